"""Laws of the ground floor: numbers, dtypes, thresholds and policies.

What they test is one function in one place (`check_threshold`, `_norms`, `_rescale`), which every
strategy calls. So they run over one strategy of each kind; `test_strategy_laws.py` has the laws
that run over all.
"""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import (
    FLOOR,
    FORMULAS,
    LIMIT,
    PARAMS,
    Strategy,
    apply,
    at,
    everything,
    measured,
    normal_tree,
    same_avals,
    seen,
    tolerance,
    wide,
)

from gradclip_jax import metrics

representatives = pytest.mark.parametrize("strategy", FLOOR, ids=str)
formulas = pytest.mark.parametrize("strategy", FORMULAS, ids=str)
FLOAT64 = jnp.dtype(jnp.float64)
dtypes = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: jnp.dtype(dtype).name
)


@representatives
@dtypes
def test_result_has_the_structure_shapes_and_dtypes_of_the_updates(strategy, dtype):
    updates = normal_tree(scale=10, dtype=dtype)
    result, _ = apply(strategy.make(LIMIT), updates, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, updates)


@representatives
@dtypes
def test_clipped_norms_are_at_most_the_limit(strategy, dtype):
    updates = normal_tree(scale=10, dtype=dtype)
    result, _ = apply(strategy.make(LIMIT), updates, PARAMS)
    limits = strategy.limits(LIMIT, result, PARAMS)
    for norm, limit in zip(strategy.norms(result), limits, strict=True):
        assert norm <= limit * (1 + tolerance(updates))


@representatives
@dtypes
def test_updates_at_or_below_the_limit_are_bit_identical(strategy, dtype):
    if strategy.changes_below:
        pytest.skip("documented to change them")
    updates = normal_tree(scale=1e-3, dtype=dtype)
    result, state = apply(strategy.make(10.0), updates, normal_tree(seed=3, scale=10))
    chex.assert_trees_all_equal(result, updates)
    assert int(seen(state)["clip_count"]) == 0


@representatives
@hypothesis.given(
    seed=st.integers(0, 1000), log_scale=st.floats(-30, 30), log_limit=st.floats(-6, 6)
)
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
def test_norms_never_grow(strategy, seed, log_scale, log_limit):
    updates = normal_tree(seed, 10.0**log_scale)
    threshold = 10.0**log_limit
    result, _ = apply(strategy.make(threshold), updates, PARAMS)
    limits = strategy.limits(threshold, result, PARAMS)
    befores, afters = strategy.norms(updates), strategy.norms(result)
    for before, after, limit in zip(befores, afters, limits, strict=True):
        # Elements below the smallest normal float32 may be flushed.
        bound = limit if strategy.enlarges else min(before, limit)
        assert after <= bound * (1 + 1e-6) + 1e-36


@representatives
@dtypes
def test_zero_stays_zero(strategy, dtype):
    updates = jax.tree.map(jnp.zeros_like, normal_tree(dtype=dtype))
    for limit in (0.0, LIMIT, jnp.inf):
        result, state = apply(strategy.make(limit), updates, PARAMS)
        chex.assert_trees_all_equal(result, updates)
        assert measured(seen(state)) == 0


@representatives
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_threshold_of_zero_gives_zeros(strategy, scale):
    result, _ = apply(strategy.make(0.0), normal_tree(scale=scale), PARAMS)
    for leaf in jax.tree.leaves(result):
        assert (np.asarray(leaf) == 0).all()


@representatives
@pytest.mark.parametrize("limit", [float("inf"), None])
def test_no_threshold_is_the_identity_and_still_measures(strategy, limit):
    updates = normal_tree(scale=1e25)  # squares overflow
    result, state = apply(strategy.make(limit), updates, PARAMS)
    chex.assert_trees_all_equal(result, updates)
    metrics = seen(state)
    assert measured(metrics) == pytest.approx(strategy.joint_norm(updates), rel=1e-5)
    assert float(metrics["clip_factor"]) == 1
    assert int(metrics["clip_count"]) == 0


