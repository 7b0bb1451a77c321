"""Clip the root mean square of each array: a limit that does not grow with its size."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_threshold
from .._clip import clip_norms
from .._inject import strategy
from .._limits import Limits, constant
from .._norms import Axes, of_blocks
from .._rescale import OnNonfinite
from .._state import init_threshold, read_threshold
from .._types import AxisName, Norms, Params, Threshold, Updates


@strategy("threshold")
def clip_by_block_rms(
    threshold: Threshold,
    *,
    axes: Axes = None,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each array to a root mean square.

    $$ g_\ell \leftarrow g_\ell / \max(1, \text{RMS}(g_\ell) / d), \qquad
       \text{RMS}(g_\ell) = \lVert g_\ell \rVert_2 / \sqrt{n_\ell} $$

    Put it behind a preconditioner, on updates whose elements are about 1, as Adafactor does. In
    the state and in the metrics norms are norms: the limit of an array is d times the root of its
    number of elements. For the clip of StableAdamW see `clip_update_rms`.

    Args:
      threshold: Largest root mean square d, non-negative; Adafactor has 1.0.
      axes: The axes that one block spans; None for all of them. For layers stacked by `scan` over
        axis 0 pass `(1, 2)`: one root mean square for each layer of (layers, inputs, outputs),
        where all layers would share one. An axis that an array does not have is left out, and an
        array that has none of them is one block. Or a callable of path and array, as in
        `unit_norms`, which returns None for one block.
      axis_name: See `global_norm`; with `axes` see `unit_norms`.
      on_nonfinite: See `clip_to_limit`; a block with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one norm for each array; with `axes`, an array of
      norms.

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
    measure, sizes_of = of_blocks(axes)

    def update(norms: Norms, state: Any, updates: Updates, params: Params) -> tuple[Norms, Any]:
        del params
        limit, state = read_threshold(rms, state)
        sizes = sizes_of(updates, axis_name=axis_name)
        return jax.tree.map(
            lambda norm, size: jnp.broadcast_to(limit * math.sqrt(size), norm.shape), norms, sizes
        ), state

    return clip_norms(
        Limits(lambda norms: init_threshold(rms), update),
        measure=measure,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
