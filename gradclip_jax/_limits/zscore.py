"""The z-score of a norm: a norm too far above the mean is clipped to near the mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import check_between_0_and_1, check_number, check_steps
from .._export import exportable
from .._types import Threshold
from .limit import Limit
from .moments import lerp, std_floor, std_update, unless_zero


@exportable
class ZScoreState(NamedTuple):
    """Number of norms of the warm-up so far, and mean and deviation of the norms."""

    steps: jax.Array
    mean: jax.Array
    deviation: jax.Array


def zscore(z_max: Threshold = 2.5, *, decay: Threshold = 0.97, warmup_steps: int = 25) -> Limit:
    r"""The z-score of a norm: above `z_max` the limit falls back towards the mean.

    $$ z_t = \frac{n_t - \mu}{\sigma}, \qquad
       L_t = \mu + z_\text{max}^2 \sigma / z_t \text{ if } z_t > z_\text{max}, \qquad
       x_t = \min(n_t, L_t) $$
    $$ \mu' = \alpha \mu + (1 - \alpha) x_t, \qquad
       \sigma'^2 = \alpha \sigma^2 + (1 - \alpha)(x_t - \mu')^2 $$

    and mu + z_max sigma otherwise. For rare spikes above a level that moves slowly. The larger a
    spike, the nearer the mean it is clipped to, and the less it moves the mean: a lasting rise may
    never pass (see `zclip`). `ema` follows one.

    Args:
      z_max: Largest z-score that passes, finite and non-negative; 2.5 in the paper.
      decay: alpha, the weight of the past, between 0 and 1 (exclusive); 0.97 in the paper.
      warmup_steps: Norms in the warm-up, at least 1; 25 in the paper. During the warm-up the limit
        is infinite, and mu and sigma are the mean and deviation of the raw norms.

    Returns:
      A `Limit`. Sigma counts as a thousandth of mu at least, so that a constant stream is never
      clipped. Zero norms (frozen layers), NaN and infinity are ignored.

    Raises:
      ValueError: For a number outside of its range.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import zscore
    >>> limit = zscore(2.0, warmup_steps=2)
    >>> state = limit.init(jnp.float32(0.0))
    >>> for norm in (2.0, 4.0, 7.0):  # mean 3, deviation 1
    ...     value, state = limit.update(jnp.float32(norm), state)
    ...     print(value)
    inf
    inf
    4.0

    Kumar, Owen, Chowdhury, Güra, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*, 2025,
    https://arxiv.org/abs/2504.02507, the reciprocal rule; `zclip` has our departures.
    """
    z_max = check_number("z_max", z_max, "be a finite number of at least 0", 0)
    decay = check_between_0_and_1("decay", decay)
    warmup_steps = check_steps("warmup_steps", warmup_steps)

    def init(norm: jax.Array) -> ZScoreState:
        return ZScoreState(
            jnp.zeros_like(norm, dtype=jnp.int32), jnp.zeros_like(norm), jnp.zeros_like(norm)
        )

    def update(norm: jax.Array, state: ZScoreState) -> tuple[jax.Array, ZScoreState]:
        z, alpha = (jnp.asarray(x).astype(norm.dtype) for x in (z_max, decay))
        steps, mean, deviation = state
        warm = steps >= jnp.asarray(warmup_steps).astype(steps.dtype)
        most = z * std_floor(deviation, mean)
        above = norm - mean
        fires = above > most
        usable = fires & (most > 0)
        # Not divided by a norm, of whose derivative the square underflows from 1e-19.
        times = jnp.where(usable, above / jnp.where(usable, most, 1), 1)
        target = mean + most / times  # z_max^2 sigma / z
        limit = jnp.where(fires, target, jnp.maximum(mean + most, norm))
        limit = jnp.where(warm, limit, jnp.inf)
        x = jnp.minimum(norm, limit)
        weight = jnp.where(warm, 1 - alpha, 1 / (steps + 1).astype(norm.dtype))
        # Its distance from the new mean, as in the paper; in the warm-up as Welford has it.
        share = weight * (1 - weight) * jnp.where(warm, 1 - weight, 1)
        new = ZScoreState(
            jnp.where(warm, steps, steps + 1),
            lerp(mean, x, weight),
            std_update(deviation, x - mean, weight, share),
        )
        return limit, unless_zero(norm, new, state)

    return Limit(init, update)
