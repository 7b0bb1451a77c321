"""Skip a step: the parameters do not move, and the optimizer does not learn that it was there."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_transformation, check_whole_number
from .._clip import Measure, in_update, measured_types
from .._compiled import compiled
from .._devices import axis_names, filled_like, varying_like
from .._export import exportable
from .._given import GivenNorm
from .._inject import injectable
from .._limits import Limit, as_limit, constant, update_finite
from .._norms import global_norm, leaf_norms, leaf_sizes
from .._state import check_trees, check_type, increment_if, overwritten
from .._types import AxisName, Threshold
from .unless import data_of, unless_skipped
from .zero_nonfinite import finite_part


@exportable
class SkipState(NamedTuple):
    """What a guard saw and did in its last update, and how often; `metrics` reads it.

    Attributes:
      grad_norm: What `measure` found, float32 (float64 under x64); it may be NaN or infinite.
      skip_limit: The limit on the norm; infinity where the norm has none.
      loss: The loss, or the mean of those of all devices; None unless the guard watches it.
      loss_limit: The limit on the loss; None unless the guard watches it.
      skipped: Whether the last update was skipped, bool.
      skip_count: Number of updates skipped, int32.
      skips_in_a_row: Number of updates skipped since the last one that was no spike, int32.
      nonfinite_count: Number of updates in which the norm or the loss was not finite, skipped or
        not, int32.
      step_count: Number of updates, skipped or not, int32.
      limit_state: State of the limit on the norm.
      loss_limit_state: State of the limit on the loss; None unless the guard watches it.
      inner_state: State of the optimizer.
    """

    grad_norm: jax.Array
    skip_limit: jax.Array
    loss: Any
    loss_limit: Any
    skipped: jax.Array
    skip_count: jax.Array
    skips_in_a_row: jax.Array
    nonfinite_count: jax.Array
    step_count: jax.Array
    limit_state: Any
    loss_limit_state: Any
    inner_state: Any


@injectable()
def skip_nonfinite(
    optimizer: optax.GradientTransformation,
    *,
    max_consecutive: int = 16,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skip the steps of an optimizer in which a gradient is NaN or infinite.

    $$ (u, s) \leftarrow \begin{cases}
         \text{optimizer}(g, s) & \lVert g \rVert < \infty \\
         (0, s) & \text{otherwise} \end{cases} $$

    Use it around the whole optimizer wherever a step may fail: in float16, with a loss that can
    overflow, with data that are not checked. A zero gradient still moves the moments and decays the
    weights; in a skipped step the state stays as it was, bit for bit.

    Args:
      optimizer: The optimizer, clips and `MultiSteps` included. Around `MultiSteps` a micro-step is
        skipped as if it had never been; within it, one NaN would stay in the sum forever.
      max_consecutive: Skips in a row after which the guard gives up, a whole number of at least 1:
        then the elements that are not finite become zero and the rest goes through, until a
        gradient is finite again. 16 is ours: a loss scale of 2^16 that halves at every skip comes
        down to 1 first.
      measure: A norm of all gradients, one scalar: `global_norm`, or `given_norm("grad_norm")`
        where it is known already; clips within that read it get the norm of what goes on to them.
      axis_name: See `global_norm`. All devices skip together.

    Returns:
      An optimizer with a `SkipState`, which `metrics` reads. Its update takes the extra arguments
      of `optimizer`. Finite gradients come through bit for bit; a norm beyond the largest float32
      counts as not finite.

    Raises:
      ValueError: For an `optimizer` that is not one, or a `max_consecutive` below 1.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> optimizer = gradclip_jax.skip_nonfinite(optax.sgd(0.1, momentum=0.9))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": jnp.array([jnp.nan, 1.0])}, state, params)
    >>> print(updates["w"], gradclip_jax.metrics(state)["skip_count"])
    [0. 0.] 1

    Micikevicius et al., *Mixed Precision Training*, ICLR 2018, https://arxiv.org/abs/1710.03740,
    section 3.2.
    """
    return _skip(optimizer, None, None, max_consecutive, measure, axis_name)


