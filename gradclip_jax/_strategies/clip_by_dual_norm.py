"""Clip for optimizers that step to the edge of a ball: sign updates, Muon, Scion."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import Threshold, check_threshold
from .._clip import measured_types
from .._devices import AxisName, replicate_matrices, reshard_like
from .._inject import named_strategy
from .._leaves import broadcast_prefix, is_function, is_gradient, path_name, widen
from .._limits import constant
from .._matrices import check_whole_matrices, product, quintic
from .._memory import to_device, to_memory_of
from .._norms import global_norm, leaf_norms
from .._polynomials import polar_factor
from .._rescale import OnNonfinite, check_on_nonfinite, shrink
from .._safe import all_finite, powers_near
from .._state import (
    check_trees,
    init_threshold,
    initial_state,
    next_state,
    read_threshold,
    transformation,
)

Split = tuple[jax.Array, Callable[[jax.Array], jax.Array]]


class Ball(NamedTuple):
    """The unit ball of a norm of one array: how far and where a gradient leads within it.

    Attributes:
      split: `x -> (parts, point)`: an array whose norm of order `order` is the dual norm of x, and
        a function from that dual norm to the point of the ball that goes furthest along x.
      order: 1 or 2.
      whole: Whether it needs whole matrices, so that devices may not split them.
    """

    split: Callable[[jax.Array], Split]
    order: int = 1
    whole: bool = False


def _signs(x: jax.Array) -> Split:
    return x, lambda dual: jnp.sign(x)


def _unit(x: jax.Array) -> Split:
    def point(dual: jax.Array) -> jax.Array:
        # XLA divides by a scalar by its inverse, which above 8.5e37 it flushes to zero.
        first, second = powers_near(dual)
        # The step of a NaN is zeroed, and zero times the NaN in its derivative would be NaN.
        usable = jnp.isfinite(dual) & (dual != 0)
        rest = jnp.where(usable, dual, 1) * first * second
        return (
            jnp.where(jnp.isfinite(x), x, 0)
            * first.astype(x.dtype)
            * second.astype(x.dtype)
            / rest.astype(x.dtype)
        )

    return x, point


def _orthogonal(x: jax.Array) -> Split:
    return _of_matrix(x, _by_platform)


def _exactly_orthogonal(x: jax.Array) -> Split:
    return _of_matrix(x, _by_decomposition)


def _nearly_orthogonal(x: jax.Array) -> Split:
    return _of_matrix(x, _by_newton_schulz)


sign_ball = Ball(_signs)
"""All elements at most 1: the direction is the sign (x / |x| of complex x), the dual norm the sum
of moduli. For Lion, signSGD, and embeddings or heads in Scion."""

euclidean_ball = Ball(_unit, order=2)
"""Euclidean norm at most 1: the direction is x / ||x||, and the norm is its own dual."""

spectral_ball = Ball(_orthogonal, whole=True)
"""Singular values at most 1: the direction is U V^T, the dual norm the sum of singular values.

By a decomposition on CPU, and by products of matrices on accelerators, which are made for them:
Polar Express polynomials, to within 1e-6, but that a singular value below 3.5e-6 of the Frobenius
norm comes out below 1, and one that is only rounding not at 0. The last two axes of an array are
those of a matrix; vectors take the Euclidean ball."""

exact_spectral_ball = Ball(_exactly_orthogonal, whole=True)
"""As `spectral_ball`, by a decomposition on accelerators, too."""

newton_schulz_ball = Ball(_nearly_orthogonal, whole=True)
"""As `spectral_ball`, by the five Newton-Schulz steps of Muon: products of matrices alone.

