"""Clip the root mean square of each array: a limit that does not grow with its size."""

import math
from typing import Any

import jax
import optax

from .._checks import check_threshold
from .._clip import clip_norms
from .._inject import strategy
from .._limits import Limits, constant
from .._norms import leaf_norms, leaf_sizes
from .._rescale import OnNonfinite
from .._state import init_threshold, read_threshold
from .._types import AxisName, Norms, Params, Threshold, Updates


@strategy("threshold")
def clip_by_block_rms(
    threshold: Threshold, *, axis_name: AxisName = None, on_nonfinite: OnNonfinite = "zero"
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each array to a root mean square.

    $$ g_\ell \leftarrow g_\ell / \max(1, \text{RMS}(g_\ell) / d), \qquad
       \text{RMS}(g_\ell) = \lVert g_\ell \rVert_2 / \sqrt{n_\ell} $$

    Put it behind a preconditioner, on updates whose elements are about 1, as Adafactor does. In
    the state and in the metrics norms are norms: the limit of an array is d times the root of its
    number of elements.

    Args:
      threshold: Largest root mean square d, non-negative; Adafactor has 1.0.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one norm for each array.

    Raises:
      ValueError: For a threshold that is negative, NaN, boolean or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_block_rms(1.0)
    >>> grads = jnp.array([2.0, 2.0, 2.0, 2.0])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)
    [1. 1. 1. 1.]

    Shazeer, Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory Cost*, ICML 2018,
    https://arxiv.org/abs/1804.04235, algorithm 4 (update clipping), without its preconditioner.
    """
    rms = constant(check_threshold("threshold", threshold))

    def update(norms: Norms, state: Any, updates: Updates, params: Params) -> tuple[Norms, Any]:
        del norms, params
        limit, state = read_threshold(rms, state)
        sizes = leaf_sizes(updates, axis_name=axis_name)
        return jax.tree.map(lambda size: limit * math.sqrt(size), sizes), state

    return clip_norms(
        Limits(lambda norms: init_threshold(rms), update),
        measure=leaf_norms,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
