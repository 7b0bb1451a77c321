"""A skipped step moves no parameter, and the optimizer does not learn that it was there."""

import contextlib
import dataclasses
import functools
import inspect
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import shard_map, through_orbax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

import gradclip_jax
from gradclip_jax import Limit, metrics
from gradclip_jax._guards import SkipState, skip_nonfinite, skip_spikes

PARAMS = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}


def grads(scale=1.0, bad=None):
    """A gradient of norm 13 * scale; `bad` takes the place of one element."""
    tree = {"w": jnp.array([3.0, 4.0]) * scale, "b": jnp.array([12.0]) * scale}
    return tree if bad is None else {**tree, "b": jnp.array([bad])}


def deviations(k: float) -> Limit:
    """Mean plus k standard deviations of the norms so far; the mean stands for a spike."""

    def init(norm):
        return jnp.zeros_like(norm), jnp.zeros_like(norm), jnp.zeros(norm.shape, jnp.int32)

    def update(norm, state):
        mean, square, count = state
        spread = jnp.sqrt(jnp.maximum(square - mean * mean, 0))
        limit = jnp.where(count < 5, jnp.inf, jnp.maximum(mean, mean + k * spread))
        seen = jnp.where(norm > limit, mean, norm)
        weight = jnp.maximum(0.05, 1 / (count + 1).astype(norm.dtype))
        return limit, (
            mean + weight * (seen - mean),
            square + weight * (seen * seen - square),
            count + 1,
        )

    return Limit(init, update)


def run(optimizer, stream, state=None, **extra_args):
    state = optimizer.init(PARAMS) if state is None else state
    update = jax.jit(optimizer.update)
    flags = []
    for tree in stream:
        updates, state = update(tree, state, PARAMS, **extra_args)
        flags.append(int(metrics(state)["skipped"]))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    return flags, state


@pytest.fixture(autouse=True)
def _standard(standard_promotion):
    """Adam of optax needs it."""


@pytest.fixture(params=["branch", "select"])
def way(request, monkeypatch):
    """The program of a CPU and that of an accelerator, which runs on CPU, too."""
    if request.param == "select":
        choose = lambda *args, default, **others: default(*args)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
        jax.clear_caches()
        yield
        jax.clear_caches()
    else:
        yield


both_ways = pytest.mark.usefixtures("way")
GUARDS = [skip_nonfinite, lambda inner, **kw: skip_spikes(inner, grad_norm=1e3, **kw)]
each_guard = pytest.mark.parametrize("guard", GUARDS, ids=["nonfinite", "spikes"])


@both_ways
@each_guard
def test_what_is_not_finite_moves_nothing_and_leaves_the_state_bit_for_bit(guard):
    optimizer = guard(optax.adamw(1e-2, weight_decay=0.1))
    _, before = run(optimizer, [grads()] * 3)
    for bad in (np.nan, np.inf, -np.inf):
        updates, after = jax.jit(optimizer.update)(grads(bad=bad), before, PARAMS)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        chex.assert_trees_all_equal(after.inner_state, before.inner_state)
        seen = metrics(after)
        assert (int(seen["skip_count"]), int(seen["nonfinite_count"])) == (1, 1)
        assert int(seen["step_count"]) == 4


@both_ways
@each_guard
def test_without_a_spike_the_optimizer_is_the_one_within(guard):
    def double(updates, state, params=None):
        return jax.tree.map(lambda x, m: x + m, updates, state), updates

    inner = optax.GradientTransformation(lambda params: params, double)
    optimizer = guard(inner)
    state = optimizer.init(PARAMS)
    for before, after in [(grads(0.7), grads(0.1)), (grads(1e-9), grads(30.0))]:
        _, state = jax.jit(optimizer.update)(before, state)
        updates, state = jax.jit(optimizer.update)(after, state)
        chex.assert_trees_all_equal(state.inner_state, after)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.add, before, after))


@both_ways
def test_one_spike_and_one_nan_in_a_hundred_steps_and_a_restart_between_them(tmp_path):
    scales = 1 / 13 + 0.005 * np.sin(np.arange(100))
    stream = [*(grads(s) for s in scales), grads(1e6 / 13), grads(bad=np.nan), grads(1 / 13)]
    optimizer = skip_spikes(optax.adam(1e-2), grad_norm=deviations(6.0))
    flags, end = run(optimizer, stream)
    assert flags == [0] * 100 + [1, 1, 0]
    calm_flags, calm = run(optimizer, [*stream[:100], stream[-1]])
    assert sum(calm_flags) == 0
    chex.assert_trees_all_equal(end.inner_state, calm.inner_state)
    assert int(metrics(end)["skip_count"]) == 2
    assert abs(float(end.skip_limit / calm.skip_limit) - 1) < 0.01

    _, saved = run(optimizer, stream[:101])
    restored = through_orbax(saved, optimizer.init(PARAMS), tmp_path)
    chex.assert_trees_all_equal(run(optimizer, stream[101:], restored)[1], end)


@both_ways
def test_the_guard_gives_up_and_rescales_to_the_limit():
    optimizer = skip_spikes(optax.sgd(1.0), grad_norm=6.5, max_consecutive=2)
    state, seen = optimizer.init(PARAMS), []
    for tree in [grads(), grads(), grads(), grads(), grads(0.5), grads()]:
        updates, state = jax.jit(optimizer.update)(tree, state)
        seen.append((float(optax.tree.norm(updates)), int(state.skips_in_a_row)))
    assert seen == [(0, 1), (0, 2), (6.5, 2), (6.5, 2), (6.5, 0), (0, 1)]
    assert int(state.skip_count) == 3


