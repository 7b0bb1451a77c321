"""Mean and standard deviation of a window of the past, as in OLMo-core, MaxText and levanter."""

import jax
import jax.numpy as jnp

from .._checks import check_number, check_whole_number
from .._types import Threshold
from .limit import Limit
from .moments import std_floor
from .window import new_window, push


def deviation(k: Threshold = 6.0, *, window: int = 128, min_count: int = 64) -> Limit:
    r"""K standard deviations above the mean of the last `window` norms, before this one.

    $$ L_t = \mu + k \sigma, \qquad \mu = \frac1n \sum_i n_i, \qquad
       \sigma^2 = \frac{1}{n - 1} \sum_i (n_i - \mu)^2 $$

    over the norms $n_{t-W}, \dots, n_{t-1}$, and infinity for the first of them. For loss spikes in
    pre-training, around an optimizer: `skip_spikes(optimizer, grad_norm=deviation(),
    loss=deviation())` is OLMo-core's and MaxText's. Norms enter as they are, skipped or not, so a
    new level becomes the window's within W steps. A spike widens sigma for W steps; `limits.median`
    resists.

    Args:
      k: Number of standard deviations, finite and non-negative; 6 in all three.
      window: W, the number of norms remembered, at least 2; 128 in all three.
      min_count: Norms, this one included, from which on there is a limit, 2 to `window`; 64.

    Raises:
      ValueError: For a number outside of its range, such as a window below `min_count`.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import deviation
    >>> limit = deviation(2.0, window=4, min_count=3)
    >>> state = limit.init(jnp.float32(0.0))
    >>> for norm in (1.0, 3.0, 9.0):  # mean 2, deviation 1.41421
    ...     value, state = limit.update(jnp.float32(norm), state)
    ...     print(f"{value:.4f}")
    inf
    inf
    4.8284

    OLMo-core, `SkipStepOptimizer`, https://github.com/allenai/OLMo-core. We depart in norms that
    are not finite, which do not enter (there one NaN skips every step of the next window), and in
    sigma, which is at least a thousandth of the mean: a constant stream is never a spike.
    """
    k = check_number("k", k, "be a finite number of at least 0", 0)
    window = check_whole_number("window", window, 2)
    min_count = check_whole_number("min_count", min_count, 2)
    if window < min_count:
        raise ValueError(
            f"`window` must be at least `min_count`, got {window} and {min_count}: it would never "
            "hold as many norms."
        )

    def init(norm: jax.Array) -> jax.Array:
        return new_window(norm, window)

    def update(norm: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = jnp.isfinite(norms)
        count = jnp.sum(known, axis=0).astype(norm.dtype)
        # Each share is added up, not the norms: their sum may overflow.
        mean = jnp.sum(jnp.where(known, norms, 0) / jnp.maximum(count, 1)[None], axis=0)
        distance = jnp.where(known, norms - mean[None], 0)
        # Squares are taken of numbers of at most 1, for those of distances may overflow.
        largest = jnp.max(jnp.abs(distance), axis=0)
        share = distance / jnp.where(largest > 0, largest, 1)[None]
        variance = jnp.sum(share * share, axis=0) / jnp.maximum(count - 1, 1)
        spread = largest * jnp.sqrt(jnp.where(variance > 0, variance, 1))
        sigma = std_floor(jnp.where(variance > 0, spread, 0), mean)
        limit = mean + jnp.asarray(k).astype(norm.dtype) * sigma
        return jnp.where(count + 1 >= min_count, limit, jnp.inf), push(norms, norm)

    return Limit(init, update)
