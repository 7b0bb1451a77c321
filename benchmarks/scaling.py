"""What a clip costs by the number of parameters.

python benchmarks/scaling.py
python benchmarks/scaling.py --parameters 1e4,1e6 --out results
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import jax.numpy as jnp
from harness import Spread, differences, ratios
from step_overhead import CLIPS, OPTIMIZERS, step_of

COPIES = {"adamw": 5.3, "sgd": 3.3}
"""Memory that a row needs, in vectors: params, moments, gradients, a temporary one, and a rest."""
LINES = {"bare norm": "0.5", "gradclip_jax": "C0", "optax": "C1"}
"""Colours of what is drawn."""
Times = Mapping[str, list[float]]


def measure_size(optimizer: str, count: int, **rounds: Any) -> dict[str, list[float]]:
    """Steps on one vector, with and without a clip; they share params and optimizer state."""
    make = OPTIMIZERS[optimizer]()
    grads, params = jnp.ones(count), jnp.zeros(count)
    shared = [params, make.init(params)]
    del params  # it is donated
    cases: dict[str, Callable[[], Any]] = {}
    for name in ("no clip", *LINES):
        clip = CLIPS[name]()
        own = [clip.init(grads)]
        program = harness.compiled(step_of(make, clip), *shared, *own, grads, donate=(0, 1))

        def run(program: harness.Program = program, own: list[Any] = own) -> Any:
            shared[0], shared[1], own[0] = program.run(*shared, *own, grads)
            return shared, own

        cases[name] = run
    return harness.interleaved(cases, **rounds)


def overheads(times: Times) -> dict[str, list[float]]:
    """Seconds that each clip adds, round by round."""
    return {name: differences(times[name], times["no clip"]) for name in LINES}


# --- the report ---

TEXT = """\
One vector of float32 in a step after the backward pass: gradients in, params and optimizer state in
and out and donated. The overhead is the time of the step with the clip minus that without it in the
same round; cells are medians over at most {rounds} rounds and, in brackets, quartiles. The bare
norm is a step that also returns `optax.tree.norm` of its gradients, behind a barrier. GB/s are the
bytes of the gradients over the overhead.

"""
HEADER = (
    "optimizer", "parameters", "step alone, ms", *(f"{name}, ms" for name in LINES),
    "gradclip_jax / bare norm", "gradclip_jax / optax", "gradclip_jax, GB/s",
)  # fmt: skip


def cells(optimizer: str, count: int, times: Times) -> list[Any]:
    """A row of the table."""
    added = overheads(times)
    ours, peak = added["gradclip_jax"], harness.peak_bandwidth()
    speed = Spread.of(ratios([4 * count] * len(ours), ours), 1e-9)
    share = "" if peak is None else f", {100 * speed.median * 1e9 / peak:.0f} % of the peak"
    return [
        optimizer,
        f"{count:,}",
        Spread.of(times["no clip"], 1e3),
        *(Spread.of(one, 1e3) for one in added.values()),
        Spread.of(ratios(ours, added["bare norm"])),
        Spread.of(ratios(ours, added["optax"])),
        f"{speed}{share}",
    ]


def draw(all_times: Mapping[tuple[str, int], Times], file: Path) -> None:
    """Overheads over parameters, a panel for each optimizer, on logarithmic axes."""
    from matplotlib.figure import Figure

    optimizers = list(dict.fromkeys(optimizer for optimizer, _ in all_times))
    figure = Figure(figsize=(1 + 5 * len(optimizers), 4.5), layout="constrained")
    panels = figure.subplots(1, len(optimizers), squeeze=False, sharey=True)[0]
    for axes, optimizer in zip(panels, optimizers, strict=True):
        sizes = {count: times for (who, count), times in all_times.items() if who == optimizer}
        for name, colour in LINES.items():
            draw_line(axes, sizes, name, colour)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)  # noise can leave nothing to draw
        axes.set_title(f"in front of {optimizer}")
        axes.set_xlabel("parameters")
    spreads = [Spread.of(o, 1e3) for times in all_times.values() for o in overheads(times).values()]
    medians = [spread.median for spread in spreads if spread.median > 0] or [1.0]
    panels[0].set_ylim(min(medians) / 4, max(medians) * 4)  # of all panels
    panels[0].set_ylabel("milliseconds added to a step")
    panels[0].legend()
    figure.suptitle(harness.machine())
    figure.savefig(file, dpi=110)


def draw_line(axes: Any, sizes: Mapping[int, Times], name: str, colour: str) -> None:
    """The medians and quartiles of one clip; medians that are not above 0 are left out."""
    spreads = {count: Spread.of(overheads(times)[name], 1e3) for count, times in sizes.items()}
    kept = {count: spread for count, spread in spreads.items() if spread.median > 0}
    low, median, high = zip(*kept.values(), strict=True) if kept else ((), (), ())
    axes.plot(list(kept), median, color=colour, label=name, marker="o")
    axes.fill_between(list(kept), low, high, color=colour, alpha=0.2, linewidth=0)


def measure(args: argparse.Namespace) -> str:
    """The table, and where there is a directory the figure."""
    counts = harness.numbers("--parameters", args.parameters)
    optimizers = harness.chosen("--optimizers", args.optimizers, COPIES)
    all_times, lines = {}, []
    for optimizer, count in itertools.product(optimizers, counts):
        harness.progress(optimizer, f"{count:,} parameters")
        needed, available = COPIES[optimizer] * 4 * count, harness.available_bytes()
        if needed > available:
            lines.append(
                f"{optimizer}, {count:,} parameters: skipped, as it needs {needed / 1e9:.1f} GB "
                f"of memory and {available / 1e9:.1f} GB are available.\n"
            )
            continue
        rounds = {"rounds": args.rounds, "seconds": args.seconds}
        all_times[optimizer, count] = measure_size(optimizer, count, **rounds)
    rows = [cells(optimizer, count, times) for (optimizer, count), times in all_times.items()]
    parts = [TEXT.format(rounds=args.rounds), harness.table(HEADER, rows)]
    if harness.peer("matplotlib") is None:
        lines.append("matplotlib: not installed, no figure.\n")
    elif args.out is not None and all_times:
        file = args.out / f"{harness.slug()}_scaling.png"
        draw(all_times, file)
        lines.append(f"![Overhead over parameters]({file.name})\n")
        lines.append("Bands are quartiles; medians that are not above 0 are left out.\n")
    return "\n".join(["".join(parts), *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure a clip by the number of parameters.")
    add = parser.add_argument
    add(
        "--parameters",
        default="1e4,1e5,1e6,1e7,1e8,1e9",
        help="numbers of parameters, by comma (%(default)s)",
    )
    add("--optimizers", default=",".join(COPIES), help="optimizers, by comma (%(default)s)")
    return harness.run("Cost by the number of parameters", parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
