"""The norm of every array, or of every layer of a stack, behind a clip of something larger."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, shard_map
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import gradclip_jax
from gradclip_jax import (
    clip_by_global_norm,
    clip_by_group_norm,
    clip_to_limit,
    given_norm,
    group_norms,
    leaf_norms,
    metrics,
    unit_norms,
)
from gradclip_jax._per_layer import _of_layers

# Layers of norm 5 and 12, of 0 and 84; a head of 0. Together 85.
GRADS = {
    "blocks": {
        "w": jnp.array([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 12.0], [0.0, 0.0]]]),
        "b": jnp.array([[0.0, 0.0], [0.0, 84.0]]),
    },
    "head": jnp.array([0.0]),
}
ARRAYS = {"grad_norm/blocks/b": 84, "grad_norm/blocks/w": 13, "grad_norm/head": 0}
LAYERS = {
    "grad_norm/blocks/b/0": 0,
    "grad_norm/blocks/b/1": 84,
    "grad_norm/blocks/w/0": 5,
    "grad_norm/blocks/w/1": 12,
}
each_check = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])


def stacked(path, leaf):
    """What `nnx.scan` and `nn.scan` make: layers along the first axis of all in `blocks`."""
    return 0 if path.startswith("blocks") else None


def once(clip, grads=GRADS):
    return clip.update(grads, clip.init(grads))


def norms_of(state, **options):
    """All entries of the metrics that have a path."""
    return {
        key: float(value)
        for key, value in metrics(state, per_layer=True, **options).items()
        if key.startswith("grad_norm/")
    }


CLIPS = {
    "global": functools.partial(clip_by_global_norm, 17.0),
    "normalised": functools.partial(gradclip_jax.normalize_by_norm, 17.0),
    "zclip": gradclip_jax.zclip,
    "autoclip": gradclip_jax.autoclip,
    "groups": functools.partial(
        clip_by_group_norm, 17.0, labels={"blocks": {"w": "x", "b": "y"}, "head": "x"}
    ),
    "labels of shapes": functools.partial(
        clip_by_group_norm, 17.0, labels=lambda tree: jax.tree.map(lambda x: str(x.shape), tree)
    ),
    "arrays": functools.partial(clip_to_limit, 17.0, measure=leaf_norms),
}


@pytest.mark.parametrize("make", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("per_layer", [True, stacked], ids=["arrays", "layers"])
def test_the_norms_are_listed_and_the_clip_is_the_same(make, per_layer):
    clip = make(per_layer=per_layer)
    updates, state = once(clip)
    assert norms_of(state) == ARRAYS | (LAYERS if per_layer is stacked else {})
    expected, plain = once(make())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)
    for field in ("grad_norm", "clip_limit", "clip_factor"):
        pair = getattr(state, field), getattr(plain, field)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *pair)
    assert jax.tree.map(jax.typeof, clip.init(GRADS)) == jax.tree.map(jax.typeof, state)


def test_a_clip_without_them_holds_none_and_says_how_to_get_them():
    for clip in (
        clip_by_global_norm(1.0),
        clip_by_group_norm(1.0, labels={"blocks": "x", "head": "y"}),
        gradclip_jax.clip_by_value(1.0),
        gradclip_jax.skip_nonfinite(optax.scale(1.0)),
    ):
        _, state = once(clip)
        assert getattr(state, "layer_norms", None) is None
        with pytest.raises(ValueError, match=r"build the clip with `per_layer=True`"):
            metrics(state, per_layer=True)


@pytest.mark.parametrize(
    "clip",
    [
        gradclip_jax.clip_by_norm(1.0),
        gradclip_jax.clip_by_block_rms(1.0),
        gradclip_jax.adagc(),
        gradclip_jax.limit_norm_growth(),
        gradclip_jax.clip_by_unit_norm(1.0),
        gradclip_jax.clip_by_unit_norm(1.0, axes=(1, 2)),
    ],
)
def test_a_clip_that_measures_each_array_needs_no_more(clip):
    _, state = once(clip)
    assert jax.tree.leaves(state.layer_norms) == []
    assert norms_of(state) == pytest.approx(ARRAYS)


def test_adaptive_grad_clip_measures_each_array():
    clip = gradclip_jax.adaptive_grad_clip(1.0)
    _, state = clip.update(GRADS, clip.init(GRADS), GRADS)
    assert norms_of(state) == pytest.approx(ARRAYS)


def test_an_array_alone_and_a_stack_alone():
    assert norms_of(once(clip_by_global_norm(1.0, per_layer=True), jnp.array([3.0, 4.0]))[1]) == {}
    clip = clip_by_global_norm(1.0, per_layer=lambda path, leaf: -1)
    _, state = once(clip, jnp.array([[3.0, 0.0], [4.0, 12.0]]))
    assert norms_of(state) == {"grad_norm/0": 5, "grad_norm/1": 12}
    # Scalars that are stacked are layers of one element.
    _, state = once(clip_by_global_norm(1.0, per_layer=lambda path, leaf: 0), jnp.array([3.0, 4.0]))
    assert norms_of(state) == {"grad_norm/0": 3, "grad_norm/1": 4}
    assert norms_of(once(clip_by_global_norm(1.0, per_layer=True), {})[1]) == {}


def test_what_is_no_gradient_has_no_norm():
    tree = {"key": jax.random.key(0), "int": jnp.arange(3), "none": None, "w": jnp.array([3.0, 4])}
    tree |= {"empty": jnp.zeros((2, 0))}
    labels = {"key": "a", "int": "b", "none": "a", "w": "a", "empty": "b"}
    seen = []

    def axis(path, leaf):
        seen.append((path, leaf.shape))
        return 0 if path == "empty" else None

    for clip in (
        clip_by_global_norm(1.0, per_layer=axis),
        clip_by_group_norm(1.0, labels=labels, per_layer=axis),
        clip_to_limit(1.0, measure=leaf_norms, per_layer=axis),
    ):
        updates, state = once(clip, tree)
        np.testing.assert_allclose(updates["w"], [0.6, 0.8], rtol=1e-6)
        layers = {f"grad_norm/empty/{i}": 0 for i in range(2)}
        assert norms_of(state) == {"grad_norm/empty": 0, "grad_norm/w": 5} | layers
    assert set(seen) == {("empty", (2, 0)), ("w", (2,))}


@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e36])
@pytest.mark.parametrize("per_layer", [True, stacked], ids=["arrays", "layers"])
def test_squares_may_overflow_and_underflow(scale, per_layer):
    grads = jax.tree.map(lambda x: x * scale, GRADS)
    _, state = once(clip_by_global_norm(1.0, per_layer=per_layer), grads)
    assert float(state.grad_norm) == pytest.approx(85 * scale, rel=1e-6)
    assert norms_of(state)["grad_norm/blocks/w"] == pytest.approx(13 * scale, rel=1e-6)


def test_a_nan_shows_in_its_layer_alone():
    grads = GRADS["blocks"] | {"w": GRADS["blocks"]["w"].at[1, 0, 0].set(jnp.nan)}
    updates, state = once(clip_by_global_norm(17.0, per_layer=lambda path, leaf: 0), grads)
    np.testing.assert_array_equal(updates["b"], 0)
    seen = norms_of(state)
    assert {key for key, norm in seen.items() if np.isnan(norm)} == {"grad_norm/w", "grad_norm/w/1"}
    assert (seen["grad_norm/w/0"], int(state.nonfinite_count)) == (5, 1)


def test_float16_and_complex_arrays_count_in_float32():
    """In float16 squares overflow from 256, and so does the norm of 84,000."""
    grads = {"h": jnp.full((2, 4), 42_000, jnp.float16), "z": jnp.array([3 + 4j])}
    _, state = once(clip_by_global_norm(1.0, per_layer=lambda path, leaf: 0), grads)
    seen = norms_of(state)
    assert seen["grad_norm/h/1"] == pytest.approx(84_000, rel=1e-3)
    assert seen["grad_norm/z/0"] == 5
    assert {x.dtype for x in jax.tree.leaves(state.layer_norms)} == {jnp.dtype(jnp.float32)}


def reads(clip, grads):
    """How often what XLA is given sums over arrays of 64 x 64, with and without `per_layer`."""
    text = jax.jit(clip.update).lower(grads, clip.init(grads)).as_text()
    return len(re.findall(r"stablehlo.reduce\(.*tensor<4x64x64xf32>", text))


@pytest.mark.parametrize("per_layer", [True, lambda path, leaf: 0], ids=["arrays", "layers"])
def test_the_gradients_are_read_once(per_layer):
    """Once in the plain sum, and once in the branch that runs where that is not exact."""
    grads = {name: jnp.ones((4, 64, 64)) for name in "abc"}
    assert reads(clip_by_global_norm(1.0), grads) == 2 * 3
    assert reads(clip_by_global_norm(1.0, per_layer=per_layer), grads) == 2 * 3


def test_eager_updates_share_one_compiled_program_whatever_the_number_of_arrays():
    clip = clip_by_global_norm(1.0, per_layer=lambda path, leaf: 0)
    grads = {str(i): jnp.ones((2, 3)) for i in range(50)}
    before, state = _of_layers._cache_size(), clip.init(grads)
    for _ in range(3):
        _, state = clip.update(grads, state)
    assert _of_layers._cache_size() == before + 1


def test_a_step_with_a_donated_state_scans_and_traces_once():
    clip = clip_by_global_norm(17.0, per_layer=stacked)
    step = jax.jit(clip.update, donate_argnums=1)
    state = clip.init(GRADS)
    for _ in range(3):
        _, state = step(GRADS, state)
    assert step._cache_size() == 1
    assert norms_of(state) == ARRAYS | LAYERS

    def body(state, scale):
        _, state = clip.update(jax.tree.map(lambda x: x * scale, GRADS), state)
        return state, metrics(state, per_layer=True)["grad_norm/blocks/w/1"]

    _, norms = jax.lax.scan(body, state, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(norms, [12, 24])


@pytest.mark.parametrize("per_layer", [True, stacked], ids=["arrays", "layers"])
def test_the_derivative_is_that_of_the_clip(per_layer):
    """Also where a layer is zero, and where all are: there the clip is the identity."""

    def through(clip):
        return lambda grads: sum(
            jnp.sum(x * (1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)))
            for x in jax.tree.leaves(clip.update(grads, clip.init(grads))[0])
        )

    for scale in (1.0, 0.0):
        grads = jax.tree.map(lambda x, scale=scale: x * scale, GRADS)
        found = jax.grad(through(clip_by_global_norm(17.0, per_layer=per_layer)))(grads)
        expected = jax.grad(through(clip_by_global_norm(17.0)))(grads)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, found, expected)


BAD = {
    "units": (unit_norms, r"got the measure unit_norms\."),
    "order": (
        functools.partial(leaf_norms, order=1), r"got the measure leaf_norms, order=1\. To measure"
    ),
    "given": (given_norm("n"), r"got the measure GivenNorm\(name='n'\)\."),
    "of a user": (lambda updates, *, axis_name: jnp.float32(1), r"got the measure <lambda>\."),
}  # fmt: skip


@pytest.mark.parametrize(("measure", "message"), BAD.values(), ids=BAD)
def test_a_measure_without_norms_of_arrays_raises_at_the_door(measure, message):
    with pytest.raises(ValueError, match=f"^`per_layer` must be False unless .* {message}"):
        clip_to_limit(1.0, measure=measure, per_layer=True)
    with pytest.raises(ValueError, match=r"`per_layer` must be False .* global_norm, order=inf\. "):
        clip_by_global_norm(1.0, order=float("inf"), per_layer=True)


def test_the_fix_that_the_error_names_works():
    first = clip_by_global_norm(None, per_layer=True)
    _, state = once(optax.chain(first, gradclip_jax.clip_by_value(1.0)))
    assert norms_of(state) == ARRAYS
    seen = metrics(state, per_layer=True)
    assert float(seen["clip_0/grad_norm/blocks/w"]) == 13
    assert not any(key.startswith("clip_1/grad_norm") for key in seen)


@pytest.mark.parametrize("per_layer", [1, None, "layers", lambda: 0, jnp.bool_(True)])
def test_anything_else_raises_at_the_door(per_layer):
    with pytest.raises(ValueError, match=r"^`per_layer` must be True, False, or a function"):
        clip_by_global_norm(1.0, per_layer=per_layer)


@pytest.mark.parametrize("axis", [2, -3, False, "0", (0,)])
def test_an_axis_that_an_array_does_not_have_is_named(axis):
    clip = clip_by_global_norm(1.0, per_layer=lambda path, leaf: axis)
    with pytest.raises(
        ValueError, match=r"`per_layer` must return an axis .* for `w` of shape \(2"
    ):
        clip.init({"w": jnp.ones((2, 3))})


def test_it_passes_through_injection():
    make = optax.inject_hyperparams(clip_by_global_norm)
    assert norms_of(once(make(17.0, per_layer=True))[1]) == ARRAYS
    make = optax.inject_hyperparams(clip_by_global_norm, static_args="per_layer")
    assert norms_of(once(make(17.0, per_layer=stacked))[1]) == ARRAYS | LAYERS


def test_a_state_with_norms_of_other_layers_raises():
    """A clip that left them alone would show old norms for ever."""
    makers = [
        clip_by_global_norm(1.0),
        clip_by_global_norm(1.0, per_layer=True),
        clip_by_global_norm(1.0, per_layer=stacked),
    ]
    for i, old in enumerate(makers):
        for j, new in enumerate(makers):
            if i != j:
                with pytest.raises(ValueError, match="`state` come from this clip"):
                    new.update(GRADS, old.init(GRADS))


# On many devices: norms of layers 1, 2, …, 8 times 5 in `w`, of 0 but the last in `b`.

STACK = {
    "w": jnp.arange(1.0, 9.0)[:, None, None] * jnp.array([[3.0, 0.0], [0.0, 4.0]]),
    "b": jnp.zeros((8, 2)).at[7].set(jnp.array([6.0, 8.0])),
    "head": jnp.arange(8.0),
}
SPECS = {
    "layers": {"w": P("data"), "b": P("data"), "head": P()},
    "layers of one": {"w": P("data"), "b": P(), "head": P("data")},
    "none": {"w": P(), "b": P(), "head": P()},
}


def layer_axis(path, leaf):
    assert leaf.shape[0] == 8, "the shape over all devices"
    return None if path == "head" else 0


def expected_norms():
    layers = {f"grad_norm/w/{i}": 5.0 * (i + 1) for i in range(8)}
    layers |= {f"grad_norm/b/{i}": 10.0 * (i == 7) for i in range(8)}
    whole = {"grad_norm/w": 5 * np.sqrt(204), "grad_norm/b": 10, "grad_norm/head": np.sqrt(140)}
    return whole | layers


MANY = {
    "global": clip_by_global_norm,
    "groups": functools.partial(clip_by_group_norm, labels={"w": "x", "b": "x", "head": "y"}),
    "arrays": functools.partial(clip_to_limit, measure=leaf_norms),
}


def check(updates, state, make):
    assert norms_of(state) == pytest.approx(expected_norms(), rel=1e-6)
    expected, plain = once(make(7.0), STACK)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, updates, expected)
    jax.tree.map(close, state.grad_norm, plain.grad_norm)
    assert (int(state.clip_count), int(state.step_count)) == (1, 1)


@each_check
@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_devices_may_split_the_layers(specs, make, check_vma, mesh):
    clip = make(7.0, per_layer=layer_axis, axis_name=specs)
    of_layers = {"w": specs["w"], "b": specs["b"], "head": P()}
    state = jax.tree.map(lambda x: P(), jax.eval_shape(clip.init, STACK))
    out = specs, state._replace(layer_norms=of_layers)
    mapped = shard_map(
        functools.partial(once, clip),
        mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=check_vma,
    )  # fmt: skip
    check(*mapped(STACK), make)


@each_check
@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
def test_devices_may_split_within_layers(make, check_vma, mesh):
    """Then each device has part of every layer, and the norms are reduced over all."""
    grads = {"w": jnp.tile(STACK["w"], (1, 4, 1)), "head": STACK["head"]}
    specs = {"w": P(None, "data"), "head": P("data")}
    labels = {"labels": {"w": "x", "head": "y"}} if make is MANY["groups"] else {}
    clip = make(7.0, per_layer=layer_axis, axis_name=specs, **labels)
    mapped = shard_map(
        lambda grads: (once(clip, grads)[0], metrics(once(clip, grads)[1], per_layer=True)),
        mesh=mesh, in_specs=(specs,), out_specs=(specs, P()), check_vma=check_vma,
    )  # fmt: skip
    updates, seen = mapped(grads)
    assert float(seen["grad_norm/w/7"]) == pytest.approx(80)
    assert float(seen["grad_norm/w"]) == pytest.approx(10 * np.sqrt(204))
    expected, _ = once(make(7.0, **labels), grads)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected)


def test_metrics_within_a_region_that_splits_layers_say_that_they_cannot_know(mesh):
    specs = SPECS["layers"]
    clip = clip_by_global_norm(7.0, per_layer=layer_axis, axis_name=specs)

    def seen(grads):
        return metrics(once(clip, grads)[1], per_layer=True)

    with pytest.raises(ValueError, match=r"devices hold different layers of `b` .*'data'"):
        shard_map(seen, mesh=mesh, in_specs=(specs,), out_specs=P())(STACK)


def test_layers_that_devices_split_ask_for_the_specs(mesh):
    clip = clip_by_global_norm(7.0, per_layer=lambda path, leaf: 0, axis_name="data")
    for grads in (jnp.ones((8, 2)), jnp.ones(8)):
        with pytest.raises(ValueError, match="`axis_name` must be a tree of PartitionSpecs"):
            shard_map(
                lambda grads: once(clip, grads)[0], mesh=mesh, in_specs=P("data"),
                out_specs=P("data"), check_vma=False,
            )(grads)  # fmt: skip


@pytest.mark.parametrize("per_layer", [True, layer_axis], ids=["arrays", "layers"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
def test_under_jit_shardings_tell_all(make, specs, kind, per_layer):
    mesh = make_mesh(kind, data=8)
    clip = make(7.0, per_layer=per_layer)
    with jax.set_mesh(mesh):
        grads = {name: jax.device_put(x, NamedSharding(mesh, specs[name]))
                 for name, x in STACK.items()}  # fmt: skip
        state = clip.init(grads)
        updates, new = jax.jit(clip.update)(grads, state)
        same = norms_of(jax.jit(lambda state: clip.update(grads, state)[1])(new))
    seen = norms_of(new)
    expected = expected_norms()
    if per_layer is True:
        expected = {key: norm for key, norm in expected.items() if key.count("/") == 1}
    assert seen == pytest.approx(expected, rel=1e-6)
    assert same == pytest.approx(expected, rel=1e-6)
    if kind == AxisType.Explicit:
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, once(make(7.0), STACK)[0]
    )


def test_pmap_takes_names_for_arrays_and_specs_for_layers():
    """Eight shares of a vector; each has two layers of a stack in full."""
    vector = {"w": jnp.arange(8.0)[:, None]}
    clip = clip_by_global_norm(1.0, per_layer=True, axis_name="i")
    state = jax.pmap(lambda grads: once(clip, grads)[1], axis_name="i")(vector)
    np.testing.assert_allclose(state.layer_norms["w"], np.full(8, np.sqrt(140)), rtol=1e-6)
    specs = {"w": P("i")}
    clip = clip_by_global_norm(1.0, per_layer=lambda path, leaf: 0, axis_name=specs)
    stack = {"w": jnp.arange(1.0, 17.0).reshape(8, 2, 1)}
    state = jax.pmap(lambda grads: once(clip, grads)[1], axis_name="i")(stack)
    np.testing.assert_allclose(state.grad_norm, np.full(8, np.sqrt(1496)), rtol=1e-6)
    np.testing.assert_allclose(state.layer_norms["w"].ravel(), np.arange(1.0, 17.0), rtol=1e-6)


def test_arrays_in_host_memory_have_norms_beside_those_on_the_device():
    device = jax.devices()[0]
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    grads = {"host": jax.device_put(jnp.array([[3e20, 0.0], [0.0, 0.0]]), pinned),
             "device": jnp.array([4e20])}  # fmt: skip
    for per_layer in (True, lambda path, leaf: 0 if path == "host" else None):
        clip = clip_by_global_norm(1.0, per_layer=per_layer)
        state = clip.init(grads)
        for update in (clip.update, jax.jit(clip.update)):
            result, new = update(grads, state)
            assert result["host"].sharding.memory_kind == "pinned_host"
            assert float(new.grad_norm) == pytest.approx(5e20)
            assert norms_of(new)["grad_norm/host"] == pytest.approx(3e20)


def test_a_scanned_stack_of_nnx_has_its_layers(standard_promotion):
    """From an optimizer as it is, from its state and from that as a pure dict."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def layer(rngs):
                return nnx.Linear(4, 4, rngs=rngs)

            self.blocks, self.head = layer(rngs), nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return jnp.tanh(layer(x))

            return self.head(forward(x, self.blocks))

    model = Model(nnx.Rngs(0))
    clip = clip_by_global_norm(1.0, per_layer=stacked)
    optimizer = nnx.Optimizer(model, optax.chain(clip, optax.adam(1e-3)), wrt=nnx.Param)
    grads = nnx.grad(lambda model: (model(jnp.ones((2, 4))) ** 2).sum())(model)
    optimizer.update(model, grads)
    kernel = np.asarray(jax.tree.leaves(nnx.as_pure(grads)["blocks"]["kernel"])[0])
    seen = norms_of(optimizer)
    for i in range(3):
        expected = np.linalg.norm(kernel[i])
        assert seen[f"grad_norm/blocks/kernel/{i}"] == pytest.approx(expected, rel=1e-5)
    assert {"grad_norm/blocks/bias/2", "grad_norm/head/kernel", "grad_norm/head/bias"} <= set(seen)
    of_nnx = nnx.state(optimizer)
    for state in (of_nnx, nnx.to_pure_dict(of_nnx)):
        assert norms_of(state) == pytest.approx(seen)


