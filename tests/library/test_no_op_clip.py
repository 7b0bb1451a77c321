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
def moved(before, after):
    """The norm of the update that reached SGD."""
    return global_norm(jax.tree.map(jnp.subtract, before, after)) / RATE


def record(monitor, step, state, before, after, **options):
    monitor.record(step, metrics(state, **options), update_norm=moved(before, after))


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
    "smooth": clip_by_global_norm(LIMIT, response=gradclip_jax.smooth),
    "drop": clip_by_global_norm(LIMIT, response=gradclip_jax.drop),
    "normalised": gradclip_jax.normalize_by_norm(LIMIT),
    "adaptive": gradclip_jax.zclip(),
    "each array": clip_by_norm(LIMIT),
    "each unit": gradclip_jax.clip_by_unit_norm(LIMIT, axes=()),
    "relative": gradclip_jax.adaptive_grad_clip(0.1),
    "two": optax.chain(gradclip_jax.clip_by_norm(LIMIT), clip_by_global_norm(LIMIT)),
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