@both_ways
def test_after_giving_up_what_is_not_finite_is_zero_and_the_rest_goes_through():
    optimizer = skip_nonfinite(optax.sgd(1.0), max_consecutive=1)
    flags, state = run(optimizer, [grads(bad=np.nan)])
    updates, state = jax.jit(optimizer.update)(grads(bad=np.nan), state)
    assert flags == [1]
    np.testing.assert_array_equal(updates["w"], [-3.0, -4.0])
    np.testing.assert_array_equal(updates["b"], [0.0])
    assert int(state.nonfinite_count) == 2

    optimizer = skip_spikes(optax.sgd(1.0), grad_norm=1.0, max_consecutive=1)
    _, state = run(optimizer, [grads(bad=np.inf)])
    updates, _ = jax.jit(optimizer.update)(grads(bad=np.inf), state)
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


@both_ways
def test_a_new_regime_stops_no_run():
    """With statistics that take in no skipped step, AXLearn never steps again."""
    never_learns = Limit(lambda norm: (), lambda norm, state: (jnp.full_like(norm, 20.0), state))
    flags, _ = run(skip_spikes(optax.sgd(0.1), grad_norm=never_learns), [grads(100.0)] * 40)
    assert flags == [1] * 16 + [0] * 24


def test_a_constant_norm_is_no_spike():
    """AXLearn skips 1000 of 1000: a norm must be below its mean plus a deviation of 0."""
    flags, _ = run(skip_spikes(optax.sgd(0.1), grad_norm=13.0), [grads()] * 20)
    assert sum(flags) == 0


def test_one_nan_costs_one_step():
    """In MaxText it costs the interval and one, for it enters the window of the statistics."""
    noise = 1 + 0.1 * np.random.default_rng(0).standard_normal(40)
    stream = [grads(x) if i != 15 else grads(bad=np.nan) for i, x in enumerate(noise)]
    flags, _ = run(skip_spikes(optax.sgd(0.1), grad_norm=deviations(6.0)), stream)
    assert flags == [int(i == 15) for i in range(40)]


def test_a_nan_while_the_limit_still_warms_up_is_skipped():
    """MaxText applies it."""
    flags, _ = run(
        skip_spikes(optax.sgd(0.1), grad_norm=deviations(6.0)), [grads(bad=np.nan), grads()]
    )
    assert flags == [1, 0]


@both_ways
def test_a_zero_times_nan_reaches_neither_update_nor_moments():
    """OLMo and levanter skip by a product with 0; `run` asserts that updates are finite."""
    _, state = run(
        skip_spikes(optax.adam(1e-2), grad_norm=100.0), [grads(), grads(bad=np.nan), grads()]
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner_state))


@both_ways
def test_a_loss_may_be_watched_and_goes_on_to_the_optimizer():
    seen = []

    def remember(updates, state, params=None, *, loss, **extra_args):
        assert loss.shape == ()
        seen.append(loss)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), remember)
    optimizer = skip_spikes(inner, loss=2.0, max_consecutive=1)
    state = optimizer.init(PARAMS)
    for loss, passes in [(1.0, 1), (3.0, 0), (3.0, 1), (jnp.nan, 1), (-1.0, 1), (jnp.nan, 0)]:
        updates, state = jax.jit(optimizer.update)(grads(), state, PARAMS, loss=jnp.float32(loss))
        np.testing.assert_array_equal(updates["b"], [12.0 * passes])
    assert seen
    assert float(metrics(state)["grad_norm"]) == 13.0
    for missing in ({}, {"loss": None}, {"value": 1.0}):
        with pytest.raises(ValueError, match="`skip_spikes` watches `loss`: call `update"):
            optimizer.update(grads(), state, PARAMS, **missing)
    with pytest.raises(ValueError, match="`loss` must be a real scalar, got float32"):
        jax.jit(optimizer.update)(grads(), state, PARAMS, loss=jnp.ones(2))


def test_a_loss_that_is_not_finite_is_never_learned_from():
    optimizer = skip_spikes(optax.sgd(0.1), loss=deviations(6.0))
    _, before = run(optimizer, [grads()] * 3, loss=jnp.float32(2.0))
    for bad in (jnp.nan, jnp.inf):
        flags, after = run(optimizer, [grads()], before, loss=jnp.float32(bad))
        assert flags == [1]
        chex.assert_trees_all_equal(after.loss_limit_state, before.loss_limit_state)


