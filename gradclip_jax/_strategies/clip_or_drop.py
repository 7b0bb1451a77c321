"""Clip what is above one norm, and drop what is above another."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_threshold
from .._clip import Measure, clip_to_limit
from .._inject import strategy
from .._limits import Limit, constant
from .._norms import global_norm
from .._rescale import OnNonfinite
from .._types import AxisName, Threshold


@strategy("max_norm", "drop_norm")
def clip_or_drop(
    max_norm: Threshold,
    *,
    drop_norm: Threshold,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink what is above `max_norm` to it, and make zeros of what is above `drop_norm`.

    $$ g \leftarrow g \cdot \begin{cases}
         \min(1, \text{max\_norm} / \lVert g \rVert) & \lVert g \rVert \le \text{drop\_norm} \\
         0 & \text{otherwise} \end{cases} $$

    For batches that are broken rather than large: their direction is wrong at any length.

    **A zero gradient is a step all the same.** Adam moves by its momentum, its moments and the
    weights decay. To skip the step, put the limit around the optimizer instead:
    `skip_spikes(optax.chain(clip_by_global_norm(max_norm), optimizer), grad_norm=drop_norm)`.

    Args:
      max_norm: Largest norm that passes as it is, as in `clip_by_global_norm`. None for none.
      drop_norm: Largest norm that is shrunk, at least `max_norm`. None for none. May be a schedule.
      measure: See `clip_to_limit`; `leaf_norms` drops single arrays.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`.

    Returns:
      A transformation with a `ClipState`, whose `clip_limit` is 0 where it drops.

    Raises:
      ValueError: For thresholds as in `clip_by_global_norm`; for a `drop_norm` below `max_norm`.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_or_drop(1.0, drop_norm=100.0)
    >>> state = clip.init(jnp.zeros(2))
    >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([300.0, 400.0])):
    ...     updates, state = clip.update(grads, state)
    ...     print(updates)
    [0.6 0.8]
    [0. 0.]

    `drop_norm` of AXLearn's `clip_by_global_norm`, `grad_norm_to_clip_to_zero` of Lingvo. We depart
    in a norm of NaN, which becomes zero here: in AXLearn, whose factor is 0, it stays 0 * NaN.
    """
    max_norm = check_threshold("max_norm", max_norm)
    drop_norm = check_threshold("drop_norm", drop_norm)
    known = isinstance(max_norm, float) and isinstance(drop_norm, float)
    if known and drop_norm < max_norm < math.inf:
        raise ValueError(
            f"`drop_norm` must be at least `max_norm`, got {drop_norm!r} and {max_norm!r}: nothing "
            "would be clipped. To drop alone, pass `max_norm=None`."
        )
    kept, shrunk = constant(max_norm), constant(drop_norm)

    def init(norm: jax.Array) -> Any:
        return kept.init(norm), shrunk.init(norm)

    def update(norm: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        limit, kept_state = kept.update(norm, state[0])
        largest, shrunk_state = shrunk.update(norm, state[1])
        return jnp.where(norm > largest, 0, limit), (kept_state, shrunk_state)

    return clip_to_limit(
        Limit(init, update, adaptive=False),
        measure=measure,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
