"""A saved state goes over to an optimizer with other clips; clips start anew, all else is kept."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradclip_jax
from gradclip_jax import (
    clip_by_global_norm,
    clip_by_norm,
    clip_to_limit,
    metrics,
    skip_nonfinite,
    upgrade_state,
)
from gradclip_jax.limits import percentile

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"w": jnp.array([3.0, 4.0]), "layers": [jnp.ones(2), jnp.ones((2, 2)), jnp.ones(2)]}
ADAM = optax.adam(1e-3)
FLAT = (optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 0.1))


def trained(optimizer, steps=3):
    state = optimizer.init(PARAMS)
    for step in range(1, steps + 1):
        grads = jax.tree.map(lambda x, step=step: x * step + x.size, PARAMS)
        _, state = optimizer.update(grads, state, PARAMS)
    return state


def goes_on(old, new, *, taken):
    """Upgrade from old to new: what is not of a clip is as it was, and an update works."""
    saved, fresh = trained(old), new.init(PARAMS)
    state = upgrade_state(saved, fresh)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    of_adam = [
        [x for x in jax.tree.leaves(tree, is_leaf=is_adam) if is_adam(x)] for tree in (saved, state)
    ]
    assert len(of_adam[0]) > 0
    jax.tree.map(np.testing.assert_array_equal, *of_adam)
    seen = metrics(state)
    steps = [int(x) for key, x in seen.items() if key.endswith("/step_count")]
    assert taken is None or (steps or [int(seen["step_count"])]) == taken
    new.update(PARAMS, state, PARAMS)
    return state


CLIP, OTHER = clip_by_global_norm(1.0), clip_by_norm(1.0)
SCHEDULED = clip_by_global_norm(lambda count: 1.0)
QUANTILE = clip_to_limit(percentile(window=4))
LABELS = {"w": "a", "layers": "b"}


@pytest.mark.parametrize(
    "clip",
    [CLIP, OTHER, SCHEDULED, QUANTILE],
    ids=["constant", "each array", "schedule", "percentile"],
)
def test_a_clip_may_be_new_at_any_place_of_a_chain(clip):
    goes_on(optax.chain(*FLAT), optax.chain(clip, *FLAT), taken=[0])
    goes_on(optax.chain(*FLAT), optax.chain(FLAT[0], clip, FLAT[1]), taken=[0])
    goes_on(optax.chain(*FLAT), optax.chain(*FLAT, clip), taken=[0])
    goes_on(optax.chain(CLIP, *FLAT), optax.chain(CLIP, *FLAT, clip), taken=[3, 0])
    goes_on(optax.chain(*FLAT, CLIP), optax.chain(clip, *FLAT, CLIP), taken=[0, 3])


def test_an_optimizer_alone_becomes_the_last_part_of_a_chain_and_back():
    goes_on(ADAM, optax.chain(CLIP, ADAM), taken=[0])
    goes_on(optax.chain(CLIP, ADAM), optax.chain(OTHER, CLIP, ADAM), taken=[0, 3])
    state = upgrade_state(trained(optax.chain(CLIP, ADAM)), ADAM.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, state, trained(optax.chain(CLIP, ADAM))[1])


def test_the_clip_of_optax_may_become_one_of_ours_and_back():
    of_optax = optax.clip_by_global_norm(1.0)
    goes_on(optax.chain(of_optax, ADAM), optax.chain(CLIP, ADAM), taken=[0])
    state = upgrade_state(
        trained(optax.chain(CLIP, ADAM)), optax.chain(of_optax, ADAM).init(PARAMS)
    )
    assert state[0] == optax.EmptyState()
    assert int(state[1][0].count) == 3


@pytest.mark.parametrize(
    "new",
    [OTHER, SCHEDULED, QUANTILE, gradclip_jax.zclip()],
    ids=["each array", "schedule", "percentile", "zclip"],
)
def test_a_strategy_may_change_and_a_constant_become_a_schedule(new):
    goes_on(optax.chain(CLIP, ADAM), optax.chain(new, ADAM), taken=[0])
    goes_on(optax.chain(new, ADAM), optax.chain(CLIP, ADAM), taken=[0])
    goes_on(optax.chain(new, ADAM), optax.chain(new, ADAM), taken=[3])


def test_what_a_clip_has_learned_stays_unless_its_shapes_changed():
    old = optax.chain(QUANTILE, ADAM)
    state = goes_on(old, optax.chain(clip_to_limit(percentile(50.0, window=4)), ADAM), taken=[3])
    jax.tree.map(np.testing.assert_array_equal, state[0], trained(old)[0])
    goes_on(old, optax.chain(clip_to_limit(percentile(window=5)), ADAM), taken=[0])
    # Two clips side by side: the one with the same state is the old one.
    goes_on(old, optax.chain(CLIP, QUANTILE, ADAM), taken=[0, 3])
    goes_on(optax.chain(QUANTILE, CLIP, ADAM), optax.chain(CLIP, QUANTILE, CLIP, ADAM),
            taken=[0, 3, 3])  # fmt: skip
    # Behind the optimizer it is another clip, of other norms.
    goes_on(old, optax.chain(ADAM, QUANTILE), taken=[0])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda clip: clip,
        gradclip_jax.skip_nonfinite,
        gradclip_jax.error_feedback,
        lambda clip: optax.inject_hyperparams(lambda rate: clip)(0.1),
    ],
    ids=["clip", "skip_nonfinite", "error_feedback", "injected"],
)
def test_a_run_may_begin_and_cease_to_keep_norms_of_layers(wrap):
    """What the limit has learned stays; the norms of other layers do not."""

    def chain(**options):
        return optax.chain(wrap(clip_to_limit(percentile(window=4), **options)), ADAM)

    def learned(state):
        is_clip = lambda x: isinstance(x, gradclip_jax.ClipState)  # noqa: E731
        (clip,) = filter(is_clip, jax.tree.leaves(state, is_leaf=is_clip))
        return clip._replace(layer_norms=())

    def axis(path, leaf):
        return 0

    kinds = [{}, {"per_layer": True}, {"per_layer": axis}]
    for options in kinds:
        old = chain(**options)
        for others in kinds:
            state = goes_on(old, chain(**others), taken=[3])
            jax.tree.map(np.testing.assert_array_equal, learned(state), learned(trained(old)))
        same = upgrade_state(trained(old), old.init(PARAMS))
        jax.tree.map(np.testing.assert_array_equal, same, trained(old))


NESTED = {
    "MultiSteps": lambda chain: optax.MultiSteps(chain, 2),
    "inject": lambda chain: optax.inject_hyperparams(lambda rate: chain)(0.1),
    "masked": lambda chain: optax.masked(chain, {"w": True, "layers": [True, True, False]}),
    "partition": lambda chain: optax.partition({"a": chain, "b": optax.adam(1.0)}, LABELS),
    "skip_nonfinite": skip_nonfinite,
    "named_chain": lambda chain: optax.named_chain(("all", chain), ("decay", optax.trace(0.9))),
    "apply_if_finite": lambda chain: optax.apply_if_finite(chain, 3),
}


@pytest.mark.parametrize("name", NESTED)
def test_wherever_the_chain_is(name):
    nest = NESTED[name]
    saved = trained(nest(ADAM))
    new = nest(optax.chain(OTHER, ADAM))
    state = upgrade_state(saved, new.init(PARAMS))
    gone = upgrade_state(state, nest(ADAM).init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, gone, saved)
    new.update(PARAMS, state, PARAMS)


def test_a_part_of_a_named_chain_may_be_new():
    named = optax.named_chain(("adam", ADAM), ("trace", optax.trace(0.9)))
    goes_on(named, optax.named_chain(("clip", CLIP), ("adam", ADAM), ("trace", optax.trace(0.9))),
            taken=[0])  # fmt: skip


@pytest.mark.parametrize(
    "guard",
    [
        skip_nonfinite,
        functools.partial(gradclip_jax.skip_spikes, grad_norm=gradclip_jax.limits.median(window=4)),
        lambda chain: optax.chain(gradclip_jax.error_feedback(OTHER), chain),
        lambda chain: optax.chain(gradclip_jax.clip21(OTHER), chain),
        lambda chain: optax.chain(gradclip_jax.zero_nonfinite(), chain),
    ],
)
def test_a_guard_may_be_new_stay_and_go(guard):
    saved = trained(ADAM)
    state = upgrade_state(saved, guard(ADAM).init(PARAMS))
    gone = upgrade_state(state, ADAM.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, gone, saved)
    guarded = trained(guard(ADAM))
    same = upgrade_state(guarded, guard(ADAM).init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, same, guarded)
    goes_on(guard(ADAM), guard(optax.chain(QUANTILE, ADAM)), taken=None)


def test_a_clip_with_an_injected_limit_may_be_new():
    inject = optax.inject_hyperparams
    rate = inject(optax.adam)(0.1)
    state = goes_on(rate, optax.chain(inject(clip_by_global_norm)(1.0), rate), taken=[0])
    assert float(state[0].hyperparams["max_norm"]) == 1.0
    assert int(state[1].count) == 3
    goes_on(optax.chain(inject(clip_by_global_norm)(1.0), rate), optax.chain(CLIP, rate), taken=[0])


def test_the_noise_of_private_training_goes_on_where_it_was():
    noise = gradclip_jax.per_example.gaussian_noise(1.0, max_norm=1.0, key=0)
    old, new = optax.chain(noise, ADAM), optax.chain(CLIP, noise, ADAM)
    assert int(goes_on(old, new, taken=[0])[1].step_count) == 3


def test_what_is_more_than_a_clip_raises_and_is_named():
    saved = trained(ADAM)
    with pytest.raises(
        ValueError, match=r"`ScaleByAdamState.mu layers` there are 3 arrays .* 0 in"
    ):
        upgrade_state(saved, optax.lion(1e-3).init(PARAMS))
    with pytest.raises(
        ValueError, match=r"`ScaleByAdamState.mu w` is float32\[2\] .* float32\[3\]"
    ):
        upgrade_state(saved, ADAM.init({**PARAMS, "w": jnp.ones(3)}))
    with pytest.raises(ValueError, match=r"is float32\[2\] in `saved` and bfloat16\[2\]"):
        upgrade_state(saved, optax.adam(1.0, mu_dtype=jnp.bfloat16).init(PARAMS))
    with pytest.raises(ValueError, match="Restore it with the `init` of the old optimizer"):
        upgrade_state(flax.serialization.to_state_dict(saved), optax.chain(CLIP, ADAM).init(PARAMS))
    with pytest.raises(ValueError, match="3 arrays in `saved` and 4 in"):
        upgrade_state(saved, ADAM.init({**PARAMS, "layers": [jnp.ones(2)] * 4}))
    for nothing in (None, (), optax.sgd(0.1).init(PARAMS)):
        with pytest.raises(ValueError, match="nothing in it has a place"):
            upgrade_state(nothing, optax.chain(CLIP, ADAM).init(PARAMS))


def test_an_optimizer_without_a_memory_has_nothing_to_be_kept():
    sgd = optax.sgd(0.1)
    fresh = optax.chain(CLIP, sgd).init(PARAMS)
    state = upgrade_state(trained(sgd), fresh)
    jax.tree.map(np.testing.assert_array_equal, state, fresh)


def test_from_bytes_of_flax_with_the_old_optimizer_as_the_template():
    old, new = optax.chain(CLIP, ADAM), optax.chain(SCHEDULED, ADAM)
    saved = flax.serialization.to_bytes(trained(old))
    restored = flax.serialization.from_bytes(old.init(PARAMS), saved)
    state = upgrade_state(restored, new.init(PARAMS))
    assert int(state[1][0].count) == 3
    jax.jit(new.update)(PARAMS, state, PARAMS)


def test_the_opt_state_of_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda model: (model(jnp.ones((4, 2))) ** 2).sum())(model)
    old = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    old.update(model, grads)
    new = nnx.Optimizer(model, optax.chain(OTHER, ADAM), wrt=nnx.Param)
    new.opt_state = upgrade_state(old.opt_state, new.opt_state)
    assert int(new.opt_state[1][0].count[...]) == 1
    new.update(model, grads)
    assert int(new.opt_state[1][0].count[...]) == 2
    assert int(metrics(new)["step_count"]) == 1
