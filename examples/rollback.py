"""Rollback on a loss spike: restore a checkpoint, skip the data, lower the learning rate.

    python examples/rollback.py

Forty batches have their inputs in the wrong unit, and the limit is too high to bound what they do:
the ReLUs die. `Monitor` sees the spike, and orbax's `CheckpointManager` takes the run back to a
state from before it. Half a minute on two cores.
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import gradclip_jax as gc

MAX_NORM = 20.0  # a safety net, far above the norms of this run. At 1 it recovers by itself
LEARNING_RATE, MOMENTUM = 0.1, 0.9  # at half the rate, one of three seeds recovers by itself
LOWER = 0.5  # factor on the learning rate at a rollback, for what the skip does not cure
SAVE_EVERY = 50  # batches; PaLM goes back about 100 (Chowdhery et al. 2022, section 5.1)
SKIP = 200  # batches, from the checkpoint on. PaLM skips 200 to 500
CHECK_EVERY = 10  # batches: `flush` waits for the device, so it is not called after every one
ALERTS = {"loss_spike", "nonfinite", "diverged", "norm_growing"}  # those that a rollback can cure
BROKEN = range(425, 465)  # batches in millimeters instead of meters
STEPS = 1000  # batches of data; the spike lies in the middle of them
BATCH, FEATURES, UNITS = 64, 8, 64  # small, so that a step takes a millisecond


def batch_at(position: int) -> tuple[jax.Array, jax.Array]:
    """The same batch whenever it is asked for: a position in the data is a number."""
    x = np.random.default_rng(position).normal(size=(BATCH, FEATURES)).astype(np.float32)
    y = np.sin(x[:, 0] * x[:, 1]) + x[:, 2]
    return jnp.asarray(1000 * x if position in BROKEN else x), jnp.asarray(y)


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, UNITS, rngs=rngs)
        self.second = nnx.Linear(UNITS, UNITS, rngs=rngs)
        self.last = nnx.Linear(UNITS, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))[:, 0]


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def new_model() -> tuple[MLP, nnx.Optimizer]:
    model = MLP(nnx.Rngs(0))
    # `inject_hyperparams` keeps the learning rate in the state, where a rollback can lower it.
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=LEARNING_RATE, momentum=MOMENTUM)
    tx = optax.chain(gc.clip_by_global_norm(MAX_NORM), sgd)  # the clip, then the optimizer
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def roll_back(manager: ocp.CheckpointManager, since: int, model: MLP, optimizer: nnx.Optimizer):
    """Restore the last checkpoint from before batch `since`; return the position to go on from."""
    manager.wait_until_finished()  # a save may still be under way
    good = max(saved for saved in manager.all_steps() if saved <= since)
    for saved in manager.all_steps():
        if saved > good:
            manager.delete(saved)  # it is from after the spike: a later rollback must not take it
    state = nnx.state((model, optimizer))  # for shapes and dtypes: parameters, momentum, clip
    nnx.update((model, optimizer), manager.restore(good, args=ocp.args.StandardRestore(state)))
    rate = optimizer.opt_state[1].hyperparams["learning_rate"]
    rate[...] = rate[...] * LOWER
    print(f"  restored batch {good}, skip to {good + SKIP}, learning rate {float(rate[...]):g}")
    return good + SKIP


def train(steps: int, rollback: bool) -> np.ndarray:
    """The loss on each batch; NaN where it was skipped."""
    model, optimizer = new_model()
    alerts: list[gc.monitor.Alert] = []
    monitor = gc.Monitor(on_alert=alerts.append, window=SAVE_EVERY)
    losses: dict[int, jax.Array] = {}
    position = 0
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
        while position < steps:
            # The position names the checkpoint, so that it is restored with the rest.
            if position % SAVE_EVERY == 0:
                state = nnx.state((model, optimizer))
                manager.save(position, args=ocp.args.StandardSave(state))
            losses[position] = train_step(model, optimizer, *batch_at(position))
            monitor.record(position, gc.metrics(optimizer), loss=losses[position])
            position += 1
            if position % CHECK_EVERY == 0:
                monitor.flush()
                bad = [alert for alert in alerts if alert.kind in ALERTS]
                alerts.clear()
                for alert in bad:
                    print(f"  batch {alert.step}: {alert.kind}. {alert.message}")
                if bad and rollback:
                    since = min(alert.since for alert in bad)
                    resume = roll_back(manager, since, model, optimizer)
                    position = max(position, resume)  # where growth was slow, `since` is long ago
    return np.array([float(losses.get(batch, np.nan)) for batch in range(steps)])


def plot(alone: np.ndarray, rolled_back: np.ndarray) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    lines = ((alone, "without rollback", "C3"), (rolled_back, "with rollback", "C0"))
    for losses, label, color in lines:
        axes.semilogy(losses, color=color, lw=1)
        axes.annotate(label, (len(losses), np.nanmedian(losses[-50:])), (5, 0), color=color,
                      textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    axes.axvspan(BROKEN.start, BROKEN.stop, color="gray", alpha=0.3, lw=0)
    axes.annotate("broken batches", (BROKEN.start, 100), (-5, 0), color="gray",
                  textcoords="offset points", ha="right")  # fmt: skip
    axes.set(title="The same network and data", xlabel="batch", ylabel="loss", xlim=(0, len(alone)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("rollback.png", dpi=120)


def main(steps: int = STEPS) -> tuple[float, float]:
    """The loss at the end without rollback and with it."""
    print("Without rollback:")
    alone = train(steps, rollback=False)
    print("With rollback:")
    rolled_back = train(steps, rollback=True)
    plot(alone, rolled_back)
    ends = float(np.nanmean(alone[-50:])), float(np.nanmean(rolled_back[-50:]))
    print(f"Without rollback the loss ends at {ends[0]:.3f}, with it at {ends[1]:.3f}.")
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rollback on a loss spike.")
    parser.add_argument("--steps", type=int, default=STEPS)
    main(parser.parse_args().steps)
