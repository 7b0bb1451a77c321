"""From the docstrings of the library to pages: Google sections, Markdown and LaTeX to Sphinx.

Docstrings are written to be read in an editor: sections as in Google's style, `code` as in
Markdown, equations between `$$`, tables with `|`. Sphinx reads reStructuredText.
"""

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

import gradclip_jax

SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):$")
FIELD = re.compile(r"^  (?! )([^:]+): *(.*)$")
MATH = re.compile(r"^( *)\$\$(.*?)\$\$ *$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^( *)\|.*\n\1\|[ :|-]+\n(?:\1\|.*\n?)+", re.MULTILINE)
API = Path(__file__).parent / "api"
PAGES = ("strategies", "guards")
ROW = re.compile(r"^\| `(\w+)`", re.MULTILINE)
CALL = re.compile(r"^(?:gradclip_jax\.)?(\w+(?:\.\w+)?)(?:\(.*\))?$", re.DOTALL)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """For `autodoc-process-docstring`: rewrite the lines in place."""
    lines[:] = restructured("\n".join(lines)).split("\n")


def restructured(text: str) -> str:
    """A docstring as reStructuredText."""
    blocks = re.split(r"\n{2,}", text)
    section, result = "", []
    for block in blocks:
        if block.lstrip().startswith(">>>"):
            section = ""
            result.append(block)
            continue
        first, _, rest = block.partition("\n")
        if found := SECTION.match(first):
            section, block = found[1], rest
            result.append("\n".join(fields(section, block.split("\n"))))
        elif section and block.startswith("  "):  # another paragraph of the section
            result.append(inline(textwrap.indent(textwrap.dedent(block), "    ")))
        else:
            section = ""
            result.append(inline(block))
    return "\n\n".join(result) + "\n"


def fields(section: str, lines: list[str]) -> list[str]:
    """The lines of one section as a list of fields."""
    if section == "Returns":
        body = inline("\n".join(line[2:] for line in lines)).split("\n")
        return [":returns:", *(f"    {line}" for line in body)]
    # What takes an argument is a field of Python's; an attribute is one of a list.
    start = {"Args": ":param {}:", "Raises": ":raises {}:", "Attributes": "    * **{}**:"}[section]
    result = [":attributes:"] if section == "Attributes" else []
    margin = "      " if section == "Attributes" else "    "
    for line in lines:
        if found := FIELD.match(line):
            result += [start.format(found[1]), f"{margin}{found[2]}"]
        else:
            result.append(f"{margin}{line.strip()}")
    return inline("\n".join(result)).split("\n")


def inline(text: str) -> str:
    """Equations, tables and code of a piece of text that holds no example."""
    kept: list[str] = []

    def keep(replacement: str) -> str:
        kept.append(replacement)
        return f"\0{len(kept) - 1}\0"

    def equation(found: re.Match[str]) -> str:
        body = "\n".join(f"{found[1]}   {line.strip()}" for line in found[2].strip().split("\n"))
        return keep(f"\n{found[1]}.. math::\n\n{body}\n")

    def code(found: re.Match[str]) -> str:
        # Outside of a word, as reStructuredText wants it.
        return keep(f"``{found[1]}``" + (r"\ " if found[2] else "")) + found[2]

    text = MATH.sub(equation, text)
    text = TABLE.sub(lambda found: keep(table(found[0], found[1])), text)
    text = re.sub(r"`([^`]+)`(\w?)", code, text)
    text = text.replace("|", r"\|")
    while "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], text)
    return text


def table(text: str, indent: str) -> str:
    """A Markdown table as a directive."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        for line in text.strip("\n").split("\n")
    ]
    lines = ["", ".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    for row in (rows[0], *rows[2:]):
        for i, cell in enumerate(row):
            content = re.sub(r"`([^`]+)`", r"``\1``", cell)
            lines.append(f"   {'* -' if i == 0 else '  -'} {content}")
    return "\n".join(f"{indent}{line}".rstrip() for line in lines) + "\n"


def rows(page: str) -> list[str]:
    """The strategies or guards of a page: the names that begin the rows of its tables."""
    return ROW.findall((API / f"{page}.md").read_text(encoding="utf-8"))


def write_pages(app: Any) -> None:
    """For `builder-inited`: a page for each strategy and guard, from its docstring."""
    for page in PAGES:
        (API / page).mkdir(exist_ok=True)
        new = {API / page / f"{name}.rst": name for name in rows(page)}
        for file in set((API / page).iterdir()) - set(new):
            file.unlink()
        for file, name in new.items():
            text = f"{name}\n{'=' * len(name)}\n\n.. autofunction:: gradclip_jax.{name}\n"
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                file.write_text(text, encoding="utf-8")


def list_pages(app: Any, docname: str, source: list[str]) -> None:
    """For `source-read`: these pages in the navigation, below that of their table."""
    page = docname.removeprefix("docs/api/")
    if page in PAGES:
        entries = "\n".join(f"{page}/{name}" for name in rows(page))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


class LinkPublicNames(SphinxPostTransform):
    """Let `clip_by_norm`, `clip_by_norm(1.0)` and `per_example.clip` lead to the reference."""

    default_priority = 5  # before Sphinx resolves references

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(nodes.literal)):
            found = CALL.match(node.astext())
            if not found or not is_public(found[1]) or inside(node):
                continue
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"gradclip_jax.{found[1]}",
                refexplicit=True,
                refwarn=True,
                refdoc=self.env.docname,
            )
            node.replace_self(link)
            link += node


def is_public(name: str) -> bool:
    """Whether the reference has an entry of that name."""
    owner, _, member = name.partition(".")
    if name.startswith("_") or not hasattr(gradclip_jax, owner):
        return False
    found = getattr(gradclip_jax, owner)
    return not member or (
        (inspect.ismodule(found) or owner == "Monitor") and hasattr(found, member)
    )


def inside(node: nodes.Node) -> bool:
    """Whether a link there would be one within a link, or in a heading."""
    parent = node.parent
    while parent is not None:
        if isinstance(parent, nodes.title | nodes.reference | addnodes.desc_signature):
            return True
        parent = parent.parent
    return False


def setup(app: Any) -> dict[str, bool]:
    """Make this module an extension."""
    app.connect("autodoc-process-docstring", process)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", list_pages)
    app.add_post_transform(LinkPublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
