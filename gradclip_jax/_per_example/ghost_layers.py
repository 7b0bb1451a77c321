"""Layers for ghost clipping: norm and scaled sum from the two factors of a gradient.

The gradient of a kernel is a sum over positions t of outer products of what it is multiplied with,
x_t, and the derivatives d_t of the loss at the outputs; for a convolution x_t is a patch. The norm,
and the scaled sum over examples, follow from the factors (Bu, Wang, Zha, Karypis, *Differentially
Private Optimization on Large Model at Small Cost*, 2023, https://arxiv.org/abs/2210.00038,
section 3):

    |sum_t x_t d_t^T|^2 = sum_ts (x_t . x_s) (d_t . d_s)
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._leaves import widen
from .._safe import safe_power
from .rule import expand_like
from .sharding import out_sharding_of

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 64


class Inputs(NamedTuple):
    """What a kernel is multiplied with in a call.

    Attributes:
      array: All that is needed of the input; of one example, or with a leading axis of examples.
      starts: Where each slice of the kernel along its window begins to meet the inputs.
      window: From the array of examples and a start to what that slice meets, [examples, positions,
        i]. All of it together is the patches, which are larger than the inputs by the window.
    """

    array: Any
    starts: Sequence[Sequence[int]]
    window: Callable[[jax.Array, Any], jax.Array]


LayerCall = tuple[jax.Array, int, Inputs]
"""Result of a call, the number of its axes along which the parameter is used again, and inputs."""


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
      layer: Its class.
      attribute: The name of its parameter.
      gradients: The class of the gradients of examples.
      call: From a way to call the layer, the layer and its argument to a record of the call.
    """

    layer: Any
    attribute: str
    gradients: Any
    call: Callable[..., LayerCall]


