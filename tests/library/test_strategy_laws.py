"""What holds of every strategy, one case each: see `test_floor_laws.py` for what all share."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import (
    EVERY,
    FLOOR,
    KINDS,
    LIBRARY,
    LIMIT,
    OF_OPTAX,
    OURS,
    PARAMS,
    STRATEGIES,
    apply,
    at,
    measured,
    normal_tree,
    public_limits,
    public_strategies,
    same_avals,
    seen,
    tolerance,
    wide,
)

import gradclip_jax
from gradclip_jax import _inject

all_strategies = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
every_strategy = pytest.mark.parametrize("strategy", EVERY, ids=str)


def test_every_public_strategy_is_in_the_table_and_has_its_laws():
    wrappers = {"clip21", "clip_update_rms", "error_feedback", "skip_nonfinite", "skip_spikes"}
    assert set(public_strategies()) - wrappers - {"clip_norms"} == set(_inject.STRATEGIES)
    of_laws = {strategy.name.split("[")[0] for strategy in EVERY}
    assert (
        set(_inject.STRATEGIES) - {"zero_nonfinite", "qk_clip"} <= of_laws
        or LIBRARY != "gradclip_jax"
    )


def test_every_public_limit_is_in_the_registry():
    registered = {strategy.name for strategy in OURS}
    # Of a constant and of two limits all others are made; zclip is a z-score under a cap.
    assert set(public_limits()) - registered == {"constant", "minimum", "maximum", "zscore"}


def test_the_representatives_of_the_floor_are_four():
    """The engine at global scope, one clip per array, one per element and one of matrices."""
    if LIBRARY == "gradclip_jax":
        assert {strategy.name for strategy in FLOOR} == KINDS


@every_strategy
def test_result_has_the_structure_shapes_and_dtypes_of_the_updates(strategy):
    updates = normal_tree(scale=10)
    updates["bias"] = updates["bias"].astype(jnp.bfloat16)
    updates["filter"] = updates["filter"].astype(jnp.float16)
    result, _ = apply(strategy.make(LIMIT), updates, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, updates)


@all_strategies
def test_clipped_norms_are_at_most_the_limit(strategy):
    updates = normal_tree(scale=10)
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
def test_updates_at_or_below_the_limit_are_bit_identical(strategy):
    if strategy.changes_below:
        pytest.skip("documented to change them")
    updates = normal_tree(scale=1e-3)
    result, state = apply(strategy.make(10.0), updates, normal_tree(seed=3, scale=10))
    chex.assert_trees_all_equal(result, updates)
    assert int(seen(state)["clip_count"]) == 0


@all_strategies
def test_an_update_exactly_at_the_limit_is_bit_identical(strategy):
    is_rms_of_units = strategy.units and strategy.argument == "threshold"
    if strategy.changes_below or strategy.order == 3 or strategy.needs_params or is_rms_of_units:
        pytest.skip("no norm that is exact to the last bit")
    updates = {"kernel": jnp.zeros((2, 2)).at[0, 1].set(3.0)}
    limit = 1.5 if strategy.argument == "threshold" else 3.0  # a root mean square of four elements
    result, state = apply(strategy.make(limit), updates)
    chex.assert_trees_all_equal(result, updates)
    assert float(seen(state)["clipped"]) == 0
    assert int(seen(state)["clip_count"]) == 0


@all_strategies
def test_direction_is_kept_within_a_group(strategy):
    if strategy.of_matrices:
        pytest.skip("it keeps singular vectors, and shortens some")
    updates = normal_tree(scale=10)
    result, _ = apply(strategy.make(LIMIT), updates, PARAMS)
    pairs = zip(strategy.vectors(updates), strategy.vectors(result), strict=True)
    for before, after in pairs:
        factor = np.linalg.norm(wide(after)) / np.linalg.norm(wide(before))
        np.testing.assert_allclose(wide(after), factor * wide(before), rtol=1e-5)


@every_strategy
def test_zero_stays_zero(strategy):
    updates = jax.tree.map(jnp.zeros_like, PARAMS)
    result, state = apply(strategy.make(LIMIT), updates, PARAMS)
    chex.assert_trees_all_equal(result, updates)
    assert measured(seen(state)) == 0


@all_strategies
def test_a_threshold_of_zero_gives_zeros(strategy):
    result, _ = apply(strategy.make(0.0), normal_tree(), PARAMS)
    for leaf in jax.tree.leaves(result):
        assert (np.asarray(leaf) == 0).all()


@all_strategies
def test_no_threshold_is_the_identity_and_still_measures(strategy):
    updates = normal_tree(scale=1e25)  # squares overflow
    result, state = apply(strategy.make(None), updates, PARAMS)
    chex.assert_trees_all_equal(result, updates)
    metrics = seen(state)
    assert measured(metrics) == pytest.approx(strategy.joint_norm(updates), rel=1e-5)
    assert float(metrics["clip_factor"]) == 1
    assert int(metrics["clip_count"]) == 0


@all_strategies
def test_a_negative_threshold_raises_and_is_named(strategy):
    """Each has its own name; what else may not be is refused in one place, `check_threshold`."""
    if strategy.name == "clip_by_range":
        make = lambda upper: gradclip_jax.clip_by_range(-1.0, upper=upper)  # noqa: E731
    else:
        make = strategy.make
    name = re.escape(strategy.argument)
    with pytest.raises(ValueError, match=rf"`{name}` must be non-negative, got -1.0"):
        make(-1.0)


@all_strategies
def test_what_is_not_finite_zeroes_its_group_and_leaves_the_others_alone(strategy):
    updates = normal_tree(scale=10)
    broken = {**updates, "kernel": updates["kernel"].at[0, 0].set(jnp.nan)}
    clip = strategy.make(LIMIT)
    expected, _ = apply(clip, updates, PARAMS)
    result, state = apply(clip, broken, PARAMS)
    pairs = zip(
        strategy.vectors(broken), strategy.vectors(expected), strategy.vectors(result), strict=True
    )
    for before, unbroken, after in pairs:
        np.testing.assert_array_equal(after, unbroken if np.isfinite(before).all() else 0)
    assert int(seen(state)["nonfinite_count"]) == 1


@all_strategies
def test_propagate_makes_the_group_nan_and_leaves_the_others_alone(strategy):
    updates = normal_tree(scale=10)
    broken = {**updates, "bias": updates["bias"].at[0].set(jnp.inf)}
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


@every_strategy
def test_state_keeps_its_structure_shapes_dtypes_and_weak_types(strategy):
    updates = normal_tree(scale=10, dtype=jnp.bfloat16)
    clip = strategy.make(optax.linear_schedule(1.0, 0.1, 10))
    state = clip.init(PARAMS)
    _, new = clip.update(updates, state, PARAMS)
    assert same_avals(state, new)


@all_strategies
def test_a_schedule_is_called_with_the_number_of_updates(strategy):
    clip = strategy.make(lambda count: jnp.array([3.0, 2.0, 1.0])[count])
    updates = normal_tree(scale=100)
    state = clip.init(PARAMS)
    for limit in (3.0, 2.0, 1.0):
        result, state = clip.update(updates, state, PARAMS)
        expected, _ = apply(strategy.make(limit), updates, PARAMS)
        chex.assert_trees_all_close(result, expected, rtol=1e-6)


@every_strategy
def test_a_scan_traces_once_and_is_the_loop(strategy):
    clip = strategy.make(LIMIT)
    updates = normal_tree(scale=10)
    traces = []

    def step(state, _):
        traces.append(1)
        return clip.update(updates, state, PARAMS)[::-1]

    state, results = jax.lax.scan(step, clip.init(PARAMS), length=3)
    assert len(traces) == 1
    looped = clip.init(PARAMS)
    for i in range(3):
        result, looped = clip.update(updates, looped, PARAMS)
        chex.assert_trees_all_close(at(i, results), result, rtol=1e-6)
    chex.assert_trees_all_close(state, looped, rtol=1e-6)
    assert int(seen(state)["step_count"]) == 3


@every_strategy
def test_init_accepts_abstract_params(strategy):
    clip = strategy.make(LIMIT)
    abstract = jax.eval_shape(clip.init, PARAMS)
    assert jax.tree.structure(abstract) == jax.tree.structure(clip.init(PARAMS))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert same_avals(clip.init(shapes), clip.init(PARAMS))


@all_strategies
def test_threshold_can_be_injected_as_a_hyperparameter(strategy):
    if strategy in OF_OPTAX or strategy.name == "clip_by_range" or "[mapping]" in strategy.name:
        pytest.skip("not a factory of the library")
    argument = strategy.argument
    make = optax.inject_hyperparams(strategy.make)
    if strategy.name == "clip_by_group_norm":
        make = optax.inject_hyperparams(strategy.make, static_args=("labels",))
    if isinstance(strategy.make, functools.partial) and "labels" not in strategy.make.keywords:
        make = optax.inject_hyperparams(strategy.make, static_args=tuple(strategy.make.keywords))
    updates = normal_tree(scale=10)
    clip = make(**{argument: optax.linear_schedule(0.3, 0.1, 10)})
    result, state = clip.update(updates, clip.init(updates), updates)
    expected, _ = apply(strategy.make(0.3), updates)
    chex.assert_trees_all_close(result, expected, rtol=1e-6)
    assert argument in state.hyperparams


@every_strategy
def test_a_compiled_update_is_the_eager_one_and_takes_donations(strategy):
    clip = strategy.make(LIMIT)
    expected = apply(clip, normal_tree(scale=10), PARAMS)
    updates, state = normal_tree(scale=10), clip.init(PARAMS)
    result = jax.jit(clip.update, donate_argnums=(0, 1))(updates, state, PARAMS)
    chex.assert_trees_all_close(result, expected, rtol=1e-6)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(updates))


@every_strategy
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
    assert measured(metrics) == pytest.approx(measured(expected), rel=1e-6)


@every_strategy
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
def test_a_clip_that_is_off_has_the_state_of_one_that_is_on(strategy):
    on, off = strategy.make(1.0).init(PARAMS), strategy.make(None).init(PARAMS)
    assert same_avals(on, off)


@all_strategies
def test_only_a_clip_that_needs_params_compares_their_structure_with_that_of_the_updates(strategy):
    """`optax.lookahead` has two of each parameter, and one gradient."""
    clip, updates = strategy.make(LIMIT), normal_tree(scale=10)
    params = optax.LookaheadParams(PARAMS, PARAMS)
    if strategy.needs_params:
        with pytest.raises(ValueError, match="`params` must have the structure of the updates"):
            clip.update(updates, clip.init(PARAMS), params)
    else:
        result = clip.update(updates, clip.init(PARAMS), params)
        chex.assert_trees_all_equal(result, clip.update(updates, clip.init(PARAMS), PARAMS))


@every_strategy
def test_an_initial_state_has_no_weak_type(strategy):
    """A state from a checkpoint has none, and would compile the step anew."""
    leaves = jax.tree.leaves(strategy.make(LIMIT).init(PARAMS))
    assert not any(leaf.weak_type for leaf in leaves)


@every_strategy
def test_an_initial_state_may_be_donated_to_a_step_that_may_keep_it(strategy):
    """One array in two places cannot be donated twice."""
    clip, updates = strategy.make(LIMIT), normal_tree(scale=10)

    def step(state, moves):
        return jax.lax.cond(moves, lambda: clip.update(updates, state, PARAMS)[1], lambda: state)

    step = jax.jit(step, donate_argnums=0)
    state = step(step(clip.init(PARAMS), False), True)
    assert int(seen(state)["step_count"]) == 1


@all_strategies
@pytest.mark.parametrize("state", [None, optax.EmptyState()], ids=["None", "EmptyState"])
def test_a_clip_without_a_memory_starts_from_no_state(strategy, state):
    """MaxText and many loops call clips so: those of optax have no state."""
    if LIBRARY != "gradclip_jax":
        pytest.skip("its clips have no state to begin with")
    clip = strategy.make(LIMIT)
    fresh = clip.init(PARAMS)
    grads = normal_tree(5, scale=100 * LIMIT)
    if jax.tree.leaves(fresh.limit_state):
        with pytest.raises(ValueError, match="`state` must be what `init` returned"):
            clip.update(grads, state, PARAMS)
        return
    expected = clip.update(grads, fresh, PARAMS)
    got = clip.update(grads, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    compiled = jax.jit(lambda grads: clip.update(grads, state, PARAMS))(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), compiled, expected)


@every_strategy
def test_the_state_of_another_clip_raises_and_names_init(strategy):
    if LIBRARY != "gradclip_jax":
        pytest.skip("its clips have no state")
    clip = strategy.make(LIMIT)
    fresh, grads = clip.init(PARAMS), normal_tree(6)
    others = [other.make(LIMIT).init(PARAMS) for other in STRATEGIES]
    others += [optax.adam(1e-3).init(PARAMS), gradclip_jax.zero_nonfinite().init(PARAMS), (), 1.0]
    for other in others:
        if _kind(other) != _kind(fresh):
            with pytest.raises(ValueError, match=r"`init`|`init\(params\)`"):
                clip.update(grads, other, PARAMS)
    # What was accepted once is not taken for granted.
    clip.update(grads, fresh, PARAMS)
    with pytest.raises(ValueError, match="`state` must be the `ClipState` that `init` returned"):
        clip.update(grads, optax.adam(1e-3).init(PARAMS), PARAMS)


def _kind(state):
    return type(state), jax.tree.structure(state), [jnp.ndim(x) for x in jax.tree.leaves(state)]


@all_strategies
def test_a_schedule_has_a_memory(strategy):
    if LIBRARY != "gradclip_jax":
        pytest.skip("its clips have no state")
    scheduled = strategy.make(lambda count: LIMIT)
    with pytest.raises(ValueError, match="the limit of this clip has a memory"):
        scheduled.update(normal_tree(7), optax.EmptyState(), PARAMS)
    with pytest.raises(ValueError, match="`init`"):
        scheduled.update(normal_tree(7), strategy.make(LIMIT).init(PARAMS), PARAMS)
