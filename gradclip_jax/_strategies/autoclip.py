"""AutoClip: a percentile of the norms seen so far, this one included."""

import jax
import optax

from .._checks import check_percentile, check_whole_number
from .._clip import Measure, clip_to_limit
from .._inject import strategy
from .._limits import Limit
from .._limits.window import new_window, percentile_of, push
from .._norms import global_norm
from .._per_layer import PerLayer
from .._rescale import OnNonfinite
from .._types import AxisName, Threshold


@strategy("percentile")
def autoclip(
    percentile: Threshold = 10.0,
    *,
    window: int = 1000,
    measure: Measure = global_norm,
    per_layer: PerLayer = False,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""AutoClip: clip the gradient to a percentile of its norms so far.

    $$ g_t \leftarrow g_t \cdot \min\!\Big(1, \frac{L_t}{\lVert g_t \rVert}\Big), \qquad
       L_t = P_p(\lVert g_{t-W+1} \rVert, \dots, \lVert g_t \rVert) $$

    When the scale of the gradients is not known beforehand: scale the loss by a number, and the
    factors stay what they are. With a low percentile nearly every step is clipped, to a limit
    that follows the quiet steps.

    Args:
      percentile: p, between 0 and 100; 10 in the paper, which clips nine steps in ten.
      window: W, the number of norms remembered, at least 1, one number each. The paper remembers
        all, which is the same for as long as there are no more than W.
      measure: See `clip_to_limit`; `leaf_norms` gives each array a limit and a window.
      per_layer: See `clip_to_limit`.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a norm that is not finite does not enter the window.

    Returns:
      A transformation with a `ClipState`. The first step always passes, and there is no warm-up.
      Norms enter as they are, not as clipped: after a lasting rise the limit stays near the old
      level until 1 - p/100 of the window is new (900 steps by default), after a lasting fall it
      follows within p/100 of it (100 steps). A constant stream is never clipped. When more than
      p/100 of the window are zeros the limit is 0, and so are the updates.

    Raises:
      ValueError: For a number outside of its range.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.autoclip(50.0)
    >>> state = clip.init(jnp.zeros(2))
    >>> for grads in (jnp.array([1.5, 2.0]), jnp.array([6.0, 8.0])):  # norms 2.5 and 10
    ...     updates, state = clip.update(grads, state)
    >>> print(updates, gradclip_jax.metrics(state)["clip_limit"])
    [3.75 5.  ] 6.25

    Seetharaman, Wichern, Pardo, Le Roux, *AutoClip: Adaptive Gradient Clipping for Source
    Separation Networks*, MLSP 2020, https://arxiv.org/abs/2007.14469, algorithm 1. We depart from
    it in the window (its history grows without bound), in NaN and infinity (one NaN makes its
    percentile NaN forever), and in the 1e-6 that its `clip_grad_norm_` adds to the norm.
    """
    return clip_to_limit(
        _percentile_so_far(percentile, window),
        measure=measure,
        per_layer=per_layer,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )


def _percentile_so_far(percentile: Threshold, window: int) -> Limit:
    percentile, window = check_percentile(percentile), check_whole_number("window", window)

    def init(norm: jax.Array) -> jax.Array:
        return new_window(norm, window)

    def update(norm: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
        norms = push(norms, norm)
        return percentile_of(norms, percentile), norms

    return Limit(init, update)
