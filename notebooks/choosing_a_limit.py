# %% [markdown]
# # Choosing a limit
#
# `clip_by_global_norm(max_norm)` has one number. Where does it come from? This notebook measures
# the norms of a small recurrent network without a clip, reads a limit from their distribution, and
# shows what limits below and above it do to the same run. At the end the limits of well-known
# recipes stand beside what the examples of this repository have measured. It takes a quarter of a
# minute on a CPU.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"  # so that other machines round to the same numbers

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from ipywidgets import FloatLogSlider, FloatSlider, IntSlider, interact
from matplotlib.colors import LogNorm, Normalize

import gradclip_jax

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
plt.rcParams |= {"figure.dpi": 70, "font.size": 12, "legend.frameon": False}
plt.rcParams |= {"axes.spines.right": False, "axes.spines.top": False}
plt.rcParams |= {"figure.constrained_layout.use": True}

# %% [markdown]
# ## 1. A network that forecasts
#
# The signal is a damped oscillation, kept alive by shocks from a Student t distribution with two
# degrees of freedom. Their variance is infinite: now and then one is a hundred times the usual.
#
# $$ x_t = 1.6\, x_{t-1} - 0.9\, x_{t-2} + 0.1\, e_t, \qquad e_t \sim t_2 $$
#
# A tanh network of 16 units forecasts the next value from those before; the loss is the squared
# error. Nobody can forecast the shocks, so the mean of $(0.1\, e_t)^2$ over a batch is the loss of
# the best forecast. We call it the floor, and compare losses with it.

# %%
STEPS, TIMES, STREAMS, UNITS = 600, 24, 8, 16
random = np.random.default_rng(5)
shocks = 0.1 * random.standard_t(2, (STEPS * TIMES + 2, STREAMS))
signal = np.zeros_like(shocks)
for t in range(2, len(signal)):
    signal[t] = 1.6 * signal[t - 1] - 0.9 * signal[t - 2] + shocks[t]

batches = signal[2:].reshape(STEPS, TIMES, STREAMS)  # each step has its own stretch of the signal
floor = np.mean(shocks[2:].reshape(batches.shape)[:, 1:] ** 2, axis=(1, 2))

figure, axes = plt.subplots(figsize=(9, 2.6))
axes.plot(signal[:2000, 0], color=GREY, lw=0.8)
axes.set(xlabel="time", ylabel="one of 8 streams")
plt.show()

# %%
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


@functools.partial(jax.jit, static_argnames="optimizer")
def train_on_device(max_norm, learning_rate, optimizer):
    # The limit is an argument of the compiled program: trying another does not compile again.
    clip = gradclip_jax.clip_by_global_norm(max_norm)
    method = optax.chain(clip, optimizer(learning_rate))

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = method.update(grads, state, params)
        seen = {**gradclip_jax.metrics(state), "loss": loss}
        return (optax.apply_updates(params, updates), state), seen

    return jax.lax.scan(step, (params, method.init(params)), jnp.asarray(batches))[1]


def train(max_norm, learning_rate, optimizer=optax.sgd):
    """What was seen at each of the steps."""
    seen = train_on_device(np.float64(max_norm), np.float64(learning_rate), optimizer)
    return jax.tree.map(np.asarray, seen)


def first(run, count):
    return {name: values[:count] for name, values in run.items()}


def watch(run, every=5):
    """A monitor that was told of a run, a window of steps at a time."""
    monitor = gradclip_jax.Monitor(on_alert=lambda alert: None)
    for last in range(every - 1, len(run["loss"]), every):
        window = slice(last + 1 - every, last + 1)
        monitor.record(last, {name: values[window] for name, values in run.items()})
    return monitor


# %% [markdown]
# ## 2. Measure without a clip
#
# `max_norm=None` (or infinity) measures and clips nothing, with the same state. First at a careful
# learning rate of 0.1. `Monitor` keeps the history, and draws it:

# %%
careful = train(np.inf, 0.1)
watch(careful).plot()

# %% [markdown]
# The norms fall while the network learns and then stay in a band between 0.1 and 1. Out of it stick
# single norms of ten times the median: batches with a large shock. Here they do no harm.
#
# Now at 0.3, three times as fast. Just after step 150 one of these shocks ends the run.

