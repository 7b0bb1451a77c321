"""Predict the next chord of polyphonic music, with the gradient clipped and without.

    python examples/papers/polyphonic_music.py --data music

trains two networks on Nottingham.mat and JSB_Chorales.mat in that directory, the collections of
Boulanger-Lewandowski, Bengio, Vincent 2012 (a piece is a matrix, frames in time × 88 piano keys):
the sigmoid network of Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent
neural networks", https://arxiv.org/abs/1211.5063, section 4.2, with SGD, and the LSTM of Bai,
Kolter, Koltun 2018, https://arxiv.org/abs/1803.01271, with Adam. All learning rates, each with the
clip and without, train as one program (`jax.vmap`) from the same weights. The best by validation
composes a piece: a MIDI file. Without `--data` it learns chord progressions that it makes up.
"""

import argparse
import math
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.io
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
from examples.language_model.directory import History, make_directory
from examples.language_model.loop import train
from examples.language_model.recurrent import CELLS, Cell, Recurrent, State, uniform
from examples.language_model.results import save_results, stopwatch
from examples.language_model.scalars import advice

KEYS = 88
LOWEST_PITCH = 21  # MIDI's number of the lowest key
TICKS_PER_BEAT = 480
SPLITS = ("train", "valid", "test")
Collection = dict[str, list[np.ndarray]]


def sigmoid_step(x: jax.Array, state: State, recurrent: jax.Array) -> State:
    """The unit of Pascanu et al.; its slope is at most 1/4, so its gradient also vanishes."""
    return (jax.nn.sigmoid(x + state[0] @ recurrent),)


class Recipe(NamedTuple):
    """How a network is trained, and what the papers report."""

    cell: str
    units: int
    scale: float  # first weights are uniform between ± scale / √units
    dropout: float
    optimizer: str
    learning_rates: tuple[float, ...]
    max_norm: float
    epochs: int
    length: int = 200  # steps of back-propagation through time
    batch: int = 2
    paper_clipped: float | None = None  # in their tests
    paper_unclipped: float | None = None


RECURRENCES = {**CELLS, "sigmoid": Cell(1, 1, sigmoid_step, sums=True)}
# A sigmoid is 4 times flatter than the usual tanh, so its weights start 4 times larger.
SIGMOID = Recipe("sigmoid", 300, 4.0, 0.0, "sgd", (1.0, 2.0, 4.0), 8.0, 12)
LSTM = Recipe("lstm", 200, 1.0, 0.1, "adam", (2e-3, 4e-3, 8e-3), 1.0, 6)
RECIPES = {
    "Nottingham": [
        SIGMOID._replace(paper_clipped=3.48, paper_unclipped=3.80),
        LSTM._replace(epochs=18, paper_clipped=3.29),
    ],
    # A chorale has 60 frames: a longer sequence would mostly be padding.
    "JSB_Chorales": [
        SIGMOID._replace(length=64, epochs=30),
        LSTM._replace(length=64, epochs=20, dropout=0.2, paper_clipped=8.45),
    ],
    "chords": [
        SIGMOID._replace(length=64, epochs=4, units=64),
        LSTM._replace(length=64, epochs=4, units=64),
    ],
}
FRAMES_PER_BEAT = {"Nottingham": 4, "JSB_Chorales": 1, "chords": 4}


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "polyphonic_music")
    add = parser.add_argument
    add("--data", type=Path, help="directory with Nottingham.mat and JSB_Chorales.mat")
    add("--collection", nargs="+", choices=["Nottingham", "JSB_Chorales"], help="default: both")
    add("--network", nargs="+", choices=["sigmoid", "lstm"], default=["sigmoid", "lstm"])
    add("--epochs", type=int, help="default: those of the recipe, as all that follow")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--units", type=int)
    add("--compose", type=int, default=256, metavar="FRAMES", help="length of the MIDI file")
    return run(parser, compare, argv)


