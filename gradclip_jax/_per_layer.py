"""The norm of every array, or of every layer of a stack, next to what a clip measures of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ._checks import takes
from ._devices import per_leaf
from ._leaves import GroupNorms, is_gradient, leaf_labels, stacked_scalars
from ._measures import gives_norms, unbound
from ._norms import global_norm, group_norms, leaf_norms, unit_norms
from ._types import AxisName

PerLayer = bool | Callable[[str, Any], int | None]
"""Whether to keep the norms of arrays; or a function `(path, leaf) -> axis` that says along which
axis an array stacks layers, None for one that does not."""


def check_per_layer(per_layer: PerLayer, measure: Callable[..., Any]) -> None:
    """Raise where norms of layers are asked for that the measure cannot be taken of."""
    if not isinstance(per_layer, bool) and not (callable(per_layer) and takes(per_layer, "", None)):
        raise ValueError(
            "`per_layer` must be True, False, or a function `(path, leaf) -> axis or None`, got "
            f"{per_layer!r}."
        )
    function, keywords = unbound(measure)
    of_arrays = any(function is each for each in (global_norm, leaf_norms, group_norms))
    if per_layer is not False and not (of_arrays and gives_norms(measure)):
        bound = "".join(f", {name}={value!r}" for name, value in keywords.items())
        raise ValueError(
            "`per_layer` must be False unless the clip measures 2-norms of whole arrays "
            "(`global_norm`, `leaf_norms` or `group_norms` with `order=2`), got the measure "
            f"{getattr(function, '__name__', repr(function))}{bound}. To measure them all the "
            "same, chain `clip_by_global_norm(None, per_layer=True)`, which clips nothing, before "
            "it."
        )


def keeps_layers(per_layer: PerLayer, measure: Callable[..., Any]) -> bool:
    """Whether the state has to keep them: the norms of `leaf_norms` are those of arrays already."""
    return callable(per_layer) or (per_layer and unbound(measure)[0] is not leaf_norms)


def norms_of_layers(
    measure: Callable[..., Any], per_layer: PerLayer, updates: Any, *, axis_name: AxisName
) -> tuple[Any, Any]:
    """What a measure gives, and the norms of arrays or layers that it was taken of.

    The updates are read once, for the norms of their layers: a norm is the norm of those.
    """
    function, keywords = unbound(measure)
    layer_axes: list[int | None] = []

    def axes(path: str, leaf: Any) -> tuple[int, ...]:
        axis = None if per_layer is True else _layer_axis(per_layer, path, leaf)
        layer_axes.append(axis)
        return tuple(i for i in range(leaf.ndim) if i != axis)

    if per_layer is True:
        measured = leaf_norms(updates, axis_name=axis_name)
    else:
        measured = unit_norms(updates, axes=axes, axis_name=axis_name)
    flat, treedef = jax.tree.flatten(measured)
    layer_axes = layer_axes or [None] * len(flat)
    counted = [i for i, leaf in enumerate(jax.tree.leaves(updates)) if is_gradient(leaf)]
    given = per_leaf(axis_name, updates)
    mesh_axes = [_entry(given[i], axis) for i, axis in zip(counted, layer_axes, strict=True)]
    of_leaf: tuple[Any, ...] = tuple(range(len(given)))
    if function is group_norms:
        of_leaf = leaf_labels(keywords["labels"], updates)
    layers, norms = _of_layers(
        flat,
        layer_axes=tuple(layer_axes),
        mesh_axes=tuple(mesh_axes),
        labels=None if function is global_norm else tuple(of_leaf[i] for i in counted),
    )
    if function is leaf_norms:
        norms = treedef.unflatten([norms[i] for i in counted])
    elif function is group_norms:
        norms = GroupNorms(norms, labels=of_leaf)
    return norms, treedef.unflatten(layers)


def joint_norm(norms: Sequence[jax.Array], mesh_axes: Sequence[Any]) -> jax.Array:
    """The norm of norms; of each array of them the mesh axes along which devices split it."""
    if len(norms) == 1 and norms[0].ndim == 0:
        return norms[0]
    if not any(mesh_axes):
        return global_norm(stacked_scalars(norms), axis_name=())
    return global_norm(norms, axis_name=_specs(mesh_axes))


def _layer_axis(axis_of: Any, path: str, leaf: Any) -> int | None:
    axis = axis_of(path, leaf)
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int) or not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"`per_layer` must return an axis of the array or None, got {axis!r} for `{path}` of "
            f"shape {leaf.shape}."
        )
    return axis % leaf.ndim


def _entry(given: Any, axis: int | None) -> Any:
    """The mesh axes along which a PartitionSpec splits the layers of an array."""
    if axis is None or not isinstance(given, PartitionSpec) or axis >= len(given):
        return None
    return given[axis]


def _specs(mesh_axes: Sequence[Any]) -> list[PartitionSpec]:
    return [PartitionSpec(entry or None) for entry in mesh_axes]


# Called eagerly this is one cached program for each tree structure; inside a trace it inlines.
@functools.partial(jax.jit, static_argnames=("layer_axes", "mesh_axes", "labels"), inline=True)
def _of_layers(
    norms: list[jax.Array],
    *,
    layer_axes: tuple[int | None, ...],
    mesh_axes: tuple[Any, ...],
    labels: tuple[Any, ...] | None,
) -> tuple[list[jax.Array], Any]:
    """Norms without the axes that were reduced, and the norm of all or of each label."""
    layers = [
        jnp.squeeze(norm, tuple(i for i in range(norm.ndim) if i != axis))
        for norm, axis in zip(norms, layer_axes, strict=True)
    ]
    if labels is None:
        return layers, joint_norm(layers, mesh_axes)
    axis_name = _specs(mesh_axes) if any(mesh_axes) else ()
    return layers, dict(group_norms(layers, labels=list(labels), axis_name=axis_name))
