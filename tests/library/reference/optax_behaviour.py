"""Run the claims that are made about optax, and write down what it does: ``optax_behaviour.json``.

Run by hand in the development environment (``make reference`` says how), on eight CPU devices. The
file is ``{"versions": {package: version}, "checks": [check, …]}``, and a check is

* ``name``, ``requirement``, ``claim``: what is tried, as the docstring of its function says;
* ``right``: what a right clip gives;
* ``optax``: what optax gives, a value or ``"TypeError: the first line of the message"``.
"""

import inspect
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Check(NamedTuple):
    """A claim, what is right, and the function that finds out what optax does."""

    requirement: str
    right: Any
    run: Callable[[], Any]


CHECKS: list[Check] = []


def check(requirement: str, right: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a check."""

    def register(run: Callable[[], Any]) -> Callable[[], Any]:
        CHECKS.append(Check(requirement, right, run))
        return run

    return register


def attempt(run: Callable[[], Any]) -> Any:
    """Run a function and give its result, or its exception in one line."""
    try:
        return jax.block_until_ready(run())
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first}".removesuffix(": ")


def update(clip: optax.GradientTransformation, updates: Any, params: Any = None) -> Any:
    """Clip once, from a new state."""
    return clip.update(updates, clip.init(updates if params is None else params), params)[0]


def f32(*numbers: float) -> jax.Array:
    """Make a float32 vector."""
    return jnp.array(numbers, jnp.float32)


def bf16(*numbers: float) -> jax.Array:
    """Make a bfloat16 vector."""
    return jnp.array(numbers, jnp.bfloat16)


def norm(tree: Any) -> float:
    """Measure a tree in float64 on the host."""
    return math.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


def mesh() -> jax.sharding.Mesh:
    """Make a mesh of eight devices along the axis "d"."""
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


CLIP = optax.clip_by_global_norm(1.0)

# Device i of eight holds four elements of i + 1: local norms 2, 4, …, 16 and a true norm of 28.57.
SHARDED = np.repeat(np.arange(1, 9, dtype=np.float32), 4)


# --- R1: the true global norm on many devices ---


def in_shard_map() -> jax.Array:
    """Clip the sharded gradient to 1 inside shard_map."""

    def body(w: jax.Array) -> jax.Array:
        return update(CLIP, {"w": w})["w"]

    return jax.shard_map(body, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))(jnp.asarray(SHARDED))


@check("R1", 1.0)
def shard_map_norm() -> Any:
    """The norm of a gradient sharded over 8 devices, after clip_by_global_norm(1) in shard_map."""
    return norm(in_shard_map())


@check("R1", 1.0)
def shard_map_direction() -> Any:
    """The cosine between that gradient before and after the clip."""
    clipped = np.asarray(in_shard_map())
    return float(clipped @ SHARDED / norm(clipped) / norm(SHARDED))


def beside_replicated(check_vma: bool) -> Any:
    """Clip a sharded leaf and a replicated leaf together; give the bias of every device."""

    def body(w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        clipped = update(CLIP, {"w": w, "b": b})
        return clipped["w"], clipped["b"]

    sharded = jax.shard_map(
        body, mesh=mesh(), in_specs=(P("d"), P()), out_specs=(P("d"), P()), check_vma=check_vma
    )
    _, b = sharded(jnp.asarray(SHARDED), f32(1))
    return [float(shard.data[0]) for shard in b.addressable_shards]


@check("R1", "eight times the same number")
def shard_map_replicated_checked() -> Any:
    """The update of a replicated leaf beside a sharded one, per device, with check_vma=True."""
    return beside_replicated(check_vma=True)


@check("R1", "eight times the same number")
def shard_map_replicated_unchecked() -> Any:
    """The update of a replicated leaf beside a sharded one, per device, with check_vma=False."""
    return beside_replicated(check_vma=False)


def in_pmap(body: Callable[[jax.Array], jax.Array]) -> float:
    """Run on eight devices with the gradients 3, -1, 3, -1, … whose mean is 1."""
    return float(jax.pmap(body, axis_name="d")(f32(*[3, -1] * 4))[0])


@check("R1", 0.5)
def pmap_mean_then_clip() -> Any:
    """The gradients 3, -1, 3, -1, … on 8 devices in pmap: pmean, then a clip to 0.5."""
    return in_pmap(lambda g: update(optax.clip_by_global_norm(0.5), lax.pmean(g, "d")))


@check("R1", "0.5, or an error")
def pmap_clip_then_mean() -> Any:
    """The same in the wrong order, a clip to 0.5 and then pmean."""
    return in_pmap(lambda g: lax.pmean(update(optax.clip_by_global_norm(0.5), g), "d"))


@check("R1", 1.0)
def jit_sharded_norm() -> Any:
    """The norm of the sharded gradient after the clip under jit with a NamedSharding."""
    g = jax.device_put(SHARDED, NamedSharding(mesh(), P("d")))
    return norm(jax.jit(lambda g: update(CLIP, g))(g))


# --- R2: the norm in at least float32, safe from overflow and underflow ---


@check("R2", 1.0)
def float16_overflow() -> Any:
    """The norm of float16 [300] clipped to 1."""
    return norm(update(CLIP, jnp.array([300.0], jnp.float16)))


@check("R2", 1.0)
def float32_overflow() -> Any:
    """The norm of a hundred float32 1e20 clipped to 1."""
    return norm(update(CLIP, jnp.full(100, 1e20, jnp.float32)))


@check("R2", 1e-24)
def float32_underflow() -> Any:
    """The norm of four float32 1e-23 clipped to 1e-24."""
    return norm(update(optax.clip_by_global_norm(1e-24), jnp.full(4, 1e-23, jnp.float32)))


@check("R2", [17.3205, 24.4949, 34.641])
def bfloat16_leaves_measured() -> Any:
    """The norm of 300, 600 and 1200 bfloat16 leaves of norm 1, by optax.tree.norm."""
    return [float(optax.tree.norm([bf16(1)] * leaves)) for leaves in (300, 600, 1200)]


@check("R2", 1.0)
def bfloat16_leaves_clipped() -> Any:
    """The norm of 1200 bfloat16 leaves of norm 1 clipped to 1."""
    return norm(update(CLIP, [bf16(1)] * 1200))


@check("R2", 0.4)
def float16_beside_float32() -> Any:
    """The float16 leaf [2, 4] beside a float32 leaf of norm 1e5, clipped to 1e4: its 4."""
    updates = {"a": jnp.full(4, 5e4, jnp.float32), "b": jnp.array([2.0, 4.0], jnp.float16)}
    return float(update(optax.clip_by_global_norm(1e4), updates)["b"][1])


@check("R2", 480.0)
def float8_measured() -> Any:
    """The norm of float8_e4m3fn [288, 384] by optax.tree.norm."""
    return float(optax.tree.norm(jnp.array([288.0, 384.0], jnp.float8_e4m3fn)))


@check("R2", 141.421)
def int8_measured() -> Any:
    """The norm of int8 [100, 100] by optax.tree.norm."""
    return float(optax.tree.norm(jnp.array([100, 100], jnp.int8)))


# --- R3: non-finite gradients do not spread ---


@check("R3", "b stays finite")
def nan_spreads() -> Any:
    """The leaf b = [1, 1] beside a = [nan, 1], clipped to 1."""
    return update(CLIP, {"a": f32(math.nan, 1), "b": f32(1, 1)})["b"]


@check("R3", "b stays finite, and no leaf is NaN")
def inf_spreads() -> Any:
    """The leaves a = [inf, 1] and b = [1, 1], clipped to 1."""
    return update(CLIP, {"a": f32(math.inf, 1), "b": f32(1, 1)})


@check("R3", [0.0, 0.0, 0.0])
def zero_limit_of_zeros() -> Any:
    """The gradient [0, 0, 0] clipped to 0."""
    return update(optax.clip_by_global_norm(0.0), f32(0, 0, 0))


@check("R3", [1e30, 1.0])
def infinite_limit() -> Any:
    """The gradient [1e30, 1] clipped to inf."""
    return update(optax.clip_by_global_norm(math.inf), f32(1e30, 1))


@check("R3", "finite")
def zero_nans_then_clip() -> Any:
    """The gradient [inf, 1] after chain(zero_nans(), clip_by_global_norm(1))."""
    return update(optax.chain(optax.zero_nans(), CLIP), f32(math.inf, 1))


@check("R3", False)
def inf_poisons_adam() -> Any:
    """Whether Adam behind the clip has NaN moments 20 good steps after one infinite gradient."""
    optimizer = optax.chain(CLIP, optax.adam(1e-3))
    params = f32(1, 1)
    _, state = optimizer.update(f32(math.inf, 1), optimizer.init(params), params)
    for _ in range(20):
        _, state = optimizer.update(f32(1, 1), state, params)
    return any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(state))


@check("R3", "an update, or a count of 1")
def apply_if_finite_and_overflow() -> Any:
    """A gradient of 1e20 behind apply_if_finite(clip): the update and what it counted."""
    optimizer = optax.apply_if_finite(CLIP, 5)
    g = jnp.full(2, 1e20, jnp.float32)
    updates, state = optimizer.update(g, optimizer.init(g))
    return {"update": updates, "total_notfinite": optax.tree.get(state, "total_notfinite")}


@check("R3", "all eight devices step, or none does")
def apply_if_finite_in_shard_map() -> Any:
    """The updates of 8 devices, one of which has a NaN, under apply_if_finite in shard_map."""
    optimizer = optax.apply_if_finite(optax.sgd(1.0), 5)
    g = f32(*[1] * 7, math.nan)

    def body(g: jax.Array) -> jax.Array:
        return update(optimizer, g)

    specs = {"mesh": mesh(), "in_specs": P("d"), "out_specs": P("d")}
    return jax.jit(jax.shard_map(body, **specs, check_vma=False))(g)


# --- R4: the norm can be read back ---


@check("R4", "a state that holds the norm 5")
def norm_in_state() -> Any:
    """The state of clip_by_global_norm(1) after the gradient [3, 4]."""
    return str(CLIP.update(f32(3, 4), CLIP.init(f32(3, 4)))[1])


# --- R5: the state keeps its structure and dtypes from init on ---

MONITORED = optax.chain(optax.monitor({"norm": optax.tree.norm}), CLIP)


def scan(optimizer: optax.GradientTransformation, updates: Any, params: Any) -> str:
    """Take two steps in lax.scan."""

    def step(state: Any, _: None) -> tuple[Any, None]:
        return optimizer.update(updates, state, params)[1], None

    lax.scan(step, optimizer.init(params), None, length=2)
    return "runs"


@check("R5", "runs")
def monitor_in_scan() -> Any:
    """optax.monitor of the norm before a clip, in lax.scan."""
    return scan(MONITORED, f32(3, 4), f32(0, 0))


@check("R5", "runs")
def monitor_in_multi_steps() -> Any:
    """The same in MultiSteps."""
    optimizer = optax.MultiSteps(MONITORED, 2)
    optimizer.update(f32(3, 4), optimizer.init(f32(0, 0)))
    return "runs"


@check("R5", "runs")
def monitor_in_apply_if_finite() -> Any:
    """The same in apply_if_finite."""
    optimizer = optax.apply_if_finite(MONITORED, 5)
    optimizer.update(f32(3, 4), optimizer.init(f32(0, 0)))
    return "runs"


@check("R5", 1)
def monitor_traces() -> Any:
    """The number of times that a jitted step with the same chain is traced in three steps."""
    traces = []

    @jax.jit
    def step(state: Any) -> Any:
        traces.append(None)
        return MONITORED.update(f32(3, 4), state)[1]

    state = MONITORED.init(f32(0, 0))
    for _ in range(3):
        state = step(state)
    return len(traces)


@check("R5", 5.0)
def monitor_through_flax() -> Any:
    """The monitored norm after flax to_bytes and from_bytes into a new state."""
    _, state = MONITORED.update(f32(3, 4), MONITORED.init(f32(0, 0)))
    new = MONITORED.init(f32(0, 0))
    restored = flax.serialization.from_bytes(new, flax.serialization.to_bytes(state))
    return optax.tree.get(restored, "norm", "absent")


def through_orbax(state: Any, new: Any) -> Any:
    """Save a state with orbax and restore it in the form of another."""
    with tempfile.TemporaryDirectory() as folder, orbax.checkpoint.StandardCheckpointer() as saver:
        saver.save(Path(folder) / "state", state)
        saver.wait_until_finished()
        try:
            return saver.restore(Path(folder) / "state", new)
        except Exception as error:
            raise type(error)(str(error).replace(folder, "…")) from error


@check("R5", 5.0)
def monitor_through_orbax() -> Any:
    """The monitored norm after it is saved and restored with orbax."""
    _, state = MONITORED.update(f32(3, 4), MONITORED.init(f32(0, 0)))
    restored = through_orbax(state, MONITORED.init(f32(0, 0)))
    return optax.tree.get(restored, "norm", "absent")


@check("R5", 0.0)
def snapshot_at_init() -> Any:
    """The norm that optax.snapshot holds after init with the parameters [30, 40]."""
    state = optax.snapshot("norm", optax.tree.norm).init(f32(30, 40))
    return float(state.measurement["norm"])  # pyright: ignore[reportAttributeAccessIssue]


@check("R5", "runs")
def snapshot_of_bfloat16() -> Any:
    """optax.snapshot of bfloat16 gradients of float32 parameters, in lax.scan."""
    return scan(optax.snapshot("norm", optax.tree.norm), bf16(3, 4), f32(0, 0))


@check("R5", "[5.0, 1.0]")
def two_snapshots() -> Any:
    """Two snapshots of one name, before and after the clip, read with optax.tree.get."""
    snapshot = optax.snapshot("norm", optax.tree.norm)
    optimizer = optax.chain(snapshot, CLIP, snapshot)
    _, state = optimizer.update(f32(3, 4), optimizer.init(f32(0, 0)))
    return optax.tree.get(state, "norm")


@check("R5", "an array")
def snapshot_in_nnx() -> Any:
    """The type that optax.tree.get gives from the state of an nnx.Optimizer."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    snapshot = optax.chain(optax.snapshot("norm", optax.tree.norm), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, snapshot, wrt=nnx.Param)
    return type(optax.tree.get(optimizer.opt_state, "norm")).__name__


# --- R6: any kind of threshold, and the dtype of the updates is kept ---


@check("R6", "bfloat16")
def float32_limit_on_bfloat16() -> Any:
    """The dtype of bfloat16 gradients clipped with a threshold of jnp.float32(1)."""
    return str(update(optax.clip_by_global_norm(jnp.float32(1)), bf16(3, 4)).dtype)


@check("R6", "bfloat16")
def numpy_limit_on_bfloat16() -> Any:
    """The dtype of bfloat16 gradients clipped with a threshold of np.float32(1)."""
    limit = np.float32(1)
    return str(update(optax.clip_by_global_norm(limit), bf16(3, 4)).dtype)


def injected(limit: Any, updates: Any) -> Any:
    """Clip behind inject_hyperparams; give the update and the state."""
    clip = optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=limit)
    return clip.update(updates, clip.init(updates), updates)


