"""What goes wrong in a run: conditions on its records, each with its message and advice."""

import collections
import math
from collections.abc import Iterable

import numpy as np

from .alerts import MIN_STEPS, Finding, Recent
from .rows import Row

MAX_NORMS = 1024
"""The fit of growing norms uses at most this many."""


class Nonfinite:
    """A loss or a gradient is NaN or infinite."""

    def __init__(self):
        self._before: int | None = None

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report every such record."""
        since = row.first if self._before is None else self._before + 1
        self._before = row.step
        if not (row.nonfinite > 0 or row.nonfinite_loss):
            return None
        values = [*row.over_steps(row.norms), *row.over_steps(row.losses)]
        bad = [step for step, value in values if not math.isfinite(value)]
        if bad:
            since = min(bad)
        parts = ["the loss"] if row.nonfinite_loss else []
        if row.nonfinite > 0:
            where = [path for path, norm in row.leaves.items() if not math.isfinite(norm)]
            named = f" (in {', '.join(where[:3])}{', …' * (len(where) > 3)})" if where else ""
            parts.append(f"the norm of the gradient{named}")
        at = f"at step {since}" if bad else f"between step {since} and step {row.step}"
        return Finding(
            since,
            f"NaN or infinite {at}: {' and '.join(parts)}.",
            "A clip makes such an update zero, but Adam's moments and weight decay still act: "
            "`skip_nonfinite(optimizer)` skips the step. If the loss stays so, the parameters are "
            "lost: go back to a checkpoint, lower the learning rate or the limit, look for the "
            "operation with `jax.debug_nans`, and in float16 scale the loss.",
        )


class LimitTooLow:
    """Nearly all updates are clipped."""

    def __init__(self, max_rate: float):
        self.max_rate = max_rate

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report a clip rate over the window above `max_rate`."""
        if not (recent.is_full and math.isfinite(row.clip_limit)):
            return None
        rate, updates = recent.clip_rate, recent.increase_of("step_count")
        if updates == 0 and len(recent.rows) > 1:
            return None
        if updates > 0:
            # The counter counts an update if any group was clipped; the records have the share
            # of groups. Only the counter knows the steps between two records.
            rate = min(rate, recent.increase_of("clip_count") / updates)
        # Norms fall at the start of a run: then the second half of the window is clipped less.
        if not (rate > self.max_rate and recent.late_clip_rate > self.max_rate):
            return None
        norms = [x for each in recent.rows for x in each.norms if math.isfinite(x)]
        usual = float(np.median(norms)) if norms else math.nan
        return Finding(
            recent.rows[0].first,
            f"The clip acted on {rate:.0%} of the updates from step {recent.rows[0].first} to "
            f"{row.step}: the limit is {row.clip_limit:.3g}, the median norm {usual:.3g}. It no "
            "longer holds back spikes, it sets the size of every step.",
            "Under SGD that is a smaller learning rate in disguise: raise the limit "
            "(`suggest_max_norm` says how far), or keep it and tune the learning rate to it. Under "
            "Adam and its like it matters little, for they are invariant to the scale of the "
            "gradient. Where every step should be clipped (`autoclip`, `normalize_by_norm`), give "
            "`max_rate=1`.",
        )


