"""Clip21: clip the change of an estimate of the gradient, not the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_transformation
from .._export import exportable
from .._state import check_trees, check_type
from .memory import added, cast_like, is_none, merged, zeros_like


@exportable
class Clip21State(NamedTuple):
    """The estimate so far.

    Attributes:
      estimate: Estimate of the gradient, in at least float32; None for leaves that are none.
      clip_state: State of the clip, which sees gradient minus estimate.
    """

    estimate: Any
    clip_state: Any


def clip21(clip: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Follow the gradient by clipped steps: the update changes by at most the limit.

    $$ h_t = h_{t-1} + \text{clip}(g_t - h_{t-1}), \qquad u_t = h_t $$

    Use it with large batches, where gradients change little from step to step: once the estimate
    has caught up, nothing is clipped any more and the update is the exact gradient, so that the
    limit costs no accuracy at the end. With noisy gradients the estimate is a memory of old ones:
    take `error_feedback` there.

    Args:
      clip: Any clip: its limit is the largest change per step. A gradient of norm n is reached
        after n / limit steps, from an estimate that starts at zero.

    Returns:
      A transformation whose state has an estimate for each gradient, sharded as the parameters
      are, in at least float32. The norm of the update is not bounded by the limit. Where
      gradient or estimate would not be finite, the estimate stays, and is the update again.

    Raises:
      ValueError: For a `clip` that is not a transformation.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip21(gradclip_jax.clip_by_global_norm(2.0))
    >>> state = clip.init(jnp.array([0.0, 0.0]))
    >>> for grads in jnp.array([[0.0, 5.0], [0.0, 5.0], [0.0, 5.0]]):
    ...     updates, state = clip.update(grads, state)
    ...     print(updates)
    [0. 2.]
    [0. 4.]
    [0. 5.]

    Khirirat, Gorbunov, Horváth, Islamov, Karray, Richtárik, *Clip21: Error Feedback for Gradient
    Clipping*, 2023, https://arxiv.org/abs/2305.18929, the method for one node; for the gradient
    of each of several nodes, put it before the mean over them.
    """
    check_transformation("clip", clip, "a transformation")
    clip = optax.with_extra_args_support(clip)

    def init(params: Any) -> Clip21State:
        return Clip21State(zeros_like(params), clip.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Clip21State]:
        check_type(state, Clip21State)
        check_trees(updates, params)
        minus = jax.tree.map(jnp.negative, state.estimate)
        change = merged(added(updates, minus), updates)
        change, clip_state = clip.update(change, state.clip_state, params, **extra_args)
        estimate = jax.tree.map(_moved, state.estimate, change, updates, is_leaf=is_none)
        return cast_like(merged(estimate, updates), updates), Clip21State(estimate, clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(estimate: Any, change: Any, gradient: Any) -> Any:
    if estimate is None:
        return None
    new = estimate + change.astype(estimate.dtype)
    # A clip of elements would take an infinite gradient for a step of one limit.
    kept = jnp.isfinite(new) & jnp.isfinite(gradient)
    return jnp.where(kept, new, estimate)
