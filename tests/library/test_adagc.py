"""AdaGC against its authors' rule in NumPy, and what one array may do to the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, shard_map, through_orbax
from jax.sharding import PartitionSpec as P

import gradclip_jax
from gradclip_jax._strategies.adagc import adagc

N = [1.0, 1.2, 0.8, 1.1, 10.0, 0.9, 1.0, 50.0, 1.3, 0.7]


@functools.partial(jax.jit, static_argnums=0)
def scan(update, state, grads):
    def step(state, updates):
        updates, state = update(updates, state)
        norms = jax.tree.map(jnp.linalg.norm, updates)
        return state, (norms, state.limit_state.level, updates)

    return jax.lax.scan(step, state, grads)


def run(clip, norms, state=None):
    """Norms as clipped, levels after each step, updates and the last state."""
    unit = {"a": jnp.array([0.6, 0.8]), "b": jnp.array([[1.0, 0.0, 0.0]])}
    grads = {
        key: jnp.asarray(norms[key], jnp.float32).reshape(-1, *[1] * unit[key].ndim)
        * unit[key][None]
        for key in norms
    }
    state = clip.init({key: unit[key] for key in norms}) if state is None else state
    state, (passed, levels, updates) = scan(clip.update, state, grads)
    return passed, levels, updates, state


def authors(norms, ratio=1.04, beta=0.99, start_clip_steps=100, max_norm=1.0):
    """The released PyTorch code, in float64 and without its 1e-6: `{leaf: norms}`."""
    gamma, passed = {}, {key: [] for key in norms}
    length = len(next(iter(norms.values())))
    for t in range(length):
        now = {key: norms[key][t] for key in norms}
        if t < start_clip_steps:
            joint = np.sqrt(sum(n**2 for n in now.values()))
            now = {key: n * min(1, max_norm / joint) for key, n in now.items()}
            gamma = {key: min(gamma.get(key, np.inf), n) for key, n in now.items()}
        else:
            now = {key: min(n, ratio * gamma[key]) for key, n in now.items()}
            gamma = {key: beta * gamma[key] + (1 - beta) * n for key, n in now.items()}
        for key, n in now.items():
            passed[key].append(n)
    return passed, gamma


def stream(seed, length=300):
    rng = np.random.default_rng(seed)
    norms = 0.7 * (1 + 0.1 * rng.standard_normal(length))
    norms[22 + seed :: 23] *= 30
    return norms


TWO = {"a": stream(0), "b": 0.1 * stream(5)}
CLIP = adagc()


def test_golden_trace_of_the_authors_code():
    passed, levels, _, _ = run(adagc(warmup_steps=3), {"a": N})
    scale = [1, 0.833333, 1, 0.756363, 0.083233, 0.925183, 0.832998, 0.016667, 0.641281, 1]
    gamma = [1, 1, 0.8, 0.80032, 0.80064, 0.80096, 0.801281, 0.801601, 0.801922, 0.800903]
    np.testing.assert_allclose(passed["a"] / np.array(N), scale, rtol=3e-5)
    np.testing.assert_allclose(levels["a"], gamma, rtol=1e-5)


def test_a_seeded_stream_gives_what_the_rule_gives():
    passed, levels, _, _ = run(CLIP, TWO)
    expected, gamma = authors(TWO)
    for key in TWO:
        np.testing.assert_allclose(passed[key], expected[key], rtol=2e-5)
        np.testing.assert_allclose(levels[key][-1], gamma[key], rtol=2e-5)


def test_the_warm_up_clips_all_arrays_together():
    """Norms 3 and 4, together 5, and a limit of 1."""
    passed, levels, _, state = run(CLIP, {"a": [3.0], "b": [4.0]})
    np.testing.assert_allclose([passed["a"][0], passed["b"][0]], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose([levels["a"][0], levels["b"][0]], [0.6, 0.8], rtol=1e-6)
    metrics = gradclip_jax.metrics(state)
    assert float(metrics["grad_norm"]) == pytest.approx(5.0)
    assert float(metrics["clip_factor"]) == pytest.approx(0.2)
    _, levels, _, state = run(CLIP, {"a": [0.3], "b": [0.4]})
    assert float(gradclip_jax.metrics(state)["clip_limit"]) == 1.0
    assert int(state.clip_count) == 0


def test_after_it_no_array_pays_for_another():
    clip = adagc(warmup_steps=1)
    passed, _, _, _ = run(clip, {"a": [0.3, 30.0], "b": [0.4, 0.4]})
    np.testing.assert_allclose([passed["a"][1], passed["b"][1]], [0.312, 0.4], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("when", [0, 60, 200])
def test_an_array_that_is_not_finite_leaves_its_level_and_the_others_alone(bad, when):
    """In the authors' code, ERNIE's, kozistr's and zij's its level is NaN for ever."""
    norms = {"a": 0.5 * stream(0), "b": 0.05 * stream(5)}
    broken = {key: value.copy() for key, value in norms.items()}
    broken["a"][when] = bad
    passed, levels, updates, state = run(CLIP, broken)
    whole, _, _, _ = run(CLIP, norms)
    assert not np.any(updates["a"][when])
    assert np.all(np.isfinite(levels["a"]))
    if when:
        assert levels["a"][when] == levels["a"][when - 1]
    np.testing.assert_allclose(passed["b"][when], whole["b"][when], rtol=1e-5)
    assert float(levels["a"][-1]) == pytest.approx(0.35, rel=0.25)
    assert int(state.nonfinite_count) == 1


def test_an_array_that_is_not_finite_in_the_whole_warm_up_begins_after_it():
    clip = adagc(warmup_steps=3)
    norms = {"a": [np.nan] * 4 + [0.5, 50.0], "b": [0.1] * 6}
    passed, _, _, _ = run(clip, norms)
    np.testing.assert_allclose(passed["a"], [0, 0, 0, 0, 0.5, 0.52], rtol=1e-6)


def test_a_gradient_of_zero_does_not_freeze_an_array():
    """As of the first matrix of LoRA: the least norm of its warm-up is 0."""
    clip = adagc(warmup_steps=3)
    norms = {"a": [0.0, 0.5, 0.6, 0.5, 0.0, 0.5], "b": [0.0] * 5 + [0.3]}
    passed, levels, _, _ = run(clip, norms)
    np.testing.assert_allclose(passed["a"], norms["a"], rtol=1e-6)
    np.testing.assert_allclose(passed["b"], norms["b"], rtol=1e-6)
    assert float(levels["b"][-1]) == pytest.approx(0.3)


def test_a_level_doubles_in_1734_steps():
    passed, _, _, _ = run(adagc(warmup_steps=1), {"a": [0.1] + [10.0] * 1800})
    assert int(np.nonzero(passed["a"][1:] >= 0.208)[0][0]) == 1734


@pytest.mark.parametrize("norm", [1e-30, 1e-3, 1 / 3, 1e4, 1e20, 1e37])
def test_a_constant_stream_is_never_clipped(norm):
    _, _, _, state = run(adagc(max_norm=None), {"a": np.full(300, norm)})
    assert int(state.clip_count) == 0


def test_the_global_norm_overflows_no_more_than_it_must():
    passed, _, _, _ = run(CLIP, {"a": [3e37], "b": [4e37]})
    np.testing.assert_allclose([passed["a"][0], passed["b"][0]], [0.6, 0.8], rtol=1e-5)


def test_scan_is_the_loop_and_the_state_keeps_its_types():
    passed, _, _, last = run(CLIP, {"a": np.full(5, 3.0), "b": np.full(5, 4.0)})
    grads = {"a": jnp.array([1.8, 2.4]), "b": jnp.array([[4.0, 0.0, 0.0]])}
    state = CLIP.init(grads)
    types = jax.tree.map(jax.typeof, state)
    update = jax.jit(CLIP.update, donate_argnums=1)
    for i in range(5):
        updates, state = update(grads, state)
        np.testing.assert_allclose(jnp.linalg.norm(updates["a"]), passed["a"][i], rtol=1e-6)
    assert jax.tree.map(jax.typeof, state) == types
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, last)


def test_through_orbax_a_run_continues_bit_for_bit(tmp_path):
    """The authors' clipper is not in the checkpoint: there the warm-up begins anew."""
    first, second = ({key: n[i : i + 150] for key, n in TWO.items()} for i in (0, 150))
    _, _, _, state = run(CLIP, first)
    restored = through_orbax(state, state, tmp_path)
    passed, _, _, end = run(CLIP, second, restored)
    whole, _, _, last = run(CLIP, TWO)
    for key in TWO:
        np.testing.assert_array_equal(passed[key], whole[key][150:])
    jax.tree.map(np.testing.assert_array_equal, end, last)


