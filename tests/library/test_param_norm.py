"""Fractions of the norms of weights: LARC and LAMB in NumPy, of each array and of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import shard_map
from jax.sharding import PartitionSpec as P
from test_devices import collectives

import gradclip_jax
from gradclip_jax import clip_by_param_norm, global_norm, leaf_norms, unit_norms

WEIGHTS = {"w": jnp.array([[6.0, 0.0], [0.0, 8.0]]), "b": jnp.array([3.0, 4.0])}  # norms 10, 5
UPDATES = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.array([0.3, 0.4])}  # norms 5, 0.5


def run(clip, updates=UPDATES, weights=WEIGHTS):
    return clip.update(updates, clip.init(weights), weights)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64).ravel())


def test_by_hand_each_array_alone():
    result, state = run(clip_by_param_norm(0.1))
    np.testing.assert_allclose(result["w"], [[0.6, 0.0], [0.0, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(result["b"], UPDATES["b"])  # 0.5 is a tenth of 5
    assert {key: float(x) for key, x in state.grad_norm.items()} == {"w": 5.0, "b": 0.5}
    assert float(state.clip_limit["w"]) == 1.0


def test_by_hand_all_together():
    """Norms of 5.02 and 11.18: all shrink by one factor."""
    result, state = run(clip_by_param_norm(0.1, measure=global_norm))
    factor = 0.1 * np.sqrt(125) / np.sqrt(25.25)
    for name, update in UPDATES.items():
        np.testing.assert_allclose(result[name], factor * update, rtol=1e-6)
    assert float(state.clip_limit) == pytest.approx(0.1 * np.sqrt(125))


def test_with_units_it_is_adaptive_grad_clip():
    measure = functools.partial(unit_norms, axes=0)
    result, state = run(clip_by_param_norm(0.1, measure=measure))
    expected, other = run(gradclip_jax.adaptive_grad_clip(0.1, axes=0))
    jax.tree.map(np.testing.assert_array_equal, (result, state), (expected, other))


def test_of_another_order():
    measure = functools.partial(leaf_norms, order=jnp.inf)
    result, state = run(clip_by_param_norm(0.1, measure=measure))
    np.testing.assert_allclose(np.max(result["w"]), 0.8, rtol=1e-6)
    assert state.grad_norm is None
    assert float(state.clip_measure["w"]) == 4.0


def test_behind_sgd_it_is_larc():
    """Apex: min(0.02 |w| / |g|, lr) in place of the learning rate, without weight decay."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 5)).astype(np.float32)
    optimizer = optax.chain(optax.sgd(0.1), clip_by_param_norm(0.02, eps=0.0))
    state = optimizer.init(weights)
    for scale in (1e-3, 0.1, 1.0, 100.0):
        grads = (scale * rng.normal(size=(4, 5))).astype(np.float32)
        updates, state = optimizer.update(grads, state, weights)
        rate = min(0.02 * norm(weights) / norm(grads), 0.1)
        np.testing.assert_allclose(updates, -rate * grads, rtol=1e-5)


def test_behind_adam_it_is_lamb_with_a_clipped_trust_ratio(standard_promotion):
    rng = np.random.default_rng(1)
    weights = (0.1 * rng.normal(size=(4, 5))).astype(np.float32)
    direction = [optax.scale_by_adam(), optax.add_decayed_weights(0.01)]
    optimizer = optax.chain(*direction, clip_by_param_norm(1.0), optax.scale(-0.1))
    plain = optax.chain(*direction)
    state, other = optimizer.init(weights), plain.init(weights)
    for _ in range(3):
        grads = rng.normal(size=(4, 5)).astype(np.float32)
        updates, state = optimizer.update(grads, state, weights)
        u, other = plain.update(grads, other, weights)
        trust = min(1.0, norm(weights) / norm(u))
        assert trust < 1
        np.testing.assert_allclose(updates, -0.1 * trust * np.asarray(u), rtol=1e-5)


def test_weights_at_zero_move_by_eps():
    result, _ = run(clip_by_param_norm(0.1, eps=0.01), jnp.array([3.0, 4.0]), jnp.zeros(2))
    np.testing.assert_allclose(result, [6e-4, 8e-4], rtol=1e-6)
    result, _ = run(clip_by_param_norm(0.1, eps=0.0), jnp.array([3.0, 4.0]), jnp.zeros(2))
    np.testing.assert_array_equal(result, [0, 0])


