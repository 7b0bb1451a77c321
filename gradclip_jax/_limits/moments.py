"""What recurrences share: mean and deviation without a square that overflows, and checks."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .window import check_number

LEAST_DEVIATION = 1e-3  # of the mean: a constant stream has none, and rounding must not fire


def moved(mean: jax.Array, norm: jax.Array, weight: jax.Array) -> jax.Array:
    """A mean after one more norm of this weight; exact where norms are constant."""
    return mean + weight * (norm - mean)


def spread_out(
    deviation: jax.Array, distance: jax.Array, weight: jax.Array, share: jax.Array
) -> jax.Array:
    """The root of (1 - weight) deviation^2 + share distance^2, without a square."""
    return jnp.hypot(jnp.sqrt(1 - weight) * deviation, jnp.sqrt(share) * distance)


def floored(deviation: jax.Array, mean: jax.Array) -> jax.Array:
    """A deviation, and a thousandth of the mean at least."""
    return jnp.maximum(deviation, LEAST_DEVIATION * mean)


def learned(norm: jax.Array, new: Any, state: Any) -> Any:
    """The new state; where the norm is 0, as of a frozen layer, the old: it has no level."""
    return jax.tree.map(lambda n, old: jnp.where(norm > 0, n, old), new, state)


def check_between_0_and_1(name: str, value: Any) -> Any:
    """Return a number strictly between 0 and 1, or a traced value; else raise."""
    rule = "lie between 0 and 1 (exclusive)"
    return check_number(name, value, rule, math.ulp(0.0), math.nextafter(1.0, 0.0))


def check_above(name: str, value: Any, bound: float) -> Any:
    """Return a finite number above a bound, or a traced value; else raise."""
    rule = f"be a finite number above {bound:g}"
    return check_number(name, value, rule, math.nextafter(bound, math.inf))


def check_steps(name: str, value: Any) -> Any:
    """Return a whole number of at least 1, an array of one, or a traced value; else raise."""
    rule = "be a whole number of at least 1"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral | Tracer):
        raise ValueError(f"`{name}` must {rule}, got {value!r}.")
    return check_number(name, value, rule, 1)
