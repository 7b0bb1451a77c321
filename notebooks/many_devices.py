# %% [markdown]
# # What the norm of a gradient means on a mesh
#
# A gradient has one norm, also when eight devices hold it in pieces, and some pieces several times.
# This notebook shows who holds what, what happens when a device takes the norm of its share for the
# norm of the gradient, and how `gradclip_jax` finds the true one. It runs on eight CPU devices in
# half a minute. What is claimed as a number is asserted in the cell that shows it.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported

import re
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from matplotlib.colors import ListedColormap

import gradclip_jax

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
plt.rcParams |= {"figure.dpi": 96, "font.size": 12, "legend.frameon": False}
plt.rcParams |= {"axes.spines.right": False, "axes.spines.top": False}
plt.rcParams |= {"figure.constrained_layout.use": True, "figure.constrained_layout.wspace": 0.06}


def make_mesh(kind=AxisType.Auto, **axes):
    """A mesh of the first devices, with axes of these sizes, all of one kind."""
    sizes = tuple(axes.values())
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, tuple(axes), axis_types=(kind,) * len(axes), devices=devices)


def sharded(function, mesh, in_specs, out_specs, check_vma=True):
    """The function under `shard_map`, compiled."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )
    return jax.jit(mapped)


def refusal(function, *args):
    """The message of the ValueError that the call raises."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


assert jax.device_count() == 8

# %% [markdown]
# ## 1. Who holds what
#
# Eight devices form a mesh: four along `data` times two along `model`. Five leaves are sharded in
# the five ways that occur in practice: a replicated bias, a kernel whose rows are split along
# `data` (FSDP), one whose columns are split along `model` (tensor parallelism), one split both
# ways, and a vector split along the pair of axes. Each box below is a device. Coloured is the slice
# of each leaf that it holds, read from the shardings.

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
COLOURS = dict(zip(SPECS, (BLUE, ORANGE, GREEN, RED, PURPLE), strict=True))


def held(name, device):
    """Ones where a device holds an element of the leaf, zeros elsewhere."""
    slices = NamedSharding(mesh, SPECS[name]).devices_indices_map(SHAPES[name])[device]
    elements = np.zeros(SHAPES[name])
    elements[slices] = 1
    return elements


copies = {
    name: int(sum(held(name, device).sum() for device in mesh.devices.flat) / np.prod(shape))
    for name, shape in SHAPES.items()
}
print("copies of each element:", copies)
assert copies == {"bias": 8, "rows": 2, "columns": 4, "both": 1, "pair": 1}

figure, grid = plt.subplots(4, 2, figsize=(10, 7.6))
for (data, model), device in np.ndenumerate(mesh.devices):
    axes, left = grid[data, model], 0
    for name, colour in COLOURS.items():
        elements = held(name, device).reshape(SHAPES[name][0], -1)  # a vector as a column
        height, width = elements.shape
        slot = max(width, 5) + 1
        x, y = left + (slot - width) / 2 + np.arange(width + 1), np.arange(height + 1)
        palette = ListedColormap(["#D9D9D9", colour])
        axes.pcolormesh(x, y, elements, cmap=palette, vmin=0, vmax=1, edgecolors="white")
        axes.text(left + slot / 2, -0.6, name, ha="center")
        left += slot
    axes.set(xlim=(-0.5, left + 0.5), ylim=(8.7, -2.4), aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"device {device.id}: data {data}, model {model}", fontsize=12)
    axes.spines[:].set_visible(True)
plt.show()

# %% [markdown]
# A sum over what all devices hold counts the bias eight times. A sum over what one device holds
# misses most of the other leaves. The true norm counts each element once.

# %% [markdown]
# ## 2. The norm of one share
#
# A gradient to be checked by hand, on eight devices along one axis: a kernel whose shares have the
# norms 1, 2, … 8, so that its squares add up to 204, and a replicated bias (4, 2, 1), whose squares
# add up to 21. The true norm is √225 = 15.
#
# Inside `shard_map`, `optax.clip_by_global_norm` takes the norm of the share that it sees. As long
# as jax checks types, it refuses the result, because the bias came in replicated and would go out
# different on each device. With `check_vma=False` there is no error.

