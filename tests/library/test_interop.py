"""The same numbers by the arguments of other frameworks, and clips from configs."""

import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from registry import public_limits, required_arguments

import gradclip_jax
from gradclip_jax import (
    from_config,
    from_keras,
    from_lightning,
    from_torch,
    from_transformers,
    leaf_norms,
)
from gradclip_jax._inject import STRATEGIES
from gradclip_jax._state import measured

REFERENCE = Path(__file__).parent / "reference"
GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}


def cases(*frameworks):
    return [
        case
        for framework in frameworks
        for case in json.loads((REFERENCE / f"{framework}.json").read_text())["cases"]
    ]


def name_of(case):
    arguments = ",".join(f"{name}={value}" for name, value in case["arguments"].items())
    return f"{case['framework']}.{case['function']}({arguments})-{case['scale']}"


def arrays(tree):
    return {name: np.asarray(leaf, np.float32) for name, leaf in tree.items()}


def apply(clip, updates, params=None):
    updates = jax.tree.map(jnp.asarray, updates)
    params = updates if params is None else params
    return clip.update(updates, clip.init(params), params)


def assert_same(result, expected):
    for name, array in expected.items():
        np.testing.assert_allclose(result[name], array, rtol=2e-6, atol=1e-12, err_msg=name)


def translations(case):
    """The clips of this library that say the same, by the arguments of the case."""
    arguments = case["arguments"]
    match case["framework"], case["function"]:
        case "torch", "clip_grad_norm_":
            arguments = {**arguments, "max_norm": float(arguments["max_norm"])}
            yield from_torch(**arguments)
            is_plain = arguments.get("norm_type", 2) == 2 and "error" not in case
            if is_plain and arguments["max_norm"] > 0:
                yield from_lightning(arguments["max_norm"])
                yield from_transformers(arguments["max_norm"])
        case "torch", "clip_grad_value_":
            yield from_lightning(arguments["clip_value"], gradient_clip_algorithm="value")
        case "keras", "SGD":
            yield from_keras(**arguments)
        case "optax", "clip":
            yield from_config({"method": "clip_by_value", "threshold": arguments["max_delta"]})
        case "optax", ("clip_by_global_norm" | "clip_by_block_rms") as name:
            yield from_config({"method": name, **arguments})


# `test_parity` has more, by the names of this library.
FINITE = [
    case
    for case in cases("torch", "keras", "optax")
    if case["function"] not in ("adaptive_grad_clip", "normalize_by_update_norm")
]


@pytest.mark.parametrize("case", FINITE, ids=name_of)
def test_same_numbers(case):
    clips = list(translations(case))
    assert clips
    for clip in clips:
        result, state = apply(clip, arrays(case["updates"]))
        assert_same(result, arrays(case["expected"]))
        if "norm" in case:
            assert float(measured(state)) == pytest.approx(case["norm"], rel=1e-6)


def unlike(case):
    """What comes out here where it is not what the framework gives: the table in the docs."""
    updates, arguments = arrays(case["updates"]), case["arguments"]
    expected = arrays(case.get("expected", {}))
    infinite = case["scale"] in ("inf", "-inf") and "error" not in case
    if infinite and case["function"] == "clip_grad_norm_":
        assert np.isnan(expected["odd"][0])
        assert not any((expected["odd"][1], *expected["plain"]))
        return {name: np.full_like(x, np.nan) for name, x in updates.items()}
    if infinite and arguments.keys() & {"clip_value", "clipvalue"}:
        assert abs(expected["odd"][0]) == 1
        return {**expected, "odd": np.array([np.nan, 1], np.float32)}
    if infinite and "clipnorm" in arguments:
        assert expected["odd"][1] == 0
        return {**expected, "odd": np.full(2, np.nan, np.float32)}
    if case["scale"] == "overflow" and not np.any(expected.get("odd", 0) > 0):
        if "clipnorm" in arguments:
            return {"odd": np.array([0.6, 0.8], np.float32), "plain": expected["plain"]}
        return {"odd": np.array([0.6, 0.8], np.float32), "plain": updates["plain"] / 5e20}
    return None


