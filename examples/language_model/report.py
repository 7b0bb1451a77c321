"""What a run leaves: its result, tables on the screen and in results.txt, a plot and a sentence."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

import gradclip_jax
from examples.language_model.command_line import InputError, console
from examples.language_model.directory import History, make_directory, saved_result
from examples.language_model.plots import label_lines, plain_ticks, quiet_frame
from examples.language_model.progress import plain
from examples.language_model.results import save_results
from examples.language_model.scalars import advice

Baselines = dict[str, dict[str, float]]


class Result(NamedTuple):
    """A finished run; losses are nats per token, answers those right and all by kind."""

    clip: str
    level: str
    steps: int
    test: float
    clip_count: int
    nonfinite_count: int
    text: str
    history: History
    answers: dict[str, list[int]] | None = None

    @property
    def valid(self) -> list[float]:
        """The validation loss after each epoch; NaN for a run that ended before one was over."""
        return [loss for _, loss in self.history.get("valid", [])] or [math.nan]

    @property
    def title(self) -> str:
        return titled(self.clip)

    def diverged(self, unigram: float) -> bool:
        """Whether training made it worse, to the end; a run too short to learn did not diverge.

        A loss was not finite, or it rose to twice the first one (that of a network that knows
        nothing) and ended above that of knowing only how frequent each token is.
        """
        losses = self.history["loss"]
        if not all(map(math.isfinite, [*losses, self.valid[-1]])):
            return True
        return max(losses) > 2 * losses[0] and self.valid[-1] > unigram


def finished(out: Path, config: dict[str, Any]) -> Result | None:
    """The result in `out` if its run is over; refuses a directory of another run."""
    if (saved := saved_result(out, config)) is None:
        return None
    try:
        return Result(**saved)
    except TypeError as error:
        raise InputError(f"`--out` must hold a complete result.json, got {out}: {error}.") from None


def titled(clip: str) -> str:
    return "no clip" if clip == "none" else clip


def in_units(nats: float, level: str) -> float:
    """Bits per character, or perplexity per word."""
    if level == "char":
        return nats / math.log(2)
    return math.exp(nats) if nats < 700 else math.inf  # float64 ends at exp(709)


def scored(nats: float, level: str) -> str:
    """A score in a table: 2.066, 113.6 or 11,160."""
    number = in_units(nats, level)
    return f"{number:,.{3 if number < 10 else 1 if number < 1000 else 0}f}"


def unit_of(level: str) -> str:
    return "bits per character" if level == "char" else "perplexity"


def report(
    results: list[Result], baselines: Baselines, out: Path, settings: dict[str, Any]
) -> None:
    """Samples and tables on the screen and in results.txt, the plot in `out`, and a sentence."""
    tables = [scores_table(results, baselines)]
    tables += [answers_table(results)] if results[0].answers else []
    for result in results:
        if result.text:
            console.rule(f"text written with {result.title}")
            console.print(result.text, markup=False)
    console.print()
    make_directory(out)
    used = {**settings, "gradclip_jax": gradclip_jax.__version__}
    save_results(out, tables, used, ("jax", "flax", "optax", "numpy"))
    picture = out / ("compare.png" if len(results) > 1 else "run.png")
    draw(results, baselines, picture)
    if len(results) > 1:
        draw_losses(results, out / "losses.png")
    console.print(f"Plot: {picture}{advice(out)}")
    if len(results) > 1:
        console.print(
            "Without the clip the numbers depend on the processor: an exploding run amplifies the "
            "rounding."
        )
    console.print(conclusion(results, baselines))


def conclusion(results: list[Result], baselines: Baselines) -> str:
    """What the runs have shown, in a sentence."""
    unit, level = unit_of(results[0].level), results[0].level
    scores = [f"{in_units(result.valid[-1], level):.2f}" for result in results]
    lost = [result.diverged(baselines["1-gram"]["valid"]) for result in results]
    how = [f"the run diverged: {score}" if is_lost else score
           for score, is_lost in zip(scores, lost, strict=True)]  # fmt: skip
    if len(results) == 1:
        with_clip = "Without a clip" if results[0].clip == "none" else f"With {results[0].clip}"
        return f"{with_clip} {how[0]}{' in' if lost[0] else ''} {unit} in validation."
    if lost == [False, True]:
        return f"With the clip {scores[0]} {unit}; without it the run diverged: {scores[1]}."
    return f"With the clip {how[0]}, without it {how[1]} ({unit} in validation)."


def scores_table(results: list[Result], baselines: Baselines) -> Table:
    """A column for each split, the largest norm, and how often the clip acted."""
    level = results[0].level
    # A terminal of 80 columns has room for two spaces between the columns.
    table = Table(title=unit_of(level), box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "validation", "test", "largest norm", "clipped", "diverged"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for result in results:
        norms = result.history["grad_norm"]
        table.add_row(
            result.title,
            *(scored(nats, level) for nats in (result.valid[-1], result.test)),
            plain(np.max(norms)),
            f"{result.clip_count / len(norms):.0%}",
            "yes" if result.diverged(baselines["1-gram"]["valid"]) else "no",
        )
    for name, nats in baselines.items():
        scores = (scored(nats[split], level) for split in ("valid", "test"))
        table.add_row(name, *scores, "", "", "")
    return table


def answers_table(results: list[Result]) -> Table:
    """The share of questions in the test split that were answered word for word."""
    table = Table(title="right answers", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    counts = [result.answers or {} for result in results]
    kinds = sorted(counts[0])
    for name in ("", "all", *kinds):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for result, count in zip(results, counts, strict=True):
        pairs = [np.sum([*count.values()], axis=0), *(count[kind] for kind in kinds)]
        table.add_row(result.title, *(f"{right / asked:.1%}" for right, asked in pairs))
    asked = [counts[0][kind][1] for kind in kinds]
    table.add_row("questions", str(sum(asked)), *map(str, asked))
    return table


def draw(results: list[Result], baselines: Baselines, picture: Path) -> None:
    """Loss and validation above, gradient norm and its limit below, one colour for each run."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    scale, unit = loss_unit(results[0].level)
    names = losses(above, results, scale)
    top = above.get_ylim()[1]
    for name, nats in baselines.items():
        above.axhline(nats["valid"] / scale, color="0.6", ls=":", lw=1)
        names.append((nats["valid"] / scale, name, "0.45"))
    above.set_ylim(top=top)
    norms = []
    for number, result in enumerate(results):
        history, colour = result.history, f"C{number}"
        below.plot(steps_of(result), history["grad_norm"], colour, lw=0.8)
        norms.append((end_of(history["grad_norm"]), result.title, colour))
        limit = np.array(history["clip_limit"])
        if np.isfinite(limit).any():
            below.plot(steps_of(result), limit, "0.3", ls="--", lw=1)
            norms.append((end_of(history["clip_limit"]), "its limit", "0.3"))
    above.set(ylabel=unit, title="Loss (dots: validation)")
    below.set(yscale="log", ylabel="norm", xlabel="step", title="Gradient norm before the clip")
    finish(figure, {above: names, below: norms}, results)
    figure.savefig(picture, dpi=110)


