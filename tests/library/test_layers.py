"""A module imports only from lower layers, and the package needs jax and optax alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from registry import public_modules

import gradclip_jax

PACKAGE = Path(gradclip_jax.__file__).parent
LAYERS = [
    {"_types"},
    {"_checks", "_compiled", "_export"},
    {"_leaves", "_memory"},
    {"_devices", "_safe"},
    {"_reduce"},
    {"_platforms"},
    {"_norms", "_limits"},
    {"_given", "_matrices", "_rescale"},
    {"_state", "_inject", "_measures", "_polynomials"},
    {"_per_layer", "_balls"},
    {"_clip"},
    {"_guards", "_backward", "_per_example", "_strategies"},
    {"_metrics", "_upgrade"},
    {"_monitor", "_interop"},
    {"balls", "limits", "monitor", "per_example", "responses"},
    {"__init__"},
]
LAYER = {module: number for number, layer in enumerate(LAYERS) for module in layer}
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def module_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Modules of the package, and top-level packages from outside."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            up = len(file.relative_to(PACKAGE).parts) - node.level
            path = [*file.relative_to(PACKAGE).parts[:up], *(node.module or "").split(".")]
            inside |= {path[0]} if path[0] else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    return inside, outside


@each_file
def test_imports_only_from_lower_layers(file):
    inside, _ = imports(file)
    # Within a package of one layer: a limit needs what a limit is, a strategy chains another.
    packages = {"_limits", "_guards", "_per_example", "_strategies", "_monitor", "_interop"}
    for module in inside - (packages & {module_of(file)}):
        assert LAYER[module] < LAYER[module_of(file)], f"{file.name} imports {module}"


@each_file
def test_depends_on_jax_and_optax_alone(file):
    _, outside = imports(file)
    # numpy is a dependency of jax, and its scalars are thresholds.
    extras = {"plots.py": {"matplotlib"}, "writers.py": {"tensorboardX"}}.get(file.name, set())
    assert outside - set(sys.stdlib_module_names) <= {"jax", "optax", "numpy"} | extras


def test_extras_are_imported_only_where_they_are_used():
    """`import gradclip_jax` must not need them."""
    code = "import gradclip_jax, sys; print({'matplotlib', 'tensorboardX'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_module_has_a_layer():
    assert {module_of(file) for file in FILES} == set(LAYER)


def test_only_the_reduction_and_the_devices_know_collectives():
    collectives = ("psum", "pmax", "pmean", "all_gather")
    for file in FILES:
        if module_of(file) not in ("_reduce", "_devices"):
            calls = [
                node.attr
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Attribute)
            ]
            assert not set(calls) & set(collectives), file.name


PUBLIC = {"__init__": gradclip_jax, **public_modules()}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_surface_is_what_init_and_the_public_modules_name(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    named = [
        alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert all(alias.asname == alias.name for alias in named)
    assert len(named) == len({alias.name for alias in named})
    public = {name for name in vars(PUBLIC[module]) if not name.startswith("_")}
    assert {alias.name for alias in named} == public
    for name in public:
        assert getattr(PUBLIC[module], name).__doc__, f"{name} has no docstring"


def test_public_modules_define_nothing():
    """They are a list of names; what the names stand for is private."""
    for module in public_modules():
        body = ast.parse((PACKAGE / f"{module}.py").read_text()).body
        assert all(isinstance(node, ast.Expr | ast.ImportFrom) for node in body), module
