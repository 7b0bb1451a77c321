"""What the benchmarks share: fair rounds, compiled programs, tables, and one page per machine.

Cases run in turn (A, B, C, A, B, C, …), so that whatever disturbs the machine for a while disturbs
all of them, and they are compared within a round: what is reported is the median over the rounds of
a ratio or a difference, with its quartiles.
"""

import argparse
import datetime
import importlib
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import gradclip_jax

ROUNDS, SECONDS, LEAST = 30, 6.0, 5
"""So many rounds, but after so many seconds no further one, unless there were fewer than five."""
PAUSE = 0.01
"""Seconds before each case: threads of another library that wait for work in a loop fall asleep."""
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
"""Peak bytes a second of the memory of a device, by a word in its kind."""


# --- times ---


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    least: int = LEAST,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each case in each round, after rounds that only warm up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    began = clock()
    for number in range(-warm, rounds):
        if number == 0:
            began = clock()
        if number >= least and clock() - began > seconds:
            break
        for name, run in cases.items():
            time.sleep(PAUSE)
            start = clock()
            jax.block_until_ready(run())
            if number >= 0:
                times[name].append(clock() - start)
    return times


def differences(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """How much longer each round was."""
    return [one - other for one, other in zip(times, others, strict=True)]


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """How many times as long each round was."""
    return [one / other if other else math.nan for one, other in zip(times, others, strict=True)]


class Spread(NamedTuple):
    """The quartiles of what was seen in the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float], scale: float = 1.0) -> "Spread":
        """The quartiles of some numbers, in another unit."""
        return cls(*(scale * np.percentile(numbers, (25, 50, 75))).tolist())

    def __str__(self) -> str:
        """As a cell: the median, and the quartiles with as many decimals."""
        count = decimals(self.median)
        low, median, high = (f"{number:,.{count}f}" for number in self)
        return f"{median} ({low} to {high})"


def decimals(number: float) -> int:
    """Decimals with which a number has three significant digits."""
    if not math.isfinite(number) or number == 0:
        return 0
    return max(0, 2 - math.floor(math.log10(abs(number))))


def digits(number: float) -> str:
    """Three significant digits and no exponent."""
    return f"{number:,.{decimals(number)}f}"


# --- compiled programs ---


class Program(NamedTuple):
    """A compiled program and what it took."""

    run: Any
    seconds: float
    """To trace, lower and compile it."""
    temporary: int
    """Bytes that it allocates beside its arguments and results."""

    @property
    def instructions(self) -> int:
        """HLO instructions after optimization, those within fusions included."""
        return len(re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", self.run.as_text(), re.MULTILINE))


def compiled(
    function: Callable[..., Any],
    *args: Any,
    donate: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
) -> Program:
    """Compile a function for arguments like these, in a `jit` that has seen nothing before."""
    start = time.perf_counter()
    lowered = jax.jit(lambda *args: function(*args), donate_argnums=donate).lower(*args)
    program = lowered.compile(dict(options) if options else None)
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return Program(program, seconds, memory.temp_size_in_bytes if memory else 0)


# --- the machine ---


def peer(name: str) -> Any:
    """A module that need not be installed, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def torch_beside_jax() -> tuple[Any, str]:
    """PyTorch, where it is installed and computes on what jax does, or None and why not."""
    torch = peer("torch")
    if torch is None:
        return None, "torch: not installed, skipped.\n\n"
    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return None, "torch: finds no GPU, skipped.\n\n"
    return torch, ""


def machine() -> str:
    """The GPU, or the cores and the model of the CPU."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{os.cpu_count()} cores of {processor()}"


def processor() -> str:
    """The model name of the CPU, where Linux tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def slug() -> str:
    """The machine as the name of a file: `amd-epyc-2-cores`."""
    device = jax.devices()[0]
    cores = f"{processor()} {os.cpu_count()} cores"
    words = cores if device.platform == "cpu" else device.device_kind
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w*\)", "", words).lower()).strip("-")


def peak_bandwidth() -> float | None:
    """Bytes a second that the memory of the first device has, where that is known."""
    kind = jax.devices()[0].device_kind
    return next((peak for word, peak in BANDWIDTH.items() if word in kind), None)


