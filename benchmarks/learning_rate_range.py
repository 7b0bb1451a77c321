"""Which clip widens the range of learning rates at which a model trains, and by how much.

    python benchmarks/learning_rate_range.py --out results
    python benchmarks/learning_rate_range.py --out results --models lstm --clips none,constant
    python benchmarks/learning_rate_range.py --out results --models muon

It trains the LSTM and the Transformer of the examples on characters of the prose that every Python
ships, at seven learning rates, behind eight and ten clips, from three seeds, with and without
corrupted batches: 756 short runs. `muon` is a Transformer of 10 million parameters, at three
learning rates behind four clips. Clips have the defaults of the library, and none was tuned. What
is finished is kept in `--out`: the same command goes on from there, and ends in Markdown and a
figure.
"""

import argparse
import concurrent.futures
import datetime
import functools
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import machine, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import gradclip_jax
from examples.language_model.command_line import InputError
from examples.language_model.data import Corpus, load_corpus, write_atomically
from examples.language_model.model import LanguageModel
from examples.papers.shared.transformer import Sizes, Transformer, matrices, next_token_loss
from gradclip_jax import limits

UNITS, LAYERS, HEADS = 64, 2, 4
BATCH, LENGTH = 8, 32
STEPS, SEEDS = 800, 3
EVERY = 20
"""Steps between two losses on the same piece of the validation text, of three at the end."""
VALIDATION_WINDOWS = 64
PERIOD, FIRST = 200, 130
"""Of 200 steps one is corrupted, for the first time when all windows and warm-ups are over."""
MUON_UNITS, MUON_LAYERS, MUON_HEADS = 320, 8, 5
GAIN = 100.0
"""What multiplies the loss of a corrupted batch, about as if it were a sum instead of a mean."""
TOLERANCE = 1.1
"""A loss up to this multiple of the best one is that of a run that trains well."""
DARKEST = 1.7
"""Multiple of the best loss from which on the figure is dark."""
CONDITIONS = ("clean", "corrupted")


Optimizer = optax.GradientTransformation


class Task(NamedTuple):
    """A model, how it is trained, and the learning rates and clips that are tried."""

    make: Callable[[int, jax.Array], nnx.Module]
    """Of the size of the vocabulary and a random key."""
    loss: Callable[[Any, jax.Array], jax.Array]
    """Mean nats of each token of [batch, time + 1] given those before it."""
    optimizer: Callable[[Any], Optimizer]
    learning_rates: tuple[float, ...]
    clips: tuple[str, ...]
    about: str
    steps: int = STEPS
    seeds: int = SEEDS
    every: int = EVERY
    period: int = PERIOD
    first: int = FIRST


def lstm(vocabulary: int, key: jax.Array) -> nnx.Module:
    """The recurrent network of the examples, with one layer."""
    return LanguageModel(vocabulary, "lstm", 1, UNITS, 0.0, rngs=nnx.Rngs(key))


def lstm_loss(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """From a state of zeros: every batch is drawn anew."""
    start = model.start(len(tokens))
    logits, _ = model(tokens[:, :-1].T, start, deterministic=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:].T).mean()


def transformer(vocabulary: int, key: jax.Array) -> nnx.Module:
    """The Transformer of the examples, with two layers."""
    return Transformer(Sizes(vocabulary, LENGTH, LAYERS, UNITS, HEADS), rngs=nnx.Rngs(key))


def transformer_loss(model: Transformer, tokens: jax.Array) -> jax.Array:
    """The mean loss of the next token."""
    loss, _ = next_token_loss(model, tokens)
    return loss


def muon_transformer(vocabulary: int, key: jax.Array) -> nnx.Module:
    """The Transformer of the examples with 10 million parameters, its products in bfloat16."""
    sizes = Sizes(vocabulary, LENGTH, MUON_LAYERS, MUON_UNITS, MUON_HEADS)
    return Transformer(sizes, jnp.bfloat16, rngs=nnx.Rngs(key))


def in_front(clip: Callable[[float], Optimizer]) -> Callable[[float, Optimizer], Optimizer]:
    """A clip of gradients, before the optimizer reads them."""
    return lambda max_norm, optimizer: optax.chain(clip(max_norm), optimizer)


