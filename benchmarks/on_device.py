"""What a clip costs on the accelerator of this machine: the steps of `programs.py`, run for real.

    PYTHONPATH=. python3 benchmarks/on_device.py --out benchmarks/results
    PYTHONPATH=. python3 benchmarks/on_device.py --only strategies
    PYTHONPATH=. python3 benchmarks/on_device.py --small

It needs jax, optax and numpy, ends within `--budget` seconds, and writes `on_<device>.md` after
every row. What fails or does not compile in time says so in its cell. `--small` tries everything
out on tiny shapes.
"""

import contextlib
import functools
import itertools
import math
import os
import platform
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
from harness import Spread, differences, digits, ratios
from programs import ADAMW, CLIPS, DTYPES, PROGRAMS, Program
from strategies import BASE, SLOW, STRATEGIES

import gradclip_jax as gj

BUDGET, SECONDS = 450.0, 2.0
STEPS, BLOCK = 20, 0.03
"""Steps between two waits for the device: so many, or seconds. After 32 jax itself waits."""
PATIENCE = 75.0
"""Seconds after which a program that still compiles is given up on."""
NORMALS = np.random.default_rng(0).standard_normal(999_983, np.float32)
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
"""The compiler's option by which it makes no CUDA graph of a program."""

TINY = programs.decoder(1, 16, 32, output=(16, 32))
SMALL: dict[str, Callable[..., Program]] = {
    "matmul step": functools.partial(programs.matmul_step, rows=8, inputs=8, outputs=16),
    "Transformer step": functools.partial(
        programs.language_model, TINY, programs.transformer, 2, 8
    ),
    "LSTM step": functools.partial(
        programs.language_model, programs.lstm_layer(16, 32), programs.lstm, 2, 8
    ),
    "update of GPT-2": functools.partial(programs.update, programs.decoder(1, 8, 32)),
    "update of a mixture of experts": functools.partial(
        programs.update, programs.experts(1, 16, 2, 32)
    ),
    "update of 500 of 64 x 64": functools.partial(programs.update, {"w": (4, 4), "v": (4, 4)}),
    "update of one leaf of 4096 x 4096": functools.partial(programs.update, {"w": (8, 8)}),
}
"""What `--small` runs instead; LLaMA does not fit one device."""
ROWS = [
    (name, dtype)
    for dtype in DTYPES
    for name in SMALL
    if dtype == "float32" or "500" not in name  # half a minute to compile
]
CAPTURED = ("Transformer step", "update of GPT-2", "update of a mixture of experts")
REDUCED = ("matmul step", "Transformer step", "update of GPT-2", "update of a mixture of experts")
REDUCTIONS = {
    "as on CPU": "cpu",  # a branch, and a barrier before it
    "as on TPU": "tpu",  # a branch
    "as on GPU": "cuda",  # three sums of one read
}
EXPERTS = "update of a mixture of experts"
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "skip_nonfinite": lambda: gj.skip_nonfinite(ADAMW),
    "skip_spikes": lambda: gj.skip_spikes(ADAMW, grad_norm=gj.limits.ema(6.0)),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(ADAMW, 5),
}
"""They own the optimizer, while all others stand before it."""
BESIDE: dict[str, Callable[[], Any]] = {
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "optax.clip": lambda: optax.clip(1.0),
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
}
LATE = "not measured: the time was over"
AT_A_TIME = 8
"""Strategies that are run in turn, and compiled at the same time."""


class Plan(NamedTuple):
    """How long, how often, and at which size."""

    rounds: int
    seconds: float
    small: bool
    budget: float
    began: float

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self.began)

    def program(self, name: str) -> Callable[..., Program]:
        """A program at the size that was asked for."""
        return SMALL[name] if self.small else PROGRAMS[name]


# --- one variant of a program ---


