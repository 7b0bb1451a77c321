"""Execute the notebooks and write their twins.

    python notebooks/execute.py                       # all of them
    python notebooks/execute.py exploding_gradients   # those named

A source is a Python file in the percent format of jupytext; its twin is the `.ipynb` with outputs.
A twin needs no kernel: where a server has sliders, it has the picture at their first values. Each
such picture is also drawn with all sliders at their lower and at their upper ends, and with every
choice of every list, because `interact` would keep an error there to itself.
"""

import argparse
import base64
import contextlib
import io
import math
import os
import queue
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import PIL.Image
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(set(FOLDER.glob("*.py")) - {Path(__file__).resolve()})
SETTINGS = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONPATH": str(FOLDER.parent),
    "PYTHONWARNINGS": "always",  # what warns is seen on stderr
}
PYTHON = {"display_name": "Python 3", "language": "python", "name": "python3"}
METADATA = {"kernelspec": PYTHON, "language_info": {"name": "python"}}
FOLDED = {"tags": ["hide-input"]}  # the site shows the code of a cell when it is asked for
DRAW_WITHOUT_WIDGETS = """
import ipywidgets
import matplotlib.pyplot

def interact(draw, **widgets):
    ipywidgets.interactive(draw, **widgets)  # refuses what a server would
    pictures.append((draw, widgets))
    draw(**{name: widget.value for name, widget in widgets.items()})

pictures, ipywidgets.interact = [], interact
"""
MOVE_THE_SLIDERS = """
def values(widget):
    if hasattr(widget, "options"):  # values, or pairs of a label and a value
        return [option[1] if isinstance(option, tuple) else option for option in widget.options]
    if hasattr(widget, "base"):  # a logarithmic slider
        return [widget.base**widget.min, widget.base**widget.max]
    return [widget.min, widget.max] if hasattr(widget, "min") else [widget.value]

for draw, widgets in pictures:
    choices = {name: values(widget) for name, widget in widgets.items()}
    for i in range(max(map(len, choices.values()))):
        draw(**{name: choice[i % len(choice)] for name, choice in choices.items()})
        matplotlib.pyplot.close("all")
"""


class Client(NotebookClient):
    """A client that looks for the reply to a cell every second.

    While a widget talks to the kernel, pyzmq may miss that the reply is there, and would notice it
    only when the time of the cell is over: minutes in which nothing happens.
    """

    async def async_start_new_kernel_client(self) -> Any:
        client = await super().async_start_new_kernel_client()
        wait = client.shell_channel.get_msg

        async def get_msg(timeout: float) -> Any:
            for _ in range(math.ceil(timeout)):
                with contextlib.suppress(queue.Empty):
                    return await wait(timeout=1)
            raise queue.Empty

        client.shell_channel.get_msg = get_msg
        return client


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook without outputs, and with nothing in it that differs from run to run."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        folded = FOLDED if cell.cell_type == "code" else {}
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict(folded)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_few_colors(png: str) -> str:
    """The picture, encoded as base64, with a palette: a third of the size."""
    with PIL.Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        small = io.BytesIO()
        picture.quantize(128).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def execute(source: Path) -> nbformat.NotebookNode:
    """The notebook with outputs, made by a fresh kernel of the Python that runs this."""
    notebook = read(source)
    first, last = map(nbformat.v4.new_code_cell, (DRAW_WITHOUT_WIDGETS, MOVE_THE_SLIDERS))
    notebook.cells = [first, *notebook.cells, last]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.json")
        kernel = AsyncKernelManager(connection_file=file, transport="ipc")
        kernel.kernel_spec_manager.kernel_dirs = []  # a `python3` there may be another Python
        client = Client(notebook, kernel, timeout=300, record_timing=False, coalesce_streams=True)
        env = os.environ | SETTINGS | {"IPYTHONDIR": folder}
        client.execute(cleanup_kc=True, cwd=str(FOLDER), env=env)
    warned = [output.text for output in last.outputs if output.get("name") == "stderr"]
    if warned:
        raise RuntimeError(f"{source.name}: moving a slider warns.\n{''.join(warned)}")
    notebook.cells = notebook.cells[1:-1]
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = with_few_colors(output.data["image/png"])
                output.metadata = {}
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Execute the notebooks and write their twins.")
    names = [source.stem for source in SOURCES]
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"one of {', '.join(names)}; default: all"
    )
    chosen = parser.parse_args(arguments).names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"`name` must be one of {', '.join(names)}, got {', '.join(unknown)}.")
    for source in SOURCES:
        if source.stem in chosen or not chosen:
            nbformat.write(execute(source), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
