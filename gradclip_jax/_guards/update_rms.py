"""Update clipping as in StableAdamW: a smaller step where gradients outrun the second moment."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_above, check_between_0_and_1, check_threshold, check_transformation
from .._clip import apply_limits, measured_types
from .._compiled import compiled
from .._devices import reshard_like
from .._export import exportable
from .._inject import injectable
from .._leaves import is_gradient, path_name, widen
from .._limits import constant
from .._memory import to_device
from .._norms import Axes, of_blocks
from .._rescale import OnNonfinite, nonfinite_fill
from .._safe import safe_power
from .._state import (
    ClipState,
    check_trees,
    check_type,
    init_threshold,
    initial_state,
    read_threshold,
)
from .._types import AxisName, Params, Threshold, Updates
from .memory import is_none


@exportable
class UpdateRmsState(NamedTuple):
    """The state of the optimizer, and of the clip of its updates.

    Attributes:
      inner_state: State of the optimizer.
      clip_state: State of the clip; its `clip_measure` is the root mean square of each array.
    """

    inner_state: Any
    clip_state: ClipState


_OTHERS = ("ScaleBySM3State", "SophiaState")  # their `nu` is a momentum, and a Hessian


class _Moment(NamedTuple):
    """The second moment of one leaf, and its number of steps if it is corrected for them."""

    nu: jax.Array
    steps: jax.Array | None


@injectable("threshold")
def clip_update_rms(
    optimizer: optax.GradientTransformation,
    *,
    threshold: Threshold = 1.0,
    b2: float | None = None,
    eps: float = 1e-8,
    axes: Axes = None,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink the step of each array in which gradients outrun their second moment: StableAdamW.

    $$ u_\ell \leftarrow u_\ell / \max(1, \text{RMS}_\ell / d), \qquad \text{RMS}_\ell =
       \sqrt{\operatorname{mean}_i \, g_i^2 / \max(\hat v_i, \epsilon^2)} $$

    For spikes that come when the second moment of Adam is out of date: an element that was small
    for long makes a step of up to 1 / √(1 - b2) learning rates. In place of a clip of gradients.

    Args:
      optimizer: The whole optimizer, learning rate and weight decay included: the paper shrinks
        the learning rate of both. Its state must hold a second moment `nu`, as those of Adam,
        AdamW and RMSProp do, in a chain, a mask or `inject_hyperparams`, too. (Adamax keeps a
        first one there.) Clips of gradients go in front, and `MultiSteps` around it.
      threshold: d, non-negative; 1.0 in the paper. May be a schedule.
      b2: The decay of the second moment, as the optimizer has it. Needed where that is corrected
        for its bias, as in Adam, for the state does not hold it.
      eps: Least root of the second moment, above 0; 1e-8 as in `optax.adam`.
      axes: One root mean square for each layer of a stack; see `clip_by_block_rms`.
      axis_name: See `global_norm`; with `axes` see `unit_norms`.
      on_nonfinite: See `clip_to_limit`. The moments have the NaN all the same: `skip_nonfinite`
        around it keeps it out.

    Returns:
      An optimizer. Arrays without a second moment, as matrices under Muon, pass.

    Raises:
      ValueError: For an optimizer without a second moment, at `init`; for a missing `b2`.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> optimizer = gradclip_jax.clip_update_rms(optax.adamw(0.1, b2=0.99), b2=0.99)
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)

    Wortsman et al., *Stable and Low-Precision Training for Large-Scale Vision-Language Models*,
    NeurIPS 2023, https://arxiv.org/abs/2304.13013, algorithm 2, with any optimizer for AdamW.
    """
    check_transformation("optimizer", optimizer, "an optimizer")
    optimizer = optax.with_extra_args_support(optimizer)
    limit = constant(check_threshold("threshold", threshold))
    decay = None if b2 is None else float(check_between_0_and_1("b2", b2))
    least = float(check_above("eps", eps, 0))
    nonfinite_fill(on_nonfinite)
    measure, sizes_of = of_blocks(axes)

    def init(params: Params) -> UpdateRmsState:
        inner_state = optimizer.init(params)
        found = _moments(inner_state, params)
        _check(found, inner_state, decay)
        leaves, tree = jax.tree.flatten(params, is_leaf=is_none)
        covered = [leaf if moment else None for leaf, moment in zip(leaves, found, strict=True)]
        kinds = measured_types(measure, tree.unflatten(covered), axis_name)
        clip_state = initial_state(kinds, init_threshold(limit), are_norms=False)
        return UpdateRmsState(inner_state, clip_state)

    def update(
        updates: Updates, state: Any, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, UpdateRmsState]:
        check_type(state, UpdateRmsState)
        check_trees(updates, params)
        moved, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)
        leaves, tree = jax.tree.flatten(updates, is_leaf=is_none)
        found = _moments(inner_state, updates)
        covered = [leaf if moment else None for leaf, moment in zip(leaves, found, strict=True)]
        ratios = tree.unflatten(_ratios(covered, found, decay=decay, eps=least))
        norms = measure(ratios, axis_name=axis_name)
        sizes = sizes_of(ratios, axis_name=axis_name)
        rms = jax.tree.map(lambda norm, size: norm / math.sqrt(max(size, 1)), norms, sizes)
        most, clock = read_threshold(limit, state.clip_state.limit_state)
        limits = jax.tree.map(lambda of_block: jnp.broadcast_to(most, of_block.shape), rms)
        moved, clip_state = apply_limits(
            moved,
            rms,
            limits,
            state.clip_state,
            clock,
            on_nonfinite=on_nonfinite,
            axis_name=axis_name,
        )
        return moved, UpdateRmsState(inner_state, clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_moment(x: Any) -> bool:
    is_named = isinstance(x, tuple) and "nu" in getattr(x, "_fields", ())
    return is_named and type(x).__name__ not in _OTHERS


def _moments(state: Any, tree: Any) -> list[_Moment | None]:
    """The second moment of each leaf of a tree, None of one that has none in the state."""
    named, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    found: list[_Moment | None] = [None] * len(named)
    for node in filter(_is_moment, jax.tree.leaves(state, is_leaf=_is_moment)):
        try:
            entries = treedef.flatten_up_to(node.nu)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"`optimizer` must have a second moment of each parameter, `nu` of "
                f"`{type(node).__name__}` is another tree: {error}"
            ) from error
        for i, ((path, leaf), nu) in enumerate(zip(named, entries, strict=True)):
            if not is_gradient(leaf) or nu is None or isinstance(nu, optax.MaskedNode):
                continue
            if getattr(nu, "shape", None) != getattr(leaf, "shape", ()):
                raise ValueError(
                    f"`optimizer` must have a second moment of each element, `nu` of "
                    f"`{type(node).__name__}` has another shape than `{path_name(path)}`."
                )
            if found[i] is not None:
                raise ValueError(
                    f"`optimizer` must have one second moment, it has two of `{path_name(path)}`."
                )
            # `getattr` would find the method of tuples.
            found[i] = _Moment(nu, node.count if "count" in node._fields else None)
    return found


