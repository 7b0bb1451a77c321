"""Limits with a short memory: quantile, z-score, moving average and growth, and their clips."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, through_orbax
from jax.sharding import PartitionSpec as P

import gradclip_jax
from gradclip_jax import clip_to_limit
from gradclip_jax._devices import varying_axes
from gradclip_jax._limits import Limit, update_finite
from gradclip_jax._limits.ema import ema
from gradclip_jax._limits.growth import growth
from gradclip_jax._limits.running_quantile import running_quantile
from gradclip_jax._limits.zscore import zscore
from gradclip_jax._strategies.limit_norm_growth import limit_norm_growth
from gradclip_jax._strategies.zclip import zclip

N = [1.0, 1.2, 0.8, 1.1, 10.0, 0.9, 1.0, 50.0, 1.3, 0.7]
dual_ema = functools.partial(ema, 0.0, ratio=2.0, target=(1.1, 0.9), warmup_steps=1)
LIMITS = {
    "quantile": running_quantile(),
    "zscore": zscore(),
    "ema": ema(),
    "dual": dual_ema(),
    "growth": growth(),
}
all_limits = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
names = [name for name in LIMITS if name != "quantile"]
do_not_hunt = pytest.mark.parametrize("limit", [LIMITS[name] for name in names], ids=names)


def stream(length: int = 300) -> np.ndarray:
    """Noise of 10 % around a slow wave, and every 23rd norm a spike."""
    rng = np.random.default_rng(0)
    norms = (1 + 0.3 * np.sin(np.arange(length) / 40)) * (1 + 0.1 * rng.standard_normal(length))
    norms[22::23] *= rng.uniform(2, 60, norms[22::23].shape)
    return norms


def scanned(limit: Limit, norms, state=None, dtype=jnp.float32):
    """Limits, the states after each norm, and the last of them."""
    norms = jnp.asarray(norms, dtype)
    state = limit.init(jnp.zeros_like(norms[0])) if state is None else state
    state, (values, states) = scan(limit, state, norms)
    return np.asarray(values), states, state


# Compiled once for each limit and shape, so streams here have few lengths.
@functools.partial(jax.jit, static_argnums=0)
def scan(limit, state, norms):
    def step(state, norm):
        value, state = update_finite(limit, norm, state)
        return state, (value, state)

    return jax.lax.scan(step, state, norms)


def factors(limits, norms):
    return np.minimum(1, limits / np.asarray(norms))


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def numpy_quantile(norms, q=0.5, eta=0.2):
    limit = 1.0
    for n in norms:
        yield limit
        limit *= np.exp(-eta * (float(n <= limit) - q))


def numpy_zscore(norms, z_max=2.5, alpha=0.97, warmup=25):
    """The authors' code: `adaptive_scaling`, without its cap and its 1e-6."""
    mean, var = np.mean(norms[:warmup]), np.var(norms[:warmup])
    for t, n in enumerate(norms):
        if t < warmup:
            yield np.inf
            continue
        z = (n - mean) / np.sqrt(var)
        limit = mean + z_max * np.sqrt(var) / (z / z_max) if z > z_max else None
        yield mean + z_max * np.sqrt(var) if limit is None else limit
        x = n if limit is None else limit
        mean = alpha * mean + (1 - alpha) * x
        var = alpha * var + (1 - alpha) * (x - mean) ** 2


def numpy_ema(norms, k=3.0, beta=0.99, warmup=25):
    """Moving averages of x and of its square, with the usual bias correction."""
    first = second = 0.0
    for t, n in enumerate(norms):
        correction = 1 - beta**t
        mean = first / correction if t else 0.0
        limit = mean + k * np.sqrt(second / correction - mean**2) if t >= warmup else np.inf
        yield limit
        x = min(n, limit)
        first, second = beta * first + (1 - beta) * x, beta * second + (1 - beta) * x**2


