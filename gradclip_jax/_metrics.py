"""Read what clips and guards saw and did out of any optimizer state."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._devices import (
    axis_size,
    replicate_matrices,
    smallest_over_devices,
    split_along,
    sum_over_devices,
)
from ._guards import SkipState
from ._leaves import path_name, stacked_scalars
from ._per_layer import joint_norm
from ._state import ClipState, NonfiniteState, measured
from ._types import AxisName

SplitAxes = tuple[tuple[str, ...], ...]
"""Of each array the mesh axes along which devices hold different parts of it."""


def metrics(
    opt_state: Any,
    *,
    per_group: bool = False,
    per_layer: bool = False,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    """What the clip in an optimizer state saw and did in its last update, for logging.

    Args:
      opt_state: State of a clip, or of anything that contains one: `optax.chain`, `MultiSteps`,
        `inject_hyperparams`, an `nnx.Optimizer`, its `opt_state`, its `nnx.state` or that as a
        pure dict, a state dict of flax. Under `jit` too.
      per_group: Add an entry for each group when the clip has several: `grad_norm/encoder/w`,
        and likewise for limit and factor. Of units in one array: the norm of all of them, the
        smallest limit and factor.
      per_layer: Add the norm of every array, `grad_norm/encoder/w`, and of every layer of a stack,
        `grad_norm/blocks/w/0`. A clip that does not measure each array must be built with it.
      axis_name: Needed only for norms of units that `pmap`, or `shard_map` with `check_vma=False`,
        splits over devices: a mesh axis or axes along which each array of norms is split, or a
        prefix pytree of PartitionSpecs of the norms. Without it each device sees its own units.

    Returns:
      A flat dict of scalars, on the device until they are read. Several clips, and guards, have
      further keys: see the page of this function.

      | key | what |
      |---|---|
      | `grad_norm` | 2-norm before the clip; of several groups, the norm of all of them |
      | `clip_measure` | instead, what another clip measured; of several groups, the largest |
      | `clip_limit` | the limit; of several groups, the smallest |
      | `clip_factor` | the factor on the updates; of several groups, the smallest |
      | `clipped` | 1 if the norm was above the limit, else 0; of several groups, the fraction |
      | `clip_count` | updates in which a norm was above its limit, so far |
      | `nonfinite_count` | updates in which a norm (or element) was NaN or infinite, so far |
      | `step_count` | updates so far |

    Raises:
      ValueError: Where the state holds neither a clip nor a guard, or no clip with norms of arrays.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_global_norm(1.0)
    >>> _, state = clip.update(jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2)))
    >>> print(gradclip_jax.metrics(state)["grad_norm"])
    5.0
    """
    # An `nnx.Optimizer` is not a tree of plain arrays; its `opt_state` is.
    opt_state = getattr(opt_state, "opt_state", opt_state)
    found = _found(opt_state)
    if not found:
        raise ValueError("`opt_state` must hold the state of a clip; there is none in it.")
    clips = [(names, state) for names, state in found if isinstance(state, ClipState)]
    skips = [(names, state) for names, state in found if isinstance(state, SkipState)]
    if per_layer and all(state.layer_norms is None for _, state in clips):
        raise ValueError(
            "`per_layer` must be False unless a clip in `opt_state` knows the norm of every array: "
            "build the clip with `per_layer=True`."
        )
    of_clip = functools.partial(
        _of_clip, per_group=per_group, per_layer=per_layer, axis_name=axis_name
    )
    values = _of_all("clip", clips, of_clip) | _of_all("skip", skips, _of_skip)
    filters = [state for _, state in found if isinstance(state, NonfiniteState)]
    guards = [state for _, state in skips]
    for guard in [*filters, *guards]:
        # What a guard held back never reached the clip, so that nothing is counted twice.
        here, known = _only_array(guard.nonfinite_count), values.get("nonfinite_count")
        # Not 0 + here: under a transfer guard a zero of the host may not come to the device.
        values["nonfinite_count"] = here if known is None else known + here
        values.setdefault("step_count", _only_array(guard.step_count))
    if guards:
        values["grad_norm"] = _only_array(guards[0].grad_norm)
        values["step_count"] = _only_array(guards[0].step_count)
    return values


def _of_all(
    kind: str,
    states: Sequence[tuple[tuple[str, ...], Any]],
    read: Callable[[Any], dict[str, jax.Array]],
) -> dict[str, jax.Array]:
    """What the first says, and of several what each says under its name."""
    each = [read(state) for _, state in states]
    values = dict(each[0]) if each else {}
    if len(each) < 2:
        return values
    all_names = [names for names, _ in states]
    for i, (names, of_state) in enumerate(zip(all_names, each, strict=True)):
        if not names or all_names.count(names) > 1:
            names = (*names, f"{kind}_{all_names[:i].count(names)}")
        values |= {"/".join((*names, key)): value for key, value in of_state.items()}
    return values


def _of_clip(
    state: ClipState, *, per_group: bool, per_layer: bool, axis_name: AxisName
) -> dict[str, jax.Array]:
    kind = "grad_norm" if state.clip_measure is None else "clip_measure"
    of_clip = measured(state)
    norms = jax.tree.leaves(of_clip)
    limits = jax.tree.leaves(state.clip_limit)
    factors = jax.tree.leaves(state.clip_factor)
    axes = split_along(of_clip, axis_name)
    values = {
        **_named(kind, _of_groups(norms, limits, factors, axes=axes, kind=kind)),
        "clip_count": _only_array(state.clip_count),
        "nonfinite_count": _only_array(state.nonfinite_count),
        "step_count": _only_array(state.step_count),
    }
    if per_group and len(norms) > 1:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(of_clip)]
        of_groups = _of_each_group(norms, limits, factors, axes=axes, kind=kind)
        for path, of_group in zip(paths, of_groups, strict=True):
            named = _named(kind, of_group[:3])
            values |= {f"{key}/{path_name(path)}": value for key, value in named.items()}
    if per_layer and state.layer_norms is not None:
        values |= _of_layers(state, axis_name)
    return values


def _of_layers(state: ClipState, axis_name: AxisName) -> dict[str, jax.Array]:
    """The norm of every array, and of every layer of one that stacks layers."""
    is_kept = bool(jax.tree.leaves(state.layer_norms))
    tree = state.layer_norms if is_kept else state.grad_norm
    named = jax.tree_util.tree_leaves_with_path(tree)
    axes = split_along(tree, None if is_kept else axis_name)
    norms, layers = _of_arrays([norm for _, norm in named], axes=axes, stacked=is_kept)
    values: dict[str, jax.Array] = {}
    for (path, _), mesh_axes, norm, of_layers in zip(named, axes, norms, layers, strict=True):
        name = path_name(path)
        if of_layers and mesh_axes:
            raise ValueError(
                f"`per_layer` must be False where devices hold different layers of `{name}` (along "
                f"{mesh_axes}): return the state from the region and read it outside."
            )
        parts = ["grad_norm", *([name] if name else [])]
        values["/".join(parts)] = norm
        values |= {"/".join([*parts, str(i)]): layer for i, layer in enumerate(of_layers)}
    values.pop("grad_norm", None)  # of an array alone it is there already
    return values


def _named(kind: str, values: Sequence[jax.Array]) -> dict[str, jax.Array]:
    return dict(zip((kind, "clip_limit", "clip_factor", "clipped"), values, strict=False))


# Called eagerly this is one cached program for each number of arrays.
@functools.partial(jax.jit, static_argnames=("axes", "stacked"), inline=True)
def _of_arrays(
    norms: list[jax.Array], *, axes: SplitAxes, stacked: bool
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    whole = [joint_norm([norm], [names]) for norm, names in zip(norms, axes, strict=True)]
    return whole, [_entries(norm) if stacked and norm.ndim else [] for norm in norms]


def _entries(norms: jax.Array) -> list[jax.Array]:
    # Of a dimension that explicit mesh axes split jax takes no single entry.
    row = replicate_matrices(norms[None])
    return [row[0, i] for i in range(norms.size)]


# Called eagerly these are one cached program for each number of groups.
@functools.partial(jax.jit, static_argnames=("axes", "kind"), inline=True)
def _of_groups(
    norms: list[jax.Array],
    limits: list[jax.Array],
    factors: list[jax.Array],
    *,
    axes: SplitAxes,
    kind: str,
) -> tuple[jax.Array, ...]:
    over = frozenset[str]().union(*axes)
    counted = [(jnp.zeros((), jnp.int32), 0)]
    for names in dict.fromkeys(axes):
        here = [i for i, along in enumerate(axes) if along == names]
        like = [norms[i] for i in here]
        rows = (stacked_scalars([of[i] for i in here], like) for of in (norms, limits))
        pairs = zip(*rows, strict=True)
        above = [
            jnp.sum(jnp.isfinite(norm) & (norm > limit), dtype=jnp.int32) for norm, limit in pairs
        ]
        groups = sum(norms[i].size for i in here) * axis_size(names)
        counted.append((sum_over_devices(sum(above), names), groups))
    above, groups = map(sum, zip(*counted, strict=True))
    joint = joint_norm if kind == "grad_norm" else _largest
    return (
        joint(norms, axes),
        smallest_over_devices(_smallest(limits, jnp.inf), over),
        smallest_over_devices(_smallest(factors, 1.0), over),
        jnp.asarray(above, jnp.float32) / max(groups, 1),
    )


@functools.partial(jax.jit, static_argnames=("axes", "kind"), inline=True)
def _of_each_group(
    norms: list[jax.Array],
    limits: list[jax.Array],
    factors: list[jax.Array],
    *,
    axes: SplitAxes,
    kind: str,
) -> list[tuple[jax.Array, ...]]:
    groups = zip(norms, limits, factors, axes, strict=True)
    return [
        _of_groups([norm], [limit], [factor], axes=(names,), kind=kind)
        for norm, limit, factor, names in groups
    ]


def _found(opt_state: Any, names: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The states of clips and guards, from the outside to the inside, and the names they are under.

    A name is a key of a dict of states, as `optax.named_chain` and `optax.partition` have it.
    """

    def is_node(x: Any) -> bool:
        return isinstance(x, ClipState | NonfiniteState | SkipState | Mapping)

    found = []
    for x in filter(is_node, jax.tree.leaves(opt_state, is_leaf=is_node)):
        state = _from_dict(x) if isinstance(x, Mapping) else x
        if state is not None:
            found.append((names, state))
        if isinstance(state, SkipState):
            found += _found(state.inner_state, names)
        elif isinstance(x, Mapping) and state is None:
            for key in sorted(x, key=_place):
                found += _found(x[key], names if _is_place(key) else (*names, str(key)))
    return found


