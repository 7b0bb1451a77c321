"""A writer in a thread of its own: a disk that is slow, or full, holds up no step of training."""

import atexit
import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from .alerts import warn_user

PERIOD = 1.0
"""Seconds between two flushes: each waits for the disk."""
MAX_WAITING = 10_000
"""Rows that wait for a disk that hangs; beyond that the oldest are dropped."""
LAST_SECONDS = 10.0
"""How long the end of the process waits for the last rows."""


def in_background(
    name: str,
    write: Callable[[int, dict[str, float], float], Any],
    flush: Callable[[], Any],
) -> Callable[[int, dict[str, float]], None]:
    """Hand rows to a thread that calls `write(step, row, time)`, and `flush` after them.

    When one of the two raises, one warning says so, and all further rows are dropped.
    """
    waiting = collections.deque[tuple[int, dict[str, float], float]](maxlen=MAX_WAITING)
    closing = threading.Event()
    failures: list[Exception] = []
    told: list[Exception] = []

    def work() -> None:
        try:
            is_last = False
            while not is_last:
                is_last = closing.wait(PERIOD)
                count = len(waiting)
                for _ in range(count):
                    write(*waiting.popleft())
                if count:
                    flush()
        except Exception as error:
            failures.append(error)
            waiting.clear()

    def tell() -> None:
        if failures and not told:
            told.append(failures[0])
            warn_user(
                f"`{name}` must be able to write, got {type(failures[0]).__name__}: {failures[0]}. "
                "Its rows are dropped from here on and training goes on: make room, and begin a "
                "new file.",
                RuntimeWarning,
            )

    def put(step: int, row: dict[str, float]) -> None:
        if failures:
            tell()
        else:
            waiting.append((step, row, time.time()))

    def close() -> None:
        closing.set()
        thread.join(LAST_SECONDS)
        tell()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    atexit.register(close)
    return put
