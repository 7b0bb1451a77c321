"""From a batch to a sum of clipped gradients, one micro-batch after the other."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._devices import varying_like
from .._leaves import widen
from .rule import ExampleFactors, Rule, add_scaled, array_norms, factors_of_examples, zeros_for
from .sharding import replicate_axis0, shards_of_axis0


class Clipping(NamedTuple):
    """What both ways through a batch need."""

    each: Callable[..., Any]
    params: Any
    max_norm: Any
    rule: Rule
    pre_clip: Callable[[Any], Any] | None
    average_users: bool
    return_norms: bool
    axes: frozenset[str]

    def zeros(self) -> list[jax.Array]:
        pairs = zip(zeros_for(self.params), jax.tree.leaves(self.params), strict=True)
        return [varying_like(zero, leaf) for zero, leaf in pairs]

    def add(
        self, totals: list[jax.Array], grads: Any, real: jax.Array
    ) -> tuple[Any, ExampleFactors]:
        sizes = [leaf.size for leaf in jax.tree.leaves(self.params)]
        if self.pre_clip is not None:
            before, grads = grads, jax.vmap(self.pre_clip)(grads)
            _check_same(before, grads)
        held = factors_of_examples(array_norms(grads), sizes, real, self.max_norm, self.rule)
        return add_scaled(totals, grads, held), held


class Sums(NamedTuple):
    """What one device found: what is summed over devices, and what is not."""

    summed: tuple[Any, ...]
    norms: Any
    aux: Any


def over_examples(clip: Clipping, batch: Any, real: jax.Array, size: int) -> Sums:
    count = real.size
    steps = math.ceil(count / size)
    if size % max(map(shards_of_axis0, jax.tree.leaves(batch))) or steps * size > count:
        batch, real = jax.tree.map(replicate_axis0, (batch, real))

    def columns(x: jax.Array) -> jax.Array:
        # Column s is micro-batch s: it has as many examples of each device that holds a part.
        padded = jnp.concatenate([x, x[: steps * size - count]]) if steps * size > count else x
        return padded.reshape(size, steps, *x.shape[1:])

    table = jax.tree.map(columns, batch)
    counts = (jnp.arange(steps * size) < count).reshape(size, steps) & columns(real)

    def step(totals: list[jax.Array], number: jax.Array) -> tuple[Any, Any]:
        examples, real = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False),
            (table, counts),
        )
        (values, aux), grads = clip.each(clip.params, examples)
        totals, held = clip.add(totals, grads, real)
        seen = (jnp.sum(real, dtype=jnp.int32), held.above, held.nonfinite)
        return totals, (
            sum_of_values(values, real),
            seen,
            held.norms if clip.return_norms else None,
            aux,
        )

    totals, (values, seen, norms, aux) = scan(step, clip.zeros(), jnp.arange(steps))
    norms, aux = jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(steps * size, *x.shape[2:])[:count], (norms, aux)
    )
    seen = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), seen)
    return Sums((jnp.sum(values), totals, seen), norms, aux)


def scan(step: Callable[..., Any], start: Any, rows: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, but one step is no loop: XLA on CPU runs convolutions slowly inside one."""
    if len(jax.tree.leaves(rows)[0]) > 1:
        return jax.lax.scan(step, start, rows)
    # One program, as the loop would be, where nothing around compiles it.
    last, seen = jax.jit(step, inline=True)(start, jax.tree.map(lambda x: x[0], rows))
    return last, jax.tree.map(lambda x: x[None], seen)


def sum_of_values(values: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(real, widen(values), 0))


def _check_same(before: Any, after: Any) -> None:
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (before, after)]
    if jax.tree.structure(before) != jax.tree.structure(after) or shapes[0] != shapes[1]:
        found = [[list(shape[1:]) for shape in of_tree] for of_tree in shapes]
        raise ValueError(
            "`pre_clip` must return a tree of the structure and shapes that it got: it got arrays "
            f"of shapes {found[0]} and returned {found[1]}."
        )
