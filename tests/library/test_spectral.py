"""Singular values held to a limit, by decomposition and by matrix products."""

import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, shard_map, through_orbax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from registry import spectral_by_polynomials as by_polynomials

from gradclip_jax import clip_by_dual_norm, metrics
from gradclip_jax._strategies import spectral_clip as spectral_module
from gradclip_jax._strategies.spectral_clip import soft_spectral_clip, spectral_clip
from gradclip_jax.responses import drop, smooth_sqrt

by_decomposition = functools.partial(spectral_clip, response=smooth_sqrt)
both = pytest.mark.parametrize("make", [spectral_clip, soft_spectral_clip])


def apply(clip, updates):
    return jax.jit(clip.update)(updates, clip.init(updates))


@functools.partial(jax.jit, static_argnums=0)
def apply_at(make, limit, updates):
    """With a traced limit, so that one program serves many."""
    clip = make(limit)
    return clip.update(updates, clip.init(updates))


def matrix(sigma, rows=None, columns=None, seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    n = len(sigma)
    u, _ = np.linalg.qr(rng.normal(size=(rows or n, n)))
    v, _ = np.linalg.qr(rng.normal(size=(columns or n, n)))
    return (u * np.asarray(sigma)) @ v.T


def reference(x, response):
    """The definition in NumPy, in float64 or complex128."""
    u, sigma, vh = np.linalg.svd(np.asarray(x).astype(complex), full_matrices=False)
    return (u * response(sigma)[..., None, :]) @ vh


def hard(limit):
    return lambda sigma: np.minimum(sigma, limit)


def soft(limit):
    return lambda sigma: sigma / np.sqrt(1 + (sigma / limit) ** 2)


def test_by_hand():
    grads = {"w": jnp.diag(jnp.array([3.0, 0.5])), "b": jnp.array([3.0, 4.0])}
    result, state = apply(spectral_clip(1.0), grads)
    np.testing.assert_allclose(result["w"], np.diag([1.0, 0.5]), atol=1e-6)
    np.testing.assert_allclose(result["b"], [0.6, 0.8], rtol=1e-6)
    seen = metrics(state, per_group=True)
    assert float(seen["clip_measure/w"]) == pytest.approx(3)
    assert float(seen["clip_factor"]) == pytest.approx(0.2)
    assert float(seen["clipped"]) == 1
    result, _ = apply_at(soft_spectral_clip, 2.0, jnp.diag(jnp.array([2.0, 0.0])))
    np.testing.assert_allclose(result, np.diag([np.sqrt(2), 0.0]), atol=1e-6)


@pytest.mark.parametrize("make", [spectral_clip, by_decomposition, soft_spectral_clip])
def test_the_definition(make):
    rng = np.random.default_rng(0)
    tree = [rng.normal(size=shape) * 3 for shape in [(3, 7), (7, 3), (2, 3, 4, 2), (4, 1)]]
    result, _ = apply(make(2.0), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree))
    response = (hard if make is spectral_clip else soft)(2.0)
    expected = [reference(x, response).real for x in tree]
    chex.assert_trees_all_close(result, expected, atol=1e-5)


@pytest.mark.parametrize("top", [10.0, 100.0])
def test_newton_schulz_agrees_with_the_decomposition(top):
    x = jnp.asarray(matrix(np.geomspace(0.1, top, 16), 16, 24), jnp.float32)
    exact, _ = apply_at(by_decomposition, 1.0, x)
    result, _ = apply_at(soft_spectral_clip, 1.0, x)
    np.testing.assert_allclose(result, exact, atol=5e-5)


@pytest.mark.parametrize("top", [1e3, 1e6, 1e20, 1e37])
def test_newton_schulz_stays_below_the_limit_and_enlarges_nothing_at_any_scale(top):
    sigma = np.geomspace(top, 0.1, 16)
    result, _ = apply_at(soft_spectral_clip, 1.0, jnp.asarray(matrix(sigma), jnp.float32))
    after = np.linalg.svd(np.asarray(result, np.float64), compute_uv=False)
    assert (after <= np.minimum(sigma, 1) * (1 + 1e-3) + 1e-5).all()
    assert after[0] == pytest.approx(1, rel=1e-3)