# %%
hasty = train(np.inf, 0.3)
alerts = watch(first(hasty, 200)).alerts
for alert in alerts:
    print(f"step {alert.step}: {alert.kind}")
assert [alert.kind for alert in alerts] == ["loss_spike", "norm_growing", "diverged"]
assert not watch(first(careful, 200)).alerts
assert careful["grad_norm"].max() > 10 * np.median(careful["grad_norm"])

# %%
figure, (norms, losses) = plt.subplots(2, 1, figsize=(9, 4.4), sharex=True)
shown = slice(0, int(np.argmax(hasty["loss"] > 1e3)) + 1)
steps = np.arange(STEPS)
for rate, run, colour in (("0.1", careful, BLUE), ("0.3", hasty, RED)):
    norms.plot(steps[shown], run["grad_norm"][shown], color=colour, lw=1.2)
    losses.plot(steps[shown], run["loss"][shown], color=colour, lw=1.2, label=rate)
losses.plot(steps[shown], floor[shown], color="black", lw=1.2, ls=":", label="floor")
norms.set(yscale="log", ylabel="gradient norm")
losses.set(yscale="log", ylabel="loss", xlabel="step")
losses.legend(title="learning rate", loc="upper left", ncols=3)
plt.show()

# %% [markdown]
# Both runs met the same shock. The slower one was moved by a third of it, and came back.

# %% [markdown]
# ## 3. Look at the distribution
#
# How large a norm is usual is told by the distribution of its logarithm. `suggest_max_norm` takes
#
# $$ \text{max\_norm} = \min\Big( q_{1-r},\; q_{0.5} \big( q_{0.5} / q_{0.16} \big)^3 \Big) $$
#
# with the quantiles $q$ of the norms and the clip rate $r$ that you want, 5 % if you say nothing.
# The second term lies three deviations above the median, as the lower half tells it. It counts
# where a part of the run had exploded: then $q_{0.95}$ is a norm of the explosion.


# %%
def draw_distribution(last=150, rate=0.05):
    """The norms of the run at 0.3 up to a step, and the limit that they suggest."""
    norms = hasty["grad_norm"][: last + 1]
    norms = norms[np.isfinite(norms)]
    advice = gradclip_jax.suggest_max_norm(norms, rate=rate)
    high = np.quantile(norms, 1 - rate)
    low, middle = np.quantile(norms, (0.16, 0.5))
    figure, axes = plt.subplots(figsize=(9, 3.6))
    counts, edges = np.histogram(np.minimum(norms, 9e3), np.geomspace(0.05, 1e4, 80))
    axes.stairs(counts, edges, fill=True, color=GREY)
    for x, colour, style, label in (
        (middle, BLUE, "-", f"median {middle:.2g}"),
        (high, ORANGE, "--", f"$q_{{1-r}}$: {high:.2g}"),
        (middle * (middle / low) ** 3, GREEN, ":", f"three deviations: {middle**4 / low**3:.2g}"),
    ):
        axes.axvline(min(x, 9e3), color=colour, ls=style, lw=2.5, label=label)
    axes.plot(advice.max_norm, 1.05 * counts.max(), "v", color=RED, ms=11, clip_on=False)
    axes.set(xscale="log", xlabel="gradient norm (the last bar: all above)", ylabel="steps")
    axes.set_title(f"steps 0 to {last}: limit {advice.max_norm:g}, clips {advice.rate:.0%}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.7, 1))
    return figure


for last in (150, 175):
    draw_distribution(last)
    plt.show()

# %% [markdown]
# Above: up to step 150 the run is sound. Below: 25 steps of explosion are among the norms. The 95th
# percentile (orange) has gone with them; three deviations (green) have moved little, and so has the
# suggestion, which is the smaller of the two (red). The longer the explosion, the more it moves the
# median as well: read the limit from norms before it. With a kernel, move the last step and the
# rate:

# %%
_ = interact(
    draw_distribution,
    last=IntSlider(value=150, min=20, max=260, step=5),
    rate=FloatSlider(value=0.05, min=0.01, max=0.6, step=0.01),
)


# %%
def advise(norms):
    """The suggestion, and the 95th percentile that it does not always follow."""
    advice = gradclip_jax.suggest_max_norm(norms)
    return advice.max_norm, float(np.quantile(norms, 0.95))


sound, mixed = advise(hasty["grad_norm"][:151]), advise(hasty["grad_norm"][:176])
slower = advise(careful["grad_norm"])
for name, (limit, high) in (
    ("0.3, to step 150", sound),
    ("0.3, to step 175", mixed),
    ("0.1, all", slower),
):
    known = f"{high:.2g}" if high < 1000 else "above 1000"
    print(f"learning rate {name:<17} max_norm {limit:<5.2g} 95th percentile {known}")
assert mixed[0] < 3 * sound[0]
assert mixed[1] > 100 * sound[1]

# %% [markdown]
# ## 4. A dry run
#
# `Monitor.sweep` says when other limits would have acted on norms that were measured, without
# training again. It is a guess: behind another limit the run would have been another. Here the
# guess from the sound part of the run at 0.3 stands beside complete runs with these limits.

# %%
LIMITS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, np.inf)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
grid = {(rate, limit): train(limit, rate) for rate in RATES for limit in LIMITS}


