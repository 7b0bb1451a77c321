"""The engine: measure, limit and response in any combination."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip_jax
from gradclip_jax import ClipState, Limit, clip_to_limit, group_norms, leaf_norms, unit_norms
from gradclip_jax.limits import minimum
from gradclip_jax.responses import drop, normalize

GRADS = {"w": jnp.array([[3.0, 0.0], [4.0, 12.0]]), "b": jnp.array([0.0, 84.0])}

last_norm = Limit(lambda norm: jnp.full(norm.shape, jnp.inf), lambda norm, state: (state, norm))


def run(clip, *updates):
    state = clip.init(updates[0])
    results = []
    for update in updates:
        result, state = clip.update(update, state)
        results.append(result)
    return results, state


def test_the_example_that_can_be_checked_by_hand():
    clip = gradclip_jax.clip_by_global_norm(1.0)
    (result,), state = run(clip, {"w": jnp.array([3.0, 4.0])})
    np.testing.assert_allclose(result["w"], [0.6, 0.8], rtol=1e-7)
    assert float(state.grad_norm) == 5.0
    assert float(state.clip_factor) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "measure",
    [leaf_norms, unit_norms, functools.partial(group_norms, labels={"w": "x", "b": "y"})],
    ids=["leaf_norms", "unit_norms", "group_norms"],
)
def test_any_limit_serves_at_any_granularity(measure):
    """A limit that learns has statistics of its own for each norm."""
    clip = clip_to_limit(last_norm, measure=measure)
    doubled = {"w": 2 * GRADS["w"], "b": GRADS["b"] / 2}
    (first, second, third), state = run(clip, GRADS, doubled, GRADS)
    jax.tree.map(np.testing.assert_array_equal, first, GRADS)  # no limit yet
    np.testing.assert_allclose(second["w"], GRADS["w"], rtol=1e-6)  # held to the norm before
    np.testing.assert_array_equal(second["b"], doubled["b"])
    np.testing.assert_array_equal(third["w"], GRADS["w"])
    np.testing.assert_allclose(third["b"], doubled["b"], rtol=1e-6)
    assert int(state.clip_count) == 2


def test_a_nan_in_one_group_leaves_the_statistics_of_that_group_alone():
    clip = clip_to_limit(last_norm, measure=leaf_norms)
    broken = {"w": GRADS["w"].at[0, 0].set(jnp.nan), "b": GRADS["b"] / 2}
    _, state = run(clip, GRADS, broken)
    np.testing.assert_allclose(state.limit_state, [42.0, 13.0])
    assert np.isnan(state.grad_norm["w"])
    assert int(state.nonfinite_count) == 1


def test_joined_limits_and_other_responses():
    clip = clip_to_limit(minimum(last_norm, 50.0), measure=leaf_norms, response=drop)
    (first,), state = run(clip, GRADS)
    np.testing.assert_array_equal(first["w"], GRADS["w"])
    np.testing.assert_array_equal(first["b"], [0.0, 0.0])
    assert float(state.clip_limit["b"]) == 50.0
    (unit,), _ = run(clip_to_limit(1.0, measure=leaf_norms, response=normalize), GRADS)
    np.testing.assert_allclose(np.linalg.norm(unit["w"]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit["b"]), 1.0, rtol=1e-6)


def test_a_measure_of_the_user_with_a_prefix_of_the_updates():
    """A norm for each block of a model, however deep the block."""

    def block_norms(updates, *, axis_name):
        return {
            name: gradclip_jax.global_norm(block, axis_name=axis_name)
            for name, block in updates.items()
        }

    grads = {"encoder": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": jnp.array([0.5])}
    (result,), state = run(clip_to_limit(1.0, measure=block_norms), grads)
    np.testing.assert_allclose(result["encoder"]["w"], [0.6], rtol=1e-6)
    np.testing.assert_allclose(result["encoder"]["b"], [0.8], rtol=1e-6)
    np.testing.assert_array_equal(result["head"], [0.5])
    assert set(state.clip_measure) == {"encoder", "head"}


def test_a_measure_whose_norms_are_no_prefix_raises():
    clip = clip_to_limit(1.0, measure=lambda updates, *, axis_name: {"elsewhere": jnp.float32(1)})
    with pytest.raises(ValueError, match="`measure` must return norms whose tree is a prefix"):
        run(clip, GRADS)


GIVEN = clip_to_limit(1.0, measure=gradclip_jax.given_norm("grad_norm"))


def test_a_given_norm_is_not_measured_again():
    state = GIVEN.init(GRADS)
    result, state = GIVEN.update(GRADS, state, grad_norm=jnp.float32(170.0), loss=1.0)
    np.testing.assert_allclose(result["b"], GRADS["b"] / 170, rtol=1e-6)
    assert float(state.grad_norm) == 170.0
    text = str(jax.make_jaxpr(lambda g, s, n: GIVEN.update(g, s, grad_norm=n))(GRADS, state, 1.0))
    assert "reduce_sum" not in text


def test_a_given_norm_that_may_not_be_is_named():
    state = GIVEN.init(GRADS)
    with pytest.raises(ValueError, match=r"`grad_norm` must be a scalar, got shape \(2,\)"):
        GIVEN.update(GRADS, state, grad_norm=jnp.ones(2))
    with pytest.raises(ValueError, match=r"`grad_norm` must be real, got complex64"):
        GIVEN.update(GRADS, state, grad_norm=jnp.complex64(1))
    for missing in ({}, {"grad_norm": None}, {"norm": 1.0}):
        with pytest.raises(ValueError, match=r"`grad_norm` must be given: .*grad_norm=norm"):
            GIVEN.update(GRADS, state, **missing)
    for name in ("", "grad norm", None, 5.0):
        with pytest.raises(ValueError, match="`name` must be the name of an extra argument"):
            gradclip_jax.given_norm(name)


def test_a_given_norm_goes_through_a_chain():
    optimizer = optax.chain(GIVEN, optax.sgd(1.0))
    result, _ = optimizer.update(GRADS, optimizer.init(GRADS), grad_norm=jnp.float32(170.0))
    np.testing.assert_allclose(result["b"], -GRADS["b"] / 170, rtol=1e-6)


def test_a_given_norm_serves_adaptive_limits():
    clip = gradclip_jax.autoclip(50.0, measure=gradclip_jax.given_norm("n"))
    state = clip.init(GRADS)
    for norm, limit in ((2.5, 2.5), (10.0, 6.25)):
        _, state = clip.update(GRADS, state, n=norm)
        assert float(state.clip_limit) == limit


def test_examples_have_no_given_norm():
    """A norm of zero there would let each of them through."""
    with pytest.raises(ValueError, match="`grad_norm` must be given"):
        gradclip_jax.per_example.clip(
            {"w": jnp.ones((2, 3))}, max_norm=1.0, measure=gradclip_jax.given_norm("grad_norm")
        )


ALL_KEYS = {"grad_norm": 5.0, "norm": 5.0, "loss": 1.0, "value": 1.0}


def test_a_norm_for_the_first_clip_of_a_chain_does_not_reach_the_second(standard_promotion):
    """The update had a norm of 0.028, not 0.1: the second clip took 5 for the norm of Adam's."""
    first, last = gradclip_jax.clip_by_global_norm(1.0), gradclip_jax.clip_by_global_norm(0.1)
    grads = {"w": jnp.array([3.0, 4.0])}
    for clip in (first, GIVEN):
        chain = optax.chain(clip, optax.adam(1.0), last)
        updates, state = chain.update(grads, chain.init(grads), grads, **ALL_KEYS)
        assert float(optax.tree.norm(updates)) == pytest.approx(0.1)
        assert float(state[0].grad_norm) == 5.0


