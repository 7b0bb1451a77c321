"""Where a leaf lives: the mesh axes along which it is split.

What differs between versions of jax about types is in this file and nowhere else.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ._leaves import broadcast_prefix, path_name
from ._memory import in_host_memory
from ._types import AxisName


def type_of(x: Any) -> Any:
    """`jax.typeof(x)`, also of what `jax.eval_shape` returns where not all mesh axes are manual.

    There it leaves out the sharding, and jax (0.10 to 0.12) then asserts that nothing varies.
    """
    if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None and partly_manual():
        unsplit_spec = PartitionSpec(*[None] * len(x.shape))
        mesh = jax.sharding.get_abstract_mesh()
        x = x.update(sharding=NamedSharding(mesh, unsplit_spec))
    return jax.typeof(x)


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes along which the type of `x` says that devices hold different values."""
    return frozenset(type_of(x).manual_axis_type.varying)


def unreduced_axes(x: Any) -> frozenset[str]:
    """Mesh axes along which the type of `x` says that it is a partial sum, manual or not."""
    kind = type_of(x)
    explicit = getattr(getattr(kind.sharding, "spec", None), "unreduced", ())
    return frozenset(explicit) | frozenset(kind.manual_axis_type.unreduced)


def manual_axes() -> tuple[str, ...]:
    """Mesh axes that `shard_map` or `pmap` made manual around the code that runs now."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def partly_manual() -> bool:
    """Whether a `shard_map` left some mesh axes to the compiler (`axis_names`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 0 < len(mesh.manual_axes) < len(mesh.axis_names)


def vma_checked() -> bool:
    """Whether `shard_map` checks types here (`check_vma=True`), so that they can be believed."""
    axes = manual_axes()
    return bool(axes) and bool(varying_axes(jax.lax.axis_index(axes[0])))


def is_unsharded(leaves: Sequence[Any]) -> bool:
    """Whether it is known that each leaf lies in the memory of one device.

    Of what is traced the compiler decides later how it is split, unless there is one device only
    or all axes of the mesh are manual.
    """
    if any(in_host_memory(leaf) for leaf in leaves):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return len(mesh.manual_axes) == len(mesh.axis_names)
    return jax.device_count() == 1 or all(_on_one_device(leaf) for leaf in leaves)


def per_leaf(axis_name: AxisName, tree: Any) -> list[Any]:
    """Give every leaf of `tree` its part of `axis_name`: None, a tuple of names, or a spec."""
    count = len(jax.tree.leaves(tree))
    if axis_name is None:
        return [None] * count
    if _is_names(axis_name):
        return [(axis_name,) if isinstance(axis_name, str) else tuple(axis_name)] * count
    if not all(_is_spec(spec) for spec in jax.tree.leaves(axis_name, is_leaf=_is_spec)):
        raise ValueError(
            "`axis_name` must be a name, names, or a prefix pytree of PartitionSpecs, "
            f"got {axis_name!r}."
        )
    rule = "`axis_name` must be a prefix pytree of the updates"
    specs = broadcast_prefix(axis_name, tree, rule, is_leaf=_is_spec)
    return [PartitionSpec() if spec is None else spec for spec in specs]


def axis_names(axis_name: AxisName) -> Iterator[str]:
    """The mesh axes that a name, names, a PartitionSpec, or a tree of them names."""
    for entry in jax.tree.leaves(axis_name):
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, PartitionSpec):
            yield from axis_names(tuple(entry))


def of_pair(axis_name: AxisName) -> AxisName:
    """The `axis_name` of two trees of one structure that are measured together."""
    return axis_name if axis_name is None or _is_names(axis_name) else (axis_name, axis_name)


def reduced_axes(
    path: str, x: Any, given: Any, dims: tuple[int, ...] | None, checked: bool
) -> tuple[str, ...]:
    """Mesh axes over which a sum over `dims` of the leaf `x` (None: all of it) must go on.

    `given` is what the caller said of this leaf: None (ask its type, if types are `checked`), a
    tuple of names, or a PartitionSpec. Raises ValueError where none of them tells.
    """
    if partial := unreduced_axes(x):
        # `psum` needs a bound mesh axis, and `jit` binds none: there `reshard` makes the sum.
        what, hint = "is a partial sum (unreduced)", "In `jit` call `jax.reshard(grads, specs)`."
        raise ValueError(_not_averaged(path, partial, what, "psum", hint))
    if given is None and not checked and manual_axes():
        raise ValueError(
            "`axis_name` must be given inside `pmap`, or `shard_map` with `check_vma=False`: there "
            "the type of a gradient does not say along which mesh axes it is split. Pass a name or "
            'names (`axis_name="data"`) when every leaf is split along them, the tree of '
            "PartitionSpecs (the `in_specs`) when some leaves are replicated, or `axis_name=()` "
            "when all are (after `jax.lax.pmean`)."
        )
    split = varying_axes(x) if checked else frozenset()
    said = frozenset(axis_names(given))
    for axis in sorted(said):
        _bound_size(axis)
    if isinstance(given, PartitionSpec):
        if unsaid := split - said:
            raise ValueError(
                f"`axis_name` must say along which mesh axes `{path}` is split, got {given} for a "
                f"leaf whose type says that it varies along {sorted(unsaid)} too."
            )
        entries = given if dims is None else [entry for i, entry in enumerate(given) if i in dims]
        axes = frozenset(axis_names(entries))
    else:
        axes = split if given is None else said
    # The caller says where to look; checked types still say what is replicated there.
    axes = axes & split if checked else axes
    of_units = dims is not None and (len(x.shape) > 1 or not dims)
    if axes and of_units and not isinstance(given, PartitionSpec):
        raise ValueError(
            f"`axis_name` must be a tree of PartitionSpecs for norms of units: `{path}` is split "
            f"along mesh axes {sorted(axes)}, and only its spec says which dimension of it is."
        )
    return tuple(sorted(axes))


