"""Clip what stands out from the window before it: a percentile of the past."""

import optax

from .._checks import Threshold
from .._clip import Measure, clip_to_limit
from .._devices import AxisName
from .._inject import named_strategy
from .._limits.percentile import percentile as percentile_of_the_past
from .._norms import global_norm
from .._rescale import OnNonfinite


@named_strategy
def percentile_clip(
    percentile: Threshold = 95.0,
    *,
    window: int = 128,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the gradient to a percentile of the norms before this one.

    $$ g_t \leftarrow g_t \cdot \min\!\Big(1, \frac{L_t}{\lVert g_t \rVert}\Big), \qquad
       L_t = P_p(\lVert g_{t-W} \rVert, \dots, \lVert g_{t-1} \rVert) $$

    For spikes, with a share of steps to clip instead of a norm: about 1 - p/100 of them while the
    norms keep their distribution. The norm at hand has no part in its own limit.

    Args:
      percentile: p, between 0 and 100; 95 in the paper. A number, a scalar array or a traced
        value; for a schedule use `optax.inject_hyperparams`.
      window: W, the number of norms remembered, at least 1; 128 in the paper.
      measure: What has a limit of its own, as in `clip_to_limit`: `leaf_norms` gives one to each
        array, with as much state again for each.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a norm that is not finite does not enter the window.

    Returns:
      A transformation with a `ClipState`. The first W steps with a finite norm pass unclipped:
      `clip_to_limit(minimum(percentile(95.0), 1.0))` has a cap from the first step. Norms enter
      as they are, not as clipped, and leave after W steps. By default up to 6 spikes at a time
      leave the limit within the rest of the norms, and a lasting rise passes from its 9th step. A
      constant stream is never clipped. When more than p/100 of the window are zeros the limit is
      0, and so are the updates.

    Raises:
      ValueError: For a percentile outside of 0 to 100, or a window that is not a whole number of
        at least 1.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.percentile_clip(50.0, window=2)
    >>> state = clip.init(jnp.zeros(2))
    >>> for grads in (jnp.array([0.6, 0.8]), jnp.array([0.0, 4.0]), jnp.array([3.0, 4.0])):
    ...     updates, state = clip.update(grads, state)
    >>> print(updates, gradclip_jax.metrics(state)["clip_limit"])  # the median of 1 and 4
    [1.5 2. ] 2.5

    Golub, *Recurrent Whisperer*, 2018, https://github.com/mattgolub/recurrent-whisperer, class
    `AdaptiveGradNormClip`, whence the defaults; the past alone, as in Xiang et al., *Structured 3D
    Latents for Scalable and Versatile 3D Generation*, CVPR 2025, https://arxiv.org/abs/2412.01506,
    whose code has a window of 1000 and, like this, no limit before the window is full. There the
    limit has a cap as well: `minimum` is for that.
    """
    return clip_to_limit(
        percentile_of_the_past(percentile, window=window),
        measure,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
