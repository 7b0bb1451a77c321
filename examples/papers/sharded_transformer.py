"""Train a Transformer on a mesh of devices, and see that the clipped norm is that of one device.

    python examples/papers/sharded_transformer.py --cpu-devices 8 --mesh data=4,model=2 --compare

trains the same network on one device and then in every way that JAX has to use eight: `jit` with
automatic and with explicit axes, `shard_map` and `pmap`. It ends in a table of how far apart they
are. Weights, optimizer state and the state of the clip are split by logical rules: storage along
`data`, work along `model`. Weights and their gradients are float32, products bfloat16.

    python examples/papers/sharded_transformer.py --cpu-devices 8 --mesh data=4,model=2 --compare \\
        --optimizer muon --learning-rate 0.2 --weight-decay 0 --qk-clip 100 --steps 300 \\
        --units 64 --context 32 --batch 32 --accumulate 1

trains it twice by Muon, without a clip of attention logits and with one, and draws the logits.

    python examples/papers/sharded_transformer.py --cpu-devices 4 --processes 2 \\
        --mesh data=4,model=2

is the same network in two processes. A run that is killed continues bit for bit when the same
command is given again, and to rounding with another mesh, style or number of processes.
"""

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

import gradclip_jax
from examples.language_model import loop
from examples.language_model.checkpoints import checksum
from examples.language_model.command_line import InputError, command_line, console, run
from examples.language_model.data import Corpus, load_corpus, user_cache
from examples.language_model.directory import History, saved_result, saved_steps, write_json
from examples.language_model.optimizers import SCALARS
from examples.language_model.plots import label_lines, plain_ticks, quiet_frame
from examples.language_model.results import save_results
from examples.papers.shared import launch
from examples.papers.shared.parallel import STYLES, Style
from examples.papers.shared.transformer import (
    Logits,
    Sizes,
    Transformer,
    attention_heads,
    matrices,
    next_token_loss,
)

FETCH_EVERY = 5
SEEN = (*SCALARS, "max_logit")
OPTIMIZERS = {
    "adamw": optax.adamw,
    "muon": functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=matrices),
}
# How a run is spread over devices, where it lies and how often it is saved do not change its
# numbers beyond rounding, so that a run may go on with others.
NOT_COMPARED = {
    "mesh", "style", "axes", "compare", "out", "cache", "data", "checkpoint_every",
    "cpu_devices", "processes", "coordinator", "process_id", "distributed", "launched",
}  # fmt: skip
SETTINGS = (
    "optimizer", "learning_rate", "weight_decay", "qk_clip", "max_norm", "layers", "units", "heads",
    "context", "batch", "accumulate", "steps", "mesh",
)  # fmt: skip
VALID_BATCHES = 8
# Steps over which the learning rate rises: a Transformer whose first steps are long is thrown far
# off by them, and there rounding grows into another run.
WARM_UP = 20


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; bad input ends in one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv

    def start(args: argparse.Namespace) -> int | None:
        launch.check_options(args)
        check_sizes(args)
        if launch.launches(args):
            return launch.launch(args, argv, lambda: resumes(args.out))
        launch.join(args)
        try:
            experiment(args)
        except BaseException as error:
            if jax.process_count() > 1:
                launch.end_alone(error)
            raise
        return None

    return run(options(), start, argv)


