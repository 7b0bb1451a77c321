"""What docstrings show runs, and prints what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from registry import public_names

import gradclip_jax

MODULES = [name for _, name, _ in pkgutil.walk_packages(gradclip_jax.__path__, "gradclip_jax.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name, standard_promotion):
    if name.endswith(".writers"):
        pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_public_functions_have_an_example():
    for name, value in public_names().items():
        if callable(value) and not isinstance(value, type):
            assert ">>>" in (value.__doc__ or ""), f"{name} shows no example"


def test_public_docstrings_are_at_most_forty_lines():
    """The rest is on the page that shows them."""
    long = {
        name: lines
        for name, value in public_names().items()
        if callable(value)
        and (lines := len(inspect.cleandoc(value.__doc__ or "").splitlines())) > 40
    }
    assert not long
