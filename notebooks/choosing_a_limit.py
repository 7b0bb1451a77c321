# %% [markdown]
# # Choosing max_norm
#
# **Read `max_norm` from the norms of a run without a clip: a wide range of limits works, a limit
# above all norms does not protect, and a limit below all norms is a learning rate.** This notebook
# measures a small recurrent network, takes the limit that `suggest_max_norm` reads from its norms,
# and trains with nine limits at five learning rates. Each number below is asserted in the cell that
# prints it.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"  # so that other machines round to the same numbers

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from ipywidgets import FloatLogSlider, FloatSlider, IntSlider, interact
from matplotlib.colors import LogNorm

import gradclip_jax as gc

plt.style.use("figures.mplstyle")  # the colors C0 to C5 are blue, orange, green, red, purple, gray

# %% [markdown]
# ## A network that forecasts
#
# The signal is a damped oscillation driven by shocks from a Student t distribution with two degrees
# of freedom. Their variance is infinite: now and then one is a hundred times the usual.
#
# $$ x_t = 1.6\, x_{t-1} - 0.9\, x_{t-2} + 0.1\, e_t, \qquad e_t \sim t_2 $$
#
# A tanh network of 16 units forecasts the next value; the loss is the squared error. The shocks
# cannot be forecast, so the mean of $(0.1\, e_t)^2$ over a batch is the loss of the best forecast,
# the floor. An untrained network has 17 times the floor.

# %%
STEPS, TIMES, STREAMS, UNITS = 600, 24, 8, 16
random = np.random.default_rng(5)
shocks = 0.1 * random.standard_t(2, (STEPS * TIMES + 2, STREAMS))
signal = np.zeros_like(shocks)
for t in range(2, len(signal)):
    signal[t] = 1.6 * signal[t - 1] - 0.9 * signal[t - 2] + shocks[t]

batches = signal[2:].reshape(STEPS, TIMES, STREAMS)  # each step has its own stretch of the signal
floor = np.mean(shocks[2:].reshape(batches.shape)[:, 1:] ** 2, axis=(1, 2))
recurrent = random.normal(size=(UNITS, UNITS))
params = {
    "inputs": 0.5 * random.normal(size=UNITS),
    "recurrent": 0.9 * recurrent / np.abs(np.linalg.eigvals(recurrent)).max(),
    "bias": np.zeros(UNITS),
    "readout": 0.3 * random.normal(size=UNITS) / np.sqrt(UNITS),
}


def loss_of(params, batch):
    def cell(hidden, x):
        inputs = x[:, None] * params["inputs"]
        hidden = jnp.tanh(inputs + hidden @ params["recurrent"] + params["bias"])
        return hidden, hidden @ params["readout"]

    _, forecasts = jax.lax.scan(cell, jnp.zeros((STREAMS, UNITS)), batch[:-1])
    return jnp.mean((forecasts - batch[1:]) ** 2)


@functools.partial(jax.jit, static_argnames="method")
def train_on_device(max_norm, learning_rate, method):
    # The limit is an argument of the compiled program: another limit does not compile again.
    optimizer = optax.chain(gc.clip_by_global_norm(max_norm), method(learning_rate))

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        seen = {**gc.metrics(state), "loss": loss}
        return (optax.apply_updates(params, updates), state), seen

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.asarray(batches))[1]


def train(max_norm, learning_rate, method=optax.sgd):
    """The metrics and the loss of each step."""
    seen = train_on_device(np.float64(max_norm), np.float64(learning_rate), method)
    return jax.tree.map(np.asarray, seen)


# %% [markdown]
# ## Measure the norms without a clip
#
# `max_norm=None` (or infinity) measures and does not clip. At a learning rate of 0.1 the norms fall
# while the network learns and then stay between 0.1 and 1, but for batches with a large shock. At
# 0.3 one of these shocks ends the run just after step 150.

# %%
careful, hasty = train(np.inf, 0.1), train(np.inf, 0.3)
steps = np.arange(STEPS)
shown = int(np.argmax(hasty["loss"] > 1e3)) + 1

_, (norms, losses) = plt.subplots(2, 1, figsize=(7.6, 4.6), sharex=True)
for rate, run, color in ((0.1, careful, "C0"), (0.3, hasty, "C3")):
    norms.plot(steps[:shown], run["grad_norm"][:shown], color=color, lw=1.2)
    losses.plot(steps[:shown], run["loss"][:shown], color=color, lw=1.2)
    top = run["loss"][shown - 1]
    losses.text(shown + 1, top, f"learning\nrate {rate}", color=color, va="center")
