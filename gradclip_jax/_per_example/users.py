"""User-level clipping: the gradients of all examples of a user are summed, and clipped as one."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from .._devices import varying_along
from .._leaves import widen
from .microbatches import Clipping, Sums, scan, sum_of_values
from .rule import column
from .sharding import replicate_axis0


def over_users(clip: Clipping, batch: Any, real: jax.Array, ids: jax.Array, size: int) -> Sums:
    """The same, but the gradients of a user are summed before; who is not done is carried on."""
    count = real.size
    steps = math.ceil(count / size)
    batch, real, ids = jax.tree.map(replicate_axis0, (batch, real, ids))
    order = jnp.lexsort((ids, ~real))
    padded = jnp.concatenate([order, order[: steps * size - count]]).reshape(steps, size)
    counts = (jnp.arange(steps * size) < count).reshape(steps, size) & real[padded]

    def close(totals: Any, sums: list[jax.Array], numbers: jax.Array, done: jax.Array) -> Any:
        if clip.average_users:
            sums = [x / column(jnp.maximum(numbers, 1), x) for x in sums]
        here = done & (numbers > 0)
        totals, held = clip.add(totals, jax.tree.structure(clip.params).unflatten(sums), here)
        return totals, (here, held.above, held.nonfinite, held.norms)

    def step(carry: Any, row: Any) -> tuple[Any, Any]:
        totals, open_sums, open_number, open_id = carry
        index, real = row
        (values, aux), grads = clip.each(clip.params, jax.tree.map(lambda x: x[index], batch))
        here = ids[index]
        before = jnp.concatenate([open_id[None], here[:-1]])
        user = jnp.cumsum(here != before)  # 0 for the one that was not done
        by_user = functools.partial(
            jax.ops.segment_sum, segment_ids=user, num_segments=size + 1, indices_are_sorted=True
        )
        leaves = [widen(leaf) for leaf in jax.tree.leaves(grads)]
        kept = [jnp.where(column(real, leaf), leaf, 0) for leaf in leaves]
        pairs = zip(kept, open_sums, strict=True)
        sums = [by_user(leaf).at[0].add(carried) for leaf, carried in pairs]
        numbers = by_user(real.astype(jnp.int32)).at[0].add(open_number)
        last = user[-1]
        totals, seen = close(totals, sums, numbers, jnp.arange(size + 1) < last)
        carry = totals, [x[last] for x in sums], numbers[last], here[-1]
        return carry, (sum_of_values(values, real), seen, aux)

    zero = varying_along(jnp.zeros((), jnp.int32), clip.axes)
    start = (clip.zeros(), clip.zeros(), zero, varying_along(ids[order[0]], clip.axes))
    carry, (values, seen, aux) = scan(step, start, (padded, counts))
    totals, sums, number, _ = carry
    totals, last = close(totals, [x[None] for x in sums], number[None], jnp.ones(1, bool))
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x.ravel(), y.ravel()]), seen, last)
    users, above, nonfinite, norms = joined
    place = jnp.where(users, jnp.cumsum(users) - 1, count)
    norms = jax.tree.map(lambda x: jnp.zeros_like(x[:count]).at[place].set(x, mode="drop"), norms)
    back = jnp.argsort(order)
    aux = jax.tree.map(lambda x: x.reshape(steps * size, *x.shape[2:])[back], aux)
    found = jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.int32), (users, above, nonfinite))
    return Sums((jnp.sum(values), totals, found), norms if clip.return_norms else None, aux)


def check_user_ids(ids: Any, count: int) -> Any:
    if ids is None:
        return None
    ids = jnp.asarray(ids)
    if ids.shape != (count,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"`user_ids` must be one whole number for each of {count} examples, "
            f"got {ids.dtype}{list(ids.shape)}."
        )
    return ids
