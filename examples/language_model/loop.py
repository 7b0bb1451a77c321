"""The training loop of all examples: it continues bit for bit after Ctrl-C or a kill."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.language_model.checkpoints import Checkpoints
from examples.language_model.command_line import console
from examples.language_model.directory import History, saved_result, write_json
from examples.language_model.progress import NATS, progress
from examples.language_model.scalars import Board

# Scalars stay on the device for this many steps: fetching each at once would stall a fast one.
FETCH_EVERY = 20

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
"""`(state, number of the step) -> (state, scalars)`; the number decides which data are used."""


Scalars = list[dict[str, Any]]


class Placement(NamedTuple):
    """How a step wants its state on the devices, how a checkpoint does, and scalars on the host."""

    place: Callable[[Any], Any] = lambda state: state
    plain: Callable[[Any], Any] = lambda state: state
    fetch: Callable[[Scalars], Scalars] = jax.device_get


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
    loss_in: tuple[str, float] = NATS,
    checkpoint_every: int = 500,
    fetch_every: int = FETCH_EVERY,
    validate: Callable[[Any], float] | None = None,
    validate_every: int = 1,
    until_lost: bool = False,
    placement: Placement = Placement(),  # noqa: B008 (it is immutable)
) -> tuple[Any, History]:
    """The state after `steps` steps, and every scalar of every step.

    What the next step depends on must be in the state (parameters, optimizer, random keys): a tree
    of arrays. It is saved in `out` every `checkpoint_every` steps and on Ctrl-C, and the same call
    continues from there. `config` is what distinguishes runs: a directory of another run is
    refused. Scalars must have `loss`, and those of `gradclip_jax.metrics` are shown. Each step
    counts for `per_step` units in the speed that is shown. `validate` is called every
    `validate_every` steps and at the end: `valid` of the history has the step and its result.
    `until_lost` ends a run whose loss is not finite: without a clip nothing brings it back.

    Raises:
      InputError: For a directory that holds another run, a checkpoint that cannot be read, and a
        disk that is full: the last checkpoint stays.
      KeyboardInterrupt: On Ctrl-C, when the state is saved.
    """
    saved_result(out, config)
    leads, alone = jax.process_index() == 0, jax.process_count() == 1
    pending: Scalars = []
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(out))
        # Before anything is written: a checkpoint that does not fit stops the run here.
        at, state, history = checkpoints.restore(state)
        if at >= steps:
            say_finished(title, out)
            return placement.place(state), history
        if at:
            console.print(f"{title}: continues from step {at:,} of {steps:,} in {out}")
        # A peer that is slower still reads what is there before the first writes.
        multihost_utils.sync_global_devices("read")
        if leads:
            write_json(out / "config.json", config)
        state = placement.place(state)
        board = stack.enter_context(Board(out, at)) if leads else None
        show = stack.enter_context(progress(title, steps, at, per_step, unit, loss_in))
        # One of several processes cannot save alone: Ctrl-C ends it, and with it the others.
        interrupted = stack.enter_context(interruptions()) if alone else []
        while at < steps:
            state, scalars = step(state, np.int32(at))
            pending.append(scalars)
            at += 1
            stops = at == steps or bool(interrupted)
            saves = stops or at % checkpoint_every == 0
            validates = validate is not None and (at == steps or at % validate_every == 0)
            if saves or validates or at % fetch_every == 0:
                rows = placement.fetch(pending)
                for number, row in enumerate(rows, start=at - len(rows) + 1):
                    for name, value in row.items():
                        history.setdefault(name, []).append(float(value))
                        if board:
                            board.add_scalar(name, float(value), number)
                pending.clear()
                show(at, history)
            if validate is not None and validates:
                history.setdefault("valid", []).append([at, validate(state)])
                if board:
                    board.add_scalar("valid_loss", history["valid"][-1][1], at)
            if saves:
                if board:
                    board.flush()
                checkpoints.save(at, placement.plain(state), history)
            if interrupted and at < steps:
                raise KeyboardInterrupt
            lost = bool(history.get("loss")) and not math.isfinite(history["loss"][-1])
            if until_lost and lost and at % fetch_every == 0:
                break
    return state, history


def say_finished(title: str, out: Path) -> None:
    """A run that is not done again says so, and how to start anew."""
    console.print(f"{title}: finished. To train anew, delete {out} or give another --out.")


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, instead of breaking off a step whose buffers are donated."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)
