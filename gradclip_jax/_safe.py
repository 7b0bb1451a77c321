"""Kernels that reduce a leaf, and sums of squares that cannot overflow (Blue 1978).

Blue, *A Portable Fortran Program to Find the Euclidean Norm of a Vector*, ACM TOMS 1978, sums big,
middle and small elements apart; so does `nrm2` of LAPACK. Here each sum is of all elements, times a
power of two of its own, and the one that is exact is chosen.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._leaves import norm_dtype, widen
from ._memory import constant_like

Axes = tuple[int, ...] | None
"""Axes to reduce, which are kept with size one; None: all of them, and none is kept."""

Leaves = jax.Array | list[jax.Array]
"""A leaf, or small leaves of one shape that one kernel reads."""


def norm_from_sum(total: jax.Array, scale: jax.Array) -> jax.Array:
    """The norm from a sum of `_exact_sums`."""
    safe = SafeRange(total.dtype)
    # Not a quotient: XLA makes `a / (root / scale)` of it `a * scale / root`, which overflows.
    return safe_power(total, 0.5) * jnp.where(
        scale < 1, safe.up, jnp.where(scale > 1, safe.down, 1.0)
    ).astype(total.dtype)


def norm_from_bins(bins: jax.Array) -> jax.Array:
    """Norms from the sums of `_bins`: the bin of the largest scale, and what its neighbour adds."""
    safe = SafeRange(bins.dtype)
    small, plain, large = (safe_power(bins[i], 0.5) for i in range(3))
    return jnp.where(
        large != 0,
        hypot_of_norms(large, plain * safe.down) * safe.up,
        jnp.where(plain != 0, hypot_of_norms(plain, small * safe.down), small * safe.down),
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
        self.high = 2.0 ** (info.maxexp * 25 // 32)
        # Each of n squares may lose up to `tiny`; the sum must not notice.
        self.low = float(info.tiny) / float(info.eps)

    def scale(self, plain: jax.Array, count: Any) -> jax.Array:
        """1, or the power of two by which elements with that plain sum must be scaled."""
        is_low = plain < jnp.asarray(count * self.low, plain.dtype)
        scale = jnp.where(plain > self.high, self.down, jnp.where(is_low, self.up, 1.0))
        return scale.astype(plain.dtype)


def sum_of_squares(x: Leaves, scale: jax.Array | None = None, *, axes: Axes) -> jax.Array:
    """The sum of the squares of leaves."""
    wide = _real_parts(x)
    return _sum(_squares(wide if scale is None else [part * scale for part in wide]), axes)


def three_sums_of_squares(x: Leaves, *, axes: Axes, at_once: bool = False) -> tuple[jax.Array, ...]:
    """Three sums of squares of leaves in one read: plain, scaled up and scaled down.

    TPU fuses three reductions with the matmul that makes a gradient, but not one of three operands
    (`at_once`), which takes a GPU half the kernels. CPU must not run that one on a large leaf: it
    adds everything to one number.
    """
    wide, safe = _real_parts(x), SafeRange(norm_dtype())
    # XLA makes `(x * up) * (x * up)` of scalars `(x * x) * (up * up)`, which is infinite. With an
    # element of 1 or more the plain sum is not too small, so that no sum loses by this bound.
    up, down = (
        [jnp.clip(part * scale, -safe.up, safe.up) for part in wide]
        for scale in (safe.up, safe.down)
    )
    squares = tuple(map(_squares, (wide, up, down)))
    if not at_once:
        return tuple(_sum(of, axes) for of in squares)
    sums = sums_of(squares, axes)
    return sums if axes is None else tuple(jnp.expand_dims(of, axes) for of in sums)


def sums_of(arrays: tuple[jax.Array, ...], axes: Axes = None) -> tuple[jax.Array, ...]:
    """The sums of three arrays over these axes, in one reduction."""
    zeros = (jnp.zeros((), norm_dtype()),) * 3
    over = tuple(range(arrays[0].ndim)) if axes is None else axes
    return tuple(jax.lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), over))


def sum_of_moduli(x: Leaves, *, axes: Axes) -> jax.Array:
    """The sum of the moduli of leaves."""
    return _sum(functools.reduce(jnp.add, _moduli(x)), axes)


def sum_of_powers(
    x: Leaves, half: jax.Array, rest: jax.Array, *, order: float, axes: Axes
) -> jax.Array:
    """The sum of the powers of the moduli, each times a `PowerOfTwo`."""
    exponent = int(order) if order == int(order) else order
    powers = [PowerOfTwo(half, rest).times(modulus) ** exponent for modulus in _moduli(x)]
    return _sum(functools.reduce(jnp.add, powers), axes)


def largest_modulus(x: Leaves, *, axes: Axes) -> jax.Array:
    """The largest modulus of leaves; infinity for a NaN."""
    moduli = functools.reduce(jnp.maximum, _moduli(x))
    return _max(jnp.where(jnp.isfinite(moduli), moduli, constant_like(jnp.inf, moduli)), axes)


def largest_modulus_on_cpu(x: Leaves, *, axes: Axes) -> jax.Array:
    """The same where a select before a maximum would copy the leaf."""
    largest = _max(functools.reduce(jnp.maximum, _moduli(x)), axes)
    # On CPU a maximum loses NaN: over devices, and (jaxlib 0.10 to 0.12) over 1,000 elements too.
    return jnp.where(all_finite(x, axes=axes), largest, constant_like(jnp.inf, largest))


def all_finite(x: Leaves, *, axes: Axes = None) -> jax.Array:
    """Whether all elements are finite: x - x is NaN where x is not, and no sum loses a NaN.

    A reduction of `isfinite(x)` would keep an array of booleans, and a select on each element
    before a maximum, or a product with 0, a whole copy.
    """
    return _sum(functools.reduce(jnp.add, [part - part for part in _real_parts(x)]), axes) == 0


def finite_or_zero(x: jax.Array) -> jax.Array:
    """A leaf, with 0 for each element that is NaN or infinite."""
    return jnp.where(jnp.isfinite(x), x, constant_like(0, x))


def _real_parts(x: Leaves) -> list[jax.Array]:
    """The real and imaginary parts of leaves, in the precision of norms."""
    parts = [
        part for a in _leaves(x) for part in ([a.real, a.imag] if jnp.iscomplexobj(a) else [a])
    ]
    return [widen(part) for part in parts]


def _moduli(x: Leaves) -> list[jax.Array]:
    return [jnp.abs(widen(leaf)) for leaf in _leaves(x)]


def _leaves(x: Leaves) -> list[jax.Array]:
    return x if isinstance(x, list) else [x]


def _squares(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, [part * part for part in parts])


def _max(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.max(x, axis=axes, keepdims=axes is not None, initial=0)


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=axes is not None)


class PowerOfTwo(NamedTuple):
    """A power of two as a product: XLA flushes neither part to zero, nor the inverse of one.

    It would flush the inverse of the whole power from 2^127 on.
    """

    half: jax.Array
    rest: jax.Array

    def times(self, x: jax.Array) -> jax.Array:
        """`x` times the power, one part after the other."""
        return x * self.half * self.rest

    def divide(self, x: jax.Array) -> jax.Array:
        """`x` over the power."""
        # Not `x / half / rest`: XLA makes that `x / (half * rest)`, which overflows.
        return x * (1 / self.half) * (1 / self.rest)


def powers_near(norm: jax.Array) -> PowerOfTwo:
    """The power of two near 1 / norm; 1 for a norm that is 0 or not finite."""
    norm = jax.lax.stop_gradient(norm)
    exponent = jnp.frexp(jnp.where(jnp.isfinite(norm) & (norm != 0), norm, 1))[1]
    half, one = exponent // 2, jnp.ones_like(norm)
    return PowerOfTwo(jnp.ldexp(one, -half), jnp.ldexp(one, half - exponent))


def safe_power(x: jax.Array, exponent: float) -> jax.Array:
    """`x ** exponent` for x >= 0, with derivative 0 at 0; NaN stays NaN (`x > 0` would hide it)."""
    inside = jnp.where(x != 0, x, 1)
    power = jnp.sqrt(inside) if exponent == 0.5 else inside**exponent
    return jnp.where(x != 0, power, 0)


def hypot_of_norms(a: jax.Array, b: jax.Array) -> jax.Array:
    """The norm of two norms without the overflow of their squares; 0 if `a` is."""
    # Not computed from a zero: the derivative of the quotient would be 0 / 0.
    nonzero = a != 0
    a, b = jnp.where(nonzero, a, 1), jnp.where(nonzero, b, 0)
    large, small = jnp.maximum(a, b), jnp.minimum(a, b)
    r = small / large
    return jnp.where(nonzero, large * jnp.sqrt(1 + r * r), 0)
