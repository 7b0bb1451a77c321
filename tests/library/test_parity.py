"""The numbers of PyTorch, TensorFlow, Keras and optax, where they are right."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gradclip_jax
from gradclip_jax import clip_to_limit, global_norm, leaf_norms
from gradclip_jax._state import measured
from gradclip_jax.responses import shrink

REFERENCE = Path(__file__).parent / "reference"
CASES = [
    case
    for framework in ("torch", "tensorflow", "keras", "optax")
    for case in json.loads((REFERENCE / f"{framework}.json").read_text())["cases"]
]
torch_shrink = functools.partial(shrink, eps=1e-6)


def ours(case):
    """The same clip from this library, from function and arguments of the case."""
    arguments = case["arguments"]
    match case["framework"], case["function"]:
        case "torch", "clip_grad_norm_":
            return gradclip_jax.clip_by_global_norm(
                arguments["max_norm"], order=float(arguments["norm_type"]), response=torch_shrink
            )
        case "torch", "clip_grad_value_":
            return gradclip_jax.clip_by_value(arguments["clip_value"])
        case "tensorflow", "clip_by_value":
            return gradclip_jax.clip_by_range(
                arguments["clip_value_min"], upper=arguments["clip_value_max"]
            )
        case "tensorflow", "clip_by_norm":
            if not arguments.get("axes"):
                return gradclip_jax.clip_by_norm(arguments["clip_norm"])
            axes = arguments["axes"]
            return gradclip_jax.clip_by_unit_norm(
                arguments["clip_norm"],
                axes=lambda path, leaf: range(leaf.ndim) if axes[path] is None else axes[path],
            )
        case "tensorflow", "clip_by_global_norm":
            return gradclip_jax.clip_by_global_norm(arguments["clip_norm"])
        case "keras", "SGD":
            ((name, limit),) = [
                (k, v) for k, v in arguments.items() if k.startswith(("clip", "global"))
            ]
            return {
                "clipvalue": gradclip_jax.clip_by_value,
                "clipnorm": gradclip_jax.clip_by_norm,
                "global_clipnorm": gradclip_jax.clip_by_global_norm,
            }[name](limit)
        case "optax", "clip":
            return gradclip_jax.clip_by_value(arguments["max_delta"])
        case "optax", "clip_by_global_norm":
            return gradclip_jax.clip_by_global_norm(arguments["max_norm"])
        case "optax", "clip_by_block_rms":
            return gradclip_jax.clip_by_block_rms(arguments["threshold"])
        case "optax", "adaptive_grad_clip":
            return gradclip_jax.adaptive_grad_clip(**arguments)
        case "optax", "normalize_by_update_norm":
            # It divides by the norm + eps: a response of three lines.
            eps = arguments.get("eps", 1e-6)
            return clip_to_limit(
                arguments.get("scale_factor", 1.0),
                measure=global_norm,
                response=lambda n, limit: limit / (n + eps),
            )
    raise NotImplementedError(case["function"])


def arrays(tree):
    return {name: jnp.asarray(np.asarray(leaf, np.float32)) for name, leaf in tree.items()}


def name_of(case):
    arguments = ",".join(f"{k}={v}" for k, v in case["arguments"].items() if k != "axes")
    return f"{case['framework']}.{case['function']}({arguments})-{case['scale']}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_same_numbers(case):
    clip = ours(case)
    updates = arrays(case["updates"])
    params = arrays(case.get("params", case["updates"]))
    result, state = clip.update(updates, clip.init(params), params)
    for name, expected in case["expected"].items():
        np.testing.assert_allclose(
            result[name], np.asarray(expected, np.float32), rtol=2e-6, atol=1e-12, err_msg=name
        )
    if "norm" in case:
        assert float(measured(state)) == pytest.approx(case["norm"], rel=1e-6)


def test_the_cases_cover_what_they_should():
    functions = {(case["framework"], case["function"]) for case in CASES}
    assert len(functions) >= 11
    orders = {case["arguments"].get("norm_type") for case in CASES if case["framework"] == "torch"}
    assert {float(order) for order in orders - {None}} == {1.0, 2.0, 3.0, float("inf")}
    assert {case["scale"] for case in CASES} >= {"zero", "far below", "at", "above", "far above"}


def test_without_its_epsilon_pytorch_would_be_five_digits_off():
    """0.05 clipped to 0.01: 0.0099998 with 1e-6 in the divisor, 0.01 without."""
    x = jnp.array([0.05])
    clip = clip_to_limit(0.01, measure=leaf_norms, response=torch_shrink)
    assert float(clip.update(x, clip.init(x))[0][0]) == pytest.approx(0.01 / 1.00002, rel=1e-6)
    clip = clip_to_limit(0.01, measure=leaf_norms)
    assert float(clip.update(x, clip.init(x))[0][0]) == pytest.approx(0.01, rel=1e-6)


def test_the_recorded_behaviour_of_optax_still_names_its_checks():
    recorded = json.loads((REFERENCE / "optax_behaviour.json").read_text())
    assert recorded["versions"]["optax"] == "0.2.8"
    assert {"shard_map_norm", "nan_spreads", "float16_overflow"} <= {
        check["name"] for check in recorded["checks"]
    }
