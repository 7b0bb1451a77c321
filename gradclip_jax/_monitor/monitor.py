"""The monitor: fed with metrics from the host, it keeps a history and raises alerts."""

import collections
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import check_number, check_whole_number
from .alerts import Alert, ClipWarning, Episodes, warn_user
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
from .history import History
from .page import run_page
from .plots import draw_histogram, draw_leaves, draw_norms
from .record import fetch_record
from .rows import new_row
from .suggest import Fired, Suggestion, check_candidates, fired_at, suggest_max_norm
from .summary import step_reached, summarize
from .wiring import BehindOptimizer, Frozen, NotReduced
from .writers import Writer

MAX_PENDING = 8
"""Records that may wait for the device; a further call of `record` waits for the oldest."""


class Monitor:
    """Watches a run from the host: a history, alerts, time to a loss, and which limit to choose.

    Feed it with `metrics(opt_state)` and the loss, at every step or every tenth; or, from inside
    `lax.scan`, with arrays of a window of steps. `record` never waits for the device, unless that
    is more than 8 records behind; reading the history waits.

    One thread may record while others read: a reader gets a copy of whole records, and a reader
    that waits for the device does not make `record` wait. `on_alert` and writers are called by the
    thread that processes a record, one at a time.

    Args:
      max_rate: Clip rate above which the limit is too low, in (0, 1]; 1 for clips that act on most
        steps by design (`autoclip`, `normalize_by_norm`).
      on_alert: Called with each `monitor.Alert`, one per episode; None warns with a
        `monitor.ClipWarning`. An exception that it raises leaves `record` (or the reader of the
        history) after the record was kept.
      writers: Callables `(step, row)`, called once for each record, in order. The row is a dict
        of floats: the columns of `history` and whatever else was in the metrics.
      window: Steps over which rates are judged, at least 20.

    Raises:
      ValueError: For a rate, a window or a callable that is not valid.

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
        # For processing and reading records; reentrant, as a callback may read.
        self._lock = threading.RLock()
        self._queue: collections.deque[Fetch] = collections.deque()
        self._history = History()
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
        *,
        loss: Any = None,
        update_norm: Any = None,
    ) -> None:
        """Keep what a step, or a window of steps, has measured, without waiting for the device.

        Step and metrics may be positional, as a writer's step and row; the others are keywords.

        Args:
          step: Number of the step, or of the last step of a window; or the numbers of all steps
            in the window. They must rise from record to record.
          metrics: `metrics(opt_state)`, also `per_group=True`: scalars, or vectors with a value
            for each step of a window. The norm of a leaf may be added as `grad_norm/<path>`;
            other numbers go to the writers. Any number may be missing or come from elsewhere.
          loss: Loss of the step, or a vector of losses; `metrics["loss"]` where it is None.
          update_norm: Norm of the updates that reached the optimizer, behind the clip and before
            learning rate and momentum, to detect a clip that does nothing. It must be the norm
            that the clip measures: usually `global_norm(updates)`. For a clip of several groups,
            record their metrics with `per_group=True`.

        Raises:
          ValueError: For `metrics` that is not a dict of numbers (an optimizer state, say), or has
            none that the monitor knows while there are no writers; for traced values, for vectors
            of different lengths, and for a step that is not above the one before.
        """
        has_writers = bool(self._writers)
        fetch = fetch_record(step, metrics, loss, update_norm, has_writers=has_writers)
        self._queue.append(fetch)
        # If another thread holds the lock, to read, it or a later call processes this record.
        if not self._lock.acquire(blocking=len(self._queue) > MAX_PENDING):
            return
        try:
            while self._queue and (len(self._queue) > MAX_PENDING or self._queue[0].is_ready()):
                self._process(self._queue.popleft())
        finally:
            self._lock.release()

    def flush(self) -> None:
        """Wait for the device, and process all records."""
        with self._lock:
            # Records that another thread adds meanwhile are left, or this might never end.
            for _ in range(len(self._queue)):
                if self._queue:  # `on_alert` may have read, and flushed
                    self._process(self._queue.popleft())

    def __enter__(self) -> "Monitor":
        """The monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush."""
        self.flush()

    @property
    def history(self) -> dict[str, np.ndarray]:
        """All records, a row each: a dict of arrays of one length.

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

        All others are float64, NaN where not given. Norms and losses that are NaN or infinite are
        counted and left out; the entry of a record with no others is NaN. Where a clip measures
        no norms, `clip_measure` stands for the norm.
        """
        with self._lock:
            self.flush()
            return self._history.columns()

    @property
    def norms(self) -> dict[str, np.ndarray]:
        """Every norm, also those within windows: `step` (int64) and `grad_norm` (float64)."""
        with self._lock:
            self.flush()
            return self._history.norms()

    @property
    def leaf_norms(self) -> dict[str, np.ndarray]:
        """The norms of each recorded `grad_norm/<path>`, by path: one for each row of the history.

        The largest of a window; infinite where it was NaN or infinite, NaN where not given.
        """
        with self._lock:
            self.flush()
            return self._history.leaf_norms()

    @property
    def alerts(self) -> list[Alert]:
        """All alerts so far."""
        with self._lock:
            self.flush()
            return list(self._alerts)

    def steps_to(self, loss: float, *, records: int = 5) -> int | None:
        """The step at which a loss was reached, or None.

        A loss is reached when the median of the last `records` recorded losses is at most that,
        so that one lucky batch does not count.

        >>> import gradclip_jax
        >>> monitor = gradclip_jax.Monitor()
        >>> for step in range(100):
        ...     monitor.record(step, {}, loss=1 / (1 + step))
        >>> monitor.steps_to(0.1), monitor.steps_to(0.0)
        (11, None)
        """
        check_whole_number("records", records)
        return step_reached(self.history, loss, records)

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers, ready for `json.dumps`; None where nothing was recorded.

        | key | what |
        |---|---|
        | `step`, `records` | the last step, and the number of records |
        | `grad_norm`, `grad_norm_max` | median and largest of all norms |
        | `clip_limit`, `clip_rate` | the last limit and rate |
        | `clip_factor` | the smallest factor |
        | `nonfinite`, `nonfinite_loss` | how many updates and losses were not finite |
        | `loss`, `best_loss` | the last loss, and the smallest |
        | `loss_spikes` | how often the loss jumped |
        | `alerts` | how many alerts of each kind |
        """
        with self._lock:  # all of one moment
            history, norms, alerts = self.history, self.norms["grad_norm"], self.alerts
            return summarize(history, norms, alerts, self._spikes.count)

    def suggest(
        self, *, rate: float = 0.05, candidates: Sequence[float] | None = None
    ) -> Suggestion:
        """A limit from the norms so far: see `suggest_max_norm`."""
        return suggest_max_norm(self.norms["grad_norm"], rate=rate, candidates=candidates)

    def sweep(self, candidates: Sequence[float]) -> list[Fired]:
        """When other limits would have acted on the norms so far, without training again.

        This is a dry run: with another limit, the norms would have been different.

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
        """Plot norms, limit and clipped steps over the steps, and the loss below them.

        Returns a matplotlib figure and, with `path`, saves it there; so do the other plots. Needs
        the extra `plots`.

        Raises:
          ImportError: Where matplotlib is not installed.
          ValueError: When nothing was recorded.
        """
        return _save(draw_norms(self._nonempty_history()), path)

    def plot_histogram(
        self, path: str | os.PathLike[str] | None = None, *, candidates: Sequence[float] = ()
    ) -> Any:
        """Plot the distribution of the norms, and what each of the candidates would clip."""
        self._nonempty_history()
        limits = check_candidates(candidates)
        return _save(draw_histogram(self.norms["grad_norm"], limits), path)

    def plot_leaves(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plot the norm of each leaf over the steps, as colors.

        Raises:
          ValueError: When no norms of leaves were recorded: `metrics(state, per_layer=True)` of a
            clip that keeps them has them.
        """
        with self._lock:
            steps, leaf_norms = self._nonempty_history()["step"], self.leaf_norms
        if not leaf_norms:
            raise ValueError(
                "`metrics` must have norms of leaves (`per_layer=True`), got none in any record."
            )
        return _save(draw_leaves(steps, leaf_norms), path)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML page with summary, alerts, plots and candidates for the limit.

        The page loads nothing, so that it opens offline. Needs the extra `plots`.
        """
        with self._lock:  # all of one moment
            history, norms = self._nonempty_history(), self.norms["grad_norm"]
            leaf_norms, summary, alerts = self.leaf_norms, self.summary(), self.alerts
        text = run_page(history, norms, leaf_norms, summary, alerts)
        Path(path).write_text(text, encoding="utf-8")

    def _nonempty_history(self) -> dict[str, np.ndarray]:
        history = self.history
        if not len(history["step"]):
            raise ValueError("`record` must be called before a plot: nothing was recorded.")
        return history

    def _process(self, fetch: Fetch) -> None:
        with np.errstate(all="ignore"):  # NaN and infinity are expected here
            row = new_row(fetch.read(), fetch.size, self._history.last)
            numbers = row.numbers()
            self._history.append(row, numbers)
            new = self._episodes.add(row)
        self._alerts += new
        for writer in self._writers:
            writer(row.step, dict(numbers))
        for alert in new:
            self._on_alert(alert)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # a lock itself cannot be copied
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _save(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _warn(alert: Alert) -> None:
    warn_user(str(alert), ClipWarning)
