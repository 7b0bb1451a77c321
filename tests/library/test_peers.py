"""Defects of other libraries that had no test here yet: each test names one and shows its absence.

Most such tests stand beside what they test; the name of a peer in a docstring finds them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradclip_jax


def test_a_nan_in_one_example_costs_that_example_alone():
    """`optax.per_example_global_norm_clip` lets it into the sum over the batch."""
    clip = gradclip_jax.clip_by_global_norm(1.0)
    batch = {"a": np.float32([3.0, np.nan, 0.3]), "b": np.float32([4.0, 1.0, 0.4])}
    clipped = jax.jit(jax.vmap(lambda grads: clip.update(grads, clip.init(grads))[0]))(batch)
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0, 0.3], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8, 0.0, 0.4], rtol=1e-6)


def test_a_constant_norm_is_never_skipped_and_a_new_level_ends_the_skipping():
    """`drop_norm_by_grad_norm_stddev` of AXLearn skips a constant norm for ever, and a rise too.

    MaxText feeds its rule with norms that are clipped to 1 already, so that it can hardly fire.
    """
    inner = gradclip_jax.clip_by_global_norm(1.0)
    optimizer = gradclip_jax.skip_spikes(inner, grad_norm=gradclip_jax.limits.ema(6.0))

    def step(state, norm):
        updates, state = optimizer.update(norm, state)
        return state, (state, updates)

    run = jax.jit(lambda norms: jax.lax.scan(step, optimizer.init(norms[0]), norms)[1])
    states, updates = run(np.float32([2.0] * 500 + [40.0] * 500))
    assert int(states.skip_count[499]) == 0
    np.testing.assert_allclose(states.skip_limit[499], 2.012, rtol=1e-5)
    assert int(states.skip_count[-1]) == 16  # `max_consecutive`; from then on steps are clipped
    np.testing.assert_allclose(updates[-484:], 1.0, rtol=1e-6)
    assert float(states.skip_limit[-1]) > 40


def test_autoclip_is_of_the_norm_of_all_arrays():
    """The port to TensorFlow clips each array to the percentile of the norm of all."""
    clip = gradclip_jax.autoclip(0.0, window=2)
    grads = {"a": jnp.array([3.0, 6.0]), "b": jnp.array([4.0, 8.0])}

    @jax.jit
    def run(grads):
        start = clip.init(jax.tree.map(lambda x: x[0], grads))
        return jax.lax.scan(lambda state, x: clip.update(x, state)[::-1], start, grads)[1]

    updates = run(grads)
    np.testing.assert_allclose(updates["a"], [3.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [4.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize("response", ["shrink", "normalize", "smooth"])
def test_a_known_norm_of_minus_one_counts_as_not_finite(response):
    """DeepSpeed has -1 for an overflow, and its factor then has that sign."""
    known = gradclip_jax.given_norm("grad_norm")
    clip = gradclip_jax.clip_to_limit(
        1.0, measure=known, response=getattr(gradclip_jax.responses, response)
    )

    @jax.jit
    def update(grads, grad_norm):
        return clip.update(grads, clip.init(grads), grad_norm=grad_norm)

    updates, state = update(np.float32([3.0, 4.0]), -1.0)
    np.testing.assert_array_equal(updates, 0)
    assert int(state.nonfinite_count) == 1
