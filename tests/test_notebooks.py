"""The notebooks run, and their twins show what they print."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import execute  # noqa: E402

# What a kernel may write to stderr though nothing is wrong: matplotlib, on a new machine.
HARMLESS = re.compile(r"Matplotlib is building the font cache; this may take a moment\.\n")

all_notebooks = pytest.mark.parametrize("source", execute.SOURCES, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def streams(notebook, name: str) -> list[str]:
    """What each cell wrote to stdout or stderr."""
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == name)
        for cell in code_cells(notebook)
    ]


def twin_of(source: Path):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def test_every_notebook_has_a_twin_and_every_twin_a_source():
    twins = {twin.stem for twin in NOTEBOOKS.glob("*.ipynb")}
    assert twins == {source.stem for source in execute.SOURCES} != set()


# One test, so that only one worker of xdist runs the notebook.
@all_notebooks
def test_the_source_runs_without_a_warning_and_prints_what_its_twin_shows(source):
    executed = execute.execute(source)
    assert HARMLESS.sub("", "".join(streams(executed, "stderr"))) == ""
    assert streams(executed, "stdout") == streams(twin_of(source), "stdout")


@all_notebooks
def test_the_twin_has_the_cells_of_its_source(source):
    def texts(notebook):
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    assert texts(twin_of(source)) == texts(execute.read(source))


@all_notebooks
def test_the_twin_shows_pictures_and_no_error(source):
    cells = code_cells(twin_of(source))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "error" not in {output.output_type for output in outputs}
    assert set(streams(twin_of(source), "stderr")) == {""}


@all_notebooks
def test_the_twin_holds_nothing_of_the_machine_that_made_it(source):
    twin = twin_of(source)
    assert twin.metadata == execute.METADATA
    assert [cell.id for cell in twin.cells] == [f"cell-{i}" for i in range(len(twin.cells))]
    assert all(cell.metadata == {} for cell in twin.cells)
    outputs = [output for cell in code_cells(twin) for output in cell.outputs]
    shown = [output.get("data", {}).get("text/plain", "") for output in outputs]
    texts = [cell.source for cell in twin.cells] + streams(twin, "stdout") + shown
    place = re.compile(r"(?<![\w.])/(tmp|home|work|root|usr|opt|Users|private|var)/|0x[0-9a-f]{6,}")
    assert [found.group() for text in texts for found in place.finditer(text)] == []
    assert nbformat.writes(twin) + "\n" == source.with_suffix(".ipynb").read_text("utf-8")
