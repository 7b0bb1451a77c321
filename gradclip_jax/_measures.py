"""What is known of a measure: whether it gives 2-norms, and of every array."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ._given import GivenNorm
from ._norms import global_norm, group_norms, leaf_norms, unit_norms


def gives_norms(measure: Callable[..., Any]) -> bool:
    """Whether what it gives is 2-norms: one of the measures here, of order 2, or a given norm.

    What a function of the user gives may be anything, so it does not count as a norm.
    """
    function, keywords = unbound(measure)
    order = keywords.get("order", 2)
    known = any(function is each for each in (global_norm, leaf_norms, unit_norms, group_norms))
    is_euclidean = isinstance(order, int | float) and order == 2
    return isinstance(function, GivenNorm) or (known and is_euclidean)


def gives_norms_of_arrays(measure: Callable[..., Any]) -> bool:
    """Whether it gives the 2-norm of every array, or of its units, from which that follows."""
    function, _ = unbound(measure)
    return gives_norms(measure) and (function is leaf_norms or function is unit_norms)


def unbound(measure: Callable[..., Any]) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """The function in a `functools.partial`, and the arguments that it binds by keyword."""
    keywords: dict[str, Any] = {}
    while isinstance(measure, functools.partial):
        keywords = {**measure.keywords, **keywords}
        measure = measure.func
    return measure, keywords
