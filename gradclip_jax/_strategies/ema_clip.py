"""Clip what is so many deviations above a moving average of the norms."""

import optax

from .._checks import Threshold
from .._clip import Measure, clip_to_limit
from .._devices import AxisName
from .._inject import named_strategy
from .._limits.ema import ema
from .._norms import global_norm
from .._rescale import OnNonfinite


@named_strategy
def ema_clip(
    k: Threshold = 3.0,
    decay: Threshold = 0.99,
    *,
    ratio: float = 1.0,
    target: tuple[float, float] | None = None,
    warmup_steps: int = 25,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the gradient to a moving average of its norms and k deviations more.

    $$ g_t \leftarrow g_t \cdot \min\!\Big(1, \frac{L_t}{\lVert g_t \rVert}\Big), \qquad
       L_t = r \mu_t + k \sigma_t $$

    with mean and deviation of the norms before this one, as they were clipped. For spikes above a
    level that drifts or jumps: it clips to its own trigger, so a lasting rise comes through.

    Args:
      k: Number of deviations, non-negative; 3 is usual.
      decay: beta, the weight of the past, between 0 and 1 (exclusive); 0.99 remembers 100 steps.
      ratio: r, at least 1, for limits that are multiples of the mean: `ema_clip(0.0, ratio=2.0)`.
      target: None, or a pair (ratio, decay): then a norm above the trigger is clipped to so many
        times a mean of that decay. `ema_clip(0.0, 0.99, ratio=2.0, target=(1.1, 0.9))` is the
        rule of PDE-Transformer.
      warmup_steps: Steps that pass and from which the first mean and deviation come, at least 1.
        For a cap from the first step: `clip_to_limit(minimum(ema(), 1.0))`.
      measure: What has a limit of its own, as in `clip_to_limit`: `leaf_norms` gives one to each
        array, with as much state again for each.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a norm that is not finite leaves the statistics alone.

    Returns:
      A transformation with a `ClipState`. Sigma counts as a thousandth of mu at least, so a
      constant stream never fires; a norm of 0 does not enter. While every step is clipped sigma
      grows by 4 % a step: with a noise of 10 % a doubled level passes after 28 steps, a tenfold
      one after 83, and from a level without any noise after 217.

    Raises:
      ValueError: For a number outside of its range.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.ema_clip(0.0, ratio=2.0, warmup_steps=1)
    >>> state = clip.init(jnp.zeros(2))
    >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([12.0, 16.0])):
    ...     updates, state = clip.update(grads, state)
    >>> print(updates)  # twice the mean of 5
    [6. 8.]

    The rule of three sigma on an exponential moving average, as in smartclip and in Open-Sora
    Plan 1.5; with `target`, the clip of Holzschuh, Liu, Kohl, Thuerey, *PDE-Transformer: Efficient
    and Versatile Transformers for Physics Simulations*, ICML 2025,
    https://arxiv.org/abs/2505.24717, as in its code. We depart from smartclip in that a norm has no
    part in its own limit and enters as clipped, from Open-Sora Plan in that what is clipped enters
    at all (there statistics freeze, and a lasting rise is clipped for ever), and from both in the
    bias correction; from PDE-Transformer in that a target above the norm leaves it alone.
    """
    return clip_to_limit(
        ema(k, decay, ratio=ratio, target=target, warmup_steps=warmup_steps),
        measure,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
