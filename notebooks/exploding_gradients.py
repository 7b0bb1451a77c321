# %% [markdown]
# # Exploding gradients
#
# **The gradient of a recurrent network grows or shrinks exponentially with the number of steps.**
# A recurrent network applies the same weights at every step, so the gradient that travels back
# through T steps is multiplied T times by nearly the same matrix. Gates slow the vanishing and do
# not prevent the explosion. Each number below is asserted in the cell that prints it.
#
# Source: Pascanu, Mikolov, Bengio 2013, *On the difficulty of training recurrent neural networks*,
# [arXiv 1211.5063](https://arxiv.org/abs/1211.5063).

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ipywidgets import Dropdown, FloatSlider, IntSlider, fixed, interact

plt.style.use("figures.mplstyle")  # the colors C0 to C5 are blue, orange, green, red, purple, gray

# %% [markdown]
# ## A product of Jacobians
#
# The state is $h_t = f(W h_{t-1} + u_t)$ with inputs $u_t$. By the chain rule (their equation 5)
#
# $$ \frac{\partial h_T}{\partial h_t} = \prod_{s=t+1}^{T} \mathrm{diag}\big(f'(a_s)\big)\, W,
# \qquad a_s = W h_{s-1} + u_s. $$
#
# The spectral radius ρ of W is the largest modulus of its eigenvalues. In the long run the powers
# of W grow or shrink like $\rho^{T-t}$. Here W holds 32 × 32 normal numbers, scaled to the radius.
# The norm of a matrix is its largest singular value.

# %%
UNITS, LONGEST = 32, 100
RADII = (1.2, 1.1, 1.0, 0.9, 0.8)
NONLINEARITIES = {
    "linear": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
}


def scaled(matrix):
    """The matrix with spectral radius 1."""
    return matrix / np.abs(np.linalg.eigvals(matrix)).max()


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
    """The norms of the products in the plain recurrent network."""

    def step(state, u):
        return NONLINEARITIES[nonlinearity](radius * W @ state + u)

    return norms_of_products(step, jnp.zeros(UNITS), INPUTS)


def draw_lines(axes, lines):
    """Lines with a label at the end of each, from the lowest, moved up where two would overlap."""
    for _, color, values in lines:
        axes.semilogy(values, color=color, lw=2)
    low, high = np.log(axes.get_ylim())
    place = -np.inf
    for label, color, values in sorted(lines, key=lambda line: line[2][-1]):
        place = max(np.log(values[-1]), place + 0.07 * (high - low))
        axes.text(1.02 * (len(values) - 1), np.exp(place), label, color=color, va="center")


def draw_products(nonlinearity, length, axes=None):
    axes = axes or plt.subplots(figsize=(5, 3.2))[1]
    colors = dict(zip(RADII, ("C3", "C1", "C5", "C4", "C0"), strict=True))
    for radius, color in colors.items():
        axes.semilogy(radius ** np.arange(length + 1), color=color, lw=1, ls=":")
    norms = {radius: np.asarray(plain(radius, nonlinearity)[: length + 1]) for radius in RADII}
    draw_lines(axes, [(f"ρ = {radius}", colors[radius], norms[radius]) for radius in RADII])
    axes.set(xlabel="steps back, T − t", ylabel="norm of the product", xlim=(0, length))
    axes.set_title(f"{nonlinearity} (dotted: powers of ρ)")


_, (left, right) = plt.subplots(1, 2, sharey=True)
draw_products("linear", 50, left)
draw_products("tanh", 50, right)
right.set_ylabel("")
plt.show()

# %% [markdown]
# Without a nonlinearity the lines run parallel to the powers of ρ: the product explodes above 1 and
# vanishes below it. With tanh the factors $f' \le 1$ pull the product down, the more the larger the
# states are, and at a radius of 1.2 it neither explodes nor vanishes. The sigmoid has
# $f' \le 1/4$, so the gradient is gone after a few steps at any of these radii.

# %%
print("norm of the product after 50 steps")
print("rho     ", *(f"{radius:<9}" for radius in RADII))
for name in ("linear", "tanh", "sigmoid"):
    ends = [float(plain(radius, name)[50]) for radius in RADII]
    print(f"{name:<8}", *(f"{end:<9.2g}" for end in ends))

for radius in RADII:
    norms = np.asarray(plain(radius, "linear"))
    assert all(norms >= radius ** np.arange(LONGEST + 1) * (1 - 1e-9))  # never below the powers
    assert abs(norms[100] / norms[50] / radius**50 - 1) < 0.3  # and in the end as fast as they are
assert float(plain(1.2, "linear")[50]) > 1e3
assert 0.1 < float(plain(1.2, "tanh")[50]) < 10
assert float(plain(1.2, "sigmoid")[50]) < 1e-20

# %%
_ = interact(
    draw_products,
    nonlinearity=Dropdown(options=list(NONLINEARITIES), value="relu"),
    length=IntSlider(50, min=10, max=LONGEST),
    axes=fixed(None),
)

# %% [markdown]
# ## A spectral radius below 1 does not bound the gradient
#
# It says that the product vanishes in the end. On the way the product can grow. The matrix
#
# $$ W = \begin{pmatrix} 0.9 & 3 \\ 0 & 0.9 \end{pmatrix}, \qquad
# W^l = \begin{pmatrix} 0.9^l & 3\, l\, 0.9^{l-1} \\ 0 & 0.9^l \end{pmatrix} $$
#
# has radius 0.9 and norm 3.25. Its powers stay above 1 for 48 steps, and sequences are often
# shorter than that.


