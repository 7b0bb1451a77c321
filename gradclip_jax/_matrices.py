"""What clips of matrices share: the last two axes of an array are those of a matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from ._devices import per_leaf, reduced_axes, vma_checked
from ._leaves import is_gradient, path_name
from ._norms import unit_norms
from ._types import AxisName


def matrix_norms(updates: Any, *, axis_name: AxisName = None) -> Any:
    """Frobenius norms of matrices, the last two axes, and norms of vectors."""

    def axes(path: str, leaf: Any) -> tuple[int, ...]:
        del path
        return tuple(range(leaf.ndim))[-2:]

    return unit_norms(updates, axes=axes, axis_name=axis_name)


def check_whole_matrices(updates: Any, axis_name: AxisName) -> None:
    """Raise when devices hold parts of matrices: singular values are those of a whole one."""
    named = jax.tree_util.tree_leaves_with_path(updates)
    checked = vma_checked()
    for (path, leaf), given in zip(named, per_leaf(axis_name, updates), strict=True):
        if not is_gradient(leaf) or jnp.ndim(leaf) < 2:
            continue
        name, rank = path_name(path), jnp.ndim(leaf)
        if axes := reduced_axes(name, leaf, given, (rank - 2, rank - 1), checked):
            raise ValueError(
                f"`updates` must hold whole matrices: those of `{name}` are split along mesh axes "
                f"{list(axes)}, and a part does not tell singular values. Gather it first "
                "(`jax.lax.all_gather`), or clip under `jit` with shardings."
            )


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of matrices, in the precision of their dtype: accelerators have a coarser default."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose of each matrix."""
    return jnp.swapaxes(x, -1, -2).conj()


def quintic(x: jax.Array, a: Any, b: Any, c: Any) -> jax.Array:
    """A s + b s^3 + c s^5 of each singular value s, in three products."""
    gram = product(x, adjoint(x))
    return scaled(x, a) + product(scaled(gram, b) + scaled(product(gram, gram), c), x)


def scaled(x: jax.Array, *numbers: Any) -> jax.Array:
    """`x`, which may be complex, times real numbers, one after the other."""
    for number in numbers:
        x = x * (number.astype(x.dtype) if isinstance(number, jax.Array) else number)
    return x


def identities(x: jax.Array) -> jax.Array:
    """An identity matrix for each square matrix in the stack `x`."""
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.broadcast_to(jnp.expand_dims(eye, tuple(range(x.ndim - 2))), x.shape)
