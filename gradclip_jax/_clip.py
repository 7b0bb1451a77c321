"""The engine: updates, times the response to their norm and the limit on it, group by group."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import accepts, takes
from ._devices import AxisName, any_device, check_averaged, filled_like, manual_axes, varying_like
from ._export import exportable
from ._leaves import (
    GroupNorms,
    broadcast_norms,
    is_gradient,
    norm_dtype,
    stacked_scalars,
)
from ._limits import Limit, as_limit, observe, observe_each
from ._norms import global_norm
from ._reduce import elementwise
from ._rescale import (
    OnNonfinite,
    Response,
    check_on_nonfinite,
    check_response,
    factors,
    rescale,
    shrink,
)

Measure = Callable[..., Any]
"""`(updates, *, axis_name) -> norms`, where the tree of the norms is a prefix of the updates.

One that also has an argument `extra_args` gets the extra arguments of the update, as a mapping; at
`init`, where only the types of its norms are asked for, None.
"""

P = ParamSpec("P")
T = TypeVar("T")


@exportable
class ClipState(NamedTuple):
    """What a clip saw and did in its last update, and how often; `metrics` reads it.

    Attributes:
      grad_norm: Norms before the clip, float32 (float64 under x64); a scalar, or one for each
        group. They may be NaN or infinite.
      clip_limit: The limits they were held to, in the same shape.
      clip_factor: The factors by which the updates were multiplied, in the same shape.
      clip_count: Number of updates in which a norm was above its limit, int32.
      nonfinite_count: Number of updates in which a norm was not finite, int32.
      step_count: Number of updates, int32.
      limit_state: State of the limit.
    """

    grad_norm: Any
    clip_limit: Any
    clip_factor: Any
    clip_count: jax.Array
    nonfinite_count: jax.Array
    step_count: jax.Array
    limit_state: Any


@exportable
class NonfiniteState(NamedTuple):
    """How often a guard met what is not finite.

    Attributes:
      nonfinite_count: Number of updates with an element that was NaN or infinite, int32.
      step_count: Number of updates, int32.
    """

    nonfinite_count: jax.Array
    step_count: jax.Array


def clip_to_limit(
    limit: Limit | Any,
    measure: Measure = global_norm,
    response: Response = shrink,
    *,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Hold norms to a limit: any measure, any limit, any response.

    $$ g_k \leftarrow g_k \cdot \text{response}(n_k, \text{limit}(n_k)), \quad
       n = \text{measure}(g) $$

    Use it to build a clip of your own; the named strategies are its instances.

    Args:
      limit: A `Limit`, or a threshold as in `constant`.
      measure: `global_norm`, `leaf_norms`, `unit_norms`, `group_norms` (its labels bound by
        `functools.partial`), `given_norm("grad_norm")` for a norm that is known already, or a
        function `(updates, *, axis_name) -> norms` with norms in a prefix pytree of the updates.
        One with an argument `extra_args` gets those of the update, and None at `init`.
      response: `shrink`, `normalize`, `smooth`, `smooth_sqrt`, `smooth_tanh`, `drop`, or a
        function `(norm, limit) -> factor`.
      axis_name: Handed to the measure; see `global_norm`.
      on_nonfinite: What a group becomes whose norm is NaN or infinite: `"zero"`, or `"propagate"`
        for NaN throughout. Either way it is counted, and no limit learns from it.

    Returns:
      A transformation with a `ClipState`. Where the limit has no memory (a number, not a
      schedule), its update also starts from None and from `optax.EmptyState()`.

    Raises:
      ValueError: For a threshold, a measure, a response or a policy that may not be; in `update`,
        for updates of another structure than at `init`, and gradients that were not averaged.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_to_limit(1.0, measure=gradclip_jax.leaf_norms)
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["w"], updates["b"])
    [0.6 0.8] [0.5]
    """
    limit = as_limit(limit)
    _check_measure(measure)
    check_response(response)
    check_on_nonfinite(on_nonfinite)

    def init(params: Any) -> ClipState:
        norms = measured_types(measure, params, axis_name)
        zeros = [filled_like(0.0, kind) for kind in jax.tree.leaves(norms)]
        return initial_state(norms, memory(zeros))

    def memory(norms: Any) -> tuple[Any, ...]:
        return tuple(limit.init(norm) for norm in jax.tree.leaves(norms))

    def update(updates, state, params=None, **extra_args):
        check_trees(updates, params)
        norms = in_update(measure, extra_args)(updates, axis_name=axis_name)
        check_norms(norms, state)
        limits, limit_states = observe_each(limit, jax.tree.leaves(norms), state.limit_state)
        limit_state = tuple(limit_states)
        return hold(updates, norms, limits, state, limit_state, response, on_nonfinite, axis_name)

    return transformation(init, update, memory)


