"""Many devices: the norm of eight devices is that of one, in every way of running them."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, shard_map
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from registry import FLOOR, MORE, STRATEGIES

import gradclip_jax
from gradclip_jax import _devices, global_norm

# Other responses are measured as `shrink` is; a matrix must be whole (`test_spectral.py`).
MEASURED = [
    s for s in STRATEGIES if not (s.drops or s.of_matrices) and (s.enlarges or not s.changes_below)
] + MORE
all_strategies = pytest.mark.parametrize("strategy", MEASURED, ids=str)
# What jax asks of explicit axes, and of a collective where types say nothing, is written once for
# each kind of norm.
KINDS = [s for s in MEASURED if s in FLOOR or s.units or s.order == 3 or s in MORE]
AUTO = [(s, AxisType.Auto) for s in MEASURED]
EXPLICIT = [(s, AxisType.Explicit) for s in KINDS]
CHECKED = [(s, True) for s in MEASURED]
UNCHECKED = [(s, False) for s in KINDS]

SPECS = {
    "columns": P(None, "model"),
    "rows": P("data"),
    "both": P("data", "model"),
    "pair": P(("data", "model")),
    "bias": P(),
    "scale": P(),
}
SHAPES = {
    "columns": (3, 4),
    "rows": (8, 3),
    "both": (4, 6),
    "pair": (16,),
    "bias": (5,),
    "scale": (),
}


def mixed_tree(seed: int = 0, scale: float = 10.0):
    """Replicated leaves and leaves that are split along one axis, the other, or both."""
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, shape) * scale
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


PARAMS = mixed_tree(1, 1.0)
COUNTS = ("clip_count", "nonfinite_count", "step_count")


def clip_once(clip, updates, params):
    """Updates and counters; norms of units lie where the units do, so they stay inside."""
    updates, state = clip.update(updates, clip.init(params), params)
    seen = gradclip_jax.metrics(state)
    return updates, {key: seen[key] for key in COUNTS}


def placed(tree, mesh):
    return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}


def shard_mapped(clip, mesh, check_vma):
    return jax.jit(
        jax.shard_map(
            lambda updates, params: clip_once(clip, updates, params),
            mesh=mesh,
            in_specs=(SPECS, SPECS),
            out_specs=(SPECS, P()),
            check_vma=check_vma,
        )
    )


def assert_same(results, expected):
    for result, one in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result, one, rtol=2e-6)


@pytest.mark.parametrize(("strategy", "kind"), [*AUTO, *EXPLICIT], ids=str)
def test_jit_with_shardings(strategy, kind):
    expected = clip_once(strategy.make(0.5), mixed_tree(), PARAMS)
    mesh = make_mesh(kind, data=4, model=2)
    updates, params = placed(mixed_tree(), mesh), placed(PARAMS, mesh)
    with jax.set_mesh(mesh):
        result, counts = jax.jit(clip_once, static_argnums=0)(strategy.make(0.5), updates, params)
    assert_same((result, counts), expected)
    for name, leaf in result.items():
        assert leaf.sharding.is_equivalent_to(updates[name].sharding, leaf.ndim), name


@all_strategies
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_shard_map(strategy, check_vma, mesh_2d):
    """And a NaN on one device is seen by all: seven must not step while the eighth skips."""
    # Types say which axes split a leaf, not which dimension of it: units need the specs.
    said = None if check_vma and not strategy.units else SPECS
    mapped = shard_mapped(strategy.make(0.5, axis_name=said), mesh_2d, check_vma)
    updates = mixed_tree()
    assert_same(mapped(updates, PARAMS), clip_once(strategy.make(0.5), updates, PARAMS))
    updates["rows"] = updates["rows"].at[7, 0].set(jnp.nan)
    expected = clip_once(strategy.make(0.5), updates, PARAMS)
    assert int(expected[1]["nonfinite_count"]) == 1
    assert_same(mapped(updates, PARAMS), expected)


@all_strategies
def test_pmap_with_every_leaf_split_along_a_name(strategy):
    shapes = {"kernel": (2, 3), "bias": (4,), "filter": (1, 2, 3, 2)}
    whole = {
        name: jax.random.normal(jax.random.key(i), (8 * shape[0], *shape[1:])) * 10
        for i, (name, shape) in enumerate(shapes.items())
    }
    params = jax.tree.map(lambda x: 0.1 * x, whole)
    expected, counts = clip_once(strategy.make(0.5), whole, params)

    def split(tree):
        return {name: x.reshape(8, *shapes[name]) for name, x in tree.items()}

    # Names do not say which dimension is split: units need the spec.
    clip = strategy.make(0.5, axis_name=P("i") if strategy.units else "i")
    result, seen = jax.pmap(lambda u, p: clip_once(clip, u, p), axis_name="i")(
        split(whole), split(params)
    )
    assert_same(result, split(expected))
    for key in COUNTS:
        assert set(np.asarray(seen[key]).tolist()) == {int(counts[key])}


def test_the_norm_of_eight_devices_is_that_of_one(mesh_2d):
    """The norm itself, for leaves mixed of replicated and sharded, in the four ways of running."""
    updates = mixed_tree()
    flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in updates.values()])
    expected = np.linalg.norm(flat)
    sharded = placed(updates, mesh_2d)
    norms = [global_norm(updates), jax.jit(global_norm)(sharded), global_norm(sharded)]
    for axis_name, check_vma in ((None, True), (SPECS, False), (SPECS, True)):
        measure = shard_map(
            lambda tree, axis_name=axis_name: global_norm(tree, axis_name=axis_name),
            mesh=mesh_2d,
            in_specs=(SPECS,),
            out_specs=P(),
            check_vma=check_vma,
        )
        norms.append(measure(updates))
    split = updates["rows"].reshape(8, 1, 3)
    rest = {name: leaf for name, leaf in updates.items() if name != "rows"}
    measure = jax.pmap(
        lambda rows, rest: global_norm((rows, rest), axis_name=(P("i"), P())),
        axis_name="i",
        in_axes=(0, None),
    )
    norms.extend(measure(split, rest))
    np.testing.assert_allclose([float(norm) for norm in norms], expected, rtol=1e-6)


def test_replicated_leaves_are_counted_once_and_stay_replicated(mesh):
    """The example of a sharded kernel beside a replicated bias, norms 5.66 each: 8, not 16.97."""
    updates = {"kernel": jnp.full(32, 1.0), "bias": jnp.full(8, 2.0)}
    specs = {"kernel": P("data"), "bias": P()}
    clip = gradclip_jax.clip_by_global_norm(1.0)

    def step(updates):
        updates, state = clip.update(updates, clip.init(updates))
        return updates, state.grad_norm

    result, norm = shard_map(
        step, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()), check_vma=True
    )(updates)
    assert float(norm) == 8.0
    np.testing.assert_allclose(result["bias"], 2.0 / 8.0)
    np.testing.assert_allclose(result["kernel"], 1.0 / 8.0)


def collectives(function, *args) -> Counter:
    """Number of equations of each collective in the program of any platform, at any depth."""

    def of(jaxpr) -> Counter:
        found: Counter = Counter()
        for equation in jaxpr.eqns:
            if re.search("psum|pmax|pmin|all_gather|ppermute|all_to_all", equation.primitive.name):
                found[equation.primitive.name] += 1
            values = [x if isinstance(x, tuple | list) else [x] for x in equation.params.values()]
            jaxprs = [getattr(x, "jaxpr", x) for value in values for x in value]
            inner = [of(jaxpr) for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]
            if equation.params.get("branches_platforms"):
                # Of these one is compiled; on each platform it has the same.
                assert len({tuple(sorted(each.items())) for each in inner}) == 1
                inner = inner[:1]
            found.update(sum(inner, Counter()))
        return found

    return of(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize(("strategy", "check_vma"), [*CHECKED, *UNCHECKED], ids=str)
def test_one_collective_whatever_the_number_of_leaves(strategy, check_vma, mesh):
    updates = {str(i): jnp.ones((8, 2)) for i in range(10)}
    clip = strategy.make(0.5, axis_name=jax.tree.map(lambda _: P("data"), updates))

    def step(updates):
        updates, state = clip.update(updates, clip.init(updates), updates)
        return updates, state.step_count

    mapped = shard_map(
        step, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()), check_vma=check_vma
    )
    found = collectives(mapped, updates)
    # Powers of order 3 overflow from 7e12, so that they are scaled by the largest modulus; and
    # where units may be split, the counters are agreed on. Layers of a stack are whole here.
    whole = strategy.name == "clip_by_block_rms[axes]"
    two = strategy.order == 3 or (strategy.units and not check_vma and not whole)
    two |= strategy.name in (
        "acclip",
        "stable_spam_clip",
        "stable_spam_norm",
    )  # `init`, too
    assert found.total() == (2 if two else 1)


def test_one_collective_for_each_distinct_set_of_axes(mesh_2d):
    updates = {f"{name}{i}": leaf for name, leaf in mixed_tree().items() for i in range(10)}
    specs = {f"{name}{i}": SPECS[name] for name in SPECS for i in range(10)}
    measure = shard_map(global_norm, mesh=mesh_2d, in_specs=(specs,), out_specs=P())
    # Along data, along model, along both: replicated leaves need none.
    assert collectives(measure, updates).total() == 3


def test_replicated_leaves_alone_need_no_collective(mesh):
    measure = shard_map(global_norm, mesh=mesh, in_specs=P(), out_specs=P())
    assert collectives(measure, mixed_tree()).total() == 0


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1.0, 2.0**50, 1e20, 1e30])
def test_devices_of_very_different_size_share_one_collective(scale, mesh):
    """Some overflow, some underflow and some do neither, each on its own device."""
    x = jnp.array([1e-30, 1e-20, 1e-12, 1.0, 1e5, 0.0, 0.5, 2.0]) * scale
    measure = jax.jit(jax.shard_map(global_norm, mesh=mesh, in_specs=P("data"), out_specs=P()))
    np.testing.assert_allclose(
        float(measure(x)), np.linalg.norm(np.asarray(x, np.float64)), rtol=1e-6
    )


@pytest.mark.parametrize("run", ["pmap", "shard_map"])
def test_a_library_that_cannot_know_refuses_to_guess(run, mesh):
    clip = gradclip_jax.clip_by_global_norm(1.0)

    def step(grads):
        return clip_once(clip, grads, grads)[0]

    runs = {
        "pmap": jax.pmap(step, axis_name="i"),
        "shard_map": shard_map(
            step, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        ),
    }
    with pytest.raises(ValueError, match="`axis_name` must be given inside `pmap`, or `shard_map`"):
        runs[run](jnp.ones((8, 2)))


def test_a_spec_that_the_type_contradicts_raises(mesh):
    clip = gradclip_jax.clip_by_global_norm(1.0, axis_name=P())
    step = shard_map(
        lambda g: clip_once(clip, g, g)[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    with pytest.raises(ValueError, match=r"`w` is split, got .* varies along \['data'\] too"):
        step({"w": jnp.ones(8)})


def test_averaged_gradients_in_pmap_need_no_axes_and_say_so():
    clip = gradclip_jax.clip_by_global_norm(1.0, axis_name=())

    def step(x):
        gradient = jax.lax.pmean(x, "i")
        return clip.update(gradient, clip.init(gradient))[0]

    result = jax.pmap(step, axis_name="i")(jnp.arange(16.0).reshape(8, 2))
    np.testing.assert_allclose(
        result, np.tile(np.array([7, 8]) / np.hypot(7, 8), (8, 1)), rtol=1e-6
    )


@pytest.mark.parametrize("axis_name", ["nowhere", ("data", "nowhere"), P("nowhere")])
def test_an_axis_that_is_not_bound_raises(axis_name, mesh):
    for make in (gradclip_jax.clip_by_global_norm, gradclip_jax.clip_by_unit_norm):
        clip = make(1.0, axis_name=axis_name)
        with pytest.raises(ValueError, match=r"`axis_name` must name axes that .* bound here, got"):
            clip.update(jnp.ones(2), clip.init(jnp.ones(2)))
    clip = gradclip_jax.clip_by_global_norm(1.0, axis_name=axis_name)
    with pytest.raises(ValueError, match=r"`axis_name` must name axes that .* bound here, got 'no"):
        shard_map(
            lambda g: clip_once(clip, g, g)[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )(jnp.ones(8))


def test_a_gradient_that_is_not_averaged_raises(mesh):
    params = {"layer": {"kernel": jnp.ones(3)}}

    def step(params, batch, average):
        local = jax.lax.pcast(params, ("data",), to="varying")
        grads = jax.grad(lambda p: jnp.sum(p["layer"]["kernel"] * batch.sum()))(local)
        grads = jax.lax.pmean(grads, "data") if average else grads
        clip = gradclip_jax.clip_by_global_norm(1.0)
        return clip.update(grads, clip.init(params), params)[0]

    def run(average):
        return shard_map(
            lambda p, b: step(p, b, average), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
        )(params, jnp.arange(8.0))

    message = (
        r"the gradient of `layer/kernel` is not averaged along mesh axis 'data'.*"
        r"Call `jax\.lax\.pmean\(grads, 'data'\)` before the clip\."
    )
    with pytest.raises(ValueError, match=message):
        run(average=False)
    np.testing.assert_allclose(run(average=True)["layer"]["kernel"], 1 / np.sqrt(3), rtol=1e-6)


def test_what_is_not_averaged_is_found_beside_leaves_that_are_no_arrays(mesh):
    """Functions and strings, as in an Equinox model, have no type that could vary."""
    model = {"act": jax.nn.relu, "name": "layer", "w": jnp.ones(3), "x": 1.0}
    clip = gradclip_jax.clip_by_global_norm(1.0)

    def run(average):
        def step(w, batch):
            local = jax.lax.pcast(w, ("data",), to="varying") * batch.sum()
            grads = {**model, "w": jax.lax.pmean(local, "data") if average else local}
            return clip.update(grads, clip.init(model), {**model, "w": w})[0]["w"]

        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        return shard_map(step, mesh=mesh, **specs)(model["w"], jnp.arange(8.0))

    with pytest.raises(ValueError, match=r"the gradient of `w` is not averaged along mesh axis"):
        run(average=False)
    np.testing.assert_allclose(run(average=True), 3.5 / np.sqrt(1 + 3 * 3.5**2), rtol=1e-6)


def test_params_of_another_structure_tell_nothing_of_the_gradients(mesh, standard_promotion):
    optimizer = optax.chain(
        gradclip_jax.clip_by_global_norm(1.0), optax.lookahead(optax.sgd(1.0), 5, 0.5)
    )

    def step(x):
        params = optax.LookaheadParams.init_synced({"w": jnp.zeros(2)})
        grads = {"w": jax.lax.pmean(jnp.array([6.0, 8.0]) * x.sum(), "data")}
        return optimizer.update(grads, optimizer.init(params), params)[0].fast["w"]

    specs = {"in_specs": P("data"), "out_specs": P()}
    fast = shard_map(step, mesh=mesh, **specs)(jnp.ones(8))
    np.testing.assert_allclose(fast, [-0.6, -0.8], rtol=1e-6)


def test_a_partial_sum_raises():
    """A type that says `unreduced` is no gradient yet."""
    mesh = make_mesh(AxisType.Explicit, x=8)
    with jax.set_mesh(mesh):
        a = jax.device_put(jnp.ones((2, 8)), NamedSharding(mesh, P(None, "x")))
        b = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("x", None)))

        def step(a, b):
            partial = jnp.einsum("ij,jk->ik", a, b, out_sharding=P(unreduced={"x"}))
            return global_norm({"w": partial})

        with pytest.raises(ValueError, match=r"`w` is not averaged along mesh axis 'x'.*psum"):
            jax.jit(step)(a, b)


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_units_of_split_leaves_ask_for_the_specs(axis_name, mesh):
    clip = gradclip_jax.clip_by_unit_norm(1.0, axis_name=axis_name)
    with pytest.raises(ValueError, match="`axis_name` must be a tree of PartitionSpecs for norms"):
        shard_map(
            lambda g: clip_once(clip, g, g)[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )(jnp.ones((8, 2)))


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_elements_of_a_split_vector_are_not_summed_over_devices(axis_name, mesh):
    """The norms [3, 4] of devices that hold one element each would have been 5 on both."""
    measure = functools.partial(gradclip_jax.unit_norms, axes=(), axis_name=axis_name)
    with pytest.raises(ValueError, match="`axis_name` must be a tree of PartitionSpecs for norms"):
        shard_map(measure, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(jnp.ones(8))
    told = functools.partial(gradclip_jax.unit_norms, axes=(), axis_name=P("data"))
    norms = shard_map(told, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(jnp.arange(8.0))
    np.testing.assert_array_equal(norms, np.arange(8.0))


def test_the_rule_for_units_sees_the_whole_shape(mesh):
    """A kernel of (8, 3) is no vector because each device holds (1, 3) of it."""
    params = {"kernel": jnp.ones((8, 3))}
    grads = {"kernel": jnp.arange(24.0).reshape(8, 3)}
    expected = clip_once(gradclip_jax.adaptive_grad_clip(0.1), grads, params)
    for check_vma in (True, False):
        clip = gradclip_jax.adaptive_grad_clip(0.1, axis_name=P("data"))
        step = shard_map(
            functools.partial(clip_once, clip),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=(P("data"), P()),
            check_vma=check_vma,
        )
        assert_same(jax.jit(step)(grads, params), expected)


def test_a_name_restricts_the_norm_to_its_axis(mesh_2d):
    """Independent replicas along `model` keep norms of their own."""
    x = jnp.arange(1.0, 9.0).reshape(4, 2)
    norms = shard_map(
        lambda x: global_norm(x, axis_name="data")[None],
        mesh=mesh_2d,
        in_specs=P("data", "model"),
        out_specs=P("model"),
    )(x)
    np.testing.assert_allclose(norms, np.linalg.norm(np.asarray(x), axis=0), rtol=1e-6)


def test_state_scans_inside_shard_map(mesh_2d):
    """The state has the same type before and after, norms that vary along an axis included."""
    clip = gradclip_jax.clip_by_unit_norm(1.0, axis_name=SPECS)

    def run(updates):
        state, _ = jax.lax.scan(
            lambda s, _: (clip.update(updates, s)[1], None), clip.init(updates), length=3
        )
        return state.step_count

    count = shard_map(run, mesh=mesh_2d, in_specs=(SPECS,), out_specs=P())(mixed_tree())
    assert int(count) == 3


def test_an_optimizer_state_made_outside_serves_inside(mesh, standard_promotion):
    params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    grads = jax.tree.map(lambda x: 100 * x, params)
    optimizer = optax.chain(gradclip_jax.clip_by_global_norm(1.0), optax.adam(0.1))
    state = optimizer.init(params)
    specs = {"kernel": P("data"), "bias": P()}
    state_specs = optax.tree.map_params(
        optimizer, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )

    step = jax.jit(
        jax.shard_map(
            optimizer.update,
            mesh=mesh,
            in_specs=(specs, state_specs),
            out_specs=(specs, state_specs),
        )
    )
    result, new_state = step(grads, state)
    expected, expected_state = optimizer.update(grads, state)
    assert_same((result, new_state), (expected, expected_state))


def test_mixed_memories_are_reduced_where_they_are():
    """Host-offloaded leaves beside device leaves: only numbers move."""
    device = jax.devices()[0]
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    updates = {"host": jax.device_put(jnp.array([3e20, 0.0]), pinned), "device": jnp.array([4e20])}
    clip = gradclip_jax.clip_by_global_norm(1.0)
    state = clip.init(updates)
    for update in (clip.update, jax.jit(clip.update)):
        result, new_state = update(updates, state)
        np.testing.assert_allclose(result["host"], [0.6, 0.0], rtol=1e-6)
        np.testing.assert_allclose(result["device"], [0.8], rtol=1e-6)
        assert result["host"].sharding.memory_kind == "pinned_host"
        assert result["device"].sharding.memory_kind == "device"
        assert float(new_state.grad_norm) == pytest.approx(5e20)


@all_strategies
def test_every_strategy_takes_mixed_memories(strategy):
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    updates, params = mixed_tree(), PARAMS

    def place(tree):
        return {**tree, "rows": jax.device_put(tree["rows"], pinned)}

    expected = clip_once(strategy.make(0.5), updates, params)
    result = jax.jit(clip_once, static_argnums=0)(strategy.make(0.5), place(updates), place(params))
    assert result[0]["rows"].sharding.memory_kind == "pinned_host"
    assert_same(result, expected)


def test_the_types_of_this_jax_are_understood(mesh_2d):
    """The one place that knows how jax spells them."""
    seen = {}

    def inspect(x, y):
        seen["varying"] = _devices.varying_axes(x), _devices.varying_axes(y)
        seen["manual"] = _devices.manual_axes()
        seen["checked"] = _devices.vma_checked()
        return x

    for check_vma in (True, False):
        shard_map(
            inspect,
            mesh=mesh_2d,
            in_specs=(P("data"), P()),
            out_specs=P("data"),
            check_vma=check_vma,
        )(jnp.ones(8), jnp.ones(2))
        assert seen["varying"] == (frozenset({"data"} if check_vma else ()), frozenset())
        assert set(seen["manual"]) == {"data", "model"}
        assert seen["checked"] is check_vma
    assert _devices.manual_axes() == ()
    assert not _devices.vma_checked()


def test_jit_reshards_nothing_and_sums_once(mesh_2d):
    """Under automatic sharding: no gather, and as few reductions as XLA can combine."""
    sharded = placed(mixed_tree(), mesh_2d)
    clip = gradclip_jax.clip_by_global_norm(1.0)
    text = jax.jit(clip.update).lower(sharded, clip.init(sharded)).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {collective}(" not in text
    assert " all-reduce(" in text


@pytest.mark.parametrize("bound", [2.0**-51.5, 2.0**50])
def test_devices_on_both_sides_of_a_bound_of_the_safe_range(bound, mesh):
    """Half of the devices scale their elements before they square them, and half do not."""
    x = jnp.array([0.75, 1.5] * 4) * bound
    norm = shard_map(global_norm, mesh=mesh, in_specs=P("data"), out_specs=P())(x)
    np.testing.assert_allclose(norm, bound * math.sqrt(4 * (0.75**2 + 1.5**2)), rtol=1e-6)


def test_a_name_beside_types_counts_a_replicated_leaf_once(mesh):
    """The kernel of norm 5.66 is split, the bias of that norm is not: 8, not 16.97."""
    updates = {"kernel": jnp.full(32, 1.0), "bias": jnp.full(8, 2.0)}
    norm = shard_map(
        lambda updates: global_norm(updates, axis_name="data"),
        mesh=mesh,
        in_specs=({"kernel": P("data"), "bias": P()},),
        out_specs=P(),
    )(updates)
    assert float(norm) == 8.0


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("bad", "counts"), [(5.0, (1, 0)), (np.nan, (0, 1))])
def test_a_unit_on_one_device_is_counted_by_all(check_vma, bad, counts, mesh):
    clip = gradclip_jax.clip_by_unit_norm(1.0, axis_name=P(None, "data"))

    def step(x):
        _, state = clip.update(x, clip.init(x))
        return state.clip_count, state.nonfinite_count

    counted = shard_map(
        step, mesh=mesh, in_specs=P(None, "data"), out_specs=P(), check_vma=check_vma
    )(jnp.full((2, 8), 0.1).at[0, 3].set(bad))
    assert tuple(map(int, counted)) == counts


PARTLY = {
    "unit": lambda specs: gradclip_jax.clip_by_unit_norm(1.0, axis_name=specs),
    "row": lambda specs: gradclip_jax.clip_by_unit_norm(1.0, axes=1, axis_name=specs),
    "agc": lambda specs: gradclip_jax.adaptive_grad_clip(0.01, axis_name=specs),
    "spam": lambda specs: gradclip_jax.spam_clip(),
    "adagc": lambda specs: gradclip_jax.adagc(),
    "error_feedback": lambda specs: gradclip_jax.error_feedback(gradclip_jax.clip_by_norm(1.0)),
    "clip21": lambda specs: gradclip_jax.clip21(gradclip_jax.clip_by_norm(1.0)),
    "skip_nonfinite": lambda specs: gradclip_jax.skip_nonfinite(optax.adam(0.1)),
    "skip_spikes": lambda specs: gradclip_jax.skip_spikes(optax.adam(0.1), grad_norm=1e3),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("make", PARTLY.values(), ids=PARTLY)
def test_a_state_is_made_where_only_one_of_two_mesh_axes_is_manual(make, kind, standard_promotion):
    """There `eval_shape` leaves out the sharding, and jax.typeof fails with an AssertionError."""
    mesh = make_mesh(kind, a=2, b=4)
    specs = {"w": P("b", None)}
    grads = {"w": jnp.arange(32.0).reshape(4, 8) + 1}
    whole = make(None)
    expected, _ = whole.update(grads, whole.init(grads), grads)
    clip = make(specs)
    mapped = jax.shard_map(
        lambda grads: clip.update(grads, clip.init(grads), grads)[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
        axis_names={"b"},
    )
    split = jax.device_put(grads, NamedSharding(mesh, specs["w"]))
    with jax.set_mesh(mesh):
        result = jax.jit(mapped)(split)
    np.testing.assert_allclose(result["w"], expected["w"], rtol=1e-5)
