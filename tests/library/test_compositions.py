"""Papers that need no strategy of their own: the code of their page against their equations."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradclip_jax
from gradclip_jax import limits

PAGE = Path(__file__).parents[2] / "docs" / "compositions.md"


@pytest.fixture(scope="module")
def page():
    """The names that the page defines."""
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.DOTALL):
            exec(compile(block, PAGE.name, "exec"), names)
    return names


def run(clip, norms):
    """The norms that come out, and the last state of the limit."""

    def step(state, norm):
        updates, state = clip.update(jnp.stack([0.6 * norm, 0.8 * norm]), state)
        return state, jnp.linalg.norm(updates)

    state, passed = jax.lax.scan(step, clip.init(jnp.zeros(2)), jnp.asarray(norms, jnp.float32))
    return np.asarray(passed), state.limit_state


def zclip(norms, mode="adaptive", skips=False, z_max=2.5, alpha=0.97, warmup=25, cap=1.0):
    """The authors' code in float64: norms that come out, mean and variance after each step."""
    buffer, passed, means, variances = [], [], [], []
    mean = variance = 0.0
    for n in np.asarray(norms, np.float64):
        if len(buffer) < warmup:
            buffer.append(n)
            mean, variance = np.mean(buffer), np.var(buffer)
            target, fires = n, False
        else:
            std = np.sqrt(variance)
            z = (n - mean) / (std + 1e-6)
            fires = z > z_max
            targets = {
                "adaptive": mean + z_max * std / (z / z_max),
                "mean": mean,
                "percentile": mean + z_max * std,
            }
            fires = n > targets[mode] if mode == "percentile" else fires
            target = targets[mode] if fires else n
            if not (fires and skips):
                mean = alpha * mean + (1 - alpha) * target
                variance = alpha * variance + (1 - alpha) * (target - mean) ** 2
        passed.append(min(target, cap))
        means.append(mean)
        variances.append(variance)
    return np.array(passed), np.array(means), np.array(variances)


WARMUP = [1 + 0.1 * np.sin(i) for i in range(25)]
GOLDEN = [*WARMUP, 1.05, 0.9, 8, 1, 1.2, 30, 1]


def spiky(seed, steps=300):
    """Noise of 20 %, some norms of which are up to 100 times as large."""
    rng = np.random.default_rng(seed)
    norms = 1 + 0.2 * rng.standard_normal(steps)
    return np.abs(norms) * np.where(rng.random(steps) < 0.05, 10 ** rng.uniform(0.3, 2, steps), 1)


def test_the_transcription_has_the_golden_numbers_of_the_authors_code():
    _, mean, variance = zclip(GOLDEN)
    means = [1.001788, 0.998734, 0.99887, 0.998904, 1.003359, 1.003393, 1.003291]
    np.testing.assert_allclose(mean[25:], means, rtol=1e-6)
    known = [0.00493259, 0.00507707, 0.00492533, 0.00477761, 0.00525666, 0.00509899, 0.00494635]
    np.testing.assert_allclose(variance[25:], known, rtol=1e-5)


