"""The table of strategies, and which of their arguments `optax.inject_hyperparams` may see."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

STRATEGIES: dict[str, Callable[..., Any]] = {}
"""Every clip by its name: what `from_config`, the laws and the reference read."""


def strategy(*injected: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Enter a clip in `STRATEGIES`. The arguments that are named here may be injected."""

    def enter(make: Callable[P, T]) -> Callable[P, T]:
        STRATEGIES[make.__name__] = build = injectable(*injected)(make)
        return build

    return enter


def injectable(*injected: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let `optax.inject_hyperparams` see the defaults of these arguments, and of no other.

    It turns every default that is a number into an array, and takes every default that can be
    called for a schedule: `order=2` would be traced and `response=shrink` called with a count. So
    the other defaults are shown to it in a wrapping that it leaves alone.
    """

    def wrap(make: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(make)
        if unknown := set(injected) - set(signature.parameters):
            raise ValueError(f"`{make.__name__}` has no argument {sorted(unknown)}.")

        @functools.wraps(make)
        def build(*args: P.args, **kwargs: P.kwargs) -> T:
            plain: Any = {
                name: value.value if isinstance(value, _Structural) else value
                for name, value in kwargs.items()
            }
            return cast(Any, make)(*args, **plain)

        shown = [
            parameter
            if parameter.name in injected or parameter.default is parameter.empty
            else parameter.replace(default=_Structural(parameter.default))
            for parameter in signature.parameters.values()
        ]
        build.__dict__["__signature__"] = signature.replace(parameters=shown)
        return build

    return wrap


class _Structural:
    """A default that is neither a number nor callable, but prints as what it holds."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", repr(self.value))
