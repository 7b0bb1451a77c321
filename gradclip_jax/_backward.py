"""Clip in the backward pass: an identity whose cotangent is clipped."""

from typing import Any, TypeVar

import jax
import optax

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

    >>> import gradclip_jax, jax
    >>> clip = gradclip_jax.clip_by_value(1.0)
    >>> float(jax.grad(lambda x: 10 * gradclip_jax.clip_cotangent(x, clip))(2.0))
    1.0

    Graves, *Generating Sequences With Recurrent Neural Networks*, 2013,
    https://arxiv.org/abs/1308.0850, section 2.1: the derivatives of the loss at the inputs to the
    LSTM layers are clipped to lie within [-10, 10] (100 at the output).
    """

    @jax.custom_vjp
    def identity(x: T) -> T:
        return x

    def forward(x: T) -> tuple[T, None]:
        return x, None

    def backward(_: None, cotangent: Any) -> Any:
        return clip.update(cotangent, clip.init(cotangent))[:1]

    identity.defvjp(forward, backward)
    return identity(x)
