"""How a clip is wired into the training loop: its state is lost, or its result is not used."""

import math
from collections.abc import Mapping

import numpy as np

from .alerts import Finding, Recent
from .rows import Row


class Frozen:
    """The state of the clip does not change, though the run goes on."""

    STEPS = 100
    """More steps than gradients are usually accumulated over: a clip waits for their mean."""
    RECORDS = 3
    SAME = 1e-6

    def __init__(self):
        self._count: tuple[float, int, int] | None = None
        self._norm: tuple[float, float, int, int] | None = None

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report a counter of updates, or a norm, that has not changed for 100 steps."""
        counter, norm = self._stalled_counter(row), self._stalled_norm(row)
        if counter:
            since, value = counter
            seen = f"The clip has counted {value:.0f} updates ever since step {since}"
        elif norm:
            since, value = norm
            seen = f"The norm of the gradient has been {value:.7g} ever since step {since}"
        else:
            return None
        return Finding(
            since,
            f"{seen}, and it is step {row.step} now.",
            "The optimizer state is not threaded through the steps (the new one that `update` "
            "returns must be what the next step gets), or old metrics are recorded. If the "
            "counter rises but the norm does not change, parameters and data do not change "
            "either, or the clip stands behind something that normalises.",
        )

    def _stalled_counter(self, row: Row) -> tuple[int, float] | None:
        if math.isnan(row.step_count):
            return None
        if self._count is None or self._count[0] != row.step_count:
            self._count = (row.step_count, row.step, 0)
        value, since, records = self._count
        self._count = (value, since, records + 1)
        return (since, value) if self._is_long(row, since, records + 1) else None

    def _stalled_norm(self, row: Row) -> tuple[int, float] | None:
        if not row.norms or not all(map(math.isfinite, row.norms)):
            self._norm = None
            return None
        low, high = min(row.norms), max(row.norms)
        since, records = row.first, 0
        if self._norm is not None:
            lowest, highest = min(low, self._norm[0]), max(high, self._norm[1])
            if self._is_constant(lowest, highest):
                low, high, since, records = lowest, highest, *self._norm[2:]
        self._norm = (low, high, since, records + row.size)
        is_long = self._is_long(row, since, records + row.size)
        return (since, high) if is_long and self._is_constant(low, high) else None

    def _is_constant(self, low: float, high: float) -> bool:
        return high - low <= self.SAME * high

    def _is_long(self, row: Row, since: int, records: int) -> bool:
        return row.step - since >= self.STEPS and records >= self.RECORDS


def is_enlarged(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """At which steps ten times the norm that the clip saw reached the optimizer.

    A clip never enlarges a norm: the optimizer got something else than the clip returned.
    """
    norm, update = (values.get(key, np.full(1, math.nan)) for key in ("grad_norm", "update_norm"))
    factor = values.get("clip_factor", np.ones(1))
    return (
        (norm > 0) & (factor <= 1) & np.isfinite(update) & (update > BehindOptimizer.TIMES * norm)
    )


class BehindOptimizer:
    """The clip sees steps of the size of the learning rate, and not gradients."""

    TIMES = 10.0
    """Weight decay and noise between clip and optimizer usually add less."""
    RECORDS = 3

    def __init__(self):
        self._steps, self._since = 0, 0

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report the third record in a row, and those that follow."""
        values = row.values
        if not is_enlarged(values).all():
            self._steps = 0
            return None
        if not self._steps:
            self._since = row.first
        self._steps += row.size
        if self._steps < self.RECORDS:
            return None
        norm, update = (float(values[key][-1]) for key in ("grad_norm", "update_norm"))
        return Finding(
            self._since,
            f"The clip saw a norm of {norm:.3g} at step {row.step}, and {update:.3g} reached the "
            "optimizer: at least ten times as much, as in every record since step "
            f"{self._since}, though a clip enlarges nothing.",
            "The clip stands behind the optimizer, where it sees steps of the size of the learning "
            "rate and holds back no gradient: put it first, `optax.chain(clip, optimizer)`, and "
            "choose its limit there. Else it sees few of the leaves (`optax.masked`, "
            "`optax.partition`), or `update_norm` is that of the optimizer's own steps.",
        )


