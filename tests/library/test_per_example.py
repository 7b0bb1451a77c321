"""Per-example clipping: a Python loop as the reference, the bound, and many devices."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, shard_map
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from gradclip_jax import global_norm, group_norms, leaf_norms, per_example
from gradclip_jax.per_example import (
    equal_shares,
    gaussian_noise,
    quantile_step,
    size_shares,
    split_noise,
    value_and_grad,
)
from gradclip_jax.responses import (
    automatic,
    drop,
    normalize,
    shrink,
    smooth,
    smooth_sqrt,
    smooth_tanh,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
BATCH, INPUTS, OUTPUTS = 7, 3, 4


def data(batch=BATCH, dtype=jnp.float32, seed=0):
    """Examples whose gradients have norms on both sides of 1."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(0.05, 3, batch)[:, None]
    x, y = rng.standard_normal((2, batch, OUTPUTS))
    x = x[:, :INPUTS] * scale
    return jnp.asarray(x, dtype), jnp.asarray(y * scale, dtype)


def params_of(dtype=jnp.float32):
    """A tree with a tree in it."""
    w = np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS))
    return {"layer": {"w": jnp.asarray(w, dtype)}, "b": jnp.zeros(OUTPUTS, dtype)}


def loss(params, x, y):
    """A loss of a batch."""
    return ((jnp.tanh(x @ params["layer"]["w"]) + params["b"][None] - y) ** 2).sum(-1).mean()


def of_module(model, x, y):
    """The same of a module."""
    return ((jnp.tanh(model(x)) - y) ** 2).sum(-1).mean()


@functools.cache
def compiled_gradient(of_loss):
    """Compiled once for each loss and shape."""
    return jax.jit(jax.grad(of_loss))


@functools.cache
def at_hand():
    """Gradients of the examples, [examples, ...], and the same in a list of lists."""
    x, y = data()
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params_of(), x[:, None], y[:, None])
    return grads, gradients(loss, params_of(), x, y)


def gradients(of_loss, params, *batch):
    """The gradient of each example, one after the other: a list of lists of float64 arrays."""
    grad = compiled_gradient(of_loss)
    each = [grad(params, *(part[i : i + 1] for part in batch)) for i in range(batch[0].shape[0])]
    return [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(one)] for one in each]


RESPONSES = {
    shrink: lambda n, c: min(1, c / n),
    normalize: lambda n, c: c / n,
    smooth: lambda n, c: 1 / (1 + n / c),
    smooth_sqrt: lambda n, c: 1 / np.sqrt(1 + (n / c) ** 2),
    smooth_tanh: lambda n, c: np.tanh(n / c) * c / n,
    automatic: lambda n, c: c / (n + 0.01),
    drop: lambda n, c: float(n <= c),
}


def loop(grads, max_norm, groups=None, response=shrink, shares=None):
    """The sum in a Python loop; `groups` has the group of each leaf."""
    groups = groups or [0] * len(grads[0])
    sizes = [
        sum(g.size for g, k in zip(grads[0], groups, strict=True) if k == j)
        for j in range(max(groups) + 1)
    ]
    shares = (shares or equal_shares)(sizes)
    total = [np.zeros_like(leaf) for leaf in grads[0]]
    for one in grads:
        for group, part in enumerate(shares):
            inside = [leaf for leaf, k in zip(one, groups, strict=True) if k == group]
            norm = np.sqrt(sum((leaf**2).sum() for leaf in inside))
            factor = RESPONSES[response](norm, max_norm * np.sqrt(part))
            for i, k in enumerate(groups):
                total[i] += one[i] * factor * (k == group)
    return total


def assert_close(tree, reference, dtype=jnp.float32):
    tolerance = 2e-4 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    for leaf, expected in zip(jax.tree.leaves(tree), reference, strict=True):
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64), expected, rtol=tolerance, atol=tolerance * scale
        )


MEASURES = {
    "global": (global_norm, [0, 0], equal_shares),
    "leaves, equal shares": (leaf_norms, [0, 1], equal_shares),
    "leaves, shares by size": (leaf_norms, [0, 1], size_shares),
}
by_measure = pytest.mark.parametrize(
    ("measure", "groups", "share"), list(MEASURES.values()), ids=list(MEASURES)
)


# --- a Python loop ---


@by_measure
@pytest.mark.parametrize("response", list(RESPONSES), ids=lambda response: response.__name__)
def test_gradients_at_hand_are_clipped_as_by_a_loop(measure, groups, share, response):
    grads, each = at_hand()
    total, _ = per_example.clip(
        grads, max_norm=1.0, measure=measure, share=share, response=response
    )
    assert_close(total, loop(each, 1.0, groups, response, share))