def options() -> argparse.ArgumentParser:
    parser = command_line(__doc__, "sharded_transformer")
    add = parser.add_argument
    add("--mesh", default="", help="devices along each axis, data=4,model=2; default: all on data")
    add("--style", choices=["jit", "shard_map", "pmap"], default="jit")
    add("--axes", choices=["auto", "explicit"], default="auto", help="of the mesh in --style jit")
    add("--compare", action="store_true",
        help="one device and every style; with --qk-clip: without it and with it")  # fmt: skip
    add("--data", type=Path, help="text file, or directory with train, valid and test files")
    add("--layers", type=int, default=2)
    add("--units", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=64, help="characters that the network sees")
    add("--batch", type=int, default=64, help="sequences of a step, over all devices")
    add("--accumulate", type=int, default=2, help="parts of the batch, one after the other")
    add("--steps", type=int, default=200)
    add("--learning-rate", type=float, default=3e-3, help="the highest, after 20 steps")
    add("--weight-decay", type=float, default=0.1)
    add("--optimizer", choices=[*OPTIMIZERS], default="adamw")
    add("--qk-clip", type=float, default=math.inf, metavar="LOGIT",
        help="largest attention logit; inf only measures")  # fmt: skip
    add("--max-norm", type=float, default=0.5, help="of clip_by_global_norm; inf only measures")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the products")
    add("--checkpoint-every", type=int, default=50, metavar="STEPS")
    add("--cache", type=Path, default=user_cache(), help="directory of the built-in corpus")
    launch.add_options(parser)
    return parser


def check_sizes(args: argparse.Namespace) -> None:
    """Raises InputError for what can be told without asking for devices."""
    low = dict.fromkeys(("layers", "units", "heads", "context", "batch", "accumulate", "steps",
                         "checkpoint_every"), 1)  # fmt: skip
    for name, least in low.items():
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise InputError(f"`--{option}` must be at least {least}, got {getattr(args, name)}.")
    for name in ("learning_rate", "weight_decay", "max_norm", "qk_clip"):
        value = getattr(args, name)
        # A clip itself takes an infinite limit; a step of infinite length helps nobody.
        if not value >= 0 or (math.isinf(value) and name not in ("max_norm", "qk_clip")):
            option = name.replace("_", "-")
            raise InputError(f"`--{option}` must be a number of at least 0, got {value}.")
    if args.units % args.heads:
        raise InputError(
            f"`--units` must be a multiple of `--heads` {args.heads}, got {args.units}."
        )
    if args.axes == "explicit" and args.style != "jit":
        raise InputError(f"`--axes explicit` belongs to `--style jit`, got {args.style!r}.")
    if args.compare and (args.distributed or (args.processes or 1) > 1):
        raise InputError("`--compare` runs on one device as well: leave out the other processes.")
    # Muon multiplies matrices, of which the program of one device sees a part.
    by_hand = args.style == "shard_map" or args.axes == "explicit"
    if args.optimizer == "muon" and (by_hand or (args.compare and math.isinf(args.qk_clip))):
        raise InputError(
            "`--optimizer muon` needs whole matrices: `--style jit` with automatic axes or `pmap`, "
            "and `--compare` only with `--qk-clip`."
        )
    sizes = mesh_sizes(args.mesh)
    if args.style == "pmap" and not args.compare and sizes.get("model", 1) != 1:
        raise InputError(
            f"`--style pmap` is data parallel: `--mesh` must have model=1, got {args.mesh}."
        )
    if args.data is not None and not args.data.exists():
        raise InputError(f"`--data` must be a file or a directory that exists, got {args.data}.")


def mesh_sizes(text: str) -> dict[str, int]:
    """`data=4,model=2` as a dict; an axis that is not named is not in it."""
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in ("data", "model") or not size.isdigit() or int(size) < 1 or name in sizes:
            raise InputError(f"`--mesh` must look like data=4,model=2, got {text!r}.")
        sizes[name] = int(size)
    return sizes


def make_mesh(args: argparse.Namespace) -> Mesh:
    """The devices as data × model; those that are left over stay idle in a single process."""
    sizes, count = mesh_sizes(args.mesh), jax.device_count()
    model = sizes.get("model", 1)
    data = sizes.get("data", max(count // model, 1))
    needed = data * model
    if needed > count or (needed < count and jax.process_count() > 1):
        raise InputError(
            f"`--mesh` data={data},model={model} needs {needed} devices, there are {count} in "
            f"{jax.process_count()} process(es): give another `--mesh`, or on a CPU "
            f"`--cpu-devices {max(needed // jax.process_count(), 1)}`."
        )
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:needed],
    )  # fmt: skip


