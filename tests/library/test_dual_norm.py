"""Steps to the edge of a ball, shorter where the dual norm is small."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding, PartitionSpec

from gradclip_jax import _balls as balls, metrics
from gradclip_jax._strategies.clip_by_dual_norm import clip_by_dual_norm
from gradclip_jax._strategies.clip_by_global_norm import clip_by_global_norm

GRADS = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[3.0, 0.0], [0.0, 1.0]])}


def apply(clip, updates):
    return jax.jit(clip.update)(updates, clip.init(updates))


@pytest.mark.parametrize(("rho", "eta"), [(2.0, 1.0), (11.0, 1.0), (22.0, 0.5)])
def test_the_golden_trace(rho, eta):
    result, state = apply(clip_by_dual_norm(rho), GRADS)
    np.testing.assert_allclose(result["a"], [eta, -eta], rtol=1e-5)
    np.testing.assert_allclose(result["b"], eta * np.eye(2), atol=1e-6)
    seen = metrics(state)
    assert float(seen["clip_measure"]) == pytest.approx(11, rel=1e-5)
    assert float(seen["clip_limit"]) == rho
    assert float(seen["clip_factor"]) == pytest.approx(min(1, rho / 11), rel=1e-5)
    assert int(seen["clip_count"]) == (rho < 11)


def reference(tree, kinds, rho):
    """The equations in NumPy, in float64."""
    points, dual = {}, 0.0
    for name, x in tree.items():
        x = np.asarray(x, np.float64)
        if kinds[name] == "sign":
            points[name] = np.sign(x)
        elif kinds[name] == "euclidean":
            points[name] = x / np.linalg.norm(x)
        else:
            u, _, vh = np.linalg.svd(x, full_matrices=False)
            points[name] = u @ vh
        dual += np.sum(points[name] * x)
    return {name: point * min(1, dual / rho) for name, point in points.items()}, dual


@pytest.mark.parametrize("rho", [1.0, 100.0])
def test_the_equations(rho):
    rng = np.random.default_rng(0)
    tree = {
        "s": rng.normal(size=(5, 2)),
        "e": rng.normal(size=(3, 4)),
        "m": rng.normal(size=(2, 3, 5)),
    }
    kinds = {"s": "sign", "e": "euclidean", "m": "spectral"}
    of_key = {"s": balls.sign, "e": balls.euclidean, "m": balls.spectral}
    updates = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    expected, dual = reference(tree, kinds, rho)
    for ball in (of_key, lambda path, leaf: of_key[path]):
        result, state = apply(clip_by_dual_norm(rho, ball=ball), updates)
        chex.assert_trees_all_close(result, expected, atol=2e-6)
        assert float(metrics(state)["clip_measure"]) == pytest.approx(dual, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_one_array_in_the_euclidean_ball_is_the_global_clip_divided_by_rho(scale):
    x = jnp.array([3.0, -4.0, 12.0]) * scale
    for rho in (1.0, 100.0):
        result, _ = apply(clip_by_dual_norm(rho * scale, ball=balls.euclidean), x)
        expected, _ = apply(clip_by_global_norm(rho * scale), x)
        np.testing.assert_allclose(result, expected / (rho * scale), rtol=1e-6)


def test_newton_schulz_is_near_the_decomposition():
    x = jax.random.normal(jax.random.key(0), (2, 8, 3)) * 1e25
    result, state = apply(clip_by_dual_norm(1.0, ball=balls.newton_schulz), x)
    sigma = np.linalg.svd(result, compute_uv=False)
    assert (sigma > 0.65).all()
    assert (sigma < 1.2).all()
    inner = np.sum(np.asarray(result, np.float64) * np.asarray(x, np.float64))
    assert float(state.clip_measure) == pytest.approx(inner, rel=1e-5)


polynomial_ball = balls.Ball(
    functools.partial(balls._of_matrix, orthogonal=balls._by_polynomials), whole=True
)
"""The spectral ball as accelerators compute it, here on CPU."""


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_polynomials_agree_with_the_decomposition(scale):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(12, 8)))
    x = np.stack(
        [
            (u * sigma) @ rng.permutation(np.eye(8))
            for sigma in (np.geomspace(1, 1e-4, 8), np.ones(8), np.linspace(3, 0.1, 8))
        ]
    )
    x = jnp.asarray(x * scale, jnp.float32)
    for each in (x, jnp.swapaxes(x, -1, -2)):
        result, state = apply(clip_by_dual_norm(0.0, ball=polynomial_ball), each)
        expected, exact = apply(clip_by_dual_norm(0.0, ball=balls.exact_spectral), each)
        np.testing.assert_allclose(result, expected, atol=2e-3)
        np.testing.assert_allclose(result[1:], expected[1:], atol=2e-5)
        assert float(state.clip_measure) == pytest.approx(float(exact.clip_measure), rel=1e-5)
        sigma = np.linalg.svd(result, compute_uv=False)
        np.testing.assert_allclose(sigma, 1, atol=2e-6)


def test_polynomials_leave_zeros_and_rounding_within_the_ball():
    x = jnp.outer(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, -1.0]))
    result, _ = apply(clip_by_dual_norm(1.0, ball=polynomial_ball), x)
    assert np.linalg.norm(result, 2) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(result, x / np.linalg.norm(x), atol=0.1)
    zeros = jnp.zeros((2, 3, 4))
    np.testing.assert_array_equal(
        apply(clip_by_dual_norm(1.0, ball=polynomial_ball), zeros)[0], zeros
    )


def test_directions_of_rounding_are_no_directions():
    x = jnp.outer(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, -1.0]))
    result, _ = apply(clip_by_dual_norm(1.0, ball=balls.spectral), x)
    np.testing.assert_allclose(np.linalg.svd(result, compute_uv=False), [1, 0], atol=1e-6)


def test_vectors_in_a_ball_of_matrices_take_the_euclidean_one():
    v = jnp.array([3.0, 4.0])
    for ball in (balls.spectral, balls.newton_schulz):
        np.testing.assert_allclose(apply(clip_by_dual_norm(1.0, ball=ball), v)[0], v / 5, rtol=1e-6)


@pytest.mark.parametrize(
    "ball", [balls.sign, balls.euclidean, balls.spectral, polynomial_ball, balls.newton_schulz]
)
def test_zero_stays_zero_and_a_limit_of_zero_gives_the_full_step(ball):
    zeros = {"a": jnp.zeros(2), "b": jnp.zeros((2, 3))}
    for rho in (0.0, 1.0, None):
        result, state = apply(clip_by_dual_norm(rho, ball=ball), zeros)
        chex.assert_trees_all_equal(result, zeros)
        assert float(metrics(state)["clip_measure"]) == 0
    tiny = jax.tree.map(lambda x: x.at[0].set(1e-30), zeros)
    result, _ = apply(clip_by_dual_norm(0.0, ball=ball), tiny)
    assert all(np.abs(leaf).max() > 0.3 for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("limit", [None, np.inf])
def test_no_limit_is_the_identity_and_still_measures(limit):
    result, state = apply(clip_by_dual_norm(limit), GRADS)
    chex.assert_trees_all_equal(result, GRADS)
    assert float(metrics(state)["clip_measure"]) == pytest.approx(11)
    assert int(metrics(state)["clip_count"]) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_what_is_not_finite_zeroes_all_and_is_counted(bad, name):
    broken = {**GRADS, name: GRADS[name].at[0].set(bad)}
    result, state = apply(clip_by_dual_norm(1.0), broken)
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, GRADS))
    assert int(metrics(state)["nonfinite_count"]) == 1
    assert int(metrics(state)["clip_count"]) == 0
    result, _ = apply(clip_by_dual_norm(1.0, on_nonfinite="propagate"), broken)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(result))


def test_dtypes_come_back_and_dual_norms_are_summed_in_float32():
    updates = {"a": jnp.ones(3000, jnp.bfloat16), "b": jnp.full((2, 2), 6e4, jnp.float16)}
    result, state = apply(clip_by_dual_norm(1.0), updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, updates)
    assert float(state.clip_measure) == pytest.approx(123_000, rel=1e-3)


def test_in_float64_under_x64(x64):
    result, state = apply(clip_by_dual_norm(1.0), {"b": jnp.diag(jnp.array([1e200, 2e200]))})
    np.testing.assert_allclose(result["b"], np.eye(2), atol=1e-15)
    assert float(state.clip_measure) == pytest.approx(3e200, rel=1e-12)


def test_complex_leaves():
    z = jnp.array([[3 + 4j, 0], [0, -5j]])
    for ball in (balls.sign, balls.spectral):
        result, state = apply(clip_by_dual_norm(1.0, ball=ball), z)
        np.testing.assert_allclose(result, z / 5, atol=1e-6)
        assert float(state.clip_measure) == pytest.approx(10, rel=1e-5)
        assert result.dtype == z.dtype


def test_leaves_that_are_no_gradients_pass():
    others = {
        "none": None,
        "int": jnp.arange(3),
        "key": jax.random.key(0),
        "float0": np.zeros(2, jax.dtypes.float0),
        "empty": jnp.zeros((0, 2)),
    }
    clip = clip_by_dual_norm(22.0)
    updates = {**GRADS, **others}
    result, state = clip.update(updates, clip.init({**updates, "float0": jnp.arange(2)}))
    for name in ("none", "int", "key", "float0"):
        assert result[name] is others[name]
    assert float(state.clip_measure) == pytest.approx(11)
    assert clip.update({}, clip.init({}))[0] == {}
    assert float(clip.update(-10.0, clip.init(1.0))[0]) == pytest.approx(-10 / 22)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_scan_equals_the_loop_and_a_schedule_is_followed(tmp_path):
    clip = clip_by_dual_norm(lambda count: jnp.array([11.0, 22.0, 44.0])[count])
    state = init = clip.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), GRADS))
    loop, update = [], jax.jit(clip.update)
    for _ in range(3):
        result, state = update(GRADS, state)
        loop.append(result["a"][0])
    assert shapes(init) == shapes(state)
    np.testing.assert_allclose(loop, [1, 0.5, 0.25], rtol=1e-5)
    last, scanned = jax.lax.scan(lambda s, _: clip.update(GRADS, s)[::-1], init, length=3)
    np.testing.assert_allclose(scanned["a"][:, 0], loop, rtol=1e-6)
    chex.assert_trees_all_close(last, state, rtol=1e-6)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        chex.assert_trees_all_equal(checkpointer.restore(tmp_path / "state", init), state)


def test_jit_eager_and_vmap_agree_and_arguments_may_be_donated():
    clip = clip_by_dual_norm(22.0)
    state = clip.init(GRADS)
    eager = clip.update(GRADS, state)
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), GRADS)
    mapped = jax.vmap(clip.update, in_axes=(0, None))(batch, state)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], mapped), eager, atol=1e-6)
    grads = jax.tree.map(jnp.array, GRADS)
    chex.assert_trees_all_close(
        jax.jit(clip.update, donate_argnums=(0, 1))(grads, state), eager, atol=1e-6
    )


def test_the_derivative_of_a_small_step_is_finite():
    """Below the limit and in the Euclidean ball the step is linear."""
    clip = clip_by_dual_norm(2.0, ball=balls.euclidean)
    jacobian = jax.jacrev(lambda x: clip.update(x, clip.init(x))[0])
    np.testing.assert_allclose(jacobian(jnp.array([0.3, 0.4])), np.eye(2) / 2, atol=1e-6)
    assert np.isfinite(jacobian(jnp.zeros(2))).all()
    assert np.isfinite(jacobian(jnp.array([3e20, 4e20]))).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": -1.0}, r"^`max_norm` must be non-negative, got -1\.0\.$"),
        ({"max_norm": True}, "`max_norm` must be a non-negative number"),
        ({"max_norm": 1.0, "ball": "sign"}, "`ball` must be a `Ball`, .*, got 'sign'"),
        ({"max_norm": 1.0, "on_nonfinite": "ignore"}, "`on_nonfinite` must be"),
    ],
)
def test_what_may_not_be_raises_and_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        clip_by_dual_norm(**arguments)


def test_balls_that_do_not_cover_the_updates_raise():
    for ball, message in (
        ({"a": balls.sign}, "`ball` must cover the tree of the updates"),
        ({"a": balls.sign, "b": None}, "`ball` must give a `Ball` for `b`, got None"),
        (lambda path, leaf: path, "`ball` must give a `Ball` for `a`, got 'a'"),
    ):
        clip = clip_by_dual_norm(1.0, ball=ball)
        with pytest.raises(ValueError, match=message):
            clip.update(GRADS, clip.init(GRADS))
    # It looks at no parameter.
    clip_by_dual_norm(1.0).update(GRADS, clip.init(GRADS), {"a": GRADS["a"]})


def test_trains_to_rest_where_signs_alone_never_settle(standard_promotion):
    """The least of |x - 1|^2: full steps of 0.3 jump about it, shorter ones arrive."""

    def train(max_norm):
        optimizer = optax.chain(
            optax.inject_hyperparams(clip_by_dual_norm)(max_norm=max_norm), optax.sgd(0.3)
        )

        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(2 * (x - 1), state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.zeros(2)
        (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), length=30)
        return float(jnp.abs(x - 1).max())

    assert train(0.0) > 0.05
    assert train(4.0) < 1e-4


def test_split_over_devices_as_on_one(mesh):
    rng = np.random.default_rng(0)
    updates = {
        "s": jnp.asarray(rng.normal(size=16), jnp.float32),
        "e": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
        "m": jnp.asarray(rng.normal(size=(8, 2, 3)), jnp.float32),
        "r": jnp.ones(3),
    }
    of_key = {"s": balls.sign, "e": balls.euclidean, "m": balls.spectral, "r": balls.sign}
    split = PartitionSpec("data")
    specs = {"s": split, "e": split, "m": split, "r": PartitionSpec()}
    make = functools.partial(clip_by_dual_norm, 100.0, ball=of_key)
    expected, state = apply(make(), updates)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    result, _ = apply(make(), jax.device_put(updates, shardings))
    chex.assert_trees_all_close(result, expected, atol=1e-6)
    for checks in (True, False):
        clip = make(axis_name=specs)

        @functools.partial(
            jax.shard_map,
            mesh=make_mesh(data=8),
            in_specs=(specs,),
            out_specs=(specs, PartitionSpec()),
            check_vma=checks,
        )
        def manual(updates, clip=clip):
            result, state = clip.update(updates, clip.init(updates))
            return result, state.clip_measure

        result, norm = jax.jit(manual)(updates)
        chex.assert_trees_all_close(result, expected, atol=1e-6)
        assert float(norm) == pytest.approx(float(state.clip_measure), rel=1e-6)


def test_newton_schulz_takes_five_steps_with_the_coefficients_of_muon():
    sigma = np.array([4.0, 2.0, 1.0, 0.1])
    result, _ = apply(
        clip_by_dual_norm(1.0, ball=balls.newton_schulz), jnp.diag(jnp.asarray(sigma, jnp.float32))
    )
    s = sigma / np.linalg.norm(sigma)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(result, np.diag(s), atol=1e-4)
