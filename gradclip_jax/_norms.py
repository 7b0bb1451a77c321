"""Reduce a pytree to norms: the only reduction and the only collective of the library.

Every measure returns norms whose tree is a prefix of the tree it measured, so the code above
never asks at which granularity it works.
"""

import ast
import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from ._devices import (
    AxisName,
    axis_size,
    beside,
    changed_in_place,
    of_leaves,
    partly_manual,
    path_name,
    per_leaf,
    reduced_axes,
    reduced_in_place,
    types_tell,
    unsplit,
    varying_axes,
    whole_shape,
)

Axes = int | tuple[int, ...] | Callable[[str, Any], int | tuple[int, ...] | None] | None
"""Axes that one unit spans: see `unit_norms`."""


_FIX = (
    "make them of the tree that the clip is given, with `jax.tree.map`, or pass a function of it; "
    "behind an `nnx.Optimizer` that tree is `nnx.as_pure(nnx.state(model, nnx.Param))`"
)
_SMALL = 2**14  # elements of a leaf
_TOGETHER = 16  # small leaves of one shape that one kernel reads
_ROW = 32  # scalars that one kernel reads


def global_norm(tree: Any, *, order: float = 2, axis_name: AxisName = None) -> jax.Array:
    r"""Norm of all leaves together, as if they were one long vector.

    $$ \lVert g \rVert_p = \Big( \sum_{\ell} \sum_i |g_{\ell i}|^p \Big)^{1/p} $$

    Args:
      tree: Pytree of arrays of any shape and of any float or complex dtype. Other leaves
        (integers, booleans, PRNG keys, float0) and None are not counted.
      order: Order p of the norm, at least 1; `inf` for the largest modulus.
      axis_name: Needed only inside `pmap`, or `shard_map` with `check_vma=False`: a mesh axis or
        axes along which every leaf is split, or a prefix pytree of PartitionSpecs.

    Returns:
      A scalar in float32 (float64 under x64). Finite as long as the norm itself is below the
      largest float32, also where squares overflow; not zero as long as any element is normal.

    Raises:
      ValueError: For an order below 1, an axis that is not bound, or a missing `axis_name`.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import global_norm
    >>> float(global_norm({"w": jnp.array([3.0]), "b": jnp.array([4e30])}) / 4e30)
    1.0
    """
    measured = _flatten(tree, axis_name)
    everything = tuple(range(len(measured.leaves)))
    (norm,) = _measure(measured, dims=None, groups=(everything,), order=order)
    return norm


def leaf_norms(tree: Any, *, order: float = 2, axis_name: AxisName = None) -> Any:
    """Norm of each array: the tree with a scalar for each leaf.

    Takes the arguments of `global_norm`. Leaves that are not counted have None for a norm.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import leaf_norms
    >>> norms = leaf_norms({"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)})
    >>> float(norms["w"]), float(norms["b"])
    (5.0, 0.0)
    """
    measured = _flatten(tree, axis_name)
    each = tuple((i,) for i in range(len(measured.leaves)))
    return measured.unflatten(_measure(measured, dims=None, groups=each, order=order))


def unit_norms(
    tree: Any, *, axes: Axes = None, order: float = 2, axis_name: AxisName = None
) -> Any:
    """Norm of each unit: of the weights that lead into one output, say.

    Args:
      tree: As in `global_norm`.
      axes: The axes that one unit spans. By default all axes but the last (the inputs of a
        `Dense` kernel of shape (inputs, outputs)), and a vector or scalar is one unit. Or an int,
        or a tuple of ints (an axis that a leaf does not have is left out, so `(0, 1)` serves
        kernels and biases), or a callable of path (`"encoder/kernel"`) and leaf (its shape over
        all devices, and its dtype) that returns either, or None for the default. For layers
        stacked by `scan` over axis 0, `axes=1` keeps the layers apart.
      order: As in `global_norm`.
      axis_name: As in `global_norm`; leaves that are split inside `shard_map` need the
        PartitionSpecs, because only they say which dimension is split.

    Returns:
      The tree with, for each leaf, its norms in an array of the same rank: the axes that a unit
      spans have size one.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import unit_norms
    >>> print(unit_norms(jnp.array([[3.0, 0.0], [4.0, 1.0]])))
    [[5. 1.]]
    """
    measured = _flatten(tree, axis_name)
    dims = tuple(
        _unit_dims(axes, path, jax.ShapeDtypeStruct(whole_shape(leaf, given), leaf.dtype))
        for path, leaf, given in zip(measured.paths, measured.leaves, measured.given, strict=True)
    )
    each = tuple((i,) for i in range(len(measured.leaves)))
    return measured.unflatten(_measure(measured, dims=dims, groups=each, order=order))


