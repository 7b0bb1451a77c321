"""Training steps and updates that are measured on accelerators, as functions of abstract arguments.

    program("Transformer step", "mixed", CLIPS["gradclip_jax"])

`accelerators.py` compiles them ahead of time and `on_device.py` runs them. Three are whole steps:
gradients, clip and optimizer in one program, as in training. In the others the gradients are
arguments. Nothing is allocated here. They need jax and optax only, no model library.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import gradclip_jax

DTYPES = ("float32", "bfloat16", "mixed")
"""Mixed: parameters and optimizer state in float32, forward and backward pass in bfloat16. Where
gradients are arguments, they are bfloat16 then; in whole steps they are converted to float32."""
CLIPS: dict[str, optax.GradientTransformation | None] = {
    "none": None,
    "optax": optax.clip_by_global_norm(1.0),
    "gradclip_jax": gradclip_jax.clip_by_global_norm(1.0),
}
# So small that thousands of steps on the same batch keep all numbers finite.
ADAMW, SGD = optax.adamw(1e-5), optax.sgd(1e-5)
VOCABULARY, WIDTH = 8192, 512
Tree = Any
"""Nested mappings; the leaves are shapes first and `jax.ShapeDtypeStruct`s then."""


class Program(NamedTuple):
    """`jax.jit(step, donate_argnums=donate)` takes parameters, state and inputs.

    A step returns new parameters and state, which are donated. Integer inputs are tokens: rows of
    the leaf `embedding`.
    """

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Abstract ones, `jax.ShapeDtypeStruct`s."""
    donate: tuple[int, ...]
    init: Callable[[Any], Any]
    """The state of parameters."""


def by_select(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer sees zeros in a step that is skipped, and its old state is selected."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        go = jnp.isfinite(gradclip_jax.global_norm(updates))
        zeroed = jax.tree.map(lambda g: jnp.where(go, g, 0), updates)
        out, new = inner.update(zeroed, state, params)
        out = jax.tree.map(lambda u: jnp.where(go, u, 0), out)
        return out, jax.tree.map(lambda a, b: jnp.where(go, a, b), new, state)

    return optax.GradientTransformation(inner.init, update)


def program(name: str, dtype: str, clip: optax.GradientTransformation | None) -> Program:
    """A program by its name in `PROGRAMS`, with a clip before the optimizer or without one."""
    return PROGRAMS[name](dtype, clip)


def step_of(
    gradients: Callable[..., Any],
    params: Tree,
    inputs: tuple[Any, ...],
    clip: optax.GradientTransformation | None,
    optimizer: optax.GradientTransformation,
) -> Program:
    """Gradients, clip and optimizer in one step, which donates parameters and state."""
    if clip is not None:
        optimizer = optax.chain(clip, optimizer)

    def step(params: Any, state: Any, *inputs: Any) -> Any:
        updates, state = optimizer.update(gradients(params, *inputs), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    return Program(step, (params, state, *inputs), (0, 1), optimizer.init)


def update(
    tree: Tree,
    dtype: str,
    clip: optax.GradientTransformation | None,
    optimizer: optax.GradientTransformation = ADAMW,
) -> Program:
    """Clip and optimizer alone: the gradients of a tree of shapes are the last argument."""
    params, half = abstract(tree, dtype), abstract(tree, "bfloat16")
    grads = half if dtype == "mixed" else params
    return step_of(lambda params, grads: grads, params, (grads,), clip, optimizer)


def abstract(tree: Tree, dtype: str) -> Tree:
    """Parameters of these shapes."""
    kind = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, kind), tree, is_leaf=lambda x: type(x) is tuple
    )


def computed_in(dtype: str) -> Any:
    """The dtype of forward and backward pass."""
    return jnp.float32 if dtype == "float32" else jnp.bfloat16


# --- whole steps ---


