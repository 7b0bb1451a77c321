"""Temporal order: how far back a recurrent network learns to look, with the clip and without.

    python examples/papers/temporal_order.py

Two symbols, A or B each, are hidden in a sequence of distractors: one near its beginning, one in
the middle. At the end a simple recurrent network says which they were and in which order: AA, AB,
BA or BB. The longer the sequence, the further the gradient must travel, and the more it vanishes or
explodes. Three methods (plain SGD, the clip, the clip with the regulariser Ω) train from the same
weights on the same sequences, five seeds each, all of them in one vmapped program for each length.
A run is solved when it errs on fewer than 1 % of 10,000 fresh sequences, and then stops.

Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks",
https://arxiv.org/abs/1211.5063, section 4.1 in the settings of its first version: 50 tanh units,
weights from N(0, 0.1), batches of 20, learning rate 0.01, limit 1, Ω times 4.
`--paper` takes their lengths and number of updates: days on a CPU. An update whose gradient is not
finite is left out in all methods, so that plain SGD fails of its own; the table counts them.
"""

import argparse
import functools
import math
import operator
import sys
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
from examples.language_model.loop import train
from examples.language_model.recurrent import rnn_step
from examples.language_model.results import save_results
from examples.language_model.scalars import advice

METHODS = {"SGD": (math.inf, 0.0), "clip": (1.0, 0.0), "clip + Ω": (1.0, 4.0)}  # limit, weight
SYMBOLS, CLASSES = 6, 4  # A, B and four distractors; AA, AB, BA, BB
UNITS, SCALE, BATCH, LEARNING_RATE = 50, 0.1, 20, 0.01
TEST, CHUNKS = 10_000, 20  # fresh sequences of a test, tested in so many parts
LENGTHS, PAPER_LENGTHS = [10, 20, 30, 50], [50, 100, 150, 200]
EDGES = np.logspace(-6, 4, 101).astype(np.float32)  # of the histogram of gradient norms


def sequences(key: jax.Array, length: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Symbols [length, count] and classes [count].

    The first of the two symbols that matter stands in [T/10, 2T/10), the second in [5T/10, 6T/10).
    """
    others_key, pair_key, places_key = jax.random.split(key, 3)
    symbols = jax.random.randint(others_key, (length, count), 2, SYMBOLS)
    pair = jax.random.randint(pair_key, (2, count), 0, 2)
    places = jax.random.randint(places_key, (2, count), 0, length // 10)
    times = jnp.arange(length)[:, None]
    for symbol, place, first in zip(pair, places, (length // 10, length // 2), strict=True):
        symbols = jnp.where(times == first + place, symbol, symbols)
    return symbols, 2 * pair[0] + pair[1]


class Network(nnx.Module):
    """A simple recurrent network whose last state names the class."""

    def __init__(self, units: int = UNITS, *, rngs: nnx.Rngs):
        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(SCALE * jax.random.normal(rngs.params(), shape))

        self.input, self.recurrent = normal(SYMBOLS, units), normal(units, units)
        self.bias = nnx.Param(jnp.zeros(units))
        self.output, self.output_bias = normal(units, CLASSES), nnx.Param(jnp.zeros(CLASSES))

    def __call__(
        self, symbols: jax.Array, nudges: jax.Array | float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """Logits, and the states tanh(x_t) of all times; the nudges are added to x_t."""
        x = jax.nn.one_hot(symbols, SYMBOLS) @ self.input[...] + self.bias[...] + nudges
        recurrent = self.recurrent[...]

        def step(state: tuple[jax.Array, ...], x: jax.Array):
            state = rnn_step(x, state, recurrent)
            return state, state[0]

        (last,), states = jax.lax.scan(step, (jnp.zeros(x.shape[1:]),), x)
        return last @ self.output[...] + self.output_bias[...], states


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Network(rngs=nnx.Rngs(0))))


def omega(recurrent: jax.Array, states: jax.Array, errors: jax.Array) -> jax.Array:
    """Ω: how far errors are from keeping their norm when they go back in time, step by step.

    Ω = Σ_k (‖dE/dx_{k+1} · ∂x_{k+1}/∂x_k‖ / ‖dE/dx_{k+1}‖ − 1)²,   averaged over the batch,

    where x_{k+1} = W tanh(x_k) + …, so that ∂x_{k+1}/∂x_k = W diag(1 − tanh²(x_k)). A W that keeps
    the norm of the errors that are there, whatever it does to other directions, lets them neither
    vanish nor explode. Its gradient is the immediate partial derivative ∂⁺Ω/∂W: the errors
    dE/dx_{k+1} and the states, although they depend on W themselves, count as constants, so that
    nothing is propagated through time a second time. `stop_gradient` says so.

    Pascanu et al. 2013, equations 9 and 10. Errors that have vanished, to a squared norm below
    1e-20, are left out as in the authors' program (https://github.com/pascanur/trainingRNNs),
    which departs from the equation by squared norms and a mean over k.
    """
    states, errors = jax.lax.stop_gradient((states[:-1], errors[1:]))
    before = errors @ recurrent.T * (1 - states**2)
    square, square_before = jnp.sum(errors**2, axis=-1), jnp.sum(before**2, axis=-1)
    # The root has no derivative where all units are saturated and nothing goes back.
    counts = (square >= 1e-20) & (square_before > 0)
    ratio = jnp.sqrt(jnp.where(counts, square_before / jnp.where(counts, square, 1), 1))
    return jnp.sum((ratio - 1) ** 2) / states.shape[1]


def gradient(
    params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array], weight: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its gradient, to which that of Ω, times `weight`, is added.

    The derivative with respect to what is added to x_t is the back-propagated error dE/dx_t.
    """
    symbols, classes = batch

    def loss(params: dict[str, jax.Array], nudges: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, states = nnx.merge(GRAPH, params)(symbols, nudges)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes)
        return losses.mean(), states

    nudges = jnp.zeros((*symbols.shape, len(params["recurrent"])))
    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, states), (grads, errors) = both(params, nudges)
    if weight is not None:
        of_omega = jax.grad(omega)(params["recurrent"], states, errors)
        grads = {**grads, "recurrent": grads["recurrent"] + weight * of_omega}
    return value, grads