def group_norms(
    tree: Any, *, labels: Any, order: float = 2, axis_name: AxisName = None
) -> "GroupNorms":
    """Norm of each group of leaves that share a label.

    Args:
      tree: As in `global_norm`.
      labels: A prefix pytree of labels (strings or numbers), or a callable that makes one from
        the tree, as in `optax.partition`. A module of labels is taken for a pytree, though it can
        be called. For parameters of flax NNX map over `nnx.as_pure(nnx.state(model, nnx.Param))`.
      order: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A dict with one scalar for each label.

    Raises:
      ValueError: When the labels do not cover the tree.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax import group_norms
    >>> grads = {"a": jnp.array(3.0), "b": jnp.array(4.0), "c": jnp.array(1.0)}
    >>> norms = group_norms(grads, labels={"a": "body", "b": "body", "c": "head"})
    >>> float(norms["body"]), float(norms["head"])
    (5.0, 1.0)
    """
    measured = _flatten(tree, axis_name)
    of_leaf = leaf_labels(labels, tree)
    pairs = zip(of_leaf, measured.positions, strict=True)
    counted = [label for label, position in pairs if position is not None]
    names = sorted(set(counted), key=str)
    groups = tuple(tuple(i for i, label in enumerate(counted) if label == name) for name in names)
    norms = _measure(measured, dims=None, groups=groups, order=order)
    return GroupNorms(zip(names, norms, strict=True), labels=of_leaf)


def leaf_sizes(tree: Any, *, axis_name: AxisName = None) -> Any:
    """Number of elements of each leaf that `leaf_norms` counts, over all devices that hold it."""
    measured = _flatten(tree, axis_name)
    checked = types_tell()
    return measured.unflatten(
        [
            leaf.size * axis_size(reduced_axes(path, leaf, given, None, checked))
            for path, leaf, given in zip(
                measured.paths, measured.leaves, measured.given, strict=True
            )
        ]
    )


class GroupNorms(dict):
    """Norms by label, with the label of every leaf: what `spread` needs to give them back."""

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
with contextlib.suppress(ValueError):  # of a module that is loaded again
    jax.export.register_pytree_node_serialization(
        GroupNorms,
        serialized_name="gradclip_jax.GroupNorms",
        serialize_auxdata=lambda aux: repr(aux).encode(),
        deserialize_auxdata=lambda text: ast.literal_eval(text.decode()),
    )


def spread(norms: Any, tree: Any) -> list[Any]:
    """Give every leaf of `tree` the entry of `norms`, a prefix of it, that covers the leaf."""
    if isinstance(norms, GroupNorms):
        return [norms.get(label) for label in norms.labels]
    rule = "`measure` must return norms whose tree is a prefix of the updates"
    return of_leaves(norms, tree, rule, is_leaf=lambda x: x is None)


def leaf_labels(labels: Any, tree: Any) -> tuple[Any, ...]:
    """The label of every leaf of `tree`, from a prefix pytree of labels or a callable."""
    given = labels(tree) if is_function(labels) else labels
    of_leaf = tuple(of_leaves(given, tree, f"`labels` must cover the tree of the updates ({_FIX})"))
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


class _Measured(NamedTuple):
    """The leaves of a tree that count, what is known of each, and the way back."""

    leaves: list[jax.Array]
    paths: list[str]
    given: list[Any]
    positions: list[int | None]
    treedef: Any

    def unflatten(self, norms: Sequence[Any]) -> Any:
        return self.treedef.unflatten([None if i is None else norms[i] for i in self.positions])