class Variant:
    """A compiled step with arguments of its own, which goes on where it stopped."""

    def __init__(self, made: Program, options: Mapping[str, Any] | None = None):
        self.own = values(made)
        self.compiled = harness.compiled(made.step, *self.own, donate=made.donate, options=options)
        self.steps, self.took = 1, 0.0
        self.calls: list[float] = []

    def first(self) -> None:
        """Finds out whether it runs, and how many steps make a block."""
        for _ in range(2):  # the first one loads
            start = time.perf_counter()
            jax.block_until_ready(self.block())
            self.took = (time.perf_counter() - start) / self.steps
            self.steps = max(1, min(STEPS, int(BLOCK / self.took)))
        self.calls.clear()

    def block(self) -> Any:
        """Some steps without a wait, and in `calls` how long a call took to return."""
        start = time.perf_counter()
        for _ in range(self.steps):
            self.own[0], self.own[1] = self.compiled.run(*self.own)
        self.calls.append((time.perf_counter() - start) / self.steps)
        return self.own[:2]

    def moved(self) -> float:
        """Bytes that a step reads and writes by the compiler's count, else its arguments once."""
        costs: Any = self.compiled.run.cost_analysis() or {}
        return costs.get("bytes accessed") or sum(leaf.nbytes for leaf in jax.tree.leaves(self.own))


def values(made: Program) -> list[Any]:
    """Params, state and inputs on the device: normal numbers and, for integers, tokens."""
    params, _, *inputs = made.arguments
    words = made.arguments[0].get("embedding", jax.ShapeDtypeStruct((1,), int)).shape[0]
    start = itertools.count(step=7919)

    def drawn(leaf: jax.ShapeDtypeStruct, scale: float) -> jax.Array:
        size = math.prod(leaf.shape)
        numbers = np.resize(np.roll(NORMALS, next(start)), size).reshape(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            numbers = (np.abs(numbers) * words) % words
        # A copy: what shares its memory with NumPy cannot be donated.
        return jnp.array(numbers * np.float32(scale), leaf.dtype, copy=True)

    weights = jax.tree.map(lambda leaf: drawn(leaf, 0.02), params)
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), made.init(weights))
    return [weights, state, *(jax.tree.map(lambda x: drawn(x, 1), tree) for tree in inputs)]


class Measured(NamedTuple):
    """Variants that ran in turn, the seconds of each step, and why the others did not."""

    variants: dict[str, Variant]
    times: dict[str, list[float]]
    failures: dict[str, str]

    def cell(self, name: str, value: Callable[[str], Any]) -> str:
        """What is told of a variant, or why it failed."""
        if name in self.failures:
            return self.failures[name]
        try:
            return str(value(name))
        except KeyError:  # what it is compared with failed
            return ""

    def beside(self, name: str, value: Callable[[str], Any]) -> str:
        """A further cell: the reason stands in the first one."""
        return "failed" if name in self.failures else self.cell(name, value)

    def microseconds(self, name: str) -> Spread:
        """Of a step."""
        return Spread.of(self.times[name], 1e6)

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as long as another in the same round."""
        return Spread.of(ratios(self.times[name], self.times[other]))

    def overhead(self, name: str, end: str = "") -> str:
        """What a clip adds to the step over what that of optax adds, if that is to be seen."""
        alone = self.times[f"none{end}"]
        one, two = (
            float(np.median(differences(self.times[key], alone))) for key in (name, f"optax{end}")
        )
        return digits(one / two) if two > 0.01 * float(np.median(alone)) else "–"

    def compile_seconds(self, name: str) -> str:
        """To trace, lower and compile."""
        return digits(self.variants[name].compiled.seconds)

    def host(self, name: str) -> str:
        """Microseconds until a call returns."""
        return digits(1e6 * float(np.median(self.variants[name].calls)))


def measured(makes: Mapping[str, Callable[[], Variant]], plan: Plan, parallel: bool) -> Measured:
    """Compile variants, in parallel or one after the other, and run them in turn."""
    variants, failures = {}, {}
    results = {name: started(make) for name, make in makes.items()} if parallel else {}
    until = time.perf_counter() + PATIENCE
    for name, make in makes.items():
        patience = until - time.perf_counter() if parallel else PATIENCE
        try:
            ready = results[name] if parallel else started(make)
            variant = ready(min(patience, plan.left()))
            variant.first()
            variants[name] = variant
        except Exception as error:
            failures[name] = failed(error)
    runs = {name: variant.block for name, variant in variants.items()}
    try:
        seconds = min(plan.seconds, max(0, plan.left()))
        least = 2 if any(variant.took > 0.5 for variant in variants.values()) else harness.LEAST
        times = harness.interleaved(runs, plan.rounds, seconds, least)
    except Exception as error:
        return Measured({}, {}, failures | dict.fromkeys(variants, failed(error)))
    for name, variant in variants.items():
        times[name] = [seconds / variant.steps for seconds in times[name]]
        variant.own.clear()  # the memory is for the next ones
    return Measured(variants, times, failures)


def started(make: Callable[[], Variant]) -> Callable[[float], Variant]:
    """Begin in a thread; what is returned waits for the result, but not forever."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((make(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()

    def result(seconds: float) -> Variant:
        try:
            made, error = results.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            raise TimeoutError(f"not compiled after {seconds:.0f} s") from None
        if error is not None:
            raise error
        return made

    return result


