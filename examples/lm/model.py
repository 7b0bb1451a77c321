"""A recurrent language model in Flax NNX, its training step, its score and its samples."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradclip_jax

State = tuple[jax.Array, ...]
Carry = tuple[State, ...]


class Cell(NamedTuple):
    """A recurrence: how many gates and state arrays, and one step in time.

    `step(x, state, recurrent)` receives the input already multiplied by its weights, for all
    gates, and returns the new state; its first array is what the next layer sees.
    """

    gates: int
    states: int
    step: Callable[[jax.Array, State, jax.Array], State]


def lstm_step(x: jax.Array, state: State, recurrent: jax.Array) -> State:
    """Long short-term memory with a forget gate (Gers, Schmidhuber, Cummins 2000)."""
    h, c = state
    i, f, g, o = jnp.split(x + h @ recurrent, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_step(x: jax.Array, state: State, recurrent: jax.Array) -> State:
    """Gated recurrent unit (Cho et al. 2014), reset after the product so that it is one product."""
    (h,) = state
    (xr, xz, xn), (r, z, n) = (jnp.split(a, 3, axis=-1) for a in (x, h @ recurrent))
    z = jax.nn.sigmoid(xz + z)
    return (z * h + (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + r) * n),)


def rnn_step(x: jax.Array, state: State, recurrent: jax.Array) -> State:
    """The simple recurrent network (Elman 1990), whose gradients explode most readily."""
    return (jnp.tanh(x + state[0] @ recurrent),)


CELLS = {"lstm": Cell(4, 2, lstm_step), "gru": Cell(3, 1, gru_step), "rnn": Cell(1, 1, rnn_step)}


class Recurrent(nnx.Module):
    """One layer: all inputs times their weights at once, then a scan over time."""

    def __init__(
        self,
        cell: Cell,
        units: int,
        *,
        scale: float,
        forget_bias: float,
        cotangent_limit: float | None,
        rngs: nnx.Rngs,
    ):
        self.cell, self.cotangent_limit = cell, cotangent_limit
        bias = uniform(scale)(rngs.params(), (cell.gates * units,))
        if cell is CELLS["lstm"]:
            bias = bias.at[units : 2 * units].add(forget_bias)
        self.input = nnx.Param(uniform(scale)(rngs.params(), (units, cell.gates * units)))
        self.recurrent = nnx.Param(uniform(scale)(rngs.params(), (units, cell.gates * units)))
        self.bias = nnx.Param(bias)

    def __call__(self, inputs: jax.Array, state: State) -> tuple[jax.Array, State]:
        recurrent = self.recurrent[...]

        def step(state: State, x: jax.Array) -> tuple[State, jax.Array]:
            state = self.cell.step(x, state, recurrent)
            if self.cotangent_limit is not None:
                clip = gradclip_jax.clip_by_value(self.cotangent_limit)
                state = gradclip_jax.clip_cotangent(state, clip)
            return state, state[0]

        state, outputs = jax.lax.scan(step, state, inputs @ self.input[...] + self.bias[...])
        return outputs, state


class LanguageModel(nnx.Module):
    """Embedding, recurrent layers, projection; dropout on all that is not recurrent.

    Zaremba, Sutskever, Vinyals 2014, "Recurrent neural network regularization",
    https://arxiv.org/abs/1409.2329 (equation 3 and section 4.1). `scale` None is the usual
    1 / sqrt(units). With scale 0.1, forget bias 0 and no dropout this is their small model.

    The LSTM's forget bias of 1 follows Jozefowicz, Zaremba, Sutskever 2015, "An empirical
    exploration of recurrent network architectures", section 2.
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
        self.cell, self.units = CELLS[cell], units
        self.embedding = nnx.Param(uniform(width)(rngs.params(), (vocabulary_size, units)))
        self.layers = nnx.List(
            Recurrent(
                self.cell,
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
        self.output_bias = nnx.Param(jnp.zeros(vocabulary_size))

    def start(self, batch: int) -> Carry:
        """The state before the first token."""
        # Arrays of their own: a buffer that occurs twice cannot be donated.
        return tuple(
            tuple(jnp.zeros((batch, self.units)) for _ in range(self.cell.states))
            for _ in self.layers
        )

    def __call__(
        self, tokens: jax.Array, carry: Carry, *, deterministic: bool
    ) -> tuple[jax.Array, Carry]:
        """Logits of the next tokens, [time, batch, vocabulary], and the state to carry over."""
        x = self.dropout(self.embedding[...][tokens], deterministic=deterministic)
        states = []
        for layer, state in zip(self.layers, carry, strict=True):
            x, state = layer(x, state)
            x = self.dropout(x, deterministic=deterministic)
            states.append(state)
        return x @ self.output[...] + self.output_bias[...], tuple(states)


def uniform(scale: float) -> Callable[..., jax.Array]:
    """Initial weights between -scale and scale, as in Zaremba et al. 2014."""

    def initialise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-scale, maxval=scale)

    return initialise


@nnx.jit(static_argnames="mean_loss", donate_argnames=("model", "optimizer", "carry"))
def train_step(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    carry: Carry,
    inputs: jax.Array,
    targets: jax.Array,
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
    return final, {"loss": nats, **gradclip_jax.metrics(optimizer.opt_state)}


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
