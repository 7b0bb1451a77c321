"""What recurrences share: mean and deviation without a square that overflows."""

from typing import Any

import jax
import jax.numpy as jnp

LEAST_DEVIATION = 1e-3  # of the mean: a constant stream has none, and rounding must not fire


def lerp(mean: jax.Array, norm: jax.Array, weight: jax.Array) -> jax.Array:
    """A mean after one more norm of this weight; exact where norms are constant."""
    return mean + weight * (norm - mean)


def std_update(
    deviation: jax.Array, distance: jax.Array, weight: jax.Array, share: jax.Array
) -> jax.Array:
    """The root of (1 - weight) deviation^2 + share distance^2, without a square."""
    return jnp.hypot(jnp.sqrt(1 - weight) * deviation, jnp.sqrt(share) * distance)


def std_floor(deviation: jax.Array, mean: jax.Array) -> jax.Array:
    """A deviation, and a thousandth of the mean at least."""
    return jnp.maximum(deviation, LEAST_DEVIATION * mean)


def unless_zero(norm: jax.Array, new: Any, state: Any) -> Any:
    """The new state; where the norm is 0, as of a frozen layer, the old: it has no level."""
    return jax.tree.map(lambda n, old: jnp.where(norm > 0, n, old), new, state)
