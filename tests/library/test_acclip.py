"""ACClip against its algorithm in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import through_orbax

from gradclip_jax import acclip, metrics


def run(clip, stream, state=None):
    """What comes out of each gradient of a stream, and the last state."""
    first = jax.tree.map(lambda x: x[0], stream)

    def step(state, grads):
        updates, state = clip.update(grads, state)
        return state, updates

    state = clip.init(first) if state is None else state
    state, updates = jax.jit(lambda state: jax.lax.scan(step, state, stream))(state)
    return updates, state


def algorithm_2(stream, b1=0.9, b2=0.99, eps=1e-5):
    """Zhang et al. 2020 with alpha = 1, in float64."""
    m, tau, results = 0.0, 0.0, []
    for g in np.asarray(stream, np.float64):
        m, tau = b1 * m + (1 - b1) * g, b2 * tau + (1 - b2) * np.abs(g)
        results.append(np.minimum(tau / (np.abs(m) + eps), 1) * m)
    return np.stack(results)


def heavy(seed=0, steps=300):
    """Elements with heavy tails, of three scales."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(1.5, size=(steps, 2, 3)) * [1.0, 1e-2, 1e-4]).astype(np.float32)


def test_by_hand():
    clip = acclip(0.5, b2=0.75, eps=0.0)
    stream = np.float32([[4, -8, 0], [0, 8, 0], [-4, 8, 0]])
    # m: 2, 1, -1.5 and -4, 2, 5; tau: 1, 0.75, 1.5625 and 2, 3.5, 4.625.
    result, state = run(clip, stream)
    np.testing.assert_allclose(result, [[1, -2, 0], [0.75, 2, 0], [-1.5, 4.625, 0]], rtol=1e-6)
    seen = metrics(state)
    assert float(seen["clip_measure"]) == pytest.approx(5 / 4.625)
    assert float(seen["clip_limit"]) == 1
    assert float(seen["clip_factor"]) == pytest.approx(0.925)
    assert int(seen["clip_count"]) == 3


@pytest.mark.parametrize("numbers", [(0.9, 0.99, 1e-5), (0.5, 0.9, 0.0), (0.99, 0.9, 1e-3)])
def test_it_is_the_algorithm(numbers):
    b1, b2, eps = numbers
    stream = {"a": heavy(0), "b": heavy(1)}
    result, _ = run(acclip(b1, b2=b2, eps=eps), stream)
    for name, array in stream.items():
        # Where the momentum cancels, its rounding is that of what cancelled.
        largest = np.abs(array).max(axis=0)
        difference = np.abs(result[name] - algorithm_2(array, b1, b2, eps)) / largest
        assert difference.max() < 2e-6


def test_defaults_are_those_of_the_paper():
    stream = heavy()
    result, _ = run(acclip(), stream)
    np.testing.assert_allclose(result, algorithm_2(stream), rtol=1e-3, atol=1e-5)


def test_a_constant_gradient_warms_up():
    result, _ = run(acclip(eps=0.0), np.ones((100, 1), np.float32))
    np.testing.assert_allclose(result[[0, 99], 0], [0.01, 1 - 0.99**100], rtol=1e-5)


def test_without_eps_it_is_a_clamp_of_the_momentum_at_its_level():
    stream = heavy()
    result, state = run(acclip(eps=0.0), stream)
    m, tau = state.limit_state
    np.testing.assert_allclose(result[-1], np.clip(m, -tau, tau), rtol=1e-6)


def test_a_spike_is_cut_to_a_tenth_of_what_it_adds_to_the_momentum():
    stream = np.float32([1.0] * 300 + [1000.0])[:, None]
    result, state = run(acclip(), stream)
    assert float(state.limit_state[0][0]) == pytest.approx(100.9, rel=1e-3)
    assert float(result[-1, 0]) == pytest.approx(0.99 * (1 - 0.99**300) + 10, rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("when", [0, 7])
def test_what_is_not_finite_becomes_zero_and_leaves_the_averages_alone(bad, when):
    stream = heavy(0, 20)
    broken = stream.copy()
    broken[when, 1, 1] = bad
    result, state = run(acclip(), broken)
    assert result[when, 1, 1] == 0
    without, last = run(acclip(), np.delete(stream, when, axis=0))
    np.testing.assert_allclose(
        np.delete(result, when, axis=0)[:, 1, 1], without[:, 1, 1], rtol=1e-6
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[1, 1], state.limit_state),
        jax.tree.map(lambda x: x[1, 1], last.limit_state),
        rtol=1e-6,
    )
    untouched = np.ones((2, 3), bool)
    untouched[1, 1] = False
    whole, _ = run(acclip(), stream)
    np.testing.assert_allclose(result[:, untouched], whole[:, untouched], rtol=1e-6)
    assert int(state.nonfinite_count) == 1
    result, _ = run(acclip(on_nonfinite="propagate"), broken)
    np.testing.assert_array_equal(np.isnan(result), ~np.isfinite(broken))