@check("R6", "bfloat16")
def scheduled_limit_on_bfloat16() -> Any:
    """The dtype of bfloat16 gradients clipped with a schedule through inject_hyperparams."""
    return str(injected(optax.linear_schedule(0.3, 0.1, 10), bf16(3, 4))[0].dtype)


@check("R6", 0.3)
def injected_limit_on_bfloat16() -> Any:
    """The threshold in the state after inject_hyperparams(0.3) on bfloat16 gradients."""
    return float(injected(0.3, bf16(3, 4))[1].hyperparams["max_norm"])


@check("R6", ["bfloat16", "float32"])
def injected_limit_on_a_mixed_tree() -> Any:
    """The dtypes of bfloat16 and float32 leaves clipped through inject_hyperparams(0.3)."""
    return [str(x.dtype) for x in injected(0.3, [bf16(3), f32(4)])[0]]


@check("R6", "bfloat16")
def block_rms_promotes() -> Any:
    """The dtype of bfloat16 gradients after clip_by_block_rms(jnp.float32(1))."""
    return str(update(optax.clip_by_block_rms(jnp.float32(1)), bf16(3, 4)).dtype)


@check("R6", "bfloat16")
def agc_promotes() -> Any:
    """The dtype of bfloat16 gradients after adaptive_grad_clip(jnp.float32(0.01))."""
    clip = optax.adaptive_grad_clip(jnp.float32(0.01))
    return str(update(clip, bf16(3, 4), bf16(1, 1)).dtype)


