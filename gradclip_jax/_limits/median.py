"""The median of the past plus k robust deviations: half of the window may be spikes."""

import jax
import jax.numpy as jnp

from .._checks import check_number, check_whole_number
from .._types import Threshold
from .limit import Limit
from .window import is_full, new_window, percentile_of, push

SIGMA_OF_MAD = 1.4826  # of a normal distribution: 1 / (its 75th percentile)
LEAST_SIGMA = 1e-3  # of the median: for a window in which most norms are the same


def median(k: Threshold = 5.0, *, window: int = 128) -> Limit:
    r"""The median of the last `window` norms plus k robust deviations (MAD), for bursts of spikes.

    $$ L_t = m + k \cdot \max(1.4826 \, \text{MAD}, \; 10^{-3} m), \quad
       m = \operatorname{med}(n_{t-W}, \dots, n_{t-1}), \quad
       \text{MAD} = \operatorname{med}_i |n_i - m| $$

    and infinity for t <= W. One spike carries a mean and a standard deviation away; the median and
    the MAD stand until half of the window are spikes.

    Args:
      k: Number of deviations, finite and non-negative; 5 clips far outliers only. 1.4826 MAD is
        the standard deviation of a normal distribution. A number, a scalar array or a traced value.
      window: W, the number of norms remembered, at least 1. The limit is infinite until the window
        is full: `minimum(median(), 1.0)` clips from the first step.

    Returns:
      A `Limit`. The window holds raw norms, not clipped ones, so the limit follows a lasting
      change after half a window. A constant stream is never clipped: the deviation counts as a
      thousandth of the median at least. NaN and infinity stay out of the window.

    Raises:
      ValueError: For a k that is negative or not finite, or a window that is not a whole number of
        at least 1.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import median
    >>> robust = median(2.0, window=3)
    >>> state = robust.init(jnp.float32(0.0))
    >>> for norm in (1.0, 2.0, 90.0, 9.0):
    ...     limit, state = robust.update(jnp.float32(norm), state)
    >>> print(f"{limit:.4f}")  # 2 + 2 * 1.4826 * 1
    4.9652

    Hampel, *The Influence Curve and its Role in Robust Estimation*, JASA 69, 1974,
    https://doi.org/10.1080/01621459.1974.10482962 (median and MAD). We know of no paper that
    applies it to gradients.
    """
    k = check_number("k", k, "be a finite number of at least 0", 0)
    window = check_whole_number("window", window)

    def init(norm: jax.Array) -> jax.Array:
        return new_window(norm, window)

    def update(norm: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
        middle = percentile_of(norms, 50)
        deviation = percentile_of(jnp.abs(norms - middle[None]), 50)
        sigma = jnp.maximum(SIGMA_OF_MAD * deviation, LEAST_SIGMA * middle)
        limit = middle + jnp.asarray(k).astype(norm.dtype) * sigma
        return jnp.where(is_full(norms), limit, jnp.inf), push(norms, norm)

    return Limit(init, update)
