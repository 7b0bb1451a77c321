"""Find stolen cards by their last transactions, with an LSTM, and see what the clip does.

    python examples/papers/fraud_detection.py

generates card histories, of which 1 % end in fraud, and trains the detector that
`fraud_detection.json` describes, with its clip and without, on logarithms of amounts and on raw
amounts, whose heavy tail makes the largest gradients many times as large. Gradient boosting on
aggregated features is the baseline. It ends in a table and a plot.

The recipe is the usual one for such a classifier: the state after the last transaction gives the
probability of fraud, trained by Adam on the binary cross-entropy, with each array's gradient
limited to a norm of 1. The loss is not weighted: weights would spoil the calibration.
"""

import argparse
import difflib
import functools
import json
import math
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
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    roc_auc_score,
)

import gradclip_jax
from examples.language_model.command_line import (
    InputError,
    check_number,
    command_line,
    console,
    run,
)
from examples.language_model.loop import train
from examples.language_model.model import measured_by_clip
from examples.language_model.recurrent import CELLS, Recurrent, uniform
from examples.language_model.results import save_results, stopwatch
from examples.language_model.scalars import advice

CONFIG = Path(__file__).with_suffix(".json")
OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "rmsprop": optax.rmsprop, "sgd": optax.sgd}
BOOSTING: dict[str, Any] = {"learning_rate": 0.03, "max_iter": 200, "early_stopping": False}
# What each value of the config may be: one of these names, or a number (whole where the limits
# are) between two limits, both included.
RULES: dict[str, dict[str, Any]] = {
    "data": {
        "train_cards": (100, 10**8), "valid_cards": (100, 10**8), "test_cards": (100, 10**8),
        "length": (16, 10_000), "fraud_rate": (1e-4, 0.5), "tail_index": (0.5, 100.0),
    },
    "model": {"units": (1, 10_000)},
    "optimizer": {"method": OPTIMIZERS, "learning_rate": (1e-8, 10.0)},
    "gradient_clip": {},  # whatever `gradclip_jax.from_config` takes
    "training": {"batch": (1, 10**6), "steps": (1, 10**9), "seeds": (1, 1000)},
}  # fmt: skip

# Kinds of merchants: how often a holder buys there, how much relative to what they usually spend,
# and how often online.
MERCHANTS = ("food", "restaurant", "fuel", "clothes", "travel", "electronics", "gifts", "services")
OFTEN = np.array([6.0, 4.0, 2.0, 2.0, 0.6, 0.8, 0.6, 2.0])
SIZE = np.array([1.0, 1.2, 1.8, 2.0, 6.0, 4.0, 1.5, 0.3])
ONLINE = np.array([0.1, 0.05, 0.0, 0.4, 0.6, 0.5, 0.6, 0.95])
CLOTHES, ELECTRONICS, GIFTS, SERVICES = 3, 5, 6, 7
COUNTRIES = 30
EDGES = np.array([0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6, 1])  # of the bins of the calibration
FINE = ("Brier", "ECE")  # scores that are small
# Frauds, how many of all there are of each, and how many transactions they take at least and most.
PATTERNS = ("test, then spend", "burst", "new country", "as the holder")
SHARES = (0.3, 0.25, 0.25, 0.2)
TRANSACTIONS = np.array([(2, 5), (3, 8), (1, 3), (1, 1)])
AWAKE = 16.0  # hours of the day in which a holder buys


class Cards(NamedTuple):
    """Histories, [cards, length], and what is true of each card after its last transaction."""

    amount: np.ndarray  # euros
    gap: np.ndarray  # hours since the transaction before
    hour: np.ndarray  # of the day
    merchant: np.ndarray  # number in MERCHANTS
    country: np.ndarray  # 0 is that of the holder
    online: np.ndarray
    fraud: np.ndarray  # [cards]
    pattern: np.ndarray  # [cards], number in PATTERNS of what the thief does, if there is one


