"""A running quantile of the norms: one scalar that goes up or down a step."""

import jax
import jax.numpy as jnp

from .._checks import check_above, check_between_0_and_1
from .._types import Threshold
from .limit import Limit
from .moments import unless_zero


def running_quantile(
    quantile: Threshold = 0.5, *, learning_rate: float = 0.2, init: float = 1.0
) -> Limit:
    r"""A running quantile in one scalar: the limit falls after a norm below it, else it rises.

    $$ L_{t+1} = L_t \exp(-\eta (b_t - q)), \qquad b_t = [n_t \le L_t], \qquad L_1 = \text{init} $$

    When you know which share of the steps to clip but not the norm: the cheapest adaptive limit,
    and a spike of any size moves it by one step only.

    Args:
      quantile: q, between 0 and 1 (exclusive): the share of steps that pass. 0.5 in the paper; 0.9
        clips one step in ten. A number, a scalar array or a traced value.
      learning_rate: eta, above 0; 0.2 in the paper. A step up is a factor exp(eta q), one down
        exp(-eta (1 - q)): 10 % by default.
      init: The first limit, above 0, in units of the norm; 0.1 in the paper.

    Returns:
      A `Limit` without a warm-up. From a limit that is wrong by a factor of 10 it takes 24 steps
      by default; with q = 0.9 13 up, 116 down. Of a constant stream a share 1 - q is clipped, too,
      by at most 1 - exp(-eta (1 - q)). Zero norms (frozen layers), NaN and infinity are ignored.

    Raises:
      ValueError: For a number outside of its range.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.limits import running_quantile
    >>> median = running_quantile(0.5)
    >>> state = median.init(jnp.float32(0.0))
    >>> for norm in (1.0, 9.0, 9.0):
    ...     limit, state = median.update(jnp.float32(norm), state)
    ...     print(f"{limit:.4f}")
    1.0000
    0.9048
    1.0000

    Andrew, Thakkar, McMahan, Ramaswamy, *Differentially Private Learning with Adaptive Clipping*,
    NeurIPS 2021, https://arxiv.org/abs/1905.03871, algorithm 1, the geometric update, for one
    gradient and without noise: it is not private (`per_example.quantile_step`
    is).
    """
    share = check_between_0_and_1("quantile", quantile)
    rate = check_above("learning_rate", learning_rate, 0)
    first = check_above("init", init, 0)

    def init_state(norm: jax.Array) -> jax.Array:
        return norm + jnp.asarray(first).astype(norm.dtype)

    def update(norm: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
        eta, q = (jnp.asarray(x).astype(norm.dtype) for x in (rate, share))
        new = limit * jnp.exp(-eta * ((norm <= limit).astype(norm.dtype) - q))
        # A limit of 0 or infinity would stay there: multiplying cannot leave it.
        info = jnp.finfo(norm.dtype)
        new = jnp.clip(new, float(info.tiny), float(info.max))
        return limit, unless_zero(norm, new, limit)

    return Limit(init_state, update)
