"""Clip the norm of each group of leaves: encoder and decoder, body and head."""

import functools
from collections.abc import Mapping
from typing import Any

import optax

from .._checks import Threshold, check_threshold
from .._clip import apply_limits, clip_to_limit, measured_types
from .._devices import AxisName, filled_like
from .._inject import named_strategy
from .._limits import constant, update_finite
from .._norms import group_norms
from .._rescale import OnNonfinite, check_on_nonfinite
from .._state import check_trees, initial_state, transformation


@named_strategy
def clip_by_group_norm(
    max_norm: Threshold | Mapping[Any, Threshold],
    labels: Any,
    *,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each labelled group of arrays to a norm of its own.

    $$ g_\ell \leftarrow g_\ell \cdot \min(1, \text{max\_norm}_G / \lVert g_G \rVert_2),
       \quad \ell \in G $$

    For parts of a model that should not starve each other: experts and dense layers, a new head
    on an old body, the actor and the critic.

    Args:
      max_norm: Largest norm of a group, as in `clip_by_global_norm`; or one for each label.
      labels: A prefix pytree of labels (strings or ints), or a callable that makes one from the
        tree, as in `optax.partition`; see `group_norms`.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a group with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one norm for each label.

    Raises:
      ValueError: For a threshold as in `clip_by_global_norm`; labels that do not cover the tree;
        a label without a norm, or a norm whose label is nowhere.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([0.5])}
    >>> clip = gradclip_jax.clip_by_group_norm({"b": 1.0, "h": None}, {"body": "b", "head": "h"})
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["body"], updates["head"])
    [0.6 0.8] [0.5]

    McMahan, Ramage, Talwar, Zhang, *Learning Differentially Private Recurrent Language Models*,
    ICLR 2018, https://arxiv.org/abs/1710.06963, per-layer clipping of section 2, without its
    budget: each limit is the user's.
    """
    measure = functools.partial(group_norms, labels=labels)
    if not isinstance(max_norm, Mapping):
        max_norm = check_threshold("max_norm", max_norm)
        return clip_to_limit(
            constant(max_norm), measure, axis_name=axis_name, on_nonfinite=on_nonfinite
        )
    check_on_nonfinite(on_nonfinite)
    limits = {
        label: constant(check_threshold(f"max_norm[{label!r}]", limit))
        for label, limit in max_norm.items()
    }

    def init(params):
        norms = measured_types(measure, params, axis_name)
        if set(norms) != set(limits):
            raise ValueError(
                "`max_norm` must have a norm for each label and no other: the labels are "
                f"{sorted(norms, key=str)}, `max_norm` has {sorted(limits, key=str)}."
            )
        limit_state = {label: limits[label].init(filled_like(0.0, norms[label])) for label in norms}
        return initial_state(norms, limit_state)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_trees(updates, params)
        norms = measure(updates, axis_name=axis_name)
        observed = {
            label: update_finite(limits[label], norm, state.limit_state[label])
            for label, norm in norms.items()
        }
        limit_of_label = [observed[label][0] for label in norms]
        limit_state = {label: observed[label][1] for label in norms}
        return apply_limits(
            updates,
            norms,
            limit_of_label,
            state,
            limit_state,
            on_nonfinite=on_nonfinite,
            axis_name=axis_name,
        )

    return transformation(init, update)