def numpy_dual(norms):
    """EmaGradClip: above twice one average, a norm goes to 1.1 times another."""
    fast = slow = 0.0
    for t, n in enumerate(norms):
        trigger = 2 * slow / (1 - 0.99**t) if t else np.inf
        limit = 1.1 * fast / (1 - 0.9**t) if n > trigger else trigger
        yield limit
        x = min(n, limit)
        fast, slow = 0.9 * fast + 0.1 * x, 0.99 * slow + 0.01 * x


def numpy_growth(norms, gamma=1.01):
    previous = None
    for n in norms:
        y = n if previous is None else n / (max(n / previous, gamma) / gamma)
        yield np.inf if previous is None else gamma * previous
        previous = y


EQUATIONS = [numpy_quantile, numpy_zscore, numpy_ema, numpy_dual, numpy_growth]
with_equations = pytest.mark.parametrize(
    ("limit", "equation"), list(zip(LIMITS.values(), EQUATIONS, strict=True)), ids=LIMITS
)


@with_equations
def test_a_seeded_stream_gives_what_the_equations_give(limit, equation):
    limits, _, _ = scanned(limit, stream())
    np.testing.assert_allclose(limits, list(equation(stream())), rtol=2e-5)


@with_equations
def test_float64_norms_are_computed_in_float64(limit, equation, x64):
    limits, _, _ = scanned(limit, stream(), dtype=jnp.float64)
    assert limits.dtype == np.float64
    np.testing.assert_allclose(limits, list(equation(stream())), rtol=1e-12)


def test_golden_trace_of_the_geometric_quantile():
    limits, _, _ = scanned(LIMITS["quantile"], N)
    used = [1.0, 0.904837, 1.0, 0.904837, 1.0, 1.105171, 1.0, 0.904837, 1.0, 1.105171]
    scale = [1, 0.754031, 1, 0.822579, 0.1, 1, 1, 0.018097, 0.769231, 1]
    np.testing.assert_allclose(limits, used, rtol=1e-5)
    np.testing.assert_allclose(factors(limits, N), scale, rtol=3e-5)


def test_golden_trace_of_zclip():
    warmup = 1 + 0.1 * np.sin(np.arange(25))
    norms = [1.05, 0.9, 8, 1, 1.2, 30, 1]
    limits, states, _ = scanned(LIMITS["zscore"], [*warmup, *norms])
    assert np.all(limits[:25] == np.inf)
    np.testing.assert_allclose(limits[[27, 29, 30]], [1.003267, 1.147393, 1.004492], rtol=1e-5)
    assert np.all(limits[[25, 26, 28, 31]] > np.array(norms)[[0, 1, 3, 6]])
    mean = [1.001788, 0.998734, 0.99887, 0.998904, 1.003359, 1.003393, 1.003291]
    var = [0.00493259, 0.00507707, 0.00492533, 0.00477761, 0.00525666, 0.00509899, 0.00494635]
    np.testing.assert_allclose(states.mean[25:], mean, rtol=1e-5)
    np.testing.assert_allclose(states.deviation[25:] ** 2, var, rtol=1e-5)


def test_golden_trace_of_pde_transformer():
    limits, states, _ = scanned(LIMITS["dual"], N)
    scale = [1, 1, 1, 1, 0.112623, 1, 1, 0.022304, 1, 1]
    fast = [1, 1.105263, 0.99262, 1.023844, 1.048846, 1.017079, 1.013805, 1.031606, 1.07542]
    slow = [1, 1.100503, 0.999327, 1.024876, 1.045556, 1.020683, 1.017638, 1.030265, 1.061454]
    np.testing.assert_allclose(factors(limits, N), scale, rtol=3e-5)
    np.testing.assert_allclose(states.target.mean, [*fast, 1.01778], rtol=1e-5)
    np.testing.assert_allclose(states.average.mean, [*slow, 1.023652], rtol=1e-5)


