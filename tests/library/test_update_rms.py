"""StableAdamW against its algorithm in NumPy, and second moments wherever optax keeps them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from conftest import make_mesh, shard_map, through_orbax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import gradclip_jax
from gradclip_jax import clip_update_rms, metrics, upgrade_state

pytestmark = pytest.mark.usefixtures("standard_promotion")  # of optax

PARAMS = {"w": np.float32([[1.0, -2.0], [3.0, 0.5]]), "b": np.float32([0.1, -0.2, 0.3])}


def stream(steps=40, seed=0):
    """Gradients that are small, until from step 20 on those of `w` are 30 times as large."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        grads = {name: 0.1 * rng.normal(size=x.shape) for name, x in PARAMS.items()}
        grads["w"] *= 30 if step >= 20 else 1
        yield {name: x.astype(np.float32) for name, x in grads.items()}


def stable_adamw(rate=0.01, b1=0.9, b2=0.99, eps=1e-8, decay=0.1, d=1.0):
    """Algorithm 2 in float64, with the decays that debias: of each step the parameters and RMS."""
    params = {name: x.astype(np.float64) for name, x in PARAMS.items()}
    u, v = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for step, grads in enumerate(stream(), start=1):
        rms = {}
        for name, grad in grads.items():
            g = grad.astype(np.float64)
            now1, now2 = (b * (1 - b ** (step - 1)) / (1 - b**step) for b in (b1, b2))
            u[name] = now1 * u[name] + (1 - now1) * g
            v[name] = now2 * v[name] + (1 - now2) * g**2
            rms[name] = np.sqrt(np.mean(g**2 / np.maximum(v[name], eps**2)))
            eta = rate / max(1, rms[name] / d)
            old = params[name]
            params[name] = old - eta * decay * old - eta * u[name] / (np.sqrt(v[name]) + eps)
        yield dict(params), rms


