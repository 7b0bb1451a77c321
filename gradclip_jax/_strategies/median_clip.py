"""Clip outliers by the median and the MAD of the window before them."""

import optax

from .._checks import Threshold
from .._clip import Measure, clip_to_limit
from .._devices import AxisName
from .._inject import named_strategy
from .._limits.median import median
from .._norms import global_norm
from .._rescale import OnNonfinite


@named_strategy
def median_clip(
    k: Threshold = 5.0,
    *,
    window: int = 128,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the gradient to k robust deviations above the median of its norms.

    $$ g_t \leftarrow g_t \cdot \min\!\Big(1, \frac{L_t}{\lVert g_t \rVert}\Big), \qquad
       L_t = m + k \cdot \max(1.4826 \, \text{MAD}, \; 10^{-3} m) $$

    with m the median of the W norms before this one and MAD the median of their distances from
    it. For spikes that come often or in bursts: a mean and a standard deviation are carried away
    by one of them, median and MAD only when half of the window are spikes.

    Args:
      k: Number of deviations, finite and non-negative; 5 lets all but far outliers pass. 1.4826
        MAD is the standard deviation where norms are normally distributed. A number, a scalar
        array or a traced value; for a schedule use `optax.inject_hyperparams`.
      window: W, the number of norms remembered, at least 1; 128, to be full soon.
      measure: What has a limit of its own, as in `clip_to_limit`: `leaf_norms` gives one to each
        array, with as much state again for each.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a norm that is not finite does not enter the window.

    Returns:
      A transformation with a `ClipState`. The first W steps with a finite norm pass unclipped:
      `clip_to_limit(minimum(median(5.0), 1.0))` has a cap from the first step. Norms enter as
      they are, not as clipped: after a lasting change the limit is the old one for half a window
      (64 steps by default) and then follows; with noise of 10 % a doubling passes after 30 steps,
      and 94 to 97 after a rise or fall the limit is in place. A constant stream is never clipped:
      where the MAD is 0 the limit is 1.005 times the median. When more than half of the window are
      zeros the limit is 0, and so are the updates.

    Raises:
      ValueError: For a k that is negative or not a finite number, or a window that is not a whole
        number of at least 1.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.median_clip(2.0, window=3)
    >>> state = clip.init(jnp.zeros(()))
    >>> for grad in (1.0, 2.0, 90.0, 9.0):  # 2 + 2 * 1.4826 * 1
    ...     updates, state = clip.update(jnp.float32(grad), state)
    >>> print(f"{updates:.4f}")
    4.9652

    Hampel, *The Influence Curve and its Role in Robust Estimation*, JASA 69, 1974,
    https://doi.org/10.1080/01621459.1974.10482962 (median and MAD); as a rule for
    outliers: Leys et al., *Detecting outliers: Do not use standard deviation around the mean, use
    absolute deviation around the median*, 2013, https://doi.org/10.1016/j.jesp.2013.03.013. No
    paper on gradients has it to our knowledge. Norms are bounded above alone, and the deviation
    is at least a thousandth of the median, so that rounding is no outlier.
    """
    return clip_to_limit(
        median(k, window=window), measure, axis_name=axis_name, on_nonfinite=on_nonfinite
    )