@representatives
@pytest.mark.parametrize("bad", [-1.0, float("nan"), True, "1.0", 1j, [1.0], np.float32(-1.0)])
def test_a_threshold_that_may_not_be_raises_and_is_named(strategy, bad):
    with pytest.raises(ValueError, match=rf"`{strategy.argument}` must be .*, got "):
        strategy.make(bad)


@representatives
@pytest.mark.parametrize("bad", [jnp.float32(-1.0), jnp.float32(jnp.nan)])
def test_a_bad_array_raises_and_a_bad_traced_threshold_counts_as_zero(strategy, bad):
    with pytest.raises(ValueError, match="must be"):
        strategy.make(bad)
    run = jax.jit(lambda limit, updates: apply(strategy.make(limit), updates, PARAMS)[0])
    for leaf in jax.tree.leaves(run(bad, normal_tree())):
        assert (np.asarray(leaf) == 0).all()


@representatives
@pytest.mark.parametrize("policy", ["ignore", None])
def test_a_policy_that_does_not_exist_raises(strategy, policy):
    with pytest.raises(ValueError, match='`on_nonfinite` must be "zero" or "propagate", got'):
        strategy.make(1.0, on_nonfinite=policy)


@representatives
@pytest.mark.parametrize(
    ("value", "count", "dtype"),
    [
        (300.0, 4, jnp.float16),  # squares overflow from 256
        (1e20, 100, jnp.float32),
        (3e38, 1, jnp.float32),  # the factor is below the smallest float32
        (1e38, 3, jnp.float32),
        (1e-23, 4, jnp.float32),
        (2e-38, 9, jnp.float32),
        (6e-8, 4, jnp.float16),  # the smallest subnormal
    ],
)
@pytest.mark.parametrize("relative_limit", [0.01, 100.0])
def test_finite_gradients_are_held_exactly_at_any_scale(
    strategy, value, count, dtype, relative_limit
):
    updates = {"x": jnp.full(count, value, dtype)}
    params = {"x": jnp.ones(count)}
    norm = max(strategy.norms(updates))
    share = max(strategy.limits(1.0, updates, params))
    limit = norm / share * relative_limit
    if limit > 3e38 or norm > 3e38:
        pytest.skip("no float32")
    result, state = apply(strategy.make(limit), updates, params)
    expected = wide(updates["x"])
    if strategy.drops:
        expected = expected * (relative_limit > 1)
    elif strategy.changes_below or relative_limit < 1:
        r = 1 / relative_limit
        name = strategy.name
        factor = (
            1 / (1 + r)
            if "smooth]" in name
            else 1 / np.sqrt(1 + r * r)
            if "sqrt" in name
            else np.tanh(r) / r
            if "tanh" in name
            else relative_limit
        )
        expected = expected * factor
    # What is below the smallest normal number of float32 counts as zero in XLA.
    atol = 1.2e-38 if dtype == jnp.float32 else 6e-8
    np.testing.assert_allclose(wide(result["x"]), expected, rtol=tolerance(updates), atol=atol)
    assert int(seen(state)["nonfinite_count"]) == 0


@representatives
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_what_is_not_finite_zeroes_its_group_and_leaves_the_others_alone(strategy, bad, name):
    updates = normal_tree(scale=10)
    broken = {**updates, name: updates[name].at[(0,) * updates[name].ndim].set(bad)}
    clip = strategy.make(LIMIT)
    expected, _ = apply(clip, updates, PARAMS)
    result, state = apply(clip, broken, PARAMS)
    pairs = zip(
        strategy.vectors(broken), strategy.vectors(expected), strategy.vectors(result), strict=True
    )
    for before, unbroken, after in pairs:
        if np.isfinite(before).all():
            np.testing.assert_array_equal(after, unbroken)
        else:
            np.testing.assert_array_equal(after, 0)
    assert int(seen(state)["nonfinite_count"]) == 1


