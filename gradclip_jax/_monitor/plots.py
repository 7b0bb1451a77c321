"""Plots of a run: norms and limit over the steps, their distribution, and leaf by leaf."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CLIPPED, NORM, LIMIT = "#d62728", "#7f7f7f", "#1f77b4"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure; an error names the extra if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: `pip install 'gradclip-jax[plots]'`.") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_norms(history: Mapping[str, np.ndarray]) -> Any:
    """Gradient norm with its limit and the clipped steps, and below the loss, if recorded."""
    has_loss = bool(np.isfinite(history["loss"]).any())
    figure = new_figure(9, 5.5 if has_loss else 3.2)
    axes = figure.subplots(1 + has_loss, 1, sharex=True, squeeze=False)[:, 0]
    above, steps = axes[0], history["step"]
    median, largest, limit = (
        _positive(history[key]) for key in ("grad_norm", "grad_norm_max", "clip_limit")
    )
    above.fill_between(steps, _positive(history["grad_norm_min"]), largest, color=NORM, alpha=0.3)
    above.plot(steps, median, NORM, lw=0.8, label="gradient norm before the clip")
    above.plot(steps, limit, LIMIT, ls="--", label="limit")
    clipped = history["clipped"] > 0
    above.plot(steps[clipped], largest[clipped], ".", color=CLIPPED, ms=3, label="clipped")
    for step in steps[history["nonfinite"] > 0]:
        above.axvline(step, color=CLIPPED, lw=0.8, ls=":")
    above.set(ylabel="gradient norm")
    _log_if_positive(above, median)
    above.legend(fontsize="small")
    if has_loss:
        axes[1].fill_between(steps, history["loss_min"], history["loss_max"], color=NORM, alpha=0.3)
        axes[1].plot(steps, history["loss"], "k", lw=0.8)
        axes[1].set(ylabel="loss")
    axes[-1].set(xlabel="step")
    return figure


def draw_histogram(norms: np.ndarray, candidates: Sequence[float]) -> Any:
    """Distribution of the norms, with candidates for the limit and what each would clip."""
    figure = new_figure(7, 3.5)
    axes = figure.subplots()
    finite = norms[np.isfinite(norms) & (norms > 0)]
    if finite.size:
        low, high = np.log10(finite.min()), np.log10(finite.max())
        # A constant stream has one value, and a histogram needs a width.
        edges = np.logspace(low - 0.05, high + 0.05, 60)
        axes.hist(finite, edges, color=NORM)
        axes.set(xscale="log")
    for number, limit in enumerate(candidates):
        share = np.mean(finite > limit) if finite.size else 0.0
        axes.axvline(limit, color=f"C{number}", label=f"{limit:g}: clips {share:.1%}")
    axes.set(xlabel="gradient norm", ylabel="steps")
    if candidates:
        axes.legend(fontsize="small")
    return figure


def draw_leaves(steps: np.ndarray, leaf_norms: Mapping[str, np.ndarray]) -> Any:
    """The norm of each leaf over the steps, as colors on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    names = list(leaf_norms)
    figure = new_figure(9, 1.5 + 0.22 * len(names))
    axes = figure.subplots()
    rows = _positive(np.array([leaf_norms[name] for name in names]))
    seen = rows[np.isfinite(rows)]
    scale = LogNorm(seen.min(), max(seen.max(), 1.01 * seen.min())) if seen.size else None
    ends = np.append(steps, steps[-1] + max(steps[-1] - steps[-2], 1) if len(steps) > 1 else 1)
    mesh = axes.pcolormesh(
        ends, np.arange(len(names) + 1), np.ma.masked_invalid(rows), norm=scale, cmap="viridis"
    )
    axes.set(xlabel="step")
    # A leaf may be named `$\frac{1$`: plain text, neither a formula nor TeX.
    plain: dict[str, Any] = {"fontsize": "small", "parse_math": False, "usetex": False}
    axes.set_yticks(np.arange(len(names)) + 0.5, names, **plain)
    axes.invert_yaxis()
    figure.colorbar(mesh, label="gradient norm")
    return figure


def _positive(values: np.ndarray) -> np.ndarray:
    """Positive values; a logarithmic axis cannot show the others, which become NaN."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _log_if_positive(axes: Any, values: np.ndarray) -> None:
    if np.isfinite(values).any():
        axes.set(yscale="log")
