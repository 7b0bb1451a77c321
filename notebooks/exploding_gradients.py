# %% [markdown]
# # Why a gradient explodes, and what a limit on its norm does
#
# A recurrent network applies the same weights at every time step, so the gradient that travels back
# through T steps is multiplied T times by nearly the same matrix. This notebook shows where such a
# product goes: to nothing, to infinity, or up a cliff. Then it holds the norm of the gradient to a
# limit. What is claimed as a number is asserted in the cell that shows it.
#
# Source: Pascanu, Mikolov, Bengio 2013, *On the difficulty of training recurrent neural networks*,
# [arXiv 1211.5063](https://arxiv.org/abs/1211.5063).

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from ipywidgets import Dropdown, FloatLogSlider, FloatSlider, IntSlider, interact

import gradclip_jax

jax.config.update("jax_enable_x64", True)  # the cliff is given to eight digits

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
plt.rcParams |= {"figure.dpi": 72, "font.size": 12, "legend.frameon": False}
plt.rcParams |= {"axes.spines.right": False, "axes.spines.top": False}
plt.rcParams |= {"figure.constrained_layout.use": True}

# %% [markdown]
# ## 1. A product of Jacobians
#
# The state is $h_t = f(W h_{t-1} + u_t)$ with inputs $u_t$. By the chain rule (their equation 5)
#
# $$ \frac{\partial h_T}{\partial h_t} = \prod_{s=t+1}^{T} \mathrm{diag}\big(f'(a_s)\big)\, W,
# \qquad a_s = W h_{s-1} + u_s. $$
#
# The spectral radius ρ of W, the largest modulus of its eigenvalues, says how fast the powers of W
# grow or shrink in the long run: like $\rho^{T-t}$. Here W has 32 × 32 normal numbers, scaled to
# the radius, and the norm of a matrix is its largest singular value.

# %%
UNITS, LONGEST = 32, 100
RADII = (0.8, 0.9, 1.0, 1.1, 1.2)
NONLINEARITIES = {
    "linear": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
}


def scaled(matrix, radius=1.0):
    """The matrix, scaled to this spectral radius."""
    return radius * matrix / np.abs(np.linalg.eigvals(matrix)).max()


random = np.random.default_rng(0)
W = scaled(random.standard_normal((UNITS, UNITS)))
INPUTS = 0.1 * random.standard_normal((LONGEST, UNITS))


def norms_of_products(step, state, inputs):
    """‖∂h_T/∂h_t‖ for T − t = 0, 1, … of `h_t = step(h_{t-1}, u_t)`."""

    def forward(state, u):
        return step(state, u), jax.jacfwd(step)(state, u)

    def back(product, jacobian):
        product = product @ jacobian
        return product, jnp.linalg.norm(product, 2)

    _, jacobians = jax.lax.scan(forward, state, inputs)
    _, norms = jax.lax.scan(back, jnp.eye(len(state)), jacobians[::-1])
    return jnp.concatenate([jnp.ones(1), norms])


@partial(jax.jit, static_argnames="nonlinearity")
def plain(radius, nonlinearity):
    """The norms for the plain recurrent network."""

    def step(state, u):
        return NONLINEARITIES[nonlinearity](radius * W @ state + u)

    return norms_of_products(step, jnp.zeros(UNITS), INPUTS)


COLOURS = (BLUE, "#56B4E9", "0.4", ORANGE, RED)  # from vanishing to exploding


def draw_products(nonlinearity="tanh", length=50, axes=None):
    alone = axes is None
    if axes is None:
        _, axes = plt.subplots(figsize=(6.5, 4))
    for radius, colour in reversed(list(zip(RADII, COLOURS, strict=True))):
        norms = plain(radius, nonlinearity)[: length + 1]
        axes.semilogy(norms, color=colour, lw=2.5, label=f"ρ = {radius}")
        axes.semilogy(radius ** np.arange(length + 1), color=colour, lw=1, ls=":")
    axes.set(xlabel="T − t, steps back", xlim=(0, length))
    axes.set_title(f"{nonlinearity} (dotted: powers of ρ)", fontsize=12)
    if alone:
        axes.set_ylabel("norm of the product")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        plt.show()


figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
draw_products("linear", axes=left)
draw_products("tanh", axes=right)
left.set_ylabel("norm of the product")
right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Without a nonlinearity the lines run parallel to the powers of ρ: above 1 the product explodes,
# below it vanishes, both exponentially. They start above the dotted ones, because the norm of W is
# larger than its radius (section 3). With tanh the factors $f' \le 1$ pull the product down the
# more, the larger the states grow, so that a radius of 1.2 is about where it neither vanishes nor
# explodes.

# %%
print("norm of the product after 50 steps")
print("rho      0.8       0.9       1.0       1.1       1.2")
for name in ("linear", "tanh", "sigmoid"):
    ends = [float(plain(radius, name)[50]) for radius in RADII]
    print(f"{name:<8}", *(f"{end:<9.2g}" for end in ends))

linear = [np.asarray(plain(radius, "linear")) for radius in RADII]
for radius, norms in zip(RADII, linear, strict=True):
    assert all(norms >= radius ** np.arange(LONGEST + 1) * (1 - 1e-9))  # never below the powers
    assert abs(norms[100] / norms[50] / radius**50 - 1) < 0.3  # and in the end as fast as they
assert np.linalg.norm(W, 2) > 1.6

# %% [markdown]
# The sigmoid has $f' \le 1/4$: with it a radius below 4 is small, and the gradient is gone after a
# few steps. (The paper's condition: with $|f'| \le \gamma$ it is sufficient for vanishing that the
# largest singular value of W is below 1/γ, and necessary for exploding that it is above.)
#
# Move the number of steps, and try the other nonlinearities:

# %%
_ = interact(
    lambda nonlinearity, length: draw_products(nonlinearity, length),
    nonlinearity=Dropdown(options=list(NONLINEARITIES), value="tanh"),
    length=IntSlider(50, min=10, max=LONGEST),
)

# %% [markdown]
# Vanishing beside exploding, for radii from 0.5 to 4: the colour is the norm of the product, the
# line is where it is 1.

# %%
radii = np.geomspace(0.5, 4, 43)
names = ("linear", "tanh", "sigmoid")
figure, grid = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
for axes, name in zip(grid, names, strict=True):
    exponents = np.log10(jax.vmap(partial(plain, nonlinearity=name))(radii))[:, :61]
    axes.pcolormesh(
        np.arange(61), radii, exponents.clip(-8, 8), cmap="PuOr_r", vmin=-8, vmax=8, rasterized=True
    )
    axes.contour(np.arange(61), radii, exponents, levels=[0], colors="black", linewidths=1.5)
    axes.set(yscale="log", xlabel="T − t, steps back", title=name)
    axes.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes.minorticks_off()
grid[0].set_ylabel("spectral radius ρ")
bar = figure.colorbar(
    grid[0].collections[0], ax=grid, label="norm of the product", ticks=[-8, -4, 0, 4, 8]
)
bar.ax.set_yticklabels(["≤ 1e−8", "1e−4", "1", "1e4", "≥ 1e8"])
plt.show()

# %% [markdown]
# Between purple, vanishing, and orange, exploding, lies little white. The linear network has one
# radius that keeps a gradient over many steps. With tanh there is a band above 1, in which the
# states saturate just enough. With the sigmoid the gradient of all but the last steps is gone.

# %% [markdown]
# ## 2. The gradient of the weights, and two places for a limit
#
# Now a loss at the end, $E = v \cdot h_T$ with $\|v\| = 1$. Its gradient with respect to W adds up
# what arrives at each time step. A limit can be set in two places:
#
# * on the gradient that is finished: `clip_by_global_norm` multiplies it by one factor, so that
#   its direction, and with it what each time step contributes, stays as it was;
# * on the way: `clip_cotangent` holds the error $\partial E/\partial h_t$ to the limit at each step
#   (Graves 2013), so that it never grows, and no later step speaks louder than an earlier one.