def failed(error: Exception) -> str:
    """One line that fits into a cell."""
    words = str(error).strip() or type(error).__name__
    harness.progress(f"failed: {type(error).__name__}: {words[:2000]}")
    return f"failed: {words.splitlines()[0][:80]}".replace("|", "/")


def clipped(
    make: Callable[..., Program], dtype: str, options: Mapping[str, Any] | None = None
) -> dict[str, Callable[[], Variant]]:
    """A program without a clip, with that of optax, and with ours."""
    return {
        name: functools.partial(variant, make, dtype, clip, options) for name, clip in CLIPS.items()
    }


def variant(
    make: Callable[..., Program], dtype: str, clip: Any, options: Mapping[str, Any] | None = None
) -> Variant:
    """A program with a clip."""
    return Variant(make(dtype, clip), options)


def is_update(name: str) -> bool:
    """Whether a program has no matrix product: those are tuned on the device, one at a time."""
    return name.startswith("update of")


# --- sections: each yields its text again after every row ---

STEPS_TEXT = """\
One step in microseconds, without a clip, with `optax.clip_by_global_norm(1.0)` and with that of
gradclip_jax. Parameters and state are donated and come back as the next arguments; all numbers are
random. Blocks of at most {steps} steps run in turn (A, B, C, A, B, C, …), and the host waits for
the device once at the end of each. Cells are medians over the blocks and, in brackets, quartiles;
ratios are taken within a round. The overhead is the time with a clip less the time without; it is
not compared where optax's is below 1 % of the step.

"""
MORE_TEXT = """\

Each cell: none / optax / gradclip_jax. The host's time is that until a call returns; where it is
near the time of the step, the step waits for the host. The bandwidth is that of the bytes by the
compiler's count of an update, as a share of what a copy has here: {copy} GB/s, read and written.
The three programs of an update compile at the same time, those of a step one after the other.

"""


def steps(plan: Plan) -> Iterator[str]:
    """Steps and updates in all dtypes."""
    copy = copy_speed(plan)
    header = ["program", "dtype", *(f"{name}, µs" for name in CLIPS), "optax / none"]
    header += ["gradclip_jax / none", "gradclip_jax / optax", "overhead / optax's"]
    of_host = ["program", "dtype", "host, µs", "bandwidth, %", "compile, s", "temporary, MB"]
    rows, more = [], []
    for name, dtype in ROWS:
        if plan.left() < 0:
            rows.append([name, dtype, LATE, *[""] * 6])
            more.append([name, dtype, *[""] * 4])
        else:
            harness.progress(name, dtype)
            found = measured(clipped(plan.program(name), dtype), plan, is_update(name))
            times = (found.cell(key, found.microseconds) for key in CLIPS)
            overhead = found.beside("gradclip_jax", found.overhead)
            rows.append([name, dtype, *times, *three_ratios(found), overhead])
            facts = [side_by_side(found, told) for told in facts_of(found, copy)]
            # Products of matrices are not bound by the memory.
            facts[1] = facts[1] if is_update(name) else ""
            more.append([name, dtype, *facts])
        parts = [STEPS_TEXT.format(steps=STEPS), harness.table(header, rows)]
        parts += [MORE_TEXT.format(copy=digits(copy / 1e9)), harness.table(of_host, more)]
        yield "".join(parts)