@pytest.mark.parametrize(
    ("measure", "groups", "share", "dtype"),
    [(*MEASURES["global"], dtype) for dtype in DTYPES]
    + [(*of_leaves, jnp.float32) for of_leaves in list(MEASURES.values())[1:]],
)
def test_a_batch_is_clipped_as_by_a_loop(measure, groups, share, dtype):
    x, y = data(dtype=dtype)
    f = value_and_grad(
        loss, max_norm=1.0, measure=measure, share=share, microbatch_size=3, return_norms=True
    )
    (value, seen), grads = f(params_of(dtype), x, y)
    reference = gradients(loss, params_of(dtype), x, y)
    assert jax.tree.map(lambda leaf: leaf.dtype, grads) == {
        "layer": {"w": jnp.dtype(dtype)},
        "b": jnp.dtype(dtype),
    }
    assert_close(grads, loop(reference, 1.0, groups, shares=share), dtype)
    values = [loss(params_of(dtype), x[i : i + 1], y[i : i + 1]) for i in range(BATCH)]
    np.testing.assert_allclose(value, sum(map(float, values)), rtol=1e-2)
    assert int(seen.example_count) == BATCH
    for position, norms in enumerate(jax.tree.leaves(seen.norms)):
        # A tree of the norms has its leaves in the order of the gradients.
        inside = [
            [leaf for leaf, k in zip(one, groups, strict=True) if k == position]
            for one in reference
        ]
        expected = [np.sqrt(sum((leaf**2).sum() for leaf in one)) for one in inside]
        np.testing.assert_allclose(norms, expected, rtol=3e-2 if dtype != jnp.float32 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_module_is_differentiated_as_by_nnx_and_clipped_as_by_a_loop(dtype):
    model = nnx.Linear(INPUTS, OUTPUTS, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
    x, y = data(dtype=dtype)
    (_, seen), grads = value_and_grad(of_module, max_norm=1.0, microbatch_size=4)(model, x, y)
    theirs = nnx.grad(of_module)(model, x, y)
    assert jax.tree.structure(grads) == jax.tree.structure(theirs)
    graph, state = nnx.split(model)
    pure = gradients(lambda state, x, y: of_module(nnx.merge(graph, state), x, y), state, x, y)
    assert_close(grads, loop(pure, 1.0), dtype)
    assert 0 < int(seen.clip_count) < BATCH


def test_groups_by_label_are_clipped_each_to_their_share():
    x, y = data()
    labels = {"layer": "body", "b": "head"}
    measure = functools.partial(group_norms, labels=labels)
    (_, seen), grads = value_and_grad(loss, max_norm=1.0, measure=measure)(params_of(), x, y)
    assert_close(grads, loop(gradients(loss, params_of(), x, y), 1.0, [1, 0]))
    assert set(seen.clip_count) == {"body", "head"}


def test_the_mean_divides_by_the_examples_that_count_or_by_a_fixed_number():
    x, y = data()
    mask = jnp.arange(BATCH) != 2
    x = x.at[2].set(jnp.nan)  # as padding may be
    reference = [g for i, g in enumerate(gradients(loss, params_of(), x, y)) if i != 2]
    for mean_of, divisor in ((None, BATCH - 1), (10.0, 10.0)):
        f = value_and_grad(loss, max_norm=1.0, reduction="mean", mean_of=mean_of, microbatch_size=2)
        (value, seen), grads = f(params_of(), x, y, mask=mask)
        assert_close(grads, [leaf / divisor for leaf in loop(reference, 1.0)])
        assert np.isfinite(value)
        assert (int(seen.example_count), int(seen.nonfinite_count)) == (BATCH - 1, 0)


# --- arguments ---


def test_several_arguments_and_what_the_loss_returns_beside_its_value():
    def with_aux(x, scale, w, *, power):
        out = ((x @ w).sum() * scale) ** power
        return out, {"out": out, "index": x.shape[0]}

    x = data()[0]
    f = value_and_grad(
        with_aux, max_norm=1e9, argnums=(1, -1), batch_argnums=0, has_aux=True, microbatch_size=2
    )
    (value, seen), grads = f(x, jnp.float32(2.0), jnp.ones(INPUTS), power=2)
    plain = jax.grad(
        lambda s, w: sum(with_aux(x[i], s, w, power=2)[0] for i in range(BATCH)), (0, 1)
    )
    for ours, theirs in zip(grads, plain(jnp.float32(2.0), jnp.ones(INPUTS)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    np.testing.assert_allclose(seen.aux["out"], (2 * x.sum(-1)) ** 2, rtol=1e-5)
    np.testing.assert_allclose(value, seen.aux["out"].sum(), rtol=1e-5)
    assert list(seen.aux["index"]) == [1] * BATCH


def test_an_example_may_be_a_batch_itself():
    x, y = (part.reshape(2, 4, -1) for part in data(8))
    f = value_and_grad(loss, max_norm=1.0, keep_batch_dim=False)
    each = [[np.asarray(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(params_of(), *of_user))]
            for of_user in zip(x, y, strict=True)]  # fmt: skip
    assert_close(f(params_of(), x, y)[1], loop(each, 1.0))


def test_keys_are_batched_as_examples_are():
    def noisy(w, x, key):
        return (x @ w).sum() * jax.random.normal(key[0])

    keys = jax.random.split(jax.random.key(0), BATCH)
    x = data()[0]
    f = value_and_grad(noisy, max_norm=None, microbatch_size=3)
    _, grads = f(jnp.ones(INPUTS), x, keys)
    np.testing.assert_allclose(
        grads, (x * jax.vmap(jax.random.normal)(keys)[:, None]).sum(0), rtol=1e-5
    )


def test_a_filter_says_what_of_a_module_is_differentiated():
    model = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0))
    which = nnx.DiffState(0, nnx.PathContains("bias"))
    _, grads = value_and_grad(of_module, max_norm=1.0, argnums=which)(model, *data())
    assert list(grads) == ["bias"]


def test_modules_in_a_tree_are_found():
    layers = {"a": nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0))}
    _, grads = value_and_grad(lambda m, x, y: of_module(m["a"], x, y), max_norm=1.0)(
        layers, *data()
    )
    assert set(grads["a"]) == {"kernel", "bias"}


