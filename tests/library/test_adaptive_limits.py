"""Every adaptive clip on streams of 300 steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import through_orbax
from test_recurrences import numpy_ema, stream

import gradclip_jax

# Each program runs once, and compiling it takes longer than running it.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def scanned(clip, grads):
    """The last state, and what comes out in each step."""
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)

    @compiled
    def run(grads):
        start = clip.init(jax.tree.map(lambda x: x[0], grads))
        return jax.lax.scan(lambda state, x: clip.update(x, state)[::-1], start, grads)

    return run(grads)


def test_all_limits_joined_continue_bit_for_bit_through_orbax(tmp_path):
    """For three norms, so that every array of their states has a place for each."""
    limits = [
        gradclip_jax.limits.percentile(90.0, window=8),
        gradclip_jax.limits.median(window=8),
        gradclip_jax.limits.running_quantile(0.9),
        gradclip_jax.limits.zscore(warmup_steps=5),
        gradclip_jax.limits.ema(target=(1.1, 0.9), warmup_steps=5),
        gradclip_jax.limits.growth(),
    ]
    joined = functools.reduce(gradclip_jax.limits.minimum, limits)
    norms = np.random.default_rng(0).lognormal(size=(40, 3)).astype(np.float32)
    norms[7::9] *= 100
    norms[11, 1] = norms[30, 2] = np.nan
    update = compiled(joined.update)

    def run(norms, state):
        seen = []
        for norm in norms:
            limit, state = update(norm, state)
            seen.append(np.asarray(limit))
        return seen, state

    start = joined.init(jnp.zeros(3))
    expected, last = run(norms, start)
    _, middle = run(norms[:20], start)
    restored = through_orbax(middle, start, tmp_path)
    seen, end = run(norms[20:], restored)
    np.testing.assert_array_equal(seen, expected[20:])
    jax.tree.map(np.testing.assert_array_equal, end, last)
    assert np.isfinite(seen).all()


def matrices():
    """300 of 2 x 3, every 23rd a spike."""
    grads = np.random.default_rng(0).standard_normal((300, 2, 3)).astype(np.float32)
    grads[22::23] *= 50
    return grads


def test_clips_of_singular_values_on_300_matrices_with_spikes_and_a_nan():
    """They learn nothing, so a stack is a stream; the NaN costs its own matrix alone."""
    grads = matrices()
    broken = grads.copy()
    broken[150, 0, 0] = np.nan
    u, sigma, vh = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    for clip, held in [
        (gradclip_jax.spectral_clip(2.0), np.minimum(sigma, 2.0)),
        (gradclip_jax.soft_spectral_clip(2.0), sigma / np.sqrt(1 + sigma**2 / 4)),
    ]:
        expected = (u * held[:, None]) @ vh
        expected[150] = 0
        updates, state = compiled(lambda x, clip=clip: clip.update(x, clip.init(x)))(broken)
        np.testing.assert_allclose(updates, expected, atol=1e-4)
        assert int(state.nonfinite_count) == 1


def test_the_clip_of_dual_norms_on_300_matrices_with_spikes_and_a_nan():
    grads = matrices()
    u, sigma, vh = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    expected = (u @ vh) * np.minimum(1, sigma.sum(axis=1) / 9)[:, None, None]
    grads[150, 0, 0], expected[150] = np.nan, 0
    clip = gradclip_jax.clip_by_dual_norm(9.0)
    state, updates = scanned(clip, grads)
    np.testing.assert_allclose(updates, expected, atol=1e-4)
    assert int(state.nonfinite_count) == 1
    assert int(state.clip_count) == int(np.sum(np.delete(sigma, 150, axis=0).sum(axis=1) > 9))


@pytest.mark.parametrize("make", [gradclip_jax.error_feedback, gradclip_jax.clip21])
def test_what_is_carried_over_is_carried_by_array(make):
    """Around a clip of each array, each is as it would be alone, also when the other is NaN."""
    norms = {"a": stream(), "b": 3 * stream()[::-1]}
    broken = {"a": norms["a"].copy(), "b": norms["b"]}
    broken["a"][150] = np.nan
    clip = make(gradclip_jax.clip_by_norm(1.0))
    _, updates = scanned(clip, broken)
    for key, values in broken.items():
        memory, expected = 0.0, []
        for grad in values:
            if np.isnan(grad):
                expected.append(memory if make is gradclip_jax.clip21 else 0.0)
            elif make is gradclip_jax.clip21:
                memory += np.clip(grad - memory, -1, 1)
                expected.append(memory)
            else:
                expected.append(np.clip(grad + memory, -1, 1))
                memory += grad - expected[-1]
        np.testing.assert_allclose(updates[key], expected, rtol=1e-3, atol=1e-3)


def test_a_guard_skips_what_the_equations_call_a_spike_and_a_nan_teaches_it_nothing():
    norms = stream()
    limits = np.array(list(numpy_ema(norms)))
    expected = np.insert(np.where(norms > limits, 0, norms), 150, 0)
    optimizer = gradclip_jax.skip_spikes(optax.identity(), grad_norm=gradclip_jax.limits.ema())
    state, updates = scanned(optimizer, np.insert(norms, 150, np.nan))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert int(state.skip_count) == int(np.sum(expected == 0)) > 10
    assert int(state.nonfinite_count) == 1
