"""Write what PyTorch, TensorFlow, Keras and optax do to small gradients: one JSON file for each.

A fifth, `edges.json`, has what PyTorch and Keras do where a number is not finite, overflows or
switches the clip off: `python make_reference.py edges` writes it alone.

Run by hand, with the frameworks installed beside (``make reference`` says how). The tests read the
files only. Each file is ``{"versions": {package: version}, "cases": [case, …]}``, and a case is

* ``framework``, ``function``: whose result it is, for example ``torch``, ``clip_grad_norm_``;
* ``scale``: where the gradients lie: ``zero``, ``far below``, ``at``, ``above``, ``far above`` the
  limit (``at``: equal to it, without rounding), or ``tiny limit``; of an edge, what is odd;
* ``arguments``: what the function was given, under its own names; ``axes`` is per array;
* ``updates``, and ``params`` where they are read: ``{name: nested list}``;
* ``expected``: the result, ``{name: nested list}``, or ``error``: the type that is raised;
* ``norm``: the total norm, where the function returns one.

All arrays are float32, and a number is the shortest decimal that gives the same float32 again;
those that JSON does not have are ``"nan"``, ``"inf"`` and ``"-inf"``.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Tree = dict[str, np.ndarray]

# A dense kernel, a bias, a convolution (height, width, in, out) and a scalar.
SHAPES = {"matrix": (2, 3), "vector": (3,), "conv": (2, 2, 1, 2), "scalar": ()}

# The gradients with which a norm equals its limit without rounding: over all of them the 1-norm is
# 44, the 2-norm 12, the 3-norm 8, the largest 5; the vector, the scalar and the first column of the
# matrix have a 2-norm of 5.
EXACT: Tree = {
    "matrix": np.array([[3, -2, 0], [4, 1, 2]], np.float32),
    "vector": np.array([3, -4, 0], np.float32),
    "conv": np.array([2, -3, 3, 0, -4, 3, -2, -3], np.float32).reshape(SHAPES["conv"]),
    "scalar": np.array(-5, np.float32),
}

SCALES = {"zero": 0.0, "far below": 1e-3, "above": 1.001, "far above": 1e4}


def seeded(seed: int) -> Tree:
    """Draw a tree of standard normal numbers."""
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(random.normal(size=shape), np.float32) for name, shape in SHAPES.items()
    }


def scaled(tree: Tree, factor: float) -> Tree:
    """Multiply a tree by a number, with one rounding and no negative zeros."""
    return {name: np.asarray(np.float64(x) * factor + 0.0, np.float32) for name, x in tree.items()}


def trees(measure: Callable[[Tree], float], limit: float) -> Iterator[tuple[str, Tree]]:
    """Yield seeded gradients whose measure lies below and above a limit."""
    base = seeded(0)
    for scale, factor in SCALES.items():
        yield scale, scaled(base, factor * limit / measure(base))


def norm(tree: Tree, order: float = 2) -> float:
    """Measure a whole tree."""
    flat = np.concatenate([x.ravel() for x in tree.values()]).astype(np.float64)
    return float(np.linalg.norm(flat, order))


def largest(tree: Tree) -> float:
    """Measure the largest element."""
    return norm(tree, np.inf)


def largest_leaf(tree: Tree) -> float:
    """Measure the largest norm of one array."""
    return max(norm({name: x}) for name, x in tree.items())


def largest_rms(tree: Tree) -> float:
    """Measure the largest root mean square of one array."""
    return max(norm({name: x}) / x.size**0.5 for name, x in tree.items())


def largest_unit(axes: dict[str, tuple[int, ...]]) -> Callable[[Tree], float]:
    """Measure the largest norm over some axes of each array."""

    def measure(tree: Tree) -> float:
        squares = (np.sum(tree[name].astype(np.float64) ** 2, axes[name]) for name in axes)
        return max(float(np.sqrt(square).max()) for square in squares)

    return measure


def case(
    framework: str,
    function: str,
    scale: str,
    arguments: dict[str, Any],
    updates: Tree,
    expected: Tree,
    **rest: Any,
) -> dict[str, Any]:
    """Put one case together, in the order in which it is read."""
    return {
        "framework": framework,
        "function": function,
        "scale": scale,
        "arguments": arguments,
        "updates": updates,
        **rest,
        "expected": expected,
    }


def torch_cases() -> Iterator[dict[str, Any]]:
    """Run torch.nn.utils.clip_grad_norm_ and clip_grad_value_."""
    import torch

    def parameters(updates: Tree) -> list[Any]:
        result = []
        for x in updates.values():
            result.append(torch.nn.Parameter(torch.zeros(x.shape)))
            result[-1].grad = torch.tensor(x)
        return result

    def gradients(updates: Tree, parameters: list[Any]) -> Tree:
        return {name: p.grad.numpy() for name, p in zip(updates, parameters, strict=True)}

    for order, exact in [(1.0, 44.0), (2.0, 12.0), (3.0, 8.0), (np.inf, 5.0)]:
        runs = [(scale, 1.5, tree) for scale, tree in trees(lambda t, p=order: norm(t, p), 1.5)]
        runs.insert(2, ("at", exact, EXACT))
        if order == 2:  # where the 1e-6 that PyTorch adds to the norm is seen
            runs.append(("tiny limit", 0.01, {"scalar": np.array(0.05, np.float32)}))
        for scale, limit, updates in runs:
            leaves = parameters(updates)
            total = torch.nn.utils.clip_grad_norm_(leaves, limit, norm_type=order)
            arguments = {"max_norm": limit, "norm_type": "inf" if order == np.inf else order}
            yield case(
                "torch",
                "clip_grad_norm_",
                scale,
                arguments,
                updates,
                gradients(updates, leaves),
                norm=total.numpy(),
            )

    runs = [(scale, 0.5, tree) for scale, tree in trees(largest, 0.5)]
    runs.insert(2, ("at", 5.0, EXACT))
    for scale, limit, updates in runs:
        leaves = parameters(updates)
        torch.nn.utils.clip_grad_value_(leaves, limit)
        expected = gradients(updates, leaves)
        yield case("torch", "clip_grad_value_", scale, {"clip_value": limit}, updates, expected)


def tensorflow_cases() -> Iterator[dict[str, Any]]:
    """Run tf.clip_by_value, tf.clip_by_norm and tf.clip_by_global_norm."""
    import tensorflow as tf

    for scale, updates in [*trees(largest, 0.5), ("at", scaled(EXACT, 0.1))]:
        for low, high in [(-0.5, 0.5), (-0.125, 0.5)]:
            expected = {
                name: tf.clip_by_value(tf.constant(x), low, high).numpy()
                for name, x in updates.items()
            }
            arguments = {"clip_value_min": low, "clip_value_max": high}
            yield case("tensorflow", "clip_by_value", scale, arguments, updates, expected)

    runs = [(scale, 1.5, tree) for scale, tree in trees(largest_leaf, 1.5)]
    for scale, limit, updates in [*runs, ("at", 5.0, EXACT)]:
        expected = {name: tf.clip_by_norm(x, limit).numpy() for name, x in updates.items()}
        yield case("tensorflow", "clip_by_norm", scale, {"clip_norm": limit}, updates, expected)

    all_but_last = {"matrix": (0,), "conv": (0, 1, 2)}
    first = {"matrix": (0,), "vector": (0,), "conv": (0,)}
    last = {"matrix": (1,), "vector": (0,), "conv": (3,)}
    for axes in all_but_last, first, last:
        runs = [(scale, 1.5, tree) for scale, tree in trees(largest_unit(axes), 1.5)]
        for scale, limit, tree in [*runs, ("at", 5.0, EXACT)]:
            updates = {name: tree[name] for name in axes}
            expected = {
                name: tf.clip_by_norm(x, limit, axes=list(axes[name])).numpy()
                for name, x in updates.items()
            }
            arguments = {"clip_norm": limit, "axes": axes}
            yield case("tensorflow", "clip_by_norm", scale, arguments, updates, expected)

    runs = [(scale, 1.5, tree) for scale, tree in trees(norm, 1.5)]
    for scale, limit, updates in [*runs, ("at", 12.0, EXACT)]:
        clipped, total = tf.clip_by_global_norm(list(updates.values()), limit)
        expected = {name: x.numpy() for name, x in zip(updates, clipped, strict=True)}
        arguments = {"clip_norm": limit}
        yield case(
            "tensorflow",
            "clip_by_global_norm",
            scale,
            arguments,
            updates,
            expected,
            norm=total.numpy(),
        )


def keras_cases() -> Iterator[dict[str, Any]]:
    """Take one step of keras.optimizers.SGD from zero, with a learning rate of one."""
    import keras

    for argument, measure, exact in [
        ("clipvalue", largest, 5.0),
        ("clipnorm", largest_leaf, 5.0),
        ("global_clipnorm", norm, 12.0),
    ]:
        runs = [(scale, 1.5, tree) for scale, tree in trees(measure, 1.5)]
        for scale, limit, updates in [*runs, ("at", exact, EXACT)]:
            variables = [keras.Variable(np.zeros_like(x)) for x in updates.values()]
            optimizer = keras.optimizers.SGD(learning_rate=1.0, **{argument: limit})
            gradients = [keras.ops.convert_to_tensor(x) for x in updates.values()]
            optimizer.apply(gradients, variables)
            steps = (0.0 - keras.ops.convert_to_numpy(variable) for variable in variables)
            expected = dict(zip(updates, steps, strict=True))
            yield case("keras", "SGD", scale, {argument: limit}, updates, expected)


def optax_cases() -> Iterator[dict[str, Any]]:
    """Run the clips of optax where they are right: on finite and moderate gradients."""
    import jax
    import optax

    def run(name: str, scale: str, arguments: dict[str, Any], updates: Tree, **rest: Tree) -> Any:
        clip = getattr(optax, name)(**arguments)
        params = rest.get("params")
        expected, _ = clip.update(updates, clip.init(params or updates), params)
        return case("optax", name, scale, arguments, updates, jax.device_get(expected), **rest)

    for name, argument, measure, exact in [
        ("clip", "max_delta", largest, 5.0),
        ("clip_by_global_norm", "max_norm", norm, 12.0),
        ("clip_by_block_rms", "threshold", largest_rms, 5.0),
    ]:
        runs = [(scale, 1.5, tree) for scale, tree in trees(measure, 1.5)]
        for scale, limit, updates in [*runs, ("at", exact, EXACT)]:
            yield run(name, scale, {argument: limit}, updates)

    for factor in 1.0, 2.5:
        for scale, updates in trees(norm, 1.5):
            yield run("normalize_by_update_norm", scale, {"scale_factor": factor}, updates)

    params = seeded(1)
    without = {**params, "vector": np.zeros_like(params["vector"])}  # its limit comes from eps
    axes = {"matrix": (0,), "vector": (0,), "conv": (0, 1, 2), "scalar": ()}
    for scale, updates in trees(largest_unit(axes), 0.25):
        yield run("adaptive_grad_clip", scale, {"clipping": 0.25}, updates, params=params)
        arguments = {"clipping": 0.25, "eps": 0.5}
        yield run("adaptive_grad_clip", scale, arguments, updates, params=without)
    params = scaled(EXACT, 4)
    yield run("adaptive_grad_clip", "at", {"clipping": 0.25}, EXACT, params=params)


# Two arrays, of which one has what is odd.
ODD: dict[str, Tree] = {
    odd: {"odd": np.array(x, np.float32), "plain": np.array([3, -4], np.float32)}
    for odd, x in {
        "nan": [np.nan, 1],
        "inf": [np.inf, 1],
        "-inf": [-np.inf, 1],
        "overflow": [3e20, 4e20],  # the norm is 5e20, and its square is not a float32
        "zero array": [0, 0],
        "finite": [6, 8],
    }.items()
}


def edge_cases() -> Iterator[dict[str, Any]]:
    """Run PyTorch and Keras where a number is not finite, overflows, or switches the clip off."""
    import keras
    import torch

    def of_torch(odd: str, name: str, **arguments: Any) -> dict[str, Any]:
        leaves = []
        for x in ODD[odd].values():
            leaves.append(torch.nn.Parameter(torch.zeros(x.shape)))
            leaves[-1].grad = torch.tensor(x)
        try:
            total = getattr(torch.nn.utils, name)(leaves, **arguments)
        except RuntimeError as error:
            entry = case("torch", name, odd, arguments, ODD[odd], {})
            del entry["expected"]
            return {**entry, "error": type(error).__name__}
        expected = {key: x.grad.numpy() for key, x in zip(ODD[odd], leaves, strict=True)}
        rest = {} if total is None else {"norm": total.numpy()}
        return case("torch", name, odd, arguments, ODD[odd], expected, **rest)

    def of_keras(odd: str, **arguments: Any) -> dict[str, Any]:
        variables = [keras.Variable(np.zeros_like(x)) for x in ODD[odd].values()]
        optimizer = keras.optimizers.SGD(learning_rate=1.0, **arguments)
        optimizer.apply([keras.ops.convert_to_tensor(x) for x in ODD[odd].values()], variables)
        steps = [0.0 - keras.ops.convert_to_numpy(variable) for variable in variables]
        return case(
            "keras", "SGD", odd, arguments, ODD[odd], dict(zip(ODD[odd], steps, strict=True))
        )

    for odd in ODD:
        for order in (2.0, "inf"):
            yield of_torch(odd, "clip_grad_norm_", max_norm=1.0, norm_type=order)
        yield of_torch(odd, "clip_grad_norm_", max_norm=1.0, error_if_nonfinite=True)
        yield of_torch(odd, "clip_grad_value_", clip_value=1.0)
        for argument in ("clipnorm", "clipvalue", "global_clipnorm"):
            yield of_keras(odd, **{argument: 1.0})
    for odd in ("zero array", "finite"):
        for limit in (0.0, "inf"):
            yield of_torch(odd, "clip_grad_norm_", max_norm=float(limit))
        yield of_keras(odd)
        for argument in ("clipnorm", "clipvalue", "global_clipnorm"):
            for limit in (0.0, -1.0):
                yield of_keras(odd, **{argument: limit})


def plain(value: Any) -> Any:
    """Turn float32 arrays into lists of the shortest numbers that round to them."""
    match value:
        case float() if not np.isfinite(value):
            return str(value)
        case dict():
            return {key: plain(x) for key, x in value.items()}
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case list() | tuple():
            return [plain(x) for x in value]
        case float() if np.float32(value) == value:
            return float(str(np.float32(value)))
    return value


def text(versions: dict[str, str], cases: list[dict[str, Any]]) -> str:
    """Write JSON with one line for each entry of a case."""
    blocks = (
        ",\n".join(f"   {json.dumps(key)}: {json.dumps(plain(x))}" for key, x in entry.items())
        for entry in cases
    )
    body = ",\n".join(f"  {{\n{block}\n  }}" for block in blocks)
    return f'{{\n "versions": {json.dumps(versions)},\n "cases": [\n{body}\n ]\n}}\n'


def main() -> None:
    """Write a file for each framework, or for those that are named, beside this script."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    makers = {
        "torch": (torch_cases, ["torch"]),
        "tensorflow": (tensorflow_cases, ["tensorflow-cpu"]),
        "keras": (keras_cases, ["keras", "jax"]),
        "optax": (optax_cases, ["optax", "jax"]),
        "edges": (edge_cases, ["torch", "keras", "jax"]),
    }
    for framework in sys.argv[1:] or makers:
        make, packages = makers[framework]
        versions = {package: metadata.version(package) for package in [*packages, "numpy"]}
        path = Path(__file__).with_name(f"{framework}.json")
        cases = list(make())
        path.write_text(text(versions, cases), encoding="utf-8")
        counts = itertools.groupby(cases, lambda entry: entry["function"])
        print(path.name, *(f"{name} {len(list(group))}" for name, group in counts), sep=", ")


if __name__ == "__main__":
    main()