# --- R9: leaves that are no real gradients pass through ---


@check("R9", [5])
def integer_leaf() -> Any:
    """The int32 leaf [5] beside the gradient [3, 4], clipped to 1."""
    return update(CLIP, {"w": f32(3, 4), "i": jnp.array([5], jnp.int32)})["i"]


@check("R9", "passes through")
def float0_leaf() -> Any:
    """A float0 leaf beside the gradient [3, 4], clipped to 1."""
    return update(CLIP, {"w": f32(3, 4), "i": np.zeros(1, jax.dtypes.float0)})["i"]


@check("R9", "passes through")
def key_leaf() -> Any:
    """A PRNG key beside the gradient [3, 4], clipped to 1."""
    return str(update(CLIP, {"w": f32(3, 4), "k": jax.random.key(0)})["k"])


@check("R9", 0.6)
def python_leaf() -> Any:
    """The Python number 3.0 beside the gradient [4], clipped to 1."""
    return update(CLIP, {"w": f32(4), "x": 3.0})["x"]


@check("R9", "the modulus is clipped")
def complex_leaf() -> Any:
    """The complex gradient [3 + 4j] after optax.clip(1)."""
    return str(update(optax.clip(1.0), jnp.array([3 + 4j], jnp.complex64)))


# --- R10: thresholds are checked ---