def test_more_steps_and_float64_serve_a_larger_range(x64):
    x = jnp.asarray(matrix(np.geomspace(0.1, 1e5, 16)))
    result, _ = apply(soft_spectral_clip(1.0, iterations=20), x)
    np.testing.assert_allclose(result, reference(x, soft(1.0)).real, atol=1e-5)
    assert result.dtype == jnp.float64


@pytest.mark.parametrize("top", [1e-30, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("share", [0.01, 100.0])
def test_hard_values_are_exact_at_any_scale(top, share):
    sigma = np.array([1.0, 0.5, 0.25]) * top
    x = jnp.asarray(matrix(sigma), jnp.float32)
    limit = 0.6 * top if share < 1 else top * share
    result, state = apply_at(spectral_clip, limit, x)
    expected = reference(x, hard(limit)).real
    np.testing.assert_allclose(result, expected, atol=1e-6 * top)
    assert int(metrics(state)["nonfinite_count"]) == 0


def test_a_frobenius_norm_below_the_limit_passes_bit_for_bit():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    result, state = apply_at(spectral_clip, 10.0, x)
    np.testing.assert_array_equal(result, x)
    assert int(metrics(state)["clip_count"]) == 0
    frobenius = np.linalg.norm(x, axis=(1, 2))
    np.testing.assert_allclose(state.clip_measure[:, 0, 0], frobenius, rtol=1e-6)
    # In a stack in which another matrix is clipped too.
    mixed, state = apply_at(spectral_clip, 10.0, x.at[1].multiply(100))
    np.testing.assert_array_equal(mixed[::2], x[::2])
    assert float(metrics(state)["clipped"]) == pytest.approx(1 / 3)
    # The smooth response is 1 up to rounding far below its limit.
    np.testing.assert_array_equal(apply(soft_spectral_clip(1e6), x)[0], x)


def test_singular_values_below_the_limit_pass_bit_for_bit():
    x = jnp.asarray(matrix([1.0, 0.9, 0.9, 0.8]), jnp.float32)
    result, state = apply(spectral_clip(1.1), x)
    np.testing.assert_array_equal(result, x)
    assert float(metrics(state)["clip_measure"]) == pytest.approx(1, rel=1e-6)
    assert float(metrics(state)["clipped"]) == 0


def test_directions_that_are_clipped_leave_the_others_alone():
    x = jnp.asarray(matrix([100.0, 0.5, 0.25]), jnp.float32)
    result, _ = apply(spectral_clip(1.0), x)
    sigma = np.linalg.svd(result, compute_uv=False)
    np.testing.assert_allclose(sigma, [1, 0.5, 0.25], rtol=1e-4)
    dropped, _ = apply(spectral_clip(1.0, response=drop), x)
    np.testing.assert_allclose(np.linalg.svd(dropped, compute_uv=False), [0.5, 0.25, 0], atol=1e-4)


def test_vectors_are_held_by_their_norm_with_the_same_response():
    v, scalar = jnp.array([3.0, 4.0]), jnp.array(-5.0)
    for make, expected in ((spectral_clip, 1.0), (soft_spectral_clip, 5 / np.sqrt(26))):
        result, _ = apply(make(1.0), {"v": v, "column": v[:, None], "scalar": scalar})
        np.testing.assert_allclose(result["v"], v / 5 * expected, rtol=1e-5)
        np.testing.assert_allclose(result["column"][:, 0], result["v"], rtol=1e-5)
        np.testing.assert_allclose(result["scalar"], -expected, rtol=1e-5)


@both
def test_complex_matrices(make):
    x = np.asarray(matrix([5.0, 1.0]) + 1j * matrix([3.0, 0.5], seed=1), np.complex64)
    result, _ = apply(make(1.0), jnp.asarray(x))
    expected = reference(x, (hard if make is spectral_clip else soft)(1.0))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert result.dtype == jnp.complex64


@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_dtypes_come_back_and_are_computed_in_float32(make, dtype):
    x = jnp.full((4, 4), 300.0, dtype)  # in float16 a square overflows from 256
    result, state = apply(make(1.0), x)
    assert result.dtype == dtype
    np.testing.assert_allclose(result.astype(jnp.float32), 0.25, rtol=0.02)
    assert float(metrics(state)["clip_measure"]) == pytest.approx(1200, rel=1e-5)


@both
@pytest.mark.parametrize("policy", ["zero", "propagate"])
def test_what_is_not_finite_stays_in_its_matrix(make, policy):
    x = jax.random.normal(jax.random.key(0), (4, 3, 3)) * 9
    update = functools.partial(apply_at, functools.partial(make, on_nonfinite=policy), 1.0)
    expected, _ = update(x)
    result, state = update(x.at[1, 2, 0].set(jnp.nan).at[2, 0, 1].set(-jnp.inf))
    np.testing.assert_allclose(result[::3], expected[::3], rtol=1e-6)
    np.testing.assert_array_equal(result[1:3], 0 if policy == "zero" else np.nan)
    assert int(metrics(state)["nonfinite_count"]) == 1


TREE = {
    "w": jnp.asarray(matrix([5.0, 1.0]), jnp.float32),
    "none": None,
    "int": jnp.arange(3),
    "key": jax.random.key(0),
    "float0": np.zeros(2, jax.dtypes.float0),
    "empty": jnp.zeros((0, 2)),
    "b": jnp.zeros(2, jnp.bfloat16),
}


@both
def test_leaves_that_are_no_gradients_pass(make):
    clip = make(1.0)
    result, state = clip.update(TREE, clip.init({**TREE, "float0": jnp.arange(2)}))
    for name in ("none", "int", "key", "float0"):
        assert result[name] is TREE[name]
        assert state.clip_measure[name] is None
    chex.assert_trees_all_equal_shapes_and_dtypes(result["b"], TREE["b"])
    assert clip.update({}, clip.init({}))[0] == {}
    assert float(clip.update(10.0, clip.init(1.0))[0]) == pytest.approx(1, rel=0.01)


@both
def test_zero_and_limits_of_zero_and_infinity(make):
    x = jax.random.normal(jax.random.key(0), (2, 3, 3)).at[0].set(0)
    np.testing.assert_array_equal(apply_at(make, 0.0, x)[0], 0)
    for limit in (None, np.inf):
        result, state = apply(make(limit), x * 1e25)
        np.testing.assert_array_equal(result, x * 1e25)
        assert float(metrics(state)["clip_measure"]) == pytest.approx(1e25 * np.linalg.norm(x))
    result, _ = apply_at(make, 1.0, x)
    np.testing.assert_array_equal(result[0], 0)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@both
def test_scan_equals_the_loop_and_a_schedule_is_followed(make):
    clip = make(lambda count: jnp.array([3.0, 2.0, 1.0])[count])
    x = jnp.asarray(matrix([9.0, 1.0]), jnp.float32)
    state = init = clip.init(jax.ShapeDtypeStruct((2, 2), jnp.bfloat16))
    update, loop = jax.jit(clip.update), []
    for _ in range(3):
        result, state = update(x, state)
        loop.append(result)
    assert shapes(init) == shapes(state)
    last, scanned = jax.lax.scan(lambda s, _: clip.update(x, s)[::-1], init, length=3)
    np.testing.assert_allclose(scanned, np.stack(loop), rtol=1e-6)
    chex.assert_trees_all_close(last, state, rtol=1e-6)
    tops = np.linalg.svd(scanned, compute_uv=False)[:, 0]
    expected = [3, 2, 1] if make is spectral_clip else [soft(c)(9.0) for c in (3, 2, 1)]
    np.testing.assert_allclose(tops, expected, rtol=1e-4)


@both
def test_jit_eager_and_vmap_agree(make):
    x = jax.random.normal(jax.random.key(0), (3, 4, 2)) * jnp.array([0.1, 1, 10])[:, None, None]
    clip = make(1.0)
    state = clip.init(x[0])
    eager = jnp.stack([clip.update(each, state)[0] for each in x])
    np.testing.assert_allclose(eager, apply(clip, x)[0], atol=1e-6)
    mapped, _ = jax.vmap(clip.update, in_axes=(0, None))(x, state)
    np.testing.assert_allclose(mapped, eager, atol=1e-6)


@both
def test_updates_and_state_may_be_donated_and_saved(make, tmp_path):
    clip = make(1.0)
    grads = {"w": jnp.asarray(matrix([9.0, 1.0]), jnp.float32), "b": jnp.ones(3)}
    expected, state = apply(clip, grads)
    restored = through_orbax(state, clip.init(grads), tmp_path)
    chex.assert_trees_all_equal(restored, state)
    result, _ = jax.jit(clip.update, donate_argnums=(0, 1))(grads, state)
    chex.assert_trees_all_close(result, expected)


@both
def test_derivatives(make, x64):
    def clipped(x):
        clip = make(1.0)
        return clip.update(x, clip.init(x))[0]

    backward = jax.jit(lambda x: jax.vjp(clipped, x)[1](direction)[0])
    direction = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(backward(jnp.zeros((2, 3))), direction)
    x = jnp.asarray(matrix([3.0, 0.5], 2, 3))
    move = jnp.asarray(np.random.default_rng(1).normal(size=x.shape)) * 1e-6
    change = clipped(x + move) - clipped(x - move)
    np.testing.assert_allclose(
        jnp.vdot(change, direction), 2 * jnp.vdot(move, backward(x)), rtol=1e-5
    )


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": -1.0}, r"^`max_norm` must be non-negative, got -1\.0\.$"),
        ({"max_norm": True}, "`max_norm` must be a non-negative number"),
        ({"max_norm": 1.0, "on_nonfinite": "ignore"}, "`on_nonfinite` must be"),
    ],
)
def test_what_may_not_be_raises_and_is_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("iterations", [0, True, 2.0])
def test_iterations_that_may_not_be(iterations):
    with pytest.raises(
        ValueError, match=r"^`iterations` must be a whole number of at least 1, got"
    ):
        soft_spectral_clip(1.0, iterations=iterations)