def test_golden_trace_of_the_norm_growth_limiter():
    limits, states, _ = scanned(LIMITS["growth"], N)
    scale = [1, 0.841667, 1, 0.734545, 0.081608, 0.915823, 0.832483, 0.016816, 0.653243, 1]
    passed = [1, 1.01, 0.8, 0.808, 0.81608, 0.824241, 0.832483, 0.840808, 0.849216, 0.7]
    np.testing.assert_allclose(factors(limits, N), scale, rtol=3e-5)
    np.testing.assert_allclose(states.norm, passed, rtol=1e-5)


@all_limits
def test_scan_is_the_loop(limit):
    norms = stream()
    values, _, last = scanned(limit, norms)
    state = limit.init(jnp.zeros(()))
    update = jax.jit(functools.partial(update_finite, limit))
    for norm, expected in zip(norms, values, strict=True):
        value, state = update(jnp.float32(norm), state)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state, last)


@all_limits
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("when", [0, 10, 100])
def test_what_is_not_finite_leaves_the_statistics_bit_for_bit(limit, bad, when):
    norms = stream(299)
    values, _, state = scanned(limit, norms)
    broken, _, after = scanned(limit, np.insert(norms, when, bad))
    assert same_bits(state, after)
    np.testing.assert_array_equal(np.delete(broken, when), values)


@all_limits
def test_an_array_of_norms_is_as_many_scalars(limit):
    norms = np.stack([stream(), 1e3 * stream()[::-1], np.full(300, 7.0)], axis=1)
    norms[30, 1] = np.nan
    values, _, state = scanned(limit, norms)
    for i in range(3):
        alone, _, alone_state = scanned(limit, norms[:, i])
        np.testing.assert_allclose(values[:, i], alone, rtol=1e-5)
        part = jax.tree.map(lambda x, i=i: x[i], state)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), part, alone_state)


@all_limits
def test_saved_and_restored_a_run_continues_bit_for_bit(limit):
    norms = stream()
    values, _, last = scanned(limit, norms)
    _, _, middle = scanned(limit, norms[:150])
    saved, tree = jax.tree.flatten(jax.tree.map(np.asarray, middle))
    restored = tree.unflatten([jnp.asarray(x) for x in saved])
    rest, _, end = scanned(limit, norms[150:], restored)
    np.testing.assert_array_equal(rest, values[150:])
    assert same_bits(end, last)


@all_limits
def test_state_keeps_shapes_dtypes_and_no_array_twice(limit):
    state = limit.init(jnp.zeros((2, 3)))
    types = jax.tree.map(jax.typeof, state)
    assert all(x.shape == (2, 3) and not x.weak_type for x in jax.tree.leaves(state))
    _, new = jax.jit(limit.update, donate_argnums=1)(jnp.ones((2, 3)), state)
    assert jax.tree.map(jax.typeof, new) == types


@all_limits
def test_states_vary_over_devices_as_the_norms_do(limit):
    @jax.jit
    @functools.partial(jax.shard_map, mesh=make_mesh(data=8), in_specs=P("data"), out_specs=P())
    def run(norms):
        def step(state, _):
            value, state = update_finite(limit, norms, state)
            return state, value

        state, values = jax.lax.scan(step, limit.init(norms * 0), length=3)
        assert all(varying_axes(x) == {"data"} for x in jax.tree.leaves(state))
        return jax.lax.pmax(values[-1].max(), "data")

    values, _, _ = scanned(limit, np.full(3, 8.0))
    np.testing.assert_allclose(run(jnp.arange(1.0, 9.0)), values[-1], rtol=1e-6)


@do_not_hunt
@pytest.mark.parametrize("norm", [1e-30, 1e-3, 0.1, 1.0, 1 / 3, 1e4, 1e20, 1e37])
def test_a_constant_stream_never_fires(limit, norm):
    """As ZClip does where sigma is only 1e-6, and the deadlock of axlearn where it is 0."""
    limits, _, _ = scanned(limit, np.full(300, norm))
    assert np.all(np.float32(norm) <= limits)


@do_not_hunt
def test_a_stream_constant_up_to_rounding_never_fires(limit):
    norms = np.tile(np.float32([0.1, np.nextafter(np.float32(0.1), 1)]), 150)
    limits, _, _ = scanned(limit, norms)
    assert np.all(norms <= limits)


