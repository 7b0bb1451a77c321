"""Follow the page `add_a_strategy.md` in a copy of the repository.

    python docs/add_a_strategy.py build/newcomer

The suite runs the laws in such a copy, and `make test-newcomer` all tests of the library.
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```\{code-block\} \w+\n((?::[^\n]*\n)+)\n(.*?)^```", re.M | re.DOTALL)


class Block(NamedTuple):
    """A block of the page: file and remark of its caption, the highlighted lines, all of it."""

    file: str
    remark: str
    new: set[int]
    body: str


def blocks() -> list[Block]:
    """All blocks of the page, in order."""
    found = []
    for options, body in FENCE.findall(PAGE):
        given = dict(re.findall(r"^:([\w-]+): (.*)$", options, flags=re.MULTILINE))
        file, remark = re.findall(r'"`(.*)`(.*)"', given["caption"])[0]
        new = {int(line) for line in given.get("emphasize-lines", "").split(",") if line}
        found.append(Block(file, remark, new, body))
    return found


def add(folder: Path, block: Block) -> None:
    """Write a file; or add its new lines to a file that has the other lines of the block."""
    path = folder / block.file
    if not block.new:
        if path.exists():
            raise FileExistsError(f"`{block.file}` must be new, but is there.")
        path.write_text(block.body, encoding="utf-8")
        return
    lines = enumerate(block.body.splitlines(keepends=True), start=1)
    known = "".join(line for number, line in lines if number not in block.new)
    text = path.read_text(encoding="utf-8")
    if text.count(known) != 1:
        raise ValueError(f"`{block.file}` must have these lines of the page once:\n{known}")
    path.write_text(text.replace(known, block.body), encoding="utf-8")


def follow(folder: Path) -> None:
    """Copy the repository to a new folder, and add what the page adds."""
    others = (".*", "build", "dist", "demo", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*others))
    for block in blocks():
        if not block.remark:  # else it shows a mistake
            add(folder, block)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Follow add_a_strategy.md in a copy.")
    parser.add_argument("folder", type=Path, help="the copy, a new folder")
    follow(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
