"""Clip the norm of each array alone, as `clipnorm` does in Keras."""

import optax

from .._checks import check_threshold
from .._clip import clip_to_limit
from .._inject import strategy
from .._limits import constant
from .._norms import leaf_norms
from .._rescale import OnNonfinite
from .._types import AxisName, Threshold


@strategy("max_norm")
def clip_by_norm(
    max_norm: Threshold, *, axis_name: AxisName = None, on_nonfinite: OnNonfinite = "zero"
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient clipping by norm, each array on its own: `clipnorm` in Keras.

    $$ g_\ell \leftarrow g_\ell \cdot \min(1, \text{max\_norm} / \lVert g_\ell \rVert_2) $$

    For models whose arrays have gradients of very different size, where one of them would starve
    the others under a global norm. The direction of the whole gradient changes.

    Args:
      max_norm: Largest norm of one array, non-negative, as in `clip_by_global_norm`.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one norm for each array.

    Raises:
      ValueError: For a threshold that is negative, NaN, boolean or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_norm(1.0)
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["w"], updates["b"])
    [0.6 0.8] [0.5]

    The rule of `tf.clip_by_norm` and of `clipnorm` in Keras; often mistaken there for the global
    norm.
    """
    max_norm = check_threshold("max_norm", max_norm)
    return clip_to_limit(
        constant(max_norm), measure=leaf_norms, axis_name=axis_name, on_nonfinite=on_nonfinite
    )
