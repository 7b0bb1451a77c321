"""A record on the host as a row: what the conditions read, and what history and writers keep."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

COLUMNS = (
    "grad_norm_min", "grad_norm", "grad_norm_max", "clip_limit", "clip_factor", "clipped",
    "clip_rate", "nonfinite", "loss_min", "loss", "loss_max", "nonfinite_loss",
)  # fmt: skip
EMPTY, NAN = np.zeros(0), np.full(1, math.nan)


class Row(NamedTuple):
    """One record on the host; NaN or empty where a number was not given."""

    steps: Sequence[int]
    """The steps of the window, or a single one."""
    norms: Sequence[float]
    losses: Sequence[float]
    clip_limit: float
    clip_factor: float
    clipped: float
    clipped_so_far: float
    """Clipped steps of all records up to this one."""
    judged_so_far: int
    """Steps of all records up to this one that say whether they were clipped."""
    clip_count: float
    step_count: float
    nonfinite: float
    """Updates since the record before that were not finite, recorded or counted."""
    nonfinite_loss: int
    leaves: Mapping[str, float]
    values: Mapping[str, np.ndarray]
    """All numbers that were given, each a vector over the steps."""

    @property
    def first(self) -> int:
        """First step of the window."""
        return self.steps[0]

    @property
    def step(self) -> int:
        """Last step of the window."""
        return self.steps[-1]

    @property
    def size(self) -> int:
        """Number of steps in the window."""
        return len(self.steps)

    @property
    def clip_rate(self) -> float:
        """Clipped updates so far, as a share of all."""
        if self.step_count > 0 and not math.isnan(self.clip_count):
            return self.clip_count / self.step_count
        return self.clipped_so_far / self.judged_so_far if self.judged_so_far else math.nan

    def over_steps(self, values: Sequence[float]) -> Iterator[tuple[int, float]]:
        """Pairs of step and value; a single value in a window belongs to its last step."""
        return zip(self.steps[-len(values) :], values, strict=True) if len(values) else iter(())

    def numbers(self) -> dict[str, float]:
        """The columns of the history, and the last value of all other numbers."""
        given = {key: float(value[-1]) for key, value in self.values.items()}
        given |= {f"grad_norm/{path}": norm for path, norm in self.leaves.items()}
        columns = (
            *_min_median_max(self.norms), self.clip_limit, self.clip_factor, self.clipped,
            self.clip_rate, self.nonfinite, *_min_median_max(self.losses),
            float(self.nonfinite_loss) if self.losses else math.nan,
        )  # fmt: skip
        return given | dict(zip(COLUMNS, columns, strict=True))


def new_row(values: dict[str, np.ndarray], size: int, last: Row | None) -> Row:
    """The row of a window of `size` steps that follows the row `last`."""
    steps = _numbered(values["step"], size, last)
    values = {key: value for key, value in values.items() if key != "step"}
    measured = values.get("clip_measure", values.get("grad_norm"))
    norms = values.get("grad_norm", EMPTY if measured is None else measured).tolist()
    losses = values.get("loss", EMPTY).tolist()
    leaves = {
        key.partition("/")[2]: _largest_or_inf(value.tolist())
        for key, value in values.items()
        if key.startswith("grad_norm/")
    }
    share = values.get("clipped")
    if share is None and "clip_limit" in values:
        share = values["clip_limit"] < (NAN if measured is None else measured)
    clipped = math.nan if share is None else float(np.mean(share))
    clipped_so_far, judged_so_far = (last.clipped_so_far, last.judged_so_far) if last else (0.0, 0)
    if not math.isnan(clipped):
        clipped_so_far += clipped * size
        judged_so_far += size
    return Row(
        steps=steps,
        norms=norms,
        losses=losses,
        clip_limit=_last_or_nan(values, "clip_limit"),
        clip_factor=min(values.get("clip_factor", NAN).tolist()),
        clipped=clipped,
        clipped_so_far=clipped_so_far,
        judged_so_far=judged_so_far,
        clip_count=_last_or_nan(values, "clip_count"),
        step_count=_last_or_nan(values, "step_count"),
        nonfinite=_nonfinite(norms, values.get("nonfinite_count"), last),
        nonfinite_loss=sum(not math.isfinite(loss) for loss in losses),
        leaves=leaves,
        values=values,
    )


def _numbered(given: np.ndarray, size: int, last: Row | None) -> list[int]:
    """The steps of a window; the user may give the last one alone."""
    for step in given.tolist():
        if not -(2.0**63) <= step < 2.0**63:  # false for NaN, too
            raise ValueError(f"`step` must be a number below 2**63, got {step:.20g}.")
    steps = [int(step) for step in given]
    if len(steps) < size:
        steps = list(range(steps[-1] - size + 1, steps[-1] + 1))
    # Only the steps that the user gave must rise.
    known = steps if len(given) == size else steps[-1:]
    known = [last.step, *known] if last else known
    for earlier, later in itertools.pairwise(known):
        if later <= earlier:
            raise ValueError(
                f"`step` must rise from record to record, got {later} after {earlier}: a new "
                "run needs a new `Monitor`."
            )
    return steps


def _nonfinite(norms: list[float], count: np.ndarray | None, last: Row | None) -> float:
    """Updates since the last record that were not finite: recorded ones, or as many as counted."""
    seen = sum(not math.isfinite(norm) for norm in norms)
    if count is None:
        return float(seen) if norms else math.nan
    # After a restart from a checkpoint, the first count is an old one.
    before = last.values.get("nonfinite_count", count) if last else count[:1]
    return max(float(seen), float(count[-1] - before[-1]))


def _last_or_nan(values: Mapping[str, np.ndarray], key: str) -> float:
    return float(values[key][-1]) if key in values else math.nan


def _min_median_max(values: Sequence[float]) -> tuple[float, float, float]:
    """Smallest, median and largest of the finite values; NaN if there are none."""
    finite = sorted(x for x in values if math.isfinite(x))
    if not finite:
        return math.nan, math.nan, math.nan
    half = len(finite) // 2
    median = finite[half] if len(finite) % 2 else 0.5 * (finite[half - 1] + finite[half])
    return finite[0], median, finite[-1]


def _largest_or_inf(norms: list[float]) -> float:
    return max(x if math.isfinite(x) else math.inf for x in norms)
