"""ZClip: what is too many deviations above the mean goes back towards the mean."""

import optax

from .._checks import check_threshold
from .._clip import Measure, clip_to_limit
from .._inject import strategy
from .._limits import constant, minimum
from .._limits.zscore import zscore
from .._norms import global_norm
from .._per_layer import PerLayer
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
    per_layer: PerLayer = False,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""ZClip: clip spikes of the norm by their z-score, the larger the closer to the mean.

    $$ z_t = \frac{n_t - \mu}{\sigma}, \qquad
       x_t = \mu + z_\text{max}^2 \sigma / z_t \text{ if } z_t > z_\text{max}, \text{ else } n_t $$
    $$ \mu' = \alpha \mu + (1 - \alpha) x_t, \qquad
       \sigma'^2 = \alpha \sigma^2 + (1 - \alpha)(x_t - \mu')^2, \qquad
       L_t = \min(x_t, \text{max\_norm}) $$

    For loss spikes in pre-training: rare norms far above a level that moves slowly.

    Args:
      z_max: Largest z-score that passes, finite and non-negative; 2.5 in the paper.
      decay: alpha, between 0 and 1 (exclusive); 0.97 in the paper, a memory of 33 steps.
      warmup_steps: Steps for the first mean and deviation, at least 1, with the cap alone; 25.
      max_norm: A cap from the first step on; 1.0 in the authors' code. None for none.
      measure: See `clip_to_limit`; `leaf_norms` gives each array a limit and statistics.
      per_layer: See `clip_to_limit`.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a norm that is not finite leaves the statistics alone.

    Returns:
      A transformation with a `ClipState`. Sigma is at least a thousandth of mu, so a constant
      stream is never clipped; zeros are ignored. A lasting rise may never pass: with a noise of
      10 % a doubling takes more than 30,000 steps. Where the level may jump, use `limits.ema`.

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
    https://arxiv.org/abs/2504.02507, the reciprocal rule with the authors' cap; their modes `mean`,
    `percentile` and `skip_update_on_spike` are compositions (docs, *Papers as compositions*). We
    depart in NaN (there the mean is NaN forever), in the floor of sigma (there 1e-6), in zeros.
    """
    cap = constant(check_threshold("max_norm", max_norm))
    return clip_to_limit(
        minimum(zscore(z_max, decay=decay, warmup_steps=warmup_steps), cap),
        measure=measure,
        per_layer=per_layer,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
