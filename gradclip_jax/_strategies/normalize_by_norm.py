"""Give every gradient the same norm: the direction alone is left."""

import functools

import optax

from .._checks import check_threshold
from .._clip import clip_to_limit
from .._inject import strategy
from .._limits import constant
from .._norms import check_order, global_norm
from .._per_layer import PerLayer
from .._rescale import OnNonfinite, normalize
from .._types import AxisName, Threshold


@strategy("max_norm")
def normalize_by_norm(
    max_norm: Threshold = 1.0,
    *,
    order: float = 2,
    per_layer: PerLayer = False,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Normalise the gradient: bring its global norm to `max_norm`, from below too.

    $$ g \leftarrow \text{max\_norm} \cdot g / \lVert g \rVert_p $$

    For plateaus and cliffs alike, with a learning rate that decays; noise is not averaged out near
    a minimum. This is a normaliser, not a clip: small gradients are enlarged. For each array
    instead of all, use `clip_to_limit(1.0, measure=leaf_norms, response=responses.normalize)`.

    Args:
      max_norm: The norm that every gradient gets, non-negative. 0 gives zeros; `inf` or None
        changes nothing and still measures.
      order: Order p of the norm, at least 1; see `clip_by_global_norm`.
      per_layer: See `clip_to_limit`.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`.

    Returns:
      A transformation with a `ClipState`. A zero gradient stays zero; there is no epsilon.

    Raises:
      ValueError: For a norm that is negative, NaN, boolean or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> normalize = gradclip_jax.normalize_by_norm(10.0)
    >>> grads = jnp.array([3.0, 4.0])
    >>> updates, state = normalize.update(grads, normalize.init(grads))
    >>> print(updates)
    [6. 8.]

    Hazan, Levy, Shalev-Shwartz, *Beyond Convexity: Stochastic Quasi-Convex Optimization*, NeurIPS
    2015, https://arxiv.org/abs/1507.02030, algorithm 1. optax divides by the norm + 1e-6.
    """
    max_norm = check_threshold("max_norm", max_norm)
    measure = functools.partial(global_norm, order=check_order(order))
    return clip_to_limit(
        constant(max_norm),
        measure=measure,
        response=normalize,
        per_layer=per_layer,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