def generate(
    rng: np.random.Generator, cards: int, length: int, fraud_rate: float, tail_index: float
) -> Cards:
    """Draw histories in which honest holders also go on holiday, on sprees and buy big things."""
    shape, at = (cards, length), np.arange(length)

    def each(draw: np.ndarray) -> np.ndarray:  # one number for each card
        return draw[:, None]

    def span(share: float, longest: int) -> tuple[np.ndarray, np.ndarray]:
        # Of a share of the cards a few transactions in a row: the first of them, and all.
        start, size = rng.integers(1, length, cards), rng.integers(3, longest + 1, cards)
        later = at - each(np.where(rng.random(cards) < share, start, length))
        return later == 0, (later >= 0) & (later < each(size))

    def tail() -> np.ndarray:  # Pareto: the variance is infinite up to an index of 2
        return (1 - rng.random(shape)) ** (-1 / tail_index)

    # The holder has a pace, a level of spending, and favourite merchants.
    level = each(np.exp(rng.normal(np.log(25), 0.5, cards)))
    gap = each(np.exp(rng.normal(np.log(10), 0.6, cards))) * rng.exponential(size=shape)
    taste = rng.dirichlet(OFTEN, cards).cumsum(1)
    merchant = (rng.random(shape)[..., None] > taste[:, None, :-1]).sum(2)
    country = np.zeros(shape, int)
    abroad = each(rng.integers(1, COUNTRIES, cards))

    # What looks like fraud and is none.
    first, holiday = span(0.25, 12)
    gap = np.where(first, gap + 8, gap)
    country = np.where(holiday, abroad, country)
    first, spree = span(0.3, 10)
    gap = np.where(spree & ~first, rng.exponential(0.2, shape), gap)
    merchant = np.where(spree, rng.choice([CLOTHES, ELECTRONICS, GIFTS], shape), merchant)
    first, phone = span(0.3, 5)  # a phone, then what one puts on it: the order of a test, reversed
    merchant = np.where(phone, np.where(first, ELECTRONICS, SERVICES), merchant)
    gap = np.where(phone & ~first, rng.exponential(0.15, shape), gap)

    online = rng.random(shape) < ONLINE[merchant]
    amount = level * SIZE[merchant] * np.exp(rng.normal(0, 0.6, shape))
    amount = np.where(rng.random(shape) < 0.03, amount * tail(), amount)
    amount = np.where(phone & ~first, rng.uniform(0.5, 3, shape), amount)
    # Nobody buys asleep: hours awake become hours of the clock.
    awake = gap.cumsum(1) + each(rng.uniform(0, AWAKE, cards))
    clock = 24 * (awake // AWAKE) + awake % AWAKE + each(rng.uniform(6, 9, cards))
    gap = np.diff(clock, axis=1, prepend=clock[:, :1] - gap[:, :1])

    # The thief has the last transactions, at any hour.
    fraud = rng.random(cards) < fraud_rate
    pattern = rng.choice(len(PATTERNS), cards, p=SHARES)
    test, burst, new_country, quiet = (each(pattern == i) for i in range(len(PATTERNS)))
    size = rng.integers(*TRANSACTIONS[pattern].T, endpoint=True)
    stolen = each(fraud) & (at >= length - each(size))
    first = at == length - each(size)
    small = test & (at < length - each(rng.integers(1, np.maximum(size, 2))))
    pause = np.where(new_country, 0.5 + rng.exponential(4, shape), rng.exponential(10, shape))
    short = rng.exponential(np.where(new_country, 1.5, 0.15), shape)
    usual = np.where(burst, 40, np.where(quiet, 2 * level, 80))
    haul = usual * np.exp(rng.normal(0, 0.5, shape))
    haul = np.where(rng.random(shape) < 0.3, haul * tail(), haul)
    amount = np.where(stolen, np.where(small, rng.uniform(0.5, 3, shape), haul), amount)
    gap = np.where(stolen, np.where(first, pause, short), gap)
    bought = np.where(small, SERVICES, rng.choice([CLOTHES, ELECTRONICS, GIFTS, SERVICES], shape))
    merchant = np.where(stolen, bought, merchant)
    online = np.where(stolen, ~new_country, online)
    country = np.where(stolen & new_country, each(rng.integers(1, COUNTRIES, cards)), country)
    hour = (clock[:, :1] + gap.cumsum(1) - gap[:, :1]) % 24
    return Cards(amount, gap, hour, merchant, country, online, fraud, pattern)


def sequences(cards: Cards, raw: bool) -> np.ndarray:
    """What the LSTM reads, [cards, length, features]: amounts and gaps raw, or as logarithms."""
    scaled = (cards.amount, cards.gap)
    if not raw:
        scaled = (np.log(cards.amount) / 2 - 1.5, np.log(cards.gap + 0.01) / 2)
    angle = cards.hour * (2 * np.pi / 24)
    moved = np.diff(cards.country, axis=1, prepend=0) != 0
    columns = (
        *scaled, np.sin(angle), np.cos(angle), cards.country != 0, moved, cards.online,
        *(cards.merchant == number for number in range(len(MERCHANTS))),
    )  # fmt: skip
    return np.stack(columns, axis=-1, dtype=np.float32, casting="unsafe")


def aggregates(cards: Cards) -> np.ndarray:
    """What gradient boosting reads, [cards, features]: the last transaction, and its setting."""
    log_amount, foreign = np.log(cards.amount), cards.country != 0
    age = cards.gap[:, ::-1].cumsum(1)[:, ::-1] - cards.gap  # hours before the last transaction
    last = [log_amount, np.log(cards.gap + 0.01), cards.hour, cards.merchant, foreign, cards.online]
    before = log_amount[:, :-1]
    columns = [column[:, -1] for column in last]
    columns += [before.mean(1), before.std(1), before.max(1), before.min(1)]
    columns += [log_amount[:, -1] - before.mean(1), cards.online.mean(1), foreign.mean(1)]
    columns += [(cards.country == cards.country[:, -1:]).sum(1)]
    for hours in (1, 6, 24):
        recent = age < hours
        columns += [recent.sum(1), (recent & foreign).sum(1), (recent & cards.online).sum(1)]
        columns += [np.log((recent * cards.amount).sum(1))]
        columns += [np.where(recent, log_amount, np.inf).min(1)]
        columns += [np.where(recent, log_amount, -np.inf).max(1)]
    return np.stack(columns, axis=1, dtype=np.float64, casting="unsafe")


class Detector(nnx.Module):
    """An LSTM whose state after the last transaction gives the log-odds of fraud."""

    def __init__(self, features: int, units: int, fraud_rate: float, rngs: nnx.Rngs):
        self.layer = Recurrent(CELLS["lstm"], features, units, scale=units**-0.5, rngs=rngs)
        self.output = nnx.Param(uniform(units**-0.5)(rngs.params(), (units,)))
        # The network begins at the base rate, and need not spend its first steps on learning it.
        self.bias = nnx.Param(jnp.array(math.log(fraud_rate / (1 - fraud_rate))))

    def __call__(self, histories: jax.Array) -> jax.Array:
        x = jnp.swapaxes(histories, 0, 1)
        outputs, _ = self.layer(x, self.layer.start(x.shape[1]))
        return outputs[-1] @ self.output[...] + self.bias[...]


@functools.cache  # so that runs that differ in their seed alone share a compiled step
def make_optimizer(config: str, clips: bool) -> optax.GradientTransformation:
    """The clip of the config, or one that only measures, in front of its optimizer."""
    clip, optimizer, training = (
        json.loads(config)[section] for section in ("gradient_clip", "optimizer", "training")
    )
    if clips:
        first = gradclip_jax.from_config(clip)
    else:
        first = gradclip_jax.clip_by_global_norm(math.inf, on_nonfinite="propagate")
    half = training["steps"] // 2
    rate = optax.linear_schedule(
        optimizer["learning_rate"], 0.0, training["steps"] - half, transition_begin=half
    )
    return optax.chain(first, OPTIMIZERS[optimizer["method"]](rate))


@functools.partial(jax.jit, static_argnames=("graph", "optimizer", "batch"))
def update(graph, optimizer, batch, state, number, key, x, y):
    """One step on cards drawn for its number."""
    params, opt_state = state
    rows = jax.random.randint(jax.random.fold_in(key, number), (batch,), 0, len(x))

    def objective(params):
        logits = nnx.merge(graph, params)(x[rows])
        return optax.sigmoid_binary_cross_entropy(logits, y[rows]).mean()

    loss, grads = jax.value_and_grad(objective)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    scalars = {"loss": loss, **measured_by_clip(opt_state)}
    return (optax.apply_updates(params, updates), opt_state), scalars


@functools.partial(jax.jit, static_argnames="graph")
def probability(graph, params, x):
    return jax.nn.sigmoid(nnx.merge(graph, params)(x))


def fit(config: dict[str, Any], clips: bool, seed: int, x: np.ndarray, y: np.ndarray, out: Path):
    """Train one detector; its probabilities as a function of histories, and its scalars."""
    training = config["training"]
    rngs, rate = nnx.Rngs(seed), config["data"]["fraud_rate"]
    graph, params = nnx.split(Detector(x.shape[-1], config["model"]["units"], rate, rngs))
    optimizer = make_optimizer(json.dumps(config), clips)
    data = (jax.random.key(seed), jnp.asarray(x), jnp.asarray(y, jnp.float32))
    (params, _), history = train(
        lambda state, number: update(graph, optimizer, training["batch"], state, number, *data),
        (params, optimizer.init(params)),
        training["steps"],
        out,
        title=out.name,
        config={**config, "clips": clips, "seed": seed},
        per_step=training["batch"],
        unit="cards",
    )

    def predict(x: np.ndarray) -> np.ndarray:
        parts = np.array_split(x, math.ceil(len(x) / 1000))
        p = np.concatenate([probability(graph, params, part) for part in parts])
        return np.nan_to_num(p)  # a network that is lost predicts no fraud

    return predict, history


def reliability(fraud: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean prediction, share of frauds and share of cards of each bin that is not empty."""
    bins = np.clip(np.searchsorted(EDGES, p, side="right") - 1, 0, len(EDGES) - 2)
    count = np.bincount(bins, minlength=len(EDGES) - 1)
    sums = [np.bincount(bins, values, len(count))[count > 0] for values in (p, fraud)]
    count = count[count > 0]
    return np.stack([sums[0] / count, sums[1] / count, count / len(p)])


def best_threshold(fraud: np.ndarray, p: np.ndarray) -> float:
    """The threshold with the largest F1 = 2 precision · recall / (precision + recall)."""
    precision, recall, thresholds = precision_recall_curve(fraud, p)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def score(valid: Cards, test: Cards, p_valid: np.ndarray, p_test: np.ndarray) -> dict[str, float]:
    """What the table shows; the threshold is chosen on the validation cards."""
    caught = p_test >= best_threshold(valid.fraud, p_valid)
    predicted, observed, share = reliability(test.fraud, p_test)
    return {
        "AP": average_precision_score(test.fraud, p_test),
        "ROC AUC": roc_auc_score(test.fraud, p_test),
        "F1": 2 * float((caught & test.fraud).sum() / (caught.sum() + test.fraud.sum())),
        "Brier": brier_score_loss(test.fraud, p_test),
        "ECE": float(np.sum(share * np.abs(predicted - observed))),
        **{
            name: float(caught[test.fraud & (test.pattern == number)].mean())
            for number, name in enumerate(PATTERNS)
        },
    }


class Result(NamedTuple):
    """One row of the table: a score and a history for each seed, the predictions of the first."""

    name: str
    scores: list[dict[str, float]]
    p_test: np.ndarray
    histories: list[dict[str, list]]


def detect(args: argparse.Namespace) -> None:
    config = read_config(args.config)
    check_number("steps", args.steps, 1)
    if args.steps is not None:
        config["training"]["steps"] = args.steps
    seconds, data = stopwatch(args.out), config["data"]
    train_cards, valid, test = (
        generate(np.random.default_rng([args.seed, number]), data[f"{split}_cards"],
                 data["length"], data["fraud_rate"], data["tail_index"])
        for number, split in enumerate(("train", "valid", "test"))
    )  # fmt: skip
    for split, cards in (("valid", valid), ("test", test)):
        if not cards.fraud.any():
            raise InputError(f"`--config` must draw a fraud in {split}: give more cards.")

    boosting = HistGradientBoostingClassifier(**BOOSTING, random_state=args.seed)
    boosting.fit(aggregates(train_cards), train_cards.fraud)
    p_valid, p_test = (boosting.predict_proba(aggregates(cards))[:, 1] for cards in (valid, test))
    results = [Result("gradient boosting", [score(valid, test, p_valid, p_test)], p_test, [])]
    for inputs in ("log", "raw"):
        x, x_valid, x_test = (sequences(c, inputs == "raw") for c in (train_cards, valid, test))
        for clips in (True, False):
            scores, histories, p_first = [], [], np.array([])
            for seed in range(args.seed, args.seed + config["training"]["seeds"]):
                out = args.out / f"{inputs}-{'clip' if clips else 'none'}-{seed}"
                predict, history = fit(config, clips, seed, x, train_cards.fraud, out)
                p_test = predict(x_test)
                scores.append(score(valid, test, predict(x_valid), p_test))
                histories.append(history)
                p_first = p_first if len(p_first) else p_test
            results.append(
                Result(f"LSTM, {inputs}, {'clip' if clips else 'none'}", scores, p_first, histories)
            )

    picture = args.out / "fraud_detection.png"
    draw(results, test, picture)
    settings = {**config, "seed": args.seed}
    settings |= seconds()
    packages = ("jax", "flax", "optax", "scikit-learn", "numpy")
    save_results(args.out, make_tables(results), settings, packages)
    console.print(f"Plot: {picture}{advice(args.out)}")


def read_config(file: Path) -> dict[str, Any]:
    """The config in a file; what it leaves out is that of `fraud_detection.json`."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"`--config` must be a JSON file, got {file}: {reason}.") from None
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    for section, values in check_object("its top", given).items():
        check_name("its top", section, RULES)
        before = config[section]
        if section == "gradient_clip" and "method" in check_object(section, values):
            before = {}  # the threshold of another clip says nothing about this one
        for key, value in check_object(section, values).items():
            if section != "gradient_clip":
                check_value(section, key, value)
        config[section] = before | values
    check_clip(config["gradient_clip"])
    return config


def check_clip(config: dict[str, Any]) -> None:
    try:
        clip = gradclip_jax.from_config(config)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`--config` must describe a clip at gradient_clip, got {config}: {error}"
        ) from None
    measured = measured_by_clip(clip.init({"w": jnp.zeros((2, 2))}))
    if not measured.keys() >= {"grad_norm", "clipped"}:
        raise InputError(
            f"`--config` must have a clip that measures a norm at gradient_clip, got {config}."
        )


def check_object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"`--config` must have an object {{…}} at {where}, got {value!r}.")
    return value


