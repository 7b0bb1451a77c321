"""What a clip adds to a training step: this library, optax and PyTorch, beside the bare norm.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --quick
    python benchmarks/step_overhead.py --trees gpt2 --dtypes bfloat16 --optimizers sgd

The overhead is the time of a step with the clip minus that of the step alone in the same round.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from harness import Spread, differences, digits, ratios

import gradclip_jax

MAX_NORM = 1.0
LEARNING_RATE = 1e-3
Shape = tuple[int, ...]


class Tree(NamedTuple):
    """The shapes of parameters, and in which dtypes and with which optimizers they are measured."""

    words: str
    shapes: Sequence[Shape]
    dtypes: Sequence[str] = ("float32", "bfloat16", "mixed")
    optimizers: Sequence[str] = ("adamw", "sgd")


def lstm_shapes(units: int = 650, vocabulary: int = 10_000) -> list[Shape]:
    """The medium LSTM of Zaremba et al. (2014): embedding, two layers, softmax."""
    layer = [(2 * units, 4 * units), (4 * units,)]
    return [(vocabulary, units), *layer, *layer, (units, vocabulary), (vocabulary,)]


def gpt2_shapes(width: int = 768, layers: int = 12, vocabulary: int = 50_257) -> list[Shape]:
    """GPT-2 of 124M parameters: embeddings, blocks, and the last normalisation."""
    normalisation = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = [*normalisation, *attention, *normalisation, *perceptron]
    return [(vocabulary, width), (1024, width), *layers * block, *normalisation]


WHOLE = ("float32", "bfloat16")
TREES = {
    "large": Tree("one leaf of 4096 × 4096", [(4096, 4096)], WHOLE),
    "lstm": Tree("an LSTM language model", lstm_shapes()),
    "gpt2": Tree("GPT-2 124M", gpt2_shapes(), optimizers=("adamw",)),
    "500": Tree("500 leaves of 64 × 64", 500 * [(64, 64)], WHOLE),
    # Each of its programs takes minutes to compile.
    "2000": Tree("2,000 leaves of 32 × 32", 2000 * [(32, 32)], WHOLE[:1], ("adamw",)),
}
EAGER = {"GPT-2's 148": gpt2_shapes(), "148 of 64 elements": 148 * [(64,)]}
DTYPES = ("float32", "bfloat16", "mixed")
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(LEARNING_RATE),
    "sgd": lambda: optax.sgd(LEARNING_RATE),
}
QUICK = {"trees": "large,lstm,500", "dtypes": "float32", "optimizers": "adamw"}


def norm_alone(seen: Callable[[Any], Any]) -> optax.GradientTransformation:
    """It returns the norm of what is seen of the updates, and leaves them as they are."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del state, params
        return updates, optax.tree.norm(seen(updates)).astype(jnp.float32)

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


CLIPS: dict[str, Callable[[], Any]] = {
    "no clip": optax.identity,
    # Without a barrier XLA shares the squares with AdamW, and for that writes them to memory.
    "bare norm": lambda: norm_alone(jax.lax.optimization_barrier),
    "logged norm": lambda: norm_alone(lambda updates: updates),
    "gradclip_jax": lambda: gradclip_jax.clip_by_global_norm(MAX_NORM),
    "optax": lambda: optax.clip_by_global_norm(MAX_NORM),
}
FOREACH = {"torch": None, "torch foreach": True, "torch loop": False}
"""What is passed to `clip_grad_norm_`; None is the step alone."""


def step_of(optimizer: Any, clip: Any) -> Callable[..., Any]:
    """A training step after its backward pass: gradients in; params and states in and out."""

    def step(params: Any, state: Any, clip_state: Any, grads: Any) -> Any:
        updates, clip_state = clip.update(grads, clip_state)
        updates, state = optimizer.update(updates, state, params)
        return optax.apply_updates(params, updates), state, clip_state

    return step


def dtype_of(shape: Shape, name: str) -> Any:
    """In a mixed tree matrices are bfloat16 and vectors float32."""
    half = name == "bfloat16" or (name == "mixed" and len(shape) > 1)
    return ml_dtypes.bfloat16 if half else np.float32