@do_not_hunt
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_limits_scale_with_the_norms_where_squares_do_not_exist(limit, scale):
    norms = stream()
    plain, _, _ = scanned(limit, norms)
    scaled, _, state = scanned(limit, norms * scale)
    np.testing.assert_allclose(scaled / np.float32(scale), plain, rtol=1e-4)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_derivative_of_the_target_is_finite_at_any_scale(scale):
    """That of mu + (z_max sigma)^2 / (n - mu), with mu = 3, sigma = 1 and n = 7: -4 / 16."""
    limit = zscore(2.0, warmup_steps=2)
    _, _, state = scanned(limit, np.array([2.0, 4.0]) * scale)
    slope = jax.grad(lambda norm: limit.update(norm, state)[0])(jnp.float32(7.0 * scale))
    assert float(slope) == pytest.approx(-0.25, rel=1e-5)


@all_limits
def test_one_norm_of_1e38_does_no_lasting_harm(limit):
    norms = np.ones(2000)
    norms[40] = 1e38
    limits, _, _ = scanned(limit, norms)
    assert np.all(np.isfinite(limits[41:]))
    assert 0.5 < limits[-1] < 3


@all_limits
def test_a_spike_enters_only_as_clipped(limit):
    """One of 1e3 and one of 1e6 leave the same, or nearly so, where the target is not the limit."""
    states = []
    for spike in (1e3, 1e6):
        limits, _, _ = scanned(limit, [*stream(20), *stream(20), spike, 1.0])
        states.append(limits[-1])
    np.testing.assert_allclose(states[0], states[1], rtol=1e-2)


@all_limits
def test_a_norm_of_zero_does_not_enter(limit):
    """Steps of a layer that is frozen, at the start or in the middle, are as none."""
    norms = stream(150)
    _, _, state = scanned(limit, norms)
    for when in (0, 30):
        _, _, after = scanned(limit, np.insert(norms, when, np.zeros(150)))
        assert same_bits(state, after)


def steps_until_passed(limit: Limit, before, after) -> int:
    """Number of steps until the limit reaches the new level."""
    limits, _, _ = scanned(limit, np.concatenate([before, after]))
    (passed,) = np.nonzero(limits[len(before) :] >= after)
    return int(passed[0])


def test_the_quantile_comes_from_anywhere_at_the_documented_rate():
    """ln(10) / (eta q) is 23.03: the 25th limit is above."""
    assert steps_until_passed(running_quantile(init=0.1), [], np.ones(100)) == 24
    assert steps_until_passed(running_quantile(0.9, init=0.1), [], np.ones(100)) == 13
    limits, _, _ = scanned(running_quantile(0.9, init=10.0), np.ones(300))
    assert int(np.nonzero(limits < 1)[0][0]) == 116


@pytest.mark.parametrize("q", [0.25, 0.5, 0.9])
def test_the_quantile_lets_its_share_pass(q):
    norms = np.random.default_rng(1).lognormal(size=4000)
    limits, _, _ = scanned(running_quantile(q), norms)
    assert abs(np.mean(norms <= limits) - q) < 0.02


def test_the_quantile_never_sticks_at_the_end_of_its_range():
    for start, norm in ((1.0, 1e-37), (1e30, 3e38)):
        limits, _, state = scanned(
            running_quantile(learning_rate=50.0, init=start), np.full(20, norm)
        )
        assert np.all(limits > 0)
        assert np.all(np.isfinite(limits))
        assert float(state) > 0


def around(level, length):
    return level * (1 + 0.1 * np.random.default_rng(2).standard_normal(length))


def test_zscore_holds_a_doubled_level_where_it_was_and_ema_lets_it_pass():
    """The rule of the paper: the further above the mean, the nearer to it a norm is put."""
    before, after = around(1.0, 500), around(2.0, 5000)
    limits, _, _ = scanned(zscore(), np.concatenate([before, after]))
    assert np.all(limits[-1000:] < 1.2)
    assert steps_until_passed(ema(), before, after) < 40
    assert steps_until_passed(zscore(), before, 0.75 * after) < 60