MODES = {
    "adaptive": ("adaptive", False, []),
    "percentile": ("percentile", False, ["to_trigger"]),
    "mean": ("mean", False, ["to_mean"]),
    "adaptive, skips": ("adaptive", True, ["without_spikes"]),
    "percentile, skips": ("percentile", True, ["to_trigger", "without_spikes"]),
    "mean, skips": ("mean", True, ["to_mean", "without_spikes"]),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("norms", [GOLDEN, spiky(0), spiky(1)], ids=["golden", "one", "two"])
def test_each_mode_of_zclip_has_the_numbers_of_the_authors_code(name, norms, page):
    mode, skips, functions = MODES[name]
    limit = limits.zscore()
    for function in functions:
        limit = page[function](limit)
    clip = gradclip_jax.clip_to_limit(limits.minimum(limit, 1.0))
    passed, (((_, mean, deviation), _),) = run(clip, norms)
    expected, means, variances = zclip(norms, mode, skips)
    # There the deviation has 1e-6 more, by which z is smaller.
    np.testing.assert_allclose(passed, expected, rtol=1e-4)
    np.testing.assert_allclose(mean, means[-1], rtol=1e-5)
    np.testing.assert_allclose(deviation, np.sqrt(variances[-1]), rtol=1e-4)


def test_the_modes_differ():
    ends = [zclip(spiky(0), mode, skips)[2][-1] for mode, skips, _ in MODES.values()]
    # What is not learned is the same in all three modes.
    assert len(np.unique(np.round(ends, 6))) == len(MODES) - 2


@pytest.mark.parametrize("name", ["to_trigger", "to_mean", "without_spikes"])
def test_a_nan_is_not_learned_in_any_mode(name, page):
    clip = gradclip_jax.clip_to_limit(page[name](limits.zscore()))
    norms = spiky(0)
    _, expected = run(clip, norms)
    passed, state = run(clip, np.insert(norms, 40, np.nan))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert passed[40] == 0


def aggc(norms, high, beta=0.95, least=0.0, corrected=False):
    """The factor of each norm of one group; `corrected` frees the average of its bias."""
    s, factors = 0.0, []
    for step, n in enumerate(norms):
        average = s / (1 - beta**step) if corrected and step else s
        limit = high * average
        factors.append(max(limit / n, least) if limit > 0 and n > limit else 1.0)
        s = beta * s + (1 - beta) * factors[-1] * n
    return np.array(factors)


def test_the_released_numbers_of_aggc_multiply_every_gradient_by_nine_tenths():
    for seed in range(3):
        norms = 1 + 0.2 * np.abs(np.random.default_rng(seed).standard_normal(500))
        np.testing.assert_array_equal(aggc(norms, 0.6, least=0.9)[1:], 0.9)


def test_with_a_ratio_above_1_aggc_is_a_moving_average_of_each_group(page):
    norms = {"query": spiky(0), "up": spiky(1)}
    tree = {f"layer_{i}": {name: {"kernel": jnp.zeros(2)} for name in norms} for i in range(2)}
    clip = gradclip_jax.clip_to_limit(
        limits.ema(0.0, ratio=1.5, decay=0.95, warmup_steps=1),
        measure=lambda tree, axis_name: gradclip_jax.group_norms(
            tree, labels=page["module_types"], axis_name=axis_name
        ),
    )

    def step(state, now):
        # The two layers have 0.6 and 0.8 of the norm of their group.
        shares = {"layer_0": jnp.array([0.6, 0.0]), "layer_1": jnp.array([0.0, 0.8])}
        grads = {
            layer: {name: {"kernel": now[name] * share} for name in now}
            for layer, share in shares.items()
        }
        state = clip.update(grads, state)[1]
        return state, state.clip_factor

    stream = {name: jnp.asarray(each, jnp.float32) for name, each in norms.items()}
    _, factors = jax.lax.scan(step, clip.init(tree), stream)
    for name, each in norms.items():
        expected = aggc(each, 1.5, corrected=True)
        np.testing.assert_allclose(factors[name], expected, rtol=2e-5)
        assert 10 < (expected < 1).sum() < 100


def test_the_band_raises_what_is_small_and_leaves_zero_alone(page):
    norm, limit = jnp.array([0.0, 0.1, 1.9, 3.0, 9.0]), jnp.full(5, 6.0)
    factor = page["band"](norm, limit)
    np.testing.assert_allclose(factor, [1, 1.2, 2 / 1.9, 1, 6 / 9], rtol=1e-6)
    np.testing.assert_array_equal(page["band"](norm, jnp.full(5, jnp.inf)), 1)


def test_from_a_config():
    config = {
        "method": "clip_to_limit",
        "limit": {"method": "ema", "k": 0.0, "ratio": 1.5, "decay": 0.95},
        "measure": {"method": "group_norms", "labels": {"a": "x", "b": "y"}},
    }
    clip = gradclip_jax.from_config(config)
    grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = clip.update(grads, clip.init(grads))
    assert set(state.clip_limit) == {"x", "y"}
