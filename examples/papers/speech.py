"""Read spoken digits: a bidirectional LSTM, connectionist temporal classification, and a clip.

    python examples/papers/speech.py --compare --learning-rates 0.05 0.1 0.2 0.4

trains a network to write "one seven three" when it hears it, with and without the clip. The labels
say nothing about time: `optax.ctc_loss` sums over all ways to align them with the frames. The
voices that it is tested on are never heard in training. Without `--data` a seeded synthesiser
speaks; with it, the recordings are read from a directory of WAV files that are named as in the
Free Spoken Digit Dataset, {digit}_{speaker}_{n}.wav.

Graves, Fernández, Gomez, Schmidhuber 2006, "Connectionist temporal classification", section 5:
the network, its initial weights, momentum 0.9 and noise on the inputs; here smaller, and with
batches. A clip by global norm in front of momentum and this loss is that of Amodei et al. 2015,
"Deep Speech 2", https://arxiv.org/abs/1512.02595, whose limit is 400 for their larger network.
"""

import argparse
import hashlib
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

import gradclip_jax
from examples.language_model.command_line import (
    InputError,
    check_number,
    command_line,
    console,
    run,
)
from examples.language_model.directory import History, saved_result, write_json
from examples.language_model.loop import say_finished, train
from examples.language_model.plots import label_lines, plain_ticks, quiet_frame
from examples.language_model.recurrent import CELLS, Recurrent, uniform
from examples.language_model.results import save_results
from examples.language_model.scalars import advice
from examples.papers.shared.audio import ALPHABET, BANDS, HOP, VOICES, Batch, load

TESTED = 200  # utterances of the held-out speakers
SHOWN = 5  # of them, in results.txt
SMOOTHED = 10  # steps of which the plot shows the mean loss
Array = jax.Array | np.ndarray


def main(argv: list[str] | None = None) -> int:
    return run(parser(), experiment, argv)


def experiment(args: argparse.Namespace) -> None:
    for name in ("digits", "utterances", "units", "batch", "steps"):
        check_number(name, getattr(args, name), 1)
    check_number("momentum", args.momentum, 0, 1)
    for name in ("input_noise", "max_norm"):
        check_number(name, getattr(args, name), 0)
    for rate in args.learning_rates:
        if not 0 < rate < math.inf:
            raise InputError(f"`--learning-rates` must be positive, got {rate:g}.")
    # A short run needs no more utterances than it sees.
    sizes = (min(args.utterances, args.steps * args.batch), min(TESTED, args.steps * args.batch))
    sets = load(args.data, sizes, args.digits, args.seed)
    kinds = (True, False) if args.compare else (True,)
    results = [fit(args, sets, rate, clips) for rate in args.learning_rates for clips in kinds]
    report(args, results, sets[1])


def parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__, "speech")
    add = parser.add_argument
    add("--data", type=Path, help="directory of WAV files; default: a synthesiser")
    add("--digits", type=int, default=3, help="most digits in an utterance")
    add("--utterances", type=int, default=1000, help="to train on")
    add("--units", type=int, default=64, help="of each direction")
    add("--input-noise", type=float, default=0.3, help="standard deviation, features have 1")
    add("--batch", type=int, default=16)
    add("--steps", type=int, default=600)
    add("--learning-rates", type=float, nargs="+", default=[0.1], help="one run for each")
    add("--momentum", type=float, default=0.9)
    add("--max-norm", type=float, default=10.0, help="of the gradient of nats per utterance")
    add("--compare", action="store_true", help="train each without the clip as well")
    return parser


def decode(path: Sequence[int]) -> str:
    """The text of a label per frame: repeated labels are one, blanks are dropped."""
    return "".join(ALPHABET[label - 1] for label, _ in itertools.groupby(path) if label > 0)


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: fewest insertions, deletions and replacements of a character."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


class SpeechModel(nnx.Module):
    """An LSTM that reads forwards, one that reads backwards, and a projection of both."""

    def __init__(self, units: int, rngs: nnx.Rngs):
        scale, classes = 0.1, len(ALPHABET) + 1
        self.forward = Recurrent(CELLS["lstm"], BANDS, units, scale=scale, rngs=rngs)
        self.backward = Recurrent(CELLS["lstm"], BANDS, units, scale=scale, rngs=rngs)
        self.output = nnx.Param(uniform(scale)(rngs.params(), (2 * units, classes)))
        self.output_bias = nnx.Param(jnp.zeros(classes))

    def __call__(self, features: Array, frames: Array) -> jax.Array:
        """Logits of blank and characters, [utterances, frames, 1 + characters]."""
        x = jnp.swapaxes(features, 0, 1)
        forward, _ = self.forward(x, self.forward.start(len(frames)))
        backward, _ = self.backward(reverse(x, frames), self.backward.start(len(frames)))
        both = jnp.concatenate([forward, reverse(backward, frames)], axis=-1)
        return (both @ self.output[...] + self.output_bias[...]).swapaxes(0, 1)


