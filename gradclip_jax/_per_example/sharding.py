"""Mesh axes: along which the batch varies, and what `vmap` needs to know of explicit ones."""

import contextlib
import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from .._devices import axis_names, axis_size, manual_axes, varying_axes, vma_checked
from .._leaves import path_name


class BatchAxes(NamedTuple):
    """Mesh axes along which types say that the batch varies, and those to sum over."""

    varying: frozenset[str]
    summed: tuple[str, ...]


def batch_axes(params: Any, others: Any, axis_name: Any) -> BatchAxes:
    """Where types tell, the axes along which `others` vary; else those that the caller names."""
    named = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    if vma_checked():
        for path, leaf in jax.tree.leaves_with_path(params):
            if varying_axes(leaf):
                raise ValueError(
                    f"parameters must be replicated inside `shard_map`, but `{path_name(path)}` "
                    f"varies along {sorted(varying_axes(leaf))}. Under `jit` they may be split."
                )
        varying = frozenset().union(*map(varying_axes, jax.tree.leaves(others)))
        return BatchAxes(varying, tuple(sorted(varying)))
    if axis_name is None and manual_axes():
        raise ValueError(
            "`axis_name` must be given inside `pmap`, or `shard_map` with `check_vma=False`: the "
            "mesh axes along which the batch is split, or `()`."
        )
    axis_size(named)
    return BatchAxes(frozenset(), tuple(named))


def mesh_of(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which the explicit mesh of these arrays is set, if no mesh is.

    Without it jax refuses `vmap` over a dimension that is split.
    """
    leaves = jax.tree.leaves(tree)
    split = [x for x in leaves if not jax.typeof(x).sharding.mesh.empty]
    if not split or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    if any(isinstance(x, Tracer) for x in leaves):
        return jax.sharding.use_abstract_mesh(jax.typeof(split[0]).sharding.mesh)
    return jax.set_mesh(split[0].sharding.mesh)


def shards_of_axis0(x: Any) -> int:
    """Into how many parts explicit mesh axes split the first dimension."""
    sharding = jax.typeof(x).sharding
    return math.prod(sharding.mesh.shape[name] for name in axis_names(tuple(sharding.spec[:1])))


def replicate_axis0(x: jax.Array) -> jax.Array:
    """`x`, its first dimension no longer split by explicit mesh axes."""
    sharding = jax.typeof(x).sharding
    if shards_of_axis0(x) == 1:
        return x
    spec = PartitionSpec(None, *sharding.spec[1:])
    return jax.sharding.reshard(x, sharding.update(spec=spec))


def out_sharding_of(x: jax.Array, *dimensions: tuple[jax.Array, int]) -> Any:
    """The `out_sharding` of an array whose dimensions are split as these dimensions of arrays.

    The explicit mesh axes are those of `x`; None if it has none: then the compiler decides.
    """
    sharding = jax.typeof(x).sharding
    if not any(axis_names(sharding.spec)):
        return None
    entries = [jax.typeof(other).sharding.spec[dim] for other, dim in dimensions]
    return sharding.update(spec=PartitionSpec(*entries))