def available_bytes() -> float:
    """Memory that is free where jax computes; infinity where that is not known."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else math.inf


def versions() -> str:
    """What the numbers depend on."""
    found = {"jax": jax.__version__, "jaxlib": metadata.version("jaxlib")}
    found |= {"optax": optax.__version__, "gradclip_jax": gradclip_jax.__version__}
    if (torch := peer("torch")) is not None:
        found["torch"] = torch.__version__
    found |= {"numpy": np.__version__, "Python": platform.python_version()}
    return ", ".join(f"{name} {version}" for name, version in found.items())


# --- pages and tables ---


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def page_with(page: str, section: str) -> str:
    """A page in which a section is put in the place of the one with its heading, or at the end."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE) if page else [f"# {machine()}\n\n"]
    heading = section.partition("\n")[0]
    places = [i for i, part in enumerate(parts) if part.partition("\n")[0] == heading]
    parts[slice(places[0], places[0] + 1) if places else slice(len(parts), None)] = [section]
    return "\n".join(part.strip() + "\n" for part in parts)


# --- the command line ---


class InputError(Exception):
    """Bad input, in one line that names the argument, the rule and the value."""


def command_line(description: str) -> argparse.ArgumentParser:
    """What all benchmarks understand."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIRECTORY", help="where to keep the page of this machine")
    add("--rounds", type=int, default=ROUNDS, help="most rounds of each table row (%(default)s)")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"time after which only the first {LEAST} rounds begin (%(default)s)",
    )
    return parser


def run(
    heading: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], str],
    argv: Sequence[str] | None,
) -> int:
    """Print a section, and keep it in the page of this machine; bad input ends in status 2."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(given)
    # A program that is read from a cache takes no time to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        check_rounds(args)
        file = None if args.out is None else writable(args.out)
        body = measure(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    script = sys.modules[measure.__module__].__file__ or ""
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *given])
    facts = f"`{command}`\n\n{versions()}, {machine()}. Date: {datetime.date.today().isoformat()}."
    section = f"## {heading}\n\n{facts}\n\n{body.strip()}\n"
    print(section, end="")
    if file is not None:
        keep(file, section)
    return 0


def check_rounds(args: argparse.Namespace) -> None:
    """Whether `--rounds` and `--seconds` can be meant."""
    if args.rounds < 1:
        raise InputError(f"`--rounds` must be at least 1, got {args.rounds}.")
    if not args.seconds >= 0:
        raise InputError(f"`--seconds` must be non-negative, got {args.seconds}.")


def keep(file: Path, section: str) -> None:
    """Put a section into a page; whoever stops the program finds the old page or the new one."""
    new = file.with_suffix(".new")
    new.write_text(page_with(file.read_text("utf-8"), section), "utf-8")
    new.replace(file)


def writable(directory: Path, prefix: str = "") -> Path:
    """The page of this machine in a directory; finds out before the work is done."""
    file = directory / f"{prefix}{slug()}.md"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise InputError(
            f"`--out` must be a directory that can be written, got {directory}: {error.strerror}."
        ) from None
    return file


def chosen(argument: str, text: str, known: Iterable[str]) -> list[str]:
    """Names that are known, each once."""
    names, known = text.split(","), list(known)
    if len(set(names)) < len(names) or not set(names) <= set(known):
        raise InputError(
            f"`{argument}` must be some of {','.join(known)}, each once, got {text!r}."
        )
    return names


def numbers(argument: str, text: str) -> list[int]:
    """Positive whole numbers, as in 10,100 or 1e4,1e9."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = [0.0]
    if any(not (1 <= number < math.inf) or number % 1 for number in found):
        raise InputError(f"`{argument}` must be positive whole numbers by comma, got {text!r}.")
    return [int(number) for number in found]


def number(argument: str, text: str) -> int:
    """One positive whole number."""
    found = numbers(argument, text)
    if len(found) != 1:
        raise InputError(f"`{argument}` must be one number, got {text!r}.")
    return found[0]


def progress(*words: object) -> None:
    """Say on stderr what is measured next."""
    print(", ".join(map(str, words)), file=sys.stderr)
