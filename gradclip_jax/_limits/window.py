"""A window: the last W norms, newest first, and exact percentiles of what it holds."""

from typing import Any

import jax
import jax.numpy as jnp


def new_window(norm: jax.Array, window: int) -> jax.Array:
    """A window for norms like `norm` (zeros) along a new axis 0; infinity is an empty place."""
    # From the norm itself, so that the window varies and is split over devices as the norm is.
    return jnp.broadcast_to(norm + jnp.inf, (window, *norm.shape))


def push(norms: jax.Array, norm: jax.Array) -> jax.Array:
    """The window after one more norm; the oldest leaves."""
    # A shift, not a place to write to: places would differ from norm to norm after a NaN, and the
    # sort reads the window anyway.
    return jnp.concatenate([norm[None], norms[:-1]])


def is_full(norms: jax.Array) -> jax.Array:
    """Whether the oldest place of the window holds a norm."""
    return jnp.isfinite(norms[-1])


def percentile_of(values: jax.Array, percentile: Any) -> jax.Array:
    """Percentile along axis 0 of the finite values, as `np.percentile`; 0 where there are none.

    Linear between the two nearest ranks, each element with a number of values of its own. A
    percentile that is negative or NaN counts as 0, one above 100 as 100.
    """
    ranked = jnp.sort(values, axis=0)
    finite = jnp.isfinite(ranked)
    # Infinity would make NaN of the difference of two empty places, and of every derivative.
    ranked = jnp.where(finite, ranked, 0)
    last = jnp.maximum(jnp.sum(finite, axis=0) - 1, 0).astype(values.dtype)
    percentile = jnp.asarray(percentile).astype(values.dtype)
    # A rank such as 94.05 has no exact fraction left in float32, and gaps between ranks are wide
    # where spikes begin: the remainder of 100 ranks is exact when the percentile is whole.
    hundred_ranks = jnp.minimum(jnp.where(percentile > 0, percentile, 0), 100) * last
    rest = jnp.fmod(hundred_ranks, 100)
    below = jnp.round((hundred_ranks - rest) / 100)
    index = jnp.arange(len(ranked), dtype=values.dtype).reshape(-1, *[1] * last.ndim)

    def at(rank: jax.Array) -> jax.Array:
        # Not a gather, which asks of explicitly split arrays how its result is split.
        return jnp.sum(jnp.where(index == rank[None], ranked, 0), axis=0)

    low, high = at(below), at(jnp.minimum(below + 1, last))
    # Rounding must not carry it above the value that it lies below.
    return jnp.minimum(low + (high - low) * (rest / 100), high)