def named_strategy(strategy: Callable[P, T]) -> Callable[P, T]:
    """Let `optax.inject_hyperparams` see the thresholds of a strategy, and nothing else.

    It turns every default that is a number into an array and takes every default that can be
    called for a schedule: `order=2` would be traced and `response=shrink` called with a count.
    Thresholds are positional here and structure is keyword-only, so the defaults of keyword-only
    arguments are shown to it in a wrapping that it leaves alone.
    """
    signature = inspect.signature(strategy)

    @functools.wraps(strategy)
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        plain: Any = {
            name: value.value if isinstance(value, _Structural) else value
            for name, value in kwargs.items()
        }
        return cast(Any, strategy)(*args, **plain)

    shown = [
        parameter.replace(default=_Structural(parameter.default))
        if parameter.kind is parameter.KEYWORD_ONLY
        else parameter
        for parameter in signature.parameters.values()
    ]
    build.__dict__["__signature__"] = signature.replace(parameters=shown)
    return build


class _Structural:
    """A default that is neither a number nor callable, but prints as what it holds."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", repr(self.value))


def initial_state(norms: Any, limit_state: Any) -> ClipState:
    """The state before the first update, for norms of these shapes and types."""

    def full(number: float) -> Any:
        return jax.tree.map(functools.partial(filled_like, number), _plain(norms))

    # Each entry is an array of its own: a state with one array twice cannot be donated.
    return ClipState(
        grad_norm=full(0.0),
        clip_limit=full(0.0),
        clip_factor=full(1.0),
        clip_count=jnp.zeros((), jnp.int32),
        nonfinite_count=jnp.zeros((), jnp.int32),
        step_count=jnp.zeros((), jnp.int32),
        limit_state=limit_state,
    )


def measured_types(measure: Measure, params: Any, axis_name: AxisName) -> Any:
    """Shapes and types of the norms of a tree; no value is read and outside no axis is bound."""
    gradients = jax.tree.map(lambda leaf: leaf if is_gradient(leaf) else None, params)
    along = axis_name if manual_axes() else ()
    return jax.eval_shape(functools.partial(in_update(measure, None), axis_name=along), gradients)


def in_update(measure: Measure, extra_args: Any) -> Measure:
    """The measure, with the extra arguments of an update (None at `init`) if it asks for them."""
    if not accepts(measure, "extra_args"):
        return measure
    return functools.partial(measure, extra_args=extra_args)


def init_threshold(threshold: Limit) -> Any:
    """The state of a threshold that looks at no norm: a constant or the clock of a schedule."""
    return threshold.init(jnp.zeros((), norm_dtype()))


def read_threshold(threshold: Limit, state: Any) -> tuple[jax.Array, Any]:
    """The value of such a threshold in this update, a scalar, and its next state."""
    return observe(threshold, jnp.zeros((), norm_dtype()), state)


def check_trees(updates: Any, params: Any) -> None:
    """Raise when updates are not averaged yet, where params of their structure tell."""
    if params is not None:
        check_averaged(updates, params)


def check_params(updates: Any, params: Any) -> None:
    """Raise when params that are needed differ in structure from the updates."""
    treedef = jax.tree.structure(updates, is_leaf=lambda x: x is None)
    try:
        treedef.flatten_up_to(params)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`params` must have the structure of the updates: {error}") from error


def transformation(
    init: optax.TransformInitFn,
    update: Callable[..., tuple[Any, Any]],
    memory: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A clip whose update takes the states that its `init` makes, and says so of any other.

    Many loops pass None or `optax.EmptyState()` to a clip, for those of optax have no state. One
    without a memory starts afresh from these: nothing is lost but its counters. `memory` makes
    the state of the limit from norms, for less than a whole `init`.
    """
    last: list[Any] = [None]

    def checked(updates, state, params=None, **extra_args):
        if state is None or isinstance(state, optax.EmptyState):
            started = init(updates)
            if jax.tree.leaves(getattr(started, "limit_state", ())):
                raise ValueError(
                    f"`state` must be what `init` returned, got {state!r}: the limit of this clip "
                    "has a memory. Call `init(params)` once and pass each update the state of the "
                    "one before."
                )
            return update(updates, started, params, **extra_args)
        kind = _kind(state)
        if kind != last[0]:
            # Once for each program; called eagerly, once for each kind of state.
            if memory is not None and isinstance(state, ClipState):
                limit_state = jax.eval_shape(memory, state.grad_norm)
                fresh = state._replace(limit_state=limit_state)
            else:
                fresh = jax.eval_shape(lambda: init(updates))
            if kind != _kind(fresh):
                check_trees(updates, params)
                _raise_for_state(state, jax.eval_shape(lambda: init(updates)))
            last[0] = kind
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, checked)