@representatives
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("position", [0, 2500, 4999])
def test_what_is_not_finite_is_found_in_large_arrays(strategy, bad, position):
    """From 1,000 elements on, the maximum of an array loses NaN on CPU."""
    updates = {"x": jnp.ones(5000).at[position].set(bad), "y": jnp.ones((50, 40))}
    result, state = apply(strategy.make(0.1), updates, jax.tree.map(jnp.ones_like, updates))
    assert int(seen(state)["nonfinite_count"]) == 1
    for before, after in zip(strategy.vectors(updates), strategy.vectors(result), strict=True):
        assert np.isfinite(after).all()
        assert np.isfinite(before).all() or not after.any()


@representatives
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_propagate_makes_the_group_nan_and_leaves_the_others_alone(strategy, bad):
    updates = normal_tree(scale=10)
    broken = {**updates, "bias": updates["bias"].at[0].set(bad)}
    result, _ = apply(strategy.make(LIMIT, on_nonfinite="propagate"), broken, PARAMS)
    for before, after in zip(strategy.vectors(broken), strategy.vectors(result), strict=True):
        assert np.isfinite(after).all() == np.isfinite(before).all()
        assert np.isnan(after).any() != np.isfinite(before).all()


@representatives
@dtypes
def test_state_keeps_its_structure_shapes_dtypes_and_weak_types(strategy, dtype):
    updates = normal_tree(scale=10, dtype=dtype)
    clip = strategy.make(optax.linear_schedule(1.0, 0.1, 10))
    state = clip.init(PARAMS)
    _, new = clip.update(updates, state, PARAMS)
    assert same_avals(state, new)


@representatives
@pytest.mark.parametrize("tree_dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize(
    "threshold",
    [
        0.3,
        np.float32(0.3),
        np.float64(0.3),
        jnp.float32(0.3),
        jnp.bfloat16(0.3),
        jnp.float16(0.3),
        optax.constant_schedule(0.3),
        optax.linear_schedule(0.3, 0.1, 10),
    ],
    ids=lambda threshold: f"{type(threshold).__name__}-{getattr(threshold, 'dtype', '')}",
)
def test_any_kind_of_threshold_serves_any_dtype(strategy, tree_dtype, threshold):
    updates = normal_tree(scale=10, dtype=jnp.bfloat16)
    if tree_dtype == "mixed":
        updates["kernel"] = updates["kernel"].astype(jnp.float32)
    expected, _ = apply(strategy.make(0.3), updates, PARAMS)
    result, _ = apply(strategy.make(threshold), updates, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, updates)
    # A threshold of bfloat16 is 0.30078.
    rounded = tolerance(updates)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(wide(x), wide(y), rtol=rounded), result, expected
    )


@representatives
def test_a_traced_threshold_may_be_mapped_over(strategy):
    updates = normal_tree(scale=10)
    mapped = jax.vmap(lambda limit: apply(strategy.make(limit), updates, PARAMS)[0])(
        jnp.array([0.1, 1.0])
    )
    for i, limit in enumerate([0.1, 1.0]):
        expected, _ = apply(strategy.make(limit), updates, PARAMS)
        chex.assert_trees_all_close(at(i, mapped), expected, rtol=1e-6)


@representatives
def test_a_mapped_update_is_the_one_of_each(strategy):
    clip = strategy.make(LIMIT)
    batch = [normal_tree(seed, 10.0) for seed in range(3)]
    mapped = jax.vmap(lambda updates: apply(clip, updates, PARAMS))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
    )
    for i, updates in enumerate(batch):
        chex.assert_trees_all_close(at(i, mapped), apply(clip, updates, PARAMS), rtol=1e-6)


