# %% [markdown]
# # The gradient norm on many devices
#
# **A gradient has one norm, however many devices hold its pieces; a device that clips by the norm
# of its own shard trains another model.** This notebook runs `shard_map`, `jit` and `pmap` (FSDP,
# tensor parallelism, data parallelism) on eight CPU devices. Each number below is asserted in the
# cell that prints it. [Many devices](../docs/many_devices.md) is the guide.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported

import re
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from ipywidgets import FloatLogSlider, interact
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from matplotlib.colors import ListedColormap

import gradclip_jax as gc

plt.style.use("figures.mplstyle")  # the colors C0 to C5 are blue, orange, green, red, purple, gray
assert jax.device_count() == 8


def make_mesh(kind=AxisType.Auto, **axes):
    """A mesh with axes of these names and sizes."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def sharded(function, mesh, in_specs, out_specs, check_vma=True):
    """The function under `shard_map`, compiled."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )
    return jax.jit(mapped)


# %% [markdown]
# ## The shards of each device
#
# Eight devices form a mesh of four along `data` times two along `model`. Five leaves are sharded in
# the five usual ways: a replicated bias, a kernel with rows split along `data` (FSDP), one with
# columns split along `model` (tensor parallelism), one split both ways, and a vector split along
# both axes together. Each box is a device, and the color marks the shard that it holds.

# %%
mesh = make_mesh(data=4, model=2)
SPECS = {
    "bias": P(),
    "rows": P("data"),
    "columns": P(None, "model"),
    "both": P("data", "model"),
    "pair": P(("data", "model")),
}
SHAPES = {"bias": (8,), "rows": (8, 4), "columns": (4, 8), "both": (8, 4), "pair": (8,)}


def shard_of(name, device):
    """Ones where a device holds an element of the leaf, zeros elsewhere."""
    elements = np.zeros(SHAPES[name])
    elements[NamedSharding(mesh, SPECS[name]).devices_indices_map(SHAPES[name])[device]] = 1
    return elements


_, grid = plt.subplots(4, 2, figsize=(7.6, 6))
for place, device in np.ndenumerate(mesh.devices):
    axes, left = grid[place], 0
    for number, name in enumerate(SPECS):
        elements = shard_of(name, device).reshape(SHAPES[name][0], -1)  # a vector as a column
        height, width = elements.shape
        slot = max(width, 5) + 1
        x, y = left + (slot - width) / 2 + np.arange(width + 1), np.arange(height + 1)
        palette = ListedColormap(["#8080804d", f"C{number}"])
        axes.pcolormesh(x, y, elements, cmap=palette, vmin=0, vmax=1)
        axes.text(left + slot / 2, -0.6, name, ha="center", size=8)
        left += slot
    axes.set(xlim=(-0.5, left + 0.5), ylim=(8.7, -2.4), aspect="equal", xticks=[], yticks=[])
    axes.set_title("device {}: data {}, model {}".format(device.id, *place), size=9)
    axes.spines[:].set_visible(True)

copies = {
    name: int(sum(shard_of(name, device).sum() for device in mesh.devices.flat) / np.prod(shape))
    for name, shape in SHAPES.items()
}
print("copies of each element:", copies)
assert copies == {"bias": 8, "rows": 2, "columns": 4, "both": 1, "pair": 1}

# %% [markdown]
# A sum over what all devices hold counts the bias eight times. A sum over what one device holds
# misses most of the other leaves. The norm of the gradient counts each element once.
#
# ## The norm of one shard
#
# A gradient to check by hand: the shards of a kernel on eight devices have the norms 1, 2, … 8, so
# its squares add up to 204. A replicated bias (4, 2, 1) adds 21. The norm is √225 = 15. Inside
# `shard_map` with `check_vma=False`, `optax.clip_by_global_norm` takes the norm of the shard that
# it sees.