@pytest.mark.parametrize("case", cases("edges"), ids=name_of)
def test_what_is_odd(case):
    updates, expected = arrays(case["updates"]), unlike(case)
    for clip in translations(case):
        if "error" in case and expected is None:
            with pytest.raises(RuntimeError, match="must be finite, got"):
                apply(clip, updates)
            continue
        result, state = apply(clip, updates)
        assert_same(result, expected or arrays(case["expected"]))
        if "norm" in case and expected is None:
            known = float(case["norm"])
            # Under the infinity norm a NaN counts as infinite here.
            assert float(measured(state)) == pytest.approx(known) or not math.isfinite(known)
            assert math.isfinite(measured(state)) == math.isfinite(known)


def test_the_edges_cover_what_they_should():
    edges = cases("edges")
    assert {case["scale"] for case in edges} >= {"nan", "inf", "overflow", "zero array"}
    assert any("error" in case for case in edges)
    # No clip at all, with limits of 0 and below.
    off = [
        case for case in edges if case["arguments"] in ({}, {"clipnorm": 0.0}, {"clipnorm": -1.0})
    ]
    assert len(off) == 6
    assert all(arrays(case["expected"])["plain"][0] == 3 for case in off)


def test_at_the_limit_the_epsilon_of_pytorch_shows():
    updates, _ = apply(from_torch(5.0), {"w": jnp.array([3.0, 4.0])})
    assert 0 < 3 - float(updates["w"][0]) < 1e-6
    updates, _ = apply(from_torch(5.0, eps=0.0), {"w": jnp.array([3.0, 4.0])})
    assert updates["w"].tolist() == [3, 4]
    updates, _ = apply(from_torch(0.01), {"w": jnp.array([0.05])})
    assert float(updates["w"][0]) == pytest.approx(0.01 * 0.05 / 0.050001, rel=1e-6)


@pytest.mark.parametrize("make", [from_lightning, from_transformers])
@pytest.mark.parametrize("off", [None, 0, 0.0, -1, np.float32(0)])
def test_no_clip_still_measures(make, off):
    updates, state = apply(make(off), GRADS)
    assert updates["w"].tolist() == [3, 4]
    assert gradclip_jax.metrics(state)["grad_norm"] == pytest.approx(math.sqrt(25.25))
    assert apply(from_lightning(off, gradient_clip_algorithm="value"), GRADS)[0]["w"].tolist() == [
        3,
        4,
    ]


def test_a_nan_may_be_held_back_instead():
    grads = {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(2)}
    for clip in (
        from_torch(1.0, on_nonfinite="zero"),
        from_keras(global_clipnorm=1.0, on_nonfinite="zero"),
        from_lightning(1.0, on_nonfinite="zero"),
        from_transformers(on_nonfinite="zero"),
    ):
        updates, state = apply(clip, grads)
        assert not jnp.any(updates["b"])
        assert state.nonfinite_count == 1


def test_thresholds_may_be_schedules():
    halving = optax.linear_schedule(1.0, 0.5, 1)
    for clip in (from_torch(halving), from_keras(clipnorm=halving), from_lightning(halving)):
        state = clip.init(GRADS)
        for limit in (1.0, 0.5):
            updates, state = clip.update(GRADS, state)
            assert jnp.linalg.norm(updates["w"]) == pytest.approx(limit, rel=1e-2)


def test_axis_name_reaches_the_norm():
    grads = jnp.ones((4, 1))
    clip = from_lightning(1.0, axis_name="i")
    update = jax.jit(jax.vmap(lambda g: clip.update(g, clip.init(g))[0], axis_name="i"))
    np.testing.assert_allclose(update(grads), 0.5, rtol=2e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_torch(-1.0), "`max_norm` must be non-negative, got -1.0"),
        (lambda: from_torch("1"), "`max_norm` must be a non-negative number"),
        (lambda: from_torch(1.0, norm_type=0), r'`norm_type` must be .* `inf` or `"inf"`, got 0'),
        (lambda: from_torch(1.0, norm_type=True), "`norm_type` must be a number of at least 1"),
        (lambda: from_torch(1.0, norm_type="two"), "`norm_type` must be .* got 'two'"),
        (lambda: from_torch(1.0, eps=-1.0), "`eps` must be a finite number of at least 0, got -1"),
        (
            lambda: from_keras(clipnorm=1.0, clipvalue=0.5),
            "Only one of .* got clipnorm=1.0, clipvalue=0.5",
        ),
        (lambda: from_keras(clipnorm=0.0, global_clipnorm=1.0), "Only one of"),
        (lambda: from_keras(clipnorm=True), "`clipnorm` must be .* got True"),
        (lambda: from_keras(global_clipnorm=math.nan), "`global_clipnorm` must be .* got nan"),
        (
            lambda: from_lightning(1.0, gradient_clip_algorithm="norms"),
            '`gradient_clip_algorithm` must be "norm" or',
        ),
        (lambda: from_lightning("1"), "`gradient_clip_val` must be .* got '1'"),
        (lambda: from_transformers(False), "`max_grad_norm` must be .* got False"),
    ],
)
def test_arguments_that_may_not_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


