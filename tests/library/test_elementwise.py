"""SPAM: limits of elements that are multiples of their own root mean square."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, shard_map, through_orbax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gradclip_jax import metrics
from gradclip_jax._strategies.spam_clip import spam_clip


def run(clip, stream, state=None):
    """What comes out for each gradient of a stream, and the last state."""
    state = clip.init(stream[0]) if state is None else state
    results = []
    update = jax.jit(clip.update)
    for grads in stream:
        result, state = update(grads, state)
        results.append(result)
    return results, state


def reference(stream, threshold, decay, warmup_steps):
    """The equations in NumPy, in float64."""
    v, results = np.zeros(stream.shape[1:]), []
    for step, g in enumerate(np.asarray(stream, np.float64)):
        with np.errstate(invalid="ignore"):
            fires = (g * g > threshold * v) & (v > 0) & (step >= warmup_steps)
        y = np.where(fires, np.sign(g) * np.sqrt(threshold * v), g)
        v = np.where(np.isfinite(g), decay * v + (1 - decay) * y * y, v)
        results.append(np.where(np.isfinite(g), y, 0))
    return np.stack(results), v


def spiky(steps=300, size=3, seed=0):
    """Normal elements, one in fifty of which is a hundred times its size."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(steps, size)) * 10.0 ** np.arange(size)
    return (grads * np.where(rng.random(grads.shape) < 0.02, 100, 1)).astype(np.float32)


def rms_of(state):
    return state.limit_state[1]


def test_by_hand():
    clip = spam_clip(4.0, decay=0.75, warmup_steps=1)
    # v = 0.25 * 9, the limit twice its root.
    (first, second), state = run(clip, [jnp.array([3.0, 3.0]), jnp.array([-100.0, 1.0])])
    np.testing.assert_array_equal(first, [3.0, 3.0])
    np.testing.assert_allclose(second, [-3.0, 1.0], rtol=1e-6)
    # v = 0.75 * 2.25 + 0.25 * 9 with the element as it came out.
    np.testing.assert_allclose(rms_of(state)[0] ** 2, 3.9375, rtol=1e-6)


def test_metrics_tell_the_element_furthest_beyond():
    clip = spam_clip(4.0, decay=0.75, warmup_steps=1)
    _, state = run(clip, [jnp.array([3.0, 3.0]), jnp.array([-100.0, 1.0])])
    seen = metrics(state)
    assert float(seen["clip_measure"]) == pytest.approx(100 / 1.5)
    assert float(seen["clip_limit"]) == 2
    assert float(seen["clip_factor"]) == pytest.approx(0.03)
    assert (float(seen["clipped"]), int(seen["clip_count"])) == (1, 1)


@pytest.mark.parametrize(
    ("threshold", "decay", "warmup_steps"), [(9.0, 0.9, 0), (5000.0, 0.999, 20)]
)
def test_the_equations_on_a_stream_with_spikes(threshold, decay, warmup_steps):
    stream = spiky()
    results, state = run(spam_clip(threshold, decay=decay, warmup_steps=warmup_steps), list(stream))
    expected, v = reference(stream, threshold, decay, warmup_steps)
    np.testing.assert_allclose(np.stack(results), expected, rtol=1e-5)
    np.testing.assert_allclose(rms_of(state), np.sqrt(v), rtol=1e-5)
    assert (expected != stream).any()


def test_by_default_the_twentieth_update_is_the_first_that_is_clipped():
    """The loop of the authors: it counts steps from 1 on and clips those from 20 on."""
    stream = [np.float64(1e3 if step == 19 else 1.0) for step in range(1, 20)] + [np.float64(1e6)]
    v, expected = 0.0, []
    for step, g in enumerate(stream, start=1):
        if step >= 20 and g * g > 5000 * v:
            g = np.sign(g) * np.sqrt(5000 * v)
        v = 0.999 * v + 0.001 * g * g
        expected.append(g)
    results, state = run(spam_clip(), [jnp.asarray([g], jnp.float32) for g in stream])
    np.testing.assert_allclose(np.concatenate(results), expected, rtol=1e-5)
    assert float(results[-2][0]) == 1e3
    assert float(results[-1][0]) < 1e4
    assert int(metrics(state)["clip_count"]) == 1


def test_a_spike_is_clipped_at_all():
    """A widely used port writes through a copy made by a mask, and never clips."""
    stream = [jnp.array([1.0, -1.0])] * 100 + [jnp.array([1e4, -1e4])]
    (*_, last), _ = run(spam_clip(), stream)
    limit = np.sqrt(5000 * (1 - 0.999**100))
    np.testing.assert_allclose(last, [limit, -limit], rtol=1e-4)