def _from_dict(fields: Mapping[Any, Any]) -> Any:
    """The state whose fields these are, for frameworks that make dicts of states, else None.

    `nnx.state` leaves out what is empty: the state of a limit without a memory, a None, and that
    `grad_norm` tells the norms of all arrays. So several norms count as those of arrays there.
    """
    for kind in (ClipState, SkipState, NonfiniteState):
        counters = {name for name in kind._fields if not name.endswith("_state")}
        norms = {"grad_norm", "clip_measure", "clip_limit", "clip_factor", "layer_norms"}
        losses = {"loss", "loss_limit"}
        if counters - norms - losses <= set(fields) <= set(kind._fields):
            empty: dict[str, Any] = dict.fromkeys(kind._fields)
            if isinstance(fields.get("grad_norm"), Mapping):
                empty["layer_norms"] = ()
            return kind(**{**empty, **fields})
    return None


def _is_place(key: Any) -> bool:
    """Whether a key is a number in a chain or a field of a state that became a dict, not a name."""
    return str(key).isdecimal() or str(key).endswith(("_state", "_states"))


def _place(key: Any) -> tuple[int, str]:
    """Where a part of a chain stood: as a key, its number may be a string."""
    return (int(key), "") if str(key).isdecimal() else (-1, str(key))


