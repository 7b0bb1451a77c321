"""What a finished example leaves as text: its tables, its settings and the versions it ran with."""

import importlib.metadata
import io
import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.language_model.command_line import console


def save_results(
    out: Path, tables: Iterable[Table], settings: dict[str, Any], packages: Iterable[str]
) -> None:
    """Show the tables, and write them to results.txt in `out` with settings and versions."""
    text, tables = io.StringIO(), list(tables)
    for show in (console, Console(file=text, width=100)):
        for table in tables:
            show.print(table)
            show.print()
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    lines.append(", ".join([f"Python {platform.python_version()}", *versions]))
    (out / "results.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def stopwatch(out: Path) -> Callable[[], dict[str, int]]:
    """Start before a run in `out`, and get a function that returns its seconds as a setting.

    It returns no setting where a part of the run was there before: that took longer than this.
    """
    start, fresh = time.monotonic(), not any(out.glob("*/checkpoints"))
    return lambda: {"seconds": round(time.monotonic() - start)} if fresh else {}