@pytest.mark.parametrize("check_vma", [True, False])
def test_over_devices_it_is_the_clip_on_one(check_vma):
    grads = {"a": jnp.arange(1.0, 9.0), "b": jnp.array([3.0, 4.0])}
    specs = {"a": P("data"), "b": P()}
    clip = adagc(warmup_steps=1, axis_name=None if check_vma else specs)

    def twice(grads):
        state = clip.init(grads)
        first, state = clip.update(grads, state, grads)
        second, _ = clip.update(jax.tree.map(lambda g: 2 * g, first), state, grads)
        return first, second

    over_devices = shard_map(
        twice,
        mesh=make_mesh(data=8),
        in_specs=(specs,),
        out_specs=(specs, specs),
        check_vma=check_vma,
    )
    on_one = adagc(warmup_steps=1)
    first, state = on_one.update(grads, on_one.init(grads), grads)
    second, _ = on_one.update(jax.tree.map(lambda g: 2 * g, first), state, grads)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, jax.jit(over_devices)(grads), (first, second))


def test_numbers_may_be_injected_and_max_norm_scheduled(standard_promotion):
    norms = {"a": jnp.array([3.0, 4.0])}
    clip = optax.inject_hyperparams(adagc)(warmup_steps=2)
    updates, state = jax.jit(clip.update)(norms, clip.init(norms), norms)
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)
    assert set(state.hyperparams) == {"ratio", "decay", "max_norm", "warmup_steps"}
    clip = adagc(max_norm=optax.linear_schedule(1.0, 2.0, 1))
    _, state = clip.update(norms, clip.init(norms), norms)
    updates, _ = clip.update(norms, state, norms)
    np.testing.assert_allclose(updates["a"], [1.2, 1.6], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("ratio", bad) for bad in (1.0, 0.5, np.nan, True)),
        *(("decay", bad) for bad in (0.0, 1.0, 1.5, True)),
        *(("warmup_steps", bad) for bad in (0, 2.5, True, None)),
        *(("max_norm", bad) for bad in (-1.0, np.nan, True)),
    ],
)
def test_a_bad_argument_raises_and_is_named(name, bad):
    with pytest.raises(ValueError, match=f"^`{name}` must "):
        adagc(**{name: bad})


def test_a_policy_that_does_not_exist_raises():
    with pytest.raises(ValueError, match="`on_nonfinite` must be"):
        adagc(on_nonfinite="skip")
