"""Measures, on numbers that can be checked by hand and against float64."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from registry import apply

from gradclip_jax import (
    clip_by_dual_norm,
    clip_by_group_norm,
    clip_by_norm,
    global_norm,
    group_norms,
    leaf_norms,
    metrics,
    unit_norms,
)
from gradclip_jax._leaves import broadcast_norms
from gradclip_jax.balls import euclidean as euclidean_ball, sign as sign_ball

ROOT_160 = np.float32(np.sqrt(160.0))
GRADS = {"w": jnp.array([[3.0, 0.0], [4.0, 12.0]]), "b": jnp.array([0.0, 84.0])}


def test_global_norm_of_a_chain_of_pythagorean_triples():
    assert float(global_norm(GRADS)) == 85.0
    assert float(global_norm(GRADS, order=1)) == 103.0
    assert float(global_norm(GRADS, order=jnp.inf)) == 84.0
    assert float(global_norm([jnp.array([3.0, 4.0, 5.0])], order=3)) == pytest.approx(6.0)


def test_leaf_norms_have_the_tree_of_the_updates():
    norms = leaf_norms(GRADS)
    assert {name: float(norm) for name, norm in norms.items()} == {"w": 13.0, "b": 84.0}


def test_unit_norms_keep_the_axes_that_a_unit_spans():
    norms = unit_norms(GRADS)
    np.testing.assert_array_equal(norms["w"], [[5.0, 12.0]])
    np.testing.assert_array_equal(norms["b"], [84.0])


def test_unit_axes_by_int_tuple_and_callable():
    np.testing.assert_array_equal(unit_norms(GRADS, axes=1)["w"], [[3.0], [ROOT_160]])
    np.testing.assert_array_equal(unit_norms(GRADS, axes=1)["b"], [0.0, 84.0])
    np.testing.assert_array_equal(unit_norms(GRADS, axes=(0, 1))["w"], [[13.0]])
    np.testing.assert_array_equal(unit_norms(GRADS, axes=(0, 1))["b"], [84.0])
    by_path = unit_norms(GRADS, axes=lambda path, leaf: -1 if path == "w" else None)
    np.testing.assert_array_equal(by_path["w"], [[3.0], [ROOT_160]])
    np.testing.assert_array_equal(by_path["b"], [84.0])


def test_unit_axes_that_may_not_be():
    with pytest.raises(ValueError, match=r"`axes` names axis 1 of a leaf of rank 1 \(`b`\), got 1"):
        unit_norms(GRADS, axes=lambda path, leaf: 1)
    with pytest.raises(ValueError, match=r"axis 5 of a leaf of rank 2, got \(0, 5\)"):
        unit_norms(GRADS["w"], axes=lambda path, leaf: (0, 5))
    with pytest.raises(
        ValueError, match=r"`axes` must be an int or a tuple of ints, got \(0\.5,\)"
    ):
        unit_norms(GRADS, axes=(0.5,))


def test_layers_stacked_by_scan_stay_apart():
    stacked = jnp.stack([jnp.full((3, 2), 1.0), jnp.full((3, 2), 100.0)])
    norms = unit_norms(stacked, axes=(1, 2))
    np.testing.assert_allclose(norms[:, 0, 0], [np.sqrt(6), 100 * np.sqrt(6)], rtol=1e-6)


def test_group_norms_by_prefix_and_by_callable():
    grads = {"body": {"a": jnp.array(3.0), "b": jnp.array(4.0)}, "head": jnp.array(2.0)}
    norms = group_norms(grads, labels={"body": "slow", "head": "fast"})
    assert {label: float(norm) for label, norm in norms.items()} == {"slow": 5.0, "fast": 2.0}
    by_rank = group_norms(grads, labels=lambda tree: jax.tree.map(lambda x: x.ndim, tree))
    assert {label: float(norm) for label, norm in by_rank.items()} == {0: pytest.approx(29**0.5)}


def test_labels_that_do_not_cover_the_tree_raise():
    with pytest.raises(ValueError, match="`labels` must cover the tree of the updates"):
        group_norms(GRADS, labels={"w": "a"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module as those of Equinox: a pytree that can be called."""

    w: Any
    b: Any

    def __call__(self, x):
        return x @ self.w


