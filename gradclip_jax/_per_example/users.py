"""User-level clipping: the gradients of all examples of a user are summed, and clipped as one.

The batch is sorted by user, so that the examples of one follow each other. The sum of a user who
has examples in the next micro-batch, too, is carried there.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._devices import varying_along
from .._leaves import widen
from .microbatches import Clipping, Sums, scan_unless_one, sum_where
from .rule import expand_like
from .sharding import replicate_axis0


class _Carry(NamedTuple):
    """What a micro-batch hands to the next: sums of all users before, and of the last, open one."""

    totals: list[jax.Array]
    open_sums: list[jax.Array]
    open_count: jax.Array
    open_id: jax.Array


def over_users(clip: Clipping, batch: Any, mask: jax.Array, ids: jax.Array, size: int) -> Sums:
    """Sums over a batch, the examples of a user clipped as one, `size` examples at a time."""
    count = mask.size
    steps = math.ceil(count / size)
    batch, mask, ids = jax.tree.map(replicate_axis0, (batch, mask, ids))
    order = jnp.lexsort((ids, ~mask))
    positions = jnp.concatenate([order, order[: steps * size - count]]).reshape(steps, size)
    masks = (jnp.arange(steps * size) < count).reshape(steps, size) & mask[positions]

    def add(totals: Any, sums: list[jax.Array], counts: jax.Array, is_done: jax.Array) -> Any:
        """Add the users who have no further example; `counts` of their examples may be 0."""
        if clip.average_users:
            sums = [x / expand_like(jnp.maximum(counts, 1), x) for x in sums]
        added = is_done & (counts > 0)
        totals, factors = clip.add(totals, jax.tree.structure(clip.params).unflatten(sums), added)
        return totals, (added, factors.above, factors.nonfinite, factors.norms)

    def step(carry: _Carry, of_step: Any) -> tuple[_Carry, Any]:
        position, mask = of_step
        (values, aux), grads = clip.each(clip.params, jax.tree.map(lambda x: x[position], batch))
        user_ids = ids[position]
        before = jnp.concatenate([carry.open_id[None], user_ids[:-1]])
        user = jnp.cumsum(user_ids != before)  # 0 is the open user
        by_user = functools.partial(
            jax.ops.segment_sum, segment_ids=user, num_segments=size + 1, indices_are_sorted=True
        )
        leaves = [widen(leaf) for leaf in jax.tree.leaves(grads)]
        kept = [jnp.where(expand_like(mask, leaf), leaf, 0) for leaf in leaves]
        pairs = zip(kept, carry.open_sums, strict=True)
        sums = [by_user(leaf).at[0].add(carried) for leaf, carried in pairs]
        counts = by_user(mask.astype(jnp.int32)).at[0].add(carry.open_count)
        last = user[-1]
        totals, found = add(carry.totals, sums, counts, jnp.arange(size + 1) < last)
        carry = _Carry(totals, [x[last] for x in sums], counts[last], user_ids[-1])
        return carry, (sum_where(mask, values), found, aux)

    zero = varying_along(jnp.zeros((), jnp.int32), clip.axes)
    start = _Carry(clip.zeros(), clip.zeros(), zero, varying_along(ids[order[0]], clip.axes))
    carry, (values, found, aux) = scan_unless_one(step, start, (positions, masks))
    totals, last = add(
        carry.totals, [x[None] for x in carry.open_sums], carry.open_count[None], jnp.ones(1, bool)
    )
    added, above, nonfinite, norms = jax.tree.map(
        lambda x, y: jnp.concatenate([x.ravel(), y.ravel()]), found, last
    )
    place = jnp.where(added, jnp.cumsum(added) - 1, count)
    norms = jax.tree.map(lambda x: jnp.zeros_like(x[:count]).at[place].set(x, mode="drop"), norms)
    original = jnp.argsort(order)
    aux = jax.tree.map(lambda x: x.reshape(steps * size, *x.shape[2:])[original], aux)
    counts = jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.int32), (added, above, nonfinite))
    return Sums((jnp.sum(values), totals, counts), norms if clip.return_norms else None, aux)


def check_user_ids(ids: Any, count: int) -> Any:
    """Return whole numbers [examples], or None for no users; raise for anything else."""
    if ids is None:
        return None
    ids = jnp.asarray(ids)
    if ids.shape != (count,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"`user_ids` must be one whole number for each of {count} examples, "
            f"got {ids.dtype}{list(ids.shape)}."
        )
    return ids
