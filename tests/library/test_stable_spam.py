"""AdaClip and AdaGN of Stable-SPAM against their equations in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import through_orbax

import gradclip_jax
from gradclip_jax import metrics, stable_spam_clip, stable_spam_norm

N = [1.0, 1.2, 0.8, 1.1, 10.0, 0.9, 1.0, 50.0, 1.3, 0.7]
CLIP, NORM = stable_spam_clip(), stable_spam_norm()


@functools.partial(jax.jit, static_argnums=0)
def scan(update, state, stream):
    def step(state, grads):
        updates, state = update(grads, state)
        return state, updates

    return jax.lax.scan(step, state, stream)


def run(clip, stream, state=None):
    """What comes out of each gradient of a stream, and the last state."""
    first = jax.tree.map(lambda x: x[0], stream)
    state, updates = scan(clip.update, clip.init(first) if state is None else state, stream)
    return updates, state


def adaclip(stream, theta=0.999):
    """Of one array in float64: m <- theta m + (1 - theta) max |g|, corrected for its bias."""
    m, results = 0.0, []
    for step, g in enumerate(np.asarray(stream, np.float64), start=1):
        largest = np.abs(g).max()
        m = theta * m + (1 - theta) * largest
        limit = m / (1 - theta**step)
        results.append(np.where(np.abs(g) > limit, g / largest * limit, g))
    return np.stack(results)


def adagn(stream, gamma1=0.7, gamma2=0.9):
    """Of one array in float64: g / n M / sqrt(V), both corrected for their bias."""
    m, v, results = 0.0, 0.0, []
    for step, g in enumerate(np.asarray(stream, np.float64), start=1):
        n = np.linalg.norm(g)
        m, v = gamma1 * m + (1 - gamma1) * n, gamma2 * v + (1 - gamma2) * n**2
        factor = m / (1 - gamma1**step) / np.sqrt(v / (1 - gamma2**step)) / n
        results.append(factor * g)
    return np.stack(results)


def spiky(seed=0, steps=300):
    """Normal elements of three scales, some of which are 300 times their size."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(steps, 3, 4)) * [[1.0], [0.1], [0.01]]
    return (grads * np.where(rng.random(grads.shape) < 0.01, 300, 1)).astype(np.float32)


def test_the_clip_by_hand():
    """The mean of the largest is 1, 2, 3: with a theta near 1 that of all so far."""
    stream = np.float32([[1, 1, 0, -1], [3, -1, 1, 2.5], [5, 0, -4, 3]])
    result, state = run(stable_spam_clip(1 - 1e-6), stream)
    expected = [[1, 1, 0, -1], [2, -1, 1, 5 / 3], [3, 0, -12 / 5, 3]]
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    seen = metrics(state)
    assert float(seen["clip_measure"]) == 5
    assert float(seen["clip_limit"]) == pytest.approx(3, rel=1e-5)
    assert float(seen["clip_factor"]) == pytest.approx(0.6, rel=1e-5)
    assert int(seen["clip_count"]) == 2


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_clip_is_the_equation(decay):
    stream = {"a": spiky(0), "b": spiky(1)}
    result, _ = run(stable_spam_clip(decay), stream)
    for name, array in stream.items():
        expected = adaclip(array, decay)
        np.testing.assert_allclose(result[name], expected, rtol=2e-5)
        assert (expected != array).any(axis=(1, 2)).sum() > 10


def test_what_is_below_the_limit_is_bit_identical():
    stream = spiky()
    result, state = run(CLIP, stream)
    limit = np.float32(adaclip(stream)[-1]).max()
    below = np.abs(stream[-1]) < 0.99 * limit
    np.testing.assert_array_equal(np.asarray(result)[-1][below], stream[-1][below])
    assert float(jnp.abs(result[-1]).max()) <= float(state.clip_limit) * (1 + 1e-6)


def test_an_element_above_the_limit_may_come_out_below_one_that_was_not():
    """The offenders keep their order among each other, as in the paper."""
    (_, result), _ = run(stable_spam_clip(1 - 1e-6), np.float32([[1, 1, 1], [9, 6, 4.9]]))
    np.testing.assert_allclose(result, [5, 10 / 3, 4.9], rtol=1e-5)