def test_a_norm_from_before_the_unscaling_does_not_reach_the_clip():
    """The update had a norm of 0.00098, not 1."""
    chain = optax.chain(optax.scale(1 / 1024), gradclip_jax.clip_by_global_norm(1.0))
    grads = {"w": jnp.array([3.0, 4.0]) * 1024}
    updates, _ = chain.update(grads, chain.init(grads), grad_norm=5.0 * 1024)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0)


def test_updates_of_another_structure_than_at_init_raise():
    clip = gradclip_jax.clip_by_norm(1.0)
    state = clip.init(GRADS)
    with pytest.raises(
        ValueError, match="`updates` must have the structure of the params given to"
    ):
        clip.update({"w": GRADS["w"]}, state)


@pytest.mark.parametrize(
    "clips",
    [
        (gradclip_jax.clip_by_global_norm(1.0), gradclip_jax.clip_by_global_norm(1.0, order=1)),
        (gradclip_jax.clip_by_global_norm(1.0, order=1), gradclip_jax.clip_by_global_norm(1.0)),
        (gradclip_jax.clip_by_value(1.0), gradclip_jax.clip_by_global_norm(1.0)),
        (gradclip_jax.clip_by_norm(1.0), gradclip_jax.spectral_clip(1.0)),
    ],
)
def test_a_state_with_another_measure_than_that_of_the_clip_raises(clips):
    """It would call a largest modulus a norm, or the other way round."""
    first, second = clips
    with pytest.raises(ValueError, match="`state` come from this clip"):
        second.update(GRADS, first.init(GRADS))