BAD = {"w": jnp.array([3.0, jnp.nan])}
RAISING = from_torch(1.0, error_if_nonfinite=True)


def update(grads):
    return RAISING.update(grads, RAISING.init(grads))


def test_an_eager_update_raises_before_it_returns():
    with pytest.raises(RuntimeError, match=r"must be finite, got nan \(`error_if_nonfinite=True`"):
        update(BAD)
    updates, _ = update(GRADS)
    assert jnp.linalg.norm(updates["w"]) == pytest.approx(5 / math.sqrt(25.25), rel=1e-5)


def test_a_compiled_update_raises_when_it_is_waited_for():
    step = jax.jit(update)
    good = {"w": jnp.array([3.0, 4.0])}
    for _ in range(2):
        np.testing.assert_allclose(step(good)[0]["w"], [0.6, 0.8], rtol=1e-6)
        with pytest.raises(RuntimeError, match="must be finite, got nan"):
            jax.block_until_ready(step(BAD))
    step(good)  # or jax raises at exit what it raised last


def test_a_scan_of_mapped_updates_raises():
    @jax.jit
    def run(grads):
        _, updates = jax.lax.scan(lambda _, g: (None, jax.vmap(update)(g)[0]), None, grads)
        return updates

    grads = {"w": jnp.arange(12.0).reshape(2, 3, 2)}
    assert jnp.all(jnp.isfinite(run(grads)["w"]))
    with pytest.raises(RuntimeError, match="must be finite, got inf"):
        jax.block_until_ready(run({"w": grads["w"].at[1, 2, 0].set(jnp.inf)}))
    run(grads)


def test_on_many_devices_all_of_them_raise(mesh):
    sharded = NamedSharding(mesh, P("data"))
    good = jax.device_put(jnp.full(8, 2.0), sharded)
    bad = jax.device_put(good.at[3].set(jnp.inf), sharded)

    def mean_of(grads):  # a collective behind the clip, in which none may be left waiting
        updates, _ = update(grads)
        return updates, jax.lax.pmean(jnp.sum(updates), "data")

    in_region = jax.shard_map(mean_of, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))
    for step in (jax.jit(lambda grads: (update(grads)[0], jnp.sum(grads))), jax.jit(in_region)):
        np.testing.assert_allclose(step(good)[0], 8**-0.5, rtol=1e-6)
        with pytest.raises(RuntimeError, match="must be finite, got inf"):
            jax.block_until_ready(step(bad))
        step(good)


def test_without_the_request_there_is_no_callback():
    for clip, calls in ((from_torch(1.0), False), (RAISING, True)):
        program = str(jax.make_jaxpr(clip.update)(GRADS, clip.init(GRADS)))
        assert ("callback" in program) == calls
        # In a branch, so that a step that goes well does not wait for the host.
        assert not calls or program.index("cond[") < program.index("callback")


def test_a_derivative_through_it_is_that_of_the_clip():
    def loss(grads):
        return jnp.sum(update(grads)[0]["w"])

    grads = {"w": jnp.array([0.3, 0.4])}
    assert jax.jit(jax.grad(loss))(grads)["w"].tolist() == [1, 1]


def numbers(state):
    return [np.asarray(x).tolist() for x in jax.tree.leaves(state)]


