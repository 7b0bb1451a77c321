"""What every example's command line does alike: options, and refusals in one line."""

import argparse
import contextlib
import errno
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

console = Console(soft_wrap=True, highlight=False)


class InputError(ValueError):
    """What the user gave cannot be used; the message is all that needs to be shown."""


@contextlib.contextmanager
def writing(out: Path, what_now: str = "") -> Iterator[None]:
    """Refuses in one line a disk that is full, or cannot be written, while a run writes there."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not (reason := _of_disk(error)):
            raise
        raise InputError(
            f"`--out` must be a directory that can be written, got {out}: {reason}.{what_now}"
        ) from None


def _of_disk(error: BaseException | None) -> str:
    """What the disk said at the beginning of an error, which orbax makes a ValueError; or ""."""
    # Only what writing meets: a file that cannot be read is another story.
    codes = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
    while error is not None:
        known = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(known[1]) if known else getattr(error, "errno", None)
        if code in codes:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


class Parser(argparse.ArgumentParser):
    """Refuses bad input in one line on stderr with exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = "%(default)" in (action.help or "") or "default" in (action.help or "")
        silent = action.default is False or action.default in (None, [], argparse.SUPPRESS)
        if told or silent:
            return action.help
        return f"{action.help} (default: %(default)s)".lstrip()

    def add_argument(self, action: argparse.Action) -> None:
        if action.help is None:  # argparse asks for the string above only where there is a help
            action.help = ""
        if action.help == "" and action.option_strings:
            action.help = "(default: %(default)s)"
        super().add_argument(action)


def command_line(doc: str | None, out: str) -> Parser:
    """A parser that shows the docstring of the example and has the options of every run."""
    parser = Parser(prog=f"{out}.py", description=doc, formatter_class=Help)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the weights and of all that is drawn")
    add("--out", type=Path, default=Path("runs", out), help="directory of the run")
    return parser


def check_number(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise unless the option is None or between `low` and `high`, both included."""
    if value is not None and not low <= value <= high:
        rule = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise InputError(f"`--{name.replace('_', '-')}` must be {rule}, got {value:g}.")


def run(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], int | None],
    argv: list[str] | None = None,
) -> int:
    """The exit status of `main`: its own or 0, 2 for bad input, 130 for Ctrl-C."""
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and not args.out.is_dir():
            raise InputError(f"`--out` must be a directory, got the file {args.out}.")
        check_number("seed", args.seed, 0)
        with writing(args.out):
            return main(args) or 0
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command continues from the last checkpoint in {args.out}")
        return 130