def reverse(x: jax.Array, frames: Array) -> jax.Array:
    """Time backwards, [time, batch, ...], and the padding where it was: behind the utterance."""
    time = jnp.arange(len(x))[:, None]
    order = jnp.where(time < frames, frames - 1 - time, time)
    return jnp.take_along_axis(x, order[..., None], axis=0)


def ctc(logits: jax.Array, batch: Batch) -> jax.Array:
    """Nats per utterance: minus the log of the summed probability of all paths to its labels."""
    paddings = [
        (jnp.arange(width) >= lengths[:, None]).astype(jnp.float32)
        for width, lengths in (
            (logits.shape[1], batch.frames),
            (batch.labels.shape[1], batch.characters),
        )
    ]
    return optax.ctc_loss(logits, paddings[0], batch.labels, paddings[1]).mean()


class Result(NamedTuple):
    learning_rate: float
    clip: str
    loss: float  # nats per utterance of the held-out speakers
    errors: float  # per character
    paths: list[list[int]]  # the most likely label of each frame, of the utterances that are drawn
    history: History


def fit(
    args: argparse.Namespace, sets: tuple[Batch, Batch], learning_rate: float, clips: bool
) -> Result:
    """One run, from its last checkpoint if there is one, to its error on held-out speakers."""
    clip = f"clip_by_global_norm({args.max_norm:g})" if clips else "none"
    train_set, test_set = sets
    # Infinity measures and lets everything pass, so that the plot shows what SGD saw.
    limit, on_nonfinite = (args.max_norm, "zero") if clips else (math.inf, "propagate")
    half = args.steps // 2
    schedule = optax.linear_schedule(learning_rate, 0.0, args.steps - half, half)
    optimizer = optax.chain(
        gradclip_jax.clip_by_global_norm(limit, on_nonfinite=on_nonfinite),
        optax.sgd(schedule, momentum=args.momentum),
    )
    graph, params = nnx.split(SpeechModel(args.units, nnx.Rngs(args.seed)))

    @jax.jit
    def update(state: Any, batch: Batch, key: jax.Array):
        params, opt_state = state
        noise = args.input_noise * jax.random.normal(key, batch.features.shape)

        def objective(params: Any) -> jax.Array:
            return ctc(nnx.merge(graph, params)(batch.features + noise, batch.frames), batch)

        loss, grads = jax.value_and_grad(objective)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        scalars = {"loss": loss, **gradclip_jax.metrics(opt_state)}
        return (optax.apply_updates(params, updates), opt_state), scalars

    def step(state: Any, number: jax.Array):
        rng = np.random.default_rng((args.seed, int(number)))
        rows = rng.choice(len(train_set.frames), min(args.batch, len(train_set.frames)), False)
        return update(state, train_set.rows(rows), jax.random.key(rng.integers(2**31)))

    out = args.out / f"lr{learning_rate:g}_{'clip' if clips else 'none'}"
    title = f"learning rate {learning_rate:g}, {clip}"
    names = ("digits", "utterances", "units", "input_noise", "batch", "steps", "momentum", "seed")
    config = {name: getattr(args, name) for name in names} | {
        "learning_rate": learning_rate, "clip": clip, "data": digest(sets)
    }  # fmt: skip
    if (saved := saved_result(out, config)) is not None:
        say_finished(title, out)
        return Result(**saved)
    state = (params, optimizer.init(params))
    (params, _), history = train(
        step, state, args.steps, out, title=title, config=config,
        per_step=args.batch, unit="utterances", checkpoint_every=100,
    )  # fmt: skip

    @jax.jit
    def read(params: Any, batch: Batch):
        logits = nnx.merge(graph, params)(batch.features, batch.frames)
        return ctc(logits, batch), logits.argmax(-1)

    loss, labels = jax.device_get(read(params, test_set))
    paths = [path[:length].tolist() for path, length in zip(labels, test_set.frames, strict=True)]
    wrong = map(edits, map(decode, paths), texts(test_set))
    rate = sum(wrong) / int(test_set.characters.sum())
    result = Result(learning_rate, clip, float(loss), rate, paths, history)
    write_json(out / "result.json", result._asdict())
    return result