def three_ratios(found: Measured) -> list[str]:
    """Of optax and ours to none, and of ours to optax."""
    pairs = (("optax", "none"), ("gradclip_jax", "none"), ("gradclip_jax", "optax"))
    return [found.beside(one, lambda name, two=two: found.ratio(name, two)) for one, two in pairs]


def facts_of(found: Measured, copy: float) -> list[Callable[[str], str]]:
    """What the second table tells of a variant."""

    def share(name: str) -> str:
        speed = found.variants[name].moved() / float(np.median(found.times[name]))
        return digits(100 * speed / copy)

    return [
        found.host,
        share,
        found.compile_seconds,
        lambda name: digits(found.variants[name].compiled.temporary / 1e6),
    ]


def side_by_side(found: Measured, told: Callable[[str], str]) -> str:
    """One fact of all variants in one cell."""
    return " / ".join("–" if name in found.failures else told(name) for name in CLIPS)


def copy_speed(plan: Plan) -> float:
    """Bytes a second that are read and written where an array is copied."""
    x = jnp.zeros(2**16 if plan.small else 2**28, jnp.float32)
    program = harness.compiled(lambda x: x + 1, x)

    def run() -> Any:
        return [program.run(x) for _ in range(4)][-1]

    times = harness.interleaved({"copy": run}, min(plan.rounds, 10), plan.seconds, warm=2)
    return 4 * 2 * x.nbytes / float(np.median(times["copy"]))


GRAPHS_TEXT = """\
The same in float32 with CUDA graphs, as XLA compiles by default, and without them
(`--xla_gpu_enable_command_buffer=`), as where a step cannot be captured: six programs in turn.
Microseconds, and in brackets the host's.

"""


def graphs(plan: Plan) -> Iterator[str]:
    """Steps with and without CUDA graphs."""
    if jax.default_backend() != "gpu" and not plan.small:
        yield "Not a GPU: skipped.\n"
        return
    options = WITHOUT_GRAPHS if jax.default_backend() == "gpu" else None
    header, rows = ["program", "graphs", *CLIPS, "overhead / optax's"], []
    for name in CAPTURED:
        if plan.left() < 0:
            rows.append([name, LATE, *[""] * 4])
        else:
            harness.progress(name, "with and without graphs")
            makes = clipped(plan.program(name), "float32")
            without = clipped(plan.program(name), "float32", options)
            makes |= {f"{key} without": make for key, make in without.items()}
            rows += rows_of_graphs(name, measured(makes, plan, is_update(name)))
        yield GRAPHS_TEXT + harness.table(header, rows)


def rows_of_graphs(name: str, found: Measured) -> Iterator[list[str]]:
    """A row with and one without graphs."""

    def times(key: str) -> str:
        return f"{digits(found.microseconds(key).median)} ({found.host(key)})"

    for words, end in (("with", ""), ("without", " without")):
        cells = [found.cell(f"{key}{end}", times) for key in CLIPS]
        overhead = functools.partial(found.overhead, end=end)
        yield [name, words, *cells, found.beside(f"gradclip_jax{end}", overhead)]


REDUCTIONS_TEXT = """\
`clip_by_global_norm` with the reduction of each platform, on this one, in float32: microseconds of
a step, and in brackets what it adds to the step without a clip over what optax's adds.

"""