# %%
line = make_mesh(data=8)
specs = {"kernel": P("data"), "bias": P()}
grads = {"kernel": jnp.repeat(jnp.arange(1.0, 9.0) / 2, 4), "bias": jnp.array([4.0, 2.0, 1.0])}
optax_clip = optax.clip_by_global_norm(1.0)
our_clip = gradclip_jax.clip_by_global_norm(1.0, axis_name=specs)


def clipped(clip, grads):
    return clip.update(grads, clip.init(grads))[0]


def on_each_device(function):
    """One number from each device, by `shard_map` with the checks off."""
    step = sharded(lambda grads: function(grads)[None], line, (specs,), P("data"), check_vma=False)
    return np.asarray(step(grads))


def naive_norm(grads):
    return jnp.sqrt(jax.lax.psum(optax.tree.norm(grads) ** 2, "data"))


def factor(clip):
    return on_each_device(lambda grads: clipped(clip, grads)["bias"][0] / grads["bias"][0])


def clip_of_share(grads):
    return clipped(optax_clip, grads)


message = refusal(sharded(clip_of_share, line, (specs,), specs), grads)
assert "require replication" in message
print("With the checks on jax says:", textwrap.shorten(message, 140, placeholder=" …"))

local = on_each_device(optax.tree.norm)
naive = on_each_device(naive_norm)
true = on_each_device(partial(gradclip_jax.global_norm, axis_name=specs))
optax_factor, our_factor = factor(optax_clip), factor(our_clip)
print("norm of each share:     ", local.round(2))
print("psum of all squares:    ", naive.round(2))
print("ours, told the specs:   ", true.round(2))
print("factors of optax:       ", optax_factor.round(3))
print("factors of ours:        ", our_factor.round(3))
np.testing.assert_allclose(local, np.sqrt(np.arange(1, 9) ** 2 + 21), rtol=1e-6)
np.testing.assert_allclose(naive, np.sqrt(204 + 8 * 21), rtol=1e-6)
np.testing.assert_allclose(true, 15, rtol=1e-6)
np.testing.assert_allclose(optax_factor, 1 / local, rtol=1e-6)
np.testing.assert_allclose(our_factor, 1 / 15, rtol=1e-6)

# %%
figure, (norms, factors) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(5, 4))
number = np.arange(8)
norms.bar(number, local, color=ORANGE, label="norm of the share")
bar = norms.bar([8.5], naive[:1], color=PURPLE, label="psum of all squares")
norms.bar_label(bar, fmt="%.1f")
norms.axhline(15, color=BLUE, lw=2, label="true norm")
norms.text(-0.4, 15.4, "15", color=BLUE)
norms.set(ylim=(0, 28), ylabel="norm", xlabel="device")
norms.set_xticks([*number, 8.5], [*map(str, number), "all"])
norms.legend(loc="upper left")
factors.bar(number - 0.2, optax_factor, 0.4, color=ORANGE, label="optax")
factors.bar(number + 0.2, our_factor, 0.4, color=BLUE, label="ours")
factors.set(ylabel="factor for a limit of 1", xlabel="device", xticks=number)
factors.legend()
plt.show()

# %% [markdown]
# Eight factors for one bias. The naive remedy, a `psum` of all squares, gives all devices the same
# norm and a wrong one: 19.3, because the bias is counted eight times. Ours is 15 everywhere.
#
# What eight factors do in training: a linear model in FSDP style. Each device keeps one row of the
# kernel and a copy of the bias. It gathers the kernel, takes the gradient of its part of the batch,
# scatters that of the kernel and averages that of the bias. Only the clip differs.

# %%
scales = jnp.linspace(0.2, 2.0, 8)  # of the features, so that the shares have different norms
half = jax.random.normal(jax.random.key(0), (16, 8)) * scales
inputs = jnp.concatenate([half, -half])  # their mean is zero: the best bias is the mean target
targets = inputs.sum(1) * 3 + 5
batch_specs = (specs, P("data"), P("data"))
batch = {"kernel": jnp.zeros(8), "bias": jnp.zeros(())}, inputs, targets


