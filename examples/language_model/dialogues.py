"""Dialogues whose questions have one right answer, from a seeded generator or from a text."""

import itertools
import random
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from examples.language_model.data import WORD, Corpus, numbered, tokenise

NAMES = (
    "ada", "alan", "carl", "clara", "edith", "emil", "emmy", "frank", "grace", "hilda", "ida",
    "john", "kurt", "leo", "lise", "marie", "max", "nora", "otto", "paul", "rosa", "sofia", "tim",
    "vera",
)  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "orange", "pink", "red", "white")
PLACES = ("bakery", "library", "museum", "office", "park", "pool", "school", "shop")
OPENS, CLOSES, NUMBERS = range(6, 12), range(14, 20), range(1, 16)
SMALL_TALK = {
    "hello.": "hello, nice to see you.",
    "good morning.": "good morning to you.",
    "i am tired today.": "then take a rest.",
    "it is cold outside.": "a cup of tea will help.",
    "tell me something.": "a long gradient is best cut short.",
    "thank you.": "you are welcome.",
}
# Which word makes a generated question one of which kind; the first that occurs counts.
KINDS = {"name": "name", "like": "colour", "when": "hours", "at": "open?", "plus": "sum"}
DIALOGUES = {"train": 10_000, "valid": 300, "test": 300}
HELD_OUT = 10  # one combination of facts in so many is never trained on
CONTEXT = 200  # tokens of a dialogue that are read before an answer
Exchange = tuple[str, str]


class Question(NamedTuple):
    """Tokens of a dialogue up to the end of a question, and those of the answer that follows."""

    kind: str
    context: list[int]
    answer: list[int]


def generated(seed: int, level: str, vocabulary_size: int) -> Corpus:
    """Dialogues to train on, and two splits of such about other combinations of facts."""
    splits = []
    for number, (split, count) in enumerate(DIALOGUES.items()):
        draw = random.Random(f"{seed} {number}")
        drawn = (dialogue(draw, held_out=split != "train") for _ in range(count))
        text = "\n".join("".join(f"{turn}\n" for turn in turns) for turns in drawn)
        splits.append(tokenise(text, level, WORD))
    return numbered(splits, level, vocabulary_size)


def dialogue(draw: random.Random, held_out: bool) -> list[str]:
    """Turns of two speakers: one tells facts, asks about them and for sums, and makes small talk.

    The name and the colour of a person, the hours of a place and the terms of a sum are three
    combinations; either all of them are held out or none is.
    """

    def pick(*choices: Sequence) -> list:
        while True:
            combination = [draw.choice(choice) for choice in choices]
            if (zlib.crc32(repr(combination).encode()) % HELD_OUT == 0) == held_out:
                return combination

    name, colour = pick(NAMES, COLOURS)
    place, opens, closes = pick(PLACES, OPENS, CLOSES)
    facts: list[tuple[Exchange, list[Exchange]]] = [
        (
            (draw.choice([f"my name is {name}.", f"i am {name}."]), f"nice to meet you, {name}."),
            [("what is my name?", f"your name is {name}.")],
        ),
        (
            (
                draw.choice([f"i like {colour}.", f"{colour} is the best colour."]),
                f"{colour} is fine.",
            ),
            [("which colour do i like?", f"you like {colour}.")],
        ),
        (
            (f"the {place} opens at {opens} and closes at {closes}.", f"so {opens} to {closes}."),
            [
                (f"when does the {place} open?", f"it opens at {opens}."),
                (f"when does the {place} close?", f"it closes at {closes}."),
                *(at_hour(place, opens, closes, draw.randrange(24)) for _ in range(2)),
            ],
        ),
    ]
    draw.shuffle(facts)
    turns: list[str] = []
    questions: list[Exchange] = []
    for _ in range(draw.randint(5, 8)):
        a, b = pick(NUMBERS, NUMBERS)
        kinds = ["talk", "sum", *["tell"] * (2 * bool(facts)), *["ask"] * (3 * bool(questions))]
        match draw.choice(kinds):
            case "talk":
                exchange = draw.choice([*SMALL_TALK.items()])
            case "sum":
                exchange = (f"what is {a} plus {b}?", f"that is {a + b}.")
            case "tell":
                exchange, more = facts.pop()
                questions += more
            case _:
                exchange = questions.pop(draw.randrange(len(questions)))
        said, answer = exchange
        # People do not always type the last mark.
        turns += [said if draw.random() < 0.8 else said[:-1], answer]
    return turns


def at_hour(place: str, opens: int, closes: int, hour: int) -> Exchange:
    """Whether a place is open at an hour, and why not."""
    if hour < opens:
        answer = f"no, it opens at {opens}."
    else:
        answer = f"yes, until {closes}." if hour < closes else f"no, it closes at {closes}."
    return f"is the {place} open at {hour}?", answer


def questions(corpus: Corpus, kinds: dict[str, str], most: int = 1000) -> list[Question]:
    """The turns of the test split that end in a question mark, each with the turn after it."""
    found, begin, end = [], 0, corpus.end
    lines = np.split(corpus.test, np.flatnonzero(corpus.test == end) + 1)
    turns = [line[line != end].tolist() for line in lines]
    for number, (turn, answer) in enumerate(itertools.pairwise(turns)):
        if not turn:  # an empty line parts two dialogues
            begin = number + 1
        elif answer and corpus.vocabulary[turn[-1]] == "?":
            words = tokenise(corpus.text(np.array(turn)), "word", WORD)
            kind = next((kind for word, kind in kinds.items() if word in words), "other")
            found.append(Question(kind, context(turns[begin : number + 1], end), answer))
    return found[:most]


def context(turns: Sequence[list[int]], end: int) -> list[int]:
    """The last tokens of a dialogue, which begins after an empty line."""
    return [end, *(token for turn in turns for token in [*turn, end])][-CONTEXT:]


def readable(text: str) -> str:
    """Words as people write them: no space in front of a mark."""
    return re.sub(r" ([.,!?])", r"\1", text)
