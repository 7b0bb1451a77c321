"""Plots whose lines have their names at their ends, where a legend would hide what explodes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Label = tuple[float, str, Any]
"""The height of a line at its right end, its name and its colour."""


def label_lines(axes: Axes, labels: Sequence[Label], gap: float = 13.0) -> None:
    """Writes each name at the right of `axes`, at the height of its line, none over another.

    `gap` is the least distance of two names in points. Call it when limits and scales are set.
    """
    if not labels:
        return
    to_points = axes.transData.transform
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides how high a point of the data lies
    scale = 72 / figure.dpi
    low, high = axes.bbox.y0 * scale, axes.bbox.y1 * scale
    x = axes.get_xlim()[1]
    labels = sorted(labels, key=lambda label: label[0])
    wanted = [float(to_points((x, y))[1]) * scale for y, _, _ in labels]
    at = np.clip(np.nan_to_num(wanted, posinf=high), low, high)
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    at[-1] = min(at[-1], high)  # a pile at the top moves down
    for i in reversed(range(len(at) - 1)):
        at[i] = min(at[i], at[i + 1] - gap)
    for (_, name, colour), y in zip(labels, at, strict=True):
        axes.annotate(
            name, (1, (y - low) / (high - low)), xycoords="axes fraction", xytext=(9, 0),
            textcoords="offset points", color=colour, va="center", fontsize=9,
        )  # fmt: skip


def plain_ticks(axes: Axes) -> None:
    """A logarithmic axis with 2, 5 and 1,000 on it instead of powers of ten."""
    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def quiet_frame(axes: Axes) -> None:
    """No lines above and at the right, where the names are."""
    axes.spines[["top", "right"]].set_visible(False)