def check_name(where: str, name: Any, known: dict[str, Any]) -> None:
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or sorted(known)
        raise InputError(
            f"`--config` must have a known name at {where}, got {name!r}; "
            f"nearest: {', '.join(near)}."
        )


def check_value(section: str, key: str, value: Any) -> None:
    check_name(section, key, RULES[section])
    where, rule = f"{section}.{key}", RULES[section][key]
    if isinstance(rule, dict):
        check_name(where, value, rule)
        return
    low, high = rule
    kind = "a whole number" if isinstance(low, int) else "a number"
    right = type(value) is int or (type(value) is float and isinstance(low, float))
    if not (right and low <= value <= high):
        raise InputError(
            f"`--config` must have {kind} from {low:g} to {high:g} at {where}, got {value!r}."
        )


def make_tables(results: list[Result]) -> list[Table]:
    """The scores, and the share of the frauds of each pattern that is caught: means over seeds."""
    names = list(results[0].scores[0])
    kinds = {"fraud detection": names[: -len(PATTERNS)], "frauds caught": list(PATTERNS)}
    tables = []
    for title, columns in kinds.items():
        table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
        more = ["AP ±", "max norm", "clip rate"] if not tables else []
        for name in ("", *columns, *more):
            table.add_column(name, justify="right" if name else "left", min_width=6)
        for result in results:
            values = {name: [scores[name] for scores in result.scores] for name in columns}
            cells = [f"{np.mean(values[name]):.{4 if name in FINE else 3}f}" for name in columns]
            if more and result.histories:
                norm = max(max(history["grad_norm"]) for history in result.histories)
                rate = np.mean([history["clipped"] for history in result.histories])
                cells += [f"{np.std(values['AP']):.3f}", f"{norm:.2g}", f"{rate:.1%}"]
            table.add_row(result.name, *cells)
        tables.append(table)
    return tables


