"""Clip norms of updates to a fraction of the norms of their weights: of each array, or of all."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_threshold
from .._clip import Measure, apply_limits, measured_types
from .._devices import of_pair
from .._inject import strategy
from .._leaves import is_gradient, norm_dtype
from .._limits import constant
from .._measures import gives_norms, gives_norms_of_arrays, unbound
from .._norms import global_norm, group_norms, leaf_norms, unit_norms
from .._rescale import OnNonfinite, nonfinite_fill
from .._state import (
    ClipState,
    check_norms,
    check_params,
    check_trees,
    init_threshold,
    initial_state,
    read_threshold,
    transformation,
)
from .._types import AxisName, Norms, Params, Threshold, Updates


@strategy("ratio", "eps")
def clip_by_param_norm(
    ratio: Threshold = 0.02,
    *,
    eps: Threshold = 1e-3,
    measure: Measure = leaf_norms,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each array to a fraction of the norm of its weights: LARC, LAMB, `max_unorm`.

    $$ u_\ell \leftarrow u_\ell \cdot \min\!\Big(1, \;
       \rho \, \frac{\max(\lVert w_\ell \rVert, \epsilon)}{\lVert u_\ell \rVert}\Big) $$

    For large batches, where one learning rate is too high for some layers. Behind an optimizer no
    array moves by more than rho of its norm in a step: LARC is `chain(sgd(…), clip_by_param_norm(
    0.02))`, LAMB with its trust ratio clipped at 1 is `chain(scale_by_adam(),
    add_decayed_weights(…), clip_by_param_norm(1.0), scale(-lr))`.

    Args:
      ratio: rho, non-negative; 0.02 is the trust coefficient of LARC in Apex and `max_unorm` of
        LARS in bitsandbytes, whose LAMB has 1.0. May be a schedule.
      eps: Norm that stands for weights near zero, non-negative; 1e-3 as in `adaptive_grad_clip`.
        With 0, what starts at zero never moves.
      measure: `leaf_norms`; `global_norm` for all updates together against all weights; or
        `unit_norms`, of which `adaptive_grad_clip` is the instance. Arguments bound by
        `functools.partial`.
      axis_name: See `global_norm`; for `unit_norms` see there.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState`. Its update needs `params`. Arrays without an update (None
      for frozen ones) do not count, nor do their weights.

    Raises:
      ValueError: For thresholds as in `clip_by_global_norm`; for another measure; for an update
        without `params`.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_param_norm(0.1)
    >>> weights, updates = jnp.array([6.0, 8.0]), jnp.array([3.0, 4.0])
    >>> updates, state = clip.update(updates, clip.init(weights), weights)
    >>> print(updates)  # norm 1, a tenth of 10
    [0.6 0.8]

    You, Gitman, Ginsburg, *Large Batch Training of Convolutional Networks*, 2017,
    https://arxiv.org/abs/1708.03888, the local learning rate of section 4, as a limit (LARC). We
    depart in weights of norm zero, which LARC does not clip at all.
    """
    return clip_to_params(
        "clip_by_param_norm",
        check_threshold("ratio", ratio),
        check_threshold("eps", eps),
        measure,
        axis_name,
        on_nonfinite,
    )


def clip_to_params(
    name: str,
    ratio: Threshold,
    eps: Threshold,
    measure: Measure,
    axis_name: AxisName,
    on_nonfinite: OnNonfinite,
) -> optax.GradientTransformationExtraArgs:
    """A clip to a fraction of the norms of weights, with thresholds that are checked already."""
    nonfinite_fill(on_nonfinite)
    known = (leaf_norms, unit_norms, global_norm)
    if all(unbound(measure)[0] is not function for function in known):
        raise ValueError(
            "`measure` must be `leaf_norms`, `unit_norms` or `global_norm`, so that updates and "
            f"weights are measured together, got {measure!r}."
        )
    fraction, least = constant(ratio), constant(eps)
    are_norms = gives_norms(measure)
    layers = () if gives_norms_of_arrays(measure) else None

    def init(params: Params) -> ClipState:
        norms = measured_types(measure, params, axis_name)
        thresholds = (init_threshold(fraction), init_threshold(least))
        return initial_state(norms, thresholds, are_norms=are_norms, layer_norms=layers)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        if params is None:
            raise ValueError(
                f"`{name}` compares gradients with parameters: call "
                "`update(updates, state, params)`."
            )
        check_params(updates, params)
        check_trees(updates, params)
        norms, weights = _of_both(measure, updates, params, axis_name)
        check_norms(norms, state, are_norms=are_norms, layer_norms=layers)
        share, share_state = read_threshold(fraction, state.limit_state[0])
        floor, floor_state = read_threshold(least, state.limit_state[1])

        def limit(norm: jax.Array) -> jax.Array:
            # Infinity times a norm of zero would be NaN.
            bounded = share < jnp.inf
            return jnp.where(
                bounded, jnp.where(bounded, share, 0) * jnp.maximum(norm, floor), share
            )

        return apply_limits(
            updates,
            norms,
            jax.tree.map(limit, weights),
            state,
            (share_state, floor_state),
            on_nonfinite=on_nonfinite,
            axis_name=axis_name,
        )

    return transformation(init, update)


def _of_both(
    measure: Measure, updates: Updates, params: Params, axis_name: AxisName
) -> tuple[Norms, Norms]:
    """Norms of updates and of their weights, in trees of one structure, by one collective."""
    weights = jax.tree.map(
        lambda u, w: w if is_gradient(u) else None, updates, params, is_leaf=lambda x: x is None
    )
    both, along = (updates, weights), of_pair(axis_name)
    function, keywords = unbound(measure)
    if function is not global_norm:
        return measure(both, axis_name=along)
    norms = group_norms(both, labels=("updates", "weights"), axis_name=along, **keywords)
    zero = jnp.zeros((), norm_dtype())
    return norms.get("updates", zero), norms.get("weights", zero)