def test_the_count_is_its_own_and_never_reset(standard_promotion):
    """The authors' code clips nothing for hundreds of steps after each reset of the momentum."""
    optimizer = optax.chain(CLIP, optax.adam(0.1))
    grads = jnp.ones(2)
    state = optimizer.init(grads)
    for _ in range(5):
        _, state = optimizer.update(grads, state)
    reset = (state[0], optax.adam(0.1).init(grads))
    updates, _ = CLIP.update(jnp.array([6.0, 1.0]), reset[0])
    np.testing.assert_allclose(updates, [11 / 6, 1], rtol=1e-2)


def test_golden_trace_of_the_norm():
    direction = np.float32([0.6, 0.8])
    result, state = run(NORM, np.float32(N)[:, None] * direction)
    lengths = np.linalg.norm(result, axis=1)
    golden = [1, 1.007102, 0.966206, 0.988648, 0.848154, 0.696834, 0.599412, 0.826049]
    np.testing.assert_allclose(lengths, [*golden, 0.641388, 0.493924], rtol=2e-6)
    np.testing.assert_allclose(result / lengths[:, None], np.tile(direction, (10, 1)), rtol=1e-6)
    assert float(metrics(state)["clip_limit"]) == pytest.approx(0.493924, rel=1e-6)


def test_the_norm_is_the_equation():
    stream = {"a": spiky(0), "b": spiky(1)}
    result, _ = run(stable_spam_norm(0.85, b2=0.99), stream)
    for name, array in stream.items():
        np.testing.assert_allclose(result[name], adagn(array, 0.85, 0.99), rtol=5e-5)


def test_the_norm_that_comes_out_is_bounded_and_falls_after_a_spike():
    """The worst that can be, by Cauchy: shares of the mean in proportion to w / w'."""
    worst = (0.9 / 0.7) ** np.arange(300)
    for norms in (worst, worst[::-1]):
        lengths = np.linalg.norm(run(NORM, np.float32(norms / norms.max())[:, None])[0], axis=1)
        assert lengths.max() <= 1.4056
    assert run(NORM, np.float32(worst / worst.max())[:, None])[0].max() > 1.0
    spike = np.float32([1e-6] * 100 + [1.0] + [1e-6] * 10)[:, None]
    lengths = np.asarray(run(NORM, spike)[0]).ravel()[100:]
    assert lengths[0] == pytest.approx(0.3 / np.sqrt(0.1), rel=1e-4)
    assert lengths[10] == pytest.approx(0.045, rel=0.01)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e37])
def test_neither_depends_on_the_unit(scale):
    stream = np.float32(spiky() / 300)
    scaled = (stream * np.float64(scale)).astype(np.float32)
    for clip, unit in ((CLIP, np.float32(scale)), (NORM, np.float32(1))):
        expected, state = run(clip, stream)
        result, other = run(clip, scaled)
        np.testing.assert_allclose(result / unit, expected, rtol=1e-4, atol=1e-5)
        assert int(other.nonfinite_count) == int(state.nonfinite_count) == 0


