# %% [markdown]
# # Convergence theory of gradient clipping
#
# **Three theorems about clipped gradient descent show on functions of one variable: it is faster
# where curvature grows with the gradient, it is biased under skewed noise, and it converges under
# noise of infinite variance.** Each number below is asserted in the cell that prints it.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import FloatLogSlider, FloatSlider, interact

import gradclip_jax as gc

plt.style.use("figures.mplstyle")  # the colors C0 to C5 are blue, orange, green, red, purple, gray


def clipped(grad, limit):
    clip = gc.clip_by_global_norm(limit)
    return jnp.asarray(clip.update(grad, clip.init(grad))[0])


# %% [markdown]
# ## Speed under growing curvature
#
# Gradient descent with a fixed learning rate needs a rate below 2/L, where L bounds the curvature.
# Zhang, He, Sra, Jadbabaie 2019 (*Why gradient clipping accelerates training*,
# [arXiv 1905.11881](https://arxiv.org/abs/1905.11881)) measured on language models that the
# curvature grows with the gradient, and assume
#
# $$ \|\nabla^2 f(x)\| \le L_0 + L_1 \|\nabla f(x)\|. $$
#
# The simplest such function is $f(x) = \cosh x$, with $f'' = \cosh x \le 1 + |\sinh x| = 1 + |f'|$.
# No constant bounds its curvature.

# %%
STOP = 1e-3  # on |f'|


def path_on_cosh(start, learning_rate, limit, steps):
    """Each x of gradient descent on cosh."""

    def step(x, _):
        return x - learning_rate * clipped(jnp.sinh(x), limit), x

    return np.asarray(jax.lax.scan(step, jnp.float64(start), length=steps)[1])


def draw_cosh(start, learning_rate, limit):
    _, axes = plt.subplots(figsize=(6.5, 3.4))
    runs = (
        (f"no clip, learning rate {learning_rate:.2g}", learning_rate, np.inf, "C3"),
        (f"limit {limit:.2g}, learning rate 1", 1.0, limit, "C0"),
    )
    for label, rate, bound, color in runs:
        path = path_on_cosh(start, rate, bound, 150)
        path = path[np.abs(path) < start + 0.5]  # what leaves the picture is not drawn
        slopes = np.abs(np.sinh(path)) + 1e-16
        axes.semilogy(slopes, "o-", color=color, ms=3, lw=1)
        i = min(len(slopes) - 1, 10 if bound < np.inf else 70)
        place = max(1.5 * slopes[i], 2e-5) if bound == np.inf else 0.3 * np.sinh(start)
        axes.text(i + 2, place, label, color=color)
    axes.axhline(STOP, color="C5", lw=1, zorder=0)
    axes.set(xlabel="step", ylabel="|f'|", ylim=(1e-5, 10 * np.sinh(start)), xlim=(0, 150))


_ = interact(
    draw_cosh,
    start=FloatSlider(6, min=1, max=10, step=0.5),
    learning_rate=FloatLogSlider(10**-1.5, min=-3.5, max=0, step=0.1),
    limit=FloatLogSlider(1, min=-1, max=1, step=0.1),
)

# %% [markdown]
# At x = 6 the curvature is 202, so the learning rate of the red run must be small, and it stays
# small near the minimum, where the curvature is 1. The clipped run takes steps of length 1 while
# $|f'| > 1$ and steps of learning rate 1 after that.
#
# How many steps until $|f'| \le 10^{-3}$ (the gray line)? Without a clip the best of 60 learning
# rates counts, $m \, x_0 / \sinh x_0$ for m from 0.05 to 2.5. (m = 1, which lands on the minimum by
# chance, is not among them.) With the clip, learning rate and limit are 1, whatever the start.

# %%
STARTS = np.array([2, 4, 6, 8, 10, 12])


def fewest_steps(start):
    """The number of steps that the best fixed learning rate needs."""
    factors = np.geomspace(0.05, 2.5, 60)
    x = np.full(len(factors), float(start))
    for steps in range(100_000):
        slopes = np.sinh(x)
        if (np.abs(slopes) <= STOP).any():
            return steps
        kept = np.abs(x) <= start  # a path that moves away from the start diverges
        factors, x, slopes = factors[kept], x[kept], slopes[kept]
        x = x - factors * start / np.sinh(start) * slopes
    raise AssertionError("none arrived")


fixed = [fewest_steps(start) for start in STARTS]
slopes = [np.abs(np.sinh(path_on_cosh(start, 1.0, 1.0, 20))) for start in STARTS]
with_clip = [int(np.argmax(slope <= STOP)) for slope in slopes]
print("start                  ", *(f"{start:>6}" for start in STARTS))
print("best fixed learning rate", *(f"{steps:>5} " for steps in fixed))
print("clipped                 ", *(f"{steps:>5} " for steps in with_clip))
assert fixed == [4, 13, 124, 617, 3785, 26267]
assert with_clip == [2, 4, 6, 8, 10, 12]