def matmul_step(
    dtype: str,
    clip: optax.GradientTransformation | None,
    rows: int = 1024,
    inputs: int = 2048,
    outputs: int = 8192,
) -> Program:
    """The gradient of one weight matrix, xᵀ dy, and SGD."""

    def gradients(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        return {"up": (x.T @ dy).astype(params["up"].dtype)}

    x = jax.ShapeDtypeStruct((rows, inputs), computed_in(dtype))
    dy = jax.ShapeDtypeStruct((rows, outputs), computed_in(dtype))
    return step_of(gradients, abstract({"up": (inputs, outputs)}, dtype), (x, dy), clip, SGD)


def language_model(
    tree: Tree,
    network: Callable[..., jax.Array],
    batch: int,
    length: int,
    dtype: str,
    clip: optax.GradientTransformation | None,
) -> Program:
    """A step of AdamW on the cross-entropy of the next token."""

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda w: w.astype(computed_in(dtype)), params)
        logits = network(params, tokens[:, :-1]).astype(jnp.float32)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(nats)

    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    return step_of(jax.grad(loss), abstract(tree, dtype), (tokens,), clip, ADAMW)


def transformer(params: Any, tokens: jax.Array, heads: int = 8) -> jax.Array:
    """Logits of a decoder; the causal mask alone tells it the positions."""
    x = params["embedding"][tokens]
    batch, length, width = x.shape
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
    for w in (params[name] for name in params if name.startswith("layer")):
        y = normalised(x, w["scale_1"], w["bias_1"]) @ w["qkv"] + w["qkv_bias"]
        q, k, v = jnp.split(y.reshape(batch, length, 3 * heads, -1), 3, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * (width / heads) ** -0.5
        scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores).astype(x.dtype)
        y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width)
        x = x + y @ w["out"] + w["out_bias"]
        y = normalised(x, w["scale_2"], w["bias_2"]) @ w["up"] + w["up_bias"]
        x = x + jax.nn.gelu(y) @ w["down"] + w["down_bias"]
    return normalised(x, params["scale"], params["bias"]) @ params["output"]