def _flatten(tree: Any, axis_name: AxisName) -> _Measured:
    named, treedef = jax.tree_util.tree_flatten_with_path(tree)
    measured = _Measured([], [], [], [], treedef)
    for (path, leaf), given in zip(named, per_leaf(axis_name, tree), strict=True):
        counts = is_gradient(leaf)
        measured.positions.append(len(measured.leaves) if counts else None)
        if counts:
            measured.leaves.append(leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf))
            measured.paths.append(path_name(path))
            measured.given.append(given)
    return measured


def _unit_dims(axes: Axes, path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    rank = leaf.ndim
    strict = callable(axes)
    if callable(axes):
        axes = axes(path, leaf)
    if axes is None:
        return tuple(range(rank - 1)) if rank > 1 else tuple(range(rank))
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in given):
        raise ValueError(f"`axes` must be an int or a tuple of ints, got {axes!r}.")
    kept = [axis for axis in given if -rank <= axis < rank]
    if strict and len(kept) < len(given):
        raise ValueError(f"`axes` must be axes of `{path}`, which has {rank}, got {axes!r}.")
    return tuple(sorted({axis % rank for axis in kept}))


def check_order(order: Any) -> float:
    """Return `order` when it is a Python number of at least 1, the order of a norm."""
    if isinstance(order, bool) or not isinstance(order, int | float) or not order >= 1:
        raise ValueError(
            "`order` must be a Python number of at least 1 (`inf` for the largest modulus), "
            f"got {order!r}."
        )
    return float(order)


def _measure(
    measured: _Measured,
    *,
    dims: tuple[tuple[int, ...], ...] | None,
    groups: tuple[tuple[int, ...], ...],
    order: float,
) -> list[jax.Array]:
    """Norms of groups of leaves; with `dims`, of each leaf over these axes, which are kept."""
    order = check_order(order)
    all_dims = (None,) * len(measured.leaves) if dims is None else dims
    checked = types_tell()
    along = tuple(
        _Along(reduced_axes(path, leaf, given, over, checked), tuple(sorted(varying_axes(leaf))))
        for path, leaf, given, over in zip(
            measured.paths, measured.leaves, measured.given, all_dims, strict=True
        )
    )
    return _norms_of_groups(
        measured.leaves,
        dims=all_dims,
        along=along,
        groups=groups,
        order=order,
        together=dims is None and unsplit(measured.leaves),
    )


class _Cell(NamedTuple):
    """The leaves of one group that are split alike and reduced over the same mesh axes."""

    group: int
    along: "_Along"
    members: tuple[int, ...]


class _Along(NamedTuple):
    """Mesh axes to reduce over, and all along which the type says that a leaf varies."""

    axes: tuple[str, ...]
    varying: tuple[str, ...]


# Called eagerly this is one cached program for each tree structure; inside a trace it inlines.
@functools.partial(
    jax.jit, static_argnames=("dims", "along", "groups", "order", "together"), inline=True
)
def _norms_of_groups(leaves, **options):
    measure = functools.partial(_norms_of_cells, **options)
    # In such a rule jax (0.10 to 0.12) cannot transpose a branch that `vmap` has mapped, nor 0.12 a
    # barrier of which some operands are constant.
    return _with_finite_derivative(measure, functools.partial(measure, branch=False), leaves)


def _with_finite_derivative(measure, differentiable, leaves):
    """`measure(leaves)`, with the derivative of `differentiable` without what is not finite.

    An update that is zeroed for a NaN passes a zero back to its norm, and zero times the NaN in
    the derivative of a square would be NaN. Only a program that differentiates computes more.
    """

    def finite_part(x):
        return jnp.where(jnp.isfinite(x), x, beside(0, x))

    def derivative(primals, tangents):
        (leaves,), (moved,) = primals, tangents
        finite = [changed_in_place(finite_part, x) for x in leaves]
        return measure(leaves), jax.jvp(differentiable, (finite,), (moved,))[1]

    measured = jax.custom_jvp(measure)
    measured.defjvp(derivative)
    return measured(leaves)


