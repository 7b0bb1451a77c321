"""A clip moves norms between devices, and never a gradient: what is split stays where it is."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import collectives
from conftest import make_mesh
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from registry import FLOOR, MORE, STRATEGIES

import gradclip_jax

# Sizes that no axis divides (3, 5, 7) stand wherever the layout allows them.
LEAVES = {
    "rows": ((8, 7), P("data")),
    "columns": ((7, 8), P(None, "model")),
    "both": ((8, 10), P("data", "model")),
    "pair": ((16,), P(("data", "model"))),
    "stacked": ((3, 6, 8), P(None, "model", "data")),
    "bias": ((5,), P()),
}
SPECS = {name: spec for name, (_, spec) in LEAVES.items()}
# The norms of the seven columns of `rows`, all of whose units are split.
MOST_UNITS = 7

# Other responses are measured as `shrink` is; a matrix must be whole (`test_spectral.py`).
MEASURED = [
    s for s in STRATEGIES if not (s.drops or s.of_matrices) and (s.enlarges or not s.changes_below)
] + MORE
AUTO = [(s, AxisType.Auto) for s in MEASURED]
# What explicit axes keep is the type of each leaf, and the engine sees to it for each kind of norm.
EXPLICIT = [
    (s, AxisType.Explicit) for s in MEASURED if s in FLOOR or s.units or s.order == 3 or s in MORE
]
both_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
both_of_units = pytest.mark.parametrize(
    "make", [gradclip_jax.clip_by_unit_norm, gradclip_jax.adaptive_grad_clip]
)


def tree(seed=0, scale=10.0):
    draw = np.random.default_rng(seed)
    return {
        name: scale * draw.standard_normal(shape, np.float32) for name, (shape, _) in LEAVES.items()
    }


def placed(values, mesh, specs=SPECS):
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in values.items()}


def moved(compiled, numbers=1):
    """Sizes of the operands of all collectives, apart from sums of at most so many numbers."""
    # By operand: XLA combines some of what is independent.
    operands = [(one.kind, size) for one in collectives(compiled.as_text()) for size in one.sizes]
    return Counter(
        (kind, size) for kind, size in operands if kind != "all-reduce" or size > numbers
    )


def assert_placed_like(shardings, updates):
    for name, sharding in shardings.items():
        assert sharding.is_equivalent_to(updates[name].sharding, updates[name].ndim), name


@pytest.mark.parametrize(("strategy", "kind"), [*AUTO, *EXPLICIT], ids=str)
def test_no_strategy_reshards(strategy, kind):
    mesh = make_mesh(kind, data=4, model=2)
    clip = strategy.make(0.5)
    types = {}

    def update(updates, state, params):
        result = clip.update(updates, state, params)
        types["in"] = jax.tree.map(jax.typeof, (updates, state))
        types["out"] = jax.tree.map(jax.typeof, result)
        return result

    with jax.set_mesh(mesh):
        updates, params = placed(tree(), mesh), placed(tree(1, 1.0), mesh)
        compiled = jax.jit(update).lower(updates, clip.init(params), params).compile()
    assert collectives(compiled.as_text())
    assert not moved(compiled, MOST_UNITS if strategy.units else 1)
    assert_placed_like(compiled.output_shardings[0], updates)
    # With explicit axes the sharding is in the type: those of updates and state are kept.
    assert types["in"] == types["out"]


@both_of_units
def test_a_state_whose_norms_are_split_over_explicit_axes_scans(make):
    mesh = make_mesh(AxisType.Explicit, data=4, model=2)
    clip = make(0.5)

    def run(updates):
        def step(state, _):
            return clip.update(updates, state, updates)[1], None

        return jax.lax.scan(step, clip.init(updates), length=3)[0]

    with jax.set_mesh(mesh):
        state = jax.eval_shape(run, placed(tree(), mesh))
    assert state.grad_norm["both"].sharding.spec == P(None, "model")


@pytest.mark.parametrize("specs", [SPECS, dict.fromkeys(SPECS, P())], ids=["split", "replicated"])
def test_params_split_otherwise_than_gradients_leave_the_type_of_these(specs):
    """As when the weights are gathered and their gradients scattered, or the other way round."""
    mesh = make_mesh(AxisType.Explicit, data=4, model=2)
    other = dict.fromkeys(SPECS, P()) if specs is SPECS else SPECS
    clip = gradclip_jax.adaptive_grad_clip(0.5)
    with jax.set_mesh(mesh):
        updates, params = placed(tree(), mesh, specs), placed(tree(1, 1.0), mesh, other)
        result = jax.eval_shape(clip.update, updates, clip.init(updates), params)[0]
    assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, updates)


@both_kinds
def test_units_split_over_automatic_axes_within_shard_map_are_not_gathered(kind):
    """Manual along `data` alone: norms that are split along `model` stay so in their collective."""
    mesh = make_mesh(kind, data=4, model=2)
    manual = {"rows": P("data"), "columns": P(), "both": P("data")}
    updates = {name: tree()[name] for name in manual}
    one_device = gradclip_jax.clip_by_unit_norm(0.5)
    clip = gradclip_jax.clip_by_unit_norm(0.5, axis_name=manual)

    def compiled(update):
        mapped = jax.shard_map(update, in_specs=(manual,), out_specs=manual, axis_names={"data"})
        return jax.jit(mapped).lower(placed(updates, mesh)).compile()

    def update(updates):
        return clip.update(updates, clip.init(updates))[0]

    with jax.set_mesh(mesh):
        program = compiled(update)
        # Before 0.12, jax gathers leaves with explicit axes at the border of such a region.
        without = compiled(lambda updates: jax.tree.map(lambda x: 2 * x, updates))
        assert moved(program, 3 * MOST_UNITS) == moved(without)
        result = program(placed(updates, mesh))
    expected = one_device.update(updates, one_device.init(updates))[0]
    for name, leaf in result.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=2e-6)


# A network of two layers: all of its parameters are split along both axes but the bias, and
# gathered along data when they are used (FSDP); hidden units are split along model (TP).
NETWORK = {
    "in": ((16, 24), P("data", "model"), P(None, "model")),
    "bias": ((24,), P("model"), P("model")),
    "out": ((24, 8), P("model", "data"), P("model")),
}


def loss(params, x, kind):
    explicit = kind == AxisType.Explicit
    place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    whole = {name: place(leaf, NETWORK[name][2]) for name, leaf in params.items()}

    def product(equation, a, b, spec):
        return jnp.einsum(equation, a, b, out_sharding=spec if explicit else None)

    hidden = product("bi,ih->bh", x, whole["in"], P("data", "model")) + whole["bias"]
    out = product("bh,ho->bo", jnp.tanh(hidden), whole["out"], P("data"))
    return jnp.mean(out * out)


@both_kinds
def test_a_training_step_moves_the_same_with_a_clip_and_without(kind, standard_promotion):
    """FSDP and tensor parallelism: gathers and scatters are those of the network."""
    mesh = make_mesh(kind, data=4, model=2)
    draw = np.random.default_rng(0)
    values = {
        name: draw.standard_normal(shape, np.float32) for name, (shape, *_) in NETWORK.items()
    }
    specs = {name: spec for name, (_, spec, _) in NETWORK.items()}

    def compiled(*clips):
        optimizer = optax.chain(*clips, optax.adamw(1e-3))

        def step(params, state, x):
            grads = jax.grad(loss)(params, x, kind)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        with jax.set_mesh(mesh):
            params = placed(values, mesh, specs)
            x = jax.device_put(np.ones((12, 16), np.float32), NamedSharding(mesh, P("data")))
            program = jax.jit(step).lower(params, optimizer.init(params), x).compile()
        assert_placed_like(program.output_shardings[0], params)
        return program

    # At most the norms of the twelve columns of `in` that are on one device.
    without = moved(compiled(), 12)
    assert any(kind != "all-reduce" for kind, _ in without)
    clips = gradclip_jax.clip_by_global_norm(0.5), gradclip_jax.adaptive_grad_clip(0.5)
    assert moved(compiled(*clips), 12) == without


def test_what_no_axis_divides_is_clipped_where_it_is(mesh_2d):
    """Three rows over four devices, one of them with none."""
    x = np.arange(1.0, 22.0, dtype=np.float32).reshape(3, 7)
    clip = gradclip_jax.clip_by_unit_norm(1.0)

    def compiled(update):
        def step(x):
            grads = jax.lax.with_sharding_constraint(2 * x, P("data"))
            return jax.lax.with_sharding_constraint(update(grads), P("data"))

        with jax.set_mesh(mesh_2d):
            return jax.jit(step).lower(x).compile()

    program = compiled(lambda grads: clip.update(grads, clip.init(grads))[0])
    # What leaves the program is gathered, with a clip and without: jax has no such arrays outside.
    assert moved(program, 7) == moved(compiled(lambda grads: 2 * grads))
    np.testing.assert_allclose(program(x), x / np.linalg.norm(x, axis=0), rtol=2e-6)
