"""Names for what goes through a clip, where the type system has only `Any`."""

from typing import Any, TypeAlias

Updates: TypeAlias = Any
"""Pytree of gradients, or of what an optimizer made of them."""

Params: TypeAlias = Any
"""Pytree of parameters, or None."""

Norms: TypeAlias = Any
"""Pytree of norms, a prefix of the updates: one for all, one for each group, array or unit."""

Threshold: TypeAlias = Any
"""A Python number, an array of any float dtype, a traced value, an optax schedule, or None."""

AxisName: TypeAlias = Any
"""Mesh axes over which leaves are split: see `global_norm`."""
