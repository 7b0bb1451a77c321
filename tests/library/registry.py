"""All strategies, each with what a reference in NumPy needs to know of it; and what laws share.

A new strategy is tested as soon as `@strategy` enters it; the laws that compare with a reference
run over it once it stands here. To see what the laws say of optax:
`CLIP_LIBRARY=optax python -m pytest tests/library -k laws`.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax
from gradclip_jax import Limit, _inject
from gradclip_jax._strategies import spectral_clip
from gradclip_jax._strategies.adaptive_grad_clip import nfnets_axes

Tree = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Strategy:
    """A strategy with one threshold left open, and its groups, norm and limit in plain terms."""

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    groups: Callable[[Tree], dict[str, np.ndarray]]
    """Group number of each element."""
    argument: str = "max_norm"
    order: float = 2
    limit: Callable[[float, np.ndarray, np.ndarray], float] = lambda t, elements, params: t
    """Largest norm of a group, from threshold, elements and params of the group."""
    enlarges: bool = False
    changes_below: bool = False
    """Whether a norm below the limit is changed too, as by smooth responses."""
    drops: bool = False
    units: bool = False
    """Whether groups are smaller than arrays, so that devices must be told what is split."""
    of_matrices: bool = False
    """Whether the norm of a group, which is a matrix, is its largest singular value."""

    def __str__(self) -> str:
        return self.name

    @property
    def needs_params(self) -> bool:
        """Whether its limit is one of the weights."""
        return self.limit is weight_limit

    def vectors(self, tree: Tree) -> list[np.ndarray]:
        """The elements of each group."""
        numbers = self.groups(tree)
        flat = np.concatenate([np.asarray(tree[key]).reshape(-1) for key in sorted(tree)])
        ids = np.concatenate([numbers[key].reshape(-1) for key in sorted(tree)])
        return [flat[ids == i] for i in np.unique(ids)]

    def norms(self, tree: Tree) -> list[float]:
        """The norm of each group, in float64."""
        if self.of_matrices:
            return [norm for key in sorted(tree) for norm in largest_singular_values(tree[key])]
        return [float(np.linalg.norm(wide(vector), self.order)) for vector in self.vectors(tree)]

    def joint_norm(self, tree: Tree) -> float:
        """The norm of a whole tree below its limits, as `metrics` has it, in float64."""
        of_group = [np.linalg.norm(wide(vector), self.order) for vector in self.vectors(tree)]
        # A clip of elements measures the largest. One of matrices bounds singular values by the
        # Frobenius norm as long as that is below the limit, and the largest of these is told.
        largest = self.groups is elements or self.of_matrices
        return float(np.linalg.norm(of_group, np.inf if largest else 2))

    def limits(self, threshold: float, tree: Tree, params: Tree) -> list[float]:
        """The limit of each group."""
        pairs = zip(self.vectors(tree), self.vectors(params), strict=True)
        return [self.limit(threshold, elements, weights) for elements, weights in pairs]


def wide(x: Any) -> np.ndarray:
    """In float64 or complex128."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def largest_singular_values(leaf: Any) -> list[float]:
    """Of each matrix in a stack, in float64; a vector is a matrix of one column."""
    x = wide(leaf)
    x = x.reshape(-1, 1) if x.ndim < 2 else x
    return np.linalg.norm(x, 2, axis=(-2, -1)).ravel().tolist()


def everything(tree: Tree) -> dict[str, np.ndarray]:
    """One group."""
    return {key: np.zeros(np.shape(leaf), int) for key, leaf in tree.items()}


def leaves(tree: Tree) -> dict[str, np.ndarray]:
    """A group for each array."""
    return {key: np.full(np.shape(tree[key]), i) for i, key in enumerate(sorted(tree))}


