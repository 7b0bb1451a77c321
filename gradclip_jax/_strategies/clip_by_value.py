"""Clip each element alone: to a modulus, or between two bounds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_lower_bound, check_threshold
from .._clip import measured_types
from .._devices import of_pair
from .._inject import strategy
from .._leaves import is_gradient
from .._limits import Limit, constant
from .._memory import changed_in_place, constant_like
from .._norms import global_norm, group_norms
from .._rescale import OnNonfinite, clamped, nonfinite_fill, ratio, shrink
from .._state import (
    ClipState,
    check_trees,
    init_threshold,
    initial_state,
    next_state,
    read_threshold,
    transformation,
)
from .._types import AxisName, Params, Threshold, Updates


@strategy("limit")
def clip_by_value(
    limit: Threshold,
    *,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient clipping by value: clip each element to a modulus.

    $$ g_i \leftarrow \min(\max(g_i, -\text{limit}), \text{limit}) $$

    For reproducing models that were trained with it; it turns the direction of the gradient
    towards a corner of the cube. What it measures is the largest modulus: the `clip_measure` of
    its metrics.

    Args:
      limit: Largest modulus that passes, non-negative, as `max_norm` in `clip_by_global_norm`.
        Complex elements keep their phase.
      axis_name: See `global_norm`; the clamp needs no other device, but what it measures does.
      on_nonfinite: `"zero"` makes each element that is NaN or infinite zero; `"propagate"`, NaN.

    Returns:
      A transformation with a `ClipState` of one number.

    Raises:
      ValueError: For a limit that is negative, NaN, boolean or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_value(1.0)
    >>> grads = jnp.array([-3.0, 0.5])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)
    [-1.   0.5]

    Mikolov, *Statistical Language Models Based on Neural Networks*, thesis, Brno 2012, section
    3.3; `clipvalue` in Keras, `optax.clip`.
    """
    bound = constant(check_threshold("limit", limit))

    def measured(updates: Any, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        del low
        return global_norm(updates, order=jnp.inf, axis_name=axis_name), high

    return _between(bound, bound, measured, axis_name, on_nonfinite)


@strategy("lower", "upper")
def clip_by_range(
    lower: Threshold,
    *,
    upper: Threshold,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each element between two bounds.

    $$ g_i \leftarrow \min(\max(g_i, \text{lower}), \text{upper}) $$

    For bounds that are not symmetric; else see `clip_by_value`. What it measures is the modulus of
    the element that goes furthest beyond its bound, against the modulus of that bound.

    Args:
      lower: The lower bound, at most 0. May be a schedule.
      upper: The upper bound, non-negative. May be a schedule.
      axis_name: See `clip_by_value`.
      on_nonfinite: See `clip_by_value`.

    Returns:
      A transformation with a `ClipState` of one number.

    Raises:
      ValueError: For a bound that is NaN, boolean, not a number, or on the wrong side of 0; for
        complex leaves.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_range(lower=-1.0, upper=2.0)
    >>> grads = jnp.array([-3.0, 0.5, 3.0])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)
    [-1.   0.5  2. ]

    `tf.clip_by_value`, `jnp.clip`.
    """
    down = constant(check_lower_bound("lower", lower))
    up = constant(check_threshold("upper", upper))
    measured = functools.partial(_furthest, axis_name=axis_name)
    return _between(down, up, measured, axis_name, on_nonfinite)


def _between(
    down: Limit,
    up: Limit,
    measured: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    axis_name: AxisName,
    on_nonfinite: OnNonfinite,
) -> optax.GradientTransformationExtraArgs:
    """A clamp between -down and up; `measured` gives what it held, and to which bound."""
    fill = nonfinite_fill(on_nonfinite)
    clamp = functools.partial(clamped, fill=fill)

    def init(params: Params) -> ClipState:
        norm = measured_types(functools.partial(global_norm, order=jnp.inf), params, axis_name)
        limit_state = (init_threshold(down), init_threshold(up))
        return initial_state(norm, limit_state, are_norms=False)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        check_trees(updates, params)
        low, down_state = read_threshold(down, state.limit_state[0])
        high, up_state = read_threshold(up, state.limit_state[1])
        norm, bound = measured(updates, low, high)
        clipped = jax.tree.map(
            lambda x: changed_in_place(clamp, jnp.asarray(x), low, high) if is_gradient(x) else x,
            updates,
        )
        finite = jnp.isfinite(norm)
        factor = jnp.where(finite, shrink(norm, bound), fill)
        return clipped, next_state(
            state,
            norm,
            bound,
            factor,
            clipped=finite & (norm > bound),
            nonfinite=~finite,
            limit_state=(down_state, up_state),
        )

    return transformation(init, update)


def _furthest(
    updates: Any, low: jax.Array, high: jax.Array, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """The modulus of the element furthest beyond its bound, by ratio, and that bound."""
    parts = jax.tree.map(lambda x: _side(x, 1) if is_gradient(x) else None, updates)
    other = jax.tree.map(lambda x: _side(x, -1) if is_gradient(x) else None, updates)
    sides = group_norms(
        (parts, other), labels=("above", "below"), order=jnp.inf, axis_name=of_pair(axis_name)
    )
    above, below = sides.get("above", 0 * high), sides.get("below", 0 * low)
    beyond_high, beyond_low = ratio(above, high), ratio(below, low)
    tied = beyond_high == beyond_low
    is_above = jnp.where(tied, above >= below, beyond_high > beyond_low)
    return jnp.where(is_above, above, below), jnp.where(is_above, high, low)


def _side(x: Any, sign: int) -> jax.Array:
    if jnp.iscomplexobj(x):
        raise ValueError(
            "`clip_by_range` clips real gradients, got complex ones: `clip_by_value` clips their "
            "modulus."
        )
    x = jnp.asarray(x)
    return jnp.maximum(x, constant_like(0, x)) if sign > 0 else -jnp.minimum(x, constant_like(0, x))
