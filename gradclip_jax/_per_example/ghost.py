"""Ghost clipping: the gradient of an example stays two factors, whose product is never formed.

A layer is watched at each call: its input is one factor, and the other is the derivative with
respect to a zero that is added to its output. Its own parameter is not differentiated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .._devices import varying_along, varying_axes
from .._leaves import path_name
from .ghost_layers import Inputs, Kind, as_matrix, is_plain, kinds, pays

_CELLS = ("SimpleCell", "LSTMCell", "OptimizedLSTMCell", "GRUCell")


@dataclasses.dataclass(frozen=True)
class _Site:
    """A call of a layer: its parameter and kind, its inputs, and what is added to its output."""

    name: str
    kind: Kind
    inputs: Inputs
    shape: tuple[int, ...]
    dtype: Any


def ghost_gradients(
    nnx: Any, value_of: Callable[..., Any], params: Any, example: Any
) -> Callable[[Any, Any], Any] | None:
    """`(params, examples) -> ((values, aux), grads)`, gradients as two factors where that pays.

    `value_of` takes params, an example, and what to do with modules before they are called. None
    where it pays for no parameter.
    """
    named = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    tree = _usable_sites(nnx, value_of, params, dict(named), example)
    sites = jax.tree.leaves(tree)
    if not sites:
        return None
    is_ghost = [name in {site.name for site in sites} for name, _ in named]
    treedef = jax.tree.structure(params)

    def each(params: Any, examples: Any) -> Any:
        leaves = jax.tree.leaves(params)
        direct = [leaf for leaf, ghost in zip(leaves, is_ghost, strict=True) if not ghost]

        def of_example(direct: Any, probes: Any, example: Any) -> Any:
            rest = iter(direct)
            whole = [
                leaf if ghost else next(rest) for leaf, ghost in zip(leaves, is_ghost, strict=True)
            ]
            watch = _Watch(nnx, {site.name for site in sites}, probes=probes)
            value, aux = value_of(treedef.unflatten(whole), example, watch.start)
            return value, (aux, watch.inputs)

        axes = frozenset().union(*map(varying_axes, leaves))
        probes = jax.tree.map(
            lambda site: varying_along(jnp.zeros(site.shape, site.dtype), axes), tree
        )
        mapped = jax.vmap(
            jax.value_and_grad(of_example, (0, 1), has_aux=True), in_axes=(None, None, 0)
        )
        (values, (aux, inputs)), (of_direct, outputs) = mapped(direct, probes, examples)
        arrays, outputs = jax.tree.leaves(inputs), jax.tree.leaves(outputs)
        calls = [
            (site, site.inputs._replace(array=x), y.reshape(y.shape[0], -1, y.shape[-1]))
            for site, x, y in zip(sites, arrays, outputs, strict=True)
        ]
        rest, grads = iter(of_direct), []
        for (name, leaf), ghost in zip(named, is_ghost, strict=True):
            if not ghost:
                grads.append(next(rest))
                continue
            here, xs, ys = zip(*(call for call in calls if call[0].name == name), strict=True)
            grads.append(here[0].kind.gradients(leaf, xs, jnp.concatenate(ys, axis=1)))
        return (values, aux), treedef.unflatten(grads)

    return each


def _usable_sites(
    nnx: Any, value_of: Callable[..., Any], params: Any, named: dict[str, Any], example: Any
) -> list[Any]:
    """Calls of layers whose parameter is used in such calls alone, where ghost clipping pays."""
    seen: list[Any] = []

    def run(params: Any, copies: Any, example: Any) -> Any:
        watch = _Watch(nnx, set(named), copies=dict(zip(named, copies, strict=True)))
        value = value_of(params, example, watch.start)[0]
        seen[:] = watch.sites
        return value

    program = jax.make_jaxpr(run)(params, jax.tree.leaves(params), example).jaxpr
    used = {id(var) for eqn in program.eqns for var in eqn.invars}
    own = program.invars[: len(named)]
    names = {name for name, var in zip(named, own, strict=True) if id(var) not in used}
    for name in set(names):
        here = [site for site in jax.tree.leaves(seen) if site.name == name]
        positions = sum(math.prod(site.shape[:-1]) for site in here)
        are_real = all(jnp.issubdtype(site.dtype, jnp.floating) for site in here)
        if not are_real or not pays(positions, named[name].size):
            names.remove(name)
    return _sites_of(names, seen)


def _sites_of(names: set[str], sites: list[Any]) -> list[Any]:
    chosen = [_sites_of(names, site) if isinstance(site, list) else site for site in sites]
    return [site for site in chosen if isinstance(site, list) or site.name in names]


def _level() -> Any:
    """A token that differs inside `scan`, `jit` and the like: their values must not get outside."""
    return core.get_opaque_trace_state(convention="nnx")


class _Watch:
    """Records the calls of layers with parameters of these names.

    Calls inside a scan over time are a list within the lists, with time as the first axis.
    """

    def __init__(self, nnx: Any, names: set[str], *, copies: Any = None, probes: Any = None):
        """Copies stand for the parameters within such calls; probes are added to outputs."""
        self.nnx, self.names, self.copies, self.probes = nnx, names, copies, probes
        self.sites: list[Any] = []
        self.inputs: list[Any] = []
        self.known: dict[int, str] = {}
        self.here: Any = None

    def start(self, model: Any) -> None:
        """Record the calls of the layers in a module from now on."""
        self.here = _level()
        for kind in kinds(self.nnx):
            watched = self._watched(kind)
            for path, module in self.nnx.iter_modules(model):
                name = "/".join(map(str, (*path, kind.attribute)))
                is_kind = type(module) is kind.layer and name in self.names
                if is_kind and is_plain(self.nnx, module):
                    self.known[id(module)] = name
                    object.__setattr__(module, "__class__", watched)
        cells = [getattr(self.nnx, name) for name in _CELLS]
        for _, module in self.nnx.iter_modules(model):
            if type(module) is self.nnx.RNN and type(module.cell) in cells:
                object.__setattr__(module, "__class__", self._watched_rnn())

    def _watched(self, kind: Kind) -> Any:
        def of_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
            plain = functools.partial(kind.layer.__call__, layer)
            inside = _level() != self.here
            further = len(args) != 1 or any(value is not None for value in kwargs.values())
            if further or inside or id(layer) not in self.known:
                return plain(*args, **kwargs)
            return self._call(kind, plain, layer, jnp.asarray(args[0]))

        return type(kind.layer.__name__, (kind.layer,), {"__call__": of_layer})

    def _call(self, kind: Kind, plain: Callable[[Any], Any], layer: Any, x: jax.Array) -> Any:
        name, own = self.known[id(layer)], vars(layer)[kind.attribute]
        if self.copies is not None:
            vars(layer)[kind.attribute] = own.replace(self.copies[name])
        result, positions, inputs = kind.call(plain, layer, x)
        vars(layer)[kind.attribute] = own
        output = as_matrix(result, positions)
        if self.probes is not None:
            result = (output + self.probes[len(self.inputs)]).reshape(result.shape)
        site = _Site(name, kind, inputs._replace(array=None), output.shape, output.dtype)
        self.sites.append(site)
        self.inputs.append(inputs.array)
        return result

    def _watched_rnn(self) -> Any:
        plain = self.nnx.RNN
        known = {"initial_carry", "return_carry", "time_major", "reverse", "keep_order"}

        def of_rnn(rnn: Any, *args: Any, **kwargs: Any) -> Any:
            # A stream of random numbers is only read to make a carry, and one is given.
            unread = (type(None), self.nnx.RngStream)
            given = {key: value for key, value in kwargs.items() if not isinstance(value, unread)}
            inside = _level() != self.here
            if inside or len(args) != 1 or not {"initial_carry"} <= given.keys() <= known:
                return plain.__call__(rnn, *args, **kwargs)
            setting = {**vars(rnn), **given}
            axis = 0 if setting["time_major"] else args[0].ndim - 2
            x, carry = jnp.moveaxis(args[0], axis, 0), given["initial_carry"]
            carry, y = self._scan(rnn, carry, x, setting["reverse"])
            if setting["reverse"] and not setting["keep_order"]:
                y = jnp.flip(y, 0)
            y = jnp.moveaxis(y, 0, axis)
            return (carry, y) if setting["return_carry"] else y

        return type(plain.__name__, (plain,), {"__call__": of_rnn})

    def _scan(self, rnn: Any, carry: Any, x: jax.Array, reverse: bool) -> tuple[Any, jax.Array]:
        """Like `nnx.scan`, which lets only the state of modules out of a step, but with records."""
        outer = self.sites, self.inputs, self.probes, self.here
        probes = None if self.probes is None else self.probes[len(self.inputs)]

        def step(carry: Any, xs: Any) -> Any:
            x, self.probes = xs
            self.sites, self.inputs = [], []
            self.here = _level()
            carry, y = rnn.cell(carry, x)
            return carry, (y, self.inputs)

        carry, (y, inputs) = jax.lax.scan(
            step, carry, (x, probes), reverse=reverse, unroll=rnn.unroll
        )
        sites = [dataclasses.replace(site, shape=(len(x), *site.shape)) for site in self.sites]
        self.sites, self.inputs, self.probes, self.here = outer
        self.sites.append(sites)
        self.inputs.append(inputs)
        return carry, y
