"""Balance a pole with proximal policy optimization, every gradient held to a norm of 0.5.

    python examples/papers/ppo_cartpole.py

trains five seeds on CartPole-v1, with the clip and without it. All of it is one JAX program:
environments, advantages and optimizer run in a single jitted update, and the seeds are a `vmap`.
The table compares returns with those of CleanRL, whose recipe this is; the plot shows them on
the way there.

An episode is cut off after 500 steps. CleanRL learns from that as if the pole had fallen, which
the policy cannot foresee: there the clip decides. `--bootstrap` keeps the value of the last state.

Schulman, Wolski, Dhariwal, Radford, Klimov 2017, "Proximal policy optimization algorithms",
https://arxiv.org/abs/1707.06347. The recipe and its settings: Huang et al. 2022, "CleanRL",
https://docs.cleanrl.dev/rl-algorithms/ppo.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

import gradclip_jax
from examples.language_model.command_line import check_number, command_line, console, run
from examples.language_model.directory import History
from examples.language_model.loop import train
from examples.language_model.results import save_results
from examples.language_model.scalars import advice

UNITS = 64  # of each hidden layer
ENVS, ROLLOUT = 4, 128  # environments of a seed, and steps in each between two updates
EPOCHS, MINIBATCHES = 4, 4
GAMMA, GAE_LAMBDA = 0.99, 0.95
CLIP_RANGE, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.5, 0.01
MAX_EPISODE = 500
EVALUATION_EPISODES = 100
PUBLISHED = "490.0 ± 6.1"  # CleanRL's page, 500,000 steps

# The dynamics


def step_pole(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state [..., 4] a fiftieth of a second later, and whether the pole has fallen.

    Position, velocity, angle, angular velocity; the action 1 pushes right, 0 left. Barto, Sutton,
    Anderson 1983, with the constants and the Euler step of Gymnasium's CartPole-v1.
    """
    gravity, pole_mass, mass, half_length, push, seconds = 9.8, 0.1, 1.1, 0.5, 10.0, 0.02
    _, velocity, angle, spin = jnp.moveaxis(state, -1, 0)
    force = jnp.where(action == 1, push, -push)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    common = (force + pole_mass * half_length * spin**2 * sin) / mass
    turn = (gravity * sin - cos * common) / (half_length * (4 / 3 - pole_mass * cos**2 / mass))
    push_back = common - pole_mass * half_length * turn * cos / mass
    change = jnp.stack([velocity, push_back, spin, turn], axis=-1)
    state = state + seconds * change
    fallen = (jnp.abs(state[..., 0]) > 2.4) | (jnp.abs(state[..., 2]) > math.radians(12))
    return state, fallen


def start_pole(key: jax.Array, envs: int) -> jax.Array:
    return jax.random.uniform(key, (envs, 4), minval=-0.05, maxval=0.05)


# The agent


class Policy(nnx.Module):
    """Two networks of two hidden layers: the logits of the actions, and the value of the state."""

    def __init__(self, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, scale: float = math.sqrt(2)) -> nnx.Linear:
            orthogonal = nnx.initializers.orthogonal(scale)
            return nnx.Linear(inputs, outputs, kernel_init=orthogonal, rngs=rngs)

        def network(outputs: int, scale: float) -> nnx.Sequential:
            hidden = linear(4, UNITS), jnp.tanh, linear(UNITS, UNITS), jnp.tanh
            return nnx.Sequential(*hidden, linear(UNITS, outputs, scale))

        self.actor, self.critic = network(2, 0.01), network(1, 1.0)

    def __call__(self, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.actor(state), self.critic(state)[..., 0]


@functools.cache
def policy_graph() -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Policy(nnx.Rngs(0))))


def policy_of(params: Any) -> Policy:
    return nnx.merge(policy_graph(), params)


class Agent(NamedTuple):
    """One seed: what it has learned, and the episodes that it is in."""

    params: Any
    opt_state: optax.OptState
    state: jax.Array  # [envs, 4]
    elapsed: jax.Array  # steps of the episode, which is also its return: each step earns 1
    key: jax.Array


class Batch(NamedTuple):
    """What an update learns from: [rollout, envs], or the [minibatch] drawn from it."""

    state: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    advantage: jax.Array


