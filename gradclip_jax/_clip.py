"""The engine: updates, times the response to their norm and the limit on it, group by group."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import accepts, takes
from ._compiled import compiled
from ._devices import any_device, filled_like, manual_axes, varying_like
from ._inject import strategy
from ._leaves import (
    broadcast_norms,
    is_gradient,
    stacked_scalars,
)
from ._limits import Limit, Limits, each
from ._measures import gives_norms, gives_norms_of_arrays
from ._norms import global_norm
from ._per_layer import PerLayer, check_per_layer, keeps_layers, norms_of_layers
from ._platforms import elementwise
from ._rescale import (
    Factor,
    OnNonfinite,
    Response,
    check_response,
    factors,
    nonfinite_fill,
    rescale,
    shrink,
)
from ._state import (
    ClipState,
    check_norms,
    check_trees,
    initial_state,
    next_state,
    overwritten,
    plain_norms,
    transformation,
)
from ._types import AxisName, Norms, Params, Threshold, Updates

Measure = Callable[..., Any]
"""`(updates, *, axis_name) -> norms`, where the tree of the norms is a prefix of the updates.

One that also has an argument `extra_args` gets the extra arguments of the update, as a mapping; at
`init`, where only the types of its norms are asked for, None.
"""


@strategy("limit")
def clip_to_limit(
    limit: Limit | Threshold,
    *,
    measure: Measure = global_norm,
    response: Response = shrink,
    per_layer: PerLayer = False,
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
        One with an argument `extra_args` gets those of the update, and None at `init`. What a
        function of your own gives, or an `order` other than 2, is `clip_measure` in the metrics,
        not `grad_norm`.
      response: `shrink`, `normalize`, `smooth`, `smooth_sqrt`, `smooth_tanh`, `drop`, or a
        function `(norm, limit) -> factor`.
      per_layer: Whether the state keeps the norm of every array, for `metrics(per_layer=True)`; or
        a function `(path, leaf) -> axis` for arrays that stack layers along an axis, as `scan` has
        them, and None for others: then it keeps the norm of each layer. The gradients are read
        once all the same. For 2-norms of arrays alone.
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
    return clip_norms(
        each(limit),
        measure=measure,
        response=response,
        per_layer=per_layer,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )


def clip_norms(
    limits: Limits,
    *,
    measure: Measure = global_norm,
    response: Response = shrink,
    per_layer: PerLayer = False,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip norms to limits that may depend on all norms of the tree, and on the params.

    $$ g_k \leftarrow g_k \cdot \text{response}(n_k, l_k), \quad
       l = \text{limits}(n), \quad n = \text{measure}(g) $$

    Use it for a rule that one norm alone does not decide: a cap on the whole while each array has
    a limit, limits in proportion to roots of sizes. `clip_to_limit(limit)` is
    `clip_norms(each(limit))`.

    Args:
      limits: A `Limits`: a pair of functions, `init` and `update`.
      measure: See `clip_to_limit`.
      response: See `clip_to_limit`.
      per_layer: See `clip_to_limit`.
      axis_name: See `clip_to_limit`.
      on_nonfinite: See `clip_to_limit`.

    Returns:
      A transformation with a `ClipState`.

    Raises:
      ValueError: As `clip_to_limit`.

    >>> import gradclip_jax, jax, jax.numpy as jnp
    >>> def update(norms, state, updates, params):  # the mean of the norms
    ...     mean = sum(norms.values()) / len(norms)
    ...     return {name: mean for name in norms}, state
    >>> limits = gradclip_jax.Limits(lambda norms: (), update)
    >>> clip = gradclip_jax.clip_norms(limits, measure=gradclip_jax.leaf_norms)
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}  # norms 5 and 1
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["w"], updates["b"])
    [1.8000001 2.4      ] [1.]
    """
    if not isinstance(limits, Limits):
        raise ValueError(
            f"`limits` must be a `Limits`, got {limits!r}. Pass a limit on one norm to "
            "`clip_to_limit`, or as `each(limit)`."
        )
    _check_measure(measure)
    check_response(response)
    nonfinite_fill(on_nonfinite)
    check_per_layer(per_layer, measure)
    are_norms, has_layers = gives_norms(measure), keeps_layers(per_layer, measure)
    known_layers = () if gives_norms_of_arrays(measure) else None

    def measure_all(updates: Any, *, axis_name: AxisName, extra_args: Any) -> tuple[Any, Any]:
        if has_layers:
            return norms_of_layers(measure, per_layer, updates, axis_name=axis_name)
        return in_update(measure, extra_args)(updates, axis_name=axis_name), known_layers

    def init(params: Params) -> ClipState:
        norms, layers = measured_types(measure_all, params, axis_name)
        zeros = jax.tree.map(functools.partial(filled_like, 0.0), norms)
        return initial_state(norms, limits.init(zeros), are_norms=are_norms, layer_norms=layers)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        check_trees(updates, params)
        norms, layers = measure_all(updates, axis_name=axis_name, extra_args=extra_args)
        check_norms(norms, state, are_norms=are_norms, layer_norms=layers)
        of_norms, limit_state = limits.update(norms, state.limit_state, updates, params)
        updates, new = apply_limits(
            updates, norms, of_norms, state, limit_state, response, on_nonfinite, axis_name
        )
        if has_layers:
            new = new._replace(layer_norms=overwritten(state.layer_norms, layers))
        return updates, new

    return transformation(init, update, limits.init)


