"""Train a recurrent language model with a clipped gradient, and see what the clip does.

    python examples/language_model/train.py --compare --out demo

trains the same network twice on the prose that Python ships, with the clip and without it, and
ends in a table and a plot. Every strategy of `gradclip_jax`, every limit of `gradclip_jax.limits`
and every optimizer of optax can be chosen by name: `--clip percentile --clip-arg window=64`. A run
that is killed continues bit for bit when the same command is given again.

    python examples/language_model/train.py --preset zaremba-small --data ptb
    python examples/language_model/train.py --preset shakespeare --data tinyshakespeare.txt
    python examples/language_model/train.py --preset chatbot --chat

are whole recipes by name; the last one answers at a prompt when it is trained.

The recipe is that of Zaremba, Sutskever, Vinyals 2014, "Recurrent neural network regularization",
https://arxiv.org/abs/1409.2329: truncated back-propagation through time with the state carried
over, the loss summed over the unrolled steps, the gradient limited to a norm of 5.
"""

import argparse
import ast
import contextlib
import difflib
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradclip_jax
from examples.language_model.command_line import InputError, Parser, console, writing
from examples.language_model.data import Corpus, WittenBell, load_corpus, segments, user_cache
from examples.language_model.dialogues import KINDS, context, generated, questions, readable
from examples.language_model.model import (
    LanguageModel,
    measured_by_clip,
    replies,
    sample,
    score,
    train_step,
)
from examples.language_model.recurrent import CELLS
from examples.language_model.run import (
    SCALARS,
    Board,
    Checkpoints,
    History,
    Result,
    finished,
    progress,
    report,
    restore,
    write_json,
)

# Scalars stay on the device for this many steps: fetching each at once would stall a fast one.
FETCH_EVERY = 20
# Where a run lies and how often it is saved do not change its numbers; the text is compared by
# its digest.
PLACES = {"out", "cache", "data", "checkpoint_every"}
NOT_COMPARED = {*PLACES, "dialogues", "compare", "chat", "preset"}

