"""A run in a few numbers: its summary, and the step at which it reached a loss."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .alerts import Alert


def summarize(
    history: Mapping[str, np.ndarray],
    norms: np.ndarray,
    alerts: Sequence[Alert],
    loss_spikes: int,
) -> dict[str, Any]:
    """The dict that `Monitor.summary` returns."""
    return {
        "step": int(history["step"][-1]) if len(history["step"]) else None,
        "records": len(history["step"]),
        "grad_norm": _of_finite(np.median, norms),
        "grad_norm_max": _of_finite(np.max, norms),
        "clip_limit": last_given(history["clip_limit"]),
        "clip_rate": last_given(history["clip_rate"]),
        "clip_factor": _of_finite(np.min, history["clip_factor"]),
        "nonfinite": int(np.nansum(history["nonfinite"])),
        "nonfinite_loss": int(np.nansum(history["nonfinite_loss"])),
        "loss": last_given(history["loss"]),
        "best_loss": _of_finite(np.min, history["loss_min"]),
        "loss_spikes": loss_spikes,
        "alerts": dict(collections.Counter(alert.kind for alert in alerts)),
    }


def step_reached(history: Mapping[str, np.ndarray], loss: float, records: int) -> int | None:
    """The first step at which the median of the last `records` losses is at most `loss`."""
    given = ~np.isnan(history["loss"])
    losses, steps = history["loss"][given], history["step"][given]
    if len(losses) < records:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(losses, records)
    reached = np.flatnonzero(np.median(windows, axis=1) <= loss)
    return int(steps[reached[0] + records - 1]) if reached.size else None


def last_given(column: np.ndarray) -> float | None:
    """The last value that is not NaN."""
    given = column[~np.isnan(column)]
    return float(given[-1]) if given.size else None


def _of_finite(function: Callable[[np.ndarray], Any], values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(function(finite)) if finite.size else None
