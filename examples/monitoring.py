"""Monitoring gradient clipping: alerts for a limit that is too low and for NaN, and a better limit.

    python examples/monitoring.py

The first run has both faults; the second takes the limit that the monitor suggests. Ten seconds.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradclip_jax as gc

TOO_LOW = 0.01  # the first fault: the norms are 0.5 to 7, so this limit sets the size of each step
NAN_BATCH = 300  # the second fault: a missing value in this batch
LEARNING_RATE, MOMENTUM = 0.05, 0.9  # SGD: under Adam a limit that always fires changes little
STEPS = 500  # the monitor judges rates over 200 steps
BATCH, FEATURES, UNITS = 64, 8, 64  # small, so that a step takes a millisecond


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(FEATURES, UNITS, rngs=rngs)
        self.out = nnx.Linear(UNITS, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x)))[:, 0]


def batch_at(step: int) -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(step).normal(size=(BATCH, FEATURES)).astype(np.float32)
    y = np.sin(x[:, 0] * x[:, 1]) + x[:, 2]
    if step == NAN_BATCH:
        x[0, 0] = np.nan
    return jnp.asarray(x), jnp.asarray(y)


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def train(max_norm: float, steps: int) -> gc.Monitor:
    """Train with one limit; the monitor has the norms, the losses and the alerts of the run."""
    model = MLP(nnx.Rngs(0))
    sgd = optax.sgd(LEARNING_RATE, MOMENTUM)
    tx = optax.chain(gc.clip_by_global_norm(max_norm), sgd)  # the clip, then the optimizer
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # Without `on_alert`, an alert is a Python warning.
    monitor = gc.Monitor(on_alert=lambda alert: print(f"[{alert.kind}] {alert}\n"))
    for step in range(steps):
        loss = train_step(model, optimizer, *batch_at(step))
        monitor.record(step, gc.metrics(optimizer), loss=loss)  # does not wait for the device
    monitor.flush()
    return monitor


def main(steps: int = STEPS) -> tuple[float, float]:
    """The median loss of the last 50 steps with the limit that is too low and the suggested one."""
    print(f"Limit {TOO_LOW:g}:\n")
    first = train(TOO_LOW, steps)
    first.plot("monitoring.png")
    first.save_html("monitoring.html")
    advice = first.suggest()  # `suggest_max_norm` of the norms, which are measured before the clip
    print(advice)
    print(f"\nLimit {advice.max_norm:g}:\n")
    second = train(advice.max_norm, steps)
    ends = (
        float(np.nanmedian(first.history["loss"][-50:])),
        float(np.nanmedian(second.history["loss"][-50:])),
    )
    print(
        f"With a limit of {TOO_LOW:g} the loss ends at {ends[0]:.2f}, with the suggested "
        f"{advice.max_norm:g} at {ends[1]:.2f} (monitoring.png, monitoring.html)."
    )
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Alerts on gradient clipping, and a better limit.")
    parser.add_argument("--steps", type=int, default=STEPS)
    main(parser.parse_args().steps)
