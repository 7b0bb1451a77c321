# %% [markdown]
# # Gradient clipping by norm
#
# **A clip by norm shortens the step, keeps its direction, and leaves small gradients as they are.**
# Where a gradient explodes, the loss has a cliff, and a step along the gradient leaves the region
# in which the gradient says anything. `clip_by_global_norm` keeps the step inside that region. For
# a gradient that vanished it does nothing. Each number below is asserted in the cell that prints
# it.
#
# Source: Pascanu, Mikolov, Bengio 2013, *On the difficulty of training recurrent neural networks*,
# [arXiv 1211.5063](https://arxiv.org/abs/1211.5063), section 3.2 and figure 6.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"  # the paper's cliff needs eight digits

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from ipywidgets import Dropdown, FloatLogSlider, FloatSlider, IntSlider, interact

import gradclip_jax as gc

plt.style.use("figures.mplstyle")  # the colors C0 to C5 are blue, orange, green, red, purple, gray

# %% [markdown]
# ## The gradient of a recurrent network, clipped
#
# A plain network $h_t = f(W h_{t-1} + u_t)$ with a loss at the end, $E = v \cdot h_T$. W has
# 32 × 32 elements and the spectral radius ρ, T is the length of the sequence, τ is the limit. There
# are two places for a clip:
#
# * `clip_by_global_norm` multiplies the finished gradient by one factor, $\min(1, \tau / \|g\|)$;
# * `clip_cotangent` clips the error $\partial E/\partial h_t$ at each step on its way back (Graves
#   2013), so it cannot grow.

# %%
UNITS, LONGEST = 32, 100
NONLINEARITIES = {"linear": lambda x: x, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}
random = np.random.default_rng(0)
W = random.standard_normal((UNITS, UNITS))
W /= np.abs(np.linalg.eigvals(W)).max()
INPUTS = 0.1 * random.standard_normal((LONGEST, UNITS))
READOUT = random.standard_normal(UNITS)
READOUT /= np.linalg.norm(READOUT)


def loss(weights, last, nonlinearity, limit):
    """E at the step `last`, with the errors clipped on their way back if there is a limit."""
    clip = gc.clip_by_global_norm(limit)

    def step(state, u):
        state = NONLINEARITIES[nonlinearity](weights @ state + u)
        return state if limit is None else gc.clip_cotangent(state, clip), state

    _, states = jax.lax.scan(step, jnp.zeros(UNITS), INPUTS)
    return states[last - 1] @ READOUT


@partial(jax.jit, static_argnames="nonlinearity")
def gradient_norms(radius, nonlinearity, limit):
    """‖∂E/∂W‖ for each length: without a clip, by `clip_by_global_norm`, by `clip_cotangent`."""
    clip = gc.clip_by_global_norm(limit)
    grad_of = jax.grad(loss)

    def norms(last):
        grad = grad_of(radius * W, last, nonlinearity, None)
        clipped, _ = clip.update(grad, clip.init(grad))
        on_the_way = grad_of(radius * W, last, nonlinearity, limit)
        return [jnp.linalg.norm(matrix) for matrix in (grad, clipped, on_the_way)]

    return jax.vmap(norms)(jnp.arange(1, LONGEST + 1))


def draw_gradient_norms(rho, length, limit, nonlinearity):
    _, axes = plt.subplots(figsize=(6.5, 3.4))
    norms = gradient_norms(rho, nonlinearity, limit)
    styles = (
        ("no clip", "C3", 9),
        ("clip_by_global_norm", "C0", -17),
        ("clip_cotangent", "C2", -4),
    )
    for (name, color, shift), line in zip(styles, norms, strict=True):
        axes.semilogy(np.arange(1, length + 1), line[:length], color=color, lw=2)
        end = length, float(line[length - 1])
        axes.annotate(name, end, (4, shift), textcoords="offset points", color=color)
    axes.axhline(limit, color="C5", lw=1, zorder=0)
    axes.set(xlabel="length T of the sequence", ylabel="norm of ∂E/∂W", xlim=(1, length))
    axes.set_title(f"{nonlinearity}, spectral radius ρ = {rho:.1f}, limit τ = {limit:.3g}")


