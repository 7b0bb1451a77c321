"""Programs compiled for TPU and GPU, ahead of time and without a device."""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from hlo import Facts, Hlo, Instruction, facts, host_synchronizations
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The compilers come with plugins that look for a device when jax first computes something.
config: Any = jax.config
if not config.jax_platforms:
    config.update("jax_platforms", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no server of metadata to wait for
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# Those of `tests/conftest.py` and of the user are for programs that run here.
OPTIONS = {"xla_backend_optimization_level": 3}
GPU_OPTIONS = OPTIONS | {"xla_gpu_autotune_level": 0}  # the autotuner would time kernels on a GPU


class Gpu(NamedTuple):
    """What the compiler is told of a GPU, from its data sheet."""

    name: str
    capability: int
    cores: int
    gigahertz: float
    memory: float
    """Bytes of its memory, and below bytes a second and bytes of its L2 cache."""
    bandwidth: float
    cache: float


GPUS = {
    "H100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 84978434048, 3352.32e9, 50 * 2**20),
    "H200": Gpu("NVIDIA H200 141GB HBM3e", 9, 132, 1.98, 141 * 2**30, 4.8e12, 50 * 2**20),
    "B200": Gpu("NVIDIA B200", 10, 148, 1.965, 180 * 2**30, 8e12, 126 * 2**20),
}


def gpu_target(gpu: Gpu) -> str:
    """The description of a GPU as a `GpuTargetConfigProto`."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth:.0f}
  l2_cache_size: {gpu.cache:.0f}
  clock_rate_ghz: {gpu.gigahertz}
  device_memory_size: {gpu.memory:.0f}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {gpu.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.name}"
"""


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_gpu_compiler() -> bool:
    """Whether the CUDA plugin of jax is installed, with ptxas."""
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    except ModuleNotFoundError:
        return False


def mesh_of(target: str, shape: Sequence[int] = (1,), names: Sequence[str] = ("data",)) -> Mesh:
    """The first devices of a target, `v5e:4x4` or `H100:8`, as a mesh of this shape."""
    kind, _, size = target.partition(":")
    if kind in GPUS:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            topology=f"1x1x{size or 1}",
            target_config=gpu_target(GPUS[kind]),
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=target)
    count = prod(shape)
    return Mesh(np.array(described.devices[:count]).reshape(shape), tuple(names))


class Compiled(NamedTuple):
    """A compiled program."""

    text: str
    facts: Facts

    def fusions(self) -> list[Instruction]:
        """The fusions of the entry computation, in the order in which they run."""
        hlo = Hlo(self.text)
        return [one for one in hlo.computations[hlo.entry] if one.opcode == "fusion"]


def _cpu_seconds() -> float:
    """Of this process and its children: ptxas is one."""
    return sum(os.times()[:4])


def placed(arguments: Any, mesh: Mesh, specs: Any = None) -> Any:
    """Abstract arguments on a mesh: replicated, or split by a tree of PartitionSpecs."""
    specs = jax.tree.map(lambda _: PartitionSpec(), arguments) if specs is None else specs
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec), weak_type=x.weak_type
        ),
        arguments,
        specs,
    )


def compiled(function: Callable[..., Any], *arguments: Any, donate: Sequence[int] = ()) -> Compiled:
    """Compile a function for the devices on which the shardings of its arguments lie."""
    mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    is_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    jax.clear_caches()  # a jit inside of the function may have been traced for other devices
    with tempfile.TemporaryDirectory() as directory:
        options: Any = GPU_OPTIONS | {"xla_dump_to": directory} if is_gpu else OPTIONS
        start = _cpu_seconds()
        # The library asks how many devices there are, and they are those of the target.
        with mock.patch("jax.device_count", return_value=mesh.size):
            lowered = jax.jit(lambda *xs: function(*xs), donate_argnums=donate).lower(*arguments)
        program = lowered.compile(compiler_options=options)
        seconds = _cpu_seconds() - start
        text, memory = str(program.as_text()), program.memory_analysis()
        assert memory is not None
        dumps = Path(directory).glob("*.thunk_sequence_after_thunk_passes.txt")
        waits = sum(host_synchronizations(x.read_text(), text) for x in dumps) if is_gpu else None
    return Compiled(
        text,
        facts(
            text,
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            seconds=seconds,
            host_synchronizations=waits,
        ),
    )
