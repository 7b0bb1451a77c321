"""Ghost gradients: those of an example as two factors, whose product is never formed.

The gradient of the kernel of a dense layer is a sum of outer products of its inputs x and the
derivatives d of the loss at its outputs. The norm, and the scaled sum over examples, follow from
the factors (Bu, Wang, Zha, Karypis, *Differentially Private Optimization on Large Model at Small
Cost*, 2023, https://arxiv.org/abs/2210.00038, section 3):

    |sum_t x_t d_t^T|^2 = sum_ts (x_t . x_s) (d_t . d_s)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from .._devices import path_name, varying_axes, varying_like
from .._norms import widen

Factors = tuple[jax.Array, jax.Array]

_HIGHEST = jax.lax.Precision.HIGHEST
_ROUNDING = 2.0**-20


class Dense:
    """Gradients of a kernel: inputs [examples, positions, i], outputs [examples, positions, o]."""

    def __init__(self, kernel: jax.Array, inputs: jax.Array, outputs: jax.Array):
        """Keep the factors in at least float32."""
        del kernel
        self.inputs, self.outputs = widen(inputs), widen(outputs)

    def norms(self) -> jax.Array:
        """Norm of each example."""
        return _norms(_gram(self.inputs), self.inputs, self.outputs)

    def summed(self, first: jax.Array, second: jax.Array, keep: jax.Array) -> jax.Array:
        """The sum over examples, each scaled."""
        inputs = jnp.where(keep[:, None, None], self.inputs, 0)
        scaled = _scaled(self.outputs, first, second, keep)
        return jnp.einsum("nti,nto->io", inputs, scaled, precision=_HIGHEST)


class Lookup:
    """Gradients of a table: indices [examples, positions, 1], outputs as above."""

    def __init__(self, table: jax.Array, inputs: jax.Array, outputs: jax.Array):
        """Keep the factors in at least float32."""
        rows = inputs[..., 0]
        self.shape, self.outputs = table.shape, widen(outputs)
        self.inputs = jnp.where(rows < 0, rows + table.shape[0], rows)

    def norms(self) -> jax.Array:
        """Norm of each example: an index that it has several times is one row."""
        same = self.inputs[:, :, None] == self.inputs[:, None, :]
        ones = jnp.ones((*self.inputs.shape, 1), self.outputs.dtype)
        return _norms(same.astype(self.outputs.dtype), ones, self.outputs)

    def summed(self, first: jax.Array, second: jax.Array, keep: jax.Array) -> jax.Array:
        """The sum over examples, each scaled."""
        scaled = _scaled(self.outputs, first, second, keep)
        return jnp.zeros(self.shape, scaled.dtype).at[self.inputs].add(scaled)


def _gram(x: jax.Array) -> jax.Array:
    return jnp.einsum("nti,nsi->nts", x, x, precision=_HIGHEST)


def _norms(gram: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """The root of the sum of products of Gram matrices, and what rounding may take from it."""
    squares = jnp.sum(gram * _gram(outputs), axis=(1, 2))
    lengths = [jnp.sqrt(jnp.sum(part * part, axis=2)) for part in (inputs, outputs)]
    most = jnp.sum(lengths[0] * lengths[1], axis=1)
    # Terms of both signs may cancel, so that what is left is rounding.
    safe = jnp.where(squares > 0, squares, 0 * squares) + _ROUNDING * most * most
    return jnp.where(safe != 0, jnp.sqrt(jnp.where(safe != 0, safe, 1)), 0)


def _scaled(x: jax.Array, first: jax.Array, second: jax.Array, keep: jax.Array) -> jax.Array:
    column = functools.partial(jnp.expand_dims, axis=(1, 2))
    kept = jnp.where(column(keep), x, 0)
    return kept * column(second.astype(x.dtype)) * column(first.astype(x.dtype))


class _Site(NamedTuple):
    """A call of a layer: the name of its parameter, and its input and output."""

    name: str
    inputs: Any
    outputs: Any


def ghost_gradients(
    nnx: Any, value_of: Callable[..., Any], params: Any, example: Any
) -> Callable[[Any, Any], Any] | None:
    """`(params, examples) -> ((values, aux), grads)` with ghost gradients where that can be.

    `value_of` takes params, an example, and what to do with modules before they are called. None
    if no layer allows it.
    """
    named = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    names = [name for name, _ in named]
    sites, kinds = _usable_sites(nnx, value_of, params, names, example)
    if not sites:
        return None
    ghosts = [name in kinds for name in names]
    treedef = jax.tree.structure(params)

    def each(params: Any, examples: Any) -> Any:
        leaves = jax.tree.leaves(params)
        direct = [leaf for leaf, ghost in zip(leaves, ghosts, strict=True) if not ghost]

        def of_example(direct: Any, probes: Any, example: Any) -> Any:
            rest, seen = iter(direct), []
            whole = [
                leaf if ghost else next(rest) for leaf, ghost in zip(leaves, ghosts, strict=True)
            ]

            def call(layer: Callable[[Any], Any], name: str, x: Any) -> Any:
                probe = probes[len(seen)]
                seen.append(x)
                return layer(x) + probe

            prepare = functools.partial(_instrument, nnx, set(kinds), call)
            value, aux = value_of(treedef.unflatten(whole), example, prepare)
            return value, (aux, seen)

        probes = [jnp.zeros(site.outputs.shape, site.outputs.dtype) for site in sites]
        probes = [varying_like(probe, _widest(leaves)) for probe in probes]
        mapped = jax.vmap(
            jax.value_and_grad(of_example, (0, 1), has_aux=True), in_axes=(None, None, 0)
        )
        (values, (aux, inputs)), (of_direct, outputs) = mapped(direct, probes, examples)
        rest, grads = iter(of_direct), []
        for (name, leaf), ghost in zip(named, ghosts, strict=True):
            if not ghost:
                grads.append(next(rest))
                continue
            here = [i for i, site in enumerate(sites) if site.name == name]
            factors = [
                jnp.concatenate([_positions(parts[i], kinds[name], k) for i in here], axis=1)
                for k, parts in enumerate((inputs, outputs))
            ]
            grads.append(kinds[name](leaf, *factors))
        return (values, aux), treedef.unflatten(grads)

    return each


def _widest(leaves: Sequence[jax.Array]) -> jax.Array:
    return max(leaves, key=lambda leaf: len(varying_axes(leaf)))


def _positions(x: jax.Array, kind: Any, number: int) -> jax.Array:
    """[examples, positions, features]; an index has one feature."""
    if kind is Lookup and number == 0:
        return x.reshape(x.shape[0], -1, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _usable_sites(
    nnx: Any, value_of: Callable[..., Any], params: Any, names: list[str], example: Any
) -> tuple[list[_Site], dict[str, Any]]:
    """Calls of layers whose parameter serves in such calls alone, and what each parameter is."""
    kinds: dict[str, Any] = {}
    sites: list[_Site] = []

    def run(params: Any, copies: Any, example: Any) -> Any:
        given = dict(zip(names, jax.tree.leaves(copies), strict=True))

        def call(layer: Any, name: str, x: Any) -> Any:
            module = layer.__self__
            attribute = name.rpartition("/")[2]
            own = vars(module)[attribute]
            vars(module)[attribute] = own.replace(given[name])
            result = layer(x)
            vars(module)[attribute] = own
            kinds[name] = Dense if attribute == "kernel" else Lookup
            sites.append(_Site(name, jax.typeof(x), jax.typeof(result)))
            return result

        prepare = functools.partial(_instrument, nnx, set(names), call)
        return value_of(params, example, prepare)[0]

    program = jax.make_jaxpr(run)(params, params, example).jaxpr
    used = {id(var) for eqn in program.eqns for var in eqn.invars}
    own = program.invars[: len(names)]
    elsewhere = {name for name, var in zip(names, own, strict=True) if id(var) in used}
    kinds = {name: kind for name, kind in kinds.items() if name not in elsewhere}
    return [site for site in sites if site.name in kinds], kinds


def _instrument(nnx: Any, names: set[str], call: Callable[..., Any], model: Any) -> None:
    """Let `call(layer, name, x)` stand for each call of a layer with a parameter of these names."""
    here = core.get_opaque_trace_state(convention="nnx")
    known: dict[int, str] = {}

    def replaced(kind: Any) -> Any:
        plain = kind.__call__

        def of_layer(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            inside = core.get_opaque_trace_state(convention="nnx") != here
            if args or kwargs or inside or id(self) not in known:
                return plain(self, x, *args, **kwargs)
            return call(plain.__get__(self), known[id(self)], x)

        return type(kind.__name__, (kind,), {"__call__": of_layer})

    for kind, attribute in ((nnx.Linear, "kernel"), (nnx.Embed, "embedding")):
        ghost = replaced(kind)
        for path, module in nnx.iter_modules(model):
            name = "/".join(map(str, (*path, attribute)))
            if type(module) is kind and name in names and _is_plain(module):
                known[id(module)] = name
                object.__setattr__(module, "__class__", ghost)


def _is_plain(module: Any) -> bool:
    """Whether its output is a plain product, or a plain row."""
    product = getattr(module, "dot_general", jax.lax.dot_general)
    return product is jax.lax.dot_general and getattr(module, "num_embeddings", 2) > 1
