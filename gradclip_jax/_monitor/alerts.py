"""Alerts, and how a condition on the records of a run becomes one of them per episode."""

import collections
import dataclasses
import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .rows import Row

PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
LEAST_SEEN = 20
"""Steps that must have been seen before a rate, a share or a spread is believed."""
QUIET_RECORDS = 5
"""Records without its condition before an episode ends, however far apart they are."""


class ClipWarning(UserWarning):
    """What a `Monitor` without `on_alert` warns with."""


@dataclasses.dataclass(frozen=True)
class Alert:
    """One episode of something that is wrong, told at its first record.

    Attributes:
      kind: One of `nonfinite`, `limit_too_low`, `limit_inert`, `norm_growing`, `loss_spike`,
        `diverged`, `dominating_leaf`, `frozen`, `not_reduced` and `behind_optimizer`.
      step: Step of the record that raised it.
      since: First step at which the condition held, as far as the records tell.
      message: What was seen, with its numbers.
      advice: What to try.
    """

    kind: str
    step: int
    since: int
    message: str
    advice: str

    def __str__(self) -> str:
        """As a warning shows it."""
        return f"{self.message} {self.advice}"


class Seen(NamedTuple):
    """A condition that holds."""

    since: int
    message: str
    advice: str


class Recent:
    """The latest records: those of at least `window` steps, of which at least 20 were seen."""

    def __init__(self, window: int):
        self.window, self.rows = window, collections.deque[Row]()
        self._seen, self._clipped = 0, 0.0

    def add(self, row: Row) -> None:
        """Take one in, and let go of those that are no longer needed."""
        rows = self.rows
        rows.append(row)
        self._count(row, 1)
        while len(rows) > 1 and self._is_full(rows[1].first, self._seen - rows[0].size):
            self._count(rows.popleft(), -1)

    def _count(self, row: Row, sign: int) -> None:
        self._seen += sign * row.size
        self._clipped += sign * row.size * (0.0 if math.isnan(row.clipped) else row.clipped)

    def _is_full(self, first: int, seen: int) -> bool:
        return first <= self.rows[-1].step - self.window + 1 and seen >= LEAST_SEEN

    @property
    def is_full(self) -> bool:
        """Whether the run is that long already."""
        return self._is_full(self.rows[0].first, self._seen)

    @property
    def clipped(self) -> float:
        """Share of the steps seen that were clipped."""
        return self._clipped / self._seen

    @property
    def clipped_lately(self) -> float:
        """The same over the second half of the window."""
        half = [row for row in self.rows if row.step > self.rows[-1].step - self.window // 2]
        return sum(row.clipped * row.size for row in half) / sum(row.size for row in half)

    def increase_of(self, count: str) -> float:
        """By how much a counter rose after the first step; NaN where it was not given."""
        first, last = (row.values.get(count) for row in (self.rows[0], self.rows[-1]))
        return math.nan if first is None or last is None else float(last[-1] - first[0])


Condition = Callable[[Row, Recent], Seen | None]


class Episodes:
    """Conditions, each of which is told once until it has been false for a while.

    An episode ends when its condition has been false for `window` steps, and five records: then
    nothing of the episode is left in the window over which rates are judged, and what comes and
    goes (a loss scale that finds its value, say) is told once.
    """

    def __init__(self, conditions: Mapping[str, Condition], window: int):
        self.conditions, self.recent = conditions, Recent(window)
        self._last: dict[str, tuple[int, int]] = {}

    def add(self, row: Row) -> list[Alert]:
        """The alerts that begin with this record."""
        self.recent.add(row)
        alerts = []
        for kind, condition in self.conditions.items():
            seen = condition(row, self.recent)
            if seen is not None:
                if kind not in self._last:
                    alerts.append(Alert(kind, row.step, *seen))
                self._last[kind] = (row.step, 0)
            elif kind in self._last:
                step, quiet = self._last[kind]
                self._last[kind] = (step, quiet + 1)
                if row.step - step >= self.recent.window and quiet + 1 >= QUIET_RECORDS:
                    del self._last[kind]
        return alerts


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn where the user's code called the package."""
    frame, depth = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=depth)
