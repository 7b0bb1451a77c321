# %% [markdown]
# # Which clip?
#
# Every strategy of `gradclip_jax` meets the same stream of gradients, with spikes, a drift and a
# change of regime, and later the same NaN. What comes out, how far is it turned, and what has the
# clip learned from it? All of them run in one compiled program, which takes most of the half
# minute that this notebook needs on a CPU.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"  # so that other machines round to the same numbers

import inspect

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from ipywidgets import FloatLogSlider, FloatSlider, interact
from matplotlib.colors import LogNorm
from matplotlib.patches import Circle, Rectangle

import gradclip_jax as gc

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#B3B3B3"
plt.rcParams |= {"figure.dpi": 68, "font.size": 11, "legend.frameon": False}
plt.rcParams |= {"axes.spines.right": False, "axes.spines.top": False}
plt.rcParams |= {"figure.constrained_layout.use": True}

# %% [markdown]
# ## 1. One stream
#
# Gradients of a kernel and a bias, random in direction. Each has a norm of about 1, which drifts
# downwards, trebles at step 300 for good and falls to a tenth at step 450. Upon that come spikes:
# of the whole gradient at 60 and 150 (30 times), of the bias alone at 200 (30 times), of one
# element of the kernel at 240 (300 times), and a burst of five bad steps at 380 (20 times).

# %%
STEPS = 600
SPIKES = {"whole": 150, "bias": 200, "element": 240, "burst": 384}
random = np.random.default_rng(0)
level = np.exp(-0.7 * np.arange(STEPS) / 300)
level[300:] *= 3
level[450:] /= 10
params = {name: random.normal(size=shape) for name, shape in (("kernel", (6, 8)), ("bias", (8,)))}
params = {name: 3 * x / np.linalg.norm(x) for name, x in params.items()}