def test_a_clip_of_arrays_that_became_a_dict_tells_them_too(standard_promotion):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, gradclip_jax.clip_by_norm(1.0), wrt=nnx.Param)
    grads = nnx.grad(lambda model: (model(jnp.ones((4, 2))) ** 2).sum())(model)
    optimizer.update(model, grads)
    for state in (optimizer, nnx.state(optimizer), nnx.to_pure_dict(nnx.state(optimizer))):
        assert set(norms_of(state)) == {"grad_norm/kernel", "grad_norm/bias"}
    plain = nnx.Optimizer(model, clip_by_global_norm(1.0), wrt=nnx.Param)
    with pytest.raises(ValueError, match="build the clip"):
        metrics(nnx.to_pure_dict(nnx.state(plain)), per_layer=True)


def test_metrics_move_nothing_to_the_device():
    _, state = once(clip_by_global_norm(1.0, per_layer=stacked))
    expected = norms_of(state)
    with jax.transfer_guard("disallow"):
        seen = metrics(state, per_layer=True)
    assert {key: float(seen[key]) for key in expected} == expected


def test_groups_bound_by_a_partial_take_them_in_order_2_alone():
    measure = functools.partial(group_norms, labels={"blocks": "x", "head": "y"})
    assert norms_of(once(clip_to_limit(1.0, measure=measure, per_layer=True))[1]) == ARRAYS
    measure = functools.partial(measure, order=3)
    with pytest.raises(ValueError, match=r"group_norms, labels=.*, order=3"):
        clip_to_limit(1.0, measure=measure, per_layer=True)
