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
from ._leaves import norm_dtype, scalar_rows, stacked_scalars, unstacked_scalars
from ._memory import changed_in_place, in_host_memory, reduced_in_place
from ._safe import (
    Axes,
    SafeRange,
    finite_or_zero,
    largest_modulus,
    largest_modulus_on_cpu,
    norm_from_bins,
    norm_from_sum,
    powers_near,
    safe_power,
    sum_of_moduli,
    sum_of_powers,
    sum_of_squares,
    sums_of,
    three_sums_of_squares,
)

_SMALL = 2**14  # elements of a leaf
_ROW = 64  # elements of a last axis that a kernel may reduce alone
_LONG_ROW = 2**12  # elements that a GPU still reduces by one kernel
_FUSED_ON_GPU = 64  # small leaves of one shape that one kernel reads

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
        return self.over_devices(of_shards, jax.lax.psum, jnp.add)

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
        empty: Any = 0.0,
    ) -> list[Any]:
        """The result of a kernel for each shard, joined over its leaves: `empty` if it has none."""
        empty = jax.tree.map(lambda number: jnp.asarray(number, norm_dtype()), empty)
        reduced = []
        for shard in shards:
            number = () if numbers is None else numbers[shard.group]
            parts = [
                self._batch(kernel, batch, number, self.axes[batch[0]])
                for batch in self._batches(shard.members)
            ]
            # Else XLA adds arrays of one shape and keeps their sum, to reduce that.
            parts = self._apart(parts) if len(parts) > 1 else parts
            joined = functools.reduce(functools.partial(jax.tree.map, join), parts or [empty])
            reduced.append(joined)
        return reduced

    def by_rows(self, kernel: Kernel, shard: Shard) -> Any:
        """The same sums for one shard of whole leaves, in fewer kernels of a GPU.

        Each large leaf alone takes two kernels; here the second one sums the rows of all.
        """
        batches = self._batches(shard.members)
        if len(batches) < 2:
            return self.on_this_device(kernel, [shard], empty=(0.0,) * 3)[0]
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
        self, of_shards: Callable[[list[Shard]], list[Any]], collective: Any, join: Any
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


# Called eagerly this is one cached program for each tree structure; inside a trace it inlines.
@functools.partial(jax.jit, static_argnames="order", inline=True)
def norms_of_groups(plan: Plan, *, order: float) -> list[jax.Array]:
    """The norm of each group of a plan, by the way that is fastest on the platform."""

    def measure(leaves):
        here = dataclasses.replace(plan, leaves=leaves)
        shared = dataclasses.replace(here, barrier=True)
        if order != 2:
            return jax.lax.platform_dependent(
                cpu=lambda: _norms(shared, order, largest_modulus_on_cpu),
                default=lambda: _norms(here, order),
            )
        if any(in_host_memory(leaf) for leaf in leaves):
            return by_branch(shared)
        ways = {
            "cpu": lambda: by_branch(shared),
            "tpu": lambda: in_one_read(here, _three_sums),
        }
        if all(over is None for over in plan.axes):
            ways["default"] = lambda: in_one_read(here, _three_sums_on_gpu)
        else:
            ways |= dict.fromkeys(("cuda", "rocm"), functools.partial(in_float64, here))
            ways["default"] = lambda: in_two_reads(here)
        return jax.lax.platform_dependent(**ways)

    def differentiable(leaves):
        here = dataclasses.replace(plan, leaves=leaves)
        return in_two_reads(here) if order == 2 else _norms(here, order)

    return with_finite_derivative(measure, differentiable, plan.leaves)


