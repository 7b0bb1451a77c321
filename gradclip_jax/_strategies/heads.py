"""Where weights have attention heads, and which logits are theirs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._leaves import is_gradient, path_name
from .._types import Params, Updates

Role = Literal["query", "key", "query_rotary"]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where a weight has attention heads: what the function `heads` of `qk_clip` returns for it.

    Attributes:
      role: `"query"` or `"key"`, which share a factor, or `"query_rotary"`, which takes all of it:
        the rotary queries of latent attention, and any query whose key must not change.
      axis: The axis with one entry for each head. In a stack of layers the axes of layer and head,
        `(0, 2)`, in the order of those of the logits.
      part: What of the weight it is, for those of several roles: an index or a slice of an axis,
        `{1: 0}` or `{2: slice(0, 64)}`.
      shape: The shape in which to see a weight whose axes are products, such as (inputs, heads *
        features): `(inputs, heads, features)`. One number may be -1. `axis` and `part` are those
        of this shape.

    >>> from gradclip_jax import Heads
    >>> query = Heads("query", axis=1)  # (inputs, heads, features)
    >>> key = Heads("key", axis=1, shape=(512, 8, -1))  # (512, 8 * features)
    >>> fused = Heads("query", axis=2, part={1: 0}), Heads("key", axis=2, part={1: 1})
    """

    role: Role
    axis: int | tuple[int, ...]
    part: Mapping[int, int | slice] = dataclasses.field(default_factory=dict[int, int | slice])
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check each argument where it enters."""
        if self.role not in ("query", "key", "query_rotary"):
            raise ValueError(f'`role` must be "query", "key" or "query_rotary", got {self.role!r}.')
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if not axes or not all(map(_is_whole, axes)):
            raise ValueError(f"`axis` must be an axis or a tuple of axes, got {self.axis!r}.")
        is_dict = isinstance(self.part, Mapping)
        if not is_dict or not all(_is_whole(i) and _is_part(of) for i, of in self.part.items()):
            raise ValueError(
                "`part` must be a dict of axes, each with an index or a slice without a step, "
                f"got {self.part!r}."
            )
        if self.shape is not None and not (self.shape and all(map(_is_whole, self.shape))):
            raise ValueError(f"`shape` must be a tuple of whole numbers, got {self.shape!r}.")


class View(NamedTuple):
    """Where the heads of one role are in a weight, all axes counted from the front.

    Attributes:
      role: See `Heads`.
      shape: The shape in which the weight is seen.
      axes: Its axes of stack and heads, in the order of those of the logits.
      part: The start and the stop of each axis.
      merged: Of each axis of the weight the axes of `shape` that are in it.
    """

    role: Role
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    part: tuple[tuple[int, int], ...]
    merged: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of layers and heads."""
        return tuple(self.part[axis][1] - self.part[axis][0] for axis in self.axes)


class Weight(NamedTuple):
    """A weight that has heads, and its position among the leaves."""

    position: int
    path: str
    array: Any
    views: tuple[View, ...]


class Layer(NamedTuple):
    """An attention layer, or a stack of them: its place, logits and weights."""

    place: str
    logits: list[jax.Array]
    weights: list[Weight]


