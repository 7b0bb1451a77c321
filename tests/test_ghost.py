"""Ghost gradients: the numbers of the direct way, without the gradients of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from flax import nnx
from jax.sharding import PartitionSpec as P

from gradclip_jax import clipped_value_and_grad, leaf_norms

WORDS, UNITS = 11, 5


class Model(nnx.Module):
    """A table and two layers, of which one serves at two places; or what ghosts cannot do."""

    def __init__(self, kind="plain", dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.kind = kind
        self.embed = nnx.Embed(WORDS, UNITS, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.hidden = nnx.Linear(UNITS, UNITS, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(UNITS, WORDS, param_dtype=dtype, dtype=dtype, rngs=rngs)
        if kind == "recurrent":
            self.cell = nnx.RNN(nnx.SimpleCell(UNITS, UNITS, rngs=rngs))

    def __call__(self, words):
        x = self.embed(words)
        x = jnp.tanh(self.hidden(jnp.tanh(self.hidden(x))))
        if self.kind == "recurrent":
            carry = jnp.zeros((*x.shape[:-2], UNITS))
            x = self.cell(x, initial_carry=carry)
        if self.kind == "checkpoint":
            x = jnp.tanh(jax.checkpoint(lambda x: self.hidden(x))(x))
        if self.kind == "tied":
            return self.embed.attend(x)
        return self.out(x)


def loss(model, words, classes):
    logits = model(words).astype(jnp.float32)
    rows = jnp.take_along_axis(jax.nn.log_softmax(logits), classes[..., None], axis=-1)
    penalty = (model.out.kernel[...].astype(jnp.float32) ** 2).sum() if (
        model.kind == "penalty"
    ) else 0.0  # fmt: skip
    return -rows.sum() + penalty


def data(batch=5, length=4):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.integers(0, WORDS, (batch, length)), jnp.int32) for _ in range(2))


def both(model, max_norm, words, classes, **settings):
    found = []
    for ghost in (True, False):
        f = clipped_value_and_grad(loss, max_norm, return_norms=True, ghost=ghost, **settings)
        found.append(jax.jit(f)(model, words, classes))
    return found


@pytest.mark.parametrize("kind", ["plain", "tied", "penalty", "recurrent", "checkpoint"])
def test_ghosts_give_the_numbers_of_the_direct_way(kind):
    ghosts, direct = both(Model(kind), 1.0, *data(), microbatch_size=2)
    assert jax.tree.structure(ghosts) == jax.tree.structure(direct)
    for one, other in zip(jax.tree.leaves(ghosts), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_ghosts_of_each_array_and_in_bfloat16():
    ghosts, direct = both(Model(), 1.0, *data(), measure=leaf_norms)
    for one, other in zip(jax.tree.leaves(ghosts), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    ghosts, direct = both(Model(dtype=jnp.bfloat16), 1.0, *data())
    for one, other in zip(jax.tree.leaves(ghosts), jax.tree.leaves(direct), strict=True):
        one, other = (np.asarray(leaf, np.float32) for leaf in (one, other))
        np.testing.assert_allclose(one, other, rtol=0.05, atol=0.02)


def test_a_ghost_adds_at_most_the_limit():
    words, classes = data(1)
    f = clipped_value_and_grad(loss, 0.5, ghost=True, dtype=jnp.float32)
    (_, seen), grads = f(Model(), words, classes)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
    assert 0.4999 < np.sqrt(sum((leaf**2).sum() for leaf in leaves)) <= 0.5
    assert int(seen.clip_count) == 1


def test_no_gradient_of_an_example_is_formed():
    model = Model()
    words, classes = data(64)
    graph, params = nnx.split(model)

    def bytes_of(ghost):
        f = clipped_value_and_grad(loss, 1.0, ghost=ghost)
        step = jax.jit(lambda p, *batch: f(nnx.merge(graph, p), *batch)[1])
        return step.lower(params, words[:, :1], classes[:, :1]).compile().memory_analysis()

    assert bytes_of(True).temp_size_in_bytes < bytes_of(False).temp_size_in_bytes / 2


def test_ghosts_in_shard_map(standard_promotion):
    words, classes = data(8)
    graph, params = nnx.split(Model())
    f = clipped_value_and_grad(loss, 1.0, ghost=True)
    step = jax.shard_map(
        lambda p, *batch: f(nnx.merge(graph, p), *batch)[1], mesh=make_mesh(data=8),
        in_specs=(P(), P("data"), P("data")), out_specs=P(),
    )  # fmt: skip
    expected = clipped_value_and_grad(loss, 1.0)(Model(), words, classes)[1]
    grads = jax.jit(step)(params, words, classes)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