class Run(NamedTuple):
    """One seed of one method; all runs are stacked along a first axis."""

    seed: jax.Array
    limit: jax.Array  # infinity measures and does not clip
    weight: jax.Array  # of Ω
    params: Any
    opt_state: Any
    solved: jax.Array
    loss: jax.Array  # mean over the last block of updates
    errors: jax.Array  # of the last 10,000 fresh sequences
    norms: jax.Array  # how many gradient norms fell between EDGES
    largest: jax.Array  # gradient norm


def optimizer(limit: jax.Array) -> optax.GradientTransformationExtraArgs:
    return optax.chain(gradclip_jax.clip_by_global_norm(limit), optax.sgd(LEARNING_RATE))


def keys(base: int, seed: jax.Array) -> jax.Array:
    """Keys of weights, training and tests: the same for all methods of a seed."""
    return jax.random.split(jax.random.fold_in(jax.random.key(base), seed), 3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(base: int, seeds: int) -> Run:
    """All runs before the first update: all seeds of the first method, then of the second, …"""

    def start_one(seed: jax.Array, limit: jax.Array, weight: jax.Array) -> Run:
        network = Network(rngs=nnx.Rngs(keys(base, seed)[0]))
        params = nnx.to_pure_dict(nnx.state(network))
        norms = jnp.zeros(len(EDGES) + 1, jnp.int32)
        zero, never = jnp.float32(0), jnp.zeros((), bool)
        opt_state = optimizer(limit).init(params)
        return Run(seed, limit, weight, params, opt_state, never, zero, jnp.int32(0), norms, zero)

    limits, weights = (jnp.repeat(jnp.array(x), seeds) for x in zip(*METHODS.values(), strict=True))
    return jax.vmap(start_one)(jnp.tile(jnp.arange(seeds), len(METHODS)), limits, weights)


@functools.partial(jax.jit, static_argnames=("base", "length", "updates", "regularised"))
def train_block(
    runs: Run, rows: jax.Array, number: jax.Array,
    *, base: int, length: int, updates: int, regularised: bool,
) -> Run:  # fmt: skip
    """The runs, those in `rows` after the block of this number: so many updates, and a test.

    Under `vmap` each run has its own batch in every update, its own norm, and its own limit.
    """

    def block(run: Run) -> Run:
        _, train_key, test_key = keys(base, run.seed)
        weight = run.weight if regularised else None

        def update(carry: tuple[Any, Any], at: jax.Array):
            params, opt_state = carry
            batch = sequences(jax.random.fold_in(train_key, at), length, BATCH)
            loss, grads = gradient(params, batch, weight)
            change, opt_state = optimizer(run.limit).update(grads, opt_state, params)
            norm = gradclip_jax.metrics(opt_state)["grad_norm"]
            return (optax.apply_updates(params, change), opt_state), (loss, norm)

        steps = number * updates + jnp.arange(updates)
        carry, (losses, norms) = jax.lax.scan(update, (run.params, run.opt_state), steps)

        def count_errors(key: jax.Array) -> jax.Array:
            symbols, classes = sequences(key, length, TEST // CHUNKS)
            logits, _ = nnx.merge(GRAPH, carry[0])(symbols)
            return jnp.sum(jnp.argmax(logits, axis=-1) != classes)

        test_keys = jax.random.split(jax.random.fold_in(test_key, number), CHUNKS)
        errors = jax.lax.map(count_errors, test_keys).sum()
        counts = jnp.bincount(jnp.searchsorted(EDGES, norms), length=len(EDGES) + 1)
        return run._replace(
            params=carry[0], opt_state=carry[1], solved=errors < TEST // 100,
            loss=losses.mean(), errors=errors, norms=run.norms + counts,
            largest=jnp.maximum(run.largest, norms.max()),
        )  # fmt: skip

    trained = jax.vmap(block)(jax.tree.map(operator.itemgetter(rows), runs))
    return jax.tree.map(lambda x, y: x.at[rows].set(y), runs, trained)


metrics_of_runs = jax.jit(jax.vmap(gradclip_jax.metrics))


@jax.jit
def scalars(runs: Run) -> dict[str, jax.Array]:
    """Means over all runs, and over those of each method."""
    seen = metrics_of_runs(runs.opt_state)
    means = {"loss": runs.loss, "grad_norm": seen["grad_norm"], "clipped": seen["clipped"]}
    means = {name: jnp.mean(value) for name, value in means.items()}
    for name, of_method in zip(METHODS, by_method(runs), strict=True):
        means[f"solved/{name}"] = of_method.solved.mean(dtype=jnp.float32)
        means[f"errors/{name}"] = of_method.errors.mean(dtype=jnp.float32) / TEST
    return means


def by_method(runs: Run) -> list[Run]:
    """The runs of each method."""
    rows = np.arange(len(runs.seed)).reshape(len(METHODS), -1)
    return [jax.tree.map(operator.itemgetter(of_method), runs) for of_method in rows]


def train_length(args: argparse.Namespace, length: int) -> Run:
    """All runs at one length, each until it is solved or has had `--max-updates`."""
    out, blocks = args.out / f"length_{length}", args.max_updates // args.check_every

    def step(runs: Run, number: jax.Array) -> tuple[Run, dict[str, jax.Array]]:
        active = np.flatnonzero(~np.asarray(runs.solved))
        if len(active):
            # What is solved costs nothing more. Every size is compiled anew: let there be few, and
            # fill up with the same runs again.
            size = -(-len(active) // args.seeds) * args.seeds
            runs = train_block(
                runs, jnp.asarray(np.resize(active, size)), number, base=args.seed, length=length,
                updates=args.check_every, regularised=bool(runs.weight[active].any()),
            )  # fmt: skip
        return runs, scalars(runs)

    # The number of updates is left out: a run may be continued to a larger one.
    config = {"length": length, "seed": args.seed, "seeds": args.seeds,
              "check_every": args.check_every, "methods": METHODS}  # fmt: skip
    runs, history = train(
        step, start(args.seed, args.seeds), blocks, out, title=f"length {length}", config=config,
        per_step=args.check_every, unit="updates", checkpoint_every=1,
    )  # fmt: skip
    if (done := len(history["loss"])) > blocks:
        raise InputError(
            f"`--max-updates` must be at least {done * args.check_every} to show the run in {out}, "
            f"got {args.max_updates}."
        )
    return jax.device_get(runs)


def make_table(results: dict[int, Run]) -> Table:
    """A row for each length and method."""
    table = Table(
        title="temporal order", box=SIMPLE_HEAD, pad_edge=False, show_edge=False,
        caption="updates: median of the runs that were solved; errors: mean of the others; "
        "norms: before the clip, with the gradient of Ω",
    )  # fmt: skip
    for name in ("length", "method", "solved", "updates", "errors", "norm > 1", "largest norm",
                 "not finite"):  # fmt: skip
        table.add_column(name, justify="left" if name == "method" else "right")
    for length, runs in results.items():
        for name, of_method in zip(METHODS, by_method(runs), strict=True):
            solved, seen = of_method.solved, metrics_of_runs(of_method.opt_state)
            above = of_method.norms[:, EDGES.searchsorted(1.0) + 1 :].sum()
            table.add_row(
                str(length), name, f"{solved.sum()}/{len(solved)}",
                f"{np.median(seen['step_count'][solved]):,.0f}" if solved.any() else "–",
                "–" if solved.all() else f"{of_method.errors[~solved].mean() / TEST:.1%}",
                f"{above / of_method.norms.sum():.2%}", f"{of_method.largest.max():.3g}",
                str(seen["nonfinite_count"].sum()),
            )  # fmt: skip
    return table


def draw(results: dict[int, Run], picture: Path) -> None:
    """The rate of success over the length, and how often norms are how large at two lengths."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    lengths = list(results)
    success, *tails = figure.subplots(1, 3)
    shown = [lengths[0], lengths[-1]]
    for number, name in enumerate(METHODS):
        # Lines that coincide are drawn one above the other, the last the thinnest.
        style = {"color": f"C{number}", "lw": 5 - 1.7 * number, "label": name}
        rates = [by_method(runs)[number].solved.mean() for runs in results.values()]
        success.plot(lengths, 100 * np.array(rates), marker="o", ms=9 - 2 * number, **style)
        for axes, length in zip(tails, shown, strict=True):
            counts = by_method(results[length])[number].norms.sum(axis=0)
            share = counts[::-1].cumsum()[::-1][1:] / counts.sum()
            seen = (share > 0) & (np.append(share[1:], 0) < 1)
            axes.plot(EDGES[seen], share[seen], **{**style, "lw": 1.5})
    success.set(xlabel="length of the sequence", ylabel="runs solved, %", ylim=(-4, 104))
    success.legend(fontsize="small", loc="lower left")
    tails[0].legend(fontsize="small", loc="lower left")
    for axes, length in zip(tails, shown, strict=True):
        axes.axvline(1, color="grey", ls="--", label="limit")
        axes.set(xscale="log", yscale="log", title=f"length {length}", xlabel="gradient norm",
                 ylabel="share of updates above it")  # fmt: skip
    figure.savefig(picture, dpi=100)


def compare(args: argparse.Namespace) -> None:
    """Trains at every length, and writes table and plot."""
    for name in ("max_updates", "check_every", "seeds"):
        check_number(name, getattr(args, name), 1)
    for length in args.lengths or []:
        check_number("lengths", length, 10)
    lengths, max_updates = (PAPER_LENGTHS, 5_000_000) if args.paper else (LENGTHS, 40_000)
    args.lengths = sorted(set(args.lengths or lengths))
    args.max_updates = args.max_updates or max_updates
    args.check_every = min(args.check_every, args.max_updates)
    if args.max_updates % args.check_every:
        raise InputError(
            f"`--max-updates` must be a multiple of `--check-every`, {args.check_every}, got "
            f"{args.max_updates}."
        )
    results = {length: train_length(args, length) for length in args.lengths}
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "paper")}
    save_results(args.out, [make_table(results)], settings, ["jax", "flax", "optax"])
    draw(results, args.out / "temporal_order.png")
    console.print(f"Table and plot: {args.out}{advice(args.out)}")


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "temporal_order")
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", metavar="T", help="of the sequences: 10 or more")
    add("--max-updates", "--steps", type=int, help="of a run that is not solved before")
    add("--check-every", type=int, default=1000, help="updates between two tests")
    add("--seeds", type=int, default=5)
    add("--paper", action="store_true", help="lengths 50 to 200, and 5 million updates")
    return run(parser, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
