"""Ghost clipping: the numbers of the direct way, without the gradients of examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from gradclip_jax import leaf_norms
from gradclip_jax.per_example import value_and_grad

WORDS, CLASSES, UNITS, BATCH = 40, 24, 16, 3


class Model(nnx.Module):
    """A table and two layers, one of them used twice; or what ghost clipping cannot do."""

    def __init__(self, kind="plain", dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.kind = kind
        self.embed = nnx.Embed(WORDS, UNITS, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.hidden = nnx.Linear(UNITS, UNITS, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(UNITS, CLASSES, param_dtype=dtype, dtype=dtype, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words)
        x = jnp.tanh(self.hidden(jnp.tanh(self.hidden(x))))
        if self.kind == "elsewhere":
            x = jnp.tanh(jax.checkpoint(lambda x: self.hidden(x))(x))
        if self.kind == "tied":
            return self.embed.attend(x)
        return self.out(x)


def loss(model, words, classes):
    logits = model(words).astype(jnp.float32)
    rows = jnp.take_along_axis(jax.nn.log_softmax(logits), classes[..., None], axis=-1)
    penalty = (model.out.kernel[...].astype(jnp.float32) ** 2).sum() if (
        model.kind == "elsewhere"
    ) else 0.0  # fmt: skip
    return -rows.sum() + penalty


def data(batch=BATCH, length=4):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(x, jnp.int32) for x in rng.integers(0, CLASSES, (2, batch, length)))


class Layers(nnx.Module):
    """Layers, and a function that calls them."""

    def __init__(self, apply, **layers):
        self.apply = apply
        for name, layer in layers.items():
            setattr(self, name, layer)


def made(build):
    """A module with made-up numbers: its own are programs that take longer than the tests."""
    graph, state = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(2)
    numbers = jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype), state
    )
    return nnx.merge(graph, numbers)


def made_of(apply, layers):
    return made(lambda: Layers(apply, **layers(nnx.Rngs(0))))


def of_layers(model, x):
    return sum(jnp.cos(y + 1).sum() for y in jax.tree.leaves(list(model.apply(model, x))))


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, *shape)), jnp.float32)


def traced(loss, model, *batch, ghost=True, **settings):
    f = value_and_grad(loss, max_norm=1.0, return_norms=True, ghost=ghost, **settings)
    return jax.jit(f).trace(model, *batch)


def formed(trace, model, size=BATCH):
    """The kernels and tables of which a gradient for each example is in the program."""
    program, found = str(trace.jaxpr), set()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape = ",".join(map(str, (size, *leaf.shape)))
        if path[-1] != "bias" and f"[{shape}]" in program:
            found.add("/".join(map(str, path)))
    return found


def check(loss, model, *batch, direct=frozenset(), rtol=2e-4, atol=2e-5, **settings):
    """Both ways give the same numbers, and only these arrays go the direct way."""
    traces = [traced(loss, model, *batch, ghost=ghost, **settings) for ghost in (True, False)]
    same(*(trace.lower().compile()(model, *batch) for trace in traces), rtol, atol)
    assert formed(traces[0], model, settings.get("microbatch_size", BATCH)) == direct


def same(ours, direct, rtol=2e-4, atol=2e-5):
    pairs = zip(*map(jax.tree.leaves_with_path, (ours, direct)), strict=True)
    for (path, one), (other_path, other) in pairs:
        assert path == other_path
        one, other = (np.asarray(leaf, np.float32) for leaf in (one, other))
        np.testing.assert_allclose(one, other, rtol, atol, err_msg=jax.tree_util.keystr(path))


DIRECT = {
    "plain": set(),
    "tied": {"embed/embedding", "out/kernel"},
    "elsewhere": {"hidden/kernel", "out/kernel"},
}


@pytest.mark.parametrize("kind", DIRECT)
def test_ghost_clipping_gives_the_numbers_of_the_direct_way(kind):
    check(loss, made(lambda: Model(kind)), *data(), direct=DIRECT[kind], microbatch_size=2)


def test_ghost_clipping_of_each_array_and_in_bfloat16():
    model = made(lambda: Model(dtype=jnp.bfloat16))
    check(loss, model, *data(), measure=leaf_norms, rtol=0.05, atol=0.02)


def test_with_ghost_clipping_an_example_adds_at_most_the_limit():
    words, classes = data(1)
    f = jax.jit(value_and_grad(loss, max_norm=0.5, ghost=True, dtype=jnp.float32))
    (_, seen), grads = f(made(Model), words, classes)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
    assert 0.4999 < np.sqrt(sum((leaf**2).sum() for leaf in leaves)) <= 0.5
    assert int(seen.clip_count) == 1


@pytest.mark.parametrize(("of_input", "of_loss"), [(1e-30, 1.0), (1e25, 1e-20), (1.0, 1e25)])
def test_ghost_norms_whose_squares_leave_the_range_are_measured(of_input, of_loss):
    def layers(rngs):
        return {
            "dense": nnx.Linear(8, 32, use_bias=False, rngs=rngs),
            "convolution": nnx.Conv(8, 32, 2, use_bias=False, rngs=rngs),
            "table": nnx.Embed(5, 64, rngs=rngs),
        }

    def scaled(model, x, words):
        values = model.dense(x), model.convolution(x), of_input * model.table(words)
        return of_loss * sum((y / jnp.sqrt(1.0 * y.size)).sum() for y in values)

    model = made_of(None, layers)
    x, words = of_input * normal(4, 8), jnp.array([[0, 1, 1], [2, 2, 2], [3, 4, 0]])
    limit = 0.5 * of_input * of_loss
    found = {}
    for ghost in (True, False):
        f = value_and_grad(
            scaled, max_norm=limit, measure=leaf_norms, return_norms=True, ghost=ghost
        )
        found[ghost] = jax.jit(f)(model, x, words)
    assert formed(traced(scaled, model, x, words), model) == set()
    size = np.float32(of_input * of_loss)
    ours, direct = (
        [np.asarray(leaf) / size for leaf in jax.tree.leaves((seen.norms, grads))]
        for (_, seen), grads in found.values()
    )
    for one, other in zip(ours, direct, strict=True):
        np.testing.assert_allclose(one, other, 2e-4, 2e-5)
    assert sum(map(int, jax.tree.leaves(found[True][0][1].clip_count))) > 0


def test_an_example_whose_positions_differ_much_in_scale_is_clipped():
    """Of each Gram matrix one product underflows: 1e-20 twice, where the other has 1e20 twice."""
    x = jnp.array([[[1e10, 0, 0, 0], [0, 1e-10, 0, 0]]])
    d = jnp.array([[[1e-10, 0], [0, 1e10]]])
    layer = made(lambda: nnx.Linear(4, 2, use_bias=False, rngs=nnx.Rngs(0)))
    f = value_and_grad(
        lambda layer, x, d: (layer(x) * d).sum(), max_norm=0.01, ghost=True, return_norms=True
    )
    (_, seen), grads = jax.jit(f)(layer, x, d)
    assert 2**0.5 <= float(seen.norms[0]) < 2**0.5 * (1 + 1e-4)
    assert int(seen.clip_count) == 1
    np.testing.assert_allclose(
        grads.kernel[...][:2], 0.01 / 2**0.5 * np.eye(2), rtol=1e-4, atol=1e-9
    )


class Factors(nnx.Module):
    """A layer of each kind; the loss gives the outputs of most of them their cotangents."""

    def __init__(self, dtype):
        same = {"param_dtype": dtype, "dtype": dtype, "rngs": nnx.Rngs(0)}
        self.dense = nnx.Linear(6, 6, **same)
        self.axes = nnx.LinearGeneral((2, 3), (5, 4), axis=(1, 3), use_bias=False, **same)
        self.convolution = nnx.Conv(6, 6, 2, padding="CAUSAL", use_bias=False, **same)
        self.table = nnx.Embed(5, 10, **same)
        same["recurrent_kernel_init"] = nnx.initializers.zeros  # the default has no bfloat16
        self.rnn = nnx.RNN(nnx.SimpleCell(6, 6, **same), rngs=False)

    def __call__(self, x, words, carry):
        several = jnp.moveaxis(x.reshape(1, 4, 2, 3), 1, 2)
        return {
            "dense": self.dense(x),
            "axes": self.axes(several),
            "convolution": self.convolution(x),
            "table": self.table(words),
            "rnn": self.rnn(x, initial_carry=carry),
        }

    def loss(self, x, words, cotangents):
        y = self(x, words, jnp.ones((1, 6), x.dtype))
        pairs = [(y[name].astype(jnp.float32), cotangents[name]) for name in y]
        return sum((one * other.astype(jnp.float32)).sum() for one, other in pairs)


@functools.cache
def compiled_factors(dtype):
    """Compiled once for all that is drawn: the limit is an argument."""
    f = value_and_grad(
        Factors.loss,
        max_norm=None,
        measure=leaf_norms,
        return_norms=True,
        ghost=True,
        dtype=jnp.float32,
    )
    model = made(lambda: Factors(dtype))
    step = jax.jit(lambda model, *batch: f(model, *batch[:-1], max_norm=batch[-1]))
    cotangents = {name: jnp.ones((1, 4, *shape), dtype) for name, shape in SHAPES.items()}
    words = jnp.zeros((1, 4), jnp.int32)
    trace = step.trace(model, jnp.ones((1, 4, 6), dtype), words, cotangents, jnp.float32(1))
    assert formed(trace, model, 1) == set()
    return functools.partial(trace.lower().compile(), model)


def true_gradients(x, words, cotangents):
    """Those that are sums of products of what is given, in float64."""
    x, words = np.asarray(x, np.float64)[0], np.asarray(words)[0]
    d = {name: np.asarray(y, np.float64)[0] for name, y in cotangents.items()}
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    table = np.zeros((5, 10))
    np.add.at(table, words, d["table"])
    return {
        ("dense", "kernel"): np.einsum("ti,to->io", x, d["dense"]),
        ("axes", "kernel"): np.einsum("ti,top->iop", x, d["axes"]),
        ("convolution", "kernel"): np.einsum(
            "kti,to->kio", np.stack([before, x]), d["convolution"]
        ),
        ("table", "embedding"): table,
    }  # fmt: skip


SHAPES = {"dense": (6,), "axes": (5, 4), "convolution": (6,), "table": (10,), "rnn": (6,)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@settings(deadline=None, max_examples=12, database=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    of_inputs=st.lists(st.floats(-30, 30), min_size=4, max_size=4),
    of_products=st.lists(st.floats(-30, 30), min_size=4, max_size=4),
    cancel=st.booleans(),
    share=st.sampled_from([1e-9, 1e-5, 1e-3, 0.5]),
)
def test_with_ghost_clipping_an_example_adds_at_most_the_limit_whatever_the_scales_of_its_positions(
    dtype, seed, of_inputs, of_products, cancel, share
):
    rng = np.random.default_rng(seed)
    inputs, products = np.array(of_inputs), np.array(of_products)
    if cancel:  # position 1 takes back what 0 adds, and little is left
        products = np.clip(products[0], -6, 6) + np.array([0, 0, -6, -9])
    outputs = np.clip(products - inputs, -36, 36)
    patches = np.maximum(inputs, [inputs[0], *inputs[:-1]])
    x = 10.0 ** inputs[:, None] * rng.standard_normal((4, 6))
    cotangents = {
        name: 10.0 ** outputs.reshape(-1, *(1 for _ in shape)) * rng.standard_normal((4, *shape))
        for name, shape in SHAPES.items()
    }
    if cancel:
        power = 2.0 ** np.round((inputs[0] - inputs[1]) * np.log2(10))
        x[1] = x[0] / power
        for y in cotangents.values():
            y[1] = -y[0] * power
    # Else their gradients overflow.
    cotangents["convolution"] *= 10.0 ** (inputs - patches)[:, None]
    cotangents["rnn"] = np.clip(cotangents["rnn"], -1e3, 1e3)
    x, cotangents = jax.tree.map(lambda y: jnp.asarray(y[None], dtype), (x, cotangents))
    limit = np.float32(max(share * 10.0 ** products[0], 1e-37))
    words = jnp.array([[1, 1, 3, -1]])
    (_, seen), grads = compiled_factors(dtype)(x, words, cotangents, limit)
    assert int(seen.nonfinite_count) == 0
    norms = {path: float(norm[...][0]) for path, norm in nnx.to_flat_state(seen.norms)}
    for path, gradient in true_gradients(x, words, cotangents).items():
        true = np.sqrt((gradient**2).sum())
        assert norms[path] >= true * (1 - 2**-16) or true < 2**-126, path
    for path, leaf in nnx.to_flat_state(grads):
        added = np.sqrt((np.asarray(leaf[...], np.float64) ** 2).sum())
        assert added <= np.float64(limit) / np.sqrt(len(norms)), path


def test_no_gradient_of_an_example_is_formed():
    model = made(Model)
    words, classes = data(64)
    graph, params = nnx.split(model)

    def bytes_of(ghost):
        f = value_and_grad(loss, max_norm=1.0, ghost=ghost)
        step = jax.jit(lambda p, *batch: f(nnx.merge(graph, p), *batch)[1])
        return step.lower(params, words[:, :1], classes[:, :1]).compile().memory_analysis()

    assert bytes_of(True).temp_size_in_bytes < bytes_of(False).temp_size_in_bytes / 2


def test_ghost_clipping_only_where_two_gram_matrices_are_no_larger_than_the_gradient():
    layer = made(lambda: nnx.Linear(4, 18, rngs=nnx.Rngs(0)))
    table = made(lambda: nnx.Embed(4, 18, rngs=nnx.Rngs(0)))
    once = Layers(lambda model, x: model.layer(x), layer=layer)
    assert formed(traced(of_layers, once, normal(6, 4)), once) == set()  # 2 * 6 * 6 = 4 * 18
    assert formed(traced(of_layers, once, normal(7, 4)), once) == {"layer/kernel"}
    twice = Layers(lambda model, x: model.layer(x) + model.layer(-x), layer=layer)
    assert formed(traced(of_layers, twice, normal(3, 4)), twice) == set()
    assert formed(traced(of_layers, twice, normal(5, 4)), twice) == {"layer/kernel"}
    lookup = Layers(lambda model, x: model.table(x), table=table)
    assert formed(traced(of_layers, lookup, jnp.zeros((BATCH, 6), jnp.int32)), lookup) == set()
    assert formed(traced(of_layers, lookup, jnp.zeros((BATCH, 7), jnp.int32)), lookup) == {
        "table/embedding"
    }


def test_ghost_clipping_of_products_over_several_axes_and_of_attention():
    def apply(model, x):
        return model.outer(x.mT), model.attention(x), model.several(x)

    model = made_of(apply, lambda rngs: {
        "outer": nnx.LinearGeneral((2, 4), (4, 6, 3), axis=(1, -1), rngs=rngs),
        "attention": nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs),
        "several": nnx.LinearGeneral(16, 16, batch_axis={0: 1}, rngs=rngs),
    })  # fmt: skip
    check(of_layers, model, normal(2, 4, 16), direct={"several/kernel"})


CONVOLUTIONS = {
    "same": ((3, 2), {"strides": 2, "padding": "SAME"}),
    "valid": ((3, 3), {"strides": (2, 1), "padding": "VALID"}),
    "numbers": ((2, 3), {"kernel_dilation": (1, 2), "padding": ((2, -1), (1, 2)), "strides": 2}),
    "dilated": ((2, 2), {"input_dilation": 2, "padding": 1, "strides": 3}),
    "reflect": ((3, 2), {"padding": "REFLECT", "strides": 2}),
    "causal": ((5,), {"padding": "CAUSAL", "kernel_dilation": 2, "strides": 2}),
    "circular": ((4,), {"padding": "CIRCULAR", "strides": 2}),
}


def test_ghost_clipping_of_convolutions():
    def layers(rngs):
        mask = np.arange(7 * 3 * 24, dtype=np.float32).reshape(7, 3, 24) % 2
        return {
            "grouped": nnx.Conv(3, 24, 6, strides=4, feature_group_count=3, rngs=rngs),
            "masked": nnx.Conv(3, 24, 7, strides=4, mask=mask, rngs=rngs),
        } | {
            name: nnx.Conv(3, 24, size, use_bias=name == "same", rngs=rngs, **settings)
            for name, (size, settings) in CONVOLUTIONS.items()
        }  # fmt: skip

    def apply(model, x):
        # In one dimension the first of the two axes is a batch within an example.
        names = "grouped", "masked", *CONVOLUTIONS
        return [getattr(model, name)(x) for name in names] + [model.same(x[:, :2])]

    direct = {"grouped/kernel", "masked/kernel"}
    check(of_layers, made_of(apply, layers), normal(3, 7, 3), direct=direct)


def test_ghost_clipping_of_recurrent_networks():
    def layers(rngs):
        def rnn(cell, **settings):
            return nnx.RNN(cell(8, 8, rngs=rngs), rngs=False, **settings)

        forward, backward = rnn(nnx.SimpleCell, unroll=2), rnn(nnx.GRUCell)
        return {
            "before": nnx.Linear(8, 8, rngs=rngs),
            "both": nnx.Bidirectional(forward, backward, rngs=False),
            "lstm": rnn(nnx.LSTMCell, time_major=True, return_carry=True),
            "optimized": rnn(nnx.OptimizedLSTMCell, reverse=True),
            "cell": nnx.SimpleCell(8, 8, rngs=rngs),
        }

    def apply(model, x):
        x = model.before(x)
        time, carry = jnp.arange(1.0, 4.0)[None, :, None], jnp.full((1, 8), 0.1)
        rngs = nnx.RngStream(0, tag="carry")
        yield time * model.both(x, initial_carry=(carry, carry), rngs=rngs)
        yield model.lstm(jnp.swapaxes(time * x, 0, 1), initial_carry=(carry, carry))
        yield time * model.optimized(x, initial_carry=(carry, carry))
        for step in range(2):
            carry, y = model.cell(carry, x[:, step])
            yield y

    check(of_layers, made_of(apply, layers), normal(3, 8))


def test_recurrent_networks_that_take_lengths_go_the_direct_way():
    def apply(model, x):
        return model.rnn(x, initial_carry=jnp.zeros((1, 9)), seq_lengths=jnp.array([2]))

    model = made_of(
        apply, lambda rngs: {"rnn": nnx.RNN(nnx.SimpleCell(8, 9, rngs=rngs), rngs=False)}
    )
    names = {f"rnn/cell/dense_{name}/kernel" for name in "ih"}
    assert formed(traced(of_layers, model, normal(3, 8)), model) == names


def test_ghost_clipping_in_shard_map(standard_promotion):
    words, classes = data(8)
    model = made(Model)
    graph, params = nnx.split(model)
    f = value_and_grad(loss, max_norm=1.0, ghost=True)
    step = jax.shard_map(
        lambda p, *batch: f(nnx.merge(graph, p), *batch)[1], mesh=make_mesh(data=8),
        in_specs=(P(), P("data"), P("data")), out_specs=P(),
    )  # fmt: skip
    direct = jax.jit(value_and_grad(loss, max_norm=1.0))
    same(jax.jit(step)(params, words, classes), nnx.state(direct(model, words, classes)[1]))


def test_ghost_clipping_of_examples_that_explicit_axes_split():
    def layers(rngs):
        return {
            "dense": nnx.Linear(8, 8, rngs=rngs),
            "convolution": nnx.Conv(8, 8, 3, rngs=rngs),
            "rnn": nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs), rngs=False),
        }

    def apply(model, x):
        x = model.convolution(model.dense(x))
        zeros = jnp.zeros((1, 8))
        return [model.rnn(x, initial_carry=(zeros, zeros))]

    model, x = made_of(apply, layers), jnp.asarray(np.random.default_rng(3).random((8, 4, 8)), "f")
    direct = traced(of_layers, model, x, ghost=False).lower().compile()(model, x)
    mesh = make_mesh(AxisType.Explicit, data=8)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("data")))
        trace = traced(of_layers, model, split)
        assert formed(trace, model, size="8@data") == set()
        same(trace.lower().compile()(model, split), direct)
