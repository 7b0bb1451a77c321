"""The monitor: fed with metrics from the host, it keeps a history and raises alerts."""

import collections
import inspect
import itertools
import math
import os
import threading
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._checks import check_number, check_whole_number
from .alerts import Alert, ClipWarning, Episodes, Row
from .conditions import (
    Diverged,
    DominatingLeaf,
    LimitInert,
    LimitTooLow,
    LossSpike,
    Nonfinite,
    NormGrowing,
)
from .fetch import Fetch
from .page import page
from .plots import draw_histogram, draw_leaves, draw_norms
from .suggest import Fired, Suggestion, check_candidates, fired_at, suggest_max_norm
from .wiring import BehindOptimizer, Frozen, NotReduced

LATE = 8
"""Records that may wait for the device; a further one waits for the oldest of them."""
PACKAGE = os.path.dirname(os.path.dirname(__file__))
COLUMNS = (
    "grad_norm_min", "grad_norm", "grad_norm_max", "clip_limit", "clip_factor", "clipped",
    "clip_rate", "nonfinite", "loss_min", "loss", "loss_max", "nonfinite_loss",
)  # fmt: skip

KNOWN = (
    "grad_norm", "clip_limit", "clip_factor", "clipped", "clip_count", "nonfinite_count",
    "step_count", "loss", "update_norm",
)  # fmt: skip
"""What the history is made of."""

Writer = Callable[[int, dict[str, float]], Any]
"""`(step, row)`; the row has the columns of the history and whatever else was recorded."""


