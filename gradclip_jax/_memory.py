"""Host memory: a leaf is computed where it lies, and only scalars move."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on as _compute_on

# jax 0.10.2 and 0.11 call it `compute_on2`.
_computed_on: Any = getattr(_compute_on, "compute_on2", _compute_on.compute_on)


def reduced_in_place(f: Callable[..., jax.Array], x: jax.Array, *numbers: jax.Array) -> jax.Array:
    """`f(x, *numbers)`, computed in the memory that holds `x`; the result is on the device."""
    return _in_place(f, jax.memory.Space.Device, x, *numbers)


def changed_in_place(f: Callable[..., jax.Array], x: jax.Array, *numbers: jax.Array) -> jax.Array:
    """`f(x, *numbers)`, computed in the memory that holds `x`, and left there."""
    return _in_place(f, jax.memory.Space.Host, x, *numbers)


def constant_like(number: float, x: jax.Array) -> jax.Array:
    """A number in the dtype and the memory of `x`: constants are on the device."""
    array = jax.numpy.asarray(number, x.dtype)
    return to_memory_of(array, x)


def to_device(x: Any) -> jax.Array:
    """A leaf on the device, also if host memory holds it: for what cannot be computed there."""
    x = jax.numpy.asarray(x)
    return jax.device_put(x, jax.memory.Space.Device) if in_host_memory(x) else x


def to_memory_of(x: jax.Array, origin: Any) -> jax.Array:
    """What came of a leaf, in the memory that holds the leaf."""
    return jax.device_put(x, jax.memory.Space.Host) if in_host_memory(origin) else x


def _in_place(
    f: Callable[..., jax.Array], space: Any, x: jax.Array, *numbers: jax.Array
) -> jax.Array:
    if not in_host_memory(x):
        return f(x, *numbers)
    there = [to_memory_of(number, x) for number in numbers]
    return _computed_on(f, compute_type="device_host", out_memory_spaces=space)(x, *there)


def in_host_memory(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