# %%
READOUT = random.standard_normal(UNITS)
READOUT /= np.linalg.norm(READOUT)


def loss(weights, nudges, last, nonlinearity, limit):
    """E at the step `last`; the gradient of a nudge is the error of its time step."""
    clip = gradclip_jax.clip_by_global_norm(limit)

    def step(state, inputs):
        u, nudge = inputs
        state = NONLINEARITIES[nonlinearity](weights @ state + u) + nudge
        return state if limit is None else gradclip_jax.clip_cotangent(state, clip), state

    _, states = jax.lax.scan(step, jnp.zeros(UNITS), (INPUTS, nudges))
    return states[last - 1] @ READOUT


@partial(jax.jit, static_argnames="nonlinearity")
def back_propagated(radius, last, nonlinearity, limit=None):
    """The gradient of the weights, and the norm of the error at each time step."""
    nudges = jnp.zeros((LONGEST, UNITS))
    grad = jax.grad(loss, argnums=(0, 1))
    of_weights, errors = grad(radius * W, nudges, last, nonlinearity, limit)
    return of_weights, jnp.linalg.norm(errors, axis=1)


@partial(jax.jit, static_argnames="nonlinearity")
def norms_by_length(radius, nonlinearity, limit):
    """The norm of the gradient of the weights for each length of the sequence, by kind of clip."""
    clip = gradclip_jax.clip_by_global_norm(limit)

    def norms(last):
        grad, _ = back_propagated(radius, last, nonlinearity)
        clipped, _ = clip.update(grad, clip.init(grad))
        on_the_way, _ = back_propagated(radius, last, nonlinearity, limit)
        return [jnp.linalg.norm(matrix) for matrix in (grad, clipped, on_the_way)]

    return jax.vmap(norms)(jnp.arange(1, LONGEST + 1))


STYLES = {
    "no clip": {"color": RED, "lw": 2},
    "clip_by_global_norm": {"color": BLUE, "lw": 2},
    "clip_cotangent": {"color": GREEN, "lw": 2.5, "ls": ":"},
}


def draw_back_propagation(rho=3.0, length=60, nonlinearity="tanh", limit=1.0):
    times = np.arange(1, length + 1)
    by_length = norms_by_length(rho, nonlinearity, limit)
    _, errors = back_propagated(rho, length, nonlinearity)
    _, on_the_way = back_propagated(rho, length, nonlinearity, limit)
    factor = by_length[1][length - 1] / by_length[0][length - 1]
    by_time = (errors, factor * errors, on_the_way)

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    for axes, lines in ((left, by_time), (right, by_length)):
        for (label, style), norms in zip(STYLES.items(), lines, strict=True):
            axes.semilogy(times, norms[:length], label=label, **style)
        axes.axhline(limit, color="0.7", lw=1, zorder=0)
        axes.set_xlim(1, length)
    left.set(xlabel="time step t", ylabel="norm of the error ∂E/∂h at t")
    right.set(xlabel="length T of the sequence", ylabel="norm of the gradient ∂E/∂W")
    right.legend(loc="upper left")
    figure.suptitle(f"{nonlinearity}, ρ = {rho:.2f}, limit {limit:.3g}", fontsize=12)
    plt.show()


draw_back_propagation()

# %% [markdown]
# Left, the norm of the error at each time step of a sequence of 60: it grows on its way back, from
# right to left. The clip of the whole gradient shifts the line and keeps its slope; the clip on the
# way cuts it off at the limit. Right, the norm of the gradient of the weights for sequences of
# every length: one clip is a ceiling for it, the other lets it grow with the number of steps, each
# of which may add as much as the limit, but no longer exponentially.

# %%
before, whole, on_the_way = (np.asarray(norms) for norms in norms_by_length(3.0, "tanh", 1.0))
for length in (20, 40, 60, 80, 100):
    i = length - 1
    print(f"T = {length:<3}  no clip {before[i]:.1e}  ", end="")
    print(f"clip_by_global_norm {whole[i]:.2f}  clip_cotangent {on_the_way[i]:.1f}")
