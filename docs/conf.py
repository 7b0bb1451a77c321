"""The site: `make docs`, or `sphinx-build -W -n --keep-going -c docs . build/site`.

The source directory is the root of the repository, so a link between two files is the same link on
the site. Nothing is fetched, neither by the build nor by its pages, and no notebook is executed:
the suite does that.
"""

import importlib
import inspect
import os
import shutil
import sys
import tomllib
from operator import attrgetter
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "gradclip_jax"
copyright = "the authors of gradclip_jax, Apache-2.0"
pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
version = release = pyproject["version"]
repository, here = (pyproject["urls"][name] for name in ("Repository", "Documentation"))

root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/api/**", "notebooks/*.ipynb", "benchmarks/results/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "demo", "docs/playground"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
    "docstrings",  # docs/docstrings.py
    "equations",  # docs/equations.py
]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "substitution"]
myst_substitutions = {
    "links": f"Version {version} · "
    + " · ".join(f"[{name}]({url})" for name, url in pyproject["urls"].items() if url != here)
}
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}
nb_merge_streams = True

# The docstrings say what each argument is; the types of pytrees would only hide its name.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
nitpick_ignore = [("py:exc", name) for name in ("ImportError", "RuntimeError", "ValueError")]

# What readers search for by another name than that of the page: first among the results.
SEARCHED = {
    "docs/api/guards": ["NaN"],
    "docs/api/per_example": ["DP-SGD"],
    "docs/api/strategies/adaptive_grad_clip": ["AGC", "adaptive gradient clipping"],
    "docs/api/strategies/clip_by_global_norm": ["gradient clipping by norm"],
    "docs/coming_from": ["max_grad_norm"],
    "docs/many_devices": ["FSDP"],
    "docs/per_example": ["DP-SGD"],
}

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/logo.svg"
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The lines of a function or class in the repository."""
    module = importlib.import_module(info["module"])
    found = inspect.unwrap(attrgetter(info["fullname"])(module))
    if not inspect.isroutine(found) and not inspect.isclass(found):
        return None
    file = Path(inspect.getfile(found)).relative_to(ROOT).as_posix()
    lines, first = inspect.getsourcelines(found)
    return f"{repository}/blob/main/{file}#L{first}-L{first + len(lines) - 1}"


def index(app: Sphinx, docname: str, source: list[str]) -> None:
    """Enter in the index what a page is searched for; the search puts main entries first."""
    if docname in SEARCHED:
        entries = ".. index::\n" + "".join(f"   ! {term}\n" for term in SEARCHED[docname])
        if app.env.doc2path(docname).suffix == ".md":
            entries = f"```{{eval-rst}}\n{entries}```\n"
        source[0] = f"{entries}\n{source[0]}"


FRONT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=docs/index.html">
<title>gradclip_jax</title>
<a href="docs/index.html">gradclip_jax</a>
</html>
"""


def finish(app: Sphinx, error: Exception | None) -> None:
    """Add what Sphinx does not make: the playground and a front door."""
    if error or app.builder.format != "html":
        return
    out = Path(app.outdir)
    playground = ROOT / "docs" / "playground"
    if playground.exists():
        shutil.copytree(playground, out / "docs" / "playground", dirs_exist_ok=True)
    (out / "index.html").write_text(FRONT, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Add the hooks to the build."""
    app.connect("source-read", index)
    app.connect("build-finished", finish)
