"""The norm-growth limiter: the norm of an array may grow by so much in a step."""

import optax

from .._clip import clip_to_limit
from .._inject import strategy
from .._limits.growth import growth
from .._norms import leaf_norms
from .._rescale import OnNonfinite
from .._types import AxisName, Threshold


@strategy("ratio")
def limit_norm_growth(
    ratio: Threshold = 1.01,
    *,
    floor: float = 0.1,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Norm-growth limiter (Fira): clip each array to a multiple of its last clipped norm.

    $$ g_\ell \leftarrow g_\ell \cdot \min\!\Big(1, \frac{L_\ell}{\lVert g_\ell \rVert}\Big), \qquad
       L_\ell = \max(\gamma x_\ell, \; \varphi \bar x_\ell), \qquad
       x_\ell' = \min(\lVert g_\ell \rVert, L_\ell) $$

    with a moving average of what passed. For updates that should grow smoothly, as those of
    low-rank optimizers when their projection changes; behind the preconditioner.

    Args:
      ratio: gamma, the most by which a norm may grow in one step, above 1; 1.01 in the papers,
        which doubles in 70 steps.
      floor: phi, the share of the average of the last hundred norms below which the limit does
        not fall, from 0 (none, as in the papers) to 1.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero, the others pass, and
        its limit stays as it was.

    Returns:
      A transformation with a `ClipState` of one norm for each array. The first norm that is not 0
      passes, and so does a constant stream. After a norm of a thousandth the old level is back in
      233 steps (694 without a floor); zeros are ignored. A tenfold rise takes 232 steps. For
      one norm of all arrays: `clip_to_limit(limits.growth())`.

    Raises:
      ValueError: For a ratio that is not above 1, or a floor that is not between 0 and 1.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.limit_norm_growth(2.0)
    >>> state = clip.init({"w": jnp.zeros(2)})
    >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([12.0, 16.0])):
    ...     updates, state = clip.update({"w": grads}, state)
    >>> print(updates["w"])  # from a norm of 5 to one of 10
    [6. 8.]

    Chen, Feng, Li, Lai, Yue, Yuan, Wang, *Fira: Can We Achieve Full-rank Training of LLMs Under
    Low-rank Constraint?*, 2024, https://arxiv.org/abs/2410.01623, the norm-growth limiter; the
    same in APOLLO. We depart from it in the floor and in a norm of 0, after which it takes 1,388
    steps to return to 1, and in the 1e-8 that it adds to a norm.
    """
    return clip_to_limit(
        growth(ratio, floor=floor),
        measure=leaf_norms,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
