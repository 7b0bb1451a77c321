"""Singular values by matrix products alone: clamped to a limit, or all brought to one.

A polynomial step maps each singular value s to a s + b s^3 + c s^5. What lies between `low` and 1
goes nearest to 1 by the minimax polynomial of that interval, found by Remez: Polar Express (Amsel,
Persson, Musco, Gower, *The Polar Express: Optimal Matrix Sign Methods and Their Application to the
Muon Algorithm*, 2025, https://arxiv.org/abs/2505.16932). It also keeps the order of what is below
`low` and what is above, and so tells in the end which values are above a limit.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from ._matrices import adjoint, identities, product, quintic, scaled
from ._safe import powers_near

# RAISE is minimax from 0.0083 to 1: it raises small values 4.2 times, to 0.02 those of STARTS[i] in
# i steps, and holds all below 1. The steps from 0.02 on are minimax from 1.5 times what a limit of
# 0.02 has become, so that nothing above the limit comes near it again: 0.4213 after those of
# APPROACH, 0.7536 after one more. SIGN is minimax from 2e-4.
RAISE = (4.21973077, -12.350961, 9.1302302)
STARTS = (
    0.02, 0.00473995057, 0.00112328685, 0.000266198755, 6.30842991e-05, 1.49498398e-05,
    3.54284209e-06, 8.39589605e-07, 1.98967576e-07, 4.7151723e-08, 1.11741069e-08,
)  # fmt: skip
APPROACH = ((7.35517259, -20.6812897, 15.0849759), (2.91416811, -2.17532183, 0.473022845))
CONVERGE = (
    (2.0235679, -1.39129983, 0.378857223),
    (2.12775141, -1.79231178, 0.663131868),
    (1.875, -1.25, 0.375),
)
SQUARED_LIMIT = 0.567858122  # after the first step of CONVERGE
SIGN = (
    (8.48849572, -25.0959981, 18.5534238),
    (4.23359881, -3.13096802, 0.579478475),
    (4.18559236, -3.09785305, 0.575726472),
    (3.99600308, -2.96608037, 0.560802144),
    (3.39040864, -2.53234787, 0.511812485),
    (2.37063438, -1.72603499, 0.422505577),
    (1.89748569, -1.27237902, 0.375209265),
    (1.87145897, -1.24292616, 0.371467193),
)
# The inverse of APPROACH up to the limit, to within 1.3e-5: value / limit = s (p + q s^2 + r s^4).
INVERSE = (2.33264254, 0.219556821, 0.0561162975)


@jax.custom_jvp
def hold_singular_values(
    x: jax.Array, norm: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Each matrix with singular values of at most `limit`; and a bound of the largest.

    With O the polar factor, to which the steps lead, Y what they have made of X after APPROACH,
    and P the projector on what is above the limit c:

    $$ U \min(\Sigma, c) V^\top = c \, \big((I - P) \, h(Y Y^\top) \, Y + P \, O\big), \qquad
       P = \tfrac12 \big(I + \operatorname{sign}(Y' Y'^\top - s_c^2 I)\big) $$

    Y' is one step further, and s_c what the limit has become there. h undoes the steps: what is
    below the limit they raise nearly alike. No difference is taken of numbers far above
    c, as one of X itself would be. The Gram matrices and the sign are of the smaller side.

    `norm` is the Frobenius norm. A matrix without a value above the limit comes back bit for bit,
    and its bound is the limit at most. Where `norm` is above 9e7 limits, the limit is that share of
    it, and what comes of it is scaled to the limit that was asked for.
    """
    return _clamp(x, norm, limit, fixed=False)


@hold_singular_values.defjvp
def _(primals: Any, tangents: Any) -> Any:
    # In reverse only a fixed number of steps has a derivative.
    return jax.jvp(functools.partial(_clamp, fixed=True), primals, tangents)