class OlmoCore:
    """`SkipStepOptimizer` of OLMo-core in float64, the version whose windows leave NaN out."""

    def __init__(self, interval=128, sigma=6):
        self.interval, self.sigma, self.losses, self.norms = interval, sigma, [], []

    def skips(self, loss, norm):
        self.losses = [*self.losses, loss][-(self.interval + 1) :]
        self.norms = [*self.norms, norm][-(self.interval + 1) :]
        if len(self.losses) < max(2, self.interval // 2):
            return False
        return not all(
            np.isfinite(seen[-1]) and seen[-1] - np.mean(past) <= self.sigma * np.std(past, ddof=1)
            for seen in (self.losses, self.norms)
            for past in [[x for x in seen[:-1] if np.isfinite(x)]]
        )


def steps_of(optimizer, losses, norms):
    """The states after each of many steps."""

    def step(state, seen):
        loss, norm = seen
        _, state = optimizer.update(norm, state, loss=loss)
        return state, state

    @jax.jit
    def run(seen):
        return jax.lax.scan(step, optimizer.init(jnp.float32(0)), seen)[1]

    return run((jnp.asarray(losses, jnp.float32), jnp.asarray(norms, jnp.float32)))


def spiky(seed):
    """A loss that falls from 6 to 2 and norms around 1, with spikes of one, of the other, of both.

    And a NaN in each.
    """
    rng = np.random.default_rng(seed)
    losses = 2 + 4 * np.exp(-np.arange(200) / 30) + 0.1 * rng.standard_normal(200)
    norms = rng.lognormal(sigma=0.3, size=200)
    at = rng.choice(np.arange(70, 200), 12, replace=False)
    losses[at[:6]] += 5
    norms[at[4:10]] *= 30
    losses[at[10]] = norms[at[11]] = np.nan
    return losses, norms


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [3, 6])
def test_it_skips_what_olmo_core_skips_by_loss_and_norm(seed, sigma):
    losses, norms = spiky(seed)
    limit = gradclip_jax.limits.deviation(sigma)
    optimizer = skip_spikes(optax.identity(), grad_norm=limit, loss=limit)
    seen = steps_of(optimizer, losses, norms)
    olmo = OlmoCore(sigma=sigma)
    expected = [olmo.skips(loss, norm) for loss, norm in zip(losses, norms, strict=True)]
    np.testing.assert_array_equal(seen.skipped, expected)
    assert 5 <= sum(expected) < 30
    # Each of the two alone misses spikes of the other.
    for name in ("grad_norm", "loss"):
        alone = steps_of(skip_spikes(optax.identity(), **{name: limit}), losses, norms)
        assert 2 <= int(alone.skip_count[-1]) < sum(expected)


def test_both_windows_have_seen_every_step_and_no_nan():
    losses, norms = spiky(0)
    limit = gradclip_jax.limits.deviation()
    optimizer = skip_spikes(optax.identity(), grad_norm=limit, loss=limit)
    seen = steps_of(optimizer, losses, norms)
    assert int(seen.skip_count[-1]) == 6
    for window, values in [(seen.limit_state, norms), (seen.loss_limit_state, losses)]:
        np.testing.assert_array_equal(window[-1], np.float32(values[np.isfinite(values)])[:-129:-1])