def test_ema_lets_a_tenfold_level_pass_even_from_a_constant_one():
    """From sigma = 0, as after Open-Sora's frozen statistics or axlearn's deadlock."""
    assert 200 < steps_until_passed(ema(), np.ones(500), np.full(1000, 10.0)) < 240


def test_growth_comes_back_from_a_tiny_norm():
    """Without the floor 694 steps; the papers need 1,388 after a norm of 0."""
    before, after = np.ones(200), np.ones(1000)
    assert steps_until_passed(growth(), [*before, 1e-3], after) == 233
    assert steps_until_passed(growth(floor=0.0), [*before, 1e-3], after) == 694
    assert steps_until_passed(growth(), [*before, 0.0], after) == 0


def test_a_warm_up_takes_in_norms_as_they_are_and_clips_nothing():
    """lingvo's tracker caps its first norms at 0.004 and is too low for hundreds of steps."""
    norms = [3.0, 5.0, 100.0, 4.0]
    for limit in (zscore(warmup_steps=4), ema(decay=0.999999, warmup_steps=4)):
        limits, _, state = scanned(limit, norms)
        assert np.all(limits == np.inf)
        mean = state.mean if hasattr(state, "mean") else state.average.mean
        np.testing.assert_allclose(mean, np.mean(norms), rtol=1e-5)
        np.testing.assert_allclose(state.deviation, np.std(norms), rtol=1e-5)


def test_a_target_above_the_norm_leaves_it_alone():
    limit = ema(0.0, ratio=1.5, target=(5.0, 0.9), warmup_steps=1)
    limits, _, _ = scanned(limit, [1.0, 2.0])
    assert limits[1] == 5.0


@pytest.mark.parametrize(
    ("make", "name", "bad"),
    [
        *((running_quantile, "quantile", bad) for bad in (0.0, 1.0, -1, np.nan, True, "0.5", None)),
        *((running_quantile, "learning_rate", bad) for bad in (0.0, -1.0, np.inf, True)),
        *((running_quantile, "init", bad) for bad in (0, -1.0, np.nan, False, jnp.ones(2))),
        *((zscore, "z_max", bad) for bad in (-1.0, np.nan, np.inf, True, None)),
        *((zscore, "decay", bad) for bad in (0.0, 1.0, 1.5, True)),
        *((zscore, "warmup_steps", bad) for bad in (0, -1, 2.5, 2.0, True, None)),
        *((ema, "k", bad) for bad in (-1.0, np.nan, True)),
        *((ema, "decay", bad) for bad in (0.0, 1.0, 1.5, True)),
        *((ema, "ratio", bad) for bad in (0.99, np.inf, True)),
        *((ema, "warmup_steps", bad) for bad in (0, 2.5, True)),
        *((ema, "target", bad) for bad in (1.1, (1.1,), [1.1, 0.9])),
        *((growth, "ratio", bad) for bad in (1.0, 0.5, np.nan, True)),
        *((growth, "floor", bad) for bad in (-0.1, 1.5, True)),
    ],
)
def test_a_bad_argument_raises_and_is_named(make, name, bad):
    with pytest.raises(ValueError, match=f"^`{name}` must "):
        make(**{name: bad})


def test_the_message_names_argument_rule_and_value():
    rule = r"^`decay` must lie between 0 and 1 \(exclusive\), got 1\.5\.$"
    with pytest.raises(ValueError, match=rule):
        zscore(decay=1.5)
    with pytest.raises(ValueError, match=r"^`target\[1\]` must lie between 0 and 1"):
        ema(target=(1.1, 2.0))
    with pytest.raises(ValueError, match=r"^`ratio` must be a finite number above 1, got 1\.0\.$"):
        growth(1.0)


# --- The clips ------------------------------------------------------------------------------------