def normalised(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Layer normalization."""
    return jax.nn.standardize(x, epsilon=1e-5) * scale + bias


def lstm(params: Any, tokens: jax.Array) -> jax.Array:
    """Logits of one LSTM layer, one time step after the other."""
    gates_of_inputs = params["embedding"][tokens] @ params["input"] + params["gates_bias"]
    start = jnp.zeros((len(tokens), params["recurrent"].shape[0]), gates_of_inputs.dtype)

    def step(carry: Any, gates: jax.Array) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(gates + h @ params["recurrent"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    _, h = jax.lax.scan(step, (start, start), gates_of_inputs.swapaxes(0, 1))
    return h.swapaxes(0, 1) @ params["output"] + params["output_bias"]


# --- trees of shapes ---


def decoder(layers: int, width: int, vocabulary: int, **others: tuple[int, ...]) -> Tree:
    """A Transformer with biases, each layer with 12 leaves of its own."""
    layer = {
        "scale_1": (width,), "bias_1": (width,),
        "qkv": (width, 3 * width), "qkv_bias": (3 * width,),
        "out": (width, width), "out_bias": (width,),
        "scale_2": (width,), "bias_2": (width,),
        "up": (width, 4 * width), "up_bias": (4 * width,),
        "down": (4 * width, width), "down_bias": (width,),
    }  # fmt: skip
    ends = {"embedding": (vocabulary, width), "scale": (width,), "bias": (width,), **others}
    return {**ends, **{f"layer_{i}": layer for i in range(layers)}}


def lstm_layer(width: int, vocabulary: int) -> Tree:
    """One LSTM layer between embedding and output."""
    return {
        "embedding": (vocabulary, width), "input": (width, 4 * width),
        "recurrent": (width, 4 * width), "gates_bias": (4 * width,),
        "output": (width, vocabulary), "output_bias": (vocabulary,),
    }  # fmt: skip


def gpt2(layers: int = 12) -> Tree:
    """GPT-2 (12 layers: 148 leaves, 124 M), its vocabulary padded to a multiple of 128."""
    return decoder(layers, 768, 50_304, positions=(1024, 768))


def experts(
    layers: int = 2, width: int = WIDTH, count: int = 8, vocabulary: int = VOCABULARY
) -> Tree:
    """A Transformer with a mixture of experts (2 layers: 22 leaves, 27 M)."""
    layer = {
        "scale_1": (width,), "bias_1": (width,), "qkv": (width, 3 * width), "out": (width, width),
        "scale_2": (width,), "bias_2": (width,), "router": (width, count),
        "up": (count, width, 2 * width), "down": (count, 2 * width, width),
    }  # fmt: skip
    ends = {"embedding": (vocabulary, width), "output": (width, vocabulary)}
    ends |= {"scale": (width,), "bias": (width,)}
    return {**ends, **{f"layer_{i}": layer for i in range(layers)}}


def llama(layers: int = 32, width: int = 4096, hidden: int = 11_008, keys: int = 4096) -> Tree:
    """LLaMA 2 with scanned layers: 12 leaves, of which 9 stack all layers.

    The defaults are the 7 B model; 80, 8192, 28672, 1024 the one of 70 B, with grouped queries.
    """
    shapes = {
        "scale_1": (width,), "query": (width, width), "key": (width, keys), "value": (width, keys),
        "out": (width, width), "scale_2": (width,), "gate": (width, hidden), "up": (width, hidden),
        "down": (hidden, width),
    }  # fmt: skip
    ends = {"embedding": (32_000, width), "output": (width, 32_000), "scale": (width,)}
    return {**ends, "layers": {name: (layers, *shape) for name, shape in shapes.items()}}


def specs(tree: Any) -> Any:
    """How FSDP × tensor parallel splits parameters, states or all arguments of a program.

    Matrices are split along both axes of a mesh ("data", "model"), the ones that end in the width
    the other way round; scales, biases, routers and statistics not at all; inputs by their rows.
    """

    def spec(path: Any, leaf: Any) -> P:
        name = getattr(path[-1], "key", None) if path else None
        if name is None:  # an input, or a number in the state
            return P("data") if len(leaf.shape) > 1 else P()
        if len(leaf.shape) < 2 or any(word in name for word in ("scale", "bias", "router")):
            return P()
        axes = ("data", "model")
        if name in ("embedding", "out", "down"):
            axes = axes[::-1]
        # An axis of size 1 was reduced: a norm of each row, say.
        axes = (*[None] * (len(leaf.shape) - 2), *axes)
        return P(
            *(None if size == 1 else axis for axis, size in zip(axes, leaf.shape, strict=True))
        )

    return jax.tree_util.tree_map_with_path(spec, tree)


TREES: dict[str, Callable[[], Tree]] = {
    "GPT-2": gpt2,
    "a mixture of experts": experts,
    "500 of 64 x 64": lambda: {f"w_{i}": (64, 64) for i in range(500)},
    "one leaf of 4096 x 4096": lambda: {"w": (4096, 4096)},
    "LLaMA 7B": llama,
    "LLaMA 70B": lambda: llama(80, 8192, 28_672, 1024),
}
TRANSFORMER = decoder(2, WIDTH, VOCABULARY, output=(WIDTH, VOCABULARY))
LSTM = lstm_layer(WIDTH, VOCABULARY)
PROGRAMS: dict[str, Callable[..., Program]] = {
    "matmul step": matmul_step,
    "Transformer step": functools.partial(language_model, TRANSFORMER, transformer, 8, 256),
    "LSTM step": functools.partial(language_model, LSTM, lstm, 32, 32),
    **{
        f"update of {name}": lambda *args, tree=tree, **kwargs: update(tree(), *args, **kwargs)
        for name, tree in TREES.items()
    },
}
