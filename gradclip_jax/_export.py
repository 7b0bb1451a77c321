"""What `jax.export` must know of the classes in a state, to serialize a training step."""

import contextlib
from typing import TypeVar

import jax.export

T = TypeVar("T", bound=type)


def exportable(kind: T) -> T:
    """Register a NamedTuple by a name that says nothing of the file where it is."""
    # A module that is loaded again makes its classes anew; the first keep the name.
    with contextlib.suppress(ValueError):
        jax.export.register_namedtuple_serialization(
            kind, serialized_name=f"gradclip_jax.{kind.__name__}"
        )
    return kind
