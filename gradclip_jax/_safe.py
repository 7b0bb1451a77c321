"""Sums of squares that cannot overflow, and what else is computed of the elements of a leaf."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ._leaves import widen
from ._memory import beside


def norm_of_sum(total: jax.Array, scale: jax.Array) -> jax.Array:
    """The norm from a sum of `_exact_sums`."""
    safe = SafeRange(total.dtype)
    # Not a quotient: XLA makes `a / (root / scale)` of it `a * scale / root`, which overflows.
    return safe_power(total, 0.5) * jnp.where(
        scale < 1, safe.up, jnp.where(scale > 1, safe.down, 1.0)
    ).astype(total.dtype)


def norm_of_bins(bins: jax.Array) -> jax.Array:
    """Norms from the sums of `_bins`: the bin of the largest scale, and what its neighbour adds."""
    safe = SafeRange(bins.dtype)
    small, plain, large = (safe_power(bins[i], 0.5) for i in range(3))
    return jnp.where(
        large != 0,
        joint_norm(large, plain * safe.down) * safe.up,
        jnp.where(plain != 0, joint_norm(plain, small * safe.down), small * safe.down),
    )


class SafeRange:
    """Where a plain sum of squares can be believed, and the powers of two that serve outside.

    In float32 the scales are 2^80 and 2^-80: they take any element whose square is lost to where
    it is not. A power of two rounds nothing; and it is fixed, because XLA turns `x / scale` into
    `x * (1 / scale)`, which flushes to zero for scales above 8.5e37.
    """

    def __init__(self, dtype: Any):
        info = jnp.finfo(dtype)
        self.up = 2.0 ** (info.maxexp * 5 // 8)
        self.down = 1 / self.up
        # Room for the sums of 2^28 devices and leaves to be added.
        self.most = 2.0 ** (info.maxexp * 25 // 32)
        # Each of n squares may lose up to `tiny`; the sum must not notice.
        self.least = float(info.tiny) / float(info.eps)

    def scale(self, plain: jax.Array, count: Any) -> jax.Array:
        """1, or the power of two by which elements with that plain sum must be scaled."""
        low = plain < jnp.asarray(count * self.least, plain.dtype)
        scale = jnp.where(plain > self.most, self.down, jnp.where(low, self.up, 1.0))
        return scale.astype(plain.dtype)


def sum_of_squares(x, scale=None, *, dims):
    arrays = x if isinstance(x, list) else [x]
    parts = [part for a in arrays for part in ([a.real, a.imag] if jnp.iscomplexobj(a) else [a])]
    wide = [widen(part) if scale is None else widen(part) * scale for part in parts]
    return _sum(functools.reduce(jnp.add, [part * part for part in wide]), dims)


def sum_of_moduli(x, *, dims):
    return _sum(jnp.abs(widen(x)), dims)


def sum_of_powers(x, first, second, *, order, dims):
    scaled = jnp.abs(widen(x)) * first * second
    return _sum(scaled ** (int(order) if order == int(order) else order), dims)


def largest_modulus(x, *, dims):
    largest = jnp.max(jnp.abs(widen(x)), axis=dims, keepdims=dims is not None, initial=0)
    # On CPU a maximum loses NaN: over devices, and (jaxlib 0.10 to 0.12) over 1,000 elements too.
    return jnp.where(all_finite(x, dims=dims), largest, beside(jnp.inf, largest))


def all_finite(x: jax.Array, *, dims: tuple[int, ...] | None = None) -> jax.Array:
    """Whether all elements are finite: x - x is NaN where x is not, and no sum loses a NaN.

    A reduction of `isfinite(x)` would keep an array of booleans, and a select on each element
    before a maximum, or a product with 0, a whole copy.
    """
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    zeros = [widen(part) - widen(part) for part in parts]
    return _sum(functools.reduce(jnp.add, zeros), dims) == 0


def _sum(x, dims):
    return jnp.sum(x, axis=dims, keepdims=dims is not None)


def inverse_power_of_two(norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two powers of two whose product is near 1 / norm; both and their inverses are normal."""
    usable = jnp.isfinite(norm) & (norm != 0)
    exponent = jnp.frexp(jnp.where(usable, norm, 1))[1]
    half = exponent // 2
    one = jnp.ones_like(norm)
    return jnp.ldexp(one, -half), jnp.ldexp(one, half - exponent)


def safe_power(x: jax.Array, exponent: float) -> jax.Array:
    """`x ** exponent` for x >= 0, with derivative 0 at 0; NaN stays NaN (`x > 0` would hide it)."""
    inside = jnp.where(x != 0, x, 1)
    power = jnp.sqrt(inside) if exponent == 0.5 else inside**exponent
    return jnp.where(x != 0, power, 0)


def joint_norm(most: jax.Array, least: jax.Array) -> jax.Array:
    """The norm of two norms without the overflow of their squares; 0 if `most` is."""
    # Not computed from a zero: the derivative of the ratio would be 0 / 0.
    nonzero = most != 0
    most, least = jnp.where(nonzero, most, 1), jnp.where(nonzero, least, 0)
    most, least = jnp.maximum(most, least), jnp.minimum(most, least)
    ratio = least / most
    return jnp.where(nonzero, most * jnp.sqrt(1 + ratio * ratio), 0)