def test_of_two_nested_guards_the_inner_one_does_not_see_what_the_outer_one_skips():
    """A batch with a loss of 9 raises the norm to 3; the norm stays there, the loss does not."""
    limit = gradclip_jax.limits.deviation(2.0, window=8, min_count=4)
    losses = [1.0, 2.0, 1.0, 2.0, 9.0, 9.0, 1.0, 2.0]
    norms = [1.0, 2.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0]
    one = skip_spikes(optax.identity(), grad_norm=limit, loss=limit)
    skipped = np.asarray(steps_of(one, losses, norms).skipped)
    np.testing.assert_array_equal(skipped, [0, 0, 0, 0, 1, 0, 0, 0])
    nested = skip_spikes(skip_spikes(optax.identity(), grad_norm=limit), loss=limit)
    states = steps_of(nested, losses, norms)
    np.testing.assert_array_equal(states.skipped, [0, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(states.inner_state.skipped, [0, 0, 0, 0, 0, 1, 0, 0])


@both_ways
def test_a_loss_at_a_new_level_stops_no_run_and_gradients_are_rescaled_to_the_limit_on_the_norm():
    optimizer = skip_spikes(optax.sgd(1.0), grad_norm=6.5, loss=2.0, max_consecutive=2)
    state, seen = optimizer.init(PARAMS), []
    for loss, scale in [
        (3.0, 0.5),
        (np.nan, 0.5),
        (3.0, 1.0),
        (np.nan, 0.1),
        (1.0, 0.5),
        (1.0, 1.0),
    ]:
        updates, state = jax.jit(optimizer.update)(grads(scale), state, loss=jnp.float32(loss))
        seen.append((round(float(optax.tree.norm(updates)), 5), int(state.skips_in_a_row)))
    assert seen == [(0, 1), (0, 2), (6.5, 2), (1.3, 2), (6.5, 0), (0, 1)]
    assert (int(state.skip_count), int(state.nonfinite_count)) == (3, 2)


@both_ways
def test_metrics_tell_the_loss_and_its_limit():
    optimizer = skip_spikes(optax.sgd(1.0), grad_norm=100.0, loss=2.0)
    updates, state = optimizer.update(grads(), optimizer.init(PARAMS), loss=jnp.float32(3.0))
    np.testing.assert_array_equal(updates["b"], [0.0])
    seen = {name: float(value) for name, value in metrics(state).items()}
    assert (seen["skipped"], seen["grad_norm"], seen["skip_limit"]) == (1, 13, 100)
    assert (seen["loss"], seen["loss_limit"]) == (3, 2)
    assert not {"loss", "loss_limit"} & set(metrics(skip_nonfinite(optax.sgd(1.0)).init(PARAMS)))
    of_norm = metrics(skip_spikes(optax.sgd(1.0), loss=2.0).init(PARAMS))
    assert {"skip_limit", "loss_limit"} <= set(of_norm)


def test_the_loss_is_watched_in_an_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    guard = skip_spikes(optax.adam(1e-3), grad_norm=1e3, loss=gradclip_jax.limits.deviation())
    optimizer = nnx.Optimizer(model, guard, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads, loss=loss)
        return loss

    loss = step(model, optimizer, jnp.ones((4, 2)))
    for state in (optimizer, nnx.state(optimizer), nnx.to_pure_dict(nnx.state(optimizer))):
        seen = metrics(state)
        assert float(seen["loss"]) == float(loss)
        assert float(seen["loss_limit"]) == np.inf


def test_a_guard_may_begin_to_watch_the_loss_in_a_run_that_is_under_way():
    of_norm = skip_spikes(optax.adam(0.1), grad_norm=1e3)
    both = skip_spikes(optax.adam(0.1), grad_norm=1e3, loss=gradclip_jax.limits.deviation())
    _, saved = run(of_norm, [grads()] * 3)
    state = gradclip_jax.upgrade_state(saved, both.init(PARAMS))
    chex.assert_trees_all_equal(state.inner_state, saved.inner_state)
    _, state = run(both, [grads()] * 2, state, loss=jnp.float32(1.0))
    assert int(state.step_count) == 2
    same = gradclip_jax.upgrade_state(state, both.init(PARAMS))
    chex.assert_trees_all_equal(same, state)


def test_the_state_of_a_guard_that_watches_something_else_is_refused():
    of_norm = skip_spikes(optax.sgd(0.1), grad_norm=1e3)
    both = skip_spikes(optax.sgd(0.1), grad_norm=1e3, loss=2.0)
    with pytest.raises(
        ValueError, match=r"`state` must come from this guard, .* watches the norm:"
    ):
        both.update(grads(), of_norm.init(PARAMS), loss=1.0)
    with pytest.raises(
        ValueError, match=r"`state` must come from this guard, .* watches the loss:"
    ):
        of_norm.update(grads(), both.init(PARAMS), loss=1.0)


def axlearn(norms, times=20.0, decay=0.99, max_norm=1.0):
    """`skip_and_clip_by_global_norm` with `drop_norm_by_grad_norm_ema`: lengths of steps, means."""
    mean, count, lengths, means = 1.0, 0, [], []
    for norm in norms:
        if np.isfinite(norm) and norm < times * mean:
            share = decay * (1 - decay**count) / (1 - decay ** (count + 1))
            mean, count = share * mean + (1 - share) * norm, count + 1
            lengths.append(norm * min(1, max_norm / (norm + 1e-8)))
        else:
            lengths.append(0.0)
        means.append(mean)
    return np.array(lengths), np.array(means)


def without_spikes(limit):
    """A limit that does not learn from what is above it, as in docs/compositions.md."""

    def update(norm, state):
        value, new = limit.update(norm, state)
        return value, jax.tree.map(lambda x, old: jnp.where(norm > value, old, x), new, state)

    return Limit(limit.init, update)


@pytest.mark.parametrize("times", [3.0, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_around_a_clip_it_has_the_numbers_of_skip_and_clip_of_axlearn(seed, times):
    _, norms = spiky(seed)
    mean = gradclip_jax.limits.ema(0.0, ratio=times, decay=0.99, warmup_steps=1)
    inner = optax.chain(gradclip_jax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.0))
    optimizer = skip_spikes(inner, grad_norm=without_spikes(mean))

    def step(state, norm):
        updates, state = optimizer.update(norm, state)
        return state, (-updates, state.limit_state.average.mean)

    start = optimizer.init(jnp.float32(0))
    _, (lengths, means) = jax.lax.scan(step, start, jnp.asarray(norms, jnp.float32))
    expected, expected_means = axlearn(norms, times)
    np.testing.assert_allclose(lengths, expected, rtol=1e-5)
    np.testing.assert_allclose(means, expected_means, rtol=1e-5)
    assert 2 <= (expected == 0).sum() < 20


def test_functions_among_the_extra_arguments_go_on_too():
    def inner_update(updates, state, params=None, *, value_fn, **extra_args):
        return jax.tree.map(value_fn, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), inner_update)
    optimizer = skip_nonfinite(inner)
    updates, _ = optimizer.update(grads(), optimizer.init(PARAMS), value_fn=lambda x: -x)
    np.testing.assert_array_equal(updates["b"], [-12.0])


@both_ways
def test_a_given_norm_is_not_measured_again_and_goes_on_as_what_is_passed_on():
    known = gradclip_jax.given_norm("grad_norm")
    clip = gradclip_jax.clip_to_limit(1.0, measure=known)
    optimizer = skip_spikes(clip, grad_norm=6.5, max_consecutive=1, measure=known)
    state = optimizer.init(PARAMS)
    _, state = jax.jit(optimizer.update)(grads(), state, grad_norm=13.0)
    updates, state = jax.jit(optimizer.update)(grads(), state, grad_norm=13.0)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0)
    assert float(state.inner_state.grad_norm) == 6.5


@pytest.mark.parametrize("make", [skip_nonfinite, functools.partial(skip_spikes, grad_norm=100.0)])
def test_a_guard_looks_at_no_argument_that_it_was_not_built_to_look_at(make):
    """Loops pass `grad_norm` for other purposes; the inner optimizer gets it as it is."""
    seen = []

    def inner_update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), inner_update)
    optimizer = make(inner)
    _, state = optimizer.update(grads(), optimizer.init(PARAMS), grad_norm=jnp.nan)
    assert float(state.grad_norm) == 13.0
    assert not bool(state.skipped)
    assert {name for extra_args in seen for name in extra_args} == {"grad_norm"}


def test_a_guard_measures_one_scalar():
    optimizer = skip_nonfinite(optax.sgd(1.0), measure=gradclip_jax.leaf_norms)
    with pytest.raises(ValueError, match="`measure` must return one scalar, got"):
        optimizer.init(PARAMS)