def test_no_gradient_becomes_zero_because_nothing_is_known_yet():
    """By the letter of the equation, an element with v = 0 would stay zero for ever."""
    clip = spam_clip(4.0, decay=0.9, warmup_steps=0)
    (first, _, third), _ = run(clip, [jnp.array([2.0, 0.0])] * 2 + [jnp.array([0.1, 7.0])])
    np.testing.assert_array_equal(first, [2.0, 0.0])
    np.testing.assert_array_equal(third, jnp.array([0.1, 7.0]))


def test_everything_passes_during_the_warm_up():
    stream = [jnp.array([10.0**i]) for i in range(4)]
    results, state = run(spam_clip(2.0, decay=0.5, warmup_steps=4), stream)
    chex.assert_trees_all_equal(results, stream)
    assert float(metrics(state)["clip_limit"]) == np.inf
    (held,), _ = run(spam_clip(2.0, decay=0.5, warmup_steps=4), [jnp.array([1e9])], state)
    assert float(held[0]) < 2e3


@pytest.mark.parametrize("level", [1e-30, 1e-3, 1e4, 1e30])
def test_a_constant_stream_never_fires(level):
    results, state = run(spam_clip(), [jnp.full(2, level)] * 200)
    np.testing.assert_array_equal(np.stack(results), np.float32(level))
    assert int(metrics(state)["clip_count"]) == 0


def test_a_new_level_is_reached_in_16_updates_and_the_old_one_in_4605_a_decade():
    clip = spam_clip()
    _, state = run(clip, [jnp.ones(1)] * 5000)
    steps = 0
    while True:
        (held,), state = run(clip, [jnp.array([1e6])], state)
        steps += 1
        if float(held[0]) == 1e6:
            break
    assert 12 <= steps <= 16
    _, state = run(clip, [jnp.array([1e-9])], state)
    before = float(rms_of(state)[0])
    after, _ = jax.lax.scan(
        lambda s, _: (clip.update(jnp.array([1e-9]), s)[1], None), state, length=4605
    )
    assert float(rms_of(after)[0]) == pytest.approx(before / 10, rel=0.01)


def test_squares_do_not_overflow():
    results, state = run(
        spam_clip(100.0, decay=0.9, warmup_steps=1), [jnp.array([1e20, 1e-25])] * 3
    )
    np.testing.assert_array_equal(np.stack(results), np.float32([[1e20, 1e-25]] * 3))
    (held,), state = run(
        spam_clip(100.0, decay=0.9, warmup_steps=1), [jnp.array([3e38, 1.0])], state
    )
    rms = np.sqrt(1 - 0.9**3)
    np.testing.assert_allclose(held, [10 * rms * 1e20, 10 * rms * 1e-25], rtol=1e-4)
    assert int(metrics(state)["nonfinite_count"]) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_becomes_zero_and_leaves_the_statistics_bit_equal(bad):
    clip = spam_clip(9.0, decay=0.9, warmup_steps=2)
    stream = list(spiky(30))
    _, state = run(clip, stream)
    broken = stream[0].copy()
    broken[1] = bad
    (result,), new = run(clip, [broken], state)
    (unbroken,), expected = run(clip, [stream[0]], state)
    np.testing.assert_array_equal(result, np.where([True, False, True], unbroken, 0))
    assert rms_of(new)[1] == rms_of(state)[1]
    np.testing.assert_array_equal(rms_of(new)[::2], rms_of(expected)[::2])
    assert int(metrics(new)["nonfinite_count"]) == 1
    clip = spam_clip(9.0, decay=0.9, warmup_steps=2, on_nonfinite="propagate")
    (result,), _ = run(clip, [broken], state)
    np.testing.assert_array_equal(np.isnan(result), [False, True, False])


def test_complex_elements_are_held_by_modulus():
    clip = spam_clip(4.0, decay=0.75, warmup_steps=1)
    z = jnp.array([3 + 4j, 1j])
    (_, held), state = run(clip, [z, 100 * z])
    np.testing.assert_allclose(held, z, rtol=1e-6)
    assert held.dtype == z.dtype
    assert rms_of(state).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_small_dtypes_come_back_as_they_are_and_learn_in_float32(dtype):
    clip = spam_clip(4.0, decay=0.75, warmup_steps=1)
    (_, held), state = run(clip, [jnp.array([2.0, 1.0], dtype), jnp.array([200.0, 0.5], dtype)])
    assert held.dtype == dtype
    np.testing.assert_array_equal(held.astype(jnp.float32), [2.0, 0.5])
    assert rms_of(state).dtype == jnp.float32


