"""Limits on plain lists of numbers."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax
from gradclip_jax import Limit, clip_to_limit
from gradclip_jax._limits import update_finite
from gradclip_jax.limits import constant, ema, growth, maximum, minimum, zscore


def limits_of(limit: Limit, norms, dtype=jnp.float32):
    state = limit.init(jnp.zeros((), dtype))
    values = []
    for norm in norms:
        value, state = update_finite(limit, jnp.asarray(norm, dtype), state)
        values.append(float(value))
    return values, state


last_norm = Limit(lambda norm: jnp.full(norm.shape, jnp.inf), lambda norm, state: (state, norm))
"""The norm before this one: as small as a limit that learns can be."""


def countdown(count):
    return 10.0 - count.astype(jnp.float32)


def test_a_constant_is_constant():
    assert limits_of(constant(2.0), [1.0, 100.0])[0] == [2.0, 2.0]
    assert limits_of(constant(None), [1.0])[0] == [np.inf]


def test_a_schedule_gets_the_number_of_updates():
    assert limits_of(constant(countdown), [1.0] * 3)[0] == [10.0, 9.0, 8.0]


def test_a_clock_runs_on_when_a_norm_is_not_finite():
    values, count = limits_of(constant(countdown), [1.0, np.nan, 1.0])
    assert values == [10.0, 9.0, 8.0]
    assert int(count) == 3


def test_a_scheduled_limit_below_zero_or_nan_counts_as_zero():
    assert limits_of(constant(lambda count: countdown(count) - 9), [1.0] * 3)[0] == [1.0, 0.0, 0.0]
    assert limits_of(constant(lambda count: jnp.nan), [1.0])[0] == [0.0]


def test_minus_zero_is_zero():
    (limit,), _ = limits_of(constant(-0.0), [1.0])
    assert np.copysign(1.0, limit) == 1.0


def test_a_number_beyond_float32_is_infinite():
    assert limits_of(constant(1e300), [1.0])[0] == [np.inf]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_enters_what_a_limit_has_learned(bad):
    values, _ = limits_of(last_norm, [3.0, bad, 5.0, 1.0])
    assert values == [np.inf, 3.0, 3.0, 5.0]


def test_learning_is_protected_element_by_element_and_within_joins():
    for limit in (last_norm, minimum(last_norm, 100.0), maximum(0.5, last_norm)):
        state = limit.init(jnp.zeros(2))
        _, state = update_finite(limit, jnp.array([3.0, 4.0]), state)
        _, state = update_finite(limit, jnp.array([jnp.nan, 7.0]), state)
        value, _ = update_finite(limit, jnp.array([1.0, 1.0]), state)
        np.testing.assert_array_equal(value, [3.0, 7.0])


def test_minimum_and_maximum_of_two_limits():
    assert limits_of(minimum(last_norm, 4.0), [3.0, 5.0, 1.0])[0] == [4.0, 3.0, 4.0]
    assert limits_of(maximum(last_norm, 4.0), [3.0, 5.0, 1.0])[0] == [np.inf, 4.0, 5.0]
    both = maximum(minimum(last_norm, 10.0), 2.0)
    assert limits_of(both, [1.0, 50.0, 3.0])[0] == [10.0, 2.0, 10.0]


def test_limits_take_arrays_of_norms():
    limit = minimum(constant(2.0), last_norm)
    state = limit.init(jnp.zeros((2, 3)))
    value, _ = jax.jit(limit.update)(jnp.ones((2, 3)), state)
    assert value.shape == (2, 3)
    assert value.dtype == jnp.float32


@pytest.mark.parametrize("bad", [-1, float("nan"), False, "1", None, jnp.ones(2), jnp.array(True)])
def test_a_constant_that_may_not_be_raises(bad):
    if bad is None:
        assert limits_of(constant(bad), [1.0])[0] == [np.inf]
        return
    with pytest.raises(ValueError, match="`limit` must be"):
        constant(bad)


LARGE = [5_000_000_000, np.int64(3_000_000_000), np.uint64(2**63), np.array(5_000_000_000)]


@pytest.mark.parametrize("number", [*LARGE, 10**400, np.longdouble("1e400")], ids=type)
def test_a_large_number_is_a_limit_as_large_and_never_wraps(number):
    """In int32 3,000,000,000 wraps to a negative number, and 2**63 to 0: both zero the update."""
    expected = float(np.float32(number)) if number < 2**64 else np.inf
    assert limits_of(constant(number), [1.0])[0] == [expected]
    assert limits_of(constant(lambda count: number), [1.0])[0] == [expected]


def test_a_fraction_is_its_value():
    assert limits_of(constant(Fraction(1, 2)), [1.0])[0] == [0.5]
    assert limits_of(constant(lambda count: Fraction(1, 2)), [1.0])[0] == [0.5]
    half = Fraction(3, 2)
    for limit in (zscore(half), growth(half), ema(half, target=(half, Fraction(9, 10)))):
        assert limits_of(limit, [1.0, 2.0])[1]


@pytest.mark.parametrize(
    "value", [jnp.ones(1), None, 1 + 0j, jnp.complex64(1), "1", True, jnp.array(True)], ids=str
)
def test_a_schedule_of_what_is_no_real_scalar_raises_and_is_named(value):
    clip = gradclip_jax.clip_by_global_norm(lambda count: value)
    grads = jnp.array([3.0, 4.0])
    with pytest.raises(ValueError, match=r"^`max_norm` must be a schedule of real scalars, got "):
        clip.update(grads, clip.init(grads))
    clip = gradclip_jax.clip_by_range(lambda count: value, upper=2.0)
    with pytest.raises(ValueError, match=r"^`lower` must be a schedule of real scalars, got "):
        clip.update(grads, clip.init(grads))


@pytest.mark.parametrize(
    "function",
    [gradclip_jax.leaf_norms, gradclip_jax.responses.shrink, gradclip_jax.clip_by_norm, Limit],
)
def test_a_measure_a_response_or_a_clip_is_no_schedule(function):
    with pytest.raises(ValueError, match=rf"`limit` must be .* the function `{function.__name__}`"):
        clip_to_limit(function)
    with pytest.raises(ValueError, match=r"`max_norm` must be .* Pass a measure as `measure`"):
        gradclip_jax.clip_by_global_norm(function)


@pytest.mark.parametrize("bad", [2**31, np.int64(2**31), 10**400])
def test_counts_beyond_where_counters_stop_raise(bad):
    with pytest.raises(ValueError, match="`warmup_steps` must be"):
        ema(warmup_steps=bad)
    with pytest.raises(ValueError, match=r"^`max_consecutive` must be below 2\*\*31"):
        gradclip_jax.skip_nonfinite(optax.sgd(0.1), max_consecutive=bad)


def test_the_message_names_argument_rule_and_value():
    with pytest.raises(ValueError, match=r"^`limit` must be non-negative, got -1\.0\.$"):
        constant(-1.0)


def test_the_clock_of_a_schedule_stops_at_its_largest_value():
    most = jnp.int32(2**31 - 1)
    _, count = update_finite(constant(lambda count: 1.0), jnp.float32(1.0), most)
    assert int(count) == 2**31 - 1


@pytest.mark.parametrize(
    "make",
    [
        gradclip_jax.autoclip,
        gradclip_jax.zclip,
        gradclip_jax.adagc,
        gradclip_jax.limit_norm_growth,
        *(getattr(gradclip_jax.limits, name) for name in ("percentile", "median", "ema", "growth")),
        gradclip_jax.limits.zscore,
        gradclip_jax.limits.running_quantile,
    ],
)
def test_a_schedule_of_a_number_that_is_not_a_threshold_names_inject_hyperparams(make):
    with pytest.raises(ValueError, match=r"optax\.inject_hyperparams\(strategy\)"):
        make(optax.constant_schedule(1.5))


def test_a_schedule_of_an_argument_of_a_limit_is_injected_by_a_function_of_it():
    make = optax.inject_hyperparams(
        lambda k: gradclip_jax.clip_to_limit(gradclip_jax.limits.ema(k, warmup_steps=1))
    )
    clip = make(k=optax.linear_schedule(0.0, 100.0, 1))
    state = clip.init(jnp.zeros(()))
    for norm in (1.0, 9.0):  # no deviation yet: a thousandth of the mean, 100 times
        updates, state = clip.update(jnp.float32(norm), state)
    assert float(updates) == pytest.approx(1.1)