_ = interact(
    draw_gradient_norms,
    rho=FloatSlider(3, min=0.5, max=4, step=0.1),
    length=IntSlider(60, min=10, max=LONGEST, step=5),
    limit=FloatLogSlider(1, min=-3, max=3, step=0.5),
    nonlinearity=Dropdown(options=list(NONLINEARITIES), value="tanh"),
)

# %% [markdown]
# Without a clip the norm grows exponentially with T. `clip_by_global_norm` is a ceiling for it.
# `clip_cotangent` lets it grow, but no faster than the number of steps, each of which adds at most
# the limit. At a radius below 1 the red line falls, and no limit lifts it again.

# %%
before, after, on_the_way = (np.asarray(norms) for norms in gradient_norms(3.0, "tanh", 1.0))
for length in (20, 60, 100):
    i = length - 1
    print(f"T = {length:<3}  no clip {before[i]:.1e}  ", end="")
    print(f"clip_by_global_norm {after[i]:.2f}  clip_cotangent {on_the_way[i]:.1f}")
assert before[99] > 1e8
assert all(after <= 1 + 1e-6)
np.testing.assert_array_equal(after[before <= 1], before[before <= 1])  # left as they were
assert all(on_the_way <= np.arange(1, LONGEST + 1) * np.sqrt(UNITS))  # the modulus of tanh is < 1

# %% [markdown]
# ## One step at the cliff
#
# The smallest network whose gradient explodes (figure 6 of the paper) has one unit, 50 steps and
# two parameters:
#
# $$ x_t = w\, \sigma(x_{t-1}) + b, \qquad x_0 = \tfrac12, \qquad
# E = \big(\sigma(x_{50}) - 0.7\big)^2. $$


# %%
def cost(point):
    """E at the point (w, b)."""

    def step(x, _):
        return point[0] * jax.nn.sigmoid(x) + point[1], None

    x, _ = jax.lax.scan(step, jnp.float64(0.5), length=50)
    return (jax.nn.sigmoid(x) - 0.7) ** 2


costs = jax.jit(jax.vmap(cost))
grad_at = jax.jit(jax.grad(cost))
WALL, VALLEY = jnp.array([5.0, -2.61234136]), jnp.array([5.0, -2.0])
GRAD = np.asarray(grad_at(WALL))
NORM = float(np.linalg.norm(GRAD))


def step_from(point, limit, learning_rate=0.1):
    """Where one step of gradient descent lands."""
    optimizer = optax.chain(gc.clip_by_global_norm(limit), optax.sgd(learning_rate))
    updates, _ = optimizer.update(grad_at(point), optimizer.init(point))
    return point + jnp.asarray(updates)


print(f"norm of the gradient: {NORM:.3f} at the wall, ", end="")
print(f"{jnp.linalg.norm(grad_at(VALLEY)):.4f} in the valley; cost at the wall {cost(WALL):.4f}")
landings = {limit: step_from(WALL, limit) for limit in (None, 1.0, 0.1)}
for limit, point in landings.items():
    w, b = point.tolist()
    print(f"limit {limit!s:<4} lands at ({w:.5f}, {b:.5f}), cost {cost(point):.4f}")

np.testing.assert_allclose(GRAD, [-3577.721, -5751.099], atol=5e-4)
np.testing.assert_allclose(jnp.linalg.norm(grad_at(VALLEY)), 5.549566e-2, atol=5e-9)
np.testing.assert_allclose(landings[None], [362.772, 572.498], atol=5e-4)
np.testing.assert_allclose(landings[1.0], [5.05282231, -2.52743080], atol=5e-9)
np.testing.assert_allclose(landings[0.1], [5.00528223, -2.60385030], atol=5e-9)
landed = [cost(point) for point in (WALL, *landings.values())]
np.testing.assert_allclose(landed, [0.14960413, 0.09, 0.02586525, 0.01215804], atol=5e-9)

# %% [markdown]
# The wall and the valley are 0.6 apart, and their norms differ by a factor of 100,000. From the
# wall a step with learning rate 0.1 goes 677 far without a clip, and 0.1 with the limit 1, in the
# same direction.

# %%
DISTANCES = np.geomspace(1e-7, 1e3, 401)


