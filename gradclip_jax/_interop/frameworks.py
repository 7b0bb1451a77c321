"""Clips by the arguments of other frameworks, and with their numbers."""

import functools
import math
import numbers
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from .._checks import check_number, check_threshold
from .._rescale import OnNonfinite, Response, shrink
from .._state import ClipState, measured
from .._strategies.clip_by_global_norm import clip_by_global_norm
from .._strategies.clip_by_norm import clip_by_norm
from .._strategies.clip_by_value import clip_by_value
from .._types import AxisName, Params, Threshold, Updates


def from_torch(
    max_norm: Threshold,
    *,
    norm_type: float | str = 2,
    error_if_nonfinite: bool = False,
    eps: float = 1e-6,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""The clip of `torch.nn.utils.clip_grad_norm_`, by its arguments and with its numbers.

    $$ g \leftarrow g \cdot \min\!\Big(1, \frac{\text{max\_norm}}{\lVert g \rVert_p +
       \epsilon}\Big) $$

    For a loop that comes from PyTorch; in a new one use `clip_by_global_norm(max_norm)`.

    Args:
      max_norm: Largest norm that passes, non-negative; a number or a schedule, see
        `clip_by_global_norm`. (PyTorch takes a negative one and goes uphill.)
      norm_type: Order p of the norm, at least 1; `inf` or `"inf"` for the largest modulus.
      error_if_nonfinite: Raise RuntimeError for a norm that is NaN or infinite. An eager update
        waits for the norm at every step, as PyTorch does. A compiled one raises through a host
        callback in a branch that is taken only then: the error (`jax.errors.JaxRuntimeError`,
        which is a RuntimeError) comes where a result of that step is waited for, and what was
        donated to it is lost. Such a program cannot be exported, nor cached on disk.
      eps: Added to the norm, finite and non-negative; PyTorch has 1e-6, so at a norm of `max_norm`
        the factor is a little below 1. 0 for none.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`. `"propagate"` is nearest to PyTorch: a NaN makes all NaN
        there and here; an infinite element makes itself NaN and the others 0 there, all NaN here.

    Returns:
      A transformation with a `ClipState`; what PyTorch returns is `grad_norm` in
      `metrics(opt_state)`, or `clip_measure` where `norm_type` is not 2. Norms whose squares
      overflow are right here and infinite there, and of half-precision gradients norm and factor
      are float32 here and half precision there.

    Raises:
      ValueError: For a threshold, an order or an epsilon that may not be.
      RuntimeError: In the update, see `error_if_nonfinite`.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.from_torch(0.01)
    >>> grads = jnp.array([0.03, 0.04])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)  # 0.01 / 0.050001 of it
    [0.00599988 0.00799984]

    `torch.nn.utils.clip_grad_norm_` of PyTorch 2.13.
    """
    clip = clip_by_global_norm(
        max_norm,
        order=_order(norm_type),
        response=_with_eps(float(check_number("eps", eps, "be a finite number of at least 0", 0))),
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
    return _or_raise(clip) if error_if_nonfinite else clip


def from_keras(
    *,
    clipnorm: Threshold = None,
    clipvalue: Threshold = None,
    global_clipnorm: Threshold = None,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """The clip of a Keras optimizer, by its arguments and with its numbers.

    | argument | clip |
    |---|---|
    | `clipnorm` | `clip_by_norm`: each array has a norm of its own, none is global |
    | `clipvalue` | `clip_by_value` |
    | `global_clipnorm` | `clip_by_global_norm` |

    Args:
      clipnorm: Largest norm of each array.
      clipvalue: Largest modulus of each element.
      global_clipnorm: Largest norm of all arrays together. Of the three at most one may be given.
        A number of 0 or below does not clip, as in Keras, nor does None; it still measures. May
        be a schedule, of which a 0 gives zeros.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`. `"propagate"` is nearest to Keras: `global_clipnorm` makes
        all gradients NaN there and here. After an infinite element `clipnorm` leaves zeros in the
        rest of its array and `clipvalue` clips it, where all of them, or that element, are NaN
        here.

    Returns:
      A transformation with a `ClipState`. Put it first in `optax.chain`: Keras too clips before
      weight decay, and accumulated gradients once. Norms whose squares overflow are right here;
      in Keras they are infinite.

    Raises:
      ValueError: When more than one is given; for a threshold that is NaN or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.from_keras(clipnorm=1.0)
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["w"], updates["b"])
    [0.6 0.8] [0.5]

    `keras.optimizers.Optimizer` of Keras 3.15, and of `tf.keras` before it.
    """
    clips = {
        "clipnorm": (clip_by_norm, clipnorm),
        "clipvalue": (clip_by_value, clipvalue),
        "global_clipnorm": (clip_by_global_norm, global_clipnorm),
    }
    given = {name: value for name, (_, value) in clips.items() if value is not None}
    if len(given) > 1:
        raise ValueError(
            "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` may be given, got "
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())}."
        )
    for name, value in given.items():
        make, _ = clips[name]
        if not _is_off(value):
            threshold = check_threshold(name, value)
            return make(threshold, axis_name=axis_name, on_nonfinite=on_nonfinite)
    return clip_by_global_norm(None, axis_name=axis_name, on_nonfinite=on_nonfinite)


def from_lightning(
    gradient_clip_val: Threshold,
    *,
    gradient_clip_algorithm: Literal["norm", "value"] | None = "norm",
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """The clip of a Lightning `Trainer`, by its arguments and with its numbers.

    Args:
      gradient_clip_val: Largest global norm, or modulus of an element. A number of 0 or below does
        not clip, as in Lightning, nor does None; it still measures. May be a schedule, of which a
        0 gives zeros.
      gradient_clip_algorithm: `"norm"` (or None), which is `from_torch(gradient_clip_val)` with its
        epsilon, or `"value"`, which is `clip_by_value`.
      axis_name: See `global_norm`.
      on_nonfinite: See `from_torch`. With `"value"` an infinite element is clipped there and NaN
        here.

    Returns:
      A transformation with a `ClipState`.

    Raises:
      ValueError: For another algorithm; for a threshold that is NaN or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.from_lightning(0.5, gradient_clip_algorithm="value")
    >>> grads = jnp.array([-3.0, 0.25])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)
    [-0.5   0.25]

    `lightning.pytorch.Trainer` of Lightning 2, which calls PyTorch.
    """
    algorithm = str(gradient_clip_algorithm or "norm").lower()
    if algorithm not in ("norm", "value"):
        raise ValueError(
            f'`gradient_clip_algorithm` must be "norm" or "value", got {gradient_clip_algorithm!r}.'
        )
    limit = gradient_clip_val
    limit = None if _is_off(limit) else check_threshold("gradient_clip_val", limit)
    if algorithm == "value" and limit is not None:
        return clip_by_value(limit, axis_name=axis_name, on_nonfinite=on_nonfinite)
    return from_torch(limit, axis_name=axis_name, on_nonfinite=on_nonfinite)


def from_transformers(
    max_grad_norm: Threshold = 1.0,
    *,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """The clip of the `Trainer` of Transformers, by its argument and with its numbers.

    Args:
      max_grad_norm: Largest global norm, as in `from_torch`, epsilon included; 1.0 is the default
        of `TrainingArguments`. A number of 0 or below does not clip, as there, nor does None; it
        still measures. May be a schedule, of which a 0 gives zeros.
      axis_name: See `global_norm`.
      on_nonfinite: See `from_torch`.

    Returns:
      A transformation with a `ClipState`.

    Raises:
      ValueError: For a threshold that is NaN or not a number.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.from_transformers()
    >>> grads = jnp.array([30.0, 40.0])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates.round(6), gradclip_jax.metrics(state)["grad_norm"])
    [0.6 0.8] 50.0

    `transformers.Trainer`, which calls PyTorch through Accelerate.
    """
    limit = max_grad_norm
    limit = None if _is_off(limit) else check_threshold("max_grad_norm", limit)
    return from_torch(limit, axis_name=axis_name, on_nonfinite=on_nonfinite)


def _is_off(value: Threshold) -> bool:
    """Whether a threshold switches the clip off in Keras, Lightning and Transformers."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return value is None or (is_number and float(value) <= 0)