def named_weights(
    heads: Callable[[str, Any], Any], updates: Updates, params: Params
) -> list[Weight]:
    """The weights for which `heads` returned something."""
    named, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
    arrays = treedef.flatten_up_to(params)
    found: list[Weight] = []
    for position, ((path, step), array) in enumerate(zip(named, arrays, strict=True)):
        if step is None or array is None:
            continue
        name = path_name(path)
        of_weight = heads(name, array)
        given = of_weight if isinstance(of_weight, tuple | list) else (of_weight,)
        given = [entry for entry in given if entry is not None]
        if not all(isinstance(entry, Heads) for entry in given):
            raise ValueError(
                f"`heads` must return `Heads`, several of them or None, got {of_weight!r} for "
                f"`{name}`."
            )
        if given and not (is_gradient(step) and is_gradient(array)):
            raise ValueError(
                f"`heads` must name weights of a float dtype, got `{name}`, which is "
                f"{jnp.result_type(array)}. Return None for it."
            )
        if given:
            views = tuple(_view(name, jnp.shape(array), entry) for entry in given)
            found.append(Weight(position, name, array, views))
    # `optax.tree.map_params` calls `init` with a tree of no leaves.
    if named and not found:
        paths = ", ".join(f"`{path_name(path)}`" for path, _ in named[:3])
        raise ValueError(
            "`heads` must return `Heads` for the weights of queries and keys, got None for all of "
            f"{len(named)}: their paths are like {paths}."
        )
    return found


def _view(path: str, shape: tuple[int, ...], heads: Heads) -> View:
    """An entry of `heads`, resolved against the shape of its weight."""
    seen, merged = _seen(path, shape, heads.shape or shape)
    rank, what = len(seen), f"`{path}`, seen in the shape {seen}"
    given = heads.axis if isinstance(heads.axis, tuple) else (heads.axis,)
    axes = tuple(axis + rank if axis < 0 else axis for axis in given)
    part = {axis + rank if axis < 0 else axis: of for axis, of in heads.part.items()}
    if not {*axes, *part} <= set(range(rank)) or len(set(axes)) < len(axes):
        raise ValueError(
            f"`axis` and `part` of `Heads` must name axes of {what}, got {heads.axis} and "
            f"{heads.part}."
        )
    ranges = [range(size)[_as_slice(part.get(axis, slice(None)))] for axis, size in enumerate(seen)]
    if not all(ranges):
        raise ValueError(f"`part` of `Heads` must leave something of {what}, got {heads.part}.")
    return View(heads.role, seen, axes, tuple((r.start, r.stop) for r in ranges), merged)