def run(optimizer, grads=None, params=PARAMS):
    """Of each step the parameters and the state."""
    params = jax.tree.map(jnp.asarray, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for each in stream() if grads is None else grads:
        updates, state = update(each, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@pytest.mark.parametrize("d", [1.0, 0.5])
def test_around_adamw_it_is_stable_adamw(d):
    optimizer = clip_update_rms(optax.adamw(0.01, b2=0.99, weight_decay=0.1), threshold=d, b2=0.99)
    steps = list(zip(run(optimizer), stable_adamw(d=d), strict=True))
    for (ours, state), (theirs, rms) in steps:
        for name in PARAMS:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5)
            assert float(state.clip_state.clip_measure[name]) == pytest.approx(rms[name], rel=2e-5)
    clipped = sum(max(rms.values()) > d for _, (_, rms) in steps)
    assert clipped > 5
    # The first root mean square is 1 up to rounding.
    assert abs(int(metrics(steps[-1][0][1])["clip_count"]) - clipped) <= 1


def test_by_hand():
    """Nine gradients of 1, then one of 10: v = 1 + 99 (1 - b2) / (1 - b2^10)."""
    optimizer = clip_update_rms(optax.adam(1.0, b2=0.9), b2=0.9)
    grads = [{"x": jnp.full(4, 1.0)}] * 9 + [{"x": jnp.full(4, 10.0)}]
    *_, (_, state) = run(optimizer, grads, {"x": jnp.zeros(4)})
    v = 1 + 99 * 0.1 / (1 - 0.9**10)
    assert float(state.clip_state.clip_measure["x"]) == pytest.approx(10 / np.sqrt(v), rel=1e-5)
    assert float(state.clip_state.clip_factor["x"]) == pytest.approx(np.sqrt(v) / 10, rel=1e-5)


def test_the_optimizer_is_as_it_was_and_no_step_is_longer():
    plain = optax.adamw(0.01, b2=0.99)
    optimizer = clip_update_rms(plain, b2=0.99)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, other = optimizer.init(params), plain.init(params)
    for grads in stream():
        updates, state = optimizer.update(grads, state, params)
        expected, other = plain.update(grads, other, params)
        chex.assert_trees_all_close(state.inner_state, other, rtol=1e-6)
        for name, factor in state.clip_state.clip_factor.items():
            np.testing.assert_allclose(updates[name], factor * expected[name], rtol=1e-6)
            assert factor <= 1


WITHOUT_CORRECTION = {
    "rmsprop": lambda: optax.rmsprop(0.1, decay=0.9),
    "centered": lambda: optax.rmsprop(0.1, decay=0.9, centered=True),
}


@pytest.mark.parametrize("make", WITHOUT_CORRECTION.values(), ids=WITHOUT_CORRECTION)
def test_a_moment_that_is_not_corrected_is_taken_as_it_is(make):
    """In the first step RMSProp divides by the root of (1 - decay) g^2: an RMS of 3.16."""
    _, state = next(run(clip_update_rms(make())))
    assert float(state.clip_state.clip_measure["w"]) == pytest.approx(np.sqrt(10), rel=1e-4)


PLACES = {
    "chain": lambda adam: optax.chain(optax.clip_by_global_norm(1e9), adam, optax.scale(0.5)),
    "masked": lambda adam: optax.masked(adam, {"w": True, "b": False}),
    "inject_hyperparams": lambda adam: optax.inject_hyperparams(optax.adam)(0.1, b2=0.99),
    "partition": lambda adam: optax.partition(
        {"adam": adam, "sgd": optax.sgd(0.1)}, {"w": "adam", "b": "sgd"}
    ),
    "two_partitions": lambda adam: optax.partition(
        {"one": adam, "two": optax.rmsprop(0.1, decay=0.9)}, {"w": "one", "b": "two"}
    ),
    "skip": gradclip_jax.skip_nonfinite,
    "finite": lambda adam: optax.apply_if_finite(adam, 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_moment_is_found_wherever_it_is(place):
    alone = clip_update_rms(optax.adam(0.1, b2=0.99), b2=0.99)
    optimizer = clip_update_rms(PLACES[place](optax.adam(0.1, b2=0.99)), b2=0.99)
    for (_, expected), (_, state) in zip(run(alone), run(optimizer), strict=True):
        rms, known = state.clip_state.clip_measure, expected.clip_state.clip_measure
        np.testing.assert_allclose(rms["w"], known["w"], rtol=1e-5)
        if place in ("masked", "partition"):
            assert rms["b"] is None
        elif place != "two_partitions":
            np.testing.assert_allclose(rms["b"], known["b"], rtol=1e-5)


def test_under_muon_matrices_pass_and_vectors_are_clipped():
    optimizer = clip_update_rms(optax.contrib.muon(0.01, adam_b2=0.99), b2=0.99)
    plain = optax.contrib.muon(0.01, adam_b2=0.99)
    params = jax.tree.map(jnp.asarray, PARAMS)
    grads = [{"w": PARAMS["w"], "b": s * np.ones(3, np.float32)} for s in (1.0, 1.0, 30.0)]
    state, other = optimizer.init(params), plain.init(params)
    for each in grads:
        updates, state = optimizer.update(each, state, params)
        expected, other = plain.update(each, other, params)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    assert state.clip_state.clip_measure["w"] is None
    assert float(state.clip_state.clip_factor["b"]) < 0.7


def test_layers_of_a_stack_are_clipped_apart():
    adam = optax.adam(1.0, b2=0.9)
    params = {"stack": jnp.zeros((2, 3, 2)), "bias": jnp.zeros(2)}
    quiet = jax.tree.map(jnp.ones_like, params)
    loud = {**quiet, "stack": quiet["stack"].at[1].set(10.0)}
    pooled, apart = (
        list(run(clip_update_rms(adam, b2=0.9, axes=axes), [quiet] * 9 + [loud], params))[-1][1]
        for axes in (None, (1, 2))
    )
    v = 1 + 99 * 0.1 / (1 - 0.9**10)
    rms = apart.clip_state.clip_measure["stack"].ravel()
    np.testing.assert_allclose(rms, [1, 10 / np.sqrt(v)], rtol=1e-5)
    expected = np.sqrt((1 + 100 / v) / 2)
    np.testing.assert_allclose(pooled.clip_state.clip_measure["stack"], expected, rtol=1e-5)
    assert apart.clip_state.clip_measure["bias"].shape == (1,)


def test_tiny_second_moments_count_as_eps():
    """Of a gradient of 1e-25 the square is 0, and the quotient would be infinite."""
    _, state = next(run(clip_update_rms(optax.adam(0.1), b2=0.999), [{"x": jnp.full(2, 1e-25)}],
                        {"x": jnp.zeros(2)}))  # fmt: skip
    assert float(state.clip_state.clip_measure["x"]) == pytest.approx(1e-17)
    _, state = next(run(clip_update_rms(optax.adam(0.1), b2=0.999), [{"x": jnp.zeros(2)}],
                        {"x": jnp.zeros(2)}))  # fmt: skip
    assert float(state.clip_state.clip_measure["x"]) == 0


def test_a_nan_makes_the_step_of_its_array_zero_and_a_guard_around_keeps_it_out():
    params = jax.tree.map(jnp.asarray, PARAMS)
    optimizer = clip_update_rms(optax.adam(0.1), b2=0.999)
    broken = {**PARAMS, "b": np.float32([np.nan, 1, 1])}
    updates, state = optimizer.update(broken, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["b"], 0)
    assert np.isfinite(updates["w"]).all()
    assert int(metrics(state)["nonfinite_count"]) == 1
    guarded = gradclip_jax.skip_nonfinite(optimizer)
    _, state = guarded.update(broken, guarded.init(params), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner_state.inner_state))


def test_no_threshold_is_the_optimizer_alone_and_zero_stands_still():
    plain = optax.adam(0.1)
    for (ours, _), (theirs, _) in zip(
        run(clip_update_rms(plain, threshold=None, b2=0.999)), run(plain), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    ours, _ = next(run(clip_update_rms(plain, threshold=0.0, b2=0.999)))
    jax.tree.map(np.testing.assert_array_equal, ours, PARAMS)


def test_thresholds_may_be_schedules_and_the_state_keeps_its_types():
    optimizer = clip_update_rms(
        optax.adam(0.1), threshold=optax.linear_schedule(1.0, 0.5, 10), b2=0.999
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    types = jax.tree.map(jax.typeof, state)

    def step(state, _):
        return optimizer.update(PARAMS, state, params)[::-1]

    last, _ = jax.lax.scan(step, state, length=10)
    assert jax.tree.map(jax.typeof, last) == types
    assert float(last.clip_state.clip_limit["w"]) == pytest.approx(0.55)
    abstract = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_dtypes_are_measured_in_float32(dtype):
    params = {"x": jnp.ones(2, dtype)}
    optimizer = clip_update_rms(optax.adam(0.1, b2=0.5), b2=0.5)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert updates["x"].dtype == dtype
    assert state.clip_state.clip_measure["x"].dtype == jnp.float32
    assert float(state.clip_state.clip_measure["x"]) == pytest.approx(1, rel=1e-2)


def test_leaves_that_are_no_gradients_pass():
    params = {"x": jnp.ones(2), "none": None}
    optimizer = clip_update_rms(optax.adam(0.1), b2=0.999)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["none"] is None
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}


def test_derivatives_are_finite_where_a_gradient_is_zero():
    optimizer = clip_update_rms(optax.adam(0.1), b2=0.999)

    def moved(grads):
        return optimizer.update(grads, optimizer.init(jnp.zeros(2)), jnp.zeros(2))[0]

    plain = jax.jacrev(lambda g: optax.adam(0.1).update(g, optax.adam(0.1).init(g))[0])
    for grads in (jnp.array([1.0, 2.0]), jnp.array([1e-3, 1.0])):
        assert np.isfinite(jax.jacrev(moved)(grads)).all()
    finite = np.isfinite(plain(jnp.array([0.0, 1.0])))  # the root of Adam itself has none at 0
    assert np.isfinite(jax.jacrev(moved)(jnp.array([0.0, 1.0])))[finite].all()


SPECS = {"w": P("data", "model"), "b": P("data"), "s": P()}
SHAPES = {"w": (8, 4), "b": (8,), "s": ()}


def sharded_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def two_steps(optimizer, params, grads):
    state = optimizer.init(params)
    first, state = optimizer.update(grads, state, params)
    second, state = optimizer.update(jax.tree.map(lambda g: 20 * g, grads), state, params)
    return first, second, metrics(state)["clip_count"]


@pytest.mark.parametrize("axes", [None, 1])
@pytest.mark.parametrize("check_vma", [True, False])
def test_within_shard_map_it_is_as_on_one_device(axes, check_vma, mesh_2d):
    params, grads = sharded_tree(0), sharded_tree(1)
    said = None if check_vma and axes is None else SPECS
    make = functools.partial(clip_update_rms, optax.adamw(0.1, b2=0.9), b2=0.9, axes=axes)
    mapped = shard_map(
        functools.partial(two_steps, make(axis_name=said)),
        mesh=mesh_2d,
        in_specs=(SPECS, SPECS),
        out_specs=(SPECS, SPECS, P()),
        check_vma=check_vma,
    )
    expected = two_steps(make(), params, grads)
    assert int(expected[2]) >= 1
    chex.assert_trees_all_close(mapped(params, grads), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_under_jit_with_shardings_it_is_as_on_one_device(kind):
    mesh = make_mesh(kind, data=4, model=2)
    params, grads = sharded_tree(0), sharded_tree(1)
    optimizer = clip_update_rms(optax.adamw(0.1, b2=0.9), b2=0.9)
    expected = two_steps(optimizer, params, grads)
    with jax.set_mesh(mesh):
        placed = [
            {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}
            for tree in (params, grads)
        ]
        result = jax.jit(functools.partial(two_steps, optimizer))(*placed)
    chex.assert_trees_all_close(result, expected, rtol=1e-5)
    assert result[0]["w"].sharding.is_equivalent_to(placed[0]["w"].sharding, 2)


def test_it_may_be_new_around_the_optimizer_of_a_checkpoint(tmp_path):
    plain = optax.adamw(0.01, b2=0.99)
    *_, (params, saved) = run(plain)
    optimizer = clip_update_rms(plain, b2=0.99)
    fresh = optimizer.init(params)
    state = upgrade_state(saved, fresh)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, saved)
    jax.tree.map(np.testing.assert_array_equal, upgrade_state(state, saved), saved)
    restored = through_orbax(state, fresh, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def init_of(optimizer, **arguments):
    return lambda: clip_update_rms(optimizer, **arguments).init(PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            init_of(optax.sgd(0.1, momentum=0.9)),
            r"`optimizer` must have a second moment, a field `nu` .* none in TraceState, Empty",
        ),
        (init_of(optax.lion(0.1)), "there is none in ScaleByLionState"),
        (init_of(optax.adafactor(0.1)), "there is none in FactoredState"),
        (init_of(optax.novograd(0.1), b2=0.9), "of `ScaleByNovogradState` has another shape than"),
        (init_of(optax.sm3(0.1)), "there is none in ScaleBySM3State"),
        (
            init_of(optax.chain(optax.scale_by_adam(), optax.scale_by_rms()), b2=0.9),
            "`optimizer` must have one second moment, it has two of `b`",
        ),
        (init_of(optax.adam(0.1)), r"`b2` must be given: .* \(0.999 in `optax.adamw`\)"),
        (lambda: clip_update_rms(optax.adam), "`optimizer` must be an optimizer of optax"),
        (lambda: clip_update_rms(optax.adam(0.1), b2=1.0), "`b2` must lie between 0 and 1"),
        (lambda: clip_update_rms(optax.adam(0.1), eps=0.0), "`eps` must be a finite number above"),
        (
            lambda: clip_update_rms(optax.adam(0.1), threshold=-1.0),
            r"^`threshold` must be non-negative, got -1\.0\.$",
        ),
        (lambda: clip_update_rms(optax.adam(0.1), on_nonfinite="x"), "`on_nonfinite` must be"),
        (
            lambda: gradclip_jax.from_config({"method": "clip_update_rms"}),
            r"^`clip_update_rms` wraps an optimizer and is not a clip: `from_config\(…, opt",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_state_of_another_optimizer_raises():
    optimizer = clip_update_rms(optax.adam(0.1), b2=0.999)
    with pytest.raises(ValueError, match="`state` must be the `UpdateRmsState` that `init`"):
        optimizer.update(PARAMS, optax.adam(0.1).init(PARAMS), PARAMS)
