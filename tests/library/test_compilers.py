"""What the compilers of TPU and GPU make of a clip, ahead of time and without a device.

Every claim is relative to the same program without a clip, compiled in the same run: absolute
numbers change with each version of a compiler. `make test-compilers` installs both compilers, and
where one is missing its tests are skipped.
"""

import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import compiled as c
import jax
import optax
import programs
import pytest
import strategies
from hlo import Facts
from jax.sharding import PartitionSpec as P
from registry import LIBRARY, OURS

import gradclip_jax

tpu = pytest.mark.skipif(not c.has_tpu_compiler(), reason="libtpu is not installed")
gpu = pytest.mark.skipif(not c.has_gpu_compiler(), reason="jax-cuda12-plugin is not installed")
# The programs are those of a user, who adds a bias as `x + b`.
pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.skipif(LIBRARY != "gradclip_jax", reason="compares this library with none"),
]

TREE = programs.gpt2(layers=2)
PARAMS = programs.abstract(TREE, "float32")


def size_of(tree: object) -> int:
    """Bytes of all leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


LEAVES, GRADIENTS = len(jax.tree.leaves(PARAMS)), size_of(PARAMS)
V5E, V5E_4X4 = ("v5e:2x2", (1, 1)), ("v5e:4x4", (4, 4))
H100, EIGHT_H100 = ("H100", (1, 1)), ("H100:8", (2, 4))
# What the registry has no threshold for.
OTHERS = {
    "acclip": gradclip_jax.acclip,
    "adagc": gradclip_jax.adagc,
    "clippy": gradclip_jax.clippy,
    "spam_clip": gradclip_jax.spam_clip,
    "stable_spam_clip": gradclip_jax.stable_spam_clip,
    "stable_spam_norm": gradclip_jax.stable_spam_norm,
    "qk_clip": strategies.STRATEGIES["qk_clip"],
    "clip_by_dual_norm": functools.partial(gradclip_jax.clip_by_dual_norm, 1.0),
    "soft_spectral_clip": functools.partial(gradclip_jax.soft_spectral_clip, 1.0),
    "zero_nonfinite": gradclip_jax.zero_nonfinite,
}
STRATEGIES = {strategy.name: functools.partial(strategy.make, 0.5) for strategy in OURS} | OTHERS
MATRICES = (
    "spectral_clip",
    "spectral_clip[polynomials]",
    "clip_by_dual_norm",
    "soft_spectral_clip",
)
"""They multiply matrices, which takes kernels and reads of its own."""
READS = {"adaptive_grad_clip": 2, "clip_by_global_norm[order=3]": 2, "clippy": 2}
READS |= {"clip_by_param_norm": 2, "clip_by_param_norm[global_norm]": 2}
"""Of gradients and parameters; and of the largest element before the powers."""
MANY_KERNELS = (
    "clip_by_unit_norm",
    "clip_by_block_rms[axes]",
    "clip_by_global_norm[per_layer]",
    "stable_spam_clip",
)
"""The norms of units are an array, with a root and a factor for each leaf; `per_layer` keeps the
norm of each, which XLA copies to the state; limits of elements are asked of each leaf."""
BRANCHES = ("spectral_clip", "spectral_clip[polynomials]", "soft_spectral_clip")
"""On an H200 their branches cost 2 ms for GPT-2, and the products that they save 150."""


def split(tree: object) -> object:
    """Matrices along both axes of a mesh, in one order: XLA joins no sums of different orders."""
    return jax.tree.map(lambda x: P("data", "model") if len(x.shape) == 2 else P(), tree)


def compiled(program: programs.Program, target: tuple[str, tuple[int, ...]]) -> c.Compiled:
    """A program on one device, or split over a mesh (data, model)."""
    name, shape = target
    mesh = c.mesh_of(name, shape, ("data", "model"))
    specs = None if mesh.size == 1 else split(program.arguments)
    arguments = c.placed(program.arguments, mesh, specs)
    return c.compiled(program.step, *arguments, donate=program.donate)


def update(clip: optax.GradientTransformation | None, target: tuple[str, tuple[int, ...]]) -> Facts:
    """Of clip and AdamW on the tree of a small GPT-2."""
    return compiled(programs.update(TREE, "float32", clip), target).facts


@functools.cache
def without(target: tuple[str, tuple[int, ...]]) -> Facts:
    """Of AdamW alone."""
    return update(None, target)


# --- TPU ---


@tpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_tpu_the_norm_rides_on_the_matmul_that_makes_the_gradient(dtype):
    fusions = compiled(programs.matmul_step(dtype, gradclip_jax.clip_by_global_norm(1.0)), V5E)
    first, *others = fusions.fusions()
    assert len(others) == 1
    assert "[2048,8192]" in first.type
    assert "f32[]" in first.type


@tpu
def test_on_tpu_the_step_of_a_matmul_is_no_dearer_than_with_the_clip_of_optax():
    ours, theirs = (
        compiled(programs.matmul_step("float32", programs.CLIPS[name]), V5E).facts
        for name in ("gradclip_jax", "optax")
    )
    assert ours.cycles <= theirs.cycles


@tpu
def test_on_tpu_a_split_tree_takes_one_all_reduce_and_moves_no_gradient():
    ours, none = update(gradclip_jax.clip_by_global_norm(1.0), V5E_4X4), without(V5E_4X4)
    assert none.collectives.keys().isdisjoint({"all-gather", "all-to-all"})
    assert ours.collectives == none.collectives | {"all-reduce": 1}
    assert ours.collective_bytes <= 12 * LEAVES
    assert ours.branch_collectives.keys() <= {"all-reduce"}


@tpu
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in MATRICES])
def test_on_tpu_no_strategy_reshards(name):
    ours, none = update(STRATEGIES[name](), V5E_4X4), without(V5E_4X4)
    # Heads of fused weights cross shards: their factors, which are scalars, go to the next device.
    allowed = {"all-reduce", "collective-permute"} if name == "qk_clip" else {"all-reduce"}
    assert ours.collectives.keys() - none.collectives.keys() <= allowed
    assert ours.branch_collectives.keys() <= {"all-reduce"}
    # A scalar or two for each array, and rows of units: never an array.
    assert ours.collective_bytes <= GRADIENTS / 100


@tpu
@pytest.mark.parametrize("target", [V5E, V5E_4X4], ids=str)
def test_on_tpu_parameters_and_moments_are_updated_in_place(target):
    ours, none = update(gradclip_jax.clip_by_global_norm(1.0), target), without(target)
    assert ours.aliased >= none.aliased >= 0.999 * 3 * GRADIENTS / math.prod(target[1])
    assert ours.conditionals <= 1


@tpu
def test_on_tpu_a_guard_costs_no_more_than_selects_by_hand():
    tree, adamw = programs.experts(), optax.adamw(1e-3)
    ours, by_hand = (
        compiled(programs.update(tree, "float32", None, guarded), V5E).facts
        for guarded in (gradclip_jax.skip_nonfinite(adamw), programs.by_select(adamw))
    )
    # It asks each element whether it is finite, too, for the time after it has given up.
    assert ours.cycles + ours.branch_cycles <= 1.01 * (by_hand.cycles + by_hand.branch_cycles)
    assert ours.temporary <= 10e6


def decompositions() -> set[str]:
    """Those in a spectral clip of a small GPT-2."""
    text = compiled(programs.update(TREE, "float32", gradclip_jax.spectral_clip(1.0)), V5E).text
    return {"Eigh", "Svd", "Qr"} & set(re.findall(r'custom_call_target="(\w+)', text))


@tpu
def test_on_tpu_a_spectral_clip_decomposes_nothing():
    """A decomposition of matrices of this size does not compile in 100 s."""
    code = "import test_compilers as t; assert not t.decompositions()"
    here = Path(__file__).parent
    paths = [here, here.parents[1], here.parents[1] / "benchmarks"]
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]}; {code}"
    # A process of its own: a compiler that decomposes matrices cannot be interrupted.
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900, capture_output=True)


# --- GPU ---


@gpu
@pytest.mark.parametrize("name", STRATEGIES)
def test_on_gpu_a_clip_adds_few_kernels_and_no_branch(name):
    ours, none = update(STRATEGIES[name](), H100), without(H100)
    assert ours.aliased >= none.aliased >= 3 * GRADIENTS
    if name not in BRANCHES:
        assert ours.conditionals == 0
        assert ours.host_synchronizations == 0
    if name not in MATRICES:
        reads = READS.get(name, 1)
        few = 3 if reads > 1 or name in MANY_KERNELS else 2
        assert ours.kernels <= none.kernels + few * LEAVES
        state = size_of(jax.eval_shape(STRATEGIES[name]().init, PARAMS))  # read and written
        assert ours.bytes <= none.bytes + 1.01 * (reads * GRADIENTS + 2 * state)


@gpu
def test_on_gpu_update_clipping_has_no_branch_and_keeps_one_copy_of_the_updates():
    adamw = optax.adamw(1e-3)
    around = gradclip_jax.clip_update_rms(adamw, b2=0.999)
    ours = compiled(programs.update(TREE, "float32", None, around), H100).facts
    assert ours.conditionals == ours.host_synchronizations == 0
    assert ours.temporary <= 1.01 * GRADIENTS
    assert ours.kernels <= without(H100).kernels + 3 * LEAVES


@gpu
@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_norm", "clip_by_value", "zclip"])
def test_on_eight_gpus_the_host_never_waits(name):
    ours, none = update(STRATEGIES[name](), EIGHT_H100), without(EIGHT_H100)
    assert none.collectives == {}
    assert sum(ours.collectives.values()) <= 2
    # XLA gathers the three sums of a leaf, where it reduces one: scalars either way.
    assert ours.collectives.keys() <= {"all-reduce", "all-gather"}
    assert ours.collective_bytes <= 3 * 4 * (2 + 4) * LEAVES
    assert ours.branch_collectives == {}
    assert ours.host_synchronizations == 0
