"""The pages that compare: tests and names that they give exist, and no cell lacks its source."""

import re
from pathlib import Path

from registry import public_names

ROOT = Path(__file__).parents[2]
VS_OPTAX = (ROOT / "docs" / "vs_optax.md").read_text()
VS_OTHERS = (ROOT / "docs" / "vs_others.md").read_text()


def rows(page: str) -> list[list[str]]:
    """The cells of all rows of its tables, headers and rules left out."""
    lines = re.findall(r"^\| (.*) \|\n", page, flags=re.MULTILINE)
    return [line.split(" | ") for line in lines]


def test_each_difference_from_optax_is_kept_by_a_test_or_a_benchmark_that_exists():
    defined = {
        name
        for file in (ROOT / "tests" / "library").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)
    }
    kept = [cells[3] for cells in rows(VS_OPTAX) if len(cells) == 4 and cells[3] != "kept by"]
    assert len(kept) > 35
    for by in kept:
        if by == "the same":
            continue
        if by.startswith("`benchmarks/"):
            assert (ROOT / by.strip("`")).exists(), by
        else:
            assert by.strip("`") in defined, by


def test_each_cell_is_a_verdict_with_a_source():
    table = [cells for cells in rows(VS_OTHERS) if len(cells) == 12 and cells[0] != "feature"]
    assert len(table) > 35
    defined = dict(re.findall(r"^\[([a-z]-[a-z]+)\]: (https://\S+)$", VS_OTHERS, flags=re.M))
    used = set()
    for feature, ours, *peers in table:
        assert re.match(r"(yes|partly): ", ours), feature
        for cell in peers:
            verdict = re.fullmatch(r"(?:n/a|no|\[(?:yes|partly|no)\]\[([a-z]-[a-z]+)\])", cell)
            assert verdict, (feature, cell)
            used |= {verdict[1]} - {None}
    assert used == set(defined)


def test_the_names_in_our_column_are_public():
    column = [cells[1] for cells in rows(VS_OTHERS) if len(cells) == 12]
    names = {name for cell in column for name in re.findall(r"`([\w.]+)", cell)}
    assert len(names) > 25
    assert names - {"optax.masked", "optax.MultiSteps"} <= set(public_names())
