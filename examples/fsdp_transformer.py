"""FSDP: a Transformer sharded over a mesh, clipped by the norm of its whole gradient.

    python examples/fsdp_transformer.py

A minute on two cores, where eight CPU devices stand in for accelerators. Under `jit` the clip needs
no argument: XLA sums over all shards. The same training on one device measures the same norms. The
text is the help that every Python ships (`help("topics")`).
"""

import argparse
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import gradclip_jax as gc

MAX_NORM = 0.5  # clips about half of the steps, so that a wrong norm would change the losses
LEARNING_RATE = 3e-3  # common for AdamW and a network of this size
WARM_UP = 20  # steps; a Transformer whose first steps are long may diverge
STEPS = 100  # enough to halve the loss
BATCH = 32  # sequences: four on each of eight devices
CONTEXT, UNITS, HEADS, LAYERS = 32, 64, 4, 2  # small enough for a CPU
SEED = 0  # of weights and batches

TEXT = "\n".join(topics.values())
VOCABULARY = sorted(set(TEXT))
TOKENS = np.searchsorted(VOCABULARY, list(TEXT)).astype(np.int32)


class Block(nnx.Module):
    """Causal self-attention and a network of two layers, each on a residual."""

    def __init__(self, rngs: nnx.Rngs):
        self.first_norm, self.second_norm = (nnx.RMSNorm(UNITS, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, UNITS, decode=False, rngs=rngs)
        self.up = nnx.Linear(UNITS, 4 * UNITS, rngs=rngs)
        self.down = nnx.Linear(4 * UNITS, UNITS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        causal = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.first_norm(x), mask=causal)
        return x + self.down(nnx.gelu(self.up(self.second_norm(x))))


class Transformer(nnx.Module):
    """Characters [batch, time] to the logits of the character after each."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(len(VOCABULARY), UNITS, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, UNITS, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(LAYERS))
        self.norm = nnx.RMSNorm(UNITS, rngs=rngs)
        self.logits = nnx.Linear(UNITS, len(VOCABULARY), rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def loss_of(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Mean nats per character."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def shard(module: nnx.Module | nnx.Optimizer, mesh: Mesh) -> None:
    """Split each array along its first axis that the number of devices divides."""

    def place(x: jax.Array) -> jax.Array:
        sizes = [size % mesh.size == 0 for size in x.shape]
        axis = sizes.index(True) if True in sizes else None
        spec = P() if axis is None else P(*[None] * axis, "data")  # P(): a copy on each device
        return jax.device_put(x, NamedSharding(mesh, spec))

    nnx.update(module, jax.tree.map(place, nnx.state(module)))


@nnx.jit
def train_step(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, grads)
    return loss


def train(count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The loss and the gradient norm of each step, on the first `count` devices."""
    mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])
    rate = optax.linear_schedule(0.0, LEARNING_RATE, WARM_UP)
    tx = optax.chain(gc.clip_by_global_norm(MAX_NORM), optax.adamw(rate))  # as on one device
    model = Transformer(nnx.Rngs(SEED))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shard(model, mesh)
    shard(optimizer, mesh)  # AdamW's two moments take twice the memory of the weights
    rng = np.random.default_rng(SEED)
    losses, norms = [], []
    for step in range(steps):
        starts = rng.integers(len(TOKENS) - CONTEXT, size=(BATCH, 1))
        batch = TOKENS[starts + np.arange(CONTEXT + 1)]
        tokens = jax.device_put(batch, NamedSharding(mesh, P("data")))
        losses.append(float(train_step(model, optimizer, tokens)))
        norms.append(float(gc.metrics(optimizer)["grad_norm"]))
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:3d}   loss {losses[-1]:.4f}   norm {norms[-1]:.6f}")
    return np.array(losses), np.array(norms)


def plot(one: tuple[np.ndarray, ...], many: tuple[np.ndarray, ...], devices: int) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name, wide, thin in zip(panels, ("loss", "gradient norm"), one, many, strict=True):
        axes.plot(wide, color="C1", lw=5, alpha=0.5)
        axes.plot(thin, color="C0", lw=1)
        axes.set(title=name, xlabel="step", ylim=(0, None))
        axes.text(0.4, 0.9, "one device (wide)", color="C1", transform=axes.transAxes)
        axes.text(0.4, 0.82, f"{devices} devices (thin)", color="C0", transform=axes.transAxes)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].axhline(MAX_NORM, color="gray", ls=":")
    panels[1].annotate("limit", (0, MAX_NORM), (0, 3), color="gray", textcoords="offset points")
    figure.savefig("fsdp_transformer.png", dpi=120)


def main(steps: int = STEPS) -> float:
    """The largest relative difference between the norms on all devices and on one."""
    count = jax.device_count()
    print(f"{count} devices:")
    losses, norms = many = train(count, steps)
    print("One device:")
    one = train(1, steps)
    plot(one, many, count)
    difference = float(np.max(np.abs(norms / one[1] - 1)))
    print(
        f"The loss falls from {losses[0]:.2f} to {losses[-1]:.2f} on {count} devices; the norms "
        f"differ from those of one device by at most {difference:.0e} (fsdp_transformer.png)."
    )
    return difference


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # has no effect where there are accelerators
    parser = argparse.ArgumentParser(description="A sharded Transformer with gradient clipping.")
    parser.add_argument("--steps", type=int, default=STEPS)
    main(parser.parse_args().steps)