@both
def test_composes_with_the_wrappers_of_optax(make, standard_promotion):
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    clip = optax.inject_hyperparams(make)(max_norm=optax.linear_schedule(1.0, 0.5, 5))
    optimizer = optax.chain(optax.masked(clip, {"w": True, "b": False}), optax.sgd(1.0))
    wrapped = optax.apply_if_finite(optimizer, 2)
    result, state = jax.jit(wrapped.update)(params, wrapped.init(params), params)
    np.testing.assert_allclose(result["b"], -1.0)
    assert int(metrics(state)["step_count"]) == 1


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "unset"])
@pytest.mark.parametrize(
    "clip",
    [spectral_clip(1.0), soft_spectral_clip(1.0), clip_by_dual_norm(1.0)],
    ids=["hard", "soft", "dual"],
)
def test_a_matrix_split_by_explicit_axes_is_gathered_and_split_again(clip, is_set):
    """jax raises a ShardingTypeError for its decomposition and for its products."""
    mesh = make_mesh(AxisType.Explicit, x=2, y=2)
    specs = {
        "both": PartitionSpec("x", "y"),
        "rows": PartitionSpec("x", None),
        "columns": PartitionSpec(None, "y"),
        "pair": PartitionSpec(("x", "y"), None),
        "stack": PartitionSpec("y", None, "x"),
    }
    rng = np.random.default_rng(0)
    shapes = {key: (2, 4, 8) if key == "stack" else (8, 4) for key in specs}
    grads = {key: jnp.asarray(rng.normal(size=shape), "float32") for key, shape in shapes.items()}
    expected, _ = apply(clip, grads)
    placed = {key: jax.device_put(x, NamedSharding(mesh, specs[key])) for key, x in grads.items()}
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        result = jax.jit(lambda grads: apply(clip, grads)[0])(placed)
    chex.assert_trees_all_close(result, expected, rtol=2e-4, atol=1e-5)
    for key, leaf in result.items():
        assert leaf.sharding.is_equivalent_to(placed[key].sharding, leaf.ndim)