losses.plot(steps[:shown], floor[:shown], color="C5", lw=1, ls=":")
losses.text(shown + 1, 0.2 * floor[shown - 1], "floor", color="C5", va="center")
norms.set(yscale="log", ylabel="gradient norm", xlim=(0, shown))
losses.set(yscale="log", ylabel="loss", xlabel="step")

print(f"learning rate 0.1: median norm {np.median(careful['grad_norm']):.2f}, ", end="")
print(f"largest {careful['grad_norm'].max():.1f}")
assert careful["grad_norm"].max() > 10 * np.median(careful["grad_norm"])
assert 150 < shown < 170

# %% [markdown]
# ## Read a limit from their distribution
#
# With the quantiles $q$ of the norms and the clip rate $r$ that you want, 5 % by default,
# `suggest_max_norm` takes
#
# $$ \text{max\_norm} = \min\Big( q_{1-r},\; q_{0.5} \big( q_{0.5} / q_{0.16} \big)^3 \Big). $$
#
# The second term lies three deviations of the logarithm above the median, measured on the lower
# half. It counts where a part of the run had exploded: then $q_{0.95}$ is a norm of the explosion.
# The norms in this picture include steps of the explosion.


# %%
def draw_distribution(last, rate):
    """The norms of the run at 0.3 up to a step, and the limit read from them."""
    norms = hasty["grad_norm"][: last + 1]
    norms = norms[np.isfinite(norms)]
    advice = gc.suggest_max_norm(norms, rate=rate)
    low, middle, high = np.quantile(norms, (0.16, 0.5, 1 - rate))
    _, axes = plt.subplots(figsize=(7.6, 3.4))
    counts, edges = np.histogram(np.minimum(norms, 9e3), np.geomspace(0.05, 1e4, 60))
    axes.stairs(counts, edges, fill=True, color="C5", alpha=0.5)
    lines = (
        (middle, "C0", f"median {middle:.2g}"),
        (middle * (middle / low) ** 3, "C2", f"three deviations {middle**4 / low**3:.2g}"),
        (high, "C1", f"quantile {1 - rate:.2g}: {high:.2g}"),
    )
    for row, (x, color, label) in enumerate(sorted(lines)):
        axes.axvline(min(x, 9e3), color=color, lw=2)
        height = counts.max() * (1.3 - 0.12 * row)
        side, shift = ("right", 0.9) if x > 1e3 else ("left", 1.1)
        axes.text(shift * min(x, 9e3), height, label, color=color, ha=side)
    axes.set(xscale="log", xlabel="gradient norm (last bar: all above)", ylabel="steps")
    axes.set_ylim(0, 1.4 * counts.max())
    axes.set_title(f"steps 0 to {last}: max_norm {advice.max_norm:g}, clips {advice.rate:.0%}")


_ = interact(
    draw_distribution,
    last=IntSlider(value=175, min=20, max=260, step=5),
    rate=FloatSlider(value=0.05, min=0.01, max=0.6, step=0.01),
)

# %%
suggested = gc.suggest_max_norm(hasty["grad_norm"][:151])  # before the explosion
exploded = gc.suggest_max_norm(hasty["grad_norm"][:176])
quantiles = [np.quantile(hasty["grad_norm"][:count], 0.95) for count in (151, 176)]
for last, advice in ((150, suggested), (175, exploded)):
    print(f"to step {last}: max_norm={advice.max_norm:.2g} would have clipped {advice.rate:.0%}")
assert 1 < suggested.max_norm < 3
assert exploded.max_norm < 3 * suggested.max_norm
assert quantiles[1] > 100 * quantiles[0]

# %% [markdown]
# ## Too low, too high
#
# Nine limits at five learning rates, 600 steps of SGD each. A number is the loss over the floor in
# the last 200 steps.

# %%
LIMITS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, np.inf)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def excess(run):
    """The median of loss / floor over the last 200 steps; infinite where the run diverged.

    Then it ends four times worse than it was before, or worse than an untrained network.
    """
    ratio = np.where(np.isnan(run["loss"]), np.inf, run["loss"] / floor)
    best, last = np.median(ratio.reshape(-1, 50), axis=1).min(), np.median(ratio[-200:])
    return last if last < min(4 * best, 20) else np.inf


names = [f"{limit:g}" if limit < np.inf else "none" for limit in LIMITS]
ratios = np.array([[excess(train(limit, rate)) for limit in LIMITS] for rate in RATES])
_, axes = plt.subplots(figsize=(7.6, 3.4))
scale = LogNorm(1.5, 17)
palette = plt.get_cmap("viridis_r").with_extremes(bad="none")
axes.imshow(np.ma.masked_invalid(ratios), norm=scale, cmap=palette, aspect="auto")
for (row, column), value in np.ndenumerate(ratios):
    text = f"{value:.1f}" if np.isfinite(value) else "diverged"
    color = "C3" if text == "diverged" else "white" if scale(value) > 0.5 else "black"
    axes.text(column, row, text, ha="center", va="center", color=color, size=9)