def measured_types(measure: Measure, params: Params, axis_name: AxisName) -> Any:
    """Shapes and types of the norms of a tree; no value is read and outside no axis is bound."""
    gradients = jax.tree.map(lambda leaf: leaf if is_gradient(leaf) else None, params)
    along = axis_name if manual_axes() else ()
    return jax.eval_shape(functools.partial(in_update(measure, None), axis_name=along), gradients)


def in_update(measure: Measure, extra_args: Any) -> Measure:
    """The measure, with the extra arguments of an update (None at `init`) if it asks for them."""
    if not accepts(measure, "extra_args"):
        return measure
    return functools.partial(measure, extra_args=extra_args)


def apply_limits(
    updates: Updates,
    norms: Norms,
    limits: Norms,
    state: ClipState,
    limit_state: Any,
    response: Response = shrink,
    on_nonfinite: OnNonfinite = "zero",
    axis_name: AxisName = None,
) -> tuple[Updates, ClipState]:
    """Hold norms to limits: rescale the updates, and write down what was done."""
    flat, treedef = jax.tree.flatten(norms)
    leaves, tree = jax.tree.flatten(updates)
    index = broadcast_norms(treedef.unflatten(range(len(flat))), updates)
    counted = [i for i, leaf in enumerate(leaves) if is_gradient(leaf) and index[i] is not None]
    arrays, clip_limits, clip_factors, flags = _apply_limits(
        [leaves[i] for i in counted],
        flat,
        treedef.flatten_up_to(limits),
        index=tuple(index[i] for i in counted),
        response=response,
        on_nonfinite=on_nonfinite,
    )
    for i, array in zip(counted, arrays, strict=True):
        leaves[i] = array
    if any(norm.ndim for norm in flat):
        # Units may be split over devices, so that each device knows of its own alone.
        flags = any_device(flags, axis_name)
    return tree.unflatten(leaves), next_state(
        state,
        plain_norms(norms),
        plain_norms(treedef.unflatten(clip_limits)),
        plain_norms(treedef.unflatten(clip_factors)),
        clipped=flags[0],
        nonfinite=flags[1],
        limit_state=limit_state,
    )


@compiled(static=("index", "response", "on_nonfinite"))
def _apply_limits(
    leaves: list[jax.Array],
    norms: list[jax.Array],
    limits: list[jax.Array],
    *,
    index: tuple[int, ...],
    response: Response,
    on_nonfinite: OnNonfinite,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array], jax.Array]:
    """Clipped leaves; limit and factor of each norm; two flags."""
    applied, whole, limits, flags = factors_of_norms(norms, limits, response, on_nonfinite)
    return rescale(leaves, [applied[i] for i in index]), limits, whole, flags


def factors_of_norms(
    norms: Sequence[jax.Array],
    limits: Sequence[jax.Array],
    response: Response,
    on_nonfinite: OnNonfinite,
) -> tuple[list[Factor], list[jax.Array], list[jax.Array], jax.Array]:
    """The factor of each norm in two steps, and as one; its limit; and two flags.

    The flags say whether any norm was above its limit, and whether any was not finite.
    """
    limits = [varying_like(limit, norm) for limit, norm in zip(limits, norms, strict=True)]
    limits = [jnp.broadcast_to(limit, n.shape) for n, limit in zip(norms, limits, strict=True)]
    pairs = list(zip(*(stacked_scalars(of, norms) for of in (norms, limits)), strict=True))
    clipped = _any([jnp.any(jnp.isfinite(norm) & (norm > limit)) for norm, limit in pairs])
    flags = jnp.stack([clipped, _any([jnp.any(~jnp.isfinite(norm)) for norm, _ in pairs])])
    fill = nonfinite_fill(on_nonfinite)
    found = elementwise(functools.partial(_factors, response, fill), norms, limits)
    applied, whole, limits = ([of_norm[part] for of_norm in found] for part in range(3))
    return applied, whole, limits, flags


def _factors(
    response: Response, fill: float, norm: jax.Array, limit: jax.Array
) -> tuple[Factor, jax.Array, jax.Array]:
    """The factor of a norm, in two steps and as one: `fill` for a norm that is not finite.

    The limit comes back, too: XLA would copy each constant one to the state by a kernel of its own.
    """
    finite = jnp.isfinite(norm)
    # Zero times the derivative of a response at NaN would be NaN.
    factor = factors(jnp.where(finite, norm, 0), limit, response)
    scale = jnp.where(finite, factor.scale, fill).astype(norm.dtype)
    return factor._replace(scale=scale), scale * factor.power, limit


def _check_measure(measure: Measure) -> None:
    if not callable(measure) or not takes(measure, {}, axis_name=None):
        raise ValueError(
            "`measure` must be a function `(updates, *, axis_name) -> norms`, such as "
            f"`gradclip_jax.leaf_norms`, got {measure!r}. Pass a response as `response`."
        )


def _any(flags: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags, jnp.zeros((), bool))
