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
SGD = optax.sgd(RATE)
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


def clip_then_step(monitor):
    clip, params = clip_by_global_norm(LIMIT), START
    state, sgd_state = clip.init(params), SGD.init(params)
    for step in range(STEPS):
        before, grads = params, gradients(params, step)
        clipped, state = clip.update(grads, state)
        updates, sgd_state = SGD.update(clipped, sgd_state)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params)


def chain(monitor, clip, per_group=False):
    optimizer, params = optax.chain(clip, SGD), START
    state = optimizer.init(params)
    for step in range(STEPS):
        before, grads = params, gradients(params, step)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params, per_group=per_group)


def clipped_tree_dropped(monitor):
    """Called as if it worked in place, as PyTorch's `clip_grad_norm_` does."""
    clip, params = clip_by_global_norm(LIMIT), START
    state, sgd_state = clip.init(params), SGD.init(params)
    for step in range(STEPS):
        before, grads = params, gradients(params, step)
        _, state = clip.update(grads, state)
        updates, sgd_state = SGD.update(grads, sgd_state)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params)


def clip_after_step(monitor):
    """`optimizer.step()`, then the clip."""
    clip, params = clip_by_global_norm(LIMIT), START
    state, sgd_state = clip.init(params), SGD.init(params)
    for step in range(STEPS):
        before, grads = params, gradients(params, step)
        updates, sgd_state = SGD.update(grads, sgd_state)
        params = optax.apply_updates(params, updates)
        grads, state = clip.update(grads, state)
        record(monitor, step, state, before, params)


def clip_before_backward(monitor):
    """The gradients of the step before are still there, and are clipped again."""
    clip, params = clip_by_global_norm(LIMIT), START
    state, sgd_state = clip.init(params), SGD.init(params)
    grads = jax.tree.map(jnp.zeros_like, params)
    for step in range(STEPS):
        before, (_, state) = params, clip.update(grads, state)
        grads = gradients(params, step)
        updates, sgd_state = SGD.update(grads, sgd_state)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params)


def clip_after_zero_grad(monitor):
    """`zero_grad()`, clip, `backward()`: two tasks of Bai, Kolter, Koltun 2018 as published."""
    clip, params = clip_by_global_norm(LIMIT), START
    state, sgd_state = clip.init(params), SGD.init(params)
    for step in range(STEPS):
        before, grads = params, jax.tree.map(jnp.zeros_like, params)
        grads, state = clip.update(grads, state)
        updates, sgd_state = SGD.update(gradients(params, step), sgd_state)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params)


def one_group_masked(monitor):
    """Only the encoder is clipped."""
    clip = optax.masked(clip_by_global_norm(LIMIT), {"encoder": True, "head": False})
    optimizer, params = optax.chain(clip, SGD), START
    state = optimizer.init(params)
    for step in range(STEPS):
        before, grads = params, gradients(params, step)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params)


def one_group_partitioned(monitor):
    """Two parameter groups, of which the second has an optimizer without the clip."""
    groups = {"clipped": optax.chain(clip_by_global_norm(LIMIT), SGD), "free": SGD}
    optimizer = optax.partition(groups, {"encoder": "free", "head": "clipped"})
    params, state = START, optimizer.init(START)
    for step in range(STEPS):
        before, grads = params, gradients(params, step)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params)


def each_array_dropped(monitor):
    clip, params = clip_by_norm(LIMIT), START
    state, sgd_state = clip.init(params), SGD.init(params)
    for step in range(STEPS):
        before, grads = params, gradients(params, step)
        _, state = clip.update(grads, state)
        updates, sgd_state = SGD.update(grads, sgd_state)
        params = optax.apply_updates(params, updates)
        record(monitor, step, state, before, params, per_group=True)


BUGS = {
    clipped_tree_dropped: ("as much as before the clip", "returns is dropped"),
    clip_after_step: ("as much as before the clip", "runs after the step"),
    clip_before_backward: ("the clip saw the gradient of the step before", "before the backward"),
    clip_after_zero_grad: ("the clip saw zeros", "before the backward pass"),
    one_group_masked: ("passed the clip by", "without `optax.masked`"),
    one_group_partitioned: ("passed the clip by", "before `optax.partition`"),
    each_array_dropped: ("as much as before the clip", "returns is dropped"),
}
names = {"ids": lambda loop: loop.__name__}


def test_a_loop_that_clips_raises_nothing():
    monitor = Monitor()
    clip_then_step(monitor)
    assert monitor.alerts == []
    assert monitor.history["grad_norm"].min() > 10 * LIMIT


CLIPS = {
    "global": clip_by_global_norm(LIMIT),
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
    chain(monitor, CLIPS[name], per_group)
    assert monitor.alerts == []
    assert monitor.history["clipped"].max() > 0


@pytest.mark.parametrize("loop", BUGS, **names)
def test_each_clip_that_does_nothing_is_named(loop):
    alerts = []
    monitor = Monitor(on_alert=alerts.append)
    loop(monitor)
    monitor.flush()
    (alert,) = alerts
    seen, fix = BUGS[loop]
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