def assert_alike(clip, other, params=GRADS):
    """Two clips do the same for three steps, the last of them a spike."""
    state, other_state = clip.init(params), other.init(params)
    for scale in (1.0, 2.0, 50.0):
        grads = jax.tree.map(lambda x, scale=scale: scale * x, GRADS)
        updates, state = clip.update(grads, state, params)
        expected, other_state = other.update(grads, other_state, params)
        assert numbers(updates) == numbers(expected)
    assert numbers(state) == numbers(other_state)


ADAPTIVE = {
    "autoclip": {"window": 2},
    "clip_to_limit": {"limit": {"method": "percentile", "window": 2}},
    "zclip": {"warmup_steps": 2, "max_norm": None},
}


def test_adaptive_strategies_may_hold_each_array_by_its_own_past():
    for name, arguments in ADAPTIVE.items():
        clip = from_config({"method": name, "measure": "leaf_norms", **arguments})
        assert jax.tree.structure(clip.init(GRADS).grad_norm) == jax.tree.structure(GRADS)
        whole = from_config({"method": name, **arguments})
        assert whole.init(GRADS).grad_norm.shape == ()


def test_a_spike_in_one_array_does_not_touch_another():
    arguments = ADAPTIVE["zclip"]
    clip = gradclip_jax.zclip(measure=leaf_norms, **arguments)
    alone = gradclip_jax.zclip(**arguments)
    state, of_array = clip.init(GRADS), {key: alone.init(x) for key, x in GRADS.items()}
    updates = dict(GRADS)
    for scales in ({"w": 1.0, "b": 3.0}, {"w": 2.0, "b": 1.0}, {"w": 1.0, "b": 90.0}):
        grads = {key: scales[key] * x for key, x in GRADS.items()}
        updates, state = clip.update(grads, state)
        for key, x in grads.items():
            expected, of_array[key] = alone.update(x, of_array[key])
            assert updates[key].tolist() == expected.tolist()
    assert updates["w"].tolist() == [3, 4]
    assert updates["b"] < 3  # of 45, in an update whose norm of all is what it was before