@check("R10", "ValueError")
def negative_norm_limit() -> Any:
    """The gradient [3, 4] after clip_by_global_norm(-1)."""
    return update(optax.clip_by_global_norm(-1.0), f32(3, 4))


@check("R10", "ValueError")
def nan_limit() -> Any:
    """The gradient [3, 4] after clip_by_global_norm(nan)."""
    return update(optax.clip_by_global_norm(math.nan), f32(3, 4))


@check("R10", "ValueError")
def boolean_limit() -> Any:
    """The gradient [3, 4] after clip_by_global_norm(True)."""
    return update(optax.clip_by_global_norm(True), f32(3, 4))


@check("R10", "ValueError")
def negative_value_limit() -> Any:
    """The gradient [3, -4] after optax.clip(-1)."""
    return update(optax.clip(-1.0), f32(3, -4))


# --- R11: a derivative of the clip at zero ---


def jacobian(clip: optax.GradientTransformation, params: Any = None) -> Any:
    """Differentiate the clipped gradient at [0, 0]."""
    return jax.jacobian(lambda g: update(clip, g, params))(f32(0, 0))


@check("R11", [[1.0, 0.0], [0.0, 1.0]])
def global_norm_jacobian() -> Any:
    """The Jacobian of clip_by_global_norm(1) at a zero gradient."""
    return jacobian(CLIP)