# Zaremba et al. 2014, section 4.1: plain SGD at rate 1, evaluated as one stream.
ZAREMBA = {
    "level": "word", "layers": 2, "forget_bias": 0.0, "batch": 20, "max_norm": 5.0,
    "learning_rate": 1.0, "momentum": 0.0, "eval_streams": 1,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "zaremba-small": ZAREMBA | {
        "units": 200, "unroll": 20, "init_scale": 0.1, "dropout": 0.0,
        "epochs": 13, "constant_epochs": 4, "epoch_divisor": 2.0,
    },
    "zaremba-medium": ZAREMBA | {
        "units": 650, "unroll": 35, "init_scale": 0.05, "dropout": 0.5,
        "epochs": 39, "constant_epochs": 6, "epoch_divisor": 1.2,
    },
    "zaremba-large": ZAREMBA | {
        "units": 1500, "unroll": 35, "init_scale": 0.04, "dropout": 0.65, "max_norm": 10.0,
        "epochs": 55, "constant_epochs": 14, "epoch_divisor": 1.15,
    },
    # For one text; that of Tiny Shakespeare (a million characters) takes minutes on two cores.
    "shakespeare": {
        "level": "char", "units": 256, "dropout": 0.1, "batch": 32, "unroll": 64, "epochs": 3,
        "optimizer": "adam", "learning_rate": 3e-3, "max_norm": 5.0,
    },
    "chatbot": {
        "dialogues": True, "level": "word", "cell": "gru", "units": 192, "batch": 32, "unroll": 64,
        "epochs": 6, "optimizer": "rmsprop", "learning_rate": 2e-3, "max_norm": 5.0,
    },
}  # fmt: skip
ANSWER = 40  # the most tokens of an answer


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; bad input ends in one line on stderr and exit status 2."""
    parser = command_line()
    args = parser.parse_args(argv)
    if args.preset:
        # What is given beside the preset still counts.
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)
    try:
        check_sizes(args)
        names = [args.clip, "none"] if args.compare else [args.clip]
        if len(set(names)) < len(names):
            raise InputError("`--compare` needs a strategy as `--clip`, got 'none'.")
        for name in names:
            build_optimizer(args, name, steps=1)
        if args.dialogues and args.data is None:
            corpus = generated(args.seed, args.level, args.vocabulary)
        else:
            corpus = load_corpus(args.data, args.level, args.vocabulary, args.cache)
        check_corpus(corpus, args)
        baselines = score_baselines(corpus)
        results = []
        for name in names:
            out = args.out / name if args.compare else args.out
            results.append(train(args, name, corpus, out))
        with writing(args.out):
            report(results, baselines, args.out, settings(args, corpus))
        if args.chat:
            chat(args, names[0], corpus, args.out / names[0] if args.compare else args.out)
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command continues from the last checkpoint in {args.out}")
        return 130
    return 0


def command_line() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), help="all options of a published recipe")
    add("--data", type=Path, help="text file, or directory with train, valid and test files")
    add("--level", choices=["char", "word"], default="char")
    add("--vocabulary", type=int, default=10_000, help="tokens kept; the others are <unk>")
    add("--cell", choices=list(CELLS), default="lstm")
    add("--layers", type=int, default=1)
    add("--units", type=int, default=256)
    add("--dropout", type=float, default=0.0, help="on all connections that are not recurrent")
    add("--init-scale", type=float, help="uniform initial weights, default 1 / sqrt(units)")
    add("--forget-bias", type=float, default=1.0,
        help="added to the bias of the gate that keeps the state; 0 in Zaremba")  # fmt: skip
    add("--batch", type=int, default=32, help="parallel streams")
    add("--unroll", type=int, default=50, help="steps of back-propagation through time")
    add("--epochs", type=int, default=1)
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--optimizer", default="sgd", help="any optax optimizer by name")
    add("--optimizer-arg", action="append", default=[], metavar="KEY=VALUE")
    # 0.3 with momentum 0.9 is a step of 3: with the limit of 5 the network learns at once,
    # without it the first steps throw it where it does not come back from.
    add("--learning-rate", type=float, default=0.3)
    add("--momentum", type=float, default=0.9, help="of --optimizer sgd")
    add("--decay-from", type=float, default=0.5, metavar="FRACTION",
        help="part of the run after which the learning rate falls linearly to 0")  # fmt: skip
    add("--epoch-divisor", type=float, metavar="FACTOR",
        help="instead: divide the learning rate by this after every epoch")  # fmt: skip
    add("--constant-epochs", type=int, default=1, help="epochs before the first such division")
    add("--clip", default="clip_by_global_norm",
        help="any strategy of gradclip_jax, any limit of gradclip_jax.limits, or none")  # fmt: skip
    add("--max-norm", type=float, help="first argument of the clip; 5 where it must have one")
    add("--clip-arg", action="append", default=[], metavar="KEY=VALUE",
        help="other arguments of the clip, as in gradclip_jax.from_config")  # fmt: skip
    add("--mean-loss", action="store_true",
        help="average the loss over the unrolled steps; default: their sum, "
        "averaged over the batch, so that a norm of 5 means what it does in Zaremba")  # fmt: skip
    add("--cotangent-limit", type=float,
        help="clip the gradient of the state by value at each time step (Graves 2013)")  # fmt: skip
    add("--eval-streams", type=int, help="parallel streams in validation, default --batch")
    add("--sample", type=int, default=300, help="tokens of text at the end")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=200, metavar="STEPS")
    add("--compare", action="store_true", help="train with the clip and without, and draw both")
    add("--dialogues", action="store_true",
        help="each line is a turn: count right answers to the questions in the test split; "
        "without --data the dialogues are generated")  # fmt: skip
    add("--chat", action="store_true", help="then answer what is typed, until Ctrl-D")
    add("--out", type=Path, default=Path("runs/language_model"), help="directory of the run")
    add("--cache", type=Path, default=user_cache(), help="directory of the built-in corpus")
    return parser


def settings(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """What differs from the defaults, and the text that was trained on."""
    usual = vars(command_line().parse_args([]))
    found = {k: v for k, v in vars(args).items() if v != usual[k] and k not in PLACES}
    sizes = [len(split) for split in (corpus.train, corpus.valid, corpus.test)]
    words = f"{corpus.level}s"
    return {**found, f"{words} of the splits": sizes, f"different {words}": len(corpus.vocabulary)}


def check_sizes(args: argparse.Namespace) -> None:
    sizes = ("layers", "units", "batch", "unroll", "epochs", "checkpoint_every", "constant_epochs")
    least = dict.fromkeys((*sizes, "steps", "eval_streams"), 1)
    for name, low in {**least, "vocabulary": 2, "sample": 0, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise InputError(f"`--{name.replace('_', '-')}` must be at least {low}, got {value}.")
    if not 0 <= args.dropout < 1:
        raise InputError(f"`--dropout` must be at least 0 and below 1, got {args.dropout}.")
    if not 0 <= args.decay_from <= 1:
        raise InputError(f"`--decay-from` must lie between 0 and 1, got {args.decay_from}.")
    for name in ("learning_rate", "init_scale", "cotangent_limit", "epoch_divisor"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"`--{name.replace('_', '-')}` must be positive, got {value}.")
    if args.chat and not args.dialogues:
        raise InputError("`--chat` needs `--dialogues`, or `--preset chatbot`.")
    if args.data is not None and not args.data.exists():
        raise InputError(f"`--data` must be a file or a directory that exists, got {args.data}.")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"`--out` must be a directory, got the file {args.out}.")


def check_corpus(corpus: Corpus, args: argparse.Namespace) -> None:
    needed = args.batch * args.unroll + 1
    if len(corpus.train) < needed:
        raise InputError(
            f"`--data` must hold at least batch × unroll + 1 = {needed} {args.level}s to train on, "
            f"got {len(corpus.train)}: use more text, or a smaller `--batch` or `--unroll`."
        )
    for split in ("valid", "test"):
        if len(getattr(corpus, split)) < 2:
            raise InputError(
                f"`--data` must hold at least 2 {args.level}s for {split}, "
                f"got {len(getattr(corpus, split))}."
            )
    if args.dialogues and not questions(corpus, KINDS, most=1):
        raise InputError(
            "`--data` must hold, for `--dialogues`, a question among its last lines: one that ends "
            "in a question mark, and its answer on the next line."
        )


def build_optimizer(
    args: argparse.Namespace, name: str, steps: int, per_epoch: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The clip `name` in front of the optimizer; refuses names and arguments that do not fit."""
    if args.epoch_divisor:
        start = (args.constant_epochs - 1) * per_epoch
        learning_rate = optax.exponential_decay(
            args.learning_rate, per_epoch, 1 / args.epoch_divisor, start, staircase=True
        )
    else:
        start = round(args.decay_from * steps)
        learning_rate = optax.linear_schedule(args.learning_rate, 0.0, max(steps - start, 1), start)
    optimizers = {k: f for k, f in vars(optax).items() if _first_parameter(f) == "learning_rate"}
    keywords = _keywords(args.optimizer_arg, "--optimizer-arg")
    if args.optimizer == "sgd":
        keywords = {"momentum": args.momentum or None, **keywords}
    optimizer = _call("--optimizer", args.optimizer, optimizers, [learning_rate], keywords)
    chain = optax.chain(build_clip(args, name), optimizer)

    def one_step(params):
        _, state = chain.update(params, chain.init(params), params)
        return measured_by_clip(state)

    try:  # what only fails in use (a missing `value_fn`) should fail before anything is written
        measured = jax.eval_shape(one_step, {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)})
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`--clip` {name} and `--optimizer` {args.optimizer} must work on gradients and "
            f"parameters alone: {_first_line(error)}"
        ) from None
    if not measured.keys() >= {*SCALARS[1:], "clip_count"}:
        raise InputError(f"`--clip` must measure a norm to be logged, got {name}.")
    return chain


