"""Make the elements zero that are not finite, and let the others pass."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._inject import strategy
from .._leaves import is_gradient, norm_dtype
from .._memory import changed_in_place, reduced_in_place
from .._norms import global_norm
from .._safe import all_finite, finite_or_zero
from .._state import NonfiniteState, increment_if, transformation
from .._types import AxisName


@strategy()
def zero_nonfinite(*, axis_name: AxisName = None) -> optax.GradientTransformationExtraArgs:
    r"""Make each element zero that is NaN or infinite, and let the others pass.

    $$ g_i \leftarrow g_i \text{ if } |g_i| < \infty \text{ else } 0 $$

    For models in which a few elements fail and the rest are still worth a step; before a clip, so
    that one NaN does not cost its whole group the update. `optax.zero_nans` lets infinities pass.

    Args:
      axis_name: See `global_norm`; the elements need no other device, but the counter does.

    Returns:
      A transformation that counts the updates in which it met such an element; `metrics` adds
      them to the `nonfinite_count` of the clip.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> guard = gradclip_jax.zero_nonfinite()
    >>> grads = jnp.array([3.0, jnp.nan, -jnp.inf])
    >>> updates, state = guard.update(grads, guard.init(grads))
    >>> print(updates, state.nonfinite_count)
    [3. 0. 0.] 1
    """

    def init(params: Any) -> NonfiniteState:
        del params
        return NonfiniteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NonfiniteState]:
        del params, extra_args
        flags = jax.tree.map(
            lambda x: reduced_in_place(_any_nonfinite, jnp.asarray(x)) if is_gradient(x) else None,
            updates,
        )
        # The largest of the flags: one collective, and the same rules as for norms.
        met = global_norm(flags, order=jnp.inf, axis_name=axis_name) > 0
        count = increment_if(state.nonfinite_count, met)
        return finite_part(updates), NonfiniteState(count, increment_if(state.step_count, True))

    return transformation(init, update)


def finite_part(updates: Any) -> Any:
    """The updates, with 0 for each element that is NaN or infinite."""
    return jax.tree.map(
        lambda x: changed_in_place(finite_or_zero, jnp.asarray(x)) if is_gradient(x) else x, updates
    )


def _any_nonfinite(x: Any) -> jax.Array:
    return (~all_finite(x)).astype(norm_dtype())