CONFIGS = [
    ({"method": "clip_by_norm", "threshold": 1.0}, lambda g: g.clip_by_norm(1.0)),
    ({"method": "clip_by_norm", "max_norm": 1}, lambda g: g.clip_by_norm(1)),
    ({"method": "clip_by_norm", "threshold": None}, lambda g: g.clip_by_norm(None)),
    ({"method": "clip_by_norm", "threshold": "inf"}, lambda g: g.clip_by_norm(math.inf)),
    ({"method": "clip_by_norm", "threshold": "1e-3"}, lambda g: g.clip_by_norm(1e-3)),
    (
        {"method": "clip_by_global_norm", "threshold": 2.0, "order": "inf", "response": "smooth"},
        lambda g: g.clip_by_global_norm(2.0, order=math.inf, response=g.responses.smooth),
    ),
    (
        {"method": "zclip", "z_max": 2.5, "warmup_steps": 2, "measure": "leaf_norms"},
        lambda g: g.zclip(2.5, warmup_steps=2, measure=g.leaf_norms),
    ),
    (
        {
            "method": "clip_to_limit",
            "limit": {
                "method": "minimum",
                "a": {"method": "percentile", "percentile": 90, "window": 2},
                "b": 1.0,
            },
            "measure": "leaf_norms",
            "response": "smooth",
        },
        lambda g: g.clip_to_limit(
            g.limits.minimum(g.limits.percentile(90, window=2), 1.0),
            measure=g.leaf_norms,
            response=g.responses.smooth,
        ),
    ),
    (
        {"method": "clip_to_limit", "threshold": {"method": "constant", "threshold": 2.0}},
        lambda g: g.clip_to_limit(g.limits.constant(2.0)),
    ),
    (
        {
            "method": "clip_to_limit",
            "limit": 1.0,
            "measure": {"method": "group_norms", "labels": {"w": "one", "b": "two"}},
            "response": {"method": "shrink", "eps": 0.5},
        },
        lambda g: g.clip_to_limit(
            1.0,
            measure=functools.partial(g.group_norms, labels={"w": "one", "b": "two"}),
            response=functools.partial(g.responses.shrink, eps=0.5),
        ),
    ),
    (
        {"method": "clip_to_limit", "limit": gradclip_jax.limits.median(window=2),
         "measure": leaf_norms},
        lambda g: g.clip_to_limit(g.limits.median(window=2), measure=g.leaf_norms),
    ),
    (
        {"method": "clip_by_unit_norm", "threshold": 1.0, "axes": [0]},
        lambda g: g.clip_by_unit_norm(1.0, axes=(0,)),
    ),
    (
        {
            "method": "clip_by_group_norm",
            "max_norm": {"one": 1.0, "two": {"schedule": "linear", "init_value": 1.0,
                                             "end_value": 0.1, "transition_steps": 2}},
            "labels": {"w": "one", "b": "two"},
        },
        lambda g: g.clip_by_group_norm(
            {"one": 1.0, "two": optax.linear_schedule(1.0, 0.1, 2)}, labels={"w": "one", "b": "two"}
        ),
    ),
    (
        {"method": "clip_to_limit", "limit": {"method": "ema", "k": 0.0, "ratio": 2.0,
                                              "target": [1.1, 0.9], "warmup_steps": 1}},
        lambda g: g.clip_to_limit(
            g.limits.ema(0.0, ratio=2.0, target=(1.1, 0.9), warmup_steps=1)
        ),
    ),
    (
        {"method": "clip_by_dual_norm", "threshold": 1.0,
         "ball": {"w": "sign", "b": "euclidean"}},
        lambda g: g.clip_by_dual_norm(1.0, ball={"w": g.balls.sign, "b": g.balls.euclidean}),
    ),
    ({"method": "zero_nonfinite"}, lambda g: g.zero_nonfinite()),
    (
        {"method": "adaptive_grad_clip", "threshold": 0.1, "on_nonfinite": "propagate"},
        lambda g: g.adaptive_grad_clip(0.1, on_nonfinite="propagate"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "make"),
    CONFIGS,
    ids=[f"{i}-{config['method']}" for i, (config, _) in enumerate(CONFIGS)],
)
def test_a_config_is_the_call_that_it_describes(config, make):
    before = repr(config)
    assert_alike(from_config(config), make(gradclip_jax))
    assert repr(config) == before


def test_steps_of_a_schedule_may_be_strings_as_in_json(standard_promotion):
    schedule = {"schedule": "piecewise_constant_schedule", "init_value": 4.0}
    schedule["boundaries_and_scales"] = {"1": 0.5, "2": 0.25}
    clip = from_config({"method": "clip_by_norm", "threshold": schedule})
    state = clip.init(GRADS)
    for limit in (4.0, 2.0, 0.5):
        _, state = clip.update(GRADS, state)
        assert state.clip_limit["w"] == limit


def test_every_strategy_and_limit_has_its_name_in_a_config():
    for name, make in STRATEGIES.items():
        clip = from_config({"method": name, **required_arguments(make)})
        assert jax.tree.leaves(clip.init(GRADS)), name
    for name in public_limits():
        needed = {"minimum": {"a": 1.0, "b": 2.0}, "constant": {"limit": 1.0}}
        limit = {"method": name, **needed.get(name.replace("maximum", "minimum"), {})}
        clip = from_config({"method": "clip_to_limit", "limit": limit})
        assert jax.tree.leaves(clip.init(GRADS)), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"method": "clip_by_nrom"},
            "`config`: unknown strategy 'clip_by_nrom'; the nearest are `clip_by_norm`",
        ),
        ({"method": "qqq"}, "there are .*`adagc`, .*`zclip`"),
        ({"method": 3}, "unknown strategy 3"),
        ({"method": "zclip", "zmax": 2.0}, "unknown argument of `zclip` 'zmax'; .* `z_max`"),
        (
            {"method": "clip_by_norm", "threshold": 1.0, "max_norm": 2.0},
            "must have `threshold` or `max_norm`, not both: for `clip_by_norm`",
        ),
        (
            {"method": "clip_by_norm", "max_norm": "1.0"},
            "`config.max_norm` must be a number, got the string '1.0': leave out the quotes",
        ),
        ({"method": "clip_by_norm"}, "`config` must have a `max_norm`, which `clip_by_norm` needs"),
        ({"threshold": 1.0, "metod": "zclip"}, "a key `method`, has `threshold`, `metod`"),
        ({}, "must have a key `method`, has none"),
        ({"method": "zclip", "measure": "leaf_norm"}, "`config.measure`: .* `leaf_norms`"),
        ({"method": "clip_by_norm", "threshold": 1, "measure": "leaf_norms"}, "unknown argument"),
        (
            {"method": "clip_to_limit", "limit": {"method": "minimum", "a": {"method": "percentil"},
                                                  "b": 1.0}},
            "config.limit.a`: unknown limit 'percentil'; the nearest are `percentile`",
        ),
        ({"method": "clip_to_limit", "limit": 1, "response": "smoth"}, "response.*`smooth`"),
        (
            {"method": "clip_to_limit", "limit": 1, "measure": {"method": "unit_norms", "axis": 1}},
            "unknown argument of `unit_norms` 'axis'; the nearest are `axes`",
        ),
        (
            {"method": "clip_to_limit", "limit": 1, "measure": {"method": "group_norms"}},
            "`config.measure` must have a `labels`",
        ),
        ({"method": "clip_to_limit", "limit": 1, "measure": 2}, "must be a dict with a `method`"),
        ({"method": "clip_by_dual_norm", "threshold": 1, "ball": "sgn"}, "unknown ball.*`sign`"),
        (
            {"method": "clip_by_norm", "threshold": {"schedule": "linaer"}},
            "`config.threshold`|`config.max_norm`: unknown schedule 'linaer'; .*`linear`",
        ),
        (
            {"method": "clip_by_norm", "threshold": {"schedule": "linear", "init": 1.0}},
            "unknown argument of `linear_schedule` 'init'; the nearest are `init_value`",
        ),
        ({"method": "clip_by_norm", "threshold": -1.0}, "`max_norm` must be non-negative, got -1"),
        ({"method": "clip_by_norm", "threshold": "one"}, "`max_norm` must be .* got 'one'"),
        ({"method": "skip_nonfinite"}, r"`skip_nonfinite` wraps an optimizer .* `from_config\(…"),
        ({"method": "clip21"}, r"wraps a clip and is not one itself: `clip21\(from_config\("),
        ({"method": "percentile"}, 'is a limit: {"method": "clip_to_limit", "limit": {"method": '),
        (["clip_by_norm"], "`config` must be a dict, or the path of a"),
        ("clip_by_norm", "`config` must be a dict, or the path of a `.json`"),
    ],
)  # fmt: skip
def test_a_config_that_may_not_be_names_what_is_near(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config)