def _check(found: list[_Moment | None], state: Any, decay: float | None) -> None:
    """Raise for an optimizer without a second moment, or one whose bias cannot be corrected."""
    if not any(map(_is_moment, jax.tree.leaves(state, is_leaf=_is_moment))):
        kinds = re.findall(r"namedtuple\[(\w+)\]", str(jax.tree.structure(state)))
        here = ", ".join(dict.fromkeys(kinds)) or repr(state)
        raise ValueError(
            "`optimizer` must have a second moment, a field `nu` in its state, as `optax.adamw` "
            f"and `optax.rmsprop` have; there is none in {here}. To clip the root mean square of "
            "its updates, put `clip_by_block_rms` behind it."
        )
    if decay is None and any(moment is not None and moment.steps is not None for moment in found):
        raise ValueError(
            "`b2` must be given: the optimizer corrects its second moment for the bias of its "
            "start, and its state does not hold the decay. Pass the `b2` of the optimizer (0.999 "
            "in `optax.adamw`)."
        )


@compiled(static=("decay", "eps"))
def _ratios(
    leaves: list[Any], found: list[_Moment | None], *, decay: float | None, eps: float
) -> list[jax.Array | None]:
    """Of each leaf the moduli over the roots of their second moment."""

    def of_leaf(leaf: Any, moment: _Moment | None) -> jax.Array | None:
        if moment is None:
            return None
        modulus = jnp.abs(widen(to_device(leaf)))
        nu = reshard_like(widen(to_device(moment.nu)), modulus)
        if moment.steps is not None and decay is not None:
            # 1 - b2^steps without the rounding of b2, which is as large as 1 - b2 in the end.
            steps = jnp.maximum(moment.steps, 1).astype(nu.dtype)
            nu = nu / -jnp.expm1(steps * math.log(decay))
        return modulus / jnp.maximum(safe_power(nu, 0.5), eps)

    return [of_leaf(leaf, moment) for leaf, moment in zip(leaves, found, strict=True)]
