"""Train on handwritten digits so that no one can tell of any image whether it was among them.

    python examples/papers/private_digits.py

trains a small network by DP-SGD, with more and with less noise, and prints what privacy that buys
and what accuracy is left. Beside it: no noise, and neither noise nor clip. `--data DIR` takes MNIST
instead (its four idx files, gzipped or not), by default with the network and the first recipe of
TensorFlow Privacy's tutorial, which reaches 95.0 % at ε = 1.19.

Each image is drawn for a step by a coin of its own (Poisson sampling), its gradient clipped, noise
added to the sum, and the sum divided by the number of images expected, not by that drawn: that is
what the accountant, `dp_accounting`, is told. Batches are padded to a fixed size. Beside the fixed
limit there is one that follows a quantile of the norms; the count that this takes is noised, too.

ε and δ hold for the network, and not for: the loss, the norms and the share clipped in the logs and
plots; the choice of hyperparameters; and anyone who knows the seed, or breaks `jax.random`, which
is made for simulation, not for cryptography.

Abadi et al. 2016, "Deep learning with differential privacy", https://arxiv.org/abs/1607.00133.
Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially private learning with adaptive clipping",
https://arxiv.org/abs/1905.03871.
"""

import argparse
import functools
import gzip
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import dp_event, rdp
from flax import nnx
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.stats import binom
from sklearn.datasets import load_digits

from examples.language_model.command_line import (
    InputError,
    check_number,
    command_line,
    console,
    run,
)
from examples.language_model.directory import History
from examples.language_model.loop import train
from examples.language_model.results import save_results
from examples.language_model.scalars import advice
from gradclip_jax import per_example

CLASSES = 10
ORDERS = [*(1 + x / 10 for x in range(1, 100)), *range(12, 64)]  # those of TensorFlow Privacy
MICROBATCH = 64  # images whose gradients exist at one time: all 512 at once take 5 times as long
OVERFLOW = 1e-9  # of δ: how probable it may be that any batch exceeds its fixed size
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
# What an option is when it is not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "noise_multipliers": [32.0, 16.0, 8.0, 4.0, 2.0], "seeds": 5, "steps": 100, "batch": 512,
        "max_norm": 1.0, "learning_rate": {"sgd": 1.0, "adam": 0.01},
    },
    "MNIST": {
        "noise_multipliers": [1.3], "seeds": 1, "steps": 3515, "batch": 256,
        "max_norm": 1.5, "learning_rate": {"sgd": 0.25, "adam": 0.001},
    },
}  # fmt: skip

# Privacy


def epsilons(
    noise_multiplier: float, probability: float, steps: int, delta: float
) -> tuple[float, float]:
    """ε at δ of steps on examples drawn with a probability: as tight as known, and the classic one.

    Both come of the same Rényi divergences. The classic conversion, min over the orders α of
    RDP(α) + log(1/δ) / (α − 1), is that of most published figures; the tight one is smaller:
    Canonne, Kamath, Steinke 2020, https://arxiv.org/abs/2004.00010, proposition 12. Neighbours
    differ by one example, which one has and the other has not.
    """
    if noise_multiplier == 0:
        return math.inf, math.inf
    accountant = rdp.RdpAccountant(ORDERS)
    step = dp_event.PoissonSampledDpEvent(probability, dp_event.GaussianDpEvent(noise_multiplier))
    accountant.compose(step, steps)
    classic = accountant.rdp - math.log(delta) / (accountant.orders - 1)
    return float(accountant.get_epsilon(delta)), float(classic.min())


def fixed_size(examples: int, probability: float, steps: int, delta: float) -> int:
    """The size of a batch that no step exceeds, but with a probability p of a tiny share of δ.

    Of a larger one the last examples are left out. That adds at most (1 + exp(ε)) p to δ, which at
    ε = 10 is 2e-5 of it.
    """
    larger = binom.sf(np.arange(examples + 1), examples, probability)
    return int(np.argmax(steps * larger <= OVERFLOW * delta))


