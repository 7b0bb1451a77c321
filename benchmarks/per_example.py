"""Per-example clipping: memory and time against the batch, beside optax and jax-privacy.

python benchmarks/per_example.py
python benchmarks/per_example.py --networks lstm --batches 64,256 --width 128 --microbatch 32
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Spread, digits, ratios

import gradclip_jax

CLASSES, MAX_NORM = 10, 1.0
PRIVACY = "jax_privacy.clipping"
TEXT = """\
The sum of the gradients of a batch in float32, each clipped to norm 1. The micro-batch is how many
gradients exist at one time. Memory is what the compiled program allocates beside arguments and
results, in copies of the weights. Medians over at most {rounds} rounds, in which all cases of a
batch take turns, and quartiles; the ratio is that to ours with the same micro-batch, within a
round. Inside a loop, as over micro-batches, XLA on CPU runs convolutions slowly
(https://github.com/jax-ml/jax/issues/12868).

"""

Case = tuple[str, str, Callable[..., Any], Any]


class Network(NamedTuple):
    """A network, made for a number of units."""

    text: str
    loss: Callable[..., Any]
    shapes: Callable[[int], Any]
    example: Callable[[int], tuple[int, ...]]
    layers: Callable[[Any, int], Any]
    loss_of_layers: Callable[..., Any]
    width: int

    def title(self) -> str:
        """What it is."""
        return self.text.format(width=self.width)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Of a batch, with classes as whole numbers."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def dense(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Three dense layers, [batch, width]."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return cross_entropy(x @ params[-1]["kernel"] + params[-1]["bias"], y)


def recurrent(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """An LSTM over [batch, steps, width], and a dense layer on its last state."""

    def step(carry: Any, inputs: jax.Array) -> Any:
        hidden, cell = carry
        gates = inputs @ params["input"] + hidden @ params["recurrent"] + params["bias"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(cell), cell), None

    zeros = jnp.zeros((x.shape[0], params["recurrent"].shape[0]), x.dtype)
    (hidden, _), _ = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
    return cross_entropy(hidden @ params["output"], y)


def convolutional(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Two convolutions over [batch, 8, 8, 8], and a dense layer on the mean of the positions."""
    order = ("NHWC", "HWIO", "NHWC")
    for kernel in params["kernels"]:
        convolved = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=order)
        x = jax.nn.relu(convolved)
    return cross_entropy(x.mean((1, 2)) @ params["output"], y)


def dense_layers(nnx: Any, width: int) -> Any:
    """The same network of `nnx.Linear`."""
    sizes = [width, width, width, CLASSES]
    return nnx.List(nnx.Linear(*pair, rngs=nnx.Rngs(0)) for pair in itertools.pairwise(sizes))


