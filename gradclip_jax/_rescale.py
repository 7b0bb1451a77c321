"""Responses, from norm and limit to a factor; and the only place where a gradient is multiplied."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ._checks import takes
from ._leaves import widen
from ._memory import changed_in_place, constant_like

Response = Callable[[jax.Array, jax.Array], jax.Array]
"""`(norm, limit) -> factor`, elementwise on arrays of one float dtype.

A factor beyond 2^100 or 2^-100 must be proportional to the limit; see `factors`."""

OnNonfinite = Literal["zero", "propagate"]


class Factor(NamedTuple):
    """The factor of a response in two steps, for one that float32 cannot hold.

    Attributes:
      scale: The factor itself wherever float32 can hold it.
      power: The power of two that it still lacks; 1 wherever it lacks none.
    """

    scale: jax.Array
    power: jax.Array


def shrink(norm: jax.Array, limit: jax.Array, *, eps: float = 0.0) -> jax.Array:
    r"""Shrink what is above the limit to the limit, and leave the rest alone.

    $$ \min(1, \; \text{limit} / (\text{norm} + \epsilon)) $$

    The default has no epsilon: at or below the limit the factor is exactly 1. PyTorch's
    `clip_grad_norm_` has 1e-6: `functools.partial(shrink, eps=1e-6)` gives its numbers.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.responses import shrink
    >>> float(shrink(jnp.float32(10.0), jnp.float32(5.0)))
    0.5
    """
    norm = norm + eps if eps else norm
    over = norm > limit
    # End in a division: XLA computes one once, but repeats a select in every leaf that it scales.
    return jnp.where(over, limit, 1) / jnp.where(over, norm, 1)


def normalize(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Bring every norm to the limit, small ones too (limit / norm); zero stays zero.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.responses import normalize
    >>> float(normalize(jnp.float32(0.5), jnp.float32(1.0)))
    2.0
    """
    usable = (norm != 0) & (limit != jnp.inf)
    return jnp.where(usable, limit / jnp.where(usable, norm, 1), 1)


def smooth(norm: jax.Array, limit: jax.Array) -> jax.Array:
    r"""Shrink without a corner: 1 / (1 + r) with r = norm / limit.

    The clipped norm is below the limit and approaches it: limit * r / (1 + r). The rational
    softening of Zhang, Jin, Fang, Wang, *Improved Analysis of Clipping Algorithms for Non-convex
    Optimization*, 2020, https://arxiv.org/abs/2010.02519, as in its reference implementation.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.responses import smooth
    >>> float(smooth(jnp.float32(5.0), jnp.float32(5.0)))
    0.5
    """
    return 1 / (1 + ratio(norm, limit))


def smooth_sqrt(norm: jax.Array, limit: jax.Array) -> jax.Array:
    r"""Shrink without a corner: 1 / sqrt(1 + r^2) with r = norm / limit.

    The same map of one singular value as in soft spectral clipping, *SPECTRA*, 2026,
    https://arxiv.org/abs/2603.14315.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.responses import smooth_sqrt
    >>> round(float(smooth_sqrt(jnp.float32(5.0), jnp.float32(5.0))), 4)
    0.7071
    """
    r = ratio(norm, limit)
    # r * r overflows from 1.8e19 in float32.
    small = jnp.where(r <= 1, r, 0)
    inverse = 1 / jnp.where(r <= 1, 1, r)
    return jnp.where(
        r <= 1, 1 / jnp.sqrt(1 + small * small), inverse / jnp.sqrt(1 + inverse * inverse)
    )


def smooth_tanh(norm: jax.Array, limit: jax.Array) -> jax.Array:
    r"""Shrink without a corner: tanh(r) / r with r = norm / limit.

    The response of *SoftAdaClip*, 2025, https://arxiv.org/abs/2510.01447.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.responses import smooth_tanh
    >>> round(float(smooth_tanh(jnp.float32(5.0), jnp.float32(5.0))), 4)
    0.7616
    """
    r = ratio(norm, limit)
    # Below 1e-4 tanh(r) / r is 1 - r^2 / 3, which is 1 in float32 (and its derivative is 0 at 0).
    tiny = r < 1e-4
    return jnp.where(tiny, 1 - r * jnp.where(tiny, r, 0) / 3, jnp.tanh(r) / jnp.where(tiny, 1, r))


