"""Reduce leaves to groups and over devices: the only reduction and the only collective."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._devices import partly_manual
from ._leaves import in_rows, norm_dtype
from ._memory import beside, changed_in_place, reduced_in_place
from ._safe import (
    SafeRange,
    inverse_power_of_two,
    largest_modulus,
    norm_of_bins,
    norm_of_sum,
    safe_power,
    sum_of_moduli,
    sum_of_powers,
    sum_of_squares,
)

_SMALL = 2**14  # elements of a leaf
_TOGETHER = 16  # small leaves of one shape that one kernel reads


class _Cell(NamedTuple):
    """The leaves of one group that are split alike and reduced over the same mesh axes."""

    group: int
    along: "Along"
    members: tuple[int, ...]


class Along(NamedTuple):
    """Mesh axes to reduce over, and all along which the type says that a leaf varies."""

    axes: tuple[str, ...]
    varying: tuple[str, ...]


# Called eagerly this is one cached program for each tree structure; inside a trace it inlines.
@functools.partial(
    jax.jit, static_argnames=("dims", "along", "groups", "order", "together"), inline=True
)
def norms_of_groups(leaves, **options):
    measure = functools.partial(_norms_of_cells, **options)
    # In such a rule jax (0.10 to 0.12) cannot transpose a branch that `vmap` has mapped, nor 0.12 a
    # barrier of which some operands are constant.
    return with_finite_derivative(measure, functools.partial(measure, branch=False), leaves)


def with_finite_derivative(measure, differentiable, leaves):
    """`measure(leaves)`, with the derivative of `differentiable` without what is not finite.

    An update that is zeroed for a NaN passes a zero back to its norm, and zero times the NaN in
    the derivative of a square would be NaN. Only a program that differentiates computes more.
    """

    def finite_part(x):
        return jnp.where(jnp.isfinite(x), x, beside(0, x))

    def derivative(primals, tangents):
        (leaves,), (moved,) = primals, tangents
        finite = [changed_in_place(finite_part, x) for x in leaves]
        return measure(leaves), jax.jvp(differentiable, (finite,), (moved,))[1]

    measured = jax.custom_jvp(measure)
    measured.defjvp(derivative)
    return measured(leaves)


def _norms_of_cells(leaves, *, dims, along, groups, order, together, branch=True):
    cells = [
        _Cell(group, split, tuple(i for i in members if along[i] == split))
        for group, members in enumerate(groups)
        for split in sorted({along[i] for i in members}) or [Along((), ())]
    ]
    over_leaves = functools.partial(_over_leaves, leaves, dims, barrier=branch)
    over_devices = functools.partial(_over_devices, cells, len(groups))
    if order == 1:
        moduli = functools.partial(over_leaves, sum_of_moduli)
        return over_devices(moduli, jax.lax.psum, jnp.add)
    if order == 2:
        squares = functools.partial(over_leaves, sum_of_squares, together=together)
        sizes = [leaf.size for leaf in leaves]
        if len(cells) == len(groups) and not any(cell.along.axes for cell in cells):
            return [norm_of_sum(*of_cell) for of_cell in _exact_sums(squares, cells, sizes, branch)]
        binned = functools.partial(_bins, squares, sizes=sizes, branch=branch)
        bins = over_devices(binned, jax.lax.psum, jnp.add)
        return [norm_of_bins(of_group) for of_group in bins]
    largest = functools.partial(over_leaves, largest_modulus, join=jnp.maximum)
    norms = over_devices(largest, jax.lax.pmax, jnp.maximum)
    if order == math.inf:
        return norms
    scales = [inverse_power_of_two(jax.lax.stop_gradient(norm)) for norm in norms]
    powers = functools.partial(over_leaves, functools.partial(sum_of_powers, order=order))
    sums = over_devices(
        lambda here: powers(here, numbers=[scales[cell.group] for cell in here]),
        jax.lax.psum,
        jnp.add,
    )
    roots = [safe_power(total, 1 / order) for total in sums]
    # Not `root / first / second`: XLA makes that `root / (first * second)`, which overflows.
    return [
        root * (1 / first) * (1 / second)
        for root, (first, second) in zip(roots, scales, strict=True)
    ]


def _over_leaves(
    leaves, dims, of_leaf, cells, *, numbers=None, join=jnp.add, together=False, barrier=True
):
    """One array for each cell: reduced over the elements of a leaf, then over its leaves."""
    keep = apart if barrier else lambda x: x
    reduced = []
    for position, cell in enumerate(cells):
        number = () if numbers is None else numbers[position]
        parts = []
        for first, *others in _alike(leaves, cell.members, together):
            of_these = functools.partial(of_leaf, dims=dims[first])
            if others:
                alike = [leaves[first], *(leaves[i] for i in others)]
                parts.append(of_these(*keep((alike, *number))))
            else:
                parts.append(reduced_in_place(of_these, *keep((leaves[first], *number))))
        # Else XLA adds arrays of one shape and keeps their sum, to reduce that.
        parts = keep(parts) if len(parts) > 1 else parts
        reduced.append(functools.reduce(join, parts) if parts else jnp.zeros((), norm_dtype()))
    return reduced


def _alike(leaves: Sequence[jax.Array], members: Sequence[int], together: bool) -> list[list[int]]:
    """Parts of `members` that one kernel reduces: single ones, or small leaves of one type."""
    parts: list[list[int]] = []
    last: dict[Any, list[int]] = {}
    for i in members:
        kind = jax.typeof(leaves[i])
        known = last.get(kind)
        if known is None or len(known) == _TOGETHER or kind.size > _SMALL or not together:
            known = last[kind] = []
            parts.append(known)
        known.append(i)
    return parts


def apart(x):
    """`x`, but what is computed of it is shared with nothing else that is computed of the same.

    The squares of gradients are in the optimizer, too: XLA would keep them for it, or a float32
    copy of bfloat16, or a factor broadcast to the shape of several leaves.
    """
    return jax.lax.optimization_barrier(x)


def _over_devices(cells, group_count, of_cells, collective, join):
    """One array for each group, by one collective for each distinct set of mesh axes."""
    joined: list[Any] = [None] * group_count
    for along in dict.fromkeys(cell.along for cell in cells):
        here = [cell for cell in cells if cell.along == along]
        totals = of_cells(here)
        if along.axes:
            totals = _at_once(functools.partial(collective, axis_name=along.axes), totals)
        for cell, total in zip(here, totals, strict=True):
            known = joined[cell.group]
            joined[cell.group] = total if known is None else join(known, total)
    return joined


def _at_once(collective, arrays):
    """Apply a collective to all arrays as one vector: given a tree it would make one of each."""
    if partly_manual():
        # Norms of units may be split along the other axes: as one vector they would be gathered.
        return [collective(array) for array in arrays]
    flat = jnp.concatenate([array.ravel() for array in arrays])
    ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
    parts = jnp.split(collective(flat), ends)
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _exact_sums(squares, cells, sizes, branch):
    """Sums of squares of each cell, and the power of two by which it scaled its elements.

    The plain sum serves as long as it is in the safe range, where no square that matters can have
    overflowed or underflowed. Outside, the sum is taken again of elements scaled by a fixed power
    of two.
    """
    safe = SafeRange(norm_dtype())
    plain = squares(cells)
    counts = [sum(sizes[i] for i in cell.members) for cell in cells]
    # Kept apart, not stacked as a vector: XLA would compute the vector anew for each leaf that
    # reads its entry of it (200 leaves of 64 x 64 took 21 s to compile instead of 8).
    scales = [safe.scale(s, count) for s, count in zip(plain, counts, strict=True)]
    odd = [jnp.any(row != 1) for row in in_rows(scales)]
    unsafe = functools.reduce(jnp.logical_or, odd, jnp.zeros((), bool))
    scaled = functools.partial(squares, cells, numbers=[(scale,) for scale in scales])
    exact = jax.lax.cond(unsafe, scaled, lambda: plain) if branch else scaled()
    return list(zip(exact, scales, strict=True))


def _bins(squares, cells, sizes, branch):
    """The sums of `_exact_sums`, each in the bin of its scale among three (a new first axis).

    Each device chooses its scale alone and the bins of all of them are added: that takes one
    collective, and none for agreeing on a scale.
    """
    return [
        jnp.stack([jnp.where(chosen, s, 0) for chosen in (scale > 1, scale == 1, scale < 1)])
        for s, scale in _exact_sums(squares, cells, sizes, branch)
    ]