@pytest.mark.parametrize("layer", ["BatchNorm", "Dropout"])
def test_a_loss_that_changes_a_module_is_refused_and_told_what_to_do(layer):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(INPUTS, OUTPUTS, rngs=rngs)
            self.layer = (
                nnx.Dropout(0.5, rngs=rngs) if layer == "Dropout" else nnx.BatchNorm(4, rngs=rngs)
            )

        def __call__(self, x):
            return self.layer(self.linear(x))

    model = Model(nnx.Rngs(0))
    f = value_and_grad(of_module, max_norm=1.0)
    with pytest.raises(ValueError, match=r"`fun` must leave the state .* `layer/.*model.eval\(\)"):
        f(model, *data())
    model.eval()
    (_, seen), _ = f(model, *data())
    assert int(seen.nonfinite_count) == 0


X, Y = data()
WRONG = {
    "reduction": (lambda: value_and_grad(loss, max_norm=1.0, reduction="median"), "got 'median'"),
    "mean_of without": (lambda: value_and_grad(loss, max_norm=1.0, mean_of=3), 'reduction="mean"'),
    "mean_of": (
        lambda: value_and_grad(loss, max_norm=1.0, reduction="mean", mean_of=0),
        "`mean_of` must be",
    ),
    "microbatch_size": (
        lambda: value_and_grad(loss, max_norm=1.0, microbatch_size=0),
        "`microbatch_size` must be",
    ),
    "negative": (lambda: value_and_grad(loss, max_norm=-1.0), "`max_norm` must be non-negative"),
    "negative call": (
        lambda: value_and_grad(loss, max_norm=1.0)(params_of(), X, Y, max_norm=-1.0),
        "got -1.0",
    ),
    "schedule": (lambda: value_and_grad(loss, max_norm=lambda count: 1.0), "got a function"),
    "lengths": (
        lambda: value_and_grad(loss, max_norm=1.0)(params_of(), X, Y[:3]),
        r"argument 1 \[7, 3\], argument 2 \[3, 4\]",
    ),
    "no batch": (lambda: value_and_grad(loss, max_norm=1.0)(params_of()), "some batch"),
    "pre_clip": (
        lambda: value_and_grad(loss, max_norm=1.0, pre_clip=lambda g: g["b"])(params_of(), X, Y),
        r"`pre_clip` must return .* shapes \[\[4\], \[3, 4\]\] and returned \[\[4\]\]",
    ),
    "mean_of in float32": (
        lambda: value_and_grad(loss, max_norm=1.0, reduction="mean", mean_of=1e-320),
        "`mean_of` must lie between 1.2e-38 and 3.4e\\+38, the range of float32, got 1e-320",
    ),
    "twice": (
        lambda: value_and_grad(loss, max_norm=1.0, batch_argnums=(0, 1))(params_of(), X, Y),
        "once",
    ),
    "argnums": (
        lambda: value_and_grad(loss, max_norm=1.0, argnums=3)(params_of(), X, Y),
        "`argnums` must be",
    ),
    "mask": (
        lambda: value_and_grad(loss, max_norm=1.0)(params_of(), X, Y, mask=jnp.ones(BATCH)),
        r"`mask` must be one boolean for each of 7 examples, got float32\[7\]",
    ),
    "user_ids": (
        lambda: value_and_grad(loss, max_norm=1.0)(params_of(), X, Y, user_ids=jnp.arange(3)),
        "`user_ids` must be",
    ),
    "grads": (lambda: per_example.clip({"w": X, "b": Y[:2]}, max_norm=1.0), r"float32\[2, 4\]"),
    "integers": (
        lambda: per_example.clip({"w": jnp.ones((2, 2), int)}, max_norm=1.0),
        "float arrays",
    ),
    "scalars": (lambda: per_example.clip({"w": jnp.float32(1)}, max_norm=1.0), "float arrays"),
    "noise": (lambda: gaussian_noise(-1.0, max_norm=1.0, key=0), "`noise_multiplier` must be"),
    "noise of no limit": (
        lambda: gaussian_noise(1.0, max_norm=None, key=0),
        "`max_norm` must be finite",
    ),
    "noise in float32": (
        lambda: gaussian_noise(1e39, max_norm=1.0, key=0),
        "`noise_multiplier` must lie between 1.2e-38",
    ),
    "noise divided in float32": (
        lambda: gaussian_noise(1.0, max_norm=1.0, key=0, mean_of=1e-320),
        "`mean_of` must lie between 1.2e-38",
    ),
    "limit of noise in float32": (
        lambda: gaussian_noise(1.0, max_norm=1e39, key=0),
        "`max_norm` must be fin",
    ),
    "noise that overflows": (
        lambda: gaussian_noise(1e30, max_norm=1e30, key=0),
        "noise_multiplier \\* max_norm / mean_of` must lie",
    ),
    "noise of a count": (
        lambda: quantile_step(1.0, seen=None, noise_std=1e39),
        "`noise_std` must lie between",
    ),
    "split": (
        lambda: split_noise(2.0, noise_std=1.0),
        "`noise_std` must be a finite number above 1",
    ),
    "response": (
        lambda: value_and_grad(loss, max_norm=1.0, response="shrink"),
        "`response` must be a function",
    ),
    "response of gradients": (
        lambda: per_example.clip({"w": X}, max_norm=1.0, response=leaf_norms),
        "`response` must be a function of norm and limit",
    ),
}


def test_only_the_first_argument_is_positional():
    for name, value in vars(per_example).items():
        if inspect.isfunction(value):
            kinds = [parameter.kind for parameter in inspect.signature(value).parameters.values()]
            assert kinds[1:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 1), name