class Monitor:
    """Watches a run from the host: a history, alerts, time to a loss, and which limit to choose.

    Feed it with `metrics(opt_state)` and the loss, at every step or every tenth; or, from inside
    `lax.scan`, with arrays of a window of steps. It never waits for the device in `record`,
    unless that is more than 8 records behind; whatever reads the history waits.

    One thread may record while others read: what they get is a copy of whole records, and a
    reader that waits for the device does not make `record` wait. `on_alert` and writers are called
    in the thread that takes a record in, one at a time.

    Each alert is raised once per episode. An episode ends when its condition has been false for
    `window` steps and five records, so that what comes and goes is told once.

    | kind | when |
    |---|---|
    | `nonfinite` | a loss or a norm is NaN or infinite |
    | `limit_too_low` | more than `max_rate` of the updates are clipped over the window |
    | `limit_inert` | none in 1,000 updates, or in a window whose norms are all below a tenth |
    | `norm_growing` | the norm grew tenfold over the last 16, 32, …, 1024 norms, exponentially |
    | `loss_spike` | a loss is above its median by 10 deviations, four times as far as any before |
    | `diverged` | 20 losses in a row are all above twice the largest of the first three |
    | `dominating_leaf` | one leaf has 95 % of the squared norm, over 20 records |
    | `frozen` | the counter of updates, or the norm, has stood still for 100 steps |
    | `not_reduced` | the limit was exceeded, and what reached the optimizer is above it |
    | `behind_optimizer` | ten times the norm that the clip saw reached the optimizer, thrice |

    The last one needs `update_norm` in `record`; without it a clip behind the optimizer looks like
    one whose limit is too high, and `limit_inert` says to look at its place first.

    Args:
      max_rate: Clip rate above which the limit is too low, in (0, 1]; 1 never tells, as is right
        for what clips most steps by design (`autoclip`, `normalize_by_norm`).
      on_alert: Called with each `Alert`; None warns with a `ClipWarning`. What it raises comes
        out of `record` (or of what reads the history), when all is noted.
      writers: Callables `(step, row)`, called once for each record, in order. The row is a dict
        of floats: the columns of `history` and whatever else was in the metrics.
      window: Steps over which rates are judged, at least 20.

    Raises:
      ValueError: For arguments that may not be.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> optimizer = optax.chain(gradclip_jax.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> state, monitor = optimizer.init(params), gradclip_jax.Monitor(on_alert=print)
    >>> for step in range(3):
    ...     updates, state = optimizer.update(params, state, params)  # the gradient of w²/2
    ...     params = optax.apply_updates(params, updates)
    ...     monitor.record(step, gradclip_jax.metrics(state))
    >>> print(monitor.history["grad_norm"].round(2), monitor.summary()["clip_rate"])
    [5.  4.9 4.8] 1.0
    """

    def __init__(
        self,
        *,
        max_rate: float = 0.9,
        on_alert: Callable[[Alert], Any] | None = None,
        writers: Iterable[Writer] = (),
        window: int = 200,
    ):
        rule = "be above 0 and at most 1"
        self._max_rate = float(check_number("max_rate", max_rate, rule, math.ulp(0.0), 1.0))
        self._window = check_whole_number("window", window, 20)
        if on_alert is not None and not callable(on_alert):
            raise ValueError(f"`on_alert` must be a function of an `Alert`, got {on_alert!r}.")
        self._writers = tuple(writers)
        for writer in self._writers:
            if not callable(writer):
                raise ValueError(f"`writers` must be functions of step and row, got {writer!r}.")
        self._on_alert = _warn if on_alert is None else on_alert
        # Held by who takes records in or reads them; a callback may read, so that it is reentrant.
        self._lock = threading.RLock()
        self._queue: collections.deque[Fetch] = collections.deque()
        self._kept = 0, 0
        self._last: Row | None = None
        self._clipped, self._seen = 0.0, 0
        self._steps = array("q")
        self._columns = {name: array("d") for name in COLUMNS}
        self._norm_steps, self._norms = array("q"), array("d")
        self._leaves: dict[str, array] = {}
        self._alerts: list[Alert] = []
        self._spikes = LossSpike(self._window)
        self._episodes = Episodes(
            {
                "nonfinite": Nonfinite(),
                "limit_too_low": LimitTooLow(self._max_rate),
                "limit_inert": LimitInert(self._window),
                "norm_growing": NormGrowing(),
                "loss_spike": self._spikes,
                "diverged": Diverged(),
                "dominating_leaf": DominatingLeaf(),
                "frozen": Frozen(),
                "not_reduced": NotReduced(),
                "behind_optimizer": BehindOptimizer(),
            },
            self._window,
        )

    def record(
        self,
        step: Any,
        metrics: Mapping[str, Any],
        loss: Any = None,
        update_norm: Any = None,
    ) -> None:
        """Take in what a step, or a window of steps, has measured; waits for nothing.

        Args:
          step: Number of the step, or of the last step of a window; or the numbers of all steps
            in the window. They must rise from record to record.
          metrics: `metrics(opt_state)`, also `per_group=True`: scalars, or vectors with a value
            for each step of a window. The norm of a leaf may be added as `grad_norm/<path>`;
            further numbers go to the writers. What `metrics` calls `grad_norm`, `clip_limit` and
            so on may come from elsewhere, and any may be missing.
          loss: Loss of the step, or a vector of losses; `metrics["loss"]` where it is None.
          update_norm: Norm of the updates that reached the optimizer, behind the clip and before
            learning rate and momentum, to tell a clip that does nothing. It must be the norm
            that the clip measures: `global_norm(updates)`, as a rule. Beside a clip of several
            groups, record their metrics with `per_group=True`.

        Raises:
          ValueError: For `metrics` that is no dict of numbers (an optimizer state, say) or has none
            that the monitor knows while there are no writers; for traced values, for vectors of
            different lengths, and for a step that is not above the one before.
        """
        _check_record(step, metrics)
        given = {key: value for key, value in metrics.items() if value is not None}
        extra = {"loss": loss, "update_norm": update_norm, "step": step}
        given |= {key: value for key, value in extra.items() if value is not None}
        if metrics and not self._writers and not any(map(_is_known, given)):
            raise ValueError(
                f"`metrics` must have a number that the monitor knows ({', '.join(KNOWN)}), got "
                f"only {', '.join(metrics)}: rename it, or add `writers`, which get all numbers."
            )
        for key, value in given.items():
            _check_number(key, value)
        fetch = Fetch(given)
        for key, value in given.items():
            if np.size(value) not in (1, fetch.size):
                raise ValueError(
                    f"`{key}` must be a scalar or have {fetch.size} values, as others in this "
                    f"window, got {np.size(value)}."
                )
        self._queue.append(fetch)
        # Another thread that waits for the device, to read, takes this one in later.
        if not self._lock.acquire(blocking=len(self._queue) > LATE):
            return
        try:
            while self._queue and (len(self._queue) > LATE or self._queue[0].is_ready()):
                self._digest(self._queue.popleft())
        finally:
            self._lock.release()

    def flush(self) -> None:
        """Wait for all that was recorded, and take it in."""
        with self._lock:
            # What another thread records meanwhile is for the next one, or this might never end.
            for _ in range(len(self._queue)):
                if self._queue:  # `on_alert` may have read, and flushed
                    self._digest(self._queue.popleft())

    def __enter__(self) -> "Monitor":
        """The monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush."""
        self.flush()

    @property
    def history(self) -> dict[str, np.ndarray]:
        """What was recorded, a row for each record: a dict of arrays of one length.

        | key | what |
        |---|---|
        | `step` | last step of the window, int64 |
        | `grad_norm_min`, `grad_norm`, `grad_norm_max` | smallest, median and largest norm |
        | `clip_limit` | the limit of the last step |
        | `clip_factor` | the smallest factor |
        | `clipped` | share of the steps that were clipped; of groups, the mean fraction |
        | `clip_rate` | clipped updates so far, as a share of all: from `clip_count` |
        | `nonfinite` | updates since the last record whose norm was NaN or infinite |
        | `loss_min`, `loss`, `loss_max` | smallest, median and largest loss |
        | `nonfinite_loss` | losses in the window that were NaN or infinite |

        All others are float64, NaN where not given. Norms and losses that are not finite are
        counted and left out; where no other is left it says NaN.
        """
        with self._lock:
            self.flush()
            columns = {"step": self._steps, **self._columns}
            return {name: self._copy(column) for name, column in columns.items()}

    @property
    def norms(self) -> dict[str, np.ndarray]:
        """Every norm seen, those within windows too: `step` (int64) and `grad_norm` (float64)."""
        with self._lock:
            self.flush()
            count = self._kept[1]
            steps, norms = (np.array(x)[:count] for x in (self._norm_steps, self._norms))
            return {"step": steps, "grad_norm": norms}

    @property
    def leaf_norms(self) -> dict[str, np.ndarray]:
        """Of each `grad_norm/<path>` the path, and a norm for each row of the history.

        Of a window the largest; infinite where it was NaN or infinite, NaN where not given.
        """
        with self._lock:
            self.flush()
            return {path: self._copy(column) for path, column in self._leaves.items()}

    @property
    def alerts(self) -> list[Alert]:
        """All alerts so far."""
        with self._lock:
            self.flush()
            return list(self._alerts)

    def steps_to(self, loss: float, *, records: int = 5) -> int | None:
        """The step at which a loss was reached, or None.

        Reached is a loss when the median of the last `records` recorded ones is at or below it,
        so that one lucky batch does not count.

        >>> import gradclip_jax
        >>> monitor = gradclip_jax.Monitor()
        >>> for step in range(100):
        ...     monitor.record(step, {}, loss=1 / (1 + step))
        >>> monitor.steps_to(0.1), monitor.steps_to(0.0)
        (11, None)
        """
        check_whole_number("records", records)
        history = self.history
        given = ~np.isnan(history["loss"])
        losses, steps = history["loss"][given], history["step"][given]
        if len(losses) < records:
            return None
        windows = np.lib.stride_tricks.sliding_window_view(losses, records)
        reached = np.flatnonzero(np.median(windows, axis=1) <= loss)
        return int(steps[reached[0] + records - 1]) if reached.size else None

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers, ready for `json.dumps`; None where nothing was given.

        | key | what |
        |---|---|
        | `step`, `records` | the last step, and how often it was recorded |
        | `grad_norm`, `grad_norm_max` | median and largest of all norms seen |
        | `clip_limit`, `clip_rate` | the last ones |
        | `clip_factor` | the smallest |
        | `nonfinite`, `nonfinite_loss` | how many updates and losses were not finite |
        | `loss`, `best_loss` | the last loss, and the smallest |
        | `loss_spikes` | how often the loss jumped |
        | `alerts` | how many alerts of each kind |
        """
        with self._lock:
            history, norms = self.history, self.norms["grad_norm"]
            kinds = collections.Counter(alert.kind for alert in self._alerts)
            spikes = self._spikes.count
        return {
            "step": int(history["step"][-1]) if len(history["step"]) else None,
            "records": len(history["step"]),
            "grad_norm": _of(np.median, norms),
            "grad_norm_max": _of(np.max, norms),
            "clip_limit": _last(history["clip_limit"]),
            "clip_rate": _last(history["clip_rate"]),
            "clip_factor": _of(np.min, history["clip_factor"]),
            "nonfinite": int(np.nansum(history["nonfinite"])),
            "nonfinite_loss": int(np.nansum(history["nonfinite_loss"])),
            "loss": _last(history["loss"]),
            "best_loss": _of(np.min, history["loss_min"]),
            "loss_spikes": spikes,
            "alerts": dict(kinds),
        }

    def suggest(
        self, *, rate: float = 0.05, candidates: Sequence[float] | None = None
    ) -> Suggestion:
        """A limit from the norms seen so far: see `suggest_max_norm`."""
        return suggest_max_norm(self.norms["grad_norm"], rate=rate, candidates=candidates)

    def sweep(self, candidates: Sequence[float]) -> list[Fired]:
        """When other limits would have acted on the norms seen so far, without training again.

        It is a dry run: behind another limit the norms would have been others.

        >>> import gradclip_jax
        >>> monitor = gradclip_jax.Monitor()
        >>> for step, norm in enumerate([1.0, 3.0, 0.5, 7.0]):
        ...     monitor.record(step, {"grad_norm": norm})
        >>> for fired in monitor.sweep([2.0, 10.0]):
        ...     print(fired.max_norm, fired.count, fired.rate, fired.first_step, fired.steps)
        2.0 2 0.5 1 [1 3]
        10.0 0 0.0 None []
        """
        norms = self.norms
        return fired_at(norms["step"], norms["grad_norm"], candidates)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Norms over the steps with the limit and the clipped steps, and the loss below them.

        Returns a matplotlib figure and, with `path`, saves it there; so do the other plots. Needs
        the extra `plots`.

        Raises:
          ImportError: Where matplotlib is not installed.
          ValueError: When nothing was recorded.
        """
        return _saved(draw_norms(self._recorded()), path)

    def plot_histogram(
        self, path: str | os.PathLike[str] | None = None, candidates: Sequence[float] = ()
    ) -> Any:
        """How often which norm was seen, and what each of the candidates would clip."""
        self._recorded()
        limits = check_candidates(candidates)
        return _saved(draw_histogram(self.norms["grad_norm"], limits), path)

    def plot_leaves(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The norm of each leaf over the steps, as colours.

        Raises:
          ValueError: When no norms of leaves were recorded: `metrics(state, per_group=True)` of a
            clip with a norm for each leaf has them.
        """
        with self._lock:
            steps, leaf_norms = self._recorded()["step"], self.leaf_norms
        if not leaf_norms:
            raise ValueError(
                "`metrics` must have norms of leaves (`per_group=True`), got none in any record."
            )
        return _saved(draw_leaves(steps, leaf_norms), path)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """One page with summary, alerts, plots and candidates for the limit.

        All is inside, so that it can be read offline and sent to others. Needs the extra `plots`.
        """
        with self._lock:  # all of one moment
            history, norms = self._recorded(), self.norms["grad_norm"]
            leaf_norms, summary, alerts = self.leaf_norms, self.summary(), self.alerts
        advice = suggest_max_norm(norms) if np.isfinite(norms).any() else None
        shown = (
            () if advice is None else dict.fromkeys([advice.max_norm, *_positive_limits(history)])
        )
        figures = {
            "Norm and limit": draw_norms(history),
            "Distribution of the norms": draw_histogram(norms, sorted(set(shown))),
        }
        if leaf_norms:
            figures["Leaf by leaf"] = draw_leaves(history["step"], leaf_norms)
        text = page(summary, alerts, figures, str(advice or ""))
        Path(path).write_text(text, encoding="utf-8")

    def _recorded(self) -> dict[str, np.ndarray]:
        history = self.history
        if not len(history["step"]):
            raise ValueError("`record` must be called before a plot: nothing was recorded.")
        return history

    def _digest(self, fetch: Fetch) -> None:
        values = fetch.read()
        steps = self._numbered(values.pop("step"), fetch.size)
        with np.errstate(all="ignore"):  # what is not finite is what this is about
            row, numbers = self._row(steps, values)
            self._keep(row, numbers)
            new = self._episodes.add(row)
        self._alerts += new
        for writer in self._writers:
            writer(row.step, dict(numbers))
        for alert in new:
            self._on_alert(alert)

    def _numbered(self, given: np.ndarray, size: int) -> list[int]:
        """The steps of a window, of which the last alone may be given."""
        for step in given.tolist():
            if not -(2.0**63) <= step < 2.0**63:  # not for NaN either
                raise ValueError(f"`step` must be a number below 2**63, got {step:.20g}.")
        steps = [int(step) for step in given]
        if len(steps) < size:
            steps = list(range(steps[-1] - size + 1, steps[-1] + 1))
        # Steps that are made up here are no mistake of the caller's.
        known = steps if len(given) == size else steps[-1:]
        known = [self._last.step, *known] if self._last else known
        for earlier, later in itertools.pairwise(known):
            if later <= earlier:
                raise ValueError(
                    f"`step` must rise from record to record, got {later} after {earlier}: a new "
                    "run needs a new `Monitor`."
                )
        return steps

    def _row(self, steps: list[int], values: dict[str, np.ndarray]) -> tuple[Row, dict[str, float]]:
        """A record as the conditions see it, and as history and writers do."""
        norms, losses = (values.get(key, NONE).tolist() for key in ("grad_norm", "loss"))
        leaves = {
            key.partition("/")[2]: _largest(value.tolist())
            for key, value in values.items()
            if key.startswith("grad_norm/")
        }
        clipped = values.get("clipped")
        if clipped is None and "clip_limit" in values:
            clipped = values["clip_limit"] < values.get("grad_norm", np.full(1, math.nan))
        row = Row(
            steps=steps,
            norms=norms,
            losses=losses,
            clip_limit=_end(values, "clip_limit"),
            clip_factor=min(values.get("clip_factor", NAN).tolist()),
            clipped=math.nan if clipped is None else float(np.mean(clipped)),
            clip_count=_end(values, "clip_count"),
            step_count=_end(values, "step_count"),
            nonfinite=self._nonfinite(norms, values.get("nonfinite_count")),
            nonfinite_loss=sum(not math.isfinite(loss) for loss in losses),
            leaves=leaves,
            values=values,
        )
        numbers = {key: float(value[-1]) for key, value in values.items()}
        numbers |= {f"grad_norm/{path}": norm for path, norm in leaves.items()}
        columns = (
            *_spread(norms), row.clip_limit, row.clip_factor, row.clipped, self._rate(row),
            row.nonfinite, *_spread(losses), float(row.nonfinite_loss) if losses else math.nan,
        )  # fmt: skip
        return row, numbers | dict(zip(COLUMNS, columns, strict=True))

    def _nonfinite(self, norms: list[float], count: np.ndarray | None) -> float:
        """Updates since the last record that were not finite: those seen, or as many as counted."""
        seen = sum(not math.isfinite(norm) for norm in norms)
        if count is None:
            return float(seen) if norms else math.nan
        # The first count of a run that goes on from a checkpoint is an old one.
        before = self._last.values.get("nonfinite_count", count) if self._last else count[:1]
        return max(float(seen), float(count[-1] - before[-1]))

    def _rate(self, row: Row) -> float:
        """Clipped updates so far, as a share of all."""
        if not math.isnan(row.clipped):
            self._clipped += row.clipped * row.seen
            self._seen += row.seen
        if row.step_count > 0 and not math.isnan(row.clip_count):
            return row.clip_count / row.step_count
        return self._clipped / self._seen if self._seen else math.nan

    def _keep(self, row: Row, numbers: dict[str, float]) -> None:
        """Append a row to the history, whole or not at all."""
        # Ctrl-C may have broken in on the last one.
        rows, norms = self._kept
        for column in (self._steps, *self._columns.values(), *self._leaves.values()):
            del column[rows:]
        del self._norm_steps[norms:], self._norms[norms:]
        for path in row.leaves:
            if path not in self._leaves:
                self._leaves[path] = array("d", [math.nan]) * rows
        for path, column in self._leaves.items():
            column.append(row.leaves.get(path, math.nan))
        for name, column in self._columns.items():
            column.append(numbers[name])
        self._steps.append(row.step)
        self._norm_steps.extend(row.steps[-len(row.norms) :] if row.norms else ())
        self._norms.extend(row.norms)
        self._kept = len(self._steps), len(self._norms)
        self._last = row

    def _copy(self, column: array) -> np.ndarray:
        return np.array(column)[: self._kept[0]]

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # a lock itself cannot be copied
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _check_record(step: Any, metrics: Any) -> None:
    if isinstance(metrics, Mapping) and step is not None and not isinstance(step, Mapping):
        return
    if step is None or isinstance(step, Mapping):
        raise ValueError(
            "`step` must be the number of the step and come first, `record(step, metrics)`, "
            f"got {step!r}."
        )
    raise ValueError(
        "`metrics` must be a dict of numbers, as from `gradclip_jax.metrics(opt_state)`, "
        f"got {type(metrics).__name__}: call `record(step, gradclip_jax.metrics(opt_state))`."
    )


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        return
    try:
        np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`{key}` must be a number or numbers, got {value!r}.") from error


def _is_known(key: str) -> bool:
    return key.partition("/")[0] in KNOWN


NONE, NAN = np.zeros(0), np.full(1, math.nan)


def _end(values: Mapping[str, np.ndarray], key: str) -> float:
    """The value of the last step, NaN where there is none."""
    return float(values[key][-1]) if key in values else math.nan


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Smallest, median and largest of the finite ones, NaN where there is none."""
    finite = sorted(x for x in values if math.isfinite(x))
    if not finite:
        return math.nan, math.nan, math.nan
    half = len(finite) // 2
    median = finite[half] if len(finite) % 2 else 0.5 * (finite[half - 1] + finite[half])
    return finite[0], median, finite[-1]


def _largest(norms: list[float]) -> float:
    return max(x if math.isfinite(x) else math.inf for x in norms)


def _of(function: Callable[[np.ndarray], Any], values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(function(finite)) if finite.size else None


def _last(column: np.ndarray) -> float | None:
    given = column[~np.isnan(column)]
    return float(given[-1]) if given.size else None


def _positive_limits(history: Mapping[str, np.ndarray]) -> list[float]:
    """The limit of the last step, where there is a finite one."""
    limit = _last(history["clip_limit"])
    return [limit] if limit is not None and 0 < limit < math.inf else []


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _warn(alert: Alert) -> None:
    """Warn where the user's code called the monitor."""
    frame, depth = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(str(alert), ClipWarning, stacklevel=depth)
