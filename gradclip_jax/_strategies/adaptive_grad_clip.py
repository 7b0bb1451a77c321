"""AGC: hold the gradient of each unit to a fraction of the weights of the unit."""

import functools
from typing import Any

import optax

from .._checks import check_threshold
from .._inject import strategy
from .._norms import Axes, unit_norms
from .._rescale import OnNonfinite
from .._types import AxisName, Threshold
from .clip_by_param_norm import clip_to_params


@strategy("clipping", "eps")
def adaptive_grad_clip(
    clipping: Threshold = 0.01,
    *,
    eps: Threshold = 1e-3,
    axes: Axes = None,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive gradient clipping (AGC): clip each unit to a fraction of its weights' norm.

    $$ g_u \leftarrow g_u \cdot \min\!\Big(1, \lambda
       \frac{\max(\lVert w_u \rVert, \epsilon)}{\lVert g_u \rVert}\Big) $$

    For networks without normalisation layers, and for learning rates that should not depend on
    the scale of the loss. Put it before the optimizer, and leave the last layer out
    (`optax.masked`), as the paper does.

    Args:
      clipping: The fraction lambda, non-negative; 0.01 in the paper, less for larger batches.
      eps: Norm that stands for weights near zero, non-negative; 1e-3 in the paper. Without it
        weights that start at zero would never move.
      axes: The axes that one unit spans; see `unit_norms`. The default is the rule of the NFNets
        code: a vector or scalar, or an array with at most one axis longer than 1, is one unit;
        axis 0 in ranks 2 and 3; all axes but the last above. For layers stacked by `scan`
        (layers, inputs, outputs) pass `axes=1`, or the layers are pooled.
      axis_name: See `global_norm`; inside `shard_map` leaves that are split need PartitionSpecs.
      on_nonfinite: See `clip_to_limit`; a unit with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one array of norms for each array. Its update needs
      `params`.

    Raises:
      ValueError: For thresholds as in `clip_by_global_norm`; for an update without `params`.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.adaptive_grad_clip(0.01)
    >>> params = {"w": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
    >>> grads = {"w": jnp.array([[1.0, 0.001], [0.0, 0.0]])}
    >>> updates, state = clip.update(grads, clip.init(params), params)
    >>> print(updates["w"])
    [[0.05  0.001]
     [0.    0.   ]]

    Brock, De, Smith, Simonyan, *High-Performance Large-Scale Image Recognition Without
    Normalization*, ICML 2021, https://arxiv.org/abs/2102.06171, equation 3.
    """
    return clip_to_params(
        "adaptive_grad_clip",
        check_threshold("clipping", clipping),
        check_threshold("eps", eps),
        functools.partial(unit_norms, axes=nfnets_axes if axes is None else axes),
        axis_name,
        on_nonfinite,
    )


def nfnets_axes(path: str, leaf: Any) -> tuple[int, ...]:
    """The axes that one unit spans, by the rank rule of the NFNets code."""
    del path
    if sum(size != 1 for size in leaf.shape) <= 1:
        return tuple(range(leaf.ndim))
    return (0,) if leaf.ndim <= 3 else tuple(range(leaf.ndim - 1))
