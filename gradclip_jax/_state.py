"""The state of a clip: from `init` to the next, and what an update checks of it."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._compiled import compiled
from ._devices import check_averaged, filled_like
from ._export import exportable
from ._leaves import GroupNorms, norm_dtype
from ._limits import Limit, update_finite
from ._types import Norms, Params, Updates


@exportable
class ClipState(NamedTuple):
    """What a clip saw and did in its last update, and how often; `metrics` reads it.

    Attributes:
      grad_norm: 2-norms before the clip, float32 (float64 under x64); a scalar, or one for each
        group. They may be NaN or infinite. None for a clip that measures something else.
      clip_measure: What such a clip measured, in the same shapes: a largest modulus, a norm of
        another order, a dual norm, a ratio, singular values. None for a clip that measures norms.
      clip_limit: The limits on what was measured, in the same shapes.
      clip_factor: The factors by which the updates were multiplied, in the same shapes.
      clip_count: Number of updates in which what was measured was above its limit, int32.
      nonfinite_count: Number of updates in which it was not finite, int32.
      step_count: Number of updates, int32.
      layer_norms: 2-norms of all arrays, or of the layers of those that stack layers, of a clip
        that was built with `per_layer`. Empty where `grad_norm` tells them, else None.
      limit_state: State of the limit.
    """

    grad_norm: Any
    clip_measure: Any
    clip_limit: Any
    clip_factor: Any
    clip_count: jax.Array
    nonfinite_count: jax.Array
    step_count: jax.Array
    layer_norms: Any
    limit_state: Any


@exportable
class NonfiniteState(NamedTuple):
    """How often a guard met NaN or infinity.

    Attributes:
      nonfinite_count: Number of updates with an element that was NaN or infinite, int32.
      step_count: Number of updates, int32.
    """

    nonfinite_count: jax.Array
    step_count: jax.Array


def measured(state: ClipState) -> Any:
    """What the clip measured in its last update: norms, or its other measure."""
    return state.grad_norm if state.clip_measure is None else state.clip_measure


def initial_state(
    norms: Norms, limit_state: Any, *, are_norms: bool = True, layer_norms: Any = None
) -> ClipState:
    """The state before the first update, for norms, or another measure, of these types."""

    def full(number: float) -> Any:
        return jax.tree.map(functools.partial(filled_like, number), plain_norms(norms))

    # Each entry is an array of its own: a state with one array twice cannot be donated.
    return ClipState(
        grad_norm=full(0.0) if are_norms else None,
        clip_measure=None if are_norms else full(0.0),
        clip_limit=full(0.0),
        clip_factor=full(1.0),
        clip_count=jnp.zeros((), jnp.int32),
        nonfinite_count=jnp.zeros((), jnp.int32),
        step_count=jnp.zeros((), jnp.int32),
        layer_norms=jax.tree.map(functools.partial(filled_like, 0.0), layer_norms),
        limit_state=limit_state,
    )


def next_state(
    state: ClipState,
    norms: Any,
    clip_limit: Any,
    clip_factor: Any,
    *,
    clipped: jax.Array,
    nonfinite: jax.Array,
    limit_state: Any,
) -> ClipState:
    """The next state, its counters advanced by two flags."""
    norms, clip_limit, clip_factor, limit_state = overwritten(
        (measured(state), state.clip_limit, state.clip_factor, state.limit_state),
        (norms, clip_limit, clip_factor, limit_state),
    )
    return ClipState(
        grad_norm=norms if state.clip_measure is None else None,
        clip_measure=None if state.clip_measure is None else norms,
        clip_limit=clip_limit,
        clip_factor=clip_factor,
        clip_count=increment_if(state.clip_count, clipped),
        nonfinite_count=increment_if(state.nonfinite_count, nonfinite),
        step_count=increment_if(state.step_count, True),
        layer_norms=state.layer_norms,
        limit_state=limit_state,
    )


@compiled()
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


def increment_if(count: jax.Array, flag: jax.Array | bool) -> jax.Array:
    """A counter, one further where the flag is set; it stops at its largest value."""
    return jnp.where(flag & (count < jnp.iinfo(count.dtype).max), count + 1, count)


def init_threshold(threshold: Limit) -> Any:
    """The state of a threshold that looks at no norm: a constant or the clock of a schedule."""
    return threshold.init(jnp.zeros((), norm_dtype()))


def read_threshold(threshold: Limit, state: Any) -> tuple[jax.Array, Any]:
    """The value of such a threshold in this update, a scalar, and its next state."""
    return update_finite(threshold, jnp.zeros((), norm_dtype()), state)


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

    def checked(
        updates: Updates, state: Any, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, Any]:
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
            fresh = None
            if memory is not None and isinstance(state, ClipState):
                # A limit is made for the norms of its own clip, not for those of any other.
                with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                    limit_state = jax.eval_shape(memory, measured(state))
                    fresh = state._replace(limit_state=limit_state)
            if fresh is None:
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
        are_norms = fresh.clip_measure is None
        check_norms(measured(fresh), state, are_norms=are_norms, layer_norms=fresh.layer_norms)
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


def check_norms(
    norms: Norms, state: ClipState, *, are_norms: bool = True, layer_norms: Any = None
) -> None:
    """Raise when norms (or another measure) are not those of the state, made by `init`."""
    of_updates = {
        "grad_norm": norms if are_norms else None,
        "clip_measure": None if are_norms else norms,
        "layer_norms": layer_norms,
    }
    for field, norms in of_updates.items():
        here, known = _ranks(plain_norms(norms)), _ranks(getattr(state, field))
        if here != known:
            raise ValueError(
                "`updates` must have the structure of the params given to `init`, and `state` come "
                f"from this clip: their norms are {here[0]} with ranks {here[1]}, the state has "
                f"{known[0]} with ranks {known[1]} (`{field}`)."
            )


def _ranks(norms: Any) -> tuple[Any, list[int]]:
    leaves, treedef = jax.tree.flatten(norms)
    return treedef, [leaf.ndim if hasattr(leaf, "ndim") else np.ndim(leaf) for leaf in leaves]


def plain_norms(norms: Norms) -> Any:
    """Norms as users and checkpoints know them: those of groups as a plain dict."""
    return dict(norms) if isinstance(norms, GroupNorms) else norms


def check_trees(updates: Updates, params: Params) -> None:
    """Raise when updates are not averaged yet, where params of their structure tell."""
    if params is not None:
        check_averaged(updates, params)


def check_params(updates: Updates, params: Params) -> None:
    """Raise when params that are needed differ in structure from the updates."""
    treedef = jax.tree.structure(updates, is_leaf=lambda x: x is None)
    try:
        treedef.flatten_up_to(params)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`params` must have the structure of the updates: {error}") from error
