"""The site builds, its links lead somewhere, and a newcomer who follows its page gets through."""

import html.parser
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import add_a_strategy
import pytest
from registry import public_limits, public_modules, public_names, public_strategies
from test_layers import LAYERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PUBLIC = set(public_names())

LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(html.parser.HTMLParser):
    """What a page can be linked by, what it links to, what it loads, and its text."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors, self.links, self.loads, self.styles = set(), [], [], []
        self.texts: list[str] = []
        self._within: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag in ("a", "area") and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADS.get(tag, "")):
            self.loads.append(given[LOADS[tag]])
        self.styles.append(given.get("style") or "")
        if tag in ("script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag):
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data):
        if self._within[-1:] == ["style"]:
            self.styles.append(data)
        elif not self._within:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@pytest.fixture(scope="session")
def site(built) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted((built / "html").rglob("*.html"))}


def test_the_site_builds_without_a_warning(built):
    assert (built / "said").read_text(encoding="utf-8") == ""


def is_local(link: str) -> bool:
    return not urlsplit(link).scheme and not urlsplit(link).netloc


def test_every_link_and_anchor_within_the_site_leads_somewhere(site):
    broken = []
    for file, page in site.items():
        for link in filter(is_local, page.links + page.loads):
            parts = urlsplit(link)
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = not anchor or target not in site or anchor in site[target].anchors
            if not target.exists() or not known:
                broken.append(f"{file.name}: {link}")
    assert broken == []
    assert len(site) > 20


def test_no_page_loads_anything_from_the_network(site, built):
    for file, page in site.items():
        elsewhere = [load for load in page.loads if not is_local(load)]
        assert [load for load in elsewhere if not load.startswith("data:")] == [], file.name
    styles = {file: file.read_text(encoding="utf-8") for file in (built / "html").rglob("*.css")}
    styles |= {file: "\n".join(page.styles) for file, page in site.items()}
    for file, style in styles.items():
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style), file.name


def test_equations_are_drawn_before_a_browser_opens_the_page(site, built):
    """Else they grow after the page is shown, and push down what a link leads to."""
    drawn = 0
    for file, page in site.items():
        assert not [load for load in page.loads if "mathjax" in load.lower()], file.name
        text = file.read_text(encoding="utf-8")
        equations = re.findall(r'class="math">(.{17})', text)
        assert set(equations) <= {'<svg aria-label="'}, file.name
        drawn += len(equations)
        if (built / "html" / "docs" / "api") in file.parents:
            assert "$$" not in page.text, file.name
            assert "`" not in page.text, file.name
    assert drawn > 200


def test_every_public_name_has_an_entry_in_the_reference(site, built):
    api = built / "html" / "docs" / "api"
    anchors = set().union(*(page.anchors for file, page in site.items() if api in file.parents))
    assert {f"gradclip_jax.{name}" for name in PUBLIC} <= anchors
    assert {f"module-gradclip_jax.{name}" for name in public_modules()} <= anchors
    assert len(PUBLIC) > 60


def test_every_strategy_limit_response_and_norm_has_its_equation_in_a_table():
    rows = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    shown = {
        name
        for cell, rest in re.findall(r"^\| (`.*?) \|(.*)$", rows, flags=re.MULTILINE)
        for name in re.findall(r"`([\w.]+)", cell)
        if "$" in rest
    }
    responses = {"shrink", "normalize", "smooth", "smooth_sqrt", "smooth_tanh", "drop"}
    norms = {"global_norm", "leaf_norms", "unit_norms", "group_norms"}
    others = {"clip_cotangent", "from_torch", "from_keras", "from_lightning", "from_transformers"}
    wanted = {*public_strategies(), *norms, *others}
    wanted |= {f"limits.{name}" for name in public_limits()}
    wanted |= {f"responses.{name}" for name in responses}
    assert wanted - {"clip_to_limit"} <= shown
    assert shown <= PUBLIC


def test_every_strategy_has_a_page_of_its_own_with_its_source(site, built):
    """Pages are made of the tables that the test above compares with the registry."""
    api = built / "html" / "docs" / "api"
    for name in {*public_strategies(), "clip_cotangent"}:
        files = [api / folder / f"{name}.html" for folder in ("strategies", "guards")]
        (page,) = [site[file] for file in files if file in site]
        assert f"gradclip_jax.{name}" in page.anchors, name
        source = r"/blob/main/gradclip_jax/\w+(/\w+)?\.py#L\d+-L\d+$"
        assert any(re.search(source, link) for link in page.links)


def test_the_first_page_says_how_to_install_which_version_and_where_the_code_is(site, built):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    home = site[built / "html" / "docs" / "index.html"]
    assert f"pip install git+{project['urls']['Repository']}" in home.text
    assert f"Version {project['version']}" in home.text
    assert set(project["urls"].values()) - {project["urls"]["Documentation"]} <= set(home.links)
    pictures = [load for load in home.loads if load.endswith(".png")]
    assert len(pictures) == len(set(pictures)) >= 10


def test_notebooks_benchmarks_and_examples_are_on_the_site(site, built):
    for folder, suffix in (("notebooks", ".ipynb"), ("benchmarks/results", ".md")):
        for source in (ROOT / folder).glob(f"*{suffix}"):
            assert (built / "html" / folder / source.name).with_suffix(".html") in site
    examples = (DOCS / "examples.md").read_text()
    for result in (ROOT / "examples" / "results").iterdir():
        assert f"../examples/results/{result.name}" in examples
    for pattern in ("*.py", "papers/*.py", "language_model/train.py"):
        for example in set((ROOT / "examples").glob(pattern)) - {
            ROOT / "examples/papers/__init__.py"
        }:
            assert example.relative_to(ROOT).as_posix() in examples
    benchmarks = (DOCS / "benchmarks.md").read_text()
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        assert benchmark.stem == "harness" or f"benchmarks/{benchmark.name}" in benchmarks


def test_the_commands_of_the_benchmarks_are_those_of_their_results():
    results = "\n".join(page.read_text() for page in (ROOT / "benchmarks/results").glob("*.md"))
    commands = re.findall(r"`(python benchmarks/.*?)`", (DOCS / "benchmarks.md").read_text())
    assert len(commands) >= 9
    for command in commands:
        assert f"`{command}`" in results, command


def test_make_bench_runs_the_first_benchmarks_of_the_page():
    named = re.findall(r"python benchmarks/(\w+)\.py", (DOCS / "benchmarks.md").read_text())
    (line,) = re.findall(r"^BENCHMARKS = (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert named[: line.count(" ") + 1] == line.split()


def test_the_layout_names_every_module_in_its_layer():
    layer, named = -1, [set() for _ in LAYERS]
    for number, module in re.findall(
        r"^\| (\d*) ?\| `(\w+)`", (DOCS / "layout.md").read_text(), flags=re.M
    ):
        layer = int(number) if number else layer
        named[layer].add(module)
    assert named == LAYERS


# Add a strategy in ten minutes


TUTORIAL = add_a_strategy.PAGE
SEES_STRATEGIES = [
    *(f"tests/library/test_{name}.py" for name in ("layers", "docstrings", "interop", "limits")),
    "tests/library/test_strategy_laws.py::test_every_public_strategy_is_in_the_table_and_has_its_laws",
    "tests/site/test_docs.py::test_every_strategy_limit_response_and_norm_has_its_equation_in_a_table",
]
"""Tests that read the table of strategies or the public names; `.ci/run` runs the whole library."""


@pytest.fixture
def newcomer(tmp_path) -> Path:
    """A copy of the repository in which the page was followed."""
    add_a_strategy.follow(tmp_path / "copy")
    return tmp_path / "copy"


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of Python, with the package of the copy."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=env | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_in(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def laws_of_the_page() -> list[str]:
    """The arguments of pytest in the command of the page."""
    (command,) = re.findall(r"^python -m pytest (.*)$", TUTORIAL, flags=re.MULTILINE)
    return shlex.split(command)


def test_a_newcomer_adds_a_strategy_by_the_page_and_the_laws_test_it(newcomer):
    done = run_tests(newcomer, *laws_of_the_page())
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 25
    done = run_tests(newcomer, *SEES_STRATEGIES)
    assert done.returncode == 0, done.stdout
    for arguments in (["check"], ["format", "--check"]):
        checked = run_in(
            newcomer, "-m", "ruff", *arguments, "--no-cache", "gradclip_jax", "tests/library"
        )
        assert checked.returncode == 0, checked.stdout


def test_the_laws_find_the_mistake_that_the_page_shows(newcomer):
    (mistake,) = [block for block in add_a_strategy.blocks() if block.remark]
    assert mistake.new
    file = newcomer / mistake.file
    text = file.read_text()
    file.write_text(text[: text.index(mistake.body.splitlines()[0])] + mistake.body)
    laws = re.findall(r"^\| `(test_\w+)` \|", TUTORIAL, flags=re.MULTILINE)
    assert len(laws) == 4
    of_laws = f"mean_clip and ({' or '.join(laws)})"
    done = run_tests(newcomer, "tests/library/test_strategy_laws.py", "-k", of_laws)
    assert done.returncode == 1, done.stdout
    assert set(re.findall(r"^FAILED .*?::(test_\w+)", done.stdout, flags=re.M)) == set(laws)


def test_a_file_that_is_not_as_the_page_says_is_named(newcomer):
    file, export, *_ = add_a_strategy.blocks()
    with pytest.raises(FileExistsError, match=r"mean_clip.py` must be new"):
        add_a_strategy.add(newcomer, file)
    (newcomer / export.file).write_text("")
    with pytest.raises(ValueError, match=r"__init__.py` must have these lines of the page once"):
        add_a_strategy.add(newcomer, export)
