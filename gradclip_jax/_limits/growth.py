"""Growth: a norm may be so many times the one before, and not more."""

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
    r"""The norm that passed last, times a ratio.

    $$ L_t = \max(\gamma x_{t-1}, \; \varphi \bar x_{t-1}), \qquad x_t = \min(n_t, L_t) $$

    with a moving average of what passed (decay 0.99, free of bias). The first norm passes, and so
    does a constant stream. Without the floor one small norm would be the new level: a thousandth
    costs 694 steps at a ratio of 1.01. A norm of 0 is no level and does not enter.

    Args:
      ratio: gamma, the most by which a norm may grow in one step, above 1.
      floor: phi, the share of the average below which the limit does not fall, from 0 (none) to 1.
        After a small norm it takes some ln(1 / phi) / ln(gamma) steps to be back.

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
