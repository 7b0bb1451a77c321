"""ZClip: what is too many deviations above the mean goes back towards the mean."""

import optax

from .._checks import check_threshold
from .._clip import Measure, clip_to_limit
from .._inject import strategy
from .._limits import constant, minimum
from .._limits.zscore import zscore
from .._norms import global_norm
from .._rescale import OnNonfinite
from .._types import AxisName, Threshold


@strategy("z_max", "decay", "max_norm")
def zclip(
    z_max: Threshold = 2.5,
    *,
    decay: Threshold = 0.97,
    warmup_steps: int = 25,
    max_norm: Threshold = 1.0,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip a norm whose z-score is too high, the harder the higher it is; and cap the rest.

    $$ z_t = \frac{n_t - \mu}{\sigma}, \qquad
       x_t = \mu + z_\text{max}^2 \sigma / z_t \text{ if } z_t > z_\text{max}, \text{ else } n_t $$
    $$ \mu' = \alpha \mu + (1 - \alpha) x_t, \qquad
       \sigma'^2 = \alpha \sigma^2 + (1 - \alpha)(x_t - \mu')^2, \qquad
       L_t = \min(x_t, \text{max\_norm}) $$

    For loss spikes in the pre-training of language models: rare norms far above a level that
    moves slowly.

    Args:
      z_max: Largest z-score that passes, finite and non-negative; 2.5 in the paper.
      decay: alpha, between 0 and 1 (exclusive); 0.97 in the paper, a memory of 33 steps.
      warmup_steps: Steps from which the first mean and deviation come, at least 1; 25 in the
        paper. Until then only the cap holds.
      max_norm: A cap that holds from the first step, as in `clip_by_global_norm`; 1.0 in the
        authors' code. None for none. Statistics take in norms as clipped by the z-score, not by
        the cap.
      measure: What has a limit of its own, as in `clip_to_limit`: `leaf_norms` gives one to each
        array, with as much state again for each.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a norm that is not finite leaves the statistics alone.

    Returns:
      A transformation with a `ClipState`. Sigma counts as a thousandth of mu at least, so a
      constant stream never fires; a norm of 0 does not enter. A lasting rise may never pass: what
      is far above the mean comes out at the mean, and moves it by next to nothing. With a noise
      of 10 % a rise to 1.5 times the level is let through after 45 steps, and a doubling not in
      30,000. Where the level may jump (a new task, another batch size), use `limits.ema`.

    Raises:
      ValueError: For a number outside of its range.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.zclip(2.0, warmup_steps=2, max_norm=None)
    >>> state = clip.init(jnp.zeros(2))
    >>> for grads in (jnp.array([2.0, 0.0]), jnp.array([0.0, 4.0]), jnp.array([7.0, 0.0])):
    ...     updates, state = clip.update(grads, state)
    >>> print(updates)  # mean 3, deviation 1, z 4: 3 + 2 * 2 / 4
    [4. 0.]

    Kumar, Owen, Chowdhury, Güra, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*, 2025,
    https://arxiv.org/abs/2504.02507, the reciprocal rule, as in the authors' code, which adds the
    cap. We depart from it in what is not finite (one NaN makes its mean NaN for ever, and only
    the cap is left), in the floor of sigma (there 1e-6 in units of the norm, so that a constant
    stream fires by rounding), and in a norm of 0.
    """
    cap = constant(check_threshold("max_norm", max_norm))
    return clip_to_limit(
        minimum(zscore(z_max, decay=decay, warmup_steps=warmup_steps), cap),
        measure=measure,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