def train_step(params, state, inputs, targets, optimizer):
    """One step of one device: `kernel` is its share, `bias` its copy."""

    def loss(kernel, bias):
        return jnp.mean((inputs @ kernel + bias - targets) ** 2) / 2

    kernel = jax.lax.all_gather(params["kernel"], "data", tiled=True)
    of_kernel, of_bias = jax.grad(loss, argnums=(0, 1))(kernel, params["bias"])
    grads = {
        "kernel": jax.lax.psum_scatter(of_kernel, "data", tiled=True) / 8,
        "bias": jax.lax.pmean(of_bias, "data"),
    }
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(clip, steps=150):
    """The bias of each device after each step."""
    optimizer = optax.chain(clip, optax.sgd(0.1))

    def run(params, inputs, targets):
        def step(carry, _):
            params, state = train_step(carry[0], carry[1], inputs, targets, optimizer)
            return (params, state), params["bias"]

        _, biases = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return biases[:, None]

    return np.asarray(sharded(run, line, batch_specs, P(None, "data"), check_vma=False)(*batch))


biases = {"optax": train(optax_clip), "gradclip_jax": train(our_clip)}
figure, grid = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for axes, (library, of_devices) in zip(grid, biases.items(), strict=True):
    for device, colour in enumerate(plt.get_cmap("viridis")(np.linspace(0, 0.95, 8))):
        axes.plot(of_devices[:, device], color=colour, lw=2, label=str(device))
    axes.set_title(f"{library}.clip_by_global_norm(1.0)", fontsize=12)
    axes.set_xlabel("step")
grid[0].set_ylabel("bias, one line for each device")
grid[1].legend(title="device", loc="lower right", ncols=2)
plt.show()

for library, of_devices in biases.items():
    last = of_devices[-1]
    print(f"{library:<12} after the last step: {last.min():.2f} to {last.max():.2f}")
assert np.ptp(biases["optax"][-1]) > 1
assert np.ptp(biases["gradclip_jax"], axis=1).max() == 0
np.testing.assert_allclose(biases["gradclip_jax"][-1], 5, atol=0.02)

# %% [markdown]
# With one factor the copies stay one bias, and it arrives at 5, the mean of the targets. With eight
# factors they part in the first step. They never meet again: when no device clips any more, all
# copies get the same averaged update, and what lies between them stays. Nothing raises an error.

# %% [markdown]
# ## 3. How the types tell
#
# In checked `shard_map` the type of an array says along which mesh axes the devices hold different
# values: `V:data` means that it varies along `data`. So a clip needs no argument. It adds up the
# squares of a leaf over the devices along those axes only, and counts a bias once that varies along
# none.

# %%
tree = {
    name: jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}


def show_types(grads):
    for name, leaf in grads.items():  # runs once, when the function is traced
        print(f"{name:<8} {jax.typeof(leaf)}")
    return gradclip_jax.global_norm(grads)


norm = sharded(show_types, mesh, (SPECS,), P())(tree)

# %% [markdown]
# Leaves that vary along the same axes share one collective. Five leaves or fifty: one `psum` along
# `data`, one along `model`, one along both. Each carries three numbers: the sums of squares that
# are too large for float32, fit for it, or too small.


# %%
AXES_OF_GROUP = {4: "data", 2: "model", 8: "data and model"}


def psums(function, *args):
    """The mesh axes of each `psum` in the program, by how many devices it adds up."""
    program = jax.jit(function).lower(*args).as_text()
    sizes = re.findall(r"stablehlo.all_reduce.*?tensor<\d+x(\d+)xi64>", program, flags=re.DOTALL)
    return sorted(AXES_OF_GROUP[int(size)] for size in sizes)


for count in (1, 10):
    many = {f"{name}{i}": leaf for name, leaf in tree.items() for i in range(count)}
    many_specs = {f"{name}{i}": SPECS[name] for name in tree for i in range(count)}
    along = psums(sharded(gradclip_jax.global_norm, mesh, (many_specs,), P()), many)
    print(f"{len(many):>2} leaves, {len(along)} psums: along", ", along ".join(along))
    assert along == ["data", "data and model", "model"]

# %% [markdown]
# ## 4. Every way of running
#
# The same five leaves in every way that jax runs them. Under `jit` the compiler knows the shardings
# and there is nothing to say; optax is right there too. In unchecked `shard_map` and in `pmap` the
# types say nothing, so the caller does: the specs, or `axis_name=()` when every leaf is replicated,
# as it is after a `pmean`.