_, axes = plt.subplots(figsize=(6.5, 3))
for label, color, steps in (("best fixed rate", "C3", fixed), ("clipped", "C0", with_clip)):
    axes.semilogy(STARTS, steps, "o-", color=color, lw=2)
    axes.text(12.2, steps[-1], label, color=color, va="center")
axes.set(xlabel="start", ylabel="steps to |f'| ≤ 0.001", ylim=(1, 1e5))
plt.show()

# %% [markdown]
# The number of steps grows like $e^{x_0}$ with a fixed learning rate and like $x_0$ with the clip.
#
# ## Bias under skewed noise
#
# If rare gradients are large on one side, the clip cuts that side off, and the mean of the clipped
# gradients is no longer the gradient. Koloskova, Hendrikx, Stich 2023 (*Revisiting Gradient
# Clipping*, [arXiv 2305.01588](https://arxiv.org/abs/2305.01588)) show that clipped SGD with noise
# of standard deviation σ stops at a gradient of order $\min(\sigma, \sigma^2/c)$ for a limit c,
# however small the steps are.
#
# On $f(x) = x^2/2$ the worst noise of two values can be found by hand: a with probability p and −b
# otherwise, with mean 0 and variance $ab = \sigma^2$. Where only a is clipped, the mean of the
# clipped gradient is zero at
#
# $$ p\,c + (1-p)(x - b) = 0, \qquad \frac{p}{1-p} = \frac{b}{a} \quad\Rightarrow\quad
# x = b\Big(1 - \frac{c}{a}\Big) = \frac{\sigma^2}{a}\Big(1 - \frac{c}{a}\Big), $$
#
# which is largest for $a = 2c$: $|f'| = \sigma^2/4c$. This holds for $c \ge \sigma/2$. Below, the
# worst values are ±σ, and the path stops at $|f'| = \sigma - c$.


# %%
def worst_noise(sigma, limit):
    """The two values of the noise, a and b, and the probability of the first."""
    a = jnp.maximum(2 * limit, sigma)
    b = sigma**2 / a
    return a, b, b / (a + b)


def law(sigma, limit):
    return np.where(limit >= sigma / 2, sigma**2 / (4 * limit), sigma - limit)


@jax.jit
def resting_points(sigma, limits):
    """Where descent along the mean of the clipped gradients stops, for each limit."""
    a, b, p = worst_noise(sigma, limits)
    clip = jax.vmap(clipped)

    def step(x, _):
        return x - 0.5 * (p * clip(x + a, limits) + (1 - p) * clip(x - b, limits)), None

    return jax.lax.scan(step, jnp.full(len(limits), 3.0 * sigma), length=4000)[0]


@jax.jit
def noisy_path(sigma, limit, noise):
    """x at each step of clipped SGD with learning rate 0.02."""

    def step(x, noise):
        return x - 0.02 * clipped(x + noise, limit), x

    return jax.lax.scan(step, 2.0 * sigma, noise)[1]


LIMITS = np.geomspace(0.1, 4, 25)
DRAWS = np.random.default_rng(0).random(4000)


def draw_bias(sigma, limit):
    _, (of_limit, of_step) = plt.subplots(1, 2, figsize=(9, 3.2))
    of_limit.plot(LIMITS, law(sigma, LIMITS), color="C5", lw=1.5)
    of_limit.plot(LIMITS, resting_points(sigma, LIMITS), "o", color="C0", ms=4)
    of_limit.plot(limit, law(sigma, limit), "D", color="C3", ms=8)
    of_limit.set(xlabel="limit c", ylabel="|f'| at rest", ylim=(0, 1.2 * sigma), xscale="log")
    of_limit.set_title("dots: descent along the mean; line: the law")
    a, b, p = worst_noise(sigma, limit)
    noise = jnp.where(p > DRAWS, a, -b)
    end, at_end = len(DRAWS) * 1.02, float(law(sigma, limit))
    of_step.plot(noisy_path(sigma, np.inf, noise), color="C1", lw=1)
    of_step.plot(noisy_path(sigma, limit, noise), color="C0", lw=1)
    of_step.axhline(at_end, color="C3", lw=1.5, ls="--")
    of_step.text(end, at_end, f"limit {limit:.2g}\nand the law", color="C0", va="center")
    of_step.text(end, -0.15 * sigma, "no clip", color="C1", va="center")
    of_step.set(xlabel="step", ylabel="x", ylim=(-0.8 * sigma, 2 * sigma), xlim=(0, len(DRAWS)))


_ = interact(
    draw_bias,
    sigma=FloatSlider(1, min=0.2, max=3, step=0.1),
    limit=FloatLogSlider(1, min=-1, max=0.6, step=0.05),
)

# %% [markdown]
# Left, law and measurement agree to six digits. Right, one noisy run with and without the clip, on
# the same noise. A larger limit makes the bias smaller in proportion; smaller steps do not. Under
# symmetric noise the bias is zero.

# %%
for sigma in (1.0, 3.0):
    np.testing.assert_allclose(resting_points(sigma, LIMITS), law(sigma, LIMITS), rtol=1e-6)
