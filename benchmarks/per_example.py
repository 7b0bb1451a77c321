"""Per-example clipping: memory and time against the batch, beside optax and jax-privacy.

python benchmarks/per_example.py
python benchmarks/per_example.py --batches 64,256 --width 1024 --microbatch 32
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Spread, digits, ratios

import gradclip_jax

CLASSES, MAX_NORM = 10, 1.0
TEXT = """\
A network with two hidden layers of {width} units and {weights:,} weights in float32, the sum of the
gradients of a batch, each clipped to norm 1. `microbatch` is how many gradients exist at one time.
Memory is what the compiled program allocates beside arguments and results, in copies of the
weights. Medians over at most {rounds} rounds, in which all cases of a batch take turns, and
quartiles; the ratio is that to ours with the same micro-batch, within a round.

"""

Case = tuple[str, str, Callable[..., Any]]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of a batch."""
    for weights, bias in params[:-1]:
        x = jnp.tanh(x @ weights + bias)
    weights, bias = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ weights + bias, y).mean()


def network(width: int) -> Any:
    """Weights and biases of each layer."""
    rng = np.random.default_rng(0)
    sizes = [width, width, width, CLASSES]
    return [
        (jnp.asarray(rng.standard_normal(shape) / width**0.5, jnp.float32), jnp.zeros(shape[1]))
        for shape in itertools.pairwise(sizes)
    ]


def examples(batch: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Made-up inputs and classes."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((batch, width)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, CLASSES, batch), jnp.int32)


def ours(microbatch: int | None) -> Callable[..., Any]:
    """This library."""
    f = gradclip_jax.clipped_value_and_grad(loss, MAX_NORM, microbatch_size=microbatch)
    return lambda params, x, y: f(params, x, y)[1]


def with_ghosts(nnx: Any, microbatch: int | None) -> Callable[..., Any]:
    """The same network of `nnx.Linear`, and the gradients of its kernels never formed."""

    def of_layers(layers: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for layer in layers[:-1]:
            x = jnp.tanh(layer(x))
        return optax.softmax_cross_entropy_with_integer_labels(layers[-1](x), y).mean()

    f = gradclip_jax.clipped_value_and_grad(
        of_layers, MAX_NORM, microbatch_size=microbatch, ghost=True
    )

    def run(params: Any, x: jax.Array, y: jax.Array) -> Any:
        layers = nnx.List(nnx.Linear(*weights.shape, rngs=nnx.Rngs(0)) for weights, _ in params)
        for layer, (weights, bias) in zip(layers, params, strict=True):
            layer.kernel[...], layer.bias[...] = weights, bias
        return f(layers, x, y)[1]

    return run


def with_optax(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """As its documentation does it: all gradients at once."""
    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x[:, None], y[:, None])
    return optax.per_example_global_norm_clip(grads, MAX_NORM)[0]


def with_jax_privacy(module: Any, microbatch: int | None) -> Callable[..., Any]:
    """Its `clipped_grad`."""
    return module.clipped_grad(
        loss, l2_clip_norm=MAX_NORM, batch_argnums=(1, 2), microbatch_size=microbatch
    )


def cases_of(batch: int, microbatch: int, nnx: Any, privacy: Any) -> list[Case]:
    """Name, micro-batch and function; jax-privacy takes only what divides the batch."""
    cases: list[Case] = []
    for size in dict.fromkeys((min(microbatch, batch), batch)):
        whole = None if size == batch else size
        cases.append(("gradclip_jax", str(size), ours(whole)))
        if nnx is not None:
            cases.append(("gradclip_jax, ghost", str(size), with_ghosts(nnx, whole)))
        if privacy is not None and batch % size == 0:
            cases.append(("jax-privacy", str(size), with_jax_privacy(privacy, whole)))
        if size == batch:
            cases.append(("optax", str(size), with_optax))
    return cases


def rows_of(batch: int, args: argparse.Namespace, sizes: dict[str, int], privacy: Any) -> Any:
    """The rows of one batch."""
    params, data = network(sizes["width"]), examples(batch, sizes["width"])
    copies = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    found = cases_of(batch, sizes["microbatch"], harness.peer("flax.nnx"), privacy)
    programs = {}
    for name, size, function in found:
        harness.progress(f"batch {batch}", name, f"micro-batch {size}")
        programs[name, size] = harness.compiled(function, params, *data)
    runs = {
        f"{name} {size}": functools.partial(program.run, params, *data)
        for (name, size), program in programs.items()
    }
    times = harness.interleaved(runs, rounds=args.rounds, seconds=args.seconds)
    for (name, size), program in programs.items():
        of_case = times[f"{name} {size}"]
        yield [
            batch, size, name, digits(program.temporary / copies), Spread.of(of_case, 1e3),
            Spread.of(ratios(of_case, times[f"gradclip_jax {size}"])),
        ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure per-example clipping against the batch.")
    add = parser.add_argument
    add("--batches", default="16,64,256", help="examples, by comma (%(default)s)")
    add("--microbatch", default="16", help="examples whose gradients exist at once (%(default)s)")
    add("--width", default="256", help="inputs and units of a layer (%(default)s)")
    return harness.run("Per-example clipping", parser, measure, argv)


def measure(args: argparse.Namespace) -> str:
    """The table."""
    sizes = {
        name: harness.number(f"--{name}", getattr(args, name)) for name in ("microbatch", "width")
    }
    batches = harness.numbers("--batches", args.batches)
    privacy = harness.peer("jax_privacy.clipping")
    missing = "" if privacy is not None else "jax-privacy: not installed, skipped.\n\n"
    weights = sum(leaf.size for leaf in jax.tree.leaves(network(sizes["width"])))
    rows = [row for batch in batches for row in rows_of(batch, args, sizes, privacy)]
    header = ("batch", "micro-batch", "library", "memory (weights)", "ms", "ratio to ours")
    return "".join(
        [
            TEXT.format(width=sizes["width"], weights=weights, rounds=args.rounds),
            missing,
            harness.table(header, rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
