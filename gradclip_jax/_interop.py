"""Clips by the arguments of other frameworks, and from configs."""

import difflib
import functools
import importlib
import inspect
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ._checks import Threshold, check_number, check_threshold
from ._clip import clip_to_limit
from ._devices import AxisName
from ._guards import zero_nonfinite
from ._limits import constant, maximum, minimum
from ._limits.ema import ema
from ._limits.growth import growth
from ._limits.median import median
from ._limits.percentile import percentile
from ._limits.quantile import quantile
from ._limits.zscore import zscore
from ._norms import global_norm, group_norms, leaf_norms, unit_norms
from ._rescale import (
    OnNonfinite,
    Response,
    drop,
    normalize,
    shrink,
    smooth,
    smooth_sqrt,
    smooth_tanh,
)
from ._state import ClipState
from ._strategies.adagc import adagc
from ._strategies.adaptive_grad_clip import adaptive_grad_clip
from ._strategies.autoclip import autoclip
from ._strategies.clip_by_block_rms import clip_by_block_rms
from ._strategies.clip_by_dual_norm import (
    clip_by_dual_norm,
    euclidean_ball,
    exact_spectral_ball,
    newton_schulz_ball,
    sign_ball,
    spectral_ball,
)
from ._strategies.clip_by_global_norm import clip_by_global_norm
from ._strategies.clip_by_group_norm import clip_by_group_norm
from ._strategies.clip_by_norm import clip_by_norm
from ._strategies.clip_by_unit_norm import clip_by_unit_norm
from ._strategies.clip_by_value import clip_by_value
from ._strategies.ema_clip import ema_clip
from ._strategies.limit_norm_growth import limit_norm_growth
from ._strategies.median_clip import median_clip
from ._strategies.normalize_by_norm import normalize_by_norm
from ._strategies.percentile_clip import percentile_clip
from ._strategies.quantile_clip import quantile_clip
from ._strategies.spam_clip import spam_clip
from ._strategies.spectral_clip import soft_spectral_clip, spectral_clip
from ._strategies.zclip import zclip