def test_a_guard_with_a_norm_of_another_order():
    largest = functools.partial(gradclip_jax.global_norm, order=jnp.inf)
    optimizer = skip_spikes(optax.sgd(1.0), grad_norm=6.0, measure=largest)
    _, state = optimizer.update(grads(), optimizer.init(PARAMS))
    assert float(state.grad_norm) == 12.0


@both_ways
def test_updates_come_in_the_dtype_of_the_optimizer_and_state_keeps_its_type():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2), "none": None}
    optimizer = skip_spikes(gradclip_jax.clip_by_global_norm(1.0), grad_norm=10.0)
    state = optimizer.init(params)
    for x in (30.0, np.nan, 1.0):
        updates, new = jax.jit(optimizer.update)({**params, "w": params["w"] * x}, state)
        assert updates["w"].dtype == jnp.bfloat16
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        np.testing.assert_array_equal(updates["n"], params["n"] * (x == 1.0))
        state = new


@both_ways
@each_guard
def test_scan_is_the_loop(guard):
    stream = [grads(), grads(bad=np.nan), grads(2e3), grads(), grads(bad=np.inf), grads(0.1)]
    optimizer = guard(optax.sgd(0.1, momentum=0.9), max_consecutive=1)

    def body(state, tree):
        updates, state = optimizer.update(tree, state, PARAMS)
        return state, updates

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *stream)
    scanned, _ = jax.lax.scan(body, optimizer.init(PARAMS), stacked)
    chex.assert_trees_all_close(scanned, run(optimizer, stream)[1], rtol=1e-6)


@both_ways
def test_around_multi_steps_a_bad_micro_step_has_never_been():
    """Within it `optax.MultiSteps` keeps the NaN in its sum for ever."""
    multi = optax.MultiSteps(optax.sgd(1.0), 2)
    optimizer = skip_nonfinite(multi)
    state, total = optimizer.init(PARAMS), jnp.zeros(1)
    for tree in [grads(), grads(bad=np.nan), grads(3.0)]:
        updates, state = jax.jit(optimizer.update)(tree, state, PARAMS)
        total = total + updates["b"]
    np.testing.assert_array_equal(total, [-24.0])
    assert int(metrics(state)["skip_count"]) == 1


@both_ways
def test_within_multi_steps_the_mean_is_judged():
    optimizer = optax.MultiSteps(skip_spikes(optax.sgd(1.0), grad_norm=20.0), 2)
    state = optimizer.init(PARAMS)
    for scale, moved in [(1.0, 0), (1.5, 1), (1.0, 0), (9.0, 0)]:
        updates, state = jax.jit(optimizer.update)(grads(scale), state, PARAMS)
        assert bool(updates["b"][0] != 0) == bool(moved)
    assert int(metrics(state)["skip_count"]) == 1


def test_hyperparameters_may_be_injected_within_and_around():
    inside = skip_spikes(optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2), grad_norm=100.0)
    flags, _ = run(inside, [grads(), grads(100.0), grads()])
    assert flags == [0, 1, 0]
    make = optax.inject_hyperparams(skip_spikes)
    around = make(optimizer=optax.sgd(1.0), grad_norm=optax.linear_schedule(20.0, 10.0, 2))
    flags, state = run(around, [grads(), grads(), grads()])
    assert flags == [0, 0, 1]
    assert float(metrics(state)["skip_limit"]) == 10.0
    around = make(optimizer=optax.sgd(1.0), loss=optax.linear_schedule(3.0, 1.0, 2))
    flags, state = run(around, [grads(), grads(), grads()], loss=jnp.float32(1.5))
    assert flags == [0, 0, 1]
    assert float(metrics(state)["loss_limit"]) == 1.0
    both = make(optimizer=optax.sgd(1.0), grad_norm=20.0, loss=gradclip_jax.limits.ema())
    state = both.init(PARAMS)
    state.hyperparams["grad_norm"] = jnp.float32(10.0)
    assert run(both, [grads()], state, loss=jnp.float32(1.5))[0] == [1]
    defaults = inspect.signature(skip_spikes).parameters["max_consecutive"].default
    assert not isinstance(defaults, int)


@both_ways
def test_in_an_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    chain = optax.chain(gradclip_jax.clip_by_global_norm(1.0), optax.sgd(1e-3))
    optimizer = nnx.Optimizer(model, skip_spikes(chain, grad_norm=1e3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).sum())(model))

    step(model, optimizer, jnp.ones((4, 2)))
    kernel = np.asarray(model.kernel[...])
    step(model, optimizer, jnp.full((4, 2), jnp.nan))
    np.testing.assert_array_equal(model.kernel[...], kernel)
    seen = metrics(optimizer)
    assert (int(seen["skip_count"]), int(seen["step_count"])) == (1, 2)
    assert float(seen["clip_limit"]) == 1.0


@both_ways
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("watched", ["grad_norm", "loss"])
def test_all_devices_skip_what_one_of_them_met(check_vma, watched, mesh):
    """In `optax.apply_if_finite` seven of eight devices step."""
    axis_name = None if check_vma else "data"
    optimizer = skip_spikes(optax.sgd(0.1), axis_name=axis_name, **{watched: 100.0})

    def step(x):
        updates, state = optimizer.update(x, optimizer.init(x), x, loss=jnp.sum(x))
        return updates, state.skip_count[None]

    run_on = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=P("data"), check_vma=check_vma,
            out_specs=(P("data"), P() if check_vma else P("data")),
        )
    )  # fmt: skip
    for bad in (np.nan, 1e6):
        updates, count = run_on(jnp.ones(8).at[5].set(bad))
        np.testing.assert_array_equal(updates, np.zeros(8))
        assert set(np.asarray(count).tolist()) == {1}
    assert np.all(np.asarray(run_on(jnp.ones(8))[0]) != 0)