def reductions(plan: Plan) -> Iterator[str]:
    """Steps with all reductions."""
    header, rows = ["program", "none", "optax", *REDUCTIONS], []
    for name in REDUCED:
        if plan.left() < 0:
            rows.append([name, LATE, *[""] * (len(header) - 2)])
        else:
            harness.progress(name, "with all reductions")
            makes = clipped(plan.program(name), "float32")
            del makes["gradclip_jax"]
            for words, kind in REDUCTIONS.items():
                makes[words] = functools.partial(reduced_as_on, kind, plan.program(name))
            # The program is traced under a patch: one at a time.
            rows.append([name, *cells_of_reductions(measured(makes, plan, parallel=False))])
        yield REDUCTIONS_TEXT + harness.table(header, rows)


def cells_of_reductions(found: Measured) -> list[str]:
    """Microseconds, and the overhead where there is one."""

    def times(key: str) -> str:
        time = digits(found.microseconds(key).median)
        return f"{time} ({found.overhead(key)})" if key in REDUCTIONS else time

    return [found.cell(key, times) for key in ("none", "optax", *REDUCTIONS)]


def reduced_as_on(kind: str, make: Callable[..., Program]) -> Variant:
    """A step whose norm is computed as on another platform."""
    made = make("float32", CLIPS["gradclip_jax"])
    jax.clear_caches()  # functions that were traced for another platform
    with as_on(kind) as asked:
        jax.eval_shape(made.step, *made.arguments)
        if not asked:
            raise RuntimeError("the norm is not chosen by platform")
        found = Variant(made)
    jax.clear_caches()
    return found


@contextlib.contextmanager
def as_on(kind: str) -> Iterator[list[str]]:
    """Let `jax.lax.platform_dependent` choose as on another platform; lists what it was asked."""
    asked: list[str] = []
    original = jax.lax.platform_dependent

    def chosen(*args: Any, default: Any = None, **ways: Any) -> Any:
        asked.append(kind)
        return ways.get(kind, default)(*args)

    jax.lax.platform_dependent = chosen
    try:
        yield asked
    finally:
        jax.lax.platform_dependent = original


STRATEGIES_TEXT = """\
The update of a mixture of experts ({leaves} leaves, {millions} M parameters, float32) by AdamW with
every strategy before it, or with the guard around it. Groups of {group} run in turn with AdamW
alone, to which the ratio is taken in each round.

"""


def every_strategy() -> dict[str, Callable[[], Any]]:
    """A clip, or what owns the optimizer, by name; those that take minutes to compile come last."""
    known = {**STRATEGIES, **OPTIMIZERS, **BESIDE}
    order = sorted(known, key=lambda name: (name in SLOW, name != BASE))
    return {name: known[name] for name in order}


def strategies(plan: Plan) -> Iterator[str]:
    """The update of all strategies."""
    make = plan.program(EXPERTS)
    leaves = jax.tree.leaves(make("float32", None).arguments[0])
    millions = sum(math.prod(leaf.shape) for leaf in leaves) / 1e6
    text = STRATEGIES_TEXT.format(
        leaves=len(leaves), millions=digits(millions), group=AT_A_TIME + 1
    )
    header = ["strategy", "µs", "times AdamW alone", "µs more", "host, µs", "compile, s"]
    rows = []
    known = every_strategy()
    fast = [name for name in known if name not in SLOW]
    groups = [fast[i : i + AT_A_TIME] for i in range(0, len(fast), AT_A_TIME)]
    for group in [*groups, *([name] for name in known if name in SLOW)]:
        if plan.left() < 0:
            rows += [[f"`{name}`", LATE, *[""] * 4] for name in group]
        else:
            harness.progress(*group)
            makes = {"none": functools.partial(variant, make, "float32", None)}
            makes |= {name: functools.partial(with_strategy, make, name) for name in group}
            found = measured(makes, plan, parallel=True)
            rows += [cells_of_strategy(found, name) for name in (group if rows else makes)]
        yield text + harness.table(header, rows)


