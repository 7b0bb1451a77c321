"""Carry the state of an optimizer over to one that has other clips."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ._guards import Clip21State, ErrorFeedbackState, SkipState, UpdateRmsState
from ._state import ClipState, NonfiniteState


def upgrade_state(saved: Any, fresh: Any) -> Any:
    """The state of a checkpoint for an optimizer with other clips; new clips start anew.

    Use it to add a clip to a run that is under way, to remove one, or to change its strategy:
    restore with the state of the old optimizer as the template, then upgrade.

    Args:
      saved: State of the old optimizer, with its classes: a checkpoint that was restored without
        a template is nested dicts, in which the moments of Adam and of Lion look alike.
      fresh: `optimizer.init(params)` of the new optimizer.

    Returns:
      `fresh` with all of `saved` that does not belong to a clip, and with the state of each clip
      that is still at its place and has the same shapes. A place is given by what contains it
      (classes, fields, keys) and by the order, so that a chain may grow, or an optimizer may
      become the last part of a chain. Of two neighboring clips with states of one type, the first
      is the old one. Guards (`skip_nonfinite`, …) may be new or gone, and
      `per_layer` of a clip may change.

    Raises:
      ValueError: When an array of `saved` has no place in `fresh` or another shape or dtype there,
        or nothing of `saved` has one: then more than clips has changed.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> old = optax.sgd(0.1, momentum=0.9)
    >>> _, saved = old.update(params, old.init(params))
    >>> new = optax.chain(gradclip_jax.clip_by_global_norm(1.0), old)
    >>> state = gradclip_jax.upgrade_state(saved, new.init(params))
    >>> print(state[1][0].trace["w"], state[0].step_count)
    [3. 4.] 0
    """
    fresh = _split_guards(fresh)
    old, new = list(_parts(_split_guards(saved), ())), list(_parts(fresh, ()))
    source = _of_optimizer(old, new)
    if not source and any(not _is_clip(part.value) for part in new):
        raise ValueError(
            "`saved` must be the state of the same optimizer with other clips: nothing in it has a "
            f"place in `fresh`. {_TEMPLATE}"
        )
    source |= _of_clips(old, new, source)
    values = [
        _with_layers_of(part.value, old[source[i]].value) if i in source else part.value
        for i, part in enumerate(new)
    ]
    return _join_guards(jax.tree.structure(fresh, is_leaf=_is_clip).unflatten(values))


_TEMPLATE = "Restore it with the `init` of the old optimizer as the template."


class _Part(NamedTuple):
    """An array of the optimizer or the whole state of a clip, and what contains it."""

    place: tuple[str, ...]
    value: Any


class _Guard(NamedTuple):
    """The state of a guard: its own, as that of a clip, and that of what it contains."""

    own: Any
    inner: Any


def _inner_field(state: Any) -> str:
    return "inner_state" if isinstance(state, SkipState | UpdateRmsState) else "clip_state"


def _is_guard(x: Any) -> bool:
    return isinstance(x, SkipState | ErrorFeedbackState | Clip21State | UpdateRmsState)


def _split_guards(tree: Any) -> Any:
    """The tree with a `_Guard` for the state of each guard."""

    def split(x: Any) -> Any:
        if not _is_guard(x):
            return x
        name = _inner_field(x)
        return _Guard(x._replace(**{name: None}), _split_guards(getattr(x, name)))

    return jax.tree.map(split, tree, is_leaf=_is_guard)


def _join_guards(tree: Any) -> Any:
    def join(x: Any) -> Any:
        if not isinstance(x, _Guard):
            return x
        return x.own._replace(**{_inner_field(x.own): _join_guards(x.inner)})

    return jax.tree.map(join, tree, is_leaf=lambda x: isinstance(x, _Guard))


def _is_clip(x: Any) -> bool:
    if isinstance(x, ClipState | NonfiniteState) or _is_guard(x):
        return True
    if not (hasattr(x, "hyperparams") and hasattr(x, "inner_state")):
        return False
    # A clip in `inject_hyperparams` is one with what is injected.
    within = jax.tree.leaves(x.inner_state, is_leaf=_is_clip)
    return bool(within) and all(map(_is_clip, within))


def _parts(node: Any, place: tuple[str, ...]) -> Iterator[_Part]:
    """All parts of a state, in the order of its leaves."""
    children = [] if _is_clip(node) else _children(node)
    if children is None or _is_clip(node):
        yield _Part(place, node)
        return
    for key, child in children:
        # The position in a chain does not identify a clip: it is what a new clip changes.
        nameless = isinstance(key, jax.tree_util.SequenceKey) or isinstance(node, _Guard)
        name = str(getattr(key, "key", getattr(key, "name", key)))
        kind = "" if isinstance(key, jax.tree_util.DictKey) else f"{type(node).__name__}."
        yield from _parts(child, place if nameless else (*place, kind + name))


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """What is right below a node, by key; None for a leaf."""
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(below) == 1 and below[0][0] == ():
        return None
    return [(path[0], child) for path, child in below]


def _of_optimizer(old: list[_Part], new: list[_Part]) -> dict[int, int]:
    """Where each array of the new optimizer that is not of a clip was in the old one."""
    here, there = _by_place(new), _by_place(old)
    source = {}
    for place, positions in there.items():
        name = " ".join(place) or "the state"
        found = here.get(place, [])
        if not found and all(np.ndim(old[i].value) == 0 for i in positions):
            continue  # such as the clock of a schedule that is gone
        if len(found) != len(positions):
            raise ValueError(
                "`fresh` must have all of `saved` but clips: of `" + name + f"` there are "
                f"{len(positions)} arrays in `saved` and {len(found)} in `fresh`. {_TEMPLATE}"
            )
        for i, j in zip(found, positions, strict=True):
            is_here, was = _type(new[i].value), _type(old[j].value)
            if is_here != was:
                raise ValueError(
                    f"`saved` must have the shapes and dtypes of `fresh`: `{name}` is {was} in "
                    f"`saved` and {is_here} in `fresh`."
                )
            source[i] = j
    return source


def _by_place(parts: list[_Part]) -> dict[tuple[str, ...], list[int]]:
    places: dict[tuple[str, ...], list[int]] = {}
    for i, part in enumerate(parts):
        if not _is_clip(part.value):
            places.setdefault(part.place, []).append(i)
    return places


def _of_clips(old: list[_Part], new: list[_Part], source: dict[int, int]) -> dict[int, int]:
    """Where each clip was: between the same arrays of the optimizer, with a state of one type."""
    here = _between(new, set(source))
    there = _between(old, set(source.values()))
    found = {}
    for gap, positions in here.items():
        before = there.get(gap, [])
        types = [_type_of_clip(new[i].value) for i in positions]
        types_before = [_type_of_clip(old[j].value) for j in before]
        for i, j in _common(types, types_before):
            found[positions[i]] = before[j]
    return found


def _between(parts: list[_Part], known: set[int]) -> dict[Any, list[int]]:
    """Positions of clips, by their place and the number of known arrays that stand before them."""
    gaps: dict[Any, list[int]] = {}
    count = 0
    for i, part in enumerate(parts):
        count += i in known
        if _is_clip(part.value):
            gaps.setdefault((part.place, count), []).append(i)
    return gaps


def _common(a: list[Any], b: list[Any]) -> list[tuple[int, int]]:
    """Pairs of positions of a longest common subsequence, the first of those that are equal."""
    best: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            options = [best.get((i + 1, j), []), best.get((i, j + 1), [])]
            if a[i] == b[j]:
                options.insert(0, [(i, j), *best.get((i + 1, j + 1), [])])
            best[i, j] = max(options, key=len)
    return best.get((0, 0), [])


def _type(leaf: Any) -> str:
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{array.dtype}{list(array.shape)}"


def _types(tree: Any) -> tuple[Any, list[str]]:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [_type(leaf) for leaf in leaves]


def _type_of_clip(state: Any) -> tuple[Any, list[str]]:
    """The type of its state, without norms of layers: a run may begin to keep them at any time."""

    def without_layers(x: Any) -> Any:
        return x._replace(layer_norms=()) if _is_state(x) else x

    return _types(jax.tree.map(without_layers, state, is_leaf=_is_state))


def _with_layers_of(fresh: Any, saved: Any) -> Any:
    """What was saved, with the norms of layers that the new clip keeps."""

    def with_layers(saved: Any, fresh: Any) -> Any:
        if not _is_state(saved) or _types(saved.layer_norms) == _types(fresh.layer_norms):
            return saved
        return saved._replace(layer_norms=fresh.layer_norms)

    return jax.tree.map(with_layers, saved, fresh, is_leaf=_is_state)


def _is_state(x: Any) -> bool:
    return isinstance(x, ClipState)