@pytest.mark.parametrize(("call", "message"), list(WRONG.values()), ids=list(WRONG))
def test_what_may_not_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("users", [False, True])
def test_a_batch_of_no_examples_gives_zeros_and_counts_of_0(users):
    f = value_and_grad(
        lambda *args: (loss(*args), args[1]), max_norm=1.0, has_aux=True, return_norms=True,
        measure=leaf_norms, reduction="mean", microbatch_size=2, dtype=jnp.bfloat16,
    )  # fmt: skip
    given = {"user_ids": jnp.zeros(0, jnp.int32)} if users else {"mask": jnp.ones(0, bool)}
    for step in (f, jax.jit(f)):
        (value, seen), grads = step(params_of(), X[:0], Y[:0], **given)
        counts = (seen.example_count, seen.nonfinite_count, seen.clip_count["b"])
        assert [float(value), *map(int, counts)] == [0, 0, 0, 0]
        assert seen.norms["b"].shape == (0,)
        assert seen.aux.shape == (0, 1, INPUTS)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == jax.tree.map(
            lambda x: (x.shape, jnp.bfloat16), params_of()
        )
        assert exact_norm(grads) == 0
    model = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0))
    (_, seen), grads = value_and_grad(of_module, max_norm=1.0, ghost=True)(model, X[:0], Y[:0])
    assert int(seen.example_count) == exact_norm(grads) == 0
    total, clipped = per_example.clip({"w": X[:0]}, max_norm=1.0)
    np.testing.assert_array_equal(total["w"], np.zeros(INPUTS))
    assert int(clipped) == 0


def test_no_example_on_any_device_of_shard_map_gives_zeros(mesh):
    f = value_and_grad(loss, max_norm=1.0)
    step = jax.shard_map(
        lambda *args: f(*args)[1], mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    assert exact_norm(step(params_of(), X[:0], Y[:0])) == 0


def test_parameters_may_be_numbers():
    f = value_and_grad(lambda w, x: w["a"] * x.sum() + w["b"].sum(), max_norm=1.0)
    _, grads = f({"a": 2.0, "b": np.zeros(1)}, jnp.array([[3.0], [0.0]]))
    np.testing.assert_allclose(grads["a"], 3 / 10**0.5, rtol=3e-5)
    np.testing.assert_allclose(grads["b"], [1 / 10**0.5 + 1], rtol=3e-5)


def test_what_is_done_before_the_clip_counts_in_the_norm():
    def without_b(grads):
        return {"layer": jax.tree.map(lambda x: 2 * x, grads["layer"]), "b": 0 * grads["b"]}

    each = [[0 * b, 2 * w] for b, w in gradients(loss, params_of(), X, Y)]
    f = value_and_grad(loss, max_norm=1.0, pre_clip=without_b, microbatch_size=3)
    assert_close(f(params_of(), X, Y)[1], loop(each, 1.0))
    ids = np.array([5, 2, 5, 5, 9, 2, 5])
    users = f(params_of(), X, Y, user_ids=jnp.asarray(ids))[1]
    assert_close(users, users_loop(each, ids, 1.0)[0])


def test_with_a_function_before_the_clip_ghost_clipping_goes_the_direct_way():
    model = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0))
    doubled = {"pre_clip": lambda grads: jax.tree.map(lambda x: 2 * x, grads)}
    ghost, direct = (
        value_and_grad(of_module, max_norm=1.0, ghost=ghost, **doubled)(model, X, Y)[1]
        for ghost in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, ghost, direct)


# --- the bound ---


def exact_norm(tree):
    """In extended precision."""
    leaves = [np.asarray(leaf).astype(np.longdouble) for leaf in jax.tree.leaves(tree)]
    return np.sqrt(sum((leaf**2).sum() for leaf in leaves))


RULES = [*itertools.product((global_norm,), RESPONSES), (leaf_norms, shrink)]
SHAPES = {"a": (3, 5), "b": (7,), "c": ()}


@functools.cache
def compiled_clip(measure, response, dtype):
    """One program for each rule: the bound is an argument."""
    clip = functools.partial(
        per_example.clip, measure=measure, response=response, dtype=jnp.float32
    )
    program = jax.jit(lambda grads, max_norm: clip(grads, max_norm=max_norm))
    return lambda grads, c: program(
        {key: jnp.asarray(leaf, dtype) for key, leaf in grads.items()}, jnp.float32(c)
    )


@settings(deadline=None, max_examples=25, database=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-8, 4),
    max_norm=st.floats(2**-10, 2**10, width=32),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
)
def test_one_example_adds_at_most_the_limit_to_the_last_bit(seed, scale, max_norm, rule, dtype):
    rng = np.random.default_rng(seed)
    grads = {key: 10.0**scale * rng.standard_normal((1, *shape)) for key, shape in SHAPES.items()}
    total, _ = compiled_clip(*rule, dtype)(grads, max_norm)
    assert exact_norm(total) <= np.longdouble(np.float32(max_norm))


@settings(deadline=None, max_examples=15, database=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    broken=st.lists(st.booleans(), min_size=6, max_size=6),
    what=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]),
    dtype=st.sampled_from(DTYPES[:2]),
)
def test_examples_that_are_not_finite_add_exactly_nothing(seed, broken, what, dtype):
    rng = np.random.default_rng(seed)
    grads = {key: rng.standard_normal((6, *shape)) for key, shape in SHAPES.items()}
    zeroed, spoiled = jax.tree.map(np.copy, grads), jax.tree.map(np.copy, grads)
    bad = np.array(broken)
    for key in grads:
        zeroed[key][bad] = 0
    spoiled["a"][bad, 0, :] = what  # five elements of 3e38 have a norm that overflows
    clip = compiled_clip(global_norm, shrink, dtype)
    total, clipped = clip(spoiled, 1.0)
    expected, others = clip(zeroed, 1.0)
    jax.tree.map(np.testing.assert_array_equal, total, expected)
    assert int(clipped) == int(others) + bad.sum()


