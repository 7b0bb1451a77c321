"""Stable-SPAM: clip elements to a mean of the largest, and give each array a steady norm."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_between_0_and_1
from .._clip import Measure, apply_limits, clip_to_limit, measured_types
from .._compiled import compiled
from .._devices import filled_like
from .._export import exportable
from .._inject import strategy
from .._leaves import broadcast_norms, widen
from .._limits import Limit, each
from .._limits.ema import MeanState
from .._limits.moments import lerp, std_update, unless_zero
from .._memory import changed_in_place
from .._norms import leaf_norms
from .._rescale import OnNonfinite, nonfinite_fill, normalize
from .._state import ClipState, check_norms, check_trees, initial_state, transformation
from .._types import AxisName, Params, Threshold, Updates


@exportable
class SteadyNormState(NamedTuple):
    """The mean of the norms, and the root of the mean of their squares, free of bias."""

    mean: MeanState
    root: MeanState


@strategy("decay")
def stable_spam_clip(
    decay: Threshold = 0.999,
    *,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the elements of an array that are above the mean of its largest: AdaClip.

    $$ T_t = \sum_{s \le t} w_s \max_i |g_{s,i}|, \quad w_s \propto \theta^{t-s}, \qquad
       g_i \leftarrow g_i \, \frac{T_t}{\max_j |g_j|} \text{ if } |g_i| > T_t $$

    For a few elements that spike in low-precision pre-training: the largest of them becomes
    T, and the elements that are clipped keep their order. Stable-SPAM is
    `optax.chain(stable_spam_clip(), stable_spam_norm(), optax.adam(…))`.

    Args:
      decay: theta, the weight of the past, between 0 and 1 (exclusive); 0.999 in the paper.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero and keeps its mean.

    Returns:
      A transformation with a `ClipState`: its `clip_measure` is the largest modulus of each array,
      its `clip_limit` the mean T with this one in it. So the first gradient passes, and a spike
      of k times the mean becomes 1 + (k - 1) / n times it in step n, n up to 1,000. An
      element just above T may end below one just below. Zeros are ignored.

    Raises:
      ValueError: For a `decay` outside of 0 to 1.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.stable_spam_clip()
    >>> state = clip.init(jnp.zeros(3))
    >>> for grads in (jnp.array([1.0, 1.0, 0.0]), jnp.array([3.0, -1.0, 1.0])):
    ...     updates, state = clip.update(grads, state)
    >>> print(updates.round(2))  # T is the mean of 1 and 3
    [ 2. -1.  1.]

    Huang et al., *Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam*, 2025,
    https://arxiv.org/abs/2502.17055, AdaClip. We depart in the count of the bias correction, which
    is our own: the authors' code resets it with the momentum of Adam but keeps the mean, which is
    then 500 times too large, and nothing is clipped for hundreds of steps.
    """
    limits = each(_mean(check_between_0_and_1("decay", decay)))
    nonfinite_fill(on_nonfinite)  # an error for any other word
    measure = functools.partial(leaf_norms, order=jnp.inf)

    def init(params: Params) -> ClipState:
        norms = measured_types(measure, params, axis_name)
        zeros = jax.tree.map(functools.partial(filled_like, 0.0), norms)
        return initial_state(norms, limits.init(zeros), are_norms=False)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        check_trees(updates, params)
        norms = measure(updates, axis_name=axis_name)
        check_norms(norms, state, are_norms=False)
        of_norms, limit_state = limits.update(norms, state.limit_state, updates, params)
        scaled, state = apply_limits(
            updates,
            norms,
            of_norms,
            state,
            limit_state,
            on_nonfinite=on_nonfinite,
            axis_name=axis_name,
        )
        return _unless_below(updates, scaled, norms, of_norms), state

    return transformation(init, update, limits.init)


