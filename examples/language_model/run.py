"""What a run leaves behind: checkpoints that continue it bit for bit, scalars, table and plot."""

import contextlib
import errno
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

import gradclip_jax
from examples.language_model.command_line import InputError, console, writing
from examples.language_model.data import write_atomically
from examples.language_model.results import save_results

SCALARS = ("loss", "grad_norm", "clip_limit", "clip_factor", "clipped")
RECENT = 100  # steps over which the progress line averages
PLAIN_LINE_SECONDS = 10.0  # between two lines where there is no terminal to draw a bar on
History = dict[str, list]
# Orbax warns of every checkpoint that is only read, and logs a traceback for each of its threads
# that ends with the error it raises; tensorboardX warns of every loss that is NaN.
for name in ("absl", "tensorboardX.x2num"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


class Result(NamedTuple):
    """A finished run; losses are nats per token, answers those right and all by kind."""

    clip: str
    level: str
    steps: int
    test: float
    clip_count: int
    nonfinite_count: int
    text: str
    history: History
    answers: dict[str, list[int]] | None = None

    @property
    def valid(self) -> list[float]:
        """The validation loss after each epoch; NaN for a run that ended before one was over."""
        return [loss for _, loss in self.history["valid"]] or [math.nan]

    def diverged(self, unigram: float) -> bool:
        """Whether training made it worse, to the end; a run too short to learn did not diverge.

        A loss was not finite, or it rose to twice the first one (that of a network that knows
        nothing) and ended above that of knowing only how frequent each token is.
        """
        losses = self.history["loss"]
        if not all(map(math.isfinite, [*losses, self.valid[-1]])):
            return True
        return max(losses) > 2 * losses[0] and self.valid[-1] > unigram


def finished(out: Path, config: dict[str, Any]) -> Result | None:
    """The result in `out` if its run is over; refuses a directory of another run."""
    if (saved := saved_result(out, config)) is None:
        return None
    try:
        return Result(**saved)
    except TypeError as error:
        raise InputError(f"`--out` must hold a complete result.json, got {out}: {error}.") from None


def saved_result(out: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What result.json in `out` says, if it is there; refuses a directory of another run."""
    if not (out / "config.json").exists():
        if saved_steps(out):
            raise InputError(f"`--out` must hold the config.json of its checkpoints, got {out}.")
        return None
    saved = read_json(out / "config.json")
    config = json.loads(json.dumps(config))
    different = [
        f"{key} {saved.get(key)!r} (now {config.get(key)!r})"
        for key in sorted({*saved, *config})
        if saved.get(key) != config.get(key)
    ]
    if different:
        raise InputError(
            f"`--out` must be a new directory or that of the same run, got {out}, whose run has "
            f"{', '.join(different)}: give another `--out`, or the options of that run."
        )
    return read_json(out / "result.json") if (out / "result.json").exists() else None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file, refused by its name if it cannot be read."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"`--out` must hold readable files, got {file}: {error}. Move it away, or give another "
            f"`--out`."
        ) from None
    return content if isinstance(content, dict) else {}


def make_directory(out: Path) -> None:
    """Makes the directory of a run, and refuses by its name one that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from None
    if not os.access(out, os.W_OK):
        raise _unwritable(out, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a file whole or not at all, and its directory where there is none."""
    make_directory(file.parent)
    try:
        write_atomically(file, json.dumps(content).encode())
    except OSError as error:
        raise _unwritable(file.parent, error) from None


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(
        f"`--out` must be a directory that can be written, got {out}: {error.strerror}."
    )


def saved_steps(out: Path) -> list[int]:
    """The steps that were saved in `out`, as the names of their directories say."""
    folder = out / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _pack(state: Any) -> np.ndarray:
    # One array of bytes: of many arrays read at once, orbax reports a damaged one in as many
    # tracebacks as there are others. The copy outlives a donation.
    leaves = [_plain(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return np.frombuffer(b"".join(leaves), np.uint8)


def _plain(leaf: jax.Array) -> np.ndarray:
    # Keys of random numbers are saved as the integers they are.
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unpack(packed: np.ndarray, state: Any) -> Any:
    leaves, tree = jax.tree.flatten(state)
    plain = [_plain(leaf) for leaf in leaves]
    ends = np.cumsum([leaf.nbytes for leaf in plain])
    if len(packed) != ends[-1]:
        raise ValueError(f"it holds {len(packed)} bytes, this run needs {ends[-1]}")
    arrays = [
        jnp.array(part.view(old.dtype).reshape(old.shape))
        for part, old in zip(np.split(packed, ends[:-1]), plain, strict=True)
    ]
    keyed = [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new
        for new, old in zip(arrays, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, keyed)


def _digest(step: int, packed: np.ndarray, history: History) -> int:
    # Compression alone does not notice every flipped bit, and the step is only the name of a
    # directory: of a renamed one the run would go on with the wrong data.
    return zlib.crc32(packed.tobytes(), zlib.crc32(json.dumps([step, history]).encode()))


class Checkpoints:
    """The two latest states of a run, each written whole or not at all.

    A state is a tree of arrays that holds all that the next step depends on: parameters, optimizer
    and clip, random numbers, the state carried along, and with the step the place in the text.
    """

    def __init__(self, out: Path):
        self.folder = (out / "checkpoints").absolute()
        # Saving takes milliseconds at this size; in the background it would race with donation.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with writing(out):
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def save(self, step: int, state: Any, history: History) -> None:
        packed = _pack(state)
        log = {"history": history, "digest": _digest(step, packed, history)}
        items = ocp.args.Composite(state=ocp.args.ArraySave(packed), log=ocp.args.JsonSave(log))
        with writing(self.folder, unsaved(self.folder.parent, step)):
            self.manager.save(step, args=items)


def unsaved(out: Path, step: int) -> str:
    """What is left where a checkpoint could not be written: those before it."""
    steps = saved_steps(out)
    return (
        f" The checkpoint of step {step} is not saved; with room for it, the same command goes on "
        f"from {f'step {steps[-1]}' if steps else 'the start'}."
    )


def restore(out: Path, state: Any, history: History) -> tuple[int, Any, History]:
    """Step, state and history of the last checkpoint in `out`, or 0 and what was given."""
    if not saved_steps(out):
        return 0, state, history
    folder, steps = (out / "checkpoints").absolute(), [0]
    as_bytes = ocp.RestoreArgs(restore_type=np.ndarray)
    items = ocp.args.Composite(
        state=ocp.args.ArrayRestore(restore_args=as_bytes), log=ocp.args.JsonRestore()
    )
    try:
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(folder, options=options) as manager:
            if not (steps := sorted(manager.all_steps())):  # one that was never finished
                return 0, state, history
            saved = manager.restore(steps[-1], args=items)
        if saved.log["digest"] != _digest(steps[-1], saved.state, saved.log["history"]):
            raise ValueError("the checksum differs")
        return steps[-1], _unpack(saved.state, state), saved.log["history"]
    except Exception as error:  # a damaged file fails in many ways, all with the same remedy
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise unreadable(folder / str(steps[-1]), steps[:-1], reason) from error


def unreadable(checkpoint: Path, earlier: list[int], reason: str) -> InputError:
    """The refusal of a damaged checkpoint, and what to do about it."""
    return InputError(
        f"`--out` must hold checkpoints that can be read, got {checkpoint}: {reason}. Nothing was "
        f"changed; move that directory away to continue from "
        f"{f'step {earlier[-1]}' if earlier else 'the start'}, or give another `--out`."
    )


class Board:
    """TensorBoard scalars in `out`; what lies beyond `step` belongs to a run that was killed.

    Written here and now: the thread of a `SummaryWriter` dies of a full disk, and then the run
    waits forever for it to take a scalar.
    """

    def __init__(self, out: Path, step: int):
        self.out, event = out, vars(event_pb2)["Event"]
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(out / "events"))
            start = vars(event_pb2)["SessionLog"](status=1)
            self._file.write_event(event(step=step + 1, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        event = vars(event_pb2)["Event"](
            wall_time=time.time(), step=step, summary=scalar(name, value)
        )
        with writing(self.out):
            self._file.write_event(event)

    def flush(self) -> None:
        with writing(self.out):
            self._file.flush()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        # A full disk was told already where it ended the run.
        with contextlib.suppress(*([OSError] if kind else [])), writing(self.out):
            self._file.close()


@contextlib.contextmanager
def progress(
    title: str, steps: int, step: int, per_step: int, unit: str = "tokens"
) -> Iterator[Callable[..., None]]:
    """A function of step and history that shows where the run is and how fast it goes."""
    # A terminal of 80 columns has room for a short bar; the title stands above it.
    columns = (
        BarColumn(bar_width=10), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), TextColumn("{task.fields[line]}"),
    )  # fmt: skip
    if console.is_terminal:
        console.print(title)
    first, start, last_line = step, time.monotonic(), time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=steps, completed=step, line="")

        def show(step: int, history: History) -> None:
            nonlocal last_line
            shown = [name for name in ("loss", "grad_norm", "clipped") if history.get(name)]
            recent = {name: np.mean(history[name][-RECENT:]) for name in shown}
            speed = (step - first) * per_step / (time.monotonic() - start)
            line = f"loss {recent['loss']:.3f}  {speed:,.0f} {unit}/s"
            if "grad_norm" in recent:
                clipped = recent["clipped"]
                line += f"  norm {recent['grad_norm']:.3g}  clipped {clipped:.0%}"
            bars.update(task, completed=step, line=line)
            due = time.monotonic() - last_line > PLAIN_LINE_SECONDS or step == steps
            if not console.is_terminal and due:
                console.print(f"{title}  {step}/{steps}  {line}")
                last_line = time.monotonic()

        yield show


def in_units(nats: float, level: str) -> float:
    """Bits per character, or perplexity per word."""
    if level == "char":
        return nats / math.log(2)
    return math.exp(nats) if nats < 700 else math.inf  # float64 ends at exp(709)


def report(
    results: list[Result],
    baselines: dict[str, dict[str, float]],
    out: Path,
    settings: dict[str, Any],
) -> None:
    """Samples and tables on the screen and in results.txt, the plot in `out`."""
    unit = "bits per character" if results[0].level == "char" else "perplexity"
    tables = [scores_table(results, baselines, unit)]
    tables += [answers_table(results)] if results[0].answers else []
    for result in results:
        if result.text:
            console.rule(f"text from {result.clip}")
            console.print(result.text, markup=False)
    make_directory(out)
    used = {**settings, "gradclip_jax": gradclip_jax.__version__}
    save_results(out, tables, used, ("jax", "flax", "optax", "numpy"))
    picture = out / ("compare.png" if len(results) > 1 else "run.png")
    draw(results, baselines, picture)
    console.print(f"Plot: {picture}\nScalars: tensorboard --logdir {out}")


def scores_table(results: list[Result], baselines: dict[str, dict[str, float]], unit: str) -> Table:
    """Losses of all runs and of the n-grams; `nats` is the mean of validation and test."""
    # A terminal of 80 columns has room for two spaces between the columns.
    table = Table(title=unit, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "valid", "best", "test", "nats", "max norm", "clip rate", "diverged"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    level = results[0].level
    for result in results:
        scores = (result.valid[-1], min(result.valid), result.test)
        norms = result.history["grad_norm"]
        table.add_row(
            result.clip,
            *(f"{in_units(nats, level):.4g}" for nats in scores),
            f"{(result.valid[-1] + result.test) / 2:.4g}",
            f"{np.max(norms):.2g}",
            f"{result.clip_count / len(norms):.0%}",
            "yes" if result.diverged(baselines["1-gram"]["valid"]) else "no",
        )
    for name, nats in baselines.items():
        valid, test = (f"{in_units(nats[split], level):.4g}" for split in ("valid", "test"))
        table.add_row(
            name, valid, valid, test, f"{(nats['valid'] + nats['test']) / 2:.4g}", "", "", ""
        )
    return table


def answers_table(results: list[Result]) -> Table:
    """The share of questions in the test split that were answered word for word."""
    table = Table(title="right answers", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    counts = [result.answers or {} for result in results]
    kinds = sorted(counts[0])
    for name in ("", "all", *kinds):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for result, count in zip(results, counts, strict=True):
        pairs = [np.sum([*count.values()], axis=0), *(count[kind] for kind in kinds)]
        table.add_row(result.clip, *(f"{right / asked:.1%}" for right, asked in pairs))
    asked = [counts[0][kind][1] for kind in kinds]
    table.add_row("questions", str(sum(asked)), *map(str, asked))
    return table


def draw(results: list[Result], baselines: dict[str, dict[str, float]], picture: Path) -> None:
    """Loss and validation above, gradient norm and its limit below, one colour for each run."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    level = results[0].level
    scale = math.log(2) if level == "char" else 1.0
    for number, result in enumerate(results):
        colour, history = f"C{number}", result.history
        steps = np.arange(1, len(history["loss"]) + 1)
        above.plot(steps, np.array(history["loss"]) / scale, colour, lw=0.8, label=result.clip)
        if history["valid"]:
            at, losses = zip(*history["valid"], strict=True)
            above.plot(at, np.array(losses) / scale, colour, marker="o", ls="",
                       label=f"{result.clip}, validation")  # fmt: skip
        below.plot(steps, history["grad_norm"], colour, lw=0.8, label=result.clip)
        limit = np.array(history["clip_limit"])
        if np.isfinite(limit).any():
            below.plot(steps, limit, colour, ls="--", label=f"limit of {result.clip}")
    for style, (name, nats) in zip((":", "-.", "--"), baselines.items(), strict=True):
        above.axhline(nats["valid"] / scale, color="grey", ls=style, label=name)
    above.set(yscale="log", ylabel="bits per character" if level == "char" else "nats per word")
    below.set(yscale="log", ylabel="gradient norm before the clip", xlabel="step")
    for axes in (above, below):
        axes.legend(fontsize="small")
    figure.savefig(picture, dpi=120)
