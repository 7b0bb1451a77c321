"""What docstrings, the README and the docs show runs, and says what it shows."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gradclip_jax

ROOT = Path(__file__).parent.parent
MODULES = [name for _, name, _ in pkgutil.walk_packages(gradclip_jax.__path__, "gradclip_jax.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name, standard_promotion):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_public_functions_have_an_example():
    for name, value in vars(gradclip_jax).items():
        if callable(value) and not isinstance(value, type):
            assert ">>>" in (value.__doc__ or ""), f"{name} shows no example"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


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
        promised = re.findall(r"# -> (.*)$", block, flags=re.MULTILINE)
        printed = capsys.readouterr().out.splitlines()
        assert printed == promised


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@all_pages
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
    silent = {"add_a_strategy", "benchmarks", "examples", "notebooks", "playground"}
    for name in {"README.md"} | guides - {f"docs/{page}.md" for page in silent}:
        assert "```python" in of_page[name], name
    for name in {"README.md"} | guides:
        assert "](" in of_page[name], name


def test_readme_runs_the_example(tmp_path, monkeypatch, standard_promotion):
    """The commands that it shows, cut short."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("the norm of a gradient is held to its limit\n" * 100)
    language_model = importlib.import_module("language_model")
    small = ["--steps", "3", "--batch", "4", "--unroll", "5", "--units", "8", "--out", "run"]
    commands = re.findall(
        r"^python examples/language_model.py (.*)$", "\n".join(blocks("sh")), re.M
    )
    assert len(commands) == 2
    for command in commands:
        if command == "--help":
            with pytest.raises(SystemExit, match="0"):
                language_model.main([command])
        else:
            assert language_model.main([*command.split(), *small]) == 0
            assert (tmp_path / "run" / "run.png").exists()


def test_readme_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(commands)
    for target in commands:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_readme_table_names_every_strategy():
    text = (ROOT / "README.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)", text, flags=re.MULTILINE))
    from registry import public_strategies

    assert set(public_strategies()) - {"clip_to_limit"} <= rows