def play(
    policy: Callable, agent: Agent, bootstrap: bool
) -> tuple[Agent, Batch, jax.Array, jax.Array]:
    """A rollout: the batch, the sum of the returns of all episodes that ended, and their number."""

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, tuple]:
        state, elapsed = carry
        logits, value = policy(state)
        key, start_key = jax.random.split(key)
        action = jax.random.categorical(key, logits)
        after, fallen = step_pole(state, action)
        elapsed = elapsed + 1
        ended = fallen | (elapsed == MAX_EPISODE)
        seen = (state, action, log_prob_of(logits, action), value)
        again = jnp.where(ended[:, None], start_pole(start_key, ENVS), after)
        carry = (again, jnp.where(ended, 0, elapsed))
        return carry, (seen, after, fallen, ended, jnp.where(ended, elapsed, 0))

    key, rollout_key = jax.random.split(agent.key)
    keys = jax.random.split(rollout_key, ROLLOUT)
    carry, ys = jax.lax.scan(step, (agent.state, agent.elapsed), keys)
    (state, action, log_prob, value), after, fallen, ended, returns = ys
    lost = fallen if bootstrap else ended
    advantage = advantages(value, policy(after)[1], lost, ended)
    batch = Batch(state, action, log_prob, value, advantage)
    agent = agent._replace(state=carry[0], elapsed=carry[1], key=key)
    return agent, batch, returns.sum(), ended.sum()