class Dense:
    """Gradients of a kernel [window..., inputs..., outputs...]."""

    def __init__(self, kernel: jax.Array, inputs: Sequence[Inputs], outputs: jax.Array):
        """Inputs of each call; outputs of all of them, [examples, positions, o]."""
        self.shape, self.inputs, self.outputs = kernel.shape, inputs, widen(outputs)
        self.starts = inputs[0].starts
        largest = jnp.max(self._over_starts(self.inputs, lambda x: _max_modulus(x)[None]), axis=0)
        self.powers = _balanced(_exponents(largest), _exponents(_max_modulus(self.outputs)))

    def _over_starts(
        self, inputs: Sequence[Inputs], function: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """A function of the patches at each start; results are joined along their first axis."""

        def at(start: Any) -> jax.Array:
            return function(widen(_patches(inputs, start)))

        if not self.starts[1:]:
            return at(self.starts[0])
        results = jax.lax.map(at, jnp.asarray(self.starts))
        return results.reshape(-1, *results.shape[2:])

    def norms(self) -> jax.Array:
        """Norm of each example."""
        powers = self.powers

        def of(start: Any) -> jax.Array:
            return _gram(_ldexp(widen(_patches(self.inputs, start)), powers.inputs))

        first, *others = self.starts
        gram = of(first)
        if others:
            gram, _ = jax.lax.scan(lambda sums, x: (sums + of(x), None), gram, jnp.asarray(others))
        positions, width = gram.shape[-1], self.inputs[0].array.shape[-1]
        of_outputs = _gram(_ldexp(self.outputs, powers.outputs))
        roundings = _roundings_of_gram(width, positions) + len(others)
        roundings += _roundings_of_gram(self.outputs.shape[-1], positions)
        return _norms_from_grams(gram, of_outputs, powers.whole, roundings)

    def scaled_sum(
        self, scale: jax.Array, power: jax.Array, keep: jax.Array, limit: jax.Array
    ) -> jax.Array:
        """The sum over examples, each scaled."""
        powers, lift = self.powers, _lift(limit)
        kept = [
            x._replace(array=jnp.where(expand_like(keep, x.array), x.array, 0)) for x in self.inputs
        ]
        outputs = _scaled_outputs(
            self.outputs, powers.outputs, powers.whole + lift, scale, power, keep
        )

        def product(x: jax.Array) -> jax.Array:
            patches = _ldexp(x, powers.inputs)
            split = out_sharding_of(outputs, (patches, 2), (outputs, 2))
            return jnp.einsum(
                "nti,nto->io", patches, outputs, precision=_HIGHEST, out_sharding=split
            )

        return _ldexp(self._over_starts(kept, product).reshape(self.shape), -lift)


class Lookup:
    """Gradients of a table [rows, features]."""

    def __init__(self, table: jax.Array, inputs: Sequence[Inputs], outputs: jax.Array):
        """As for a kernel; the inputs are indices."""
        self.shape, self.outputs = table.shape, widen(outputs)
        indices = _patches(inputs, ())[..., 0]
        self.rows = jnp.where(indices < 0, indices + table.shape[0], indices)
        self.whole = jnp.max(_exponents(_max_modulus(self.outputs)), axis=1)

    def norms(self) -> jax.Array:
        """Norm of each example: positions with the same index belong to one row of the table."""
        same = self.rows[:, :, None] == self.rows[:, None, :]
        gram = _gram(_ldexp(self.outputs, -self.whole[:, None]))
        roundings = _roundings_of_gram(self.outputs.shape[-1], gram.shape[-1])
        return _norms_from_grams(same.astype(gram.dtype), gram, self.whole, roundings)

    def scaled_sum(
        self, scale: jax.Array, power: jax.Array, keep: jax.Array, limit: jax.Array
    ) -> jax.Array:
        """The sum over examples, each scaled."""
        lift = _lift(limit)
        none = jnp.zeros_like(self.rows)
        scaled = _scaled_outputs(
            self.outputs, none, jnp.zeros_like(self.whole) + lift, scale, power, keep
        )
        return _ldexp(jnp.zeros(self.shape, scaled.dtype).at[self.rows].add(scaled), -lift)


def pays(positions: int, size: int) -> bool:
    """Whether two matrices [positions, positions] take no more than a gradient of this size.

    Bu, Mao, Xu, *Scalable and Efficient Training of Large Convolutional Neural Networks with
    Differential Privacy*, 2022, https://arxiv.org/abs/2205.10683, section 4.
    """
    return 0 < 2 * positions**2 <= size


def kinds(nnx: Any) -> list[Kind]:
    """The layers that ghost clipping knows."""
    return [
        Kind(nnx.Linear, "kernel", Dense, _call_dense),
        Kind(nnx.LinearGeneral, "kernel", Dense, _call_dense),
        Kind(nnx.Conv, "kernel", Dense, _call_convolution),
        Kind(nnx.Embed, "embedding", Lookup, _call_lookup),
    ]


def is_plain(nnx: Any, layer: Any) -> bool:
    """Whether its output is a plain product, convolution or row of its own parameter."""
    plain = {
        "dot_general_cls": None,
        "conv_general_dilated": jax.lax.conv_general_dilated,
        "promote_dtype": nnx.nn.dtypes.promote_dtype,
        "mask": None,
    }
    return (
        all(getattr(layer, name, known) is known for name, known in plain.items())
        and getattr(layer, "dot_general", None) in (None, jax.lax.dot_general)
        and not getattr(layer, "batch_axis", None)
        and getattr(layer, "feature_group_count", 1) == 1
        and getattr(layer, "num_embeddings", 2) > 1
    )


def as_matrix(x: jax.Array, positions: int) -> jax.Array:
    """[positions, features]: the first axes as one, and the others as one."""
    return x.reshape(math.prod(x.shape[:positions]), math.prod(x.shape[positions:]))


def _call_dense(plain: Callable[[Any], Any], layer: Any, x: jax.Array) -> LayerCall:
    result = plain(x)
    axes = [axis % x.ndim - x.ndim for axis in getattr(layer, "axis", (-1,))]
    inputs = jnp.moveaxis(x, axes, range(-len(axes), 0)).astype(result.dtype)
    positions = x.ndim - len(axes)
    return result, positions, Inputs(as_matrix(inputs, positions), [()], _flat)


def _call_lookup(plain: Callable[[Any], Any], layer: Any, x: jax.Array) -> LayerCall:
    del layer
    return plain(x), x.ndim, Inputs(as_matrix(x, x.ndim), [()], _flat)


def _call_convolution(plain: Callable[[Any], Any], layer: Any, x: jax.Array) -> LayerCall:
    """Call the layer, and record its input as it is convolved: padded, with window and strides."""
    convolve, recorded = layer.conv_general_dilated, []

    def record(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **settings: Any) -> Any:
        lhs, rhs = settings["lhs_dilation"], settings["rhs_dilation"]
        window = kernel.shape[:-2]
        if isinstance(padding, str):
            reach = [(k - 1) * d + 1 for k, d in zip(window, rhs, strict=True)]
            padding = jax.lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
        inner = [(low, high, d - 1) for (low, high), d in zip(padding, lhs, strict=True)]
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])
        result = convolve(x, kernel, strides, padding, **settings)
        offsets = itertools.product(*map(range, window))
        starts = [[i * d for i, d in zip(offset, rhs, strict=True)] for offset in offsets]
        cut = functools.partial(_window, counts=result.shape[1:-1], strides=strides)
        recorded.append(Inputs(padded, starts, cut))
        return result

    vars(layer)["conv_general_dilated"] = record
    result = plain(x)
    vars(layer)["conv_general_dilated"] = convolve
    return result, result.ndim - 1, recorded[0]


def _window(x: jax.Array, start: Any, *, counts: Sequence[int], strides: Any) -> jax.Array:
    """Of inputs [examples, batch, space..., i] those from a start on, with strides."""
    for axis, (count, stride) in enumerate(zip(counts, strides, strict=True)):
        length = (count - 1) * stride + 1
        x = jax.lax.dynamic_slice_in_dim(x, start[axis], length, axis + 2)
    return _flat(x[:, :, *(slice(None, None, stride) for stride in strides)], ())


def _flat(x: jax.Array, start: Any) -> jax.Array:
    del start
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _patches(inputs: Sequence[Inputs], start: Any) -> jax.Array:
    return jnp.concatenate([x.window(x.array, start) for x in inputs], axis=1)


