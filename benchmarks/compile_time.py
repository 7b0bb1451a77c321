"""How long a clip takes to compile, and how large its program is, by the number of leaves.

python benchmarks/compile_time.py
python benchmarks/compile_time.py --leaves 10,100
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import optax
from harness import Spread, differences, ratios
from step_overhead import CLIPS, OPTIMIZERS, step_of

LIBRARIES = ("gradclip_jax", "optax")
SIDE = 32


class Compiled(NamedTuple):
    """Seconds of each round and instructions, by the name of a clip."""

    times: dict[str, list[float]]
    instructions: dict[str, int]


def compiled_in_turn(
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], **rounds: Any
) -> Compiled:
    """Compiles functions for the shapes of their arguments, again in every round."""
    programs: dict[str, harness.Program] = {}

    def run(name: str) -> None:
        function, args = cases[name]
        programs[name] = harness.compiled(function, *args)

    runs = {name: lambda name=name: run(name) for name in cases}
    times = harness.interleaved(runs, least=1, warm=0, **rounds)
    return Compiled(times, {name: one.instructions for name, one in programs.items()})


def clip_alone(count: int, **rounds: Any) -> Compiled:
    """The clip by itself."""
    updates = count * [jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)]
    cases = {}
    for name in LIBRARIES:
        clip = CLIPS[name]()
        cases[name] = (clip.update, (updates, jax.eval_shape(clip.init, updates)))
    return compiled_in_turn(cases, **rounds)


def clip_in_step(count: int, **rounds: Any) -> Compiled:
    """AdamW, without a clip and behind each."""
    optimizer = OPTIMIZERS["adamw"]()
    params = count * [jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)]
    state = jax.eval_shape(optimizer.init, params)
    cases = {}
    for name in ("no clip", *LIBRARIES):
        clip = CLIPS[name]()
        args = (params, state, jax.eval_shape(clip.init, params), params)
        cases[name] = (step_of(optimizer, clip), args)
    return compiled_in_turn(cases, **rounds)


# --- the report ---

TEXT = f"""\
Leaves are float32 matrices of {SIDE} × {SIDE}. Seconds are those to trace, lower and compile in a
new `jit`, medians over at most {{rounds}} rounds (one, where that takes longer than {{seconds:g}}
seconds) and, in brackets, quartiles. Instructions are those of the optimized HLO program, within
fusions too.

### The clip alone

"""
STEP = """
### In front of AdamW

The overhead is the time to compile the step with the clip minus that without it.

"""
ALONE_HEADER = (
    "leaves", "gradclip_jax, s", "optax, s", "gradclip_jax / optax", "gradclip_jax, ms per leaf",
    "gradclip_jax, instructions", "optax, instructions",
)  # fmt: skip
STEP_HEADER = (
    "leaves", "AdamW, s", "gradclip_jax adds, s", "optax adds, s", "gradclip_jax / optax",
    "AdamW, instructions", "with gradclip_jax", "with optax",
)  # fmt: skip


def alone_cells(count: int, found: Compiled) -> list[Any]:
    """A row of the first table."""
    ours, theirs = (found.times[name] for name in LIBRARIES)
    return [
        f"{count:,}",
        Spread.of(ours),
        Spread.of(theirs),
        Spread.of(ratios(ours, theirs)),
        Spread.of(ours, 1e3 / count),
        *(f"{number:,}" for number in found.instructions.values()),
    ]


def step_cells(count: int, found: Compiled) -> list[Any]:
    """A row of the second table."""
    alone = found.times["no clip"]
    ours, theirs = (differences(found.times[name], alone) for name in LIBRARIES)
    return [
        f"{count:,}",
        Spread.of(alone),
        Spread.of(ours),
        Spread.of(theirs),
        Spread.of(ratios(ours, theirs)),
        *(f"{number:,}" for number in found.instructions.values()),
    ]


# --- the command line ---


def measure(args: argparse.Namespace) -> str:
    """Both tables."""
    alone_counts = harness.numbers("--leaves", args.leaves)
    step_counts = harness.numbers("--step-leaves", args.step_leaves)
    rounds = {"rounds": args.rounds, "seconds": args.seconds}
    # The first program of a process takes longer.
    harness.compiled(optax.tree.norm, jnp.ones(3))
    alone, steps = [], []
    for count in alone_counts:
        harness.progress(f"{count:,} leaves", "clip alone")
        alone.append(alone_cells(count, clip_alone(count, **rounds)))
    for count in step_counts:
        harness.progress(f"{count:,} leaves", "AdamW")
        steps.append(step_cells(count, clip_in_step(count, **rounds)))
    parts = [TEXT.format(**rounds), harness.table(ALONE_HEADER, alone)]
    return "".join([*parts, STEP, harness.table(STEP_HEADER, steps)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure how long a clip takes to compile.")
    parser.set_defaults(rounds=5)
    add = parser.add_argument
    add("--leaves", default="10,100,500,1000,2000", help="leaves of the clip alone (%(default)s)")
    add("--step-leaves", default="10,100,500,1000", help="leaves of the step (%(default)s)")
    return harness.run("Compile time", parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
