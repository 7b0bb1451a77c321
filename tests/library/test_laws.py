"""The contracts that every strategy obeys, each as one test over the registry."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import (
    OF_OPTAX,
    OURS,
    STRATEGIES,
    Strategy,
    public_limits,
    public_strategies,
    seen,
    wide,
)

import gradclip_jax

LIMIT = 0.5
SHAPES = {"kernel": (4, 3), "bias": (3,), "filter": (2, 2, 3, 2), "scale": ()}
all_strategies = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)


def normal_tree(seed: int = 0, scale: float = 1.0, dtype=jnp.float32, shapes=SHAPES):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: (jax.random.normal(key, shape) * scale).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


PARAMS = normal_tree(seed=100)


def apply(clip, updates, params=None):
    params = updates if params is None else params
    return clip.update(updates, clip.init(params), params)


def at(index, tree):
    return jax.tree.map(lambda x: x[index], tree)


def tolerance(*trees) -> float:
    """A few roundings of the coarsest dtype."""
    return 4 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trees))


def test_every_public_strategy_is_in_the_registry():
    registered = {strategy.name.split("[")[0] for strategy in OURS} - set(public_limits())
    # These have no threshold of their own: it is their limits that the laws run over, under a cap.
    adaptive = {"adagc", "autoclip", "ema_clip", "limit_norm_growth", "median_clip",
                "percentile_clip", "quantile_clip"}  # fmt: skip
    unlike_a_norm = {"clip_by_dual_norm", "soft_spectral_clip", "spam_clip", "spectral_clip"}
    wrappers = {"clip21", "error_feedback", "skip_nonfinite", "skip_spikes"}
    others = {"clip_to_limit", "zero_nonfinite"} | adaptive | unlike_a_norm | wrappers
    assert set(public_strategies()) - others == registered


def test_every_public_limit_is_in_the_registry():
    registered = {strategy.name for strategy in OURS}
    # Of a constant and of two limits all others are made; zclip is a z-score under a cap.
    assert set(public_limits()) - registered == {"constant", "minimum", "maximum", "zscore"}


@all_strategies
@dtypes
def test_result_has_the_structure_shapes_and_dtypes_of_the_updates(strategy, dtype):
    updates = normal_tree(scale=10, dtype=dtype)
    result, _ = apply(strategy.make(LIMIT), updates, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, updates)


@all_strategies
@dtypes
def test_clipped_norms_are_at_most_the_limit(strategy, dtype):
    updates = normal_tree(scale=10, dtype=dtype)
    result, _ = apply(strategy.make(LIMIT), updates, PARAMS)
    limits = strategy.limits(LIMIT, result, PARAMS)
    for norm, limit in zip(strategy.norms(result), limits, strict=True):
        assert norm <= limit * (1 + tolerance(updates))


@all_strategies
def test_hard_clips_bring_a_large_norm_to_the_limit_itself(strategy):
    if strategy.drops or (strategy.changes_below and not strategy.enlarges):
        pytest.skip("its norms stay below the limit")
    result, _ = apply(strategy.make(LIMIT), normal_tree(scale=1000), PARAMS)
    np.testing.assert_allclose(
        strategy.norms(result), strategy.limits(LIMIT, result, PARAMS), rtol=1e-6
    )


@all_strategies
@dtypes
def test_updates_at_or_below_the_limit_are_bit_identical(strategy, dtype):
    if strategy.changes_below:
        pytest.skip("documented to change them")
    updates = normal_tree(scale=1e-3, dtype=dtype)
    result, state = apply(strategy.make(10.0), updates, normal_tree(seed=3, scale=10))
    chex.assert_trees_all_equal(result, updates)
    assert int(seen(state)["clip_count"]) == 0


@all_strategies
def test_an_update_exactly_at_the_limit_is_bit_identical(strategy):
    if strategy.changes_below or strategy.order == 3 or strategy.argument == "clipping":
        pytest.skip("no norm that is exact to the last bit")
    updates = {"kernel": jnp.zeros((2, 2)).at[0, 1].set(3.0)}
    limit = 1.5 if strategy.argument == "threshold" else 3.0  # a root mean square of four elements
    result, state = apply(strategy.make(limit), updates)
    chex.assert_trees_all_equal(result, updates)
    assert float(seen(state)["clipped"]) == 0


@all_strategies
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


@all_strategies
def test_direction_is_kept_within_a_group(strategy):
    updates = normal_tree(scale=10)
    result, _ = apply(strategy.make(LIMIT), updates, PARAMS)
    pairs = zip(strategy.vectors(updates), strategy.vectors(result), strict=True)
    for before, after in pairs:
        factor = np.linalg.norm(wide(after)) / np.linalg.norm(wide(before))
        np.testing.assert_allclose(wide(after), factor * wide(before), rtol=1e-5)


@all_strategies
@dtypes
def test_zero_stays_zero(strategy, dtype):
    updates = jax.tree.map(jnp.zeros_like, normal_tree(dtype=dtype))
    for limit in (0.0, LIMIT, jnp.inf):
        result, state = apply(strategy.make(limit), updates, PARAMS)
        chex.assert_trees_all_equal(result, updates)
        assert float(seen(state)["grad_norm"]) == 0


@all_strategies
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_threshold_of_zero_gives_zeros(strategy, scale):
    result, _ = apply(strategy.make(0.0), normal_tree(scale=scale), PARAMS)
    for leaf in jax.tree.leaves(result):
        assert (np.asarray(leaf) == 0).all()


@all_strategies
@pytest.mark.parametrize("limit", [float("inf"), None])
def test_no_threshold_is_the_identity_and_still_measures(strategy, limit):
    updates = normal_tree(scale=1e25)  # squares overflow
    result, state = apply(strategy.make(limit), updates, PARAMS)
    chex.assert_trees_all_equal(result, updates)
    metrics = seen(state)
    joint = np.linalg.norm(strategy.norms(updates))
    expected = max(strategy.norms(updates)) if "value" in strategy.name else joint
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["clip_factor"]) == 1
    assert int(metrics["clip_count"]) == 0


@all_strategies
@pytest.mark.parametrize("bad", [-1.0, float("nan"), True, "1.0", 1j, [1.0], np.float32(-1.0)])
def test_a_threshold_that_may_not_be_raises_and_is_named(strategy, bad):
    if strategy.name == "clip_by_value[pair]":
        make = functools.partial(gradclip_jax.clip_by_value, -1.0)
    else:
        make = strategy.make
    with pytest.raises(ValueError, match=rf"`{strategy.argument.split('[')[0]}.* must be .*, got "):
        make(bad)


@all_strategies
@pytest.mark.parametrize("bad", [jnp.float32(-1.0), jnp.float32(jnp.nan)])
def test_a_bad_array_raises_and_a_bad_traced_threshold_counts_as_zero(strategy, bad):
    with pytest.raises(ValueError, match="must be"):
        strategy.make(bad)
    if strategy.name == "clip_by_value[pair]":
        pytest.skip("the other bound is minus a bad one, which is a good one")
    run = jax.jit(lambda limit, updates: apply(strategy.make(limit), updates, PARAMS)[0])
    for leaf in jax.tree.leaves(run(bad, normal_tree())):
        assert (np.asarray(leaf) == 0).all()


@all_strategies
@pytest.mark.parametrize("policy", ["ignore", None])
def test_a_policy_that_does_not_exist_raises(strategy, policy):
    with pytest.raises(ValueError, match='`on_nonfinite` must be "zero" or "propagate", got'):
        strategy.make(1.0, on_nonfinite=policy)


@all_strategies
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


@all_strategies
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


@all_strategies
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


@all_strategies
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_propagate_makes_the_group_nan_and_leaves_the_others_alone(strategy, bad):
    updates = normal_tree(scale=10)
    broken = {**updates, "bias": updates["bias"].at[0].set(bad)}
    result, _ = apply(strategy.make(LIMIT, on_nonfinite="propagate"), broken, PARAMS)
    for before, after in zip(strategy.vectors(broken), strategy.vectors(result), strict=True):
        assert np.isfinite(after).all() == np.isfinite(before).all()
        assert np.isnan(after).any() != np.isfinite(before).all()


@all_strategies
def test_after_a_nan_the_next_update_is_as_if_nothing_had_been(strategy):
    clip = strategy.make(LIMIT)
    updates = normal_tree(scale=10)
    state = clip.init(PARAMS)
    _, state = clip.update(jax.tree.map(lambda x: x * jnp.nan, updates), state, PARAMS)
    result, state = clip.update(updates, state, PARAMS)
    chex.assert_trees_all_equal(result, apply(clip, updates, PARAMS)[0])
    assert all(np.isfinite(value) for value in seen(state).values())


def same_avals(a, b):
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type))
    return jax.tree.structure(a) == jax.tree.structure(b) and describe(a) == describe(b)


@all_strategies
@dtypes
def test_state_keeps_its_structure_shapes_dtypes_and_weak_types(strategy, dtype):
    updates = normal_tree(scale=10, dtype=dtype)
    clip = strategy.make(optax.linear_schedule(1.0, 0.1, 10))
    state = clip.init(PARAMS)
    _, new = clip.update(updates, state, PARAMS)
    assert same_avals(state, new)


@all_strategies
def test_runs_in_scan_and_traces_once(strategy):
    clip = strategy.make(LIMIT)
    updates = normal_tree(scale=10)
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return clip.update(updates, state, PARAMS)[1]

    once = step(step(step(clip.init(PARAMS))))
    assert len(traces) == 1
    scanned, _ = jax.lax.scan(
        lambda state, _: (clip.update(updates, state, PARAMS)[1], None),
        clip.init(PARAMS),
        length=3,
    )
    chex.assert_trees_all_close(scanned, once, rtol=1e-6)
    assert int(seen(scanned)["step_count"]) == 3


@all_strategies
def test_init_accepts_abstract_params(strategy):
    clip = strategy.make(LIMIT)
    abstract = jax.eval_shape(clip.init, PARAMS)
    assert jax.tree.structure(abstract) == jax.tree.structure(clip.init(PARAMS))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert same_avals(clip.init(shapes), clip.init(PARAMS))


@all_strategies
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


@all_strategies
def test_a_schedule_is_called_with_the_number_of_updates(strategy):
    clip = strategy.make(lambda count: jnp.array([3.0, 2.0, 1.0])[count])
    updates = normal_tree(scale=100)
    state = clip.init(PARAMS)
    for limit in (3.0, 2.0, 1.0):
        result, state = clip.update(updates, state, PARAMS)
        expected, _ = apply(strategy.make(limit), updates, PARAMS)
        chex.assert_trees_all_close(result, expected, rtol=1e-6)


@all_strategies
def test_a_traced_threshold_may_be_mapped_over(strategy):
    updates = normal_tree(scale=10)
    mapped = jax.vmap(lambda limit: apply(strategy.make(limit), updates, PARAMS)[0])(
        jnp.array([0.1, 1.0])
    )
    for i, limit in enumerate([0.1, 1.0]):
        expected, _ = apply(strategy.make(limit), updates, PARAMS)
        chex.assert_trees_all_close(at(i, mapped), expected, rtol=1e-6)


@all_strategies
def test_threshold_can_be_injected_as_a_hyperparameter(strategy):
    if strategy in OF_OPTAX or "[pair]" in strategy.name or "[mapping]" in strategy.name:
        pytest.skip("not a factory of the library")
    argument = strategy.argument
    make = optax.inject_hyperparams(strategy.make)
    if strategy.name == "clip_by_group_norm":
        make = optax.inject_hyperparams(strategy.make, static_args=("labels",))
    if isinstance(strategy.make, functools.partial) and "labels" not in strategy.make.keywords:
        make = optax.inject_hyperparams(strategy.make, static_args=tuple(strategy.make.keywords))
    updates = normal_tree(scale=10, dtype=jnp.bfloat16)
    clip = make(**{argument: optax.linear_schedule(0.3, 0.1, 10)})
    result, state = jax.jit(clip.update)(updates, clip.init(updates), updates)
    expected, _ = apply(strategy.make(0.3), updates)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(wide(x), wide(y), rtol=0.02), result, expected
    )
    assert argument in state.hyperparams


@all_strategies
def test_the_derivative_at_zero_is_the_identity(strategy):
    clip = strategy.make(LIMIT)

    def clipped(x):
        return apply(clip, {"x": x, "dead": jnp.zeros(2)}, {"x": jnp.ones(3), "dead": jnp.ones(2)})[
            0
        ]["x"]

    np.testing.assert_array_equal(jax.jacobian(clipped)(jnp.zeros(3)), np.eye(3))


@all_strategies
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


@all_strategies
def test_the_derivative_is_that_of_finite_differences(strategy, x64):
    clip = strategy.make(LIMIT)

    def clipped(x):
        return apply(clip, {"x": x}, {"x": jnp.ones(3)})[0]["x"]

    for scale in (0.05, 3.0):
        x = jnp.array([1.0, -2.0, 0.5]) * scale
        jax.test_util.check_grads(clipped, (x,), order=1, eps=1e-6)


@all_strategies
def test_jit_eager_and_vmap_agree(strategy):
    clip = strategy.make(LIMIT)
    batch = [normal_tree(seed, 10.0) for seed in range(3)]
    eager = [apply(clip, updates, PARAMS) for updates in batch]
    jitted = [jax.jit(functools.partial(apply, clip))(updates, PARAMS) for updates in batch]
    chex.assert_trees_all_close(eager, jitted, rtol=1e-6)
    mapped = jax.vmap(lambda updates: apply(clip, updates, PARAMS))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
    )
    for i, expected in enumerate(eager):
        chex.assert_trees_all_close(at(i, mapped), expected, rtol=1e-6)


@all_strategies
def test_updates_and_state_may_be_donated(strategy):
    clip = strategy.make(LIMIT)
    expected, _ = apply(clip, normal_tree(scale=10), PARAMS)
    updates, state = normal_tree(scale=10), clip.init(PARAMS)
    result, _ = jax.jit(clip.update, donate_argnums=(0, 1))(updates, state, PARAMS)
    chex.assert_trees_all_close(result, expected, rtol=1e-6)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(updates))


@all_strategies
def test_leaves_that_are_no_gradients_pass_untouched_and_uncounted(strategy):
    gradients = normal_tree(scale=10)
    others = {
        "int": jnp.arange(3) + 100,
        "int8": jnp.array([100], jnp.int8),
        "bool": jnp.array([True]),
        "key": jax.random.key(0),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "none": None,
        "size_zero": jnp.zeros((0, 3)),
    }
    params = {"gradients": PARAMS, "others": {**others, "float0": jnp.arange(2)}}
    clip = strategy.make(LIMIT)
    updates = {"gradients": gradients, "others": others}
    result, state = clip.update(updates, clip.init(params), params)
    alone, alone_state = apply(clip, gradients, PARAMS)
    if strategy.name != "clip_by_group_norm":  # there the ranks of other leaves make no group
        chex.assert_trees_all_close(result["gradients"], alone, rtol=1e-6)
    for name, leaf in others.items():
        if name != "size_zero":
            assert result["others"][name] is leaf
    metrics, expected = seen(state), seen(alone_state)
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-6)


@all_strategies
def test_empty_trees_and_python_floats(strategy):
    clip = strategy.make(LIMIT)
    empties = [{}, (), {"a": None}]
    for empty in [] if "[mapping]" in strategy.name else empties:  # its label must be somewhere
        result, state = clip.update(empty, clip.init(empty), empty)
        assert result == empty
        assert int(seen(state)["step_count"]) == 1
    result, _ = clip.update({"x": 10.0}, clip.init({"x": 1.0}), {"x": 1.0})
    expected, _ = apply(clip, {"x": jnp.float32(10.0)}, {"x": jnp.float32(1.0)})
    assert float(result["x"]) == pytest.approx(float(expected["x"]))


@all_strategies
def test_complex_leaves_are_held_by_modulus(strategy):
    if strategy.name == "clip_by_value[pair]":
        with pytest.raises(ValueError, match="`upper` must be left out for complex gradients"):
            apply(strategy.make(1.0), {"z": jnp.array([1 + 1j])})
        return
    z = jnp.array([30 + 40j, -6j, 0])
    result, _ = apply(strategy.make(LIMIT), {"z": z}, {"z": jnp.ones(3)})
    modulus = jnp.abs(z)
    expected, _ = apply(strategy.make(LIMIT), {"z": modulus}, {"z": jnp.ones(3)})
    np.testing.assert_allclose(jnp.abs(result["z"]), expected["z"], rtol=1e-6)
    ratio = np.asarray(result["z"])[:2] / np.asarray(z)[:2]
    np.testing.assert_allclose(ratio.imag, 0, atol=1e-7)
    assert result["z"].dtype == z.dtype


@all_strategies
def test_float8_leaves_are_measured_in_float32(strategy):
    updates = {"x": jnp.array([240.0, -448.0, 3.5], jnp.float8_e4m3fn)}
    params = {"x": jnp.ones(3)}
    result, _ = apply(strategy.make(32.0), updates, params)
    wider, _ = apply(strategy.make(32.0), {"x": updates["x"].astype(jnp.float32)}, params)
    assert result["x"].dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(
        np.asarray(result["x"], np.float32), wider["x"], rtol=0.07, atol=2**-9
    )


@all_strategies
def test_norms_are_float64_under_x64(strategy, x64):
    updates = {"x": jnp.array([3e200, 4e200])}
    clip = strategy.make(1e100)
    result, state = apply(clip, updates, {"x": jnp.ones(2)})
    assert result["x"].dtype == jnp.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(state.grad_norm)} == {jnp.dtype(jnp.float64)}
    limit = strategy.limit(1e100, np.ones(2), np.ones(2))
    assert max(strategy.norms(result)) <= limit * (1 + 1e-12)


@all_strategies
def test_a_clip_that_is_off_has_the_state_of_one_that_is_on(strategy):
    on, off = strategy.make(1.0).init(PARAMS), strategy.make(None).init(PARAMS)
    assert same_avals(on, off)


@all_strategies
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


@all_strategies
def test_conditional_updates_keep_the_type_of_the_state(strategy):
    clip = strategy.make(LIMIT)
    updates = normal_tree(scale=10)

    @jax.jit
    def step(state, flag):
        return jax.lax.cond(flag, lambda s: clip.update(updates, s, PARAMS)[1], lambda s: s, state)

    state = step(step(clip.init(PARAMS), True), False)
    assert int(seen(state)["step_count"]) == 1


@all_strategies
def test_updates_of_another_structure_than_the_params_raise(strategy):
    clip = strategy.make(LIMIT)
    state = clip.init(PARAMS)
    updates = normal_tree()
    del updates["kernel"]
    with pytest.raises(ValueError, match="`params` must have the structure of the updates"):
        clip.update(updates, state, PARAMS)


@all_strategies
def test_equal_gradients_give_equal_bits(strategy):
    clip = strategy.make(LIMIT)
    updates = normal_tree(scale=10)
    chex.assert_trees_all_equal(apply(clip, updates, PARAMS), apply(clip, updates, PARAMS))


def test_the_registry_reference_finds_a_wrong_clip():
    """The laws can fail: optax's clip breaks the one about dtypes and overflow."""
    wrong = Strategy("wrong", optax.clip_by_global_norm, OURS[0].groups)
    updates = {"x": jnp.array([300.0], jnp.float16)}
    result, _ = apply(wrong.make(1.0), updates)
    assert wrong.norms(result) == [0.0]
