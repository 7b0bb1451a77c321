"""Writers for the rows of a monitor: TensorBoard, CSV, JSON lines."""

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .background import in_background

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins so for a formula."""

Writer = Callable[[int, dict[str, float]], Any]
"""`(step, row)`: the row has the columns of the history and whatever else was recorded."""


def to_tensorboard(directory: str | os.PathLike[str]) -> Writer:
    """Write rows as TensorBoard scalars, on disk within a second; needs tensorboardX.

    A thread writes them, so that training does not wait for the disk. If the disk is full or gone,
    one warning says so, no further rows are written, and training goes on.

    Args:
      directory: Where the event files go; it is created.

    Raises:
      ImportError: Where tensorboardX is not installed.

    >>> import gradclip_jax, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     monitor = gradclip_jax.Monitor(writers=[gradclip_jax.monitor.to_tensorboard(directory)])
    ...     monitor.record(0, {"grad_norm": 1.0})
    """
    try:
        from tensorboardX import event_file_writer, record_writer, summary
        from tensorboardX.proto import event_pb2
    except ImportError as error:
        raise ImportError(
            "`to_tensorboard` needs tensorboardX: `pip install 'gradclip-jax[tensorboard]'`."
        ) from error
    # Not a `SummaryWriter`: when a full disk ends its thread, its queue fills and blocks.
    record_writer.directory_check(os.fspath(directory))
    messages: Any = event_pb2  # generated code, whose names pyright does not see
    events = event_file_writer.EventsWriter(os.path.join(directory, "events"))

    def write(step: int, row: dict[str, float], wall_time: float) -> None:
        for key, value in row.items():
            if math.isfinite(value):
                scalar = summary.scalar(key, value)
                event = messages.Event(step=step, wall_time=wall_time, summary=scalar)
                events.write_event(event)

    return in_background("to_tensorboard", write, events.flush)


def to_csv(path: str | os.PathLike[str]) -> Writer:
    """Append rows to a CSV file: `step` and the keys of the first row, NaN for missing numbers.

    Names are quoted as in RFC 4180. An apostrophe precedes a name that a spreadsheet would take for
    a formula, because it begins with `=`, `+`, `-`, `@`, a tab or a carriage return.

    Raises:
      ValueError: For a file that has other columns, when the first row is written.

    >>> import gradclip_jax, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pathlib.Path(directory, "norms.csv")
    ...     monitor = gradclip_jax.Monitor(writers=[gradclip_jax.monitor.to_csv(path)])
    ...     monitor.record(7, {"grad_norm": 1.5})
    ...     header, row = path.read_text().splitlines()
    >>> print(header.split(",")[:3], row.split(",")[:3])
    ['step', 'clip_factor', 'clip_limit'] ['7', 'nan', 'nan']
    """
    place = Path(path)
    columns: list[str] = []

    def write(step: int, row: dict[str, float]) -> None:
        if not columns:
            keys = sorted(row)
            header = ["step", *("'" * key.startswith(FORMULA_STARTS) + key for key in keys)]
            known = _header(place)
            if known and known != header:
                raise ValueError(
                    f"`path` must be a new file or one with the columns of this run, got {place} "
                    f"with {','.join(known)}."
                )
            if not known:
                with place.open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerow(header)
            columns.extend(keys)
        with place.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([step, *(row.get(key, math.nan) for key in columns)])

    return write


def _header(place: Path) -> list[str]:
    """The column names of a CSV file, empty if there is none; a quoted name may span lines."""
    if not place.exists():
        return []
    with place.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def to_json_lines(path: str | os.PathLike[str]) -> Writer:
    """Append rows to a file, a JSON object per line; null for NaN and infinity.

    >>> import gradclip_jax, json, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pathlib.Path(directory, "norms.jsonl")
    ...     monitor = gradclip_jax.Monitor(writers=[gradclip_jax.monitor.to_json_lines(path)])
    ...     monitor.record(7, {"grad_norm": 1.5})
    ...     row = json.loads(path.read_text())
    >>> row["step"], row["grad_norm"], row["loss"]
    (7, 1.5, None)
    """
    place = Path(path)

    def write(step: int, row: dict[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with place.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    return write
