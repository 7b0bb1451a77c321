"""PPO on CartPole: the dynamics, the advantages, the loss, and a run that was interrupted."""

import argparse
import json
import math
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.papers import ppo_cartpole
from examples.papers.ppo_cartpole import (
    GAE_LAMBDA,
    GAMMA,
    Batch,
    advantages,
    main,
    ppo_loss,
    step_pole,
)


@pytest.fixture(autouse=True)
def promotion(standard_promotion):
    """Adam needs implicit promotion."""


def digest(out: Path) -> int:
    """Of everything in the last checkpoint: parameters, episodes, keys and history."""
    return json.loads((out / "checkpoints" / "3" / "log" / "metadata").read_text())["digest"]


# The dynamics


def gymnasium_step(state, action):
    """CartPole-v1 in the terms of Gymnasium, with Python's floats."""
    x, x_dot, theta, theta_dot = state
    force = 10.0 if action == 1 else -10.0
    temp = (force + 0.05 * theta_dot**2 * math.sin(theta)) / 1.1
    theta_acc = (9.8 * math.sin(theta) - math.cos(theta) * temp) / (
        0.5 * (4.0 / 3.0 - 0.1 * math.cos(theta) ** 2 / 1.1)
    )
    x_acc = temp - 0.05 * theta_acc * math.cos(theta) / 1.1
    return (
        x + 0.02 * x_dot, x_dot + 0.02 * x_acc,
        theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc,
    )  # fmt: skip


def test_the_first_push_from_rest():
    state, fallen = step_pole(jnp.zeros(4), jnp.int32(1))
    np.testing.assert_allclose(state, [0, 0.195122, 0, -0.292683], atol=1e-6)
    assert not fallen


def test_the_dynamics_are_those_of_gymnasium():
    generator = np.random.default_rng(0)
    states, actions = generator.normal(0, 0.5, (50, 4)), generator.integers(0, 2, 50)
    expected = [gymnasium_step(s, a) for s, a in zip(states, actions, strict=True)]
    found, _ = jax.jit(step_pole)(jnp.asarray(states, jnp.float32), jnp.asarray(actions))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "value", "fallen"),
    [(0, 2.39, False), (0, -2.41, True), (2, 0.209, False), (2, -0.21, True)],
)
def test_the_pole_falls_at_2_4_metres_and_at_12_degrees(place, value, fallen):
    assert step_pole(jnp.zeros(4).at[place].set(value), jnp.int32(1))[1] == fallen


# Learning


def test_a_lost_episode_is_worth_nothing_and_one_cut_off_keeps_its_value():
    value, after, yes, no = jnp.zeros((1, 3)), jnp.full((1, 3), 10.0), True, False
    found = advantages(value, after, jnp.array([[no, yes, no]]), jnp.array([[no, yes, yes]]))
    np.testing.assert_allclose(found, [[10.9, 1.0, 10.9]], rtol=1e-6)


def test_advantages_are_discounted_sums_of_errors_within_an_episode():
    generator = np.random.default_rng(0)
    value, after = generator.normal(size=(2, 20, 3)).astype(np.float32)
    fallen = generator.random((20, 3)) < 0.2
    ended = fallen | (generator.random((20, 3)) < 0.2)
    expected, later = np.zeros((20, 3)), np.zeros(3)
    for t in reversed(range(20)):
        error = 1 + GAMMA * after[t] * (1 - fallen[t]) - value[t]
        expected[t] = later = error + GAMMA * GAE_LAMBDA * later * (1 - ended[t])
    np.testing.assert_allclose(advantages(value, after, fallen, ended), expected, rtol=1e-4)