def with_finite_derivative(measure: Any, differentiable: Any, leaves: Sequence[jax.Array]) -> Any:
    """`measure(leaves)`, with the derivative of `differentiable` without what is not finite.

    An update that is zeroed for a NaN passes a zero back to its norm, and zero times the NaN in
    the derivative of a square would be NaN. Only a program that differentiates computes more.
    `differentiable` has neither a branch nor a barrier: in such a rule jax (0.10 to 0.12) cannot
    transpose a branch that `vmap` has mapped, nor 0.12 a barrier with some constant operands.
    """

    def derivative(primals, tangents):
        (leaves,), (moved,) = primals, tangents
        finite = [changed_in_place(finite_or_zero, x) for x in leaves]
        return measure(leaves), jax.jvp(differentiable, (finite,), (moved,))[1]

    measured = jax.custom_jvp(measure)
    measured.defjvp(derivative)
    return measured(leaves)


def _norms(plan: Plan, order: float, largest: Kernel = largest_modulus) -> list[jax.Array]:
    match order:
        case 1:
            return plan.sum(sum_of_moduli)
        case math.inf:
            return plan.max(largest)
    norms = plan.max(largest)
    scales = [powers_near(norm) for norm in norms]
    sums = plan.sum(functools.partial(sum_of_powers, order=order), scales)
    roots = [safe_power(total, 1 / order) for total in sums]
    # Not `root / first / second`: XLA makes that `root / (first * second)`, which overflows.
    return [
        root * (1 / first) * (1 / second)
        for root, (first, second) in zip(roots, scales, strict=True)
    ]


def by_branch(plan: Plan, branch: bool = True) -> list[jax.Array]:
    """Norms of order 2 by a plain sum, and a second read only where that is not safe."""
    if not any(split.reduced for split in plan.mesh_axes) and len(plan.shards) == len(plan.groups):
        return [norm_from_sum(*of_group) for of_group in _exact_sums(plan, plan.shards, branch)]
    bins = plan.over_devices(functools.partial(_bins, plan, branch=branch), jax.lax.psum, jnp.add)
    return [norm_from_bins(of_group) for of_group in bins]


in_two_reads = functools.partial(by_branch, branch=False)


def in_float64(plan: Plan) -> list[jax.Array]:
    """Norms of order 2 by one sum in float64, in which no square of a float32 is lost.

    For norms of units: XLA would keep the operands of three sums over the first axes of a leaf.
    """
    dtype = norm_dtype()
    if dtype != jnp.float32:
        return in_two_reads(plan)
    with jax.enable_x64(True):
        sums = plan.sum(sum_of_squares)
        roots = [safe_power(row, 0.5) for row in stacked_scalars(sums)]
        return unstacked_scalars([jax.lax.convert_element_type(row, dtype) for row in roots], sums)


def in_one_read(
    plan: Plan, three_sums: Callable[[Plan, Sequence[Shard]], list[Any]]
) -> list[jax.Array]:
    """Norms of order 2 by three sums in one read, of which one is exact.

    What a branch reads is kept in memory: on TPU a float32 copy of a bfloat16 gradient, too. At a
    branch a GPU may wait for the host, and at one with a collective it always does.
    """
    sizes = [0] * len(plan.groups)
    for shard in plan.shards:
        sizes[shard.group] += plan.size(shard)
    of_shards = functools.partial(three_sums, plan)
    sums = plan.over_devices(of_shards, jax.lax.psum, jnp.add)
    plain, up, down = zip(*sums, strict=True) if sums else ((), (), ())
    counts = [jnp.full_like(of, size) for of, size in zip(plain, sizes, strict=True)]
    kinds = (plain, up, down, counts)
    rows = zip(*(stacked_scalars(of_kind, plain) for of_kind in kinds), strict=True)
    # Else each kernel that reads a norm adds the sums of all leaves again.
    return unstacked_scalars(unshared([_norm_of_three(*row) for row in rows]), plain)


def _three_sums(plan: Plan, shards: Sequence[Shard]) -> list[Any]:
    return plan.on_this_device(three_sums_of_squares, shards, empty=(0.0,) * 3)


def _three_sums_on_gpu(plan: Plan, shards: Sequence[Shard]) -> list[Any]:
    kernel = functools.partial(three_sums_of_squares, at_once=True)
    plan = dataclasses.replace(plan, fused=_FUSED_ON_GPU)
    if not plan.is_unsharded:
        return plan.on_this_device(kernel, shards, empty=(0.0,) * 3)
    return [plan.by_rows(kernel, shard) for shard in shards]


