"""Two thresholds: what is large is clipped, what is broken is dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax
from gradclip_jax import clip_or_drop, leaf_norms, limits, metrics, skip_spikes

GRADS = jnp.array([3.0, 4.0])  # norm 5


def factor(clip, norm, state=None):
    """By how much a gradient of this norm is multiplied."""
    state = clip.init(GRADS) if state is None else state
    updates, state = clip.update(GRADS * (norm / 5), state)
    return float(updates[0] / (GRADS[0] * (norm / 5))), state


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (100.0, 0.01), (100.1, 0.0), (1e30, 0.0), (1e-30, 1.0)],
)
def test_by_hand(norm, expected):
    found, state = factor(clip_or_drop(1.0, drop_norm=100.0), norm)
    assert found == pytest.approx(expected, rel=1e-6)
    assert float(state.clip_factor) == pytest.approx(expected, rel=1e-6)
    assert float(state.clip_limit) == (0.0 if expected == 0 else 1.0)
    assert int(state.clip_count) == (expected < 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_zero(bad):
    """In AXLearn 0 * NaN is NaN."""
    clip = clip_or_drop(1.0, drop_norm=100.0)
    updates, state = clip.update(jnp.array([bad, 1.0]), clip.init(GRADS))
    np.testing.assert_array_equal(updates, [0, 0])
    assert (int(state.nonfinite_count), int(state.clip_count)) == (1, 0)


def test_none_is_no_threshold():
    assert factor(clip_or_drop(None, drop_norm=10.0), 9.0)[0] == 1
    assert factor(clip_or_drop(None, drop_norm=10.0), 11.0)[0] == 0
    assert factor(clip_or_drop(1.0, drop_norm=None), 1e30)[0] == pytest.approx(1e-30)


def test_each_array_alone():
    clip = clip_or_drop(1.0, drop_norm=10.0, measure=leaf_norms)
    grads = {"calm": 0.1 * GRADS, "large": GRADS, "broken": 100 * GRADS}
    updates, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_array_equal(updates["calm"], grads["calm"])
    np.testing.assert_allclose(updates["large"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(updates["broken"], [0, 0])


def test_thresholds_may_be_schedules_and_injected(standard_promotion):
    clip = clip_or_drop(1.0, drop_norm=optax.linear_schedule(10.0, 4.0, 1))
    found, state = factor(clip, 5.0)
    assert found == pytest.approx(0.2)
    assert factor(clip, 5.0, state)[0] == 0
    clip = optax.inject_hyperparams(clip_or_drop)(max_norm=1.0, drop_norm=10.0)
    updates, state = jax.jit(clip.update)(GRADS, clip.init(GRADS))
    np.testing.assert_allclose(updates, [0.6, 0.8], rtol=1e-6)
    assert set(state.hyperparams) == {"max_norm", "drop_norm"}


def test_derivatives_are_finite_and_of_what_is_dropped_zero():
    clip = clip_or_drop(1.0, drop_norm=10.0)
    jacobian = jax.jit(jax.jacrev(lambda x: clip.update(x, clip.init(x))[0]))
    np.testing.assert_array_equal(jacobian(jnp.zeros(2)), np.eye(2))
    for grads in (100 * GRADS, GRADS * jnp.nan):
        np.testing.assert_array_equal(jacobian(grads), np.zeros((2, 2)))
    assert np.isfinite(jacobian(GRADS)).all()


def moved(optimizer, norms):
    """The steps of an optimizer over gradients of these norms, and its last state."""

    def step(state, norm):
        updates, state = optimizer.update(GRADS * (norm / 5), state, GRADS)
        return state, updates

    state, steps = jax.lax.scan(step, optimizer.init(GRADS), jnp.asarray(norms, jnp.float32))
    return np.asarray(steps), state


def test_a_dropped_gradient_is_a_step_and_a_skipped_one_is_not(standard_promotion):
    norms = [1.0] * 10 + [1e3]
    adam = optax.adamw(0.1)
    drops = optax.chain(clip_or_drop(1.0, drop_norm=100.0), adam)
    clip = gradclip_jax.clip_by_global_norm(1.0)
    skips = skip_spikes(optax.chain(clip, adam), grad_norm=100.0)
    assert np.abs(moved(drops, norms)[0][-1]).min() > 0.05
    steps, state = moved(skips, norms)
    np.testing.assert_array_equal(steps[-1], [0, 0])
    _, before = moved(skips, norms[:-1])
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, before.inner_state)


def skip_and_clip(times, max_norm=1.0):
    """AXLearn's `skip_and_clip_by_global_norm` with `drop_norm_by_grad_norm_ema`, without momentum.

    It skips above `times` the mean of what was not skipped, and clips the rest.
    """
    inner = optax.chain(gradclip_jax.clip_by_global_norm(max_norm), optax.sgd(1.0))
    return skip_spikes(inner, grad_norm=limits.ema(0.0, ratio=times, decay=0.9, warmup_steps=1))


def axlearn(norms, times, decay=0.9):
    """Of each norm whether it is skipped: its mean learns only of those that are not."""
    mean, count, skipped = 1.0, 0, []
    for norm in norms:
        skipped.append(norm >= times * mean and count > 0)
        if not skipped[-1]:
            share = decay * (1 - decay**count) / (1 - decay ** (count + 1))
            mean, count = share * mean + (1 - share) * norm, count + 1
    return skipped


def test_it_skips_what_axlearn_skips_as_long_as_spikes_are_rare(standard_promotion):
    """The stream of the golden traces in which AXLearn skips the norms of 10 and 50."""
    norms = [1.0, 1.2, 0.8, 1.1, 10.0, 0.9, 1.0, 50.0, 1.3, 0.7]
    steps, _ = moved(skip_and_clip(4.0), norms)
    assert [not step.any() for step in steps] == axlearn(norms, 4.0)
    assert axlearn(norms, 4.0) == [norm in (10.0, 50.0) for norm in norms]
    lengths = np.linalg.norm(steps, axis=1)
    clipped = [0 if norm in (10.0, 50.0) else min(norm, 1) for norm in norms]
    np.testing.assert_allclose(lengths, clipped, rtol=1e-6)


def test_a_lasting_rise_ends_the_skips_and_deadlocks_axlearn(standard_promotion):
    norms = [1.0] * 50 + [100.0] * 200
    assert all(axlearn(norms, 20.0)[50:])
    steps, state = moved(skip_and_clip(20.0), norms)
    skipped = int(metrics(state)["skip_count"])
    assert 1 <= skipped <= 3
    assert all(step.any() for step in steps[50 + skipped :])


def test_a_constant_norm_is_never_skipped(standard_promotion):
    """With a standard deviation of 0 AXLearn skips every step from the 501st on."""
    optimizer = skip_spikes(optax.sgd(1.0), grad_norm=limits.ema(3.0, decay=0.9))
    _, state = moved(optimizer, [1.0] * 600)
    assert int(metrics(state)["skip_count"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 1.0), r"^`max_norm` must be non-negative, got -1\.0\.$"),
        ((1.0, -1.0), r"^`drop_norm` must be non-negative, got -1\.0\.$"),
        ((1.0, True), "`drop_norm` must be a non-negative number"),
        ((2.0, 1.0), r"^`drop_norm` must be at least `max_norm`, got 1\.0 and 2\.0: nothing"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    max_norm, drop_norm = arguments
    with pytest.raises(ValueError, match=message):
        clip_or_drop(max_norm, drop_norm=drop_norm)