ADAM_B2 = 0.999
# From `max_norm`, the cap that zclip and the warm-up of adagc have, and the optimizer behind.
CLIPS: dict[str, Callable[[float, Optimizer], Optimizer]] = {
    "none": in_front(lambda _: optax.identity()),
    "constant": in_front(gradclip_jax.clip_by_global_norm),
    "percentile": in_front(lambda _: gradclip_jax.clip_to_limit(limits.percentile())),
    "zclip": in_front(lambda _: gradclip_jax.zclip()),
    "adagc": in_front(lambda _: gradclip_jax.adagc()),
    "median": in_front(lambda _: gradclip_jax.clip_to_limit(limits.median())),
    "capped-percentile": in_front(
        lambda max_norm: gradclip_jax.clip_to_limit(
            limits.minimum(limits.percentile(95.0), max_norm)
        )
    ),
    "skip-spikes": lambda _, optimizer: gradclip_jax.skip_spikes(
        optimizer, grad_norm=limits.deviation()
    ),
    "stable-spam": in_front(
        lambda _: optax.chain(gradclip_jax.stable_spam_clip(), gradclip_jax.stable_spam_norm())
    ),
    "update-rms": lambda _, optimizer: gradclip_jax.clip_update_rms(optimizer, b2=ADAM_B2),
}
# The last two are for Adam: one is a normalizer, the other reads the second moment.
FOR_SGD = tuple(CLIPS)[:-2]

# Behind a clip SGD takes a step of at most learning rate times limit. AdamW divides by the norms
# that it remembers, so a clip acts on it through outliers alone: a spike stays in its second
# moment for about 1 / (1 - b2) steps.
MODELS = {
    "lstm": Task(
        lstm,
        lstm_loss,
        optax.sgd,
        tuple(2.0**i for i in range(1, 8)),
        FOR_SGD,
        f"The LSTM, 1 layer of {UNITS} units, by SGD",
    ),
    "transformer": Task(
        transformer,
        transformer_loss,
        functools.partial(optax.adamw, b2=ADAM_B2),
        tuple(2.5e-4 * 2**i for i in range(7)),
        tuple(CLIPS),
        f"The Transformer, {LAYERS} layers of {UNITS} units, by AdamW with b2 {ADAM_B2}",
    ),
    # Muon multiplies 60 matrices for each layer and step: few steps, from one seed.
    "muon": Task(
        muon_transformer,
        transformer_loss,
        functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=matrices),
        (0.005, 0.02, 0.08),
        ("none", "constant", "zclip", "skip-spikes"),
        f"The Transformer with {MUON_LAYERS} layers of {MUON_UNITS} units, 10 million parameters, "
        "products in bfloat16, by Muon (Adam for what is not a matrix of a block)",
        steps=80,
        seeds=1,
        every=3,
        period=80,
        first=66,
    ),
}


# --- one run ---


def corrupt(
    task: Task, tokens: jax.Array, noise: jax.Array, step: Any, allowed: Any
) -> tuple[Any, Any]:
    """The batch of a step and what multiplies its loss: one of a period is random, times 100."""
    bad = allowed & (step % task.period == task.first)
    return jnp.where(bad, noise, tokens), jnp.where(bad, GAIN, 1.0)