@both_ways
def test_under_pmap_with_a_collective_in_the_optimizer():
    inner = optax.chain(gradclip_jax.clip_by_global_norm(1.0, axis_name="i"), optax.adam(1e-2))
    optimizer = skip_spikes(inner, grad_norm=100.0, axis_name="i", max_consecutive=1)

    @functools.partial(jax.pmap, axis_name="i")
    def steps(x, bad):
        state = optimizer.init(x)
        _, state = optimizer.update(bad, state, x)
        first = state.skip_count
        updates, state = optimizer.update(bad, state, x)
        return first, state.skip_count, updates

    bad = jnp.ones((8, 2)).at[3, 0].set(jnp.nan)
    first, last, updates = steps(jnp.ones((8, 2)), bad)
    np.testing.assert_array_equal(first, np.ones(8))
    np.testing.assert_array_equal(last, np.ones(8))
    assert np.isfinite(updates).all()
    assert float(updates[0, 0]) != 0


@both_ways
def test_sharded_under_jit(mesh):
    sharding = NamedSharding(mesh, P("data"))
    x = jax.device_put(jnp.ones(16), sharding)
    optimizer = skip_spikes(optax.sgd(0.1), grad_norm=100.0)
    state = jax.jit(optimizer.init)(x)
    for bad, count in [(1.0, 0), (jnp.nan, 1), (1e4, 2), (1.0, 2)]:
        updates, state = jax.jit(optimizer.update)(x.at[3].set(bad), state, x)
        assert int(state.skip_count) == count
    assert np.all(np.asarray(updates) != 0)


@both_ways
def test_gradients_in_the_memory_of_the_host_stay_there():
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    params = {"host": jax.device_put(jnp.ones(4), host), "device": jnp.ones(2)}
    optimizer = skip_spikes(gradclip_jax.clip_by_global_norm(1.0), grad_norm=100.0)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(params, state)
    assert updates["host"].sharding.memory_kind == "pinned_host"
    assert int(state.skip_count) == 0
    updates, state = jax.jit(optimizer.update)({**params, "device": jnp.full(2, jnp.nan)}, state)
    np.testing.assert_array_equal(updates["host"], np.zeros(4))
    assert int(state.skip_count) == 1


@both_ways
@each_guard
def test_what_is_no_gradient_passes_through(guard):
    params = {"key": jax.random.key(0), "none": np.zeros(2, jax.dtypes.float0), "w": jnp.ones(2)}
    optimizer = guard(gradclip_jax.clip_by_global_norm(1.0))
    updates, _ = optimizer.update({**params, "w": params["w"] * jnp.nan}, optimizer.init(params))
    assert updates["key"].dtype == params["key"].dtype
    np.testing.assert_array_equal(updates["w"], [0.0, 0.0])