def whole_shape(x: Any, given: Any) -> tuple[int, ...]:
    """The shape of a leaf over all devices, as far as `given` says how it is split."""
    entries = tuple(given) if isinstance(given, PartitionSpec) else ()
    padded = entries + (None,) * (len(x.shape) - len(entries))
    return tuple(
        size * axis_size(axis_names(entry)) for size, entry in zip(x.shape, padded, strict=True)
    )


def check_averaged(updates: Any, params: Any) -> None:
    """Raise when the types tell that a gradient still differs where its parameter does not.

    Params of another structure (of `optax.lookahead`, say) tell nothing of the gradients.
    """
    if not vma_checked():
        return
    named, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
    try:
        of_updates = treedef.flatten_up_to(params)
    except (ValueError, TypeError, KeyError):
        return
    for (path, update), param in zip(named, of_updates, strict=True):
        if not (hasattr(update, "dtype") and hasattr(param, "dtype")):
            continue
        extra = varying_axes(update) - varying_axes(param)
        if extra:
            what = "varies along it while its parameter does not"
            # Stages of a pipeline hold such parts, and a mean would divide by their number.
            hint = "Parts of one sum, as of pipeline stages, take `psum`."
            raise ValueError(_not_averaged(path_name(path), extra, what, "pmean", hint))


def axis_size(axes: Iterable[str]) -> int:
    """Number of devices along `axes` together."""
    size = 1
    for axis in axes:
        size *= _bound_size(axis)
    return size


def any_device(flags: jax.Array, axis_name: AxisName) -> jax.Array:
    """Elementwise or of boolean `flags` over the devices that may hold different ones."""
    axes = varying_axes(flags) if vma_checked() else frozenset(axis_names(axis_name))
    return sum_over_devices(flags.astype("int32"), axes) > 0 if axes else flags


def split_along(norms: Any, axis_name: AxisName) -> tuple[tuple[str, ...], ...]:
    """Mesh axes along which devices hold different entries of each array of norms."""
    leaves = jax.tree.leaves(norms)
    if vma_checked():
        axes = [varying_axes(leaf) for leaf in leaves]
    else:
        axes = [frozenset(axis_names(given)) for given in per_leaf(axis_name, norms)]
    # A scalar is the norm of all devices already.
    pairs = zip(leaves, axes, strict=True)
    return tuple(tuple(sorted(names)) if leaf.ndim else () for leaf, names in pairs)


def smallest_over_devices(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """The smallest of the numbers of all devices along these axes."""
    names = tuple(sorted(axes))
    return -jax.lax.pmax(-varying_along(x, names), names) if names else x


def sum_over_devices(tree: Any, axes: Iterable[str]) -> Any:
    """The sums of the arrays of all devices along these axes."""
    names = tuple(sorted(axes))
    return jax.lax.psum(tree, names) if names else tree


def replicate_matrices(x: jax.Array) -> jax.Array:
    """`x`, its last two dimensions no longer split by explicit mesh axes.

    jax decomposes no matrix that they split, and multiplies few; under automatic axes the
    compiler gathers such a matrix by itself.
    """
    sharding = jax.typeof(x).sharding
    if len(x.shape) < 2 or not any(axis_names(sharding.spec[-2:])):
        return x
    spec = PartitionSpec(*sharding.spec[:-2], None, None)
    return jax.sharding.reshard(x, sharding.update(spec=spec))


def reshard_like(x: jax.Array, origin: jax.Array) -> jax.Array:
    """What came of the whole matrices of `origin`, split by explicit mesh axes as that is."""
    sharding = jax.typeof(origin).sharding
    return x if jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def filled_like(number: float, kind: jax.ShapeDtypeStruct) -> jax.Array:
    """A new array full of one number, with the shape, dtype, axes and split of `kind`."""
    return varying_like(jax.numpy.full(kind.shape, number, kind.dtype), kind)


def varying_along(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, with a type that varies along these axes: then its gradient is not summed there."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_like(x: jax.Array, other: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """`x`, with a type that varies along the axes along which that of `other` does.

    With explicit axes the type also says how dimensions are split, and then `x` is split so too.
    """
    x = varying_along(x, varying_axes(other))
    here, there = type_of(x).sharding.spec, type_of(other).sharding.spec
    # Without a mesh that is set there are no devices over which a new array could be split.
    if here == there or len(here) != len(there) or jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, there)


def _on_one_device(x: Any) -> bool:
    if isinstance(x, Tracer):
        return False
    return not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1


def _is_names(axis_name: AxisName) -> bool:
    return isinstance(axis_name, str) or (
        isinstance(axis_name, tuple | list) and all(isinstance(name, str) for name in axis_name)
    )


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)


def _bound_size(axis: str) -> int:
    try:
        return jax.lax.axis_size(axis)
    except NameError as error:
        raise ValueError(
            f"`axis_name` must name axes that `shard_map`, `pmap` or `vmap` bound here, "
            f"got {axis!r}. Under `jit` with shardings leave it out: the norm is global already."
        ) from error


def _not_averaged(path: str, axes: Iterable[str], what: str, collective: str, hint: str) -> str:
    names = sorted(axes)
    axis = repr(names[0]) if len(names) == 1 else repr(tuple(names))
    return (
        f"the gradient of `{path}` is not averaged along mesh axis {axis}: it {what}, so its norm "
        f"would be that of one share. Call `jax.lax.{collective}(grads, {axis})` before the clip. "
        f"{hint}"
    )
