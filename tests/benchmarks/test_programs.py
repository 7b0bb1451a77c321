"""The programs for accelerators trace, and have as many leaves and parameters as they say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.sharding import PartitionSpec as P

# A program runs under the promotion that jax has by default.
pytestmark = pytest.mark.usefixtures("standard_promotion")
ABSTRACT = programs.abstract


@pytest.mark.parametrize("clip", programs.CLIPS)
@pytest.mark.parametrize("dtype", programs.DTYPES)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_a_step_returns_what_it_was_given_and_donated(name, dtype, clip):
    step, arguments, donate, _ = programs.program(name, dtype, programs.CLIPS[clip])
    assert donate == (0, 1)
    out = jax.eval_shape(step, *arguments)
    assert out == arguments[:2]
    kind = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(arguments[0])} == {jnp.dtype(kind)}
    if name.startswith("update of"):
        kind = jnp.float32 if dtype == "float32" else jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(arguments[2])} == {jnp.dtype(kind)}


@pytest.mark.parametrize(
    ("tree", "leaves", "millions"),
    [
        (programs.gpt2(), 148, 124),
        (programs.gpt2(2), 28, 54),
        (programs.experts(), 22, 27),
        (programs.TREES["500 of 64 x 64"](), 500, 2),
        (programs.TREES["one leaf of 4096 x 4096"](), 1, 17),
        (programs.llama(), 12, 6_738),
        (programs.TREES["LLaMA 70B"](), 12, 68_977),
        (programs.TRANSFORMER, 28, 15),
        (programs.LSTM, 6, 10),
    ],
)
def test_trees_have_the_leaves_and_parameters_of_their_models(tree, leaves, millions):
    found = jax.tree.leaves(ABSTRACT(tree, "float32"))
    assert len(found) == leaves
    assert round(sum(math.prod(leaf.shape) for leaf in found) / 1e6) == millions


def test_states_are_split_as_their_parameters_and_every_axis_divides():
    for name in ("update of GPT-2", "update of a mixture of experts", "update of LLaMA 70B"):
        arguments = programs.program(name, "float32", programs.CLIPS["gradclip_jax"]).arguments
        params, state, grads = programs.specs(arguments)
        adam = state[1][0]
        assert params == adam.mu == adam.nu == grads
        assert adam.count == P()
        for leaf, spec in zip(
            jax.tree.leaves(arguments),
            jax.tree.leaves(programs.specs(arguments), is_leaf=lambda x: isinstance(x, P)),
            strict=True,
        ):
            for size, axis in zip(leaf.shape, spec, strict=False):
                assert size % {"data": 256, "model": 16, None: 1}[axis] == 0
    assert programs.specs(ABSTRACT(programs.llama(), "float32"))["layers"] == {
        **dict.fromkeys(("query", "key", "value", "gate", "up"), P(None, "data", "model")),
        **dict.fromkeys(("out", "down"), P(None, "model", "data")),
        **dict.fromkeys(("scale_1", "scale_2"), P()),
    }
    of_inputs = programs.program("matmul step", "float32", None).arguments[2:]
    assert programs.specs(of_inputs) == (P("data"), P("data"))


@pytest.mark.parametrize("network", ["transformer", "lstm"])
def test_networks_look_at_no_later_token(network):
    trees = {
        "transformer": programs.decoder(1, 16, 11, output=(16, 11)),
        "lstm": programs.lstm_layer(16, 11),
    }
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape), leaf.dtype),
        ABSTRACT(trees[network], "float32"),
    )
    one, other = jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 2, 3, 9]])
    logits = [getattr(programs, network)(params, tokens) for tokens in (one, other)]
    np.testing.assert_allclose(logits[0][:, :3], logits[1][:, :3], rtol=1e-5, atol=1e-5)
    assert np.abs(logits[0][:, 3] - logits[1][:, 3]).max() > 0.1
