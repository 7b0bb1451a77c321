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

from .._devices import split_as
from .._norms import inverse_power_of_two, safe_power, widen
from .rule import column

_HIGHEST = jax.lax.Precision.HIGHEST
_ROUNDING = 2.0**-20


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

    def norms(self) -> jax.Array:
        """Norm of each example."""
        units, undo = _near_one([x.array for x in self.inputs])
        inputs = [x._replace(array=y) for x, y in zip(self.inputs, units, strict=True)]
        (outputs,), undo_outputs = _near_one([self.outputs])

        def add(gram: jax.Array, start: Any) -> tuple[jax.Array, None]:
            return gram + _gram(_met(inputs, start)), None

        first, *others = inputs[0].starts
        gram = _gram(_met(inputs, first))
        if others:
            gram, _ = jax.lax.scan(add, gram, jnp.asarray(others))
        # One of each in turn: what is huge may undo what is tiny.
        pairs = zip(undo, undo_outputs, strict=True)
        return _norms(gram, _gram(outputs), list(itertools.chain.from_iterable(pairs)))

    def summed(self, first: jax.Array, second: jax.Array, keep: jax.Array) -> jax.Array:
        """The sum over examples, each scaled."""
        kept = [x._replace(array=jnp.where(column(keep, x.array), x.array, 0)) for x in self.inputs]
        scaled = _scaled(self.outputs, first, second, keep)

        def product(start: Any) -> jax.Array:
            met = widen(_met(kept, start))
            split = split_as(scaled, (met, 2), (scaled, 2))
            return jnp.einsum("nti,nto->io", met, scaled, precision=_HIGHEST, out_sharding=split)

        starts = self.inputs[0].starts
        total = jax.lax.map(product, jnp.asarray(starts)) if starts[1:] else product(starts[0])
        return total.reshape(self.shape)


class Lookup:
    """Gradients of a table [rows, features]."""

    def __init__(self, table: jax.Array, inputs: Sequence[Inputs], outputs: jax.Array):
        """As for a kernel; the inputs are indices."""
        self.shape, self.outputs = table.shape, widen(outputs)
        indices = _met(inputs, ())[..., 0]
        self.rows = jnp.where(indices < 0, indices + table.shape[0], indices)

    def norms(self) -> jax.Array:
        """Norm of each example: an index that it has several times is one row."""
        same = self.rows[:, :, None] == self.rows[:, None, :]
        (outputs,), undo = _near_one([self.outputs])
        return _norms(same.astype(outputs.dtype), _gram(outputs), undo)

    def summed(self, first: jax.Array, second: jax.Array, keep: jax.Array) -> jax.Array:
        """The sum over examples, each scaled."""
        scaled = _scaled(self.outputs, first, second, keep)
        return jnp.zeros(self.shape, scaled.dtype).at[self.rows].add(scaled)


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
    return jnp.einsum("nti,nsi->nts", x, x, precision=_HIGHEST)


def _near_one(arrays: Sequence[jax.Array]) -> tuple[list[jax.Array], Sequence[jax.Array]]:
    """In at least float32, each example by a power of two, and numbers that undo it.

    So that the squares of what is huge or tiny stay in range.
    """
    wide = [widen(x) for x in arrays]
    largest = [jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0) for x in wide]
    # A maximum may lose NaN; the array keeps it.
    down = inverse_power_of_two(functools.reduce(jnp.maximum, largest))
    scaled = [x * column(down[0], x) * column(down[1], x) for x in wide]
    return scaled, [1 / factor for factor in down]


def _norms(inputs: Any, outputs: jax.Array, undo: Sequence[jax.Array]) -> jax.Array:
    """From Gram matrices: the root of the sum of products, and what rounding may take from it.

    The product of the norms and the numbers of `undo` is what was before `_near_one`.
    """
    squares = jnp.sum(inputs * outputs, axis=(1, 2))
    lengths = [jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2)) for gram in (inputs, outputs)]
    most = jnp.sum(lengths[0] * lengths[1], axis=1)
    # Terms of both signs may cancel, so that what is left is rounding.
    safe = jnp.where(squares > 0, squares, 0 * squares) + _ROUNDING * most * most
    return functools.reduce(jnp.multiply, undo, safe_power(safe, 0.5))


def _scaled(x: jax.Array, first: jax.Array, second: jax.Array, keep: jax.Array) -> jax.Array:
    kept = jnp.where(column(keep, x), x, 0)
    return kept * column(second, x) * column(first, x)