def from_torch(
    max_norm: Threshold,
    norm_type: float | str = 2,
    error_if_nonfinite: bool = False,
    eps: float = 1e-6,
    *,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""The clip of `torch.nn.utils.clip_grad_norm_`, by its arguments and with its numbers.

    $$ g \leftarrow g \cdot \min\!\Big(1, \frac{\text{max\_norm}}{\lVert g \rVert_p +
       \epsilon}\Big) $$

    For a training loop that comes from PyTorch and should go on as it was. What is new, begin
    with `clip_by_global_norm(max_norm)`: without epsilon, and a NaN cannot spread.

    Args:
      max_norm: Largest norm that passes, non-negative; a number or a schedule, see
        `clip_by_global_norm`. (PyTorch takes a negative one and goes uphill.)
      norm_type: Order p of the norm, at least 1; `inf` or `"inf"` for the largest modulus.
      error_if_nonfinite: Raise RuntimeError for a norm that is NaN or infinite. An eager update
        waits for the norm at every step, as PyTorch does. A compiled one raises through a host
        callback in a branch that is taken only then: the error (`jax.errors.JaxRuntimeError`,
        which is a RuntimeError) comes where a result of that step is waited for, and what was
        donated to it is lost. Each call of such a program starts 0.14 ms later (jax 0.10.2, one
        CPU device), and it cannot be exported nor kept in the persistent compilation cache.
      eps: Added to the norm, finite and non-negative; PyTorch has 1e-6, so at a norm of `max_norm`
        the factor is a little below 1. 0 for none.
      axis_name: See `global_norm`.
      on_nonfinite: See `clip_to_limit`. `"propagate"` is nearest to PyTorch: a NaN makes all
        gradients NaN there and here; after an infinite element PyTorch has NaN in its place and 0
        elsewhere, here all are NaN.

    Returns:
      A transformation with a `ClipState`; what PyTorch returns is `grad_norm` in
      `metrics(opt_state)`. Norms whose squares overflow are right here and infinite there, and of
      half-precision gradients norm and factor are float32 here and half precision there.

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
    gradient_clip_algorithm: Literal["norm", "value"] | None = "norm",
    *,
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
    >>> clip = gradclip_jax.from_lightning(0.5, "value")
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


def from_config(
    config: Mapping[str, Any] | str | os.PathLike[str],
) -> optax.GradientTransformationExtraArgs:
    """The clip that a config describes: a strategy by its name, with its own argument names.

    | in the config | is |
    |---|---|
    | `"method"` | the name of a strategy, or `clip_to_limit` |
    | `"threshold"` | its first argument, whatever its name |
    | `"limit"`, `"a"`, `"b"` | a number, or a limit: `{"method": "percentile", "window": 64}` |
    | `"measure"`, `"response"` | a name, or with arguments `{"method": "unit_norms", "axes": 1}` |
    | `"ball"` | the name of a ball, or a dict of them |
    | a number | or a string of one that has an exponent, as YAML reads `1e-3`, or is infinite |
    | a threshold | also a schedule of optax: `{"schedule": "linear", "init_value": 9.0, …}` |
    | a list | a tuple |

    Args:
      config: A dict, or the path of a `.json`, `.yaml` or `.yml` file with one (YAML needs PyYAML).

    Returns:
      What the strategy returns.

    Raises:
      ValueError: For a method, a key or a name that does not exist, with the nearest that do; for
        two keys of one argument, an argument that is missing, or one that the strategy refuses;
        for a file that is damaged; for one nested more than 100 levels deep, as a YAML alias is
        that holds itself.
      FileNotFoundError: For a file that does not exist.
      ImportError: For a YAML file without PyYAML.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.from_config({"method": "clip_by_norm", "threshold": 1.0})
    >>> soft = gradclip_jax.from_config({
    ...     "method": "clip_to_limit",
    ...     "limit": {"method": "minimum", "a": {"method": "percentile", "window": 64}, "b": 1.0},
    ...     "measure": "leaf_norms",
    ...     "response": "smooth",
    ... })
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["w"], updates["b"])
    [0.6 0.8] [0.5]
    """
    where = "`config`"
    if not isinstance(config, Mapping):
        where, config = f"`config`: {str(config)!r}", _read(config)
    _check_depth(config, where)
    method = config.get("method") if isinstance(config, Mapping) else None
    if isinstance(method, str) and method in ADVICE:
        raise ValueError(f"`{method}` {ADVICE[method]}")
    return _called(config, STRATEGIES, "strategy", "config")


def _named(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {function.__name__: function for function in functions}


STRATEGIES = _named(
    adagc,
    adaptive_grad_clip,
    autoclip,
    clip_by_block_rms,
    clip_by_dual_norm,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_norm,
    clip_by_unit_norm,
    clip_by_value,
    clip_to_limit,
    ema_clip,
    limit_norm_growth,
    median_clip,
    normalize_by_norm,
    percentile_clip,
    quantile_clip,
    soft_spectral_clip,
    spam_clip,
    spectral_clip,
    zclip,
    zero_nonfinite,
)
LIMITS = _named(constant, ema, growth, maximum, median, minimum, percentile, quantile, zscore)
MEASURES = _named(global_norm, group_norms, leaf_norms, unit_norms)
RESPONSES = _named(drop, normalize, shrink, smooth, smooth_sqrt, smooth_tanh)
BALLS = {
    "euclidean_ball": euclidean_ball,
    "exact_spectral_ball": exact_spectral_ball,
    "newton_schulz_ball": newton_schulz_ball,
    "sign_ball": sign_ball,
    "spectral_ball": spectral_ball,
}
SCHEDULES = {
    name.removesuffix("_schedule"): name
    for name in dir(optax)
    if name == "exponential_decay" or (name.endswith("_schedule") and name != "scale_by_schedule")
}
OF_OPTIMIZER = "wraps an optimizer and is no clip: `{}(optax.chain(from_config(…), optimizer))`."
OF_CLIP = "wraps a clip and is none itself: `{}(from_config(…))`."
OF_LIMIT = 'is a limit: {{"method": "clip_to_limit", "limit": {{"method": "{}"}}}}.'
ADVICE = {
    name: advice.format(name)
    for advice, names in {
        OF_OPTIMIZER: ("skip_nonfinite", "skip_spikes"),
        OF_CLIP: ("clip21", "error_feedback"),
        OF_LIMIT: LIMITS,
    }.items()
    for name in names
}


def _called(entry: Any, known: Mapping[str, Callable[..., Any]], kind: str, where: str) -> Any:
    """What an entry of a config describes: a function by its name, called."""
    make, arguments = _chosen(entry, known, kind, where)
    signature = inspect.signature(inspect.unwrap(make)).parameters
    first = next(iter(signature), None)
    if "threshold" in arguments and "threshold" not in signature and first:
        if first in arguments:
            raise ValueError(
                f"`{where}` must have `threshold` or `{first}`, not both: for `{make.__name__}` "
                "they are the same."
            )
        arguments = {first: arguments.pop("threshold"), **arguments}
    return make(**_arguments(make, arguments, list(signature), where))


def _chosen(
    entry: Any, known: Mapping[str, Callable[..., Any]], kind: str, where: str
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that an entry names, and the arguments beside the name."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"`{where}` must be a dict with a `method`, got {entry!r}.")
    if "method" not in entry:
        raise ValueError(f"`{where}` must have a key `method`, has {_listed(entry)}.")
    arguments = dict(entry)
    return known[_checked(arguments.pop("method"), known, kind, where)], arguments


def _arguments(
    make: Callable[..., Any], arguments: Mapping[str, Any], names: list[str], where: str
) -> dict[str, Any]:
    """Arguments as the function takes them, from what a config can say."""
    signature = inspect.signature(inspect.unwrap(make)).parameters
    for name in arguments:
        _checked(name, names, f"argument of `{make.__name__}`", where)
    for name in names:
        if signature[name].default is inspect.Parameter.empty and name not in arguments:
            raise ValueError(f"`{where}` must have a `{name}`, which `{make.__name__}` needs.")
    return {name: _value(name, value, f"{where}.{name}") for name, value in arguments.items()}


def _value(name: str, value: Any, where: str) -> Any:
    """The value of one argument."""
    match name:
        case "labels" | "on_nonfinite":
            return value
        case "axis_name":
            return tuple(value) if isinstance(value, list) else value
        case "limit" | "a" | "b" if isinstance(value, Mapping) and "schedule" not in value:
            return _called(value, LIMITS, "limit", where)
        case "measure":
            return _function(value, MEASURES, name, where)
        case "response":
            return _function(value, RESPONSES, name, where)
        case "ball" if isinstance(value, str):
            return BALLS[_checked(value, BALLS, name, where)]
    if isinstance(value, Mapping) and "schedule" in value:
        return _schedule(value, where)
    if isinstance(value, Mapping):  # one for each label or array
        return {key: _value(name, each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list):
        return tuple(_value(name, each, where) for each in value)
    return _number(value, where)


def _function(value: Any, known: Mapping[str, Callable[..., Any]], kind: str, where: str) -> Any:
    """A measure or response, by its name or with keyword arguments bound."""
    if callable(value):
        return value
    if isinstance(value, str):
        return known[_checked(value, known, kind, where)]
    function, arguments = _chosen(value, known, kind, where)
    signature = inspect.signature(function).parameters
    # A clip hands its own axes to the measure.
    names = [p.name for p in signature.values() if p.kind is p.KEYWORD_ONLY]
    names = [name for name in names if name != "axis_name"]
    return functools.partial(function, **_arguments(function, arguments, names, where))


def _schedule(entry: Mapping[str, Any], where: str) -> optax.Schedule:
    """A schedule of optax, its name with `_schedule` at the end or without."""
    arguments = dict(entry)
    name = str(arguments.pop("schedule")).removesuffix("_schedule")
    make = getattr(optax, SCHEDULES[_checked(name, SCHEDULES, "schedule", where)])
    values = _arguments(make, arguments, list(inspect.signature(make).parameters), where)
    if isinstance(values.get("boundaries_and_scales"), dict):
        # The keys of JSON are strings.
        scales = values["boundaries_and_scales"].items()
        steps = {int(step) if str(step).isdigit() else step: scale for step, scale in scales}
        values["boundaries_and_scales"] = steps
    return make(**values)


def _number(value: Any, where: str) -> Any:
    """A number that YAML or JSON can only say as a string, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if "e" in value.lower() or not math.isfinite(number):
        return number
    raise ValueError(f"`{where}` must be a number, got the string {value!r}: leave out the quotes.")


def _checked(name: Any, known: Iterable[str], kind: str, where: str) -> str:
    """Return a name that is known; else raise, with the nearest that are."""
    names = list(known)
    if isinstance(name, str) and name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    raise ValueError(
        f"`{where}`: {name!r} is no {kind}; "
        + (f"the nearest are {_listed(near)}." if near else f"there are {_listed(names)}.")
    )


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _read(path: Any) -> Any:
    """What a JSON or YAML file holds."""
    suffix = Path(path).suffix.lower() if isinstance(path, str | os.PathLike) else ""
    if suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(
            "`config` must be a dict, or the path of a `.json`, `.yaml` or `.yml` file, "
            f"got {path!r}."
        )
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        there = [each.name for each in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
        nearest = f"; the nearest there are {_listed(near)}" if near else ""
        raise FileNotFoundError(f"`config` must be a file that exists, got {str(path)!r}{nearest}.")
    try:
        text = path.read_text(encoding="utf-8")
        if suffix == ".json":
            return json.loads(text)
    except RecursionError:
        raise _too_deep(f"`config`: {str(path)!r}") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"`config`: {str(path)!r} is no JSON: {error}.") from error
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise ImportError(
            f"`config`: to read {str(path)!r} PyYAML must be installed (`pip install pyyaml`); "
            "a `.json` file needs nothing."
        ) from error
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise _too_deep(f"`config`: {str(path)!r}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"`config`: {str(path)!r} is no YAML: {error}.") from error


DEEPEST = 100


def _check_depth(config: Any, where: str) -> None:
    """Raise for what holds itself, and what is nested so deeply that Python gives up."""
    level = [config] if isinstance(config, Mapping | list) else []
    for _ in range(DEEPEST):
        # What is there twice, as a YAML alias, is looked at once.
        inner = {
            id(value): value
            for each in level
            for value in (each.values() if isinstance(each, Mapping) else each)
            if isinstance(value, Mapping | list | tuple)
        }
        if not (level := list(inner.values())):
            return
    raise _too_deep(where)


def _too_deep(where: str) -> ValueError:
    return ValueError(
        f"{where} must be nested at most {DEEPEST} levels deep, got more: has it an alias of what "
        "holds that alias?"
    )


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
            f"got {norm_type!r}: below 1 it is no norm."
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

    def update(updates, state, params=None, **extra_args):
        held = clip.update(updates, state, params, **extra_args)
        updates, state = cast(tuple[Any, ClipState], held)
        norm = state.grad_norm
        if isinstance(norm, Tracer):
            # A debug callback, because nothing waits for its result: a pure one that raises leaves
            # other devices waiting for ever. In a branch, because the host is slow.
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
