"""A quantile of the norms, followed by one number that goes up or down a step."""

import jax
import jax.numpy as jnp

from .._checks import check_above, check_between_0_and_1
from .._types import Threshold
from .limit import Limit
from .moments import unless_zero


def running_quantile(
    quantile: Threshold = 0.5, *, learning_rate: float = 0.2, init: float = 1.0
) -> Limit:
    r"""A running quantile: the limit falls after a norm below it, and rises after one above it.

    $$ L_{t+1} = L_t \exp(-\eta (b_t - q)), \qquad b_t = [n_t \le L_t], \qquad L_1 = \text{init} $$

    At rest a share q of the norms is at or below the limit; of a constant stream too, around
    which it goes up and down. Norms enter as they are, by the comparison alone: a spike of any
    size moves the limit by one step. A norm of 0, as of a frozen layer, does not enter.

    Args:
      quantile: q, between 0 and 1 (exclusive); a number, a scalar array or a traced value.
      learning_rate: eta, above 0: a step up is a factor exp(eta q), one down exp(-eta (1 - q)).
      init: The first limit, above 0; from a limit that is wrong by a factor r it takes
        ln(r) / (eta q) steps up, or ln(r) / (eta (1 - q)) down.

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