@settings(deadline=None, max_examples=15, database=None, derandomize=True)
@given(order=st.permutations(range(6)), rule=st.sampled_from(RULES))
def test_the_order_of_examples_does_not_matter(order, rule):
    rng = np.random.default_rng(0)
    grads = {key: rng.standard_normal((6, *shape)) for key, shape in SHAPES.items()}
    clip = compiled_clip(*rule, jnp.float32)
    total, clipped = clip(grads, 1.0)
    other, count = clip({key: leaf[np.array(order)] for key, leaf in grads.items()}, 1.0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), total, other)
    assert jax.tree.map(int, clipped) == jax.tree.map(int, count)


@pytest.mark.parametrize("max_norm", [1e37, 3e38])
def test_a_zero_example_is_zero_under_the_largest_automatic_limit(max_norm):
    """The factor is 1e39, and zero times infinity is NaN."""
    clip = functools.partial(per_example.clip, max_norm=max_norm, response=automatic)
    total, _ = clip(jnp.array([[0.0, 0.0], [0.99, 0.0]]))
    np.testing.assert_allclose(total, [0.99 * max_norm, 0.0], rtol=1e-4)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forward", "backward"])
def test_an_example_that_is_not_finite_has_a_derivative_of_zero(mode):
    grads = jnp.array([[jnp.nan, 1.0], [0.3, 0.4]])
    rows = mode(lambda grads: per_example.clip(grads, max_norm=1.0)[0])(grads)
    np.testing.assert_allclose(rows, [[[0, 0], [1, 0]], [[0, 0], [0, 1]]])


@pytest.mark.parametrize("response", list(RESPONSES), ids=lambda response: response.__name__)
def test_zero_gradients_stay_zero_and_limits_0_and_infinity_mean_what_they_say(response):
    clip = compiled_clip(global_norm, response, jnp.float32)
    zeros = {key: np.zeros((2, *shape)) for key, shape in SHAPES.items()}
    ones = {key: np.ones((2, *shape)) for key, shape in SHAPES.items()}
    for limit in (0.0, 1.0, np.inf):
        assert exact_norm(clip(zeros, limit)[0]) == 0
    total, clipped = clip(ones, 0.0)
    assert exact_norm(total) == 0
    assert int(clipped) == 2
    total, clipped = clip(ones, np.inf)
    assert exact_norm(total) == 2 * np.sqrt(np.longdouble(23))
    assert int(clipped) == 0


def test_the_margin_below_the_limit_is_the_one_that_is_documented():
    total, _ = per_example.clip({"w": jnp.array([[4.0, 0.0]])}, max_norm=1.0)
    assert float(total["w"][0]) == 1 - 2**-16 - 2**-23
    assert "2^-16" in (per_example.clip.__doc__ or "")


def test_bfloat16_arrays_do_not_double_what_an_example_adds():
    grads = [jnp.ones((1, 400), jnp.bfloat16)] * 48
    total, _ = per_example.clip(grads, max_norm=1.0, dtype=jnp.float32)
    assert 0.9999 < exact_norm(total) <= 1


def test_complex_gradients_and_many_examples_are_added_up_as_by_numpy():
    grads = {
        key: np.random.default_rng(i).standard_normal((19, *shape)).astype(np.float32)
        for i, (key, shape) in enumerate(SHAPES.items())
    }
    grads["z"] = (grads["a"] + 1j * grads["a"]).astype(np.complex64)
    grads["b"][3] = np.nan
    each = [[leaf[i] for leaf in grads.values()] for i in range(19) if i != 3]
    total, _ = per_example.clip(grads, max_norm=1.0)
    factors = [min(1, 1 / np.sqrt(sum((abs(leaf) ** 2).sum() for leaf in one))) for one in each]
    for i, leaf in enumerate(total.values()):
        expected = sum(factor * one[i] for factor, one in zip(factors, each, strict=True))
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_whose_squares_leave_the_range_are_measured(size):
    grads = {"w": size * jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    total, clipped = per_example.clip(grads, max_norm=size)
    np.testing.assert_allclose(total["w"] / size, [0.9, 1.2], rtol=3e-5)
    assert int(clipped) == 1


# --- optax ---


@pytest.mark.parametrize("max_norm", [np.inf, 0.0, 1.25])
def test_where_optax_is_right_it_is_the_same(max_norm, standard_promotion):
    grads = [jnp.array([[0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0.0]]), jnp.ones((4, 2)) / 2]
    ours, theirs = per_example.clip(grads, max_norm=max_norm), optax.per_example_global_norm_clip(
        grads, max_norm
    )  # fmt: skip
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=3e-5)
    for share, uniform in ((equal_shares, True), (size_shares, False)):
        ours = per_example.clip(grads, max_norm=max_norm, measure=leaf_norms, share=share)
        theirs = optax.per_example_layer_norm_clip(grads, max_norm, uniform)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(left, right, rtol=3e-5)