@check("R11", [[1.0, 0.0], [0.0, 1.0]])
def block_rms_jacobian() -> Any:
    """The Jacobian of clip_by_block_rms(1) at a zero gradient."""
    return jacobian(optax.clip_by_block_rms(1.0))


@check("R11", [[1.0, 0.0], [0.0, 1.0]])
def agc_jacobian() -> Any:
    """The Jacobian of adaptive_grad_clip(0.01) at a zero gradient."""
    return jacobian(optax.adaptive_grad_clip(0.01), f32(1, 1))


# --- R12: the unit-wise clip and its axes ---


@check("R12", [1e-3, 1e-3])
def agc_of_stacked_layers() -> Any:
    """Two Dense kernels (2, 3, 1) of norm 0.1, gradients 1 and 1000: the norms after AGC(0.01).

    The first layer is clipped in the proportion of the second.
    """
    params = jnp.full((2, 3, 1), 0.1 / math.sqrt(3), jnp.float32)
    updates = jnp.stack([jnp.full((3, 1), 1.0), jnp.full((3, 1), 1e3)]).astype(jnp.float32)
    clipped = update(optax.adaptive_grad_clip(0.01), updates, params)
    return [norm(layer) for layer in clipped]


@check("R12", 3.87298)
def unit_norm_of_rank_three() -> Any:
    """The unit norms of ones(3, 5, 7), a 1-d convolution: right over its axes (0, 1), √15.

    The docstring of unitwise_norm promises the axes (0, 1, 2), which would give √105 = 10.247.
    """
    norms = optax.transforms.unitwise_norm(jnp.ones((3, 5, 7)))
    return float(norms[0, 0, 0])


@check("R12", "runs")
def agc_axes_on_a_bias() -> Any:
    """adaptive_grad_clip(axis=(0, 1)) on a convolution and its bias."""
    params = {"kernel": jnp.ones((3, 3, 4)), "bias": jnp.ones(4)}
    update(optax.adaptive_grad_clip(0.01, axis=(0, 1)), params, params)
    return "runs"


@check("R12", "runs")
def agc_on_an_explicit_mesh() -> Any:
    """adaptive_grad_clip on a kernel sharded over a mesh of explicit axes."""
    explicit = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        w = jax.device_put(jnp.ones((8, 4), jnp.float32), P("d"))
        jax.jit(lambda w: update(optax.adaptive_grad_clip(0.01), w, w))(w)
    return "runs"


# --- R15: a clip that is switched on later ---


def grown() -> tuple[Any, Any]:
    """Give a state of Adam, and a new state of the clip and Adam."""
    with_clip = optax.chain(CLIP, optax.adam(1e-3))
    return optax.chain(optax.adam(1e-3)).init(f32(1, 1)), with_clip.init(f32(1, 1))