@pytest.mark.parametrize("clip", [CLIP, NORM], ids=["clip", "norm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("when", [0, 7])
def test_what_is_not_finite_becomes_zero_and_is_forgotten(clip, bad, when):
    stream = {"a": spiky(0, 20), "b": spiky(1, 20)}
    broken = {**stream, "a": stream["a"].copy()}
    broken["a"][when, 1, 1] = bad
    without = {"a": np.delete(stream["a"], when, axis=0)}
    result, state = run(clip, broken)
    assert not result["a"][when].any()
    expected, last = run(clip, without)
    np.testing.assert_allclose(np.delete(result["a"], when, axis=0), expected["a"], rtol=1e-6)
    chex.assert_trees_all_close(state.limit_state[0], last.limit_state[0], rtol=1e-6)
    np.testing.assert_array_equal(result["b"], run(clip, stream)[0]["b"])
    assert int(state.nonfinite_count) == 1
    make = stable_spam_clip if clip is CLIP else stable_spam_norm
    result, _ = run(make(on_nonfinite="propagate"), broken)
    assert np.isnan(result["a"][when]).all()
    assert np.isfinite(result["b"]).all()


@pytest.mark.parametrize("clip", [CLIP, NORM], ids=["clip", "norm"])
def test_zeros_stay_zero_and_are_forgotten(clip):
    stream = np.float32([[3, 4], [0, 0], [6, 8], [0, 0]])
    result, state = run(clip, stream)
    np.testing.assert_array_equal(result[1::2], 0)
    expected, last = run(clip, stream[::2])
    np.testing.assert_array_equal(result[::2], expected)
    jax.tree.map(np.testing.assert_array_equal, state.limit_state, last.limit_state)
    result, _ = run(clip, np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(result, 0)


@pytest.mark.parametrize("norm", [1e-30, 1 / 3, 1e30])
def test_a_constant_stream_is_never_clipped(norm):
    _, state = run(CLIP, np.full((500, 1), norm, np.float32))
    assert int(state.clip_count) == 0
    result, _ = run(NORM, np.full((500, 1), norm, np.float32))
    np.testing.assert_allclose(result, 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_dtypes_come_back_as_they_are(dtype):
    stream = jnp.array([[2.0, 1.0], [200.0, 0.5]], dtype)
    result, state = run(stable_spam_clip(1 - 1e-6), stream)
    assert result.dtype == dtype
    np.testing.assert_allclose(result[1].astype(jnp.float32), [101, 0.5], rtol=1e-2)
    assert state.clip_limit.dtype == jnp.float32
    assert run(NORM, stream)[0].dtype == dtype


def test_complex_elements_are_clipped_by_modulus():
    stream = jnp.array([[1j, 1 + 0j], [3 + 4j, 0.5j]])
    result, _ = run(stable_spam_clip(1 - 1e-6), stream)
    np.testing.assert_allclose(result[1], [1.8 + 2.4j, 0.5j], rtol=1e-5)
    np.testing.assert_allclose(
        run(NORM, stream)[0][0], [np.sqrt(0.5) * 1j, np.sqrt(0.5)], rtol=1e-6
    )


def test_in_float64_under_x64(x64):
    stream = spiky().astype(np.float64)
    np.testing.assert_allclose(run(CLIP, stream)[0], adaclip(stream), rtol=1e-11)
    np.testing.assert_allclose(run(NORM, stream)[0], adagn(stream), rtol=1e-11)


def test_saved_and_restored_in_the_middle_is_bit_equal(tmp_path):
    clip = optax.chain(CLIP, NORM)
    stream = spiky(3, 40)
    expected, last = run(clip, stream)
    _, state = run(clip, stream[:20])
    restored = through_orbax(state, clip.init(stream[0]), tmp_path)
    result, end = run(clip, stream[20:], restored)
    chex.assert_trees_all_equal((result, end), (expected[20:], last))


def test_numbers_may_be_injected(standard_promotion):
    grads = jnp.array([3.0, 4.0])
    clip = optax.inject_hyperparams(stable_spam_clip)()
    _, state = jax.jit(clip.update)(grads, clip.init(grads))
    assert set(state.hyperparams) == {"decay"}
    clip = optax.inject_hyperparams(stable_spam_norm)()
    updates, state = jax.jit(clip.update)(grads, clip.init(grads))
    assert set(state.hyperparams) == {"b1", "b2"}
    np.testing.assert_allclose(updates, [0.6, 0.8], rtol=1e-6)


def test_all_together_under_a_global_norm():
    clip = stable_spam_norm(measure=gradclip_jax.global_norm)
    grads = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
    updates, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose([updates["a"], updates["b"]], [0.6, 0.8], rtol=1e-6)
    assert float(state.grad_norm) == 5


def test_derivatives_are_finite():
    first = jnp.array([1.0, 2.0])
    for clip in (CLIP, NORM):
        _, state = clip.update(first, clip.init(first))
        jacobian = jax.jit(jax.jacrev(lambda x, clip=clip, state=state: clip.update(x, state)[0]))
        np.testing.assert_array_equal(jacobian(jnp.zeros(2)), np.eye(2))
        for grads in ([1.0, 100.0], [0.0, 1e15], [1e-15, 0.0], [np.nan, 1.0]):
            assert np.isfinite(jacobian(jnp.array(grads))).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stable_spam_clip(1.0), r"^`decay` must lie between 0 and 1 \(exclusive\), got 1"),
        (lambda: stable_spam_clip(True), "`decay` must lie between"),
        (lambda: stable_spam_clip(on_nonfinite="x"), "`on_nonfinite` must be"),
        (lambda: stable_spam_norm(0.0), "^`b1` must lie between 0 and 1"),
        (lambda: stable_spam_norm(b2=1.5), "^`b2` must lie between 0 and 1"),
        (lambda: stable_spam_norm(b2=None), "^`b2` must lie between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