def _raise_for_state(state: Any, fresh: Any) -> None:
    check_type(state, type(fresh))
    if isinstance(fresh, ClipState):
        check_norms(fresh.grad_norm, state)
    raise ValueError(
        "`updates` must have the structure of the params given to `init`, and `state` come from "
        f"this clip: it is {_kind(state)}, not {_kind(fresh)}. Call `init(params)`, or "
        "`upgrade_state(state, init(params))` where it comes from a checkpoint."
    )


def check_type(state: Any, kind: type) -> None:
    """Raise when a state is not of the type that `init` returns."""
    if not isinstance(state, kind):
        raise ValueError(
            f"`state` must be the `{kind.__name__}` that `init` returned, got "
            f"{type(state).__name__}. Call `init(params)`, or `upgrade_state(state, init(params))` "
            "where it comes from a checkpoint."
        )


def _kind(state: Any) -> Any:
    """What all states of one clip share, on however many devices: structure, ranks, kinds."""
    leaves, treedef = jax.tree.flatten(state)
    arrays = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]
    # Shapes may be those of one device, and a float64 may come from a program with x64.
    return treedef, [(array.ndim, array.dtype.kind) for array in arrays]


def check_norms(norms: Any, state: ClipState) -> None:
    """Raise when norms are not those of the state, made by `init`."""
    measured, known = _ranks(_plain(norms)), _ranks(state.grad_norm)
    if measured != known:
        raise ValueError(
            "`updates` must have the structure of the params given to `init`, and `state` come "
            f"from this clip: their norms are {measured[0]} with ranks {measured[1]}, the state "
            f"has {known[0]} with ranks {known[1]}."
        )


def _ranks(norms: Any) -> tuple[Any, list[int]]:
    leaves, treedef = jax.tree.flatten(norms)
    return treedef, [leaf.ndim if hasattr(leaf, "ndim") else np.ndim(leaf) for leaf in leaves]


def hold(
    updates: Any,
    norms: Any,
    limits: Any,
    state: ClipState,
    limit_state: Any,
    response: Response = shrink,
    on_nonfinite: OnNonfinite = "zero",
    axis_name: AxisName = None,
) -> tuple[Any, ClipState]:
    """Hold norms to limits: rescale the updates, and write down what was done.

    `limits` has a limit for each leaf of the norms.
    """
    flat, treedef = jax.tree.flatten(norms)
    check_norms(norms, state)
    leaves, tree = jax.tree.flatten(updates)
    index = broadcast_norms(treedef.unflatten(range(len(flat))), updates)
    held = [i for i, leaf in enumerate(leaves) if is_gradient(leaf) and index[i] is not None]
    arrays, clip_limits, clip_factors, flags = _held(
        [leaves[i] for i in held],
        flat,
        list(limits),
        index=tuple(index[i] for i in held),
        response=response,
        on_nonfinite=on_nonfinite,
    )
    for i, array in zip(held, arrays, strict=True):
        leaves[i] = array
    if any(norm.ndim for norm in flat):
        # Units may be split over devices, so that each device knows of its own alone.
        flags = any_device(flags, axis_name)
    return tree.unflatten(leaves), record(
        state,
        _plain(norms),
        _plain(treedef.unflatten(clip_limits)),
        _plain(treedef.unflatten(clip_factors)),
        clipped=flags[0],
        nonfinite=flags[1],
        limit_state=limit_state,
    )