def draw_batch(
    key: jax.Array, examples: int, probability: float, size: int
) -> tuple[jax.Array, jax.Array]:
    """Indices of the examples drawn, each with the same probability, and which of them count."""
    drawn = jax.random.bernoulli(key, probability, (examples,))
    (chosen,) = jnp.nonzero(drawn, size=size, fill_value=0)
    return chosen, jnp.arange(size) < drawn.sum()


# The networks


class Perceptron(nnx.Module):
    """One hidden layer: with little data, noise on few weights leaves more than on many."""

    def __init__(self, pixels: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(pixels**2, 32, rngs=rngs)
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.hidden(images.reshape(len(images), -1))))


class Convolutional(nnx.Module):
    """That of TensorFlow Privacy's tutorials, for 28 x 28 pixels."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = Conv(1, 16, 8, "SAME", rngs)
        self.second = Conv(16, 32, 4, "VALID", rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 32, rngs=rngs)
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = max_pool(nnx.relu(self.first(images)))
        x = max_pool(nnx.relu(self.second(x)))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Conv(nnx.Module):
    """A convolution of stride 2, as a product of patches and weights.

    With `nnx.Conv` the gradients of examples take six times as long on a CPU.
    """

    def __init__(self, inputs: int, outputs: int, size: int, padding: str, rngs: nnx.Rngs):
        self.size, self.padding = size, padding
        self.linear = nnx.Linear(inputs * size**2, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        patches = jax.lax.conv_general_dilated_patches(
            x, (self.size, self.size), (2, 2), self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return self.linear(patches)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2 x 2 pixels, at every pixel but the last ones."""
    x = jnp.maximum(x[:, 1:], x[:, :-1])
    return jnp.maximum(x[:, :, 1:], x[:, :, :-1])


def make_network(pixels: int, rngs: nnx.Rngs) -> nnx.Module:
    return Convolutional(rngs) if pixels == 28 else Perceptron(pixels, rngs)


# The images


class Split(NamedTuple):
    images: np.ndarray  # [count, height, width, 1], from 0 to 1: by no statistic of the images
    labels: np.ndarray


def load_images(data: Path | None) -> tuple[Split, Split]:
    """Training and test images."""
    if data is None:
        pixels, labels = (np.asarray(x) for x in load_digits(return_X_y=True))
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = pixels[order].reshape(-1, 8, 8) / 16, labels[order]
        return as_split(images[:-300], labels[:-300]), as_split(images[-300:], labels[-300:])
    if not data.is_dir():
        raise InputError(f"`--data` must be a directory, got {data}.")
    return read_mnist(data, "train"), read_mnist(data, "t10k")


def as_split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images[..., None].astype(np.float32), labels.astype(np.int32))