def _gram(x: jax.Array) -> jax.Array:
    """Products of all pairs of positions, added up in blocks.

    One sum of 16,384 equal products is off by 435 half units in the last place on a CPU.
    """
    positions, width = x.shape[1:]
    block = max(_BLOCK, positions)  # the products of all blocks are no larger than x
    if width <= block:
        return jnp.einsum("nti,nsi->nts", x, x, precision=_HIGHEST)
    blocks = -(-width // block)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, blocks * block - width)])
    x = x.reshape(*x.shape[:2], blocks, block)
    grams = jnp.einsum("ntbi,nsbi->nbts", x, x, precision=_HIGHEST)
    return jnp.sum(jax.lax.optimization_barrier(grams), axis=1)  # else XLA sums as one row again


def _roundings_of_gram(width: int, positions: int) -> int:
    """How many roundings a product of `_gram` has at most."""
    block = min(width, max(_BLOCK, positions))
    return block + -(-width // max(block, 1))


class _Powers(NamedTuple):
    """Exponents of powers of two that bring a product of inputs and outputs near 1.

    Attributes:
      inputs: For each position, [examples, positions].
      outputs: The same.
      whole: What undoes both: at each position the sum of the three is 0.
    """

    inputs: jax.Array
    outputs: jax.Array
    whole: jax.Array


def _balanced(inputs: jax.Array, outputs: jax.Array) -> _Powers:
    """From the exponents of the largest elements at each position.

    The factors of a position become equally large, and those of the largest product near 1. Else a
    product in one Gram matrix may leave the range before one in the other would undo that.
    """
    both = inputs + outputs
    whole = jnp.max(both, axis=1)
    of_inputs = (both - whole[:, None]) // 2 - inputs
    return _Powers(of_inputs, -whole[:, None] - of_inputs, whole)


def _max_modulus(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=-1, initial=0)


def _exponents(x: jax.Array) -> jax.Array:
    """Exponents e with x < 2^e; below all others for zero, 1 for infinity and NaN."""
    exponents = jnp.frexp(jnp.where(jnp.isfinite(x) & (x != 0), x, 1))[1]
    return jnp.where(x == 0, 2 * jnp.finfo(x.dtype).minexp, exponents)


def _ldexp(x: jax.Array, exponents: jax.Array) -> jax.Array:
    """`x` times a power of two, in two steps so that neither is flushed to zero or overflows."""
    exponents = jnp.expand_dims(exponents, tuple(range(exponents.ndim, x.ndim)))
    smallest = jnp.finfo(x.dtype).minexp
    exponents = jnp.clip(exponents, 2 * smallest, -2 * smallest)
    half, one = exponents // 2, jnp.ones_like(exponents, x.dtype)
    return x * jnp.ldexp(one, half) * jnp.ldexp(one, exponents - half)


def _scaled_outputs(
    x: jax.Array,
    powers: jax.Array,
    whole: jax.Array,
    scale: jax.Array,
    power: jax.Array,
    keep: jax.Array,
) -> jax.Array:
    """Outputs scaled by the factors of examples, all powers of two at once: none overflows."""
    mantissas, exponents = zip(*map(jnp.frexp, (scale, power)), strict=True)
    mantissa = mantissas[0] * mantissas[1]
    kept = jnp.where(expand_like(keep, x), x, 0) * expand_like(mantissa, x)
    return _ldexp(kept, powers + (whole + exponents[0] + exponents[1])[:, None])


def _lift(limit: jax.Array) -> jax.Array:
    """Exponent by which sums are scaled up while they are formed, where the limit is tiny.

    Else, where large parts cancel, what is flushed to zero could matter at this limit.
    """
    return jnp.where(limit > 0, jnp.clip(-_exponents(limit), 0, 64), 0)


def _norms_from_grams(
    inputs: Any, outputs: jax.Array, whole: jax.Array, roundings: int
) -> jax.Array:
    """The norm from two Gram matrices, plus what rounding may take from it or add to the gradient.

    `roundings` is their number in both matrices, and `whole` undoes the powers of two.
    """
    positions = outputs.shape[-1]
    unit = float(jnp.finfo(outputs.dtype).eps) / 2
    squares = jnp.sum(inputs * outputs, axis=(1, 2))
    lengths = [jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2)) for gram in (inputs, outputs)]
    bound = jnp.sum(lengths[0] * lengths[1], axis=1)  # S: the norm is at most this
    # Where terms of both signs cancel, only rounding is left: of the square, and then of the sum
    # over positions. A product on TPU is off by some units, too.
    lost = unit * (roundings + 2 * positions + 8)
    safe = jnp.where(squares > 0, squares, 0 * squares) + lost * bound * bound
    norm = safe_power(safe, 0.5) + unit * (positions + 4) * bound
    # Where the bound overflows, so may partial sums of the gradient, even if terms cancel.
    return jnp.where(jnp.isfinite(_ldexp(bound, whole)), _ldexp(norm, whole), jnp.inf)