# %%
def norm_seen(grads, axis_name=None):
    """The norm that a clip measured."""
    clip = gradclip_jax.clip_by_global_norm(1.0, axis_name=axis_name)
    _, state = clip.update(grads, clip.init(grads))
    return gradclip_jax.metrics(state)["grad_norm"]


def placed_on(mesh):
    return jax.device_put(tree, {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})


def averaged_norm(grads):
    return norm_seen(jax.lax.pmean(grads, "i"), axis_name=())


# For pmap each device gets a gradient of its own; their average is the tree.
offsets = jnp.arange(8.0) - 3.5
each = jax.tree.map(lambda leaf: leaf + offsets.reshape(8, *[1] * leaf.ndim), tree)

placed = placed_on(mesh)
explicit = placed_on(make_mesh(AxisType.Explicit, data=4, model=2))
told = partial(norm_seen, axis_name=SPECS)
results = {
    "one device": norm_seen(tree),
    "jit, auto axes": jax.jit(norm_seen)(placed),
    "jit, auto axes, optax.tree.norm": jax.jit(optax.tree.norm)(placed),
    "jit, explicit axes": jax.jit(norm_seen)(explicit),
    "shard_map, checked": sharded(norm_seen, mesh, (SPECS,), P())(tree),
    "shard_map, unchecked, axis_name=specs": sharded(told, mesh, (SPECS,), P(), False)(tree),
    "pmap, pmean, axis_name=()": jax.pmap(averaged_norm, axis_name="i")(each),
}
exact = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in tree.values()))
print(f"{'NumPy, float64':<38} {exact:.4f}")
for way, norm in results.items():
    print(f"{way:<38}", *sorted({f"{value:.4f}" for value in np.ravel(norm)}))
    np.testing.assert_allclose(norm, exact, rtol=1e-6)

# %% [markdown]
# Where the types say nothing and the caller does not either, the clip does not guess.

# %%
message = refusal(sharded(norm_seen, mesh, (SPECS,), P(), check_vma=False), tree)
print(textwrap.fill(message, 96))
assert message.startswith("`axis_name` must be given")

# %% [markdown]
# ## 5. First average, then clip
#
# Eight devices, each with the gradient of its own examples; one of them met an outlier. The
# gradient of the batch is the average, so the clip comes after it. `pmean(clip(g))` is not a clip
# of that gradient: it points elsewhere, and where depends on the number of devices over which the
# same examples are spread.

# %%
gradients = jnp.array(
    [[1, 0.2], [1.2, 0], [0.9, -0.1], [1.1, 0.3], [1, -0.2], [0.8, 0.1], [1, -0.3], [-3, 8]]
)
clip_here = partial(clipped, gradclip_jax.clip_by_global_norm(1.0, axis_name=()))


def average_then_clip(examples):
    return clip_here(jax.lax.pmean(examples.mean(0), "data"))


def clip_then_average(examples):
    return jax.lax.pmean(clip_here(examples.mean(0)), "data")


def on_devices(function, count):
    step = sharded(function, make_mesh(data=count), P("data"), P(), check_vma=False)
    return np.asarray(step(gradients))


def angle(vector):
    return np.degrees(np.arctan2(vector[1], vector[0]))


late = {count: on_devices(average_then_clip, count) for count in (8, 4, 2)}
early = {count: on_devices(clip_then_average, count) for count in (8, 4, 2)}
mean = np.asarray(gradients).mean(0)
for count in (8, 4, 2):
    angles = (
        f"clip(pmean(g)) at {angle(late[count]):.1f}°, pmean(clip(g)) at {angle(early[count]):.1f}°"
    )
    print(f"{count} devices: {angles}")
    np.testing.assert_allclose(late[count], mean / np.linalg.norm(mean), rtol=1e-5)
between = angle(late[8]) - angle(early[8])
assert between > 50


# %%
def arrow(axes, tip, **style):
    axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "mutation_scale": 14, **style})


figure, (before, after) = plt.subplots(1, 2, figsize=(11, 5.2), width_ratios=(3, 5))
turn = np.linspace(0, 2 * np.pi, 200)
for axes in (before, after):
    axes.plot(np.cos(turn), np.sin(turn), color="black", lw=1, ls=":")
    axes.set_aspect("equal")
