"""Clippy: shrink the update of each array until no weight moves by more than a share of itself."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_threshold
from .._clip import measured_types
from .._compiled import compiled
from .._devices import reshard_like
from .._inject import strategy
from .._leaves import is_gradient, stacked_scalars, widen
from .._limits import constant
from .._memory import to_device
from .._norms import leaf_norms
from .._platforms import elementwise
from .._rescale import (
    Factor,
    OnNonfinite,
    nonfinite_fill,
    rescale,
    shrink,
)
from .._safe import finite_or_zero
from .._state import (
    ClipState,
    check_norms,
    check_params,
    check_trees,
    init_threshold,
    initial_state,
    next_state,
    read_threshold,
    transformation,
)
from .._types import AxisName, Params, Threshold, Updates


@strategy("relative", "absolute")
def clippy(
    relative: Threshold = 0.1,
    *,
    absolute: Threshold = 1e-7,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clippy: shrink each array's update until each weight moves by at most a share of itself.

    $$ u_\ell \leftarrow u_\ell \cdot \min\!\Big(1, \; \min_i \frac{\delta_i}{|u_i|}\Big), \qquad
       \delta_i = \lambda_\text{rel} |w_i| + \lambda_\text{abs} $$

    Put it behind the optimizer, learning rate included: `chain(optax.adagrad(0.1), clippy())`. A
    norm hardly shows that a few weights jump; the largest ratio does. Made for recommenders.

    Args:
      relative: lambda_rel, non-negative; 0.1 in the authors' code. May be a schedule.
      absolute: lambda_abs, non-negative, in units of the weights; 1e-7 in the authors' code.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; an array with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState`: its `clip_measure` is the largest of |u_i| / delta_i in
      each array, its `clip_limit` 1. Its update needs `params`.

      **One weight near zero holds its whole array.** A bias that starts at zero moves by
      `absolute` first, and then by a tenth of itself more: it takes 97 updates to 0.01, and with
      `absolute=0` it never moves. Where weights cross zero, raise `absolute` to a step that is
      small. An element whose update is zero bounds nothing, also where delta_i is zero.

    Raises:
      ValueError: For thresholds as in `clip_by_global_norm`; for an update without `params`.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clippy(0.25, absolute=0.0)
    >>> weights, updates = jnp.array([4.0, 1.0]), jnp.array([4.0, 0.2])
    >>> updates, state = clip.update(updates, clip.init(weights), weights)
    >>> print(updates)  # a quarter of both: the first weight may move by 1, the second by 0.25
    [1.   0.05]

    Tang et al., *Improving Training Stability for Multitask Ranking Models in Recommender Systems*,
    KDD 2023, https://arxiv.org/abs/2302.09178, Clippy. The authors' code may bound by the Adagrad
    accumulator, too: not here, for a transformation sees no other's state (its default is 0).
    """
    share = constant(check_threshold("relative", relative))
    least = constant(check_threshold("absolute", absolute))
    nonfinite_fill(on_nonfinite)
    largest = functools.partial(leaf_norms, order=jnp.inf)

    def init(params: Params) -> ClipState:
        kinds = measured_types(largest, params, axis_name)
        thresholds = (init_threshold(share), init_threshold(least))
        return initial_state(kinds, thresholds, are_norms=False)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        if params is None:
            raise ValueError(
                "`clippy` compares updates with parameters: call `update(updates, state, params)`."
            )
        check_params(updates, params)
        check_trees(updates, params)
        relative, share_state = read_threshold(share, state.limit_state[0])
        absolute, least_state = read_threshold(least, state.limit_state[1])
        roots = largest(_roots_of_ratios(updates, params, relative, absolute), axis_name=axis_name)
        check_norms(roots, state, are_norms=False)
        roots, treedef = jax.tree.flatten(roots)
        leaves, tree = jax.tree.flatten(updates)
        counted = [i for i, leaf in enumerate(leaves) if is_gradient(leaf)]
        here = [leaves[i] for i in counted]
        arrays, of_norms, flags = _shrunk(here, roots, on_nonfinite=on_nonfinite)
        for i, array in zip(counted, arrays, strict=True):
            leaves[i] = array
        return tree.unflatten(leaves), next_state(
            state,
            *map(treedef.unflatten, of_norms),
            clipped=flags[0],
            nonfinite=flags[1],
            limit_state=(share_state, least_state),
        )

    return transformation(init, update)


@compiled()
def _roots_of_ratios(updates: Any, params: Any, relative: jax.Array, absolute: jax.Array) -> Any:
    """The root of |u| / delta of each element, whose square may leave the range of float32.

    Infinite only where the update is not finite. The largest number that there is, of which the
    inverse is flushed to zero, where an update is wanted and none is allowed.
    """

    def of_leaf(update: Any, param: Any) -> jax.Array | None:
        if not is_gradient(update):
            return None
        x = widen(to_device(update))
        finite = jnp.isfinite(x)
        u = jnp.abs(finite_or_zero(x))
        w = jnp.abs(reshard_like(widen(to_device(param)), x))
        bounded = relative < jnp.inf
        delta = jnp.where(bounded, jnp.where(bounded, relative, 0) * w + absolute, jnp.inf)
        divides = (u != 0) & (delta != 0)
        root = jnp.sqrt(jnp.where(divides, u, 1)) / jnp.sqrt(jnp.where(divides, delta, 1))
        root = jnp.where(divides, root, jnp.where(u != 0, jnp.finfo(u.dtype).max, 0))
        return jnp.where(finite, root, jnp.inf)

    return jax.tree.map(of_leaf, updates, params, is_leaf=lambda x: x is None)


@compiled(static=("on_nonfinite",))
def _shrunk(
    leaves: list[jax.Array], roots: list[jax.Array], *, on_nonfinite: OnNonfinite
) -> tuple[list[jax.Array], tuple[list[jax.Array], ...], jax.Array]:
    """Shrunk leaves; ratio, limit and factor of each; whether one was clipped, or not finite."""
    fill = nonfinite_fill(on_nonfinite)

    def of_array(root: jax.Array) -> tuple[Factor, jax.Array, jax.Array, jax.Array]:
        finite, one = jnp.isfinite(root), jnp.ones_like(root)
        inverse = shrink(jnp.where(finite, root, 0), one)
        scale = jnp.where(finite, inverse, fill).astype(root.dtype)
        ratio = jnp.where(finite, jnp.minimum(root * root, jnp.finfo(root.dtype).max), root)
        return Factor(scale, inverse), ratio, one, scale * inverse

    found = elementwise(of_array, roots)
    flags = [jnp.zeros(2, bool)]
    for stack in stacked_scalars(roots):
        finite = jnp.isfinite(stack)
        flags.append(jnp.stack([jnp.any(finite & (stack > 1)), jnp.any(~finite)]))
    held = rescale(leaves, [factor for factor, *_ in found])
    of_norms = tuple([of[i] for of in found] for i in (1, 2, 3))
    return held, of_norms, functools.reduce(jnp.logical_or, flags)
