"""The directory of a run: what it holds, and refusals of one that cannot be used."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from examples.language_model.command_line import InputError
from examples.language_model.data import write_atomically

History = dict[str, list]


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
