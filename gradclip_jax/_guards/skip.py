"""Skip a step: the parameters do not move, and the optimizer does not learn that it was there."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_argument_name, check_transformation, check_whole_number
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
      grad_norm: Norm of the gradients, float32 (float64 under x64); it may be NaN or infinite.
      skip_limit: The limit above which the step was a spike; infinity for `skip_nonfinite`.
      skipped: Whether the last update was skipped, bool.
      skip_count: Number of updates skipped, int32.
      skips_in_a_row: Number of updates skipped since the last one that was no spike, int32.
      nonfinite_count: Number of updates in which the norm (or the value watched) was not finite,
        skipped or not, int32.
      step_count: Number of updates, skipped or not, int32.
      limit_state: State of the limit.
      inner_state: State of the optimizer.
    """

    grad_norm: jax.Array
    skip_limit: jax.Array
    skipped: jax.Array
    skip_count: jax.Array
    skips_in_a_row: jax.Array
    nonfinite_count: jax.Array
    step_count: jax.Array
    limit_state: Any
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
        skipped as if it had never been; within it, one NaN would stay in the sum for ever.
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
    return _skip(optimizer, constant(None), max_consecutive, measure, axis_name, rescales=False)


@injectable("limit")
def skip_spikes(
    optimizer: optax.GradientTransformation,
    *,
    limit: Limit | Threshold,
    value: str | None = None,
    max_consecutive: int = 16,
    measure: Measure = global_norm,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skip the steps of an optimizer in which the norm, or the loss, is above a limit.

    $$ (u, s) \leftarrow \begin{cases}
         \text{optimizer}(g, s) & x \le \text{limit}(x) \\
         (0, s) & \text{otherwise} \end{cases}
       \qquad x = \lVert g \rVert \text{ or the loss} $$

    Use it where a clip is not enough: a broken batch has a direction that is wrong at any length,
    and its square stays in the second moment of Adam for a thousand steps. Put the limit well
    above the one of a clip within, so that what is merely large is clipped and not lost.

    Args:
      optimizer: The optimizer, clips and `MultiSteps` included.
      limit: Any limit, on the global norm or on the value; or a threshold as in `constant`. It
        learns at every step, skipped or not, in its own way: most take a spike in as clipped.
      value: Name of the extra argument to watch in place of the norm, such as `"loss"`: then call
        `update(updates, state, params, loss=loss)`. It must be a scalar; the mean over the devices
        of a `shard_map` or `pmap` is taken. The limit must suit its sign.
      max_consecutive: As in `skip_nonfinite`. After it, gradients are rescaled to the limit until a
        step is not a spike; with `value` there is no limit on the norm, and they go through.
      measure: As in `skip_nonfinite`.
      axis_name: See `global_norm`. All devices skip together.

    Returns:
      An optimizer as that of `skip_nonfinite`. A norm or value that is not finite is a spike, and
      no limit learns from it. A step at the limit is not a spike, nor is a constant norm.

    Raises:
      ValueError: For an `optimizer` that is not one, a threshold that may not be, a `value` that is
        not a name, or a `max_consecutive` below 1; in `update`, for a missing value.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> optimizer = gradclip_jax.skip_spikes(optax.sgd(0.1), limit=10.0)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> updates, state = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params))
    >>> print(updates["w"], gradclip_jax.metrics(state)["grad_norm"])
    [0. 0.] 50.0

    Chen et al., *The Best of Both Worlds*, ACL 2018, https://arxiv.org/abs/1804.09849.
    """
    if value is not None:
        check_argument_name("value", value, ", or None for the norm")
    limit = as_limit(limit)
    return _skip(
        optimizer, limit, max_consecutive, measure, axis_name, value, rescales=value is None
    )


def _skip(
    optimizer: optax.GradientTransformation,
    limit: Limit,
    max_consecutive: int,
    measure: Measure,
    axis_name: AxisName,
    value: str | None = None,
    *,
    rescales: bool,
) -> optax.GradientTransformationExtraArgs:
    check_transformation("optimizer", optimizer, "an optimizer")
    max_consecutive = check_whole_number("max_consecutive", max_consecutive)
    if isinstance(optimizer, optax.MultiSteps):  # not a transformation, but takes extra arguments
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    optimizer = optax.with_extra_args_support(optimizer)
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
            skipped=jnp.zeros((), bool),
            skip_count=jnp.zeros((), jnp.int32),
            skips_in_a_row=jnp.zeros((), jnp.int32),
            nonfinite_count=jnp.zeros((), jnp.int32),
            step_count=jnp.zeros((), jnp.int32),
            limit_state=limit.init(filled_like(0.0, kind)),
            inner_state=optimizer.init(params),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SkipState]:
        check_type(state, SkipState)
        check_trees(updates, params)
        norm = in_update(measure, extra_args)(updates, axis_name=axis_name)
        watched = norm if value is None else _mean_of(value, extra_args, norm, axis_name)
        spike_limit, limit_state = update_finite(limit, watched, state.limit_state)
        finite = jnp.isfinite(norm) & jnp.isfinite(watched)
        is_spike = ~finite | (watched > spike_limit)
        skipped = is_spike & (state.skips_in_a_row < max_consecutive)

        # The optimizer gets clipped updates at every step. That changes only a spike, and what
        # becomes of a spike matters only once the guard gives up.
        kept_limit = varying_like(spike_limit, norm) if rescales else None
        again = rescales or given
        kept_norm = finite_norm(data_of(updates), norm, ~finite & ~skipped) if again else norm
        if isinstance(measure, GivenNorm):
            # Clips within that were built to read it get the norm of what goes on to them.
            high = jnp.inf if kept_limit is None else kept_limit
            extra_args[measure.name] = jnp.minimum(kept_norm, high)
        moved, inner_state = moved_unless(
            skipped, (updates, kept_norm, kept_limit), state.inner_state, params, extra_args
        )
        old = (state.grad_norm, state.skip_limit, state.skipped)
        new = (norm, varying_like(spike_limit, norm), skipped)
        return moved, SkipState(
            *overwritten(old, new),
            skip_count=increment_if(state.skip_count, skipped),
            skips_in_a_row=jnp.where(is_spike, increment_if(state.skips_in_a_row, skipped), 0),
            nonfinite_count=increment_if(state.nonfinite_count, ~finite),
            step_count=increment_if(state.step_count, True),
            limit_state=limit_state,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _mean_of(name: str, extra_args: Any, norm: jax.Array, axis_name: AxisName) -> jax.Array:
    """The value to watch, in the dtype of norms; the mean of those of all devices."""
    if name not in extra_args:
        raise ValueError(
            f"`skip_spikes` watches `{name}`: call `update(updates, state, params, {name}={name})`."
        )
    value = jnp.asarray(extra_args[name])
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be a real scalar, got {value.dtype}{list(value.shape)}.")
    value = value.astype(norm.dtype)
    mesh_axes = None if axis_name is None else tuple(sorted(set(axis_names(axis_name))))
    # Collectives belong to norms: the norm of order 1 sums positive and negative values apart.
    signs = (jnp.maximum(value, 0), jnp.maximum(-value, 0))
    above, below = leaf_norms(signs, order=1, axis_name=mesh_axes)
    return (above - below) / leaf_sizes(value, axis_name=mesh_axes)


def _finite_norm(
    updates: Any, norm: jax.Array, again: jax.Array, *, measure: Callable[[Any], jax.Array]
) -> jax.Array:
    """The norm, measured again without what is not finite where that is asked for."""

    def by_branch() -> jax.Array:
        # The flag comes from the norm of all devices: each takes the branch, and its collective.
        return jax.lax.cond(again, lambda: measure(finite_part(updates)), lambda: norm)

    def by_select() -> jax.Array:
        return jnp.where(again, measure(finite_part(updates)), norm)

    # A GPU would wait for the host at that branch; both norms come of one read there.
    return jax.lax.platform_dependent(cpu=by_branch, tpu=by_branch, default=by_select)
