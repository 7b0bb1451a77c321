"""ACClip: momentum, each element of which is at most a moving average of its own moduli."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_between_0_and_1, check_number
from .._clip import measured_types
from .._compiled import compiled
from .._inject import strategy
from .._leaves import is_gradient, widen
from .._memory import to_device, to_memory_of
from .._rescale import OnNonfinite, nonfinite_fill, shrink
from .._safe import finite_or_zero
from .._state import ClipState, check_trees, initial_state, next_state, transformation
from .._types import AxisName, Params, Threshold, Updates
from .elements import arrays_of, largest, modulus, zeros_of


@strategy("b1", "b2", "eps")
def acclip(
    b1: Threshold = 0.9,
    *,
    b2: Threshold = 0.99,
    eps: Threshold = 1e-5,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""ACClip: momentum, each element of which is clipped to a moving average of its moduli.

    $$ m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad
       \tau_i \leftarrow \beta_2 \tau_i + (1 - \beta_2) |g_i|, \qquad
       u_i = \min\!\Big(1, \frac{\tau_i}{|m_i| + \epsilon}\Big) \, m_i $$

    In place of momentum, with SGD behind it: `optax.chain(acclip(), optax.sgd(1e-3))`. For
    attention models, whose gradients have heavy tails: a spike of g moves m ten times as far as
    tau, so that it is cut at a tenth.

    Args:
      b1: beta_1, between 0 and 1 (exclusive); 0.9 in the paper.
      b2: beta_2, likewise; 0.99 in the paper.
      eps: epsilon, non-negative, in units of the gradient; 1e-5 in the paper. Where gradients are
        as small it shrinks them, so lower it there; 0 is a clamp at tau.
      axis_name: See `global_norm`; the clip needs no other device, but what it measures does.
      on_nonfinite: `"zero"` makes each element that is NaN or infinite zero; `"propagate"`, NaN.
        Either way it enters neither m nor tau.

    Returns:
      A transformation with a `ClipState`: its `clip_measure` is the largest of (|m_i| + eps) /
      tau_i, its `clip_limit` 1. It keeps two arrays for each parameter, in at least float32.

      As in the paper, m and tau start at zero and are not corrected for it, which is a warm-up: a
      constant gradient becomes a hundredth of itself in the first update and 63 % of it in the
      hundredth.

    Raises:
      ValueError: For a number outside of its range.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.acclip(0.5, b2=0.75, eps=0.0)
    >>> updates, state = clip.update(jnp.array([4.0, -8.0]), clip.init(jnp.zeros(2)))
    >>> print(updates)  # m is [2, -4] and tau [1, 2]
    [ 1. -2.]

    Zhang et al., *Why are Adaptive Methods Good for Attention Models?*, NeurIPS 2020,
    https://arxiv.org/abs/1912.03194, algorithm 2 with alpha = 1, as in its experiments.
    """
    b1, b2 = check_between_0_and_1("b1", b1), check_between_0_and_1("b2", b2)
    eps = check_number("eps", eps, "be a finite number of at least 0", 0)
    fill = nonfinite_fill(on_nonfinite)

    def init(params: Params) -> ClipState:
        ratio = measured_types(largest, params, axis_name)
        arrays = zeros_of(params, lambda x: widen(to_device(x))), zeros_of(params, modulus)
        return initial_state(ratio, arrays, are_norms=False)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        check_trees(updates, params)
        leaves, tree = jax.tree.flatten(updates)
        momenta, levels = (arrays_of(arrays, updates) for arrays in state.limit_state)
        held = [i for i, m in enumerate(momenta) if m is not None and is_gradient(leaves[i])]
        ratios: list[Any] = [None] * len(leaves)
        changed = _changed(
            [(leaves[i], momenta[i], levels[i]) for i in held],
            (b1, b2, eps),
            on_nonfinite=on_nonfinite,
        )
        for i, (leaf, m, level, ratio) in zip(held, changed, strict=True):
            leaves[i], momenta[i], levels[i], ratios[i] = leaf, m, level, ratio
        ratio = largest(tree.unflatten(ratios), axis_name=axis_name)
        finite, one = jnp.isfinite(ratio), jnp.ones_like(ratio)
        return tree.unflatten(leaves), next_state(
            state,
            ratio,
            one,
            jnp.where(finite, shrink(ratio, one), fill),
            clipped=finite & (ratio > 1),
            nonfinite=~finite,
            limit_state=(tree.unflatten(momenta), tree.unflatten(levels)),
        )

    return transformation(init, update)


@compiled(static=("on_nonfinite",))
def _changed(
    arrays: list[tuple[Any, jax.Array, jax.Array]],
    numbers: tuple[Any, Any, Any],
    *,
    on_nonfinite: OnNonfinite,
) -> list[tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """The update of each leaf, its momentum and level, and the ratio of the two."""
    fill = nonfinite_fill(on_nonfinite)

    def of_leaf(
        leaf: Any, m: jax.Array, level: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        b1, b2, eps = (jnp.asarray(number).astype(level.dtype) for number in numbers)
        # The momentum is on the device, so that a leaf in host memory has to come there.
        x = widen(to_device(leaf))
        finite = jnp.isfinite(x)
        x = finite_or_zero(x)
        # Not m + (1 - b1) (x - m): the difference of two finite numbers may overflow.
        m = jnp.where(finite, _times(b1, m) + _times(1 - b1, x), m)
        level = jnp.where(finite, b2 * level + (1 - b2) * jnp.abs(x), level)
        size = jnp.abs(m) + eps
        over = size > level
        factor = jnp.where(over, level, 1) / jnp.where(over, size, 1)
        # A momentum of zero has a ratio of zero, whatever eps is, and what underflows the largest.
        moves, known = m != 0, level != 0
        ratio = jnp.where(moves & known, size, 0) / jnp.where(known, level, 1)
        ratio = jnp.where(moves & ~known, jnp.inf, ratio)
        ratio = jnp.minimum(ratio, jnp.finfo(level.dtype).max)
        out = jnp.where(finite, _times(factor, m), fill).astype(leaf.dtype)
        return to_memory_of(out, leaf), m, level, jnp.where(finite, ratio, jnp.inf)

    return [of_leaf(*of_array) for of_array in arrays]


def _times(factor: jax.Array, x: jax.Array) -> jax.Array:
    return factor.astype(x.dtype) * x
