"""Train a residual network without normalisation, and see how far adaptive clipping carries it.

    python examples/papers/resnet_agc.py

trains the same network on handwritten digits with large batches, at learning rates that each are
twice the one before, with adaptive gradient clipping and without it. The table has the
accuracies, the plot the losses on the way there. `--data DIR` takes CIFAR-10 instead (the "python
version" of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked).

Brock, De, Smith, Simonyan 2021, "High-performance large-scale image recognition without
normalization", https://arxiv.org/abs/2102.06171: weights are standardised, the variance of the
signal is known from block to block instead of measured, residual branches start at zero (SkipInit),
and the gradient of each unit is held to a fraction of the norm of its weights. Left out here:
augmentation, dropout, stochastic depth, weight decay and squeeze-and-excite.
"""

import argparse
import functools
import math
import pickle
import sys
from collections.abc import Callable
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
from sklearn.datasets import load_digits

import gradclip_jax
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

CLASSES = 10
ALPHA = 0.2  # scale of every residual branch
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))  # keeps the variance of a normal input at 1
SIZES = ("steps", "batch", "width", "stages", "blocks")
CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]

# The network


class Conv(nnx.Module):
    """A convolution with scaled weight standardisation.

    ŵ = gain · (w − mean) / (standard deviation · √fan-in), over the weights of each output, so
    that at a gain of 1 a channel has mean 0 and variance 1 whatever the weights are. Brock, De,
    Smith 2021, https://arxiv.org/abs/2101.08692.
    """

    def __init__(self, size: int, inputs: int, outputs: int, *, stride: int = 1, rngs: nnx.Rngs):
        self.stride = stride
        normal = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(normal(rngs.params(), (size, size, inputs, outputs)))
        self.gain, self.bias = nnx.Param(jnp.ones(outputs)), nnx.Param(jnp.zeros(outputs))

    def weights(self) -> jax.Array:
        kernel = self.kernel[...]
        axes, fan_in = (0, 1, 2), math.prod(kernel.shape[:-1])
        scale = jax.lax.rsqrt(jnp.maximum(kernel.var(axes) * fan_in, 1e-4)) * self.gain[...]
        return (kernel - kernel.mean(axes)) * scale

    def __call__(self, x: jax.Array) -> jax.Array:
        strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, self.weights(), strides, "SAME", dimension_numbers=layout
        )
        return x + self.bias[...]


class Block(nnx.Module):
    """x + α · skip · f(x / β), where β is the standard deviation that x has at the start.

    A block that changes the size starts a new count: its shortcut sees x / β too.
    """

    def __init__(self, inputs: int, outputs: int, variance: float, *, stride: int, rngs: nnx.Rngs):
        self.stride, self.beta = stride, math.sqrt(variance)
        self.first = Conv(3, inputs, outputs, stride=stride, rngs=rngs)
        self.second = Conv(3, outputs, outputs, rngs=rngs)
        self.shortcut = None if inputs == outputs else Conv(1, inputs, outputs, rngs=rngs)
        self.skip = nnx.Param(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        out = activation(x) / self.beta
        if self.shortcut is not None:
            window = (self.stride, self.stride)
            x = self.shortcut(nnx.avg_pool(out, window, window, padding="SAME"))
        out = self.second(activation(self.first(out)))
        return x + ALPHA * self.skip[...] * out


class ResNet(nnx.Module):
    """A stem, stages of blocks, each with twice the channels at half the size, and the head."""

    def __init__(self, channels: int, width: int, stages: int, blocks: int, rngs: nnx.Rngs):
        self.stem = Conv(3, channels, width, rngs=rngs)
        self.blocks, inputs, variance = nnx.List(), width, 1.0
        for stage in range(stages):
            for _ in range(blocks):
                outputs, changes = width * 2**stage, inputs != width * 2**stage
                self.blocks.append(Block(inputs, outputs, variance, stride=1 + changes, rngs=rngs))
                variance = (1.0 if changes else variance) + ALPHA**2
                inputs = outputs
        self.head = nnx.Linear(
            inputs, CLASSES, kernel_init=nnx.initializers.normal(0.01), rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(activation(x).mean((1, 2)))


def activation(x: jax.Array) -> jax.Array:
    return jax.nn.relu(x) * RELU_GAIN


# The images


class Split(NamedTuple):
    images: np.ndarray  # [count, height, width, channels], mean 0 and variance 1 in training
    labels: np.ndarray


def load_images(data: Path | None) -> dict[str, Split]:
    """Training, validation and test images, as numbers that the network likes."""
    if data is None:
        pixels, labels = (np.asarray(x) for x in load_digits(return_X_y=True))
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = pixels[order].reshape(-1, 8, 8, 1), labels[order]
        ends = [0, 1197, 1497, 1797]
    else:
        parts = [read_cifar(data / name) for name in CIFAR_FILES]
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        test = len(parts[-1][1])
        valid = (len(labels) - test) // 10
        ends = [0, len(labels) - test - valid, len(labels) - test, len(labels)]
    images = images.astype(np.float32)
    images -= images[: ends[1]].mean((0, 1, 2))
    images /= images[: ends[1]].std((0, 1, 2))
    spans = zip(("train", "valid", "test"), ends, ends[1:], strict=False)
    return {
        name: Split(images[low:high], labels[low:high].astype(np.int32))
        for name, low, high in spans
    }


class ArraysOnly(pickle.Unpickler):
    """Reads the arrays of a pickle and refuses the rest: a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        array = module.startswith("numpy.") and name == "_reconstruct"
        if array or (module, name) in (
            ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")
        ):  # fmt: skip
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_cifar(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 32, 32, 3] and labels of one file of CIFAR-10."""
    try:
        with file.open("rb") as stream:
            content = ArraysOnly(stream, encoding="bytes").load()
        images, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
        if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"its images are {images.dtype} {images.shape}")
        if labels.min() < 0 or labels.max() >= CLASSES:
            raise ValueError(f"its labels reach from {labels.min()} to {labels.max()}")
    except Exception as error:  # a damaged pickle fails in many ways
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"`--data` must hold CIFAR-10's {file.name}, got {file}: {reason}"
        ) from None
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


