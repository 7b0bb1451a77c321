"""Clip the root mean square of each array: a limit that does not grow with its size."""

import math

import jax
import optax

from .._checks import Threshold, check_threshold
from .._clip import apply_limits, measured_types
from .._devices import AxisName
from .._inject import named_strategy
from .._limits import constant
from .._norms import leaf_norms, leaf_sizes
from .._rescale import OnNonfinite, check_on_nonfinite
from .._state import check_trees, init_threshold, initial_state, read_threshold, transformation


@named_strategy
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
    check_on_nonfinite(on_nonfinite)
    rms = constant(check_threshold("threshold", threshold))

    def init(params):
        norms = measured_types(leaf_norms, params, axis_name)
        return initial_state(norms, init_threshold(rms))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_trees(updates, params)
        norms = leaf_norms(updates, axis_name=axis_name)
        roots = jax.tree.map(math.sqrt, leaf_sizes(updates, axis_name=axis_name))
        limit, limit_state = read_threshold(rms, state.limit_state)
        limits = [limit * root for root in jax.tree.leaves(roots)]
        return apply_limits(
            updates,
            norms,
            limits,
            state,
            limit_state,
            on_nonfinite=on_nonfinite,
            axis_name=axis_name,
        )

    return transformation(init, update)