def test_neither_the_largest_nor_the_smallest_floats_break_it():
    stream = np.float32([[3e38, 1e-34]] * 20 + [[-3e38, -1e-34]] * 2)
    result, state = run(acclip(eps=0.0), stream)
    np.testing.assert_allclose(result, algorithm_2(stream, eps=0.0), rtol=1e-5)
    assert np.isfinite(jax.tree.leaves(state.limit_state)[0]).all()
    assert int(state.nonfinite_count) == 0


def test_zeros_stay_zero_and_count_as_no_clip():
    result, state = run(acclip(), np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(result, 0)
    assert int(state.clip_count) == 0
    assert float(state.clip_measure) == 0


def test_complex_momentum_is_clipped_by_modulus():
    clip = acclip(0.5, b2=0.75, eps=0.0)
    result, state = run(clip, jnp.array([[3 + 4j, 2j], [3 + 4j, 0j]]))
    np.testing.assert_allclose(result[0], [0.75 + 1j, 0.5j], rtol=1e-6)
    assert state.limit_state[0].dtype == jnp.complex64
    assert state.limit_state[1].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_dtypes_come_back_as_they_are_and_average_in_float32(dtype):
    """In bfloat16 0.999 + 0.001 is 1, and an average would stand still."""
    stream = jnp.full((300, 2), 0.5, dtype)
    result, state = run(acclip(), stream)
    assert result.dtype == dtype
    assert state.limit_state[0].dtype == state.limit_state[1].dtype == jnp.float32
    np.testing.assert_allclose(state.limit_state[1], 0.5 * (1 - 0.99**300), rtol=1e-4)


def test_in_float64_under_x64(x64):
    stream = heavy().astype(np.float64)
    np.testing.assert_allclose(run(acclip(), stream)[0], algorithm_2(stream), rtol=1e-9)


def test_with_sgd_behind_it_is_the_optimizer_of_the_paper(standard_promotion):
    stream = heavy(2, 20)
    steps, _ = run(optax.chain(acclip(), optax.sgd(0.1)), stream)
    np.testing.assert_allclose(steps, -0.1 * algorithm_2(stream), rtol=1e-3, atol=1e-6)


def test_saved_and_restored_in_the_middle_is_bit_equal(tmp_path):
    clip, stream = acclip(), heavy(3, 40)
    expected, last = run(clip, stream)
    _, state = run(clip, stream[:20])
    restored = through_orbax(state, clip.init(stream[0]), tmp_path)
    result, end = run(clip, stream[20:], restored)
    chex.assert_trees_all_equal((result, end), (expected[20:], last))


def test_numbers_may_be_injected(standard_promotion):
    clip = optax.inject_hyperparams(acclip)(b1=optax.linear_schedule(0.5, 0.9, 10))
    grads = jnp.array([4.0])
    updates, state = jax.jit(clip.update)(grads, clip.init(grads))
    assert set(state.hyperparams) == {"b1", "b2", "eps"}
    np.testing.assert_allclose(updates, 0.04, rtol=1e-4)


def test_derivatives_are_finite():
    clip = acclip(eps=0.0)
    _, state = clip.update(jnp.ones(2), clip.init(jnp.ones(2)))
    for start in (clip.init(jnp.zeros(2)), state):
        jacobian = jax.jacrev(lambda x, start=start: clip.update(x, start)[0])
        for grads in ([0.0, 0.0], [1.0, 100.0], [0.0, 1e25], [np.nan, 1.0]):
            assert np.isfinite(jacobian(jnp.array(grads))).all()


def test_updates_of_another_structure_raise():
    clip = acclip()
    state = clip.init({"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="`updates` must have the structure of the params given"):
        clip.update({"a": jnp.ones(2)}, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"^`b1` must lie between 0 and 1 \(exclusive\), got 1\.0\.$"),
        ({"b2": 0.0}, "^`b2` must lie between 0 and 1"),
        ({"b2": True}, "^`b2` must lie between 0 and 1"),
        ({"eps": -1.0}, r"^`eps` must be a finite number of at least 0, got -1\.0\.$"),
        ({"eps": np.inf}, "^`eps` must be a finite number of at least 0"),
        ({"on_nonfinite": "skip"}, "`on_nonfinite` must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        acclip(**arguments)