def draw(results: list[Result], test: Cards, picture: Path) -> None:
    """Precision over recall, calibration, norms and losses; of several seeds the first."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (curve, calibration), (norm, loss) = figure.subplots(2, 2)
    for number, result in enumerate(results):
        # The curves of clip and none may lie on each other.
        colour = f"C{number}" + ("--" if result.name.endswith("none") else "")
        precision, recall, _ = precision_recall_curve(test.fraud, result.p_test)
        curve.plot(recall, precision, colour, lw=1, label=result.name)
        predicted, observed, _ = reliability(test.fraud, result.p_test)
        calibration.plot(predicted, observed, colour, marker="o", ms=3, lw=1, label=result.name)
        if result.histories:
            history = result.histories[0]
            starts = np.arange(0, len(history["grad_norm"]), 10)
            norm.plot(starts, np.maximum.reduceat(history["grad_norm"], starts), colour, lw=1)
            kernel = np.ones(width := min(50, len(history["loss"]))) / width
            loss.plot(np.convolve(history["loss"], kernel, "valid"), colour, lw=1)
    calibration.plot([1e-4, 1], [1e-4, 1], "grey", ls=":", label="calibrated")
    curve.set(xlabel="recall", ylabel="precision", title="test cards")
    calibration.set(xscale="log", yscale="log", xlabel="predicted probability of fraud",
                    ylabel="share of frauds", title="calibration")  # fmt: skip
    norm.set(
        yscale="log", xlabel="step", title="largest gradient norm of 10 steps, before the clip"
    )
    loss.set(yscale="log", xlabel="step", title="training loss, mean of 50 steps")
    for axes in (curve, calibration):
        axes.legend(fontsize="small")
    figure.savefig(picture, dpi=75)


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "fraud_detection")
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="JSON; what it leaves out is as in %(default)s")
    add("--steps", type=int, help="optimizer steps, instead of those of the config")
    return run(parser, detect, argv)


if __name__ == "__main__":
    sys.exit(main())
