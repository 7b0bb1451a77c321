"""Guards keep what is not finite away from what follows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import shard_map
from jax.sharding import PartitionSpec as P

import gradclip_jax

BROKEN = {
    "a": jnp.array([jnp.nan, 3.0]),
    "b": jnp.array([jnp.inf, -jnp.inf, 4.0]),
    "n": jnp.arange(2),
}


def test_elements_become_zero_and_the_rest_passes():
    guard = gradclip_jax.zero_nonfinite()
    result, state = guard.update(BROKEN, guard.init(BROKEN))
    np.testing.assert_array_equal(result["a"], [0.0, 3.0])
    np.testing.assert_array_equal(result["b"], [0.0, 0.0, 4.0])
    assert result["n"] is BROKEN["n"]
    assert (int(state.nonfinite_count), int(state.step_count)) == (1, 1)
    _, state = guard.update(result, state)
    assert (int(state.nonfinite_count), int(state.step_count)) == (1, 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_dtypes_are_kept(dtype):
    guard = gradclip_jax.zero_nonfinite()
    x = jnp.array([jnp.nan, 2.0], dtype)
    result, _ = jax.jit(guard.update)(x, guard.init(x))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, jnp.array([0, 2], dtype))


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_large_arrays(bad):
    x = jnp.ones(5000).at[2500].set(bad)
    guard = gradclip_jax.zero_nonfinite()
    for update in (guard.update, jax.jit(guard.update)):
        result, state = update(x, guard.init(x))
        assert float(result.sum()) == 4999
        assert int(state.nonfinite_count) == 1


def test_in_front_of_a_clip_one_nan_costs_one_element():
    chain = optax.chain(gradclip_jax.zero_nonfinite(), gradclip_jax.clip_by_global_norm(1.0))
    result, _ = chain.update(BROKEN, chain.init(BROKEN))
    np.testing.assert_allclose(result["a"], [0.0, 0.6], rtol=1e-6)
    np.testing.assert_allclose(result["b"], [0.0, 0.0, 0.8], rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_all_devices_count_what_one_met(check_vma, mesh):
    x = jnp.ones(8).at[5].set(jnp.nan)
    guard = gradclip_jax.zero_nonfinite(axis_name=None if check_vma else "data")

    def step(x):
        result, state = guard.update(x, guard.init(x))
        return result, state.nonfinite_count[None]

    result, counts = shard_map(
        step, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P() if check_vma else P("data")),
        check_vma=check_vma,
    )(x)  # fmt: skip
    np.testing.assert_array_equal(result, jnp.where(jnp.isnan(x), 0, x))
    assert set(np.asarray(counts).tolist()) == {1}


def test_state_keeps_its_type_in_scan():
    guard = gradclip_jax.zero_nonfinite()
    state, _ = jax.lax.scan(
        lambda state, _: (guard.update(BROKEN, state)[1], None), guard.init(BROKEN), length=4
    )
    assert int(state.nonfinite_count) == 4


def test_a_nan_in_an_imaginary_part_is_counted():
    x = jnp.array([complex(1, math.nan), 2 + 3j])
    guard = gradclip_jax.zero_nonfinite()
    result, state = guard.update(x, guard.init(x))
    np.testing.assert_array_equal(result, [0, 2 + 3j])
    assert int(state.nonfinite_count) == 1
