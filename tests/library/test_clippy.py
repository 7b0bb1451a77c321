"""Clippy against its equation in NumPy, and the weights that could freeze their array."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import gradclip_jax
from gradclip_jax import clippy


def equation(update, weights, relative, absolute):
    """Tang et al. 2023, in float64: the scale of one array, where what is zero bounds nothing."""
    u, w = np.abs(np.asarray(update, np.float64)), np.abs(np.asarray(weights, np.float64))
    allowed = relative * w + absolute
    bounds = np.divide(allowed, u, out=np.ones_like(u), where=u != 0)
    return min(1.0, bounds.min(initial=1.0))


def run(clip, updates, weights):
    updates, weights = (
        jax.tree.map(jnp.asarray, x) if isinstance(x, dict) else jnp.asarray(x)
        for x in (updates, weights)
    )
    return clip.update(updates, clip.init(weights), weights)


@pytest.mark.parametrize(
    ("update", "weights", "relative", "absolute", "scale"),
    [
        ([2.0], [4.0], 0.1, 0.02, 0.21),  # 0.42 / 2
        ([2.0], [-4.0], 0.1, 0.02, 0.21),
        ([-2.0], [4.0], 0.1, 0.02, 0.21),
        ([0.1], [4.0], 0.1, 0.02, 1.0),
        ([2.0, 0.1], [4.0, 1.0], 0.1, 0.02, 0.21),  # 0.12 / 0.1 does not bound
        ([1.0, 1.0], [100.0, 0.0], 0.1, 0.01, 0.01),  # a weight of zero holds its array
        ([1.0, 0.0], [100.0, 0.0], 0.1, 0.0, 1.0),  # 0 / 0 bounds nothing
        ([1.0, 1.0], [100.0, 0.0], 0.1, 0.0, 0.0),
        ([0.0, 0.0], [0.0, 1.0], 0.1, 0.0, 1.0),
    ],
)
def test_by_hand(update, weights, relative, absolute, scale):
    result, state = run(clippy(relative, absolute=absolute), update, weights)
    assert equation(update, weights, relative, absolute) == pytest.approx(scale)
    np.testing.assert_allclose(result, scale * np.array(update), rtol=1e-6)
    assert float(state.clip_factor) == pytest.approx(scale)
    assert int(state.clip_count) == (scale < 1)
    if scale == 1:
        np.testing.assert_array_equal(result, np.float32(update))


@pytest.mark.parametrize("seed", range(3))
def test_each_array_is_the_equation_and_no_weight_moves_further(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, 7), "b": (6,), "s": ()}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    updates = {
        name: (rng.standard_t(2, size=shape) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
        for name, shape in shapes.items()
    }
    result, state = run(clippy(0.2, absolute=1e-3), updates, weights)
    for name in shapes:
        scale = equation(updates[name], weights[name], 0.2, 1e-3)
        np.testing.assert_allclose(result[name], scale * updates[name], rtol=1e-6)
        assert float(state.clip_measure[name]) == pytest.approx(1 / scale, rel=1e-5) or scale == 1
        allowed = 0.2 * np.abs(weights[name]) + 1e-3
        assert np.all(np.abs(result[name]) <= allowed * (1 + 1e-6))


def test_defaults_are_those_of_the_authors_code():
    result, _ = run(clippy(), [1.0], [2.0])
    np.testing.assert_allclose(result, [0.2 + 1e-7], rtol=1e-6)
    result, _ = run(clippy(), [1.0], [0.0])
    np.testing.assert_allclose(result, [1e-7], rtol=1e-6)


def test_a_bias_at_zero_takes_97_updates_to_a_hundredth():
    clip = clippy()
    bias = jnp.zeros(1)

    def step(carry, _):
        bias, state = carry
        update, state = clip.update(jnp.ones(1), state, bias)
        return (bias + update, state), bias[0] + update[0]

    _, path = jax.lax.scan(step, (bias, clip.init(bias)), length=120)
    assert int(np.argmax(path >= 0.01)) + 1 == 97
    np.testing.assert_allclose(path, 1e-6 * (1.1 ** np.arange(1, 121) - 1), rtol=1e-4)


@pytest.mark.parametrize("largest", [1e-30, 1e20, 3e38])
def test_ratios_beyond_the_largest_float_are_exact(largest):
    """3e38 against 1e-7 is a ratio of 3e45, and its inverse is no float32 either."""
    updates = np.float32([largest, largest / 4])
    result, state = run(clippy(), updates, [0.0, 0.0])
    scale = min(1.0, 1e-7 / largest)
    np.testing.assert_allclose(result, scale * updates.astype(np.float64), rtol=1e-6)
    assert np.isfinite(state.clip_measure)
    assert int(state.nonfinite_count) == 0


@pytest.mark.parametrize(("update", "scale"), [(1e-28, 0.01), (1e-30, 1.0)])
def test_tiny_weights_without_an_absolute_threshold(update, scale):
    result, _ = run(clippy(absolute=0.0), [update], [1e-29])
    np.testing.assert_allclose(result, [scale * update], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_array_that_is_not_finite_becomes_zero_and_the_others_pass(bad):
    updates = {"a": jnp.array([bad, 1.0]), "b": jnp.array([1.0])}
    weights = {"a": jnp.ones(2), "b": jnp.array([4.0])}
    result, state = run(clippy(), updates, weights)
    np.testing.assert_array_equal(result["a"], [0, 0])
    np.testing.assert_allclose(result["b"], [0.4], rtol=1e-6)
    assert (int(state.nonfinite_count), int(state.clip_count)) == (1, 1)
    assert float(state.clip_factor["a"]) == 0
    result, state = run(clippy(on_nonfinite="propagate"), updates, weights)
    assert np.isnan(result["a"]).all()
    np.testing.assert_allclose(result["b"], [0.4], rtol=1e-6)


def test_weights_that_are_not_finite_zero_their_array():
    result, state = run(clippy(), [1.0, 1.0], [np.nan, 1.0])
    np.testing.assert_array_equal(result, [0, 0])
    assert int(state.nonfinite_count) == 1


def test_complex_elements_count_by_modulus_and_keep_their_phase():
    result, _ = run(clippy(0.1, absolute=0.0), [3 + 4j, 0.1j], [10 + 0j, 10j])
    np.testing.assert_allclose(result, [0.6 + 0.8j, 0.02j], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_dtypes_come_back_as_they_are(dtype):
    weights = jnp.array([4.0, 1.0], dtype)
    result, _ = run(clippy(0.125, absolute=0.0), jnp.array([2.0, 0.125], dtype), weights)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.astype(jnp.float32), [0.5, 0.03125])


def test_in_float64_under_x64(x64):
    result, state = run(clippy(0.1, absolute=0.0), [1e200], [1e-200])
    np.testing.assert_allclose(result, [1e-201], rtol=1e-12)
    assert state.clip_factor.dtype == jnp.float64


def test_no_threshold_is_the_identity():
    updates = np.float32([1e38, 1.0, 0.0])
    for clip in (clippy(None), clippy(0.1, absolute=None)):
        result, state = run(clip, updates, [0.0, 1.0, 0.0])
        np.testing.assert_array_equal(result, updates)
        assert int(state.clip_count) == 0


def test_leaves_without_an_update_are_passed_over():
    """Frozen parameters have None for an update, as in Equinox."""
    weights = {"a": jnp.array([4.0]), "frozen": jnp.zeros(2), "step": jnp.arange(2)}
    clip = clippy(0.1, absolute=0.02)
    updates = {"a": jnp.array([2.0]), "frozen": None, "step": jnp.arange(2)}
    state = clip.init({**weights, "frozen": None})
    result, _ = clip.update(updates, state, weights)
    np.testing.assert_allclose(result["a"], [0.42], rtol=1e-6)
    assert result["frozen"] is None
    assert result["step"] is updates["step"]


def test_behind_an_optimizer_it_bounds_the_step_itself():
    optimizer = optax.chain(optax.adagrad(10.0), clippy(0.1, absolute=1e-3))
    weights = jnp.array([1.0, -2.0])
    updates, state = optimizer.update(weights, optimizer.init(weights), weights)
    assert np.all(np.abs(updates) <= 0.1 * np.abs(weights) + 1e-3 + 1e-7)
    assert float(gradclip_jax.metrics(state)["clipped"]) == 1


def test_thresholds_may_be_schedules_and_injected(standard_promotion):
    clip = clippy(optax.linear_schedule(0.1, 0.2, 1), absolute=0.0)
    weights, updates = jnp.array([4.0]), jnp.array([2.0])
    state = clip.init(weights)
    for expected in (0.4, 0.8):
        result, state = clip.update(updates, state, weights)
        np.testing.assert_allclose(result, [expected], rtol=1e-6)
    injected = optax.inject_hyperparams(clippy)()
    result, state = jax.jit(injected.update)(updates, injected.init(weights), weights)
    np.testing.assert_allclose(result, [0.4], rtol=1e-6)
    assert set(state.hyperparams) == {"relative", "absolute"}


def test_derivatives_are_finite_and_at_zero_the_identity():
    clip = clippy(0.1, absolute=0.0)
    weights = jnp.array([1.0, 0.0])

    def result(updates):
        return clip.update(updates, clip.init(weights), weights)[0]

    jacobian = jax.jit(jax.jacrev(result))
    np.testing.assert_array_equal(jacobian(jnp.zeros(2)), np.eye(2))
    for updates in ([1.0, 0.0], [1.0, 1.0], [3e38, 0.0], [np.nan, 1.0]):
        assert np.isfinite(jacobian(jnp.array(updates))).all()
    assert not jacobian(jnp.array([np.nan, 1.0])).any()


@pytest.mark.parametrize("specs", [(P("data"), P()), (P(), P("data"))])
def test_weights_split_otherwise_than_updates_leave_the_type_of_these(specs):
    mesh = make_mesh(AxisType.Explicit, data=8)
    clip = clippy(0.1, absolute=0.0)
    values = jnp.arange(1.0, 9.0)
    expected, _ = run(clip, values[::-1], values)
    updates, weights = (
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((values[::-1], values), specs, strict=True)
    )
    with jax.set_mesh(mesh):
        result, _ = jax.jit(clip.update)(updates, clip.init(weights), weights)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert jax.typeof(result) == jax.typeof(updates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relative": -0.1}, r"^`relative` must be non-negative, got -0\.1\.$"),
        ({"absolute": -1.0}, r"^`absolute` must be non-negative, got -1\.0\.$"),
        ({"relative": np.nan}, "`relative` must be a non-negative number"),
        ({"absolute": True}, "`absolute` must be a non-negative number"),
        ({"on_nonfinite": "skip"}, "`on_nonfinite` must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        clippy(**arguments)


def test_without_params_it_says_what_to_call():
    clip = clippy()
    with pytest.raises(
        ValueError, match=r"`clippy` compares updates with parameters: call `update"
    ):
        clip.update(jnp.ones(2), clip.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="`params` must have the structure of the updates"):
        clip.update({"a": jnp.ones(2)}, clip.init({"a": jnp.ones(2)}), {"b": jnp.ones(2)})