def trainer(
    task: Task, clipped_by: Callable[[Optimizer], Optimizer], corpus: Corpus, steps: int
) -> Any:
    """A function of learning rates and seeds, compiled once for all of them."""
    vocabulary = len(corpus.vocabulary)
    text = jnp.asarray(corpus.train)
    rows = min(VALIDATION_WINDOWS, len(corpus.valid) // (LENGTH + 1))
    valid = jnp.asarray(corpus.valid[: rows * (LENGTH + 1)].reshape(rows, LENGTH + 1))
    every = min(task.every, steps // 3)
    ends = [steps - 2 * every, steps - every, steps]
    # Both conditions are the same up to the first corrupted step, so that part is trained once.
    fork = min(task.first, ends[0])
    parts = {
        "start": np.array([0, fork, *ends[:-1], fork, *ends[:-1]]),
        "stop": np.array([fork, *ends, *ends]),
        "corrupted": np.arange(7) > 3,
    }

    def run(learning_rate: jax.Array, seed: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        graph, params, rest = nnx.split(task.make(vocabulary, key), nnx.Param, ...)
        optimizer = clipped_by(task.optimizer(learning_rate))

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            return task.loss(nnx.merge(graph, params, rest), tokens)

        def step(number: jax.Array, corrupted: jax.Array, state: Any) -> Any:
            params, opt_state = state
            # Of the seed and the step alone: all clips and learning rates see the same batches.
            where, what = jax.random.split(jax.random.fold_in(key, number))
            starts = jax.random.randint(where, (BATCH, 1), 0, len(text) - LENGTH)
            tokens = text[starts + jnp.arange(LENGTH + 1)]
            noise = jax.random.randint(what, tokens.shape, 0, vocabulary, tokens.dtype)
            tokens, gain = corrupt(task, tokens, noise, number, corrupted)
            grads = jax.grad(lambda params: gain * loss(params, tokens))(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def part(states: Any, of: dict[str, jax.Array]) -> Any:
            state, forked = states
            again = of["corrupted"] & (of["start"] == fork)
            state = jax.tree.map(lambda old, new: jnp.where(again, old, new), forked, state)
            state = jax.lax.fori_loop(
                of["start"], of["stop"], lambda i, state: step(i, of["corrupted"], state), state
            )
            first = of["start"] == 0
            forked = jax.tree.map(lambda old, new: jnp.where(first, new, old), forked, state)
            return (state, forked), (loss(state[0], valid), events(state[1]) / steps)

        state = params, optimizer.init(params)
        _, (losses, rates) = jax.lax.scan(part, (state, state), parts)
        final = losses[1:].reshape(2, 3).mean(axis=1)
        return {"first": jnp.full(2, loss(params, valid)), "final": final, "clipped": rates[3::3]}

    # One run after the other: for matrices this small that takes 0.7 of the time of `vmap`.
    return jax.jit(lambda *runs: jax.lax.map(lambda one: run(*one), runs))


def events(opt_state: Any) -> jax.Array:
    """In how many steps something was clipped, or the step skipped."""
    if isinstance(opt_state[0], optax.EmptyState):  # there is no clip
        return jnp.float32(0)
    seen = gradclip_jax.metrics(opt_state)
    return seen["skip_count" if "skip_count" in seen else "clip_count"].astype(jnp.float32)


# --- all runs of one model and clip ---


class Runs(NamedTuple):
    """What came of one model behind one clip; a loss that is not finite is NaN."""

    first: np.ndarray
    """Loss before the first step, [condition, learning rate, seed] as all that follow."""
    final: np.ndarray
    clipped: np.ndarray
    """Part of the steps that were clipped or skipped."""


def results_of(
    name: str, clip: str, corpus: Corpus, settings: Mapping[str, Any], done: Callable[[], None]
) -> Runs:
    """Trains a model behind a clip; `done` is called after each learning rate."""
    task = MODELS[name]
    clipped_by = functools.partial(CLIPS[clip], settings["max_norm"])
    train = trainer(task, clipped_by, corpus, settings["steps"])
    found = []
    for learning_rate in task.learning_rates:
        rates = np.full(task.seeds, learning_rate, np.float32)
        found.append(jax.device_get(train(rates, np.arange(task.seeds))))
        done()
    arrays = {}
    for field in Runs._fields:
        stacked = np.stack([one[field].T for one in found], axis=1)
        arrays[field] = np.where(np.isfinite(stacked), stacked, np.nan).astype(float)
    return Runs(**arrays)


def save(file: Path, settings: Mapping[str, Any], runs: Runs) -> None:
    """Writes a file whole or not at all; JSON knows no NaN, so that it is null."""
    arrays = {}
    for field, array in runs._asdict().items():
        known = array.astype(object)
        known[np.isnan(array)] = None
        arrays[field] = known.tolist()
    write_atomically(file, json.dumps({"settings": settings, **arrays}, indent=1).encode())


def load(file: Path, settings: Mapping[str, Any]) -> Runs | None:
    """What `save` wrote for the same settings; None where there is nothing yet."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_bytes())
        differing = [key for key in settings if content["settings"][key] != settings[key]]
        runs = Runs(*(np.array(content[field], float) for field in Runs._fields))
        saved = content["settings"]
        shape = (len(CONDITIONS), len(saved["learning_rates"]), saved["seeds"])
        if any(array.shape != shape for array in runs):
            raise ValueError(f"arrays that are not {shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"`--out` must hold results as this script writes them, got {file} with "
            f"{type(error).__name__}: {error}; remove it to train again."
        ) from None
    if differing:
        raise InputError(
            f"`--out` must not hold results of other settings, got {file} with another "
            f"{', '.join(differing)}."
        )
    return runs


# --- what the losses say ---


def best_loss(runs: Iterable[Runs]) -> float:
    """The lowest loss without corruption of any clip and learning rate, averaged over seeds."""
    means = np.stack([one.final[0].mean(axis=-1) for one in runs])
    # With steps enough some run is finite; NaN says that none was.
    return float(np.nanmin(means)) if np.isfinite(means).any() else math.nan


def trains_well(final: np.ndarray, best: float) -> np.ndarray:
    """For each learning rate whether all seeds come within 10 % of the best loss."""
    return np.all(final <= TOLERANCE * best, axis=-1)


def stays_below(runs: Runs, condition: int) -> np.ndarray:
    """For each learning rate whether no seed diverges: all end below their loss before training."""
    return np.all(runs.final[condition] < runs.first[condition], axis=-1)


def width(learning_rates: Sequence[float], well: np.ndarray) -> float:
    """Largest learning rate that trains well over the smallest one; 0 where none does."""
    good = np.array(learning_rates)[well]
    return float(good.max() / good.min()) if good.size else 0.0


def sensitivity(final: np.ndarray, first: np.ndarray, best: float) -> float:
    """Mean over learning rates and seeds of min(loss, loss before training) - best loss.

    Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities",
    https://arxiv.org/abs/2309.14322, section 2.2. There the best loss is that of the same method;
    here it is that of any clip, so that one which is bad everywhere does not count as insensitive.
    """
    return float(np.fmin(final, first).mean() - best)


def summary(
    learning_rates: Sequence[float], runs: Mapping[str, Runs], condition: int, best: float
) -> list[list[str]]:
    """A row for each clip."""
    wells = {clip: trains_well(one.final[condition], best) for clip, one in runs.items()}
    rows = []
    for clip, one in runs.items():
        good = [rate for rate, well in zip(learning_rates, wells[clip], strict=True) if well]
        means = one.final[condition].mean(axis=-1)
        kept = stays_below(one, condition)
        lowest = int(np.argmin(np.where(kept, means, np.inf)))
        rows.append(
            [
                clip,
                f"{len(good)}",
                f"{good[0]:g} to {good[-1]:g}" if good else "none",
                f"{width(learning_rates, wells[clip]):g}×" if good else "",
                f"{kept.sum()}",
                f"{means[lowest]:.3f} at {learning_rates[lowest]:g}" if kept.any() else "",
                f"{sensitivity(one.final[condition], one.first[condition], best):.2f}",
                f"{one.clipped[condition].mean():.0%}".replace("%", " %"),
            ]
        )
    return rows


def cell(final: np.ndarray, first: np.ndarray) -> str:
    """The mean loss of the seeds that did not diverge, and how many did."""
    kept = final < first
    if not kept.any():
        return "diverged"
    missing = f" ({(~kept).sum()} diverged)" if not kept.all() else ""
    return f"{final[kept].mean():.2f}{missing}"


# --- the report ---

SUMMARY = (
    "clip", "learning rates that train well", "from, to", "largest / smallest",
    "that do not diverge", "best loss", "sensitivity", "clip rate",
)  # fmt: skip
TEXT = """\
# Learning rates at which a model trains, by clip

`{command}`

{versions}, Python {python}, {machine}. Date: {date}.

Characters of {text}, batches of {batch} × {length} characters; learning rates are
constant and there is no warm-up. Clips have the defaults of the library and none was tuned:
`constant` is `clip_by_global_norm({max_norm:g})`, `capped-percentile`
`limits.minimum(limits.percentile(95.0), {max_norm:g})`, `skip-spikes`
`skip_spikes(optimizer, grad_norm=limits.deviation())`, `stable-spam`
`chain(stable_spam_clip(), stable_spam_norm())` and `update-rms` `clip_update_rms(optimizer)`; the
last two are for Adam.

In the corrupted runs some steps, after the windows and warm-ups, are corrupted: the characters are
random, and the loss is multiplied by {gain:g}.

Losses are nats per character on a piece of the validation text, averaged over three evaluations:
after the last step, and one and two intervals before. A learning rate trains well when all seeds
end within 10 % of the best mean loss of any clip without corruption. A run diverges when it ends
above its loss before training or without a finite one, a learning rate when one of its seeds does.
Sensitivity is the mean over learning rates of min(loss, loss before training) − best loss of any
clip (Wortsman et al. 2023, where it is the best of the same method): less is better. The clip rate
is the part of the steps that were clipped or skipped, over all learning rates; of `stable-spam`
those in which elements were clipped.
"""


def report(
    all_runs: Mapping[str, Mapping[str, Runs]], steps: int | None = None, **facts: Any
) -> str:
    """The tables of each model, and what they were made with."""
    parts = [TEXT.format(**facts)]
    for name, runs in all_runs.items():
        task = MODELS[name]
        rates = task.learning_rates
        best = best_loss(runs.values())
        parts.append(
            f"## {name}\n\n{task.about}: {steps or task.steps} steps, {task.seeds} "
            f"{'seed' if task.seeds == 1 else 'seeds'}. In the corrupted runs one step in "
            f"{task.period} is corrupted, from step {task.first} on. Evaluations come every "
            f"{task.every} steps. The best loss of any clip without corruption: {best:.3f}.\n"
        )
        for number, condition in enumerate(CONDITIONS):
            parts.append(f"### {name}, {condition}\n")
            parts.append(table(SUMMARY, summary(rates, runs, number, best)))
            losses = [
                [clip, *map(cell, one.final[number], one.first[number])]
                for clip, one in runs.items()
            ]
            parts.append("Mean loss by learning rate:\n")
            parts.append(table(["clip", *(f"{rate:g}" for rate in rates)], losses))
    return "\n".join(parts)


def figure(all_runs: Mapping[str, Mapping[str, Runs]]) -> Figure:
    """A heat map of the loss for each model and condition."""
    clips = max(len(runs) for runs in all_runs.values())
    picture = Figure(figsize=(13, len(all_runs) * (1.3 + 0.5 * clips)), layout="constrained")
    grid = picture.subplots(len(all_runs), len(CONDITIONS), squeeze=False)
    for row, (name, runs) in zip(grid, all_runs.items(), strict=True):
        best = best_loss(runs.values())
        for number, (axes, condition) in enumerate(zip(row, CONDITIONS, strict=True)):
            heat_map(axes, runs, number, best)
            axes.set_xticks(range(len(MODELS[name].learning_rates)))
            axes.set_xticklabels([f"{rate:g}" for rate in MODELS[name].learning_rates])
            axes.set_title(f"{name}, {condition}")
            axes.set_xlabel("learning rate")
        bar = picture.colorbar(row[0].images[0], ax=list(row), extend="max")
        bar.set_label("nats per character")
    picture.supxlabel("bold: trains well · div.: a seed diverged", fontsize="medium")
    return picture


def heat_map(axes: Axes, runs: Mapping[str, Runs], condition: int, best: float) -> None:
    """Clips over learning rates; bold is what trains well, grey what diverged."""
    losses = np.stack([one.final[condition].mean(axis=-1) for one in runs.values()])
    kept = np.stack([stays_below(one, condition) for one in runs.values()])
    well = np.stack([trains_well(one.final[condition], best) for one in runs.values()])
    shown = np.ma.masked_where(~kept, losses)
    axes.imshow(shown, cmap="cividis_r", vmin=best, vmax=DARKEST * best, aspect="auto")
    axes.set_facecolor("0.85")
    axes.set_yticks(range(len(runs)), list(runs))
    for (y, x), loss in np.ndenumerate(losses):
        dark = loss > (1 + DARKEST) / 2 * best
        axes.text(
            x, y, f"{loss:.2f}" if kept[y, x] else "div.", ha="center", va="center",
            color="white" if kept[y, x] and dark else "black",
            weight="bold" if well[y, x] else "normal",
        )  # fmt: skip


# --- the command line ---


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = command_line().parse_args(given)
    try:
        models = selected("--models", args.models, MODELS)
        clips = selected("--clips", args.clips, CLIPS)
        for name in models:
            if not taken(name, clips):
                rule = f"`--clips` must have one that {name} takes, {','.join(MODELS[name].clips)}"
                raise InputError(f"{rule}, got {args.clips!r}.")
        if args.steps is not None and args.steps < 3:
            raise InputError(f"`--steps` must be at least 3, got {args.steps}.")
        if not args.max_norm >= 0:
            raise InputError(f"`--max-norm` must be non-negative, got {args.max_norm}.")
        all_runs = run_all(models, clips, read_corpus(args.data), args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    text = report(
        all_runs,
        command=shlex.join(["python", "benchmarks/learning_rate_range.py", *given]),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        python=platform.python_version(),
        machine=machine(),
        date=datetime.date.today().isoformat(),
        text="the prose that Python ships" if args.data is None else args.data.name,
        batch=BATCH, length=LENGTH, steps=args.steps, gain=GAIN, max_norm=args.max_norm,
    )  # fmt: skip
    write_atomically(args.out / "learning_rate_range.md", text.encode())
    figure(all_runs).savefig(args.out / "learning_rate_range.png", dpi=110)
    print(text, end="")
    return 0


def command_line() -> argparse.ArgumentParser:
    """What can be chosen."""
    parser = argparse.ArgumentParser(description="Compare clips over learning rates.")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIRECTORY", help="where the results go")
    add("--models", default=",".join(MODELS), help="models, by comma (%(default)s)")
    add("--clips", default=",".join(CLIPS), help="clips, by comma (%(default)s)")
    add("--steps", type=int, help="steps of each run (800; 80 of muon)")
    add(
        "--max-norm",
        type=float,
        default=1.0,
        help="limit of the constant clip, and the cap (%(default)s)",
    )
    add("--data", type=Path, metavar="FILE", help="a text (the prose that Python ships)")
    return parser


def selected(argument: str, text: str, known: Mapping[str, Any]) -> list[str]:
    """Names that are known, each once."""
    names = text.split(",")
    if len(set(names)) < len(names) or not known.keys() >= set(names):
        raise InputError(
            f"`{argument}` must be some of {','.join(known)}, each once, got {text!r}."
        )
    return names


def read_corpus(data: Path | None) -> Corpus:
    """The text as characters."""
    corpus = load_corpus(data, "char", 1000, Path.home() / ".cache" / "gradclip_jax")
    if len(corpus.valid) <= LENGTH or len(corpus.train) <= LENGTH:
        raise InputError(
            f"`--data` must have more than {20 * LENGTH} characters, got {data} with "
            f"{len(corpus.train) + len(corpus.valid) + len(corpus.test)}."
        )
    return corpus


def run_all(
    models: Sequence[str], clips: Sequence[str], corpus: Corpus, args: argparse.Namespace
) -> dict[str, dict[str, Runs]]:
    """The results of every model and clip, read where they are there already."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "learning_rate_range.md").open("a").close()
    except OSError as error:
        raise InputError(
            f"`--out` must be a directory that can be written, got {args.out}: {error.strerror}."
        ) from None
    all_runs: dict[str, dict[str, Runs]] = {name: {} for name in models}
    missing = []
    for name in models:
        for clip in taken(name, clips):
            settings = {
                "model": name,
                "clip": clip,
                "learning_rates": list(MODELS[name].learning_rates),
                "steps": args.steps or MODELS[name].steps,
                "seeds": MODELS[name].seeds,
                "max_norm": args.max_norm,
                "text": corpus.digest,
                "versions": versions(),
            }
            file = args.out / f"{name}_{clip}.json"
            runs = load(file, settings)
            if runs is None:
                missing.append((file, settings))
            else:
                all_runs[name][clip] = runs
    for settings, runs in trained(missing, corpus):
        all_runs[settings["model"]][settings["clip"]] = runs
    return {name: {clip: all_runs[name][clip] for clip in taken(name, clips)} for name in models}


def taken(name: str, clips: Sequence[str]) -> list[str]:
    """Those of the clips that are meant for a model."""
    return [clip for clip in clips if clip in MODELS[name].clips]


def trained(
    missing: Sequence[tuple[Path, dict[str, Any]]], corpus: Corpus
) -> Iterator[tuple[dict[str, Any], Runs]]:
    """Trains what is missing, one clip in each core, and saves it."""
    if not missing:
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as bar,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        total = sum(len(settings["learning_rates"]) for _, settings in missing)
        task = bar.add_task("learning rates", total=total)

        def work(job: tuple[Path, dict[str, Any]]) -> tuple[dict[str, Any], Runs]:
            file, settings = job
            name, clip = settings["model"], settings["clip"]
            runs = results_of(name, clip, corpus, settings, lambda: bar.advance(task))
            save(file, settings, runs)
            bar.console.print(f"finished: {name}, {clip}")
            return settings, runs

        try:
            yield from threads.map(work, missing)
        except KeyboardInterrupt:
            bar.stop()
            bar.console.print("Interrupted; the same command goes on from what is finished.")
            os._exit(130)  # what is at work would be waited for


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("jax", "optax", "flax", "gradclip-jax")
    return {name: version_of(name) for name in names}


def version_of(name: str) -> str:
    """The version of a distribution; of this library it need not be installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from source"


if __name__ == "__main__":
    sys.exit(main())
