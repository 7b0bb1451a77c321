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
    """What is done with each example or user, however the batch is gone through.

    Attributes:
      each: `(params, examples) -> ((values, aux), grads)`, each with a leading axis [examples].
      params: Parameters, one tree.
      max_norm: The limit.
      rule: Which norms are clipped, and how.
      pre_clip: What is done with one gradient before its norm is measured, or None.
      average_users: Whether the gradients of a user are averaged, not summed.
      return_norms: Whether norms are returned.
      axes: Mesh axes along which types say that the batch varies.
    """

    each: Callable[..., Any]
    params: Any
    max_norm: Any
    rule: Rule
    pre_clip: Callable[[Any], Any] | None
    average_users: bool
    return_norms: bool
    axes: frozenset[str]

    def zeros(self) -> list[jax.Array]:
        """Sums to start from, one for each array of the parameters."""
        pairs = zip(zeros_for(self.params), jax.tree.leaves(self.params), strict=True)
        return [varying_like(zero, leaf) for zero, leaf in pairs]

    def add(
        self, totals: list[jax.Array], grads: Any, mask: jax.Array
    ) -> tuple[list[jax.Array], ExampleFactors]:
        """Clip gradients with a leading axis [examples] and add them to the sums."""
        sizes = [leaf.size for leaf in jax.tree.leaves(self.params)]
        if self.pre_clip is not None:
            before, grads = grads, jax.vmap(self.pre_clip)(grads)
            _check_same_shapes(before, grads)
        norms = array_norms(grads)
        factors = factors_of_examples(norms, sizes, mask, self.max_norm, self.rule)
        return add_scaled(totals, grads, factors), factors


class Sums(NamedTuple):
    """What one device found: what is summed over devices, and what is not."""

    summed: tuple[Any, ...]
    norms: Any
    aux: Any


def over_examples(clip: Clipping, batch: Any, mask: jax.Array, size: int) -> Sums:
    """Sums over a batch, each example clipped alone, `size` of them at a time."""
    count = mask.size
    steps = math.ceil(count / size)
    padding = steps * size - count
    if padding or size % max(map(shards_of_axis0, jax.tree.leaves(batch))):
        batch, mask = jax.tree.map(replicate_axis0, (batch, mask))

    def in_columns(x: jax.Array) -> jax.Array:
        # Micro-batch s is column s, every `steps`-th example. So each device that holds a part of
        # the batch has an equal share of every micro-batch, and none waits for the others.
        padded = jnp.concatenate([x, x[:padding]]) if padding else x
        return padded.reshape(size, steps, *x.shape[1:])

    table = jax.tree.map(in_columns, batch)
    masks = (jnp.arange(steps * size) < count).reshape(size, steps) & in_columns(mask)

    def step(totals: list[jax.Array], number: jax.Array) -> tuple[Any, Any]:
        examples, mask = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False),
            (table, masks),
        )
        (values, aux), grads = clip.each(clip.params, examples)
        totals, factors = clip.add(totals, grads, mask)
        counts = (jnp.sum(mask, dtype=jnp.int32), factors.above, factors.nonfinite)
        norms = factors.norms if clip.return_norms else None
        return totals, (sum_where(mask, values), counts, norms, aux)

    totals, (values, counts, norms, aux) = scan_unless_one(step, clip.zeros(), jnp.arange(steps))
    norms, aux = jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(steps * size, *x.shape[2:])[:count], (norms, aux)
    )
    counts = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), counts)
    return Sums((jnp.sum(values), totals, counts), norms, aux)


def scan_unless_one(step: Callable[..., Any], start: Any, stacked: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, but one step without a loop: in one, XLA on CPU runs convolutions slowly."""
    if len(jax.tree.leaves(stacked)[0]) > 1:
        return jax.lax.scan(step, start, stacked)
    # Compiled as one program, as the loop would be, where nothing around compiles it.
    last, found = jax.jit(step, inline=True)(start, jax.tree.map(lambda x: x[0], stacked))
    return last, jax.tree.map(lambda x: x[None], found)


def sum_where(mask: jax.Array, values: jax.Array) -> jax.Array:
    """The sum of the values where the mask is True, in at least float32."""
    return jnp.sum(jnp.where(mask, widen(values), 0))


def _check_same_shapes(before: Any, after: Any) -> None:
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (before, after)]
    if jax.tree.structure(before) != jax.tree.structure(after) or shapes[0] != shapes[1]:
        found = [[list(shape[1:]) for shape in of_tree] for of_tree in shapes]
        raise ValueError(
            "`pre_clip` must return a tree of the structure and shapes that it got: it got arrays "
            f"of shapes {found[0]} and returned {found[1]}."
        )
