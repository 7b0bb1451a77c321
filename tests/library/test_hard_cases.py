"""The hard cases of clipping on many devices, each beside the number that a naive clip gets.

`test_devices.py` compares eight devices with one. Here are the cases in which a careful program
still measures too much, too little, or something else on every device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import gradclip_jax
from gradclip_jax import clip_by_global_norm, global_norm, unit_norms

each_check = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
both_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
close = functools.partial(np.testing.assert_allclose, rtol=2e-6)


def clipped(clip, updates, params=None):
    """Updates after one clip, and the norm before."""
    updates, state = clip.update(updates, clip.init(updates), params)
    return updates, state.grad_norm


def on_devices(step, mesh, in_specs, out_specs, check_vma=True):
    """A jitted `shard_map`."""
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, check_vma=check_vma))


def by_axis_names(names, mesh, specs, check_vma, grads, gradient=lambda x: x):
    """For each `axis_name` of `names`: updates clipped to 1, and the norm on each device."""

    def step(grads):
        clips = {key: clip_by_global_norm(1.0, axis_name=name) for key, name in names.items()}
        results = {key: clipped(clip, gradient(grads)) for key, clip in clips.items()}
        return {key: (updates, norm[None]) for key, (updates, norm) in results.items()}

    out_specs = dict.fromkeys(names, (specs, P(mesh.axis_names)))
    return on_devices(step, mesh, (specs,), out_specs, check_vma)(grads)


def placed(tree, mesh, specs):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def copies(x):
    """The different values that devices hold of a replicated array, as bytes."""
    assert len(x.addressable_shards) == len(x.sharding.device_set)
    return {np.asarray(shard.data).tobytes() for shard in x.addressable_shards}


def joint(tree):
    """The norm of all elements of a tree, in NumPy."""
    flat = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(flat))


# Replicated leaves beside sharded ones: squares of norms 4 * (1 + 4 + ... + 64) = 816, and 32.

MIXED = {"kernel": np.repeat(np.arange(1.0, 9.0), 4), "bias": np.full(8, 2.0)}
MIXED_SPECS = {"kernel": P("data"), "bias": P()}


@pytest.mark.parametrize("run", ["checked", "unchecked", "pmap", "Auto", "Explicit"])
def test_updates_of_replicated_leaves_are_bit_equal_on_all_devices(run):
    axis_name = MIXED_SPECS if run in ("unchecked", "pmap") else None
    step = functools.partial(clipped, clip_by_global_norm(1.0, axis_name=axis_name))
    mesh = make_mesh(AxisType.Explicit if run == "Explicit" else AxisType.Auto, data=8)
    updates = placed(MIXED, mesh, MIXED_SPECS)
    if run == "pmap":
        step = jax.pmap(step, "data", in_axes=({"kernel": 0, "bias": None},))
        updates = {**MIXED, "kernel": MIXED["kernel"].reshape(8, 4)}
    elif run in ("Auto", "Explicit"):
        step = jax.jit(step)
    else:
        step = on_devices(step, mesh, (MIXED_SPECS,), (MIXED_SPECS, P()), run == "checked")
    updates, norm = step(updates)
    close(norm, np.sqrt(848))
    close(np.ravel(updates["kernel"]), MIXED["kernel"] / np.sqrt(848))
    assert len(copies(updates["bias"])) == len(copies(norm)) == 1


def test_norms_of_shares_give_a_replicated_leaf_eight_different_updates(mesh):
    clips = {
        "optax": optax.clip_by_global_norm(1.0),
        "all sharded": clip_by_global_norm(1.0, axis_name="data"),
    }

    def step(updates):
        return {key: clip.update(updates, clip.init(updates))[0] for key, clip in clips.items()}

    out_specs = dict.fromkeys(clips, MIXED_SPECS)
    results = on_devices(step, mesh, (MIXED_SPECS,), out_specs, check_vma=False)(MIXED)
    assert len(copies(results["optax"]["bias"])) == 8
    # Summed over devices as if all were sharded, the bias counts eight times: 32.7, not 29.1.
    close(results["all sharded"]["bias"], 2 / np.sqrt(816 + 8 * 32))


# Tied embeddings: looked up the gradient is [3, 0], as the head it is [0, 4].


def test_a_tied_embedding_is_one_leaf_and_counted_once():
    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: 3 * p["embed"][0] + 4 * p["embed"][1])(params)
        return clipped(clip_by_global_norm(1.0), grads)

    updates, norm = step({"embed": np.ones(2)})
    assert float(norm) == 5.0
    close(updates["embed"], [0.6, 0.8])
    # Listed under two names it counts twice: 7.07.
    close(global_norm({"embed": np.array([3.0, 4.0]), "head": np.array([3.0, 4.0])}), 5 * 2**0.5)


class Tied(nnx.Module):
    """The head shares the variable of the embedding."""

    def __init__(self):
        self.embed = nnx.Param(jnp.ones(2))
        self.head = self.embed

    def loss(self):
        return 3 * self.embed[...][0] + 4 * self.head[...][1]


def test_a_shared_variable_of_nnx_is_counted_once():
    model = Tied()
    grads = nnx.grad(Tied.loss)(model)
    updates, norm = jax.jit(functools.partial(clipped, clip_by_global_norm(1.0)))(grads)
    assert float(norm) == 5.0
    close(jax.tree.leaves(updates), [[0.6, 0.8]])
    # The state has the shared variable once; the module itself, taken for a pytree, has it twice.
    assert float(global_norm(nnx.state(model))) == pytest.approx(np.sqrt(2))
    assert float(global_norm(model)) == pytest.approx(2)


@each_check
def test_an_embedding_on_two_pipeline_stages_is_counted_once(check_vma):
    """The first stage looks it up and the last has the head, each with its part of a sum."""

    def gradient(embed):
        first = jax.lax.axis_index("stage") == 0
        grads = jax.grad(lambda e: jnp.where(first, 3 * e[0], 4 * e[1]))(embed)
        # With types that are checked jax sums the gradient of what is replicated by itself.
        return grads if check_vma else jax.lax.psum(grads, "stage")

    names = {"right": None} if check_vma else {"right": (), "both": "stage"}
    mesh = make_mesh(stage=2, data=4)
    results = by_axis_names(names, mesh, P(), check_vma, np.zeros(2), gradient)
    updates, norms = results["right"]
    close(updates, [0.6, 0.8])
    assert norms.tolist() == [5] * 8
    assert len(copies(updates)) == 1
    if not check_vma:
        # Counted on both stages, as it was in Megatron: 7.07, and an update of norm 0.71.
        updates, norms = results["both"]
        close(norms, [5 * np.sqrt(2)] * 8)
        close(joint(updates), np.sqrt(0.5))


# Experts and pipelines.


@each_check
def test_experts_and_dense_leaves_share_one_norm_over_different_axes(check_vma):
    """Norms 2 (dense), 3 (bias), 6 and 24 (experts): 4 + 9 + 36 + 576 = 25 squared."""
    grads = {"dense": np.ones(4), "bias": np.array([3.0]), "experts": np.array([[6.0], [24.0]])}
    specs = {"dense": P("data"), "bias": P(), "experts": P("expert")}
    names = {"right": None}
    if not check_vma:
        names = {"right": specs, "own group": {**specs, "experts": P()}}
    results = by_axis_names(names, make_mesh(data=4, expert=2), specs, check_vma, grads)
    updates, norms = results["right"]
    assert norms.tolist() == [25] * 8
    close(updates["experts"], [[6 / 25], [24 / 25]])
    close(updates["dense"], [1 / 25] * 4)
    assert len(copies(updates["dense"])) == 1  # equal elements, so that all devices hold the same
    if not check_vma:
        # Each group of experts by a norm of its own, 7 or 24.3: dense weights that are one and
        # the same are clipped 3.5 times as much in one group as in the other, and drift apart.
        updates, norms = results["own group"]
        close(norms, [7, np.sqrt(4 + 9 + 576)] * 4)
        assert len(copies(updates["dense"])) == 2


@each_check
def test_stages_with_zeros_for_the_layers_of_others_share_one_norm(check_vma):
    """One program, in which each stage holds the whole tree; 7 on the first and 24 on the last."""
    grads = {
        "embed": np.array([[2.0, 3.0], [0.0, 0.0]]),
        "block": np.array([[6.0], [0.0]]),
        "head": np.array([[0.0], [24.0]]),
    }
    names = {"right": None} if check_vma else {"right": "stage", "own stage": ()}
    mesh = make_mesh(stage=2, data=4)
    results = by_axis_names(names, mesh, P("stage"), check_vma, grads)
    updates, norms = results["right"]
    assert norms.tolist() == [25] * 8
    close(updates["embed"], [[0.08, 0.12], [0, 0]])
    close(updates["head"], [[0], [0.96]])
    if not check_vma:
        # Taken for replicated, each stage has the norm of its own layers.
        assert results["own stage"][1].tolist() == [7] * 4 + [24] * 4


@each_check
def test_layers_stacked_over_stages_share_one_norm_with_what_is_replicated(check_vma):
    grads = {"layers": np.full((8, 2), 3.0), "embed": np.array([5.0])}  # 12 and 5
    specs = {"layers": P("stage"), "embed": P()}
    names = {"right": None} if check_vma else {"right": specs, "each stage": "stage"}
    results = by_axis_names(names, make_mesh(stage=4, data=2), specs, check_vma, grads)
    updates, norms = results["right"]
    assert norms.tolist() == [13] * 8
    close(updates["embed"], [5 / 13])
    if not check_vma:
        # The embedding counted by each of four stages: 144 + 4 * 25 = 15.6 squared.
        close(results["each stage"][1], [np.sqrt(244)] * 8)


def test_parts_of_a_sum_are_to_be_summed():
    """Parts on each stage and params on all: the mean would be half the gradient."""
    mesh = make_mesh(stage=2, data=4)

    def run(collective):
        def step(params, parts):
            grads = collective({"w": parts[0]})
            return clipped(clip_by_global_norm(1.0), grads, params)

        step = on_devices(step, mesh, (P(), P("stage")), (P(), P()))
        return step({"w": np.zeros(2)}, np.array([[3.0, 0.0], [0.0, 4.0]]))

    with pytest.raises(ValueError, match=r"axis 'stage'.* Parts of one sum, .* take `psum`\."):
        run(lambda parts: parts)
    assert float(run(lambda parts: jax.lax.psum(parts, "stage"))[1]) == 5.0


def test_stages_in_separate_programs_are_clipped_by_one_norm():
    """Meshes of 4 and 2 devices, trees of different structure, norms 3e25 and 4e25."""
    devices = np.array(jax.devices())
    meshes = [Mesh(devices[:4], ("data",)), Mesh(devices[4:6], ("data",))]
    specs = [{"embed": P("data"), "block0": P()}, {"block1": P("data"), "head": P()}]
    grads = [
        {"embed": np.full(4, 1e25), "block0": np.array([1e25, 2e25])},
        {"block1": np.full(16, 0.5e25), "head": np.full(12, 1e25)},
    ]
    clip = gradclip_jax.clip_to_limit(1.0, measure=gradclip_jax.given_norm("total"))
    stages = [placed(*stage) for stage in zip(grads, meshes, specs, strict=True)]
    norms = [jax.jit(global_norm)(stage) for stage in stages]
    close(np.array(norms), [3e25, 4e25])
    # The norm of the norms, on one device; added as squares they overflow.
    total = global_norm(jax.device_put(norms, devices[0]))
    close(total, 5e25)
    with np.errstate(over="ignore"):
        assert np.square(np.array(norms, np.float32)).sum() == np.inf

    def update(stage, mesh, norm):
        known = jax.device_put(norm, NamedSharding(mesh, P()))
        return jax.jit(clip.update)(stage, clip.init(stage), total=known)

    pairs = list(zip(stages, meshes, strict=True))
    results = [update(stage, mesh, total) for stage, mesh in pairs]
    assert float(results[0][1].clip_factor) == float(results[1][1].clip_factor)
    close([joint(updates) for updates, _ in results], [0.6, 0.8])
    # Each by its own norm the stages would take steps of norm 1 each, in another direction.
    alone = [update(*pair, norm)[0] for pair, norm in zip(pairs, norms, strict=True)]
    close([joint(updates) for updates in alone], [1, 1])
    # And what is not finite in one stage stops all of them.
    for stage, mesh in pairs:
        updates, state = update(stage, mesh, global_norm([total, np.float32(np.nan)]))
        assert joint(updates) == 0
        assert int(state.nonfinite_count) == 1


@pytest.mark.parametrize("order", [1, 2, 3, float("inf")])
def test_the_norm_of_norms_is_the_norm_of_all(order):
    """Of Python floats too, as they come from another process."""
    norms = [float(np.linalg.norm(part, order)) for part in ([1, -2, 3], [4, -5])]
    close(global_norm(norms, order=order), np.linalg.norm([1, 2, 3, 4, 5], order))


# Partitions, masks and frozen leaves: norms 8 (frozen) and 6 (trained).

TUNED = {
    "frozen": {"kernel": np.full((8, 2), 2.0), "bias": np.zeros(2)},
    "trained": {"kernel": np.full(8, 2.0), "bias": np.ones(4)},
}
TUNED_SPECS = {name: {"kernel": P("data"), "bias": P()} for name in TUNED}
TRAINED, FROZEN = {"frozen": False, "trained": True}, {"frozen": True, "trained": False}


def with_frozen_leaves(axis_name):
    """Ways to freeze leaves, with the clip where it does not count them, and where it does."""
    clip = clip_by_global_norm(1.0, axis_name=axis_name)
    trained = optax.chain(clip, optax.sgd(-1.0))
    return {
        "freeze": optax.chain(optax.masked(clip, TRAINED), optax.freeze(FROZEN)),
        "partition": optax.partition(
            {"a": optax.set_to_zero(), "b": trained}, {"frozen": "a", "trained": "b"}
        ),
        "zero first": optax.chain(optax.freeze(FROZEN), clip),
        "counted": optax.chain(clip, optax.freeze(FROZEN)),
    }


@pytest.mark.parametrize("run", ["jit", "checked", "unchecked"])
def test_frozen_leaves_do_not_count(run, mesh, standard_promotion):
    optimizers = with_frozen_leaves(TUNED_SPECS if run == "unchecked" else None)

    def step(grads):
        return {
            key: optimizer.update(grads, optimizer.init(grads), grads)[0]
            for key, optimizer in optimizers.items()
        }

    if run == "jit":
        step = jax.jit(step)
    else:
        out_specs = dict.fromkeys(optimizers, TUNED_SPECS)
        step = on_devices(step, mesh, (TUNED_SPECS,), out_specs, run == "checked")
    results = step(placed(TUNED, mesh, TUNED_SPECS))
    assert joint([updates["frozen"] for updates in results.values()]) == 0
    norms = {key: joint(updates["trained"]) for key, updates in results.items()}
    # Counted, and only then made zero, they take the room of those that move: 6 / 10.
    assert norms.pop("counted") == pytest.approx(0.6)
    close(list(norms.values()), 1)


def test_a_mask_may_cut_off_what_specs_and_labels_spell_out(mesh):
    """`optax.masked` leaves one empty node of a subtree, whatever specs and labels say of it."""
    labels = jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", TUNED)
    clip = gradclip_jax.clip_by_group_norm(1.0, labels=labels, axis_name=TUNED_SPECS)
    masked = optax.masked(clip, TRAINED)

    def step(grads):
        return masked.update(grads, masked.init(grads))[0]

    updates = on_devices(step, mesh, (TUNED_SPECS,), TUNED_SPECS, check_vma=False)(TUNED)
    close(joint(updates["trained"]), 1)
    np.testing.assert_array_equal(updates["frozen"]["kernel"], TUNED["frozen"]["kernel"])
    with pytest.raises(ValueError, match="`axis_name` must be a prefix pytree of the updates"):
        global_norm(TUNED, axis_name={"frozen": P(), "trained": {"kernel": P()}})


def test_a_clip_in_each_group_of_a_partition_has_a_norm_for_each(standard_promotion):
    """Two groups of norm 1 are a step of 1.414, for optax and for us; before the partition, 1."""
    sgd = optax.sgd(-1.0)

    def partition(group):
        return optax.partition({"a": group, "b": group}, {"frozen": "a", "trained": "b"})

    optimizers = {
        "optax": partition(optax.chain(optax.clip_by_global_norm(1.0), sgd)),
        "ours": partition(optax.chain(clip_by_global_norm(1.0), sgd)),
        "before": optax.chain(clip_by_global_norm(1.0), partition(sgd)),
    }

    @jax.jit
    def step(grads):
        return {
            key: optimizer.update(grads, optimizer.init(grads))[0]
            for key, optimizer in optimizers.items()
        }

    norms = {key: joint(updates) for key, updates in step(TUNED).items()}
    assert norms == pytest.approx({"optax": np.sqrt(2), "ours": np.sqrt(2), "before": 1})


# Accumulation: two micro-batches for each step, some of which are not finite.

A, B, BAD = [3.0, 4.0], [5.0, 0.0], [np.nan, 4.0]
STEP_OF_A, STEP_OF_AB = [0.6, 0.8], np.array([4, 2]) / np.sqrt(20)


@functools.partial(jax.jit, static_argnums=0)
def scan_updates(optimizer, params, micro_batches):
    def body(state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return state, updates

    state, updates = jax.lax.scan(body, optimizer.init(params), micro_batches)
    return updates, state


def each_update(optimizer, *micro_batches):
    """The updates of all micro-batches, and the last state."""
    updates, state = scan_updates(optimizer, np.zeros(2, np.float32), np.array(micro_batches))
    return np.asarray(updates), state


def clip_and_step(*clips):
    return optax.chain(*(clips or [clip_by_global_norm(1.0)]), optax.sgd(-1.0))


def accumulated(inner, **options):
    return optax.MultiSteps(inner, 2, **options).gradient_transformation()


def skip_nonfinite(updates, gradient_step, params, axis_name=None):
    """For `should_skip_update_fn`: the same answer on all devices."""
    return ~jnp.isfinite(global_norm(updates, axis_name=axis_name)), ()


def test_the_clip_acts_once_on_the_accumulated_gradient(standard_promotion):
    """The mean of [100, 0] and [0, 1] is [50, 0.5]; clipped one by one they make [0.5, 0.5]."""
    micro_batches = [100.0, 0.0], [0.0, 1.0]
    updates, state = each_update(accumulated(clip_and_step()), *micro_batches)
    close(updates, [[0, 0], [0.99995, 0.0099995]])
    seen = gradclip_jax.metrics(state)
    close(seen["grad_norm"], np.hypot(50, 0.5))
    assert int(seen["step_count"]) == 1  # of two micro-batches
    each = optax.chain(clip_by_global_norm(1.0), accumulated(optax.sgd(-1.0)))
    close(each_update(each, *micro_batches)[0], [[0, 0], [0.5, 0.5]])


def test_a_schedule_behind_multi_steps_counts_real_steps(standard_promotion):
    optimizer = accumulated(clip_and_step(clip_by_global_norm(lambda count: 1.0 + count)))
    updates, _ = each_update(optimizer, *[[30.0, 40.0]] * 6)
    close(np.linalg.norm(updates, axis=1), [0, 1, 0, 2, 0, 3])


def test_a_skipped_micro_batch_is_as_if_it_had_never_been(standard_promotion):
    """Bit for bit: the next one takes its place."""
    ways = [
        accumulated(clip_and_step(), should_skip_update_fn=skip_nonfinite),
        accumulated(clip_and_step(), should_skip_update_fn=optax.skip_not_finite),
        optax.apply_if_finite(accumulated(clip_and_step()), 5),  # as it looks at what comes in
    ]
    for optimizer in ways:
        with_bad, state = each_update(optimizer, A, BAD, B, A, B)
        without, _ = each_update(optimizer, A, B, A, B, A)
        np.testing.assert_array_equal(with_bad[[0, 2, 3, 4]], without[:4])
        close(with_bad, [[0, 0], [0, 0], STEP_OF_AB, [0, 0], STEP_OF_AB])
        assert int(gradclip_jax.metrics(state)["step_count"]) == 2


def test_a_micro_batch_that_is_not_finite_may_count_as_zero(standard_promotion):
    """Bit for bit: a clip without a limit makes it zero before it is accumulated, and counts it."""
    optimizer = optax.chain(clip_by_global_norm(None), accumulated(clip_and_step()))
    with_bad, state = each_update(optimizer, A, BAD, A, B)
    with_zero, _ = each_update(optimizer, A, [0.0, 0.0], A, B)
    np.testing.assert_array_equal(with_bad, with_zero)
    close(with_bad, [[0, 0], STEP_OF_A, [0, 0], STEP_OF_AB])
    seen = gradclip_jax.metrics(state)
    assert (float(seen["grad_norm"]), int(seen["nonfinite_count"])) == (5.0, 1)  # micro-batches
    close(seen["clip_1/grad_norm"], np.sqrt(20))  # their mean
    assert int(seen["clip_1/nonfinite_count"]) == 0


def test_elements_that_are_not_finite_may_be_left_out_alone(standard_promotion):
    """The 4 beside the NaN counts: the mean of [3, 4] and [0, 4]."""
    optimizer = optax.chain(gradclip_jax.zero_nonfinite(), accumulated(clip_and_step()))
    updates, state = each_update(optimizer, A, BAD, A, B)
    close(updates[[1, 3]], [np.array([1.5, 4]) / np.hypot(1.5, 4), STEP_OF_AB])
    assert int(gradclip_jax.metrics(state)["nonfinite_count"]) == 1


def test_nan_in_the_accumulator_never_leaves_it(standard_promotion):
    """`MultiSteps` clears it by a product with 0, and 0 times NaN is NaN: no guard behind helps."""
    micro_batches = [A, BAD, *[A, B] * 4]

    def after(*inner):
        updates, state = each_update(accumulated(clip_and_step(*inner)), *micro_batches)
        return updates[2:], state

    poisoned, _ = after(optax.clip_by_global_norm(1.0))
    assert np.isnan(poisoned).all()  # between the steps as well
    frozen, state = after(clip_by_global_norm(1.0))
    assert (frozen == 0).all()
    seen = gradclip_jax.metrics(state)
    assert int(seen["nonfinite_count"]) == int(seen["step_count"]) == 5  # which tells
    # The quietest failure: one element never moves again, and all others look well.
    partly, _ = after(gradclip_jax.zero_nonfinite(), clip_by_global_norm(1.0))
    close(partly, [[0, 0], [0, 1]] * 4)
    refusing = accumulated(optax.apply_if_finite(clip_and_step(), 2))
    assert (each_update(refusing, *micro_batches)[0][2:] == 0).all()


def test_accumulation_by_scan_loses_one_step_and_no_more():
    """One clip for all micro-batches of a step; nothing of them is left for the next."""
    clip, each = clip_by_global_norm(1.0), clip_by_global_norm(None)

    @jax.jit
    def step(state, micro_batches, guard):
        def body(carry, gradient):
            total, seen = carry
            finite, seen = each.update(gradient, seen)
            return (total + jnp.where(guard, finite, gradient), seen), None

        start = (jnp.zeros(2), each.init(jnp.zeros(2)))
        (total, seen), _ = jax.lax.scan(body, start, micro_batches)
        updates, state = clip.update(total / len(micro_batches), state)
        return updates, state, seen.nonfinite_count

    updates, state, _ = step(clip.init(np.zeros(2)), np.array([[100.0, 0.0], [0.0, 1.0]]), False)
    close(updates, [0.99995, 0.0099995])
    updates, state, _ = step(state, np.array([A, BAD]), False)
    assert (updates.tolist(), int(state.nonfinite_count)) == ([0, 0], 1)
    updates, state, _ = step(state, np.array([A, B]), False)
    close(updates, STEP_OF_AB)
    # With the guard in the loop not even that step is lost.
    updates, state, count = step(state, np.array([A, BAD]), True)
    close(updates, STEP_OF_A)
    assert (int(count), int(state.nonfinite_count)) == (1, 1)


# Three micro-batches: the kernel has norm 4, with the bias 5; and there is a NaN on device 5.
SPLIT = {"kernel": np.full((3, 8), np.sqrt(2)), "bias": np.full((3, 1), 3.0)}
SPLIT["kernel"][1, 5] = np.nan
SPLIT_SPECS = {"kernel": P(None, "data"), "bias": P()}


@each_check
def test_a_micro_batch_with_nan_on_one_device_is_left_out_by_all(
    check_vma, mesh, standard_promotion
):
    axis_name = None if check_vma else MIXED_SPECS
    inner = clip_and_step(clip_by_global_norm(1.0, axis_name=axis_name))
    skip = functools.partial(skip_nonfinite, axis_name=axis_name)
    guard = clip_by_global_norm(None, axis_name=axis_name)
    optimizers = {
        "skip": accumulated(inner, should_skip_update_fn=skip),
        "zero": optax.chain(guard, accumulated(inner)),
    }

    def step(micro_batches):
        params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), micro_batches)
        return {
            key: scan_updates(optimizer, params, micro_batches)[0]
            for key, optimizer in optimizers.items()
        }

    out_specs = dict.fromkeys(optimizers, SPLIT_SPECS)
    results = on_devices(step, mesh, (SPLIT_SPECS,), out_specs, check_vma)(SPLIT)
    # A step of the first and third; or of the first with zeros, and the third waits.
    for key, steps in {"skip": [0, 0, 1], "zero": [0, 1, 0]}.items():
        assert len(copies(results[key]["bias"])) == 1
        close(results[key]["bias"], np.outer(steps, [0.6]))
        close(results[key]["kernel"], np.outer(steps, [np.sqrt(2) / 5] * 8))


def test_skip_not_finite_of_optax_does_not_ask_the_other_devices(mesh):
    """One device would skip while seven step, and wait for it in the collective for ever."""
    skips = {
        "optax": optax.skip_not_finite,
        "ours": functools.partial(skip_nonfinite, axis_name="data"),
    }

    def step(gradient):
        return {key: skip(gradient, jnp.int32(0), None)[0][None] for key, skip in skips.items()}

    answers = on_devices(step, mesh, (P("data"),), P("data"))(SPLIT["kernel"][1])
    assert np.flatnonzero(answers["optax"]).tolist() == [5]
    assert answers["ours"].tolist() == [True] * 8


# Host memory.

# Norms 3, 4 and 12; the first two in pinned host memory, sharded and replicated.
OFFLOADED = {
    "split": np.full((6, 6), 0.5),
    "whole": np.ones((4, 4)),
    "device": np.full((4, 4), 3.0),
}
OFFLOADED_SPECS = {"split": P("data", "model"), "whole": P(), "device": P("model")}


def offloaded(mesh):
    kinds = {"split": "pinned_host", "whole": "pinned_host", "device": "device"}
    return {
        name: jax.device_put(x, NamedSharding(mesh, OFFLOADED_SPECS[name], memory_kind=kinds[name]))
        for name, x in OFFLOADED.items()
    }


def assert_clipped_in_place(updates, norm, grads):
    assert float(norm) == 13.0
    for name, leaf in updates.items():
        close(leaf, OFFLOADED[name] / 13)
        assert leaf.sharding.is_equivalent_to(grads[name].sharding, leaf.ndim), name
        assert leaf.sharding.memory_kind == grads[name].sharding.memory_kind, name


@both_kinds
def test_sharded_leaves_in_host_memory_count_beside_those_on_devices(kind):
    mesh = make_mesh(kind, data=2, model=2)
    grads = offloaded(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(clipped, clip_by_global_norm(1.0)))
        compiled = step.lower(grads).compile()
        # optax does not add what lies in different memories.
        with pytest.raises(ValueError, match="memory_space of all inputs"):
            jax.eval_shape(optax.tree.norm, grads)
    assert_clipped_in_place(*compiled(grads), grads)
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in compiled.as_text()


@each_check
def test_leaves_in_host_memory_count_inside_shard_map(check_vma):
    mesh = make_mesh(data=2, model=2)
    grads = offloaded(mesh)
    clip = clip_by_global_norm(1.0, axis_name=None if check_vma else OFFLOADED_SPECS)
    specs = (OFFLOADED_SPECS,), (OFFLOADED_SPECS, P())
    result = on_devices(functools.partial(clipped, clip), mesh, *specs, check_vma)(grads)
    assert_clipped_in_place(*result, grads)


# Layers stacked by scan, of quite different size.

RNG = np.random.default_rng(0)
SIZES = 10.0 ** np.arange(4)
STACKED = {
    "kernel": RNG.normal(size=(4, 6, 2)) * SIZES[:, None, None],
    "bias": RNG.normal(size=(4, 2)) * SIZES[:, None],
}
LAYERS = [{name: leaf[i] for name, leaf in STACKED.items()} for i in range(4)]
STACKED_SPECS = {"kernel": P("data", "model"), "bias": P(None, "data")}  # along layers and others


def small(tree):
    """Weights for gradients."""
    return jax.tree.map(lambda x: 0.5 * np.sign(x), tree)


def clips_of_stacked(axis_name):
    return {
        "unit": gradclip_jax.clip_by_unit_norm(1.0, axes=(1, 2), axis_name=axis_name),
        "agc": gradclip_jax.adaptive_grad_clip(0.1, axes=1, axis_name=axis_name),
        "group": gradclip_jax.clip_by_group_norm(
            1.0, labels={"kernel": "k", "bias": "b"}, axis_name=axis_name
        ),
    }


@functools.cache
def clipped_layers():
    """What each of these clips makes of layers that are leaves of their own."""
    clips = {"unit": gradclip_jax.clip_by_norm(1.0), "agc": gradclip_jax.adaptive_grad_clip(0.1)}

    @jax.jit
    def step(grads, params):
        return {key: clipped(clip, grads, params)[0] for key, clip in clips.items()}

    layers = [step(layer, small(layer)) for layer in LAYERS]
    return {
        **jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
        "group": {name: leaf / joint(leaf) for name, leaf in STACKED.items()},
    }


@pytest.mark.parametrize("run", ["one device", "Explicit", "unchecked"])
def test_stacked_layers_are_clipped_as_layers_of_their_own(run):
    """Split along the layer axis or along another, too."""
    mesh = make_mesh(AxisType.Explicit if run == "Explicit" else AxisType.Auto, data=2, model=2)
    clips = clips_of_stacked(STACKED_SPECS if run == "unchecked" else None)

    def step(grads, params):
        return {key: clipped(clip, grads, params)[0] for key, clip in clips.items()}

    trees = STACKED, small(STACKED)
    if run == "unchecked":
        out_specs = dict.fromkeys(clips, STACKED_SPECS)
        step = on_devices(step, mesh, (STACKED_SPECS,) * 2, out_specs, check_vma=False)
    elif run == "Explicit":
        trees = [placed(tree, mesh, STACKED_SPECS) for tree in trees]
    with jax.set_mesh(mesh):
        results = jax.jit(step)(*trees)
    for key, expected in clipped_layers().items():
        for name in STACKED:
            close(results[key][name], expected[name])


def test_norms_of_stacked_layers():
    """Of each kernel in each layer; of each layer with all it has; and of all."""

    @jax.jit
    def norms(tree):
        of_kernels = unit_norms(tree, axes=(1, 2))["kernel"].ravel()
        of_layers = jax.vmap(global_norm)(tree)
        pooled = clipped(gradclip_jax.clip_by_norm(1.0), tree)[0]["kernel"]
        return of_kernels, of_layers, global_norm(of_layers), global_norm(tree), pooled

    of_kernels, of_layers, *of_all, pooled = norms(STACKED)
    close(of_kernels, [joint(layer["kernel"]) for layer in LAYERS])
    close(of_layers, [joint(layer) for layer in LAYERS])
    close(of_all, [joint(LAYERS)] * 2)
    # Pooled in one norm, the smallest layer keeps a thousandth of what it is due.
    assert joint(pooled[0]) < 2e-3
    assert joint(clipped_layers()["unit"]["kernel"][0]) == pytest.approx(1)


# Gradients that were not averaged: on even and odd devices; the mean is [3, 4], of norm 5.

UNEVEN = np.array([[6.0, 0.0], [0.0, 8.0]] * 4)


def test_the_mean_comes_before_the_clip():
    clip, all_sharded = (clip_by_global_norm(1.0, axis_name=name) for name in ((), "i"))

    def step(gradient):
        mean_first = clipped(clip, jax.lax.pmean(gradient, "i"))[0]
        clip_first = jax.lax.pmean(clipped(clip, gradient)[0], "i")
        return mean_first, clip_first, clipped(all_sharded, gradient)

    mean_first, clip_first, (as_one, norms) = jax.pmap(step, "i")(UNEVEN)
    close(mean_first, [[0.6, 0.8]] * 8)
    close(clip_first, [[0.5, 0.5]] * 8)  # another direction, and shorter: 0.71
    # Eight gradients behind each other, as if they were one that is split, have norm 20.
    close(norms, [20] * 8)
    close(as_one, UNEVEN / 20)


@pytest.mark.parametrize("run", ["pmap", "unchecked"])
def test_replicas_drift_apart_where_no_type_tells_that_gradients_differ(run):
    """Told that all is replicated, each device clips by its own norm."""
    clip = clip_by_global_norm(1.0, axis_name=())

    def params_after_ten_steps(gradient):
        def body(carry, _):
            params, state = carry
            updates, state = clip.update(gradient, state)
            return (params - updates, state), None

        start = (jnp.zeros(2), clip.init(gradient))
        return jax.lax.scan(body, start, length=10)[0][0]

    def step(gradient):
        gradient = gradient.reshape(2)
        mean = jax.lax.pmean(gradient, "i")
        return params_after_ten_steps(gradient)[None], params_after_ten_steps(mean)[None]

    mapped = jax.pmap(step, "i")
    if run == "unchecked":
        mapped = on_devices(step, make_mesh(i=8), (P("i"),), P("i"), check_vma=False)
    apart, together = (np.asarray(params).reshape(8, 2) for params in mapped(UNEVEN))
    close(apart, [[-10, 0], [0, -10]] * 4)  # and 14.1 from each other
    close(together, [[-6, -8]] * 8)
    assert len({params.tobytes() for params in together}) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda clip: optax.chain(clip, optax.sgd(1.0)),
        lambda clip: optax.MultiSteps(clip, 2),
        lambda clip: optax.partition({"all": clip}, "all"),
        lambda clip: optax.apply_if_finite(clip, 2),
    ],
    ids=["chain", "MultiSteps", "partition", "apply_if_finite"],
)
@both_kinds
def test_types_tell_through_wrappers_that_pass_the_params(wrap, kind, standard_promotion):
    optimizer = wrap(clip_by_global_norm(1.0))

    def step(params, batch):
        local = jax.lax.pcast(params, ("data",), to="varying")
        grads = jax.grad(lambda p: jnp.sum(p["w"] * batch.sum()))(local)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    mesh = make_mesh(kind, data=8)
    step = on_devices(step, mesh, (P(), P("data")), P())
    batch = placed(np.arange(8.0), mesh, P("data"))
    with pytest.raises(ValueError, match="the gradient of `w` is not averaged along mesh axis 'da"):
        jax.eval_shape(step, {"w": np.ones(2)}, batch)


def test_a_partial_sum_under_explicit_axes_is_to_be_resharded():
    """What the error advises, works: `psum` has no axis to sum over under `jit`."""
    mesh = make_mesh(AxisType.Explicit, x=8)
    clip = clip_by_global_norm(1.0)

    @functools.partial(jax.jit, static_argnums=2)
    def step(a, b, reduced):
        grads = {"w": jnp.einsum("ij,jk->ik", a, b, out_sharding=P(unreduced={"x"}))}
        grads = jax.reshard(grads, P()) if reduced else grads
        return clipped(clip, grads, {"w": jnp.zeros((1, 2))})

    with jax.set_mesh(mesh):
        a = placed(np.full((1, 8), 0.5), mesh, P(None, "x"))
        b = placed(np.array([[0.75, 1.0]] * 8), mesh, P("x"))
        message = r"\(unreduced\).*`jax\.lax\.psum.* In `jit` call `jax\.reshard\(grads, specs\)`\."
        with pytest.raises(ValueError, match=message):
            step(a, b, False)
        updates, norm = step(a, b, True)
    assert float(norm) == 5.0
    close(updates["w"], [[0.6, 0.8]])


# What is not finite on one device.


def test_a_clip_is_no_partial_update_where_one_device_has_nan(mesh, standard_promotion):
    """`optax.apply_if_finite` steps on seven devices of eight, and counts on one."""
    ways = {
        "optax": optax.apply_if_finite(optax.sgd(-1.0), 5),
        "ours": clip_and_step(clip_by_global_norm(1.0, axis_name="data")),
    }
    counters = {"optax": "total_notfinite", "ours": "nonfinite_count"}

    def step(gradient):
        results = {}
        for key, optimizer in ways.items():
            updates, state = optimizer.update(gradient, optimizer.init(gradient))
            results[key] = updates, optax.tree.get(state, counters[key])[None]
        return results

    step = on_devices(step, mesh, (P("data"),), P("data"), check_vma=False)
    results = {
        key: (updates.tolist(), counts.tolist())
        for key, (updates, counts) in step(np.array([1, 1, np.nan, 1, 1, 1, 1, 1])).items()
    }
    assert results["optax"] == ([1, 1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0])
    assert results["ours"] == ([0] * 8, [1] * 8)


@each_check
def test_a_nan_on_one_device_costs_its_group_the_update_and_no_other(check_vma, mesh):
    grads = {"bad": np.array([1, 1, np.nan, 1, 1, 1, 1, 1]), "good": np.full(8, np.sqrt(2))}
    clip = gradclip_jax.clip_by_norm(1.0, axis_name=None if check_vma else "data")

    def step(grads):
        updates, state = clip.update(grads, clip.init(grads))
        return updates, state.nonfinite_count[None]

    updates, counts = on_devices(step, mesh, (P("data"),), P("data"), check_vma)(grads)
    assert updates["bad"].tolist() == [0] * 8
    close(updates["good"], [np.sqrt(2) / 4] * 8)
    assert counts.tolist() == [1] * 8
