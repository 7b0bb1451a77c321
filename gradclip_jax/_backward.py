"""Clip in the backward pass: an identity whose cotangent is clipped."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import optax
from jax.core import Tracer, eval_jaxpr

from ._checks import check_transformation

T = TypeVar("T")


def clip_cotangent(x: T, clip: optax.GradientTransformation) -> T:
    r"""Return `x` as it is; on the way back, clip the gradient that arrives at it.

    $$ \bar x \leftarrow \text{clip}(\bar x) $$

    Inside a recurrence (`jax.lax.scan`, `nnx.scan`) it acts at every time step, on the product of
    Jacobians before it has exploded, where a clip of the whole gradient comes too late to tell
    the steps apart.

    Args:
      x: Pytree of arrays, a hidden state or the derivative at an input, of any float dtype.
      clip: The clip, by value (`clip_by_value(1.0)`) or by norm (`clip_by_global_norm(1.0)` for
        all of `x`, `clip_by_unit_norm(1.0, axes=-1)` for each example of a batch). It starts
        afresh each time, so its threshold must not depend on what it saw.

    Returns:
      `x`.

    Raises:
      ValueError: For a `clip` that is not a transformation, such as a bare number.

    >>> import gradclip_jax, jax
    >>> clip = gradclip_jax.clip_by_value(1.0)
    >>> float(jax.grad(lambda x: 10 * gradclip_jax.clip_cotangent(x, clip))(2.0))
    1.0

    Graves, *Generating Sequences With Recurrent Neural Networks*, 2013,
    https://arxiv.org/abs/1308.0850, section 2.1: the derivatives of the loss at the inputs to the
    LSTM layers are clipped to lie within [-10, 10] (100 at the output).
    """
    fix = ": pass `clip_by_global_norm(1.0)` or `clip_by_value(1.0)`"
    check_transformation("clip", clip, "a transformation", fix)

    def clipped(cotangent: Any) -> Any:
        return clip.update(cotangent, clip.init(cotangent))[0]

    # A threshold that is traced outside of a `scan` must go in as an argument.
    closed = jax.make_jaxpr(clipped)(x)
    captured = [const for const in closed.consts if isinstance(const, Tracer)]

    def update(cotangent: Any, captured: Sequence[Any]) -> Any:
        if not captured:
            return clipped(cotangent)
        given = iter(captured)
        consts = [next(given) if isinstance(c, Tracer) else c for c in closed.consts]
        leaves, structure = jax.tree.flatten(cotangent)
        return structure.unflatten(eval_jaxpr(closed.jaxpr, consts, *leaves))

    @jax.custom_vjp
    def identity(x: T, *captured: Any) -> T:
        return x

    def forward(x: T, *captured: Any) -> tuple[T, Any]:
        return x, captured

    def backward(captured: Sequence[Any], cotangent: T) -> Any:
        return update(cotangent, captured), *[None] * len(captured)

    identity.defvjp(forward, backward)
    return identity(x, *captured)