# Called eagerly this is one cached program for each tree structure; inside a trace it inlines.
@functools.partial(jax.jit, static_argnames=("index", "response", "on_nonfinite"), inline=True)
def _held(leaves, norms, limits, *, index, response, on_nonfinite):
    """Held leaves, the limit and factor of each norm, and whether any was clipped or not finite."""
    limits = [varying_like(limit, norm) for limit, norm in zip(limits, norms, strict=True)]
    of_norm = [jnp.broadcast_to(limit, n.shape) for n, limit in zip(norms, limits, strict=True)]
    rows = (stacked_scalars(of, norms) for of in (norms, of_norm))
    pairs = list(zip(*rows, strict=True))
    clipped = _any([jnp.any(jnp.isfinite(norm) & (norm > limit)) for norm, limit in pairs])
    flags = jnp.stack([clipped, _any([jnp.any(~jnp.isfinite(norm)) for norm, _ in pairs])])
    fill = jnp.nan if on_nonfinite == "propagate" else 0.0
    found = elementwise(functools.partial(_factors, response, fill), norms, of_norm)
    scales, powers, whole, limits = ([of_norm[part] for of_norm in found] for part in range(4))
    leaves = rescale(leaves, [scales[i] for i in index], [powers[i] for i in index])
    return leaves, limits, whole, flags


def _factors(response, fill, norm, limit):
    """The scale and the power of a factor, and both as one: `fill` for a norm that is not finite.

    The limit comes back, too: XLA would copy each constant one to the state by a kernel of its own.
    """
    finite = jnp.isfinite(norm)
    # Zero times the derivative of a response at NaN would be NaN.
    factor, power = factors(jnp.where(finite, norm, 0), limit, response)
    scale = jnp.where(finite, factor, fill).astype(norm.dtype)
    return scale, power, scale * power, limit


def record(
    state: ClipState,
    grad_norm: Any,
    clip_limit: Any,
    clip_factor: Any,
    *,
    clipped: jax.Array,
    nonfinite: jax.Array,
    limit_state: Any,
) -> ClipState:
    """The next state, its counters advanced by two flags."""
    *seen, limit_state = overwritten(
        (state.grad_norm, state.clip_limit, state.clip_factor, state.limit_state),
        (grad_norm, clip_limit, clip_factor, limit_state),
    )
    return ClipState(
        *seen,
        clip_count=counted(state.clip_count, clipped),
        nonfinite_count=counted(state.nonfinite_count, nonfinite),
        step_count=counted(state.step_count, True),
        limit_state=limit_state,
    )


@functools.partial(jax.jit, inline=True)
def overwritten(old: Any, new: Any) -> Any:
    """`new`, in a program that reads `old`.

    `jit` drops an argument that it does not read, and then its buffer is not donated: each step
    has scalars at new addresses, and a GPU captures all kernels of the step anew for them.
    """

    def over(old: Any, new: jax.Array) -> jax.Array:
        known = jnp.asarray(old)
        is_alike = jax.typeof(known) == jax.typeof(new) and new.size == 1
        return _either(known, new) if is_alike else new

    return jax.tree.map(over, old, new)


@jax.custom_jvp
def _either(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(old == new, old, new)


@_either.defjvp
def _of_the_new(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _either(*primals), tangents[1]


def _check_measure(measure: Measure) -> None:
    if not callable(measure) or not takes(measure, {}, axis_name=None):
        raise ValueError(
            "`measure` must be a function `(updates, *, axis_name) -> norms`, such as "
            f"`gradclip_jax.leaf_norms`, got {measure!r}. Pass a response as `response`."
        )


def _any(flags: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags, jnp.zeros((), bool))


def counted(count: jax.Array, flag: jax.Array | bool) -> jax.Array:
    """A counter, one further where the flag is set; it stops at its largest value."""
    return jnp.where(flag & (count < jnp.iinfo(count.dtype).max), count + 1, count)


def _plain(norms: Any) -> Any:
    """Norms as users and checkpoints know them: those of groups as a plain dict."""
    return dict(norms) if isinstance(norms, GroupNorms) else norms
