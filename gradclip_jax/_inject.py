"""Which arguments of a strategy `optax.inject_hyperparams` may see."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


def named_strategy(strategy: Callable[P, T]) -> Callable[P, T]:
    """Let `optax.inject_hyperparams` see the thresholds of a strategy, and nothing else.

    It turns every default that is a number into an array and takes every default that can be
    called for a schedule: `order=2` would be traced and `response=shrink` called with a count.
    Thresholds are positional here and structure is keyword-only, so the defaults of keyword-only
    arguments are shown to it in a wrapping that it leaves alone.
    """
    signature = inspect.signature(strategy)

    @functools.wraps(strategy)
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        plain: Any = {
            name: value.value if isinstance(value, _Structural) else value
            for name, value in kwargs.items()
        }
        return cast(Any, strategy)(*args, **plain)

    shown = [
        parameter.replace(default=_Structural(parameter.default))
        if parameter.kind is parameter.KEYWORD_ONLY
        else parameter
        for parameter in signature.parameters.values()
    ]
    build.__dict__["__signature__"] = signature.replace(parameters=shown)
    return build


class _Structural:
    """A default that is neither a number nor callable, but prints as what it holds."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", repr(self.value))
