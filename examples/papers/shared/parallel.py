"""Ways to run one training step over a mesh of devices: jit, shard_map and pmap.

They differ in who says where the devices speak to each other. With `jit` and automatic axes XLA
finds out, with explicit axes the types of the arrays say it, within `shard_map` the program does,
and `pmap` repeats a program of one device. The step in `sharded_transformer.py` is the same for
all.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from examples.papers.shared.transformer import Layout, product

# Where each logical axis lies. The storage of a weight is split along `data` (fully sharded data
# parallelism, FSDP), the work on it along `model` (tensor parallelism).
SHARDED = (
    ("embed", "data"),
    ("heads", "model"),
    ("hidden", "model"),
    ("vocabulary", None),
    ("time", None),
    ("norm", None),
)
REPLICATED = tuple((name, None) for name, _ in SHARDED)


class Style:
    """`jit` with automatic axes, and what the other styles share."""

    name = "jit"
    rules = SHARDED
    axes = AxisType.Auto
    # What the clip is told: None, as shardings and types tell it all.
    axis_name: Any = None
    # The mesh axis along which the program of one device sees a part of the examples alone.
    data_axis: str | None = None

    def __init__(self, mesh: Mesh):
        self.mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(self.axes,) * 2)

    @property
    def layout(self) -> Layout:
        return AutoLayout()

    def specs(self, params: Any) -> Any:
        """The PartitionSpec of every parameter by its logical axes."""
        with nnx.logical_axis_rules(self.rules):
            return nnx.get_partition_spec(params)

    def compiled(self, f: Callable, specs: Any, out: Any, donate: tuple[int, ...] = ()) -> Callable:
        """`f` as one program for all devices, its arguments and results split as the specs say."""
        program = jax.jit(f, out_shardings=self.shardings(out), donate_argnums=donate)

        def run(*args: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return program(*args)

        return run

    def shardings(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def place(self, tree: Any, specs: Any) -> Any:
        """Arrays of the automatic mesh as this style takes them; no number moves."""
        return jax.device_put(tree, self.shardings(specs))

    def plain(self, tree: Any, specs: Any) -> Any:
        """The same arrays on the automatic mesh again, for a checkpoint."""
        mesh = Style(self.mesh).mesh
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    def batch(self, shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> jax.Array:
        """A batch [micro, sequences, time] of which every process reads only its own sequences."""
        sharding = NamedSharding(self.mesh, P(None, "data"))
        return jax.make_array_from_callback(shape, sharding, read)

    def loss(self, loss: jax.Array) -> jax.Array:
        """The mean over all sequences, from that over those which `f` sees."""
        return loss

    def averaged(self, tree: Any) -> Any:
        """Gradients or losses as they are over all sequences."""
        return tree

    def number(self, x: jax.Array) -> float:
        """A scalar result on the host."""
        return float(x)

    def replicas_equal(self, tree: Any) -> bool:
        """Whether the devices of this process that hold the same part of an array agree on it.

        To the last bit, for every array.
        """
        for x in jax.tree.leaves(tree):
            first: dict[str, bytes] = {}
            for shard in x.addressable_shards:
                content = np.asarray(shard.data).tobytes()
                if first.setdefault(self._part(shard), content) != content:
                    return False
        return True

    def _part(self, shard: jax.Shard) -> str:
        return str(shard.index)


class ExplicitStyle(Style):
    """`jit` with explicit axes: the sharding of every array is in its type."""

    name = "explicit"
    axes = AxisType.Explicit

    @property
    def layout(self) -> Layout:
        return ExplicitLayout()


class ShardMapStyle(Style):
    """`shard_map` with checked types: the program of one device, with its collectives."""

    name = "shard_map"
    data_axis = "data"

    @property
    def layout(self) -> Layout:
        return ManualLayout()

    def compiled(self, f: Callable, specs: Any, out: Any, donate: tuple[int, ...] = ()) -> Callable:
        mapped = jax.shard_map(f, mesh=self.mesh, in_specs=specs, out_specs=out)
        return jax.jit(mapped, donate_argnums=donate)

    def loss(self, loss: jax.Array) -> jax.Array:
        # A mean within the objective: then its gradients are averaged where they are taken, those
        # of replicated weights included. The clip would refuse others.
        return jax.lax.pmean(loss, "data")


class PmapStyle(Style):
    """`pmap`: data parallel, every device with all weights, stacked along a leading axis."""

    name = "pmap"
    rules = REPLICATED
    # In `pmap` no type says what is replicated, so the step does: gradients are averaged first.
    axis_name = ()
    data_axis = "data"

    @property
    def layout(self) -> Layout:
        return Layout()

    def compiled(self, f: Callable, specs: Any, out: Any, donate: tuple[int, ...] = ()) -> Callable:
        return jax.pmap(f, axis_name="data", donate_argnums=donate)

    def place(self, tree: Any, specs: Any) -> Any:
        return jax.tree.map(lambda x: self._restacked(x, P("data"), lambda row: row[None]), tree)

    def plain(self, tree: Any, specs: Any) -> Any:
        return jax.tree.map(lambda x: self._restacked(x, P(), lambda row: row[0]), tree)

    def batch(self, shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> jax.Array:
        micro, sequences, time = shape
        count = self.mesh.size
        sharding = NamedSharding(self.mesh, P("data"))

        def of_device(index: Any) -> np.ndarray:
            share = sequences // count
            first = (index[0].start or 0) * share
            return read((slice(None), slice(first, first + share), index[3]))[None]

        return jax.make_array_from_callback(
            (count, micro, sequences // count, time), sharding, of_device
        )

    def averaged(self, tree: Any) -> Any:
        return jax.lax.pmean(tree, "data")

    def number(self, x: jax.Array) -> float:
        return float(x.addressable_shards[0].data[0])

    def _part(self, shard: jax.Shard) -> str:
        return "the row of each device is the same array"

    def _restacked(self, x: jax.Array, spec: P, change: Callable[[jax.Array], jax.Array]):
        rows = [change(shard.data) for shard in x.addressable_shards]
        shape = (self.mesh.size, *x.shape) if spec else x.shape[1:]
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_single_device_arrays(shape, sharding, rows)


class AutoLayout(Layout):
    """For automatic axes: XLA puts in the collectives, and is told what to gather.

    Without being told it may split activations along their features, because the weights are, and
    then gather whole activations instead of weights.
    """

    def whole(self, weight: nnx.Param) -> jax.Array:
        return jax.lax.with_sharding_constraint(weight[...], gathered(weight))

    def looked_up(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(table[tokens], P("data"))

    def summed(self, equation: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(product(equation, x, weight, dtype), P("data"))


class ExplicitLayout(Layout):
    """For explicit axes: the type of every result that the operands leave open is written down."""

    def whole(self, weight: nnx.Param) -> jax.Array:
        return jax.sharding.reshard(weight[...], gathered(weight))

    def looked_up(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        return table.at[tokens].get(out_sharding=P("data"))

    def summed(self, equation: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
        return product(equation, x, weight, dtype, out_sharding=P("data"))


class ManualLayout(Layout):
    """For `shard_map`: each collective is a call, and its transpose is that of the gradient."""

    def whole(self, weight: nnx.Param) -> jax.Array:
        value = weight[...]
        for dimension, axis in enumerate(mesh_axes(weight)):
            if axis == "data":  # back on the way: summed over the devices and scattered
                value = jax.lax.all_gather(value, "data", axis=dimension, tiled=True)
        return value

    def summed(self, equation: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
        return jax.lax.psum(product(equation, x, weight, dtype), "model")


def mesh_axes(weight: nnx.Param) -> list[str | None]:
    rules = dict(SHARDED)
    return [rules[name] if name else None for name in weight.get_metadata("out_sharding")]


def gathered(weight: nnx.Param) -> P:
    """The spec of a weight as it is computed with: split along `model`, whole along `data`."""
    return P(*(None if axis == "data" else axis for axis in mesh_axes(weight)))


STYLES = {style.name: style for style in (Style, ExplicitStyle, ShardMapStyle, PmapStyle)}