Singular values above 0.2 % of the norm come out between 0.68 and 1.21 instead of 1, as in Muon,
and the dual norm is that of this direction, <direction, x>."""


def matrices_and_signs(path: str, leaf: Any) -> Ball:
    """Matrices and stacks of them in the spectral ball, vectors and scalars in that of signs."""
    del path
    return spectral_ball if len(leaf.shape) > 1 else sign_ball


@named_strategy
def clip_by_dual_norm(
    max_norm: Threshold,
    *,
    ball: Any = matrices_and_signs,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Step to the edge of a ball, and less far where the gradient is small.

    $$ g \leftarrow \min\!\Big(1, \frac{\lVert g \rVert_*}{\text{max\_norm}}\Big)
       \operatorname*{argmax}_{\lVert u \rVert \le 1} \langle g, u \rangle, \qquad
       \lVert g \rVert_* = \max_{\lVert u \rVert \le 1} \langle g, u \rangle $$

    For optimizers whose step has one length whatever the gradient is, as that of Lion (signs) and
    Muon (orthogonal matrices): they never settle. Here a gradient with a dual norm above
    `max_norm` gives that very step, and one below gives a step in proportion, as in gradient
    descent. Put it in place of the sign or the orthogonalisation, behind the momentum
    (`optax.trace`) and before the learning rate.

    Args:
      max_norm: Dual norm from which on the step has full length, non-negative, in units of the
        dual norm: a sum over all elements and singular values, so it grows with the model. 0
        gives the full step always; `inf` or None changes nothing and still measures. May be a
        schedule.
      ball: A `Ball` for all arrays, a prefix pytree of them, or a function of path
        (`"encoder/kernel"`) and leaf that returns one: `sign_ball`, `spectral_ball`,
        `newton_schulz_ball`, `euclidean_ball`. By default matrices are in the spectral ball, and
        vectors and scalars in that of signs.
      axis_name: See `global_norm`; inside `shard_map` a leaf in the spectral ball must hold whole
        matrices, see `spectral_clip`.
      on_nonfinite: See `clip_to_limit`. The arrays share one length, so they are one group.

    Returns:
      A transformation with a `ClipState`: its `grad_norm` is the dual norm, the sum over all
      arrays; its `clip_factor` is min(1, max_norm / dual norm), by which the step is shorter than
      one in proportion would be. It enlarges small gradients: it is a normaliser. Zero stays zero,
      and singular values that are zero up to rounding add nothing.

    Raises:
      ValueError: For a threshold that is negative, NaN, boolean or not a number; for a `ball` that
        is none; inside `shard_map`, for matrices that are split.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_dual_norm(22.0)
    >>> grads = {"b": jnp.array([3.0, -4.0]), "w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["b"], gradclip_jax.metrics(state)["grad_norm"])
    [ 0.5 -0.5] 11.0

    Pethick, Xie, Erdogan, Antonakopoulos, Silveti-Falls, Cevher, *Generalized Gradient Norm
    Clipping & Non-Euclidean (L0,L1)-Smoothness*, NeurIPS 2025, https://arxiv.org/abs/2506.01913,
    the step min(rho, dual norm). We divide it by rho, so that the learning rate is the length of
    the full step as in Lion and Muon, and rho may change without it. With one array in
    `euclidean_ball` it is `clip_by_global_norm(rho)` divided by rho.
    """
    limit = constant(check_threshold("max_norm", max_norm))
    check_on_nonfinite(on_nonfinite)
    _check_ball(ball)
    fill = jnp.nan if on_nonfinite == "propagate" else 0.0

    def init(params):
        norm = measured_types(functools.partial(global_norm, order=1), params, axis_name)
        return initial_state(norm, init_threshold(limit))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_trees(updates, params)
        most, limit_state = read_threshold(limit, state.limit_state)
        leaves, tree = jax.tree.flatten(updates)
        balls = dict(_balls(ball, updates))
        whole = [i for i in balls if balls[i].whole]
        check_whole_matrices(tree.unflatten(_only(leaves, whole)), axis_name)
        parts, points = list(leaves), {}
        for i, of_leaf in balls.items():
            x = widen(to_device(leaves[i]))
            x = replicate_matrices(x) if of_leaf.whole else x
            parts[i], points[i] = of_leaf.split(x)
        duals: dict[int, Any] = {}
        for order in sorted({of_leaf.order for of_leaf in balls.values()}):
            alike = [i for i in balls if balls[i].order == order]
            of_order = tree.unflatten(_only(parts, alike))
            norms = jax.tree.leaves(leaf_norms(of_order, order=order, axis_name=axis_name))
            duals.update(zip(alike, norms, strict=True))
        norm = sum(duals.values(), jnp.zeros_like(state.grad_norm))
        finite, below = jnp.isfinite(norm), norm < most
        length = jnp.where(below, norm, 1) / jnp.where(below, most, 1)
        for i, point in points.items():
            x = to_device(leaves[i])
            step = reshard_like(point(duals[i]), x)
            step = jnp.where(most < jnp.inf, step * length.astype(step.dtype), widen(x))
            leaves[i] = to_memory_of(jnp.where(finite, step, fill).astype(x.dtype), leaves[i])
        return tree.unflatten(leaves), next_state(
            state,
            norm,
            most,
            jnp.where(finite, shrink(norm, most), fill).astype(norm.dtype),
            clipped=finite & (norm > most),
            nonfinite=~finite,
            limit_state=limit_state,
        )

    return transformation(init, update)


