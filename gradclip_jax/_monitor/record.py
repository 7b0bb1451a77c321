"""What `Monitor.record` takes: checked before anything is kept."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .fetch import Fetch

KNOWN = (
    "grad_norm", "clip_measure", "clip_limit", "clip_factor", "clipped", "clip_count",
    "nonfinite_count", "step_count", "loss", "update_norm",
)  # fmt: skip
"""The numbers that the history and the conditions read."""


def fetch_record(
    step: Any, metrics: Mapping[str, Any], loss: Any, update_norm: Any, *, has_writers: bool
) -> Fetch:
    """Begin to copy the numbers of a record to the host."""
    _check_step_first(step, metrics)
    given = {key: value for key, value in metrics.items() if value is not None}
    extra = {"loss": loss, "update_norm": update_norm, "step": step}
    given |= {key: value for key, value in extra.items() if value is not None}
    if metrics and not has_writers and not any(map(_is_known, given)):
        raise ValueError(
            f"`metrics` must have a number that the monitor knows ({', '.join(KNOWN)}), got "
            f"only {', '.join(metrics)}: rename it, or add `writers`, which get all numbers."
        )
    for key, value in given.items():
        _check_numeric(key, value)
    fetch = Fetch(given)
    for key, value in given.items():
        if np.size(value) not in (1, fetch.size):
            raise ValueError(
                f"`{key}` must be a scalar or have {fetch.size} values, as others in this "
                f"window, got {np.size(value)}."
            )
    return fetch


def _check_step_first(step: Any, metrics: Any) -> None:
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


def _check_numeric(key: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        return
    try:
        np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`{key}` must be a number or numbers, got {value!r}.") from error


def _is_known(key: str) -> bool:
    return key.partition("/")[0] in KNOWN
