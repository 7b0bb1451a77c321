"""Questions to a trained network: those of the test split, and those typed at a prompt."""

import contextlib

import numpy as np

from examples.language_model.command_line import console
from examples.language_model.data import Corpus
from examples.language_model.dialogues import context, questions, readable
from examples.language_model.model import LanguageModel, replies

ANSWER = 40  # the most tokens of an answer


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


def chat(model: LanguageModel, corpus: Corpus) -> None:
    """Answers each line with the likeliest turn."""
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