def drop(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Drop what is above the limit (factor 0) and leave the rest alone.

    The optimizer still sees a zero gradient, so its moments decay; to leave them as they are, a
    step must be skipped by a wrapper that owns the optimizer.

    >>> import jax.numpy as jnp
    >>> from gradclip_jax.responses import drop
    >>> float(drop(jnp.float32(10.0), jnp.float32(5.0)))
    0.0
    """
    return jnp.where(norm > limit, 0, 1).astype(norm.dtype)


def ratio(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Norm / limit, with 0 / 0 = 0."""
    nonzero = norm != 0
    return jnp.where(nonzero, norm / jnp.where(nonzero, limit, 1), 0)


def check_response(response: Response) -> None:
    """Raise for what is not a function of norm and limit, such as a name or a measure."""
    if not callable(response) or not takes(response, 1.0, 1.0):
        raise ValueError(
            "`response` must be a function of norm and limit, such as "
            f"`gradclip_jax.responses.shrink`, got {response!r}."
        )


def nonfinite_fill(on_nonfinite: str) -> float:
    """The factor where a norm is not finite, 0 or NaN; raise for a policy that does not exist."""
    if on_nonfinite not in ("zero", "propagate"):
        raise ValueError(f'`on_nonfinite` must be "zero" or "propagate", got {on_nonfinite!r}.')
    return math.nan if on_nonfinite == "propagate" else 0.0


def factors(norm: jax.Array, limit: jax.Array, response: Response) -> Factor:
    """The factor of a response to each norm and limit.

    A factor below 1.2e-38 is flushed to zero, and one above 3.4e38 overflows, though the product
    with the gradient does neither: then scale and power share it. Beyond 2^100 and 2^-100 every
    response is taken to be proportional to the limit, so that it is asked about one that is a
    power of two away.
    """
    # In float32 the powers are 2^64 and 2^126, of which the inverse is still normal: together they
    # serve factors from 2^-252 to 2^254.
    exponents = jnp.finfo(norm.dtype).maxexp
    near, far = 2.0 ** -(exponents // 2), 2.0 ** (2 - exponents)
    bound, rest = 2.0 ** -(exponents * 25 // 32), 2.0 ** -(exponents * 3 // 4)
    once = response(norm, limit)
    # The norm must stay above the limit that is raised, or `drop` would let it pass.
    down = (once < bound) & (norm * near > limit)
    up = once > 1 / bound
    # Both sides of 2^160 are scaled: XLA folds two powers into one, which is flushed.
    down_far = down & (norm * rest > limit / near)
    up_far = up & (limit * rest > norm / near)
    one = jnp.ones_like(norm)
    lowered = jnp.where(down_far, far, jnp.where(down, near, one))
    raised = jnp.where(up_far, far, jnp.where(up, near, one))
    # Both end in a division, as `shrink` does: XLA repeats a select in every leaf that it scales.
    return Factor(response(norm, limit * raised / lowered), lowered / raised)


def rescale(leaves: Sequence[jax.Array], factors: Sequence[Factor]) -> list[jax.Array]:
    """Multiply each leaf by its factor; one of 0 turns NaN and infinity into zeros, too.

    The products are taken in at least float32 and come back in the dtype of the leaf. The select
    is between an element and a constant, so all of it fuses into the pass of the optimizer that
    follows; a select between two trees would not.
    """

    def scaled(x: jax.Array, scale: jax.Array, power: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            real, imag = (scaled(part, scale, power) for part in (x.real, x.imag))
            return jax.lax.complex(real, imag).astype(x.dtype)
        wide = widen(x)
        wide = jnp.where(scale != 0, wide, constant_like(0, wide))
        return (wide * power * scale).astype(x.dtype)

    pairs = zip(leaves, factors, strict=True)
    return [changed_in_place(scaled, leaf, *factor) for leaf, factor in pairs]


def clamped(x: jax.Array, low: jax.Array, high: jax.Array, *, fill: float) -> jax.Array:
    """Each element between -low and high, or a complex one of modulus at most `high`.

    An element that is not finite becomes `fill`. Computed as in `rescale`.
    """
    wide = widen(x)
    if jnp.iscomplexobj(x):
        clipped = wide * shrink(jnp.abs(wide), high).astype(wide.dtype)
    else:
        clipped = jnp.clip(wide, -low, high)
    return jnp.where(jnp.isfinite(wide), clipped, constant_like(fill, clipped)).astype(x.dtype)