def advantages(
    value: jax.Array, value_after: jax.Array, lost: jax.Array, ended: jax.Array
) -> jax.Array:
    """Generalised advantage estimates over [time, envs], with a reward of 1 for every step.

    A_t = δ_t + γ λ (1 − ended_t) A_{t+1}, where δ_t = 1 + γ (1 − lost_t) V(s_{t+1}) − V(s_t).
    `value_after` is that of the state before a reset; where an episode ended but is not `lost`, it
    stands for what would have come. Schulman et al. 2016, https://arxiv.org/abs/1506.02438,
    equation 16.
    """
    errors = 1 + GAMMA * jnp.where(lost, 0, value_after) - value

    def step(later: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, ended = x
        advantage = error + GAMMA * GAE_LAMBDA * jnp.where(ended, 0, later)
        return advantage, advantage

    return jax.lax.scan(step, jnp.zeros_like(value[0]), (errors, ended), reverse=True)[1]


def log_prob_of(logits: jax.Array, action: jax.Array) -> jax.Array:
    return -optax.losses.softmax_cross_entropy_with_integer_labels(logits, action)


def ppo_loss(policy: Callable, batch: Batch) -> jax.Array:
    """The clipped surrogate, the clipped error of the value, and a bonus for entropy."""
    logits, value = policy(batch.state)
    ratio = jnp.exp(log_prob_of(logits, batch.action) - batch.log_prob)
    advantage = batch.advantage - batch.advantage.mean()
    advantage = advantage / (batch.advantage.std(ddof=1) + 1e-8)
    near = jnp.clip(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
    gain = jnp.minimum(advantage * ratio, advantage * near)
    target = batch.advantage + batch.value
    near = batch.value + jnp.clip(value - batch.value, -CLIP_RANGE, CLIP_RANGE)
    error = jnp.maximum((value - target) ** 2, (near - target) ** 2) / 2
    log_probs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return jnp.mean(VALUE_WEIGHT * error - gain - ENTROPY_WEIGHT * entropy)


# Training


class Recipe(NamedTuple):
    """What the compiled functions depend on."""

    steps: int
    learning_rate: float
    bootstrap: bool
    max_norm: float | None  # None: the norm is only measured

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        # Without a limit nothing shall be held back, not even what is not finite.
        on_nonfinite = "propagate" if self.max_norm is None else "zero"
        clip = gradclip_jax.clip_by_global_norm(self.max_norm, on_nonfinite=on_nonfinite)

        def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
            update = jnp.asarray(count) // (EPOCHS * MINIBATCHES)
            return self.learning_rate * (1 - update / self.steps)

        return optax.chain(clip, optax.adam(learning_rate, eps=1e-5))


@functools.partial(jax.jit, static_argnums=0)
def start_agents(recipe: Recipe, keys: jax.Array) -> Agent:
    """An agent for every key."""

    def start(key: jax.Array) -> Agent:
        params_key, state_key, key = jax.random.split(key, 3)
        params = nnx.split(Policy(nnx.Rngs(params_key)))[1]
        state, elapsed = start_pole(state_key, ENVS), jnp.zeros(ENVS, jnp.int32)
        return Agent(params, recipe.optimizer().init(params), state, elapsed, key)

    return jax.vmap(start)(keys)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update_agents(recipe: Recipe, agents: Agent, number: jax.Array) -> tuple[Agent, dict]:
    """A rollout of every agent, and what it learns from it."""
    del number  # the optimizer counts for the learning rate, and the keys are the agents'
    agents, scalars = jax.vmap(functools.partial(update, recipe))(agents)
    shown = {name: scalars[name].mean() for name in ("loss", "grad_norm", "clipped")}
    for name in ("returns", "episodes"):
        shown |= {f"{name}/{seed}": value for seed, value in enumerate(scalars[name])}
    return agents, shown


def update(recipe: Recipe, agent: Agent) -> tuple[Agent, dict[str, jax.Array]]:
    """A rollout, then several epochs of minibatches drawn from it."""
    policy, optimizer = policy_of(agent.params), recipe.optimizer()
    agent, batch, returns, episodes = play(policy, agent, recipe.bootstrap)
    key, order_key = jax.random.split(agent.key)
    size = ENVS * ROLLOUT
    flat = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), batch)
    orders = jax.vmap(lambda key: jax.random.permutation(key, size))(
        jax.random.split(order_key, EPOCHS)
    )

    def loss_of(params: Any, minibatch: Batch) -> jax.Array:
        return ppo_loss(policy_of(params), minibatch)

    def learn(carry: tuple, drawn: jax.Array) -> tuple[tuple, dict[str, jax.Array]]:
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[drawn], flat)
        loss, grads = jax.value_and_grad(loss_of)(params, minibatch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        scalars = {"loss": loss, **gradclip_jax.metrics(opt_state)}
        return (optax.apply_updates(params, updates), opt_state), scalars

    drawn = orders.reshape(EPOCHS * MINIBATCHES, -1)
    (params, opt_state), scalars = jax.lax.scan(learn, (agent.params, agent.opt_state), drawn)
    means = {name: scalars[name].mean() for name in ("loss", "grad_norm", "clipped")}
    agent = agent._replace(params=params, opt_state=opt_state, key=key)
    return agent, {**means, "returns": returns, "episodes": episodes}


@jax.jit
def evaluate_agents(params: Any, keys: jax.Array) -> jax.Array:
    """The mean return of every agent in fresh episodes, with actions drawn as in training."""

    def evaluate(params: Any, key: jax.Array) -> jax.Array:
        policy = policy_of(params)
        start_key, key = jax.random.split(key)

        def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
            state, standing = carry
            action = jax.random.categorical(key, policy(state)[0])
            state, fallen = step_pole(state, action)
            return (state, standing & ~fallen), standing

        carry = start_pole(start_key, EVALUATION_EPISODES), jnp.ones(EVALUATION_EPISODES, bool)
        rewards = jax.lax.scan(step, carry, jax.random.split(key, MAX_EPISODE))[1]
        return rewards.sum(0).astype(jnp.float32).mean()

    return jax.vmap(evaluate)(params, keys)


class Result(NamedTuple):
    history: History
    evaluated: np.ndarray  # mean return of fresh episodes, of each seed


def train_agents(args: argparse.Namespace, max_norm: float | None, out: Path) -> Result:
    recipe = Recipe(args.steps, args.learning_rate, args.bootstrap, max_norm)
    keys, test_keys = (
        jax.random.split(jax.random.key(seed), args.seeds) for seed in (args.seed, args.seed + 1)
    )
    agents, history = train(
        functools.partial(update_agents, recipe), start_agents(recipe, keys), args.steps, out,
        title=f"PPO · {args.seeds} seeds · {'no clip' if max_norm is None else 'clip'}",
        config={**settings_of(args), "max_norm": max_norm},
        per_step=ENVS * ROLLOUT * args.seeds, unit="steps",
    )  # fmt: skip
    return Result(history, np.asarray(evaluate_agents(agents.params, test_keys)))


# What came of it


def mean_returns(history: History, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps at the end of each part of the run; mean returns there, [parts, seeds].

    NaN where no episode of a seed ended.
    """
    returns, episodes = (
        np.stack([history[key] for key in history if key.startswith(name)], axis=1)
        for name in ("returns/", "episodes/")
    )
    starts = np.unique(np.arange(parts) * len(returns) // parts)
    sums, counts = (np.add.reduceat(x, starts) for x in (returns, episodes))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return np.append(starts[1:], len(returns)) * ENVS * ROLLOUT, means


def solved_from(history: History, level: float = 475.0) -> str:
    """The step from which on the mean of the seeds never falls below the level again."""
    steps, means = mean_returns(history, parts=60)
    below = np.flatnonzero(~(means.mean(axis=1) >= level))  # NaN is below
    part = below[-1] + 1 if len(below) else 0
    return f"{steps[part]:,}" if part < len(steps) else "–"


def make_table(results: dict[str, Result]) -> Table:
    """Training is its last tenth; the lowest seed is that of the evaluation."""
    table = Table(title="return on CartPole-v1", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("", "training", "evaluation", "lowest", "475 from", "clipped", "norm"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, (history, evaluated) in results.items():
        table.add_row(
            name,
            *(f"{returns.mean():.1f} ± {returns.std(ddof=1):.1f}"
              for returns in (mean_returns(history, parts=10)[1][-1], evaluated)),
            f"{evaluated.min():.1f}",
            solved_from(history),
            f"{np.mean(history['clipped']):.0%}",
            f"{np.median(history['grad_norm']):.2g}",
        )  # fmt: skip
    table.add_row("CleanRL", PUBLISHED)
    return table


def draw(results: dict[str, Result], max_norm: float, picture: Path) -> None:
    """Mean return with the band from the lowest to the highest seed; below it the norms."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for number, (name, (history, _)) in enumerate(results.items()):
        colour = f"C{number}"
        steps, means = mean_returns(history, parts=60)
        above.plot(steps, means.mean(axis=1), colour, label=name)
        band = means.min(axis=1), means.max(axis=1)
        above.fill_between(steps, *band, color=colour, alpha=0.2, lw=0)
        steps = np.arange(1, len(history["grad_norm"]) + 1) * ENVS * ROLLOUT
        below.plot(steps, history["grad_norm"], colour, lw=0.8, label=name)
    below.axhline(max_norm, color="grey", ls="--", label="limit")
    above.set(ylabel="return (band: all seeds)", ylim=(0, MAX_EPISODE * 1.02))
    below.set(yscale="log", ylabel="gradient norm before the clip", xlabel="steps of each seed")
    above.legend(loc="lower right")
    below.legend(loc="lower left")
    figure.savefig(picture, dpi=100)


def compare(args: argparse.Namespace) -> None:
    """Trains with the clip and without it, and writes table and plot."""
    for name, low in {"steps": 1, "seeds": 2, "learning_rate": 0, "max_norm": 0}.items():
        check_number(name, getattr(args, name), low)
    results = {
        f"norm ≤ {args.max_norm:g}": train_agents(args, args.max_norm, args.out / "clip"),
        "no clip": train_agents(args, None, args.out / "no_clip"),
    }
    save_results(args.out, [make_table(results)], settings_of(args), ["jax", "flax", "optax"])
    draw(results, args.max_norm, args.out / "ppo_cartpole.png")
    console.print(f"Table and plot: {args.out}{advice(args.out)}")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "out"}


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "ppo_cartpole")
    add = parser.add_argument
    add("--steps", type=int, default=976,
        help=f"updates, each after {ENVS * ROLLOUT} steps in environments")  # fmt: skip
    add("--seeds", type=int, default=5, help="agents, each with its own network and environments")
    add("--learning-rate", type=float, default=2.5e-4, help="falls linearly to 0")
    add("--max-norm", type=float, default=0.5)
    add("--bootstrap", action="store_true",
        help="an episode that is cut off keeps the value of its last state")  # fmt: skip
    return run(parser, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