def scaled(x):
    """Random directions, with the level as their norm and 15 % of noise."""
    wanted = level * np.exp(0.15 * random.normal(size=STEPS))
    usual = np.sqrt(np.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
    return x / usual * wanted.reshape(usual.shape)


grads = {name: scaled(random.normal(size=(STEPS, *x.shape))) for name, x in params.items()}
for leaf in grads.values():
    leaf[[60, 150]] *= 30
    leaf[380:385] *= 20
grads["bias"][200] *= 30
grads["kernel"][240, 2, 3] *= 300


def flat(tree):
    """A row of all elements for each step."""
    return np.concatenate([np.asarray(tree[x]).reshape(STEPS, -1) for x in sorted(tree)], axis=1)


norms = np.linalg.norm(flat(grads), axis=1)
steps, events = np.arange(STEPS), [60, 150, 200, 240, *range(380, 385)]
usual = np.sqrt(2) * level

figure, axes = plt.subplots(figsize=(10, 2.8))
axes.plot(steps, norms, color="black", lw=0.8)
axes.plot(events, norms[events], "o", color=RED, ms=4)
for step, text in (
    (60, "whole"), (150, "whole"), (200, "bias"), (240, "element"), (382, "burst"),
):  # fmt: skip
    axes.annotate(text, (step, 80), ha="center", color=RED)
axes.annotate("× 3", (302, 6), color=BLUE)
axes.annotate("/ 10", (452, 4), color=BLUE)
axes.set(yscale="log", ylim=(0.1, 200), xlabel="step", ylabel="gradient norm")
plt.show()

# %% [markdown]
# ## 2. Every strategy
#
# A constant limit is 2, a little above the norms of the beginning, or what corresponds to it: of
# one array 1.4, of one column, of one element, of the root mean square. Adaptive ones have their
# defaults, but no cap and no window that is longer than the stream; `limits.percentile` stands for
# `clip_to_limit(limits.percentile())`. A guard wraps an optimizer that does nothing, so that what
# passes is seen.

# %%
matrices = {"kernel": "matrices", "bias": "vectors"}
CONSTANT = {
    "clip_by_global_norm": gc.clip_by_global_norm(2.0),
    "clip_by_norm": gc.clip_by_norm(1.4),
    "clip_by_group_norm": gc.clip_by_group_norm({"matrices": 1.4, "vectors": 1.4}, labels=matrices),
    "clip_by_unit_norm": gc.clip_by_unit_norm(0.7),
    "clip_by_block_rms": gc.clip_by_block_rms(0.5),
    "adaptive_grad_clip": gc.adaptive_grad_clip(0.7),
    "clip_by_value": gc.clip_by_value(1.0),
    "spectral_clip": gc.spectral_clip(1.1),
    "soft_spectral_clip": gc.soft_spectral_clip(1.1),
    "clip_by_dual_norm": gc.clip_by_dual_norm(2.0),
    "normalize_by_norm": gc.normalize_by_norm(2.0),
    "clip_to_limit": gc.clip_to_limit(2.0, response=gc.responses.smooth),
}
ADAPTIVE = {
    "limits.percentile": gc.clip_to_limit(gc.limits.percentile()),
    "limits.median": gc.clip_to_limit(gc.limits.median()),
    "autoclip": gc.autoclip(window=100),
    "limits.running_quantile": gc.clip_to_limit(gc.limits.running_quantile()),
    "limits.ema": gc.clip_to_limit(gc.limits.ema()),
    "zclip": gc.zclip(max_norm=None),
    "limit_norm_growth": gc.limit_norm_growth(),
    "adagc": gc.adagc(max_norm=None),
    "spam_clip": gc.spam_clip(),
}
AROUND = {
    "skip_spikes": gc.skip_spikes(optax.identity(), grad_norm=gc.limits.median(10.0)),
    "skip_nonfinite": gc.skip_nonfinite(optax.identity()),
    "zero_nonfinite": gc.zero_nonfinite(),
    "error_feedback": gc.error_feedback(gc.clip_by_global_norm(2.0)),
    "clip21": gc.clip21(gc.clip_by_global_norm(2.0)),
}
OURS = CONSTANT | ADAPTIVE | AROUND
OF_OPTAX = {
    "optax.clip_by_global_norm": optax.clip_by_global_norm(2.0),
    "optax.clip_by_block_rms": optax.clip_by_block_rms(0.5),
    "optax.adaptive_grad_clip": optax.adaptive_grad_clip(0.7),
    "optax.clip": optax.clip(1.0),
    "optax.normalize_by_update_norm": optax.normalize_by_update_norm(2.0),
    "optax.apply_if_finite": optax.apply_if_finite(optax.identity(), 16),
    "optax.zero_nans": optax.zero_nans(),
}

public = {
    name
    for name, value in vars(gc).items()
    if inspect.isfunction(value)
    and not name.startswith("from_")
    and "GradientTransformation" in str(inspect.signature(value).return_annotation)
}
print(len(OURS), "strategies")
# `clip_by_range` is `clip_by_value` with two bounds, and `clip_norms` is the engine.
assert {name for name in OURS if not name.startswith("limits.")} <= public

# %%
CLIPS = {name: optax.with_extra_args_support(clip) for name, clip in (OURS | OF_OPTAX).items()}


@jax.jit
def run_all(stream):
    """Of each clip and step: what came out, and its metrics."""

    def step(states, grads):
        seen, new = {}, {}
        for name, clip in CLIPS.items():
            updates, new[name] = clip.update(grads, states[name], params)
            seen[name] = {"updates": updates}
            if name in OURS:
                seen[name] |= gc.metrics(new[name])
        return new, seen

    return jax.lax.scan(step, {name: clip.init(params) for name, clip in CLIPS.items()}, stream)[1]


runs = jax.tree.map(np.asarray, run_all(grads))
out = {name: np.linalg.norm(flat(runs[name]["updates"]), axis=1) for name in OURS}


def draw_strategies(names, rows):
    """Norm before and after each of some clips, and the limit where it is one on that norm."""
    figure, grid = plt.subplots(rows, 3, figsize=(11, 1.9 * rows), sharex=True, sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        axes.plot(steps, norms, color=GREY, lw=1.2, label="norm before")
        axes.plot(steps, np.maximum(out[name], 0.02), color=BLUE, lw=0.9, label="norm after")
        run = runs[name]
        if np.allclose(run.get("grad_norm", 0), norms) and name not in ONE_FOR_EACH:
            limit = run.get("clip_limit", run.get("skip_limit"))
            axes.plot(steps, limit, color=RED, lw=1.2, ls="--", label="limit")
        axes.set_title(name, fontsize=11)
        axes.set(yscale="log", ylim=(0.015, 100))
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supylabel("norm", fontsize=11)
    return figure


ONE_FOR_EACH = ("clip_by_norm", "clip_by_group_norm", "clip_by_unit_norm", "clip_by_block_rms",
    "adaptive_grad_clip", "limit_norm_growth", "adagc", "spectral_clip", "soft_spectral_clip",
    "skip_nonfinite", "error_feedback", "clip21")  # fmt: skip

# %% [markdown]
# ### Constant limits
#
# The norm that goes in is grey, the norm that comes out blue. The limit is drawn (red) where it is
# one on the norm of all leaves.

# %%
draw_strategies(list(CONSTANT), 4)
plt.show()

# %% [markdown]
# All of them take most of a spike away. After the fall at 450 they would not: a spike of ten times
# the new level would pass, for a constant limit knows nothing of the level. `normalize_by_norm`
# gives every step the same length, also after the fall, and `clip_by_dual_norm` a step to the edge
# of a ball, which is longer than most gradients here. `clip_to_limit` with the response `smooth`,
# 1/(1 + norm/limit), shrinks every gradient a little. Where each array, column or element has a
# limit of its own, the norm of all that comes out of a spike may be larger than 2.
#
# ### Adaptive limits

# %%
draw_strategies(list(ADAPTIVE), 3)
plt.show()

# %% [markdown]
# `limits.percentile`, `limits.median` and `adagc` have no limit yet at step 60, and let the spike
# pass. At 300 the level trebles: `limits.percentile`, `limits.median`, `limits.ema` and
# `limits.running_quantile` follow. `autoclip`, with this window, holds the norm down for 90 steps,
# `zclip` and `adagc` for all of the 150, and `limit_norm_growth` lets it rise by 1 % a step.
# [Adaptive limits](../docs/adaptive_limits.md) measures how long each of them takes. `spam_clip`
# looks at each element by itself and lets it be 71 times its root mean square: spikes of 30 times
# pass, and of the one of 300 times a third.
#
# ### Guards

# %%
draw_strategies(list(AROUND), 2)
plt.show()

# %% [markdown]
# `skip_spikes` gives nothing at a spike (the blue line falls out of the picture), nor at some of
# the first steps of the new regime. `error_feedback` pays out later what it cut off, for tens of
# steps after a spike. `clip21` follows the gradient by steps of at most 2: exact where it changes
# by less than that, behind it where it changes by more. The other two act on what is not finite
# only.
#
# ### Side by side
#
# The same as colours: what came out as a share of what went in. A spike that was held is a dark
# line; where it is light there, it has passed.

# %%
factor = np.array([out[name] / norms for name in OURS])
smallest = factor.reshape(len(OURS), -1, 2).min(axis=2)  # a column for two steps: no spike is lost
figure, axes = plt.subplots(figsize=(11, 6.4))
palette = plt.get_cmap("cividis")
image = axes.imshow(
    np.clip(smallest, 0.03, 1), norm=LogNorm(0.03, 1), cmap=palette, aspect="auto",
    interpolation="nearest", extent=(0, STEPS, len(OURS) - 0.5, -0.5),
)  # fmt: skip
axes.set_yticks(range(len(OURS)), list(OURS), fontsize=10)
for place in (len(CONSTANT), len(CONSTANT | ADAPTIVE)):
    axes.axhline(place - 0.5, color="white", lw=3)
axes.set(xlabel="step")
axes.spines[:].set_visible(False)
bar = figure.colorbar(image, label="norm after / norm before", pad=0.01)
bar.set_ticks([0.03, 0.1, 0.3, 1], labels=["≤ 0.03", "0.1", "0.3", "≥ 1"])
plt.show()

# %% [markdown]
# In numbers. *Touched*: the share of steps without an event that are changed by more than 0.1 %.
# Then the norm that comes out of each kind of spike, in units of what is usual then. *Rise*: the
# median of the factor over the 80 steps after the level has trebled. *Angle*: the largest between
# gradient and update at those four steps, in degrees.

# %%
quiet = np.setdiff1d(steps[130:], [*events, *range(295, 380), *range(445, 600)])


def angles(before, after):
    """Degrees between rows; NaN where one of them is zero."""
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosines = np.sum(before * after, axis=1) / np.where(lengths > 0, lengths, np.nan)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


places = list(SPIKES.values())
table = {}
print(f"{'':<24} touched  whole   bias  element  burst   rise  angle")
for name in OURS:
    updates = flat(runs[name]["updates"])
    touched = np.mean(np.abs(out[name] / norms - 1)[quiet] > 1e-3)
    whole, bias, element, burst = (out[name] / usual)[places]
    rise = np.median((out[name] / norms)[300:380])
    turned = angles(flat(grads)[places], updates[places])
    widest = "-" if np.isnan(turned).all() else f"{np.nanmax(turned):.0f}"
    table[name] = touched, whole, bias, element, burst, rise, turned
    print(
        f"{name:<24} {touched:>7.0%} {whole:>6.1f} {bias:>6.1f} {element:>8.1f} {burst:>6.1f}"
        f" {rise:>6.2f} {widest:>6}"
    )

# %%
turned = {name: row[-1] for name, row in table.items()}
whole = {name: row[1] for name, row in table.items()}
rise = {name: row[-2] for name, row in table.items()}
follows = ["limits.percentile", "limits.median", "limits.ema"]
one_factor = ["clip_by_global_norm", "normalize_by_norm", "clip_to_limit", *follows]
one_factor += ["limits.running_quantile", "autoclip", "zclip"]
assert max(turned[name].max() for name in one_factor) < 1e-5  # the direction is kept
assert 35 < turned["clip_by_value"].max() < 45
assert max(turned, key=lambda name: np.nan_to_num(turned[name]).max()) == "clip_by_dual_norm"
assert max(whole[name] for name in (*CONSTANT, *ADAPTIVE) if name != "spam_clip") < 0.3 * 26
assert min(rise[name] for name in follows) > 0.9
follow = np.array([table[name][1:5] for name in follows])
hold = np.array([table[name][1:4] for name in ("autoclip", "zclip", "adagc")])
assert (round(follow.min(), 1), round(follow.max(), 1)) == (1.4, 2.6)
assert hold.max() < 1.2
assert 0.4 < table["limits.running_quantile"][0] < 0.5
assert max(rise[name] for name in ("autoclip", "zclip", "adagc", "limit_norm_growth")) < 0.5

# %% [markdown]
# * What multiplies all elements by one factor keeps the direction: an angle of 0. A limit for each
#   array, column or element turns the gradient where one of them has spiked; that is the point of
#   it, for it takes away the spike and nothing else. `clip_by_dual_norm` turns every gradient: it
#   goes where the ball reaches furthest.
# * No strategy is best in every column. Those that follow the rise and touch nothing at rest
#   (`limits.percentile`, `limits.median`, `limits.ema`) let spikes out at 1.4 to 2.6 times the
#   usual norm. Those that hold spikes to the usual norm (`autoclip`, `zclip`, `adagc`) hold a new
#   regime down as well. `limits.running_quantile` does both and touches nearly half of all steps.
#   The table in [Which clip should I use?](../docs/which_clip.md) says which of them suits what.
#
# ## 3. Value against norm
#
# In two dimensions one sees what the direction costs. The gradient has an angle θ to the first axis
# and a norm r. A norm limit c is a circle: a gradient beyond it comes back along its own line. A
# value limit c is a square: each element is cut off by itself.
#
# $$ \text{norm: } g \min(1, c / \lVert g \rVert), \qquad
#    \text{value: } g_i \leftarrow \max(-c, \min(g_i, c)) $$


# %%
@jax.jit
def clipped_both(gradient, limit):
    """The gradient clipped by norm and by value."""
    both = gc.clip_by_global_norm(limit), gc.clip_by_value(limit)
    return [clip.update(gradient, clip.init(gradient))[0] for clip in both]


def turn(angle, norm, limit=1.0):
    """By how many degrees the value clip turns gradients of these angles (in degrees)."""
    radians = np.radians(angle)
    gradients = norm * np.stack([np.cos(radians), np.sin(radians)], axis=-1)
    by_norm, by_value = jax.vmap(clipped_both, (0, None))(gradients, limit)
    assert angles(gradients, np.asarray(by_norm)).max() < 1e-5
    return angles(gradients, np.asarray(by_value))


def draw_value_against_norm(angle=15.0, norm=2.4, limit=1.0):
    """The gradient and both clips of it; and the angle between them for all directions."""
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(10, 3.9), width_ratios=(5, 5))
    radians = np.radians(angle)
    gradient = norm * np.array([np.cos(radians), np.sin(radians)])
    by_norm, by_value = map(np.asarray, clipped_both(gradient, np.float64(limit)))
    plane.add_patch(Circle((0, 0), limit, fill=False, color=BLUE, lw=1.5))
    corner = (-limit, -limit)
    plane.add_patch(Rectangle(corner, 2 * limit, 2 * limit, fill=False, color=RED, lw=1.5))
    for vector, colour, width, label in (
        (gradient, GREY, 5, "gradient"),
        (by_norm, BLUE, 3.5, "by norm"),
        (by_value, RED, 2, "by value"),
    ):
        plane.plot([0, vector[0]], [0, vector[1]], color=colour, lw=width, label=label)
        plane.plot(*vector, "o", color=colour, ms=width + 4)
    plane.set(xlim=(-1.6, 4), ylim=(-1.6, 3.4), aspect="equal")
    plane.legend(loc="upper left")
    directions = np.linspace(0, 90, 181)
    curve.plot(directions, turn(directions, norm, limit), color=RED, lw=2)
    (turned_by,) = turn(np.array([angle]), norm, limit)
    curve.plot(angle, turned_by, "o", color=RED, ms=9)
    curve.axhline(0, color=BLUE, lw=2)
    curve.set(ylim=(-2, 47), xlabel="angle of the gradient (degrees)", ylabel="turned by (degrees)")
    curve.set_title(f"norm {norm / limit:.3g} times the limit: turned by {turned_by:.0f}°")
    return figure


for norm in (1.2, 2.4, 30.0):
    draw_value_against_norm(norm=norm)
    plt.show()

# %% [markdown]
# The further a gradient is beyond the limit, the more of the directions end up at a corner of the
# square. With a kernel, move the gradient and the limit:

# %%
_ = interact(
    draw_value_against_norm,
    angle=FloatSlider(value=15, min=0, max=90, step=1),
    norm=FloatLogSlider(value=2.4, min=-1, max=2, step=0.05),
    limit=FloatSlider(value=1, min=0.1, max=1.5, step=0.05),
)

# %% [markdown]
# In two dimensions the angle stays below 45°. In d dimensions the worst gradient has one huge
# element and d − 1 that are just at the limit. What comes out has d equal elements, so the angle is
# arccos(1/√d), which goes to a right angle. It never gets beyond: no element changes its sign.

# %%
assert turn(np.linspace(0, 90, 181), 1e6).max() < 45
for size in (2, 10, 100, 10_000):
    worst = np.ones(size)
    worst[0] = 1e9
    _, by_value = map(np.asarray, clipped_both(worst, np.float64(1)))
    (degrees,) = angles(worst[None], by_value[None])
    print(f"{size:>6} elements: {degrees:.1f}°")
    np.testing.assert_allclose(degrees, np.degrees(np.arccos(1 / np.sqrt(size))), atol=1e-3)

# %% [markdown]
# ## 4. What survives a NaN
#
# The same stream once more, with one step put in at 100: a gradient as all others, but one element
# of the bias is NaN. Four questions: what is the update of the bias, what is that of the kernel,
# where no element was NaN, does the clip treat the bias afterwards as if the step had not been, and
# what is left of Adam behind it? For comparison, what optax 0.2.8 has.

# %%
NAN = 100
broken = {name: np.insert(x, NAN, x[50], axis=0)[:STEPS] for name, x in grads.items()}
broken["bias"][NAN, 3] = np.nan
after = jax.tree.map(np.asarray, run_all(broken))


def fate(update, gradient):
    """What became of an array."""
    if np.isnan(update).all():
        return "NaN"
    if np.isnan(update).any():
        return "one NaN"
    if not update.any():
        return "zero"
    known = np.isfinite(gradient)
    rest_kept = np.array_equal(update[known], gradient[known])
    return "kept" if known.all() and rest_kept else "one zero" if rest_kept else "clipped"


def goes_on(name):
    """Whether all later updates of the bias are those without that step, bit for bit."""
    with_it = after[name]["updates"]["bias"][NAN + 1 :]
    without = runs[name]["updates"]["bias"][NAN:-1]
    if np.isnan(with_it).any():
        return "NaN"
    return "as before" if np.array_equal(with_it, without) else "others"


@jax.jit
def adam_behind(stream):
    """The last update that Adam gives."""
    adam = optax.adam(1e-3)

    def step(state, grads):
        updates, state = adam.update(grads, state)
        return state, updates

    first = jax.tree.map(lambda x: x[0], stream)
    return jax.tree.map(lambda x: x[-1], jax.lax.scan(step, adam.init(first), stream)[1])


# Adam knows nothing of arrays, so that one runs behind all of them.
moved = adam_behind({name: flat(after[name]["updates"]) for name in CLIPS})


def of_adam(name):
    lost = int(np.isnan(np.asarray(moved[name])).sum())
    return f"{lost} of {moved[name].size} NaN" if lost else "trains"


fates = {}
for name in CLIPS:
    bias, kernel = (
        fate(after[name]["updates"][leaf][NAN], broken[leaf][NAN]) for leaf in ("bias", "kernel")
    )
    fates[name] = bias, kernel, goes_on(name), of_adam(name)

print(f"{'':<31}{'bias':<10}{'kernel':<10}{'bias later':<12}Adam")
for name, (bias, kernel, later, behind) in fates.items():
    print(f"{name:<31}{bias:<10}{kernel:<10}{later:<12}{behind}")

# %%
COLOURS = {"kept": GREEN, "as before": GREEN, "trains": GREEN, "clipped": "#7CC8AE",
    "one zero": "#7CC8AE", "zero": "#F0E442", "others": "#F0E442"}  # fmt: skip
WORDS = ("bias\nat the NaN", "kernel\nat the NaN", "bias\nlater", "Adam behind,\nat the end")


def draw_fates(axes, names):
    """A coloured word for each question."""
    for row, name in enumerate(names):
        for column, word in enumerate(fates[name]):
            colour = COLOURS.get(word, "#E58A5C")  # whatever is left of NaN
            box = Rectangle((column, row), 0.96, 0.9, color=colour)
            axes.add_patch(box)
            axes.text(column + 0.48, row + 0.47, word, ha="center", va="center", fontsize=10)
    axes.set(xlim=(0, 4), ylim=(len(names), 0))
    axes.set_xticks(np.arange(4) + 0.48, WORDS, fontsize=10)
    axes.set_yticks(np.arange(len(names)) + 0.47, names, fontsize=10)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, bottom=False)
    axes.spines[:].set_visible(False)