def _clamp(
    x: jax.Array, norm: jax.Array, limit: jax.Array, *, fixed: bool
) -> tuple[jax.Array, jax.Array]:
    is_tall = x.shape[-2] > x.shape[-1]
    wide = jnp.swapaxes(x, -1, -2) if is_tall else x
    usable = jnp.isfinite(norm) & jnp.isfinite(limit)
    norm, bounded = jnp.where(usable, norm, 0), jnp.where(usable, limit, 0)
    down = powers_near(norm)
    near_norm = down.times(norm)
    near_limit = jnp.maximum(down.times(bounded), near_norm * STARTS[-1])
    near_limit = jnp.where(near_limit > 0, near_limit, 1)
    raises, start = jnp.zeros_like(norm, jnp.int32), jnp.full_like(norm, STARTS[0])
    for value, lower in itertools.pairwise(STARTS):
        is_less = near_limit < near_norm * value
        raises += is_less.astype(jnp.int32)
        start = jnp.where(is_less, lower, start)

    y = scaled(wide, *down, start / near_limit)
    y, (of_first, undoing, before, after) = _polar(y, raises, fixed)
    eye = identities(after)
    signs = _matrix_sign(scaled(after - SQUARED_LIMIT * eye, 1 / SQUARED_LIMIT), raises, fixed)
    is_above, below = (eye + signs) / 2, product(undoing, before)
    clamped = scaled(below + product(is_above, y - below), bounded)
    clamped = jnp.swapaxes(clamped, -1, -2) if is_tall else clamped
    any_above = jnp.trace(is_above, axis1=-2, axis2=-1).real[..., None, None] > 0.5
    top = jnp.sqrt(jnp.sqrt(jax.lax.stop_gradient(of_first))) * (near_limit / start)
    top = down.divide(jnp.minimum(top, near_norm))
    return jnp.where(any_above, clamped, x), jnp.where(any_above, top, jnp.minimum(top, bounded))


@jax.custom_jvp
def polar_factor(x: jax.Array) -> jax.Array:
    """U V^T of each matrix U S V^T.

    Singular values below 3.5e-6 of the Frobenius norm, of which float32 knows little, become
    less than 1, and zeros stay zero.
    """
    return _factor(x, fixed=False)


@polar_factor.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_factor, fixed=True), primals, tangents)


def _factor(x: jax.Array, *, fixed: bool) -> jax.Array:
    is_tall = x.shape[-2] > x.shape[-1]
    y = jnp.swapaxes(x, -1, -2) if is_tall else x
    norm = _norm(y)
    y = scaled(y, 1 / jnp.where(norm != 0, norm, 1))
    table = jnp.asarray([*[RAISE] * 6, *APPROACH, *CONVERGE], norm.dtype)
    y = jax.lax.fori_loop(
        0 if fixed else _zero(norm), len(table), lambda i, y: quintic(y, *table[i]), y
    )
    return jnp.swapaxes(y, -1, -2) if is_tall else y


def _polar(
    y: jax.Array, raises: jax.Array, fixed: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """The polar factor of what is above the limit; and what the clip needs of the way there.

    One loop, and not one for each part of the way: TPU compile a product in three seconds.
    """
    last = len(STARTS) - 1
    table = jnp.asarray([*[RAISE] * last, *APPROACH, *CONVERGE], jnp.finfo(y.dtype).dtype)
    first = 0 if fixed else last - jnp.max(raises)
    approached = last + len(APPROACH)

    def step(i: jax.Array, carry: Any) -> Any:
        y, (of_first, undoing, before, after) = carry
        gram = product(y, adjoint(y))
        square = product(gram, gram)
        of_first = jnp.where(i == first, _norm(square), of_first)
        p, q, r = INVERSE
        undo = p * identities(gram) + q * gram + r * square
        undoing = jnp.where(i == approached, undo, undoing)
        before = jnp.where(i == approached, y, before)
        after = jnp.where(i == approached + 1, gram, after)
        # A matrix that needs fewer steps waits for the others.
        waits = i < last - raises
        a, b, c = (jnp.where(waits, rest, table[i, j]) for j, rest in enumerate((1.0, 0.0, 0.0)))
        y = scaled(y, a) + product(scaled(gram, b) + scaled(square, c), y)
        return y, (of_first, undoing, before, after)

    square = 0 * y[..., : y.shape[-2]]
    carry = y, (0 * _norm(y), square, y, square)
    return jax.lax.fori_loop(first, len(table), step, carry)


def _matrix_sign(x: jax.Array, raises: jax.Array, fixed: bool) -> jax.Array:
    """The sign of each eigenvalue of matrices with eigenvalues between -1 and 1."""
    table = jnp.asarray(SIGN, jnp.finfo(x.dtype).dtype)
    first = 0 if fixed else _zero(raises)
    # What is not symmetric is rounding alone, and would grow.
    return jax.lax.fori_loop(
        first, len(table), lambda i, x: _symmetric(quintic(x, *table[i])), _symmetric(x)
    )


def _zero(x: jax.Array) -> jax.Array:
    """0 for `x` of no negative number, which XLA does not know on TPU.

    There it unrolls a loop of a known length, and compiles each of its products as often; for one
    of unknown length a GPU waits for the host.
    """

    def unknown(x: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.min(jnp.sign(x)), 0).astype(jnp.int32)

    return jax.lax.platform_dependent(x, tpu=unknown, default=lambda x: 0 * unknown(x))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.abs(x) ** 2, axis=(-2, -1), keepdims=True))


def _symmetric(x: jax.Array) -> jax.Array:
    return (x + adjoint(x)) / 2