def test_an_update_of_zero_stays_zero_whatever_the_weights():
    for weights in (jnp.zeros(2), jnp.ones(2)):
        for ratio in (0.0, 0.1, None):
            result, state = run(clip_by_param_norm(ratio, eps=0.0), jnp.zeros(2), weights)
            np.testing.assert_array_equal(result, [0, 0])
            assert int(state.clip_count) == int(state.nonfinite_count) == 0
            assert not np.isnan(state.clip_limit)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_neither_overflow_nor_underflow(scale):
    weights, updates = (jax.tree.map(lambda x: scale * x, tree) for tree in (WEIGHTS, UPDATES))
    for measure in (leaf_norms, global_norm):
        clip = clip_by_param_norm(0.01, eps=0.0, measure=measure)
        result, _ = run(clip, updates, weights)
        expected, _ = run(clip)
        for name in WEIGHTS:
            np.testing.assert_allclose(result[name] / scale, expected[name], rtol=1e-5)


def test_a_nan_zeroes_its_array_or_all():
    broken = {**UPDATES, "w": UPDATES["w"].at[0, 0].set(jnp.nan)}
    result, state = run(clip_by_param_norm(0.1), broken)
    assert not result["w"].any()
    np.testing.assert_array_equal(result["b"], UPDATES["b"])
    assert int(state.nonfinite_count) == 1
    result, _ = run(clip_by_param_norm(0.1, measure=global_norm), broken)
    assert not any(leaf.any() for leaf in result.values())


@pytest.mark.parametrize("measure", [leaf_norms, global_norm])
def test_weights_without_an_update_do_not_count(measure):
    """Frozen parameters have None for an update, as in Equinox."""
    weights = {**WEIGHTS, "frozen": jnp.full(3, 100.0)}
    updates = {**UPDATES, "frozen": None}
    clip = clip_by_param_norm(0.01, measure=measure)
    result, _ = clip.update(updates, clip.init({**WEIGHTS, "frozen": None}), weights)
    expected, _ = run(clip)
    assert result.pop("frozen") is None
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_empty_trees_have_a_norm_of_zero():
    clip = clip_by_param_norm(0.1, measure=global_norm)
    result, state = run(clip, {}, {})
    assert result == {}
    assert float(state.grad_norm) == 0


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("measure", [leaf_norms, global_norm])
def test_updates_and_weights_share_one_collective(measure, check_vma, mesh):
    specs = {"a": P("data"), "b": P("data")}
    tree = {name: jnp.arange(8.0) + 1 for name in specs}
    clip = clip_by_param_norm(0.1, measure=measure, axis_name=None if check_vma else specs)

    def step(updates, weights):
        return clip.update(updates, clip.init(weights), weights)[0]

    mapped = shard_map(
        step, mesh=mesh, in_specs=(specs, specs), out_specs=specs, check_vma=check_vma
    )
    assert collectives(mapped, tree, tree).total() == 1
    expected, _ = run(clip_by_param_norm(0.1, measure=measure), tree, tree)
    for name, array in mapped(tree, tree).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)


def test_from_a_config():
    config = {"method": "clip_by_param_norm", "threshold": 0.1, "measure": "global_norm"}
    result, _ = run(gradclip_jax.from_config(config))
    expected, _ = run(clip_by_param_norm(0.1, measure=global_norm))
    jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": -0.1}, r"^`ratio` must be non-negative, got -0\.1\.$"),
        ({"eps": -1.0}, r"^`eps` must be non-negative, got -1\.0\.$"),
        ({"ratio": True}, "`ratio` must be a non-negative number"),
        ({"measure": gradclip_jax.group_norms}, "`measure` must be `leaf_norms`, `unit_norms` or"),
        ({"measure": 1.0}, "`measure` must be `leaf_norms`, .* got 1.0"),
        ({"on_nonfinite": "skip"}, "`on_nonfinite` must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        clip_by_param_norm(**arguments)


def test_without_params_it_says_what_to_call():
    clip = clip_by_param_norm()
    with pytest.raises(ValueError, match="`clip_by_param_norm` compares gradients with"):
        clip.update(UPDATES, clip.init(WEIGHTS))


def test_updates_of_another_structure_raise():
    clip = clip_by_param_norm()
    other = {"w": UPDATES["w"]}
    with pytest.raises(ValueError, match="structure of the params given to `init`"):
        clip.update(other, clip.init(WEIGHTS), {"w": WEIGHTS["w"]})