def test_a_module_of_labels_is_a_tree_and_not_called():
    grads = Module(jnp.array([3.0, 4.0]), jnp.array([2.0]))
    norms = group_norms(grads, labels=Module("matrix", "vector"))
    assert {label: float(norm) for label, norm in norms.items()} == {"matrix": 5.0, "vector": 2.0}
    balls = Module(euclidean_ball, sign_ball)
    updates, _ = apply(clip_by_dual_norm(0.0, ball=balls), grads)
    np.testing.assert_allclose(updates.w, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(updates.b, [1.0])


def test_functions_of_labels_are_called_also_where_they_are_trees():
    """`jax.tree_util.Partial` is a pytree of the arguments that it has bound."""

    def label(name, tree):
        return jax.tree.map(lambda _: name, tree)

    for make in (functools.partial, jax.tree_util.Partial):
        assert set(group_norms(GRADS, labels=make(label, "all"))) == {"all"}


def test_labels_of_nnx_say_what_to_map_over():
    """An `nnx.Optimizer` gives the clip a tree of arrays, and not of variables."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)

    def norms(labels):
        optimizer = nnx.Optimizer(model, clip_by_group_norm(1.0, labels=labels), wrt=nnx.Param)
        optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model))
        return metrics(optimizer, per_group=True)

    fix = r"`labels` must .*`nnx\.as_pure\(nnx\.state\(model, nnx\.Param\)\)`"
    for labels in (
        jax.tree.map(lambda _: "all", state),
        {"kernel": "k", "bias": "b"},
        state,
        model,
    ):
        with pytest.raises(ValueError, match=fix):
            norms(labels)
    assert float(norms(jax.tree.map(lambda _: "all", nnx.as_pure(state)))["grad_norm"]) == 3.0


def test_spread_gives_each_leaf_the_norm_that_covers_it():
    tree = {"a": {"x": 1, "y": 2}, "b": 3}
    assert broadcast_norms({"a": 10, "b": 20}, tree) == [10, 10, 20]
    assert broadcast_norms(7, tree) == [7, 7, 7]
    grads = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.arange(2)}
    norms = group_norms(grads, labels={"a": "x", "b": "y", "c": "z"})
    assert broadcast_norms(norms, grads) == [norms["x"], norms["y"], None]
    with pytest.raises(ValueError, match="`measure` must return norms whose tree is a prefix"):
        broadcast_norms({"a": 10}, tree)


@pytest.mark.parametrize("order", [0.5, 0, -1, True, "2", float("nan"), jnp.float32(2), None])
def test_an_order_that_may_not_be_raises(order):
    with pytest.raises(ValueError, match="`order` must be a Python number of at least 1"):
        global_norm(GRADS, order=order)


@pytest.mark.parametrize("order", [1, 2, 2.5, 3, 10, float("inf")])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-12, 1.0, 1e12, 1e15, 1e19, 1e30, 1e37])
def test_norms_agree_with_float64_at_any_scale(order, scale):
    x = (np.random.default_rng(0).normal(size=1000) * scale / 100).astype(np.float32)
    normal = np.where(np.abs(x) < 1.2e-38, 0, x)  # XLA takes subnormals for zero
    expected = np.linalg.norm(normal.astype(np.float64) / scale, order) * scale
    measured = global_norm({"a": jnp.asarray(x[:300]), "b": jnp.asarray(x[300:])}, order=order)
    np.testing.assert_allclose(float(measured), expected, rtol=2e-6)


def test_elements_of_very_different_size():
    for x in ([1e-30, 1e10], [1e20, 1.0], [1e-25, 3e-25, 1e-24], [2.0**49, 2.0**51, 2.0**48]):
        expected = np.linalg.norm(np.asarray(x))
        np.testing.assert_allclose(float(global_norm(jnp.array(x))), expected, rtol=1e-6)
        apart = {str(i): jnp.float32(element) for i, element in enumerate(x)}
        np.testing.assert_allclose(float(global_norm(apart)), expected, rtol=1e-6)


def test_bfloat16_sums_do_not_stop_growing():
    """In bfloat16 the running sum of ones stops at 256: a norm of 16 for any number of leaves."""
    ones = [jnp.ones(1, jnp.bfloat16)] * 1200
    assert float(global_norm(ones)) == pytest.approx(np.sqrt(1200), rel=1e-6)


def test_integer_overflow_does_not_enter():
    tree = {"int8": jnp.array([100], jnp.int8), "x": jnp.array([3.0, 4.0])}
    assert float(global_norm(tree)) == 5.0


def test_the_exact_path_is_taken_only_when_the_fast_one_left_the_safe_range():
    """The second pass is a branch of a conditional, so the common case reads gradients once."""
    text = jax.jit(global_norm).lower(jnp.ones(8)).compile().as_text()
    assert text.count(" conditional(") == 1


def test_a_norm_beyond_the_largest_float32_is_infinite():
    assert float(global_norm(jnp.full(4, 3e38))) == np.inf


def test_prefix_specs_must_match_the_tree():
    with pytest.raises(ValueError, match="`axis_name` must be a prefix pytree of the updates"):
        global_norm(GRADS, axis_name={"w": P("data")})
    with pytest.raises(ValueError, match="`axis_name` must be a name, names, or a prefix pytree"):
        global_norm(GRADS, axis_name=3)


def programs_of(compiled: Any) -> int:
    return compiled._cache_size()


def test_eager_calls_share_one_compiled_program():
    from gradclip_jax._platforms import norms_of_groups

    before = programs_of(norms_of_groups)
    for scale in (1.0, 2.0, 1e30):
        leaf_norms([jnp.full(7, scale), jnp.full((7, 3), scale)])
    assert programs_of(norms_of_groups) == before + 1


def test_eager_updates_share_one_compiled_program_whatever_the_number_of_leaves():
    from gradclip_jax._clip import _apply_limits

    clip = clip_by_norm(1.0)
    grads = {str(i): jnp.ones(2) for i in range(100)}
    before = programs_of(_apply_limits)
    state = clip.init(grads)
    for _ in range(3):
        _, state = clip.update(grads, state)
    assert programs_of(_apply_limits) == before + 1


def test_the_norm_of_many_ones_is_right_in_float32():
    assert float(global_norm(jnp.ones(2**26))) == 2.0**13


def test_squares_near_the_smallest_float32_are_not_lost():
    """Of some elements near 2e-19 the squares are subnormal, which XLA takes for zero."""
    x = (np.random.default_rng(0).normal(size=1000) * 2e-19).astype(np.float32)
    expected = np.linalg.norm(x.astype(np.float64))
    np.testing.assert_allclose(float(global_norm(jnp.asarray(x))), expected, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, math.inf])
def test_a_nan_in_an_imaginary_part_is_seen_in_a_large_array(order):
    """A maximum over 1,000 elements may lose it."""
    x = jnp.ones(5000, jnp.complex64).at[2500].set(complex(1, math.nan))
    assert not np.isfinite(global_norm(x, order=order))
