"""Reduce leaves to groups and over devices: the only reduction and the only collective."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._devices import axis_size, partly_manual
from ._leaves import norm_dtype
from ._memory import in_host_memory, reduced_in_place
from ._safe import Axes, sums_of

_SMALL = 2**14  # elements of a leaf
_ROW = 64  # elements of a last axis that a kernel may reduce alone
_LONG_ROW = 2**12  # elements that a GPU still reduces by one kernel

Kernel = Callable[..., Any]
"""`(leaf or leaves, *numbers, axes) -> an array, or a tuple of arrays`: see `_safe`."""


class MeshAxes(NamedTuple):
    """Mesh axes to reduce over, and all along which the type says that a leaf varies."""

    reduced: tuple[str, ...]
    varying: tuple[str, ...]


class Shard(NamedTuple):
    """The leaves of one group that are split alike and reduced over the same mesh axes."""

    group: int
    mesh_axes: MeshAxes
    members: tuple[int, ...]


_static: Any = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which leaves are reduced together: over which of their axes, and over which mesh axes.

    Attributes:
      leaves: Arrays, the only data; all else is static.
      axes: Of each leaf the axes to reduce, which are kept with size one; None: all, not kept.
      mesh_axes: Of each leaf.
      groups: Of each group the positions of its leaves.
      is_unsharded: Whether it is known that each leaf lies in the memory of one device.
      fused: How many small leaves of one shape one kernel may read.
      barrier: Whether the reduction shares nothing with what else is computed of the leaves.
    """

    leaves: list[jax.Array]
    axes: tuple[tuple[int, ...] | None, ...] = _static()
    mesh_axes: tuple[MeshAxes, ...] = _static()
    groups: tuple[tuple[int, ...], ...] = _static()
    is_unsharded: bool = _static(default=False)
    fused: int = _static(default=16)
    barrier: bool = _static(default=False)

    @property
    def shards(self) -> list[Shard]:
        """The parts that take one number each: a group, or what differs within it in mesh axes."""
        return [
            Shard(group, split, tuple(i for i in members if self.mesh_axes[i] == split))
            for group, members in enumerate(self.groups)
            for split in sorted({self.mesh_axes[i] for i in members}) or [MeshAxes((), ())]
        ]

    def size(self, shard: Shard) -> int:
        """Number of elements of a shard on all devices."""
        here = sum(self.leaves[i].size for i in shard.members)
        return here * axis_size(shard.mesh_axes.reduced)

    def sum(self, kernel: Kernel, numbers: Sequence[Any] | None = None) -> list[jax.Array]:
        """The sum over leaves and devices for each group; `numbers` has those of each group."""
        of_shards = functools.partial(self.on_this_device, kernel, numbers=numbers)
        return self.over_devices(of_shards)

    def max(self, kernel: Kernel) -> list[jax.Array]:
        """The maximum over leaves and devices for each group."""
        of_shards = functools.partial(self.on_this_device, kernel, join=jnp.maximum)
        return self.over_devices(of_shards, jax.lax.pmax, jnp.maximum)

    def on_this_device(
        self,
        kernel: Kernel,
        shards: Sequence[Shard],
        numbers: Mapping[int, Any] | Sequence[Any] | None = None,
        join: Any = jnp.add,
    ) -> list[Any]:
        """The result of a kernel for each shard, joined over its leaves."""
        reduced = []
        for shard in shards:
            number = () if numbers is None else numbers[shard.group]
            parts = [
                self._batch(kernel, batch, number, self.axes[batch[0]])
                for batch in self._batches(shard.members)
            ]
            if not parts:  # of no leaf, what the kernel makes of no element
                parts = [kernel(jnp.zeros(0, norm_dtype()), *number, axes=None)]
            # Without the barrier XLA first adds leaves of one shape, and keeps that sum in memory
            # (17 % of the parameters of an LSTM) to reduce it.
            parts = self._apart(parts) if len(parts) > 1 else parts
            reduced.append(functools.reduce(functools.partial(jax.tree.map, join), parts))
        return reduced

    def by_rows(self, kernel: Kernel, shard: Shard) -> Any:
        """The same sums for one shard of whole leaves, in fewer kernels of a GPU.

        Each large leaf alone takes two kernels; here the second one sums the rows of all.
        """
        batches = self._batches(shard.members)
        if len(batches) < 2:
            return self.on_this_device(kernel, [shard])[0]
        parts = []
        for batch in batches:
            leaf = self.leaves[batch[0]]
            if leaf.size > _SMALL and leaf.ndim > 1 and leaf.shape[-1] >= _ROW:
                of_rows = kernel(_in_longer_rows(leaf), axes=(leaf.ndim - 1, leaf.ndim))
                parts.append(jax.tree.map(jnp.ravel, of_rows))
            else:
                parts.append(jax.tree.map(jnp.ravel, self._batch(kernel, batch, (), None)))
        joined = jax.tree.map(lambda *of_parts: jnp.concatenate(of_parts), *parts)
        return sums_of(unshared(joined))

    def over_devices(
        self,
        of_shards: Callable[[list[Shard]], list[Any]],
        collective: Any = jax.lax.psum,
        join: Any = jnp.add,
    ) -> list[Any]:
        """What `of_shards` makes, for each group, by one collective for each set of mesh axes."""
        joined: list[Any] = [None] * len(self.groups)
        shards = self.shards
        for split in dict.fromkeys(shard.mesh_axes for shard in shards):
            here = [shard for shard in shards if shard.mesh_axes == split]
            totals = of_shards(here)
            if split.reduced:
                totals = _at_once(functools.partial(collective, axis_name=split.reduced), totals)
            for shard, total in zip(here, totals, strict=True):
                known = joined[shard.group]
                joined[shard.group] = total if known is None else jax.tree.map(join, known, total)
        return joined

    def _batch(
        self, kernel: Kernel, batch: list[int], numbers: Sequence[jax.Array], axes: Axes
    ) -> Any:
        first, *others = batch
        of_these = functools.partial(kernel, axes=axes)
        if others:
            return of_these(*self._apart(([self.leaves[i] for i in batch], *numbers)))
        return reduced_in_place(of_these, *self._apart((self.leaves[first], *numbers)))

    def _batches(self, members: Sequence[int]) -> list[list[int]]:
        """Parts of `members` that one kernel reduces: single ones, or small leaves of one type."""
        batches: list[list[int]] = []
        last: dict[Any, list[int]] = {}
        for i in members:
            kind = jax.typeof(self.leaves[i])
            known = last.get(kind)
            if known is None or len(known) == self.fused or not self._may_be_fused(i):
                known = last[kind] = []
                batches.append(known)
            known.append(i)
        return batches

    def _may_be_fused(self, i: int) -> bool:
        # Vectors are replicated or sharded alike: to add them moves none to another device.
        leaf = self.leaves[i]
        is_alike = self.is_unsharded or (leaf.ndim < 2 and not in_host_memory(leaf))
        return is_alike and self.axes[i] is None and leaf.size <= _SMALL

    def _apart(self, x: Any) -> Any:
        """`x`, but what is computed of it is shared with nothing else that is computed of it.

        The squares of gradients are in the optimizer, too: XLA would keep them for it, or a
        float32 copy of bfloat16, or a factor broadcast to the shape of several leaves.
        """
        return jax.lax.optimization_barrier(x) if self.barrier else x


def _in_longer_rows(x: jax.Array) -> jax.Array:
    """A leaf of rank 2 or more, some of its rows in each matrix of a stack."""
    room = max(_LONG_ROW // x.shape[-1], 1)
    count = math.gcd(x.shape[-2], 2 ** (room.bit_length() - 1))
    return x.reshape(*x.shape[:-2], x.shape[-2] // count, count, x.shape[-1])


def unshared(tree: Any) -> Any:
    """The arrays of a tree, each computed once, and not again in each kernel that reads it."""
    # One barrier for all of them would give all of them the mesh axes of each.
    return jax.tree.map(jax.lax.optimization_barrier, tree)


def _at_once(collective: Any, trees: Sequence[Any]) -> list[Any]:
    """Apply a collective to all arrays as one vector: given a tree it would make one of each."""
    arrays, treedef = jax.tree.flatten(trees)
    if partly_manual():
        # Norms of units may be split along the other axes: as one vector they would be gathered.
        return treedef.unflatten([collective(array) for array in arrays])
    flat = jnp.concatenate([array.ravel() for array in arrays])
    ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
    parts = zip(jnp.split(collective(flat), ends), arrays, strict=True)
    return treedef.unflatten([part.reshape(array.shape) for part, array in parts])