def test_one_example_with_nan_destroys_the_sum_of_optax_and_not_ours():
    grads = [jnp.array([[3.0, 4.0], [jnp.nan, 1.0]])]
    assert np.isnan(optax.per_example_global_norm_clip(grads, 1.0)[0][0]).any()
    np.testing.assert_allclose(per_example.clip(grads, max_norm=1.0)[0][0], [0.6, 0.8], rtol=3e-5)


# --- memory ---


def temporary_bytes(batch, microbatch_size):
    """Of the compiled program, beside arguments and results; 16,384 weights."""

    def linear(w, x, y):
        return ((jnp.tanh(x @ w) - y) ** 2).mean()

    f = value_and_grad(linear, max_norm=1.0, microbatch_size=microbatch_size)
    shapes = [(128, 128), (batch, 128), (batch, 128)]
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(lambda *args: f(*args)[1]).lower(*specs).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_is_flat_in_the_batch():
    small, large = temporary_bytes(64, 8), temporary_bytes(1024, 8)
    weights = 4 * 128 * 128
    assert large - small <= 2 * (1024 - 64) * 128 * 4 + 2**14  # the batch itself, laid out anew
    assert small < (3 + 2 * 8) * weights
    # The gradients of all examples once; the scaled ones for a sum of squares are not a copy.
    assert 60 * weights < temporary_bytes(64, None) < 70 * weights


# --- users ---


def users_loop(grads, ids, max_norm, average=False, mask=None):
    """Sum the gradients of each user, then clip."""
    mask = np.ones(len(ids), bool) if mask is None else mask
    sums = []
    for user in np.unique(ids[mask]):
        mine = mask & (ids == user)
        chosen = [one for one, counts in zip(grads, mine, strict=True) if counts]
        divisor = len(chosen) if average else 1
        sums.append([sum(leaves) / divisor for leaves in zip(*chosen, strict=True)])
    return loop(sums, max_norm), sums


@pytest.mark.parametrize(("size", "average"), [(1, False), (3, True), (None, False)])
def test_the_examples_of_a_user_are_clipped_as_one_however_many(size, average):
    ids = np.array([5, -2, 5, 5, 9, -2, 5])  # one has more examples than a micro-batch
    mask = np.array([True, True, True, False, True, True, True])
    f = value_and_grad(
        lambda *args: (loss(*args), args[1][0, 0]),
        max_norm=1.0, has_aux=True, microbatch_size=size,
        average_users=average, return_norms=True, reduction="mean",
    )  # fmt: skip
    (value, seen), grads = f(params_of(), X, Y, user_ids=jnp.asarray(ids), mask=jnp.asarray(mask))
    expected, sums = users_loop(gradients(loss, params_of(), X, Y), ids, 1.0, average, mask)
    assert_close(grads, [leaf / 3 for leaf in expected])
    assert int(seen.example_count) == 3
    norms = [np.sqrt(sum((leaf**2).sum() for leaf in one)) for one in sums]
    np.testing.assert_allclose(seen.norms, [*norms, 0, 0, 0, 0], rtol=1e-5)
    assert int(seen.clip_count) == sum(norm > 1 for norm in norms)
    np.testing.assert_array_equal(seen.aux, X[:, 0])
    each = [loss(params_of(), X[i : i + 1], Y[i : i + 1]) for i in np.flatnonzero(mask)]
    np.testing.assert_allclose(value, sum(map(float, each)) / 3, rtol=1e-5)


def test_an_example_that_is_not_finite_drops_its_user_and_no_other():
    ids = np.array([0, 1, 0, 2, 1, 2, 0])
    x = X.at[4].set(jnp.inf)
    f = value_and_grad(loss, max_norm=1.0, microbatch_size=2)
    (_, seen), grads = f(params_of(), x, Y, user_ids=jnp.asarray(ids))
    kept = ids != 1
    each = gradients(loss, params_of(), X, Y)
    each = [one for one, keep in zip(each, kept, strict=True) if keep]
    assert_close(grads, users_loop(each, ids[kept], 1.0)[0])
    assert int(seen.nonfinite_count) == 1


# --- many devices ---


def collectives(program):
    """Names of the collectives in a compiled program, each as often as it stands there."""
    kinds = r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    return re.findall(kinds, program.as_text())


@pytest.fixture
def expected():
    """Of 16 examples."""
    x, y = data(16)
    return loop(gradients(loss, params_of(), x, y), 1.0)


def test_under_jit_no_device_sees_the_examples_of_another(expected, mesh):
    x, y = data(16)
    split = NamedSharding(mesh, P("data"))
    whole = NamedSharding(mesh, P())
    f = value_and_grad(loss, max_norm=1.0, microbatch_size=8, return_norms=True)
    step = jax.jit(f, in_shardings=(whole, split, split))
    program = step.lower(params_of(), x, y).compile()
    assert set(collectives(program)) == {"all-reduce"}
    (_, seen), grads = step(params_of(), *jax.device_put((x, y), split))
    assert_close(grads, expected)
    assert (int(seen.example_count), int(seen.nonfinite_count)) == (16, 0)
    assert seen.norms.sharding.spec[0] == "data"


def test_in_shard_map_each_device_clips_its_own_and_they_meet_once(expected, mesh):
    x, y = data(16)
    f = value_and_grad(loss, max_norm=1.0, microbatch_size=1, return_norms=True)

    def local(params, x, y):
        (value, seen), grads = f(params, x, y)
        return value, seen.clip_count, seen.norms, grads

    step = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("data"), P("data")),
            out_specs=(P(), P(), P("data"), P()),
        )
    )  # fmt: skip
    value, clipped, norms, grads = step(params_of(), x, y)
    assert_close(grads, expected)
    text = step.lower(params_of(), x, y).compile().as_text()
    found = re.findall(r".* (?:all-\w+|collective-\w+|reduce-scatter)\(.*", text)
    assert found
    assert all(" all-reduce(" in line and "while" not in line for line in found)
    (alone, seen), _ = value_and_grad(loss, max_norm=1.0, return_norms=True)(params_of(), x, y)
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    np.testing.assert_allclose(norms, seen.norms, rtol=1e-5)
    assert int(clipped) == int(seen.clip_count)


