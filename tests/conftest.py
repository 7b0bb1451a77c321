"""Eight CPU devices, no promotion of dtypes or ranks that is not written, and meshes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AxisType, Mesh

# XLA reads them when the first device is asked for.
FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# Most of the time goes into compiling programs that run once. These make it a fifth (jax 0.10.2) to
# a half (0.12); `OPTIMIZED=1` compiles as XLA does by default. `.ci/run` tests both.
if os.environ.get("OPTIMIZED", "0") == "0":
    FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version__.startswith("0.10."):  # later ones do not know it
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ.setdefault("MPLBACKEND", "agg")

jax.config.update("jax_numpy_dtype_promotion", "strict")


def make_mesh(kind: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    """A mesh with axes of these sizes, all of one kind (`make_mesh` alone gives explicit ones)."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def shard_map(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A compiled `jax.shard_map`: eagerly each operation is a program for all devices."""
    return jax.jit(jax.shard_map(f, **options))


def through_orbax(state: Any, template: Any, folder: Path) -> Any:
    """A state after a way through a checkpoint, restored into one of its kind."""
    import orbax.checkpoint as ocp  # few tests need it, and it takes a second

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", template)


@pytest.fixture(autouse=True)
def rank_promotion(request):
    """The library promotes no rank; an example writes `x @ w + b`, as its reader would."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    with jax.numpy_rank_promotion("raise" if folder == "library" else "allow"):
        yield


@pytest.fixture
def mesh() -> Mesh:
    """Eight devices along `data`."""
    return make_mesh(data=8)


@pytest.fixture
def mesh_2d() -> Mesh:
    """Four devices along `data` times two along `model`."""
    return make_mesh(data=4, model=2)


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Implicit promotion of dtypes and ranks for a test, as in a program of a user."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
