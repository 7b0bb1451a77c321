"""What XLA makes of a clip: memory, passes over the gradients, recompilations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import gradclip_jax

SIDE = 1024
BYTES = 4 * SIDE * SIDE
PARAMS = {"kernel": jnp.ones((SIDE, SIDE)), "bias": jnp.ones(SIDE)}


def compiled_step(clip, optimizer, params, donate_grads):
    chain = optimizer if clip is None else optax.chain(clip, optimizer)

    def step(params, state, grads):
        updates, state = chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donated = (0, 1, 2) if donate_grads else (0, 1)
    return jax.jit(step, donate_argnums=donated).lower(params, chain.init(params), params).compile()


# Donated gradients have no output to become: params and moments take the place of their own.
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")


@pytest.mark.parametrize("donate_grads", [True, False])
def test_no_second_copy_of_the_gradients_in_front_of_adamw(donate_grads, standard_promotion):
    clip = gradclip_jax.clip_by_global_norm(1.0)
    memory = compiled_step(clip, optax.adamw(1e-3), PARAMS, donate_grads).memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * BYTES


def test_optax_keeps_one(standard_promotion):
    """The bound can fail: a select between two trees keeps the clipped gradients."""
    step = compiled_step(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), PARAMS, True)
    assert step.memory_analysis().temp_size_in_bytes > 0.9 * BYTES


@pytest.mark.parametrize(
    "clip",
    [
        gradclip_jax.clip_by_norm(1.0),
        gradclip_jax.clip_by_value(1.0),
        gradclip_jax.clip_by_block_rms(1.0),
        gradclip_jax.clip_by_group_norm(1.0, labels={"kernel": 0, "bias": 1}),
        gradclip_jax.clip_by_global_norm(1.0, response=gradclip_jax.responses.smooth),
        gradclip_jax.clip_by_global_norm(1.0, order=1),
        gradclip_jax.clip_by_global_norm(1.0, order=jnp.inf),
        gradclip_jax.zero_nonfinite(),
    ],
)
def test_no_other_clip_keeps_one_either(clip, standard_promotion):
    memory = compiled_step(clip, optax.adamw(1e-3), PARAMS, True).memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * BYTES


def test_a_clip_of_bfloat16_makes_no_float32_copy():
    grads = jnp.ones((SIDE, SIDE), jnp.bfloat16)
    memory = jax.jit(gradclip_jax.global_norm).lower(grads).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * BYTES / 2


@pytest.mark.parametrize(("dtype", "make"), [(jnp.float32, optax.adamw), (jnp.bfloat16, optax.sgd)])
def test_arrays_of_one_shape_are_not_added_before_they_are_reduced(dtype, make, standard_promotion):
    """XLA makes the sum of two sums one of all elements, for which it keeps a sum of arrays."""
    params = {name: jnp.ones((512, 512), dtype) for name in "abcd"}
    step = compiled_step(gradclip_jax.clip_by_global_norm(1.0), make(1e-3), params, False)
    size = sum(array.nbytes for array in params.values())
    assert step.memory_analysis().temp_size_in_bytes < 0.01 * size


def test_a_changed_threshold_in_the_state_does_not_recompile():
    clip = optax.inject_hyperparams(gradclip_jax.clip_by_global_norm)(max_norm=1.0)
    step = jax.jit(clip.update)
    state = clip.init(PARAMS)
    for limit in (1.0, 2.0, 3.0):
        state.hyperparams["max_norm"] = jnp.float32(limit)
        _, state = step(PARAMS, state)
    assert step._cache_size() == 1


def test_nothing_calls_back_to_the_host():
    clip = gradclip_jax.clip_by_norm(1.0)
    text = str(jax.make_jaxpr(clip.update)(PARAMS, clip.init(PARAMS)))
    assert not re.search("callback|infeed|outfeed|io_effect", text)


MANY = {str(i): jnp.full((4, 4), 2.0) for i in range(100)}


def reductions(program):
    """Number of sums over arrays of 4 x 4 in what XLA is given."""
    return len(re.findall(r"stablehlo.reduce\(.*tensor<4x4xf32>", program.as_text()))


def test_small_leaves_of_one_shape_are_reduced_together_where_no_axis_is_automatic():
    """Each is read once for the fast pass and once in the exact one: 7 kernels of 16 each."""
    assert reductions(jax.jit(gradclip_jax.global_norm).lower(MANY)) == 2 * len(MANY)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    manual = jax.shard_map(gradclip_jax.global_norm, mesh=mesh, in_specs=P(), out_specs=P())
    assert reductions(jax.jit(manual).lower(MANY)) == 2 * 7


def test_one_device_is_enough_to_reduce_them_together_under_jit(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert reductions(jax.jit(lambda tree: gradclip_jax.global_norm(tree)).lower(MANY)) == 2 * 7


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_leaves_that_are_reduced_together_have_the_same_norm(scale):
    """Called eagerly the arrays say themselves that each is on one device."""
    rng = np.random.default_rng(0)
    tree = [scale * rng.standard_normal((3, 5)).astype(np.float32) for _ in range(40)]
    tree += [scale * rng.standard_normal((3, 5)).astype(jnp.bfloat16) for _ in range(20)]
    tree += [scale * (1 + 1j) * rng.standard_normal((3, 5)).astype(np.complex64) for _ in range(20)]
    exact = np.sqrt(sum(np.sum(np.abs(x.astype(np.complex128)) ** 2) for x in tree))
    arrays = [jnp.asarray(x) for x in tree]
    np.testing.assert_allclose(gradclip_jax.global_norm(arrays) / scale, exact / scale, rtol=1e-6)
    arrays[17] = arrays[17].at[1, 1].set(jnp.nan)
    assert jnp.isnan(gradclip_jax.global_norm(arrays))


@pytest.mark.parametrize("make", [gradclip_jax.clip_by_norm, gradclip_jax.adagc])
def test_no_kernel_reads_hundreds_of_scalars(make):
    """One that read the norms and limits of 500 leaves took 140 s to compile."""
    clip = make(1.5)
    program = jax.jit(clip.update).lower(MANY, clip.init(MANY)).compile().as_text()
    reads = [len(args.split(", ")) for args in re.findall(r"%\S*fus\S* \((.*)\) ->", program)]
    assert 1 < max(reads) < 70


@pytest.mark.parametrize("make", [gradclip_jax.clip_by_global_norm, gradclip_jax.clip_by_norm])
def test_the_compiled_program_grows_linearly_with_the_number_of_leaves(make):
    """Norms stacked as one vector were computed anew for each leaf: four times for twice."""

    def size(count):
        grads = {str(i): jnp.ones((4, 4)) for i in range(count)}
        clip = make(1.0)
        return len(jax.jit(clip.update).lower(grads, clip.init(grads)).compile().as_text())

    assert size(60) < 2.4 * size(30)
