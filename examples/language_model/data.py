"""Text as streams of tokens, and the n-gram that a language model has to beat."""

import ast
import collections
import hashlib
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.language_model.command_line import InputError

UNKNOWN = "<unk>"
END = "<eos>"
WORD = r"\w+|[^\w\s]"
SPLITS = ("train", "valid", "test")
# Tests are code, not prose; the other folders repeat the library or are not part of it.
SKIPPED = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    | {"site-packages", "dist-packages"}
)


class Corpus(NamedTuple):
    """Token numbers of the three splits; `vocabulary[i]` is the text of token `i`."""

    level: str
    vocabulary: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    @property
    def digest(self) -> str:
        """Identifies text and tokenisation, wherever the file lies."""
        sha = hashlib.sha256(repr((self.level, self.vocabulary)).encode())
        for tokens in (self.train, self.valid, self.test):
            sha.update(tokens.tobytes() + b"|")
        return sha.hexdigest()[:16]

    def text(self, tokens: np.ndarray) -> str:
        """The text of token numbers, with `<eos>` as the end of a line."""
        if self.level == "char":
            return "".join("\N{REPLACEMENT CHARACTER}" if t == 0 else self.vocabulary[t]
                           for t in tokens)  # fmt: skip
        return " ".join(self.vocabulary[t] for t in tokens).replace(f" {END} ", "\n")

    @property
    def end(self) -> int:
        """The token that ends a line."""
        end = END if self.level == "word" else "\n"
        if end not in self.vocabulary:
            raise InputError("`--data` must hold several lines, and `--vocabulary` keep their end.")
        return self.vocabulary.index(end)

    def tokens(self, line: str) -> list[int]:
        """The numbers of a line but its end; an unknown word may be known in small letters."""
        number = {token: i for i, token in enumerate(self.vocabulary)}
        tokens = line if self.level == "char" else re.findall(WORD, line)
        return [number.get(token, number.get(token.lower(), 0)) for token in tokens]


def load_corpus(data: Path | None, level: str, vocabulary_size: int, cache: Path) -> Corpus:
    """Reads a text file, a directory with three splits, or (None) the prose of Python itself.

    A single text is split 90 / 5 / 5 in its own order. Its words are runs of letters and digits,
    and single other marks. A directory is taken for a benchmark that is tokenised already (Penn
    Treebank, WikiText): a word is what lies between spaces. Every line ends in `<eos>`. A token
    that is rare or absent in the training split is `<unk>`.
    """
    if data is not None and data.is_dir():
        splits = [tokenise(_read(_split_file(data, name)), level, r"\S+") for name in SPLITS]
    else:
        text = python_prose(cache) if data is None else _read(data)
        tokens = tokenise(text, level, WORD)
        low, high = len(tokens) * 90 // 100, len(tokens) * 95 // 100
        splits = [tokens[:low], tokens[low:high], tokens[high:]]
    return numbered(splits, level, vocabulary_size)


def numbered(splits: Sequence[Sequence[str]], level: str, vocabulary_size: int) -> Corpus:
    """The corpus of three splits whose most frequent tokens in training are its vocabulary."""
    counts = collections.Counter(splits[0])
    counts.pop(UNKNOWN, None)
    # Ties are broken by the token itself, so that the numbering never depends on a hash seed.
    known = sorted(counts, key=lambda token: (-counts[token], token))[: vocabulary_size - 1]
    vocabulary = [UNKNOWN, *known]
    number = {token: i for i, token in enumerate(vocabulary)}
    arrays = [np.array([number.get(token, 0) for token in split], np.int32) for split in splits]
    return Corpus(level, vocabulary, *arrays)