assert before[99] > 1e8
assert before[59] > 1e5
assert all(whole <= 1 + 1e-6)
np.testing.assert_array_equal(whole[before <= 1], before[before <= 1])  # left as they were
assert all(on_the_way <= np.arange(1, LONGEST + 1) * np.sqrt(UNITS))  # the modulus of tanh is < 1

# %% [markdown]
# Move the radius, the length, the nonlinearity and the limit:

# %%
_ = interact(
    draw_back_propagation,
    rho=FloatSlider(3, min=0.5, max=4, step=0.1),
    length=IntSlider(60, min=10, max=LONGEST, step=5),
    nonlinearity=Dropdown(options=["linear", "tanh", "sigmoid"], value="tanh"),
    limit=FloatLogSlider(1, min=-3, max=3, step=0.5),
)

# %% [markdown]
# At a radius below 1 the picture tilts the other way. No limit helps there: a clip makes large
# gradients small, and nothing makes a vanished one large again.
#
# ## 3. The spectral radius is not the norm
#
# A radius below 1 means that the product vanishes in the end. On the way it can grow. The matrix
#
# $$ W = \begin{pmatrix} 0.9 & 3 \\ 0 & 0.9 \end{pmatrix}, \qquad
# W^l = \begin{pmatrix} 0.9^l & 3\, l\, 0.9^{l-1} \\ 0 & 0.9^l \end{pmatrix} $$
#
# has radius 0.9 and norm 3.25.


# %%
def powers(radius, coupling, count):
    """The norms of the powers 0, 1, … of the matrix."""
    matrix = np.array([[radius, coupling], [0, radius]])
    return [np.linalg.norm(np.linalg.matrix_power(matrix, n), 2) for n in range(count + 1)]


def draw_powers(rho=0.9, coupling=3.0):
    norms = np.array(powers(rho, coupling, 80))
    _, axes = plt.subplots(figsize=(7, 4))
    axes.semilogy(norms, color=BLUE, lw=2, label="norm of the power l of W")
    axes.semilogy(rho ** np.arange(81), color=ORANGE, lw=2, ls="--", label="power l of ρ")
    axes.axhline(1, color="0.7", lw=1, zorder=0)
    peak = int(norms.argmax())
    axes.plot(peak, norms[peak], "o", color=BLUE)
    axes.annotate(
        f"{norms[peak]:.3g} at l = {peak}", (peak, norms[peak]), (0, 8), textcoords="offset points"
    )
    axes.set(xlabel="l", xlim=(0, 80), ylim=(1e-4, max(30, 3 * norms[peak])))
    axes.legend(loc="lower left")
    plt.show()


draw_powers()

# %%
norms = powers(0.9, 3, 80)
peak = int(np.argmax(norms))
below = next(n for n in range(1, 81) if norms[n] < 1)
print(f"norm {norms[1]:.6f}; peak {norms[peak]:.6f} at l = {peak}; below 1 from l = {below} on")
assert (round(norms[1], 6), round(norms[peak], 6)) == (3.249286, 11.635514)
assert (peak, below) == (9, 49)
assert all(norm < 1 for norm in norms[below:])

# %% [markdown]
# For 48 steps a gradient may come out longer than it went in, up to 12 times. To keep the radius of
# W below 1 (by weight decay, or by its initial values) is therefore no limit on the gradient; and
# sequences are often shorter than the "long run".

# %%
_ = interact(
    draw_powers,
    rho=FloatSlider(0.9, min=0.7, max=1.1, step=0.02),
    coupling=FloatSlider(3, min=0, max=10, step=0.5),
)

# %% [markdown]
# ## 4. LSTM and GRU beside the plain network
#
# Gated cells carry their state on by a factor of its own, the forget gate: along the cell state of
# an LSTM, $\partial c_t / \partial c_{t-1}$ is the gate, a sigmoid, whatever the recurrent weights
# are. So the gradient need not vanish. It can still explode, because the gates, too, depend on the
# state through recurrent weights. Here all recurrent matrices have the radius ρ, and the bias of
# the forget gate (of the update gate in the GRU) is set by hand.

