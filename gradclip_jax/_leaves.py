"""What a leaf is, and prefix trees: an entry for each leaf that it covers."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._export import exportable

_FIX = (
    "make them of the tree that the clip is given, with `jax.tree.map`, or pass a function of it; "
    "behind an `nnx.Optimizer` that tree is `nnx.as_pure(nnx.state(model, nnx.Param))`"
)
_STACK = 32  # scalars that one kernel reads


class GroupNorms(dict[Any, Any]):
    """Norms by label, and the label of every leaf, which `broadcast_norms` needs."""

    def __init__(self, norms: Any, *, labels: tuple[Any, ...]):
        """Keep the norms, and the labels of all leaves in the order of the tree."""
        super().__init__(norms)
        self.labels = labels


jax.tree_util.register_pytree_with_keys(
    GroupNorms,
    lambda norms: (
        [(jax.tree_util.DictKey(label), norm) for label, norm in norms.items()],
        (tuple(norms), norms.labels),
    ),
    lambda aux, children: GroupNorms(zip(aux[0], children, strict=True), labels=aux[1]),
)
exportable(GroupNorms)


def broadcast_norms(norms: Any, tree: Any) -> list[Any]:
    """Give every leaf of `tree` the entry of `norms`, a prefix of it, that covers the leaf."""
    if isinstance(norms, GroupNorms):
        return [norms.get(label) for label in norms.labels]
    rule = "`measure` must return norms whose tree is a prefix of the updates"
    return broadcast_prefix(norms, tree, rule, is_leaf=lambda x: x is None)


def leaf_labels(labels: Any, tree: Any) -> tuple[Any, ...]:
    """The label of every leaf of `tree`, from a prefix pytree of labels or a callable."""
    given = labels(tree) if is_function(labels) else labels
    rule = f"`labels` must cover the tree of the updates ({_FIX})"
    of_leaf = tuple(broadcast_prefix(given, tree, rule))
    for label in of_leaf:
        if not isinstance(label, Hashable):
            raise ValueError(f"`labels` must be strings or numbers, got {label!r}: {_FIX}.")
    return of_leaf


def is_function(labels: Any) -> bool:
    """Whether to call labels or balls: a module of them can be called too, but has leaves."""
    structure = jax.tree.structure(labels)
    is_tree = structure.num_leaves and not jax.tree_util.treedef_is_leaf(structure)
    return callable(labels) and (isinstance(labels, functools.partial) or not is_tree)


def is_gradient(leaf: Any) -> bool:
    """Whether a leaf is a real or complex gradient, and not an integer, a key or a float0."""
    dtype = getattr(leaf, "dtype", None)
    return (
        isinstance(leaf, float | complex) if dtype is None else jnp.issubdtype(dtype, jnp.inexact)
    )


def norm_dtype() -> Any:
    """The dtype of norms and limits: float32, or float64 under x64."""
    return jax.dtypes.canonicalize_dtype(float)


def widen(x: jax.Array) -> jax.Array:
    """A leaf in at least the precision of norms, so that float16 squares do not overflow."""
    if jnp.iscomplexobj(x):
        wide = jnp.complex64 if norm_dtype() == jnp.float32 else jnp.complex128
    else:
        wide = norm_dtype()
    return x if jnp.finfo(x.dtype).bits > jnp.finfo(wide).bits else x.astype(wide)


def scalar_stacks(arrays: Sequence[jax.Array]) -> list[list[int]]:
    """Positions of single numbers of one type, some in each stack, which is computed together.

    One kernel that reads 500 norms and limits took XLA 140 s to compile.
    """
    of_type: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        if jnp.size(array) == 1:
            of_type.setdefault(jax.typeof(array), []).append(i)
    return [of[i : i + _STACK] for of in of_type.values() for i in range(0, len(of), _STACK)]


def stacked_scalars(
    arrays: Sequence[jax.Array], like: Sequence[jax.Array] | None = None
) -> list[jax.Array]:
    """Single numbers as short vectors, then the other arrays: for what is computed of all.

    Those that stand where `like` has single numbers of one type share a vector.
    """
    stacks = scalar_stacks(arrays if like is None else like)
    parts = [[arrays[i] for i in positions] for positions in stacks]
    stacked = [jnp.stack(part) if len(part) > 1 else part[0] for part in parts]
    alone = set(range(len(arrays))).difference(*stacks)
    return stacked + [arrays[i] for i in sorted(alone)]


def unstacked_scalars(stacked: Sequence[jax.Array], like: Sequence[jax.Array]) -> list[jax.Array]:
    """What became of each of `like` in its stack of `stacked_scalars(like)`."""
    stacks = scalar_stacks(like)
    others = iter(stacked[len(stacks) :])
    result = [array if jnp.size(array) == 1 else next(others) for array in like]
    for array, positions in zip(stacked, stacks, strict=False):
        for i, entry in zip(positions, array if len(positions) > 1 else [array], strict=True):
            result[i] = entry
    return result


def broadcast_prefix(
    prefix: Any, tree: Any, rule: str, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """For every leaf of `tree` the entry of `prefix`, a prefix of it, that covers the leaf."""
    if any(map(_is_masked, jax.tree.leaves(tree, is_leaf=_is_masked))):
        prefix = _as_masked(prefix, tree, is_leaf)
    entries, treedef = jax.tree.flatten(prefix, is_leaf=is_leaf)
    try:
        subtrees = treedef.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{rule}: {error}") from error
    pairs = zip(entries, subtrees, strict=True)
    return [entry for entry, subtree in pairs for _ in jax.tree.leaves(subtree)]


def path_name(path: Any) -> str:
    """A key path as users write it: `encoder/kernel`."""
    # The array within an `nnx.Variable` is its attribute `value`; the variable has the name.
    while path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _as_masked(prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] | None) -> Any:
    """`prefix` cut off where `optax.masked` cut off `tree`: it may name all leaves."""
    named = jax.tree.leaves_with_path(tree, is_leaf=_is_masked)
    cut = {path for path, node in named if _is_masked(node)}
    return jax.tree.map_with_path(
        lambda path, entry: optax.MaskedNode() if path in cut else entry,
        prefix,
        is_leaf=lambda path, x: path in cut or (is_leaf is not None and is_leaf(x)),
        is_leaf_takes_path=True,
    )
