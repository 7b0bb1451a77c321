"""What a clip cuts off comes back, and what is not finite never does."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import through_orbax
from jax.sharding import NamedSharding, PartitionSpec as P

import gradclip_jax
from gradclip_jax._guards import clip21, error_feedback

CLIP = gradclip_jax.clip_by_global_norm(1.0)
STREAM = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
STREAM[::40] *= 50


with_a_bound = functools.partial(error_feedback, max_carry=3.0)


def clipped(x, limit=1.0):
    norm = np.linalg.norm(x)
    return x * min(1.0, limit / norm) if norm else x


def scanned(transformation, stream, state=None):
    def body(state, grads):
        updates, state = transformation.update(grads, state)
        return state, updates

    state = transformation.init(stream[0]) if state is None else state
    return jax.jit(lambda state, stream: jax.lax.scan(body, state, stream))(state, stream)


def test_u_clip_is_its_equations():
    carry, expected = np.zeros(3), []
    for grads in STREAM.astype(np.float64):
        wanted = grads + carry
        expected.append(clipped(wanted))
        carry = wanted - expected[-1]
    state, updates = scanned(error_feedback(CLIP), jnp.asarray(STREAM))
    np.testing.assert_allclose(updates, expected, atol=2e-4)
    np.testing.assert_allclose(state.carry, carry, rtol=1e-4, atol=1e-3)


def test_clip21_is_its_equations():
    estimate, expected = np.zeros(3), []
    for grads in STREAM.astype(np.float64):
        estimate = estimate + clipped(grads - estimate)
        expected.append(estimate)
    _, updates = scanned(clip21(CLIP), jnp.asarray(STREAM))
    np.testing.assert_allclose(updates, expected, atol=1e-4)


def test_what_comes_out_is_what_came_in_minus_the_carry():
    state, updates = scanned(error_feedback(CLIP), jnp.asarray(STREAM))
    total = np.asarray(updates).sum(0) + np.asarray(state.carry)
    np.testing.assert_allclose(total, STREAM.sum(0), atol=1e-3)


def test_the_carry_is_held_to_a_norm():
    state, updates = scanned(
        error_feedback(CLIP, max_carry=2.0), jnp.array([[30.0, 40.0]] + [[0.0, 0.0]] * 3)
    )
    np.testing.assert_allclose(
        updates, [[0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0.0, 0.0]], rtol=1e-6, atol=1e-6
    )
    assert float(jnp.linalg.norm(state.carry)) < 1e-6
    _, none = scanned(error_feedback(CLIP, max_carry=0.0), jnp.asarray(STREAM[:5]))
    _, alone = scanned(CLIP, jnp.asarray(STREAM[:5]))
    np.testing.assert_array_equal(none, alone)


@pytest.mark.parametrize("make", [error_feedback, with_a_bound, clip21])
@pytest.mark.parametrize(
    "clip",
    [
        CLIP,
        gradclip_jax.clip_by_value(1.0),
        gradclip_jax.clip_by_global_norm(1.0, on_nonfinite="propagate"),
    ],
)
def test_what_is_not_finite_never_enters_the_memory(make, clip):
    stream = jnp.array([[3.0, 4.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [1e38, 1e38], [3.0, 4.0]])
    state, updates = scanned(make(clip), stream)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0]))
    assert np.isfinite(updates[-1]).all()


def test_an_element_that_is_not_finite_keeps_its_carry():
    feedback = error_feedback(CLIP)
    before, _ = scanned(feedback, jnp.array([[3.0, 4.0]]))
    after, updates = scanned(feedback, jnp.array([[jnp.nan, 1.0]]), before)
    np.testing.assert_array_equal(updates, [[0.0, 0.0]])
    np.testing.assert_allclose(after.carry, [2.4, 4.2], rtol=1e-6)


def test_clip21_repeats_its_estimate_where_the_gradient_is_broken():
    state, updates = scanned(clip21(CLIP), jnp.array([[3.0, 4.0], [jnp.nan, 4.0]]))
    np.testing.assert_array_equal(updates[0], updates[1])
    np.testing.assert_array_equal(state.estimate, updates[0])


@pytest.mark.parametrize("make", [error_feedback, clip21])
def test_the_memory_is_float32_and_updates_keep_their_dtypes(make):
    params = {"w": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(1, jnp.complex64), "n": jnp.arange(2)}
    transformation = make(CLIP)
    state = transformation.init(params)
    updates, new = jax.jit(transformation.update)(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert state[0]["w"].dtype == jnp.float32
    assert state[0]["c"].dtype == jnp.complex64
    assert state[0]["n"] is None


@pytest.mark.parametrize(
    "make", [error_feedback, clip21, functools.partial(error_feedback, max_carry=10.0)]
)
def test_python_numbers_are_gradients_too(make):
    transformation = make(CLIP)
    state = transformation.init({"x": 3.0, "y": 1j, "n": 7})
    _, new = transformation.update({"x": 3.0, "y": 4j, "n": 7}, state)
    updates, last = transformation.update({"x": 3.0, "y": 4j, "n": 7}, new)
    chex.assert_trees_all_equal_shapes_and_dtypes(last, new, state)
    assert updates["n"] == 7
    assert (updates["x"].dtype, updates["y"].dtype) == (jnp.float32, jnp.complex64)
    # One of a norm of 5 comes out of a carry, two of it of an estimate.
    times = 2 if make is clip21 else 1
    np.testing.assert_allclose(updates["x"], 0.6 * times, rtol=1e-6)
    np.testing.assert_allclose(updates["y"], 0.8j * times, rtol=1e-6)


def test_a_large_carry_swallows_no_small_gradient():
    clip = error_feedback(gradclip_jax.clip_by_global_norm(0.0))
    stream = jnp.array([[256.0], [0.5], [0.5]], jnp.bfloat16)
    assert float(scanned(clip, stream)[0].carry[0]) == 257.0


def test_a_norm_among_the_extra_arguments_is_not_taken_for_that_of_the_sum():
    feedback = error_feedback(CLIP)
    grads = jnp.array([3.0, 4.0])
    _, state = feedback.update(grads, feedback.init(grads), grad_norm=5.0)
    updates, _ = feedback.update(grads, state, grad_norm=5.0)
    np.testing.assert_allclose(updates, [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("make", [with_a_bound, clip21])
def test_saved_and_restored_it_continues_bit_for_bit(make, tmp_path):
    transformation, stream = make(CLIP), jnp.asarray(STREAM[:10])
    uninterrupted, _ = scanned(transformation, stream)
    saved, _ = scanned(transformation, stream[:5])
    restored = through_orbax(saved, transformation.init(stream[0]), tmp_path)
    chex.assert_trees_all_equal(scanned(transformation, stream[5:], restored)[0], uninterrupted)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_the_memory_is_split_as_the_parameters_are(check_vma, mesh):
    axis_name = None if check_vma else "data"
    clip = gradclip_jax.clip_by_global_norm(1.0, axis_name=axis_name)
    x = jnp.arange(8.0)
    outside = error_feedback(CLIP, max_carry=3.0)
    _, expected = outside.update(x, outside.init(x))

    def step(x):
        feedback = error_feedback(clip, max_carry=3.0, axis_name=axis_name)
        updates, state = feedback.update(x, feedback.init(x), x)
        return updates, state.carry

    _, carry = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
    )(x)
    np.testing.assert_allclose(carry, expected.carry, rtol=1e-6)


def test_the_carry_lies_where_its_parameter_does(mesh):
    sharding = NamedSharding(mesh, P("data"))
    params = jax.device_put(jnp.ones(16), sharding)
    feedback = error_feedback(CLIP, max_carry=3.0)
    state = feedback.init(params)
    assert state.carry.sharding.is_equivalent_to(sharding, 1)
    _, state = jax.jit(feedback.update)(params, state)
    assert state.carry.sharding.is_equivalent_to(sharding, 1)


def test_in_a_chain_metrics_find_the_clip_and_the_state_is_donated():
    chain = optax.chain(
        error_feedback(CLIP, max_carry=optax.linear_schedule(3.0, 1.0, 5)), optax.sgd(1.0)
    )
    params = jnp.array([3.0, 4.0])
    state = chain.init(params)
    step = jax.jit(chain.update, donate_argnums=1)
    for _ in range(2):
        _, state = step(params, state)
    assert float(gradclip_jax.metrics(state)["grad_norm"]) == 8.0
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(chain.init, params), state)


def test_arguments_that_may_not_be_raise():
    with pytest.raises(ValueError, match=r"`max_carry` must be non-negative, got -1\.0"):
        error_feedback(CLIP, max_carry=-1.0)
    for make in (error_feedback, clip21):
        with pytest.raises(ValueError, match=r"`clip` must be a transformation of optax, got 1\.0"):
            make(1.0)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf])
def test_an_infinite_gradient_is_no_step_of_the_limit_of_optax(bad):
    """`optax.clip` makes 1 of infinity."""
    stream = jnp.array([[0.5, 0.5], [bad, 0.5]])
    state, updates = scanned(gradclip_jax.clip21(optax.clip(1.0)), stream)
    np.testing.assert_array_equal(state.estimate, [0.5, 0.5])
    np.testing.assert_array_equal(updates[-1], [0.5, 0.5])
