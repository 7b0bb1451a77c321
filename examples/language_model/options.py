"""The options of `train.py`, and what is wrong with those that do not fit."""

import argparse
import math
import textwrap
from pathlib import Path
from typing import Any

from examples.language_model.command_line import InputError, Parser, command_line
from examples.language_model.data import Corpus, user_cache
from examples.language_model.dialogues import KINDS, questions
from examples.language_model.optimizers import limits, strategies
from examples.language_model.presets import DEMO, PRESETS
from examples.language_model.recurrent import CELLS

# Where a run lies and how often it is saved do not change its numbers; the text is compared by
# its digest.
PLACES = {"out", "cache", "data", "checkpoint_every"}
NOT_COMPARED = {*PLACES, "dialogues", "compare", "chat", "preset"}


def options(doc: str | None = None) -> Parser:
    """The command line of `train.py`."""
    parser = command_line(doc, "language_model")
    parser.prog, parser.epilog = "train.py", names_of_clips()
    add = parser.add_argument_group("recipe").add_argument
    add("--preset", choices=list(PRESETS), help="all options of a recipe; those given count more")
    add("--compare", action="store_true", help="train with the clip and without, and draw both")
    add("--chat", action="store_true", help="then answer what is typed, until Ctrl-D")
    add("--checkpoint-every", type=int, default=200, metavar="STEPS", help="steps between two")
    add("--sample", type=int, default=300, help="tokens of text at the end")

    add = parser.add_argument_group("text").add_argument
    add("--data", type=Path, help="text file, or directory with train, valid and test files")
    add("--cache", type=Path, default=user_cache(), help="directory of the built-in corpus")
    add("--level", choices=["char", "word"], default="char", help="what a token is")
    add("--vocabulary", type=int, default=10_000, help="tokens kept; the others are <unk>")
    add("--dialogues", action="store_true",
        help="each line is a turn: count right answers to the questions in the test split; "
        "without --data the dialogues are generated")  # fmt: skip

    add = parser.add_argument_group("network").add_argument
    add("--cell", choices=list(CELLS), default="lstm", help="of the recurrent layers")
    add("--layers", type=int, default=1, help="recurrent layers")
    add("--units", type=int, default=256, help="of each layer")
    add("--dropout", type=float, default=0.0, help="on all connections that are not recurrent")
    add("--init-scale", type=float, help="uniform initial weights, default 1 / sqrt(units)")
    add("--forget-bias", type=float, default=1.0,
        help="added to the bias of the gate that keeps the state; 0 in Zaremba")  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--batch", type=int, default=32, help="parallel streams")
    add("--unroll", type=int, default=50, help="steps of back-propagation through time")
    add("--epochs", type=int, default=1, help="passes over the training text")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--optimizer", default="sgd", help="any optax optimizer by name")
    add("--optimizer-arg", action="append", default=[], metavar="KEY=VALUE",
        help="other arguments of the optimizer")  # fmt: skip
    add("--learning-rate", type=float, default=DEMO["learning_rate"], help="at the start")
    add("--momentum", type=float, default=DEMO["momentum"], help="of --optimizer sgd")
    add("--decay-from", type=float, default=0.5, metavar="FRACTION",
        help="part of the run after which the learning rate falls linearly to 0")  # fmt: skip
    add("--epoch-divisor", type=float, metavar="FACTOR",
        help="instead: divide the learning rate by this after every epoch")  # fmt: skip
    add("--constant-epochs", type=int, default=1, help="epochs before the first such division")
    add("--mean-loss", action="store_true",
        help="average the loss over the unrolled steps; without: their sum, "
        "averaged over the batch, so that a norm of 5 means what it does in Zaremba")  # fmt: skip
    add("--eval-streams", type=int, help="parallel streams in validation, default --batch")

    add = parser.add_argument_group("clip").add_argument
    add("--clip", default="clip_by_global_norm",
        help="a strategy, a limit on the global norm, or none: the names are below")  # fmt: skip
    add("--max-norm", type=float, help="first argument of the clip; 5 where it must have one")
    add("--clip-arg", action="append", default=[], metavar="KEY=VALUE",
        help="other arguments of the clip, as in gradclip_jax.from_config")  # fmt: skip
    add("--cotangent-limit", type=float,
        help="clip the gradient of the state by value at each time step (Graves 2013)")  # fmt: skip
    return parser


def names_of_clips() -> str:
    """What `--clip` knows, as the end of the help."""
    lines = {"strategies of gradclip_jax": strategies(), "limits on the global norm": limits()}
    return "\n".join(
        textwrap.fill(f"{what}: {', '.join(names)}", 79, subsequent_indent="  ")
        for what, names in lines.items()
    )


def settings(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """What differs from the defaults, and the text that was trained on."""
    usual = vars(options().parse_args([]))
    found = {k: v for k, v in vars(args).items() if v != usual[k] and k not in PLACES}
    sizes = [len(split) for split in (corpus.train, corpus.valid, corpus.test)]
    words = f"{corpus.level}s"
    return {**found, f"{words} of the splits": sizes, f"different {words}": len(corpus.vocabulary)}


def check_sizes(args: argparse.Namespace) -> None:
    sizes = ("layers", "units", "batch", "unroll", "epochs", "checkpoint_every", "constant_epochs")
    least = dict.fromkeys((*sizes, "steps", "eval_streams"), 1)
    for name, low in {**least, "vocabulary": 2, "sample": 0}.items():
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
