"""Growth: a norm may be a ratio times the norm before it, and not more."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import check_above, check_number
from .._export import exportable
from .._types import Threshold
from .limit import Limit
from .moments import lerp, unless_zero

LEVEL_DECAY = 0.99  # of the mean that holds the limit up: it remembers some hundred norms


@exportable
class GrowthState(NamedTuple):
    """The last norm as clipped, and a moving average of such norms with the sum of its weights."""

    norm: jax.Array
    weight: jax.Array
    level: jax.Array


def growth(ratio: Threshold = 1.01, *, floor: float = 0.1) -> Limit:
    r"""The last norm that passed times a ratio: a norm may grow by a factor per step.

    $$ L_t = \max(\gamma x_{t-1}, \; \varphi \bar x_{t-1}), \qquad x_t = \min(n_t, L_t) $$

    with the moving average of x (decay 0.99, bias corrected). For updates that should grow
    smoothly, behind a preconditioner or a low-rank optimizer: `limit_norm_growth` gives each array
    such a limit.

    Args:
      ratio: gamma, the largest growth of a norm in one step, above 1; 1.01 in the papers, which
        doubles in 70 steps.
      floor: phi, the share of the average below which the limit does not fall, from 0 (no floor,
        as in the papers) to 1. After a small norm the limit is back in ln(1 / phi) / ln(gamma)
        steps; without a floor a norm of a thousandth costs 694 steps at a ratio of 1.01.

    Returns:
      A `Limit`. The first norm passes, and so does a constant stream. Zero norms (frozen layers),
      NaN and infinity are ignored.

    Raises:
      ValueError: For a number outside of its range.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import growth
    >>> doubling = growth(2.0)
    >>> state = doubling.init(jnp.float32(0.0))
    >>> for norm in (1.0, 9.0, 9.0):
    ...     limit, state = doubling.update(jnp.float32(norm), state)
    ...     print(limit)
    inf
    2.0
    4.0

    Chen et al., *Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?*, 2024,
    https://arxiv.org/abs/2410.01623; `limit_norm_growth` has our departures.
    """
    ratio = check_above("ratio", ratio, 1)
    floor = check_number("floor", floor, "lie between 0 and 1", 0, 1)

    def init(norm: jax.Array) -> GrowthState:
        return GrowthState(jnp.zeros_like(norm), jnp.zeros_like(norm), jnp.zeros_like(norm))

    def update(norm: jax.Array, state: GrowthState) -> tuple[jax.Array, GrowthState]:
        gamma, phi = (jnp.asarray(x).astype(norm.dtype) for x in (ratio, floor))
        limit = jnp.maximum(gamma * state.norm, phi * state.level)
        limit = jnp.where(state.norm > 0, limit, jnp.inf)
        x = jnp.minimum(norm, limit)
        total = LEVEL_DECAY * state.weight + 1
        new = GrowthState(x, total, lerp(state.level, x, 1 / total))
        return limit, unless_zero(norm, new, state)

    return Limit(init, update)