# Training


class Run(NamedTuple):
    """What distinguishes the steps of one run from those of another: arrays, for one program."""

    peak: jax.Array  # the highest learning rate
    key: jax.Array  # decides in which order the images come
    split: Split


class Result(NamedTuple):
    """One method at one learning rate, from several seeds."""

    histories: list[History]
    valid: np.ndarray  # accuracy of each seed
    test: np.ndarray


def make_clip(clipping: float | None) -> optax.GradientTransformationExtraArgs:
    """Adaptive clipping of all but the last layer; with None only the measurement."""
    # Without clipping nothing shall be held back, not even what is not finite.
    on_nonfinite = "propagate" if clipping is None else "zero"
    clip = gradclip_jax.adaptive_grad_clip(clipping, on_nonfinite=on_nonfinite)

    def all_but_head(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[0].key != "head", params)

    return optax.masked(clip, all_but_head)


def make_optimizer(
    args: argparse.Namespace, clipping: float | None, peak: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The clip and SGD with Nesterov's momentum.

    The learning rate rises linearly over a tenth of the steps and falls along a cosine.
    """

    def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
        rising = (jnp.asarray(count) + 1) / max(args.steps // 10, 1)
        falling = (1 + jnp.cos(jnp.pi * jnp.asarray(count) / args.steps)) / 2
        return peak * jnp.minimum(rising, falling)

    return optax.chain(make_clip(clipping), optax.sgd(learning_rate, 0.9, nesterov=True))


def make_step(graph: nnx.GraphDef, args: argparse.Namespace, clipping: float | None) -> Callable:
    @functools.partial(jax.jit, donate_argnums=1)
    def step(run: Run, state: tuple, number: jax.Array) -> tuple[tuple, dict[str, jax.Array]]:
        params, opt_state = state
        drawn = draw_batch(run.key, number, len(run.split.labels), args.batch)
        images, labels = run.split.images[drawn], run.split.labels[drawn]

        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        optimizer = make_optimizer(args, clipping, run.peak)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        scalars = {"loss": loss, **gradclip_jax.metrics(opt_state)}
        return (optax.apply_updates(params, updates), opt_state), scalars

    return step


def draw_batch(key: jax.Array, number: jax.Array, count: int, batch: int) -> jax.Array:
    """Which images step `number` sees: each epoch goes through all of them in a new order."""
    epoch, place = jnp.divmod(number, count // batch)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
    return jax.lax.dynamic_slice(order, (place * batch,), (batch,))


def train_all(
    args: argparse.Namespace, rates: list[float], splits: dict[str, Split]
) -> dict[str, list[Result]]:
    """Each method with its results, one for every learning rate."""
    split = jax.tree.map(jnp.asarray, splits["train"])
    common = {"data": source(args), **{name: getattr(args, name) for name in SIZES}}

    def start(seed: int) -> tuple[nnx.GraphDef, Any]:
        channels = split.images.shape[-1]
        return nnx.split(ResNet(channels, args.width, args.stages, args.blocks, nnx.Rngs(seed)))

    graph = start(0)[0]
    predict = jax.jit(lambda params, images: nnx.merge(graph, params)(images).argmax(-1))

    def accuracy(params: Any, split: Split, at_once: int = 1000) -> float:
        parts = range(0, len(split.labels), at_once)
        guesses = [np.asarray(predict(params, split.images[i : i + at_once])) for i in parts]
        return float(np.mean(np.concatenate(guesses) == split.labels))

    def train_one(step: Callable, name: str, clipping: float | None, rate: float, seed: int):
        peak, params = jnp.float32(rate), start(seed)[1]
        state = params, make_optimizer(args, clipping, peak).init(params)
        (params, _), history = train(
            functools.partial(step, Run(peak, jax.random.key(seed), split)),
            state, args.steps, args.out / f"{name.replace(' ', '_')}_{rate:g}_seed_{seed}",
            title=f"{name} · learning rate {rate:g} · seed {seed}",
            config={**common, "clipping": clipping, "rate": rate, "seed": seed},
            per_step=args.batch, unit="images",
        )  # fmt: skip
        return history, accuracy(params, splits["valid"]), accuracy(params, splits["test"])

    results = {}
    for name, clipping in {"AGC": args.clipping, "no clip": None}.items():
        step = make_step(graph, args, clipping)  # one compiled program for all learning rates
        results[name] = []
        for rate in rates:
            seeds = range(args.seed, args.seed + args.seeds)
            runs = [train_one(step, name, clipping, rate, seed) for seed in seeds]
            histories, valid, test = zip(*runs, strict=True)
            results[name].append(Result(list(histories), np.array(valid), np.array(test)))
    return results


# What came of it


def source(args: argparse.Namespace) -> str:
    return "digits" if args.data is None else "CIFAR-10"


def make_tables(rates: list[float], results: dict[str, list[Result]]) -> list[Table]:
    """The mean accuracy over the seeds and the lowest; what validation would have chosen."""
    every = Table(title="accuracy", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    best = Table(title="chosen in validation", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    best.add_column("")
    for table in (every, best):
        table.add_column("learning rate", justify="right")
    for table, names in ((every, [f"{name}\n" for name in results]), (best, [""])):
        for name in names:
            for column in ("valid", "test", "lowest"):
                table.add_column(f"{name}{column}", justify="right")
    for row, rate in enumerate(rates):
        every.add_row(f"{rate:g}", *(x for column in results.values() for x in cells(column[row])))
    for name, column in results.items():
        rate, result = max(zip(rates, column, strict=True), key=lambda x: x[1].valid.mean())
        best.add_row(name, f"{rate:g}", *cells(result))
    return [every, best]


def cells(result: Result) -> list[str]:
    return [f"{x:.1%}" for x in (result.valid.mean(), result.test.mean(), result.test.min())]


def draw(rates: list[float], results: dict[str, list[Result]], picture: Path) -> None:
    """Accuracy by learning rate, and the loss of the first seed; darker is a higher rate."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(results))
    for number, (name, column) in enumerate(results.items()):
        test = [result.test.mean() for result in column]
        left.plot(rates, test, f"C{number}o-", label=name)
        axes, shades = others[number], np.linspace(0.25, 1, len(rates))
        for rate, result, shade in zip(rates, column, shades, strict=True):
            axes.plot(
                finite_losses(result.histories[0]), f"C{number}", alpha=shade, lw=0.9,
                label=f"{rate:g}",
            )  # fmt: skip
        axes.set(title=name, xlabel="step", ylabel="loss", yscale="log", ylim=(1e-4, 1e3))
        axes.legend(title="learning rate", fontsize="small", loc="upper right")
    left.set(xscale="log", xlabel="learning rate", ylabel="test accuracy", ylim=(0, 1.02))
    left.legend()
    figure.savefig(picture, dpi=100)


def finite_losses(history: History) -> np.ndarray:
    """The losses until one of them, or a gradient, is not finite."""
    # The norm is asked too: compiled for the CPU, relu and mean can make a 0 of a NaN.
    finite = np.isfinite(history["loss"]) & np.isfinite(history["grad_norm"])
    return np.array(history["loss"])[np.logical_and.accumulate(finite)]


def compare(args: argparse.Namespace) -> None:
    """Trains with adaptive clipping and without it at every learning rate; table and plot."""
    for name in ("seeds", *SIZES):
        check_number(name, getattr(args, name), 1)
    check_number("clipping", args.clipping, 0)
    for rate in args.learning_rates:
        check_number("learning_rates", rate, 0)
    if args.data is not None and not args.data.is_dir():
        raise InputError(f"`--data` must be a directory, got {args.data}.")
    splits = load_images(args.data)
    check_number("batch", args.batch, 1, len(splits["train"].labels))
    rates = sorted(set(args.learning_rates))
    results = train_all(args, rates, splits)
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    save_results(
        args.out, make_tables(rates, results), {"data": source(args), **settings},
        ["jax", "flax", "optax", "scikit-learn"],
    )  # fmt: skip
    draw(rates, results, args.out / "resnet_agc.png")
    console.print(f"Table and plot: {args.out}{advice(args.out)}")


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "resnet_agc")
    add = parser.add_argument
    add("--data", type=Path, help="directory of CIFAR-10; default: scikit-learn's digits")
    add("--learning-rates", type=float, nargs="+", metavar="RATE",
        default=[0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4], help="highest of each run")  # fmt: skip
    add("--seeds", type=int, default=3, help="runs from each learning rate, from --seed on")
    add("--clipping", type=float, default=0.01, help="fraction of the norm of a unit's weights")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=256)
    add("--width", type=int, default=16, help="channels of the first stage")
    add("--stages", type=int, default=2)
    add("--blocks", type=int, default=2, help="of each stage")
    return run(parser, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
