"""A norm that the caller knows already is a measure, too."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._checks import check_argument_name
from ._leaves import norm_dtype

_NONE: Mapping[str, Any] = MappingProxyType({})


class GivenNorm(NamedTuple):
    """The measure that `given_norm` makes; two of one name are equal."""

    name: str

    def __call__(
        self,
        updates: Any,
        *,
        axis_name: Any = None,
        extra_args: Mapping[str, Any] | None = _NONE,
    ) -> jax.Array:
        """The norm among the extra arguments of an update; at `init`, which has None, a zero."""
        del updates, axis_name
        if extra_args is None:
            return jnp.zeros((), norm_dtype())
        norm = extra_args.get(self.name)
        if norm is None:
            raise ValueError(
                f"`{self.name}` must be given: the clip has `given_norm({self.name!r})` for its "
                f"measure. Call `update(updates, state, params, {self.name}=norm)`."
            )
        if jnp.shape(norm) != ():
            raise ValueError(f"`{self.name}` must be a scalar, got shape {jnp.shape(norm)}.")
        norm = jnp.asarray(norm)
        if jnp.issubdtype(norm.dtype, jnp.complexfloating):
            raise ValueError(f"`{self.name}` must be real, got {norm.dtype}.")
        norm = norm.astype(norm_dtype())
        # DeepSpeed reports -1 after an overflow; a negative factor would ascend.
        return jnp.where(norm < 0, jnp.nan, norm)


def given_norm(name: str) -> GivenNorm:
    r"""A norm that is known already: the measure of a clip that reads it from an extra argument.

    $$ n = \text{extra\_args}[\text{name}] $$

    For a norm that the loop computes anyway, and for one that no single program can measure, as
    that of all stages of a pipeline. It is the norm of what this very clip gets: behind
    `optax.scale(1 / 1024)` that of the scaled gradient, in `optax.MultiSteps` that of the
    accumulated one. `error_feedback` and `clip21` give their clip something else than the
    gradient, so it does not belong there.

    Args:
      name: Name of the extra argument of `update`. It must be a real scalar; one below 0 counts
        as not finite, because DeepSpeed reports -1 after an overflow.

    Returns:
      A measure for `clip_to_limit`, for `skip_nonfinite` and `skip_spikes`, and for every
      strategy that has a `measure`. An update without the argument raises a ValueError.

    Raises:
      ValueError: For a `name` that is not the name of an argument.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.clip_to_limit(1.0, measure=gradclip_jax.given_norm("norm"))
    >>> grads = jnp.array([3.0, 4.0])
    >>> updates, state = clip.update(grads, clip.init(grads), norm=10.0)
    >>> print(updates)
    [0.3 0.4]
    """
    return GivenNorm(check_argument_name("name", name))