def test_without_checked_types_the_axis_must_be_named(expected, mesh):
    x, y = data(16)

    def step(axis_name):
        f = value_and_grad(loss, max_norm=1.0, axis_name=axis_name)
        return shard_map(
            lambda *args: f(*args)[1], mesh=mesh, in_specs=(P(), P("data"), P("data")),
            out_specs=P(), check_vma=False,
        )(params_of(), x, y)  # fmt: skip

    assert_close(step("data"), expected)
    with pytest.raises(ValueError, match="`axis_name` must be given"):
        step(None)


def test_split_parameters_in_shard_map_are_refused(mesh):
    def local(w, x):
        return value_and_grad(lambda w, x: (x * w).sum(), max_norm=1.0)(w, x)[1]

    with pytest.raises(ValueError, match="parameters must be replicated"):
        shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(
            jnp.ones(8), jnp.ones((2, 1))
        )


def test_users_in_shard_map_are_clipped_on_their_device(mesh):
    x, y = data(16)
    ids = np.repeat(np.arange(8), 2)
    f = value_and_grad(loss, max_norm=1.0, microbatch_size=1)
    step = jax.jit(
        jax.shard_map(
            lambda p, x, y, ids: f(p, x, y, user_ids=ids)[1], mesh=mesh,
            in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P(),
        )
    )  # fmt: skip
    grads = step(params_of(), x, y, jnp.asarray(ids))
    assert_close(grads, users_loop(gradients(loss, params_of(), x, y), ids, 1.0)[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("users", [False, True], ids=["examples", "users"])
@pytest.mark.parametrize("size", [None, 8, 3])
def test_split_examples_under_jit_are_clipped_as_whole_ones(kind, users, size):
    """Also users whose examples lie on several devices."""
    x, y = data(16)
    ids = np.arange(16) % 5
    mask = np.arange(16) != 3
    with jax.set_mesh(make_mesh(kind, data=8)):
        split = NamedSharding(jax.sharding.get_mesh(), P("data"))
        f = value_and_grad(loss, max_norm=1.0, microbatch_size=size, return_norms=True)
        given = {"mask": mask, "user_ids": ids} if users else {"mask": mask}
        given = jax.device_put({name: jnp.asarray(x) for name, x in given.items()}, split)
        (_, seen), grads = jax.jit(f)(params_of(), *jax.device_put((x, y), split), **given)
    each = gradients(loss, params_of(), x, y)
    if users:
        whole = users_loop(each, ids, 1.0, mask=mask)[0]
    else:
        whole = loop([one for one, counts in zip(each, mask, strict=True) if counts], 1.0)
    assert_close(grads, whole)
    assert int(seen.example_count) == (5 if users else 15)


def test_split_parameters_under_jit_are_clipped_as_whole_ones(expected):
    mesh = make_mesh(data=4, model=2)
    x, y = data(16)
    specs = {"layer": {"w": P(None, "model")}, "b": P("model")}
    split = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.device_put(params_of(), split)
    batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    _, grads = jax.jit(value_and_grad(loss, max_norm=1.0, microbatch_size=4))(params, *batch)
    assert_close(grads, expected)


def test_explicit_axes_split_examples_parameters_and_scalars_without_a_mesh_that_is_set():
    mesh = make_mesh(AxisType.Explicit, data=4, model=2)

    def split(x, *spec):
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, P(*spec)))

    def linear(params, x, y):
        return ((x @ params["w"]) ** 2).sum() * params["scale"] + (y * params["scale"]).sum()

    x, y = data(16)
    params = {"w": jnp.ones((x.shape[1], 4)), "scale": jnp.float32(0.5)}
    given = {"w": split(params["w"], None, "model"), "scale": split(params["scale"])}
    f = value_and_grad(linear, max_norm=1.0, microbatch_size=8)
    for step in (jax.jit(f), f):
        (_, seen), grads = step(given, split(x, "data"), split(y, "data"))
        assert_close(grads, loop(gradients(linear, params, x, y), 1.0))
        assert grads["w"].sharding.spec == P(None, "model")
        assert int(seen.clip_count) > 0


@pytest.mark.parametrize("jit", [True, False])
def test_gradients_at_hand_that_explicit_axes_split_are_clipped_as_whole_ones(jit):
    split = NamedSharding(make_mesh(AxisType.Explicit, data=8), P("data"))
    x, y = data(16)
    each = gradients(loss, params_of(), x, y)
    grads = [jnp.stack(leaves) for leaves in zip(*each, strict=True)]
    clip = functools.partial(per_example.clip, max_norm=1.0)
    total, clipped = (jax.jit(clip) if jit else clip)(jax.device_put(grads, split))
    alone, clipped_alone = clip(grads)
    assert_close(total, alone)
    assert int(clipped) == int(clipped_alone) > 0


# --- noise ---


