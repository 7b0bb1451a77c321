"""Draw every adaptive limit on one stream of norms, and measure how each of them recovers.

    python docs/adaptive_limits.py  # into docs/images; prints the table of the page
    python docs/adaptive_limits.py --out some/where

All numbers are seeded. A norm is that of a gradient of one element, so what is run is each clip as
users have it, without a cap and, but for the window of autoclip, with its defaults.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import gradclip_jax
from gradclip_jax import clip_to_limit, limits

CLIPS = {
    "percentile": clip_to_limit(limits.percentile()),
    "autoclip(window=100)": gradclip_jax.autoclip(window=100),
    "median": clip_to_limit(limits.median()),
    "deviation": clip_to_limit(limits.deviation()),
    "running_quantile": clip_to_limit(limits.running_quantile()),
    "zscore": gradclip_jax.zclip(max_norm=None),
    "ema": clip_to_limit(limits.ema()),
    "growth": gradclip_jax.limit_norm_growth(),
    "adagc": gradclip_jax.adagc(max_norm=None),
    "stable_spam_clip": gradclip_jax.stable_spam_clip(),
}
WINDOWS = ("percentile", "autoclip(window=100)", "median", "deviation")

NOISE = 0.1  # standard deviation of the logarithm of a norm
AT_REST = 1000  # steps at one level before a change
AFTER = {name: 500 if name in WINDOWS else 20_000 for name in CLIPS}  # steps measured after it
WITHIN = 0.1


class Change(NamedTuple):
    """What happens to a norm of 1 at one step, and from that step on."""

    once: float
    lasting: float


CHANGES = {
    "none": Change(1, 1),
    "fall": Change(1e-3, 1e-3),
    "rise": Change(1e3, 1e3),
    "doubling": Change(2, 2),
    "dip": Change(1e-3, 1),
    "spike": Change(1e3, 1),
}


class Run(NamedTuple):
    """Norms and the limits that they met, step by step."""

    norms: np.ndarray
    limits: np.ndarray

    @property
    def clipped(self) -> np.ndarray:
        return self.norms > self.limits


def stream() -> np.ndarray:
    """600 norms of a training: noise, a drift, five spikes, a NaN, a new regime, a drop."""
    random = np.random.default_rng(0)
    steps = np.arange(600)
    norms = np.exp(0.15 * random.standard_normal(600) - 0.5 * steps / 600)
    norms[steps >= 300] *= 2
    norms[steps >= 450] /= 10
    norms[[60, 170, 250, 400, 540]] *= [100, 10, 1000, 30, 100]
    norms[220] = np.nan
    return norms


def changed(length: int) -> dict[str, np.ndarray]:
    """The same noise for each change, which comes after `AT_REST` steps; and a NaN put between."""
    noise = np.exp(NOISE * np.random.default_rng(1).standard_normal(AT_REST + length))
    columns = {}
    for name, change in CHANGES.items():
        columns[name] = noise.copy()
        columns[name][AT_REST] *= change.once
        columns[name][AT_REST + 1 :] *= change.lasting
    return {**columns, "nan": np.insert(noise, AT_REST, np.nan)[:-1]}


@functools.partial(jax.jit, static_argnums=0)
def scan(clip: Any, norms: jax.Array) -> tuple[jax.Array, Any]:
    """The limit of each norm, in columns that know nothing of each other; and the last state."""

    def step(state: Any, row: jax.Array) -> Any:
        _, state = jax.vmap(clip.update)(row, state)  # the gradient is its norm
        return state, state.clip_limit

    state, limits = jax.lax.scan(step, jax.vmap(clip.init)(jnp.zeros_like(norms[0])), norms)
    return limits, state.limit_state


def run(name: str) -> tuple[dict[str, Run], int]:
    """Each change, and the stream that is drawn; and how many numbers the state has per norm."""
    columns = changed(AFTER[name])
    length = AT_REST + AFTER[name]
    columns["drawn"] = np.pad(stream(), (0, length - len(stream())), constant_values=1)
    norms = np.stack(list(columns.values()), axis=1)
    limits, state = scan(CLIPS[name], jnp.asarray(norms, jnp.float32))
    limits = np.asarray(limits, np.float64)
    runs = {key: Run(norms[:, i], limits[:, i]) for i, key in enumerate(columns)}
    runs["drawn"] = Run(*(x[: len(stream())] for x in runs["drawn"]))
    return runs, sum(leaf.size for leaf in jax.tree.leaves(state)) // len(columns)


def first(reached: np.ndarray) -> str:
    """After how many steps something is so."""
    return f"{int(np.argmax(reached)):,}" if reached.any() else "never"


def for_good(reached: np.ndarray) -> str:
    """After how many steps something is so, and stays so."""
    (missed,) = np.nonzero(~reached)
    steps = int(missed[-1]) + 1 if len(missed) else 0
    return "never" if steps == len(reached) else f"{steps:,}"


def within(runs: dict[str, Run], key: str, level: float = 1.0) -> np.ndarray:
    """Whether each limit after a change lies where those of that level lie, to 10 %."""
    usual = level * runs["none"].limits[AT_REST // 2 :]
    limits = runs[key].limits[AT_REST + 1 :]
    return (usual.min() * (1 - WITHIN) <= limits) & (limits <= usual.max() * (1 + WITHIN))


def measured(name: str, runs: dict[str, Run], numbers: int) -> list[str]:
    """A row of the table."""
    calm, rest = runs["none"], runs["none"].limits[AT_REST // 2 :]
    twice = 2 * (1 - WITHIN) * min(1, np.median(rest))
    after_spike = runs["spike"].limits[AT_REST + 1 :] / calm.limits[AT_REST + 1 :]
    without = np.delete(runs["nan"].limits, AT_REST)
    return [
        f"`{name}`",
        f"{numbers:,}",
        f"{int(np.argmax(np.isfinite(calm.limits))):,}",
        f"{np.mean(calm.clipped[AT_REST // 2 :]):.0%}",
        for_good(within(runs, "fall", 1e-3)),
        for_good(within(runs, "rise", 1e3)),
        first(runs["doubling"].limits[AT_REST:] >= twice),
        for_good(within(runs, "dip")),
        f"{after_spike.max():.2f}",
        "none" if np.array_equal(without, calm.limits[:-1]) else "some",
    ]


HEAD = [
    "limit",
    "numbers per norm",
    "warm-up",
    "clipped at rest",
    "fall of 1000×",
    "rise of 1000×",
    "doubling",
    "one norm of 1/1000",
    "limit after a spike of 1000×",
    "trace of a NaN",
]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(name: str, drawn: Run, path: Path) -> None:
    """Limit against norm on a logarithmic scale, with the steps that are clipped."""
    steps = np.arange(len(drawn.norms))
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 2), dpi=110)
        axes = figure.add_axes((0.075, 0.2, 0.905, 0.76))
        axes.plot(steps, drawn.norms, color="0.7", linewidth=0.7, label="norm")
        hit = drawn.clipped
        axes.plot(steps[hit], drawn.norms[hit], ".", color="tab:red", ms=2.5, label="clipped")
        limits = np.where(np.isfinite(drawn.limits), drawn.limits, np.nan)
        axes.plot(steps, limits, color="tab:blue", linewidth=1, label="limit")
        for nan in np.nonzero(np.isnan(drawn.norms))[0].tolist():
            axes.axvline(nan, color="0.5", linewidth=0.7, linestyle=":", label="NaN")
        axes.set(yscale="log", ylim=(0.03, 2000), xlim=(0, len(steps)), ylabel=name, xlabel="step")
        axes.legend(loc="upper right", ncols=4, frameon=False, borderaxespad=0)
        figure.savefig(path, metadata={"Software": None})


def image(name: str) -> str:
    """The name of the file of a limit."""
    return f"{name.partition('(')[0]}.png"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw every adaptive limit, and measure it.")
    here = Path(__file__).parent / "images"
    parser.add_argument("--out", type=Path, default=here, help="directory of the images")
    out = parser.parse_args(arguments).out
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / image("percentile")).touch()
    except OSError as error:
        rule = "`--out` must be a directory that can be written"
        parser.error(f"{rule}, got {out}: {error.strerror}.")
    rows = []
    for name in CLIPS:
        runs, numbers = run(name)
        draw(name, runs["drawn"], out / image(name))
        rows.append(measured(name, runs, numbers))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