@check("R15", "restores: a limit of inf in its place from the start")
def restore_with_flax() -> Any:
    """The state of an optimizer, restored with flax after a clip is put in front of it."""
    state, new = grown()
    flax.serialization.from_bytes(new, flax.serialization.to_bytes(state))
    return "restores"


@check("R15", "restores: a limit of inf in its place from the start")
def restore_with_orbax() -> Any:
    """The same with orbax."""
    through_orbax(*grown())
    return "restores"


# --- R16: leaves in two kinds of memory ---


@check("R16", "runs")
def mixed_memory_kinds() -> Any:
    """A gradient in pinned host memory beside one on the device, clipped under jit."""
    device = jax.devices()[0]
    kinds = {"host": "pinned_host", "device": "device"}
    updates = {
        name: jax.device_put(f32(3, 4), jax.sharding.SingleDeviceSharding(device, memory_kind=kind))
        for name, kind in kinds.items()
    }
    jax.jit(lambda updates: update(CLIP, updates))(updates)
    return "runs"


# --- R17: the 1e-6 of PyTorch ---


@check("R17", "0.01, or 0.0099998 with the 1e-6 of PyTorch")
def without_epsilon() -> Any:
    """The gradient [0.05] clipped to 0.01, for which PyTorch gives 0.0099998."""
    return float(update(optax.clip_by_global_norm(0.01), f32(0.05))[0])


# --- What the five clips do to zeros and to non-finite gradients, with a limit of 1 ---

CLASSICS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "clip": optax.clip,
    "clip_by_global_norm": optax.clip_by_global_norm,
    "clip_by_block_rms": optax.clip_by_block_rms,
    "normalize_by_update_norm": optax.normalize_by_update_norm,
    "adaptive_grad_clip": lambda limit: optax.adaptive_grad_clip(0.01 * limit),
}


def matrix(updates: Any, limit: float = 1.0) -> dict[str, Any]:
    """Clip one gradient with all five; the parameters are ones."""
    params = jax.tree.map(jnp.ones_like, updates)
    return {name: update(make(limit), updates, params) for name, make in CLASSICS.items()}


@check("matrix", "zeros")
def matrix_of_zeros() -> Any:
    """The gradient [0, 0]."""
    return matrix(f32(0, 0))


@check("matrix", "zeros")
def matrix_of_zeros_to_zero() -> Any:
    """The gradient [0, 0] with a limit of 0."""
    return matrix(f32(0, 0), 0.0)


@check("matrix", "no NaN in other leaves; zero, or NaN for debugging")
def matrix_of_nan() -> Any:
    """The gradient [nan, 1]."""
    return matrix(f32(math.nan, 1))


@check("matrix", "no NaN in other leaves; zero, or NaN for debugging")
def matrix_of_inf() -> Any:
    """The gradient [inf, 1]."""
    return matrix(f32(math.inf, 1))


@check("matrix", "a stays finite")
def matrix_of_two_leaves() -> Any:
    """The leaves a = [3, 4] and b = [nan]."""
    return matrix({"a": f32(3, 4), "b": f32(math.nan)})


def plain(value: Any) -> Any:
    """Turn arrays into lists, numbers into six digits, and NaN and inf into strings for JSON."""
    match value:
        case jax.Array() | np.ndarray() | np.generic():
            array = np.asarray(value)
            return plain((array if array.dtype.kind in "biu" else np.float64(array)).tolist())
        case dict():
            return {key: plain(x) for key, x in value.items()}
        case list() | tuple():
            return [plain(x) for x in value]
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def short(value: Any) -> str:
    """Write a result for the table."""
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def main() -> None:
    """Run all checks, print a table and write the file beside this script."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    warnings.simplefilter("ignore", DeprecationWarning)  # pmap is what some checks are about
    table = Table("", "claim", "right", "optax", show_lines=True)
    checks = []
    for requirement, right, run in CHECKS:
        claim = (inspect.getdoc(run) or "").splitlines()[0]
        result = plain(attempt(run))
        table.add_row(*map(Text, (requirement, claim, short(right), short(result))))
        names = {"name": run.__name__, "requirement": requirement, "claim": claim}
        checks.append({**names, "right": right, "optax": result})
    Console().print(table)
    packages = ["optax", "jax", "flax", "orbax-checkpoint", "numpy"]
    result = {"versions": {name: metadata.version(name) for name in packages}, "checks": checks}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