# %%
GATES = np.stack([scaled(random.standard_normal((UNITS, UNITS))) for _ in range(4)])
GATE_INPUTS = 0.5 * random.standard_normal((LONGEST, 4, UNITS))


def plain_step(state, u, gates, bias):
    return jnp.tanh(gates[2] @ state + u[2])


def lstm_step(state, u, gates, bias):
    hidden, memory = jnp.split(state, 2)
    pre = gates @ hidden + u
    keep, write, show = (
        jax.nn.sigmoid(pre[0] + bias),
        jax.nn.sigmoid(pre[1]),
        jax.nn.sigmoid(pre[3]),
    )
    memory = keep * memory + write * jnp.tanh(pre[2])
    return jnp.concatenate([show * jnp.tanh(memory), memory])


def gru_step(state, u, gates, bias):
    keep = jax.nn.sigmoid(gates[0] @ state + u[0] + bias)
    reset = jax.nn.sigmoid(gates[1] @ state + u[1])
    return keep * state + (1 - keep) * jnp.tanh(gates[2] @ (reset * state) + u[2])


CELLS = {"plain, tanh": (plain_step, 1), "LSTM": (lstm_step, 2), "GRU": (gru_step, 1)}


@partial(jax.jit, static_argnames="name")
def of_cell(name, radius, bias):
    """The norms for a cell, whose state has one or two vectors."""
    step, vectors = CELLS[name]
    step = partial(step, gates=radius * GATES, bias=bias)
    return norms_of_products(step, jnp.zeros(vectors * UNITS), GATE_INPUTS)


def draw_cells(rho=1.0, forget_bias=1.0, axes=None):
    alone = axes is None
    if axes is None:
        _, axes = plt.subplots(figsize=(6, 4))
    for name, colour, line in zip(CELLS, (RED, BLUE, GREEN), ("-", "-", "--"), strict=True):
        axes.semilogy(of_cell(name, rho, forget_bias)[:61], line, color=colour, lw=2, label=name)
    axes.axhline(1, color="0.7", lw=1, zorder=0)
    axes.set(xlabel="T − t, steps back", xlim=(0, 60))
    axes.set_title(f"ρ = {rho:g}, forget bias {forget_bias:g}", fontsize=12)
    if alone:
        axes.set_ylabel("norm of the product")
        axes.legend()
        plt.show()


figure, grid = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey="row")
for row, rho in zip(grid, (1.0, 6.0), strict=True):
    for axes, bias in zip(row, (0.0, 1.0, 3.0), strict=True):
        draw_cells(rho, bias, axes)
        axes.label_outer()
    row[0].set_ylabel("norm of the product")
grid[0, 0].legend(loc="lower left")
plt.show()

# %%
print("norm of the product after 50 steps")
ends = {}
for rho, bias in ((1.0, 0.0), (1.0, 1.0), (1.0, 3.0), (6.0, 1.0)):
    ends[rho, bias] = {name: float(of_cell(name, rho, bias)[50]) for name in CELLS}
    # Where the plain network explodes it is chaotic, and rounding decides about the digits.
    texts = [
        f"{name} {end:.0e}" if end < 1e6 else f"{name} above 1e6"
        for name, end in ends[rho, bias].items()
    ]
    print(f"rho {rho:.0f}, forget bias {bias:.0f}: ", ",  ".join(texts))
assert ends[1.0, 0.0]["LSTM"] < ends[1.0, 0.0]["plain, tanh"] < 1e-5
assert 0.1 < ends[1.0, 3.0]["GRU"] < ends[1.0, 3.0]["LSTM"] < 10
assert all(end > 100 for end in ends[6.0, 1.0].values())

# %% [markdown]
# Three things are to be seen. With a bias of 0 the forget gate is half open, and the LSTM forgets
# faster than the plain network. With a bias of 3 it keeps the gradient for all 60 steps; this is
# why forget gates are initialised open. And with large recurrent weights, as they may become in
# training, gates delay the explosion and do not prevent it: an LSTM needs the limit too.