def loss_of_dense_layers(layers: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """As `dense`."""
    for layer in layers[:-1]:
        x = jnp.tanh(layer(x))
    return cross_entropy(layers[-1](x), y)


def recurrent_layers(nnx: Any, width: int) -> Any:
    """The same network of `nnx.RNN`."""
    rngs = nnx.Rngs(0)
    cell = nnx.OptimizedLSTMCell(width, width, rngs=rngs)
    return nnx.List([nnx.RNN(cell), nnx.Linear(width, CLASSES, use_bias=False, rngs=rngs)])


def loss_of_recurrent_layers(layers: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """As `recurrent`."""
    zeros = jnp.zeros((x.shape[0], x.shape[2]), x.dtype)
    return cross_entropy(layers[1](layers[0](x, initial_carry=(zeros, zeros))[:, -1]), y)


def convolutional_layers(nnx: Any, width: int) -> Any:
    """The same network of `nnx.Conv`."""
    rngs = nnx.Rngs(0)
    convolutions = [
        nnx.Conv(channels, width, (3, 3), use_bias=False, rngs=rngs) for channels in (8, width)
    ]
    return nnx.List([*convolutions, nnx.Linear(width, CLASSES, use_bias=False, rngs=rngs)])


def loss_of_convolutional_layers(layers: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """As `convolutional`."""
    for layer in layers[:-1]:
        x = jax.nn.relu(layer(x))
    return cross_entropy(layers[-1](x.mean((1, 2))), y)


NETWORKS = {
    "dense": Network(
        text="two hidden layers of {width} units",
        loss=dense,
        shapes=lambda n: [{"kernel": (n, out), "bias": (out,)} for out in (n, n, CLASSES)],
        example=lambda n: (n,),
        layers=dense_layers,
        loss_of_layers=loss_of_dense_layers,
        width=256,
    ),
    "lstm": Network(
        text="an LSTM of {width} units over 20 steps",
        loss=recurrent,
        shapes=lambda n: {
            "input": (n, 4 * n), "recurrent": (n, 4 * n), "bias": (4 * n,), "output": (n, CLASSES)
        },
        example=lambda n: (20, n),
        layers=recurrent_layers,
        loss_of_layers=loss_of_recurrent_layers,
        width=128,
    ),
    "conv": Network(
        text="two convolutions to {width} channels on 8 × 8 images",
        loss=convolutional,
        shapes=lambda n: {"kernels": [(3, 3, 8, n), (3, 3, n, n)], "output": (n, CLASSES)},
        example=lambda n: (8, 8, 8),
        layers=convolutional_layers,
        loss_of_layers=loss_of_convolutional_layers,
        width=64,
    ),
}  # fmt: skip


def weights_of(network: Network) -> Any:
    """Small normal numbers."""
    rng = np.random.default_rng(0)
    shapes, treedef = jax.tree.flatten(
        network.shapes(network.width), is_leaf=lambda x: isinstance(x, tuple)
    )
    arrays = [rng.standard_normal(shape) / math.prod(shape[:-1]) ** 0.5 for shape in shapes]
    return treedef.unflatten([jnp.asarray(array, jnp.float32) for array in arrays])


def examples(network: Network, batch: int) -> tuple[jax.Array, jax.Array]:
    """Made-up inputs and classes."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((batch, *network.example(network.width))), jnp.float32)
    return x, jnp.asarray(rng.integers(0, CLASSES, batch), jnp.int32)


def ours(network: Network, microbatch: int | None) -> Callable[..., Any]:
    """This library."""
    f = gradclip_jax.per_example.value_and_grad(
        network.loss, max_norm=MAX_NORM, microbatch_size=microbatch
    )
    return lambda params, x, y: f(params, x, y)[1]


def with_ghost_clipping(network: Network, nnx: Any, graph: Any, microbatch: int | None) -> Any:
    """The same network of layers, and the gradients of their kernels never formed."""
    f = gradclip_jax.per_example.value_and_grad(
        network.loss_of_layers, max_norm=MAX_NORM, microbatch_size=microbatch, ghost=True
    )
    return lambda state, x, y: f(nnx.merge(graph, state), x, y)[1]


def with_optax(network: Network) -> Callable[..., Any]:
    """As its documentation does it: all gradients at once."""

    def clip(params: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.vmap(jax.grad(network.loss), (None, 0, 0))(params, x[:, None], y[:, None])
        return optax.per_example_global_norm_clip(grads, MAX_NORM)[0]

    return clip


def with_jax_privacy(network: Network, module: Any, microbatch: int | None) -> Callable[..., Any]:
    """Its `clipped_grad`."""
    return module.clipped_grad(
        network.loss, l2_clip_norm=MAX_NORM, batch_argnums=(1, 2), microbatch_size=microbatch
    )


def cases_of(
    network: Network, weights: Any, batch: int, microbatch: int, nnx: Any, privacy: Any
) -> list[Case]:
    """Name, micro-batch, function and weights; jax-privacy takes only what divides the batch."""
    graph, state = nnx.split(network.layers(nnx, network.width)) if nnx else (None, None)
    cases: list[Case] = []
    for size in dict.fromkeys((min(microbatch, batch), batch)):
        whole = None if size == batch else size
        cases.append(("gradclip_jax", str(size), ours(network, whole), weights))
        if nnx is not None:
            ghost = with_ghost_clipping(network, nnx, graph, whole)
            cases.append(("gradclip_jax, ghost", str(size), ghost, state))
        if privacy is not None and batch % size == 0:
            theirs = with_jax_privacy(network, privacy, whole)
            cases.append(("jax-privacy", str(size), theirs, weights))
        if size == batch:
            cases.append(("optax", str(size), with_optax(network), weights))
    return cases


def rows_of(
    network: Network, weights: Any, batch: int, microbatch: int, args: argparse.Namespace
) -> Any:
    """The rows of one network and batch."""
    data = examples(network, batch)
    programs, runs = {}, {}
    peers = harness.peer("flax.nnx"), harness.peer(PRIVACY)
    found = cases_of(network, weights, batch, microbatch, *peers)
    for library, size, function, given in found:
        harness.progress(network.title(), f"batch {batch}", library, f"micro-batch {size}")
        program = harness.compiled(function, given, *data)
        programs[library, size] = program
        runs[f"{library} {size}"] = functools.partial(program.run, given, *data)
    copies = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    times = harness.interleaved(runs, rounds=args.rounds, seconds=args.seconds)
    for (library, size), program in programs.items():
        of_case = times[f"{library} {size}"]
        yield [
            batch, size, library, digits(program.temporary / copies), Spread.of(of_case, 1e3),
            Spread.of(ratios(of_case, times[f"gradclip_jax {size}"])),
        ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure per-example clipping against the batch.")
    add = parser.add_argument
    add("--batches", default="16,64,256", help="examples, by comma (%(default)s)")
    add("--microbatch", default="16", help="examples whose gradients exist at once (%(default)s)")
    widths = ", ".join(f"{network.width} {name}" for name, network in NETWORKS.items())
    add("--width", help=f"units or channels of a layer ({widths})")
    add("--networks", default=",".join(NETWORKS), help="some of %(default)s")
    return harness.run("Per-example clipping", parser, measure, argv)


def measure(args: argparse.Namespace) -> str:
    """A table for each network."""
    batches = harness.numbers("--batches", args.batches)
    networks = [NETWORKS[name] for name in harness.chosen("--networks", args.networks, NETWORKS)]
    if args.width is not None:
        width = harness.number("--width", args.width)
        networks = [network._replace(width=width) for network in networks]
    microbatch = harness.number("--microbatch", args.microbatch)
    parts = [TEXT.format(rounds=args.rounds)]
    if harness.peer(PRIVACY) is None:
        parts.append("jax-privacy: not installed, skipped.\n\n")
    header = ("batch", "micro-batch", "library", "memory (weights)", "ms", "ratio to ours")
    for network in networks:
        weights = weights_of(network)
        count = sum(leaf.size for leaf in jax.tree.leaves(weights))
        rows = [
            row for batch in batches for row in rows_of(network, weights, batch, microbatch, args)
        ]
        parts.append(f"### A network with {network.title()}, {count:,} weights\n\n")
        parts.append(harness.table(header, rows) + "\n")
    return "".join(parts).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(main())