def excess(run):
    """The median of loss / floor over the last 200 steps; infinite where the run diverged.

    Then it ends four times worse than it was before, or worse than an untrained network.
    """
    ratio = np.where(np.isnan(run["loss"]), np.inf, run["loss"] / floor)
    best, last = np.median(ratio.reshape(-1, 50), axis=1).min(), np.median(ratio[-200:])
    return last if last < min(4 * best, 20) else np.inf


print("max_norm  dry run  clipped  loss / floor")
for fired in watch(first(hasty, 150)).sweep([limit for limit in LIMITS if limit < np.inf]):
    run = grid[0.3, fired.max_norm]
    came_out = f"{run['clipped'].mean():>8.0%} {excess(run):>13.1f}"
    if np.isinf(excess(run)):
        came_out = f"{'diverged':>22}"
    print(f"{fired.max_norm:>8g} {fired.rate:>8.0%} {came_out}")
assert np.isinf([excess(grid[0.3, limit]) for limit in (10.0, 30.0, np.inf)]).all()

# %% [markdown]
# At 1 and 3 the guess is near. A limit in the middle of the norms changes the run, and acts more
# often than foreseen. And for a limit of 10 the guess says that it would never have acted, which is
# true of the steps seen; the shock that ended the run came after them.

# %% [markdown]
# ## 5. Too low, too high
#
# All of it at once: nine limits at five learning rates, 600 steps each. A number is the loss over
# the floor at the end. An untrained network has 17.

# %%
untrained = excess(train(np.inf, 0.0))
ratios = np.array([[excess(grid[rate, limit]) for limit in LIMITS] for rate in RATES])
clip_rates = np.array([[grid[rate, limit]["clipped"].mean() for limit in LIMITS] for rate in RATES])
clip_rates[np.isinf(ratios)] = np.nan
assert round(untrained) == 17

names = [f"{limit:g}" if limit < np.inf else "none" for limit in LIMITS]

