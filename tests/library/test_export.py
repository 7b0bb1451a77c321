"""A training step can be exported, with the state of any clip or guard among its arguments."""

import importlib
import pkgutil
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax
from gradclip_jax import clip_by_norm, clip_to_limit, group_norms

# Optax leaves it to the user to enter its states.
jax.export.register_namedtuple_serialization(
    optax.ScaleByRmsState, serialized_name="optax.ScaleByRmsState"
)
PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}

STATES = {
    "ClipState": clip_by_norm(1.0),
    "NonfiniteState": gradclip_jax.zero_nonfinite(),
    "SkipState": gradclip_jax.skip_nonfinite(clip_by_norm(1.0)),
    "loss spikes": gradclip_jax.skip_spikes(clip_by_norm(1.0), loss=gradclip_jax.limits.median()),
    "ErrorFeedbackState": gradclip_jax.error_feedback(clip_by_norm(1.0)),
    "Clip21State": gradclip_jax.clip21(clip_by_norm(1.0)),
    "UpdateRmsState": gradclip_jax.clip_update_rms(optax.scale_by_rms()),
    "NoiseState": gradclip_jax.per_example.gaussian_noise(
        1.0, max_norm=1.0, key=jax.random.PRNGKey(0)
    ),
    "AdaGCState": gradclip_jax.adagc(),
    "GrowthState": gradclip_jax.limit_norm_growth(),
    "ZScoreState": gradclip_jax.zclip(),
    "SteadyNormState": gradclip_jax.stable_spam_norm(),
    "EmaState": clip_to_limit(gradclip_jax.limits.ema()),
    "MeanState": clip_to_limit(gradclip_jax.limits.ema(), measure=gradclip_jax.leaf_norms),
    "groups": clip_to_limit(1.0, measure=lambda tree, axis_name: group_norms(tree, labels=labels)),
    "layers": gradclip_jax.clip_by_global_norm(1.0, per_layer=lambda path, leaf: 0),
    "spam_clip": gradclip_jax.spam_clip(),
    "percentile": clip_to_limit(gradclip_jax.limits.percentile(window=4)),
}


def labels(tree):
    return {"w": "x", "b": "y"}


def exported(function, *args):
    """The function after a way through bytes."""
    pytest.importorskip("flatbuffers")  # an extra of jax
    saved = jax.export.export(jax.jit(function))(*args).serialize()
    return jax.export.deserialize(saved).call


@pytest.mark.parametrize("name", STATES)
def test_a_step_is_exported_with_the_state_of(name):
    clip = optax.with_extra_args_support(STATES[name])

    def step(params, state):
        updates, state = clip.update(params, state, params, loss=params["b"][0])
        return optax.apply_updates(params, updates), state

    args = PARAMS, clip.init(PARAMS)
    if name[0].isupper():
        assert name in repr(jax.tree.structure(args))
    expected = jax.jit(step)(*args)
    result = exported(step, *args)(*args)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_every_state_class_is_among_these():
    """Each NamedTuple of arrays in the package whose name says that it is a state."""
    modules = pkgutil.walk_packages(gradclip_jax.__path__, "gradclip_jax.")
    found = {
        name
        for module in modules
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.endswith("State") and isinstance(value, type)
    }
    assert found <= set(STATES)


def test_what_was_seen_of_examples_and_norms_of_groups_are_exported():
    grad = gradclip_jax.per_example.value_and_grad(lambda w, x: (w * x).sum(), max_norm=1.0)
    x = jnp.array([1.0, 2.0])
    (_, seen), _ = exported(grad, jnp.float32(1.0), x)(jnp.float32(1.0), x)
    assert int(seen.clip_count) == 1
    norms = exported(lambda tree: group_norms(tree, labels=labels(tree)), PARAMS)(PARAMS)
    assert {name: float(norm) for name, norm in norms.items()} == {"x": 5.0, "y": 0.5}
    assert norms.labels == group_norms(PARAMS, labels=labels(PARAMS)).labels


def test_modules_may_be_loaded_again():
    code = """
import importlib, sys, gradclip_jax, gradclip_jax._limits.ema as ema
importlib.reload(ema)
importlib.reload(gradclip_jax)
for name in [name for name in sys.modules if name.startswith("gradclip_jax")]:
    del sys.modules[name]
import gradclip_jax
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert importlib.reload(gradclip_jax) is gradclip_jax


def test_only_the_state_of_the_engine_is_public():
    """What metrics read is opaque; a measure or a limit of one's own needs ClipState alone."""
    public = {name for name in vars(gradclip_jax) if name.endswith("State")}
    assert public == {"ClipState"}
