"""Numbers that users give, checked once, where they enter; never a traced value."""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._types import Threshold


def check_threshold(name: str, value: Threshold) -> Threshold:
    """Return a threshold that may be used, None as infinity; raise for one that may not."""
    if value is None:
        return math.inf
    if isinstance(value, Tracer):
        return value
    if callable(value):
        return _checked_schedule(name, value)
    kind = "a non-negative number, a scalar array, a schedule or None"
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    if is_array and (value.shape != () or not jnp.issubdtype(value.dtype, jnp.number)):
        raise ValueError(f"`{name}` must be {kind}, got an array {value.dtype}{list(value.shape)}.")
    if not is_array and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise ValueError(f"`{name}` must be {kind}, got {value!r}.")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return value
    if (is_array and jnp.iscomplexobj(value)) or math.isnan(_as_float(value)):
        raise ValueError(f"`{name}` must be {kind}, got {value!r}.")
    if _as_float(value) < 0:
        raise ValueError(f"`{name}` must be non-negative, got {value!r}.")
    return value if isinstance(value, jax.Array) else _as_float(value)


def check_lower_bound(name: str, value: Threshold) -> Threshold:
    """Minus a lower bound, which is checked and scheduled as an upper one is."""
    if isinstance(value, Tracer):
        return -value
    if callable(value):
        schedule = _checked_schedule(name, value)
        return lambda count: -jnp.asarray(schedule(count))
    rule = f"`{name}` must be at most 0, a number, a scalar array or a schedule, got {value!r}."
    if value is None or isinstance(value, bool):
        raise ValueError(rule)
    if jnp.issubdtype(getattr(value, "dtype", float), jnp.unsignedinteger):
        value = value.astype(np.float32)  # minus 1 would wrap to a bound that is huge
    try:
        return check_threshold(name, -value)
    except (ValueError, TypeError) as error:
        raise ValueError(rule) from error


def _checked_schedule(name: str, schedule: Callable[..., Any]) -> Callable[[Any], Any]:
    """A schedule that says by the name of its argument what it must not return."""
    if not takes(schedule, 0) or accepts(schedule, "axis_name"):
        raise ValueError(
            f"`{name}` must be a number, a scalar array, a schedule or None, got the function "
            f"`{_name(schedule)}`: a schedule is a function of the number of updates alone. Pass a "
            "measure as `measure` and a response as `response`."
        )

    def checked(count: Any) -> Any:
        value = schedule(count)
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            is_real = any(jnp.issubdtype(value.dtype, k) for k in (jnp.floating, jnp.integer))
            if not is_real or value.shape != ():
                got = f"an array {value.dtype}{list(value.shape)}"
                raise ValueError(f"`{name}` must be a schedule of real scalars, got {got}.")
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"`{name}` must be a schedule of real scalars, got {value!r}.")
        return value if isinstance(value, jax.Array) else _as_float(value)

    return checked


_INJECT = (
    "a schedule of it goes through `optax.inject_hyperparams(strategy)(argument=schedule)`, one of "
    "a limit through `optax.inject_hyperparams(lambda k: clip_to_limit(limits.ema(k)))(k=schedule)`"
)


def check_number(name: str, value: Any, rule: str, low: float, high: float = math.inf) -> Any:
    """Return a finite number or scalar array within bounds, or a traced value; else raise."""
    if isinstance(value, Tracer):
        return value
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        is_real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
        is_number = is_real and value.shape == ()
        if is_number and isinstance(value, jax.Array) and not value.is_fully_addressable:
            return value
    else:
        is_number = not isinstance(value, bool) and isinstance(value, numbers.Real)
    number = _as_float(value) if is_number else math.nan
    if not math.isfinite(number) or not low <= number <= high:
        fix = f": {_INJECT}" if callable(value) else ""
        raise ValueError(f"`{name}` must {rule}, got {value!r}{fix}.")
    return value if isinstance(value, jax.Array) else number


def _as_float(value: Any) -> float:
    """A real number as jax takes it: of Fractions it takes none, and it wraps large integers."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


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
    steps = check_number(name, value, rule, 1)
    return _below_counters(name, int(steps)) if isinstance(steps, float) else steps


def check_whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number that decides a shape or a program, so not a traced one; else raise."""
    is_whole = not isinstance(value, bool) and isinstance(value, numbers.Integral)
    if not is_whole or value < least:
        hint = " (name it in `static_args` of `inject_hyperparams`)"
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}, got {value!r}"
            f"{hint if isinstance(value, jax.Array) else ''}."
        )
    return _below_counters(name, int(value))


def _below_counters(name: str, value: int) -> int:
    if value >= 2**31:
        raise ValueError(f"`{name}` must be below 2**31, where counters stop, got {value}.")
    return value


def check_argument_name(name: str, value: Any) -> str:
    """Return the name of an extra argument of `update`; raise for what is not a name."""
    if not (isinstance(value, str) and value.isidentifier()):
        raise ValueError(
            f"`{name}` must be the name of an extra argument of `update`, got {value!r}."
        )
    return value


def check_transformation(name: str, value: Any, what: str, fix: str = "") -> None:
    """Raise for what is not a transformation of optax, such as a factory that was not called."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise ValueError(f"`{name}` must be {what} of optax, got {value!r}{fix}.")


def takes(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> bool:
    """Whether a function can be called so; also where its signature does not tell."""
    signature = _signature(function)
    try:
        if signature is not None:
            signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def accepts(function: Callable[..., Any], keyword: str) -> bool:
    """Whether a function names an argument so in its signature."""
    signature = _signature(function)
    return signature is not None and keyword in signature.parameters


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):  # of what is not written in Python
        return None


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