def _norms_of_cells(leaves, *, dims, along, groups, order, together, branch=True):
    cells = [
        _Cell(group, split, tuple(i for i in members if along[i] == split))
        for group, members in enumerate(groups)
        for split in sorted({along[i] for i in members}) or [_Along((), ())]
    ]
    over_leaves = functools.partial(_over_leaves, leaves, dims, barrier=branch)
    over_devices = functools.partial(_over_devices, cells, len(groups))
    if order == 1:
        moduli = functools.partial(over_leaves, _sum_of_moduli)
        return over_devices(moduli, jax.lax.psum, jnp.add)
    if order == 2:
        squares = functools.partial(over_leaves, _sum_of_squares, together=together)
        sizes = [leaf.size for leaf in leaves]
        if len(cells) == len(groups) and not any(cell.along.axes for cell in cells):
            return [_root(*of_cell) for of_cell in _exact_sums(squares, cells, sizes, branch)]
        binned = functools.partial(_bins, squares, sizes=sizes, branch=branch)
        bins = over_devices(binned, jax.lax.psum, jnp.add)
        return [_root_of_bins(of_group) for of_group in bins]
    largest = functools.partial(over_leaves, _largest_modulus, join=jnp.maximum)
    norms = over_devices(largest, jax.lax.pmax, jnp.maximum)
    if order == math.inf:
        return norms
    scales = [inverse_power_of_two(jax.lax.stop_gradient(norm)) for norm in norms]
    powers = functools.partial(over_leaves, functools.partial(_sum_of_powers, order=order))
    sums = over_devices(
        lambda here: powers(here, numbers=[scales[cell.group] for cell in here]),
        jax.lax.psum,
        jnp.add,
    )
    roots = [safe_power(total, 1 / order) for total in sums]
    # Not `root / first / second`: XLA makes that `root / (first * second)`, which overflows.
    return [
        root * (1 / first) * (1 / second)
        for root, (first, second) in zip(roots, scales, strict=True)
    ]


def _over_leaves(
    leaves, dims, of_leaf, cells, *, numbers=None, join=jnp.add, together=False, barrier=True
):
    """One array for each cell: reduced over the elements of a leaf, then over its leaves."""
    keep = apart if barrier else lambda x: x
    reduced = []
    for position, cell in enumerate(cells):
        number = () if numbers is None else numbers[position]
        parts = []
        for first, *others in _alike(leaves, cell.members, together):
            of_these = functools.partial(of_leaf, dims=dims[first])
            if others:
                alike = [leaves[first], *(leaves[i] for i in others)]
                parts.append(of_these(*keep((alike, *number))))
            else:
                parts.append(reduced_in_place(of_these, *keep((leaves[first], *number))))
        # Else XLA adds arrays of one shape and keeps their sum, to reduce that.
        parts = keep(parts) if len(parts) > 1 else parts
        reduced.append(functools.reduce(join, parts) if parts else jnp.zeros((), norm_dtype()))
    return reduced


def _alike(leaves: Sequence[jax.Array], members: Sequence[int], together: bool) -> list[list[int]]:
    """Parts of `members` that one kernel reduces: single ones, or small leaves of one type."""
    parts: list[list[int]] = []
    last: dict[Any, list[int]] = {}
    for i in members:
        kind = jax.typeof(leaves[i])
        known = last.get(kind)
        if known is None or len(known) == _TOGETHER or kind.size > _SMALL or not together:
            known = last[kind] = []
            parts.append(known)
        known.append(i)
    return parts


