"""What each strategy costs, relative to `clip_by_global_norm`.

python benchmarks/strategies.py
python benchmarks/strategies.py --trees 500 --strategies adagc,zclip
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import harness
import jax
import numpy as np
import optax
from harness import Spread, digits, ratios
from step_overhead import TREES, gradients, placed

import gradclip_jax as gj

BASE = "clip_by_global_norm"


def rank_label(tree: Any) -> Any:
    """Two groups: matrices and vectors."""
    return jax.tree.map(lambda leaf: "matrix" if np.ndim(leaf) > 1 else "vector", tree)


def qk_clip() -> optax.GradientTransformation:
    """Each matrix as a query of two heads, whose logits are its first two elements."""

    def heads(path: str, weight: Any) -> gj.Heads | None:
        shape = (weight.shape[0], 2, -1)
        return gj.Heads("query_rotary", axis=1, shape=shape) if weight.ndim == 2 else None

    clip = gj.qk_clip(heads=heads)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        logits = jax.tree.map(lambda w: w[0, :2] if w.ndim == 2 else None, params)
        return clip.update(updates, state, params, max_logits=logits)

    return optax.GradientTransformation(clip.init, update)


STRATEGIES: dict[str, Callable[[], optax.GradientTransformation]] = {
    BASE: lambda: gj.clip_by_global_norm(1.0),
    "clip_or_drop": lambda: gj.clip_or_drop(1.0, drop_norm=100.0),
    "clip_by_norm": lambda: gj.clip_by_norm(1.0),
    "clip_by_unit_norm": lambda: gj.clip_by_unit_norm(1.0),
    "clip_by_group_norm": lambda: gj.clip_by_group_norm(1.0, labels=rank_label),
    "clip_by_block_rms": lambda: gj.clip_by_block_rms(1.0),
    "adaptive_grad_clip": gj.adaptive_grad_clip,
    "clip_by_param_norm": gj.clip_by_param_norm,
    "clip_by_value": lambda: gj.clip_by_value(1.0),
    "normalize_by_norm": gj.normalize_by_norm,
    "limits.percentile": lambda: gj.clip_to_limit(gj.limits.percentile()),
    "autoclip": gj.autoclip,
    "limits.median": lambda: gj.clip_to_limit(gj.limits.median()),
    "limits.running_quantile": lambda: gj.clip_to_limit(gj.limits.running_quantile()),
    "zclip": gj.zclip,
    "limits.ema": lambda: gj.clip_to_limit(gj.limits.ema()),
    "limit_norm_growth": gj.limit_norm_growth,
    "adagc": gj.adagc,
    "clippy": gj.clippy,
    "spam_clip": gj.spam_clip,
    "acclip": gj.acclip,
    "stable_spam_clip": gj.stable_spam_clip,
    "stable_spam_norm": gj.stable_spam_norm,
    "qk_clip": qk_clip,
    "zero_nonfinite": gj.zero_nonfinite,
    "skip_nonfinite": lambda: gj.skip_nonfinite(optax.identity()),
    "skip_spikes": lambda: gj.skip_spikes(optax.identity(), grad_norm=gj.limits.ema(6.0)),
    "error_feedback": lambda: gj.error_feedback(gj.clip_by_global_norm(1.0)),
    "clip21": lambda: gj.clip21(gj.clip_by_global_norm(1.0)),
    "clip_by_dual_norm": lambda: gj.clip_by_dual_norm(1.0),
    "soft_spectral_clip": lambda: gj.soft_spectral_clip(1.0),
    "spectral_clip": lambda: gj.spectral_clip(1.0),
}
SLOW = ("clip_by_dual_norm", "soft_spectral_clip", "spectral_clip")
"""They multiply or decompose matrices: rounds of their own, so that the others get more of them."""
MANY = 100
"""Leaves beyond which the slow ones take minutes to compile, and are measured only by name."""
DEFAULT_TREES = "lstm,500"


def measure_tree(tree: str, names: Iterable[str], **rounds: Any) -> list[list[Any]]:
    """Rows of strategies that are run in turn, each on gradients of its own."""
    arrays = gradients(TREES[tree].shapes)
    params = placed(arrays, "float32", 0.02)
    cases, programs = {}, {}
    for name in dict.fromkeys((BASE, *names)):
        harness.progress(TREES[tree].words, name)
        strategy: Any = STRATEGIES[name]()
        own = [placed(arrays, "float32"), strategy.init(params)]

        def update(updates: Any, state: Any, params: Any, strategy: Any = strategy) -> Any:
            return strategy.update(updates, state, params)

        program = harness.compiled(update, *own, params, donate=(0, 1))

        # What comes out goes in again: it lies where the gradients lay.
        def run(program: harness.Program = program, own: list[Any] = own) -> Any:
            own[:] = program.run(*own, params)
            return own

        programs[name], cases[name] = program, run
    times = harness.interleaved(cases, **rounds)
    size = sum(x.nbytes for x in arrays)
    return [cells(name, times[name], times[BASE], programs[name], size) for name in names]


def cells(
    name: str, times: list[float], base: list[float], program: harness.Program, size: int
) -> list[Any]:
    """A row of the table."""
    return [
        f"`{name}`",
        Spread.of(times, 1e3),
        Spread.of(ratios(times, base)),
        digits(program.seconds),
        digits(100 * program.temporary / size),
    ]


# --- the report ---

TEXT = f"""\
The clip alone, compiled, with its updates and state donated, in float32, every strategy with its
defaults; what has none is limited to 1. Guards wrap a clip by the global norm or no optimizer.
Cells are medians over at most {{rounds}} rounds and, in brackets, quartiles; the ratio is that to
`{BASE}` in the same round. Memory is what the program allocates beside its arguments and results,
as part of that of the updates. Strategies that multiply or decompose matrices have rounds of their
own; above {MANY} leaves they take minutes to compile, and are measured only when they are named.
"""
HEADER = ("strategy", "ms", f"/ `{BASE}`", "compile, s", "temporary memory, %")


def measure(args: argparse.Namespace) -> str:
    """A table for each tree."""
    trees = harness.chosen("--trees", args.trees, TREES)
    named = args.strategies is not None
    given = args.strategies if named else ",".join(STRATEGIES)
    names = harness.chosen("--strategies", given, STRATEGIES)
    parts = [TEXT.format(rounds=args.rounds)]
    for tree in trees:
        fast = [name for name in names if name not in SLOW]
        slow = [name for name in names if name in SLOW]
        rows = []
        if fast:
            rows += measure_tree(tree, fast, rounds=args.rounds, seconds=args.seconds)
        if slow and (named or len(TREES[tree].shapes) <= MANY):
            rows += measure_tree(tree, slow, rounds=args.rounds, seconds=args.seconds, least=2)
        parts.append(f"\n### {TREES[tree].words}\n\n{harness.table(HEADER, rows)}")
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure what each strategy costs.")
    add = parser.add_argument
    add("--trees", default=DEFAULT_TREES, help="trees, by comma (%(default)s)")
    add("--strategies", help="strategies, by comma (all)")
    return harness.run("Cost of each strategy", parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