def test_in_float64_under_x64(x64):
    (_, held), state = run(spam_clip(4.0, decay=0.75, warmup_steps=1), [jnp.array([3.0])] * 2)
    assert held.dtype == rms_of(state).dtype == jnp.float64
    (held,), _ = run(spam_clip(4.0, decay=0.75, warmup_steps=1), [jnp.array([1e200])], state)
    assert float(held[0]) == pytest.approx(2 * 3 * np.sqrt(1 - 0.75**2), rel=1e-12)


TREE = {
    "w": jnp.array([[3.0, -4.0]]),
    "b": jnp.array(2.0, jnp.bfloat16),
    "none": None,
    "int": jnp.arange(3),
    "key": jax.random.key(0),
    "float0": np.zeros(2, jax.dtypes.float0),
    "empty": jnp.zeros((0, 2)),
}


def test_leaves_that_are_no_gradients_pass():
    clip = spam_clip(1.0, decay=0.5, warmup_steps=0)
    result, state = clip.update(TREE, clip.init({**TREE, "float0": jnp.arange(2)}))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        {k: result[k] for k in "wb"}, {k: TREE[k] for k in "wb"}
    )
    for name in ("none", "int", "key", "float0"):
        assert result[name] is TREE[name]
        assert rms_of(state)[name] is None
    assert clip.update({}, clip.init({}))[0] == {}
    result, _ = clip.update({"x": 10.0}, clip.init({"x": 1.0}))
    assert float(result["x"]) == 10


def test_zero_stays_zero_and_a_threshold_of_zero_gives_zeros():
    clip = spam_clip(0.0, warmup_steps=3)
    results, state = run(clip, [jnp.array([1e30, 1e-30, 0.0])] * 3)
    np.testing.assert_array_equal(np.stack(results), 0)
    assert np.isfinite(rms_of(state)).all()


@pytest.mark.parametrize("threshold", [None, np.inf])
def test_no_threshold_is_the_identity_and_still_measures(threshold):
    stream = list(spiky(30))
    results, state = run(spam_clip(threshold, warmup_steps=0), stream)
    chex.assert_trees_all_equal(results, stream)
    assert float(metrics(state)["clip_measure"]) > 0
    assert float(metrics(state)["clip_factor"]) == 1


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_state_keeps_its_shape_and_scan_equals_the_loop():
    clip = spam_clip(optax.linear_schedule(9.0, 4.0, 100), decay=0.9, warmup_steps=2)
    stream = jnp.asarray(spiky(100))
    results, state = run(clip, list(stream))
    init = clip.init(jnp.zeros(3, jnp.bfloat16))
    assert shapes(init) == shapes(state)

    def body(state, grads):
        result, state = clip.update(grads, state)
        return state, result

    last, scanned = jax.lax.scan(body, init, stream)
    # Two programs: a product and a sum may be rounded once or twice.
    np.testing.assert_allclose(scanned, np.stack(results), rtol=1e-6)
    chex.assert_trees_all_close(last, state, rtol=1e-6)


def test_jit_eager_and_vmap_agree():
    clip = spam_clip(9.0, decay=0.9, warmup_steps=2)
    streams = [spiky(5, seed=seed) for seed in range(2)]
    eager = []
    for stream in streams:
        state, results = clip.init(stream[0]), []
        for grads in stream:
            result, state = clip.update(grads, state)
            results.append(result)
        eager.append((results[-1], state))
        results, state = run(clip, list(stream))
        chex.assert_trees_all_close(eager[-1], (results[-1], state), rtol=1e-6)
    state = jax.vmap(clip.init)(np.stack([stream[0] for stream in streams]))
    mapped, update = [], jax.jit(jax.vmap(clip.update))
    for grads in np.stack(streams, axis=1):
        result, state = update(grads, state)
        mapped.append(result)
    for i in range(2):
        mine = jax.tree.map(lambda x, i=i: x[i], (mapped[-1], state))
        chex.assert_trees_all_close(mine, eager[i], rtol=1e-6)


def test_updates_and_state_may_be_donated():
    clip = spam_clip(9.0, decay=0.9)
    grads = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    state = clip.init(grads)
    expected, _ = clip.update(grads, state)
    result, _ = jax.jit(clip.update, donate_argnums=(0, 1))(grads, state)
    chex.assert_trees_all_close(result, expected)


def test_saved_and_restored_in_the_middle_is_bit_equal(tmp_path):
    clip = spam_clip(9.0, decay=0.9, warmup_steps=2)
    stream = list(spiky(40))
    expected, last = run(clip, stream)
    _, state = run(clip, stream[:20])
    restored = through_orbax(state, clip.init(stream[0]), tmp_path)
    results, state = run(clip, stream[20:], restored)
    chex.assert_trees_all_equal((results, state), (expected[20:], last))


