"""Clip the norm of all leaves together: direction kept, one scalar."""

import functools

import optax

from .._checks import check_threshold
from .._clip import clip_to_limit
from .._inject import strategy
from .._limits import constant
from .._norms import check_order, global_norm
from .._per_layer import PerLayer
from .._rescale import OnNonfinite, Response, shrink
from .._types import AxisName, Threshold


@strategy("max_norm")
def clip_by_global_norm(
    max_norm: Threshold,
    *,
    order: float = 2,
    response: Response = shrink,
    per_layer: PerLayer = False,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient clipping by global norm: one factor for all arrays keeps the direction.

    $$ g \leftarrow g \cdot \min\!\Big(1, \frac{\text{max\_norm}}{\lVert g \rVert_p}\Big), \qquad
       \lVert g \rVert_p = \Big( \sum_{\ell} \sum_i |g_{\ell i}|^p \Big)^{1/p} $$

    The usual clip, and the one to begin with: it bounds the step and keeps its direction.

    Args:
      max_norm: Largest norm that passes, non-negative; 1.0 is usual for Transformers, 0.25 to 10
        for recurrent networks. 0 gives zeros; `inf` or None clips nothing and still measures.
        May be a schedule of the number of updates.
      order: Order p of the norm, at least 1; `inf` for the largest modulus. A norm of another
        order than 2 is the `clip_measure` of the metrics.
      response: `shrink`, or one of the smooth responses.
      per_layer: See `clip_to_limit`.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`.

    Returns:
      A transformation with a `ClipState`. Zero stays zero; at or below the limit updates stay
      bit for bit (but XLA may flush to zero what is below the smallest normal number).

    Raises:
      ValueError: For a threshold that is negative, NaN, boolean or not a number.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> optimizer = optax.chain(gradclip_jax.clip_by_global_norm(1.0), optax.sgd(1.0))
    >>> updates, state = optimizer.update(grads, optimizer.init(grads))
    >>> print(updates["w"], gradclip_jax.metrics(state)["grad_norm"])
    [-0.6 -0.8] 5.0

    Pascanu, Mikolov, Bengio, *On the difficulty of training recurrent neural networks*, ICML 2013,
    https://arxiv.org/abs/1211.5063, algorithm 1. We depart from it only in not rescaling at
    equality, where both give the same.
    """
    max_norm = check_threshold("max_norm", max_norm)
    measure = functools.partial(global_norm, order=check_order(order))
    return clip_to_limit(
        constant(max_norm),
        measure=measure,
        response=response,
        per_layer=per_layer,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
