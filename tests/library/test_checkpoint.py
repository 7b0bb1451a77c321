"""Saved and restored, with flax or with orbax, a run continues bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import through_orbax
from flax import serialization
from registry import STRATEGIES

import gradclip_jax

all_strategies = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}


def grads(step):
    key = jax.random.key(step)
    return jax.tree.map(lambda x: 10 * jax.random.normal(key, x.shape), PARAMS)


def trained(optimizer, state, steps):
    for step in steps:
        _, state = optimizer.update(grads(step), state, PARAMS)
    return state


def through_flax(state, template, tmp_path):
    return serialization.from_bytes(template, serialization.to_bytes(state))


@all_strategies
def test_a_restored_run_continues_bit_for_bit(strategy, tmp_path):
    clip = strategy.make(optax.linear_schedule(1.0, 0.1, 10))
    uninterrupted = trained(clip, clip.init(PARAMS), range(6))
    saved = trained(clip, clip.init(PARAMS), range(3))
    restored = through_flax(saved, clip.init(PARAMS), tmp_path)
    chex.assert_trees_all_equal(trained(clip, restored, range(3, 6)), uninterrupted)


@pytest.mark.parametrize("through", [through_flax, through_orbax])
@pytest.mark.parametrize(
    "make",
    [
        gradclip_jax.clip_by_global_norm,
        functools.partial(gradclip_jax.clip_by_global_norm, per_layer=True),
        gradclip_jax.clip_by_norm,
        gradclip_jax.clip_by_unit_norm,
        lambda limit: gradclip_jax.clip_by_group_norm(limit, labels={"kernel": "a", "bias": "b"}),
    ],
)
def test_a_clip_may_be_switched_on_and_off_between_runs(make, through, tmp_path):
    """Off is a limit of None, not another chain: the state is the same and norms are measured."""
    off = optax.chain(make(None), optax.sgd(0.1, momentum=0.9))
    on = optax.chain(make(1.0), optax.sgd(0.1, momentum=0.9))
    saved = trained(off, off.init(PARAMS), range(3))
    restored = through(saved, on.init(PARAMS), tmp_path)
    chex.assert_trees_all_equal(restored, saved)
    state = trained(on, restored, range(3, 6))
    seen = gradclip_jax.metrics(state)
    assert int(seen["step_count"]) == 6
    assert int(seen["clip_count"]) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
