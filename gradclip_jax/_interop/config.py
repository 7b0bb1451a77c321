"""A clip from a config: a dict, or a JSON or YAML file."""

import difflib
import fnmatch
import functools
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import optax

from .. import _balls
from .._guards import clip_update_rms, skip_nonfinite, skip_spikes
from .._inject import STRATEGIES
from .._limits import constant, maximum, minimum
from .._limits.deviation import deviation
from .._limits.ema import ema
from .._limits.growth import growth
from .._limits.median import median
from .._limits.percentile import percentile
from .._limits.running_quantile import running_quantile
from .._limits.zscore import zscore
from .._norms import global_norm, group_norms, leaf_norms, unit_norms
from .._rescale import drop, normalize, shrink, smooth, smooth_sqrt, smooth_tanh
from .._strategies.heads import Heads


def from_config(
    config: Mapping[str, Any] | str | os.PathLike[str],
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The clip that a config describes: a strategy by its name, with its own argument names.

    | in the config | is |
    |---|---|
    | `"method"` | the name of a strategy, or `clip_to_limit` |
    | `"threshold"` | its first argument, whatever its name |
    | `"limit"`, `"a"`, `"grad_norm"` … | a number, or a limit: `{"method": "ema", "k": 6}` |
    | `"measure"`, `"response"` | a name, or with arguments `{"method": "unit_norms", "axes": 1}` |
    | `"ball"` | the name of a ball, or a dict of them |
    | `"heads"` | a dict of patterns: `{"*/query/kernel": {"role": "query", "axis": 1}, …}` |
    | a number | or a string of one that has an exponent, as YAML reads `1e-3`, or is infinite |
    | a threshold | also a schedule of optax: `{"schedule": "linear", "init_value": 9.0, …}` |
    | a list | a tuple |

    Args:
      config: A dict, or the path of a `.json`, `.yaml` or `.yml` file with one (YAML needs PyYAML).
      optimizer: None, or what `skip_spikes`, `skip_nonfinite` or `clip_update_rms` is around.

    Returns:
      What the strategy returns.

    Raises:
      ValueError: For a method, a key or a name that does not exist, with the nearest that do; for
        two keys of one argument, an argument that is missing, or one that the strategy refuses;
        for a file that is damaged, or nested more than 100 levels deep.
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
    if optimizer is not None:
        if not (isinstance(config, Mapping) and isinstance(method, str) and method in GUARDS):
            raise ValueError(
                f"`optimizer` must be None unless a guard ({_listed(GUARDS)}) wraps it, got a "
                f"config of {method!r}: `optax.chain(from_config(…), optimizer)`."
            )
        return _called({**config, "optimizer": optimizer}, GUARDS, "guard", "config")
    if isinstance(method, str) and method in ADVICE:
        raise ValueError(f"`{method}` {ADVICE[method]}")
    return _called(config, STRATEGIES, "strategy", "config")


def _by_name(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {function.__name__: function for function in functions}


LIMITS = _by_name(
    constant,
    deviation,
    ema,
    growth,
    maximum,
    median,
    minimum,
    percentile,
    running_quantile,
    zscore,
)
GUARDS = _by_name(clip_update_rms, skip_nonfinite, skip_spikes)
MEASURES = _by_name(global_norm, group_norms, leaf_norms, unit_norms)
RESPONSES = _by_name(drop, normalize, shrink, smooth, smooth_sqrt, smooth_tanh)
BALLS = {name: ball for name, ball in vars(_balls).items() if isinstance(ball, _balls.Ball)}
SCHEDULES = {
    name.removesuffix("_schedule"): name
    for name in dir(optax)
    if name == "exponential_decay" or (name.endswith("_schedule") and name != "scale_by_schedule")
}
OF_OPTIMIZER = "wraps an optimizer and is not a clip: `from_config(…, optimizer)`."
OF_CLIP = "wraps a clip and is not one itself: `{}(from_config(…))`."
OF_LIMIT = 'is a limit: {{"method": "clip_to_limit", "limit": {{"method": "{}"}}}}.'
ADVICE = {
    name: advice.format(name)
    for advice, names in {
        OF_OPTIMIZER: GUARDS,
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
    """The function that an entry names, and its arguments."""
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
        case "limit" | "a" | "b" | "grad_norm" | "loss" if (
            isinstance(value, Mapping) and "schedule" not in value
        ):
            return _called(value, LIMITS, "limit", where)
        case "measure":
            return _function(value, MEASURES, name, where)
        case "response":
            return _function(value, RESPONSES, name, where)
        case "heads" if isinstance(value, Mapping):
            return _heads(value, where)
        case "ball" if isinstance(value, str):
            return BALLS[_checked(value, BALLS, name, where)]
        case _:
            pass
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


def _heads(patterns: Mapping[str, Any], where: str) -> Callable[[str, Any], list[Heads]]:
    """A function of path and weight, from the `Heads` of each pattern of paths."""
    fields = list(inspect.signature(Heads).parameters)
    named: dict[str, list[Heads]] = {}
    for pattern, given in patterns.items():
        entries, place = given if isinstance(given, list) else [given], f"{where}.{pattern}"
        named[pattern] = []
        for entry in entries:
            if not isinstance(entry, Mapping):
                raise ValueError(f"`{place}` must be a dict with `role` and `axis`, got {entry!r}.")
            values = _arguments(Heads, entry, fields, place)
            # The keys of JSON are strings, and it has no slices.
            values["part"] = {
                int(axis): slice(*of) if isinstance(of, tuple) else of
                for axis, of in values.get("part", {}).items()
            }
            named[pattern].append(Heads(**values))

    def heads(path: str, weight: Any) -> list[Heads]:
        del weight
        matching = [of for pattern, of in named.items() if fnmatch.fnmatchcase(path, pattern)]
        return [entry for entries in matching for entry in entries]

    return heads


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
        f"`{where}`: unknown {kind} {name!r}; "
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
        raise ValueError(f"`config`: {str(path)!r} is not valid JSON: {error}.") from error
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
        raise ValueError(f"`config`: {str(path)!r} is not valid YAML: {error}.") from error


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