figure, grid = plt.subplots(2, 1, figsize=(9, 10.5), height_ratios=(len(OURS), len(OF_OPTAX)))
draw_fates(grid[0], list(OURS))
draw_fates(grid[1], list(OF_OPTAX))
plt.show()

# %%
assert {word for name in OURS for word in fates[name] if "NaN" in word} == set()
assert {fates[name][-1] for name in OURS} == {"trains"}
assert {name for name in OURS if fates[name][2] != "as before"} == {"spam_clip", "error_feedback"}
of_spam = [x["spam_clip"]["updates"]["bias"][:, 3] for x in (after, runs)]
assert np.array_equal(of_spam[0][NAN + 1 :], of_spam[1][NAN:-1])  # the element that was NaN
assert fates["optax.clip_by_global_norm"] == ("NaN", "NaN", "as before", "56 of 56 NaN")

# %% [markdown]
# * Of ours, nothing that is NaN comes out, and no limit has learned from it. The group whose norm
#   is NaN gets a zero: with one norm for all leaves everything, with a norm for each array the bias
#   alone. Filters by element lose one element. `clip21` gives its estimate of the gradient.
# * *Others*: `spam_clip` has learned from the seven elements of the bias that were finite, and
#   `error_feedback` has carried them over. The element that was NaN has left no trace in the first.
# * A limit of optax has no memory, so the clip itself goes on. Adam behind it does not: one NaN in
#   its moments stays there for good, and from then on so do the parameters. With a global norm it
#   is all of them. optax has guards for that, `apply_if_finite` and `zero_nans` (which lets an
#   infinity pass); they must be put there before it happens.
# * A zero still moves Adam by its momentum. `skip_nonfinite(optimizer)` skips the whole step.
#
# ## In short
#
# | you want | take |
# |---|---|
# | a guard against rare spikes, at a level that you have measured | `clip_by_global_norm` |
# | the same, at an unknown or changing level | `limits.percentile`, `limits.ema`, `limits.median` |
# | to hold spikes of an array, column, element | `clip_by_norm`, `clip_by_unit_norm`, `spam_clip` |
# | a limit relative to the weights | `adaptive_grad_clip` |
# | steps of one length | `normalize_by_norm` |
# | nothing of a bad step in the optimizer | `skip_spikes`, `skip_nonfinite` |
#
# How to find the number is the subject of [Choosing a limit](choosing_a_limit.ipynb).