def test_the_noise_has_the_deviation_it_says_and_is_drawn_anew_at_each_step():
    noise = gaussian_noise(2.0, max_norm=3.0, key=jax.random.key(0), mean_of=4)
    zeros = {"a": jnp.zeros(20_000), "b": jnp.zeros(20_000), "ids": jnp.arange(3)}
    state = noise.init(zeros)
    first, state = noise.update(zeros, state)
    second, state = noise.update(zeros, state, max_norm=jnp.float32(30.0))
    assert float(first["a"].std()) == pytest.approx(1.5, rel=0.03)
    assert float(second["a"].std()) == pytest.approx(15, rel=0.03)
    for one, other in ((first["a"], first["b"]), (first["a"], second["a"])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    np.testing.assert_array_equal(first["ids"], zeros["ids"])


def test_no_noise_is_none_also_at_an_infinite_limit_and_a_multiplier_of_nan_is_seen():
    """A limit that is traced may be infinite where nothing is clipped."""
    noise = gaussian_noise(0.0, max_norm=1.0, key=0)
    step = jax.jit(lambda grads, limit: noise.update(grads, noise.init(grads), max_norm=limit)[0])
    np.testing.assert_array_equal(step(jnp.arange(3.0), jnp.inf), [0, 1, 2])

    @jax.jit
    def noised(multiplier):
        noise = gaussian_noise(multiplier, max_norm=1.0, key=0)
        return noise.update(jnp.ones(3), noise.init(jnp.ones(3)))[0]

    assert np.isnan(noised(jnp.nan)).all()


def test_a_counter_at_its_end_stops_and_its_noise_is_never_that_of_before():
    noise = gaussian_noise(1.0, max_norm=1.0, key=0)
    zeros, last = jnp.zeros(8), jnp.iinfo(jnp.int32).max
    state = noise.init(zeros)._replace(step_count=jnp.int32(last - 1))
    seen = []
    for _ in range(4):
        update, state = noise.update(zeros, state)
        seen.append(np.asarray(update))
    assert int(state.step_count) == last
    assert all((one != other).all() for one, other in itertools.combinations(seen, 2))


def test_noise_and_gradient_are_rounded_together():
    noise = gaussian_noise(1.0, max_norm=1.0, key=0)
    fine, coarse = (
        noise.update([jnp.ones(8, dtype)], noise.init([]))[0][0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert coarse.dtype == jnp.bfloat16
    np.testing.assert_array_equal(coarse, fine.astype(jnp.bfloat16))


def test_complex_noise_has_its_deviation_in_both_parts():
    noise = gaussian_noise(1.0, max_norm=1.0, key=0)
    noised, _ = noise.update(jnp.zeros(20_000, jnp.complex64), noise.init([]))
    assert float(noised.real.std()) == pytest.approx(1, rel=0.03)
    assert float(noised.imag.std()) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.01)])
def test_a_private_step_with_an_adaptive_limit_compiles_once(optimizer, standard_promotion):
    x, y = data(16)
    f = value_and_grad(loss, max_norm=None, microbatch_size=4, dtype=jnp.float32)
    z = split_noise(0.5, noise_std=16 / 20)
    chain = optax.chain(gaussian_noise(z, max_norm=1.0, key=1), optax.scale(1 / 16), optimizer)
    traces = 0

    @jax.jit
    def step(params, state, max_norm, key):
        nonlocal traces
        traces += 1
        (_, seen), grads = f(params, x, y, max_norm=max_norm)
        updates, state = chain.update(grads, state, params, max_norm=max_norm)
        next_norm = quantile_step(max_norm, seen=seen, mean_of=16, noise_std=16 / 20, key=key)
        return optax.apply_updates(params, updates), state, next_norm, seen

    params, max_norm = params_of(), jnp.float32(8.0)
    state, seen = chain.init(params), None
    for key in jax.random.split(jax.random.key(2), 20):
        params, state, max_norm, seen = step(params, state, max_norm, key)
    assert traces == 1
    assert 0.1 < float(max_norm) < 8
    assert seen is not None
    assert int(seen.example_count) == 16
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_quantile_step_is_that_of_the_paper():
    f = value_and_grad(lambda w, x: (w * x).sum(), max_norm=3.0)
    (_, seen), _ = f(jnp.float32(0.0), jnp.array([1.0, 2.0, 4.0, jnp.nan]))
    # Two of four are not clipped, so b = 1/2; with n = 10, b = 1/2 too, as the count is centred.
    for mean_of in (None, 10):
        moved = quantile_step(3.0, seen=seen, mean_of=mean_of, quantile=0.7, learning_rate=0.2)
        assert float(moved) == pytest.approx(3 * np.exp(-0.2 * (0.5 - 0.7)), rel=1e-5)
    with pytest.raises(ValueError, match="`key` must be given"):
        quantile_step(3.0, seen=seen, noise_std=1.0)
    steps = [
        float(quantile_step(3.0, seen=seen, noise_std=0.4, key=key))
        for key in jax.random.split(jax.random.key(0), 60)
    ]
    shares = -np.log(np.array(steps) / 3) / 0.2 + 0.5
    assert shares.std() == pytest.approx(0.4 / 4, rel=0.3)


def test_the_split_of_the_noise_is_that_of_the_paper():
    assert split_noise(1.0, noise_std=5.0) == pytest.approx((1 - 1 / 100) ** -0.5)


def test_flax_is_not_imported_by_the_library():
    import subprocess
    import sys

    code = (
        "import sys, jax.numpy as jnp; from gradclip_jax.per_example import value_and_grad;"
        "f = value_and_grad(lambda w, x: (w * x).sum(), max_norm=1.0);"
        "f(jnp.ones(2), jnp.ones((3, 2)));"
        "print('flax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