def test_the_loss_is_that_of_the_paper():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(6, 2))
    value, old_value, advantage, old = generator.normal(size=(4, 6))
    action = generator.integers(0, 2, 6)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ratio = np.exp(log_probs[np.arange(6), action] - old)
    scaled = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    gain = np.minimum(scaled * ratio, scaled * np.clip(ratio, 0.8, 1.2)).mean()
    target = advantage + old_value
    near = old_value + np.clip(value - old_value, -0.2, 0.2)
    error = np.maximum((value - target) ** 2, (near - target) ** 2).mean() / 2
    entropy = -(np.exp(log_probs) * log_probs).sum(1).mean()
    batch = Batch(*map(jnp.float32, (np.zeros((6, 4)), action, old, old_value, advantage)))
    batch = batch._replace(action=jnp.asarray(action))
    policy = jnp.float32(logits), jnp.float32(value)
    found = jax.jit(lambda batch: ppo_loss(lambda _: policy, batch))(batch)
    np.testing.assert_allclose(found, error / 2 - gain - 0.01 * entropy, rtol=1e-5)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_only_with_bootstrap_an_episode_that_is_cut_off_keeps_its_value(bootstrap):
    # All are one step before the limit, far from a fall; the value is 10 everywhere.
    state, elapsed = jnp.zeros((ppo_cartpole.ENVS, 4)), jnp.full(ppo_cartpole.ENVS, 499)
    agent = ppo_cartpole.Agent(None, (), state, elapsed, jax.random.key(0))
    play = jax.jit(lambda agent: ppo_cartpole.play(constant_policy, agent, bootstrap))
    _, batch, returns, episodes = play(agent)
    np.testing.assert_allclose(batch.advantage[0], 0.9 if bootstrap else -9, rtol=1e-5)
    assert returns >= 4 * 500
    assert episodes >= 4


def constant_policy(state):
    return jnp.zeros((*state.shape[:-1], 2)), jnp.full(state.shape[:-1], 10.0)


def test_mean_returns_count_each_episode_once():
    returns, episodes = [10.0, 0.0, 50.0, 30.0], [1.0, 0.0, 2.0, 1.0]
    history = {"returns/0": returns, "returns/1": [0.0] * 4,
               "episodes/0": episodes, "episodes/1": [0.0] * 4}  # fmt: skip
    steps, means = ppo_cartpole.mean_returns(history, parts=2)
    assert steps.tolist() == [1024, 2048]
    np.testing.assert_array_equal(means, [[10.0, math.nan], [80 / 3, math.nan]])


# The command


def test_three_updates_leave_a_table_and_a_plot_and_an_interrupted_run_the_same_agents(
    tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["--steps", "3", "--seeds", "2", "--out", str(whole)]) == 0
    assert (whole / "ppo_cartpole.png").stat().st_size > 10_000
    lines = (whole / "results.txt").read_text().splitlines()
    rows = ("norm ≤ 0.5", "no clip", "CleanRL")
    assert [line.split("  ")[0] for line in lines if line.startswith(rows)] == list(rows)

    train = ppo_cartpole.train

    def interrupted(step, *arguments, **keywords):
        def stopping(agents, number):
            if int(number) == 1:
                signal.raise_signal(signal.SIGINT)
            return step(agents, number)

        return train(stopping, *arguments, **keywords)

    args = argparse.Namespace(
        seed=0, steps=3, seeds=2, learning_rate=2.5e-4, max_norm=0.5, bootstrap=False
    )
    monkeypatch.setattr(ppo_cartpole, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ppo_cartpole.train_agents(args, 0.5, parts)
    monkeypatch.setattr(ppo_cartpole, "train", train)
    ppo_cartpole.train_agents(args, 0.5, parts)
    assert digest(parts) == digest(whole / "clip")


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        (["--seeds", "1"], "`--seeds` must be at least 2, got 1"),
        (["--max-norm", "-1"], "`--max-norm` must be at least 0, got -1"),
        (["--learning-rate", "nan"], "`--learning-rate` must be at least 0, got nan"),
    ],
)
def test_bad_input_is_refused_in_one_line(more, rule, tmp_path, capsys):
    assert main([*more, "--out", str(tmp_path / "run")]) == 2
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
