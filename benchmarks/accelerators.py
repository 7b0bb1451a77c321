"""What the compilers of TPU and GPU make of a clip, ahead of time and without a device.

`make accelerators` makes an environment for each of the two compilers and writes the page. Again
with some of the sections, or with what has no result yet:

    make accelerators ARGS='--only steps,guards'
    make accelerators ARGS=--missing
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import compiled
import harness
import jax
import optax
import per_example
import programs
from harness import digits, table
from hlo import Facts
from strategies import STRATEGIES

import gradclip_jax

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "accelerators.json"
LIMIT = 100
"""CPU seconds after which a compiler is stopped."""
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "optax")


class Target(NamedTuple):
    """Devices, and the mesh (data, model) over which a program is split."""

    devices: str
    shape: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        count = self.shape[0] * self.shape[1]
        return self.kind if count == 1 else f"{self.kind}, {self.shape[0]} × {self.shape[1]}"

    @property
    def kind(self) -> str:
        """The name of the chip."""
        return self.devices.partition(":")[0]

    @property
    def compiler(self) -> str:
        """The environment that has it."""
        return "gpu" if self.kind in compiled.GPUS else "tpu"


KINDS = ("v5e", "v5p", "v6e", *compiled.GPUS)
V5E, V5P, V6E = Target("v5e:2x2"), Target("v5p:2x2x1"), Target("v6e:2x2")
H100, H200, B200 = Target("H100"), Target("H200"), Target("B200")
EIGHT_V5E, V5E_4X4 = Target("v5e:2x4", (2, 4)), Target("v5e:4x4", (4, 4))
EIGHT_H100 = Target("H100:8", (2, 4))
POD = [Target("v5p:4x4x4", (8, 8)), Target("v5p:8x8x8", (64, 8)), Target("v5p:16x16x16", (256, 16))]


class Task(NamedTuple):
    """One program to compile; a row of a table has one for each variant."""

    section: str
    target: Target
    program: str
    dtype: str
    variant: str


Results = dict[Task, Facts | str]
"""Of each task the facts, or in words why there are none."""


# --- the sections: what is compiled, and its table ---

STEPS = ("matmul step", "Transformer step", "LSTM step", "update of GPT-2")


def steps() -> list[Task]:
    """Whole steps and an update; the newest GPUs, which compile alike, in one dtype."""
    rows = [
        (target, program, dtype)
        for target in (V5E, V5P, V6E, H100)
        for program in STEPS
        for dtype in programs.DTYPES
    ]
    rows += [(target, program, "mixed") for target in (H200, B200) for program in STEPS]
    rows += [
        (target, "update of GPT-2", dtype)
        for target in (EIGHT_V5E, EIGHT_H100)
        for dtype in ("float32", "bfloat16")
    ]
    return [Task("steps", *row, variant) for row in rows for variant in programs.CLIPS]


def strategies() -> list[Task]:
    """Every strategy on one GPU and on two meshes."""
    names = ["none", *(name for name in STRATEGIES if not name.startswith("skip"))]
    names += OF_OPTAX
    return [
        Task("strategies", target, "update of small GPT-2", "float32", name)
        for target in (H100, EIGHT_H100, V5E_4X4)
        for name in names
    ]


def guards() -> list[Task]:
    """A step that may be skipped."""
    return [
        Task("guards", target, "update of a mixture of experts", "float32", name)
        for target in (V5E, EIGHT_V5E, H100, EIGHT_H100)
        for name in GUARDS
    ]


def examples() -> list[Task]:
    """Gradients of which each is clipped before they are added."""
    return [
        Task("examples", target, network, "float32", name)
        for target in (V5E, H100)
        for network in ("dense", "lstm")
        for name in EXAMPLES
    ]


def pod() -> list[Task]:
    """Large trees on many chips."""
    return [
        Task("pod", target, f"update of {tree}", "mixed", name)
        for tree in ("LLaMA 7B", "LLaMA 70B")
        for target in POD
        for name in programs.CLIPS
    ]


SECTIONS = {
    "steps": steps,
    "strategies": strategies,
    "guards": guards,
    "examples": examples,
    "pod": pod,
}
OF_OPTAX: dict[str, Callable[[], Any]] = {
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "optax.clip": lambda: optax.clip(1.0),
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "optax.contrib.muon": lambda: optax.contrib.muon(1e-5),
}


GUARDS: dict[str, Callable[[Any], Any]] = {
    "AdamW alone": lambda inner: inner,
    "skip_nonfinite": gradclip_jax.skip_nonfinite,
    "optax.apply_if_finite": lambda inner: optax.apply_if_finite(inner, 16),
    "selects by hand": programs.by_select,
}
EXAMPLES: dict[str, Callable[[per_example.Network], Any]] = {
    "jax.grad of the mean": lambda network: jax.grad(network.loss),
    "optax": per_example.with_optax,
    "gradclip_jax": lambda network: per_example.ours(network, None),
    "gradclip_jax, microbatch 32": lambda network: per_example.ours(network, 32),
}


def build(task: Task) -> tuple[Callable[..., Any], Any, Sequence[int]]:
    """A function, its abstract arguments, and which of them it is given to keep."""
    if task.section == "examples":
        network = per_example.NETWORKS[task.program]._replace(width=1024)
        arguments = (per_example.weights_of(network), *per_example.examples(network, 256))
        return EXAMPLES[task.variant](network), jax.eval_shape(lambda: arguments), ()
    if task.section == "strategies":
        tree, optimizer, clip = programs.gpt2(2), programs.ADAMW, None
        if task.variant == "optax.contrib.muon":
            optimizer = OF_OPTAX[task.variant]()
        elif task.variant != "none":
            clip = (STRATEGIES | OF_OPTAX)[task.variant]()
        program = programs.update(tree, task.dtype, clip, optimizer)
    elif task.section == "guards":
        guarded = GUARDS[task.variant](programs.ADAMW)
        program = programs.update(programs.experts(), task.dtype, None, guarded)
    else:
        program = programs.program(task.program, task.dtype, programs.CLIPS[task.variant])
    return program.step, program.arguments, program.donate


def facts_of(task: Task) -> Facts:
    """What the compiler of the target makes of a task."""
    function, arguments, donate = build(task)
    mesh = compiled.mesh_of(task.target.devices, task.target.shape, ("data", "model"))
    specs = None if mesh.size == 1 else programs.specs(arguments)
    arguments = compiled.placed(arguments, mesh, specs)
    return compiled.compiled(function, *arguments, donate=donate).facts


# --- tables ---


def cell(results: Results, task: Task, show: Callable[[Facts], object]) -> str:
    """What is shown of a task, or why it has no facts."""
    found = results.get(task, "not compiled")
    return found if isinstance(found, str) else str(show(found))


def added(results: Results, tasks: Sequence[Task], show: Callable[[Facts], float]) -> list[str]:
    """A number without a clip, what optax and we add to it, and the ratio of the two."""
    found = [results.get(task, "not compiled") for task in tasks]
    if any(isinstance(one, str) for one in found):
        return [cell(results, task, lambda f: digits(show(f))) for task in tasks] + [""]
    none, theirs, ours = (show(one) for one in found if isinstance(one, Facts))
    # Of a clip that makes a step cheaper, by luck of its allocation, a ratio says nothing.
    ratio = f"{(ours - none) / (theirs - none):.2f}" if theirs > none else ""
    return [digits(none), *(f"{x - none:+,.1f}".removesuffix(".0") for x in (theirs, ours)), ratio]


def collectives(f: Facts) -> str:
    """Of a step, and after a plus those in branches."""
    always, branch = (
        ", ".join(f"{n} {name}" for name, n in sorted(of.items())) or "0"
        for of in (f.collectives, f.branch_collectives)
    )
    return f"{always} ({f.collective_bytes:,} B)" + ("" if branch == "0" else f" + {branch}")


def steps_table(results: Results) -> str:
    """TPU by estimated cycles, GPU by kernels."""
    text = ""
    of_rows = [task for task in steps() if task.variant == "none"]
    for compiler, unit in (("tpu", "thousand cycles"), ("gpu", "kernels")):
        rows = []
        for first in (task for task in of_rows if task.target.compiler == compiler):
            row = [first._replace(variant=name) for name in programs.CLIPS]
            shown = [str(first.target), first.program, first.dtype]
            if not any(task in results for task in row):
                rows.append([*shown, "not compiled", *[""] * (8 if compiler == "tpu" else 9)])
                continue

            def main(f: Facts, tpu: bool = compiler == "tpu") -> float:
                return f.cycles / 1e3 if tpu else f.kernels

            rest = [
                " / ".join(cell(results, task, show) for task in row)
                for show in (
                    lambda f: f.fusions if f.host_synchronizations is None else f.conditionals,
                    lambda f: f"{f.seconds:.1f}",
                )
            ]
            megabytes = added(results, row, lambda f: f.bytes / 1e6)[:3]
            waits = [cell(results, row[-1], lambda f: f.host_synchronizations)]
            waits = waits if compiler == "gpu" else []
            rows.append([*shown, *added(results, row, main), *megabytes, *rest, *waits])
        header = ["target", "program", "dtype", f"{unit}: none", "optax adds", "we add"]
        header += ["we / optax", "MB: none", "optax adds", "we add"]
        header += ["fusions" if compiler == "tpu" else "conditionals", "CPU s to compile"]
        header += ["host waits, ours"] if compiler == "gpu" else []
        text += table(header, rows) + "\n"
    return text


def rows_of(results: Results, tasks: Iterable[Task], shows: Sequence[Callable[..., Any]]) -> Any:
    """A row for each task."""
    for task in tasks:
        cells = [cell(results, task, show) for show in shows[:1]]
        failed = isinstance(results.get(task, ""), str)
        rest = [""] * (len(shows) - 1) if failed else [cell(results, task, s) for s in shows[1:]]
        yield [str(task.target), task.program, f"`{task.variant}`", *cells, *rest]


def strategies_table(results: Results) -> str:
    """A row for each strategy and target."""
    shows = [
        lambda f: f.kernels,
        lambda f: digits(f.cycles / 1e3) if f.cycles else "",
        lambda f: digits(f.bytes / 1e6),
        lambda f: f.conditionals,
        lambda f: "" if f.host_synchronizations is None else f.host_synchronizations,
        collectives,
        lambda f: digits(f.temporary / 1e6),
        lambda f: f"{f.seconds:.1f}",
    ]
    header = ["kernels", "thousand cycles", "MB", "conditionals", "host waits", "collectives"]
    header = ["target", "program", "variant", *header, "temporary MB", "CPU s to compile"]
    return table(header, rows_of(results, strategies(), shows))


def guards_table(results: Results) -> str:
    """As strategies, with the cycles of branches."""
    shows = [
        lambda f: digits(f.cycles / 1e3) if f.cycles else "",
        lambda f: digits(f.branch_cycles / 1e3) if f.cycles else "",
        lambda f: digits(f.temporary / 1e6),
        lambda f: f.kernels,
        lambda f: f.conditionals,
        lambda f: "" if f.host_synchronizations is None else f.host_synchronizations,
        collectives,
    ]
    header = ["target", "program", "variant", "thousand cycles", "in branches", "temporary MB"]
    header += ["kernels", "conditionals", "host waits", "collectives"]
    return table(header, rows_of(results, guards(), shows))


def examples_table(results: Results) -> str:
    """Memory first."""
    shows = [
        lambda f: digits(f.temporary / 1e6),
        lambda f: digits(f.bytes / 1e6),
        lambda f: f.kernels,
        lambda f: f.conditionals,
    ]
    header = ["target", "network", "variant", "temporary MB", "MB moved", "kernels", "conditionals"]
    return table(header, rows_of(results, examples(), shows))


def pod_table(results: Results) -> str:
    """The cost on each chip."""
    shows = [
        lambda f: digits(f.cycles / 1e3),
        lambda f: digits(f.bytes / 1e6),
        collectives,
        lambda f: f"{f.seconds:.1f}",
    ]
    header = ["target", "program", "variant", "thousand cycles", "MB a chip", "collectives"]
    return table([*header, "CPU s to compile"], rows_of(results, pod(), shows))


TEXTS: dict[str, tuple[str, str, Callable[[Results], str]]] = {
    "steps": (
        "Training steps",
        "Gradients, clip and optimizer in one program, and an update alone, of which the gradients "
        "are arguments. Of three numbers by slashes the first is without a clip, the second with "
        "optax's, the third with ours.",
        steps_table,
    ),
    "strategies": (
        "Strategies",
        "Each with its defaults, or limited to 1, before AdamW. The tree is a GPT-2 of 2 layers "
        "with 28 leaves, on meshes split along both axes. Collectives after a plus are in branches "
        "that run after an overflow or underflow of squares alone. XLA reduces sums of leaves that "
        "are split along the same axes in another order apart.",
        strategies_table,
    ),
    "guards": (
        "Skipped steps",
        "Guards around AdamW. By hand: the optimizer sees zeros, and each element of its state is "
        "selected, old or new. In branches: all of them together.",
        guards_table,
    ),
    "examples": (
        "Per-example clipping",
        "The sum of 256 gradients, each clipped to norm 1, of networks of 1,024 units. Temporary "
        "memory is what the program allocates beside its arguments and results.",
        examples_table,
    ),
    "pod": (
        "Pods",
        "FSDP × tensor parallelism, gradients in bfloat16, parameters and moments in float32. "
        "Numbers are those of one chip.",
        pod_table,
    ),
}
ABOUT = """\
Programs are compiled ahead of time; nothing of this page is a time on a device. What a device
makes of the same programs is in the page of `benchmarks/on_device.py`.