def test_derivatives_are_finite_and_at_zero_the_identity():
    clip = spam_clip(4.0, decay=0.75, warmup_steps=0)

    def second(first, x):
        _, state = clip.update(first, clip.init(first))
        return clip.update(x, state)[0]

    zeros = jnp.zeros(2)
    np.testing.assert_array_equal(jax.jacobian(second, argnums=1)(zeros, zeros), np.eye(2))
    jacobians = jax.jit(jax.jacrev(second, argnums=(0, 1)))
    for x in (zeros, jnp.array([1.0, 100.0]), jnp.array([0.0, 1e25])):
        assert np.isfinite(jacobians(jnp.array([1.0, 0.0]), x)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -1.0}, r"^`threshold` must be non-negative, got -1\.0\.$"),
        ({"threshold": True}, "`threshold` must be a non-negative number"),
        ({"threshold": float("nan")}, "`threshold` must be"),
        ({"decay": 1.5}, r"^`decay` must lie between 0 and 1 \(exclusive\), got 1\.5\.$"),
        ({"decay": 1}, "`decay` must lie"),
        ({"decay": True}, "`decay` must lie"),
        ({"decay": None}, "`decay` must lie"),
        ({"warmup_steps": -1}, r"^`warmup_steps` must be a whole number of at least 0, got -1\.$"),
        ({"warmup_steps": True}, "`warmup_steps` must be"),
        ({"warmup_steps": 2.0}, "`warmup_steps` must be"),
        ({"on_nonfinite": "ignore"}, "`on_nonfinite` must be"),
    ],
)
def test_what_may_not_be_raises_and_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        spam_clip(**arguments)


def test_updates_of_another_structure_raise():
    clip = spam_clip()
    state = clip.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="`updates` must have the structure of the params given"):
        clip.update({"b": jnp.ones(2)}, state)
    with pytest.raises(ValueError, match="`updates` must have the structure of the params given"):
        clip.update({"a": None}, state)
    # It looks at no parameter.
    clip.update({"a": jnp.ones(2)}, state, {"b": jnp.ones(2)})


def test_composes_with_the_wrappers_of_optax(standard_promotion):
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    make = optax.inject_hyperparams(spam_clip)
    clip = make(threshold=optax.linear_schedule(9.0, 4.0, 5), decay=0.9)
    optimizer = optax.chain(optax.masked(clip, {"w": True, "b": False}), optax.adamw(1e-3))
    wrapped = optax.MultiSteps(optimizer, 2).gradient_transformation()
    state, update = wrapped.init(params), jax.jit(wrapped.update)
    for _ in range(4):
        _, state = update(params, state, params)
    assert int(metrics(state)["step_count"]) == 2


def test_split_over_devices_as_on_one(mesh):
    clip = spam_clip(4.0, decay=0.75, warmup_steps=1)
    stream = [jnp.arange(1.0, 17.0), jnp.arange(1.0, 17.0).at[9].set(1e4)]
    expected, state = run(clip, stream)
    split = NamedSharding(mesh, PartitionSpec("data"))
    sharded = [jax.device_put(grads, split) for grads in stream]
    init = clip.init(sharded[0])
    assert rms_of(init).sharding.is_equivalent_to(split, 1)
    results, state_of_jit = run(clip, sharded, init)
    chex.assert_trees_all_close((results, state_of_jit), (expected, state), rtol=1e-6)
    assert results[1].sharding.is_equivalent_to(split, 1)

    for checks, axis_name in ((True, None), (False, "data"), (False, PartitionSpec("data"))):
        manual = spam_clip(4.0, decay=0.75, warmup_steps=1, axis_name=axis_name)
        specs = (PartitionSpec("data"), jax.tree.map(lambda x: PartitionSpec(), state))
        of_state = specs[1]._replace(limit_state=((), PartitionSpec("data")))
        update = shard_map(
            manual.update,
            mesh=make_mesh(data=8),
            in_specs=(PartitionSpec("data"), of_state),
            out_specs=(PartitionSpec("data"), of_state),
            check_vma=checks,
        )
        _, new = jax.jit(update)(stream[0], manual.init(stream[0]))
        result, new = jax.jit(update)(stream[1], new)
        chex.assert_trees_all_close((result, new), (expected[1], state), rtol=1e-6)


def test_a_leaf_in_host_memory_stays_there():
    updates = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5]]), "b": jnp.ones(2)}
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    mixed = {**updates, "w": jax.device_put(updates["w"], host)}
    clip = spam_clip(4.0, decay=0.75)
    result, _ = jax.jit(clip.update)(mixed, clip.init(mixed))
    expected, _ = clip.update(updates, clip.init(updates))
    assert result["w"].sharding.memory_kind == "pinned_host"
    chex.assert_trees_all_close(jax.device_get(result), expected, atol=1e-6)
