"""The notebooks run, and their twins show what they print and draw."""

import base64
import io
import re
from pathlib import Path

import execute
import nbformat
import PIL.Image
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"

# What a kernel may write to stderr though nothing is wrong: matplotlib, on a new machine.
HARMLESS = re.compile(r"Matplotlib is building the font cache; this may take a moment\.\n")

all_notebooks = pytest.mark.parametrize("source", execute.SOURCES, ids=lambda path: path.stem)


def streams(notebook, name: str) -> list[str]:
    """What each cell wrote to stdout or stderr."""
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == name)
        for cell in execute.code_cells(notebook)
    ]


def twin_of(source: Path):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def test_every_notebook_has_a_twin_and_every_twin_a_source():
    twins = {twin.stem for twin in NOTEBOOKS.glob("*.ipynb")}
    assert twins == {source.stem for source in execute.SOURCES} != set()


def data_of(cell) -> dict:
    """What a cell shows, by type."""
    return {key: value for out in cell.outputs for key, value in out.get("data", {}).items()}


@all_notebooks
def test_the_twin_stands_without_a_kernel(source):
    """Pictures in place of widgets, which would be empty."""
    twin = twin_of(source)
    shown = {cell.source: data_of(cell) for cell in execute.code_cells(twin)}
    assert all(WIDGET not in data for data in shown.values())
    assert "widgets" not in twin.metadata
    moved = [data for code, data in shown.items() if "interact(" in code]
    assert moved
    assert all("image/png" in data for data in moved)


@all_notebooks
def test_the_pictures_have_no_background(source):
    """They are read on white and on black pages."""
    pictures = [data_of(cell).get("image/png") for cell in execute.code_cells(twin_of(source))]
    for picture in filter(None, pictures):
        with PIL.Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.convert("RGBA").getpixel((0, 0))[3] == 0


def test_the_twins_are_small_enough_for_git():
    sizes = [twin.stat().st_size for twin in NOTEBOOKS.glob("*.ipynb")]
    assert max(sizes) < 150_000
    assert sum(sizes) < 600_000


def test_the_page_lists_every_notebook_with_its_claim_in_the_order_of_reading():
    page = (ROOT / "docs" / "notebooks.md").read_text()
    entries = re.findall(r"^\d\. \[(.*?)\]\(\.\./notebooks/(\w+)\.ipynb\): (.*)$", page, flags=re.M)
    order = re.findall(r"^/notebooks/(\w+)$", page, flags=re.MULTILINE)
    assert [name for _, name, _ in entries] == order
    assert sorted(order) == [source.stem for source in execute.SOURCES]
    for title, name, claim in entries:
        first = execute.read(NOTEBOOKS / f"{name}.py").cells[0].source
        found = re.fullmatch(r"# (.*)\n\n\*\*(.*?)\*\*.*", first, flags=re.DOTALL)
        assert found, name
        assert (found[1], found[2].replace("\n", " ")) == (title, claim)


# What `interact` draws first is right; what it draws when the slider is moved to the left is not.
MOVABLE = """\
# %%
import warnings
from ipywidgets import FloatSlider, interact

def draw(x, {more}):
    {body}

# %%
_ = interact(draw, x=FloatSlider(1, min=0, max=2))
"""


@pytest.mark.parametrize(
    ("more", "body", "error", "message"),
    [
        ("", "1 / x", CellExecutionError, "ZeroDivisionError"),
        ("", "x or warnings.warn('too low')", RuntimeError, "moving a slider warns.*too low"),
        ("axes=None", "pass", CellExecutionError, "cannot be transformed to a widget"),
    ],
    ids=["error", "warning", "an argument without a widget"],
)
def test_a_picture_that_fails_with_sliders_fails_the_run(tmp_path, more, body, error, message):
    source = tmp_path / "movable.py"
    source.write_text(MOVABLE.format(body=body, more=more))
    with pytest.raises(error, match=f"(?s){message}"):
        execute.execute(source)


def test_the_command_refuses_a_notebook_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match="2"):
        execute.main(["many_devices", "nowhere"])
    assert "`name` must be one of" in capsys.readouterr().err


def test_the_command_writes_the_twins_that_it_is_asked_for(tmp_path, monkeypatch):
    sources = [tmp_path / "first.py", tmp_path / "second.py"]
    for source in sources:
        source.write_text("# %%\nprint(1)\n")
    monkeypatch.setattr(execute, "SOURCES", sources)
    execute.main(["second"])
    assert [path.name for path in tmp_path.glob("*.ipynb")] == ["second.ipynb"]
    assert streams(twin_of(sources[1]), "stdout") == ["1\n"]


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
def test_the_site_folds_the_code(source):
    """By a tag of each cell, which MyST-NB reads."""
    cells = execute.code_cells(twin_of(source))
    assert {tuple(cell.metadata.tags) for cell in cells} == {("hide-input",)}


@all_notebooks
def test_the_twin_shows_pictures_and_no_error(source):
    cells = execute.code_cells(twin_of(source))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} == {"display_data", "stream"}
    assert set(streams(twin_of(source), "stderr")) == {""}


@all_notebooks
def test_the_twin_holds_nothing_of_the_machine_that_made_it(source):
    twin = twin_of(source)
    assert twin.metadata == execute.METADATA
    assert [cell.id for cell in twin.cells] == [f"cell-{i}" for i in range(len(twin.cells))]
    assert all(cell.metadata == {} for cell in twin.cells if cell.cell_type == "markdown")
    outputs = [output for cell in execute.code_cells(twin) for output in cell.outputs]
    shown = [output.get("data", {}).get("text/plain", "") for output in outputs]
    texts = [cell.source for cell in twin.cells] + streams(twin, "stdout") + shown
    place = re.compile(r"(?<![\w.])/(tmp|home|work|root|usr|opt|Users|private|var)/|0x[0-9a-f]{6,}")
    assert [found.group() for text in texts for found in place.finditer(text)] == []
    assert nbformat.writes(twin) + "\n" == source.with_suffix(".ipynb").read_text("utf-8")