figure, grid_axes = plt.subplots(2, 1, figsize=(10, 6.6), sharex=True)
palette = plt.get_cmap("viridis_r").with_extremes(bad="#D9D9D9")
for axes, values, scale, form, title in (
    (grid_axes[0], ratios, LogNorm(1.5, 17), ".1f", "loss / floor at the end (grey: diverged)"),
    (grid_axes[1], clip_rates, Normalize(0, 1), ".0%", "clip rate"),
):
    axes.imshow(np.ma.masked_invalid(values), norm=scale, cmap=palette, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if scale(value) > 0.5 else "black"
            axes.text(column, row, f"{value:{form}}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(LIMITS)), names)
    axes.set_yticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
    axes.set_title(title, fontsize=12)
    axes.set_ylabel("learning rate")
    axes.spines[:].set_visible(False)
grid_axes[1].set_xlabel("max_norm")
plt.show()

# %% [markdown]
# * **Too high** (right): the clip has never acted before the shock comes, and what it lets through
#   then is enough. At a learning rate of 0.3 the border lies between 3 and 10, at 1 between 1 and
#   3.
# * **Too low** (left): every step is clipped. Then its length is limit × learning rate, whatever
#   the gradient: along each diagonal the numbers are the same. The limit is a learning rate in
#   disguise.
# * **Between** lies a wide range. A limit buys learning rate: without one 0.1 is the largest that
#   lives; with 0.1 as the limit, 1 trains.

# %%
for (rate, limit), (other_rate, other_limit) in (
    ((0.1, 0.01), (0.01, 0.1)),
    ((0.3, 0.01), (0.1, 0.03)),
    ((1.0, 0.01), (0.1, 0.1)),
):
    pair = excess(grid[rate, limit]), excess(grid[other_rate, other_limit])
    print(f"{rate:g} × {limit:g}: {pair[0]:.1f}   {other_rate:g} × {other_limit:g}: {pair[1]:.1f}")
    np.testing.assert_allclose(*pair, rtol=0.02)
safe = [rate for rate in RATES if np.isfinite(excess(grid[rate, np.inf]))]
assert max(safe) == 0.1
lives = {rate: [np.isfinite(excess(grid[rate, limit])) for limit in LIMITS] for rate in (0.3, 1.0)}
assert lives == {0.3: [True] * 6 + [False] * 3, 1.0: [True] * 5 + [False] * 4}
assert excess(grid[1.0, 0.1]) < excess(grid[0.1, np.inf])

# %% [markdown]
# The suggestion, about 2, is a guard: it keeps the run at 0.3 alive and touches 6 % of the steps.
# It is not the best limit of the row. That is 0.1, below the median norm, where nearly every step
# is clipped: with shocks this heavy, much of what makes a gradient long is noise. `rate=0.5`
# suggests the median.

# %%
suggested = train(sound[0], 0.3)
print(
    f"limit {sound[0]:g}: clips {suggested['clipped'].mean():.0%}, ends at {excess(suggested):.1f}"
)
assert min(LIMITS, key=lambda limit: excess(grid[0.3, limit])) == 0.1
assert excess(suggested) < excess(grid[0.1, np.inf])


# %%
def draw_training(max_norm=2.2, learning_rate=0.3):
    """Norms with the limit, and the losses over the floor, of one run."""
    run = train(max_norm, learning_rate)
    figure, (norms, losses) = plt.subplots(2, 1, figsize=(8.5, 3.8), sharex=True)
    norms.plot(steps, run["grad_norm"], color=GREY, lw=1, label="norm")
    clipped = run["clipped"] > 0
    norms.plot(steps[clipped], run["grad_norm"][clipped], ".", color=RED, ms=5, label="clipped")
    norms.axhline(max_norm, color=BLUE, ls="--", lw=1.5, label="limit")
    norms.set(yscale="log", ylim=(5e-3, 1e3), ylabel="gradient norm")
    norms.legend(loc="upper left", ncols=3)
    losses.plot(steps, run["loss"] / floor, color="black", lw=1)
    losses.axhline(1, color=GREEN, lw=1.5, ls=":")
    losses.set(yscale="log", ylim=(0.8, 1e3), ylabel="loss / floor", xlabel="step")
    norms.set_title(f"limit {max_norm:.2g}, learning rate {learning_rate:.2g}", fontsize=12)
    return figure


for limit in (0.01, 2.2, 10.0):
    draw_training(limit)
    plt.show()

# %% [markdown]
# With a kernel each position of the sliders is a training of its own, which takes a tenth of a
# second:

# %%
_ = interact(
    draw_training,
    max_norm=FloatLogSlider(value=2.2, min=-3, max=3, step=0.1),
    learning_rate=FloatLogSlider(value=0.3, min=-3, max=0, step=0.1),
)

# %% [markdown]
# `Monitor` tells a run with a limit that is too low or too high without a grid to compare with:

# %%
told = {}
for limit, rate in ((0.01, 0.1), (2.2, 0.3), (1000.0, 0.1), (1000.0, 0.3)):
    monitor = watch(first(grid.get((rate, limit)) or train(limit, rate), 300))
    told[limit, rate] = [alert.kind for alert in monitor.alerts]
    listed = ", ".join(f"{alert.kind} (step {alert.step})" for alert in monitor.alerts)
    print(f"limit {limit:<5g} learning rate {rate:g}: {listed or 'nothing'}")
assert told == {
    (0.01, 0.1): ["limit_too_low"],
    (2.2, 0.3): [],
    (1000.0, 0.1): ["limit_inert"],
    (1000.0, 0.3): ["loss_spike", "norm_growing", "diverged"],
}

# %% [markdown]
# ## 6. Under Adam
#
# Adam divides by the root mean square of the gradients it has seen, so it does not ask how long
# they are. A limit that is too low then costs nothing.

# %%
of_adam = [excess(train(limit, 0.01, optax.adam)) for limit in LIMITS]
of_sgd = [excess(grid[0.1, limit]) for limit in LIMITS]
figure, axes = plt.subplots(figsize=(9, 3.6))
places = np.arange(len(LIMITS))
axes.plot(places, of_sgd, "o-", color=ORANGE, label="SGD, learning rate 0.1")
axes.plot(places, of_adam, "s-", color=BLUE, label="Adam, learning rate 0.01")
axes.set(yscale="log", xlabel="max_norm", ylabel="loss / floor at the end", ylim=(1.3, 10))
axes.set_xticks(places, names)
axes.set_yticks([1.5, 2, 3, 5, 8], ["1.5", "2", "3", "5", "8"])
axes.minorticks_off()
axes.legend()
plt.show()

for name, values in (("SGD", of_sgd), ("Adam", of_adam)):
    print(f"{name:<4} from {min(values):.2g} to {max(values):.2g}")
assert max(of_adam) < 1.2 * min(of_adam)
assert max(of_sgd) > 5 * min(of_sgd)
assert min(of_adam[:4]) < of_adam[-1]

# %% [markdown]
# ## 7. The limits of others
#
# `print` of a suggestion shows limits of well-known recipes, and how often each would have acted on
# the norms at hand, here on those of the sound part of our run:

# %%
advice = gradclip_jax.suggest_max_norm(hasty["grad_norm"][:151])
print(advice)

# %% [markdown]
# They are twenty-fold apart, for they belong to other losses: a sum over 35 time steps has other
# gradients than a mean. What do they do in practice? The folder `examples/results` keeps complete
# runs of the examples of this repository, with limits from the recipes that they follow, and the
# clip rates that came out.


# %%
RESULTS = Path("..", "examples", "results")


def found(file, pattern):
    """The numbers in the groups of a pattern, for each line in which it is found."""
    text = (RESULTS / file).read_text("utf-8")
    matches = [match.groups() for match in re.finditer(pattern, text, flags=re.MULTILINE)]
    assert matches, f"{file} has no {pattern}"
    return np.array([[float(group.replace(",", "")) for group in groups] for groups in matches])


def limit_and_rates(file, limit, rates):
    return found(file, limit)[0, 0], found(file, rates)[:, 0] / 100


seen = {
    "PPO, cart-pole (Adam)": limit_and_rates(
        "ppo_cartpole.txt", r"^norm ≤ (\S+)", r"^norm ≤ .*?(\d+)%"
    ),
    "LSTM, Tiny Shakespeare (Adam)": limit_and_rates(
        "shakespeare.txt", r"^max_norm: (\S+)", r"^clip_by_global_norm .*?(\d+)%"
    ),
    "LSTM, Penn Treebank, by epoch (SGD)": limit_and_rates(
        "zaremba-small.txt", r'"max_norm": ([\d.]+)', r"^ +\d+ .* ([\d.]+)%$"
    ),
    "LSTM, forecasting (SGD)": limit_and_rates(
        "forecasting.txt", r"^max_norm: (\S+)", r"^ LSTM, \S+, clip .*?(\d+)%"
    ),
    "RNN, temporal order (SGD)": limit_and_rates(
        "temporal_order.txt", r"norm > (\d+)", r"^ +\d+ +clip +\d\S+ .* (\d+\.\d\d)%"
    ),
    "LSTM, spoken digits (momentum)": limit_and_rates(
        "speech.txt", r"clip_by_global_norm\((\d+)\)", r"^ .*clip_by_global_norm.* (\d+)%$"
    ),
    "LSTM, card fraud (Adam), each array": limit_and_rates(
        "fraud_detection.txt", r'"threshold": ([\d.]+)', r"^ LSTM, \w+, clip .*?([\d.]+)%$"
    ),
}
figure, axes = plt.subplots(figsize=(10, 4))
for place, (_, rates) in enumerate(seen.values()):
    axes.plot(rates, np.full(len(rates), place), "-", color="#D9D9D9", lw=6, zorder=1)
    axes.plot(rates, np.full(len(rates), place), "o", color=BLUE, ms=8, alpha=0.6)
axes.set_yticks(range(len(seen)), [f"{name}: {limit:g}" for name, (limit, _) in seen.items()])
axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
axes.set(xlim=(-0.03, 1.03), xlabel="clip rate of a complete run (of an epoch)")
axes.invert_yaxis()
plt.show()

for name, (limit, rates) in seen.items():
    print(f"{name:<36} limit {limit:<4g} clips {rates.min():>5.1%} to {rates.max():.1%}")
assert seen["PPO, cart-pole (Adam)"][0] == 0.5
assert seen["LSTM, Penn Treebank, by epoch (SGD)"][0] == 5
assert max(rates.max() for _, rates in seen.values()) > 0.99
assert min(rates.max() for _, rates in seen.values()) < 0.05

# %% [markdown]
# A usual limit says nothing of how often it acts: from never to always. Where it acts in nearly all
# steps and the run is good nevertheless, the optimizer is Adam, or the learning rate was tuned with
# the clip in place, as in the recipe of Zaremba et al. (2014). Its limit of 5 is even two things in
# one run:

# %%
columns = r"^ +(\d+) +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+) +([\d.]+)%$"
epochs, medians, largest, shares = found("zaremba-small.txt", columns).T
figure, (norms, rates) = plt.subplots(1, 2, figsize=(11, 3.6))
norms.plot(epochs, largest, "^-", color=RED, label="largest")
norms.plot(epochs, medians, "o-", color=BLUE, label="median")
norms.axhline(5, color="black", ls="--", label="limit")
norms.set(yscale="log", xlabel="epoch", ylabel="gradient norm")
norms.set_yticks([4, 5, 8, 16, 32], ["4", "5", "8", "16", "32"])
norms.minorticks_off()
norms.legend()
rates.bar(epochs, shares, color=ORANGE)
rates.set(xlabel="epoch", ylabel="clipped, %")
plt.show()

low, high = 0.5 * medians, 10 * medians
print(f"epoch {epochs[0]:.0f}: median norm {medians[0]:.1f}, clips {shares[0]:.0f} %")
print(f"epoch {epochs[-1]:.0f}: median norm {medians[-1]:.1f}, clips {shares[-1]:.0f} %")
assert shares[0] < 10
assert largest[0] > 9 * 5
assert shares[4:].min() == 100
assert ((low < 5) & (high > 5)).all()

# %% [markdown]
# In the first epoch it is a guard against norms of up to nine times the limit. From the fifth on it
# sets the length of every step, while the schedule halves the learning rate. Half to ten times the
# mean norm is the range in which Pascanu, Mikolov and Bengio (2013, section 3.2) found limits to
# work; 5 lies within it in every epoch (of the median, the mean was not kept). The limit of PPO
# does not:

# %%
ppo_medians = found("ppo_cartpole.txt", r"^norm ≤ .*?(\S+)$")[:, 0]
for median in ppo_medians:
    print(f"PPO: limit 0.5, half the median norm {median / 2:g}")
assert (0.5 * ppo_medians > 0.5).all()

# %% [markdown]
# ## In short
#
# 1. Run some hundred steps with `max_norm=None`, at a learning rate that lives without a clip.
# 2. `print(Monitor.suggest())`: the limit that clips 5 %, and what others would have clipped.
# 3. SGD: keep the clip rate in mind. Below 10 % the limit is a guard, above 90 % it is a part of
#    the learning rate, so tune the two together. With heavy tails that may be the best there is.
# 4. Adam: take 1, or what the suggestion says. Too low costs nothing, too high does not protect.
# 5. Leave `Monitor` on. The norms change with the loss, the batch and the schedule.