def test_stacks_may_be_split_over_devices_and_matrices_may_not(mesh):
    x = jax.random.normal(jax.random.key(0), (8, 4, 3)) * 3
    updates = {"w": x, "b": jnp.arange(16.0)}
    specs = {"w": PartitionSpec("data"), "b": PartitionSpec("data")}
    clip = spectral_clip(1.0, axis_name=specs)
    expected, state = apply(spectral_clip(1.0), updates)
    sharded = jax.device_put(updates, NamedSharding(mesh, PartitionSpec("data")))
    result, _ = apply(spectral_clip(1.0), sharded)
    chex.assert_trees_all_close(result, expected, atol=1e-6)

    for checks in (True, False):

        @functools.partial(
            jax.shard_map,
            mesh=make_mesh(data=8),
            in_specs=(specs,),
            out_specs=(specs, PartitionSpec()),
            check_vma=checks,
        )
        def split(updates):
            result, state = clip.update(updates, clip.init(updates))
            return result, (state.clip_measure["b"], state.clip_count)

        result, (norm, count) = jax.jit(split)(updates)
        chex.assert_trees_all_close(result, expected, atol=1e-6)
        assert float(norm[0]) == pytest.approx(float(state.clip_measure["b"][0]))
        assert int(count) == 1

    rows = {"w": PartitionSpec(None, "data"), "b": PartitionSpec()}

    def within(updates):
        clip = spectral_clip(1.0, axis_name=rows)
        return clip.update(updates, clip.init(updates))[0]

    with pytest.raises(ValueError, match="`updates` must hold whole matrices: those of `w`"):
        shard_map(within, mesh=make_mesh(data=8), in_specs=(rows,), out_specs=rows)(
            {"w": jnp.ones((2, 8, 3)), "b": jnp.ones(2)}
        )


