"""QK-Clip against algorithm 1 of the Kimi K2 report in NumPy, in every layout of weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, shard_map
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from registry import at
from test_devices import collectives

import gradclip_jax
from gradclip_jax import Heads, qk_clip

INPUTS, HEADS, FEATURES, KEYS = 6, 4, 3, 2


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


# Algorithm 1


def by_role(path, weight):
    """(inputs, heads, features), and whether the name of the weight has query or key in it."""
    role = "query" if "query" in path else "key" if "key" in path else None
    return role and Heads(role, axis=weight.ndim - 2)


def report(weights, steps, logits, tau):
    """Algorithm 1, lines 9 to 14, head by head in float64: the weights after the step."""
    new = {name: np.float64(weights[name]) + np.float64(steps[name]) for name in weights}
    for h, s_max in enumerate(np.float64(logits)):
        if s_max > tau:
            gamma = tau / s_max
            new["query"][:, h] *= math.sqrt(gamma)
            new["key"][:, h] *= math.sqrt(gamma)
    return new


def test_golden_trace_of_algorithm_1():
    names = ("query", "key", "value")
    params = {
        layer: {name: normal(INPUTS, HEADS, FEATURES, seed=10 * layer + i)
                for i, name in enumerate(names)} for layer in (0, 1)
    }  # fmt: skip
    rng = np.random.default_rng(0)
    clip = qk_clip(heads=by_role)
    state, known, counts = clip.init(params), jax.tree.map(np.float64, params), []
    for step in range(12):
        steps = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
        logits = {layer: jnp.float32(rng.uniform(0, 250, HEADS)) for layer in params}
        updates, state = jax.jit(clip.update)(steps, state, params, max_logits=logits)
        params = optax.apply_updates(params, updates)
        known = {n: report(known[n], steps[n], logits[n], 100.0) for n in known}
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), params, known
        )
        largest = max(float(of.max()) for of in logits.values())
        counts.append(largest > 100)
        seen = gradclip_jax.metrics(state)
        assert "grad_norm" not in seen
        assert seen["clip_measure"] == np.float32(largest)
        assert float(seen["clip_factor"]) == pytest.approx(min(1, 100 / largest), rel=1e-6)
        assert seen["clip_limit"] == 100
        assert seen["clip_count"] == sum(counts)
        assert seen["step_count"] == step + 1
    assert 0 < sum(counts) <= 12


def test_numbers_by_hand():
    """Logit 100, threshold 25: both sides are halved, of a weight of 3 and a step of 1 to 2."""
    params = {"query": jnp.full((1, 2, 1), 3.0), "key": jnp.full((1, 2, 1), 4.0)}
    steps = jax.tree.map(jnp.ones_like, params)
    clip = qk_clip(25.0, heads=by_role)
    updates, _ = clip.update(steps, clip.init(params), params, max_logits=jnp.array([100.0, 25.0]))
    np.testing.assert_array_equal(updates["query"].ravel(), [-1.0, 1.0])
    np.testing.assert_array_equal(updates["key"].ravel(), [-1.5, 1.0])


@pytest.mark.parametrize(
    ("alpha", "query", "key"), [(0.0, 4, 1), (1.0, 1, 4), (0.25, 8**0.5, 2**0.5)]
)
def test_alpha_is_the_share_of_the_query(alpha, query, key):
    params = {"query": jnp.full((1, 1, 1), 4.0), "key": jnp.full((1, 1, 1), 4.0)}
    clip = qk_clip(25.0, heads=by_role, alpha=alpha)
    none = jax.tree.map(jnp.zeros_like, params)
    updates, _ = clip.update(none, clip.init(params), params, max_logits=jnp.array([100.0]))
    new = optax.apply_updates(params, updates)
    assert float(new["query"][0, 0, 0]) == pytest.approx(query)
    assert float(new["key"][0, 0, 0]) == pytest.approx(key)


def test_heads_at_or_below_the_threshold_keep_their_step_bit_for_bit():
    params = {"query": normal(6, 3, 4), "key": normal(6, 3, 4, seed=1), "other": normal(5, seed=2)}
    steps = jax.tree.map(lambda x: 1e-3 * jnp.cos(1e5 * x), params)
    clip = qk_clip(heads=by_role)
    logits = jnp.array([100.0, 100.00001, -1e30])
    updates, state = clip.update(steps, clip.init(params), params, max_logits=logits)
    for name in ("query", "key"):
        np.testing.assert_array_equal(updates[name][:, [0, 2]], steps[name][:, [0, 2]])
        assert not np.array_equal(updates[name][:, 1], steps[name][:, 1])
    assert updates["other"] is steps["other"]
    assert state.clip_count == 1


# Layouts: attention itself falls to the threshold, head by head


def attend(query, key, group=1):
    """The largest logit of each head from (time, heads, features)."""
    key = jnp.repeat(key, group, axis=1)
    return jnp.max(jnp.einsum("qhd,khd->hqk", query, key), axis=(1, 2))


X = normal(7, INPUTS, seed=100)
SHAPE = (INPUTS, HEADS, FEATURES)


def separate(params):
    return attend(*(jnp.einsum("te,ehd->thd", X, params[name]) for name in ("query", "key")))


def dense(params):
    return attend(
        *((X @ params[name]["kernel"] + params[name]["bias"][None]).reshape(7, HEADS, FEATURES)
          for name in ("query", "key"))
    )  # fmt: skip


def fused(params):
    return attend(*jnp.moveaxis(jnp.einsum("te,echd->cthd", X, params["qkv"]), 0, 0)[:2])


def fused_flat(params):
    out = (X @ params["qkv"]).reshape(7, HEADS + 2 * KEYS, FEATURES)
    return attend(out[:, :HEADS], out[:, HEADS : HEADS + KEYS], HEADS // KEYS)


def grouped(params):
    query, key = (jnp.einsum("te,ehd->thd", X, params[name]) for name in ("query", "key"))
    return attend(query, key, HEADS // KEYS)


def latent(params):
    """Per head three features without a position, two rotary ones; the rotary key is shared."""
    query = jnp.einsum("te,ehd->thd", X, params["q_up"])
    key = jnp.einsum("te,ehd->thd", X, params["kv_up"])[..., :3]
    rotary = jnp.broadcast_to((X @ params["rotary_key"])[:, None], (7, HEADS, 2))
    return attend(query, jnp.concatenate([key, rotary], axis=-1))


def scanned(params):
    return jnp.stack([separate(at(i, params)) for i in range(2)])


def scanned_at_axis_1(params):
    return scanned(jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), params))


def dense_heads(path, weight):
    shape = (*weight.shape[:-1], HEADS, FEATURES)
    return Heads("query" if "query" in path else "key", axis=-2, shape=shape)


def fused_heads(path, weight):
    return Heads("query", axis=2, part={1: 0}), Heads("key", axis=-2, part={1: 1})


def fused_flat_heads(path, weight):
    shape = (INPUTS, -1, FEATURES)
    key = Heads("key", axis=1, part={1: slice(HEADS, HEADS + KEYS)}, shape=shape)
    return [Heads("query", axis=1, part={1: slice(HEADS)}, shape=shape), key]


def latent_heads(path, weight):
    if path == "q_up":
        first, rest = slice(0, 3), slice(3, None)
        return Heads("query", axis=1, part={2: first}), Heads(
            "query_rotary", axis=1, part={2: rest}
        )
    return Heads("key", axis=1, part={-1: slice(0, 3)}) if path == "kv_up" else None


def flat_latent_heads(path, weight):
    entries = latent_heads(path, weight)
    entries = entries if isinstance(entries, tuple) else (entries,)
    shape = (INPUTS, HEADS, -1)
    return [e and Heads(e.role, axis=e.axis, part=e.part, shape=shape) for e in entries]


def flat_latent(params):
    shaped = {name: w.reshape(INPUTS, HEADS, -1) for name, w in params.items() if "up" in name}
    return latent({**params, **shaped})


LATENT = {
    "q_up": normal(INPUTS, HEADS, 5), "kv_up": normal(INPUTS, HEADS, 7, seed=1),
    "rotary_key": normal(INPUTS, 2, seed=2),
}  # fmt: skip
PAIR = {"query": normal(*SHAPE), "key": normal(*SHAPE, seed=1)}
LAYOUTS = {
    "separate": (separate, by_role, PAIR),
    "dense": (dense, dense_heads, {
        name: {"kernel": normal(INPUTS, HEADS * FEATURES, seed=i),
               "bias": normal(HEADS * FEATURES, seed=i + 2)} for i, name in enumerate(PAIR)
    }),
    "fused": (fused, fused_heads, {"qkv": normal(INPUTS, 3, HEADS, FEATURES)}),
    "grouped": (grouped, by_role, PAIR | {"key": normal(INPUTS, KEYS, FEATURES, seed=1)}),
    "fused_flat": (
        fused_flat, fused_flat_heads, {"qkv": normal(INPUTS, (HEADS + 2 * KEYS) * FEATURES)}
    ),
    "latent": (latent, latent_heads, LATENT),
    "flat_latent": (flat_latent, flat_latent_heads, {
        name: w.reshape(INPUTS, -1) for name, w in LATENT.items()
    }),
    "scanned": (
        scanned, lambda path, weight: Heads(path, axis=(0, 2)),
        {name: normal(2, *SHAPE, seed=i) for i, name in enumerate(PAIR)},
    ),
    "scanned_at_axis_1": (
        scanned_at_axis_1, lambda path, weight: Heads(path, axis=(1, 2)),
        {name: normal(INPUTS, 2, HEADS, FEATURES, seed=i) for i, name in enumerate(PAIR)},
    ),
    "heads_before_layers": (
        lambda params: scanned(jax.tree.map(lambda x: jnp.transpose(x, (2, 0, 1, 3)), params)),
        lambda path, weight: Heads(path, axis=(2, 1)),
        {name: normal(INPUTS, HEADS, 2, FEATURES, seed=i) for i, name in enumerate(PAIR)},
    ),
}  # fmt: skip
of_groups = {"grouped", "fused_flat"}


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_of_each_head_fall_by_threshold_over_largest(layout, alpha):
    logits_of, heads, params = LAYOUTS[layout]
    steps = jax.tree.map(lambda x: 0.1 * jnp.cos(x), params)
    after = optax.apply_updates(params, steps)
    logits = logits_of(after)  # of the weights after the step, so that they fall to it exactly
    tau = float(jnp.median(logits))
    clip = qk_clip(tau, heads=heads, alpha=alpha)
    updates, state = clip.update(steps, clip.init(params), params, max_logits=logits)
    new = logits_of(optax.apply_updates(params, updates))
    largest = logits
    if layout in of_groups:
        largest = jnp.repeat(logits.reshape(KEYS, -1).max(axis=1), HEADS // KEYS)
    expected = logits * jnp.minimum(1, tau / largest)
    np.testing.assert_allclose(new, expected, rtol=2e-5)
    assert float(state.clip_measure) == float(logits.max())
    assert float(state.clip_factor) == pytest.approx(tau / float(logits.max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_neither_query_nor_key_keeps_its_step(layout):
    logits_of, heads, params = LAYOUTS[layout]
    steps = jax.tree.map(lambda x: 0.1 * jnp.cos(x), params)
    clip = qk_clip(1e-3, heads=heads)
    updates, _ = clip.update(
        steps, clip.init(params), params, max_logits=jnp.abs(logits_of(params)) + 1
    )
    kept = jax.tree.map(lambda a, b: np.asarray(a == b), updates, steps)
    parts = {
        "fused": lambda: kept["qkv"][:, 2],
        "fused_flat": lambda: kept["qkv"][:, (HEADS + KEYS) * FEATURES :],
        "latent": lambda: np.append(kept["kv_up"][..., 3:].ravel(), kept["rotary_key"].ravel()),
        "flat_latent": lambda: kept["rotary_key"],
    }
    untouched = parts.get(layout, lambda: np.ones(0, bool))()
    assert untouched.all()
    total = sum(int(of.sum()) for of in jax.tree.leaves(kept))
    assert layout == "flat_latent" or total == untouched.size


def test_a_query_whose_key_is_frozen_takes_the_whole_factor():
    def heads(path, weight):
        return Heads("query_rotary", axis=1) if path == "query" else None

    clip = qk_clip(25.0, heads=heads)
    none = jax.tree.map(jnp.zeros_like, PAIR)
    logits = separate(PAIR)
    updates, _ = clip.update(none, clip.init(PAIR), PAIR, max_logits=logits / logits * 100)
    np.testing.assert_allclose(separate(optax.apply_updates(PAIR, updates)), logits / 4, rtol=1e-5)
    assert updates["key"] is none["key"]


# Where logits stand


def test_logits_belong_to_the_weights_below_their_place():
    params = {
        "blocks": [{"attention": PAIR, "cross": PAIR}, {"attention": PAIR}],
        "head": PAIR["key"],
    }
    none = jax.tree.map(jnp.zeros_like, params)

    def heads(path, weight):
        return None if path == "head" else Heads(path.split("/")[-1], axis=1)

    clip = qk_clip(heads=heads)
    hot, cold = jnp.full(HEADS, 400.0), jnp.zeros(HEADS)
    logits = {"blocks": [{"attention": cold, "cross": hot}, hot]}
    updates, _ = clip.update(none, clip.init(params), params, max_logits=logits)
    moved = jax.tree.map(lambda x: bool(jnp.any(x != 0)), updates)
    no, yes = {"query": False, "key": False}, {"query": True, "key": True}
    assert moved == {"blocks": [{"attention": no, "cross": yes}, {"attention": yes}], "head": False}


class Attention(nnx.Module):
    """One layer that sows its largest logits."""

    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(INPUTS, (HEADS, FEATURES), use_bias=True, rngs=rngs)
        self.key = nnx.LinearGeneral(INPUTS, (HEADS, FEATURES), use_bias=True, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "max_logits", attend(self.query(x), self.key(x)))
        return x


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(Attention(rngs) for _ in range(2))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_a_module_of_flax_sows_is_found_at_its_weights(standard_promotion):
    network = Network(nnx.Rngs(0))
    for layer in network.layers:
        layer.query.bias[...] = normal(HEADS, FEATURES, seed=5)
    # Sown twice: the larger counts.
    _, logits = nnx.capture(lambda n: (n(X), n(2 * X)), nnx.Intermediate)(network)
    params = nnx.state(network, nnx.Param)
    clip = qk_clip(1.0, heads=by_role)
    none = jax.tree.map(jnp.zeros_like, params)
    updates, _ = clip.update(none, clip.init(params), params, max_logits=logits)
    nnx.update(network, optax.apply_updates(params, updates))
    _, after = nnx.capture(lambda n: n(2 * X), nnx.Intermediate)(network)
    for layer in range(2):
        (first, second), (third,) = (
            of["layers"][layer]["max_logits"].get_value() for of in (logits, after)
        )
        expected = jnp.minimum(jnp.maximum(first, second), 1.0)
        above = jnp.maximum(first, second) > 1
        assert above.any()
        np.testing.assert_allclose(third[above], expected[above], rtol=1e-5)


# What is not finite, and extremes


def first_update(logits, params=PAIR, threshold=100.0, **options):
    clip = qk_clip(threshold, heads=by_role, **options)
    none = jax.tree.map(jnp.zeros_like, params)
    return clip.update(none, clip.init(params), params, max_logits=jnp.asarray(logits))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_head_whose_logit_is_not_finite_is_left_alone_and_counted(bad):
    updates, state = first_update([bad, 400.0, 9.0, 3.0])
    for name, weight in PAIR.items():
        assert not updates[name][:, [0, 2, 3]].any()
        np.testing.assert_allclose(updates[name][:, 1], -weight[:, 1] / 2, rtol=1e-6)
    assert state.nonfinite_count == 1
    assert state.clip_count == 1
    assert state.clip_measure == math.inf
    assert float(state.clip_factor) == 0.25


def test_a_head_that_saw_nothing_is_not_an_error():
    """A running maximum starts at minus infinity."""
    updates, state = first_update([-math.inf] * HEADS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert state.nonfinite_count == 0
    assert state.clip_count == 0
    assert state.clip_factor == 1


def test_negative_logits_do_not_turn_a_weight_round():
    """min(1, threshold / S) of a negative S would: its root is NaN."""
    updates, _ = first_update([-50.0, 400.0, -1.0, -400.0])
    assert jnp.isfinite(updates["query"]).all()
    assert not updates["query"][:, [0, 2, 3]].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("largest", [1e4, 1e12, 1e36])
def test_weights_never_become_zero_and_come_under_the_threshold_in_some_steps(dtype, largest):
    """Of an update that is added a factor below the rounding of the weights would make zeros."""
    scale = (largest**0.5 if largest <= 1e4 or dtype != jnp.float16 else 100.0) / 2
    params = jax.tree.map(lambda x: (x * scale).astype(dtype), PAIR)
    clip = qk_clip(heads=by_role)
    none, state = jax.tree.map(jnp.zeros_like, params), clip.init(params)

    def wide(params):
        # What overflows is far above the threshold.
        logits = separate(jax.tree.map(lambda x: x.astype(jnp.float32) * 2**-50, params))
        return jnp.minimum(logits * 2.0**50, 1e37) * 2.0**50

    for _ in range(20):
        updates, state = clip.update(none, state, params, max_logits=wide(params))
        assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, none)
        params = optax.apply_updates(params, updates)
    # The rounding of a bfloat16 sum leaves a few percent.
    assert jnp.max(wide(params)) < 100 * (1 + 8 * float(jnp.finfo(dtype).eps))
    assert all(bool((leaf != 0).mean() > 0.99) for leaf in jax.tree.leaves(params))


def test_bfloat16_weights_and_steps_are_summed_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PAIR)
    steps = jax.tree.map(lambda x: (0.01 * jnp.sin(3 * x)).astype(jnp.bfloat16), params)
    clip = qk_clip(heads=by_role)
    updates, _ = clip.update(steps, clip.init(params), params, max_logits=jnp.full(HEADS, 121.0))
    for name, update in updates.items():
        w, u = (np.float64(x[name].astype(jnp.float32)) for x in (params, steps))
        exact = math.sqrt(100 / 121) * (w + u) - w
        np.testing.assert_allclose(
            np.float64(update.astype(jnp.float32)), exact, rtol=2**-8, atol=1e-4
        )


def test_under_x64_factors_are_float64(x64):
    params = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), PAIR)
    logits = jnp.full(HEADS, 300.0)
    updates, state = first_update(logits, params)
    assert state.clip_measure.dtype == jnp.float64
    for name, update in updates.items():
        np.testing.assert_allclose(update, (math.sqrt(1 / 3) - 1) * params[name], rtol=1e-14)


def test_logits_and_weights_of_other_dtypes():
    steps = {"query": jnp.zeros(SHAPE, jnp.float32), "key": jnp.zeros(SHAPE, jnp.float16)}
    params = {"query": PAIR["query"].astype(jnp.float16), "key": PAIR["key"].astype(jnp.complex64)}
    steps["key"] = jnp.zeros(SHAPE, jnp.complex64)
    clip = qk_clip(heads=by_role)
    logits = jnp.full(HEADS, 400, jnp.bfloat16)
    updates, _ = clip.update(steps, clip.init(params), params, max_logits=logits)
    for name, update in updates.items():
        assert update.dtype == steps[name].dtype
        np.testing.assert_allclose(update, -0.5 * params[name].astype(update.dtype), rtol=1e-3)


# From a config


def test_a_config_names_heads_by_patterns_of_paths():
    """What JSON can say: keys are strings, slices and shapes are lists."""
    config = {
        "method": "qk_clip",
        "threshold": 25.0,
        "heads": {
            "*up": {
                "role": "query",
                "axis": 1,
                "part": {"2": [0, 3]},
                "shape": [INPUTS, HEADS, -1],
            },
            "q_up": [{"role": "query_rotary", "axis": 1, "part": {"2": [3, None]}}],
            "kv_up": {"role": "key", "axis": [1], "part": {"2": [0, 3]}},
        },
    }
    config["heads"]["q_up"].append(config["heads"].pop("*up"))
    logits, none = jnp.full(HEADS, 100.0), jax.tree.map(jnp.zeros_like, LATENT)
    clips = gradclip_jax.from_config(config), qk_clip(25.0, heads=latent_heads)
    first, second = (
        clip.update(none, clip.init(LATENT), LATENT, max_logits=logits)[0] for clip in clips
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first["kv_up"].any()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"*q": {"rule": "query"}}, r"`config.heads.\*q`: unknown argument of `Heads` 'rule'"),
        ({"*q": {"role": "query"}}, r"`config.heads.\*q` must have a `axis`, which `Heads` needs"),
        ({"*q": "query"}, r"`config.heads.\*q` must be a dict with `role` and `axis`, got 'query'"),
        ({"*q": {"role": "q", "axis": 1}}, '`role` must be "query", "key" or "query_rotary"'),
        (3, "`heads` must be a function of path and weight"),
    ],
)
def test_a_config_with_heads_that_may_not_be(heads, message):
    with pytest.raises(ValueError, match=message):
        gradclip_jax.from_config({"method": "qk_clip", "heads": heads})


# In a program


def test_the_threshold_may_be_a_schedule_or_infinite():
    clip = qk_clip(lambda count: 100 * (count + 1), heads=by_role)
    none, state = jax.tree.map(jnp.zeros_like, PAIR), clip.init(PAIR)
    for factor in (0.25, 0.5, 0.75, 1.0):
        _, state = clip.update(none, state, PAIR, max_logits=jnp.full(HEADS, 400.0))
        assert float(state.clip_factor) == factor
    assert state.clip_count == 3
    updates, state = first_update([1e30] * HEADS, threshold=None)
    assert not updates["query"].any()
    assert state.clip_measure == np.float32(1e30)


def test_hyperparameters_may_be_injected(standard_promotion):
    clip = optax.inject_hyperparams(qk_clip, static_args="heads")(threshold=50.0, heads=by_role)
    none, state = jax.tree.map(jnp.zeros_like, PAIR), clip.init(PAIR)
    assert state.hyperparams.keys() == {"threshold", "alpha"}
    state.hyperparams["threshold"] = jnp.float32(100.0)
    _, state = clip.update(none, state, PAIR, max_logits=jnp.full(HEADS, 400.0))
    assert gradclip_jax.metrics(state)["clip_factor"] == 0.25


def test_behind_an_optimizer_in_a_chain_under_scan(standard_promotion):
    chain = optax.chain(optax.contrib.muon(0.1), qk_clip(heads=by_role))
    params = jax.tree.map(lambda x: 20 * x, PAIR)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            logits, grads = separate(params), jax.tree.map(lambda x: -x, params)
            updates, state = chain.update(grads, state, params, max_logits=logits)
            return (optax.apply_updates(params, updates), state), jnp.max(logits)

        return jax.lax.scan(step, (params, chain.init(params)), length=20)

    (_, state), largest = train(params)
    assert largest[0] > 1000
    assert (largest[3:] < 150).all()
    assert gradclip_jax.metrics(state)["clip_count"] > 3


def test_leaves_that_are_none_or_masked_are_passed_by():
    params = {**PAIR, "frozen": None, "count": jnp.arange(3)}
    steps = {**jax.tree.map(jnp.zeros_like, PAIR), "frozen": None, "count": jnp.arange(3)}
    hot = jnp.full(HEADS, 400.0)
    clip = qk_clip(heads=by_role)
    updates, _ = clip.update(steps, clip.init(params), params, max_logits=hot)
    assert updates["frozen"] is None
    np.testing.assert_array_equal(updates["count"], jnp.arange(3))
    masked = optax.masked(clip, {"query": True, "key": True, "frozen": False, "count": False})
    again, _ = masked.update(steps, masked.init(params), params, max_logits=hot)
    np.testing.assert_array_equal(again["query"], updates["query"])


def test_optax_maps_over_its_state():
    """`optax.tree.map_params` calls `init` with placeholders."""
    chain = optax.chain(optax.adam(1.0), qk_clip(heads=by_role))
    state = chain.init(PAIR)
    mapped = optax.tree.map_params(chain, lambda x: 0 * x + 7, state)
    assert float(mapped[0][0].mu["query"][0, 0, 0]) == 7
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_eager_is_compiled_and_vmap_is_each(standard_promotion):
    clip = qk_clip(heads=by_role)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PAIR)
    none = jax.tree.map(jnp.zeros_like, many)
    logits = jnp.stack([jnp.full(HEADS, 400.0), jnp.linspace(50.0, 200.0, HEADS)])

    def one(steps, params, logits):
        return clip.update(steps, clip.init(params), params, max_logits=logits)

    both = jax.vmap(one)(none, many, logits)
    for i in range(2):
        alone = one(*at(i, (none, many)), logits[i])
        jax.tree.map(np.testing.assert_array_equal, at(i, both), alone)


def test_a_gradient_through_the_clip_is_finite():
    def loss(scale, logits):
        steps = jax.tree.map(lambda x: scale * x, PAIR)
        updates, _ = qk_clip(heads=by_role).update(
            steps, qk_clip(heads=by_role).init(PAIR), PAIR, max_logits=logits
        )
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(updates))

    grads = jax.grad(loss, argnums=(0, 1))(0.1, jnp.array([400.0, 100.0, 0.0, math.nan]))
    assert all(np.isfinite(np.asarray(x)).all() for x in grads)


# Many devices


TREE = {
    "a": {"query": normal(8, HEADS, FEATURES), "key": normal(8, HEADS, FEATURES, seed=1)},
    "b": {"query": normal(8, HEADS, FEATURES, seed=2), "key": normal(8, KEYS, FEATURES, seed=3)},
    "c": normal(8, seed=4),
}
STEPS = jax.tree.map(lambda x: 0.1 * jnp.cos(x), TREE)
# Of four devices along `data`; each head has its largest elsewhere.
LOGITS = {name: normal(4, HEADS, seed=i, scale=150.0) for i, name in enumerate("ab")}
CLIP = qk_clip(heads=by_role)
EXPECTED, STATE = CLIP.update(
    STEPS, CLIP.init(TREE), TREE, max_logits=jax.tree.map(lambda x: x.max(axis=0), LOGITS)
)
SPLIT = {name: {part: P("data", "model") for part in PAIR} for name in "ab"} | {"c": P()}
WHOLE = jax.tree.map(lambda _: P(), TREE)


def check(updates, state):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), updates, EXPECTED
    )
    for name in ("clip_measure", "clip_factor", "clip_count", "nonfinite_count"):
        np.testing.assert_allclose(getattr(state, name), getattr(STATE, name), rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split_logits", [True, False])
def test_under_jit_shardings_nothing_is_to_be_said(kind, split_logits):
    mesh = make_mesh(kind, data=4, model=2)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), TREE, SPLIT)
    steps = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), STEPS, SPLIT)
    spec = P("data", "model") if split_logits else P()
    logits = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), LOGITS)

    def step(steps, params, logits):
        logits = jax.tree.map(lambda x: jnp.max(x, axis=0), logits)
        return CLIP.update(steps, CLIP.init(params), params, max_logits=logits)

    with jax.set_mesh(mesh):
        updates, state = jax.jit(step)(steps, placed, logits)
    check(updates, state)
    if kind is AxisType.Explicit:
        assert jax.tree.map(lambda x: jax.typeof(x), updates) == jax.tree.map(jax.typeof, steps)
    text = jax.jit(step).lower(steps, placed, logits).compile().as_text()
    # No weight moves: the largest thing that does has one number for each head.
    for line in text.splitlines():
        assert not any(f" {name}(" in line for name in ("all-to-all", "reduce-scatter"))


def on_mesh(step, specs, check_vma, **axes):
    mesh = make_mesh(**axes)
    out = (specs, jax.tree.map(lambda _: P(), STATE))
    return shard_map(
        step, mesh=mesh, in_specs=(specs, specs, P(*axes)),
        out_specs=out, check_vma=check_vma,
    )  # fmt: skip


def sharded_step(axis_name, own_maximum=False):
    clip = qk_clip(heads=by_role, axis_name=axis_name)

    def step(steps, params, logits):
        logits = jax.tree.map(lambda x: x.max(axis=0), logits)
        if own_maximum:
            logits = jax.lax.pmax(logits, "data")
        return clip.update(steps, clip.init(params), params, max_logits=logits)

    return step


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("axis_name", "own"), [("data", False), (("data",), True), ((), True)])
@pytest.mark.parametrize("specs", [SPLIT, WHOLE])
def test_in_shard_map_the_maximum_over_data_is_that_of_all_examples(
    specs, axis_name, own, check_vma
):
    axes = {"data": 4, "model": 2} if specs is SPLIT else {"data": 4}
    step = on_mesh(sharded_step(axis_name, own), specs, check_vma, **axes)
    check(*step(STEPS, TREE, LOGITS))


def test_types_tell_that_replicated_weights_need_the_maximum():
    step = on_mesh(sharded_step(None), WHOLE, True, data=4)
    check(*step(STEPS, TREE, LOGITS))


def test_in_pmap():
    step = sharded_step("data")
    stack = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * 4))
    logits = jax.tree.map(lambda x: x[:, None], LOGITS)
    updates, state = jax.pmap(step, axis_name="data")(stack(STEPS), stack(TREE), logits)
    for device in range(4):
        check(*at(device, (updates, state)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_two_collectives_whatever_the_number_of_layers(check_vma):
    """One over data for the heads, one over those that hold the heads for what is logged."""
    step = on_mesh(sharded_step("data"), SPLIT, check_vma, data=4, model=2)
    assert collectives(step, STEPS, TREE, LOGITS) == {"pmax": 2}
    step = on_mesh(sharded_step("data"), WHOLE, check_vma, data=4)
    assert collectives(step, STEPS, TREE, LOGITS) == {"pmax": 1}


def test_a_nan_on_one_device_reaches_all():
    logits = {**LOGITS, "a": LOGITS["a"].at[2, 1].set(math.nan)}
    step = on_mesh(sharded_step("data"), SPLIT, False, data=4, model=2)
    updates, state = step(STEPS, TREE, logits)
    np.testing.assert_array_equal(updates["a"]["query"][:, 1], STEPS["a"]["query"][:, 1])
    assert state.nonfinite_count == 1


@pytest.mark.parametrize(
    ("check_vma", "message"),
    [
        (True, r"`axis_name` must be given: the logits at `a` vary along \['data', 'model'\]"),
        (False, "`axis_name` must be given: `pmap`, and `shard_map` with `check_vma=False`"),
    ],
)
def test_an_axis_that_is_not_told_is_asked_for(check_vma, message):
    step = on_mesh(sharded_step(None), SPLIT, check_vma, data=4, model=2)
    with pytest.raises(ValueError, match=message):
        step(STEPS, TREE, LOGITS)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "`threshold` must be non-negative, got -1.0"),
        ({"alpha": 1.5}, "`alpha` must lie between 0 and 1, got 1.5"),
        ({"heads": {"query": 1}}, "`heads` must be a function of path and weight"),
        ({"axis_name": P("data")}, "`axis_name` must be a mesh axis, or several"),
    ],
)
def test_arguments_that_may_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        qk_clip(**{"heads": by_role, **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": "value"}, '`role` must be "query", "key" or "query_rotary", got \'value\''),
        ({"axis": 1.0}, "`axis` must be an axis or a tuple of axes, got 1.0"),
        ({"axis": ()}, "`axis` must be an axis or a tuple of axes"),
        ({"part": {1: slice(0, 4, 2)}}, "`part` must be a dict of axes, .* without a step"),
        ({"part": {1: "q"}}, "`part` must be a dict of axes"),
        ({"part": [0]}, "`part` must be a dict of axes"),
        ({"shape": (2, None)}, "`shape` must be a tuple of whole numbers"),
    ],
)
def test_heads_that_may_not_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Heads(**{"role": "query", "axis": 1, **arguments})


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            lambda path, weight: None,
            "for the weights of queries and keys, got None for all of 2: .* `key`",
        ),
        (
            lambda path, weight: "query",
            "must return `Heads`, several of them or None, got 'query' for `key`",
        ),
        (lambda path, weight: Heads("query", axis=3), "must name axes of `key`, seen in the shape"),
        (lambda path, weight: Heads("query", axis=(1, -2)), "must name axes of `key`"),
        (lambda path, weight: Heads("query", axis=1, part={2: 9}), "must leave something of `key`"),
        (
            lambda path, weight: Heads("query", axis=1, shape=(6, 5, -1)),
            r"`shape` of `Heads` must split axes of `key`, which has the shape \(6, 4, 3\), got",
        ),
        (
            lambda path, weight: Heads("query", axis=1, shape=(6, 2, 6)),
            "`shape` of `Heads` must split",
        ),
        (lambda path, weight: Heads("query", axis=1, shape=(6, 4, 3, 2)), "must split axes"),
    ],
)
def test_heads_that_do_not_fit_the_weights_are_named_at_once(heads, message):
    with pytest.raises(ValueError, match=message):
        qk_clip(heads=heads).init(PAIR)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            None,
            r"`max_logits` must be given: .* `update\(updates, state, params, max_logits=logits",
        ),
        (
            {"layer": jnp.zeros(4)},
            "there are no logits for `key`. Logits are at `layer`, weights .* `key`",
        ),
        ({"key": jnp.zeros(4)}, "there are no logits for `query`"),
        ([], "there are no logits for `key`. Logits are at no place"),
        (jnp.zeros(3), r"`key` has \(4,\) along axis \(1,\) for its key .* are \[\(3,\)\]"),
        (jnp.zeros(8), r"`query` has \(4,\) along axis \(1,\) for its query \(one logit each\)"),
        (jnp.zeros((2, 4)), r"must have the shape of the heads: `key`"),
        (jnp.zeros(()), r"must have the shape of the heads: `key`"),
        (jnp.zeros(0), r"must have the shape of the heads: `key`"),
        (jnp.zeros(4, jnp.complex64), "`max_logits` must be real numbers, got complex64 at ``"),
        (jnp.zeros(4, bool), "`max_logits` must be real numbers, got bool"),
    ],
)
def test_logits_that_do_not_fit_the_weights_are_named(logits, message):
    clip = qk_clip(heads=by_role)
    with pytest.raises(ValueError, match=message):
        clip.update(PAIR, clip.init(PAIR), PAIR, max_logits=logits)


def test_logits_without_weights_are_named():
    clip, params = qk_clip(heads=by_role), {"a": PAIR}
    logits = {"a": jnp.zeros(HEADS), "b": jnp.zeros(HEADS)}
    with pytest.raises(ValueError, match=r"there are no weights for `b`\. Logits are at `a`, `b`"):
        clip.update(params, clip.init(params), params, max_logits=logits)


def test_an_update_without_params_or_with_others_says_so():
    clip = qk_clip(heads=by_role)
    state = clip.init(PAIR)
    with pytest.raises(ValueError, match="`params` must be given: `qk_clip` rescales weights"):
        clip.update(PAIR, state, max_logits=jnp.zeros(HEADS))
    with pytest.raises(ValueError, match="`params` must have the structure of the updates"):
        clip.update(PAIR, state, {"query": PAIR["query"]}, max_logits=jnp.zeros(HEADS))


def test_a_query_without_its_key_and_integer_weights_are_refused():
    clip = qk_clip(heads=lambda path, weight: Heads("query", axis=1))
    with pytest.raises(ValueError, match='at `` it names only "query"'):
        clip.update(PAIR, clip.init(PAIR), PAIR, max_logits=jnp.zeros(HEADS))
    whole = {"query": jnp.zeros(SHAPE, jnp.int8)}
    with pytest.raises(
        ValueError, match="must name weights of a float dtype, got `query`, which is int8"
    ):
        qk_clip(heads=by_role).init(whole)