for vector in np.asarray(gradients):
    arrow(before, vector, color="grey", lw=1.2)
arrow(before, mean, color=BLUE, lw=2.5)
before.text(0.6, 1.1, "average", color=BLUE)
before.text(-2.6, 8, "outlier", color="dimgrey")
before.text(1.4, -0.2, "the others", color="dimgrey")
before.set(xlim=(-3.5, 4.3), ylim=(-1.2, 8.6), title="gradients of eight devices")
arrow(after, late[8], color=BLUE, lw=2.5)
after.text(0.5, 0.95, "clip(pmean(g)) on 8, 4 or 2 devices", color=BLUE)
for count, width in ((8, 2.5), (4, 1.8), (2, 1.2)):
    arrow(after, early[count], color=RED, lw=width)
    place, label = early[count] + [0.03, -0.02], f"pmean(clip(g)) on {count} devices"
    after.text(*place, label, color=RED, bbox={"color": "white", "pad": 1})
turn = np.radians(np.linspace(angle(early[8]), angle(late[8]), 50))
after.plot(0.25 * np.cos(turn), 0.25 * np.sin(turn), color="black", lw=1)
after.text(0.24, 0.15, f"{between:.0f}°")
after.set(xlim=(0, 1.5), ylim=(0, 1.1), title="after a clip to 1 (dotted)")
plt.show()

# %% [markdown]
# To limit what each device contributes may be what you want, but it is another algorithm. Where the
# types show that a gradient was not averaged, the clip refuses it: in checked `shard_map`, when it
# is given the params.

# %%
typed_clip = gradclip_jax.clip_by_global_norm(1.0)


def forgotten_average(params, examples):
    grads = {"kernel": examples.mean(0)}  # of the examples of this device
    return typed_clip.update(grads, typed_clip.init(params), params)[0]


step = sharded(forgotten_average, line, (P(), P("data")), P("data"))
message = refusal(step, {"kernel": jnp.zeros(2)}, gradients)
print(textwrap.fill(message, 96))
assert "`jax.lax.pmean(grads, 'data')`" in message

# %% [markdown]
# ## 6. Two hard cases
#
# **A tied embedding over two pipeline stages.** The first stage looks words up in it and the last
# one computes logits with it, so each holds a copy and a part of its gradient. The sum of the
# parts, (3, 4) with norm 5, is then on both stages. Counted on both, its norm is 5·√2. But after
# the `psum` its type no longer varies along `stage`, so it is counted once.

# %%
stages = make_mesh(stage=2)
parts = {"blocks": jnp.array([[10.0], [10.0]]), "embedding": jnp.array([[3.0, 0.0], [0.0, 4.0]])}


def stage_norms(parts, axis_name=None):
    """The norm of the tied embedding, and that of all leaves: 5 and √(5² + 10² + 10²) = 15."""
    grads = {**parts, "embedding": jax.lax.psum(parts["embedding"], "stage")}
    measure = partial(gradclip_jax.global_norm, axis_name=axis_name)
    return jnp.stack([measure(grads["embedding"]), measure(grads)])


once = sharded(stage_norms, stages, P("stage"), P())(parts)
# Unchecked, and told what is not so: that every leaf is split along `stage`.
wrongly_told = partial(stage_norms, axis_name="stage")
twice = sharded(wrongly_told, stages, P("stage"), P(), check_vma=False)(parts)
for name, (embedding, everything) in (("once", once), ("twice", twice)):
    print(f"counted {name:<5}: norm of the embedding {embedding:.2f}, of all {everything:.2f}")
np.testing.assert_allclose(once, [5, 15], rtol=1e-6)
np.testing.assert_allclose(twice, [5 * np.sqrt(2), np.sqrt(250)], rtol=1e-6)

# %% [markdown]
# **Experts along one axis, dense leaves along another.** The dense leaves are split over four
# devices along `data`. Two groups of devices along `expert` hold the same dense leaves, and each
# has experts of its own. Dense leaves have norm 2, the experts of the groups 3 and 6; the true norm
# is √(4 + 9 + 36) = 7. A sum along `data` alone gives each group another norm, and so the same
# dense leaves two different factors.

