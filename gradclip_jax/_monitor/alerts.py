"""Alerts: one for each episode in which a condition on the records of a run holds."""

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
MIN_STEPS = 20
"""Steps recorded before a rate, a share or a spread is believed."""
QUIET_RECORDS = 5
"""Records without the condition before an episode ends, however far apart they are."""


class ClipWarning(UserWarning):
    """The category of the warnings of a `Monitor` without `on_alert`."""


@dataclasses.dataclass(frozen=True)
class Alert:
    """What is wrong with a run, since when, and what to try; raised once per episode.

    An episode ends when its condition has been false for the `window` of the monitor and five
    records, so that a condition that comes and goes raises one alert.

    | kind | when |
    |---|---|
    | `nonfinite` | a loss or a norm is NaN or infinite |
    | `limit_too_low` | more than `max_rate` of the updates are clipped over the window |
    | `limit_inert` | none in 1,000 updates, or in a window whose norms are all below a tenth |
    | `norm_growing` | the norm grew tenfold over the last 16, 32, …, 1024 norms, exponentially |
    | `loss_spike` | a loss is above its median by 10 deviations, four times as far as any before |
    | `diverged` | 20 losses in a row are all above twice the largest of the first three |
    | `dominating_leaf` | one leaf has 95 % of the squared norm, over 20 records |
    | `frozen` | the counter of updates, or the norm, has not changed for 100 steps |
    | `not_reduced` | the limit was exceeded, and what reached the optimizer is above it |
    | `behind_optimizer` | ten times the norm that the clip saw reached the optimizer, thrice |

    The last one needs `update_norm` in `Monitor.record`. Without it, a clip behind the optimizer
    looks like one whose limit is too high, and `limit_inert` asks to check its place first.

    Attributes:
      kind: One of the kinds above.
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


class Finding(NamedTuple):
    """What a condition that holds has found."""

    since: int
    message: str
    advice: str


class Recent:
    """The latest records: at least `window` steps, and at least 20 of them recorded."""

    def __init__(self, window: int):
        self.window, self.rows = window, collections.deque[Row]()
        self._steps, self._clipped = 0, 0.0

    def add(self, row: Row) -> None:
        """Add a row, and drop those that are no longer needed."""
        rows = self.rows
        rows.append(row)
        self._count(row, 1)
        while len(rows) > 1 and self._is_full(rows[1].first, self._steps - rows[0].size):
            self._count(rows.popleft(), -1)

    def _count(self, row: Row, sign: int) -> None:
        self._steps += sign * row.size
        self._clipped += sign * row.size * (0.0 if math.isnan(row.clipped) else row.clipped)

    def _is_full(self, first: int, steps: int) -> bool:
        return first <= self.rows[-1].step - self.window + 1 and steps >= MIN_STEPS

    @property
    def is_full(self) -> bool:
        """Whether the run is as long as the window."""
        return self._is_full(self.rows[0].first, self._steps)

    @property
    def clip_rate(self) -> float:
        """Share of the steps that were clipped."""
        return self._clipped / self._steps

    @property
    def late_clip_rate(self) -> float:
        """Share of the steps in the second half of the window that were clipped."""
        half = [row for row in self.rows if row.step > self.rows[-1].step - self.window // 2]
        return sum(row.clipped * row.size for row in half) / sum(row.size for row in half)

    def increase_of(self, count: str) -> float:
        """By how much a counter rose after the first step; NaN where it was not given."""
        first, last = (row.values.get(count) for row in (self.rows[0], self.rows[-1]))
        return math.nan if first is None or last is None else float(last[-1] - first[0])


Condition = Callable[[Row, Recent], Finding | None]


class Episodes:
    """Raises an alert when a condition begins to hold, once per episode.

    An episode ends when its condition has been false for `window` steps and five records. Then the
    window over which rates are judged holds nothing of the episode. A condition that comes and goes
    (while a loss scale finds its value, say) raises one alert.
    """

    def __init__(self, conditions: Mapping[str, Condition], window: int):
        self.conditions, self.recent = conditions, Recent(window)
        self._last: dict[str, tuple[int, int]] = {}

    def add(self, row: Row) -> list[Alert]:
        """The alerts that begin with this record."""
        self.recent.add(row)
        alerts = []
        for kind, condition in self.conditions.items():
            found = condition(row, self.recent)
            if found is not None:
                if kind not in self._last:
                    alerts.append(Alert(kind, row.step, *found))
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
