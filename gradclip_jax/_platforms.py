"""The way to norms that is fastest on each platform, and to what is computed of norms."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._compiled import compiled
from ._leaves import norm_dtype, scalar_stacks, stacked_scalars, unstacked_scalars
from ._memory import changed_in_place, in_host_memory
from ._reduce import Kernel, Plan, Shard, unshared
from ._safe import (
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
    three_sums_of_squares,
)

_FUSED_ON_GPU = 64  # small leaves of one shape that one kernel reads


@compiled(static=("order",))
def norms_of_groups(plan: Plan, *, order: float) -> list[jax.Array]:
    """The norm of each group of a plan, by the way that is fastest on the platform."""

    def measure(leaves: list[jax.Array]) -> list[jax.Array]:
        here = dataclasses.replace(plan, leaves=leaves)
        shared = dataclasses.replace(here, barrier=True)
        if order != 2:
            return jax.lax.platform_dependent(
                cpu=lambda: _norms_of_order(shared, order, largest_modulus_on_cpu),
                default=lambda: _norms_of_order(here, order),
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

    def differentiable(leaves: list[jax.Array]) -> list[jax.Array]:
        here = dataclasses.replace(plan, leaves=leaves)
        return in_two_reads(here) if order == 2 else _norms_of_order(here, order)

    return with_finite_derivative(measure, differentiable, plan.leaves)


def with_finite_derivative(measure: Any, differentiable: Any, leaves: Sequence[jax.Array]) -> Any:
    """`measure(leaves)`, with the derivative of `differentiable` with only the finite elements.

    An update that is zeroed for a NaN passes a zero back to its norm, and zero times the NaN in
    the derivative of a square would be NaN. Only a program that differentiates computes more.
    `differentiable` has neither a branch nor a barrier: in such a rule jax (0.10 to 0.12) cannot
    transpose a branch that `vmap` has mapped, nor 0.12 a barrier with some constant operands.
    """

    def derivative(primals: Any, tangents: Any) -> Any:
        (leaves,), (moved,) = primals, tangents
        finite = [changed_in_place(finite_or_zero, x) for x in leaves]
        return measure(leaves), jax.jvp(differentiable, (finite,), (moved,))[1]

    measured = jax.custom_jvp(measure)
    measured.defjvp(derivative)
    return measured(leaves)


def _norms_of_order(plan: Plan, order: float, largest: Kernel = largest_modulus) -> list[jax.Array]:
    if order == 1:
        return plan.sum(sum_of_moduli)
    norms = plan.max(largest)
    if order == math.inf:
        return norms
    scales = [powers_near(norm) for norm in norms]
    sums = plan.sum(functools.partial(sum_of_powers, order=order), scales)
    roots = [safe_power(total, 1 / order) for total in sums]
    return [scale.divide(root) for root, scale in zip(roots, scales, strict=True)]


def by_branch(plan: Plan, branch: bool = True) -> list[jax.Array]:
    """Norms of order 2 by a plain sum, and a second read only where that is not safe."""
    if not any(split.reduced for split in plan.mesh_axes) and len(plan.shards) == len(plan.groups):
        return [norm_from_sum(*of_group) for of_group in _exact_sums(plan, plan.shards, branch)]
    bins = plan.over_devices(functools.partial(_bins, plan, branch=branch))
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
        roots = [safe_power(stack, 0.5) for stack in stacked_scalars(sums)]
        return unstacked_scalars([jax.lax.convert_element_type(x, dtype) for x in roots], sums)


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
    sums = plan.over_devices(functools.partial(three_sums, plan))
    plain, up, down = zip(*sums, strict=True) if sums else ((), (), ())
    counts = [jnp.full_like(of, size) for of, size in zip(plain, sizes, strict=True)]
    kinds = (plain, up, down, counts)
    stacks = zip(*(stacked_scalars(of_kind, plain) for of_kind in kinds), strict=True)
    # Without the barrier each kernel that reads a norm adds the sums of all leaves again.
    return unstacked_scalars(unshared([_norm_of_three(*of) for of in stacks]), plain)


def _three_sums(plan: Plan, shards: Sequence[Shard]) -> list[Any]:
    return plan.on_this_device(three_sums_of_squares, shards)


def _three_sums_on_gpu(plan: Plan, shards: Sequence[Shard]) -> list[Any]:
    kernel = functools.partial(three_sums_of_squares, at_once=True)
    plan = dataclasses.replace(plan, fused=_FUSED_ON_GPU)
    if not plan.is_unsharded:
        return plan.on_this_device(kernel, shards)
    return [plan.by_rows(kernel, shard) for shard in shards]


def _norm_of_three(plain: jax.Array, up: jax.Array, down: jax.Array, count: Any) -> jax.Array:
    """The norm from the exact one of three sums."""
    scale = SafeRange(plain.dtype).scale(plain, count)
    return norm_from_sum(jnp.where(scale < 1, down, jnp.where(scale > 1, up, plain)), scale)


def elementwise(f: Callable[..., Any], norms: Sequence[jax.Array], *others: Any) -> list[Any]:
    """`f(norm, *other)` for each norm; on accelerators for single numbers together, as vectors.

    There each would be a kernel. CPU would compute the vectors again in each leaf that reads one of
    their entries, which takes it three times as long to compile.
    """
    given = [norms, *others]

    def alone() -> list[Any]:
        return [f(*of_norm) for of_norm in zip(*given, strict=True)]

    def together() -> list[Any]:
        found: dict[int, Any] = {}
        for positions in scalar_stacks(norms):
            if len(positions) < 2:
                continue
            of_each = [tuple(of[i] for of in given) for i in positions]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *of_each)
            # Without the barrier XLA computes each entry anew where it is read, from an old state
            # that the new one overwrites.
            arrays, treedef = jax.tree.flatten(unshared(jax.vmap(f)(*stacked)))
            for i, *entries in zip(positions, *arrays, strict=True):
                found[i] = treedef.unflatten(entries)
        return [found[i] if i in found else f(*(of[i] for of in given)) for i in range(len(norms))]

    if all(len(positions) < 2 for positions in scalar_stacks(norms)):
        return alone()
    return jax.lax.platform_dependent(cpu=alone, default=together)


def _exact_sums(plan: Plan, shards: Sequence[Shard], branch: bool) -> list[Any]:
    """Sums of squares of each shard, and the power of two by which it scaled its elements.

    The plain sum serves as long as it is in the safe range, where no square that matters can have
    overflowed or underflowed. Outside, the sum is taken again of elements scaled by a fixed power
    of two.
    """
    safe = SafeRange(norm_dtype())
    plain = plan.on_this_device(sum_of_squares, shards)
    counts = [sum(plan.leaves[i].size for i in shard.members) for shard in shards]
    # Not stacked as a vector: XLA would compute the vector anew for each leaf that
    # reads its entry of it (200 leaves of 64 x 64 took 21 s to compile instead of 8).
    scales = [safe.scale(s, count) for s, count in zip(plain, counts, strict=True)]
    odd = [jnp.any(stack != 1) for stack in stacked_scalars(scales)]
    unsafe = functools.reduce(jnp.logical_or, odd, jnp.zeros((), bool))

    def scaled() -> list[jax.Array]:
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
