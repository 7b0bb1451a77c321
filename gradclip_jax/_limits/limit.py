"""What a limit is: written elementwise on norms, so that any limit serves at any granularity."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_threshold
from .._platforms import elementwise
from .._types import Norms, Params, Threshold, Updates


class Limit(NamedTuple):
    """A recurrence on norms: a pair of functions, and whether it is adaptive.

    Attributes:
      init: `norm -> state`. Gets an array of zeros of the shape and dtype of the norms.
      update: `(norm, state) -> (limit, state)`. Elementwise: the limit has the shape of the norm,
        and the trailing axes of every array in the state of an adaptive limit are those of the
        norm.
      adaptive: Whether the state takes in the norm. If so, a NaN or infinite norm leaves the state
        as it was, element by element (`update_finite` does that). A clock is not adaptive.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    adaptive: bool = True


class Limits(NamedTuple):
    """Limits on all norms of a tree, for rules that look at more than one norm or at the params.

    Attributes:
      init: `norms -> state`. Gets the tree of the norms, with zeros of their shapes and dtypes.
      update: `(norms, state, updates, params) -> (limits, state)`: a limit for each norm, in the
        tree of the norms. Norms may be NaN or infinite; the state must not take them in.
    """

    init: Callable[[Norms], Any]
    update: Callable[[Norms, Any, Updates, Params], tuple[Norms, Any]]


def each(limit: Limit | Threshold) -> Limits:
    """The same recurrence for each norm of a tree, with a state of its own for each.

    >>> import gradclip_jax
    >>> clip = gradclip_jax.clip_norms(
    ...     gradclip_jax.each(gradclip_jax.limits.percentile(95)), measure=gradclip_jax.leaf_norms
    ... )
    """
    limit = as_limit(limit)

    def init(norms: Norms) -> tuple[Any, ...]:
        return tuple(limit.init(norm) for norm in jax.tree.leaves(norms))

    def update(
        norms: Norms, state: Any, updates: Updates, params: Params
    ) -> tuple[Norms, tuple[Any, ...]]:
        del updates, params
        flat, treedef = jax.tree.flatten(norms)
        limits, states = update_each(limit, flat, state)
        return treedef.unflatten(limits), tuple(states)

    return Limits(init, update)


def constant(limit: Threshold) -> Limit:
    """The same limit at every step, or the one of a schedule.

    Args:
      limit: Non-negative number, array or traced value; an optax schedule, called with the number
        of updates so far; or None, for no limit. A traced or scheduled value that is negative or
        NaN counts as 0, so that the sign of an update never turns.

    Raises:
      ValueError: For a number that is negative, NaN, boolean or not a number.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import constant
    >>> five = constant(5.0)
    >>> limit, state = five.update(jnp.float32(7.0), five.init(jnp.float32(0.0)))
    >>> float(limit)
    5.0
    """
    limit = check_threshold("limit", limit)
    if callable(limit):
        return Limit(
            lambda norm: jnp.zeros((), jnp.int32),
            lambda norm, count: (_filled(limit(count), norm), optax.safe_increment(count)),
            adaptive=False,
        )
    return Limit(lambda norm: (), lambda norm, state: (_filled(limit, norm), state), adaptive=False)


def minimum(a: Limit | Threshold, b: Limit | Threshold) -> Limit:
    """The smaller of two limits: `minimum(adaptive, 1.0)` is an adaptive limit with a cap.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import minimum
    >>> capped = minimum(5.0, 1.0)
    >>> limit, state = capped.update(jnp.float32(7.0), capped.init(jnp.float32(0.0)))
    >>> float(limit)
    1.0
    """
    return _joined(jnp.minimum, a, b)


def maximum(a: Limit | Threshold, b: Limit | Threshold) -> Limit:
    """The larger of two limits: `maximum(adaptive, 0.1)` is an adaptive limit with a floor.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import maximum
    >>> floored = maximum(5.0, 1.0)
    >>> limit, state = floored.update(jnp.float32(7.0), floored.init(jnp.float32(0.0)))
    >>> float(limit)
    5.0
    """
    return _joined(jnp.maximum, a, b)


def update_finite(limit: Limit, norm: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Update a limit; a NaN or infinite norm leaves the state of an adaptive limit as it was."""
    if not limit.adaptive:
        return limit.update(norm, state)
    finite = jnp.isfinite(norm)
    value, new = limit.update(jnp.where(finite, norm, 0), state)
    return value, jax.tree.map(lambda n, old: jnp.where(finite, n, old), new, state)


def update_each(
    limit: Limit, norms: Sequence[jax.Array], states: Sequence[Any]
) -> tuple[list[jax.Array], list[Any]]:
    """Update the limit of each of several norms, with a state of its own for each."""
    found = elementwise(functools.partial(update_finite, limit), norms, states)
    return [value for value, _ in found], [state for _, state in found]


def as_limit(limit: Limit | Threshold, name: str = "limit") -> Limit:
    """A limit as it is, and anything else as a constant; `name` is that of the argument."""
    return limit if isinstance(limit, Limit) else constant(check_threshold(name, limit))


def _filled(value: Any, norm: jax.Array) -> jax.Array:
    # A Python number beyond the largest float32 is a limit that nothing reaches.
    if isinstance(value, int | float) and value > float(jnp.finfo(norm.dtype).max):
        value = math.inf
    value = jnp.asarray(value).astype(norm.dtype)
    # `value > 0` is false for NaN too, and makes 0 of -0, by which a norm must not be divided.
    return jnp.broadcast_to(jnp.where(value > 0, value, 0), norm.shape)


def _joined(join: Callable[..., jax.Array], a: Limit | Threshold, b: Limit | Threshold) -> Limit:
    a, b = as_limit(a), as_limit(b)

    def init(norm: jax.Array) -> Any:
        return a.init(norm), b.init(norm)

    def update(norm: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        limit_a, state_a = update_finite(a, norm, state[0])
        limit_b, state_b = update_finite(b, norm, state[1])
        return join(limit_a, limit_b), (state_a, state_b)

    return Limit(init, update, adaptive=False)