def texts(batch: Batch) -> list[str]:
    """What was said."""
    return [
        "".join(ALPHABET[label - 1] for label in labels[:length])
        for labels, length in zip(batch.labels, batch.characters, strict=True)
    ]


def digest(sets: tuple[Batch, ...]) -> str:
    """Identifies the data, wherever the files lie."""
    return hashlib.sha256(b"|".join(a.tobytes() for part in sets for a in part)).hexdigest()[:16]


def report(args: argparse.Namespace, results: list[Result], test_set: Batch) -> None:
    """The table on the screen and in results.txt, the plot in speech.png."""
    title = f"character errors in {len(test_set.frames)} utterances of voices never heard before"
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for name in ("learning rate", "clip", "errors", "nats", "max norm", "clip rate"):
        table.add_column(name, justify="left" if name == "clip" else "right", no_wrap=True)
    for result in results:
        norms, clipped = (np.array(result.history[name]) for name in ("grad_norm", "clipped"))
        table.add_row(
            f"{result.learning_rate:g}", result.clip, f"{result.errors:.1%}",
            f"{result.loss:.3g}", f"{norms.max():.3g}", f"{clipped.mean():.0%}",
        )  # fmt: skip
    said, best = texts(test_set), min(results, key=lambda result: result.errors)
    lines = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    lines.add_column("said")
    lines.add_column(f"read by learning rate {best.learning_rate:g}, {best.clip}")
    for text, path in list(zip(said, best.paths, strict=True))[:SHOWN]:
        lines.add_row(text, decode(path))
    options = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    data = "a directory" if args.data else f"{VOICES} synthetic voices"
    packages = ("jax", "flax", "optax", "numpy")
    save_results(args.out, [table, lines], {"options": options, "data": data}, packages)
    draw(results, test_set, args.out / "speech.png")
    console.print(f"Plot: {args.out / 'speech.png'}{advice(args.out)}")


def draw(results: list[Result], test_set: Batch, picture: Path) -> None:
    """Losses and norms, one colour for each learning rate; below them what the best run reads."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "norm"], ["heard", "heard"]])
    rates = list(dict.fromkeys(result.learning_rate for result in results))
    labels: dict[str, list] = {"loss": [], "norm": []}
    for result in results:
        colour = f"C{rates.index(result.learning_rate)}"
        style, kind = (":", ", no clip") if result.clip == "none" else ("-", "")
        losses, norms = result.history["loss"], result.history["grad_norm"]
        at = range(0, len(losses), SMOOTHED)
        smooth = [np.mean(losses[start : start + SMOOTHED]) for start in at]
        axes["loss"].plot(at, smooth, colour, ls=style, lw=1)
        axes["norm"].plot(norms, colour, ls=style, lw=0.7)
        name = f"{result.learning_rate:g}{kind}"
        labels["loss"].append((smooth[-1], name, colour))
        labels["norm"].append((float(np.median(norms[-SMOOTHED:])), name, colour))
    limit = results[0].history["clip_limit"]
    axes["norm"].plot(limit, "k--", lw=1)
    labels["norm"].append((limit[-1], "its limit", "k"))
    axes["loss"].set(yscale="log", xlabel="step", title="Nats per utterance, by learning rate")
    axes["norm"].set(yscale="log", xlabel="step", title="Gradient norm before the clip")
    for panel in labels:
        axes[panel].set_xlim(0, len(limit))
        plain_ticks(axes[panel])
        quiet_frame(axes[panel])

    best = min(results, key=lambda result: result.errors)
    number = int(np.argmax(test_set.frames))
    length = test_set.frames[number]
    axes["heard"].imshow(
        test_set.features[number, :length].T, origin="lower", aspect="auto", cmap="magma",
        extent=(0, length * HOP, 0, BANDS),
    )  # fmt: skip
    previous = 0
    for frame, label in enumerate(best.paths[number]):
        if label not in (0, previous):
            read = decode([label]).replace(" ", "\N{OPEN BOX}")
            axes["heard"].text((frame + 0.5) * HOP, BANDS + 0.6, read, ha="center")
        previous = label
    axes["heard"].set(xlabel="seconds", ylabel="mel band")
    axes["heard"].set_title(f"said: {texts(test_set)[number]}, read:", pad=20)
    for panel, names in labels.items():
        label_lines(axes[panel], names, gap=11)
    figure.savefig(picture, dpi=75)


if __name__ == "__main__":
    sys.exit(main())