def test_a_config_of_a_guard_wraps_the_optimizer():
    deviation = {"method": "deviation", "k": 3.0, "window": 8, "min_count": 4}
    config = {"method": "skip_spikes", "grad_norm": deviation, "loss": 2, "max_consecutive": 3}
    optimizer = from_config(config, optax.sgd(1.0))
    state = optimizer.init(GRADS)
    assert state.limit_state.shape == (8,)
    for loss, skips in [(1.0, 0), (3.0, 1)]:
        _, state = optimizer.update(GRADS, state, loss=loss)
        assert int(state.skip_count) == skips
    plain = from_config({"method": "skip_nonfinite"}, optax.sgd(1.0))
    assert float(plain.init(GRADS).skip_limit) == 0
    with pytest.raises(ValueError, match="`config`: unknown argument of `skip_spikes` 'grad_nrom'"):
        from_config({"method": "skip_spikes", "grad_nrom": 1.0}, optax.sgd(1.0))
    with pytest.raises(ValueError, match="must have a limit to watch, `grad_norm` or `loss`"):
        from_config({"method": "skip_spikes"}, optax.sgd(1.0))
    with pytest.raises(
        ValueError, match=r"`optimizer` must be None unless a guard .* 'clip_by_norm"
    ):
        from_config({"method": "clip_by_norm", "threshold": 1.0}, optax.sgd(1.0))


