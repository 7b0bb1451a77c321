"""A bar as wide as the terminal; a line every ten seconds where there is none."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from examples.language_model.command_line import console
from examples.language_model.directory import History

RECENT = 100  # steps over which the numbers average
PLAIN_LINE_SECONDS = 10.0  # between two lines where there is no terminal to draw a bar on
NATS = ("", 1.0)


@contextlib.contextmanager
def progress(
    title: str,
    steps: int,
    step: int,
    per_step: int,
    unit: str = "examples",
    loss_in: tuple[str, float] = NATS,
) -> Iterator[Callable[[int, History], None]]:
    """A function of step and history that shows where the run is and how fast it goes.

    `loss_in` is a unit of the loss and its size in those of the history.
    """
    bar = Progress(
        BarColumn(bar_width=None), TextColumn("step {task.completed:,} of {task.total:,}"),
        TimeRemainingColumn(compact=True), TextColumn("left"), expand=True, console=console,
    )  # fmt: skip
    task = bar.add_task(title, total=steps, completed=step)
    first, start, last_line = step, time.monotonic(), time.monotonic()
    status = Text(no_wrap=True, overflow="ellipsis")
    terminal = console.is_terminal and not console.quiet
    if terminal:
        console.print(title)
    # Nothing is drawn where there is no terminal.
    with Live(Group(bar, status), console=console) if terminal else contextlib.nullcontext():

        def show(step: int, history: History) -> None:
            nonlocal last_line
            speed = (step - first) * per_step / (time.monotonic() - start)
            line = f"{numbers(history, loss_in)} · {speed:,.0f} {unit}/s"
            status.plain = line
            bar.update(task, completed=step)
            if not terminal and (
                time.monotonic() - last_line > PLAIN_LINE_SECONDS or step == steps
            ):
                console.print(f"{title}: step {step:,} of {steps:,} · {line}")
                last_line = time.monotonic()

        yield show


def numbers(history: History, loss_in: tuple[str, float] = NATS) -> str:
    """Loss, norm and clip rate over the recent steps, as far as there are any."""
    unit, size = loss_in
    recent = {
        name: float(np.mean(history[name][-RECENT:]))
        for name in ("loss", "grad_norm", "clipped")
        if history.get(name)
    }
    parts = [" ".join(filter(None, [f"loss {recent['loss'] / size:.3f}", unit]))]
    if "grad_norm" in recent:
        parts += [f"norm {plain(recent['grad_norm'])}", f"clipped {recent['clipped']:.0%}"]
    return " · ".join(parts)


def plain(number: float) -> str:
    """A norm without an exponent: 4,100 and 1.86 and 0.006."""
    digits = 3 if abs(number) < 0.1 else 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
    return f"{number:,.{digits}f}"
