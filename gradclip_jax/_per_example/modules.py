"""Flax NNX modules among the arguments: their parameters, and state that must not change."""

import sys
from typing import Any, NamedTuple

import jax

from .._leaves import path_name


class Argument(NamedTuple):
    """An argument of the call: without modules as it is, else its modules split by `nnx.split`.

    Attributes:
      params: The argument itself, or what of its modules is differentiated.
      graph: The structure of the modules; None without modules.
      rest: All other state of the modules.
      wrt: The filter that tells parameters from the rest.
    """

    params: Any
    graph: Any = None
    rest: Any = None
    wrt: Any = None

    def merged(self, params: Any) -> Any:
        """The argument with other parameters."""
        if self.graph is None:
            return params
        # The map makes new variables, which belong to the trace that runs now.
        return flax_nnx().merge(self.graph, params, jax.tree.map(lambda x: x, self.rest))

    def check_unchanged(self, merged: Any) -> None:
        """Raise when `fun` changed the state of a module: each example changes it otherwise."""
        if self.graph is None:
            return
        before = jax.tree.leaves_with_path(self.rest)
        after = jax.tree.leaves(flax_nnx().split(merged, self.wrt, ...)[2])
        changed = [path for (path, old), new in zip(before, after, strict=False) if old is not new]
        if changed or len(before) != len(after):
            names = ", ".join(f"`{path_name(path)}`" for path in changed) or "its structure"
            raise ValueError(
                f"`fun` must leave the state of a module as it is, but changes {names}: each "
                "example has its own. For batch statistics call `model.eval()`; for dropout pass "
                "one key for each example with the batch: `model(x, rngs=nnx.Rngs(key))`; for "
                "`nnx.RNN` pass `initial_carry`."
            )


def flax_nnx() -> Any:
    """`flax.nnx` where someone imported it, or None: without it there are no modules."""
    return sys.modules.get("flax.nnx")


def split_argument(argument: Any, which: Any) -> Argument:
    """Split the modules in an argument; `which` is its position or an `nnx.DiffState`."""
    nnx = flax_nnx()
    if nnx is None:
        return Argument(argument)

    def is_module(x: Any) -> bool:
        return isinstance(x, nnx.Pytree)

    if not any(map(is_module, jax.tree.leaves(argument, is_leaf=is_module))):
        return Argument(argument)
    wrt = getattr(which, "filter", nnx.Param)
    graph, params, rest = nnx.split(argument, wrt, ...)
    return Argument(params, graph, rest, wrt)
