"""A decoder-only Transformer in Flax NNX whose weights may be split over a mesh of devices."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from gradclip_jax import Heads

Logits = dict[str, list[jax.Array]]
"""The largest attention logit of each head, where the parameters have the weights of its block."""


class Sizes(NamedTuple):
    """What decides the shape of every weight."""

    vocabulary: int
    context: int
    layers: int
    units: int
    heads: int


class Layout:
    """How the model reads a weight and sums over a split dimension; here nothing is split.

    Under `jit` with automatic shardings XLA does both by itself, so that this serves there too.
    `parallel` has the layouts for explicit axes and for `shard_map`.
    """

    def whole(self, weight: nnx.Param) -> jax.Array:
        """The weight, gathered along the axis along which only its storage is split."""
        return weight[...]

    def summed(self, equation: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
        """A product that sums over a dimension of both which tensor parallelism splits."""
        return product(equation, x, weight, dtype)

    def looked_up(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of a table, one for each token."""
        return table[tokens]


class Block(nnx.Module):
    """Causal self-attention and a network of two layers, each behind a norm and on a residual.

    Vaswani et al. 2017, "Attention is all you need", https://arxiv.org/abs/1706.03762, with the
    norm in front (GPT-2). Of each pair of products the first is split by its outputs and the
    second by its inputs, so that one sum over devices serves both: Shoeybi et al. 2019,
    "Megatron-LM", https://arxiv.org/abs/1909.08053, section 3.
    """

    def __init__(self, sizes: Sizes, dtype: jax.typing.DTypeLike, layout: Layout, rngs: nnx.Rngs):
        self.dtype, self.layout = dtype, layout
        units, heads, hidden = sizes.units, sizes.heads, 4 * sizes.units
        # Each block adds two outputs to the residual: GPT-2 scales them by 1 / √(2 layers).
        last = 0.02 / math.sqrt(2 * sizes.layers)
        weight = functools.partial(parameter, rngs)
        self.attention_scale = constant(1.0, (units,), ("norm",))
        self.qkv = weight((units, 3, heads, units // heads), ("embed", None, "heads", None))
        self.attention_out = weight(
            (heads, units // heads, units), ("heads", None, "embed"), scale=last
        )
        self.hidden_scale = constant(1.0, (units,), ("norm",))
        self.up = weight((units, hidden), ("embed", "hidden"))
        self.up_bias = constant(0.0, (hidden,), ("hidden",))
        self.down = weight((hidden, units), ("hidden", "embed"), scale=last)
        self.down_bias = constant(0.0, (units,), ("norm",))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float32 [batch, time, units] to the same, and the largest attention logits, [heads]."""
        whole = self.layout.whole
        normed = rms_normed(x, whole(self.attention_scale))
        qkv = product("bte,echd->btchd", normed, whole(self.qkv), self.dtype)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = product("bqhd,bkhd->bhqk", q / math.sqrt(q.shape[-1]), k, self.dtype)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        weights = jax.nn.softmax(scores)
        seen = product("bhqk,bkhd->bqhd", weights, v, self.dtype)
        out = whole(self.attention_out)
        x = x + self.layout.summed("bqhd,hde->bqe", seen, out, self.dtype)
        normed = rms_normed(x, whole(self.hidden_scale))
        hidden = product("bte,eh->bth", normed, whole(self.up), self.dtype)
        hidden = jax.nn.gelu(hidden + whole(self.up_bias))
        x = x + self.layout.summed("bth,he->bte", hidden, whole(self.down), self.dtype)
        return x + whole(self.down_bias), jnp.max(scores, axis=(0, 2, 3))


class Transformer(nnx.Module):
    """Tokens to logits of the next ones; the embedding is the output projection as well.

    Weights are float32, `dtype` is that of the products.
    """

    def __init__(
        self,
        sizes: Sizes,
        dtype: jax.typing.DTypeLike = jnp.float32,
        layout: Layout | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.layout = dtype, layout or Layout()
        self.embedding = parameter(rngs, (sizes.vocabulary, sizes.units), ("vocabulary", "embed"))
        self.positions = parameter(rngs, (sizes.context, sizes.units), ("time", "embed"))
        self.blocks = nnx.List(Block(sizes, dtype, self.layout, rngs) for _ in range(sizes.layers))
        self.scale = constant(1.0, (sizes.units,), ("norm",))

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Logits]:
        """[batch, time] to float32 [batch, time, vocabulary], and what its blocks say."""
        table = self.layout.whole(self.embedding)
        positions = self.layout.whole(self.positions)
        x = self.layout.looked_up(table, tokens) + positions[: tokens.shape[1]]
        largest = []
        for block in self.blocks:
            x, of_heads = block(x)
            largest.append(of_heads)
        x = rms_normed(x, self.layout.whole(self.scale))
        return product("bte,ve->btv", x, table, self.dtype), {"blocks": largest}


def attention_heads(path: str, weight: jax.Array) -> tuple[Heads, Heads] | None:
    """Where a block has its queries and keys, for `qk_clip`."""
    if not path.endswith("qkv"):
        return None
    return Heads("query", axis=2, part={1: 0}), Heads("key", axis=2, part={1: 1})


def matrices(params: Any) -> Any:
    """Inputs and outputs of the matrices of blocks, for Muon; what has None is left to Adam."""
    axes = {"qkv": (0, (2, 3)), "attention_out": ((0, 1), 2), "up": (0, 1), "down": (0, 1)}

    def of_weight(path: Any, weight: jax.Array) -> MuonDimensionNumbers | None:
        (name,) = {getattr(key, "key", None) for key in path} & axes.keys() or {None}
        return MuonDimensionNumbers(*axes[name]) if name else None

    return jax.tree.map_with_path(of_weight, params)


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str | None, ...], scale: float = 0.02
) -> nnx.Param:
    """A float32 weight; `names` are the logical axes that rules map to those of a mesh."""
    value = scale * jax.random.normal(rngs.params(), shape)
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def constant(value: float, shape: tuple[int, ...], names: tuple[str, ...]) -> nnx.Param:
    """A float32 weight that begins with one value everywhere."""
    return nnx.Param(jnp.full(shape, value), out_sharding=names, eager_sharding=False)


def product(
    equation: str, x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike, **out: Any
) -> jax.Array:
    """An einsum in `dtype`, between float32 arrays.

    Where bfloat16 were kept between products, gradients of biases and of the embedding would be
    sums of thousands of bfloat16 numbers: the first gradient of the default network comes out
    0.8 % too short, and by another amount for each number of devices.
    """
    # Rounding the result rounds the gradient that comes back, so both its products are fast too.
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), **out).astype(jnp.float32)


def rms_normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / √mean(x²) · scale: Zhang, Sennrich 2019, https://arxiv.org/abs/1910.07467."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * scale


def next_token_loss(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, Logits]:
    """Mean nats of each token of [batch, time + 1] given those before it, and attention logits."""
    logits, largest = model(tokens[:, :-1])
    # A sum over one-hot rows instead of a lookup: it is the same program under every sharding.
    hit = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * hit, axis=-1)), largest
