"""What an update computes is compiled also where the update is called eagerly."""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def compiled(static: Sequence[str] = ()) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make one cached program of a function for each tree structure and `static` arguments.

    Called eagerly it would be an operation for each leaf. Inside a trace it inlines, so that XLA
    sees no call.
    """
    return functools.partial(jax.jit, static_argnames=tuple(static), inline=True)