def gradients(shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Normal numbers, so that the clip acts."""
    draw = np.random.default_rng(0)
    return [draw.standard_normal(shape, np.float32) for shape in shapes]


def placed(arrays: Sequence[np.ndarray], dtype: str, scale: float = 1.0) -> list[jax.Array]:
    """Leaves on the device."""
    # A copy: what shares its memory with NumPy cannot be donated.
    return [jnp.array(scale * x, dtype_of(x.shape, dtype), copy=True) for x in arrays]


# --- one row ---


class Row(NamedTuple):
    """What was measured of one tree, dtype and optimizer."""

    names: list[str]
    times: dict[str, list[float]]
    programs: dict[str, harness.Program]
    params_bytes: int

    def overhead(self, name: str) -> list[float]:
        """Seconds that a clip adds, round by round."""
        alone = "torch" if name.startswith("torch") else "no clip"
        return differences(self.times[name], self.times[alone])

    def relative(self, name: str, other: str) -> Spread:
        """The overhead of one over that of another."""
        return Spread.of(ratios(self.overhead(name), self.overhead(other)))

    def milliseconds(self, name: str) -> Spread:
        """The overhead as a cell."""
        return Spread.of(self.overhead(name), 1e3)

    def alone(self, name: str) -> Spread:
        """The step without a clip as a cell."""
        return Spread.of(self.times[name], 1e3)


def measure_row(
    tree: str, dtype: str, optimizer: str, clips: Sequence[str], torch: Any, **rounds: Any
) -> Row:
    """Runs the steps of all libraries in turn."""
    arrays = gradients(TREES[tree].shapes)
    cases, programs, params_bytes = jax_cases(arrays, dtype, optimizer, clips)
    if torch is not None:
        cases |= torch_cases(torch, arrays, dtype, optimizer)
    times = harness.interleaved(cases, **rounds)
    return Row([TREES[tree].words, dtype, optimizer], times, programs, params_bytes)


def jax_cases(
    arrays: Sequence[np.ndarray], dtype: str, optimizer: str, clips: Sequence[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, harness.Program], int]:
    """Donated steps, which share params and optimizer state to save memory."""
    make = OPTIMIZERS[optimizer]()
    grads, params = placed(arrays, dtype), placed(arrays, dtype, 0.02)
    shared = [params, make.init(params)]
    programs, cases = {}, {}
    for name in clips:
        clip = CLIPS[name]()
        own = [clip.init(params)]
        program = harness.compiled(step_of(make, clip), *shared, *own, grads, donate=(0, 1))

        def run(program: harness.Program = program, own: list[Any] = own) -> Any:
            shared[0], shared[1], own[0] = program.run(*shared, *own, grads)
            return shared, own

        programs[name], cases[name] = program, run
    return cases, programs, sum(leaf.nbytes for leaf in params)


def torch_cases(
    torch: Any, arrays: Sequence[np.ndarray], dtype: str, optimizer: str
) -> dict[str, Callable[[], None]]:
    """Eager steps of PyTorch, with the optimizer fused where it can be."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    params = []
    for x in arrays:
        kind = torch.float32 if dtype_of(x.shape, dtype) == np.float32 else torch.bfloat16
        grad = torch.from_numpy(x).to(device, kind, copy=True)
        params.append(torch.nn.Parameter(0.02 * grad))
        params[-1].grad = grad
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    try:
        stepper = make(params, lr=LEARNING_RATE, fused=True)
    except (RuntimeError, TypeError):
        stepper = make(params, lr=LEARNING_RATE)

    def run(foreach: bool | None) -> None:
        if foreach is not None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)
        stepper.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return {name: lambda how=how: run(how) for name, how in FOREACH.items()}


def eager_row(words: str, shapes: Sequence[Shape], torch: Any, **rounds: Any) -> list[Any]:
    """Cells: milliseconds of a clip that is called outside any `jit`."""
    arrays = gradients(shapes)
    grads = placed(arrays, "float32")
    cases = {}
    for name in ("gradclip_jax", "optax"):
        clip = CLIPS[name]()
        state = clip.init(grads)
        cases[name] = lambda clip=clip, state=state: clip.update(grads, state)
    if torch is not None:
        steps = torch_cases(torch, arrays, "float32", "sgd")
        cases |= {name: steps[name] for name in ("torch", "torch foreach")}
    times = harness.interleaved(cases, **rounds)
    cells = [Spread.of(times[name], 1e3) for name in ("gradclip_jax", "optax")]
    cells.append(Spread.of(ratios(times["gradclip_jax"], times["optax"])))
    if torch is not None:
        foreach = differences(times["torch foreach"], times["torch"])
        cells.append(Spread.of(foreach, 1e3))
    return [words, *cells]


# --- the report ---

TEXT = """\
One step after the backward pass: gradients in, params and states in and out and donated. Gradients
are normal numbers, so that the clip acts. The overhead is the time with the clip minus the time of
the step alone in the same round. The bare norm is the floor: the step also returns
`optax.tree.norm` of its gradients, behind a barrier that keeps XLA from sharing their squares
with the optimizer. The logged norm is the same without the barrier, as a training loop would write
it. Cells are medians over at most {rounds} rounds and, in brackets, quartiles; ratios are ratios of
overheads.

"""
TORCH_TEXT = """\
PyTorch runs eagerly with its optimizer fused where it can be, and clips by
`torch.nn.utils.clip_grad_norm_`, with `foreach=True` and, as a loop, with `foreach=False`.

"""
COMPILED_TEXT = """\
Seconds to trace, lower and compile the step, and the memory that it allocates beside its arguments
and results, as part of that of the parameters.

"""
EAGER_TEXT = """\
`clip.update(grads, state)` outside any `jit`, in milliseconds, float32, nothing donated. PyTorch's
is the overhead in front of SGD.

"""
NAMES = ("tree", "dtype", "optimizer")