def read_mnist(data: Path, name: str) -> Split:
    images, file = read_idx(data, f"{name}-images-idx3-ubyte", 3)
    labels, labels_file = read_idx(data, f"{name}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (28, 28):
        raise InputError(f"`--data` must hold images of 28 x 28, got {file}: {images.shape[1:]}.")
    if len(labels) != len(images) or labels.max() >= CLASSES:
        raise InputError(
            f"`--data` must hold a label from 0 to 9 for each of {len(images)} images, got "
            f"{labels_file}: {len(labels)} labels up to {labels.max()}."
        )
    return as_split(images / np.float32(255), labels)


def read_idx(data: Path, name: str, axes: int) -> tuple[np.ndarray, Path]:
    """The bytes [count, ...] of a file, which may be gzipped, and which file that was."""
    file = data / name if (data / name).exists() else data / f"{name}.gz"
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix else file.read_bytes()
        if content[:4] != bytes([0, 0, 8, axes]):
            raise ValueError(f"it starts with {content[:4].hex() or 'nothing'}")
        shape = np.frombuffer(content, ">u4", axes, 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        if not array.size or array.size != math.prod(map(int, shape)):
            raise ValueError(f"it has {array.size} bytes for {' x '.join(map(str, shape))}")
        return array.reshape(shape), file
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"`--data` must hold MNIST's {name}, got {file}: {reason}.") from None


# Training


class Method(NamedTuple):
    """How the gradients are clipped, and how much noise is added."""

    name: str
    max_norm: float | None  # at the start, if it adapts
    noise_multiplier: float = 0.0
    quantile: float | None = None  # that the limit follows


class Setup(NamedTuple):
    """What distinguishes the steps of one method from those of another: arrays, for one program."""

    noise_multiplier: jax.Array  # of the gradient
    adapts: jax.Array
    split: Any


class Result(NamedTuple):
    """One method: an accuracy for each seed, and their mean of all that was logged."""

    method: Method
    epsilons: tuple[float, float]
    accuracies: np.ndarray
    history: History


def make_methods(args: argparse.Namespace) -> list[Method]:
    methods = []
    for clip in dict.fromkeys(args.clips):
        quantile = args.quantile if clip == "quantile" else None
        name = "fixed limit" if quantile is None else f"quantile {quantile:g}"
        for noise in sorted(set(args.noise_multipliers), reverse=True):
            methods.append(Method(name, args.max_norm, noise, quantile))
    return [*methods, Method("no noise", args.max_norm), Method("no noise, no clip", None)]


def make_optimizer(
    args: argparse.Namespace, noise_multiplier: Any, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The noise and the optimizer: DP-SGD, or DP-Adam."""
    noise = per_example.gaussian_noise(
        noise_multiplier, max_norm=args.max_norm, key=key, mean_of=args.batch
    )
    optimizer = optax.chain(noise, OPTIMIZERS[args.optimizer](args.learning_rate))
    return optax.with_extra_args_support(optimizer)


def make_step(graph: nnx.GraphDef, args: argparse.Namespace, size: int) -> Callable:
    """A step of all seeds at once, the same program for all methods: it takes long to compile."""

    def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    clipped_grad = per_example.value_and_grad(
        loss_of, max_norm=args.max_norm, microbatch_size=MICROBATCH, reduction="mean",
        mean_of=args.batch, return_norms=True,
    )  # fmt: skip

    def step_of_one(setup: Setup, keys: jax.Array, state: tuple, number: jax.Array) -> tuple:
        params, opt_state, max_norm = state
        noise_key, draw_key = keys
        draw, count_key = jax.random.split(jax.random.fold_in(draw_key, number))
        images, labels = setup.split
        chosen, counts = draw_batch(draw, len(labels), args.batch / len(labels), size)
        (loss, seen), grads = clipped_grad(
            params, images[chosen], labels[chosen], max_norm=max_norm, mask=counts
        )
        optimizer = make_optimizer(args, setup.noise_multiplier, noise_key)
        updates, opt_state = optimizer.update(grads, opt_state, params, max_norm=max_norm)
        drawn = jnp.maximum(seen.example_count, 1).astype(jnp.float32)
        scalars = {
            "loss": loss * args.batch / drawn,
            "grad_norm": seen.norms.sum() / drawn,
            "clip_limit": max_norm,
            "clipped": seen.above_count.astype(jnp.float32) / drawn,
            "nonfinite_count": seen.nonfinite_count,
        }
        adapted = per_example.quantile_step(
            max_norm, seen=seen, mean_of=args.batch, quantile=args.quantile,
            noise_std=count_noise(args.batch), key=count_key,
        )  # fmt: skip
        max_norm = jnp.where(setup.adapts, adapted, max_norm)
        return (optax.apply_updates(params, updates), opt_state, max_norm), scalars

    @functools.partial(jax.jit, donate_argnums=2)
    def step(
        setup: Setup, keys: jax.Array, state: tuple, number: jax.Array
    ) -> tuple[tuple, dict[str, jax.Array]]:
        axes = (None, 0, 0, None)
        state, scalars = jax.vmap(step_of_one, axes)(setup, keys, state, number)
        return state, {name: value.mean(0) for name, value in scalars.items()}

    return step


def count_noise(batch: int) -> float:
    """σ_b, the noise on the count of the norms below the limit, as in Andrew et al. 2021."""
    return batch / 20


def start(
    args: argparse.Namespace, pixels: int, method: Method
) -> tuple[nnx.GraphDef, jax.Array, tuple]:
    """The network, and for each seed, stacked: the keys of noise and batches, and the state."""
    seeds = range(args.seed, args.seed + args.seeds)
    keys = jnp.stack([jax.random.split(jax.random.key(seed), 3) for seed in seeds])
    networks = [nnx.split(make_network(pixels, nnx.Rngs(key))) for key in keys[:, 2]]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params in networks))

    def state_of_one(keys: jax.Array, params: Any) -> tuple:
        optimizer = make_optimizer(args, method.noise_multiplier, keys[0])
        max_norm = math.inf if method.max_norm is None else method.max_norm
        return params, optimizer.init(params), jnp.float32(max_norm)

    return networks[0][0], keys[:, :2], jax.vmap(state_of_one)(keys, params)


def train_all(args: argparse.Namespace, data: Split, test: Split) -> list[Result]:
    """Every method with its results, in the order of the table."""
    split = jax.tree.map(jnp.asarray, tuple(data))
    examples, pixels = data.images.shape[:2]
    probability = args.batch / examples
    size = fixed_size(examples, probability, args.steps, args.delta)
    kept = ("steps", "batch", "optimizer", "learning_rate", "seed", "seeds")
    common = {"data": source(args), **{name: getattr(args, name) for name in kept}}
    # The size of a batch decides which numbers are drawn for whom, and δ decides the size.
    common |= {"examples": examples, "size": size}
    methods = make_methods(args)
    graph = start(args, pixels, methods[0])[0]
    step = make_step(graph, args, size)

    @jax.jit
    def predict(params: Any, images: jax.Array) -> jax.Array:
        return jax.vmap(lambda params: nnx.merge(graph, params)(images).argmax(-1))(params)

    def accuracies(params: Any, at_once: int = 1000) -> np.ndarray:
        parts = range(0, len(test.labels), at_once)
        guesses = [np.asarray(predict(params, test.images[i : i + at_once])) for i in parts]
        return np.mean(np.concatenate(guesses, axis=1) == test.labels, axis=1)

    results = []
    for method in methods:
        noise = method.noise_multiplier
        if method.quantile is not None:  # the count takes its part of the budget
            noise = per_example.split_noise(noise, noise_std=count_noise(args.batch))
        setup = Setup(jnp.float32(noise), jnp.array(method.quantile is not None), split)
        _, keys, state = start(args, pixels, method)
        (params, _, _), history = train(
            functools.partial(step, setup, keys), state, args.steps, args.out / slug(method),
            title=label(method), config={**common, **method._asdict()},
            per_step=args.batch * args.seeds, unit="images",
        )  # fmt: skip
        found = epsilons(method.noise_multiplier, probability, args.steps, args.delta)
        results.append(Result(method, found, accuracies(params), history))
    return results


# What came of it


def source(args: argparse.Namespace) -> str:
    return "digits" if args.data is None else "MNIST"


def label(method: Method) -> str:
    noise = method.noise_multiplier
    return f"{method.name} · noise {noise:g}" if noise else method.name


def slug(method: Method) -> str:
    return label(method).replace(" · ", "_").replace(", ", "_").replace(" ", "_")


def make_table(results: list[Result], delta: float) -> Table:
    """Mean accuracy over the seeds, the lowest, and how the examples were clipped."""
    table = Table(
        title=f"accuracy on the test images, δ = {delta:g}", box=SIMPLE_HEAD, show_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("")
    for name in ("noise", "ε", "classic ε", "accuracy", "lowest", "limit", "clipped"):
        table.add_column(name, justify="right")
    for method, both, accuracies, history in results:
        table.add_row(
            method.name, f"{method.noise_multiplier:g}",
            *("∞" if math.isinf(x) else f"{x:.2f}" for x in both),
            f"{accuracies.mean():.1%}", f"{accuracies.min():.1%}",
            "" if method.max_norm is None else f"{history['clip_limit'][-1]:.2f}",
            f"{np.mean(history['clipped']):.0%}",
        )  # fmt: skip
    return table


def draw(results: list[Result], picture: Path) -> None:
    """Accuracy by ε, from the lowest to the highest of the seeds, and where the limits went."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_epsilon, limits = figure.subplots(1, 2)
    noisy = [result for result in results if result.method.noise_multiplier > 0]
    names = list(dict.fromkeys(result.method.name for result in noisy))
    for number, name in enumerate(names):
        group = [result for result in noisy if result.method.name == name]
        low, mean, high = np.transpose(
            [(x.accuracies.min(), x.accuracies.mean(), x.accuracies.max()) for x in group]
        )
        by_epsilon.errorbar(
            [result.epsilons[0] for result in group], mean, [mean - low, high - mean],
            fmt=f"C{number}o-", capsize=3, label=name,
        )  # fmt: skip
        fixed = group[0].method.quantile is None
        for result, shade in zip(group, np.linspace(1, 0.3, len(group))[::-1], strict=True):
            if not fixed or result is group[-1]:
                limits.plot(
                    result.history["clip_limit"], f"C{number}", alpha=shade, lw=1.2,
                    label=name if fixed else label(result.method),
                )  # fmt: skip
    for number, result in enumerate((x for x in results if x not in noisy), start=len(names)):
        by_epsilon.axhline(
            result.accuracies.mean(), color=f"C{number}", ls="--", lw=1, label=result.method.name
        )
    ticks = sorted({result.epsilons[0] for result in noisy})
    by_epsilon.set(xscale="log", xlabel="ε: less is more private", ylabel="test accuracy")
    by_epsilon.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    by_epsilon.minorticks_off()
    limits.set(yscale="log", xlabel="step", ylabel="limit of the norms")
    by_epsilon.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)
    limits.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(picture, dpi=100)


def compare(args: argparse.Namespace) -> None:
    """Trains with every amount of noise, and without any; table and plot."""
    for name, default in DEFAULTS[source(args)].items():
        if getattr(args, name) is None:
            value = default[args.optimizer] if isinstance(default, dict) else default
            setattr(args, name, value)
    for name in ("seeds", "steps", "batch"):
        check_number(name, getattr(args, name), 1)
    for name in ("max_norm", "learning_rate"):
        check_number(name, getattr(args, name), 1e-6, 1e6)
    check_number("quantile", args.quantile, 0.01, 0.99)
    for noise in args.noise_multipliers:
        check_number("noise_multipliers", noise, 0.1, 1e6)
        if "quantile" in args.clips and noise >= 2 * count_noise(args.batch):
            raise InputError(
                f"`--noise-multipliers` must be below a tenth of `--batch` for `--clips quantile`, "
                f"got {noise:g}: the count of {args.batch} images would cost more than that."
            )
    data, test = load_images(args.data)
    examples = len(data.labels)
    check_number("batch", args.batch, 1, examples)
    if args.delta is None:
        args.delta = 10.0 ** -math.ceil(math.log10(examples + 1))
    if not 0 < args.delta < 1 / examples:
        raise InputError(
            f"`--delta` must be above 0 and below 1/{examples}, got {args.delta:g}: with more, "
            "publishing one image as it is would count as private."
        )
    results = train_all(args, data, test)
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    save_results(
        args.out, [make_table(results, args.delta)], {"data": source(args), **settings},
        ["jax", "flax", "optax", "dp-accounting", "scikit-learn"],
    )  # fmt: skip
    draw(results, args.out / "private_digits.png")
    console.print(f"Table and plot: {args.out}{advice(args.out)}")


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "private_digits")
    add = parser.add_argument
    add("--data", type=Path, help="directory of MNIST; default: scikit-learn's digits")
    add("--noise-multipliers", type=float, nargs="+", metavar="Z",
        help="standard deviations of the noise, in units of the limit")  # fmt: skip
    add("--clips", nargs="+", choices=["fixed", "quantile"], default=["fixed", "quantile"])
    add("--max-norm", type=float, help="the fixed limit, and where the other one starts")
    add("--quantile", type=float, default=0.5, help="share of the images not clipped")
    add("--delta", type=float, help="default: the power of ten below 1 / images")
    add("--optimizer", choices=[*OPTIMIZERS], default="sgd")
    add("--learning-rate", type=float)
    add("--seeds", type=int, help="runs of each kind, from --seed on")
    add("--steps", type=int)
    add("--batch", type=int, help="expected number of images of a step")
    return run(parser, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