def elements(tree: Tree) -> dict[str, np.ndarray]:
    """A group for each element."""
    result, start = {}, 0
    for key in sorted(tree):
        size = np.size(tree[key])
        result[key] = np.arange(start, start + size).reshape(np.shape(tree[key]))
        start += size
    return result


def ranks(tree: Tree) -> dict[str, np.ndarray]:
    """A group for vectors and scalars and one for the rest."""
    return {key: np.full(np.shape(leaf), int(np.ndim(leaf) > 1)) for key, leaf in tree.items()}


def units(tree: Tree, axes: Callable[[np.ndarray], tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A group for each unit, which spans `axes`."""
    result, start = {}, 0
    for key in sorted(tree):
        leaf = np.asarray(tree[key])
        kept = [1 if i in axes(leaf) else size for i, size in enumerate(leaf.shape)]
        numbers = np.arange(start, start + int(np.prod(kept))).reshape(kept)
        result[key] = np.broadcast_to(numbers, leaf.shape)
        start += int(np.prod(kept))
    return result


def all_but_last(leaf: np.ndarray) -> tuple[int, ...]:
    """The default axes of a unit: a vector or scalar is one unit."""
    return tuple(range(leaf.ndim)) if leaf.ndim <= 1 else tuple(range(leaf.ndim - 1))


def layer_of_stack(leaf: np.ndarray) -> tuple[int, ...]:
    """The axes 1 and 2 as far as they are there; an array with neither is one unit."""
    return tuple(range(leaf.ndim))[1:3] or tuple(range(leaf.ndim))


def last_two(leaf: np.ndarray) -> tuple[int, ...]:
    """The axes of a matrix in a stack; a vector or scalar is one."""
    return tuple(range(leaf.ndim))[-2:]


def rms_limit(threshold: float, elements: np.ndarray, params: np.ndarray) -> float:
    """The norm of as many elements with the root mean square `threshold`."""
    return threshold * np.sqrt(elements.size)


def weight_limit(threshold: float, elements: np.ndarray, params: np.ndarray) -> float:
    """A fraction of the norm of the weights, or of 1e-3."""
    return threshold * max(float(np.linalg.norm(wide(params))), 1e-3)


def rank_label(tree: Any) -> Any:
    """Labels as in `ranks`."""
    return jax.tree.map(lambda leaf: "matrix" if np.ndim(leaf) > 1 else "vector", tree)


def by_label(threshold: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """Limits in a mapping, of one label for all."""
    return gradclip_jax.clip_by_group_norm({"all": threshold}, labels=lambda tree: "all", **kwargs)


def between(limit: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """Bounds given as a pair."""
    if limit is None:
        return gradclip_jax.clip_by_range(float("-inf"), upper=float("inf"), **kwargs)
    lower = (lambda count: -limit(count)) if callable(limit) else -limit
    return gradclip_jax.clip_by_range(lower, upper=limit, **kwargs)


def responding(response: Any) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """A global clip with another response."""
    return functools.partial(gradclip_jax.clip_by_global_norm, response=response)


def capped(make: Callable[..., Any]) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """An adaptive clip, of which the cap is left open: it holds alone during the warm-up."""

    def build(
        max_norm: Any, *, axis_name: Any = None, on_nonfinite: Any = "zero"
    ) -> optax.GradientTransformationExtraArgs:
        return make(max_norm=max_norm, axis_name=axis_name, on_nonfinite=on_nonfinite)

    return build


def under_cap(adaptive: Any, measure: Any = gradclip_jax.global_norm) -> Callable[..., Any]:
    """The engine with an adaptive limit and a cap, which is left open and holds alone at first."""

    def build(
        limit: Any, *, axis_name: Any = None, on_nonfinite: Any = "zero"
    ) -> optax.GradientTransformationExtraArgs:
        both = gradclip_jax.limits.minimum(adaptive, limit)
        return gradclip_jax.clip_to_limit(
            both, measure=measure, axis_name=axis_name, on_nonfinite=on_nonfinite
        )

    return build


def after_half(make: Callable[..., Any]) -> Callable[..., Any]:
    """A clip that passes its first gradient, when it has seen half of the parameters as one."""

    def build(limit: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        clip = make(**options)

        def init(params: Any) -> Any:
            half = jax.tree.map(lambda x: 0.5 * x, params)
            return clip.update(half, clip.init(params), params)[1]

        return optax.GradientTransformationExtraArgs(init, clip.update)

    return build


def spectral_by_polynomials(
    max_norm: Any, *, axis_name: Any = None, on_nonfinite: Any = "zero"
) -> optax.GradientTransformationExtraArgs:
    """The clip of singular values as accelerators compute it, here on CPU."""
    return spectral_clip._of_matrices(
        max_norm,
        spectral_clip._by_polynomials,
        gradclip_jax.responses.shrink,
        gradclip_jax.responses.shrink,
        axis_name,
        on_nonfinite,
    )


OURS = [
    Strategy("clip_by_global_norm", gradclip_jax.clip_by_global_norm, everything),
    *(
        Strategy(
            f"clip_by_global_norm[order={order}]",
            functools.partial(gradclip_jax.clip_by_global_norm, order=order),
            everything,
            order=order,
        )
        for order in (1, 3, float("inf"))
    ),
    *(
        Strategy(
            f"clip_by_global_norm[{response.__name__}]",
            responding(response),
            everything,
            changes_below=True,
        )
        for response in (
            gradclip_jax.responses.smooth,
            gradclip_jax.responses.smooth_sqrt,
            gradclip_jax.responses.smooth_tanh,
        )
    ),
    Strategy(
        "clip_by_global_norm[drop]", responding(gradclip_jax.responses.drop), everything, drops=True
    ),
    Strategy(
        "clip_by_global_norm[per_layer]",
        functools.partial(gradclip_jax.clip_by_global_norm, per_layer=True),
        everything,
    ),
    Strategy("clip_by_norm", gradclip_jax.clip_by_norm, leaves),
    Strategy(
        "clip_by_unit_norm",
        gradclip_jax.clip_by_unit_norm,
        functools.partial(units, axes=all_but_last),
        units=True,
    ),
    Strategy(
        "clip_by_group_norm",
        functools.partial(gradclip_jax.clip_by_group_norm, labels=rank_label),
        ranks,
    ),
    Strategy("clip_by_group_norm[mapping]", by_label, everything, argument="max_norm['all']"),
    Strategy(
        "clip_by_block_rms",
        gradclip_jax.clip_by_block_rms,
        leaves,
        argument="threshold",
        limit=rms_limit,
    ),
    Strategy(
        "clip_by_block_rms[axes]",
        functools.partial(gradclip_jax.clip_by_block_rms, axes=(1, 2)),
        functools.partial(units, axes=layer_of_stack),
        argument="threshold",
        limit=rms_limit,
        units=True,
    ),
    Strategy(
        "adaptive_grad_clip",
        gradclip_jax.adaptive_grad_clip,
        functools.partial(units, axes=lambda leaf: nfnets_axes("", leaf)),
        argument="clipping",
        limit=weight_limit,
        units=True,
    ),
    Strategy(
        "clip_by_param_norm",
        gradclip_jax.clip_by_param_norm,
        leaves,
        argument="ratio",
        limit=weight_limit,
    ),
    Strategy(
        "clip_by_param_norm[global_norm]",
        functools.partial(gradclip_jax.clip_by_param_norm, measure=gradclip_jax.global_norm),
        everything,
        argument="ratio",
        limit=weight_limit,
    ),
    Strategy(
        "normalize_by_norm",
        gradclip_jax.normalize_by_norm,
        everything,
        enlarges=True,
        changes_below=True,
    ),
    Strategy("zclip", capped(gradclip_jax.zclip), everything),
    *(
        Strategy(name, under_cap(limit), everything, argument="limit")
        for name, limit in {
            "percentile": gradclip_jax.limits.percentile(window=4),
            "median": gradclip_jax.limits.median(window=4),
            "deviation": gradclip_jax.limits.deviation(window=4, min_count=4),
            "ema": gradclip_jax.limits.ema(),
            "running_quantile": gradclip_jax.limits.running_quantile(init=3e38),
        }.items()
    ),
    Strategy(
        "growth",
        under_cap(gradclip_jax.limits.growth(), gradclip_jax.leaf_norms),
        leaves,
        argument="limit",
    ),
    Strategy("clip_by_value", gradclip_jax.clip_by_value, elements, argument="limit"),
    Strategy("clip_by_range", between, elements, argument="upper"),
    Strategy(
        "spectral_clip",
        gradclip_jax.spectral_clip,
        functools.partial(units, axes=last_two),
        of_matrices=True,
    ),
    Strategy(
        "spectral_clip[polynomials]",
        spectral_by_polynomials,
        functools.partial(units, axes=last_two),
        of_matrices=True,
    ),
]


def required_arguments(make: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that a strategy has no default for: 1 for a number, and labels of one group."""
    parameters = inspect.signature(inspect.unwrap(make)).parameters.values()
    known = {"labels": lambda tree: "all", "lower": -1.0, "heads": _each_row}
    return {p.name: known.get(p.name, 1.0) for p in parameters if p.default is p.empty}


def _each_row(path: str, weight: Any) -> gradclip_jax.Heads | None:
    return gradclip_jax.Heads("query_rotary", axis=0) if weight.ndim else None


def without_reference() -> list[Strategy]:
    """What the table of strategies has and `OURS` has not, with its default arguments."""
    known = {strategy.name.split("[")[0] for strategy in OURS}

    def by_default(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda threshold, **options: make(**required_arguments(make), **options)

    return [
        Strategy(name, by_default(make), everything)
        for name, make in _inject.STRATEGIES.items()
        # A guard without a norm, and a clip of weights by logits that no law has.
        if name not in known | {"zero_nonfinite", "qk_clip"}
    ]


def of_optax(make: Callable[..., optax.GradientTransformation], bound: str) -> Any:
    """A clip of optax behind the signature of ours; what it has no argument for is skipped."""

    def build(limit: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        if options:
            pytest.skip(f"optax has no {', '.join(options)}")
        if limit is None:
            pytest.skip("optax has no None for no limit")
        if callable(limit):
            make_scheduled = optax.inject_hyperparams(make)
            return optax.with_extra_args_support(make_scheduled(**{bound: limit}))
        return optax.with_extra_args_support(make(**{bound: limit}))

    return build


OF_OPTAX = [
    Strategy("clip_by_global_norm", of_optax(optax.clip_by_global_norm, "max_norm"), everything),
    Strategy("clip", of_optax(optax.clip, "max_delta"), elements, argument="max_delta"),
    Strategy(
        "clip_by_block_rms",
        of_optax(optax.clip_by_block_rms, "threshold"),
        leaves,
        argument="threshold",
        limit=rms_limit,
    ),
    Strategy(
        "adaptive_grad_clip",
        of_optax(optax.adaptive_grad_clip, "clipping"),
        functools.partial(units, axes=lambda leaf: nfnets_axes("", leaf)),
        argument="clipping",
        limit=weight_limit,
        units=True,
    ),
    Strategy(
        "normalize_by_update_norm",
        of_optax(optax.normalize_by_update_norm, "scale_factor"),
        everything,
        argument="scale_factor",
        enlarges=True,
        changes_below=True,
    ),
]

LIBRARY = os.environ.get("CLIP_LIBRARY", "gradclip_jax")
STRATEGIES = {"gradclip_jax": OURS, "optax": OF_OPTAX}[LIBRARY]
EVERY = STRATEGIES + (without_reference() if LIBRARY == "gradclip_jax" else [])
"""And what `@strategy` entered without a row above: laws that need no reference run over it."""
MORE = (
    [
        Strategy("clippy", functools.partial(gradclip_jax.clippy, absolute=0.01), leaves),
        Strategy("acclip", after_half(gradclip_jax.acclip), leaves),
        Strategy("stable_spam_clip", after_half(gradclip_jax.stable_spam_clip), leaves),
        Strategy("stable_spam_norm", after_half(gradclip_jax.stable_spam_norm), leaves),
    ]
    if LIBRARY == "gradclip_jax"
    else []
)
"""Without a norm that a reference could compare: over devices they are as on one."""
# One of each kind: the engine at global scope, a norm per array, an element, a matrix. Of another
# library nothing is known to be shared.
KINDS = {"clip_by_global_norm", "clip_by_norm", "clip_by_value", "spectral_clip"}
FLOOR = [s for s in STRATEGIES if s.name in KINDS or LIBRARY != "gradclip_jax"]
# And each order and response of the engine: these have derivatives of their own.
FORMULAS = [s for s in STRATEGIES if s in FLOOR or s.enlarges or "global_norm" in s.name]

LIMIT = 0.5
SHAPES = {"kernel": (4, 3), "bias": (3,), "filter": (2, 2, 3, 2), "scale": ()}


def normal_tree(seed: int = 0, scale: float = 1.0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Normal numbers in arrays of rank 0 to 4."""
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: (jax.random.normal(key, shape) * scale).astype(dtype)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


PARAMS = normal_tree(seed=100)


def apply(clip: Any, updates: Any, params: Any = None) -> tuple[Any, Any]:
    """The first update of a clip, and its state."""
    params = updates if params is None else params
    return clip.update(updates, clip.init(params), params)


def at(index: int, tree: Any) -> Any:
    """One entry of each array."""
    return jax.tree.map(lambda x: x[index], tree)


def tolerance(*trees: Any) -> float:
    """A few roundings of the coarsest dtype."""
    return 4 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trees))


def same_avals(a: Any, b: Any) -> bool:
    """Whether two trees are one to a compiled program."""
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type))
    return jax.tree.structure(a) == jax.tree.structure(b) and describe(a) == describe(b)


def seen(state: Any) -> dict[str, jax.Array]:
    """The metrics of a state; the end of a law where a library keeps none."""
    if LIBRARY == "optax":
        pytest.skip("optax keeps no norm")
    return gradclip_jax.metrics(state)


def measured(metrics: Mapping[str, jax.Array]) -> float:
    """The norm before the clip, or what else a clip measured."""
    (value,) = (metrics[key] for key in ("grad_norm", "clip_measure") if key in metrics)
    return float(value)


def public_modules() -> dict[str, ModuleType]:
    """The modules that hold public names of one kind, such as `per_example`."""
    return {
        name: value
        for name, value in vars(gradclip_jax).items()
        if inspect.ismodule(value) and not name.startswith("_")
    }


def public_names() -> dict[str, Any]:
    """All public names and their values: flat ones, and `per_example.clip` of a public module."""
    modules = public_modules()
    places = {"": gradclip_jax} | {f"{name}.": module for name, module in modules.items()}
    return {
        f"{place}{name}": value
        for place, module in places.items()
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


def public_strategies() -> list[str]:
    """Names of the public factories of a clip, read off their annotations; no translations."""
    return [
        name
        for name, value in vars(gradclip_jax).items()
        if inspect.isfunction(value)
        and not name.startswith("from_")
        and "GradientTransformation" in str(inspect.signature(value).return_annotation)
    ]


def public_limits() -> list[str]:
    """Names of the public limits, read off their annotations."""
    return [
        name
        for name, value in vars(gradclip_jax.limits).items()
        if inspect.isfunction(value) and inspect.signature(value).return_annotation is Limit
    ]
