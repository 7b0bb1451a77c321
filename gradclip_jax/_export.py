"""What `jax.export` must know of the classes in a state, to serialize a training step."""

import ast
import contextlib
import functools
from typing import Any, TypeVar

import jax.export

T = TypeVar("T", bound=type)


def exportable(kind: T) -> T:
    """Register a class by a name that says nothing of the file where it is.

    It is a NamedTuple, or a pytree node with auxiliary data that `repr` writes as Python literals.
    """
    register: Any = jax.export.register_namedtuple_serialization
    if not issubclass(kind, tuple):
        register = functools.partial(
            jax.export.register_pytree_node_serialization,
            serialize_auxdata=lambda aux: repr(aux).encode(),
            deserialize_auxdata=lambda text: ast.literal_eval(text.decode()),
        )
    # A module that is loaded again makes its classes anew; the first keep the name.
    with contextlib.suppress(ValueError):
        register(kind, serialized_name=f"gradclip_jax.{kind.__name__}")
    return kind
