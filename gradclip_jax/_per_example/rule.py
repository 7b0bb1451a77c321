"""How an example is clipped: from the norms of its arrays to factors, and the scaled sum."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_threshold
from .._leaves import broadcast_norms, norm_dtype, widen
from .._norms import norms_of_examples
from .._rescale import Response, factors
from .._state import plain_norms
from .sharding import out_sharding_of

Share = Callable[[Sequence[int]], Sequence[float]]
"""From the numbers of elements of the groups to their shares of the squared limit, of sum 1."""

_MARGIN = 2.0**-16


class Rule(NamedTuple):
    """Which norms of an example are clipped, to which part of the limit, and by which factor.

    Attributes:
      measure: From the norms of the arrays of an example to those that are clipped.
      share: Of the squared limit, the share of each norm.
      response: From norm and limit to the factor.
    """

    measure: Callable[..., Any]
    share: Share
    response: Response


class ExampleFactors(NamedTuple):
    """By what examples are multiplied, and what was seen of them.

    Attributes:
      keep: Whether an example counts and is finite, [examples].
      factors: For each leaf a scale and a power of two to multiply by, each [examples].
      limits: For each leaf the limit of its group, a scalar.
      norms: Norms by group before the clip, each [examples]; 0 where the mask is False.
      above: By group, the number of examples that count, are finite and above the limit.
      nonfinite: Number of examples that count and are not finite.
    """

    keep: jax.Array
    factors: list[tuple[jax.Array, jax.Array]]
    limits: list[jax.Array]
    norms: Any
    above: Any
    nonfinite: jax.Array


def equal_shares(sizes: Sequence[int]) -> Sequence[float]:
    r"""Divide the squared limit equally: each of K groups is clipped to $C / \sqrt K$.

    >>> from gradclip_jax import per_example
    >>> per_example.equal_shares([30, 10])
    [0.5, 0.5]

    McMahan, Ramage, Talwar, Zhang, *Learning Differentially Private Recurrent Language Models*,
    2018, https://arxiv.org/abs/1710.06963, per-layer clipping.
    """
    return [1 / len(sizes)] * len(sizes)


def size_shares(sizes: Sequence[int]) -> Sequence[float]:
    r"""Divide the squared limit by size: d of D elements are clipped to $C \sqrt{d / D}$.

    >>> from gradclip_jax import per_example
    >>> per_example.size_shares([30, 10])
    [0.75, 0.25]

    The other choice of McMahan et al. 2018: then all groups have one limit per element.
    """
    total = max(sum(sizes), 1)
    return [size / total for size in sizes]


def automatic(norm: jax.Array, limit: jax.Array, *, gamma: float = 0.01) -> jax.Array:
    r"""Bring every norm near the limit, and small ones less so: no threshold to tune (AUTO-S).

    $$ \text{limit} / (\text{norm} + \gamma) $$

    The limit is only the scale of the result. An infinite one is the identity.

    Args:
      norm: Norms, non-negative.
      limit: Limits, of the same shape.
      gamma: Norm that is clipped to half of the limit, above 0; in the unit of the norms. To
        change it: `functools.partial(automatic, gamma=0.1)`.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.responses import automatic
    >>> round(float(automatic(jnp.float32(0.01), jnp.float32(1.0))), 3)
    50.0

    Bu, Wang, Zha, Karypis, *Automatic Clipping: Differentially Private Deep Learning Made Easier
    and Stronger*, 2023, https://arxiv.org/abs/2206.07136, AUTO-S, with their default of 0.01.
    """
    finite = limit != jnp.inf
    return jnp.where(finite, limit, 1) / jnp.where(finite, norm + gamma, 1)


def check_max_norm(max_norm: Any) -> Any:
    """Return a limit that may be used and may be traced; raise for a schedule."""
    if callable(max_norm):
        raise ValueError(
            "`max_norm` must be a non-negative number, a scalar array or None, got a function: "
            "there is no count of steps here. Call it yourself, and pass its value at each call."
        )
    return check_threshold("max_norm", max_norm)


def check_in_range(name: str, value: Any) -> Any:
    """Return a number that float32 holds: not infinite there, nor flushed to 0."""
    if not isinstance(value, jax.Array):
        info = jnp.finfo(norm_dtype())
        low, high = float(info.tiny), float(info.max)
        if value != 0 and not low <= float(value) <= high:
            raise ValueError(
                f"`{name}` must lie between {low:.2g} and {high:.2g}, the range of {info.dtype}, "
                f"got {value!r}."
            )
    return value


def check_mask(mask: Any, count: int) -> jax.Array:
    """Return a boolean for each example: all True unless the caller gives a mask."""
    if mask is None:
        return jnp.ones(count, bool)
    mask = jnp.asarray(mask)
    if mask.shape != (count,) or mask.dtype != bool:
        raise ValueError(
            f"`mask` must be one boolean for each of {count} examples, "
            f"got {mask.dtype}{list(mask.shape)}."
        )
    return mask


def array_norms(grads: Any) -> Any:
    """The norm of each array of each example: the tree with an array [examples] for each leaf."""
    return jax.tree.map(lambda x: x.norms() if hasattr(x, "norms") else norms_of_examples(x), grads)


def factors_of_examples(
    norms: Any, sizes: Sequence[int], mask: jax.Array, max_norm: Any, rule: Rule
) -> ExampleFactors:
    """The factors of examples, from the norm of each of their arrays.

    `sizes` has the number of elements of each array of one example.
    """
    leaves = jax.tree.leaves(norms)
    grouped = jax.vmap(functools.partial(rule.measure, axis_name=()))(norms)
    flat, groups = jax.tree.flatten(grouped)
    if any(norm.ndim != 1 for norm in flat):
        raise ValueError("`measure` must return scalars from the norms of the arrays.")
    # Joint norms, too: they overflow where those of the arrays are finite.
    # A reduction of one table, since XLA repeats elementwise tests for each array: 48 took 9 s.
    table = jnp.stack([*leaves, *flat]) if leaves else jnp.zeros((1, mask.size))
    finite = jnp.isfinite(table).all(axis=0)
    keep = mask & finite
    group_of_leaf = broadcast_norms(groups.unflatten(range(len(flat))), norms)
    group_sizes = [0] * len(flat)
    for group, size in zip(group_of_leaf, sizes, strict=True):
        group_sizes[group] += size
    limits = [_limit(max_norm, share) for share in rule.share(group_sizes)] if flat else []
    pairs, above = [], []
    for norm, limit in zip(flat, limits, strict=True):
        usable = jnp.where(keep, norm, 0)
        lowered = jnp.broadcast_to(limit * (1 - _margin(len(leaves))), norm.shape)
        pairs.append(factors(usable, lowered, rule.response))
        above.append(jnp.sum(usable > limit, dtype=jnp.int32))
    seen = groups.unflatten([jnp.where(mask, norm, 0) for norm in flat])
    return ExampleFactors(
        keep=keep,
        factors=[pairs[group] for group in group_of_leaf],
        limits=[limits[group] for group in group_of_leaf],
        norms=plain_norms(seen),
        above=plain_norms(groups.unflatten(above)),
        nonfinite=jnp.sum(mask & ~finite, dtype=jnp.int32),
    )


def _limit(max_norm: Any, share: float) -> jax.Array:
    limit = jnp.asarray(max_norm).astype(norm_dtype())
    # False for NaN, too: a traced limit of NaN lets nothing through.
    return jnp.where(limit > 0, limit, 0) * np.asarray(np.sqrt(share), norm_dtype())


def _margin(leaves: int) -> float:
    """By which share of the limit norms are clipped below it, so that no rounding exceeds it.

    A backend sums up squares in rows of at most some hundred numbers, rows of rows and so on, so
    that each level adds at most some hundred half units in the last place to the sum, half of it
    to the norm; then the leaves are added one by one.
    """
    return _MARGIN + leaves * float(jnp.finfo(norm_dtype()).eps)


def zeros_for(tree: Any) -> list[jax.Array]:
    """A sum of nothing for each leaf of one example, in at least float32."""
    kinds = jax.eval_shape(lambda leaves: [widen(leaf) for leaf in leaves], jax.tree.leaves(tree))
    return [jnp.zeros(kind.shape, kind.dtype) for kind in kinds]


def add_scaled(totals: list[jax.Array], grads: Any, examples: ExampleFactors) -> list[jax.Array]:
    """Add examples, each scaled by its factors, to sums; those not kept add exactly nothing."""
    of_leaves = zip(totals, jax.tree.leaves(grads), examples.factors, examples.limits, strict=True)
    return [
        total
        + (
            leaf.scaled_sum(scale, power, examples.keep, limit)
            if hasattr(leaf, "scaled_sum")
            else _scaled_sum(leaf, scale, power, examples.keep)
        )
        for total, leaf, (scale, power), limit in of_leaves
    ]


def _scaled_sum(leaf: jax.Array, scale: jax.Array, power: jax.Array, keep: jax.Array) -> jax.Array:
    # A product with a vector lets each device sum its own examples before devices are summed; and
    # on a CPU XLA takes 5 s for a sum along the first axis of 16 x 512 x 1024, and 0.01 s for this.
    if jnp.iscomplexobj(leaf):
        parts = (_scaled_sum(part, scale, power, keep) for part in (leaf.real, leaf.imag))
        return jax.lax.complex(*parts)
    wide = widen(leaf)
    kept = jnp.where(expand_like(keep, wide), wide, 0) * expand_like(power, wide)
    return jnp.tensordot(
        scale.astype(wide.dtype),
        kept,
        axes=1,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=out_sharding_of(kept, *((kept, dim) for dim in range(1, kept.ndim))),
    )


def expand_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Numbers [examples] with the rank and dtype of `other`, [examples, ...]; booleans stay."""
    x = jnp.expand_dims(x, tuple(range(1, other.ndim)))
    return x if x.dtype == bool else x.astype(other.dtype)
