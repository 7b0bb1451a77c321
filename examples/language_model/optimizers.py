"""The clip and the optimizer of a run, by the names of their functions."""

import argparse
import ast
import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradclip_jax
from examples.language_model.command_line import InputError
from examples.language_model.model import measured_by_clip

SCALARS = ("loss", "grad_norm", "clip_limit", "clip_factor", "clipped")


def optimizers() -> dict[str, Callable]:
    """The optimizers of optax whose first argument is a learning rate."""
    return {k: f for k, f in vars(optax).items() if _first_parameter(f) == "learning_rate"}


def strategies() -> list[str]:
    """The clips of gradclip_jax that need nothing but a number."""
    return sorted(name for name, f in vars(gradclip_jax).items() if _is_strategy(name, f))


def limits() -> list[str]:
    """The limits of gradclip_jax.limits that need nothing but numbers."""
    functions = vars(gradclip_jax.limits).items()
    names = {name for name, function in functions if inspect.isfunction(function)}
    return sorted(names - {"minimum", "maximum"})


def _is_strategy(name: str, function: Any) -> bool:
    if not inspect.isfunction(function) or name.startswith("from_"):
        return False
    parameters = inspect.signature(function).parameters
    needed = [p.name for p in parameters.values() if p.default is p.empty]
    # The name of a limit is given instead of `clip_to_limit`.
    others = {"optimizer", "limits"}.intersection(parameters) or name == "clip_to_limit"
    return "on_nonfinite" in parameters and len(needed) < 2 and not others


def build_optimizer(
    args: argparse.Namespace, name: str, steps: int, per_epoch: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The clip `name` in front of the optimizer; refuses names and arguments that do not fit."""
    if args.epoch_divisor:
        start = (args.constant_epochs - 1) * per_epoch
        learning_rate = optax.exponential_decay(
            args.learning_rate, per_epoch, 1 / args.epoch_divisor, start, staircase=True
        )
    else:
        start = round(args.decay_from * steps)
        learning_rate = optax.linear_schedule(args.learning_rate, 0.0, max(steps - start, 1), start)
    keywords = _keywords(args.optimizer_arg, "--optimizer-arg")
    if args.optimizer == "sgd":
        keywords = {"momentum": args.momentum or None, **keywords}
    optimizer = _call("--optimizer", args.optimizer, optimizers(), [learning_rate], keywords)
    chain = optax.chain(build_clip(args, name), optimizer)

    def one_step(params):
        _, state = chain.update(params, chain.init(params), params)
        return measured_by_clip(state)

    try:  # what only fails in use (a missing `value_fn`) should fail before anything is written
        measured = jax.eval_shape(one_step, {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)})
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`--clip` {name} and `--optimizer` {args.optimizer} must work on gradients and "
            f"parameters alone: {_first_line(error)}"
        ) from None
    if not measured.keys() >= {*SCALARS[1:], "clip_count"}:
        raise InputError(f"`--clip` must measure a norm to be logged, got {name}.")
    return chain


def build_clip(args: argparse.Namespace, name: str) -> optax.GradientTransformationExtraArgs:
    """A strategy, a limit on the global norm, or a clip that only measures."""
    if name == "none":
        # It lets everything pass, so that the plots show what the optimizer saw.
        return gradclip_jax.clip_by_global_norm(math.inf, on_nonfinite="propagate")
    limit = getattr(gradclip_jax.limits, name, None)
    arguments = _keywords(args.clip_arg, "--clip-arg")
    needed = _first_parameter(limit or getattr(gradclip_jax, name, None), without_default=True)
    if args.max_norm is not None or (needed and needed not in arguments):
        arguments["threshold"] = 5.0 if args.max_norm is None else args.max_norm
    config = {"method": name, **arguments}
    try:
        return gradclip_jax.from_config(
            {"method": "clip_to_limit", "limit": config} if limit else config
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"`--clip` must be a clip, got {name}: {_first_line(error)}") from None


def _first_parameter(function: Any, without_default: bool = False) -> str | None:
    if not inspect.isfunction(function):
        return None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            return None
        has_default = parameter.default is not parameter.empty
        return None if without_default and has_default else parameter.name
    return None


def _call(option: str, name: str, known: dict[str, Callable], arguments: list, keywords: dict):
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "none"], n=3, cutoff=0.4) or sorted(known)
        raise InputError(
            f"`{option}` must be a known name, got {name!r}; nearest: {', '.join(near)}."
        )
    try:
        return known[name](*arguments, **keywords)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`{option}` {name} takes {inspect.signature(known[name])}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _keywords(pairs: list[str], option: str) -> dict[str, Any]:
    keywords = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise InputError(f"`{option}` must look like key=value, got {pair!r}.")
        try:
            keywords[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            # Not a Python value: infinity, or a word such as the name of a response.
            keywords[key] = {"inf": math.inf, "nan": math.nan}.get(value, value)
    return keywords
