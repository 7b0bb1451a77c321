"""Layers of which the gradients of examples are two factors, and what follows from the factors.

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
from .rule import column
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


Seen = tuple[jax.Array, int, Inputs]
"""Result of a call, the number of its axes along which the parameter is used again, and inputs."""


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
      layer: Its class.
      attribute: The name of its parameter.
      gradients: What the gradients of examples are.
      call: What is seen, from a way to call the layer, the layer and its argument.
    """

    layer: Any
    attribute: str
    gradients: Any
    call: Callable[..., Seen]


class Dense:
    """Gradients of a kernel [window..., inputs..., outputs...]."""

    def __init__(self, kernel: jax.Array, inputs: Sequence[Inputs], outputs: jax.Array):
        """Inputs of each call; outputs of all of them, [examples, positions, o]."""
        self.shape, self.inputs, self.outputs = kernel.shape, inputs, widen(outputs)
        self.starts = inputs[0].starts
        largest = jnp.max(self._over_starts(self.inputs, lambda x: _largest(x)[None]), axis=0)
        self.powers = _balanced(_exponents(largest), _exponents(_largest(self.outputs)))

    def _over_starts(
        self, inputs: Sequence[Inputs], function: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """A function of the patches at each start; results are joined along their first axis."""

        def at(start: Any) -> jax.Array:
            return function(widen(_met(inputs, start)))

        if not self.starts[1:]:
            return at(self.starts[0])
        results = jax.lax.map(at, jnp.asarray(self.starts))
        return results.reshape(-1, *results.shape[2:])

    def norms(self) -> jax.Array:
        """Norm of each example."""
        powers = self.powers

        def of(start: Any) -> jax.Array:
            return _gram(_scaled(widen(_met(self.inputs, start)), powers.inputs))

        first, *others = self.starts
        gram = of(first)
        if others:
            gram, _ = jax.lax.scan(lambda sums, x: (sums + of(x), None), gram, jnp.asarray(others))
        positions, width = gram.shape[-1], self.inputs[0].array.shape[-1]
        of_outputs = _gram(_scaled(self.outputs, powers.outputs))
        chain = _chain(width, positions) + len(others)
        chain += _chain(self.outputs.shape[-1], positions)
        return _norms(gram, of_outputs, powers.whole, chain)

    def summed(
        self, first: jax.Array, second: jax.Array, keep: jax.Array, limit: jax.Array
    ) -> jax.Array:
        """The sum over examples, each scaled."""
        powers, lift = self.powers, _lift(limit)
        kept = [x._replace(array=jnp.where(column(keep, x.array), x.array, 0)) for x in self.inputs]
        outputs = _factored(self.outputs, powers.outputs, powers.whole + lift, first, second, keep)

        def product(x: jax.Array) -> jax.Array:
            met = _scaled(x, powers.inputs)
            split = out_sharding_of(outputs, (met, 2), (outputs, 2))
            return jnp.einsum("nti,nto->io", met, outputs, precision=_HIGHEST, out_sharding=split)

        return _scaled(self._over_starts(kept, product).reshape(self.shape), -lift)


class Lookup:
    """Gradients of a table [rows, features]."""

    def __init__(self, table: jax.Array, inputs: Sequence[Inputs], outputs: jax.Array):
        """As for a kernel; the inputs are indices."""
        self.shape, self.outputs = table.shape, widen(outputs)
        indices = _met(inputs, ())[..., 0]
        self.rows = jnp.where(indices < 0, indices + table.shape[0], indices)
        self.whole = jnp.max(_exponents(_largest(self.outputs)), axis=1)

    def norms(self) -> jax.Array:
        """Norm of each example: an index that it has several times is one row."""
        same = self.rows[:, :, None] == self.rows[:, None, :]
        gram = _gram(_scaled(self.outputs, -self.whole[:, None]))
        chain = _chain(self.outputs.shape[-1], gram.shape[-1])
        return _norms(same.astype(gram.dtype), gram, self.whole, chain)

    def summed(
        self, first: jax.Array, second: jax.Array, keep: jax.Array, limit: jax.Array
    ) -> jax.Array:
        """The sum over examples, each scaled."""
        lift = _lift(limit)
        none = jnp.zeros_like(self.rows)
        scaled = _factored(
            self.outputs, none, jnp.zeros_like(self.whole) + lift, first, second, keep
        )
        return _scaled(jnp.zeros(self.shape, scaled.dtype).at[self.rows].add(scaled), -lift)


def pays(positions: int, size: int) -> bool:
    """Whether two matrices [positions, positions] take no more than a gradient of this size.

    Bu, Mao, Xu, *Scalable and Efficient Training of Large Convolutional Neural Networks with
    Differential Privacy*, 2022, https://arxiv.org/abs/2205.10683, section 4.
    """
    return 0 < 2 * positions**2 <= size


def kinds(nnx: Any) -> list[Kind]:
    """The layers that are known."""
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


def rows(x: jax.Array, positions: int) -> jax.Array:
    """[positions, features]: the first axes as one, and the others as one."""
    return x.reshape(math.prod(x.shape[:positions]), math.prod(x.shape[positions:]))


def _call_dense(plain: Callable[[Any], Any], layer: Any, x: jax.Array) -> Seen:
    result = plain(x)
    axes = [axis % x.ndim - x.ndim for axis in getattr(layer, "axis", (-1,))]
    inputs = jnp.moveaxis(x, axes, range(-len(axes), 0)).astype(result.dtype)
    positions = x.ndim - len(axes)
    return result, positions, Inputs(rows(inputs, positions), [()], _flat)


def _call_lookup(plain: Callable[[Any], Any], layer: Any, x: jax.Array) -> Seen:
    del layer
    return plain(x), x.ndim, Inputs(rows(x, x.ndim), [()], _flat)


def _call_convolution(plain: Callable[[Any], Any], layer: Any, x: jax.Array) -> Seen:
    """The layer hands over its input when that is padded, with what is left to pad, and strides."""
    convolve, seen = layer.conv_general_dilated, []

    def seeing(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **settings: Any) -> Any:
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
        seen.append(Inputs(padded, starts, cut))
        return result

    vars(layer)["conv_general_dilated"] = seeing
    result = plain(x)
    vars(layer)["conv_general_dilated"] = convolve
    return result, result.ndim - 1, seen[0]


def _window(x: jax.Array, start: Any, *, counts: Sequence[int], strides: Any) -> jax.Array:
    """Of inputs [examples, batch, space..., i] those from a start on, with strides."""
    for axis, (count, stride) in enumerate(zip(counts, strides, strict=True)):
        length = (count - 1) * stride + 1
        x = jax.lax.dynamic_slice_in_dim(x, start[axis], length, axis + 2)
    return _flat(x[:, :, *(slice(None, None, stride) for stride in strides)], ())


def _flat(x: jax.Array, start: Any) -> jax.Array:
    del start
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _met(inputs: Sequence[Inputs], start: Any) -> jax.Array:
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


def _chain(width: int, positions: int) -> int:
    """How many roundings a product of `_gram` has behind it at most."""
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


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=-1, initial=0)


