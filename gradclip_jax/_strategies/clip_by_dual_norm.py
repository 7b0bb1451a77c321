"""Clip for optimizers that step to the edge of a ball: sign updates, Muon, Scion."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _balls as balls
from .._checks import check_threshold
from .._clip import measured_types
from .._devices import replicate_matrices, reshard_like
from .._inject import strategy
from .._leaves import broadcast_prefix, is_function, is_gradient, path_name, widen
from .._limits import constant
from .._matrices import check_whole_matrices
from .._memory import to_device, to_memory_of
from .._norms import global_norm, leaf_norms
from .._rescale import OnNonfinite, nonfinite_fill, shrink
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


def matrices_and_signs(path: str, leaf: Any) -> balls.Ball:
    """Matrices and stacks of them in the spectral ball, vectors and scalars in that of signs."""
    del path
    return balls.spectral if len(leaf.shape) > 1 else balls.sign


@strategy("max_norm")
def clip_by_dual_norm(
    max_norm: Threshold,
    *,
    ball: Any = matrices_and_signs,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Step to the edge of a ball, and less far where the gradient is small.

    $$ g \leftarrow \min\!\Big(1, \frac{\lVert g \rVert_*}{\text{max\_norm}}\Big)
       \operatorname*{argmax}_{\lVert u \rVert \le 1} \langle g, u \rangle, \qquad
       \lVert g \rVert_* = \max_{\lVert u \rVert \le 1} \langle g, u \rangle $$

    For optimizers whose step has one length, as that of Lion (signs) and Muon (orthogonal
    matrices): they never settle. Here a dual norm below `max_norm` gives a step in proportion. Put
    it in place of the sign or the orthogonalization, behind the momentum (`optax.trace`) and
    before the learning rate.

    Args:
      max_norm: Dual norm from which on the step has full length, non-negative. It is a sum over
        all elements and singular values, so it grows with the model. 0 gives the full step always;
        `inf` or None changes nothing and still measures. May be a schedule.
      ball: A `balls.Ball` for all arrays, a prefix pytree of them, or a function of path
        (`"encoder/kernel"`) and leaf that returns one. By default matrices are in `balls.spectral`,
        and vectors and scalars in `balls.sign`.
      axis_name: See `global_norm`; for matrices in a spectral ball, see `spectral_clip`.
      on_nonfinite: See `clip_to_limit`. The arrays share one length, so they are one group.

    Returns:
      A transformation with a `ClipState`: its `clip_measure` is the dual norm of all arrays. It
      enlarges small gradients: it is a normalizer. Zero stays zero.

    Raises:
      ValueError: For a threshold or a `ball` that may not be; for split matrices.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_by_dual_norm(22.0)
    >>> grads = {"b": jnp.array([3.0, -4.0]), "w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["b"], gradclip_jax.metrics(state)["clip_measure"])
    [ 0.5 -0.5] 11.0

    Pethick et al., *Generalized Gradient Norm Clipping & Non-Euclidean (L0,L1)-Smoothness*, NeurIPS
    2025, https://arxiv.org/abs/2506.01913, the step min(rho, dual norm), which we divide by rho.
    """
    limit = constant(check_threshold("max_norm", max_norm))
    _check_ball(ball)
    fill = nonfinite_fill(on_nonfinite)

    def init(params: Params) -> ClipState:
        norm = measured_types(functools.partial(global_norm, order=1), params, axis_name)
        return initial_state(norm, init_threshold(limit), are_norms=False)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        check_trees(updates, params)
        most, limit_state = read_threshold(limit, state.limit_state)
        leaves, tree = jax.tree.flatten(updates)
        found = dict(_balls(ball, updates))
        whole = [i for i in found if found[i].whole]
        check_whole_matrices(tree.unflatten(_only(leaves, whole)), axis_name)
        parts, points = list(leaves), {}
        for i, of_leaf in found.items():
            x = widen(to_device(leaves[i]))
            x = replicate_matrices(x) if of_leaf.whole else x
            parts[i], points[i] = of_leaf.split(x)
        duals: dict[int, Any] = {}
        for order in sorted({of_leaf.order for of_leaf in found.values()}):
            alike = [i for i in found if found[i].order == order]
            of_order = tree.unflatten(_only(parts, alike))
            norms = jax.tree.leaves(leaf_norms(of_order, order=order, axis_name=axis_name))
            duals.update(zip(alike, norms, strict=True))
        norm = sum(duals.values(), jnp.zeros_like(state.clip_measure))
        finite, below = jnp.isfinite(norm), norm < most
        length = jnp.where(below, norm, 1) / jnp.where(below, most, 1)
        for i, point in points.items():
            x = to_device(leaves[i])
            step = reshard_like(point(duals[i]), x)
            step = jnp.where(most < jnp.inf, step * length.astype(step.dtype), widen(x))
            leaves[i] = to_memory_of(jnp.where(finite, step, fill).astype(x.dtype), leaves[i])
        return tree.unflatten(leaves), next_state(
            state,
            norm,
            most,
            jnp.where(finite, shrink(norm, most), fill).astype(norm.dtype),
            clipped=finite & (norm > most),
            nonfinite=~finite,
            limit_state=limit_state,
        )

    return transformation(init, update)


def _balls(ball: Any, updates: Any) -> Iterator[tuple[int, balls.Ball]]:
    """The ball of each gradient, by its position among the leaves."""
    named = jax.tree_util.tree_leaves_with_path(updates)
    if is_function(ball):
        given = [
            ball(path_name(path), leaf if hasattr(leaf, "shape") else jnp.asarray(leaf))
            if is_gradient(leaf)
            else None
            for path, leaf in named
        ]
    else:
        rule = "`ball` must cover the tree of the updates"
        given = broadcast_prefix(ball, updates, rule, is_leaf=_is_ball)
    for i, ((path, leaf), of_leaf) in enumerate(zip(named, given, strict=True)):
        if not is_gradient(leaf):
            continue
        if not isinstance(of_leaf, balls.Ball):
            raise ValueError(f"`ball` must give a `Ball` for `{path_name(path)}`, got {of_leaf!r}.")
        is_matrix = jnp.ndim(leaf) > 1 and jnp.size(leaf)
        yield i, of_leaf if is_matrix or not of_leaf.whole else balls.euclidean


def _only(leaves: list[Any], positions: list[int]) -> list[Any]:
    """The leaves with None for all but some of them."""
    return [leaf if i in positions else None for i, leaf in enumerate(leaves)]


def _check_ball(ball: Any) -> None:
    if is_function(ball) or all(map(_is_ball, jax.tree.leaves(ball, is_leaf=_is_ball))):
        return
    raise ValueError(
        "`ball` must be a `Ball`, a prefix pytree of them or a function of path and leaf, "
        f"got {ball!r}."
    )


def _is_ball(x: Any) -> bool:
    return isinstance(x, balls.Ball) or x is None
