"""An exponential moving average of the norms plus k standard deviations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import check_above, check_between_0_and_1, check_number, check_steps
from .._export import exportable
from .._types import Threshold
from .limit import Limit
from .moments import lerp, std_floor, std_update, unless_zero


@exportable
class MeanState(NamedTuple):
    """A mean free of the bias of its start: the sum of its weights, if a new norm weighs 1."""

    weight: jax.Array
    mean: jax.Array


@exportable
class EmaState(NamedTuple):
    """Number of norms of the warm-up so far, mean and deviation, and the mean for a target."""

    steps: jax.Array
    average: MeanState
    deviation: jax.Array
    target: MeanState | None


def ema(
    k: Threshold = 3.0,
    *,
    decay: Threshold = 0.99,
    ratio: float = 1.0,
    target: tuple[float, float] | None = None,
    warmup_steps: int = 25,
) -> Limit:
    r"""An exponential moving average of the norms plus k standard deviations: the rule of 3 sigma.

    $$ L_t = r \mu_t + k \sigma_t, \qquad
       \mu_t = \sum_{s<t} w_s x_s, \quad \sigma_t^2 = \sum_{s<t} w_s (x_s - \mu_t)^2, \quad
       w_s \propto \beta^{t-s}, \quad x_s = \min(n_s, L_s) $$

    For spikes above a level that drifts or jumps: a clipped norm widens sigma by 4 % a step, so
    that a lasting rise passes in the end. The weights sum to 1 (bias correction).

    Args:
      k: Number of deviations, finite and non-negative; 3 is usual.
      decay: beta, the weight of the past, between 0 and 1 (exclusive); 0.99 remembers 100 steps.
      ratio: r, at least 1, for multiples of the mean: `ema(0.0, ratio=2.0)` is twice the mean.
      target: None, or a pair (ratio, decay) with a ratio above 0: a norm above the limit is clipped
        to that ratio of a mean with that decay. `ema(0.0, ratio=2.0, target=(1.1, 0.9))` is the
        rule of PDE-Transformer.
      warmup_steps: Norms in the warm-up, at least 1. During the warm-up the limit is infinite:
        `minimum(ema(), 1.0)` clips from the first step.

    Returns:
      A `Limit`. Sigma counts as a thousandth of mu at least, so that a constant stream is never
      clipped. Zero norms (frozen layers), NaN and infinity are ignored.

    Raises:
      ValueError: For a number outside of its range.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import ema
    >>> twice_the_mean = ema(0.0, ratio=2.0, warmup_steps=1)
    >>> state = twice_the_mean.init(jnp.float32(0.0))
    >>> for norm in (3.0, 5.0):
    ...     limit, state = twice_the_mean.update(jnp.float32(norm), state)
    ...     print(limit)
    inf
    6.0

    As in smartclip and Open-Sora Plan 1.5; `target` from Holzschuh et al., *PDE-Transformer*, 2025,
    https://arxiv.org/abs/2505.24717. The guide on adaptive limits has our departures.
    """
    k = check_number("k", k, "be a finite number of at least 0", 0)
    decay = check_between_0_and_1("decay", decay)
    ratio = check_number("ratio", ratio, "be a finite number of at least 1", 1)
    warmup_steps = check_steps("warmup_steps", warmup_steps)
    if target is not None:
        if not isinstance(target, tuple) or len(target) != 2:
            raise ValueError(f"`target` must be None or a pair (ratio, decay), got {target!r}.")
        times = check_above("target[0]", target[0], 0)
        target = times, check_between_0_and_1("target[1]", target[1])

    def init(norm: jax.Array) -> EmaState:
        return EmaState(
            steps=jnp.zeros_like(norm, dtype=jnp.int32),
            average=MeanState(jnp.zeros_like(norm), jnp.zeros_like(norm)),
            deviation=jnp.zeros_like(norm),
            target=MeanState(jnp.zeros_like(norm), jnp.zeros_like(norm)) if target else None,
        )

    def update(norm: jax.Array, state: EmaState) -> tuple[jax.Array, EmaState]:
        def number(value: Threshold) -> jax.Array:
            return jnp.asarray(value).astype(norm.dtype)

        mean, deviation = state.average.mean, state.deviation
        limit = number(ratio) * mean + number(k) * std_floor(deviation, mean)
        if target and state.target:
            limit = jnp.where(norm > limit, number(target[0]) * state.target.mean, limit)
        warm = state.steps >= jnp.asarray(warmup_steps).astype(jnp.int32)
        limit = jnp.where(warm, limit, jnp.inf)
        x = jnp.minimum(norm, limit)
        average = _taken_in(state.average, x, number(decay))
        weight = 1 / average.weight
        new = EmaState(
            steps=jnp.where(warm, state.steps, state.steps + 1),
            average=average,
            deviation=std_update(deviation, x - mean, weight, weight * (1 - weight)),
            target=None,
        )
        if target and state.target:
            new = new._replace(target=_taken_in(state.target, x, number(target[1])))
        return limit, unless_zero(norm, new, state)

    return Limit(init, update)


def _taken_in(state: MeanState, norm: jax.Array, decay: jax.Array) -> MeanState:
    weight = decay * state.weight + 1
    return MeanState(weight, lerp(state.mean, norm, 1 / weight))