def test_updates_may_lack_leaves_that_the_params_have():
    """None for a parameter that is frozen is no other structure."""
    clip = gradclip_jax.clip_by_global_norm(1.0)
    updates = {"w": None, "b": GRADS["b"]}
    result, _ = clip.update(updates, clip.init(GRADS), GRADS)
    assert result["w"] is None
    assert float(result["b"][1]) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "leaf"}, r"^`measure` must be a function .* got 'leaf'\. Pass a response"),
        (
            {"measure": gradclip_jax.responses.shrink},
            "`measure` must be .* Pass a response as `response`",
        ),
        ({"measure": {"w": 1}}, "`measure` must be a function"),
        (
            {"response": "shrink"},
            r"^`response` must be .* `gradclip_jax\.responses\.shrink`, got 'shrink'",
        ),
        ({"response": leaf_norms}, "`response` must be a function of norm and limit"),
        ({"response": 0.5}, "`response` must be a function of norm and limit"),
    ],
)
def test_a_measure_or_a_response_that_may_not_be_raises_before_any_update(arguments, message):
    with pytest.raises(ValueError, match=message):
        clip_to_limit(1.0, **arguments)
    if "response" in arguments:
        with pytest.raises(ValueError, match=message):
            gradclip_jax.clip_by_global_norm(1.0, **arguments)
        with pytest.raises(ValueError, match=message):
            gradclip_jax.spectral_clip(1.0, **arguments)
    else:
        with pytest.raises(ValueError, match=message):
            gradclip_jax.zclip(**arguments)


def test_a_compiled_measure_and_a_bound_response_pass_the_door():
    response = functools.partial(gradclip_jax.responses.shrink, eps=0.0)
    clip = clip_to_limit(
        1.0, measure=jax.jit(leaf_norms, static_argnames="axis_name"), response=response
    )
    run(clip, GRADS)


def test_state_is_readable_by_its_field_names():
    optimizer = optax.chain(gradclip_jax.clip_by_global_norm(1.0), optax.sgd(1.0))
    _, state = optimizer.update(GRADS, optimizer.init(GRADS))
    assert float(optax.tree.get(state, "grad_norm")) == 85.0
    assert ClipState._fields[:4] == ("grad_norm", "clip_measure", "clip_limit", "clip_factor")


def test_help_shows_the_defaults_that_injection_must_not_see():
    text = str(inspect.signature(gradclip_jax.clip_by_global_norm))
    assert "order: float = 2" in text
    assert "= shrink" in text
    assert "'zero', 'propagate'] = 'zero'" in text


def test_structural_arguments_pass_through_injection():
    make = optax.inject_hyperparams(
        gradclip_jax.clip_by_global_norm, static_args=("order", "response")
    )
    clip = make(max_norm=1.0, order=1, response=drop)
    result, state = clip.update(GRADS, clip.init(GRADS))
    assert float(jnp.abs(result["b"]).sum()) == 0
    assert set(state.hyperparams) == {"max_norm"}
    with pytest.raises(ValueError, match="`order` must be a Python number"):
        optax.inject_hyperparams(gradclip_jax.clip_by_global_norm)(max_norm=1.0, order=1).init(
            GRADS
        )


def test_counters_stop_at_their_largest_value():
    clip = gradclip_jax.clip_by_global_norm(1.0)
    most = jnp.int32(2**31 - 1)
    state = clip.init(GRADS)._replace(step_count=most, clip_count=most)
    _, state = clip.update(GRADS, state)
    assert int(state.step_count) == int(state.clip_count) == 2**31 - 1


WITH_A_MEMORY = {
    "adagc": gradclip_jax.adagc(),
    "spam_clip": gradclip_jax.spam_clip(),
    "zclip": gradclip_jax.zclip(),
    "skip_nonfinite": gradclip_jax.skip_nonfinite(optax.sgd(1.0)),
    "skip_spikes": gradclip_jax.skip_spikes(optax.sgd(1.0), grad_norm=1.0),
    "error_feedback": gradclip_jax.error_feedback(gradclip_jax.clip_by_value(1.0)),
    "clip21": gradclip_jax.clip21(gradclip_jax.clip_by_value(1.0)),
    "gaussian_noise": gradclip_jax.per_example.gaussian_noise(1.0, max_norm=1.0, key=0),
}


@pytest.mark.parametrize("clip", WITH_A_MEMORY.values(), ids=WITH_A_MEMORY)
def test_what_has_a_memory_names_init_for_any_other_state(clip):
    others = [None, (), optax.EmptyState(), optax.adam(1.0).init(GRADS)]
    others.append(gradclip_jax.clip_by_norm(1.0).init(GRADS))
    for other in others:
        with pytest.raises(ValueError, match=r"`state` (must|come from).*"):
            clip.update(GRADS, other, GRADS)


@pytest.mark.parametrize("state", [None, optax.EmptyState()], ids=str)
@pytest.mark.parametrize(
    "clip",
    [gradclip_jax.zero_nonfinite(), gradclip_jax.clip_by_dual_norm(1.0)],
    ids=["zero_nonfinite", "clip_by_dual_norm"],
)
def test_counters_and_constants_start_afresh(clip, state):
    expected = clip.update(GRADS, clip.init(GRADS))
    jax.tree.map(np.testing.assert_array_equal, clip.update(GRADS, state), expected)


def test_a_state_with_other_ranks_of_norms_raises():
    """A norm for each array, and one for each unit of it, have one structure."""
    clip = gradclip_jax.clip_by_unit_norm(1.0)
    with pytest.raises(ValueError, match=r"given to `init`, and `state` come .* ranks \[0, 0\]"):
        clip.update(GRADS, gradclip_jax.clip_by_norm(1.0).init(GRADS))
