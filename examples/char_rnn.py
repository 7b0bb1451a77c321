"""An LSTM on characters in Flax NNX, trained with gradient clipping and without.

    python examples/char_rnn.py

About a minute on two cores. The text is the help that every Python ships (`help("topics")`).
"""

import argparse
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import gradclip_jax as gc

MAX_NORM = 10.0  # the large LSTM of Zaremba et al. 2014; their loss is summed over time, too
UNROLL = 50  # 35 words in the paper; a character says less than a word
LEARNING_RATE = 0.5  # 1 in the paper, for sums of fewer terms. At 0.3 both runs train
UNITS = 128  # 1,500 in the paper; a small network explodes in the same way
BATCH = 32  # 20 in the paper
STEPS = 400  # enough to spell; without the clip the first ten are enough to diverge
SEED = 0  # of weights and batches: both runs start from the same weights and see the same text

TEXT = "\n".join(topics.values())
VOCABULARY = sorted(set(TEXT))
TOKENS = np.searchsorted(VOCABULARY, list(TEXT)).astype(np.int32)


def new_model() -> nnx.Sequential:
    """Characters [batch, time] to the logits of the character after each."""
    rngs = nnx.Rngs(SEED)
    return nnx.Sequential(
        nnx.Embed(len(VOCABULARY), UNITS, rngs=rngs),
        nnx.RNN(nnx.OptimizedLSTMCell(UNITS, UNITS, rngs=rngs)),
        nnx.Linear(UNITS, len(VOCABULARY), rngs=rngs),
    )


def loss_of(model: nnx.Sequential, tokens: jax.Array) -> jax.Array:
    """Nats, summed over time and averaged over the batch."""
    logits = model(tokens[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return nats.sum(axis=1).mean()


@nnx.jit
def train_step(model: nnx.Sequential, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, grads)
    return loss


def train(clip: optax.GradientTransformation, steps: int) -> np.ndarray:
    """The loss of each step, in bits per character."""
    model = new_model()
    tx = optax.chain(clip, optax.sgd(LEARNING_RATE))  # the clip stands in front of the optimizer
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(SEED)
    bits = []
    for step in range(steps):
        starts = rng.integers(len(TOKENS) - UNROLL, size=(BATCH, 1))
        tokens = jnp.asarray(TOKENS[starts + np.arange(UNROLL + 1)])
        loss = train_step(model, optimizer, tokens)
        bits.append(float(loss) / UNROLL / np.log(2))
        if step % 50 == 0 or step == steps - 1:
            seen = gc.metrics(optimizer)
            print(
                f"step {step:4d}   {bits[-1]:7.2f} bits per character   "
                f"norm {seen['grad_norm']:8.1f}   clipped {seen['clip_count']:3.0f} times"
            )
    return np.array(bits)


def plot(clipped: np.ndarray, unclipped: np.ndarray) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    lines = ((clipped, f"clip_by_global_norm({MAX_NORM:g})", "C0"), (unclipped, "no clip", "C3"))
    for bits, label, color in lines:
        axes.semilogy(bits, color=color, lw=1)
        axes.annotate(label, (len(bits) - 1, np.median(bits[-50:])), (5, 0), color=color,
                      textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    uniform = np.log2(len(VOCABULARY))
    axes.axhline(uniform, color="gray", lw=0.8, ls=":")
    axes.annotate("every character equally likely", (len(clipped) / 2, uniform), (0, 3),
                  textcoords="offset points", color="gray")  # fmt: skip
    axes.set(
        title="An LSTM in Flax NNX: the same weights and text",
        xlabel="step",
        ylabel="bits per character",
    )
    axes.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("char_rnn.png", dpi=120)


def main(steps: int = STEPS) -> tuple[float, float]:
    """Bits per character at the end, with the clip and without."""
    print(f"With the clip, limit {MAX_NORM:g}:")
    clipped = train(gc.clip_by_global_norm(MAX_NORM), steps)
    print("Without: a limit of None measures the norm and clips nothing.")
    unclipped = train(gc.clip_by_global_norm(None), steps)
    plot(clipped, unclipped)
    ends = float(clipped[-20:].mean()), float(unclipped[-20:].mean())
    print(
        f"With the clip {ends[0]:.2f} bits per character in the last 20 steps; without, "
        f"{ends[1]:.2f} (char_rnn.png)."
    )
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An LSTM with gradient clipping and without.")
    parser.add_argument("--steps", type=int, default=STEPS)
    main(parser.parse_args().steps)