axes.set_xticks(range(len(LIMITS)), names)
axes.set_yticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
axes.set(xlabel="max_norm", ylabel="learning rate", title="loss / floor at the end, SGD")
axes.spines[:].set_visible(False)

# %% [markdown]
# * **Too high** (right): the clip first acts on the shock itself, and what it lets through ends the
#   run.
# * **Too low** (left): every step is clipped, and its length is limit × learning rate, whatever the
#   gradient. Along each diagonal the numbers are the same.
# * **Between** lies a wide range. Without a clip 0.1 is the largest learning rate that survives;
#   with a limit of 0.1 a learning rate of 1 trains.
#
# The suggested limit keeps the run at 0.3 alive and clips 6 % of its steps. The best limit of that
# row is lower, 0.1: with shocks this heavy, much of what makes a gradient long is noise. To get a
# limit near the median, call `suggest_max_norm(norms, rate=0.5)`.

# %%
of = {(rate, limit): ratios[i, j] for i, rate in enumerate(RATES) for j, limit in enumerate(LIMITS)}
for (rate, limit), (other_rate, other_limit) in (
    ((0.1, 0.01), (0.01, 0.1)), ((0.3, 0.01), (0.1, 0.03)), ((1.0, 0.01), (0.1, 0.1)),
):  # fmt: skip
    pair = of[rate, limit], of[other_rate, other_limit]
    print(f"{rate:g} × {limit:g}: {pair[0]:.1f}   {other_rate:g} × {other_limit:g}: {pair[1]:.1f}")
    np.testing.assert_allclose(*pair, rtol=0.02)
survives = np.isfinite(ratios).tolist()
assert survives[RATES.index(0.3)] == [True] * 6 + [False] * 3
assert survives[RATES.index(1.0)] == [True] * 5 + [False] * 4
assert max(rate for rate in RATES if np.isfinite(of[rate, np.inf])) == 0.1
assert of[1.0, 0.1] < of[0.1, np.inf]
assert min(LIMITS, key=lambda limit: of[0.3, limit]) == 0.1
run = train(suggested.max_norm, 0.3)
print(f"suggested, at 0.3: clips {run['clipped'].mean():.0%}, ends at {excess(run):.1f}")
assert excess(run) < of[0.1, np.inf]
assert run["clipped"].mean() < 0.1
assert round(excess(train(np.inf, 0.0))) == 17


# %%
def draw_training(max_norm, learning_rate):
    """Norms and losses of one run, which takes a tenth of a second."""
    run = train(max_norm, learning_rate)
    clipped = run["clipped"] > 0
    _, (norms, losses) = plt.subplots(2, 1, figsize=(7.6, 4.2), sharex=True)
    norms.plot(steps, run["grad_norm"], color="C5", lw=1)
    norms.plot(steps[clipped], run["grad_norm"][clipped], ".", color="C3", ms=5)
    norms.axhline(max_norm, color="C0", lw=1.5)
    norms.text(STEPS, max_norm, " limit", color="C0", va="center")
    norms.set(yscale="log", ylim=(5e-3, 1e3), ylabel="gradient norm", xlim=(0, STEPS))
    norms.set_title(f"max_norm {max_norm:.2g}, learning rate {learning_rate:.2g} (red: clipped)")
    losses.plot(steps, run["loss"] / floor, color="C4", lw=1)
    losses.axhline(1, color="C2", lw=1.5)
    losses.text(STEPS, 1, " floor", color="C2", va="center")
    losses.set(yscale="log", ylim=(0.8, 1e3), ylabel="loss / floor", xlabel="step")


_ = interact(
    draw_training,
    max_norm=FloatLogSlider(value=2.2, min=-2, max=2.5, step=0.1),
    learning_rate=FloatLogSlider(value=0.3, min=-3, max=0, step=0.1),
)

# %% [markdown]
# ## Under Adam
#
# Adam divides by the root mean square of past gradients, so their length cancels. A limit that is
# too low costs nothing there.

# %%
of_adam = [excess(train(limit, 0.01, optax.adam)) for limit in LIMITS]
of_sgd = [of[0.1, limit] for limit in LIMITS]
for name, values in (("SGD, learning rate 0.1", of_sgd), ("Adam, learning rate 0.01", of_adam)):
    print(f"{name:<24}: loss / floor from {min(values):.2g} to {max(values):.2g} over all limits")
assert max(of_adam) < 1.2 * min(of_adam)
assert max(of_sgd) > 5 * min(of_sgd)