# %%
experts_mesh = make_mesh(data=4, expert=2)
mixture = {"dense": jnp.ones(4), "experts": jnp.array([3.0, 6.0])}
mixture_specs = {"dense": P("data"), "experts": P("expert")}


def norm_on_each(axis_name):
    """An array of groups times devices along `data`."""
    step = sharded(
        lambda grads: gradclip_jax.global_norm(grads, axis_name=axis_name)[None, None],
        experts_mesh,
        (mixture_specs,),
        P("expert", "data"),
        check_vma=False,
    )
    return np.asarray(step(mixture))


of_group = norm_on_each({"dense": P("data"), "experts": P()})
of_all = norm_on_each(mixture_specs)
np.testing.assert_allclose(of_group, [[np.sqrt(13)] * 4, [np.sqrt(40)] * 4], rtol=1e-6)
np.testing.assert_allclose(of_all, np.full((2, 4), 7), rtol=1e-6)

figure, axes = plt.subplots(figsize=(7.5, 3.6))
for group, colour in enumerate((ORANGE, PURPLE)):
    bars = axes.bar(np.arange(4) + 5 * group, of_group[group], color=colour)
    axes.bar_label(bars, fmt="%.2f", label_type="center")
axes.axhline(7, color=BLUE, lw=2, label="true norm: ours, on every device")
places = [f"{data}, {expert}" for expert in range(2) for data in range(4)]
axes.set_xticks([*range(4), *range(5, 9)], places)
axes.set(ylim=(0, 9), ylabel="norm within a group", xlabel="device: place along data, expert")
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## 7. What it costs
#
# The collectives in compiled programs: of the training step above, without and with the clip, and
# of a clip of the five leaves under `jit`. Those in branches run only when a sum of squares left
# the range of float32 and is taken again.

# %%
KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def compiled(function, *args):
    return str(jax.jit(function).lower(*args).compile().as_text())


def collectives(program):
    """The number of collectives of each kind that always run, and of all in branches."""
    branches, main = program.split("\nENTRY")
    counts = [
        [len(re.findall(rf" {kind}(?:-start)?\(", part)) for kind in KINDS]
        for part in (main, branches)
    ]
    return *counts[0], sum(counts[1])


def step_with(clip):
    optimizer = optax.chain(clip, optax.sgd(0.1))

    def step(params, inputs, targets):
        return train_step(params, optimizer.init(params), inputs, targets, optimizer)[0]

    return sharded(step, line, batch_specs, specs, check_vma=False)


programs = {
    "shard_map, step without a clip": compiled(step_with(optax.identity()), *batch),
    "shard_map, step with ours": compiled(step_with(our_clip), *batch),
    "jit, clip of optax": compiled(partial(clipped, optax_clip), placed),
    "jit, clip of ours": compiled(partial(clipped, typed_clip), placed),
}
found = {name: collectives(program) for name, program in programs.items()}
columns = (*KINDS, "in branches")
print(" " * 30, *columns, sep="  ")
for name, counts in found.items():
    cells = [f"{count:>{len(column)}}" for column, count in zip(columns, counts, strict=True)]
    print(f"{name:<30}", *cells, sep="  ")
carried = re.findall(r"= (.*) all-reduce\(", programs["shard_map, step with ours"])
print("carried by the all-reduce of the step with ours:", re.sub(r"\{\d*\}", "", *carried))
gather, scatter, reduce, _ = found["shard_map, step without a clip"]
assert found["shard_map, step with ours"] in [
    (gather, scatter, reduce + more, 0) for more in (0, 1)
]
assert found["jit, clip of ours"][:3] == found["jit, clip of optax"][:3]

# %% [markdown]
# In the training step the clip needs three more numbers, and XLA sends them along with the gradient
# of the bias: the number of collectives is the same. Under `jit` as many always run as with optax.
#
# ## In short
#
# | how it runs | what to say |
# |---|---|
# | `jit` with shardings, auto or explicit | nothing |
# | `shard_map` | nothing; average first, and pass the params to get an error if you did not |
# | `shard_map` with `check_vma=False` | `axis_name=specs`, the tree that is also in `in_specs` |
# | `pmap`, gradients averaged | `axis_name=()` |
# | `pmap`, every leaf split along `i` | `axis_name="i"` |
