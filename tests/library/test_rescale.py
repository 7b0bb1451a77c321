"""Responses, and the multiplication."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradclip_jax
from gradclip_jax import clip_to_limit, global_norm
from gradclip_jax._rescale import factors
from gradclip_jax.responses import (
    automatic,
    drop,
    normalize,
    shrink,
    smooth,
    smooth_sqrt,
    smooth_tanh,
)

SMOOTH = [smooth, smooth_sqrt, smooth_tanh]
norms = jnp.array([0.0, 1e-6, 0.5, 1.0, 2.0, 1e3, 1e30])


@pytest.mark.parametrize("response", [shrink, normalize, drop, *SMOOTH])
def test_the_held_norm_is_at_most_the_limit_and_zero_has_factor_one(response):
    factor = response(norms, jnp.ones_like(norms))
    assert (factor * norms <= 1 + 1e-6).all()
    assert float(factor[0]) == 1.0
    assert factor.dtype == jnp.float32


@pytest.mark.parametrize(
    ("response", "formula"),
    [
        (smooth, lambda r: 1 / (1 + r)),
        (smooth_sqrt, lambda r: 1 / np.sqrt(1 + r**2)),
        (smooth_tanh, lambda r: np.tanh(r) / r),
        (shrink, lambda r: np.minimum(1, 1 / r)),
        (normalize, lambda r: 1 / r),
        (drop, lambda r: 1.0 * (r <= 1)),
    ],
)
def test_responses_are_their_formulas(response, formula):
    norm, limit = np.logspace(-10, 10, 41), 0.3
    factor = response(jnp.asarray(norm, jnp.float32), jnp.full(41, limit))
    np.testing.assert_allclose(factor, formula(norm / np.float32(limit)), rtol=2e-6)


@pytest.mark.parametrize("response", SMOOTH)
def test_smooth_responses_have_no_corner_and_never_reach_the_limit(response):
    r = jnp.linspace(0.01, 5, 200)
    held, slope = jax.vmap(jax.value_and_grad(lambda r: r * response(r, jnp.float32(1))))(r)
    assert (held < 1).all()
    assert (slope > 0).all()
    assert (jnp.abs(jnp.diff(slope)) < 0.06).all()  # the slope of `shrink` falls by 1 at once


@pytest.mark.parametrize("response", [shrink, normalize, drop, *SMOOTH])
def test_limits_of_zero_and_infinity(response):
    positive = norms[1:]
    np.testing.assert_array_equal(response(positive, jnp.zeros_like(positive)), 0)
    np.testing.assert_array_equal(response(norms, jnp.full_like(norms, jnp.inf)), 1)


@pytest.mark.parametrize("response", [shrink, normalize, drop, *SMOOTH])
@pytest.mark.parametrize("limit", [0.0, 1.0, jnp.inf])
def test_derivatives_at_a_zero_norm_are_zero_never_nan(response, limit):
    assert float(jax.grad(response)(0.0, jnp.float32(limit))) == 0


def test_shrink_with_the_epsilon_of_pytorch():
    """Its scale is limit / (norm + 1e-6), so a norm at the limit shrinks a little."""
    norm = jnp.float32(0.05)
    assert float(shrink(norm, jnp.float32(0.01), eps=1e-6)) == pytest.approx(0.01 / 0.050001)
    assert float(shrink(jnp.float32(1.0), jnp.float32(1.0), eps=1e-6)) < 1
    clip = clip_to_limit(1.0, measure=global_norm, response=functools.partial(shrink, eps=1e-2))
    updates, _ = clip.update(jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, np.array([3.0, 4.0]) / 5.01, rtol=1e-6)


def test_a_factor_below_the_smallest_float32_is_shared_by_two_steps():
    factor = factors(jnp.float32(3e38), jnp.float32(1e-3), shrink)
    assert float(factor.power) == 2.0**-64
    assert float(factor.scale) * 2.0**-64 == pytest.approx(1e-3 / 3e38, rel=1e-6, abs=0)
    clip = clip_to_limit(1e-3)
    updates, _ = clip.update(jnp.array([3e38, 3e35]), clip.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [1e-3, 1e-6], rtol=1e-5)


def test_a_factor_above_the_largest_float32_is_shared_by_two_steps():
    clip = clip_to_limit(1e10, measure=global_norm, response=normalize)
    updates, _ = clip.update(jnp.array([3e-35, 4e-35]), clip.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, [6e9, 8e9], rtol=1e-5)


def test_the_smallest_limits_hold_the_largest_norms():
    """Their factor, 1e-38, is flushed though norm and limit are ordinary numbers."""
    for norm, limit in ((1e8, 1e-30), (1e18, 1e-20), (1e37, 1e-37)):
        clip = clip_to_limit(limit)
        updates, _ = clip.update(jnp.array([norm, 0.0]), clip.init(jnp.zeros(2)))
        np.testing.assert_allclose(updates, [limit, 0.0], rtol=1e-5)


def test_the_largest_norms_are_given_to_the_smallest_gradients():
    """Their factors, 1e41 and 1e60, overflow, and 0 times infinity is NaN."""
    for norm, element in ((1e38, 0.001), (1e30, 1e-30), (1e38, 2e-38)):
        clip = gradclip_jax.normalize_by_norm(norm)
        updates, _ = clip.update(jnp.array([element, 0.0]), clip.init(jnp.zeros(2)))
        np.testing.assert_allclose(updates, [norm, 0.0], rtol=1e-5)


FORMULAS = {
    shrink: lambda n, c: np.minimum(1, c / n),
    normalize: lambda n, c: c / n,
    smooth: lambda n, c: 1 / (1 + n / c),
    smooth_sqrt: lambda n, c: 1 / np.hypot(1, n / c),
    smooth_tanh: lambda n, c: np.tanh(n / c) * (c / n),
    drop: lambda n, c: 1.0 * (n <= c),
    automatic: lambda n, c: c / (n + 0.01),
}


@pytest.mark.parametrize("response", FORMULAS, ids=lambda response: response.__name__)
def test_no_pair_of_norm_and_limit_leaves_the_range_before_its_product(response):
    """All 76 x 76 magnitudes, in float64 for comparison: the product is a normal float32."""
    scales = 10.0 ** np.arange(-37, 39)
    norm, limit = (x.ravel().astype(np.float32) for x in np.meshgrid(scales, scales))

    @jax.jit
    def held(norm, limit):
        scale, power = factors(norm, limit, response)
        return norm * power * scale

    result = np.asarray(held(norm, limit), np.float64)
    wide = norm.astype(np.float64)
    expected = wide * FORMULAS[response](wide, limit.astype(np.float64))
    usable = (expected == 0) | ((expected > 1.2e-38) & (expected < 3.4e38))
    assert usable.sum() > 5000
    np.testing.assert_allclose(result[usable], expected[usable], rtol=2e-6)


@pytest.mark.parametrize("response", FORMULAS, ids=lambda response: response.__name__)
@pytest.mark.parametrize("limit", [0.0, 1e-37, 1.0, 1e37, jnp.inf])
def test_zero_times_any_factor_is_zero(response, limit):
    scale, power = factors(jnp.float32(0), jnp.float32(limit), response)
    assert float(jnp.float32(0) * power * scale) == 0


@pytest.mark.parametrize("response", FORMULAS, ids=lambda response: response.__name__)
def test_a_limit_of_zero_holds_every_norm(response):
    norm = jnp.asarray(10.0 ** np.arange(-37, 39), jnp.float32)
    scale, power = factors(norm, jnp.zeros_like(norm), response)
    np.testing.assert_array_equal(norm * power * scale, 0)


def test_the_product_is_taken_in_float32():
    """In float16 300 times 1 / 300 = 0.003334 would be 1.0002."""
    clip = clip_to_limit(1.0)
    updates, _ = clip.update(jnp.array([300.0], jnp.float16), clip.init(jnp.zeros(1)))
    assert updates.dtype == jnp.float16
    assert float(updates[0]) == 1.0


def test_near_zero_tanh_is_its_series(x64):
    r = jnp.array([1e-5, 9e-5, 1.1e-4])
    np.testing.assert_allclose(1 - smooth_tanh(r, jnp.ones(3)), r**2 / 3, rtol=1e-5)


def test_the_state_has_the_factor_of_both_steps():
    clip = gradclip_jax.clip_by_global_norm(1.0)
    grads = jnp.array([1e32])
    _, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(state.clip_factor, 1e-32, rtol=1e-6)