@injectable("grad_norm", "loss")
def skip_spikes(
    optimizer: optax.GradientTransformation,
    *,
    grad_norm: Limit | Threshold = None,
    loss: Limit | Threshold = None,
    max_consecutive: int = 16,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skip the loss spikes of a run: steps with a norm, or a loss, above its limit.

    $$ (u, s) \leftarrow \begin{cases}
         \text{optimizer}(g, s) & \lVert g \rVert \le L_g \text{ and } \ell \le L_\ell \\
         (0, s) & \text{otherwise} \end{cases} $$

    Use it where a clip is not enough: a broken batch has a direction that is wrong at any length,
    and its square stays in the second moment of Adam for a thousand steps. Put the limit well
    above the one of a clip within, so that what is merely large is clipped and not lost.

    Args:
      optimizer: The optimizer, clips and `MultiSteps` included.
      grad_norm: The limit $L_g$ on the global norm: any limit, or a threshold as in `constant`. It
        learns at every step, skipped or not, in its own way: most take a spike in as clipped.
      loss: The limit on the loss, likewise; at least one of the two. Call `update(updates, state,
        params, loss=loss)` with a scalar, of which the mean over the devices of a `shard_map` or
        `pmap` is taken. For a loss that may be negative take `limits.deviation`.
      max_consecutive: As in `skip_nonfinite`. After it, gradients are rescaled to the limit on the
        norm, if there is one, until a step is not a spike.
      measure: As in `skip_nonfinite`.
      axis_name: See `global_norm`. All devices skip together.

    Returns:
      An optimizer as that of `skip_nonfinite`. A norm or a loss that is not finite is a spike, and
      its limit does not learn from it. A step at the limit is not a spike, nor is a constant norm.

    Raises:
      ValueError: For an `optimizer` that is not one, neither limit, a threshold that may not be,
        or a `max_consecutive` below 1; in `update`, for a missing loss.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> optimizer = gradclip_jax.skip_spikes(optax.sgd(0.1), grad_norm=10.0)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> updates, state = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params))
    >>> print(updates["w"], gradclip_jax.metrics(state)["grad_norm"])
    [0. 0.] 50.0

    Chen et al., *The Best of Both Worlds*, ACL 2018, https://arxiv.org/abs/1804.09849; on both,
    OLMo-core, `SkipStepOptimizer`, https://github.com/allenai/OLMo-core.
    """
    if grad_norm is None and loss is None:
        raise ValueError(
            "`skip_spikes` must have a limit to watch, `grad_norm` or `loss` or both, got neither: "
            "`skip_spikes(optimizer, grad_norm=limits.deviation())`."
        )
    norm_limit = None if grad_norm is None else as_limit(grad_norm, "grad_norm")
    loss_limit = None if loss is None else as_limit(loss, "loss")
    return _skip(optimizer, norm_limit, loss_limit, max_consecutive, measure, axis_name)


def _skip(
    optimizer: optax.GradientTransformation,
    norm_limit: Limit | None,
    loss_limit: Limit | None,
    max_consecutive: int,
    measure: Measure,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    check_transformation("optimizer", optimizer, "an optimizer")
    max_consecutive = check_whole_number("max_consecutive", max_consecutive)
    if isinstance(optimizer, optax.MultiSteps):  # not a transformation, but takes extra arguments
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    optimizer = optax.with_extra_args_support(optimizer)
    rescales = norm_limit is not None
    limit = norm_limit or constant(None)
    # One function for each guard, so that eagerly too it is compiled once.
    given = isinstance(measure, GivenNorm)
    measured = functools.partial(global_norm if given else measure, axis_name=axis_name)
    finite_norm = compiled()(functools.partial(_finite_norm, measure=measured))
    moved_unless = unless_skipped(optimizer)

    def init(params: Any) -> SkipState:
        kind = measured_types(measure, params, axis_name)
        if getattr(kind, "shape", None) != ():
            raise ValueError(f"`measure` must return one scalar, got {kind}.")
        return SkipState(
            grad_norm=filled_like(0.0, kind),
            skip_limit=filled_like(0.0, kind),
            loss=filled_like(0.0, kind) if loss_limit else None,
            loss_limit=filled_like(0.0, kind) if loss_limit else None,
            skipped=jnp.zeros((), bool),
            skip_count=jnp.zeros((), jnp.int32),
            skips_in_a_row=jnp.zeros((), jnp.int32),
            nonfinite_count=jnp.zeros((), jnp.int32),
            step_count=jnp.zeros((), jnp.int32),
            limit_state=limit.init(filled_like(0.0, kind)),
            loss_limit_state=loss_limit.init(filled_like(0.0, kind)) if loss_limit else None,
            inner_state=optimizer.init(params),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SkipState]:
        check_type(state, SkipState)
        if (state.loss is None) != (loss_limit is None):
            raise ValueError(
                "`state` must come from this guard, got that of one which watches "
                f"{'the norm' if loss_limit else 'the loss'}: call `init(params)`, or "
                "`upgrade_state(state, init(params))` where it comes from a checkpoint."
            )
        check_trees(updates, params)
        norm = in_update(measure, extra_args)(updates, axis_name=axis_name)
        highest_norm, limit_state = update_finite(limit, norm, state.limit_state)
        finite, is_high = jnp.isfinite(norm), norm > highest_norm
        loss = highest_loss = loss_limit_state = None
        if loss_limit:
            loss = _mean_loss(extra_args, norm, axis_name)
            highest_loss, loss_limit_state = update_finite(loss_limit, loss, state.loss_limit_state)
            finite, is_high = finite & jnp.isfinite(loss), is_high | (loss > highest_loss)
            loss, highest_loss = varying_like(loss, norm), varying_like(highest_loss, norm)
        is_spike = ~finite | is_high
        skipped = is_spike & (state.skips_in_a_row < max_consecutive)

        # The optimizer gets clipped updates at every step. That changes only a spike, and what
        # becomes of a spike matters only once the guard gives up.
        kept_limit = varying_like(highest_norm, norm) if rescales else None
        again = rescales or given
        kept_norm = finite_norm(data_of(updates), norm, ~finite & ~skipped) if again else norm
        if isinstance(measure, GivenNorm):
            # Clips within that were built to read it get the norm of what goes on to them.
            high = jnp.inf if kept_limit is None else kept_limit
            extra_args[measure.name] = jnp.minimum(kept_norm, high)
        moved, inner_state = moved_unless(
            skipped, (updates, kept_norm, kept_limit), state.inner_state, params, extra_args
        )
        old = (state.grad_norm, state.skip_limit, state.loss, state.loss_limit, state.skipped)
        new = (norm, varying_like(highest_norm, norm), loss, highest_loss, skipped)
        return moved, SkipState(
            *overwritten(old, new),
            skip_count=increment_if(state.skip_count, skipped),
            skips_in_a_row=jnp.where(is_spike, increment_if(state.skips_in_a_row, skipped), 0),
            nonfinite_count=increment_if(state.nonfinite_count, ~finite),
            step_count=increment_if(state.step_count, True),
            limit_state=limit_state,
            loss_limit_state=loss_limit_state,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _mean_loss(extra_args: Any, norm: jax.Array, axis_name: AxisName) -> jax.Array:
    """The loss in the dtype of norms; the mean of those of all devices."""
    if extra_args.get("loss") is None:
        raise ValueError(
            "`skip_spikes` watches `loss`: call `update(updates, state, params, loss=loss)`."
        )
    value = jnp.asarray(extra_args["loss"])
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"`loss` must be a real scalar, got {value.dtype}{list(value.shape)}.")
    value = value.astype(norm.dtype)
    mesh_axes = None if axis_name is None else tuple(sorted(set(axis_names(axis_name))))
    # Collectives belong to norms: the norm of order 1 sums positive and negative values apart.
    signs = (jnp.maximum(value, 0), jnp.maximum(-value, 0))
    above, below = leaf_norms(signs, order=1, axis_name=mesh_axes)
    return (above - below) / leaf_sizes(value, axis_name=mesh_axes)


def _finite_norm(
    updates: Any, norm: jax.Array, again: jax.Array, *, measure: Callable[[Any], jax.Array]
) -> jax.Array:
    """The norm, measured again over the finite elements where that is asked for."""

    def by_branch() -> jax.Array:
        # The flag comes from the norm of all devices: each takes the branch, and its collective.
        return jax.lax.cond(again, lambda: measure(finite_part(updates)), lambda: norm)

    def by_select() -> jax.Array:
        return jnp.where(again, measure(finite_part(updates)), norm)

    # A GPU would wait for the host at that branch; both norms come of one read there.
    return jax.lax.platform_dependent(cpu=by_branch, tpu=by_branch, default=by_select)