def user_cache() -> Path:
    home = {
        "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"),
        "darwin": "~/Library/Caches",
    }.get(sys.platform, os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(home).expanduser() / "gradclip_jax"


def tokenise(text: str, level: str, word: str) -> list[str]:
    """Characters, or the matches of the pattern `word` with `<eos>` after every line."""
    if level == "char":
        return list(text)
    return [token for line in text.splitlines() for token in (*re.findall(word, line), END)]


def segments(tokens: np.ndarray, batch: int, unroll: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Pieces of `batch` parallel streams for truncated back-propagation through time.

    Stream `b` is one contiguous part of the text, and piece `k + 1` starts where piece `k` ended,
    so the state of the network can be carried over. Yields inputs, targets (the next token) and
    weights, each of shape [unroll, batch]. Every token but the first is a target exactly once;
    the last pieces are padded with weight 0.
    """
    targets = len(tokens) - 1
    length = -(-targets // (batch * unroll)) * unroll
    padding = (0, batch * length - targets)
    x, y = (np.pad(part, padding).reshape(batch, length) for part in (tokens[:-1], tokens[1:]))
    weights = np.pad(np.ones(targets, np.float32), padding).reshape(batch, length)
    for start in range(0, length, unroll):
        yield tuple(np.ascontiguousarray(a[:, start : start + unroll].T) for a in (x, y, weights))


class WittenBell:
    """Interpolated Witten-Bell n-gram: the baseline, counted in a second or two.

    P(w | h) = (c(hw) + t(h) P(w | h')) / (c(h) + t(h)), where c counts occurrences, t(h) is the
    number of different tokens seen after h, and h' is h without its oldest token. Below the
    unigram lies the uniform distribution, so every token has a probability.

    Witten and Bell 1991, "The zero-frequency problem", https://doi.org/10.1109/18.87000 (method
    C); in the interpolated form of Chen and Goodman 1998, section 2.6.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocabulary_size: int):
        if vocabulary_size**order >= 2**63:
            raise InputError(
                f"`order` must keep vocabulary ** order below 2 ** 63, "
                f"got {vocabulary_size} ** {order}."
            )
        self.order, self.vocabulary_size = order, vocabulary_size
        self.tables = []
        for n in range(1, order + 1):
            grams, counts = np.unique(self._grams(tokens, n), return_counts=True)
            contexts, first = np.unique(grams // vocabulary_size, return_index=True)
            totals = np.add.reduceat(counts, first)
            types = np.diff(np.append(first, len(grams)))
            self.tables.append((grams, counts, contexts, totals, types))

    def _grams(self, tokens: np.ndarray, n: int) -> np.ndarray:
        # An n-gram is one integer in base `vocabulary_size`, its last token the lowest digit.
        number = np.zeros(len(tokens) - n + 1, np.int64)
        for i in range(n):
            number = number * self.vocabulary_size + tokens[i : len(tokens) - n + 1 + i]
        return number

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """The probability of every token but the first, given those before it."""
        p = np.full(len(tokens), 1 / self.vocabulary_size)
        for n, (grams, counts, contexts, totals, types) in enumerate(self.tables, start=1):
            if n > len(tokens):
                break
            seen = self._grams(tokens, n)
            count, _ = _look_up(grams, counts, seen)
            at, known = _look_up(contexts, np.arange(len(contexts)), seen // self.vocabulary_size)
            lower = p[n - 1 :]
            mixed = (count * known + types[at] * lower) / (totals[at] + types[at])
            p[n - 1 :] = np.where(known, mixed, lower)
        return p[1:]

    def nats(self, tokens: np.ndarray) -> float:
        """Mean negative log-likelihood of every token but the first."""
        return float(-np.log(self.probabilities(tokens)).mean())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray):
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[at] == wanted
    return np.where(found, values[at], 0), found


def python_prose(cache: Path, library: Path | None = None) -> str:
    """English that every Python carries: the docstrings of its library and `pydoc` topics.

    The files are parsed, never imported. Kept are whole paragraphs of sentences, each once and on
    one line: about 1.4 million characters. The text differs between Python versions, so it is
    cached per version.
    """
    place = cache / f"python-{sys.version.split()[0]}-prose.txt"
    if library is None and place.is_file() and (text := place.read_text("ascii")):
        return text
    library = library or Path(sysconfig.get_path("stdlib"))
    text = "\n".join(dict.fromkeys(p for doc in _docstrings(library) for p in _paragraphs(doc)))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text.encode())
    except OSError as error:  # a read-only home costs three seconds per run, not the run
        print(f"The corpus is not cached: {error}", file=sys.stderr)
    return text


def _docstrings(library: Path) -> Iterator[str]:
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if SKIPPED.intersection(parts):
            continue
        try:
            nodes = ast.walk(ast.parse(file.read_bytes()))
        except (SyntaxError, ValueError, OSError):
            continue  # templates of other tools are not all Python
        for node in nodes:
            if parts[0] == "pydoc_data" and isinstance(node, ast.Constant):
                yield str(node.value)
            elif isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            ):
                yield ast.get_docstring(node) or ""


def _paragraphs(doc: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", doc):
        text = " ".join(paragraph.split())
        # A sentence of at least five words; tables and listings have more marks than letters.
        letters = sum(c.isalpha() or c in " ,.'" for c in text)
        if (text.isascii() and text.count(" ") >= 4 and text[-1] in ".:!?"
                and ">>>" not in text and letters > 0.85 * len(text)):  # fmt: skip
            yield text


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, also when killed half-way."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"`--data` must be readable, got {file}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"`--data` must be UTF-8 text, got {file} with byte {error.object[error.start]:#04x} "
            f"at position {error.start}."
        ) from None
    if not text.strip():
        raise InputError(f"`--data` must hold text, got the empty file {file}.")
    return text.replace("\r\n", "\n")


def _split_file(directory: Path, split: str) -> Path:
    files = sorted(f for f in directory.iterdir() if f.is_file() and split in f.name.lower())
    if len(files) != 1:
        raise InputError(
            f"`--data` must be a directory with one file named after each of train, valid and "
            f"test, got {directory} with {len(files)} for {split}"
            f"{': ' if files else ''}{', '.join(f.name for f in files)}."
        )
    return files[0]
