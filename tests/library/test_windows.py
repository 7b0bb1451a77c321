"""Limits that remember a window of norms: percentiles, the median and the MAD, deviations."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, through_orbax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import gradclip_jax
from gradclip_jax import clip_to_limit
from gradclip_jax._limits import minimum, update_finite
from gradclip_jax._limits.deviation import deviation
from gradclip_jax._limits.median import median
from gradclip_jax._limits.percentile import percentile
from gradclip_jax._limits.window import is_full, new_window, percentile_of, push
from gradclip_jax._strategies.autoclip import _percentile_so_far, autoclip

GOLDEN = [1.0, 1.2, 0.8, 1.1, 10.0, 0.9, 1.0, 50.0, 1.3, 0.7]
INF = np.inf


def so_far(p: float = 10.0, *, window: int = 1000) -> gradclip_jax.Limit:
    return _percentile_so_far(p, window)


def stream(length=300, seed=0):
    """Norms about 1, with a spike in one step of twenty."""
    random = np.random.default_rng(seed)
    norms = np.exp(0.3 * random.standard_normal(length))
    return np.where(random.random(length) < 0.05, 50 * norms, norms)


@functools.partial(jax.jit, static_argnums=0)
def scanned(limit, norms, state):
    def step(state, norm):
        value, state = update_finite(limit, norm, state)
        return state, value

    state, values = jax.lax.scan(step, state, norms)
    return values, state


def run(limit, norms, state=None, dtype=jnp.float32):
    """Limits of all steps, and the last state."""
    norms = jnp.asarray(norms, dtype)
    state = limit.init(jnp.zeros(norms.shape[1:], dtype)) if state is None else state
    return scanned(limit, norms, state)


def run_by_twenties(limit, norms, state=None):
    """The same, in a program that is compiled once for tests of any length."""
    values = []
    for twenty in np.split(np.asarray(norms), len(norms) // 20):
        value, state = run(limit, twenty, state)
        values.append(value)
    return np.concatenate(values), state


# The equations, in NumPy


def past_percentile_in_numpy(p, window, norms):
    return [
        np.percentile(norms[t - window : t], p) if t >= window else INF for t in range(len(norms))
    ]


def percentile_so_far_in_numpy(p, window, norms):
    return [np.percentile(norms[max(0, t + 1 - window) : t + 1], p) for t in range(len(norms))]


def median_in_numpy(k, window, norms):
    limits = []
    for t in range(len(norms)):
        past = norms[max(0, t - window) : t]
        middle = np.median(past) if t >= window else INF
        mad = np.median(np.abs(past - middle)) if t >= window else 0
        limits.append(middle + k * max(1.4826 * mad, 1e-3 * middle))
    return limits


def deviation_in_numpy(k, window, norms):
    """At half of the window there is a limit, this norm included."""
    limits = []
    for t in range(len(norms)):
        past = norms[max(0, t - window) : t].astype(np.float64)
        known = len(past) + 1 >= window // 2
        limits.append(past.mean() + k * past.std(ddof=1) if known else INF)
    return limits


def of_half_a_window(k, *, window):
    return deviation(k, window=window, min_count=window // 2)


LIMITS = {
    "deviation": (of_half_a_window, deviation_in_numpy, 6.0, 8),
    "percentile": (percentile, past_percentile_in_numpy, 95.0, 100),
    "percentile of one": (percentile, past_percentile_in_numpy, 95.0, 1),
    "so_far": (so_far, percentile_so_far_in_numpy, 99.9, 100),
    "median": (median, median_in_numpy, 5.0, 7),
}
each_limit = pytest.mark.parametrize("name", LIMITS)
MADE = {
    "percentile": percentile(window=10),
    "so_far": so_far(window=10),
    "median": median(window=10),
    "deviation": deviation(window=10, min_count=10),
}
each_made = pytest.mark.parametrize("limit", MADE.values(), ids=MADE)
ALL = minimum(percentile(60, window=2), minimum(median(1.0, window=2), so_far(40, window=3)))
each_maker = pytest.mark.parametrize("make", [autoclip, percentile, median])


@each_limit
def test_limits_are_those_of_the_equations(name):
    make, in_numpy, threshold, window = LIMITS[name]
    values, _ = run(make(threshold, window=window), stream())
    np.testing.assert_allclose(values, in_numpy(threshold, window, stream()), rtol=1e-5)


@pytest.mark.parametrize("name", ["so_far", "median"])
def test_limits_are_those_of_the_equations_in_float64(name, x64):
    make, in_numpy, threshold, window = LIMITS[name]
    values, state = run(make(threshold, window=window), stream(), dtype=jnp.float64)
    assert values.dtype == state.dtype == jnp.float64
    np.testing.assert_allclose(values, in_numpy(threshold, window, stream()), rtol=1e-13)


# Traces of the published programs


def test_autoclip_follows_the_trace_of_its_authors():
    """At the 10th and the 90th percentile; theirs divides by the norm + 1e-6."""
    seen = jax.vmap(lambda p: history_of(autoclip(p), GOLDEN))(jnp.array([10.0, 90.0]))
    limits = [
        [1.0, 1.02, 0.84, 0.86, 0.88, 0.85, 0.86, 0.87, 0.88, 0.79],
        [1.0, 1.18, 1.16, 1.17, 6.48, 5.6, 4.72, 22.0, 18.0, 14.0],
    ]
    factors = [
        [1, 0.849999, 1, 0.781817, 0.088, 0.944443, 0.859999, 0.0174, 0.676923, 1],
        [1, 0.983333, 1, 1, 0.648, 1, 1, 0.44, 1, 1],
    ]
    np.testing.assert_allclose(seen["clip_limit"], limits, rtol=1e-5)
    np.testing.assert_allclose(seen["clip_factor"], factors, rtol=1e-5)


def test_a_percentile_follows_the_trace_of_trellis():
    seen = history_of(clip_to_limit(percentile(95, window=4)), GOLDEN)
    limits = [INF, INF, INF, INF, 1.185, 8.68, 8.665, 8.665, 44.0, 42.695]
    np.testing.assert_allclose(seen["clip_limit"], limits, rtol=1e-5)
    factors = [1, 1, 1, 1, 0.1185, 1, 1, 0.1733, 1, 1]
    np.testing.assert_allclose(seen["clip_factor"], factors, rtol=1e-5)


def test_a_median_of_numbers_to_check_by_hand():
    """Of 1, 1.2, 0.8, 1.1 the median is 1.05, and the distances are 0.05, 0.05, 0.15, 0.25."""
    seen = history_of(clip_to_limit(median(5, window=4)), GOLDEN[:5])
    np.testing.assert_allclose(seen["clip_limit"][:4], INF)
    np.testing.assert_allclose(seen["clip_limit"][4], 1.05 + 5 * 1.4826 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(seen["clip_factor"][4], 0.17913, rtol=1e-5)


def olmo_skips(values, interval=128, sigma=6):
    """Of a stream of losses or norms, those that the rule of OLMo-core takes for spikes."""
    seen, skips = [], []
    for value in values:
        seen = [*seen, value][-(interval + 1) :]
        past = seen[:-1]
        decides = len(seen) >= max(2, interval // 2)
        skips.append(decides and value - np.mean(past) > sigma * np.std(past, ddof=1))
    return skips


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [3, 6])
def test_deviation_decides_as_olmo_core_does(seed, sigma):
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(sigma=0.3, size=200)
    norms[rng.integers(70, 200, 8)] *= 30  # spikes, of which some follow each other
    limits, _ = run(deviation(sigma), norms)
    expected = olmo_skips(norms, sigma=sigma)
    np.testing.assert_array_equal(norms.astype(np.float32) > limits, expected)
    assert 0 < sum(expected) < 20


def test_a_constant_stream_is_never_a_spike_to_deviation_and_a_nan_does_not_enter():
    """Of a constant stream OLMo-core skips every norm that rounding raises."""
    norms = [0.1] * 10 + [np.nan] * 3 + [0.1] * 10 + [0.2]
    limits, _ = run(deviation(window=8, min_count=4), norms)
    assert (limits[:3] == INF).all()
    np.testing.assert_allclose(limits[3:], 0.1006, rtol=1e-5)


def test_squares_of_deviations_do_not_overflow():
    limits, _ = run(deviation(2.0, window=4, min_count=3), [1e30, 3e30, 0.0])
    np.testing.assert_allclose(limits[2], 2e30 + 2 * np.sqrt(2) * 1e30, rtol=1e-6)


@pytest.mark.parametrize("bad", [0, 1, 2.5, True, None])
def test_no_count_that_may_not_be(bad):
    with pytest.raises(ValueError, match=r"^`min_count` must be a whole number of at least 2, got"):
        deviation(min_count=bad)
    with pytest.raises(ValueError, match=r"^`window` must be at least `min_count`, got 32 and 64"):
        deviation(window=32)


def history_of(clip, norms):
    """Limit and factor after each of these norms, as `metrics` tells them."""

    def step(state, norm):
        state = clip.update(norm, state)[1]
        seen = gradclip_jax.metrics(state)
        return state, {key: seen[key] for key in ("clip_limit", "clip_factor")}

    return jax.lax.scan(step, clip.init(jnp.zeros(())), jnp.asarray(norms, jnp.float32))[1]


# Percentiles


compiled_percentile = jax.jit(percentile_of)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_percentiles_are_those_of_numpy(count):
    values = np.random.default_rng(count).random((8, 3)).astype(np.float32)
    values[count:] = INF
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(values))
    for p in (0.0, 10.0, 37.5, 50.0, 100.0):
        result = compiled_percentile(shuffled, p)
        np.testing.assert_allclose(result, np.percentile(values[:count], p, axis=0), rtol=1e-6)


def test_each_norm_has_a_number_of_values_of_its_own():
    values = jnp.array([[1.0, 4.0, INF], [INF, 2.0, INF], [3.0, 9.0, INF]])
    np.testing.assert_array_equal(compiled_percentile(values, 50.0), [2.0, 4.0, 0.0])


@pytest.mark.parametrize(("p", "expected"), [(-3.0, 1.0), (np.nan, 1.0), (500.0, 9.0)])
def test_a_traced_percentile_out_of_range_counts_as_the_nearest(p, expected):
    assert float(compiled_percentile(jnp.array([1.0, 9.0]), p)) == expected


def test_a_percentile_is_never_above_its_neighbour():
    """In float32, 0.3 + (0.7 - 0.3) would be above 0.7 if it were not held below."""
    values = jnp.asarray(np.random.default_rng(0).random((2, 1000)), jnp.float32)
    for p in (50.0, 99.9999, 100.0):
        result = compiled_percentile(values, p)
        assert bool(jnp.all((values.min(0) <= result) & (result <= values.max(0))))


def test_the_newest_norm_is_first_and_the_oldest_leaves():
    norms = new_window(jnp.zeros(()), 3)
    for norm in (1.0, 2.0, 3.0, 4.0):
        assert bool(is_full(norms)) == (norm > 3)
        norms = push(norms, jnp.float32(norm))
    np.testing.assert_array_equal(norms, [4.0, 3.0, 2.0])


# What every limit obeys


@each_made
def test_a_constant_stream_never_fires(limit):
    for norms in ([1e-3, 0.1, 1.0, 1e4], [1e20, 1e-30, 0.0, 3e38]):
        norms = np.float32(norms)
        values, _ = run_by_twenties(limit, np.tile(norms, (40, 1)))
        assert np.all(norms <= values)


def test_rounding_is_no_outlier_to_the_median():
    """Where all norms are 0.1 the limit is 0.1005, so that 0.1000001 is no spike."""
    values, _ = run_by_twenties(MADE["median"], np.full((40, 4), 0.1))
    np.testing.assert_allclose(values[10:], 0.1005, rtol=1e-6)


@each_made
def test_what_is_not_finite_leaves_the_window_as_it_was(limit):
    """AutoClip of its authors is NaN for ever after one."""
    norms = np.tile(stream(40)[:, None], 4)
    bad = np.insert(norms, [25] * 20, [np.nan, np.inf, -np.inf, np.nan], axis=0)
    expected, last = run_by_twenties(limit, norms)
    values, state = run_by_twenties(limit, bad)
    np.testing.assert_array_equal(np.delete(values, range(25, 45), axis=0), expected)
    np.testing.assert_array_equal(state, last)
    assert not np.isnan(values).any()


@each_made
def test_a_run_may_begin_with_what_is_not_finite(limit):
    values, state = run_by_twenties(limit, np.tile([np.nan, np.inf, 1.0, 2.0], (20, 1)))
    assert not np.isnan(values).any()
    assert not np.isfinite(state[:, :2]).any()
    np.testing.assert_array_equal(state[:, 2:], np.tile([1.0, 2.0], (10, 1)))


@each_made
def test_a_scan_is_the_loop(limit):
    norms = jnp.asarray(stream(80).reshape(20, 4), jnp.float32)
    values, last = run_by_twenties(limit, norms)
    update = jax.jit(limit.update)
    state = limit.init(norms[0] * 0)
    for norm, expected in zip(norms, values, strict=True):
        value, state = update(norm, state)
        np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(state, last)


@each_made
def test_an_array_of_norms_is_as_many_scalars(limit):
    norms = np.stack([stream(40, seed) for seed in range(4)], axis=1)
    norms[7, 1] = np.nan
    together, _ = run_by_twenties(limit, norms)
    alone = [run_by_twenties(limit, norms[:, i])[0] for i in range(4)]
    np.testing.assert_array_equal(together, np.stack(alone, axis=1))


def test_an_axis_of_no_norms_is_fine():
    values, state = run(ALL, np.zeros((5, 2, 0)))
    assert values.shape == (5, 2, 0)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(2, 2, 0), (2, 2, 0), (3, 2, 0)]


@each_made
def test_saved_and_restored_it_goes_on_bit_for_bit(limit):
    norms = np.tile(stream(40)[:, None], 4)
    norms[5:, 0] = np.nan  # beside windows that are full one that never will be
    expected, last = run(limit, norms)
    _, state = run_by_twenties(limit, norms[:20])
    leaves, treedef = jax.tree.flatten(state)
    restored = treedef.unflatten([jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    values, state = run_by_twenties(limit, norms[20:], restored)
    np.testing.assert_array_equal(values, expected[20:])
    np.testing.assert_array_equal(state, last)


def test_a_window_goes_through_orbax(tmp_path):
    clip = gradclip_jax.clip_to_limit(ALL, measure=gradclip_jax.leaf_norms)
    grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.nan])}
    _, state = jax.jit(clip.update)(grads, clip.init(grads))
    restored = through_orbax(state, clip.init(grads), tmp_path)
    chex.assert_trees_all_equal(restored, state)


@each_made
def test_the_state_is_one_array_that_keeps_shape_dtype_and_strength(limit):
    state = limit.init(jnp.zeros((2, 3)))
    value, new = jax.eval_shape(limit.update, jnp.ones((2, 3)), state)
    kept = jax.eval_shape(limit.init, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    for one in (new, kept):
        assert (one.shape, one.dtype, one.weak_type) == ((10, 2, 3), state.dtype, False)
    assert not state.weak_type
    assert (value.shape, value.dtype, value.weak_type) == ((2, 3), jnp.float32, False)


# How they recover


def test_six_spikes_in_128_leave_the_95th_percentile_and_a_rise_passes_from_its_ninth_step():
    values, _ = run(percentile(), [1.0] * 128 + [10.0] * 10)
    np.testing.assert_allclose(values[128 : 128 + 7], 1.0)
    np.testing.assert_allclose(values[128 + 7], 1 + 0.65 * 9, rtol=1e-5)
    np.testing.assert_allclose(values[128 + 8 :], 10.0)


def test_half_of_a_window_of_spikes_leaves_the_median_and_a_rise_passes_from_its_65th_step():
    values, _ = run(median(), [1.0] * 128 + [10.0] * 70)
    np.testing.assert_allclose(values[128 : 128 + 64], 1.005, rtol=1e-6)
    np.testing.assert_allclose(values[128 + 64], 5.5 + 5 * 1.4826 * 4.5, rtol=1e-6)
    np.testing.assert_allclose(values[128 + 65 :], 10.05, rtol=1e-6)


def test_autoclip_follows_a_rise_in_900_steps_and_a_fall_in_100():
    values, _ = run(so_far(), [10.0] * 1000 + [100.0] * 910)
    assert values[1000 + 895] == 10.0
    assert values[1000 + 905] == 100.0
    values, _ = run(so_far(), [10.0] * 1000 + [1.0] * 110)
    assert values[1000 + 95] == 10.0
    assert values[1000 + 105] == 1.0


def test_the_median_moves_by_raw_norms_and_not_by_its_own_limit():
    """A median of norms as clipped drifts down: each step is below the one before."""
    values, _ = run(median(0.0, window=8), stream(300))
    assert np.mean(values[250:]) > 0.8


def test_norms_near_the_largest_number_leave_the_window_again():
    values, _ = run(minimum(median(window=4), 1e30), [1.0] * 4 + [3e38] * 5 + [1.0] * 8)
    assert not np.isnan(values).any()
    np.testing.assert_allclose(values[-1], 1.005, rtol=1e-6)


# As transformations


@each_maker
def test_no_threshold_that_may_not_be(make):
    name = "k" if make is median else "percentile"
    rule = {"k": "be a finite number of at least 0", "percentile": "lie between 0 and 100"}[name]
    wrong = [-1, INF, np.nan, True, "5", None, jnp.ones(2), jnp.array(True), jnp.array(-1.0)]
    for bad in wrong + ([] if name == "k" else [100.5]):
        with pytest.raises(ValueError, match=f"^`{name}` must {rule}, got "):
            make(bad)


@each_maker
@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None, "3"])
def test_no_window_that_may_not_be(make, bad):
    with pytest.raises(ValueError, match=r"^`window` must be a whole number of at least 1, got "):
        make(window=bad)
    with pytest.raises(ValueError, match=r"name it in `static_args` of `inject_hyperparams`"):
        make(window=jnp.array(3))


@each_maker
def test_defaults_are_those_documented(make):
    expected = {autoclip: (10.0, 1000), percentile: (95.0, 128), median: (5.0, 128)}[make]
    values = inspect.signature(inspect.unwrap(make)).parameters.values()
    assert [value.default for value in values][:2] == list(expected)


def clip_by_median(k, *, window):
    return clip_to_limit(median(k, window=window))


@pytest.mark.parametrize("make", [autoclip, clip_by_median])
def test_the_threshold_may_be_injected_as_a_schedule(make, standard_promotion):
    name = "k" if make is clip_by_median else "percentile"
    schedule = {name: optax.linear_schedule(0.0, 50.0, 5)}
    clip = optax.inject_hyperparams(make, static_args="window")(**schedule, window=2)
    updates, update = jnp.array([3.0, 4.0]), jax.jit(clip.update)
    state = clip.init(updates)
    for step in range(4):
        updates, state = update(jnp.array([3.0, 4.0]) * (1 + step), state)
    assert float(gradclip_jax.metrics(state)["clip_limit"]) > 5
    assert np.isfinite(updates).all()


def test_it_is_traced_once_and_its_state_can_be_donated():
    clip = gradclip_jax.clip_to_limit(ALL, measure=gradclip_jax.leaf_norms)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(updates, state):
        traces.append(1)
        return clip.update(updates, state)

    state = clip.init({"w": jnp.zeros(2), "b": jnp.zeros(2)})
    for step in range(5):
        _, state = update({"w": jnp.ones(2) * step, "b": jnp.ones(2)}, state)
    assert len(traces) == 1
    assert int(state.step_count) == 5


def test_the_gradient_of_a_clipped_zero_is_the_identity():
    clip = gradclip_jax.clip_to_limit(ALL)
    state = clip.init(jnp.zeros(2))
    jacobian = jax.jit(jax.jacobian(lambda x: clip.update(x, state)[0]))(jnp.zeros(2))
    np.testing.assert_array_equal(jacobian, np.eye(2))


def clipped(clip, grads):
    update, state, updates = jax.jit(clip.update), clip.init(grads[0]), None
    for grad in grads:
        updates, state = update(grad, state)
    assert float(state.clip_count) > 0
    return updates, state.limit_state


def test_windows_of_units_are_split_as_the_units_are():
    """One window for each of eight units that lie on eight devices."""
    clip = gradclip_jax.clip_to_limit(ALL, measure=gradclip_jax.unit_norms)
    grads = [jnp.arange(16.0).reshape(2, 8) * scale for scale in (1.0, 2.0, 1.5, 9.0)]
    expected = clipped(clip, grads)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = make_mesh(kind, data=8)
        with jax.set_mesh(mesh):
            split = [jax.device_put(grad, NamedSharding(mesh, P(None, "data"))) for grad in grads]
            result = clipped(clip, split)
        assert result[0].sharding.spec == P(None, "data")
        assert all(leaf.sharding.spec[-1] == "data" for leaf in jax.tree.leaves(result[1]))
        chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_inside_shard_map_the_limit_is_that_of_the_whole_gradient(mesh):
    clip = gradclip_jax.clip_to_limit(ALL)
    grads = [jnp.arange(16.0) * scale for scale in (1.0, 2.0, 1.5, 9.0)]

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P(None, "data"), out_specs=(P("data"), P()))
    def steps(stacked):
        state = clip.init(stacked[0])
        state, updates = jax.lax.scan(lambda s, g: clip.update(g, s)[::-1], state, stacked)
        return updates[-1], state.limit_state

    result = steps(jnp.stack(grads))
    chex.assert_trees_all_close(result, clipped(clip, grads), rtol=1e-6)


def test_autoclip_is_invariant_to_the_scale_of_the_loss():
    """Seetharaman et al. 2020: SGD with steps that are normalised by the limit."""
    params = trained(autoclip(10.0))
    np.testing.assert_allclose(params, np.tile(params[2], (5, 1)), rtol=1e-4)


def test_a_fixed_limit_is_not_invariant_to_the_scale_of_the_loss():
    params = trained(gradclip_jax.clip_by_global_norm(1.0))
    assert not np.allclose(params[0], params[2], rtol=0.1)


def trained(clip):
    """Params after 60 steps of a noisy least squares, for five scales of its loss."""
    random = np.random.default_rng(0)
    batches = random.standard_normal((60, 8, 3)) * random.gamma(1, 1, (60, 1, 1))

    def loss(params, batch, scale):
        return scale * jnp.mean((batch @ (params - jnp.array([1.0, -2.0, 3.0]))) ** 2)

    def params_at(scale):
        def step(carry, batch):
            params, state = carry
            updates, state = clip.update(jax.grad(loss)(params, batch, scale), state)
            return (params - 0.1 * updates / state.clip_limit, state), None

        start = jnp.zeros(3), clip.init(jnp.zeros(3))
        return jax.lax.scan(step, start, jnp.asarray(batches, jnp.float32))[0][0]

    return jax.jit(jax.vmap(params_at))(jnp.array([1e-5, 1e-2, 1.0, 1e2, 1e5]))
