"""Clips that do nothing: published bugs as small loops, each of which the monitor names.

Most of them trained for years before anyone saw it: the logged norm looks right, for it is that
before the clip. What tells is the norm of the update that reached the optimizer; behind plain SGD
that is how far the parameters moved, over the learning rate, whatever the loop calls its variables.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import gradclip_jax
from gradclip_jax import Monitor, clip_by_global_norm, clip_by_norm, global_norm, metrics

RATE, LIMIT, STEPS = 0.01, 1.0, 10
START = {"encoder": jnp.array([3.0, -2.0]), "head": jnp.array([5.0])}
SGD, GLOBAL = optax.sgd(RATE), clip_by_global_norm(LIMIT)
NOISE = jax.random.normal(jax.random.key(0), (120, 3))


@jax.jit
def gradients(params, step):
    """Of a parabola, with noise that keeps the norm well above the limit."""
    noise = {"encoder": NOISE[step, :2], "head": NOISE[step, 2:]}
    return jax.tree.map(lambda w, e: 10 * (w + 0.1 * e), params, noise)


@jax.jit
def unthreaded(params, step):
    """A step that begins with the state of the first one."""
    optimizer = optax.chain(clip_by_global_norm(LIMIT), SGD)
    updates, state = optimizer.update(gradients(params, step), optimizer.init(params))
    return optax.apply_updates(params, updates), metrics(state)


@jax.jit
def norm_applied(before, after):
    """The norm of the update that reached SGD."""
    return global_norm(jax.tree.map(jnp.subtract, before, after)) / RATE


def record(monitor, step, state, before, after, **options):
    monitor.record(step, metrics(state, **options), update_norm=norm_applied(before, after))


def run(monitor, order, clip=GLOBAL, per_group=False):
    """Train with the operations of a step in this order; each works on the same gradient."""
    params, state, sgd_state = START, clip.init(START), SGD.init(START)
    grads = jax.tree.map(jnp.zeros_like, START)
    for step in range(STEPS):
        before = params
        for operation in order:
            match operation:
                case "zero grad":
                    grads = jax.tree.map(jnp.zeros_like, params)
                case "backward":
                    grads = gradients(params, step)
                case "clip":
                    grads, state = clip.update(grads, state, params)
                case "clip in place":  # as PyTorch's `clip_grad_norm_`: what it returns is dropped
                    _, state = clip.update(grads, state, params)
                case "step":
                    updates, sgd_state = SGD.update(grads, sgd_state)
                    params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params, per_group=per_group)


RIGHT = ["backward", "clip", "step"]
DROPPED = ["backward", "clip in place", "step"]
PARTS = {"clipped": GLOBAL, "free": optax.identity()}
# Two of them train tasks of Bai, Kolter, Koltun 2018 as published: those after `zero_grad()`.
BUGS = {
    "the clipped tree is dropped": (
        (DROPPED,),
        ("as much as before the clip", "returns is dropped"),
    ),
    "each array is clipped, and dropped": (
        (DROPPED, clip_by_norm(LIMIT), True),
        ("as much as before the clip", "returns is dropped"),
    ),
    "clip after step": (
        (["backward", "step", "clip"],),
        ("as much as before the clip", "runs after the step"),
    ),
    "clip before backward": (
        (["clip", "backward", "step"],),
        ("the clip saw the gradient of the step before", "before the backward"),
    ),
    "clip after zero grad": (
        (["zero grad", "clip", "backward", "step"],),
        ("the clip saw zeros", "before the backward pass"),
    ),
    "one group is masked": (
        (RIGHT, optax.masked(GLOBAL, {"encoder": True, "head": False})),
        ("passed the clip by", "without `optax.masked`"),
    ),
    "one group has no clip": (
        (RIGHT, optax.partition(PARTS, {"encoder": "free", "head": "clipped"})),
        ("passed the clip by", "before `optax.partition`"),
    ),
}


def test_a_loop_that_clips_raises_nothing():
    monitor = Monitor()
    run(monitor, RIGHT)
    assert monitor.alerts == []
    assert monitor.history["grad_norm"].min() > 10 * LIMIT


CLIPS = {
    "global": GLOBAL,
    "smooth": clip_by_global_norm(LIMIT, response=gradclip_jax.responses.smooth),
    "drop": clip_by_global_norm(LIMIT, response=gradclip_jax.responses.drop),
    "normalised": gradclip_jax.normalize_by_norm(LIMIT),
    "adaptive": gradclip_jax.zclip(),
    "each array": clip_by_norm(LIMIT),
    "each unit": gradclip_jax.clip_by_unit_norm(LIMIT, axes=()),
    "relative": gradclip_jax.adaptive_grad_clip(0.1),
    "two": optax.chain(gradclip_jax.clip_by_norm(LIMIT), clip_by_global_norm(LIMIT)),
    "one for each part": optax.partition({"a": GLOBAL, "b": GLOBAL}, {"encoder": "a", "head": "b"}),
    # What they measure is not the norm of what reached the optimizer.
    "values": gradclip_jax.clip_by_value(LIMIT),
    "largest modulus": clip_by_global_norm(LIMIT, order=float("inf")),
    "singular values": gradclip_jax.spectral_clip(LIMIT),
    "values, in a guard": gradclip_jax.skip_nonfinite(gradclip_jax.clip_by_value(LIMIT)),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("per_group", [False, True])
def test_no_clip_that_works_is_blamed(name, per_group):
    monitor = Monitor()
    run(monitor, RIGHT, CLIPS[name], per_group)
    assert monitor.alerts == []
    assert monitor.history["clipped"].max() > 0


@pytest.mark.parametrize("bug", BUGS)
def test_each_clip_that_does_nothing_is_named(bug):
    alerts = []
    monitor = Monitor(on_alert=alerts.append)
    loop, (seen, fix) = BUGS[bug]
    run(monitor, *loop)
    monitor.flush()
    (alert,) = alerts
    assert alert.kind == "not_reduced"
    assert "The limit was exceeded and the update was not reduced" in alert.message
    assert seen in alert.message
    assert fix in alert.advice
    assert alert.since <= 1
    assert alert.step <= 3


def behind(optimizer, limit, told=True):
    """The alerts of a clip that stands behind the optimizer: it sees steps, not gradients."""
    alerts = []
    monitor = Monitor(on_alert=alerts.append)
    chain = optax.chain(optimizer, clip_by_global_norm(limit))
    params, state = START, chain.init(START)

    @jax.jit
    def train(params, state, step):
        grads = gradients(params, step)
        updates, state = chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state, global_norm(grads)

    for step in range(240):
        params, state, norm = train(params, state, step % 120)
        monitor.record(step, metrics(state), update_norm=norm if told else None)
    monitor.flush()
    return alerts


@pytest.mark.parametrize("optimizer", [optax.sgd(RATE), optax.adam(1e-3)], ids=["sgd", "adam"])
@pytest.mark.parametrize("limit", [1000.0, 10.0, 1.0, 1e-5])
def test_a_clip_behind_the_optimizer_is_said_to_stand_there(optimizer, limit, standard_promotion):
    first, *more = behind(optimizer, limit)
    assert (first.kind, first.step, first.since) == ("behind_optimizer", 2, 0)
    assert "reached the optimizer: at least ten times as much" in first.message
    assert "The clip stands behind the optimizer" in first.advice
    assert "`optax.chain(clip, optimizer)`" in first.advice
    expected = "limit_too_low" if limit < 1e-3 else "limit_inert"
    assert {alert.kind for alert in more} <= {expected}


def test_weight_decay_and_normalising_are_no_clip_behind_the_optimizer():
    monitor = Monitor(on_alert=lambda alert: None)
    for step in range(10):  # twice as much by weight decay; 50 times by a clip that enlarges
        norm = 1.0 + 0.1 * step
        numbers = {"grad_norm": norm, "clip_limit": 100.0, "clip_factor": 1.0, "clipped": 0.0}
        monitor.record(2 * step, numbers, update_norm=2 * norm)
        enlarged = numbers | {"clip_factor": 100 / norm}
        monitor.record(2 * step + 1, enlarged, update_norm=100.0)
    assert monitor.alerts == []


@pytest.mark.parametrize("optimizer", [optax.sgd(RATE), optax.adam(1e-3)], ids=["sgd", "adam"])
def test_without_the_norm_that_reached_the_optimizer_its_place_is_the_first_to_check(
    optimizer, standard_promotion
):
    (alert,) = behind(optimizer, 100.0, told=False)
    assert alert.kind == "limit_inert"
    where = alert.advice.index("behind the optimizer")
    assert where < alert.advice.index("lower the limit")


def test_a_clip_that_does_not_act_before_the_optimizer_is_not_said_to_stand_behind_it():
    monitor = Monitor(on_alert=lambda alert: None)
    run(monitor, RIGHT, clip_by_global_norm(1e6))
    assert monitor.alerts == []


def test_a_factor_that_is_logged_but_not_applied_needs_no_norm_of_the_update():
    alerts = []
    monitor = Monitor(on_alert=alerts.append)
    for step in range(3):
        numbers = {"grad_norm": 5.0 + step, "clip_limit": 1.0, "clip_factor": 1.0, "clipped": 1.0}
        monitor.record(step, numbers)
    assert [alert.kind for alert in alerts] == ["not_reduced"]
    assert "no factor is applied" in alerts[0].advice


def test_a_state_that_is_not_threaded_through_is_frozen():
    """`init` in the loop: the clip counts one update for ever, and an adaptive one never learns."""
    alerts = []
    params, monitor = START, Monitor(on_alert=alerts.append)
    for step in range(120):
        params, seen = unthreaded(params, step)
        monitor.record(step, seen)
    monitor.flush()
    assert [(alert.kind, alert.step, alert.since) for alert in alerts] == [("frozen", 100, 0)]
    assert "counted 1 updates ever since step 0" in alerts[0].message
    assert "not threaded through" in alerts[0].advice