@both_ways
def test_donated_and_abstract():
    optimizer = skip_spikes(optax.adam(1e-2), grad_norm=deviations(6.0))
    state = optimizer.init(PARAMS)
    kinds = jax.eval_shape(optimizer.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(kinds, jax.eval_shape(lambda: state))
    step = jax.jit(optimizer.update, donate_argnums=1)
    for tree in (grads(), grads(bad=np.nan), grads()):
        _, state = step(tree, state, PARAMS)
    assert step._cache_size() == 1
    assert isinstance(state, SkipState)


def optimizers():
    """The optimizers of optax that can be made from a learning rate, and some that wrap one."""
    made = {}
    for module in (optax, optax.contrib):
        for name in dir(module):
            function = getattr(module, name)
            if not inspect.isfunction(function) or name in ("lbfgs", "noisy_sgd"):
                continue
            if "learning_rate" in inspect.signature(function).parameters:
                with contextlib.suppress(TypeError, DeprecationWarning):  # it needs more than that
                    made[name] = function(learning_rate=0.1)
    made["sgd with momentum"] = optax.sgd(0.1, momentum=0.9)
    made["adamw with a schedule"] = optax.adamw(optax.linear_schedule(1.0, 0.1, 9))
    made["noisy_sgd"] = optax.noisy_sgd(0.1, key=jax.random.key(0))
    made["ema"] = optax.chain(optax.ema(0.9), optax.scale(-0.1))
    made["injected"] = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    made["masked"] = optax.masked(optax.adam(0.1), {"w": True, "b": False})
    return made


OPTIMIZERS = optimizers()
WIDE = [(jnp.float16, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]


def types_of(update, state, params, updates):
    """Those of the result, or the kind of error where the optimizer itself cannot do it."""
    try:
        updates, state = jax.eval_shape(update, updates, state, params)
    except Exception as error:
        return type(error)
    return jax.tree.map(
        lambda x: (x.shape, x.dtype),
        (updates, state.inner_state if isinstance(state, SkipState) else state),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_around_any_optimizer_types_are_its_own_also_where_gradients_are_wider(name):
    """Gradients in float32 of parameters in float16, as a loss scale leaves them, widen Adam's."""
    inner, optimizer = OPTIMIZERS[name], skip_spikes(OPTIMIZERS[name], grad_norm=1e3)
    for narrow, dtype in WIDE:
        params = {"w": jnp.ones((4, 4), narrow), "b": jnp.ones(4, narrow)}
        updates = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        expected = types_of(inner.update, inner.init(params), params, updates)
        assert types_of(optimizer.update, optimizer.init(params), params, updates) == expected


def test_optimizers_are_most_of_those_of_optax():
    assert len(OPTIMIZERS) > 25
    assert {"adam", "lion", "muon", "adafactor", "lamb", "schedule_free_adamw"} <= set(OPTIMIZERS)


@both_ways
def test_a_skipped_step_widens_the_state_as_any_other_and_keeps_its_numbers():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    optimizer = skip_nonfinite(optax.sgd(0.1, momentum=0.9))
    state = optimizer.init(params)
    updates, state = optimizer.update(grads(bad=np.nan), state, params)
    np.testing.assert_array_equal(updates["w"], [0.0, 0.0])
    updates, state = optimizer.update(grads(), state, params)
    updates, state = optimizer.update(grads(bad=np.nan), state, params)
    (trace, *_), *_ = jax.tree.leaves(state.inner_state), 0
    assert trace.dtype == updates["b"].dtype == jnp.float32
    np.testing.assert_array_equal(trace, [12.0])


@both_ways
def test_a_skipped_step_keeps_keys_flags_and_numbers_of_any_dtype():
    def init(params):
        numbers = {"int8": jnp.int8(1), "float": 1.5, "complex": jnp.complex64(2j)}
        return {"key": jax.random.key(0), "flag": jnp.array(True), **numbers}

    def update(updates, state, params=None):
        key, flag, numbers = state["key"], state["flag"], {**state}
        del numbers["key"], numbers["flag"]
        numbers = jax.tree.map(lambda x: x * 2, numbers)
        return updates, {"key": jax.random.split(key)[1], "flag": ~flag, **numbers}

    optimizer = skip_nonfinite(optax.GradientTransformation(init, update))
    state = optimizer.init(PARAMS)
    for step in (optimizer.update, jax.jit(optimizer.update)):
        _, moved = step(grads(), state)
        _, kept = step(grads(bad=np.nan), moved)
        chex.assert_trees_all_equal(kept.inner_state, moved.inner_state)
        assert bool(moved.inner_state["flag"]) != bool(state.inner_state["flag"])
        state = moved


@both_ways
def test_a_skipped_step_has_a_derivative():
    """The root of a second moment of zero has none: backwards it would be 0 * inf."""

    def loss(state, params):
        updates, new = optimizer.update(grads(bad=np.nan), state, params)
        return sum(map(jnp.sum, jax.tree.leaves((updates, new.inner_state[0].nu))))

    optimizer = skip_nonfinite(optax.adamw(1e-2))
    of_state, of_params = jax.grad(loss, argnums=(0, 1), allow_int=True)(
        optimizer.init(PARAMS), PARAMS
    )
    chex.assert_trees_all_equal(of_state.inner_state[0].nu, jax.tree.map(jnp.ones_like, PARAMS))
    chex.assert_trees_all_equal(of_params, jax.tree.map(jnp.zeros_like, PARAMS))


@both_ways
def test_a_spike_is_skipped_under_debug_nans():
    """Of gradients that are zero some optimizers make 0 / 0; what came of it is not selected."""
    normalized = optax.stateless(
        lambda updates, params: jax.tree.map(lambda x: x / optax.tree.norm(updates), updates)
    )
    optimizer = skip_spikes(optax.chain(normalized, optax.adam(1e-2)), grad_norm=1.0)
    state = optimizer.init(PARAMS)
    with jax.debug_nans(True):
        for step in (optimizer.update, jax.jit(optimizer.update)):
            _, new = step(grads(), state, PARAMS)
            assert int(new.skip_count) == 1


@pytest.mark.parametrize(
    ("platform", "guard", "branches"),
    [
        ("cpu", skip_nonfinite, 1),
        ("tpu", skip_nonfinite, 0),
        ("cuda", skip_nonfinite, 0),
        ("rocm", skip_nonfinite, 0),
        ("cpu", GUARDS[1], 2),
        ("tpu", GUARDS[1], 1),  # the norm of what is finite, once the guard gives up
        ("cuda", GUARDS[1], 0),
    ],
)
def test_an_accelerator_has_no_branch_around_the_optimizer(platform, guard, branches):
    def plain_norm(tree, axis_name=None):
        return optax.tree.norm(tree)

    optimizer = guard(optax.adamw(1e-2), measure=plain_norm)
    traced = jax.jit(optimizer.update).trace(PARAMS, optimizer.init(PARAMS), PARAMS)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # The choice of a platform is a case, too, but of a number that is known.
    on_a_flag = r'\(tensor<i1>\) -> tensor<i32>\s+%\S+ = "stablehlo\.case"'
    assert len(re.findall(on_a_flag, text)) == branches


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A model as those of Equinox: the activation and a name are leaves."""

    w: jax.Array
    activation: Any
    name: str = "layer"
    size: Any = "small"


@both_ways
@each_guard
@pytest.mark.parametrize("compiled", [True, False])
def test_functions_and_strings_in_a_model_pass_a_guard(guard, compiled):
    model = Layer(jnp.array([3.0, 4.0]), jax.nn.relu, size=np.str_("small"))
    optimizer = guard(optax.masked(optax.adam(0.1), lambda tree: jax.tree.map(has_dtype, tree)))

    def step(w, state):
        updates, state = optimizer.update(dataclasses.replace(model, w=w), state, model)
        assert updates.activation is jax.nn.relu
        assert (updates.name, updates.size) == ("layer", "small")
        return updates.w, state

    step = jax.jit(step) if compiled else step
    moved, state = step(model.w, optimizer.init(model))
    np.testing.assert_allclose(moved, [-0.1, -0.1], rtol=1e-5)
    still, state = step(model.w * jnp.nan, state)
    np.testing.assert_array_equal(still, [0.0, 0.0])
    assert (int(state.skip_count), int(state.step_count)) == (1, 2)


def has_dtype(x):
    return isinstance(x, jax.Array)


@both_ways
def test_functions_and_strings_may_be_in_the_state_of_the_optimizer():
    inner = optax.GradientTransformation(
        lambda params: {"activation": jax.nn.relu, "count": jnp.zeros(())},
        lambda updates, state, params=None: (updates, {**state, "count": state["count"] + 1}),
    )
    optimizer = skip_nonfinite(inner)
    state = optimizer.init(PARAMS)
    for bad, count in [(None, 1), (np.nan, 1), (None, 2)]:
        _, state = optimizer.update(grads(bad=bad), state)
        assert state.inner_state["activation"] is jax.nn.relu
        assert int(state.inner_state["count"]) == count


def test_eagerly_a_guard_is_traced_once():
    traced = []

    def inner_update(updates, state, params=None):
        traced.append(1)
        return updates, state

    optimizer = skip_nonfinite(optax.GradientTransformation(lambda params: (), inner_update))
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(grads(), state, PARAMS)
    for _ in range(3):
        _, state = optimizer.update(grads(), state, PARAMS)
    assert len(traced) == 1


def test_the_updates_are_all_the_memory_that_a_guard_needs():
    params = {str(i): jnp.ones((64, 64)) for i in range(4)}
    optimizer = skip_spikes(optax.adam(1e-2), grad_norm=100.0)

    def step(params, state, tree):
        updates, state = optimizer.update(tree, state, params)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params).compile()
    )
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp <= 1.3 * 4 * 64 * 64 * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_float64(x64, dtype):
    params = {"w": jnp.ones(2)}
    optimizer = skip_spikes(optax.sgd(0.1), grad_norm=deviations(6.0), loss=deviations(6.0))
    state = optimizer.init(params)
    for _ in range(2):
        _, new = jax.jit(optimizer.update)(params, state, loss=jnp.asarray(1e-3, dtype))
        assert new.grad_norm.dtype == new.loss.dtype == new.loss_limit.dtype == jnp.float64
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new


@both_ways
def test_many_runs_at_once():
    optimizer = skip_nonfinite(optax.sgd(1.0))
    trees = jnp.array([[1.0, 2.0], [jnp.nan, 2.0]])
    state = jax.vmap(optimizer.init)(trees)
    updates, state = jax.vmap(optimizer.update)(trees, state)
    np.testing.assert_array_equal(updates, [[-1.0, -2.0], [0.0, 0.0]])
    np.testing.assert_array_equal(state.skip_count, [0, 1])


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, None])
def test_max_consecutive_must_be_a_whole_number_of_at_least_1(bad):
    with pytest.raises(
        ValueError, match=r"^`max_consecutive` must be a whole number of at least 1, got"
    ):
        skip_nonfinite(optax.sgd(0.1), max_consecutive=bad)


def test_arguments_that_may_not_be_raise():
    with pytest.raises(ValueError, match="`optimizer` must be an optimizer of optax, got 3"):
        skip_spikes(3, grad_norm=1.0)
    for name in ("grad_norm", "loss"):
        with pytest.raises(ValueError, match=rf"^`{name}` must be non-negative, got -1\.0"):
            skip_spikes(optax.sgd(0.1), **{name: -1.0})
    with pytest.raises(
        ValueError, match="must have a limit to watch, `grad_norm` or `loss` or both"
    ):
        skip_spikes(optax.sgd(0.1))


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_loss_is_the_mean_of_those_of_all_devices(check_vma, mesh):
    """Losses of 1 to 8, of mean 4.5: a sum would be 36."""
    axis_name = None if check_vma else "data"
    optimizers = [
        skip_spikes(optax.sgd(0.1), loss=limit, axis_name=axis_name) for limit in (4.4, 4.6)
    ]

    def step(losses):
        states = [
            optimizer.update(losses, optimizer.init(losses), losses, loss=losses[0])[1]
            for optimizer in optimizers
        ]
        return jnp.stack([state.skip_count for state in states])

    skipped = shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma)(
        jnp.arange(1.0, 9.0)
    )
    assert skipped.tolist() == [1, 0]


def test_norm_and_loss_of_all_devices_under_pmap():
    """On device 3 the loss is -20; the mean of 1, 2, 3, -20, 5, 6, 7, 8 is 1.5."""
    optimizer = skip_spikes(optax.sgd(0.1), grad_norm=100.0, loss=1.4, axis_name="i")

    @functools.partial(jax.pmap, axis_name="i")
    def step(x, loss):
        _, state = optimizer.update(x, optimizer.init(x), x, loss=loss)
        return state.loss, state.skipped, metrics(state)["loss_limit"]

    losses = jnp.arange(1.0, 9.0).at[3].set(-20.0)
    loss, skipped, limit = step(jnp.ones((8, 2)), losses)
    np.testing.assert_allclose(loss, np.full(8, 1.5), rtol=1e-6)
    assert skipped.all()
    np.testing.assert_allclose(limit, np.full(8, 1.4), rtol=1e-6)
    assert not step(jnp.ones((8, 2)), losses - 0.2)[1].any()