def cells_of_strategy(found: Measured, name: str) -> list[str]:
    """A row of the table."""

    def more(key: str) -> str:
        return digits(1e6 * float(np.median(differences(found.times[key], found.times["none"]))))

    words = "AdamW alone" if name == "none" else f"`{name}`"
    told = (lambda key: found.ratio(key, "none"), more, found.host, found.compile_seconds)
    cells = [found.beside(name, cell) for cell in told]
    return [words, found.cell(name, found.microseconds), *cells]


def with_strategy(make: Callable[..., Program], name: str) -> Variant:
    """The update with a strategy before AdamW, or with a guard around it."""
    if name in OPTIMIZERS:
        return Variant(make("float32", None, optimizer=OPTIMIZERS[name]()))
    return variant(make, "float32", every_strategy()[name]())


# --- the page ---

SECTIONS: dict[str, tuple[str, Callable[[Plan], Iterator[str]]]] = {
    "steps": ("Steps on the device", steps),
    "graphs": ("CUDA graphs", graphs),
    "reductions": ("Reductions", reductions),
    "strategies": ("Every strategy on the device", strategies),
}


def facts(argv: Sequence[str]) -> str:
    """The command, the versions and the card."""
    found = {"jax": jax.__version__, "jaxlib": metadata.version("jaxlib")}
    found |= {"optax": optax.__version__, "gradclip_jax": own_version()}
    found |= {"Python": platform.python_version()}
    command = shlex.join(["python3", "benchmarks/on_device.py", *argv])
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    devices = f"{jax.device_count()} × {harness.machine()}"
    runtime = " ".join(getattr(jax.devices()[0].client, "platform_version", "").split())
    return f"`PYTHONPATH=. {command}`\n\n{versions}; {devices}; {driver()}{runtime[:100]}.\n\n"


def own_version() -> str:
    """Of this checkout, also where it is not installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    found = re.search(r'^version = "(.*)"', project.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else gj.__version__


def driver() -> str:
    """The driver of an NVIDIA card, where it can be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"driver {told.stdout.splitlines()[0].strip()}, " if told.stdout.strip() else ""


def summary(text: str) -> str:
    """The first two and the last four columns of the first table, without quartiles."""
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = table[0].splitlines() if table else []
    cells = [[cell.strip().split(" (")[0] for cell in line.split("|")[1:-1]] for line in lines]
    return "".join(f"| {' | '.join(row[:2] + row[-4:])} |\n" for row in cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections; bad input ends in one line on stderr and exit status 2."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = harness.command_line("Measure what a clip costs on this accelerator.")
    parser.set_defaults(seconds=SECONDS)
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help="sections, by comma (%(default)s)")
    add("--small", action="store_true", help="tiny shapes, to try it out")
    add("--budget", type=float, default=BUDGET, help="seconds for all (%(default)s)")
    args = parser.parse_args(given)
    # A program that is read from a cache takes no time to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    plan = Plan(args.rounds, args.seconds, args.small, args.budget, time.perf_counter())
    try:
        harness.check_rounds(args)
        names = harness.chosen("--only", args.only, SECTIONS)
        if not args.budget > 0:
            raise harness.InputError(f"`--budget` must be positive, got {args.budget}.")
        prefix = "small_on_" if args.small else "on_"
        file = None if args.out is None else harness.writable(args.out, prefix)
    except harness.InputError as error:
        print(error, file=sys.stderr)
        return 2
    head = facts(given)
    texts = dict.fromkeys(names, "")
    for name in names:
        heading, rows = SECTIONS[name]
        try:
            for text in rows(plan):
                texts[name] = f"## {heading}\n\n{head}{text}"
                if file is not None:
                    harness.keep(file, texts[name])
        except Exception as error:  # the next sections are still worth their time
            texts[name] += f"\n{failed(error)}\n"
        print(texts[name], flush=True)
    if "steps" in names:
        print(summary(texts["steps"]), end="")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a compilation that was given up on would still be waited for