def _order(norm_type: Any) -> float:
    try:
        order = math.nan if isinstance(norm_type, bool) else float(norm_type)
    except (TypeError, ValueError):
        order = math.nan
    if not order >= 1:
        raise ValueError(
            '`norm_type` must be a number of at least 1, `inf` or `"inf"`, '
            f"got {norm_type!r}: below 1 it is not a norm."
        )
    return order


# One function for each epsilon, so that clips share their compiled programs.
@functools.cache
def _with_eps(eps: float) -> Response:
    return functools.partial(shrink, eps=eps) if eps else shrink


def _or_raise(
    clip: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Raise in an update whose norm is not finite."""

    def update(
        updates: Updates, state: Any, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        held = clip.update(updates, state, params, **extra_args)
        updates, state = cast(tuple[Any, ClipState], held)
        norm = measured(state)
        if isinstance(norm, Tracer):
            # A debug callback, because nothing waits for its result: a pure one that raises leaves
            # other devices waiting forever. In a branch, because the host is slow.
            jax.lax.cond(
                jnp.isfinite(norm),
                lambda norm: None,
                lambda norm: jax.debug.callback(_check_finite, norm),
                norm,
            )
        else:
            _check_finite(norm)
        return updates, state

    return optax.GradientTransformationExtraArgs(clip.init, update)


def _check_finite(norm: Any) -> None:
    # Under `vmap` the branch is taken always.
    if not math.isfinite(norm):
        raise RuntimeError(
            f"The norm of the gradients must be finite, got {float(norm)} "
            "(`error_if_nonfinite=True`)."
        )