class LimitInert:
    """The clip has never acted: in 1,000 updates, or in a window far below the limit."""

    UPDATES = 1000
    FAR = 10.0
    """A limit is far too high from this multiple of the largest norm."""

    def __init__(self, window: int):
        self.window = window
        self._fired, self._largest = False, 0.0
        self._first: Row | None = None
        self._steps_recorded = 0

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report a run without a clipped update; a clip with an infinite limit only measures."""
        self._fired |= row.clip_count > 0 or row.clipped > 0
        if self._fired or not math.isfinite(row.clip_limit):
            self._first = None
            return None
        if self._first is None:
            self._first, self._steps_recorded, self._largest = row, 0, 0.0
        self._steps_recorded += row.size
        self._largest = max(self._largest, *(x for x in row.norms if math.isfinite(x)), 0.0)
        counted = row.step_count - self._first.step_count
        updates = int(self._steps_recorded if math.isnan(counted) else counted + self._first.size)
        is_far = self.window <= updates and row.clip_limit > self.FAR * self._largest > 0
        if self._steps_recorded < MIN_STEPS or not (is_far or updates >= self.UPDATES):
            return None
        return Finding(
            self._first.first,
            f"The clip has not acted once in {updates} updates: the limit is {row.clip_limit:.3g}, "
            f"the largest norm seen {self._largest:.3g}.",
            "Look first whether it stands behind the optimizer: there it sees steps of the size of "
            "the learning rate and not gradients, and belongs in front, `optax.chain(clip, "
            "optimizer)`. In front of it, it is a harmless safety net, but the run is one without "
            "a clip. To hold back the largest norms, lower the limit to what `Monitor.suggest()` "
            "says; to measure alone, give `max_norm=inf`.",
        )


class NormGrowing:
    """The norm grows exponentially: its logarithm is a straight line that rises by log 10."""

    MIN_NORMS = 16
    BLOCKS = 32
    GROWTH = math.log(10.0)
    SIGNIFICANCE = 12.0
    """Standard errors of a slope that is not noise: many, as neighboring norms are correlated."""

    def __init__(self):
        self._steps: list[int] = []
        self._logs: list[float] = []

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report tenfold growth over the last 16, 32, 64, … norms that is not slowing down."""
        for step, norm in row.over_steps(row.norms):
            if math.isfinite(norm) and norm > 0:
                self._steps.append(step)
                self._logs.append(math.log(norm))
        if len(self._logs) > 2 * MAX_NORMS:
            del self._steps[:-MAX_NORMS], self._logs[:-MAX_NORMS]
        count, best = self.MIN_NORMS, None
        while count <= min(len(self._logs), MAX_NORMS) and best is None:
            # A cheap test first, which nearly always fails: is the last eighth far above the first?
            last = upper_median(self._logs[-(count // 8) :])
            early = upper_median(self._logs[-count : -count + count // 8])
            if last - early > 0.5 * self.GROWTH:
                best = self._fit(count)
            count *= 2
        if best is None:
            return None
        since, factor, doubling = best
        return Finding(
            since,
            f"The norm of the gradient has grown {factor:.3g} times from step {since} to step "
            f"{row.step}, doubling every {doubling:.3g} steps, and is not slowing down.",
            "Training is about to explode: lower the learning rate (or warm it up for longer), or "
            "lower the limit to a norm from before the growth; `skip_spikes` or an adaptive "
            "clip (`zclip`, `autoclip`) only delays it. A recurrent network may need "
            "`clip_cotangent`.",
        )

    def _fit(self, count: int) -> tuple[int, float, float] | None:
        """First step, growth and doubling time of the last `count` norms, if they grow."""
        size = count // min(count, self.BLOCKS)
        shape = (count // size, size)
        steps = np.array(self._steps[-count:]).reshape(shape).mean(axis=1)
        logs = np.median(np.array(self._logs[-count:]).reshape(shape), axis=1)
        slope = theil_sen(steps, logs)
        length = steps[-1] - steps[0]
        rest = logs - slope * steps
        noise = 1.4826 * np.median(np.abs(rest - np.median(rest)))
        error = noise / np.sqrt(np.sum((steps - steps.mean()) ** 2))
        half = len(steps) // 2
        is_growth = slope * length > self.GROWTH and slope > self.SIGNIFICANCE * error
        if not is_growth or theil_sen(steps[half:], logs[half:]) < 0.8 * slope:
            return None
        # Tenfold growth to a norm that the run has had before is not an alarm.
        before = self._logs[-MAX_NORMS:-count]
        known = [upper_median(before[i : i + 8]) for i in range(0, len(before), 8)]
        if slope * length < 2 * self.GROWTH and known and max(known) > logs[-1]:
            return None
        return self._steps[-count], math.exp(min(slope * length, 700.0)), math.log(2.0) / slope


def upper_median(values: Iterable[float]) -> float:
    """The median, the upper one of an even number; faster than NumPy's on short lists."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """The median of the slopes between all pairs of points: robust to a third of outliers."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


class LossSpike:
    """A loss is far above those before."""

    DEVIATIONS, BEYOND, SHARE = 10.0, 4.0, 0.1

    def __init__(self, window: int):
        self.count = 0
        """Spikes so far; spikes in neighboring steps count as one."""
        self._usual = collections.deque[float](maxlen=window)
        self._high = False

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report a loss that is above all bounds of the last `window` losses.

        It must lie above their median by ten robust deviations, by four times as much as any of
        them, and by a tenth of the median. A spike does not enter later medians.
        """
        found = None
        for step, loss in row.over_steps(row.losses):
            if not math.isfinite(loss):
                continue
            bound = self._bound(loss)
            if bound is None:
                self._usual.append(loss)
            else:
                self.count += not self._high
                found = found or (step, loss, *bound)
            self._high = bound is not None
        if found is None:
            return None
        step, loss, usual, largest = found
        return Finding(
            step,
            f"The loss was {loss:.3g} at step {step}; before, its median was {usual:.3g} and the "
            f"largest {largest:.3g}.",
            "Look at the batch of that step. If the loss comes back by itself, the clip did its "
            "work; if not, go back to a checkpoint and leave the batch out, or lower the limit or "
            "the learning rate. `skip_spikes(optimizer, loss=...)` skips such steps.",
        )

    def _bound(self, loss: float) -> tuple[float, float] | None:
        """Median and largest of the losses before, if this one is a spike."""
        if len(self._usual) < MIN_STEPS or loss <= (largest := max(self._usual)):
            return None
        usual = upper_median(self._usual)
        deviation = 1.4826 * upper_median([abs(x - usual) for x in self._usual])
        bound = max(
            self.DEVIATIONS * deviation, self.BEYOND * (largest - usual), self.SHARE * abs(usual)
        )
        return (usual, largest) if loss - usual > bound else None


class Diverged:
    """The loss is far above where it began, and stays there."""

    FIRST = 3

    def __init__(self):
        self._first: list[float] = []
        self._lately = collections.deque[tuple[int, float]](maxlen=MIN_STEPS)

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report 20 losses that are all above twice the largest of the first three."""
        for step, loss in row.over_steps(row.losses):
            if not math.isfinite(loss):
                continue
            if len(self._first) < self.FIRST:
                self._first.append(loss)
            else:
                self._lately.append((step, loss))
        if len(self._lately) < MIN_STEPS:
            return None
        start = max(self._first)
        lowest = min(loss for _, loss in self._lately)
        if lowest <= start + abs(start):
            return None
        return Finding(
            self._lately[0][0],
            f"The loss has been at least {lowest:.3g} since step {self._lately[0][0]}; it began "
            f"at {start:.3g}.",
            "The run has left the region in which it can learn: begin again with a limit (or a "
            "lower one, see `Monitor.suggest()`), a lower learning rate, or a longer warm-up.",
        )


class DominatingLeaf:
    """One leaf has nearly all of the norm, and all others are clipped because of it."""

    SHARE = 0.95
    MIN_LEAVES = 3

    def __init__(self):
        self._top = collections.deque[tuple[int, str, float]](maxlen=MIN_STEPS)

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report one leaf that is the largest of 20 records, with a median share of 95 %."""
        # A stack counts by its layers, `blocks/w/0`, and not once more as a whole.
        stacks = {path.rpartition("/")[0] for path in row.leaves}
        squares = {
            path: x * x for path, x in row.leaves.items() if math.isfinite(x) and path not in stacks
        }
        total = math.fsum(squares.values())
        if len(squares) < self.MIN_LEAVES or not 0 < total < math.inf:
            return None
        path = max(squares, key=squares.__getitem__)
        self._top.append((row.first, path, squares[path] / total))
        if len(self._top) < MIN_STEPS or any(other != path for _, other, _ in self._top):
            return None
        share = float(np.median([share for *_, share in self._top]))
        if share <= self.SHARE:
            return None
        since = self._top[0][0]
        return Finding(
            since,
            f"`{path}` has had {share:.1%} of the squared norm of {len(squares)} leaves since "
            f"step {since}.",
            "A global clip scales all leaves because of that one. Clip it by itself "
            "(`clip_by_group_norm`, `clip_by_norm`, or `adaptive_grad_clip`, which compares it "
            "with its weights), and look at its initial scale and at the data that reach it.",
        )