def check_mesh(args: argparse.Namespace, mesh: Mesh) -> None:
    """Raises InputError where a size does not divide evenly over the devices."""
    data, model = mesh.shape["data"], mesh.shape["model"]
    for option, size, parts, why in (
        ("batch", args.batch, data * args.accumulate, f"data={data} × accumulate"),
        ("units", args.units, data, f"data={data}"),
        ("heads", args.heads, model, f"model={model}"),
    ):
        if size % parts:
            raise InputError(f"`--{option}` must be a multiple of {why} = {parts}, got {size}.")


def resumes(out: Path) -> str:
    steps = saved_steps(out)
    start = f"step {steps[-1]}" if steps else "the start"
    return f"The same command goes on from {start} in {out}"


class Result(NamedTuple):
    """A finished run; losses are nats per character."""

    style: str
    history: History
    valid: float
    checksum: int
    replicas_equal: bool


def experiment(args: argparse.Namespace) -> None:
    """One run, or one for each style, and its numbers on the screen."""
    console.quiet = jax.process_index() > 0
    mesh = make_mesh(args)
    corpus = load_corpus(args.data, "char", 10_000, args.cache)
    for split in ("train", "valid"):
        if len(getattr(corpus, split)) <= args.context + 1:
            raise InputError(
                f"`--data` must hold more than context + 1 = {args.context + 1} characters for "
                f"{split}, got {len(getattr(corpus, split))}."
            )
    style = STYLES["explicit" if args.axes == "explicit" else args.style](mesh)
    if args.compare and math.isfinite(args.qk_clip):
        check_mesh(args, mesh)
        compare_clips(args, style, corpus)
        return
    if not args.compare:
        check_mesh(args, mesh)
        title = f"{args.style}, {', '.join(f'{k}={v}' for k, v in mesh.shape.items())}"
        result = train(args, style, title, corpus, args.out)
        console.print(
            f"validation {result.valid / math.log(2):.4f} bits per character, "
            f"largest norm {max(result.history['grad_norm']):.4g}, "
            f"largest logit {max(result.history['max_logit']):.4g}, "
            f"clipped {np.mean(result.history['clipped']):.0%} of the steps, "
            f"replicas {'equal' if result.replicas_equal else 'DIFFERENT'}, "
            f"checksum {result.checksum:08x}"
        )
        return
    flat = mesh.devices.reshape(-1, 1)
    runs = {
        "one device": Style(Mesh(flat[:1], mesh.axis_names)),
        **{name: make(mesh) for name, make in STYLES.items() if name != "pmap"},
        "pmap": STYLES["pmap"](Mesh(flat, mesh.axis_names)),
    }
    for style in runs.values():
        check_mesh(args, style.mesh)
    # On the host, as each run overwrites its own.
    start = jax.device_get(Program(args, runs["one device"], len(corpus.vocabulary)).start())
    results = [
        train(args, style, name, corpus, args.out / name.replace(" ", "_"), start)
        for name, style in runs.items()
    ]
    console.print(comparison(results))


