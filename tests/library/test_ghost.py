"""Ghost gradients: the numbers of the direct way, without the gradients of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from gradclip_jax import clipped_value_and_grad, leaf_norms

WORDS, CLASSES, UNITS, BATCH = 40, 24, 16, 3


class Model(nnx.Module):
    """A table and two layers, of which one serves at two places; or what ghosts cannot do."""

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
    f = clipped_value_and_grad(loss, 1.0, return_norms=True, ghost=ghost, **settings)
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
def test_ghosts_give_the_numbers_of_the_direct_way(kind):
    check(loss, made(lambda: Model(kind)), *data(), direct=DIRECT[kind], microbatch_size=2)


def test_ghosts_of_each_array_and_in_bfloat16():
    model = made(lambda: Model(dtype=jnp.bfloat16))
    check(loss, model, *data(), measure=leaf_norms, rtol=0.05, atol=0.02)


def test_a_ghost_adds_at_most_the_limit():
    words, classes = data(1)
    f = jax.jit(clipped_value_and_grad(loss, 0.5, ghost=True, dtype=jnp.float32))
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
        f = clipped_value_and_grad(
            scaled, limit, measure=leaf_norms, return_norms=True, ghost=ghost
        )
        found[ghost] = jax.jit(f)(model, x, words)
    assert formed(traced(scaled, model, x, words), model) == set()
    size = np.float32(of_input * of_loss)
    ghosts, direct = (
        [np.asarray(leaf) / size for leaf in jax.tree.leaves((seen.norms, grads))]
        for (_, seen), grads in found.values()
    )
    for one, other in zip(ghosts, direct, strict=True):
        np.testing.assert_allclose(one, other, 2e-4, 2e-5)
    assert sum(map(int, jax.tree.leaves(found[True][0][1].clip_count))) > 0


def test_no_gradient_of_an_example_is_formed():
    model = made(Model)
    words, classes = data(64)
    graph, params = nnx.split(model)

    def bytes_of(ghost):
        f = clipped_value_and_grad(loss, 1.0, ghost=ghost)
        step = jax.jit(lambda p, *batch: f(nnx.merge(graph, p), *batch)[1])
        return step.lower(params, words[:, :1], classes[:, :1]).compile().memory_analysis()

    assert bytes_of(True).temp_size_in_bytes < bytes_of(False).temp_size_in_bytes / 2


def test_ghosts_only_where_two_gram_matrices_are_no_larger_than_the_gradient():
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


def test_ghosts_of_products_over_several_axes_and_of_attention():
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


def test_ghosts_of_convolutions():
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


def test_ghosts_of_recurrent_networks():
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


def test_ghosts_in_shard_map(standard_promotion):
    words, classes = data(8)
    model = made(Model)
    graph, params = nnx.split(model)
    f = clipped_value_and_grad(loss, 1.0, ghost=True)
    step = jax.shard_map(
        lambda p, *batch: f(nnx.merge(graph, p), *batch)[1], mesh=make_mesh(data=8),
        in_specs=(P(), P("data"), P("data")), out_specs=P(),
    )  # fmt: skip
    direct = jax.jit(clipped_value_and_grad(loss, 1.0))
    same(jax.jit(step)(params, words, classes), nnx.state(direct(model, words, classes)[1]))


def test_ghosts_of_examples_that_explicit_axes_split():
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
