"""Clip the norm of each unit: of the weights into one output, say."""

import functools

import optax

from .._checks import check_threshold
from .._clip import clip_to_limit
from .._inject import strategy
from .._limits import constant
from .._norms import Axes, unit_norms
from .._rescale import OnNonfinite
from .._types import AxisName, Threshold


@strategy("max_norm")
def clip_by_unit_norm(
    max_norm: Threshold,
    *,
    axes: Axes = None,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each unit of each array to a norm of its own.

    $$ g_{\ell u} \leftarrow
       g_{\ell u} \cdot \min(1, \text{max\_norm} / \lVert g_{\ell u} \rVert_2) $$

    For a few units that explode while their neighbours learn, and for layers stacked by `scan`
    (`axes=(1, 2)`: one norm for each layer).

    Args:
      max_norm: Largest norm of one unit, non-negative, as in `clip_by_global_norm`.
      axes: The axes that one unit spans; see `unit_norms`.
      axis_name: See `global_norm`; inside `shard_map` leaves that are split need PartitionSpecs.
      on_nonfinite: See `clip_to_limit`; a unit with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one array of norms for each array.

    Raises:
      ValueError: For a threshold that is negative, NaN, boolean or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_unit_norm(1.0)
    >>> grads = jnp.array([[3.0, 0.0], [4.0, 0.5]])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)
    [[0.6 0. ]
     [0.8 0.5]]

    The rule of `tf.clip_by_norm` with `axes`.
    """
    max_norm = check_threshold("max_norm", max_norm)
    measure = functools.partial(unit_norms, axes=axes)
    return clip_to_limit(
        constant(max_norm), measure=measure, axis_name=axis_name, on_nonfinite=on_nonfinite
    )
