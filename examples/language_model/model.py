"""A recurrent language model in Flax NNX, its training step, its score and its samples."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradclip_jax
from examples.language_model.recurrent import CELLS, Carry, Recurrent, uniform

Tokens = jax.Array | np.ndarray


class LanguageModel(nnx.Module):
    """Embedding, recurrent layers, projection; dropout on all that is not recurrent.

    Zaremba, Sutskever, Vinyals 2014, "Recurrent neural network regularization",
    https://arxiv.org/abs/1409.2329 (equation 3 and section 4.1). `scale` None is the usual
    1 / sqrt(units). With scale 0.1, forget bias 0 and no dropout this is their small model.
    """

    def __init__(
        self,
        vocabulary_size: int,
        cell: str,
        layers: int,
        units: int,
        dropout: float,
        *,
        scale: float | None = None,
        forget_bias: float = 1.0,
        cotangent_limit: float | None = None,
        rngs: nnx.Rngs,
    ):
        width = units**-0.5 if scale is None else scale
        self.units = units
        self.embedding = nnx.Param(uniform(width)(rngs.params(), (vocabulary_size, units)))
        self.layers = nnx.List(
            Recurrent(
                CELLS[cell],
                units,
                units,
                scale=width,
                forget_bias=forget_bias,
                cotangent_limit=cotangent_limit,
                rngs=rngs,
            )
            for _ in range(layers)
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.output = nnx.Param(uniform(width)(rngs.params(), (units, vocabulary_size)))
        bias = uniform(scale or 0.0)(rngs.params(), (vocabulary_size,))
        self.output_bias = nnx.Param(bias)

    def start(self, batch: int) -> Carry:
        """The state before the first token."""
        return tuple(layer.start(batch) for layer in self.layers)

    def __call__(
        self, tokens: Tokens, carry: Carry, *, deterministic: bool
    ) -> tuple[jax.Array, Carry]:
        """Logits of the next tokens, [time, batch, vocabulary], and the state to carry over."""
        x = self.dropout(self.embedding[...][tokens], deterministic=deterministic)
        states = []
        for layer, state in zip(self.layers, carry, strict=True):
            x, state = layer(x, state)
            x = self.dropout(x, deterministic=deterministic)
            states.append(state)
        # One matrix of all steps: with two dimensions to sum over, the gradient is slower.
        logits = x.reshape(-1, self.units) @ self.output[...] + self.output_bias[...]
        return logits.reshape(*tokens.shape, -1), tuple(states)


@nnx.jit(static_argnames="mean_loss", donate_argnames=("model", "optimizer", "carry"))
def train_step(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    carry: Carry,
    inputs: Tokens,
    targets: Tokens,
    *,
    mean_loss: bool,
) -> tuple[Carry, dict[str, jax.Array]]:
    """One step of truncated back-propagation through time; the state carried in is a constant.

    The gradient is that of the loss summed over the unrolled steps and averaged over the batch,
    as in Zaremba et al. 2014, whose limits of 5 and 10 apply to its norm; `mean_loss` averages
    over the steps as well. The loss that is reported is nats per token either way.
    """

    def objective(model: LanguageModel):
        logits, final = model(inputs, carry, deterministic=False)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return nats * (1 if mean_loss else len(inputs)), (nats, final)

    (_, (nats, final)), grads = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, grads)
    return final, {"loss": nats, **measured_by_clip(optimizer.opt_state)}


def measured_by_clip(opt_state: Any) -> dict[str, jax.Array]:
    """The metrics; of a clip that measures no norm, `grad_norm` is what it measures instead."""
    seen = gradclip_jax.metrics(opt_state)
    return {"grad_norm": seen["clip_measure"], **seen} if "clip_measure" in seen else seen


@nnx.jit
def _weighted_nats(model: LanguageModel, carry: Carry, inputs, targets, weights):
    logits, carry = model(inputs, carry, deterministic=True)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # A weight of 0 must also silence a padded step whose loss is not finite.
    return jnp.where(weights > 0, nats, 0).sum(), carry


def score(model: LanguageModel, pieces: Iterable[tuple[np.ndarray, ...]], batch: int) -> float:
    """Nats per token over whole streams, the state carried along."""
    carry, nats, tokens = model.start(batch), 0.0, 0.0
    for inputs, targets, weights in pieces:
        total, carry = _weighted_nats(model, carry, inputs, targets, weights)
        nats, tokens = nats + float(total), tokens + float(weights.sum())
    return nats / tokens


@nnx.jit(static_argnames="length")
def sample(model: LanguageModel, first: jax.Array, key: jax.Array, *, length: int) -> jax.Array:
    """`length` tokens drawn from the model after the token `first`."""

    def step(carry, key):
        token, state = carry
        logits, state = model(token[None], state, deterministic=True)
        token = jax.random.categorical(key, logits[0])
        return (token, state), token[0]

    start = (jnp.reshape(first, (1,)), model.start(1))
    return jax.lax.scan(step, start, jax.random.split(key, length))[1]


@nnx.jit
def _likeliest(model: LanguageModel, carry: Carry, tokens: Tokens, reads: Tokens):
    """The likeliest next tokens, and the state, which stays as it was where nothing is read."""
    logits, read = model(tokens[None], carry, deterministic=True)
    carry = jax.tree.map(lambda new, old: jnp.where(reads[:, None], new, old), read, carry)
    return jnp.argmax(logits[0], axis=-1), carry


def replies(
    model: LanguageModel, contexts: Sequence[Sequence[int]], end: int, length: int
) -> list[list[int]]:
    """The likeliest tokens after each context, one by one up to `end`, at most `length`."""
    longest = max(map(len, contexts))
    # Contexts end together: the shorter ones begin later.
    starts = np.array([longest - len(context) for context in contexts])
    tokens = np.array([[end] * n + [*c] for n, c in zip(starts, contexts, strict=True)], np.int32)
    carry, said = model.start(len(contexts)), []
    for step in range(longest + length):
        column = tokens[:, step] if step < longest else said[-1]
        column, carry = _likeliest(model, carry, column, step >= starts)
        if step >= longest - 1:
            said.append(np.asarray(column))
    rows = np.stack(said[:length], axis=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
