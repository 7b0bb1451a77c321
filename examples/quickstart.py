"""Gradient clipping in one line of the optimizer chain, and the norm in the log.

    python examples/quickstart.py

A few seconds.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import gradclip_jax as gc

MAX_NORM = 1.0  # the usual limit; `examples/monitoring.py` chooses one from measured norms
LEARNING_RATE = 0.1  # a hundred times AdamW's usual rate; four parameters need no less
STEPS = 100  # enough to fit a line


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def main(steps: int = STEPS) -> float:
    x = jax.random.normal(jax.random.key(0), (64, 3))
    y = x @ jnp.array([1.0, -2.0, 3.0]) + 0.5
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    optimizer = optax.chain(gc.clip_by_global_norm(MAX_NORM), optax.adamw(LEARNING_RATE))
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, gc.metrics(state)

    loss = jnp.inf
    for step in range(steps):
        params, state, loss, seen = train_step(params, state)
        if step % 20 == 0 or step == steps - 1:
            print(
                f"step {step:3d}   loss {loss:8.4f}   norm {seen['grad_norm']:5.2f}   "
                f"factor {seen['clip_factor']:.2f}   clipped {seen['clip_count']:.0f} times"
            )
    clipped = int(gc.metrics(state)["clip_count"])
    print(f"After {steps} steps the loss is {loss:.1g}; the clip acted on {clipped} of them.")
    return float(loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Gradient clipping in one line of the chain.")
    parser.add_argument("--steps", type=int, default=STEPS)
    main(parser.parse_args().steps)