@formulas
def test_the_derivative_at_zero_is_the_identity(strategy):
    clip = strategy.make(LIMIT)

    def clipped(x):
        return apply(clip, {"x": x, "dead": jnp.zeros(2)}, {"x": jnp.ones(3), "dead": jnp.ones(2)})[
            0
        ]["x"]

    np.testing.assert_array_equal(jax.jacobian(clipped)(jnp.zeros(3)), np.eye(3))


@formulas
@pytest.mark.parametrize("scale", [1e-25, 1e-3, 100.0, 1e25])
def test_derivatives_are_finite_and_agree_with_forward_mode(strategy, scale):
    if strategy.enlarges and scale == 1e-25:
        pytest.skip("its derivative is 5e24 there, and the square of a norm underflows on the way")
    clip = strategy.make(LIMIT)
    params = {"x": jnp.ones(3), "dead": jnp.ones(2)}

    def clipped(x):
        return apply(clip, {"x": x, "dead": jnp.zeros(2)}, params)[0]["x"]

    x = jnp.array([1.0, -2.0, 0.5]) * scale
    backward = jax.jacrev(clipped)(x)
    assert np.isfinite(backward).all()
    np.testing.assert_allclose(backward, jax.jacfwd(clipped)(x), rtol=1e-4, atol=1e-6)


@representatives
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forward", "backward"])
def test_an_update_that_was_zeroed_has_a_derivative_of_zero(strategy, mode, bad):
    """By the updates and by the limit; zero times the derivative at a NaN would be NaN."""
    params = {"x": jnp.ones(3), "y": jnp.ones((2, 2))}

    def clipped(limit, updates):
        return apply(strategy.make(limit), updates, params)[0]

    limit, y = jnp.float32(0.5), jnp.array([[3.0, 0.0], [0.0, 40.0]])
    updates = {"x": jnp.array([bad, 2.0, -30.0]), "y": y}
    result = clipped(limit, updates)
    assert float(result["x"][0]) == 0
    for name, (by_limit, by_updates) in mode(clipped, argnums=(0, 1))(limit, updates).items():
        chex.assert_tree_all_finite((by_limit, by_updates))
        # What is zero in `y` was so before: only `x` was zeroed.
        zeroed = (result[name] == 0) & (name == "x")
        for row in (by_limit, *by_updates.values()):
            np.testing.assert_array_equal(row[zeroed], 0)


@representatives
def test_the_derivative_of_a_mapped_update_is_that_of_each(strategy):
    """Also of one that was zeroed, beside one that was not."""
    params = {"x": jnp.ones(3)}

    def clipped(x):
        return apply(strategy.make(LIMIT), {"x": x}, params)[0]["x"]

    x = jnp.array([[3.0, -4.0, 0.1], [jnp.nan, 1.0, -20.0], [1e-3, 0.0, 1e25]])
    rows = jax.jacrev(jax.vmap(clipped))(x)
    for i in range(3):
        np.testing.assert_allclose(rows[i, :, i], jax.jacrev(clipped)(x[i]), rtol=1e-6)
    assert np.isfinite(rows).all()


@formulas
def test_the_derivative_is_that_of_finite_differences(strategy, x64):
    clip = strategy.make(LIMIT)

    def clipped(x):
        return apply(clip, {"x": x}, {"x": jnp.ones(3)})[0]["x"]

    for scale in (0.05, 3.0):
        x = jnp.array([1.0, -2.0, 0.5]) * scale
        jax.test_util.check_grads(clipped, (x,), order=1, eps=1e-6)


@formulas
def test_complex_leaves_are_held_by_modulus(strategy):
    z = jnp.array([30 + 40j, -6j, 0])
    result, _ = apply(strategy.make(LIMIT), {"z": z}, {"z": jnp.ones(3)})
    modulus = jnp.abs(z)
    expected, _ = apply(strategy.make(LIMIT), {"z": modulus}, {"z": jnp.ones(3)})
    np.testing.assert_allclose(jnp.abs(result["z"]), expected["z"], rtol=1e-6)
    ratio = np.asarray(result["z"])[:2] / np.asarray(z)[:2]
    np.testing.assert_allclose(ratio.imag, 0, atol=1e-7)
    assert result["z"].dtype == z.dtype


