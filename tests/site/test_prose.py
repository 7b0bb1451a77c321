"""What the README and the docs show runs, and prints what they say."""

import re
import tomllib
from pathlib import Path

import adaptive_limits
import pytest
from registry import public_strategies

import gradclip_jax
from examples.language_model import train as language_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
OTHERS = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")]


def blocks(language: str, page: Path = PAGES[0]) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.DOTALL)


@all_pages
def test_blocks_run_in_order(page, capsys, standard_promotion):
    """Python blocks run as one program; what a comment `# -> x` promises is what is printed."""
    namespace: dict = {}
    python = blocks("python", page)
    assert len(python) == page.read_text().count("```python")
    for block in python:
        exec(compile(block, page.name, "exec"), namespace)
        promised = re.findall(r"# -> ?(.*)$", block, flags=re.MULTILINE)
        printed = capsys.readouterr().out.splitlines()
        assert printed == promised


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    for file, anchor in links:
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), anchor


def test_pages_have_code_and_links():
    """What the two tests above look for is found, but on pages that have none."""
    of_page = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
    guides = {name for name in of_page if name.startswith("docs/") and name.count("/") == 1}
    silent = {"add_a_strategy", "benchmarks", "examples", "notebooks", "playground", "vs_others"}
    for name in {"README.md"} | guides - {f"docs/{page}.md" for page in silent}:
        assert "```python" in of_page[name], name
    for name in {"README.md"} | guides:
        assert "](" in of_page[name], name


def test_the_commands_of_the_language_model_run(tmp_path, monkeypatch, standard_promotion):
    """Those of the page of examples, cut short."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("the norm of a gradient is held to its limit\n" * 100)
    small = ["--steps", "3", "--batch", "4", "--unroll", "5", "--units", "8", "--out", "run"]
    commands = re.findall(
        r"^python examples/language_model/train\.py (.*)$",
        "\n".join(blocks("sh", ROOT / "docs" / "examples.md")),
        re.M,
    )
    assert len(commands) == 2
    for command in commands:
        if command == "--help":
            with pytest.raises(SystemExit, match="0"):
                language_model.main([command])
        else:
            assert language_model.main([*command.split(), *small]) == 0
            assert (tmp_path / "run" / "run.png").exists()


def test_the_version_that_is_cited_is_the_one_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()
    assert gradclip_jax.__version__ == version


def test_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    shown = "\n".join(blocks("sh") + blocks("sh", ROOT / "CONTRIBUTING.md"))
    commands = re.findall(r"^make ([\w-]+)", shown, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(commands)
    for target in commands:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_table_of_all_strategies_names_public_ones():
    """New ones need only a row of the reference."""
    text = (ROOT / "docs" / "which_clip.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)\(", text[text.index("## All strategies") :], re.MULTILINE))
    assert rows <= set(public_strategies())
    assert len(rows) > 20


def test_readme_fits_on_three_screens():
    assert len(PAGES[0].read_text().splitlines()) <= 120


# The page on adaptive limits


def test_the_page_shows_what_the_script_prints_and_draws(tmp_path, capsys):
    assert adaptive_limits.main(["--out", str(tmp_path)]) == 0
    page = (ROOT / "docs" / "adaptive_limits.md").read_text()
    assert capsys.readouterr().out in page
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted({adaptive_limits.image(name) for name in adaptive_limits.CLIPS})
    for name in drawn:
        assert (ROOT / "docs" / "images" / name).is_file()
        assert f"(images/{name})" in page
        assert 5_000 < (tmp_path / name).stat().st_size < 80_000


def test_a_directory_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        adaptive_limits.main(["--out", str(tmp_path / "file")])
    rule = f"`--out` must be a directory that can be written, got {tmp_path / 'file'}: File exists."
    assert rule in capsys.readouterr().err