def _seen(
    path: str, shape: tuple[int, ...], given: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The shape in which a weight is seen, and of each of its axes those that are in it."""
    known = math.prod(size for size in given if size != -1)
    rest = math.prod(shape) // max(known, 1)
    seen = tuple(rest if size == -1 else size for size in given)
    merged: list[tuple[int, ...]] = []
    start = 0
    for size in shape:
        stop = start + 1
        while stop < len(seen) and math.prod(seen[start:stop]) < size:
            stop += 1
        if math.prod(seen[start:stop]) == size:
            merged.append(tuple(range(start, stop)))
        start = stop
    if len(merged) < len(shape) or start != len(seen) or math.prod(seen) != math.prod(shape):
        raise ValueError(
            f"`shape` of `Heads` must split axes of `{path}`, which has the shape {shape}, got "
            f"{given}."
        )
    return seen, tuple(merged)


def attention_layers(max_logits: Any, weights: Sequence[Weight]) -> list[Layer]:
    """The logits, each with the weights below the place where it stands."""
    layers: dict[str, Layer] = {}
    for path, logits in jax.tree.leaves_with_path(max_logits):
        parts = path_name(path).split("/")
        # A module of flax stores what it sows under its own path, and a name.
        parts = parts[: parts.index("max_logits")] if "max_logits" in parts else parts
        place = "/".join(parts)
        logits = logits if hasattr(logits, "dtype") else jnp.asarray(logits)
        if not (is_gradient(logits) and jnp.isrealobj(logits)):
            raise ValueError(f"`max_logits` must be real numbers, got {logits.dtype} at `{place}`.")
        layers.setdefault(place, Layer(place, [], [])).logits.append(logits)
    for weight in weights:
        above = [
            place for place in layers if f"{weight.path}/".startswith(f"{place}/" if place else "")
        ]
        if not above:
            raise ValueError(_unmatched(f"logits for `{weight.path}`", layers, weights))
        layers[max(above, key=len)].weights.append(weight)
    for layer in layers.values():
        if not layer.weights:
            raise ValueError(_unmatched(f"weights for `{layer.place}`", layers, weights))
    return list(layers.values())


def _unmatched(what: str, layers: Mapping[str, Layer], weights: Sequence[Weight]) -> str:
    places = ", ".join(f"`{place}`" for place in list(layers)[:3])
    paths = ", ".join(f"`{weight.path}`" for weight in weights[:3])
    return (
        "`max_logits` must be a tree that has the logits of a layer where `params` has its "
        f"weights, or below that under the name `max_logits`; there are no {what}. Logits are at "
        f"{places or 'no place'}, weights that `heads` names at {paths}."
    )


def group_count(layer: Layer) -> int:
    """The number of groups of heads that share a key, hence a factor."""
    shape = jnp.shape(layer.logits[0])
    count, roles = shape[-1] if shape else 0, set[Role]()
    groups = count
    for weight in layer.weights:
        for view in weight.views:
            *stack, here = view.counts
            roles.add(view.role)
            groups = math.gcd(groups, here)
            is_key = view.role == "key"
            fits = count > 0 and (count % here == 0 if is_key else count == here)
            if not fits or any(jnp.shape(x) != (*stack, count) for x in layer.logits):
                of = "a divisor of the number of logits" if is_key else "one logit each"
                raise ValueError(
                    f"`max_logits` must have the shape of the heads: `{weight.path}` has "
                    f"{view.counts} along axis {view.axes} for its {view.role} ({of}), and the "
                    f"logits at `{layer.place}` are {[jnp.shape(x) for x in layer.logits]}."
                )
    if ("query" in roles) != ("key" in roles):
        (role,) = roles & {"query", "key"}
        raise ValueError(
            f"`heads` must name queries and keys, which share a factor; at `{layer.place}` it "
            f'names only "{role}". Queries that take all of it are "query_rotary".'
        )
    return groups


def placed(factors: jax.Array, view: View) -> jax.Array:
    """The factors of heads on the axes of their weight, 1 where there is no head of this role."""
    order = sorted(range(len(view.axes)), key=lambda i: view.axes[i])
    *stack, groups = factors.shape
    if groups != view.counts[-1]:  # not `jnp.repeat`: explicit axes would have to be told
        each = (*stack, groups, view.counts[-1] // groups)
        factors = jnp.broadcast_to(factors[..., None], each).reshape(view.counts)
    factors = jnp.transpose(factors, order)
    shape = [size if axis in view.axes else 1 for axis, size in enumerate(view.shape)]
    whole = [
        (start, size - stop) for (start, stop), size in zip(view.part, view.shape, strict=True)
    ]
    around = [whole[axis] for axis in sorted(view.axes)]
    if any(map(any, around)):
        factors = jnp.pad(factors, around, constant_values=1)
    factors = factors.reshape(shape)
    for axis, (start, stop) in enumerate(view.part):
        if axis not in view.axes and stop - start < view.shape[axis]:
            index = np.arange(view.shape[axis]).reshape(
                [-1 if i == axis else 1 for i in range(len(shape))]
            )
            factors = jnp.where((start <= index) & (index < stop), factors, 1)
    return _merged(factors, view)


def _merged(factors: jax.Array, view: View) -> jax.Array:
    """Factors that were placed in the shape of a view, in that of the weight."""
    shape = list(factors.shape)
    for axes in view.merged:
        if any(shape[axis] > 1 for axis in axes):
            for axis in axes:
                shape[axis] = view.shape[axis]
    sizes = [math.prod(shape[axis] for axis in axes) for axes in view.merged]
    return jnp.broadcast_to(factors, shape).reshape(sizes)


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_part(x: Any) -> bool:
    return _is_whole(x) or (isinstance(x, slice) and x.step in (None, 1))


def _as_slice(x: int | slice) -> slice:
    return x if isinstance(x, slice) else slice(x, x + 1 or None)
