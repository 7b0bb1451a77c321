"""Clip each element alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import Threshold, check_lower_bound, check_threshold
from .._clip import measured_types
from .._devices import AxisName, of_pair
from .._inject import named_strategy
from .._leaves import is_gradient
from .._limits import constant
from .._memory import changed_in_place, constant_like
from .._norms import global_norm, group_norms
from .._rescale import OnNonfinite, check_on_nonfinite, clamped, ratio, shrink
from .._state import (
    check_trees,
    init_threshold,
    initial_state,
    next_state,
    read_threshold,
    transformation,
)


@named_strategy
def clip_by_value(
    limit: Threshold,
    upper: Threshold = None,
    *,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each element: `clip_by_value(limit)` to ±limit, `clip_by_value(lower, upper)` between.

    $$ g_i \leftarrow \min(\max(g_i, -\text{limit}), \text{limit}) $$

    For reproducing models that were trained with it; it turns the direction of the gradient
    towards a corner of the cube. As a clip on a norm it is the largest modulus that is measured
    here, so that is the `grad_norm` of its state and metrics (between unequal bounds: the element
    that goes furthest beyond its bound, and that bound).

    Args:
      limit: Largest modulus that passes, non-negative, as `max_norm` in `clip_by_global_norm`.
        Complex elements keep their phase. With `upper`: the lower bound, at most 0.
      upper: The upper bound, non-negative; leave it out for symmetric bounds.
      axis_name: See `global_norm`; the clamp needs no other device, but the norm in the state does.
      on_nonfinite: `"zero"` makes each element that is NaN or infinite zero; `"propagate"`, NaN.

    Returns:
      A transformation with a `ClipState` of one norm.

    Raises:
      ValueError: For a bound that is NaN, boolean, not a number, or on the wrong side of 0; for
        complex leaves between unequal bounds.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_value(1.0)
    >>> grads = jnp.array([-3.0, 0.5])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)
    [-1.   0.5]

    Mikolov, *Statistical Language Models Based on Neural Networks*, thesis, Brno 2012, section
    3.3; `clipvalue` in Keras, `optax.clip`.
    """
    check_on_nonfinite(on_nonfinite)
    if upper is None:
        down = up = constant(check_threshold("limit", limit))
    else:
        down = constant(check_lower_bound("limit", limit))
        up = constant(check_threshold("upper", upper))
    fill = jnp.nan if on_nonfinite == "propagate" else 0.0
    clamp = functools.partial(clamped, fill=fill)

    def init(params):
        norm = measured_types(functools.partial(global_norm, order=jnp.inf), params, axis_name)
        return initial_state(norm, (init_threshold(down), init_threshold(up)))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_trees(updates, params)
        low, down_state = read_threshold(down, state.limit_state[0])
        high, up_state = read_threshold(up, state.limit_state[1])
        if upper is None:
            norm, bound = global_norm(updates, order=jnp.inf, axis_name=axis_name), high
        else:
            norm, bound = _furthest(updates, low, high, axis_name)
        held = jax.tree.map(
            lambda x: changed_in_place(clamp, jnp.asarray(x), low, high) if is_gradient(x) else x,
            updates,
        )
        finite = jnp.isfinite(norm)
        factor = jnp.where(finite, shrink(norm, bound), fill)
        return held, next_state(
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
            "`upper` must be left out for complex gradients: they are clipped by modulus."
        )
    x = jnp.asarray(x)
    return jnp.maximum(x, constant_like(0, x)) if sign > 0 else -jnp.minimum(x, constant_like(0, x))
