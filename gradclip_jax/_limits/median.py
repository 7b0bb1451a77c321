"""So many deviations above the median of the past: half of the window may be spikes."""

import jax
import jax.numpy as jnp

from .._checks import check_number, check_whole_number
from .._types import Threshold
from .limit import Limit
from .window import is_full, new_window, percentile_of, push

SIGMA_OF_MAD = 1.4826  # of a normal distribution: 1 / (its 75th percentile)
LEAST_SIGMA = 1e-3  # of the median: for a window in which most norms are the same


def median(k: Threshold = 5.0, *, window: int = 128) -> Limit:
    r"""The median of the last `window` norms, before this one, and k robust deviations more.

    $$ L_t = m + k \cdot \max(1.4826 \, \text{MAD}, \; 10^{-3} m), \quad
       m = \operatorname{med}(n_{t-W}, \dots, n_{t-1}), \quad
       \text{MAD} = \operatorname{med}_i |n_i - m| $$

    and infinity for t <= W. Norms enter as they are, not as clipped. Spikes hardly move the limit
    while they are fewer than half of the window. Where most norms are the same the MAD is 0, and
    the deviation counts as a thousandth of the median: constant streams never fire. Norms that
    are not finite do not enter.

    Args:
      k: Number of deviations, finite and non-negative; a number, a scalar array or a traced value.
      window: W, the number of norms remembered, at least 1. Until as many are there the limit is
        infinite: `minimum(median(), 1.0)` clips from the first step.

    Raises:
      ValueError: For a k or a window that may not be.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import median
    >>> robust = median(2.0, window=3)
    >>> state = robust.init(jnp.float32(0.0))
    >>> for norm in (1.0, 2.0, 90.0, 9.0):
    ...     limit, state = robust.update(jnp.float32(norm), state)
    >>> print(f"{limit:.4f}")  # 2 + 2 * 1.4826 * 1
    4.9652
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
