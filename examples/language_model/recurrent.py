"""Recurrent layers in Flax NNX: LSTM, GRU and the simple network, one layer at a time."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import gradclip_jax

State = tuple[jax.Array, ...]
Carry = tuple[State, ...]


class Cell(NamedTuple):
    """A recurrence: how many gates and state arrays, and one step in time.

    `step(x, state, recurrent)` receives the input already multiplied by its weights, for all
    gates, and returns the new state; its first array is what the next layer sees. `sums` says
    that `step` uses `x` and `recurrent` only in `x + state[0] @ recurrent`: it trains faster.
    """

    gates: int
    states: int
    step: Callable[[jax.Array, State, jax.Array], State]
    sums: bool = False


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


CELLS = {
    "lstm": Cell(4, 2, lstm_step, sums=True),
    "gru": Cell(3, 1, gru_step),
    "rnn": Cell(1, 1, rnn_step, sums=True),
}


class Recurrent(nnx.Module):
    """One layer: all inputs times their weights at once, then a scan over time.

    Called with inputs of shape [time, batch, inputs] and a state, it returns outputs of shape
    [time, batch, units] and the last state. The forget bias of 1 keeps the state of an LSTM at
    first, as in Jozefowicz, Zaremba, Sutskever 2015, "An empirical exploration of recurrent
    network architectures", section 2, and likewise that of a GRU.
    """

    def __init__(
        self,
        cell: Cell,
        inputs: int,
        units: int,
        *,
        scale: float,
        forget_bias: float = 1.0,
        cotangent_limit: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.cell, self.cotangent_limit = cell, cotangent_limit
        bias = uniform(scale)(rngs.params(), (cell.gates * units,))
        if cell.gates > 1:  # the second one decides how much of the state is kept
            bias = bias.at[units : 2 * units].add(forget_bias)
        self.input = nnx.Param(uniform(scale)(rngs.params(), (inputs, cell.gates * units)))
        self.recurrent = nnx.Param(uniform(scale)(rngs.params(), (units, cell.gates * units)))
        self.bias = nnx.Param(bias)

    def start(self, batch: int) -> State:
        """The state before the first input."""
        # Arrays of their own: a buffer that occurs twice cannot be donated.
        units = self.recurrent.shape[0]
        return tuple(jnp.zeros((batch, units)) for _ in range(self.cell.states))

    def __call__(self, inputs: jax.Array, state: State) -> tuple[jax.Array, State]:
        def step(recurrent: jax.Array, state: State, x: jax.Array) -> tuple[State, jax.Array]:
            state = self.cell.step(x, state, recurrent)
            if self.cotangent_limit is not None:
                clip = gradclip_jax.clip_by_value(self.cotangent_limit)
                state = gradclip_jax.clip_cotangent(state, clip)
            return state, state[0]

        run = scan_of_sums if self.cell.sums else scan
        x = inputs @ self.input[...] + self.bias[...]
        return run(step, self.recurrent[...], state, x)


Step = Callable[[jax.Array, State, jax.Array], tuple[State, jax.Array]]
Result = tuple[jax.Array, State]


def scan(step: Step, recurrent: jax.Array, state: State, x: jax.Array) -> Result:
    """All outputs of `step(recurrent, state, x[t])`, and the last state."""
    state, outputs = jax.lax.scan(functools.partial(step, recurrent), state, x)
    return outputs, state


def scan_of_sums(step: Step, recurrent: jax.Array, state: State, x: jax.Array) -> Result:
    """The same for a step that uses weights and input only in x[t] + h[t-1] @ recurrent.

    The gradient of the weights is then that of x times h, one product over all steps. As JAX
    derives it, it is a sum that grows through the scan: a fifth of the time of an LSTM.
    """

    @jax.custom_vjp
    def run(recurrent: jax.Array, state: State, x: jax.Array) -> Result:
        return scan(step, recurrent, state, x)

    def forward(recurrent: jax.Array, state: State, x: jax.Array):
        result, pull_back = jax.vjp(functools.partial(scan, step, recurrent), state, x)
        before = jnp.concatenate([state[0][None], result[0][:-1]])
        return result, (pull_back, before)

    def backward(saved, cotangent: Result):
        pull_back, before = saved
        state, x = pull_back(cotangent)
        return jnp.tensordot(before, x, ((0, 1), (0, 1))), state, x

    run.defvjp(forward, backward)
    return run(recurrent, state, x)


def uniform(scale: float) -> Callable[..., jax.Array]:
    """Initial weights between -scale and scale, as in Zaremba et al. 2014."""

    def initialise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-scale, maxval=scale)

    return initialise