def in_rows(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Scalars as short vectors, then the other arrays: for what is computed of all of them.

    One kernel that reads 500 norms and limits took XLA 140 s to compile.
    """
    scalars = [array for array in arrays if not array.ndim]
    rows = [scalars[i : i + _ROW] for i in range(0, len(scalars), _ROW)]
    stacked = [jnp.stack(row) if len(row) > 1 else row[0] for row in rows]
    return stacked + [array for array in arrays if array.ndim]


def apart(x):
    """`x`, but what is computed of it is shared with nothing else that is computed of the same.

    The squares of gradients are in the optimizer, too: XLA would keep them for it, or a float32
    copy of bfloat16, or a factor broadcast to the shape of several leaves.
    """
    return jax.lax.optimization_barrier(x)


def _over_devices(cells, group_count, of_cells, collective, join):
    """One array for each group, by one collective for each distinct set of mesh axes."""
    joined: list[Any] = [None] * group_count
    for along in dict.fromkeys(cell.along for cell in cells):
        here = [cell for cell in cells if cell.along == along]
        totals = of_cells(here)
        if along.axes:
            totals = _at_once(functools.partial(collective, axis_name=along.axes), totals)
        for cell, total in zip(here, totals, strict=True):
            known = joined[cell.group]
            joined[cell.group] = total if known is None else join(known, total)
    return joined


def _at_once(collective, arrays):
    """Apply a collective to all arrays as one vector: given a tree it would make one of each."""
    if partly_manual():
        # Norms of units may be split along the other axes: as one vector they would be gathered.
        return [collective(array) for array in arrays]
    flat = jnp.concatenate([array.ravel() for array in arrays])
    ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
    parts = jnp.split(collective(flat), ends)
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _exact_sums(squares, cells, sizes, branch):
    """Sums of squares of each cell, and the power of two by which it scaled its elements.

    The plain sum serves as long as it is in the safe range, where no square that matters can have
    overflowed or underflowed. Outside, the sum is taken again of elements scaled by a fixed power
    of two.
    """
    safe = _SafeRange(norm_dtype())
    plain = squares(cells)
    counts = [sum(sizes[i] for i in cell.members) for cell in cells]
    # Kept apart, not stacked as a vector: XLA would compute the vector anew for each leaf that
    # reads its entry of it (200 leaves of 64 x 64 took 21 s to compile instead of 8).
    scales = [safe.scale(s, count) for s, count in zip(plain, counts, strict=True)]
    odd = [jnp.any(row != 1) for row in in_rows(scales)]
    unsafe = functools.reduce(jnp.logical_or, odd, jnp.zeros((), bool))
    scaled = functools.partial(squares, cells, numbers=[(scale,) for scale in scales])
    exact = jax.lax.cond(unsafe, scaled, lambda: plain) if branch else scaled()
    return list(zip(exact, scales, strict=True))


def _bins(squares, cells, sizes, branch):
    """The sums of `_exact_sums`, each in the bin of its scale among three (a new first axis).

    Each device chooses its scale alone and the bins of all of them are added: that takes one
    collective, and none for agreeing on a scale.
    """
    return [
        jnp.stack([jnp.where(chosen, s, 0) for chosen in (scale > 1, scale == 1, scale < 1)])
        for s, scale in _exact_sums(squares, cells, sizes, branch)
    ]


def _root(total: jax.Array, scale: jax.Array) -> jax.Array:
    """The norm from a sum of `_exact_sums`."""
    safe = _SafeRange(total.dtype)
    # Not a quotient: XLA makes `a / (root / scale)` of it `a * scale / root`, which overflows.
    return safe_power(total, 0.5) * jnp.where(
        scale < 1, safe.up, jnp.where(scale > 1, safe.down, 1.0)
    ).astype(total.dtype)


def norms_of_examples(x: jax.Array) -> jax.Array:
    """The norm of each `x[i]`, [examples].

    Summed twice: first plainly, then at the scale that the plain sum asks for. A `cond` around the
    second pass would make devices that hold examples agree on it, and would hold a copy.
    """

    def norms(leaves):
        (x,) = leaves
        squares = functools.partial(_sum_of_squares, dims=tuple(range(1, x.ndim)))
        plain = squares(x)
        scale = _SafeRange(plain.dtype).scale(plain, math.prod(x.shape[1:]))
        return _root(squares(x, scale), scale).ravel()

    return _with_finite_derivative(norms, norms, [x])


def _root_of_bins(bins: jax.Array) -> jax.Array:
    """Norms from the sums of `_bins`: the bin of the largest scale, and what its neighbour adds."""
    safe = _SafeRange(bins.dtype)
    small, plain, large = (safe_power(bins[i], 0.5) for i in range(3))
    return jnp.where(
        large != 0,
        _joint(large, plain * safe.down) * safe.up,
        jnp.where(plain != 0, _joint(plain, small * safe.down), small * safe.down),
    )


class _SafeRange:
    """Where a plain sum of squares can be believed, and the powers of two that serve outside.

    In float32 the scales are 2^80 and 2^-80: they take any element whose square is lost to where
    it is not. A power of two rounds nothing; and it is fixed, because XLA turns `x / scale` into
    `x * (1 / scale)`, which flushes to zero for scales above 8.5e37.
    """

    def __init__(self, dtype: Any):
        info = jnp.finfo(dtype)
        self.up = 2.0 ** (info.maxexp * 5 // 8)
        self.down = 1 / self.up
        # Room for the sums of 2^28 devices and leaves to be added.
        self.most = 2.0 ** (info.maxexp * 25 // 32)
        # Each of n squares may lose up to `tiny`; the sum must not notice.
        self.least = float(info.tiny) / float(info.eps)

    def scale(self, plain: jax.Array, count: Any) -> jax.Array:
        """1, or the power of two by which elements with that plain sum must be scaled."""
        low = plain < jnp.asarray(count * self.least, plain.dtype)
        scale = jnp.where(plain > self.most, self.down, jnp.where(low, self.up, 1.0))
        return scale.astype(plain.dtype)


def _sum_of_squares(x, scale=None, *, dims):
    arrays = x if isinstance(x, list) else [x]
    parts = [part for a in arrays for part in ([a.real, a.imag] if jnp.iscomplexobj(a) else [a])]
    wide = [widen(part) if scale is None else widen(part) * scale for part in parts]
    return _sum(functools.reduce(jnp.add, [part * part for part in wide]), dims)


def _sum_of_moduli(x, *, dims):
    return _sum(jnp.abs(widen(x)), dims)


def _sum_of_powers(x, first, second, *, order, dims):
    scaled = jnp.abs(widen(x)) * first * second
    return _sum(scaled ** (int(order) if order == int(order) else order), dims)


def _largest_modulus(x, *, dims):
    largest = jnp.max(jnp.abs(widen(x)), axis=dims, keepdims=dims is not None, initial=0)
    # On CPU a maximum loses NaN: over devices, and (jaxlib 0.10 to 0.12) over 1,000 elements too.
    return jnp.where(all_finite(x, dims=dims), largest, beside(jnp.inf, largest))


def all_finite(x: jax.Array, *, dims: tuple[int, ...] | None = None) -> jax.Array:
    """Whether all elements are finite: x - x is NaN where x is not, and no sum loses a NaN.

    A reduction of `isfinite(x)` would keep an array of booleans, and a select on each element
    before a maximum, or a product with 0, a whole copy.
    """
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    zeros = [widen(part) - widen(part) for part in parts]
    return _sum(functools.reduce(jnp.add, zeros), dims) == 0


def _sum(x, dims):
    return jnp.sum(x, axis=dims, keepdims=dims is not None)


def inverse_power_of_two(norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two powers of two whose product is near 1 / norm; both and their inverses are normal."""
    usable = jnp.isfinite(norm) & (norm != 0)
    exponent = jnp.frexp(jnp.where(usable, norm, 1))[1]
    half = exponent // 2
    one = jnp.ones_like(norm)
    return jnp.ldexp(one, -half), jnp.ldexp(one, half - exponent)


def safe_power(x: jax.Array, exponent: float) -> jax.Array:
    """`x ** exponent` for x >= 0, with derivative 0 at 0; NaN stays NaN (`x > 0` would hide it)."""
    inside = jnp.where(x != 0, x, 1)
    power = jnp.sqrt(inside) if exponent == 0.5 else inside**exponent
    return jnp.where(x != 0, power, 0)


def _joint(most: jax.Array, least: jax.Array) -> jax.Array:
    """The norm of two norms without the overflow of their squares; 0 if `most` is."""
    # Not computed from a zero: the derivative of the ratio would be 0 / 0.
    nonzero = most != 0
    most, least = jnp.where(nonzero, most, 1), jnp.where(nonzero, least, 0)
    most, least = jnp.maximum(most, least), jnp.minimum(most, least)
    ratio = least / most
    return jnp.where(nonzero, most * jnp.sqrt(1 + ratio * ratio), 0)