def _norm_of_three(plain: jax.Array, up: jax.Array, down: jax.Array, count: Any) -> jax.Array:
    """The norm from the exact one of three sums."""
    scale = SafeRange(plain.dtype).scale(plain, count)
    return norm_from_sum(jnp.where(scale < 1, down, jnp.where(scale > 1, up, plain)), scale)


def _in_longer_rows(x: jax.Array) -> jax.Array:
    """A leaf of rank 2 or more, some of its rows in each matrix of a stack."""
    room = max(_LONG_ROW // x.shape[-1], 1)
    count = math.gcd(x.shape[-2], 2 ** (room.bit_length() - 1))
    return x.reshape(*x.shape[:-2], x.shape[-2] // count, count, x.shape[-1])


def elementwise(f: Callable[..., Any], norms: Sequence[jax.Array], *others: Any) -> list[Any]:
    """`f(norm, *other)` for each norm; on accelerators for single numbers together, as vectors.

    There each would be a kernel. CPU would compute the vectors again in each leaf that reads one of
    their entries, which takes it three times as long to compile.
    """
    given = [norms, *others]

    def alone() -> list[Any]:
        return [f(*of_norm) for of_norm in zip(*given, strict=True)]

    def together() -> list[Any]:
        rows = [row for row in scalar_rows(norms) if len(row) > 1]
        found: dict[int, Any] = {}
        for row in rows:
            of_row = [tuple(of[i] for of in given) for i in row]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *of_row)
            # Else each entry is computed anew, from a state that its successor overwrites.
            arrays, treedef = jax.tree.flatten(unshared(jax.vmap(f)(*stacked)))
            for i, *entries in zip(row, *arrays, strict=True):
                found[i] = treedef.unflatten(entries)
        return [found[i] if i in found else f(*(of[i] for of in given)) for i in range(len(norms))]

    if all(len(row) < 2 for row in scalar_rows(norms)):
        return alone()
    return jax.lax.platform_dependent(cpu=alone, default=together)


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


def _exact_sums(plan: Plan, shards: Sequence[Shard], branch: bool) -> list[Any]:
    """Sums of squares of each shard, and the power of two by which it scaled its elements.

    The plain sum serves as long as it is in the safe range, where no square that matters can have
    overflowed or underflowed. Outside, the sum is taken again of elements scaled by a fixed power
    of two.
    """
    safe = SafeRange(norm_dtype())
    plain = plan.on_this_device(sum_of_squares, shards)
    counts = [sum(plan.leaves[i].size for i in shard.members) for shard in shards]
    # Kept apart, not stacked as a vector: XLA would compute the vector anew for each leaf that
    # reads its entry of it (200 leaves of 64 x 64 took 21 s to compile instead of 8).
    scales = [safe.scale(s, count) for s, count in zip(plain, counts, strict=True)]
    odd = [jnp.any(row != 1) for row in stacked_scalars(scales)]
    unsafe = functools.reduce(jnp.logical_or, odd, jnp.zeros((), bool))

    def scaled():
        numbers = {shard.group: (scale,) for shard, scale in zip(shards, scales, strict=True)}
        return plan.on_this_device(sum_of_squares, shards, numbers)

    exact = jax.lax.cond(unsafe, scaled, lambda: plain) if branch else scaled()
    return list(zip(exact, scales, strict=True))


def _bins(plan: Plan, shards: Sequence[Shard], *, branch: bool) -> list[jax.Array]:
    """The sums of `_exact_sums`, each in the bin of its scale among three (a new first axis).

    Each device chooses its scale alone and the bins of all of them are added: that takes one
    collective, and none for agreeing on a scale.
    """
    return [
        jnp.stack([jnp.where(chosen, s, 0) for chosen in (scale > 1, scale == 1, scale < 1)])
        for s, scale in _exact_sums(plan, shards, branch)
    ]
