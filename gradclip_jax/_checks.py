"""Numbers that users give, checked once, where they enter; never a traced value."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Threshold = Any
"""A Python number, an array of any float dtype, a traced value, an optax schedule, or None."""


def check_threshold(name: str, value: Threshold) -> Threshold:
    """Return a threshold that may be used, None as infinity; raise for one that may not."""
    if value is None:
        return math.inf
    if callable(value) or isinstance(value, Tracer):
        return value
    kind = "a non-negative number, a scalar array, a schedule or None"
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    if is_array and (value.shape != () or not jnp.issubdtype(value.dtype, jnp.number)):
        raise ValueError(f"`{name}` must be {kind}, got an array {value.dtype}{list(value.shape)}.")
    if not is_array and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise ValueError(f"`{name}` must be {kind}, got {value!r}.")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return value
    if jnp.iscomplexobj(value) or math.isnan(value):
        raise ValueError(f"`{name}` must be {kind}, got {value!r}.")
    if float(value) < 0:
        raise ValueError(f"`{name}` must be non-negative, got {value!r}.")
    return value


def negated(name: str, value: Threshold) -> Threshold:
    """Minus a threshold, so that a lower bound is checked and scheduled as an upper one is."""
    if callable(value):
        return lambda count: -jnp.asarray(value(count))
    if value is None or isinstance(value, bool | str):
        raise ValueError(
            f"`{name}` must be a number at most 0, an array or a schedule, got {value!r}."
        )
    return -value


def check_number(name: str, value: Any, rule: str, least: float, most: float = math.inf) -> Any:
    """Return a finite number or scalar array within bounds, or a traced value; else raise."""
    if isinstance(value, Tracer):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        is_number = real and value.shape == ()
        if is_number and isinstance(value, jax.Array) and not value.is_fully_addressable:
            return value
    else:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= float(value) <= most:
        raise ValueError(f"`{name}` must {rule}, got {value!r}.")
    return value


def check_percentile(percentile: Any) -> Any:
    """Return a percentile that may be used; raise for one that may not."""
    return check_number("percentile", percentile, "lie between 0 and 100", 0, 100)


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


def check_whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number that decides a shape or a program, so not a traced one; else raise."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least:
        hint = " (name it in `static_args` of `inject_hyperparams`)"
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}, got {value!r}"
            f"{hint if isinstance(value, jax.Array) else ''}."
        )
    return int(value)
