"""AGC against its equation in NumPy, and the rule for its units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import gradclip_jax
from gradclip_jax._strategies.adaptive_grad_clip import nfnets_axes


def equation_3(grad, weight, axes, clipping, eps):
    """Brock et al. 2021: G_i <- lambda |W_i|* / |G_i| G_i if |G_i| / |W_i|* > lambda."""
    grad, weight = np.asarray(grad, np.float64), np.asarray(weight, np.float64)
    norm = np.sqrt((grad**2).sum(axes, keepdims=True))
    most = clipping * np.maximum(np.sqrt((weight**2).sum(axes, keepdims=True)), eps)
    return np.where(norm > most, grad * most / np.maximum(norm, 1e-300), grad)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((5,), (0,)),
        ((1, 5), (0, 1)),  # a row counts as a vector
        ((1, 1, 5, 1), (0, 1, 2, 3)),
        ((4, 5), (0,)),
        ((2, 4, 5), (0,)),
        ((3, 3, 4, 5), (0, 1, 2)),
        ((2, 3, 3, 4, 5), (0, 1, 2, 3)),
    ],
)
def test_equation_and_rank_rule(shape, axes):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert nfnets_axes("w", leaf) == axes
    keys = jax.random.split(jax.random.key(0))
    grad, weight = (jax.random.normal(key, shape) for key in keys)
    clip = gradclip_jax.adaptive_grad_clip(0.5, eps=1e-3)
    result, _ = clip.update({"w": grad}, clip.init({"w": weight}), {"w": weight})
    expected = equation_3(grad, weight, axes, 0.5, 1e-3)
    np.testing.assert_allclose(result["w"], expected, rtol=1e-5)


def test_weights_at_zero_move_by_eps():
    clip = gradclip_jax.adaptive_grad_clip(0.01, eps=1e-3)
    weights = jnp.zeros((3, 2))
    result, _ = clip.update(jnp.ones((3, 2)), clip.init(weights), weights)
    np.testing.assert_allclose(np.linalg.norm(result, axis=0), 1e-5, rtol=1e-5)


def test_layers_stacked_by_scan_are_clipped_apart():
    """Pooled over the layers, the gradient of the quiet one would be 1.4e-6 instead of 1e-3."""
    weights = jnp.full((2, 3, 1), 0.1 / np.sqrt(3))
    grads = jnp.stack([jnp.full((3, 1), 1.0), jnp.full((3, 1), 1000.0)])
    clip = gradclip_jax.adaptive_grad_clip(0.01, axes=1)
    result, _ = clip.update(grads, clip.init(weights), weights)
    np.testing.assert_allclose(np.linalg.norm(result, axis=(1, 2)), [1e-3, 1e-3], rtol=1e-5)


def test_one_tuple_of_axes_serves_convolutions_and_biases():
    params = {"filter": jnp.ones((3, 5, 7)), "bias": jnp.ones(7)}
    clip = gradclip_jax.adaptive_grad_clip(0.01, axes=(0, 1))
    grads = jax.tree.map(lambda x: 100 * x, params)
    result, state = clip.update(grads, clip.init(params), params)
    assert state.grad_norm["filter"].shape == (1, 1, 7)
    np.testing.assert_allclose(state.grad_norm["filter"], 100 * np.sqrt(15), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(result["bias"]), 0.01 * np.sqrt(7), rtol=1e-5)


def test_explicit_shardings_are_kept():
    mesh = make_mesh(AxisType.Explicit, data=4, model=2)
    sharding = NamedSharding(mesh, P("data", "model"))
    weights = jax.random.normal(jax.random.key(0), (8, 6))
    clip = gradclip_jax.adaptive_grad_clip(0.01)
    expected, _ = clip.update(100 * weights, clip.init(weights), weights)
    placed = jax.device_put(weights, sharding)
    with jax.set_mesh(mesh):
        result, _ = jax.jit(clip.update)(100 * placed, clip.init(placed), placed)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert result.sharding.spec == sharding.spec


def test_without_params_it_says_what_to_call():
    clip = gradclip_jax.adaptive_grad_clip()
    grads = jnp.ones((2, 2))
    with pytest.raises(ValueError, match=r"compares gradients with parameters: call `update\(upd"):
        clip.update(grads, clip.init(grads))


def test_defaults_are_those_of_the_paper():
    weights = jnp.array([[1.0], [0.0]])
    clip = gradclip_jax.adaptive_grad_clip()
    result, _ = clip.update(jnp.array([[3.0], [4.0]]), clip.init(weights), weights)
    np.testing.assert_allclose(result, [[0.006], [0.008]], rtol=1e-5)


@pytest.mark.parametrize(
    ("clipping", "eps", "name"), [(-0.1, 1e-3, "clipping"), (0.1, -1.0, "eps")]
)
def test_bad_arguments_are_named(clipping, eps, name):
    with pytest.raises(ValueError, match=rf"^`{name}` must be non-negative, got -"):
        gradclip_jax.adaptive_grad_clip(clipping, eps=eps)