# %%
line = make_mesh(data=8)
specs = {"kernel": P("data"), "bias": P()}
grads = {"kernel": jnp.repeat(jnp.arange(1.0, 9.0) / 2, 4), "bias": jnp.array([4.0, 2.0, 1.0])}
CLIPS = {
    "optax": optax.clip_by_global_norm,
    "gradclip_jax": partial(gc.clip_by_global_norm, axis_name=specs),
}


def on_each_device(function):
    """One number from each device."""
    step = sharded(lambda grads: function(grads)[None], line, (specs,), P("data"), check_vma=False)
    return np.asarray(step(grads))


def factor_of(clip):
    def factor(grads):
        return clip.update(grads, clip.init(grads))[0]["bias"][0] / grads["bias"][0]

    return on_each_device(factor)


local = on_each_device(optax.tree.norm)
naive = on_each_device(lambda grads: jnp.sqrt(jax.lax.psum(optax.tree.norm(grads) ** 2, "data")))
true = on_each_device(partial(gc.global_norm, axis_name=specs))
factors = {library: factor_of(clip(1.0)) for library, clip in CLIPS.items()}
print("norm of each shard:         ", local.round(2))
print("psum of all squares:        ", naive.round(2))
print("gradclip_jax, with specs:   ", true.round(2))
for library, factor in factors.items():
    print(f"factors of {library:<17}", factor.round(3))
np.testing.assert_allclose(local, np.sqrt(np.arange(1, 9) ** 2 + 21), rtol=1e-6)
np.testing.assert_allclose(naive, np.sqrt(204 + 8 * 21), rtol=1e-6)
np.testing.assert_allclose(true, 15, rtol=1e-6)
np.testing.assert_allclose(factors["optax"], 1 / local, rtol=1e-6)
np.testing.assert_allclose(factors["gradclip_jax"], 1 / 15, rtol=1e-6)

# %% [markdown]
# optax scales the one bias by eight factors. A `psum` of all squares gives every device the same
# norm and a wrong one, because it counts the bias eight times.
#
# What do eight factors do in training? Below, a linear model in FSDP style: each device holds one
# row of the kernel and a copy of the bias, gathers the kernel, takes the gradient of its part of
# the batch, scatters that of the kernel and averages that of the bias.

# %%
scales = jnp.linspace(0.2, 2.0, 8)  # of the features, so that the shards have different norms
half = jax.random.normal(jax.random.key(0), (16, 8)) * scales
inputs = jnp.concatenate([half, -half])  # their mean is zero: the best bias is the mean target
targets = inputs.sum(1) * 3 + 5
BATCH = {"kernel": jnp.zeros(8), "bias": jnp.zeros(())}, inputs, targets


def grads_of(params, inputs, targets):
    """The gradients that one device holds: its row of the kernel, and its copy of the bias."""

    def loss(kernel, bias):
        return jnp.mean((inputs @ kernel + bias - targets) ** 2) / 2

    kernel = jax.lax.all_gather(params["kernel"], "data", tiled=True)
    of_kernel, of_bias = jax.grad(loss, argnums=(0, 1))(kernel, params["bias"])
    return {
        "kernel": jax.lax.psum_scatter(of_kernel, "data", tiled=True) / 8,
        "bias": jax.lax.pmean(of_bias, "data"),
    }


@partial(jax.jit, static_argnames="library")
def train(library, limit):
    """The bias of each device after each of 150 steps."""

    def run(params, inputs, targets):
        optimizer = optax.chain(CLIPS[library](limit), optax.sgd(0.1))

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(grads_of(params, inputs, targets), state, params)
            return (optax.apply_updates(params, updates), state), params["bias"]

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)[1][:, None]

    return sharded(run, line, (specs, P("data"), P("data")), P(None, "data"), False)(*BATCH)


def draw_training(limit):
    _, grid = plt.subplots(1, 2, figsize=(8.6, 3.2), sharey=True)
    for axes, library in zip(grid, CLIPS, strict=True):
        biases = np.asarray(train(library, limit))
        for device, color in enumerate(plt.get_cmap("viridis")(np.linspace(0.25, 0.95, 8))):
            axes.plot(biases[:, device], color=color, lw=2)
        for device in (0, 7) if np.ptp(biases[-1]) > 0.5 else ():
            axes.text(152, biases[-1, device], f"device {device}", va="center")
        if np.ptp(biases[-1]) == 0:
            axes.text(152, biases[-1, 0], "all devices", va="center")
        axes.set(xlabel="step", xlim=(0, 150), title=f"{library}.clip_by_global_norm({limit:.2g})")
    grid[0].set_ylabel("bias, a line for each device")