def _balls(ball: Any, updates: Any) -> Iterator[tuple[int, Ball]]:
    """The ball of each gradient, by its position among the leaves."""
    named = jax.tree_util.tree_leaves_with_path(updates)
    if is_function(ball):
        given = [
            ball(path_name(path), leaf if hasattr(leaf, "shape") else jnp.asarray(leaf))
            if is_gradient(leaf)
            else None
            for path, leaf in named
        ]
    else:
        rule = "`ball` must cover the tree of the updates"
        given = broadcast_prefix(ball, updates, rule, is_leaf=_is_ball)
    for i, ((path, leaf), of_leaf) in enumerate(zip(named, given, strict=True)):
        if not is_gradient(leaf):
            continue
        if not isinstance(of_leaf, Ball):
            raise ValueError(f"`ball` must give a `Ball` for `{path_name(path)}`, got {of_leaf!r}.")
        is_matrix = jnp.ndim(leaf) > 1 and jnp.size(leaf)
        yield i, of_leaf if is_matrix or not of_leaf.whole else euclidean_ball


def _only(leaves: list[Any], positions: list[int]) -> list[Any]:
    """The leaves with None for all but some of them."""
    return [leaf if i in positions else None for i, leaf in enumerate(leaves)]


def _check_ball(ball: Any) -> None:
    if is_function(ball) or all(map(_is_ball, jax.tree.leaves(ball, is_leaf=_is_ball))):
        return
    raise ValueError(
        "`ball` must be a `Ball`, a prefix pytree of them or a function of path and leaf, "
        f"got {ball!r}."
    )


def _is_ball(x: Any) -> bool:
    return isinstance(x, Ball) or x is None


def _of_matrix(x: jax.Array, orthogonal: Callable[..., tuple[jax.Array, jax.Array]]) -> Split:
    """Split each matrix, brought near 1 by a power of two, into parts and direction."""
    finite = all_finite(x, axes=(x.ndim - 2, x.ndim - 1))
    x = jnp.where(finite, x, 0)
    first, second = powers_near(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    parts, direction = orthogonal(x * first.astype(x.dtype) * second.astype(x.dtype))
    # What is not finite must be seen in the norm, and must not reach the decomposition.
    parts = jnp.where(finite, parts * (1 / first) * (1 / second), jnp.nan)
    return parts, lambda dual: direction


def _by_decomposition(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, sigma, vh = jnp.linalg.svd(x, full_matrices=False)
    sigma = sigma[..., None, :]
    # Directions in which there is nothing but rounding are no directions.
    least = sigma[..., :1] * (max(x.shape[-2:]) * jnp.finfo(sigma.dtype).eps)
    return jnp.sum(sigma, axis=-1, keepdims=True), product(u * (sigma > least).astype(u.dtype), vh)


def _by_polynomials(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _along(polar_factor(x), x)


def _by_platform(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.platform_dependent(x, cpu=_by_decomposition, default=_by_polynomials)


def _by_newton_schulz(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    is_tall = x.shape[-2] > x.shape[-1]
    y = jnp.swapaxes(x, -1, -2) if is_tall else x
    norm = jnp.sqrt(jnp.sum(jnp.abs(y) ** 2, axis=(-2, -1), keepdims=True))
    y = y / jnp.where(norm != 0, norm, 1).astype(y.dtype)
    for _ in range(5):
        y = quintic(y, 3.4445, -4.7750, 2.0315)  # the coefficients of Muon
    return _along(jnp.swapaxes(y, -1, -2) if is_tall else y, x)


def _along(direction: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """<direction, x> of each matrix, and the direction."""
    return jnp.sum((direction.conj() * x).real, axis=(-2, -1), keepdims=True), direction