def report(
    rows: Sequence[Row], eager: Sequence[Sequence[Any]], rounds: int, torch: bool, skipped: str
) -> str:
    """All tables; those of PyTorch where it was measured."""
    parts = [TEXT.format(rounds=rounds), skipped]
    header = (
        *NAMES, "step alone, ms", *(f"{name}, ms" for name in CLIPS if name != "no clip"),
        "gradclip_jax / bare norm", "gradclip_jax / optax",
    )  # fmt: skip
    parts += [harness.table(header, map(jax_cells, rows)), "\n"]
    if torch:
        header = (
            *NAMES, "step alone, ms", "foreach, ms", "loop, ms",
            "gradclip_jax / foreach", "gradclip_jax / loop",
        )  # fmt: skip
        parts += [TORCH_TEXT, harness.table(header, map(torch_cells, rows)), "\n"]
    units = [f"{name}{unit}" for unit in (", s", ", %") for name in CLIPS]
    parts += [COMPILED_TEXT, harness.table((*NAMES, *units), map(compiled_cells, rows)), "\n"]
    if eager:
        header = ["leaves", "gradclip_jax", "optax", "gradclip_jax / optax"]
        header += ["torch foreach"] if torch else []
        parts += [EAGER_TEXT, harness.table(header, eager)]
    return "".join(parts)


def jax_cells(row: Row) -> list[Any]:
    """A row of the first table."""
    return [
        *row.names,
        row.alone("no clip"),
        *(row.milliseconds(name) for name in row.programs if name != "no clip"),
        row.relative("gradclip_jax", "bare norm"),
        row.relative("gradclip_jax", "optax"),
    ]


def torch_cells(row: Row) -> list[Any]:
    """A row of the second table."""
    ways = ("torch foreach", "torch loop")
    return [
        *row.names,
        row.alone("torch"),
        *(row.milliseconds(name) for name in ways),
        *(row.relative("gradclip_jax", name) for name in ways),
    ]


def compiled_cells(row: Row) -> list[Any]:
    """A row of the third table."""
    programs = row.programs.values()
    return [
        *row.names,
        *(digits(program.seconds) for program in programs),
        *(digits(100 * program.temporary / row.params_bytes) for program in programs),
    ]


# --- the command line ---


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; bad input ends in one line on stderr and exit status 2."""
    parser = harness.command_line("Measure what a clip adds to a training step.")
    add = parser.add_argument
    add("--trees", help=f"trees, by comma ({','.join(TREES)})")
    add("--dtypes", help="dtypes, by comma (those of the tree)")
    add("--optimizers", help="optimizers, by comma (those of the tree)")
    add("--eager", action=argparse.BooleanOptionalAction, help="measure the clip outside jit, too")
    add("--quick", action="store_true", help=" ".join(f"--{k} {v}" for k, v in QUICK.items()))
    return harness.run("Overhead in a training step", parser, measure, argv)


def measure(args: argparse.Namespace) -> str:
    """All rows that were asked for."""
    rows = [*wanted(args)]
    torch, skipped = harness.torch_beside_jax()
    rounds = {"rounds": args.rounds, "seconds": args.seconds}
    measured = []
    for row in rows:
        harness.progress(TREES[row[0]].words, *row[1:])
        measured.append(measure_row(*row, [*CLIPS], torch, **rounds))
    eager = []
    if args.eager or (args.eager is None and not args.quick):
        for words, shapes in EAGER.items():
            harness.progress("eager", words)
            eager.append(eager_row(words, shapes, torch, **rounds))
    return report(measured, eager, args.rounds, torch is not None, skipped)


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Trees with their dtypes and optimizers."""
    known: Mapping[str, Any] = {"trees": TREES, "dtypes": DTYPES, "optimizers": OPTIMIZERS}
    chosen = {}
    for name in known:
        text = QUICK[name] if args.quick and getattr(args, name) is None else getattr(args, name)
        if text is not None:
            chosen[name] = harness.chosen(f"--{name}", text, known[name])
    for name in chosen.get("trees", TREES):
        tree = TREES[name]
        for dtype, optimizer in itertools.product(
            chosen.get("dtypes", tree.dtypes), chosen.get("optimizers", tree.optimizers)
        ):
            yield name, dtype, optimizer


if __name__ == "__main__":
    sys.exit(main())
