"""The update of an optimizer, unless a step is skipped."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._compiled import compiled
from .._devices import filled_like, varying_like
from .._leaves import is_gradient
from .._memory import changed_in_place, constant_like
from .._rescale import factors, rescale, shrink
from .memory import merged


def unless_skipped(
    optimizer: optax.GradientTransformationExtraArgs,
) -> Callable[..., tuple[Any, Any]]:
    """The update of an optimizer, but where a step is skipped zeros and the state as it was."""

    def unless(data: Any, rest: Any = None) -> Any:
        @compiled()  # three uses, one trace
        def move(skipped: jax.Array, *read: Any) -> Any:
            arguments = read if rest is None else merged(read, rest)
            (updates, norm, limit), state, params, extra_args = arguments
            applied = _applied(updates, norm, limit, skipped)
            return data_of(optimizer.update(applied, state, params, **extra_args))

        def stay() -> Any:
            zeros, kept = jax.eval_shape(move, *data)
            _, (updates, *_), state, *_ = data
            return jax.tree.map(_zeros, zeros, updates), jax.tree.map(_as_kind, state, kept)

        def by_branch() -> Any:
            # The step is the first branch: with the two swapped XLA copies the state.
            return jax.lax.cond(~skipped, lambda: move(*data), stay)

        def by_select() -> Any:
            moved = move(skipped, *_unread(skipped, read))
            return jax.tree.map(functools.partial(_select, skipped), stay(), moved)

        # An accelerator selects in the pass of the optimizer. A branch keeps that pass from what
        # is around it: AdamW on 27 million parameters costs a TPU v5e 3.1 M cycles and 133 MB, by
        # selects 2.1 and 6. On CPU 64 MiB of Adam take 64 MiB and 112 ms, by selects 116 and 189.
        skipped, *read = data
        return jax.lax.platform_dependent(cpu=by_branch, default=by_select)

    of_data = compiled()(unless)

    def run(*arguments: Any) -> tuple[Any, Any]:
        # A function or a string (in a model, or of a line search) is neither an argument nor a
        # result of a compiled program.
        data = data_of(arguments)
        rest = jax.tree.map(lambda x: None if _is_data(x) else x, arguments[1:])
        if jax.tree.leaves(rest):
            moved, inner_state = compiled()(functools.partial(unless, rest=rest))(data)
        else:
            moved, inner_state = of_data(data)
        _, (updates, *_), state, *_ = arguments
        return merged(moved, updates), merged(inner_state, state)

    return run


@jax.custom_jvp
def _unread(_: jax.Array, tree: Any) -> Any:
    """The tree, whose derivative is zero where the step is skipped."""
    return tree


@_unread.defjvp
def _derivative(primals: Any, tangents: Any) -> Any:
    # What a skipped step computes is not used, but backwards its 0 * inf would be NaN.
    (skipped, tree), (_, tangent) = primals, tangents
    return tree, jax.tree.map(lambda x: _select(skipped, jnp.zeros_like(x), x), tangent)


def _select(skipped: jax.Array, old: Any, new: Any) -> Any:
    if new.dtype == jax.dtypes.float0:
        return new
    return changed_in_place(lambda x, old, bad: jax.lax.select(bad, old, x), new, old, skipped)


def data_of(tree: Any) -> Any:
    """The tree with None for each leaf that is not data."""
    return jax.tree.map(lambda x: x if _is_data(x) else None, tree)


def _is_data(x: Any) -> bool:
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind not in "OSUMm"
    return isinstance(x, int | float | complex | jax.Array)


def _as_kind(x: Any, kind: jax.ShapeDtypeStruct) -> Any:
    # Gradients that are wider than the parameters widen the state of an optimizer.
    return varying_like(x if x.dtype == kind.dtype else x.astype(kind.dtype), kind)


def _zeros(kind: jax.ShapeDtypeStruct, update: Any) -> Any:
    if not jnp.issubdtype(kind.dtype, jnp.number):
        return update  # a PRNG key, or what has no value at all (float0)
    # The kind does not tell the memory: an optimizer leaves an update in that of the gradient.
    return changed_in_place(lambda x, zeros: zeros, update, filled_like(0, kind))


def _applied(updates: Any, norm: jax.Array, limit: jax.Array | None, skipped: jax.Array) -> Any:
    """The finite elements, rescaled to the limit if there is one; zeros in a skipped step."""
    factor = None if limit is None else factors(norm, limit, shrink)

    def kept(x: jax.Array, skipped: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(x) & ~skipped, x, constant_like(0, x))

    def applied(x: Any) -> Any:
        if not is_gradient(x):
            return x
        x = changed_in_place(kept, jnp.asarray(x), skipped)
        return x if factor is None else rescale([x], [factor])[0]

    return jax.tree.map(applied, updates)