def compare(args: argparse.Namespace) -> None:
    """Trains every network on every collection; leaves tables, a plot and music in `--out`."""
    for name in ("epochs", "steps", "units", "compose"):
        check_number(name, getattr(args, name), 1)
    if args.collection and args.data is None:
        raise InputError("`--collection` needs `--data`, the directory with its file.")
    names = args.collection or ["Nottingham", "JSB_Chorales"] if args.data else ["chords"]
    collections = {
        name: read_collection(args.data, name) if args.data else chord_progressions(args.seed)
        for name in names
    }
    given = {name: getattr(args, name) for name in ("epochs", "units") if getattr(args, name)}
    make_directory(args.out)
    seconds, results, music = stopwatch(args.out), [], {}
    for name, collection in collections.items():
        of_collection = [
            fit(name, recipe._replace(**given), collection, args)
            for recipe in RECIPES[name]
            if recipe.cell in args.network
        ]
        best = min(of_collection, key=lambda result: result.valid.min())
        music[name] = compose(best, collection["valid"][0], args.compose, args.seed)
        (args.out / f"{name}.mid").write_bytes(midi(music[name], FRAMES_PER_BEAT[name]))
        results += of_collection
    report(results, collections, seconds(), args.out)
    draw(results, collections, music, args.out / "polyphonic_music.png")


# Pieces


def read_collection(directory: Path, name: str) -> Collection:
    """The pieces in `name`.mat, whose cell arrays are traindata, validdata and testdata."""
    file = directory / f"{name}.mat"
    if not file.is_file():
        raise InputError(f"`--data` must be a directory with {name}.mat, got {directory}.")
    try:
        content = scipy.io.loadmat(file)
        pieces = {split: list(content[f"{split}data"].flat) for split in SPLITS}
    except Exception as error:  # a damaged file fails in many ways, all with the same remedy
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise InputError(
            f"`--data` must hold files of MATLAB that can be read, got {file}: "
            f"{type(error).__name__}: {reason}."
        ) from None
    for split, of_split in pieces.items():
        if not of_split:
            raise InputError(f"`--data` must hold pieces, got none in {split}data of {file}.")
        for number, piece in enumerate(map(np.asarray, of_split)):
            frames = len(piece) if piece.ndim == 2 and piece.shape[1] == KEYS else 0
            if frames < 2 or not np.isin(piece, (0, 1)).all():
                raise InputError(
                    f"`--data` must hold matrices of zeros and ones, 2 or more frames × {KEYS} "
                    f"keys, got another as piece {number} of {split}data in {file}, of shape "
                    f"{piece.shape}."
                )
    return {s: [piece.astype(np.uint8) for piece in of_split] for s, of_split in pieces.items()}


