"""Trees that remember gradients: an array for each gradient, None for each other leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from .._leaves import is_gradient, widen


def is_none(x: Any) -> bool:
    """Whether a leaf of a memory is that of a leaf without gradient."""
    return x is None


def zeros_like(params: Any) -> Any:
    """A memory of the gradients: zeros in at least float32, sharded as the parameters are."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, jax.eval_shape(widen, x).dtype) if is_gradient(x) else None,
        params,
    )


def added(updates: Any, memory: Any) -> Any:
    """Updates plus memory, in the dtype of the memory; None where there is none."""
    return jax.tree.map(
        lambda m, x: None if m is None else jnp.asarray(x).astype(m.dtype) + m,
        memory,
        updates,
        is_leaf=is_none,
    )


def merged(gradients: Any, updates: Any) -> Any:
    """The gradients, and the other leaves of the updates as they are."""
    return jax.tree.map(lambda g, x: x if g is None else g, gradients, updates, is_leaf=is_none)


def cast_like(tree: Any, updates: Any) -> Any:
    """A tree in the dtypes of the updates."""
    return jax.tree.map(
        lambda x, like: x.astype(jnp.asarray(like).dtype) if is_gradient(x) else x, tree, updates
    )
