"""Execute the notebooks and write their twins: `python notebooks/execute.py`.

A source is a Python file in the percent format of jupytext; its twin is the `.ipynb` with outputs.
"""

import os
import tempfile
from pathlib import Path

import jupytext
import nbformat
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


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook without outputs, and with nothing in it that differs from run to run."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def execute(source: Path) -> nbformat.NotebookNode:
    """The notebook with outputs, made by a fresh kernel of the Python that runs this."""
    notebook = read(source)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.json")
        kernel = AsyncKernelManager(connection_file=file, transport="ipc")
        kernel.kernel_spec_manager.kernel_dirs = []  # a `python3` there may be another Python
        client = NotebookClient(notebook, kernel, timeout=120, record_timing=False)
        env = os.environ | SETTINGS | {"IPYTHONDIR": folder}
        client.execute(cleanup_kc=True, cwd=str(FOLDER), env=env)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


if __name__ == "__main__":
    for source in SOURCES:
        nbformat.write(execute(source), source.with_suffix(".ipynb"))