def chord_progressions(seed: int) -> Collection:
    """Pieces in a random major key: a bass, a triad and a melody of its tones, 8 frames a chord."""
    rng = np.random.default_rng(seed)
    degrees = [0, 1, 3, 4, 5]  # I, ii, IV, V, vi, and how often each leads to each, in tenths
    leads = [[0, 2, 3, 3, 2], [1, 0, 0, 8, 1], [3, 2, 0, 4, 1], [6, 0, 1, 0, 3], [1, 3, 4, 2, 0]]
    scale = np.array([0, 2, 4, 5, 7, 9, 11])

    def piece() -> np.ndarray:
        tonic, chord, frames = rng.integers(16, 24), 0, []
        for _ in range(rng.integers(6, 25)):
            triad = degrees[chord] + np.array([0, 2, 4])
            for tone in rng.choice(triad, 4):
                steps = np.array([triad[0], *triad + 7, tone + 14])
                frame = np.zeros(KEYS, np.uint8)
                frame[tonic + 12 * (steps // 7) + scale[steps % 7]] = 1
                frames += [frame, frame]
            chord = rng.choice(5, p=np.array(leads[chord]) / 10)
        return np.stack(frames)

    return {s: [piece() for _ in range(n)] for s, n in zip(SPLITS, (128, 32, 32), strict=True)}


def cut(pieces: list[np.ndarray], length: int) -> list[np.ndarray]:
    """Parts of `length` steps: a step predicts the next frame, so neighbours share a frame."""
    return [p[at : at + length + 1] for p in pieces for at in range(0, len(p) - 1, length)]


def pad(pieces: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal length, [number, length + 1, keys], and how many steps of each are real."""
    rows = np.zeros((len(pieces), length + 1, KEYS), np.uint8)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    return rows, np.array([len(piece) - 1 for piece in pieces], np.int32)


def count_keys(collection: Collection, markov: bool) -> tuple[float, float]:
    """Test score of knowing how often a key is on; `markov`: given whether it is on now."""
    now = np.concatenate([piece[:-1] for piece in collection["train"]]) == 1
    then = np.concatenate([piece[1:] for piece in collection["train"]]) == 1
    given = (~now, now) if markov else (np.ones_like(now),) * 2
    chances = [(np.sum(then & g, axis=0) + 0.5) / (np.sum(g, axis=0) + 1) for g in given]
    sums = []
    for piece in collection["test"]:
        chance = np.where(piece[:-1] == 1, chances[1], chances[0])
        sums.append(-np.sum(np.log(np.where(piece[1:] == 1, chance, 1 - chance))))
    per_step, per_piece = averages(np.array(sums), collection["test"])
    return float(per_step), float(per_piece)


def averages(sums: np.ndarray, pieces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Nats per step, of all steps together as in Bai et al., and the mean of the pieces' own."""
    steps = np.array([len(piece) - 1 for piece in pieces])
    return sums.sum(-1) / steps.sum(), (sums / steps).mean(-1)


# Networks


class Network(nnx.Module):
    """A recurrent layer and a logit for each key; dropout on what is not recurrent."""

    def __init__(self, recipe: Recipe, rngs: nnx.Rngs):
        width, units = recipe.units**-0.5, recipe.units
        cell = RECURRENCES[recipe.cell]
        self.layer = Recurrent(cell, KEYS, units, scale=recipe.scale * width, rngs=rngs)
        self.dropout = nnx.Dropout(recipe.dropout)
        self.output = nnx.Param(uniform(width)(rngs.params(), (units, KEYS)))
        self.bias = nnx.Param(jnp.zeros(KEYS))

    def __call__(self, frames: jax.Array, state: State, key: jax.Array | None = None):
        """Logits of the next frames, [time, batch, keys], and the state; a key drops units."""
        outputs, state = self.layer(frames, state)
        outputs = self.dropout(outputs, deterministic=key is None, rngs=key)
        return outputs @ self.output[...] + self.bias[...], state


def nats(model: Network, rows: jax.Array, steps: jax.Array, key: jax.Array | None = None):
    """Negative log-likelihood of each row, summed over the keys and over its steps."""
    frames = jnp.swapaxes(rows, 0, 1).astype(jnp.float32)
    logits, _ = model(frames[:-1], model.layer.start(len(rows)), key)
    each = optax.sigmoid_binary_cross_entropy(logits, frames[1:]).sum(-1)
    padding = jnp.arange(len(each))[:, None] >= steps
    return jnp.where(padding, 0.0, each).sum(0)


class Training(NamedTuple):
    """All that the next step depends on; the first axis of each array counts the networks."""

    params: Any
    opt_state: Any
    rate: jax.Array
    epoch_loss: jax.Array  # summed over the steps of this epoch
    last_loss: jax.Array  # of the epoch before
    best: Any  # parameters when validation was best
    valid: jax.Array  # validation then


class Result(NamedTuple):
    """The networks of one recipe, each as it was when validation was best."""

    name: str
    collection: str
    recipe: Recipe
    graph: Any
    best: Any
    valid: np.ndarray
    test: tuple[np.ndarray, np.ndarray]
    history: History


def methods(recipe: Recipe) -> list[tuple[float, float]]:
    """Limit and learning rate of each network; infinity measures and lets everything pass."""
    return [(n, rate) for n in (recipe.max_norm, math.inf) for rate in recipe.learning_rates]


def label(limit: float, rate: float) -> str:
    return f"{f'clip {limit:g}' if limit < math.inf else 'no clip'}, rate {rate:g}"


def optimizer(recipe: Recipe, limit: jax.Array, rate: jax.Array) -> optax.GradientTransformation:
    # A gradient that is not finite is the end of plain SGD, and that shall be seen.
    clip = gradclip_jax.clip_by_global_norm(limit, on_nonfinite="propagate")
    return optax.chain(clip, getattr(optax, recipe.optimizer)(rate))


def train_step(graph: Any, recipe: Recipe) -> Callable[..., tuple[Training, dict[str, jax.Array]]]:
    """A function of state, limits, rows, their steps and a key: one update of every network."""

    def update(params, opt_state, limit, rate, rows, steps, key):
        def loss(params):
            sums = nats(nnx.merge(graph, params), rows, steps, key)
            return sums.sum() / steps.sum().astype(jnp.float32)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer(recipe, limit, rate).update(grads, opt_state, params)
        seen = gradclip_jax.metrics(opt_state)
        scalars = {"loss": value, "grad_norm": seen["grad_norm"], "clipped": seen["clipped"]}
        return optax.apply_updates(params, updates), opt_state, scalars

    @jax.jit
    def step(now: Training, limits: jax.Array, rows: jax.Array, steps: jax.Array, key: jax.Array):
        update_all = jax.vmap(update, in_axes=(0, 0, 0, 0, None, None, None))
        params, opt_state, scalars = update_all(
            now.params, now.opt_state, limits, now.rate, rows, steps, key
        )
        epoch_loss = now.epoch_loss + scalars["loss"]
        return now._replace(params=params, opt_state=opt_state, epoch_loss=epoch_loss), scalars

    return step


@jax.jit
def end_epoch(now: Training, valid: jax.Array) -> Training:
    """Halves each learning rate with which the error of the epoch rose, as Pascanu et al. do."""
    better = valid < now.valid
    keep = jax.vmap(lambda b, new, old: jax.tree.map(lambda x, y: jnp.where(b, x, y), new, old))
    return now._replace(
        rate=jnp.where(now.epoch_loss > now.last_loss, now.rate / 2, now.rate),
        epoch_loss=jnp.zeros_like(now.epoch_loss),
        last_loss=now.epoch_loss,
        best=keep(better, now.params, now.best),
        valid=jnp.where(better, valid, now.valid),
    )


def scorer(graph: Any) -> Callable[[Any, list[np.ndarray]], np.ndarray]:
    """A function of parameters and pieces: nats of whole pieces, [networks, pieces]."""
    nats_of_all = jax.jit(
        jax.vmap(lambda params, *rows: nats(nnx.merge(graph, params), *rows), (0, None, None))
    )

    def score(params: Any, pieces: list[np.ndarray]) -> np.ndarray:
        by_length = np.argsort([len(piece) for piece in pieces], kind="stable")
        sums = []
        for group in np.split(by_length, range(32, len(pieces), 32)):
            longest = len(pieces[group[-1]]) - 1
            # Few lengths, so that few programs are compiled.
            rows, steps = pad([pieces[i] for i in group], 200 * math.ceil(longest / 200))
            sums.append(np.asarray(nats_of_all(params, rows, steps)))
        return np.concatenate(sums, axis=1)[:, np.argsort(by_length)]

    return score


def fit(name: str, recipe: Recipe, pieces: Collection, args: argparse.Namespace) -> Result:
    """Trains a network for each limit and learning rate, and keeps the best of its epochs."""
    rows, counts = pad(cut(pieces["train"], recipe.length), recipe.length)
    batch = min(recipe.batch, len(rows))
    per_epoch = len(rows) // batch
    steps = args.steps or recipe.epochs * per_epoch
    limits, rates = (jnp.array(column) for column in zip(*methods(recipe), strict=True))
    names = [label(*method) for method in methods(recipe)]
    to_shuffle, to_drop = jax.random.split(jax.random.key(args.seed))
    graph, first = nnx.split(Network(recipe, nnx.Rngs(args.seed)))
    update, score = train_step(graph, recipe), scorer(graph)

    def step(now: Training, number: jax.Array) -> tuple[Training, dict[str, jax.Array]]:
        epoch, at = divmod(int(number), per_epoch)
        order = jax.random.permutation(jax.random.fold_in(to_shuffle, epoch), len(rows))
        use = np.asarray(order)[at * batch : (at + 1) * batch]
        key = jax.random.fold_in(to_drop, number)
        now, scalars = update(now, limits, rows[use], counts[use], key)
        if at == per_epoch - 1 or number == steps - 1:
            valid, _ = averages(score(now.params, pieces["valid"]), pieces["valid"])
            scalars["valid"] = jnp.asarray(valid, jnp.float32)
            now = end_epoch(now, scalars["valid"])
        named = {f"{k}/{n}": v for k, vs in scalars.items() for n, v in zip(names, vs, strict=True)}
        return now, {"loss": scalars["loss"].min(), **named}

    params = jax.tree.map(lambda x: jnp.stack([x] * len(names)), first)
    init = jax.vmap(lambda params, *method: optimizer(recipe, *method).init(params))
    worst = jnp.full(len(names), jnp.inf)
    now = Training(params, init(params, limits, rates), rates, 0 * rates, worst, params, worst)
    data = zlib.crc32(b"".join(piece.tobytes() for split in SPLITS for piece in pieces[split]))
    config = {**recipe._asdict(), "steps": steps, "seed": args.seed, "data": data}
    title = f"{name} · {recipe.cell}"
    now, history = train(
        step, now, steps, args.out / f"{name}-{recipe.cell}", title=title,
        config=config, per_step=batch * recipe.length, unit="frames", checkpoint_every=per_epoch,
    )  # fmt: skip
    test = averages(score(now.best, pieces["test"]), pieces["test"])
    valid = np.asarray(now.valid)
    return Result(title, name, recipe, graph, now.best, valid, test, history)


# Music


def compose(result: Result, opening: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """What the best network plays on after the opening: each key by its own probability."""
    best = int(result.valid.argmin())
    model = nnx.merge(result.graph, jax.tree.map(lambda x: x[best], result.best))

    @jax.jit
    def play(opening: jax.Array, keys: jax.Array) -> jax.Array:
        def step(now, key):
            logits, state = model(now[0][None], now[1])
            frame = jax.random.bernoulli(key, jax.nn.sigmoid(logits[0])).astype(jnp.float32)
            return (frame, state), frame[0]

        _, state = model(opening[:-1], model.layer.start(1))
        return jax.lax.scan(step, (opening[-1], state), keys)[1]

    first = jnp.asarray(opening[:16, None], jnp.float32)
    return np.asarray(play(first, jax.random.split(jax.random.key(seed), frames))) == 1


def midi(roll: np.ndarray, frames_per_beat: int) -> bytes:
    """A Standard MIDI File (format 0, 120 beats a minute) of a roll, [frames, keys].

    A key that stays on is a note that is held. Times are ticks since the event before.
    """
    changes = np.diff(roll.astype(np.int8), axis=0, prepend=0, append=0)
    track, last = b"", 0
    for frame, change in enumerate(changes):
        for key in np.argsort(change, kind="stable"):  # notes end before others start
            if change[key]:
                tick = frame * TICKS_PER_BEAT // frames_per_beat
                on, velocity = (0x90, 80) if change[key] > 0 else (0x80, 0)
                track += variable_length(tick - last) + bytes([on, LOWEST_PITCH + key, velocity])
                last = tick
    track += b"\x00\xff\x2f\x00"  # end of the track
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS_PER_BEAT)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def variable_length(number: int) -> bytes:
    """Seven bits a byte, of which all but the last have their highest bit set."""
    parts = [number & 0x7F]
    while number := number >> 7:
        parts.append(number & 0x7F | 0x80)
    return bytes(reversed(parts))


# Results


def report(
    results: list[Result], collections: dict[str, Collection], seconds: dict[str, int], out: Path
) -> None:
    """For each method its best learning rate in validation, what counting and papers reached."""
    tables = []
    settings: dict[str, Any] = {
        "columns": "test: of all steps; by piece: the mean of each piece's own; valid, epoch: the "
        "best epoch of the best learning rate; clipped: steps; norm: the largest",
        "last two rows": "each key by how often it is on, and given whether it is on now",
    }
    for name, collection in collections.items():
        table = Table(title=f"{name}, nats per step", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in ("", "test", "paper", "by piece", "valid", "rate", "epoch", "clipped", "norm"):
            table.add_column(head, justify="right" if head else "left", no_wrap=True)
        for result in (result for result in results if result.collection == name):
            for number in best_of_methods(result.valid):
                add_row(table, result, number)
            steps = len(result.history["loss"])
            settings[result.name] = {**result.recipe._asdict(), "steps": steps}
        for markov, text in ((False, "frequency"), (True, "last frame")):
            test, of_pieces = (f"{value:.3f}" for value in count_keys(collection, markov))
            table.add_row(text, test, "", of_pieces)
        tables.append(table)
    if seconds:
        settings |= {**seconds, "seconds of CPU time": round(time.process_time())}
    save_results(out, tables, settings, ["jax", "flax", "optax", "numpy"])
    console.print(f"Music, plot and table: {out}{advice(out)}")


def best_of_methods(valid: np.ndarray) -> list[int]:
    """The best network with the clip, and the best without."""
    half = len(valid) // 2
    return [int(valid[:half].argmin()), half + int(valid[half:].argmin())]


def add_row(table: Table, result: Result, number: int) -> None:
    limit, rate = methods(result.recipe)[number]
    valid, norms, clipped = (
        np.array(result.history[f"{scalar}/{label(limit, rate)}"])
        for scalar in ("valid", "grad_norm", "clipped")
    )
    published = result.recipe.paper_clipped if limit < math.inf else result.recipe.paper_unclipped
    table.add_row(
        f"{result.recipe.cell}, {label(limit, rate).split(',')[0]}",
        f"{result.test[0][number]:.3f}", f"{published:.2f}" if published else "",
        f"{result.test[1][number]:.3f}", f"{result.valid[number]:.3f}", f"{rate:g}",
        f"{1 + np.argmin(np.nan_to_num(valid, nan=np.inf))}", f"{clipped.mean():.0%}",
        f"{norms.max():.3g}",
    )  # fmt: skip


def draw(
    results: list[Result], collections: dict[str, Collection], music: dict[str, np.ndarray],
    picture: Path,
) -> None:  # fmt: skip
    """Validation after each epoch of every network, and the pieces that were composed."""
    heights = [3] + [2] * len(music)
    figure = Figure(figsize=(3.2 * max(len(results), 2), sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(results), height_ratios=heights)
    for column, result in enumerate(results):
        axes = figure.add_subplot(grid[0, column])
        rates = result.recipe.learning_rates
        for limit, rate in methods(result.recipe):
            valid = result.history[f"valid/{label(limit, rate)}"]
            axes.plot(range(1, len(valid) + 1), valid, color=f"C{rates.index(rate)}",
                      ls="-" if limit < math.inf else "--", label=label(limit, rate))  # fmt: skip
        known, _ = count_keys(collections[result.collection], markov=True)
        axes.axhline(known, color="grey", ls=":", label="last frame")
        papers = [p for p in (result.recipe.paper_clipped, result.recipe.paper_unclipped) if p]
        for paper in papers:
            axes.axhline(paper, color="black", ls="-.", label=f"paper, test: {paper:.2f}")
        axes.set(title=result.name, xlabel="epoch", ylabel="validation, nats per step",
                 ylim=(0.95 * min(known, *papers, result.valid.min()), 1.15 * known))  # fmt: skip
        axes.legend(fontsize="x-small", loc="upper right")
    for line, (name, roll) in enumerate(music.items(), start=1):
        axes = figure.add_subplot(grid[line, :])
        axes.imshow(roll.T, cmap="Greys", aspect="auto", origin="lower", interpolation="nearest")
        axes.set(title=f"composed after {name}", ylabel="key", xlabel="frame")
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    raise SystemExit(main())
