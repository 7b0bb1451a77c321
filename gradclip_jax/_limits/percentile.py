"""A percentile of the norms of the past, over a window."""

import jax
import jax.numpy as jnp

from .._checks import check_percentile, check_whole_number
from .._types import Threshold
from .limit import Limit
from .window import is_full, new_window, percentile_of, push


def percentile(percentile: Threshold = 95.0, *, window: int = 128) -> Limit:
    r"""A percentile of the last `window` norms, without the current one.

    $$ L_t = P_p(n_{t-W}, \dots, n_{t-1}), \qquad L_t = \infty \text{ for } t \le W $$

    For rare spikes, when you know which share of the steps to clip but not the norm: about
    1 - p/100 of the steps are clipped while the norms keep their distribution.

    Args:
      percentile: p, between 0 and 100; 95 in the source. A number, a scalar array or a traced
        value.
      window: W, the number of norms remembered, at least 1; 128 in the source. The limit is
        infinite until the window is full: `minimum(percentile(), 1.0)` clips from the first step.

    Returns:
      A `Limit`. The window holds raw norms, not clipped ones, so the limit follows a lasting
      change: by default a rise passes from its 9th step, and up to 6 spikes in the window do not
      lift the limit above the other norms. A constant stream is never clipped. NaN and infinity
      stay out of the window. The percentile is linear between ranks, as in `np.percentile`.

    Raises:
      ValueError: For a percentile outside of 0 to 100, or a window that is not a whole number of
        at least 1.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import percentile
    >>> median = percentile(50.0, window=2)
    >>> state = median.init(jnp.float32(0.0))
    >>> for norm in (1.0, 3.0, 9.0):
    ...     limit, state = median.update(jnp.float32(norm), state)
    ...     print(limit)
    inf
    inf
    2.0

    Golub, *Recurrent Whisperer*, 2018, https://github.com/mattgolub/recurrent-whisperer, class
    `AdaptiveGradNormClip`, for the defaults; Xiang et al., *Structured 3D Latents for Scalable and
    Versatile 3D Generation*, 2025, https://arxiv.org/abs/2412.01506, for the past alone.
    """
    percentile, window = check_percentile(percentile), check_whole_number("window", window)

    def init(norm: jax.Array) -> jax.Array:
        return new_window(norm, window)

    def update(norm: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
        limit = jnp.where(is_full(norms), percentile_of(norms, percentile), jnp.inf)
        return limit, push(norms, norm)

    return Limit(init, update)