def draw_losses(results: list[Result], picture: Path) -> None:
    """One panel, 900 pixels wide: the losses and nothing else."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    scale, unit = loss_unit(results[0].level)
    names = losses(axes, results, scale)
    axes.set(ylabel=unit, xlabel="step")
    finish(figure, {axes: names}, results)
    figure.savefig(picture, dpi=100)


def losses(axes: Axes, results: list[Result], scale: float) -> list[tuple[float, str, str]]:
    """Draws each loss, and returns the names of the lines."""
    names = []
    for number, result in enumerate(results):
        colour, loss = f"C{number}", np.array(result.history["loss"]) / scale
        axes.plot(steps_of(result), loss, colour, lw=0.9)
        if valid := result.history.get("valid"):
            at, nats = zip(*valid, strict=True)
            axes.plot(at, np.array(nats) / scale, colour, marker="o", ls="", clip_on=False)
        names.append((end_of(loss), result.title, colour))
    axes.set_yscale("log")
    return names


def finish(figure: Figure, names: dict[Axes, list], results: list[Result]) -> None:
    """Ticks that read and names at the lines; they come last, when the axes are as they stay."""
    longest = max(len(result.history["loss"]) for result in results)
    for axes in names:
        axes.set_xlim(0, longest)
        plain_ticks(axes)
        quiet_frame(axes)
    for axes, labels in names.items():
        label_lines(axes, labels)


def steps_of(result: Result) -> np.ndarray:
    return np.arange(1, len(result.history["loss"]) + 1)


def end_of(values: Any) -> float:
    """Where a line ends: the median of its last steps that are finite."""
    finite = np.array(values)[np.isfinite(values)]
    return float(np.median(finite[-20:])) if len(finite) else math.nan


def loss_unit(level: str) -> tuple[float, str]:
    return (math.log(2), "bits per character") if level == "char" else (1.0, "nats per word")