def draw_step(limit):
    along = np.asarray(WALL) - DISTANCES[:, None] * GRAD / NORM
    _, axes = plt.subplots(figsize=(6.5, 3.2))
    axes.semilogx(DISTANCES, costs(along), color="C5", lw=1.5)
    limited = f"limit {limit:.3g}  ", 0.1 * min(limit, NORM), "C0", "right"
    for name, distance, color, side in (("  no clip", 0.1 * NORM, "C3", "left"), limited):
        height = float(cost(WALL - distance * GRAD / NORM))
        axes.plot(distance, height, "o", ms=9, color=color)
        axes.text(distance, height + 0.004, name, color=color, ha=side)
    axes.set(xlabel="distance from the wall along the step", ylabel="cost", ylim=(0, 0.16))


_ = interact(draw_step, limit=FloatLogSlider(1, min=-3, max=4, step=0.25))

# %% [markdown]
# The cost falls within a distance of 0.0001 and then rises slowly. The gradient is the slope at a
# point: a slope of 6773 does not mean that going 677 far pays off.
#
# ## Gradient descent with and without the clip
#
# 400 steps of gradient descent with learning rate 0.1 from 256 starts in the valley. All paths meet
# the wall.

# %%
START = jnp.array([5.0, -2.4])


@partial(jax.jit, static_argnames="steps")
@partial(jax.vmap, in_axes=(0, None, None))
def descend(start, limit, steps=400):
    """Points, costs and norms before each step."""
    optimizer = optax.chain(gc.clip_by_global_norm(limit), optax.sgd(0.1))

    def step(carry, _):
        point, state = carry
        value, grad = jax.value_and_grad(cost)(point)
        updates, state = optimizer.update(grad, state, point)
        return (point + updates, state), (point, value, jnp.linalg.norm(grad))

    return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)[1]


def draw_descent(limit):
    _, (terrain, curve) = plt.subplots(1, 2, figsize=(9, 3.6))
    w, b = np.meshgrid(np.linspace(4.2, 5.4, 121), np.linspace(-2.9, -1.7, 121))
    heights = costs(jnp.stack([w.ravel(), b.ravel()], 1)).reshape(w.shape)
    extent = (4.2, 5.4, -2.9, -1.7)
    terrain.imshow(heights, extent=extent, origin="lower", cmap="Greys", alpha=0.5, aspect="auto")
    limited = limit, "C0", f"limit {limit:.3g}", "top"
    for value, color, name, side in ((jnp.inf, "C3", "no clip", "bottom"), limited):
        points, values, _ = (np.asarray(part)[0] for part in descend(START[None], value, 400))
        terrain.plot(*points.T, ".-", color=color, lw=1, ms=3)
        curve.semilogy(values, color=color, lw=1)
        curve.text(405, values[-1], name, color=color, va=side)
    terrain.plot(*START, "o", color="C1")
    terrain.text(5.02, -2.37, "start", color="C1")
    terrain.set(xlim=(4.2, 5.4), ylim=(-2.9, -1.7), xlabel="w", ylabel="b")
    terrain.set_title("both paths (darker: higher cost)")
    curve.set(xlabel="step", ylabel="cost along the path", xlim=(0, 400))


_ = interact(draw_descent, limit=FloatLogSlider(1, min=-2, max=4, step=0.25))

# %% [markdown]
# Without a clip one of the hits throws the weights to where the gradient is nearly zero, and they
# stay there at a cost of 0.09. With the limit every hit ends in a step of 0.1, and the path creeps
# along the foot of the wall to a cost of zero. The cost still jumps on the way: a clip does not
# take the wall away. Where exactly a path is thrown depends on the last digit, so the cell below
# asserts shares of the 256 starts.

# %%
ws, bs = np.meshgrid(np.linspace(4.8, 5.3, 16), np.linspace(-2.4, -2.0, 16))
STARTS = jnp.stack([ws.ravel(), bs.ravel()], 1)
for limit in (jnp.inf, 1.0):
    points, values, norms = (np.asarray(part) for part in descend(STARTS, limit, 400))
    away = np.linalg.norm(points[:, -1] - points[:, 0], axis=1) > 2
    assert all(norms.max(axis=1) > 1)  # every path meets a norm above the limit
    if limit == 1.0:
        print("limit 1: all end with a cost below 0.01")
        assert not away.any()
        assert values[:, -1].max() < 0.01
    else:
        print("no clip: most end more than 2 away, and most with a cost above 0.05")
        assert away.mean() > 0.5
        assert np.mean(values[:, -1] > 0.05) > 0.5