* Cycles are the TPU compiler's own estimate of each fusion, added up. Scalar operations,
  collectives and copies count nothing, and an operand that was copied into VMEM beforehand makes
  its fusion cheaper although its bytes still move. Of a loop the body counts once. Trust fusions,
  bytes and the cycles of reductions; differences below 5 % of a step are allocation luck.
* Kernels are fusions, copies and calls of libraries: on GPU the nodes of the CUDA graph.
* MB are the bytes of HBM that the kernels read and write, as if no cache kept anything. On TPU
  what the compiler keeps in VMEM between two kernels is not among them.
* The host waits where a conditional, or a loop of unknown length, is not part of a CUDA graph. With
  CUDA before 12.3 and on ROCm no conditional is part of one.
* CPU seconds are those to trace, lower and compile; ± 30 %. The autotuner of the GPU compiler is
  off, for it needs a device.
"""


def page(results: Results, versions: dict[str, str]) -> str:
    """The whole page."""
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    date = datetime.date.today().isoformat()
    text = f"# TPU and GPU, by their compilers\n\n`make accelerators`\n\n{found}. Date: {date}.\n\n"
    for heading, about, make in TEXTS.values():
        text += f"## {heading}\n\n{about}\n\n{make(results).strip()}\n\n"
    head, _, rest = text.partition("## ")
    return f"{head}{ABOUT}\n## {rest.strip()}\n"


# --- processes ---


def work() -> None:
    """Compile the tasks of the standard input, a line of JSON each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jax.config.update("jax_enable_compilation_cache", False)
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    print("RESULT", json.dumps(versions | {"gradclip_jax": gradclip_jax.__version__}), flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + LIMIT
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            answer: Any = dataclasses.asdict(facts_of(task_of(json.loads(line))))
        except Exception as error:
            answer = f"{type(error).__name__}: {str(error).partition('.')[0][:100]}"
        print("RESULT", json.dumps(answer), flush=True)


def task_of(parts: Sequence[Any]) -> Task:
    """A task as JSON has it."""
    section, (devices, shape), *rest = parts
    return Task(section, Target(devices, tuple(shape)), *rest)


class Worker:
    """A process in the environment of a compiler, started anew after it was stopped."""

    def __init__(self, python: str):
        self.start = functools.partial(
            subprocess.Popen,
            [python, __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        self.process: Any = None
        self.versions: dict[str, str] = {}

    def ask(self, task: Task) -> Any:
        """Facts as a mapping, or why there are none."""
        if self.process is None:
            self.process = self.start()
            answer = self.answer()
            if not isinstance(answer, dict):
                raise harness.InputError(f"The environment of {task.target} cannot be used.")
            self.versions = answer
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next result; in words why there is none when the process has ended."""
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        with self.process as ended:
            self.process = None
        status = ended.returncode
        return f"> {LIMIT} s" if status == -signal.SIGXCPU else f"the compiler ended with {status}"


def read() -> tuple[Results, dict[str, str]]:
    """The results and versions that are kept."""
    if not RESULTS.exists():
        return {}, {}
    kept = json.loads(RESULTS.read_text())
    results = {
        task_of(task): found if isinstance(found, str) else Facts(**found)
        for task, found in kept["results"]
    }
    return results, kept["versions"]


def write(results: Results, versions: dict[str, str]) -> None:
    """Keep them."""
    found = [
        (task, one if isinstance(one, str) else dataclasses.asdict(one))
        for task, one in results.items()
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"versions": versions, "results": found}, indent=1))


def measure(args: argparse.Namespace) -> str:
    """Compile what was asked for, both compilers at once, and make the page of all results."""
    names = harness.chosen("--only", args.only, SECTIONS)
    results, versions = read()
    lock = threading.Lock()
    kinds = harness.chosen("--targets", args.targets, KINDS)
    tasks = [task for name in names for task in SECTIONS[name]() if task.target.kind in kinds]
    if args.missing:
        tasks = [task for task in tasks if task not in results]

    def compile_all(compiler: str, python: str) -> None:
        worker = Worker(python)
        for task in tasks:
            if task.target.compiler == compiler:
                answer = worker.ask(task)
                with lock:
                    found = answer if isinstance(answer, str) else Facts(**answer)
                    shown = found if isinstance(found, str) else f"{found.seconds:.1f} s"
                    harness.progress(*map(str, task), shown)
                    results[task] = found
                    versions.update(worker.versions)
                    write(results, versions)

    with futures.ThreadPoolExecutor() as pool:
        pythons = {compiler: getattr(args, compiler) for compiler in ("tpu", "gpu")}
        for done in [pool.submit(compile_all, *pair) for pair in pythons.items() if pair[1]]:
            done.result()
    return page(results, versions)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tpu", metavar="PYTHON", help="the interpreter that has libtpu")
    add("--gpu", metavar="PYTHON", help="the interpreter that has the CUDA plugin of jax")
    add("--only", default=",".join(SECTIONS), metavar="SECTIONS", help="of %(default)s")
    add("--targets", default=",".join(KINDS), metavar="KINDS", help="of %(default)s")
    add("--missing", action="store_true", help="compile only what has no result")
    add("--out", type=Path, metavar="FILE", help="where to keep the page")
    add("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work()
        return 0
    try:
        text = measure(args)
    except harness.InputError as error:
        print(error, file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(text, "utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