def build_clip(args: argparse.Namespace, name: str) -> optax.GradientTransformationExtraArgs:
    """A strategy, a limit on the global norm, or a clip that only measures."""
    if name == "none":
        # It lets everything pass, so that the plots show what the optimizer saw.
        return gradclip_jax.clip_by_global_norm(math.inf, on_nonfinite="propagate")
    limit = getattr(gradclip_jax.limits, name, None)
    arguments = _keywords(args.clip_arg, "--clip-arg")
    needed = _first_parameter(limit or getattr(gradclip_jax, name, None), without_default=True)
    if args.max_norm is not None or (needed and needed not in arguments):
        arguments["threshold"] = 5.0 if args.max_norm is None else args.max_norm
    config = {"method": name, **arguments}
    try:
        return gradclip_jax.from_config(
            {"method": "clip_to_limit", "limit": config} if limit else config
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"`--clip` must be a clip, got {name}: {_first_line(error)}") from None


def _first_parameter(function: Any, without_default: bool = False) -> str | None:
    if not inspect.isfunction(function):
        return None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            return None
        has_default = parameter.default is not parameter.empty
        return None if without_default and has_default else parameter.name
    return None


def _call(option: str, name: str, known: dict[str, Callable], arguments: list, keywords: dict):
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "none"], n=3, cutoff=0.4) or sorted(known)
        raise InputError(
            f"`{option}` must be a known name, got {name!r}; nearest: {', '.join(near)}."
        )
    try:
        return known[name](*arguments, **keywords)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`{option}` {name} takes {inspect.signature(known[name])}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _keywords(pairs: list[str], option: str) -> dict[str, Any]:
    keywords = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise InputError(f"`{option}` must look like key=value, got {pair!r}.")
        try:
            keywords[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            # Not a Python value: infinity, or a word such as the name of a response.
            keywords[key] = {"inf": math.inf, "nan": math.nan}.get(value, value)
    return keywords


def score_baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """What counting alone achieves; the highest order is the one to beat."""
    orders = (1, 3, 5) if corpus.level == "char" else (1, 2, 3)
    grams = {n: WittenBell(corpus.train, n, len(corpus.vocabulary)) for n in orders}
    return {
        f"{n}-gram": {split: gram.nats(getattr(corpus, split)) for split in ("valid", "test")}
        for n, gram in grams.items()
    }


def build(
    args: argparse.Namespace, clip: str, corpus: Corpus
) -> tuple[LanguageModel, nnx.Optimizer, int, int]:
    """A new network and its optimizer, the steps of the run and those of an epoch."""
    per_epoch = (len(corpus.train) - 1) // (args.batch * args.unroll)
    steps = args.steps or args.epochs * per_epoch
    model = LanguageModel(
        len(corpus.vocabulary), args.cell, args.layers, args.units, args.dropout,
        scale=args.init_scale, forget_bias=args.forget_bias, cotangent_limit=args.cotangent_limit,
        rngs=nnx.Rngs(args.seed),
    )  # fmt: skip
    optimizer = nnx.Optimizer(model, build_optimizer(args, clip, steps, per_epoch), wrt=nnx.Param)
    return model, optimizer, steps, per_epoch


def train(args: argparse.Namespace, clip: str, corpus: Corpus, out: Path) -> Result:
    """One run, from its last checkpoint if there is one, to its test score."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}
    config |= {"clip": clip, "corpus": corpus.digest}
    if (result := finished(out, config)) is not None:
        console.print(f"The run in {out} is finished; reporting it again.")
        return result

    model, optimizer, steps, per_epoch = build(args, clip, corpus)
    streams = args.eval_streams or args.batch
    valid = list(segments(corpus.valid, streams, args.unroll))
    # Whole pieces only: the network shall not learn the padding.
    whole = corpus.train[: per_epoch * args.batch * args.unroll + 1]
    pieces = list(segments(whole, args.batch, args.unroll))

    # Before anything is written: a checkpoint that does not fit stops the run here.
    state = (nnx.state((model, optimizer)), model.start(args.batch))
    history: History = {name: [] for name in (*SCALARS, "valid")}
    step, (variables, carry), history = restore(out, state, history)
    nnx.update((model, optimizer), variables)
    write_json(out / "config.json", config)

    title = f"{args.cell} · {clip}"
    tokens = args.batch * args.unroll
    pending: list[dict[str, jax.Array]] = []
    with (
        Checkpoints(out) as checkpoints,
        Board(out, step) as writer,
        progress(title, steps, step, tokens) as show,
    ):
        while step < steps:
            inputs, targets, _ = pieces[step % per_epoch]
            if step % per_epoch == 0:
                carry = model.start(args.batch)
            carry, scalars = train_step(
                model, optimizer, carry, inputs, targets, mean_loss=args.mean_loss
            )
            pending.append({name: scalars[name] for name in SCALARS})
            step += 1
            ends = step % per_epoch == 0 or step == steps
            saves = step % args.checkpoint_every == 0 or step == steps
            if ends or saves or step % FETCH_EVERY == 0:
                for at, row in enumerate(jax.device_get(pending), start=step - len(pending) + 1):
                    for name, value in row.items():
                        history[name].append(float(value))
                        writer.add_scalar(name, float(value), at)
                pending.clear()
                show(step, history)
            if ends:
                history["valid"].append([step, score(model, valid, streams)])
                writer.add_scalar("valid_loss", history["valid"][-1][1], step)
            if saves:
                writer.flush()
                state = (nnx.state((model, optimizer)), carry)
                checkpoints.save(step, state, history)
            lost = bool(history["loss"]) and not math.isfinite(history["loss"][-1])
            if clip == "none" and step % FETCH_EVERY == 0 and lost:
                break  # what is not finite has reached the parameters, and nothing brings it back

    counts = gradclip_jax.metrics(optimizer.opt_state)
    answers = None
    if args.dialogues:
        answers, text = ask(model, corpus, KINDS if args.data is None else {})
    else:
        first = corpus.vocabulary.index("\n") if "\n" in corpus.vocabulary else 0
        drawn = sample(model, jnp.int32(first), jax.random.key(args.seed), length=args.sample)
        text = corpus.text(np.asarray(drawn))
    result = Result(
        clip=clip,
        level=args.level,
        steps=step,
        test=score(model, segments(corpus.test, streams, args.unroll), streams),
        clip_count=int(counts["clip_count"]),
        nonfinite_count=int(counts["nonfinite_count"]),
        text=text,
        history=history,
        answers=answers,
    )
    write_json(out / "result.json", result._asdict())
    return result


def ask(
    model: LanguageModel, corpus: Corpus, kinds: dict[str, str]
) -> tuple[dict[str, list[int]], str]:
    """Right answers and questions of each kind in the test split, and the longest dialogue."""
    asked = questions(corpus, kinds)
    said = replies(model, [question.context for question in asked], corpus.end, ANSWER)
    counts: dict[str, list[int]] = {}
    for question, answer in zip(asked, said, strict=True):
        count = counts.setdefault(question.kind, [0, 0])
        count[0] += answer == question.answer
        count[1] += 1
    longest, answer = max(zip(asked, said, strict=True), key=lambda pair: len(pair[0].context))
    shown = corpus.text(np.array([*longest.context[1:], *answer], int))
    return counts, readable(shown)


def chat(args: argparse.Namespace, clip: str, corpus: Corpus, out: Path) -> None:
    """Answers each line with the likeliest turn, by the last checkpoint of a run."""
    model, optimizer, _, _ = build(args, clip, corpus)
    state = (nnx.state((model, optimizer)), model.start(args.batch))
    step, (variables, _), _ = restore(out, state, {})
    if step == 0:
        raise InputError(f"`--out` must hold the checkpoint of the run for `--chat`, got {out}.")
    nnx.update((model, optimizer), variables)
    console.print("Say something. An empty line begins a new dialogue, Ctrl-D ends.")
    turns: list[list[int]] = []
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if not (line := input("> ").strip()):
                turns = []
                continue
            turns.append(corpus.tokens(line))
            (reply,) = replies(model, [context(turns, corpus.end)], corpus.end, ANSWER)
            turns.append(reply)
            console.print(readable(corpus.text(np.array(reply, int))), markup=False)
    console.print()


if __name__ == "__main__":
    sys.exit(main())
