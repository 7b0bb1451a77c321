"""Error feedback: what a clip cuts off is not lost, it is added to the next gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_threshold, check_transformation
from .._devices import varying_like
from .._export import exportable
from .._inject import injectable
from .._limits import constant
from .._norms import global_norm
from .._rescale import factors, rescale, shrink
from .._state import check_trees, check_type, init_threshold, read_threshold
from .._types import AxisName, Threshold
from .memory import added, cast_like, is_none, merged, zeros_like


@exportable
class ErrorFeedbackState(NamedTuple):
    """What is still owed.

    Attributes:
      carry: What the clip has cut off so far and not given back, in at least float32; None for
        leaves that are not gradients.
      limit_state: State of the limit on the carry.
      clip_state: State of the clip.
    """

    carry: Any
    limit_state: Any
    clip_state: Any


@injectable("max_carry")
def error_feedback(
    clip: optax.GradientTransformation,
    *,
    max_carry: Threshold = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Carry what a clip cuts off over to the next gradient (U-Clip).

    $$ v_t = g_t + \Delta_{t-1}, \quad u_t = \text{clip}(v_t), \quad
       \Delta_t = (v_t - u_t) \cdot \min\!\Big(1, \frac{\text{max\_carry}}{\lVert v_t - u_t \rVert}
       \Big) $$

    Use it where a clip acts on most steps: clipped gradients are biased, for the large ones are
    those cut; with the carry the bias of their sum stays bounded, and the sum of the updates
    is the sum of what came in, minus the carry. Not for a clip that is there for rare
    explosions: the explosion would come back in instalments.

    Args:
      clip: Any clip, or chain of clips.
      max_carry: Largest norm of the carry, non-negative, or a schedule; what is above it is
        forgotten. None, as in the paper, forgets nothing: then a spike of 1000 times the limit
        takes 1000 steps to be given back. Ten times the limit of the clip bounds that to ten.
        0 is the clip alone.
      axis_name: See `global_norm`; needed only for a `max_carry`.

    Returns:
      A transformation whose state has a carry for each gradient, sharded as the parameters are,
      in at least float32: in bfloat16 a carry of 256 would swallow gradients of 0.5. What rounding
      to the dtype of the gradient takes is carried over, too. An element for which gradient, or
      what the clip makes of it, is not finite leaves its carry as it was.

    Raises:
      ValueError: For a `clip` that is not a transformation, or a `max_carry` that may not be.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.error_feedback(gradclip_jax.clip_by_global_norm(1.0))
    >>> state = clip.init(jnp.array([0.0, 0.0]))
    >>> for grads in jnp.array([[3.0, 4.0], [0.0, 0.0]]):
    ...     updates, state = clip.update(grads, state)
    ...     print(updates, state.carry)
    [0.6 0.8] [2.4 3.2]
    [0.6 0.8] [1.8000001 2.4      ]

    Elesedy, Hutter, *U-Clip: On-Average Unbiased Stochastic Gradient Clipping*, 2023,
    https://arxiv.org/abs/2302.02971, the U-Clip update. The bound on the carry is ours.
    """
    check_transformation("clip", clip, "a transformation")
    limit = constant(check_threshold("max_carry", max_carry))
    clip = optax.with_extra_args_support(clip)

    def init(params: Any) -> ErrorFeedbackState:
        return ErrorFeedbackState(zeros_like(params), init_threshold(limit), clip.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ErrorFeedbackState]:
        check_type(state, ErrorFeedbackState)
        check_trees(updates, params)
        wanted = merged(added(updates, state.carry), updates)
        clipped, clip_state = clip.update(wanted, state.clip_state, params, **extra_args)
        clipped = cast_like(clipped, updates)
        carry = jax.tree.map(_rest, state.carry, wanted, clipped, is_leaf=is_none)
        carry_limit, limit_state = read_threshold(limit, state.limit_state)
        if max_carry is not None:
            carry = _within_limit(carry, carry_limit, axis_name)
        return clipped, ErrorFeedbackState(carry, limit_state, clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _rest(carry: Any, wanted: Any, clipped: Any) -> Any:
    if carry is None:
        return None
    rest = wanted - clipped.astype(wanted.dtype)
    return jnp.where(jnp.isfinite(rest), rest, carry)


def _within_limit(carry: Any, limit: jax.Array, axis_name: AxisName) -> Any:
    leaves, treedef = jax.tree.flatten(carry)
    norm = global_norm(carry, axis_name=axis_name)
    factor = factors(norm, varying_like(limit, norm), shrink)
    factor = factor._replace(scale=jnp.where(jnp.isfinite(norm), factor.scale, 0))
    return treedef.unflatten(rescale(leaves, [factor] * len(leaves)))
