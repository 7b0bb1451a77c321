"""A training loop that continues bit for bit after Ctrl-C or a kill."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.language_model.run import (
    Board,
    Checkpoints,
    History,
    progress,
    restore,
    saved_result,
    write_json,
)

# Scalars stay on the device for this many steps: fetching each at once would stall a fast one.
FETCH_EVERY = 20

Step = Callable[[Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
"""`(state, number of the step) -> (state, scalars)`; the number decides which data are used."""


def train(
    step: Step,
    state: Any,
    steps: int,
    out: Path,
    *,
    title: str,
    config: dict[str, Any],
    per_step: int,
    unit: str = "examples",
    checkpoint_every: int = 500,
) -> tuple[Any, History]:
    """The state after `steps` steps, and every scalar of every step.

    What the next step depends on must be in the state (parameters, optimizer, random keys): a tree
    of arrays. It is saved in `out` every `checkpoint_every` steps and on Ctrl-C, and the same call
    continues from there. `config` is what distinguishes runs: a directory of another run is
    refused. Scalars must have `loss`, and those of `gradclip_jax.metrics` are shown. Each step
    counts for `per_step` units in the speed that is shown.

    Raises:
      InputError: For a directory that holds another run, a checkpoint that cannot be read, and a
        disk that is full: the last checkpoint stays.
      KeyboardInterrupt: On Ctrl-C, when the state is saved.
    """
    saved_result(out, config)
    at, state, history = restore(out, state, {})
    write_json(out / "config.json", config)
    pending: list[dict[str, jax.Array]] = []
    with (
        Checkpoints(out) as checkpoints,
        Board(out, at) as writer,
        progress(title, steps, at, per_step, unit) as show,
        interruptions() as interrupted,
    ):
        while at < steps:
            state, scalars = step(state, jnp.int32(at))
            pending.append(scalars)
            at += 1
            stops = at == steps or bool(interrupted)
            saves = stops or at % checkpoint_every == 0
            if saves or at % FETCH_EVERY == 0:
                for number, row in enumerate(jax.device_get(pending), start=at - len(pending) + 1):
                    for name, value in row.items():
                        history.setdefault(name, []).append(float(value))
                        writer.add_scalar(name, float(value), number)
                pending.clear()
                show(at, history)
            if saves:
                checkpoints.save(at, state, history)
            if interrupted and at < steps:
                raise KeyboardInterrupt
    return state, history


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, instead of breaking off a step whose buffers are donated."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)
