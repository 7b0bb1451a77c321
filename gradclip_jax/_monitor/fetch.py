"""Numbers on their way from the device to the host; only reading them waits."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from .._leaves import norm_dtype


class Fetch:
    """Named scalars or vectors that are being copied to the host.

    The numbers on one device are concatenated there: one transfer, however many groups a clip has,
    and a copy, as the next step may donate the optimizer state that `metrics` read.
    """

    def __init__(self, argument: Mapping[str, Any]):
        self._on_host: dict[str, np.ndarray] = {}
        self._on_device: list[tuple[list[str], list[int], Any]] = []
        by_device: dict[Any, dict[str, jax.Array]] = {}
        for name, value in argument.items():
            if isinstance(value, Tracer):
                raise ValueError(
                    f"`{name}` must be the result of a finished step, got a traced value: call "
                    "`Monitor.record` outside of `jit`, with what the step returned."
                )
            if isinstance(value, jax.Array):
                value = _addressable(name, value)
                # A float does not hold a count beyond 2^24.
                is_count = not jnp.issubdtype(value.dtype, jnp.floating) and value.dtype != bool
                place = (frozenset(value.devices()), value.sharding.memory_kind, is_count)
                by_device.setdefault(place, {})[name] = value
            else:
                self._on_host[name] = _as_float64(name, value)
            if np.ndim(value) > 1:
                raise ValueError(
                    f"`{name}` must be a scalar, or a vector with a value for each step of a "
                    f"window, got shape {np.shape(value)}."
                )
        for values in by_device.values():
            with _without_mesh(values):
                joined = _concatenate(tuple(values.values()))
            joined.copy_to_host_async()
            sizes = [value.size for value in values.values()]
            self._on_device.append((list(values), sizes, joined))
        sizes = {value.size for value in self._on_host.values()}
        self.size = max(sizes.union(*(part for _, part, _ in self._on_device), {1}))
        """Number of steps in the window; 1 for scalars."""

    def is_ready(self) -> bool:
        """Whether reading would not wait."""
        return all(joined.is_ready() for _, _, joined in self._on_device)

    def read(self) -> dict[str, np.ndarray]:
        """The vectors, in float64; waits for the device."""
        values = {name: value.reshape(-1) for name, value in self._on_host.items()}
        for names, sizes, joined in self._on_device:
            numbers = np.asarray(joined).astype(np.float64)
            start = 0
            for name, size in zip(names, sizes, strict=True):
                values[name] = numbers[start : start + size]
                start += size
        return values


def _as_float64(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value, np.float64)
    except OverflowError:  # a Python int beyond the range of floats
        raise ValueError(f"`{name}` must fit into a float64, got {type(value)}.") from None


def _addressable(name: str, value: jax.Array) -> jax.Array:
    if len(value.sharding.device_set) == 1:
        return value
    if value.is_fully_replicated:
        # Each process reads its own copy, so that a single process may record.
        return value.addressable_data(0)
    if not value.is_fully_addressable:
        raise ValueError(
            f"`{name}` must be the same on all processes, got {value.sharding}: let the step "
            "return it replicated."
        )
    return value


def _without_mesh(values: Mapping[str, jax.Array]) -> contextlib.AbstractContextManager[Any]:
    """A context in which arrays of one device may be concatenated, if the user's has a mesh."""
    devices = next(iter(values.values())).devices()
    if jax.sharding.get_abstract_mesh().empty or len(devices) > 1:
        return contextlib.nullcontext()
    return jax.set_mesh(Mesh(np.array([*devices]), ("one",)))


@jax.jit
def _concatenate(values: Sequence[jax.Array]) -> jax.Array:
    is_count = not jnp.issubdtype(values[0].dtype, jnp.floating) and values[0].dtype != bool
    dtype = jax.dtypes.canonicalize_dtype(int) if is_count else norm_dtype()
    return jnp.concatenate([jnp.ravel(value).astype(dtype) for value in values])