# %%
_ = interact(
    lambda rho, forget_bias: draw_cells(rho, forget_bias),
    rho=FloatSlider(1, min=0.5, max=8, step=0.5),
    forget_bias=FloatSlider(1, min=-1, max=4, step=0.5),
)

# %% [markdown]
# ## 5. The cliff
#
# What does the loss look like where the gradient explodes? The smallest example is the paper's
# (their figure 6): one unit, 50 steps, two parameters,
#
# $$ x_t = w\, \sigma(x_{t-1}) + b, \qquad x_0 = \tfrac12, \qquad
# E = \big(\sigma(x_{50}) - 0.7\big)^2. $$

# %%
T = 50


def cost(point):
    """E at the point (w, b)."""

    def step(x, _):
        return point[0] * jax.nn.sigmoid(x) + point[1], None

    x, _ = jax.lax.scan(step, jnp.float64(0.5), length=T)
    return (jax.nn.sigmoid(x) - 0.7) ** 2


cost_and_grad = jax.jit(jax.value_and_grad(cost))
costs = jax.jit(jax.vmap(cost))
WALL, VALLEY = jnp.array([5.0, -2.61234136]), jnp.array([5.0, -2.0])

at_wall, grad = cost_and_grad(WALL)
in_valley = jnp.linalg.norm(cost_and_grad(VALLEY)[1])
norm = jnp.linalg.norm(grad)
print(
    f"at the wall:   cost {at_wall:.8f}, gradient ({grad[0]:.3f}, {grad[1]:.3f}), norm {norm:.3f}"
)
print(f"in the valley: norm {in_valley:.6e}")
np.testing.assert_allclose(at_wall, 0.14960413, atol=5e-9)
np.testing.assert_allclose(grad, [-3577.721, -5751.099], atol=5e-4)
np.testing.assert_allclose(norm, 6773.125, atol=5e-4)
np.testing.assert_allclose(in_valley, 5.549566e-2, atol=5e-9)

# %% [markdown]
# Two points, 0.6 apart, and norms that differ by a factor of 100,000. One step of gradient descent
# from the wall, with learning rate 0.1, without a clip and with two limits:


# %%
def step_from(point, limit, learning_rate=0.1):
    """Where one step of clipped gradient descent lands."""
    optimizer = optax.chain(gradclip_jax.clip_by_global_norm(limit), optax.sgd(learning_rate))
    updates, _ = optimizer.update(cost_and_grad(point)[1], optimizer.init(point))
    return point + jnp.asarray(updates)


landings = {limit: step_from(WALL, limit) for limit in (None, 1.0, 0.1)}
for limit, point in landings.items():
    w, b = point.tolist()
    print(f"limit {limit!s:<4} lands at ({w:.8f}, {b:.8f}), cost {cost(point):.8f}")
np.testing.assert_allclose(landings[None], [362.772, 572.498], atol=5e-4)
np.testing.assert_allclose(landings[1.0], [5.05282231, -2.52743080], atol=5e-9)
np.testing.assert_allclose(landings[0.1], [5.00528223, -2.60385030], atol=5e-9)
landed = [cost(point) for point in landings.values()]
np.testing.assert_allclose(landed, [0.09, 0.02586525, 0.01215804], atol=5e-9)


# %%
def wall(w):
    """The b at which x_0 is the unstable fixed point: from there the states part."""
    return 0.5 - w / (1 + np.exp(-0.5))


# Rows along the wall, with none in it: on a plain grid it would be ragged.
OFFSETS = np.concatenate([np.linspace(-0.5, -0.004, 20), np.linspace(0.002, 0.5, 20)])
WS, BS = np.meshgrid(np.linspace(4.6, 5.4, 17), OFFSETS)
BS = wall(WS) + BS
TERRAIN = np.asarray(costs(jnp.stack([WS.ravel(), BS.ravel()], 1))).reshape(WS.shape)
DISTANCES = np.geomspace(1e-7, 1e3, 401)
DOWN = -np.asarray(grad / norm)
GREYS = {"cmap": "Greys", "vmin": -0.1, "vmax": 0.6}  # the lower, the lighter