class NotReduced:
    """The limit was exceeded, and what reached the optimizer is above it: a clip without effect."""

    TIMES = 3
    ABOVE = 1.02
    """bfloat16 rounds a norm by up to 0.4 %."""

    def __init__(self):
        self._times, self._since = 0, 0
        self._groups = False
        self._before: tuple[int, float] | None = None

    def __call__(self, row: Row, recent: Recent) -> Finding | None:
        """Report the third such step, and those that follow."""
        values = row.values
        norm, limit = (values.get(key) for key in ("grad_norm", "clip_limit"))
        if norm is None or limit is None:
            return None
        update = values.get("update_norm")
        factor = values.get("clip_factor", np.ones(1))
        clipped = values.get("clipped", (norm > limit).astype(float))
        grouped = any(key.startswith("clip_factor/") for key in values)
        # With several groups, `norm` is that of all together and `limit` the smallest.
        reached = values.get("skipped", np.zeros(1)) == 0
        by_group = (norm > 1.01 * limit) & (clipped == 0) & reached
        by_group = by_group | ((norm * factor > 1.01 * limit) & (clipped > 0) & (factor < 1))
        by_group = (by_group & np.isfinite(norm)) | ((clipped > 0) & (clipped < 1))
        self._groups |= grouped or bool(np.any(by_group))
        over = np.isfinite(norm) & (norm > 1.01 * limit) & (clipped > 0) & (factor >= 1)
        if update is not None:
            over = over | self._exceeds_groups(values, limit, update, grouped)
            over = over & ~is_enlarged(values)  # `BehindOptimizer` reports those
        finding = None
        for i in np.flatnonzero(over).tolist():
            step = row.steps[i - over.size]
            if not self._times:
                self._since = step
            self._times += 1
            if self._times >= self.TIMES and finding is None:
                # A value that was given once for a window belongs to its last step.
                at = {k: float(x[max(i - over.size, -x.size)]) for k, x in values.items()}
                if i and update is not None and update.size > 1:
                    self._before = row.steps[i - 1], float(update[i - 1])
                finding = Finding(self._since, *self._explain(at, step))
        if not over.any():
            self._times = 0
        self._before = None if update is None else (row.step, float(update[-1]))
        return finding

    def _exceeds_groups(
        self,
        values: Mapping[str, np.ndarray],
        limit: np.ndarray,
        update: np.ndarray,
        grouped: bool,
    ) -> np.ndarray:
        """Where more reached the optimizer than the limits of all groups let through."""
        # Each of several clips stands by its name; the plain key is that of the first.
        limits = [values[key] for key in values if key.endswith("/clip_limit")] or [limit]
        whole = np.sqrt(sum(np.square(x) for x in limits))
        if not self._groups:
            return np.isfinite(update) & (update > self.ABOVE * whole)
        if not grouped:
            return np.zeros(update.shape, bool)
        paths = [key.partition("/")[2] for key in values if key.startswith("clip_factor/")]
        names = ("grad_norm", "clip_limit", "clip_factor")
        groups = [[values[f"{name}/{path}"] for name in names] for path in paths]
        # With several units in an array, norm (of all) times factor (the smallest) is too small.
        known = np.all([n * f <= 1.01 * bound for n, bound, f in groups], axis=0)
        expected = np.sqrt(sum(np.square(n * f) for n, _, f in groups))
        return known & np.isfinite(update) & (update > self.ABOVE * expected)

    def _explain(self, at: Mapping[str, float], step: int) -> tuple[str, str]:
        """Message and advice."""
        norm, limit, factor = at["grad_norm"], at["clip_limit"], at.get("clip_factor", 1.0)
        update = at.get("update_norm", math.nan)
        started = f"The limit was exceeded and the update was not reduced ({self._times} times "
        started += f"since step {self._since}): at step {step} the limit was {limit:.3g}, "
        last, before = self._before or (step, math.nan)
        stale = last == step - 1 and math.isclose(before, norm, rel_tol=1e-4)
        if math.isnan(update):
            seen = f"the norm {norm:.3g} and the factor {factor:.3g}."
            return started + seen, "The gradient is measured, but no factor is applied to it."
        reached = f"the clip saw a norm of {norm:.3g}, and {update:.3g} reached the optimizer"
        if math.isclose(update, norm, rel_tol=1e-3):
            return (
                f"{started}{reached}, as much as before the clip.",
                "What the clip returns is dropped, or the clip runs after the step: pass its "
                "first result on, `updates, state = clip.update(grads, state)`, or put it into "
                "the chain before the optimizer.",
            )
        if stale or norm == 0:
            which = "zeros" if norm == 0 else "the gradient of the step before"
            return (
                f"{started}{reached}: the clip saw {which}.",
                "The clip runs before the backward pass: compute the gradients first and clip "
                "those.",
            )
        passed = math.sqrt(max(update**2 - min(norm, limit) ** 2, 0.0))
        return (
            f"{started}{reached}: a part with a norm of {passed:.3g} passed the clip by.",
            "One group of parameters is clipped, another is not (or each by itself): put the clip "
            "before `optax.partition` and without `optax.masked`, so that it sees all gradients. "
            "With groups on purpose, record `metrics(opt_state, per_group=True)`.",
        )