@pytest.mark.parametrize(
    "clip", [spectral_clip(1.0), clip_by_dual_norm(1.0)], ids=["spectral", "dual_norm"]
)
def test_a_leaf_in_host_memory_stays_there(clip):
    updates = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5]]), "b": jnp.ones(2)}
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    mixed = {**updates, "w": jax.device_put(updates["w"], host)}
    result, _ = jax.jit(clip.update)(mixed, clip.init(mixed))
    expected, _ = clip.update(updates, clip.init(updates))
    assert result["w"].sharding.memory_kind == "pinned_host"
    chex.assert_trees_all_close(jax.device_get(result), expected, atol=1e-6)


@both
def test_clips_made_anew_share_one_compiled_program(make):
    """Called eagerly, as each step of a loop without `jit` does."""
    x = jnp.ones((3, 5))
    apply_eagerly = make(1.0)
    apply_eagerly.update(x, apply_eagerly.init(x))
    clip_matrices: Any = spectral_module._clip_matrices
    programs = clip_matrices._cache_size()
    again = make(2.0)
    again.update(x, again.init(x))
    assert clip_matrices._cache_size() == programs


def test_a_factor_below_the_smallest_float32_is_shared_by_two_steps():
    """Singular values of 1e30 and 2e30 are brought to 0.01, by factors of 1e-32."""
    result, _ = apply_at(spectral_clip, 0.01, jnp.diag(jnp.array([1e30, 2e30])))
    np.testing.assert_allclose(result, 0.01 * np.eye(2), rtol=1e-5)


NEAR_AND_FAR = {
    "around the limit": np.linspace(0.9, 1.1, 16),
    "at the limit": np.ones(16),
    "a little above": np.full(16, 1.0001),
    "all sizes": np.geomspace(100, 0.1, 16),
    "one of 1,000": [1e3] + [0.5] * 15,
    "of rank 3": [5.0, 2.0, 0.5],
}


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("sigma", NEAR_AND_FAR.values(), ids=NEAR_AND_FAR)
def test_polynomials_agree_with_the_decomposition(sigma, shape):
    x = jnp.asarray(matrix(sigma, *shape), jnp.float32)
    for scale in (1e-30, 1.0, 1e30):
        result, _ = apply_at(by_polynomials, scale, x * scale)
        wide = np.asarray(result, np.float64) / scale
        assert np.linalg.norm(wide - reference(x, hard(1.0)).real, 2) < 1e-4
        assert np.linalg.norm(wide, 2) < 1 + 5e-5


def test_polynomials_hold_what_is_far_above_the_limit():
    """What lies that far below the largest value is known to a part of it only in float32."""
    for top in (1e6, 1e12):
        x = jnp.asarray(matrix([top] + [0.5] * 15), jnp.float32)
        result, _ = apply_at(by_polynomials, 1.0, x)
        after = np.linalg.svd(np.asarray(result, np.float64), compute_uv=False)
        assert after[0] == pytest.approx(1, abs=2e-6)
        if top == 1e6:
            np.testing.assert_allclose(after[1:], 0.5, atol=0.1)


