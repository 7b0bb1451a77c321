"""Unit balls of norms of one array: where a step of length 1 leads furthest along a gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._matrices import product, quintic
from ._polynomials import polar_factor
from ._safe import all_finite, powers_near

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


sign = Ball(_signs)
"""All elements at most 1: the direction is the sign (x / |x| of complex x), the dual norm the sum
of moduli. For Lion, signSGD, and embeddings or heads in Scion."""

euclidean = Ball(_unit, order=2)
"""Euclidean norm at most 1: the direction is x / ||x||, and the norm is its own dual."""

spectral = Ball(_orthogonal, whole=True)
"""Singular values at most 1: the direction is U V^T, the dual norm the sum of singular values.

By a decomposition on CPU, and by products of matrices on accelerators, which are made for them:
Polar Express polynomials, to within 1e-6, but that a singular value below 3.5e-6 of the Frobenius
norm becomes less than 1, and one that is only rounding not at 0. The last two axes of an array are
those of a matrix; vectors take the Euclidean ball."""

exact_spectral = Ball(_exactly_orthogonal, whole=True)
"""As `spectral`, by a decomposition on accelerators, too."""

newton_schulz = Ball(_nearly_orthogonal, whole=True)
"""As `spectral`, by the five Newton-Schulz steps of Muon: products of matrices alone.

Singular values above 0.2 % of the norm become 0.68 to 1.21 instead of 1, as in Muon,
and the dual norm is that of this direction, <direction, x>."""


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
    # Directions in which only rounding is left do not count.
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
