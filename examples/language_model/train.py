"""Train a recurrent language model with a clipped gradient, and see what the clip does.

    python examples/language_model/train.py --preset demo

trains the same network twice on the prose that Python ships, with the clip and without it, and
ends in a table, a plot and a sentence. Every strategy of `gradclip_jax`, every limit of
`gradclip_jax.limits` and every optimizer of optax can be chosen by name: `--clip percentile
--clip-arg window=64`. A run that is killed continues bit for bit when the same command is given
again.

    python examples/language_model/train.py --preset zaremba-small --data ptb
    python examples/language_model/train.py --preset shakespeare --data tinyshakespeare.txt
    python examples/language_model/train.py --preset chatbot --chat

are whole recipes by name; the last one answers at a prompt when it is trained.

The recipe is that of Zaremba, Sutskever, Vinyals 2014, "Recurrent neural network regularization",
https://arxiv.org/abs/1409.2329: truncated back-propagation through time with the state carried
over, the loss summed over the unrolled steps, the gradient limited to a norm of 5.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gradclip_jax
from examples.language_model.chat import ask, chat
from examples.language_model.command_line import InputError, console, run
from examples.language_model.data import Corpus, WittenBell, load_corpus, segments
from examples.language_model.dialogues import KINDS, generated
from examples.language_model.directory import write_json
from examples.language_model.loop import say_finished, train
from examples.language_model.model import LanguageModel, sample, score, train_step
from examples.language_model.optimizers import SCALARS, build_optimizer
from examples.language_model.options import (
    NOT_COMPARED,
    check_corpus,
    check_sizes,
    options,
    settings,
)
from examples.language_model.presets import PRESETS
from examples.language_model.progress import NATS
from examples.language_model.report import Result, finished, loss_unit, report


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; bad input ends in one line on stderr and exit status 2."""
    parser = options(__doc__)
    preset = parser.parse_args(argv).preset
    if preset:
        # What is given with the preset still counts.
        parser.set_defaults(**PRESETS[preset])
    return run(parser, experiment, argv)


def experiment(args: argparse.Namespace) -> None:
    """One run, or two to compare, and a report."""
    check_sizes(args)
    names = [args.clip, "none"] if args.compare else [args.clip]
    if len(set(names)) < len(names):
        raise InputError("`--compare` needs a strategy as `--clip`, got 'none'.")
    for name in names:
        build_optimizer(args, name, steps=1)
    console.print("Reading the text.")
    if args.dialogues and args.data is None:
        corpus = generated(args.seed, args.level, args.vocabulary)
    else:
        corpus = load_corpus(args.data, args.level, args.vocabulary, args.cache)
    check_corpus(corpus, args)
    console.print(
        f"Counting n-grams of {len(corpus.train):,} {unit_of_text(args.level)}: the baselines."
    )
    baselines = score_baselines(corpus)
    runs = [Run(args, name, corpus, args.out / name if args.compare else args.out)
            for name in names]  # fmt: skip
    report([one.result() for one in runs], baselines, args.out, settings(args, corpus))
    if args.chat:
        chat(runs[0].trained(), corpus)


def unit_of_text(level: str) -> str:
    return "characters" if level == "char" else "words"


def score_baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """What counting alone achieves; the highest order is the one to beat."""
    orders = (1, 3, 5) if corpus.level == "char" else (1, 2, 3)
    grams = {n: WittenBell(corpus.train, n, len(corpus.vocabulary)) for n in orders}
    return {
        f"{n}-gram": {split: gram.nats(getattr(corpus, split)) for split in ("valid", "test")}
        for n, gram in grams.items()
    }