@representatives
def test_float8_leaves_are_measured_in_float32(strategy):
    updates = {"x": jnp.array([240.0, -448.0, 3.5], jnp.float8_e4m3fn)}
    params = {"x": jnp.ones(3)}
    result, _ = apply(strategy.make(32.0), updates, params)
    wider, _ = apply(strategy.make(32.0), {"x": updates["x"].astype(jnp.float32)}, params)
    assert result["x"].dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(
        np.asarray(result["x"], np.float32), wider["x"], rtol=0.07, atol=2**-9
    )


@representatives
def test_norms_are_float64_under_x64(strategy, x64):
    updates = {"x": jnp.array([3e200, 4e200])}
    clip = strategy.make(1e100)
    result, state = apply(clip, updates, {"x": jnp.ones(2)})
    assert result["x"].dtype == jnp.float64
    assert {x.dtype for x in jax.tree.leaves((state.grad_norm, state.clip_measure))} == {FLOAT64}
    limit = strategy.limit(1e100, np.ones(2), np.ones(2))
    assert max(strategy.norms(result)) <= limit * (1 + 1e-12)
    found = metrics(state)
    assert found["clip_limit"].dtype == FLOAT64
    assert found["clipped"] == 1


@representatives
def test_composes_with_the_wrappers_of_optax(strategy, standard_promotion):
    updates = normal_tree(scale=10)
    optimizer = optax.chain(strategy.make(LIMIT), optax.sgd(1.0))
    expected, _ = optimizer.update(updates, optimizer.init(PARAMS), PARAMS)
    for wrapped in (
        optax.apply_if_finite(optimizer, 3),
        optax.MultiSteps(optimizer, 1).gradient_transformation(),
        optax.masked(optimizer, True),
        optax.with_extra_args_support(optimizer),
    ):
        state = wrapped.init(PARAMS)

        def body(state, _, wrapped=wrapped):
            result, state = wrapped.update(updates, state, PARAMS)
            return state, result

        state, results = jax.lax.scan(body, state, length=2)
        chex.assert_trees_all_close(at(-1, results), expected, rtol=1e-6)
        assert int(seen(state)["step_count"]) == 2


@representatives
def test_conditional_updates_keep_the_type_of_the_state(strategy):
    clip = strategy.make(LIMIT)
    updates = normal_tree(scale=10)

    @jax.jit
    def step(state, flag):
        return jax.lax.cond(flag, lambda s: clip.update(updates, s, PARAMS)[1], lambda s: s, state)

    state = step(step(clip.init(PARAMS), True), False)
    assert int(seen(state)["step_count"]) == 1


@representatives
def test_equal_gradients_give_equal_bits(strategy):
    clip = strategy.make(LIMIT)
    updates = normal_tree(scale=10)
    chex.assert_trees_all_equal(apply(clip, updates, PARAMS), apply(clip, updates, PARAMS))


def test_the_reference_finds_a_wrong_clip():
    """The laws can fail: the norm that the registry computes is not at the limit of this clip."""

    def update(updates, state, params=None):
        norm = jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(updates)))  # in float16
        return jax.tree.map(lambda x: x / jnp.maximum(norm, 1), updates), state

    naive = optax.GradientTransformation(lambda params: (), update)
    wrong = Strategy("wrong", lambda limit: optax.with_extra_args_support(naive), everything)
    updates = {"x": jnp.array([300.0], jnp.float16)}
    result, _ = apply(wrong.make(1.0), updates)
    assert wrong.norms(updates) == [300.0]
    assert wrong.norms(result) == [0.0]