@strategy("b1", "b2")
def stable_spam_norm(
    b1: Threshold = 0.7,
    *,
    b2: Threshold = 0.9,
    measure: Measure = leaf_norms,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Give each array the norm that a mean of its norms has to their root mean square: AdaGN.

    $$ g_\ell \leftarrow \frac{g_\ell}{n_t} \cdot \frac{M_t}{\sqrt{V_t}}, \qquad
       M_t = \sum_{s \le t} w_s n_s, \; w_s \propto \gamma_1^{t-s}, \qquad
       V_t = \sum_{s \le t} w'_s n_s^2, \; w'_s \propto \gamma_2^{t-s} $$

    For norms that jump from step to step under Adam or a sign: the update has a norm of about
    1, below it where norms are uneven. **It has no unit and enlarges small gradients**, noise too:
    it is a normaliser, and of no use in front of plain SGD.

    Args:
      b1: gamma_1, between 0 and 1 (exclusive); 0.7 in the paper.
      b2: gamma_2, likewise; 0.9 in the paper.
      measure: See `clip_to_limit`; `leaf_norms` in the paper.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero and keeps its means.

    Returns:
      A transformation with a `ClipState`, whose `clip_limit` is the norm of the update: at most
      1.41, whatever came before. After a spike that is large beyond all others it is 0.95 first
      (0.3 / √0.1), and 0.05 ten steps later. Zero stays zero, and does not enter.

    Raises:
      ValueError: For a number outside of 0 to 1.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.stable_spam_norm()
    >>> grads = jnp.array([3e6, 4e6])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates)
    [0.6 0.8]

    Huang et al., as `stable_spam_clip`, AdaGN; in version 3, *GradientStabilizer: Fix the Norm,
    Not the Gradient*, ICML 2026. We depart in having no epsilon, and a bias correction that
    nothing resets.
    """
    limit = _steady_norm(check_between_0_and_1("b1", b1), check_between_0_and_1("b2", b2))
    return clip_to_limit(
        limit, measure=measure, response=normalize, axis_name=axis_name, on_nonfinite=on_nonfinite
    )


def _mean(decay: Threshold) -> Limit:
    """The mean of all norms so far, this one included."""

    def update(norm: jax.Array, state: MeanState) -> tuple[jax.Array, MeanState]:
        weight, share = _weights(state, decay)
        state = unless_zero(norm, MeanState(weight, lerp(state.mean, norm, share)), state)
        return state.mean, state

    return Limit(_no_mean, update)


def _steady_norm(b1: Threshold, b2: Threshold) -> Limit:
    """The mean of all norms so far, in units of the root of the mean of their squares."""

    def init(norm: jax.Array) -> SteadyNormState:
        return SteadyNormState(_no_mean(norm), _no_mean(norm))

    def update(norm: jax.Array, state: SteadyNormState) -> tuple[jax.Array, SteadyNormState]:
        weight, share = _weights(state.mean, b1)
        mean = MeanState(weight, lerp(state.mean.mean, norm, share))
        weight, share = _weights(state.root, b2)
        root = MeanState(weight, std_update(state.root.mean, norm, share, share))
        new = unless_zero(norm, SteadyNormState(mean, root), state)
        known = new.root.mean > 0
        return jnp.where(known, new.mean.mean / jnp.where(known, new.root.mean, 1), 0), new

    return Limit(init, update)


def _no_mean(norm: jax.Array) -> MeanState:
    return MeanState(jnp.zeros_like(norm), jnp.zeros_like(norm))


def _weights(state: MeanState, decay: Threshold) -> tuple[jax.Array, jax.Array]:
    """The sum of all weights with that of one more norm, and its share of them."""
    weight = jnp.asarray(decay).astype(state.weight.dtype) * state.weight + 1
    return weight, 1 / weight


def _unless_below(updates: Any, scaled: Any, norms: Any, limits: Any) -> Any:
    """The elements that are at or below the limit of their array as they were."""
    leaves, tree = jax.tree.flatten(updates)
    of_leaves = zip(
        leaves,
        jax.tree.leaves(scaled),
        broadcast_norms(norms, updates),
        broadcast_norms(limits, updates),
        strict=True,
    )
    return tree.unflatten(
        [y if norm is None else _kept(x, y, norm, limit) for x, y, norm, limit in of_leaves]
    )


@compiled()
def _kept(x: jax.Array, y: jax.Array, norm: jax.Array, limit: jax.Array) -> jax.Array:
    def kept(x: jax.Array, y: jax.Array, limit: jax.Array, is_finite: jax.Array) -> jax.Array:
        return jnp.where((jnp.abs(widen(x)) <= limit) & is_finite, x, y)

    return changed_in_place(kept, x, y, limit, jnp.isfinite(norm))
