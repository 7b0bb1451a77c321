"""Scalars for TensorBoard."""

import contextlib
import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from examples.language_model.command_line import writing

logging.getLogger("tensorboardX.x2num").setLevel(logging.CRITICAL)  # warns of every NaN


class Board:
    """TensorBoard scalars in `out`; what lies beyond `step` belongs to a run that was killed.

    Written here and now: the thread of a `SummaryWriter` dies of a full disk, and then the run
    waits forever for it to take a scalar.
    """

    def __init__(self, out: Path, step: int):
        self.out, event = out, vars(event_pb2)["Event"]
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(out / "events"))
            start = vars(event_pb2)["SessionLog"](status=1)
            self._file.write_event(event(step=step + 1, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        event = vars(event_pb2)["Event"](
            wall_time=time.time(), step=step, summary=scalar(name, value)
        )
        with writing(self.out):
            self._file.write_event(event)

    def flush(self) -> None:
        with writing(self.out):
            self._file.flush()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        # A full disk was told already where it ended the run.
        with contextlib.suppress(*([OSError] if kind else [])), writing(self.out):
            self._file.close()


def advice(out: Path) -> str:
    """How to look at the scalars, where the program for it is installed."""
    installed = importlib.util.find_spec("tensorboard") is not None
    return f"\nScalars: tensorboard --logdir {out}" if installed else ""
