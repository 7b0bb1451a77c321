"""QK-Clip: hold attention logits to a threshold by rescaling the weights of queries and keys."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_number, check_threshold
from .._compiled import compiled
from .._devices import axis_size, manual_axes, varying_axes, vma_checked
from .._inject import strategy
from .._leaves import norm_dtype, widen
from .._limits import constant
from .._memory import changed_in_place
from .._reduce import MeshAxes, Plan
from .._rescale import shrink
from .._state import (
    ClipState,
    check_params,
    check_trees,
    init_threshold,
    initial_state,
    next_state,
    read_threshold,
    transformation,
)
from .._types import Params, Threshold, Updates
from .heads import Heads, Layer, Role, View, attention_layers, group_count, named_weights, placed


@strategy("threshold", "alpha")
def qk_clip(
    threshold: Threshold = 100.0,
    *,
    heads: Callable[[str, Any], Heads | Sequence[Heads] | None],
    alpha: float = 0.5,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""QK-clip (MuonClip): rescale query and key weights of heads with too large logits.

    $$ W_{q,h} \leftarrow \gamma_h^{\alpha} W_{q,h}, \quad
       W_{k,h} \leftarrow \gamma_h^{1 - \alpha} W_{k,h}, \quad
       \gamma_h = \min(1, \; \tau / S_h) $$

    W are the weights after the step, S is the largest attention logit of a head (scaled, before
    the softmax) in the forward pass. For Transformers whose logits explode, as under Muon. Put it
    last in the chain, and call `update(grads, state, params, max_logits=logits)`: in `logits` an
    array stands where `params` has the weights of its layer.

    Args:
      threshold: tau, non-negative; 100 in the report. May be a schedule.
      heads: A function of path (`"block/query/kernel"`) and weight that returns its `Heads`,
        several of a fused weight, or None.
      alpha: The share of the query; 0.5 in the report.
      axis_name: Inside `shard_map` and `pmap` the mesh axes along which devices see other
        examples, over which the maximum is taken; `()` where it was taken already.

    Returns:
      A transformation with a `ClipState`: the largest logit, tau, the smallest gamma. A head whose
      logit is NaN or infinite keeps its step, and is counted.

    Raises:
      ValueError: Where `heads`, `params` and `max_logits` are missing or do not fit together.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> def heads(path, weight):  # (inputs, heads, features)
    ...     return gradclip_jax.Heads("query" if "query" in path else "key", axis=1)
    >>> params = {"block": {"query": jnp.ones((1, 2, 1)), "key": jnp.ones((1, 2, 1))}}
    >>> clip, logits = gradclip_jax.qk_clip(25.0, heads=heads), {"block": jnp.array([100.0, 9.0])}
    >>> steps = {"block": {"query": jnp.ones((1, 2, 1)), "key": jnp.zeros((1, 2, 1))}}
    >>> steps, state = clip.update(steps, clip.init(params), params, max_logits=logits)
    >>> print(steps["block"]["query"].ravel(), steps["block"]["key"].ravel())
    [0. 1.] [-0.5  0. ]

    Kimi Team, *Kimi K2: Open Agentic Intelligence*, 2025, https://arxiv.org/abs/2507.20534,
    algorithm 1; heads that share a key share a gamma, as in Megatron-LM. We depart from it in
    that one step shrinks a weight at most by the root of its dtype's epsilon.
    """
    limit = constant(check_threshold("threshold", threshold))
    share = check_number("alpha", alpha, "lie between 0 and 1", 0, 1)
    names = _axis_names(axis_name)
    if not callable(heads):
        raise ValueError(
            "`heads` must be a function of path and weight that returns `Heads`, several of them "
            f"or None, got {heads!r}."
        )

    def init(params: Params) -> ClipState:
        named_weights(heads, params, params)
        number = jax.ShapeDtypeStruct((), norm_dtype())
        return initial_state(number, init_threshold(limit), are_norms=False)

    def update(
        updates: Updates,
        state: ClipState,
        params: Params = None,
        *,
        max_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[Updates, ClipState]:
        del extra_args
        if params is None or max_logits is None:
            raise ValueError(
                f"`{'params' if params is None else 'max_logits'}` must be given: `qk_clip` "
                "rescales weights by the largest logits of their heads. Call `update(updates, "
                "state, params, max_logits=logits)`."
            )
        check_params(updates, params)
        check_trees(updates, params)
        most, clock = read_threshold(limit, state.limit_state)
        leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
        layers = attention_layers(max_logits, named_weights(heads, updates, params))
        changed, largest, above = _rescaled(
            [[jnp.asarray(leaves[w.position]) for w in layer.weights] for layer in layers],
            [[w.array for w in layer.weights] for layer in layers],
            _plan(layers, names),
            most,
            share,
            views=tuple(tuple(w.views for w in layer.weights) for layer in layers),
            groups=tuple(group_count(layer) for layer in layers),
            joined=names or (),
        )
        for layer, steps in zip(layers, changed, strict=True):
            for weight, step in zip(layer.weights, steps, strict=True):
                leaves[weight.position] = step
        return treedef.unflatten(leaves), next_state(
            state,
            largest,
            most,
            shrink(above, most),
            clipped=above > most,
            nonfinite=largest == jnp.inf,
            limit_state=clock,
        )

    return transformation(init, update)


@compiled(static=("views", "groups", "joined"))
def _rescaled(
    steps: list[list[jax.Array]],
    weights: list[list[jax.Array]],
    logits: Plan,
    most: jax.Array,
    share: Any,
    *,
    views: tuple[tuple[tuple[View, ...], ...], ...],
    groups: tuple[int, ...],
    joined: tuple[str, ...],
) -> tuple[list[list[jax.Array]], jax.Array, jax.Array]:
    """The steps to the rescaled weights, the largest logit, and the largest finite one."""
    changed: list[list[jax.Array]] = []
    largest: list[jax.Array] = []
    for number, of_heads in enumerate(logits.max(_number_or_inf)):
        # Heads that share a key share a factor.
        stack, count = of_heads.shape[:-1], of_heads.shape[-1]
        if count != groups[number]:
            shape = (*stack, groups[number], count // groups[number])
            of_heads = jnp.max(of_heads.reshape(shape), axis=-1)
        gamma = shrink(jnp.where(jnp.isfinite(of_heads), of_heads, 0), most)
        factors: dict[Role, jax.Array] = {
            "query": gamma**share,
            "key": gamma ** (1 - share),
            "query_rotary": gamma,
        }
        of_layer = zip(steps[number], weights[number], views[number], strict=True)
        changed.append([_rescaled_step(factors, *of_weight) for of_weight in of_layer])
        largest.append(of_heads)
    (both,) = _over_all(largest, joined).max(_largest)
    return changed, *both


def _rescaled_step(
    factors: Mapping[Role, jax.Array], step: jax.Array, weight: jax.Array, views: tuple[View, ...]
) -> jax.Array:
    """The step to the rescaled sum of weight and step; the step itself where nothing is clipped."""
    weight = jnp.asarray(weight)
    # A smaller factor would drown in the rounding of the sum with this step, and weights that
    # become zero on both sides have no gradient any more. The rest of it follows in later steps.
    least = max(float(jnp.finfo(x.dtype).eps) for x in (step, weight)) ** 0.5
    of_views = [placed(jnp.maximum(factors[view.role], least), view) for view in views]
    factor = functools.reduce(jnp.multiply, of_views)

    def to_rescaled(step: jax.Array, weight: jax.Array, factor: jax.Array) -> jax.Array:
        wide = jnp.result_type(widen(step).dtype, widen(weight).dtype)
        old, scale = weight.astype(wide), factor.astype(wide)
        moved = scale * (old + step.astype(wide)) - old
        return jnp.where(factor == 1, step, moved.astype(step.dtype))

    return changed_in_place(to_rescaled, step, weight, factor)


def _number_or_inf(x: jax.Array, *, axes: Any) -> jax.Array:
    # A maximum over devices may lose NaN, and never loses infinity.
    del axes
    return jnp.where(jnp.isnan(x), jnp.inf, x.astype(norm_dtype()))


def _largest(x: jax.Array | list[jax.Array], *, axes: Any) -> tuple[jax.Array, jax.Array]:
    """The largest element, and the largest that is finite."""
    del axes
    arrays = x if isinstance(x, list) else [x]
    finite = [jnp.where(array < jnp.inf, array, -jnp.inf) for array in arrays]
    first, second = (jnp.max(functools.reduce(jnp.maximum, of)) for of in (arrays, finite))
    return first, second


def _axis_names(axis_name: Any) -> tuple[str, ...] | None:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    is_names = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    if names is not None and not is_names:
        raise ValueError(f"`axis_name` must be a mesh axis, or several, got {axis_name!r}.")
    return None if names is None else tuple(names)


def _plan(layers: Sequence[Layer], names: tuple[str, ...] | None) -> Plan:
    """The maximum over all arrays of a layer, and over the devices that see other examples."""
    axis_size(names or ())  # they must be bound here
    arrays: list[jax.Array] = []
    mesh_axes: list[MeshAxes] = []
    groups: list[tuple[int, ...]] = []
    for layer in layers:
        groups.append(tuple(range(len(arrays), len(arrays) + len(layer.logits))))
        for logits in layer.logits:
            arrays.append(jnp.asarray(logits))
            mesh_axes.append(MeshAxes(_data_axes(layer, logits, names), _varying(logits)))
    return Plan(arrays, ((),) * len(arrays), tuple(mesh_axes), tuple(groups))


def _data_axes(layer: Layer, logits: Any, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes along which the factors of one head would differ if its logits were not joined."""
    if not manual_axes():
        return ()
    if vma_checked():
        varying = set(_varying(logits))
        of_weights = {axis for weight in layer.weights for axis in _varying(weight.array)}
        if names is not None or not varying & of_weights:
            return tuple(sorted(varying & set(names or ()) | varying - of_weights))
        why = (
            f"the logits at `{layer.place}` vary along {sorted(varying & of_weights)} as weights do"
        )
    elif names is not None:
        return tuple(sorted(names))
    else:
        why = (
            "`pmap`, and `shard_map` with `check_vma=False`, do not say along which axes they vary"
        )
    raise ValueError(
        f"`axis_name` must be given: {why}. Pass the mesh axes along which devices see other "
        'examples (`axis_name="data"`), or `()` where the maximum over them is taken already.'
    )


def _over_all(largest: Sequence[jax.Array], joined: tuple[str, ...]) -> Plan:
    """The maximum over all layers and heads, and the devices that hold them."""
    rest = tuple(sorted({*manual_axes()} - {*joined}))
    checked = vma_checked()
    mesh_axes = [MeshAxes(_varying(x) if checked else rest, _varying(x)) for x in largest]
    count = len(largest)
    return Plan([*largest], (None,) * count, tuple(mesh_axes), (tuple(range(count)),))


def _varying(x: Any) -> tuple[str, ...]:
    return tuple(sorted(varying_axes(x)))
