"""What clips of elements share: arrays for the leaves, and the largest of their ratios."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._devices import filled_like
from .._leaves import broadcast_prefix, is_gradient, widen
from .._memory import to_device
from .._norms import global_norm
from .._types import AxisName, Params, Updates


def modulus(x: Any) -> jax.Array:
    """The moduli of a leaf, on the device and in at least the precision of norms."""
    return jnp.abs(widen(to_device(x)))


def largest(tree: Any, *, axis_name: AxisName = None) -> jax.Array:
    """The largest modulus of all leaves; infinity for a NaN."""
    return global_norm(tree, order=jnp.inf, axis_name=axis_name)


def zeros_of(params: Params, like: Callable[[Any], jax.Array]) -> Any:
    """Zeros of the type of `like(leaf)` for each gradient, and None for each other leaf."""
    gradients = jax.tree.map(lambda x: x if is_gradient(x) else None, params)
    kinds = jax.eval_shape(lambda tree: jax.tree.map(like, tree), gradients)
    return jax.tree.map(_zeros_of_leaf, kinds, gradients)


def arrays_of(arrays: Any, updates: Updates) -> list[Any]:
    """The array of each leaf, None for a leaf that was not a gradient at `init`."""
    rule = "`updates` must have the structure of the params given to `init`"
    found = broadcast_prefix(arrays, updates, rule, is_leaf=lambda x: x is None)
    as_updates = jax.tree.structure(jax.tree.structure(updates).unflatten(found))
    if as_updates != jax.tree.structure(arrays):
        raise ValueError(f"{rule}: {jax.tree.structure(arrays)}, got {as_updates}.")
    return found


def _zeros_of_leaf(kind: jax.ShapeDtypeStruct, param: Any) -> jax.Array:
    # A concrete array gives its sharding, too, which a type alone may not know.
    # The state of a parameter in host memory is on the device.
    is_concrete = isinstance(param, jax.Array) and not isinstance(param, Tracer)
    if is_concrete and jax.typeof(param).memory_space != jax.memory.Space.Host:
        return jnp.zeros_like(param, kind.dtype)
    return filled_like(0.0, kind)
