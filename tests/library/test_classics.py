"""What is particular to one classic clip and no law for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax


def run(clip, updates):
    return clip.update(updates, clip.init(updates))


def test_clip_by_value_turns_the_direction_and_reports_the_largest_modulus():
    result, state = run(
        gradclip_jax.clip_by_value(1.0), {"a": jnp.array([-3.0, 0.5]), "b": jnp.array(2.0)}
    )
    np.testing.assert_array_equal(result["a"], [-1.0, 0.5])
    assert float(result["b"]) == 1.0
    assert float(state.clip_measure) == 3.0
    assert float(state.clip_factor) == pytest.approx(1 / 3)


def test_clip_by_range_measures_the_element_furthest_beyond_its_bound():
    x = jnp.array([-5.0, -1.0, 0.5, 9.0])
    result, state = run(gradclip_jax.clip_by_range(-2.0, upper=6.0), x)
    np.testing.assert_array_equal(result, [-2.0, -1.0, 0.5, 6.0])
    # -5 goes furthest beyond its bound, by a factor of 2.5; 9 by 1.5.
    assert (float(state.clip_measure), float(state.clip_limit)) == (5.0, 2.0)
    result, state = run(gradclip_jax.clip_by_range(-6.0, upper=2.0), x)
    np.testing.assert_array_equal(result, [-5.0, -1.0, 0.5, 2.0])
    assert (float(state.clip_measure), float(state.clip_limit)) == (9.0, 2.0)
    result, state = run(gradclip_jax.clip_by_range(0.0, upper=9.0), x)
    np.testing.assert_array_equal(result, [0.0, 0.0, 0.5, 9.0])
    assert int(state.clip_count) == 1


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0.5, 1.0), r"`lower` must be at most 0, .* got 0\.5"),
        ((False, 1.0), "`lower` must be at most 0"),
        ((jnp.uint32(1), 1.0), "`lower` must be at most 0"),
        ((None, 1.0), "`lower` must be at most 0, .* got None"),
        ((np.uint32(1), 1.0), r"`lower` must be at most 0.* got "),
        ((jnp.ones(1), 1.0), r"`lower` must be at most 0.* got Array\("),
        ((-1.0, -0.5), r"`upper` must be non-negative, got -0\.5"),
        (("-1", 1.0), r"`lower` must be at most 0, a number, .* got '-1'"),
        ((float("nan"), 1.0), r"`lower` must be at most 0.* got nan"),
    ],
)
def test_clip_by_range_refuses_bounds_on_the_wrong_side_of_zero(bounds, message):
    with pytest.raises(ValueError, match=message):
        gradclip_jax.clip_by_range(bounds[0], upper=bounds[1])


def test_clip_by_value_keeps_the_phase_of_complex_elements():
    result, _ = run(gradclip_jax.clip_by_value(1.0), jnp.array([3 + 4j, 0.3j]))
    np.testing.assert_allclose(result, [0.6 + 0.8j, 0.3j], rtol=1e-6)


def test_clip_by_block_rms_shrinks_what_is_large_and_never_amplifies():
    """An inverted clamp, as two ports of Adafactor have it, would enlarge the small leaf."""
    updates = {"large": jnp.full((10, 10), 3.0), "small": jnp.full(100, 0.01)}
    result, state = run(gradclip_jax.clip_by_block_rms(1.0), updates)
    np.testing.assert_allclose(result["large"], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(result["small"], updates["small"])
    assert float(state.clip_limit["large"]) == pytest.approx(10.0)


def test_clip_by_block_rms_has_one_rms_for_each_layer_of_a_stack():
    """Pooled, the quiet layer would shrink with the loud one: RMS 2.85 of both together."""
    updates = {
        "stack": jnp.stack([jnp.full((2, 3), 0.5), jnp.full((2, 3), 4.0)]),
        "biases": jnp.stack([jnp.full(3, 5.0), jnp.full(3, 0.1)]),
        "vector": jnp.array([3.0, 0.0, 0.0]),  # RMS 1.73: it has no axis 1, so it is one block
        "scalar": jnp.float32(7.0),
    }
    result, state = run(gradclip_jax.clip_by_block_rms(1.0, axes=(1, 2)), updates)
    np.testing.assert_array_equal(result["stack"][0], updates["stack"][0])
    np.testing.assert_allclose(result["stack"][1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(result["biases"], [[1.0] * 3, [0.1] * 3], rtol=1e-6)
    np.testing.assert_allclose(result["vector"], [np.sqrt(3), 0, 0], rtol=1e-6)
    np.testing.assert_allclose(result["scalar"], 1.0, rtol=1e-6)
    assert state.grad_norm["stack"].shape == (2, 1, 1)


def test_clip_by_block_rms_asks_a_callable_for_the_axes_of_each_array():
    def axes(path, leaf):
        return tuple(range(1, leaf.ndim)) if path.startswith("layers") else None

    updates = {"layers": jnp.array([[4.0, 4.0], [0.5, 0.5]]), "head": jnp.array([[4.0], [0.0]])}
    result, _ = run(gradclip_jax.clip_by_block_rms(1.0, axes=axes), updates)
    np.testing.assert_allclose(result["layers"], [[1.0, 1.0], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(result["head"], [[np.sqrt(2)], [0]], rtol=1e-6)


def test_clip_by_block_rms_names_axes_that_may_not_be():
    with pytest.raises(ValueError, match="`axes` must be an int or a tuple of ints, got"):
        gradclip_jax.clip_by_block_rms(1.0, axes=("1",)).init(jnp.ones((2, 2)))


LABELS = {"a": "x", "b": "y"}
UPDATES = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([30.0, 40.0])}


def test_clip_by_group_norm_with_a_limit_for_each_label():
    clip = gradclip_jax.clip_by_group_norm(
        {"x": 1.0, "y": optax.constant_schedule(100.0)}, labels=LABELS
    )
    result, state = run(clip, UPDATES)
    np.testing.assert_allclose(result["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(result["b"], UPDATES["b"])
    assert {label: float(norm) for label, norm in state.grad_norm.items()} == {"x": 5.0, "y": 50.0}


def test_clip_by_group_norm_joins_leaves_of_one_label():
    result, _ = run(gradclip_jax.clip_by_group_norm(1.0, labels={"a": 0, "b": 0}), UPDATES)
    np.testing.assert_allclose(result["b"], np.array([30, 40]) / np.sqrt(2525), rtol=1e-6)


@pytest.mark.parametrize("limits", [{"x": 1.0}, {"x": 1.0, "y": 1.0, "z": 1.0}])
def test_clip_by_group_norm_names_labels_without_a_limit_and_limits_without_a_label(limits):
    with pytest.raises(
        ValueError, match=r"`max_norm` must have a norm for each label and no other"
    ):
        gradclip_jax.clip_by_group_norm(limits, labels=LABELS).init(UPDATES)


@pytest.mark.parametrize("limit", [1.0, {"x": 1.0}])
def test_clip_by_group_norm_refuses_labels_that_do_not_cover_the_tree(limit):
    with pytest.raises(ValueError, match="`labels` must cover the tree of the updates"):
        gradclip_jax.clip_by_group_norm(limit, labels={"a": "x"}).init(UPDATES)


def test_clip_by_group_norm_names_the_bad_limit():
    with pytest.raises(ValueError, match=r"`max_norm\['y'\]` must be non-negative, got -1\.0"):
        gradclip_jax.clip_by_group_norm({"x": 1.0, "y": -1.0}, labels=LABELS)


def test_normalize_by_norm_has_no_epsilon():
    """optax divides by the norm + 1e-6: a norm of 0.0015 would come out 6.7e-4 too small."""
    result, _ = run(gradclip_jax.normalize_by_norm(), jnp.array([0.0009, 0.0012]))
    np.testing.assert_allclose(result, [0.6, 0.8], rtol=1e-6)


def test_masked_leaves_are_neither_counted_nor_scaled():
    clip = optax.masked(gradclip_jax.clip_by_global_norm(1.0), {"a": True, "b": False})
    result, state = run(clip, UPDATES)
    np.testing.assert_allclose(result["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(result["b"], UPDATES["b"])
    assert float(gradclip_jax.metrics(state)["grad_norm"]) == 5.0


def test_one_global_norm_before_a_partition():
    """A clip in each group would let each have the whole norm: together 1.41 instead of 1."""
    optimizer = optax.chain(
        gradclip_jax.clip_by_global_norm(1.0),
        optax.partition({"x": optax.sgd(1.0), "y": optax.sgd(1.0)}, LABELS),
    )
    result, _ = optimizer.update(UPDATES, optimizer.init(UPDATES), UPDATES)
    joint = np.concatenate(jax.tree.leaves(result))
    np.testing.assert_allclose(np.linalg.norm(joint), 1.0, rtol=1e-6)
