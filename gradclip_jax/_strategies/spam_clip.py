"""SPAM: hold each element to a multiple of its own root mean square."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_between_0_and_1, check_threshold, check_whole_number
from .._clip import measured_types
from .._compiled import compiled
from .._inject import strategy
from .._leaves import is_gradient
from .._limits import constant
from .._memory import to_device, to_memory_of
from .._rescale import OnNonfinite, clamped, nonfinite_fill, ratio, shrink
from .._state import (
    ClipState,
    check_trees,
    init_threshold,
    initial_state,
    next_state,
    read_threshold,
    transformation,
)
from .._types import AxisName, Params, Threshold, Updates
from .elements import arrays_of, largest, modulus, zeros_of


@strategy("threshold", "decay")
def spam_clip(
    threshold: Threshold = 5000.0,
    *,
    decay: Any = 0.999,
    warmup_steps: int = 19,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""SPAM: clip each element to a multiple of its own root mean square so far.

    $$ g_i \leftarrow \operatorname{sign}(g_i) \sqrt{\Theta v_i}
       \;\text{ if } g_i^2 > \Theta v_i, \qquad v_i \leftarrow \beta v_i + (1 - \beta) g_i^2 $$

    The limit is that of the elements seen before; v takes in the element as clipped. For training
    in which a few elements spike to a thousand times their usual size while the norm hardly shows
    it. Put it before an optimizer; it costs one more array for each parameter.

    Args:
      threshold: The ratio of squares Θ, non-negative; 5000 in the paper, so an element may be 71
        times its root mean square. `inf` or None clips nothing and still measures; 0 gives zeros.
        May be a schedule.
      decay: β, between 0 and 1 (exclusive); 0.999 as in Adam, whose second moment the paper uses.
      warmup_steps: Updates at the start that all pass; 19 in the authors' code.
      axis_name: See `global_norm`; the clip needs no other device, but what it measures does.
      on_nonfinite: `"zero"` makes each element that is NaN or infinite zero; `"propagate"`, NaN.
        Either way it does not enter v.

    Returns:
      A transformation with a `ClipState`. Its `clip_measure` is the largest ratio of an element to
      its root mean square, its `clip_limit` the root of Θ. An element with v = 0 passes. The page
      of strategies says how it follows elements that grow or shrink.

    Raises:
      ValueError: For a number outside of its range.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.spam_clip(4.0, decay=0.75, warmup_steps=1)
    >>> _, state = clip.update(jnp.array([3.0, 3.0]), clip.init(jnp.zeros(2)))
    >>> updates, state = clip.update(jnp.array([-100.0, 1.0]), state)
    >>> print(updates)
    [-3.  1.]

    Huang et al., *SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training*, ICLR 2025,
    https://arxiv.org/abs/2501.06842, its clip alone. We depart in a v of our own, not Adam's, in no
    reset of the optimizer's moments, and in v = 0 (there such an element is zero forever).
    """
    square = constant(check_threshold("threshold", threshold))
    rate = 1 - check_between_0_and_1("decay", decay)
    warmup_steps = check_whole_number("warmup_steps", warmup_steps, least=0)
    fill = nonfinite_fill(on_nonfinite)

    def init(params: Params) -> ClipState:
        norm = measured_types(largest, params, axis_name)
        rms = zeros_of(params, modulus)
        return initial_state(norm, (init_threshold(square), rms), are_norms=False)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        check_trees(updates, params)
        clock, old = state.limit_state
        most, clock = read_threshold(square, clock)
        most = jnp.sqrt(most)
        most = jnp.where((state.step_count < warmup_steps) & (most > 0), jnp.inf, most)
        leaves, tree = jax.tree.flatten(updates)
        arrays = arrays_of(old, updates)
        held = [i for i, rms in enumerate(arrays) if rms is not None and is_gradient(leaves[i])]
        ratios: list[Any] = [None] * len(leaves)
        changed = _changed(
            [jnp.asarray(leaves[i]) for i in held],
            [arrays[i] for i in held],
            most,
            rate,
            on_nonfinite=on_nonfinite,
        )
        for i, (leaf, rms, times) in zip(held, changed, strict=True):
            leaves[i], arrays[i], ratios[i] = leaf, rms, times
        norm = largest(tree.unflatten(ratios), axis_name=axis_name)
        finite = jnp.isfinite(norm)
        return tree.unflatten(leaves), next_state(
            state,
            norm,
            most,
            jnp.where(finite, shrink(norm, most), fill),
            clipped=finite & (norm > most),
            nonfinite=~finite,
            limit_state=(clock, tree.unflatten(arrays)),
        )

    return transformation(init, update)


@compiled(static=("on_nonfinite",))
def _changed(
    leaves: list[jax.Array],
    arrays: list[jax.Array],
    most: jax.Array,
    rate: Any,
    *,
    on_nonfinite: OnNonfinite,
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """The update of each leaf, its new root mean square, and the ratio of both before."""
    fill = nonfinite_fill(on_nonfinite)
    changed = []
    for leaf, rms in zip(leaves, arrays, strict=True):
        # The root mean square is on the device, so that a leaf in host memory has to come there.
        x = to_device(leaf)
        new = _learned(x, rms, most, jnp.asarray(rate).astype(rms.dtype))
        limits = _limits(rms, most)
        held = clamped(x, limits, limits, fill=fill)
        changed.append((to_memory_of(held, leaf), new, _ratio(x, rms)))
    return changed


def _learned(x: jax.Array, rms: jax.Array, most: jax.Array, rate: jax.Array) -> jax.Array:
    size = modulus(x)
    clipped = jnp.minimum(size, _limits(rms, most))
    return jnp.where(jnp.isfinite(size), _root_of_mean(rms, clipped, rate), rms)


def _limits(rms: jax.Array, most: jax.Array) -> jax.Array:
    """The limit of each element; what was zero so far passes, unless nothing may."""
    bounded = ((rms != 0) | (most == 0)) & (most < jnp.inf)
    return jnp.where(bounded, jnp.where(bounded, rms, 1) * jnp.where(bounded, most, 1), jnp.inf)


def _ratio(x: jax.Array, rms: jax.Array) -> jax.Array:
    """How many times its root mean square an element is, 0 where that is not known yet."""
    size = modulus(x)
    # A ratio of finite numbers may overflow, which does not make it NaN or infinite.
    times = jnp.minimum(ratio(jnp.where(rms != 0, size, 0), rms), jnp.finfo(rms.dtype).max)
    return jnp.where(jnp.isfinite(size), times, size)


def _root_of_mean(rms: jax.Array, size: jax.Array, rate: jax.Array) -> jax.Array:
    """The root of (1 - rate) rms^2 + rate size^2, whose squares may overflow."""
    most = jnp.maximum(rms, size)
    nonzero = most != 0
    scale = jnp.where(nonzero, most, 1)
    old, new = rms / scale, size / scale
    # In this form the mean of equal squares is that square, without a rounding.
    mean = old * old + rate * (new * new - old * old)
    return jnp.where(nonzero, scale * jnp.sqrt(jnp.where(nonzero, mean, 1)), 0)
