"""The four measures: a pytree to norms.

Every measure returns norms whose tree is a prefix of the tree it measured, so the code above
never asks at which granularity it works.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._devices import (
    axis_size,
    is_unsharded,
    per_leaf,
    reduced_axes,
    varying_axes,
    vma_checked,
    whole_shape,
)
from ._leaves import GroupNorms, is_gradient, leaf_labels, path_name
from ._platforms import norms_of_groups, with_finite_derivative
from ._reduce import MeshAxes, Plan
from ._safe import SafeRange, norm_from_sum, sum_of_squares
from ._types import AxisName

Axes = int | tuple[int, ...] | Callable[[str, Any], int | tuple[int, ...] | None] | None
"""Axes that one unit spans: see `unit_norms`."""


def global_norm(tree: Any, *, order: float = 2, axis_name: AxisName = None) -> jax.Array:
    r"""Norm of all leaves together, as if they were one long vector.

    $$ \lVert g \rVert_p = \Big( \sum_{\ell} \sum_i |g_{\ell i}|^p \Big)^{1/p} $$

    Args:
      tree: Pytree of arrays of any shape and of any float or complex dtype. Other leaves
        (integers, booleans, PRNG keys, float0) and None are not counted.
      order: Order p of the norm, at least 1; `inf` for the largest modulus.
      axis_name: Needed only inside `pmap`, or `shard_map` with `check_vma=False`: a mesh axis or
        axes along which every leaf is split, or a prefix pytree of PartitionSpecs.

    Returns:
      A scalar in float32 (float64 under x64). Finite as long as the norm itself is below the
      largest float32, also where squares overflow; not zero as long as any element is normal.

    Raises:
      ValueError: For an order below 1, an axis that is not bound, or a missing `axis_name`.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import global_norm
    >>> float(global_norm({"w": jnp.array([3.0]), "b": jnp.array([4e30])}) / 4e30)
    1.0
    """
    measured = _flatten(tree, axis_name)
    everything = tuple(range(len(measured.leaves)))
    (norm,) = _measure(measured, dims=None, groups=(everything,), order=order)
    return norm


def leaf_norms(tree: Any, *, order: float = 2, axis_name: AxisName = None) -> Any:
    """Norm of each array: the tree with a scalar for each leaf.

    Takes the arguments of `global_norm`. Leaves that are not counted have None for a norm.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import leaf_norms
    >>> norms = leaf_norms({"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)})
    >>> float(norms["w"]), float(norms["b"])
    (5.0, 0.0)
    """
    measured = _flatten(tree, axis_name)
    each = tuple((i,) for i in range(len(measured.leaves)))
    return measured.unflatten(_measure(measured, dims=None, groups=each, order=order))


def unit_norms(
    tree: Any, *, axes: Axes = None, order: float = 2, axis_name: AxisName = None
) -> Any:
    """Norm of each unit: of the weights that lead into one output, say.

    Args:
      tree: As in `global_norm`.
      axes: The axes that one unit spans. By default all axes but the last (the inputs of a
        `Dense` kernel of shape (inputs, outputs)), and a vector or scalar is one unit. Or an int,
        or a tuple of ints (an axis that a leaf does not have is left out, so `(0, 1)` serves
        kernels and biases), or a callable of path (`"encoder/kernel"`) and leaf (its shape over
        all devices, and its dtype) that returns either, or None for the default. For layers
        stacked by `scan` over axis 0, `axes=1` keeps the layers apart.
      order: As in `global_norm`.
      axis_name: As in `global_norm`; leaves that are split inside `shard_map` need the
        PartitionSpecs, because only they say which dimension is split.

    Returns:
      The tree with, for each leaf, its norms in an array of the same rank: the axes that a unit
      spans have size one.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import unit_norms
    >>> print(unit_norms(jnp.array([[3.0, 0.0], [4.0, 1.0]])))
    [[5. 1.]]
    """
    measured = _flatten(tree, axis_name)
    each = tuple((i,) for i in range(len(measured.leaves)))
    return measured.unflatten(
        _measure(measured, dims=_dims(measured, axes), groups=each, order=order)
    )


def group_norms(
    tree: Any, *, labels: Any, order: float = 2, axis_name: AxisName = None
) -> "GroupNorms":
    """Norm of each group of leaves that share a label.

    Args:
      tree: As in `global_norm`.
      labels: A prefix pytree of labels (strings or numbers), or a callable that makes one from
        the tree, as in `optax.partition`. A module of labels is taken for a pytree, though it can
        be called. For parameters of flax NNX map over `nnx.as_pure(nnx.state(model, nnx.Param))`.
      order: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A dict with one scalar for each label.

    Raises:
      ValueError: When the labels do not cover the tree.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import group_norms
    >>> grads = {"a": jnp.array(3.0), "b": jnp.array(4.0), "c": jnp.array(1.0)}
    >>> norms = group_norms(grads, labels={"a": "body", "b": "body", "c": "head"})
    >>> float(norms["body"]), float(norms["head"])
    (5.0, 1.0)
    """
    measured = _flatten(tree, axis_name)
    of_leaf = leaf_labels(labels, tree)
    pairs = zip(of_leaf, measured.positions, strict=True)
    counted = [label for label, position in pairs if position is not None]
    names = sorted(set(counted), key=str)
    groups = tuple(tuple(i for i, label in enumerate(counted) if label == name) for name in names)
    norms = _measure(measured, dims=None, groups=groups, order=order)
    return GroupNorms(zip(names, norms, strict=True), labels=of_leaf)


def leaf_sizes(tree: Any, *, axis_name: AxisName = None) -> Any:
    """Number of elements of each leaf that `leaf_norms` counts, over all devices that hold it."""
    measured = _flatten(tree, axis_name)
    return _sizes(measured, (None,) * len(measured.leaves))


def of_blocks(axes: Axes) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The norm and the size of each array or, with `axes`, of each block that spans them.

    Axes as in `unit_norms`, but an array for which they name none is one block.
    """
    if axes is None:
        return leaf_norms, leaf_sizes

    def of_leaf(path: str, leaf: Any) -> Any:
        every = tuple(range(leaf.ndim))
        if callable(axes):
            chosen = axes(path, leaf)
            return every if chosen is None else chosen
        given: tuple[Any, ...] = (axes,) if isinstance(axes, int) else tuple(axes)
        if not all(isinstance(axis, int) for axis in given):
            return given  # `_unit_dims` says what is wrong with it
        return tuple(axis for axis in given if -leaf.ndim <= axis < leaf.ndim) or every

    def sizes(tree: Any, *, axis_name: AxisName = None) -> Any:
        measured = _flatten(tree, axis_name)
        return _sizes(measured, _dims(measured, of_leaf))

    return functools.partial(unit_norms, axes=of_leaf), sizes


class _Measured(NamedTuple):
    """The leaves of a tree that count, what is known of each, and the way back."""

    leaves: list[jax.Array]
    paths: list[str]
    given: list[Any]
    positions: list[int | None]
    treedef: Any

    def unflatten(self, norms: Sequence[Any]) -> Any:
        return self.treedef.unflatten([None if i is None else norms[i] for i in self.positions])


def _flatten(tree: Any, axis_name: AxisName) -> _Measured:
    named, treedef = jax.tree_util.tree_flatten_with_path(tree)
    measured = _Measured([], [], [], [], treedef)
    for (path, leaf), given in zip(named, per_leaf(axis_name, tree), strict=True):
        counts = is_gradient(leaf)
        measured.positions.append(len(measured.leaves) if counts else None)
        if counts:
            measured.leaves.append(leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf))
            measured.paths.append(path_name(path))
            measured.given.append(given)
    return measured


def _dims(measured: _Measured, axes: Axes) -> tuple[tuple[int, ...], ...]:
    """Of each leaf the axes that one unit spans."""
    of_leaf = zip(measured.paths, measured.leaves, measured.given, strict=True)
    return tuple(
        _unit_dims(axes, path, jax.ShapeDtypeStruct(whole_shape(leaf, given), leaf.dtype))
        for path, leaf, given in of_leaf
    )


def _sizes(measured: _Measured, dims: Sequence[tuple[int, ...] | None]) -> Any:
    """Number of elements of each leaf along these axes (None: all), over all devices."""
    checked = vma_checked()
    of_leaf = zip(measured.paths, measured.leaves, measured.given, dims, strict=True)
    return measured.unflatten(
        [
            (leaf.size if over is None else math.prod(leaf.shape[i] for i in over))
            * axis_size(reduced_axes(path, leaf, given, over, checked))
            for path, leaf, given, over in of_leaf
        ]
    )


def _unit_dims(axes: Axes, path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    rank = leaf.ndim
    is_chosen = callable(axes)  # for this very leaf
    if callable(axes):
        axes = axes(path, leaf)
    if axes is None:
        return tuple(range(rank - 1)) if rank > 1 else tuple(range(rank))
    given: tuple[Any, ...] = (axes,) if isinstance(axes, int) else tuple(axes)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in given):
        raise ValueError(f"`axes` must be an int or a tuple of ints, got {axes!r}.")
    missing = [axis for axis in given if not -rank <= axis < rank]
    if is_chosen and missing:
        where = f" (`{path}`)" if path else ""
        raise ValueError(
            f"`axes` names axis {missing[0]} of a leaf of rank {rank}{where}, got {axes!r}: return "
            "axes that the leaf has, or None for all but the last."
        )
    return tuple(sorted({axis % rank for axis in given if axis not in missing}))


def check_order(order: Any) -> float:
    """Return `order` when it is a Python number of at least 1, the order of a norm."""
    if isinstance(order, bool) or not isinstance(order, int | float) or not order >= 1:
        raise ValueError(
            "`order` must be a Python number of at least 1 (`inf` for the largest modulus), "
            f"got {order!r}."
        )
    return float(order)


def _measure(
    measured: _Measured,
    *,
    dims: tuple[tuple[int, ...], ...] | None,
    groups: tuple[tuple[int, ...], ...],
    order: float,
) -> list[jax.Array]:
    """Norms of groups of leaves; with `dims`, of each leaf over these axes, which are kept."""
    order = check_order(order)
    axes = (None,) * len(measured.leaves) if dims is None else dims
    checked = vma_checked()
    of_leaf = zip(measured.paths, measured.leaves, measured.given, axes, strict=True)
    mesh_axes = tuple(
        MeshAxes(reduced_axes(path, leaf, given, over, checked), tuple(sorted(varying_axes(leaf))))
        for path, leaf, given, over in of_leaf
    )
    plan = Plan(
        measured.leaves, axes, mesh_axes, groups, is_unsharded=is_unsharded(measured.leaves)
    )
    return norms_of_groups(plan, order=order)


def norms_of_examples(x: jax.Array) -> jax.Array:
    """The norm of each `x[i]`, [examples].

    Summed twice: first plainly, then at the scale that the plain sum asks for. A `cond` around the
    second pass would make devices that hold examples agree on it, and would hold a copy.
    """

    def norms(leaves: Sequence[jax.Array]) -> jax.Array:
        (x,) = leaves
        squares = functools.partial(sum_of_squares, axes=tuple(range(1, x.ndim)))
        plain = squares(x)
        scale = SafeRange(plain.dtype).scale(plain, math.prod(x.shape[1:]))
        return norm_from_sum(squares(x, scale), scale).ravel()

    return with_finite_derivative(norms, norms, [x])
