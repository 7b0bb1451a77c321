"""Clip gradients of examples that exist already, and add them up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._compiled import compiled
from .._leaves import is_gradient
from .._norms import global_norm
from .._rescale import Response, check_response, shrink
from .rule import (
    Rule,
    Share,
    add_scaled,
    array_norms,
    check_mask,
    check_max_norm,
    equal_shares,
    factors_of_examples,
    zeros_for,
)
from .sharding import mesh_of


def clip(
    grads: Any,
    *,
    max_norm: Any,
    measure: Callable[..., Any] = global_norm,
    share: Share = equal_shares,
    response: Response = shrink,
    mask: Any = None,
    dtype: Any = None,
) -> tuple[Any, Any]:
    r"""Sum of per-example gradients that exist already, each clipped (DP-SGD).

    $$ \sum_i g_i \, \text{response}(\lVert g_i \rVert, C) $$

    For gradients as from `jax.vmap(jax.grad(loss), (None, 0))`; where they need too much memory,
    use `per_example.value_and_grad`. It takes the place of `optax.per_example_global_norm_clip`,
    and with `measure=leaf_norms` of `optax.per_example_layer_norm_clip` (`share=size_shares` is its
    `uniform=False`).

    Args:
      grads: Pytree of arrays [examples, ...] of any float or complex dtype.
      max_norm: C, as in `per_example.value_and_grad`, and so are the next three.
      measure: Which norms of an example are clipped.
      share: How several norms share the squared limit.
      response: From norm and limit to the factor.
      mask: Which examples count, booleans [examples]; by default all.
      dtype: Of the sums; by default that of each leaf.

    Returns:
      The sums, a tree like that of one example; and how many examples count and were above their
      limit or not finite: an int32, or one for each norm that `measure` returns. An example that
      is not finite adds exactly nothing. One above the limit is scaled to C (1 - 2^-16 - K 2^-23),
      K the number of arrays, so that no rounding exceeds C.

    Raises:
      ValueError: For leaves that do not share their first axis, or an argument out of its range.

    >>> import gradclip_jax, jax.numpy as jnp, numpy as np
    >>> grads = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 1.0]])}
    >>> total, clipped = gradclip_jax.per_example.clip(grads, max_norm=1.0)
    >>> print(np.asarray(total["w"]).round(3), clipped)
    [0.9 1.2] 2

    Abadi et al., *Deep Learning with Differential Privacy*, 2016,
    https://arxiv.org/abs/1607.00133, algorithm 1 without its noise.
    """
    check_response(response)
    max_norm = check_max_norm(max_norm)
    leaves = jax.tree.leaves(grads)
    counts = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(counts) != 1 or counts == {()} or not all(map(is_gradient, leaves)):
        found = sorted({f"{leaf.dtype}{list(leaf.shape)}" for leaf in map(jnp.asarray, leaves)})
        raise ValueError(
            "`grads` must be float arrays with one example for each index of their first axis, "
            f"got {', '.join(found) or 'none'}."
        )
    ((count,),) = counts
    mask = check_mask(mask, count)
    with mesh_of(grads):
        return _sum_clipped(grads, max_norm, mask, rule=Rule(measure, share, response), dtype=dtype)


@compiled(static=("rule", "dtype"))
def _sum_clipped(
    grads: Any, max_norm: Any, mask: jax.Array, *, rule: Rule, dtype: Any
) -> tuple[Any, Any]:
    leaves, treedef = jax.tree.flatten(grads)
    zeros = zeros_for([jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves])
    sizes = [zero.size for zero in zeros]
    factors = factors_of_examples(array_norms(grads), sizes, mask, max_norm, rule)
    pairs = zip(add_scaled(zeros, grads, factors), leaves, strict=True)
    cast = [total.astype(leaf.dtype if dtype is None else dtype) for total, leaf in pairs]
    clipped = jax.tree.map(lambda above: above + factors.nonfinite, factors.above)
    return treedef.unflatten(cast), clipped
