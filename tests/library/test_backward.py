"""Clipping in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shard_map
from flax import nnx
from jax.sharding import PartitionSpec as P

from gradclip_jax import (
    clip_by_global_norm,
    clip_by_unit_norm,
    clip_by_value,
    clip_cotangent,
    zero_nonfinite,
)


def test_the_value_passes_and_the_cotangent_is_clipped():
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}

    def loss(x, clip):
        y = clip_cotangent(x, clip)
        return 3 * y["a"].sum() + 4 * y["b"].sum()

    for clip in (clip_by_value(2.0), clip_by_global_norm(1.0)):
        assert float(loss(x, clip)) == 21.0
    by_value = jax.grad(loss)(x, clip_by_value(3.5))
    np.testing.assert_array_equal(by_value["a"], [3.0, 3.0])
    np.testing.assert_array_equal(by_value["b"], [3.5])
    by_norm = jax.grad(loss)(x, clip_by_global_norm(1.0))
    np.testing.assert_allclose(by_norm["b"], [4 / np.sqrt(34)], rtol=1e-6)


def test_each_example_of_a_batch_has_a_norm_of_its_own():
    x = jnp.ones((2, 3))
    clip = clip_by_unit_norm(1.0, axes=-1)
    gradient = jax.grad(lambda x: (jnp.array([[10.0], [0.1]]) * clip_cotangent(x, clip)).sum())(x)
    np.testing.assert_allclose(np.linalg.norm(gradient, axis=1), [1.0, 0.1 * np.sqrt(3)], rtol=1e-6)


def scanned(weight, clip, steps=100):
    """h <- weight * h: the gradient of the last state grows as weight ** steps."""

    def body(h, _):
        if clip is not None:
            h = clip_cotangent(h, clip)
        return weight * h, None

    return jax.lax.scan(body, jnp.ones(2), length=steps)[0].sum()


def test_every_time_step_of_a_scan_is_clipped():
    """Unclipped the gradient of the weight overflows; clipped, each step adds a bounded part."""
    weight = 3.0
    exploded = jax.grad(scanned)(jnp.float32(weight), None)
    assert not np.isfinite(exploded)
    # In the last step the cotangent is 1, before it min(w, 1) = 1 for each of two elements.
    bounded = jax.grad(lambda w: scanned(w, clip_by_value(1.0), 20))(jnp.float32(1.5))
    expected = sum(2 * 1.5**t for t in range(20))
    assert float(bounded) == pytest.approx(expected, rel=1e-5)


def test_the_clip_of_the_whole_gradient_comes_too_late_to_do_the_same():
    """The gradient at the first hidden state has norm sqrt(2) and not 1.5^20 of it."""

    def first(h, clip):
        def body(h, _):
            return 1.5 * (h if clip is None else clip_cotangent(h, clip)), None

        return jax.lax.scan(body, h, length=20)[0].sum()

    np.testing.assert_allclose(jax.grad(first)(jnp.ones(2), clip_by_value(1.0)), [1.0, 1.0])
    np.testing.assert_allclose(jax.grad(first)(jnp.ones(2), None), [1.5**20] * 2, rtol=1e-5)


class Recurrent(nnx.Module):
    """A cell whose hidden state is clipped on the way back."""

    def __init__(self, clip, rngs):
        self.cell = nnx.SimpleCell(3, 3, rngs=rngs)
        self.clip = clip

    def __call__(self, h, x):
        h, y = self.cell(clip_cotangent(h, self.clip), x)
        return h, y


@pytest.mark.parametrize("clip", [clip_by_value(1e-3), clip_by_global_norm(1e-3)])
def test_it_runs_inside_nnx_scan(clip):
    model = Recurrent(clip, nnx.Rngs(0))

    @nnx.scan(in_axes=(None, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def unrolled(model, h, x):
        return model(h, x)

    def loss(model, h):
        h, _ = unrolled(model, h, jnp.ones((7, 2, 3)))
        return 1e3 * h.sum()

    gradient = nnx.jit(nnx.grad(loss, argnums=1))(model, jnp.zeros((2, 3)))
    # At most 1e-3 in each of six elements, or in all together.
    assert 0 < float(jnp.linalg.norm(gradient)) <= 1e-3 * np.sqrt(6) * (1 + 1e-6)
    weights = nnx.grad(loss)(model, jnp.zeros((2, 3)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))


def test_jit_vmap_and_second_order():
    clip = clip_by_value(1.0)
    f = jax.jit(jax.grad(lambda x: (clip_cotangent(x, clip) ** 2).sum() * 5))
    np.testing.assert_array_equal(f(jnp.array([0.05, 3.0])), [0.5, 1.0])
    mapped = jax.vmap(f)(jnp.array([[0.05, 3.0], [1.0, -1.0]]))
    np.testing.assert_array_equal(mapped, [[0.5, 1.0], [1.0, -1.0]])
    second = jax.jacrev(f)(jnp.array([0.05, 3.0]))
    np.testing.assert_array_equal(second, [[10.0, 0.0], [0.0, 0.0]])


def test_a_traced_threshold():
    def gradient(limit):
        return jax.grad(lambda x: 10 * clip_cotangent(x, clip_by_value(limit)))(1.0)

    np.testing.assert_array_equal(jax.jit(jax.vmap(gradient))(jnp.array([1.0, 2.0])), [1.0, 2.0])


def test_dtype_and_devices(mesh):
    x = jnp.full(8, 100.0, jnp.bfloat16)
    gradient = jax.grad(lambda x: (x * clip_cotangent(x, clip_by_value(1.0))).sum())(x)
    assert gradient.dtype == jnp.bfloat16

    def step(x):
        return jax.grad(lambda x: (100 * clip_cotangent(x, clip_by_global_norm(1.0))).sum())(x)

    result = shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(jnp.ones(8))
    np.testing.assert_allclose(np.linalg.norm(result), 1.0, rtol=1e-6)


def test_a_guard_serves_as_well():
    gradient = jax.grad(lambda x: jnp.inf * clip_cotangent(x, zero_nonfinite()))(1.0)
    assert float(gradient) == 0


def test_a_threshold_may_be_traced_outside_of_a_scan():
    def loss(weight, limit):
        return scanned(weight, clip_by_global_norm(limit), 20)

    weight, limits = jnp.float32(1.5), jnp.array([0.5, 1.0])
    expected = [jax.grad(loss)(weight, float(limit)) for limit in limits]
    compiled = jax.jit(jax.grad(loss))
    np.testing.assert_allclose([compiled(weight, limit) for limit in limits], expected, rtol=1e-6)
    mapped = jax.vmap(jax.grad(loss), (None, 0))(weight, limits)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)


def test_the_value_does_not_depend_on_the_threshold():
    def loss(limit):
        return 3 * scanned(2.0, clip_by_value(limit), 3)

    assert float(jax.grad(loss)(0.5)) == 0
    assert float(jax.jit(jax.grad(loss))(0.5)) == 0


@pytest.mark.parametrize("clip", [1.0, None, clip_by_value])
def test_a_clip_that_is_no_transformation_raises_on_the_way_forward(clip):
    with pytest.raises(ValueError, match=r"^`clip` must be .*: pass `clip_by_global_norm\(1\.0\)`"):
        clip_cotangent(jnp.ones(2), clip)
