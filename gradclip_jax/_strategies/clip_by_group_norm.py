"""Clip the norm of each group of leaves: encoder and decoder, body and head."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from .._checks import check_threshold
from .._clip import clip_norms
from .._inject import strategy
from .._limits import Limits, constant, each, update_finite
from .._norms import group_norms
from .._per_layer import PerLayer
from .._rescale import OnNonfinite
from .._types import AxisName, Norms, Params, Threshold, Updates


@strategy("max_norm")
def clip_by_group_norm(
    max_norm: Threshold | Mapping[Any, Threshold],
    *,
    labels: Any,
    per_layer: PerLayer = False,
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
      per_layer: See `clip_to_limit`.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`; a group with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one norm for each label.

    Raises:
      ValueError: For a threshold as in `clip_by_global_norm`; labels that do not cover the tree;
        a label without a norm, or a norm whose label is nowhere.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([0.5])}
    >>> labels = {"body": "b", "head": "h"}
    >>> clip = gradclip_jax.clip_by_group_norm({"b": 1.0, "h": None}, labels=labels)
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["body"], updates["head"])
    [0.6 0.8] [0.5]

    McMahan, Ramage, Talwar, Zhang, *Learning Differentially Private Recurrent Language Models*,
    ICLR 2018, https://arxiv.org/abs/1710.06963, per-layer clipping of section 2, without its
    budget: each limit is the user's.
    """
    measure = functools.partial(group_norms, labels=labels)
    make = functools.partial(
        clip_norms,
        measure=measure,
        per_layer=per_layer,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )
    if not isinstance(max_norm, Mapping):
        return make(each(constant(check_threshold("max_norm", max_norm))))
    limits = {
        label: constant(check_threshold(f"max_norm[{label!r}]", limit))
        for label, limit in max_norm.items()
    }

    def init(norms: Mapping[Any, Any]) -> dict[Any, Any]:
        if set(norms) != set(limits):
            raise ValueError(
                "`max_norm` must have a norm for each label and no other: the labels are "
                f"{sorted(norms, key=str)}, `max_norm` has {sorted(limits, key=str)}."
            )
        return {label: limits[label].init(norm) for label, norm in norms.items()}

    def update(
        norms: Norms, state: Any, updates: Updates, params: Params
    ) -> tuple[Norms, dict[Any, Any]]:
        del updates, params
        found = {
            label: update_finite(limits[label], norm, state[label]) for label, norm in norms.items()
        }
        of_norms = jax.tree.structure(norms).unflatten([limit for limit, _ in found.values()])
        return of_norms, {label: state for label, (_, state) in found.items()}

    return make(Limits(init, update))