def _exponents(x: jax.Array) -> jax.Array:
    """Exponents e with x < 2^e; that of zero is below all, and what is not finite stays so."""
    exponents = jnp.frexp(jnp.where(jnp.isfinite(x) & (x != 0), x, 1))[1]
    return jnp.where(x == 0, 2 * jnp.finfo(x.dtype).minexp, exponents)


def _scaled(x: jax.Array, exponents: jax.Array) -> jax.Array:
    """Times a power of two, in two steps of which neither is flushed to zero or overflows."""
    exponents = jnp.expand_dims(exponents, tuple(range(exponents.ndim, x.ndim)))
    least = jnp.finfo(x.dtype).minexp
    exponents = jnp.clip(exponents, 2 * least, -2 * least)
    half, one = exponents // 2, jnp.ones_like(exponents, x.dtype)
    return x * jnp.ldexp(one, half) * jnp.ldexp(one, exponents - half)


def _factored(
    x: jax.Array,
    powers: jax.Array,
    whole: jax.Array,
    first: jax.Array,
    second: jax.Array,
    keep: jax.Array,
) -> jax.Array:
    """Examples scaled by their factors; all powers of two at once, so that nothing is lost."""
    mantissas, exponents = zip(*map(jnp.frexp, (first, second)), strict=True)
    mantissa = mantissas[0] * mantissas[1]
    kept = jnp.where(column(keep, x), x, 0) * column(mantissa, x)
    return _scaled(kept, powers + (whole + exponents[0] + exponents[1])[:, None])


def _lift(limit: jax.Array) -> jax.Array:
    """Exponent by which sums are larger while they are formed, where the limit is tiny.

    Else what is flushed to zero, of parts that cancel, were not small against the limit.
    """
    return jnp.where(limit > 0, jnp.clip(-_exponents(limit), 0, 64), 0)


def _norms(inputs: Any, outputs: jax.Array, whole: jax.Array, chain: int) -> jax.Array:
    """From Gram matrices: the norm, and what rounding may take from it or add to the gradient.

    `chain` is the number of roundings in both matrices, and `whole` undoes the powers of two.
    """
    positions = outputs.shape[-1]
    unit = float(jnp.finfo(outputs.dtype).eps) / 2
    squares = jnp.sum(inputs * outputs, axis=(1, 2))
    lengths = [jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2)) for gram in (inputs, outputs)]
    most = jnp.sum(lengths[0] * lengths[1], axis=1)
    # Terms of both signs may cancel, so that what is left is rounding: of the square, and then of
    # the sum over positions. A product on TPU is off by some units, too.
    lost = unit * (chain + 2 * positions + 8)
    safe = jnp.where(squares > 0, squares, 0 * squares) + lost * most * most
    norm = safe_power(safe, 0.5) + unit * (positions + 4) * most
    # Where the sum of lengths overflows, so may the gradient, though what is left of it is small.
    return jnp.where(jnp.isfinite(_scaled(most, whole)), _scaled(norm, whole), jnp.inf)
