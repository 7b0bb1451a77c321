"""Reading clips out of any optimizer state."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import shard_map
from flax import nnx
from jax.sharding import PartitionSpec as P

import gradclip_jax
from gradclip_jax import metrics
from gradclip_jax._guards import skip_nonfinite, skip_spikes

GRADS = {"encoder": {"w": jnp.array([[3.0, 0.0], [4.0, 12.0]])}, "head": jnp.array([84.0])}
KEYS = [
    "grad_norm", "clip_limit", "clip_factor", "clipped",
    "clip_count", "nonfinite_count", "step_count",
]  # fmt: skip
SKIPS = ["skipped", "skip_count", "skips_in_a_row", "skip_limit"]


def after(optimizer, *updates):
    state = optimizer.init(GRADS)
    for update in updates:
        _, state = optimizer.update(update, state, GRADS)
    return state


def numbers(values):
    return {key: float(value) for key, value in values.items()}


def test_keys_and_values_of_a_global_clip():
    state = after(
        gradclip_jax.clip_by_global_norm(17.0), GRADS, jax.tree.map(lambda x: x / 100, GRADS), GRADS
    )
    seen = metrics(state)
    assert list(seen) == KEYS
    assert numbers(seen) == {
        "grad_norm": 85.0, "clip_limit": 17.0, "clip_factor": pytest.approx(0.2), "clipped": 1.0,
        "clip_count": 2, "nonfinite_count": 0, "step_count": 3,
    }  # fmt: skip
    assert all(np.shape(value) == () for value in seen.values())


def infinity_norm(updates, *, axis_name):
    """A measure of a user."""
    return gradclip_jax.global_norm(updates, order=np.inf, axis_name=axis_name)


NORMS = {
    "global": lambda: gradclip_jax.clip_by_global_norm(17.0),
    "order 2.0": lambda: gradclip_jax.clip_by_global_norm(17.0, order=2.0),
    "arrays": lambda: gradclip_jax.clip_by_norm(17.0),
    "units": lambda: gradclip_jax.clip_by_unit_norm(17.0),
    "groups": lambda: gradclip_jax.clip_by_group_norm(17.0, labels={"encoder": 0, "head": 1}),
    "root mean squares": lambda: gradclip_jax.clip_by_block_rms(17.0),
    "adagc": gradclip_jax.adagc,
    "adaptive_grad_clip": gradclip_jax.adaptive_grad_clip,
}
# The largest modulus is 84, the sum of moduli 103, the largest singular value of w 12.87.
MEASURES = {
    "value": (lambda: gradclip_jax.clip_by_value(21.0), 84),
    "range": (lambda: gradclip_jax.clip_by_range(-1.0, upper=21.0), 84),
    "order inf": (lambda: gradclip_jax.clip_by_global_norm(21.0, order=np.inf), 84),
    "order 1": (lambda: gradclip_jax.normalize_by_norm(21.0, order=1), 103),
    "arrays, order 1": (
        lambda: gradclip_jax.clip_to_limit(
            21.0, measure=functools.partial(gradclip_jax.leaf_norms, order=1)
        ),
        84,  # of 19 and 84 the largest
    ),
    "of a user": (lambda: gradclip_jax.clip_to_limit(21.0, measure=infinity_norm), 84),
    "spectral": (lambda: gradclip_jax.spectral_clip(21.0), 84),
    "dual": (
        lambda: gradclip_jax.clip_by_dual_norm(21.0, ball=gradclip_jax.balls.sign),
        103,
    ),
    "ratio": (gradclip_jax.spam_clip, 0),  # to what came before: nothing yet
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_what_is_a_norm_or_follows_from_norms_is_grad_norm(make):
    state = after(make(), GRADS)
    assert state.clip_measure is None
    seen = metrics(state)
    assert "clip_measure" not in seen
    assert float(seen["grad_norm"]) == pytest.approx(85, rel=1e-6)


@pytest.mark.parametrize(("make", "expected"), MEASURES.values(), ids=MEASURES)
def test_what_is_another_measure_is_clip_measure_and_of_several_the_largest(make, expected):
    state = after(make(), GRADS)
    assert state.grad_norm is None
    seen = metrics(state, per_group=True)
    assert list(seen)[:7] == ["clip_measure", *KEYS[1:]]
    assert not [key for key in seen if key.startswith("grad_norm")]
    assert float(seen["clip_measure"]) == pytest.approx(expected, rel=1e-6)


def test_each_group_has_its_other_measure():
    clip = gradclip_jax.clip_to_limit(
        21.0, measure=functools.partial(gradclip_jax.unit_norms, order=1)
    )
    seen = numbers(metrics(after(clip, GRADS), per_group=True))
    assert seen["clip_measure/encoder/w"] == 12  # columns of 7 and 12
    assert seen["clip_factor/head"] == 0.25
    assert seen["clipped"] == pytest.approx(1 / 3)


def test_a_guard_gives_the_norm_beside_another_measure():
    seen = numbers(metrics(after(skip_nonfinite(gradclip_jax.clip_by_value(21.0)), GRADS)))
    assert (seen["grad_norm"], seen["clip_measure"], seen["clip_limit"]) == (85, 84, 21)


def test_a_clip_holds_one_number_whatever_it_measures():
    """None is no leaf: neither memory nor a kernel."""
    for make in (gradclip_jax.clip_by_value, gradclip_jax.clip_by_global_norm):
        assert len(jax.tree.leaves(make(1.0).init(GRADS))) == 6


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_of_measures_that_devices_split_the_largest_of_all_is_told(check_vma, mesh):
    """Sums of moduli of eight columns: one has 20, the others 1."""
    specs = P(None, "data")
    measure = functools.partial(gradclip_jax.unit_norms, axes=0, order=1)
    clip = gradclip_jax.clip_to_limit(1.0, measure=measure, axis_name=specs)

    def update(grads):
        _, state = clip.update(grads, clip.init(grads))
        return metrics(state, axis_name=None if check_vma else specs)

    mapped = shard_map(update, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    seen = numbers(mapped(jnp.full((4, 8), 0.25).at[:, 3].set(5.0)))
    assert (seen["clip_measure"], seen["clip_factor"]) == (20, pytest.approx(0.05))


def test_with_groups_the_norm_is_global_the_factor_smallest_and_clipped_a_fraction():
    seen = numbers(metrics(after(gradclip_jax.clip_by_norm(42.0), GRADS)))
    assert seen["grad_norm"] == 85.0
    assert seen["clip_factor"] == 0.5
    assert seen["clip_limit"] == 42.0
    assert seen["clipped"] == 0.5
    assert seen["clip_count"] == 1


def test_each_group_is_keyed_by_its_path():
    seen = numbers(metrics(after(gradclip_jax.clip_by_norm(42.0), GRADS), per_group=True))
    assert seen["grad_norm/encoder/w"] == 13.0
    assert seen["grad_norm/head"] == 84.0
    assert seen["clip_factor/head"] == 0.5
    assert seen["clip_limit/encoder/w"] == 42.0
    labels = {"encoder": "body", "head": "head"}
    grouped = after(gradclip_jax.clip_by_group_norm(42.0, labels=labels), GRADS)
    assert numbers(metrics(grouped, per_group=True))["grad_norm/body"] == 13.0


def test_units_are_summed_up_for_each_array():
    seen = numbers(metrics(after(gradclip_jax.clip_by_unit_norm(6.0), GRADS), per_group=True))
    assert seen["grad_norm/encoder/w"] == 13.0
    assert seen["clip_factor/encoder/w"] == 0.5
    assert seen["clipped"] == pytest.approx(2 / 3)


def test_a_single_group_has_no_entries_of_its_own():
    state = after(gradclip_jax.clip_by_global_norm(1.0), GRADS)
    assert list(metrics(state, per_group=True)) == KEYS


@pytest.mark.parametrize(
    "wrap",
    [
        lambda clip: optax.chain(clip, optax.sgd(0.1)),
        lambda clip: optax.chain(optax.trace(0.9), optax.chain(clip, optax.scale(-1.0))),
        lambda clip: optax.MultiSteps(optax.chain(clip, optax.sgd(0.1)), 1),
        lambda clip: optax.apply_if_finite(optax.chain(clip, optax.sgd(0.1)), 5),
        lambda clip: optax.masked(clip, True),
        lambda clip: optax.partition({"a": clip}, "a"),
        lambda clip: optax.named_chain(("clip", clip), ("sgd", optax.sgd(0.1))),
    ],
)
def test_a_clip_is_found_anywhere(wrap, standard_promotion):
    seen = metrics(after(wrap(gradclip_jax.clip_by_global_norm(17.0)), GRADS))
    assert float(seen["grad_norm"]) == 85.0


def test_a_clip_is_found_under_injected_hyperparameters():
    make = optax.inject_hyperparams(gradclip_jax.clip_by_global_norm)
    assert float(metrics(after(make(max_norm=17.0), GRADS))["grad_norm"]) == 85.0


@pytest.mark.parametrize("make", [gradclip_jax.clip_by_global_norm, gradclip_jax.clip_by_norm])
def test_a_clip_is_found_in_an_nnx_optimizer(make, standard_promotion):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(make(1.0), optax.adam(1e-3)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
        optimizer.update(model, grads)
        return metrics(optimizer.opt_state, per_group=True)

    inside = step(model, optimizer, jnp.ones((4, 2)))
    outside = metrics(optimizer, per_group=True)
    assert numbers(inside) == pytest.approx(numbers(outside))
    assert outside["grad_norm"] > 1
    assert int(outside["step_count"]) == 1
    if make is gradclip_jax.clip_by_norm:
        assert {"grad_norm/kernel", "grad_norm/bias"} <= set(outside)


VALUE, GLOBAL = gradclip_jax.clip_by_value(42.0), gradclip_jax.clip_by_global_norm(17.0)


def test_several_clips_are_numbered_in_the_order_of_the_chain():
    """The plain keys are those of the first, which `clip_0` says too."""
    seen = numbers(metrics(after(optax.chain(VALUE, GLOBAL), GRADS)))
    first = ["clip_measure", *KEYS[1:]]
    assert list(seen) == [
        *first, *(f"clip_0/{key}" for key in first), *(f"clip_1/{key}" for key in KEYS)
    ]  # fmt: skip
    assert seen["clip_measure"] == seen["clip_0/clip_measure"] == 84.0
    assert seen["clip_limit"] == seen["clip_0/clip_limit"] == 42.0
    assert seen["clip_1/grad_norm"] == pytest.approx(np.hypot(13, 42))
    assert seen["clip_1/clip_limit"] == 17.0


def norms_by_name(state, **options):
    """The last part of each key that ends in `grad_norm` goes; the plain key is the empty name."""
    seen = numbers(metrics(state, **options))
    return {
        key.removesuffix("grad_norm").removesuffix("/"): value
        for key, value in seen.items()
        if key.endswith("grad_norm")
    }


# The norms that clips of 17 and of 5 see of a gradient of norm 85.
SCALE = optax.scale(0.5)
SECOND = gradclip_jax.clip_by_global_norm(5.0)
NAMED = {
    "chain": (lambda: optax.chain(GLOBAL, SECOND), {"": 85, "clip_0": 85, "clip_1": 17}),
    "alone in a named chain": (
        lambda: optax.named_chain(("body", GLOBAL), ("half", SCALE)),
        {"": 85},
    ),
    "named chain": (
        lambda: optax.named_chain(("a", GLOBAL), ("b", SCALE), ("c", SECOND)),
        {"": 85, "a": 85, "c": 8.5},
    ),
    "in the order of their names": (
        lambda: optax.named_chain(("z", GLOBAL), ("a", SECOND)),
        {"": 17, "a": 17, "z": 85},
    ),
    "two under one name": (
        lambda: optax.named_chain(("a", optax.chain(GLOBAL, SCALE, SECOND)), ("b", SECOND)),
        {"": 85, "a/clip_0": 85, "a/clip_1": 8.5, "b": 5},
    ),
    "named within a chain": (
        lambda: optax.chain(GLOBAL, optax.named_chain(("a", SECOND)), SECOND),
        {"": 85, "clip_0": 85, "a": 17, "clip_1": 5},
    ),
    "named twice": (
        lambda: optax.named_chain(
            ("outer", optax.named_chain(("a", GLOBAL), ("b", SECOND))), ("then", SCALE)
        ),
        {"": 85, "outer/a": 85, "outer/b": 17},
    ),
    "injected": (
        lambda: optax.named_chain(
            ("a", optax.inject_hyperparams(gradclip_jax.clip_by_global_norm)(max_norm=17.0)),
            ("b", SECOND),
        ),
        {"": 85, "a": 85, "b": 17},
    ),
    "partition": (
        lambda: optax.partition({"x": GLOBAL, "y": SECOND}, {"encoder": "x", "head": "y"}),
        {"": 13, "x": 13, "y": 84},
    ),
    "accumulated": (
        lambda: optax.MultiSteps(optax.named_chain(("a", GLOBAL), ("b", SECOND)), 1),
        {"": 85, "a": 85, "b": 17},
    ),
    "within a guard": (
        lambda: skip_nonfinite(optax.named_chain(("a", SCALE), ("b", GLOBAL), ("c", SECOND))),
        {"": 85, "b": 42.5, "c": 17},
    ),
}


@pytest.mark.parametrize(("make", "expected"), NAMED.values(), ids=NAMED)
def test_each_of_several_clips_has_its_name(make, expected, standard_promotion):
    optimizer = make()
    state = after(optimizer, GRADS)
    assert norms_by_name(state) == pytest.approx(expected)
    # As it comes out of jit, where the keys of a dict are sorted, and as a state dict of flax.
    same = jax.jit(lambda state: state)(state)
    assert norms_by_name(same) == pytest.approx(expected)
    as_dict = flax.serialization.to_state_dict(state)
    assert norms_by_name(as_dict) == pytest.approx(expected)
    assert norms_by_name({"opt_state": as_dict, "step": 1}) == pytest.approx(expected)


def test_optimizers_in_a_dict_have_their_names():
    states = {"actor": after(GLOBAL, GRADS), "critic": after(optax.chain(SCALE, GLOBAL), GRADS)}
    assert norms_by_name(states) == {"": 85, "actor": 85, "critic": 42.5}


def test_groups_stand_under_the_name_of_their_clip():
    chain = optax.named_chain(("a", GLOBAL), ("b", gradclip_jax.clip_by_norm(42.0)))
    seen = numbers(metrics(after(chain, GRADS), per_group=True))
    assert seen["b/grad_norm/head"] == pytest.approx(84 / 5)
    assert seen["b/clip_limit/encoder/w"] == 42
    assert "grad_norm/head" not in seen


def test_what_a_guard_zeroed_is_counted_with_what_the_clip_did():
    broken = {**GRADS, "head": jnp.array([jnp.nan])}
    chain = optax.chain(gradclip_jax.zero_nonfinite(), gradclip_jax.clip_by_global_norm(1.0))
    seen = numbers(metrics(after(chain, broken, GRADS, broken)))
    assert seen["nonfinite_count"] == 2
    assert seen["grad_norm"] == 13.0
    assert numbers(metrics(after(gradclip_jax.zero_nonfinite(), broken))) == {
        "nonfinite_count": 1, "step_count": 1,
    }  # fmt: skip


def test_a_guard_tells_what_it_skipped_and_counts_what_never_reached_the_clip():
    broken = {**GRADS, "head": jnp.array([jnp.nan])}
    chain = optax.chain(gradclip_jax.clip_by_global_norm(17.0), optax.sgd(0.1))
    guard = skip_spikes(skip_nonfinite(chain), grad_norm=100.0)
    huge = jax.tree.map(lambda x: x * 2, GRADS)
    seen = numbers(metrics(after(guard, GRADS, broken, huge)))
    assert list(seen) == [
        *KEYS, *SKIPS,
        *(f"skip_0/{key}" for key in SKIPS), *(f"skip_1/{key}" for key in SKIPS),
    ]  # fmt: skip
    assert (seen["skip_0/skipped"], seen["skip_1/skipped"]) == (1, 0)
    assert (seen["skip_0/skip_count"], seen["skip_1/skip_count"]) == (2, 0)
    assert (seen["skipped"], seen["skip_count"], seen["skips_in_a_row"]) == (1, 2, 2)
    assert (seen["skip_limit"], seen["grad_norm"]) == (100.0, 170.0)
    assert (seen["nonfinite_count"], seen["step_count"], seen["clip_count"]) == (1, 3, 1)
    alone = numbers(metrics(after(skip_nonfinite(optax.sgd(0.1)), GRADS, broken)))
    assert (alone["skip_count"], alone["step_count"], alone["nonfinite_count"]) == (1, 2, 1)


def test_a_state_without_a_clip_raises(standard_promotion):
    with pytest.raises(
        ValueError, match="`opt_state` must hold the state of a clip; there is none"
    ):
        metrics(optax.adam(1e-3).init(GRADS))


def test_the_global_norm_of_groups_does_not_overflow():
    huge = jax.tree.map(lambda x: x * 1e30, GRADS)
    assert float(
        metrics(after(gradclip_jax.clip_by_norm(1.0), huge))["grad_norm"]
    ) == pytest.approx(85e30)


def test_metrics_run_inside_scan():
    clip = gradclip_jax.clip_by_norm(42.0)

    def body(state, scale):
        _, state = clip.update(jax.tree.map(lambda x: x * scale, GRADS), state)
        return state, metrics(state)["grad_norm"]

    _, norms = jax.lax.scan(body, clip.init(GRADS), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(norms, [85.0, 170.0, 255.0])


def test_of_units_in_several_arrays_the_factor_is_the_smallest():
    state = after(gradclip_jax.clip_by_unit_norm(6.0), GRADS)  # norms 5 and 12, and 84
    assert numbers(gradclip_jax.metrics(state))["clip_factor"] == pytest.approx(6 / 84)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_metrics_of_units_that_devices_split_are_those_of_all(check_vma, mesh):
    """In seven columns the norm is 0.5, in one 10; the bias, of norm 2, is on all devices."""
    specs = {"w": P(None, "data"), "b": P()}
    clip = gradclip_jax.clip_by_unit_norm(1.0, axes=0, axis_name=specs)
    grads = {"w": jnp.full((4, 8), 0.25).at[:, 3].set(5.0), "b": jnp.full(4, 1.0)}

    def update(grads):
        _, state = clip.update(grads, clip.init(grads))
        said = None if check_vma else specs
        return metrics(state, axis_name=said), metrics(state, axis_name=said, per_group=True)

    mapped = shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=check_vma)
    seen, each = map(numbers, mapped(grads))
    assert seen["grad_norm"] == pytest.approx(np.sqrt(7 * 0.25 + 100 + 4))
    assert seen["clip_factor"] == pytest.approx(0.1)
    assert seen["clipped"] == pytest.approx(2 / 9)
    assert each["grad_norm/w"] == pytest.approx(np.sqrt(7 * 0.25 + 100))
    assert each["clip_factor/b"] == pytest.approx(0.5)


def test_metrics_of_split_units_are_those_of_all_outside_the_region(mesh):
    specs = P(None, "data")
    clip = gradclip_jax.clip_by_unit_norm(1.0, axis_name=specs)
    grads = jnp.ones((4, 8)).at[:, 3].set(5.0)
    of_state = jax.tree.map(lambda x: P(), clip.init(jnp.ones((4, 1))))
    of_state = of_state._replace(grad_norm=specs, clip_limit=specs, clip_factor=specs)

    def update(grads):
        return clip.update(grads, clip.init(grads))[1]

    state = shard_map(update, mesh=mesh, in_specs=specs, out_specs=of_state, check_vma=False)(grads)
    seen = gradclip_jax.metrics(state)
    assert float(seen["grad_norm"]) == pytest.approx(np.sqrt(7 * 4 + 100))
    assert float(seen["clip_factor"]) == pytest.approx(0.1)
    assert float(seen["clipped"]) == 1.0


GUARDED = {
    "skip_nonfinite": lambda: skip_nonfinite(gradclip_jax.clip_by_norm(17.0)),
    "skip_spikes": lambda: skip_spikes(
        optax.sgd(1.0), grad_norm=gradclip_jax.limits.median(window=4)
    ),
    "zero_nonfinite": gradclip_jax.zero_nonfinite,
    "both": lambda: optax.chain(
        gradclip_jax.zero_nonfinite(), skip_nonfinite(gradclip_jax.clip_by_global_norm(17.0))
    ),
    "units": lambda: gradclip_jax.clip_by_unit_norm(17.0),
    "spectral": lambda: gradclip_jax.spectral_clip(17.0),
}


@pytest.mark.parametrize("make", GUARDED.values(), ids=GUARDED)
def test_metrics_move_nothing_to_the_device(make):
    state = after(make(), GRADS)
    expected = numbers(metrics(state, per_group=True))
    with jax.transfer_guard("disallow"):
        seen = metrics(state, per_group=True)
    assert numbers(seen) == expected


@pytest.mark.parametrize("name", [*GUARDED, "clip_by_norm", "zclip", "error_feedback"])
def test_a_state_that_became_a_dict_tells_the_same(name, standard_promotion):
    others = {
        "clip_by_norm": lambda: gradclip_jax.clip_by_norm(1.0),
        "zclip": gradclip_jax.zclip,
        "error_feedback": lambda: gradclip_jax.error_feedback(gradclip_jax.clip_by_norm(1.0)),
    }
    clip = (GUARDED | others)[name]()
    # Of twelve parts the strings of their numbers sort in another order than they stood.
    parts = [optax.trace(0.9), clip, *[optax.identity()] * 8, optax.clip(1.0)]
    chain = optax.chain(*parts, gradclip_jax.clip_by_value(42.0), optax.adam(1e-3))
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    grads = nnx.grad(lambda model: (model(jnp.ones((4, 2))) ** 2).sum())(model)
    optimizer.update(model, grads)
    expected = numbers(metrics(optimizer, per_group=True))
    of_nnx = nnx.state(optimizer)
    as_dict = flax.serialization.to_state_dict(nnx.to_pure_dict(nnx.state(optimizer)))
    for state in (of_nnx, nnx.to_pure_dict(of_nnx), as_dict):
        assert numbers(metrics(state, per_group=True)) == expected
    plain = chain.init(GRADS)
    saved = flax.serialization.to_state_dict(plain)
    assert numbers(metrics(saved)) == numbers(metrics(plain))