def test_files(tmp_path):
    config = {"method": "clip_by_norm", "threshold": 1.0}
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(config))
    assert_alike(from_config(path), gradclip_jax.clip_by_norm(1.0))
    assert_alike(from_config(str(path)), gradclip_jax.clip_by_norm(1.0))
    with pytest.raises(FileNotFoundError, match=r"clap.json'; the nearest there are `clip.json`"):
        from_config(tmp_path / "clap.json")
    with pytest.raises(FileNotFoundError, match="must be a file that exists"):
        from_config(tmp_path / "nowhere" / "clip.json")
    path.write_text('{"method": "clip_by_norm", ')
    with pytest.raises(
        ValueError, match=r"clip.json' is not valid JSON: Expecting .* line 1 column 28"
    ):
        from_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"clip.json' is not valid JSON: 'utf-8' codec"):
        from_config(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"`config` must be a dict with a `method`, got \[1\]"):
        from_config(path)


def test_yaml_files(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "clip.yaml"
    path.write_text("method: clip_to_limit\nlimit: {method: ema, k: 2}\nmeasure: leaf_norms")
    expected = gradclip_jax.clip_to_limit(gradclip_jax.limits.ema(2), measure=leaf_norms)
    assert_alike(from_config(path), expected)
    path.write_text("method: clip_by_norm\nthreshold: 1e-3")  # a string in YAML 1.1
    assert_alike(from_config(path), gradclip_jax.clip_by_norm(1e-3))
    path.write_text("method: [")
    with pytest.raises(ValueError, match=r"clip.yaml' is not valid YAML: "):
        from_config(path)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_config_that_is_nested_without_end_is_named(tmp_path, suffix):
    """Of 100,000 levels Python's own parsers raise RecursionError."""
    if suffix == ".yaml":
        pytest.importorskip("yaml")
    path = tmp_path / f"clip{suffix}"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(
        ValueError, match=rf"`config`: .*clip{suffix}' must be nested at most 100 levels deep"
    ):
        from_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "&a\nmethod: clip_by_norm\nmax_norm: *a",
        "method: clip_to_limit\nlimit: &a {method: minimum, a: 1.0, b: *a}",
        "method: clip_to_limit\nlimit: &a [1, *a]",
        "method: clip_by_norm\nmax_norm: &a {schedule: linear, init_value: *a}",
        "&a\nmethod: clip_by_norm\n? [*a]\n: 1",
    ],
)
def test_a_yaml_alias_of_what_holds_it_is_named(tmp_path, text):
    pytest.importorskip("yaml")
    path = tmp_path / "clip.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"`config`: .*clip.yaml' (must|is not valid YAML)"):
        from_config(path)


def test_a_dict_that_holds_itself_is_no_config():
    config = {"method": "clip_to_limit"}
    config["limit"] = config
    with pytest.raises(ValueError, match=r"`config` must be nested at most 100 levels deep"):
        from_config(config)


def test_a_yaml_alias_that_is_used_twice_is_fine(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "clip.yaml"
    path.write_text(
        "method: clip_to_limit\nlimit:\n  method: minimum\n"
        "  a: &a {method: median, window: 2}\n  b: *a\n"
    )
    limit = gradclip_jax.limits.minimum(
        gradclip_jax.limits.median(window=2), gradclip_jax.limits.median(window=2)
    )
    assert_alike(from_config(path), gradclip_jax.clip_to_limit(limit))


def test_yaml_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "clip.yml"
    path.write_text("method: zclip")
    with pytest.raises(ImportError, match=r"PyYAML must be installed \(`pip install pyyaml`\)"):
        from_config(path)


def test_the_default_of_transformers_is_a_norm_of_1():
    clip = gradclip_jax.from_transformers()
    grads = jnp.array([3.0, 4.0])
    _, state = clip.update(grads, clip.init(grads))
    assert float(state.clip_limit) == 1.0


@pytest.mark.parametrize("name", ["euclidean", "newton_schulz", "sign", "spectral"])
def test_a_config_gets_the_ball_that_it_names(name):
    grads = jnp.array([[3.0, 1.0], [0.0, 2.0]])  # another direction in each ball
    ball = getattr(gradclip_jax.balls, name)
    config = {"method": "clip_by_dual_norm", "threshold": 1.0, "ball": name}
    clips = gradclip_jax.from_config(config), gradclip_jax.clip_by_dual_norm(1.0, ball=ball)
    first, second = (clip.update(grads, clip.init(grads))[0] for clip in clips)
    np.testing.assert_array_equal(first, second)