def draw_cliff(limit=1.0, azimuth=25, elevation=35):
    start = np.asarray(WALL)
    moved, whole = 0.1 * min(limit, float(norm)), 0.1 * float(norm)
    landing = start + moved * DOWN
    figure = plt.figure(figsize=(12, 5))
    axes = figure.add_subplot(1, 2, 1, projection="3d", computed_zorder=False)
    axes.plot_surface(WS, BS, TERRAIN, rcount=40, ccount=17, ec="0.5", lw=0.3, **GREYS)
    beyond = start + np.array([[0], [0.72]]) * DOWN  # the beginning of the long step
    axes.plot(*beyond.T, [at_wall, at_wall], color=RED, lw=3, zorder=3)
    beyond = start + 0.85 * DOWN
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    style = {"color": RED, "ha": "center", "bbox": box, "zorder": 4}
    write = partial(axes.text, beyond[0], beyond[1])  # in 3-D a text has three coordinates
    write(float(at_wall), "no clip: to (363, 572)", **style)
    if moved < 0.6:
        ends = np.stack([start, landing])
        axes.plot(*ends.T, [at_wall, cost(landing)], color=BLUE, lw=3, zorder=3)
        axes.plot(*landing, cost(landing), "o", color=BLUE, zorder=4)
    axes.plot(*start, at_wall, "o", color="black", zorder=4)
    axes.set(xlabel="w", ylabel="b", zlabel="cost")
    axes.view_init(elevation, azimuth)

    axes = figure.add_subplot(1, 2, 2)
    axes.semilogx(DISTANCES, costs(start + DISTANCES[:, None] * DOWN), color="black", lw=1.5)
    ends = {"no clip": (whole, RED), f"limit {limit:.3g}": (moved, BLUE)}
    for label, (distance, colour) in ends.items():
        axes.plot(distance, cost(start + distance * DOWN), "o", ms=9, color=colour, label=label)
    axes.set(xlabel="distance from the start along the step", ylabel="cost", ylim=(0, 0.16))
    axes.legend(loc="upper right")
    plt.show()


draw_cliff()

# %% [markdown]
# Left, the cost over the two parameters. A valley slopes gently down towards a wall, and a step
# starts in the wall (black). Without a clip it leaves the picture. With the limit it lands in the
# valley (white), in the same direction. Right, the cost along that line, on a logarithmic scale of
# the distance: at the start it falls within 0.0001, and then it is a valley whose floor rises. A
# gradient tells the slope at a point; from a slope of 6773 it does not follow that going 677 far
# is worth while. That is all that a limit says: do not trust a slope further than so.

# %%
_ = interact(
    draw_cliff,
    limit=FloatLogSlider(1, min=-3, max=4, step=0.25),
    azimuth=IntSlider(25, min=-180, max=180, step=5),
    elevation=IntSlider(35, min=0, max=90, step=5),
)

# %% [markdown]
# How high is the wall? The largest norm of the gradient over b, for several w (searched on a grid
# that is refined ten times):

# %%
norms_at = jax.jit(jax.vmap(lambda point: jnp.linalg.norm(jax.grad(cost)(point))))


def peak_norm(w):
    centre, width, highest = wall(w), 0.5, 0.0
    for _ in range(10):
        b = centre + width * np.linspace(-1, 1, 201)
        norms = np.asarray(norms_at(np.stack([np.full_like(b, w), b], 1)))
        centre, width, highest = b[norms.argmax()], width / 20, norms.max()
    return float(highest)


peaks = {w: peak_norm(w) for w in (4.6, 4.8, 5.0, 5.2, 5.4)}
for w, peak in peaks.items():
    print(f"w = {w}: {peak:9.1f}")
expected = [315.7, 1396.3, 6773.1, 34241.6, 173678]
np.testing.assert_allclose(list(peaks.values()), expected, rtol=2e-4)
assert [f"{peak:.4g}" for peak in peaks.values()] == [f"{value:.4g}" for value in expected]