CLIPS = {
    "running_quantile": lambda: clip_to_limit(running_quantile()),
    "zclip": functools.partial(zclip, warmup_steps=3),
    "ema": lambda: clip_to_limit(ema(warmup_steps=3, target=(1.1, 0.9))),
    "limit_norm_growth": limit_norm_growth,
}
all_clips = pytest.mark.parametrize("make", CLIPS.values(), ids=CLIPS)


def grads(norm):
    return {"w": jnp.array([0.6, 0.8], jnp.float32) * norm}


def run(clip, norms, state=None):
    state = clip.init(grads(1.0)) if state is None else state
    update = jax.jit(clip.update)
    passed = []
    for norm in norms:
        updates, state = update(grads(norm), state)
        passed.append(float(jnp.linalg.norm(updates["w"])))
    return passed, state


@all_clips
def test_a_clip_holds_the_gradient_to_its_limit_and_says_so(make):
    passed, state = run(make(), [1.0, 1.1, 0.9, 1.0, 50.0])
    metrics = gradclip_jax.metrics(state)
    assert passed[-1] == pytest.approx(float(metrics["clip_limit"]), rel=1e-5)
    assert passed[-1] < 2
    assert float(metrics["clipped"]) == 1


def test_zclip_is_capped_from_the_first_step_and_learns_uncapped():
    passed, state = run(zclip(warmup_steps=2), [3.0, 5.0, 4.0])
    np.testing.assert_allclose(passed, [1.0, 1.0, 1.0], rtol=1e-6)
    assert float(state.limit_state[0][0].mean) == 4.0
    passed, _ = run(zclip(warmup_steps=2, max_norm=None), [3.0, 5.0, 4.0])
    np.testing.assert_allclose(passed, [3.0, 5.0, 4.0], rtol=1e-6)


def test_one_nan_does_not_end_the_adaptation_of_zclip():
    """In the authors' code mean and deviation are NaN from then on."""
    passed, state = run(zclip(warmup_steps=2, max_norm=None), [1.0, 1.2, np.nan, 1.1, 30.0])
    assert passed[2] == 0
    assert passed[4] < 1.3
    assert int(state.nonfinite_count) == 1


def test_norms_grow_array_by_array():
    clip = limit_norm_growth(2.0)
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    update = jax.jit(clip.update)
    _, state = update({"a": jnp.ones(1), "b": jnp.full(1, 100.0)}, clip.init(params))
    updates, _ = update({"a": jnp.full(1, 50.0), "b": jnp.full(1, 150.0)}, state)
    assert (float(updates["a"][0]), float(updates["b"][0])) == (2.0, 150.0)


def test_numbers_may_be_injected_as_hyperparameters(standard_promotion):
    clip = optax.inject_hyperparams(zclip)(warmup_steps=2)
    passed, state = run(clip, [0.5, 0.6, 0.9])
    assert passed == run(zclip(warmup_steps=2), [0.5, 0.6, 0.9])[0]
    assert set(state.hyperparams) == {"z_max", "decay", "max_norm", "warmup_steps"}


def test_a_clip_through_orbax_continues_bit_for_bit(tmp_path):
    clip = CLIPS["ema"]()
    expected, _ = run(clip, N)
    _, state = run(clip, N[:5])
    restored = through_orbax(state, clip.init(grads(1.0)), tmp_path)
    rest, _ = run(clip, N[5:], restored)
    assert rest == expected[5:]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (running_quantile, {"quantile": 0.5, "learning_rate": 0.2, "init": 1.0}),
        (
            gradclip_jax.zclip,
            {"z_max": 2.5, "decay": 0.97, "warmup_steps": 25, "max_norm": 1.0},
        ),
        (
            ema,
            {"k": 3.0, "decay": 0.99, "ratio": 1.0, "target": None, "warmup_steps": 25},
        ),
        (gradclip_jax.limit_norm_growth, {"ratio": 1.01, "floor": 0.1}),
    ],
)
def test_defaults_are_those_documented(make, expected):
    parameters = inspect.signature(inspect.unwrap(make)).parameters
    assert {name: parameters[name].default for name in expected} == expected