class Run:
    """One network, trained with one clip."""

    def __init__(self, args: argparse.Namespace, clip: str, corpus: Corpus, out: Path):
        self.args, self.clip, self.corpus, self.out = args, clip, corpus, out
        self.title = f"{args.cell.upper()} {'without a clip' if clip == 'none' else 'with ' + clip}"
        self.config = {k: v for k, v in vars(args).items() if k not in NOT_COMPARED}
        self.config |= {"clip": clip, "corpus": corpus.digest}
        self.per_epoch = (len(corpus.train) - 1) // (args.batch * args.unroll)
        self.steps = args.steps or args.epochs * self.per_epoch
        self.streams = args.eval_streams or args.batch

    def build(self) -> tuple[LanguageModel, nnx.Optimizer]:
        """A new network and its optimizer."""
        args = self.args
        model = LanguageModel(
            len(self.corpus.vocabulary), args.cell, args.layers, args.units, args.dropout,
            scale=args.init_scale, forget_bias=args.forget_bias,
            cotangent_limit=args.cotangent_limit, rngs=nnx.Rngs(args.seed),
        )  # fmt: skip
        optimizer = build_optimizer(args, self.clip, self.steps, self.per_epoch)
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def train(self) -> tuple[LanguageModel, nnx.Optimizer, dict[str, list]]:
        """From the last checkpoint, if there is one."""
        args, per_epoch = self.args, self.per_epoch
        model, optimizer = both = self.build()
        valid = list(segments(self.corpus.valid, self.streams, args.unroll))
        # Whole pieces only: the network must not learn the padding.
        whole = self.corpus.train[: per_epoch * args.batch * args.unroll + 1]
        pieces = list(segments(whole, args.batch, args.unroll))

        def step(state: Any, number: np.int32) -> tuple[Any, dict[str, jax.Array]]:
            variables, carry = state
            nnx.update(both, variables)  # another one only at the start, from a checkpoint
            inputs, targets, _ = pieces[number % per_epoch]
            if number % per_epoch == 0:
                carry = model.start(args.batch)
            carry, seen = train_step(
                model, optimizer, carry, inputs, targets, mean_loss=args.mean_loss
            )
            return (nnx.state(both), carry), {name: seen[name] for name in SCALARS}

        size, unit = loss_unit(args.level)
        (variables, _), history = train(
            step, (nnx.state(both), model.start(args.batch)), self.steps, self.out,
            title=self.title, config=self.config, per_step=args.batch * args.unroll,
            unit=unit_of_text(args.level),
            loss_in=(unit, size) if args.level == "char" else NATS,
            checkpoint_every=args.checkpoint_every, validate_every=per_epoch,
            validate=lambda _: score(model, valid, self.streams), until_lost=self.clip == "none",
        )  # fmt: skip
        nnx.update(both, variables)
        return model, optimizer, history

    def result(self) -> Result:
        """Trained, tested and saved; or as it was saved."""
        if (result := finished(self.out, self.config)) is not None:
            say_finished(self.title, self.out)
            return result
        args, corpus = self.args, self.corpus
        model, optimizer, history = self.train()
        console.print(f"Testing on {len(corpus.test):,} {unit_of_text(args.level)}.")
        counts = gradclip_jax.metrics(optimizer.opt_state)
        answers = None
        if args.dialogues:
            answers, text = ask(model, corpus, KINDS if args.data is None else {})
        else:
            first = corpus.vocabulary.index("\n") if "\n" in corpus.vocabulary else 0
            drawn = sample(model, jnp.int32(first), jax.random.key(args.seed), length=args.sample)
            text = corpus.text(np.asarray(drawn))
        result = Result(
            clip=self.clip,
            level=args.level,
            steps=len(history["loss"]),
            test=score(model, segments(corpus.test, self.streams, args.unroll), self.streams),
            clip_count=int(counts["clip_count"]),
            nonfinite_count=int(counts["nonfinite_count"]),
            text=text,
            history=history,
            answers=answers,
        )
        write_json(self.out / "result.json", result._asdict())
        return result

    def trained(self) -> LanguageModel:
        """The network of a run that is finished."""
        model, *_ = self.train()
        return model


if __name__ == "__main__":
    sys.exit(main())