_ = interact(draw_training, limit=FloatLogSlider(1, min=-0.5, max=2, step=0.25))

# %%
for library in CLIPS:
    biases = np.asarray(train(library, 1.0))
    print(f"{library:<12} after the last step: {biases[-1].min():.2f} to {biases[-1].max():.2f}")
    if library == "optax":
        assert np.ptp(biases[-1]) > 1
    else:
        assert np.ptp(biases, axis=1).max() == 0
        np.testing.assert_allclose(biases[-1], 5, atol=0.02)

# %% [markdown]
# With one factor the copies stay one bias, and it reaches 5, the mean of the targets. With eight
# factors the copies separate in the first step and stay separate: later, unclipped steps move all
# of them by the same amount. No error is raised.
#
# ## Every way to run it
#
# In checked `shard_map` the type of an array names the mesh axes along which it varies, so a clip
# needs no argument: it sums the squares of a leaf over the devices along those axes. Under `jit`
# the compiler knows the shardings. Where types say nothing (`check_vma=False`, `pmap`), pass
# `axis_name`: the specs, or `()` after a `pmean`.


# %%
def norm_seen(grads, axis_name=None):
    """The norm that a clip measured."""
    clip = gc.clip_by_global_norm(1.0, axis_name=axis_name)
    return gc.metrics(clip.update(grads, clip.init(grads))[1])["grad_norm"]


def placed_on(mesh):
    return jax.device_put(tree, {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})


keys = jax.random.split(jax.random.key(0), len(SHAPES))
tree = {name: jax.random.normal(key, SHAPES[name]) for key, name in zip(keys, SHAPES, strict=True)}
# For pmap each device gets a gradient of its own; their average is the tree.
offsets = jnp.arange(8.0) - 3.5
each = jax.tree.map(lambda leaf: leaf + offsets.reshape(8, *[1] * leaf.ndim), tree)
averaged = jax.pmap(lambda grads: norm_seen(jax.lax.pmean(grads, "i"), ()), axis_name="i")
with_specs = partial(norm_seen, axis_name=SPECS)
checked = sharded(norm_seen, mesh, (SPECS,), P())
explicit = make_mesh(AxisType.Explicit, data=4, model=2)
results = {
    "one device": norm_seen(tree),
    "jit, auto axes": jax.jit(norm_seen)(placed_on(mesh)),
    "jit, explicit axes": jax.jit(norm_seen)(placed_on(explicit)),
    "shard_map": checked(tree),
    "shard_map, unchecked, axis_name=specs": sharded(with_specs, mesh, (SPECS,), P(), False)(tree),
    "pmap, pmean, axis_name=()": averaged(each),
}
exact = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in tree.values()))
print(f"{'NumPy, float64':<38} {exact:.4f}")
for way, norm in results.items():
    print(f"{way:<38}", *sorted({f"{value:.4f}" for value in np.ravel(norm)}))
    np.testing.assert_allclose(norm, exact, rtol=1e-6)

# %% [markdown]
# Where types say nothing and the caller does not either, the clip refuses. And the number of
# collectives does not grow with the number of leaves: one `psum` for each set of mesh axes.

# %%
message = ""
try:
    sharded(norm_seen, mesh, (SPECS,), P(), check_vma=False)(tree)
except ValueError as error:
    message = str(error)
assert message.startswith("`axis_name` must be given")
print("unchecked, without axis_name: refused")

program = checked.lower(tree).as_text()
print("psums:", len(re.findall(r"stablehlo\.all_reduce", program)), "for five leaves")
assert len(re.findall(r"stablehlo\.all_reduce", program)) == 3  # data, model, both