# %% [markdown]
# ## 6. Down the valley, with the limit and without
#
# From 256 starts in the valley, 400 steps of gradient descent with learning rate 0.1 each. The two
# paths drawn start at the same point. What differs is the limit.

# %%
START = jnp.array([5.0, -2.4])


def descend(start, limit, steps=400):
    """Points, costs and norms before each step."""
    optimizer = optax.chain(gradclip_jax.clip_by_global_norm(limit), optax.sgd(0.1))

    def step(carry, _):
        point, state = carry
        value, grad = jax.value_and_grad(cost)(point)
        updates, state = optimizer.update(grad, state, point)
        return (point + updates, state), (point, value, jnp.linalg.norm(grad))

    return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)[1]


descend_all = jax.jit(jax.vmap(descend, in_axes=(0, None)))
ws, bs = np.meshgrid(np.linspace(4.8, 5.3, 16), np.linspace(-2.4, -2.0, 16))
STARTS = jnp.stack([ws.ravel(), bs.ravel()], 1)


def draw_descent(limit=1.0):
    figure, (terrain, curve) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(5, 4))
    w, b = np.meshgrid(np.linspace(4.2, 5.4, 161), np.linspace(-2.9, -1.7, 161))
    heights = costs(jnp.stack([w.ravel(), b.ravel()], 1)).reshape(w.shape)
    image = terrain.pcolormesh(w, b, heights, rasterized=True, **GREYS)
    figure.colorbar(image, ax=terrain, label="cost")
    for value, colour, label in ((jnp.inf, RED, "no clip"), (limit, BLUE, f"limit {limit:.3g}")):
        points, values, _ = (np.asarray(part)[0] for part in descend_all(START[None], value))
        terrain.plot(*points.T, ".-", color=colour, lw=1, ms=3, label=label)
        curve.semilogy(values, color=colour, lw=1, label=label)
    terrain.plot(*START, "o", color="black")
    terrain.set(xlim=(4.2, 5.4), ylim=(-2.9, -1.7), xlabel="w", ylabel="b")
    terrain.legend(loc="lower left")
    curve.set(xlabel="step", ylabel="cost along the path")
    curve.legend(loc="lower left")
    plt.show()


draw_descent()

# %% [markdown]
# Both walk down into the valley and hit the wall. Without a clip one of the hits throws the weights
# to where the gradient is next to nothing, and there they stay, with a cost of 0.09. With the limit
# every hit ends in a step of 0.1, and the path creeps along the foot of the wall to where the cost
# is zero. The cost is not smooth on this way: a limit does not take the wall away.
#
# Of all 256 starts (where exactly a path is thrown depends on the last digit, so this is asserted
# with room):

# %%
for limit in (jnp.inf, 1.0):
    points, values, norms = (np.asarray(part) for part in descend_all(STARTS, limit))
    away = np.linalg.norm(points[:, -1] - points[:, 0], axis=1) > 2
    assert all(norms.max(axis=1) > 1)  # every path meets a norm above the limit
    if limit == 1.0:
        print("limit 1: all end with a cost below 0.01")
        assert not away.any()
        assert values[:, -1].max() < 0.01
    else:
        print("no clip: most end further than 2 away, and most with a cost above 0.05")
        assert away.mean() > 0.5
        assert np.mean(values[:, -1] > 0.05) > 0.5

# %%
_ = interact(draw_descent, limit=FloatLogSlider(1, min=-2, max=4, step=0.25))

# %% [markdown]
# ## In short
#
# * The gradient of a recurrent network is a product of as many Jacobians as there are steps. It
#   explodes or vanishes exponentially; between the two lies a thin line.
# * A spectral radius below 1 lets the product vanish in the end, not on the way. Gates slow the
#   vanishing; they do not prevent the explosion.
# * Where the gradient explodes, the loss has a wall, and a step along the gradient leaves the
#   region in which the gradient says anything. `clip_by_global_norm` shortens that step and changes
#   nothing else. For what vanished it does nothing.