# %%
def powers(radius, coupling):
    """The norms of the powers 0 to 80 of the matrix."""
    matrix = np.array([[radius, coupling], [0, radius]])
    return np.array([np.linalg.norm(np.linalg.matrix_power(matrix, n), 2) for n in range(81)])


def draw_powers(rho, coupling):
    norms = powers(rho, coupling)
    _, axes = plt.subplots(figsize=(6, 3))
    draw_lines(axes, [("norm of $W^l$", "C0", norms), ("$\\rho^l$", "C1", rho ** np.arange(81))])
    axes.axhline(1, color="C5", lw=1, zorder=0)
    axes.set(xlabel="power l", xlim=(0, 80))
    axes.set_title(f"ρ = {rho:.2f}: largest norm {norms.max():.3g} at l = {norms.argmax()}")


_ = interact(
    draw_powers,
    rho=FloatSlider(0.9, min=0.7, max=1.1, step=0.02),
    coupling=FloatSlider(3, min=0, max=10, step=0.5),
)

# %%
norms = powers(0.9, 3)
peak, below = int(np.argmax(norms)), int(np.argmax(norms[1:] < 1)) + 1
print(f"norm {norms[1]:.6f}; peak {norms[peak]:.6f} at l = {peak}; below 1 from l = {below} on")
assert (round(norms[1], 6), round(norms[peak], 6)) == (3.249286, 11.635514)
assert (peak, below) == (9, 49)
assert all(norms[below:] < 1)

# %% [markdown]
# ## LSTM and GRU
#
# An LSTM carries its cell state on by the forget gate: $\partial c_t / \partial c_{t-1}$ along that
# path is a sigmoid, whatever the recurrent weights are, so the gradient need not vanish. It can
# still explode, because the gates depend on the state through recurrent weights. Here all recurrent
# matrices have the radius ρ. The bias of the forget gate (in the GRU, of the update gate) is set by
# hand.

# %%
GATES = np.stack([scaled(random.standard_normal((UNITS, UNITS))) for _ in range(4)])
GATE_INPUTS = 0.5 * random.standard_normal((LONGEST, 4, UNITS))


def plain_step(state, u, gates, bias):
    return jnp.tanh(gates[2] @ state + u[2])


def lstm_step(state, u, gates, bias):
    hidden, memory = jnp.split(state, 2)
    pre = gates @ hidden + u
    forget, write, show = map(jax.nn.sigmoid, (pre[0] + bias, pre[1], pre[3]))
    memory = forget * memory + write * jnp.tanh(pre[2])
    return jnp.concatenate([show * jnp.tanh(memory), memory])


def gru_step(state, u, gates, bias):
    keep = jax.nn.sigmoid(gates[0] @ state + u[0] + bias)
    reset = jax.nn.sigmoid(gates[1] @ state + u[1])
    return keep * state + (1 - keep) * jnp.tanh(gates[2] @ (reset * state) + u[2])


CELLS = {"plain": (plain_step, 1, "C3"), "LSTM": (lstm_step, 2, "C0"), "GRU": (gru_step, 1, "C2")}


@partial(jax.jit, static_argnames="name")
def norms_of_cell(name, radius, bias):
    """The norms of the products for a cell, whose state has one or two vectors."""
    step, vectors, _ = CELLS[name]
    step = partial(step, gates=radius * GATES, bias=bias)
    return norms_of_products(step, jnp.zeros(vectors * UNITS), GATE_INPUTS)


def draw_cells(rho, forget_bias, axes=None):
    axes = axes or plt.subplots(figsize=(5, 3.2))[1]
    norms = {name: np.asarray(norms_of_cell(name, rho, forget_bias)[:61]) for name in CELLS}
    draw_lines(axes, [(name, color, norms[name]) for name, (_, _, color) in CELLS.items()])
    axes.axhline(1, color="C5", lw=1, zorder=0)
    axes.set(xlabel="steps back, T − t", ylabel="norm of the product", xlim=(0, 60))
    axes.set_title(f"ρ = {rho:g}, forget bias {forget_bias:g}")


_, grid = plt.subplots(1, 3, figsize=(9, 3))
for axes, (rho, bias) in zip(grid, ((1, 0), (1, 3), (8, 1)), strict=True):
    draw_cells(float(rho), float(bias), axes)
    axes.set_ylabel("norm of the product" if axes is grid[0] else "")

# %% [markdown]
# With a forget bias of 0 the gate is half open, and the LSTM forgets faster than the plain network.
# With a bias of 3 it keeps the gradient for all 60 steps, which is why forget gates are initialized
# open. With recurrent weights that have grown large in training all three explode: an LSTM needs
# the clip too.

# %%
print("norm of the product after 50 steps")
ends = {}
for rho, bias in ((1.0, 0.0), (1.0, 3.0), (8.0, 1.0)):
    ends[rho] = {name: float(norms_of_cell(name, rho, bias)[50]) for name in CELLS}
    # A network that explodes is chaotic: rounding decides about the digits.
    texts = [f"{name} {f'{x:.0e}' if x < 100 else 'above 100'}" for name, x in ends[rho].items()]
    print(f"rho {rho:.0f}, forget bias {bias:.0f}: ", ",  ".join(texts))
    if bias == 0:
        assert ends[rho]["LSTM"] < ends[rho]["plain"] < 1e-5
    if bias == 3:
        assert 0.1 < ends[rho]["GRU"] < ends[rho]["LSTM"] < 10
assert all(end > 100 for end in ends[8.0].values())

# %%
_ = interact(
    draw_cells,
    rho=FloatSlider(8, min=0.5, max=10, step=0.5),
    forget_bias=FloatSlider(3, min=-1, max=4, step=0.5),
    axes=fixed(None),
)