for limit in (0.25, 0.5, 1.0, 2.0):
    measured = float(resting_points(1.0, np.array([limit]))[0])
    print(f"sigma 1, limit {limit:<4}: |f'| at rest {measured:.4f}, law {law(1.0, limit):.4f}")

# %% [markdown]
# ## Convergence under heavy tails
#
# Without a clip SGD needs noise of finite variance. Here the noise is Student's t with 1.5 degrees
# of freedom, which has a mean and no variance. On $x^2/2$ with learning rate 1/(k+1) the iterate is
# the mean of all noise so far. Clipped to $\tau_k = k^{2/3}$, each term has a variance of order
# $\tau_k^{2-1.5} = k^{1/3}$, and
#
# $$ E\,x_K^2 \approx \frac{1}{K^2} \sum_{k \le K} k^{1/3} \sim K^{-2/3}. $$
#
# Gorbunov, Danilova, Gasnikov 2020 ([arXiv 2005.10785](https://arxiv.org/abs/2005.10785)) proved
# that clipped SGD converges under heavy tails. The limit here is a schedule.

# %%
RUNS, STEPS = 400, 10_000
NOISE = np.random.default_rng(0).standard_t(1.5, size=(STEPS, RUNS))


@jax.jit
def under_heavy_tails(noise, scale):
    """x² of each run after each step, with the limit `scale · k^(2/3)`."""
    clip = gc.clip_by_unit_norm(lambda count: scale * (count + 1.0) ** (2 / 3), axes=())

    def step(carry, inputs):
        x, state = carry
        k, noise = inputs
        grad, state = clip.update(x + noise, state)
        x = x - grad / (k + 1)
        return (x, state), x**2

    start = jnp.ones(noise.shape[1])
    return jax.lax.scan(step, (start, clip.init(start)), (jnp.arange(len(noise)), noise))[1]


def draw_tails(scale):
    _, axes = plt.subplots(figsize=(6.5, 3.4))
    k = np.arange(1, STEPS + 1)
    shown = np.unique(np.geomspace(1, STEPS, 400).astype(int)) - 1
    runs = (("no clip", np.inf, "C3", "bottom"), ("clipped", scale, "C0", "top"))
    for name, factor, color, side in runs:
        squares = np.asarray(under_heavy_tails(NOISE, factor)).mean(axis=1)
        axes.loglog(k[shown], squares[shown], color=color, lw=1.5)
        axes.text(1.1 * STEPS, squares[-1], name, color=color, va=side)
    axes.loglog(k, k ** (-2 / 3), color="C5", lw=1, ls="--")
    axes.text(1, 0.4, "$k^{-2/3}$", color="C5", va="top")
    axes.set(xlabel="step k", ylabel=f"x², mean of {RUNS} runs", title=f"limit {scale:.2g} k^(2/3)")


_ = interact(draw_tails, scale=FloatLogSlider(1, min=-1, max=2, step=0.25))

# %% [markdown]
# With the clip the error falls along a line. Without it a single draw can lift the mean of all runs
# at any time. The slope is −2/3 in the limit of many steps and flatter before, because the
# variance of a clipped draw, $\int_0^\tau 2t \, P(|\xi| > t) \, dt$, has not reached its power law
# yet. The cell below computes the slope from that integral.

# %%
t = np.concatenate([[0], np.geomspace(1e-4, 1e5, 100_001)])
width = np.concatenate([[0], np.diff(t)])
density = width * (1 + t**2 / 1.5) ** (-1.25)
outside = 1 - np.cumsum(density) / (density.sum() + 2 * 1.5**1.25 / 1.5 * t[-1] ** -1.5)
variance = np.cumsum(width * 2 * t * outside)
k = np.arange(1, STEPS + 1)
theory = np.cumsum(np.interp(k ** (2 / 3), t, variance)) / k**2.0


def slope_of(errors):
    """The slope from step 100 on in log-log, over points equally far apart there."""
    at = np.unique(np.geomspace(100, STEPS - 1, 60).astype(int))
    return np.polyfit(np.log(at + 1), np.log(errors[at]), 1)[0]


errors = {scale: np.asarray(under_heavy_tails(NOISE, scale)).mean(axis=1) for scale in (1, np.inf)}
jumps = {scale: float(np.max(mean[101:] / mean[100:-1])) for scale, mean in errors.items()}
measured, computed = slope_of(errors[1]), slope_of(theory)
print(f"slope from 100 to 10,000 steps: measured {measured:.2f}, computed {computed:.2f}")
print(f"largest rise in one step: with the clip {jumps[1]:.2f}, without {jumps[np.inf]:.2f}")
print(f"error at the end, without the clip over with it: {errors[np.inf][-1] / errors[1][-1]:.1f}")
assert abs(measured - computed) < 0.03
assert jumps[1] < 1.1 < 1.4 < jumps[np.inf]
assert errors[np.inf][-1] > 3 * errors[1][-1]
