"""A percentile of the norms of the past, over a window."""

import jax
import jax.numpy as jnp

from .._checks import check_percentile, check_whole_number
from .._types import Threshold
from .limit import Limit
from .window import is_full, new_window, percentile_of, push


def percentile(percentile: Threshold = 95.0, *, window: int = 128) -> Limit:
    r"""The percentile of the last `window` norms, before this one.

    $$ L_t = P_p(n_{t-W}, \dots, n_{t-1}), \qquad L_t = \infty \text{ for } t \le W $$

    Norms enter as they are, not as clipped, so that the limit follows a lasting change. The
    percentile is exact, linear between ranks as in `np.percentile`. A constant stream never
    fires. Norms that are not finite do not enter.

    Args:
      percentile: p, between 0 and 100; a number, a scalar array or a traced value.
      window: W, the number of norms remembered, at least 1. Until as many are there the limit is
        infinite: `minimum(percentile(), 1.0)` clips from the first step.

    Raises:
      ValueError: For a percentile or a window that may not be.

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
    """
    percentile, window = check_percentile(percentile), check_whole_number("window", window)

    def init(norm: jax.Array) -> jax.Array:
        return new_window(norm, window)

    def update(norm: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
        limit = jnp.where(is_full(norms), percentile_of(norms, percentile), jnp.inf)
        return limit, push(norms, norm)

    return Limit(init, update)