def test_polynomials_take_a_row_a_column_a_stack_and_complex_numbers():
    rng = np.random.default_rng(0)
    stack = np.stack([matrix(np.geomspace(top, 0.1, 4), 4, 6) for top in (0.2, 2.0, 1e2, 1e4)])
    tree = [rng.normal(size=(1, 40)), rng.normal(size=(40, 1)), stack]
    tree.append(matrix([5.0, 1.0]) + 1j * matrix([3.0, 0.5], seed=1))
    result, state = apply(by_polynomials(1.0), [jnp.asarray(x, narrow(x)) for x in tree])
    for x, held, norm in zip(tree, result, state.clip_measure, strict=True):
        np.testing.assert_allclose(held, reference(x, hard(1.0)), atol=3e-4)
        assert held.dtype == narrow(x)
        tops = np.linalg.norm(x, 2, axis=(-2, -1))
        assert (norm[..., 0, 0] >= tops * (1 - 1e-5)).all()
        assert (norm[..., 0, 0] <= np.maximum(tops * 1.2, 1)).all()


def narrow(x):
    return jnp.complex64 if np.iscomplexobj(x) else jnp.float32


def test_polynomials_tell_what_is_above_the_limit_from_what_is_not():
    """A Frobenius norm of 1.8, and singular values of at most 1."""
    x = jnp.asarray(matrix([1.0, 0.9, 0.9, 0.8]), jnp.float32)
    result, state = apply_at(by_polynomials, 1.1, x)
    np.testing.assert_array_equal(result, x)
    assert float(metrics(state)["clipped"]) == 0
    assert 1 <= float(metrics(state)["clip_measure"]) <= 1.1
    _, state = apply_at(by_polynomials, 0.95, x)
    assert float(metrics(state)["clipped"]) == 1


def test_polynomials_have_the_derivative_of_the_decomposition(x64):
    direction = jnp.arange(6.0).reshape(2, 3)
    for sigma in ([3.0, 0.5], [300.0, 2.0]):
        x = jnp.asarray(matrix(sigma, 2, 3))
        backwards = [
            jax.jit(lambda x, make=make: jax.vjp(lambda x: apply(make(1.0), x)[0], x)[1](direction))
            for make in (spectral_clip, by_polynomials)
        ]
        exact, result = (backward(x)[0] for backward in backwards)
        np.testing.assert_allclose(result, exact, atol=1e-3 * np.abs(exact).max())
    for x in (jnp.zeros((2, 3)), jnp.full((2, 3), jnp.nan), jnp.full((2, 3), 1e200)):
        assert np.isfinite(backwards[1](x)[0]).all()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_accelerators_decompose_only_where_they_are_told_to(platform):
    """Seen in the program that they would compile."""

    def program(clip):
        x = jnp.ones((4, 6))
        lowered = jax.jit(clip.update).trace(x, clip.init(x)).lower(lowering_platforms=(platform,))
        return lowered.as_text().lower()

    # Three products are those of a step in each of two loops, and two come at the end.
    products = {"cpu": 1, "cuda": 8, "tpu": 8}[platform]
    assert program(spectral_clip(1.0)).count("dot_general") == products
    decomposed = program(spectral_clip(1.0, exact=True))
    assert decomposed.count("dot_general") != 8
    assert program(spectral_clip(1.0, response=drop)).count("dot_general") == decomposed.count(
        "dot_general"
    )


def test_arrays_of_one_shape_share_one_program():
    """On TPU each product of matrices takes seconds to compile."""
    x = jnp.asarray(matrix([5.0, 1.0, 0.1], 3, 4), jnp.float32)
    trees = [[x * (i + 1) for i in range(count)] for count in (2, 5)]
    clip = by_polynomials(1.0)
    sizes = []
    for tree in trees:
        lowered = jax.jit(clip.update).lower(tree, clip.init(tree))
        sizes.append(lowered.as_text().count("dot_general"))
        for before, after in zip(tree, apply(clip, tree)[0], strict=True):
            np.testing.assert_allclose(after, reference(before, hard(1.0)).real, atol=1e-4)
    assert sizes[0] == sizes[1]
