"""Clip to a running quantile of the norms: one number of state."""

import optax

from .._checks import Threshold
from .._clip import Measure, clip_to_limit
from .._devices import AxisName
from .._inject import named_strategy
from .._limits.quantile import quantile as running_quantile
from .._norms import global_norm
from .._rescale import OnNonfinite


@named_strategy
def quantile_clip(
    quantile: Threshold = 0.5,
    *,
    learning_rate: float = 0.2,
    init: float = 1.0,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the gradient to a running quantile of its norms.

    $$ g_t \leftarrow g_t \cdot \min\!\Big(1, \frac{L_t}{\lVert g_t \rVert}\Big), \qquad
       L_{t+1} = L_t \exp(-\eta (b_t - q)), \qquad b_t = [\lVert g_t \rVert \le L_t] $$

    When the share of steps to clip is known and the norm is not: the cheapest limit that adapts,
    and the one that a spike of any size moves the least.

    Args:
      quantile: q, between 0 and 1 (exclusive): the share of steps that pass. 0.5 in the paper; 0.9
        clips one step in ten. A number, a scalar array or a traced value.
      learning_rate: eta, above 0; 0.2 in the paper. By default a step up or down is 10 %.
      init: The first limit, above 0, in units of the norm; the paper has 0.1.
      measure: What has a limit of its own, as in `clip_to_limit`: `leaf_norms` gives one to each
        array, with as much state again for each.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a norm that is not finite leaves the limit as it is.

    Returns:
      A transformation with a `ClipState`. There is no warm-up: the limit is `init` in the first
      step. It comes from anywhere: by default a factor of 10 up or down takes 24 steps, with
      q = 0.9 it takes 13 up and 116 down. It never rests, so of a constant stream a share 1 - q
      is clipped too, by at most 1 - exp(-eta (1 - q)). A norm of 0 does not enter, and the limit
      stays within the normal numbers of its dtype.

    Raises:
      ValueError: For a number outside of its range.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.quantile_clip(0.5, init=5.0)
    >>> state = clip.init(jnp.zeros(2))
    >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])):
    ...     updates, state = clip.update(grads, state)
    >>> print(updates, gradclip_jax.metrics(state)["clip_limit"])  # 5 exp(-0.1)
    [2.7145123 3.6193497] 4.524187

    Andrew, Thakkar, McMahan, Ramaswamy, *Differentially Private Learning with Adaptive Clipping*,
    NeurIPS 2021, https://arxiv.org/abs/1905.03871, algorithm 1, the geometric update. There b is
    the noised share of many clients at or below the limit; here it is one gradient, 0 or 1, and
    without noise: this is no mechanism for privacy. We depart from it in a norm of 0, which counts
    there, and would let the limit of a frozen layer fall to 0.
    """
    return clip_to_limit(
        running_quantile(quantile, learning_rate=learning_rate, init=init),
        measure,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