def _of_skip(state: SkipState) -> dict[str, jax.Array]:
    return {
        "skipped": _only_array(state.skipped).astype(jnp.float32),
        "skip_count": _only_array(state.skip_count),
        "skips_in_a_row": _only_array(state.skips_in_a_row),
        "skip_limit": _only_array(state.skip_limit),
        **{
            name: _only_array(value)
            for name, value in (("loss", state.loss), ("loss_limit", state.loss_limit))
            if value is not None
        },
    }


def _only_array(x: Any) -> jax.Array:
    """The array itself, also where a framework wrapped it (`nnx.OptArray`)."""
    (array,) = jax.tree.leaves(x)
    return array


def _largest(values: list[jax.Array], axes: SplitAxes) -> jax.Array:
    if len(values) == 1 and values[0].ndim == 0:
        return values[0]
    over = frozenset[str]().union(*axes)
    return 0 - smallest_over_devices(_smallest([-value for value in values], 0.0), over)


def _smallest(values: list[jax.Array], default: float) -> jax.Array:
    if len(values) == 1 and values[0].ndim == 0:
        return values[0]
    smallest = [jnp.min(value, initial=jnp.inf) for value in stacked_scalars(values) if value.size]
    return jnp.min(jnp.stack(smallest)) if smallest else jnp.asarray(default, jnp.float32)
