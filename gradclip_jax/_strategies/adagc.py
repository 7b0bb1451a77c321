"""AdaGC: each array is held to a moving average of its own norms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_above, check_between_0_and_1, check_steps, check_threshold
from .._clip import clip_norms
from .._compiled import compiled
from .._devices import vma_checked
from .._export import exportable
from .._inject import strategy
from .._leaves import stacked_scalars
from .._limits import Limit, Limits, constant, update_each
from .._limits.moments import lerp, unless_zero
from .._norms import global_norm, leaf_norms
from .._rescale import OnNonfinite
from .._state import increment_if, init_threshold, read_threshold
from .._types import AxisName, Norms, Params, Threshold, Updates


@exportable
class AdaGCState(NamedTuple):
    """The level of each array (0 before its first norm), the clock of max_norm, and the steps."""

    level: Any
    max_norm: Any
    step_count: jax.Array


@strategy("ratio", "decay", "max_norm")
def adagc(
    ratio: Threshold = 1.04,
    *,
    decay: Threshold = 0.99,
    warmup_steps: int = 100,
    max_norm: Threshold = 1.0,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGC: clip all arrays together at first, then each to a multiple of its own average.

    In the warm-up `max_norm` limits the global norm, and the least norm of an array is its level:

    $$ g_\ell \leftarrow g_\ell \cdot
       \min\!\Big(1, \frac{\lambda \gamma_\ell}{\lVert g_\ell \rVert}\Big), \qquad
       \gamma_\ell \leftarrow \beta \gamma_\ell
       + (1 - \beta) \min(\lVert g_\ell \rVert, \lambda \gamma_\ell) $$

    For pre-training, where spikes begin in a few arrays: no array pays for another.

    Args:
      ratio: lambda, above 1; 1.04 in the authors' code, 1.03 to 1.05 in the paper.
      decay: beta, the weight of the past, between 0 and 1 (exclusive); 0.99 in the authors' code.
      warmup_steps: Steps with the global clip, at least 1; 100 in the paper.
      max_norm: Limit of the global norm in the warm-up; 1.0 in the authors' code. None for none.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero and keeps its level.

    Returns:
      A transformation with a `ClipState` of one norm for each array. A level doubles in 1,734
      steps at most, so one that was low in the warm-up brakes for long. Zeros are ignored: a frozen
      layer, or one of LoRA, takes its first other norm for its level.

    Raises:
      ValueError: For a number outside of its range.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.adagc(2.0, warmup_steps=1, max_norm=5.0)
    >>> state = clip.init({"w": jnp.zeros(2), "b": jnp.zeros(1)})
    >>> for scale in (1.0, 10.0):
    ...     grads = {"w": scale * jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    ...     updates, state = clip.update(grads, state)
    >>> print(updates["w"], updates["b"])
    [6. 0.] [4.]

    Wang et al., *AdaGC: Improving Training Stability for Large Language Model Pretraining*, 2025,
    https://arxiv.org/abs/2502.11034, algorithm 1, with the numbers of the authors' PyTorch code.
    We depart in NaN (there a level is NaN forever), in zeros (there the layer never moves again),
    in the 1e-6 that it adds to norms, and in that checkpoints hold the levels.
    """
    ratio = check_above("ratio", ratio, 1)
    decay = check_between_0_and_1("decay", decay)
    warmup_steps = check_steps("warmup_steps", warmup_steps)
    cap = constant(check_threshold("max_norm", max_norm))

    def init(norms: Norms) -> AdaGCState:
        level = jax.tree.map(jnp.zeros_like, norms)
        return AdaGCState(level, init_threshold(cap), jnp.zeros((), jnp.int32))

    def update(
        norms: Norms, state: AdaGCState, updates: Updates, params: Params
    ) -> tuple[Norms, AdaGCState]:
        del updates, params
        largest, clock = read_threshold(cap, state.max_norm)
        warm = state.step_count >= jnp.asarray(warmup_steps).astype(jnp.int32)
        flat, treedef = jax.tree.flatten(norms)
        limits, levels = _limits_and_levels(
            flat, treedef.flatten_up_to(state.level), largest, warm, ratio, decay
        )
        count = increment_if(state.step_count, True)
        return treedef.unflatten(limits), AdaGCState(treedef.unflatten(levels), clock, count)

    return clip_norms(
        Limits(init, update), measure=leaf_norms, axis_name=axis_name, on_nonfinite=on_nonfinite
    )


@compiled()
def _limits_and_levels(
    norms: list[jax.Array],
    levels: list[jax.Array],
    max_norm: jax.Array,
    warm: jax.Array,
    ratio: Any,
    decay: Any,
) -> tuple[list[jax.Array], list[jax.Array]]:
    finite = [jnp.where(jnp.isfinite(norm), norm, 0) for norm in norms]
    # They are reduced over devices already.
    joint = global_norm(stacked_scalars(finite), axis_name=None if vma_checked() else ())
    over = joint > max_norm

    def update(norm: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The quotient is at most 1: `max_norm / joint` could be flushed to zero.
        part = max_norm * (norm / jnp.where(over, joint, 1))
        first = jnp.where(over, part, max_norm)
        known = level > 0
        later = jnp.where(known, jnp.asarray(ratio).astype(norm.dtype) * level, jnp.inf)
        limit = jnp.where(warm, later, first)
        x = jnp.minimum(norm, limit)
        weight = 1 - jnp.asarray(decay).astype(norm.dtype)
        new = jnp.where(warm, lerp(level, x, weight), jnp.minimum(level, x))
        return limit, unless_zero(x, jnp.where(known, new, x), level)

    of_array = Limit(lambda norm: norm, update)
    return update_each(of_array, norms, levels)