class Program:
    """The network, its optimizer and their sharding, compiled for one style."""

    def __init__(self, args: argparse.Namespace, style: Style, vocabulary: int):
        self.args, self.style = args, style
        sizes = Sizes(vocabulary, args.context, args.layers, args.units, args.heads)
        self.network = functools.partial(Transformer, sizes, args.dtype, style.layout)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, args.learning_rate, WARM_UP, max(args.steps, WARM_UP + 1)
        )
        make = functools.partial(OPTIMIZERS[args.optimizer], weight_decay=args.weight_decay)
        # The clip comes first: what it limits is the gradient, averaged over all that was seen.
        # That of attention logits comes last: it turns the step.
        self.optimizer = optax.chain(
            gradclip_jax.clip_by_global_norm(args.max_norm, axis_name=style.axis_name),
            make(rate),
            gradclip_jax.qk_clip(args.qk_clip, heads=attention_heads, axis_name=style.data_axis),
        )
        abstract = nnx.eval_shape(lambda: self.network(rngs=nnx.Rngs(args.seed)))
        self.graph, params = nnx.split(abstract, nnx.Param)
        opt_state = jax.eval_shape(self.optimizer.init, params)
        specs = style.specs(params)
        # Moments lie where their parameters do; counters and norms everywhere. Muon leaves a mask
        # where it has a matrix for Adam, and the other way round.
        opt_specs = optax.tree.map_params(
            self.optimizer, lambda x, spec: x if is_masked(x) else spec, opt_state, specs,
            transform_non_params=lambda _: P(), is_leaf=is_masked,
        )  # fmt: skip
        self.abstract, self.specs = (params, opt_state), (specs, opt_specs)
        numbers, batch = dict.fromkeys(SEEN, P()), P(None, "data")
        self.step = style.compiled(
            self._step, (*self.specs, batch), (*self.specs, numbers), donate=(0, 1)
        )
        self.score = style.compiled(self._score, (specs, batch), P())

    def start(self) -> Any:
        """The state before the first step, split from the beginning and the same for any mesh."""

        def made() -> Any:
            params = nnx.state(self.network(rngs=nnx.Rngs(self.args.seed)), nnx.Param)
            return params, self.optimizer.init(params)

        return Style(self.style.mesh).compiled(made, (), self.specs)()

    def split(self, state: Any) -> Any:
        """A state on the host, split as `start` would split it."""
        return jax.device_put(state, Style(self.style.mesh).shardings(self.specs))

    def batch(self, text: np.ndarray, seed: tuple[int, ...]) -> jax.Array:
        """Random pieces of the text, [micro, sequence, time + 1], decided by the seed alone."""
        args = self.args
        starts = np.random.default_rng(seed).integers(
            len(text) - args.context, size=(args.accumulate, args.batch // args.accumulate)
        )

        def read(index: tuple[slice, ...]) -> np.ndarray:
            return text[starts[index[:2]][..., None] + np.arange(args.context + 1)]

        return self.style.batch((*starts.shape, args.context + 1), read)

    def _objective(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, Logits]:
        loss, logits = next_token_loss(nnx.merge(self.graph, params), tokens)
        return self.style.loss(loss), logits

    def _step(self, params: Any, opt_state: Any, batch: jax.Array) -> Any:
        def add(total: Any, tokens: jax.Array) -> Any:
            differentiated = jax.value_and_grad(self._objective, has_aux=True)
            (loss, logits), grads = differentiated(params, tokens)
            return jax.tree.map(jnp.add, total, (loss, grads)), logits

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, logits = jax.lax.scan(add, zero, batch)
        logits = jax.tree.map(lambda x: jnp.max(x, axis=0), logits)  # of all micro-batches
        # Accumulate, average over micro-batches and devices, then clip, once.
        loss, grads = self.style.averaged(jax.tree.map(lambda x: x / len(batch), total))
        updates, opt_state = self.optimizer.update(grads, opt_state, params, max_logits=logits)
        seen = {"loss": loss, **gradclip_jax.metrics(opt_state)}
        seen["max_logit"] = seen["clip_1/clip_measure"]
        params = optax.apply_updates(params, updates)
        return params, opt_state, {name: seen[name] for name in SEEN}

    def _score(self, params: Any, batch: jax.Array) -> jax.Array:
        losses = jax.lax.map(lambda tokens: self._objective(params, tokens)[0], batch)
        return self.style.averaged(losses.mean())


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def train(
    args: argparse.Namespace, style: Style, title: str, corpus: Corpus, out: Path, start: Any = None
) -> Result:
    """One run, from its last checkpoint if there is one, to its validation loss."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}
    config |= {"corpus": corpus.digest}
    launch.agree({**config, "style": style.name, "mesh": dict(style.mesh.shape)})
    if (saved := saved_result(out, config)) is not None:
        loop.say_finished(title, out)
        return Result(**saved)
    program = Program(args, style, len(corpus.vocabulary))

    def step(state: Any, number: np.int32) -> tuple[Any, dict[str, jax.Array]]:
        batch = program.batch(corpus.train, (args.seed, int(number)))
        *state, scalars = program.step(*state, batch)
        return tuple(state), scalars

    state, history = loop.train(
        step,
        program.start() if start is None else program.split(start),
        args.steps,
        out,
        title=title,
        config=config,
        per_step=args.batch * args.context,
        unit="characters",
        checkpoint_every=args.checkpoint_every,
        fetch_every=FETCH_EVERY,
        placement=loop.Placement(
            place=lambda state: style.place(state, program.specs),
            plain=lambda state: style.plain(state, program.specs),
            fetch=lambda rows: [{k: style.number(v) for k, v in row.items()} for row in rows],
        ),
    )
    losses = [
        style.number(program.score(state[0], program.batch(corpus.valid, (args.seed, 0, i))))
        for i in range(VALID_BATCHES)
    ]
    result = Result(
        style=title,
        history=history,
        valid=float(np.mean(losses)),
        checksum=checksum(style.plain(state, program.specs)),
        replicas_equal=style.replicas_equal(state),
    )
    if jax.process_index() == 0:
        write_json(out / "result.json", result._asdict())
    return result


def comparison(results: list[Result]) -> Table:
    """How far the losses and norms of every style are from those of one device."""
    one = results[0]
    table = Table(title="against one device", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("", "first norm", "last norm", "norms differ", "losses differ", "replicas"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for result in results:
        norms = result.history["grad_norm"]
        table.add_row(
            result.style,
            f"{norms[0]:.7g}",
            f"{norms[-1]:.7g}",
            *(f"{difference(result, one, name):.1e}" for name in ("grad_norm", "loss")),
            "equal" if result.replicas_equal else "DIFFERENT",
        )
    return table


def compare_clips(args: argparse.Namespace, style: Style, corpus: Corpus) -> None:
    """Trains without the clip of attention logits and with it; table and plot."""
    table = Table(title="attention logits", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("", "largest", "at the end", "bits per character"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels: dict[Axes, list] = {left: [(args.qk_clip, "its limit", "0.4")], right: []}
    for name, limit in (("without", math.inf), ("qk_clip", args.qk_clip)):
        one = argparse.Namespace(**{**vars(args), "qk_clip": limit})
        result = train(one, style, name, corpus, args.out / name)
        logits = result.history["max_logit"]
        score = f"{result.valid / math.log(2):.3f}"
        table.add_row(name, f"{max(logits):.4g}", f"{logits[-1]:.4g}", score)
        bits = np.array(result.history["loss"]) / math.log(2)
        for axes, values in ((left, logits), (right, bits)):
            (line,) = axes.plot(range(1, args.steps + 1), values, lw=0.9)
            labels[axes].append((values[-1], name, line.get_color()))
    left.axhline(args.qk_clip, color="0.4", ls="--", lw=1)
    left.set(yscale="log", xlabel="step", title="Largest attention logit")
    right.set(xlabel="step", title="Loss in bits per character")
    plain_ticks(left)
    for axes, names in labels.items():
        axes.set_xlim(0, args.steps)
        quiet_frame(axes)
        label_lines(axes, names)
    settings = {name: getattr(args, name) for name in SETTINGS}
    save_results(args.out, [table], settings, ("jax", "flax", "optax"))
    figure.savefig(args.out / "sharded_transformer.png", dpi=100)


def difference(result: Result, one: Result, name: str) -> float:
    """The largest relative difference over the steps."""
    a, b = (np.array(r.history[name]) for r in (result, one))
    return float(np.max(np.abs(a / b - 1)))


if __name__ == "__main__":
    sys.exit(main())
