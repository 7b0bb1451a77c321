"""Tokens a second in training the LSTM of Zaremba et al. 2014: in JAX, and beside it in PyTorch.

    python benchmarks/lstm_throughput.py
    python benchmarks/lstm_throughput.py --presets zaremba-small,zaremba-medium

Both take the same steps: forward, backward through time, clip by the global norm, SGD. They start
from the same weights and read the same tokens, which are random.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import harness
import jax
import numpy as np
import optax
from flax import nnx
from harness import Spread

import gradclip_jax
from examples.language_model.model import LanguageModel, train_step
from examples.language_model.presets import PRESETS

VOCABULARY = 10_000
STEPS = 5
"""Steps of a round, one after another without a pause, as in training."""
SECONDS = 60.0
Pieces = list[tuple[np.ndarray, np.ndarray]]


class Steps(NamedTuple):
    """What takes the next steps of a model, and the loss and gradient norm of the first one."""

    run: Callable[[], Any]
    loss: float
    norm: float


def pieces(recipe: Mapping[str, Any]) -> Pieces:
    """Inputs and targets of [unroll, batch], one pair for each step of a round."""
    draw, shape = np.random.default_rng(0), (recipe["unroll"], recipe["batch"])
    drawn = draw.integers(0, VOCABULARY, (STEPS, 2, *shape)).astype(np.int32)
    return [(inputs, targets) for inputs, targets in drawn]


def network(recipe: Mapping[str, Any]) -> LanguageModel:
    """The model of `examples/language_model/train.py --preset …`."""
    return LanguageModel(
        VOCABULARY, "lstm", recipe["layers"], recipe["units"], recipe["dropout"],
        scale=recipe["init_scale"], forget_bias=recipe["forget_bias"], rngs=nnx.Rngs(0),
    )  # fmt: skip


def jax_steps(recipe: Mapping[str, Any]) -> Steps:
    """The step of the example, which is compiled and donates its arguments."""
    model = network(recipe)
    clip = gradclip_jax.clip_by_global_norm(recipe["max_norm"])
    chain = optax.chain(clip, optax.sgd(recipe["learning_rate"]))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    carry = [model.start(recipe["batch"])]
    read = pieces(recipe)

    def run(count: int = STEPS) -> dict[str, jax.Array]:
        scalars = {}
        for inputs, targets in read[:count]:
            carry[0], scalars = train_step(
                model, optimizer, carry[0], inputs, targets, mean_loss=False
            )
        return scalars

    first = run(1)
    return Steps(run, float(first["loss"]), float(first["grad_norm"]))


def torch_steps(torch: Any, recipe: Mapping[str, Any]) -> Steps:
    """The same model of `nn.Embedding`, `nn.LSTM` and `nn.Linear`, run eagerly."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    units, layers = recipe["units"], recipe["layers"]
    embedding = torch.nn.Embedding(VOCABULARY, units)
    lstm = torch.nn.LSTM(units, units, layers, dropout=recipe["dropout"])
    output = torch.nn.Linear(units, VOCABULARY)
    dropout = torch.nn.Dropout(recipe["dropout"])
    model = torch.nn.ModuleList([embedding, lstm, output, dropout]).to(device)
    weights = {"0.weight": (ours := network(recipe)).embedding[...]}
    weights |= {"2.weight": ours.output[...].T, "2.bias": ours.output_bias[...]}
    for i, layer in enumerate(ours.layers):
        weights[f"1.weight_ih_l{i}"] = layer.input[...].T
        weights[f"1.weight_hh_l{i}"] = layer.recurrent[...].T
        weights[f"1.bias_ih_l{i}"] = layer.bias[...]
    for name, parameter in model.named_parameters():
        # The second bias of PyTorch's layer would only double the steps of the first.
        parameter.requires_grad_(name in weights)
        value = np.array(weights[name]) if name in weights else np.zeros(parameter.shape)
        parameter.data.copy_(torch.from_numpy(value))
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = recipe["learning_rate"]
    try:
        optimizer = torch.optim.SGD(params, lr=rate, fused=True)
    except (RuntimeError, TypeError):
        optimizer = torch.optim.SGD(params, lr=rate)
    read = [[torch.from_numpy(x).long().to(device) for x in piece] for piece in pieces(recipe)]
    carry: list[Any] = [None]

    def run(count: int = STEPS) -> tuple[Any, Any]:
        nats = norm = None
        for inputs, targets in read[:count]:
            optimizer.zero_grad()
            hidden, state = lstm(dropout(embedding(inputs)), carry[0])
            logits = output(dropout(hidden))
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (nats * len(inputs)).backward()
            norm = torch.nn.utils.clip_grad_norm_(params, recipe["max_norm"])
            optimizer.step()
            carry[0] = tuple(part.detach() for part in state)
        if device == "cuda":
            torch.cuda.synchronize()
        return nats, norm

    nats, norm = run(1)
    return Steps(run, nats.item(), norm.item())


def row(preset: str, torch: Any, rounds: int, seconds: float) -> list[Any]:
    """Cells of one preset."""
    recipe = PRESETS[preset]
    cases = {"jax": jax_steps(recipe)}
    if torch is not None:
        cases["torch"] = torch_steps(torch, recipe)
    times = harness.interleaved({name: case.run for name, case in cases.items()}, rounds, seconds)
    tokens = STEPS * recipe["batch"] * recipe["unroll"]
    speeds = [Spread.of([tokens / time for time in taken]) for taken in times.values()]
    cells = [preset, tokens // STEPS, *speeds]
    if torch is not None:
        # The ratio of the speeds is that of the times the other way round.
        cells.append(Spread.of(harness.ratios(times["torch"], times["jax"])))
    cells += [f"{case.loss:.4f}, {case.norm:.4f}" for case in cases.values()]
    return cells


TEXT = """\
Tokens a second in whole training steps: forward, backward through time, clip by the global norm,
SGD, on {vocabulary:,} words. JAX is the step of `examples/language_model/train.py` behind
`clip_by_global_norm`; PyTorch is `nn.LSTM` with `clip_grad_norm_`, run eagerly. The two take
{steps} steps in turn, and cells are medians over at most {rounds} rounds and, in brackets,
quartiles. They start from the same weights: the last columns are loss and gradient norm in the
first step.

"""


def measure(args: argparse.Namespace) -> str:
    """The table of all presets that were asked for."""
    names = [name for name, recipe in PRESETS.items() if "init_scale" in recipe]
    presets = harness.chosen("--presets", args.presets, names)
    torch, skipped = harness.torch_beside_jax()
    rows = []
    for preset in presets:
        harness.progress(preset)
        rows.append(row(preset, torch, args.rounds, args.seconds))
    both = ["JAX", "PyTorch"] if torch is not None else ["JAX"]
    header = ["preset", "tokens a step", *(f"{name}, tokens/s" for name in both)]
    header += ["JAX / PyTorch"] if torch is not None else []
    header += [f"{name}, first loss and norm" for name in both]
    text = TEXT.format(vocabulary=VOCABULARY, steps=STEPS, rounds=args.rounds)
    return text + skipped + harness.table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure how fast an LSTM language model trains.")
    parser.add_argument("--presets", default="zaremba-small", help="by comma (%(default)s)")
    parser.set_defaults(seconds=SECONDS)
    return harness.run("Throughput of an LSTM", parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
