"""DP-SGD: Gaussian noise, and a private limit that follows a quantile of the norms."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import check_above, check_number
from .._export import exportable
from .._leaves import is_gradient, norm_dtype, widen
from .._limits.running_quantile import running_quantile
from .._state import check_type
from .call import PerExample
from .rule import check_in_range, check_max_norm


@exportable
class NoiseState(NamedTuple):
    """Which noise comes next.

    Attributes:
      step_count: Number of updates so far, int32; it stops at 2^31 - 1.
      key: The key, as it was given; from 2^31 - 1 updates on, another one after each.
    """

    step_count: jax.Array
    key: jax.Array


def gaussian_noise(
    noise_multiplier: Any, *, max_norm: Any, key: Any, mean_of: Any = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Add the noise of DP-SGD to a sum (or mean) of clipped gradients.

    $$ g + \mathcal N(0, (z C / n)^2 I) $$

    Put it first in an `optax.chain`, after `per_example.value_and_grad`: with `optax.sgd` that is
    DP-SGD, with `optax.adam` DP-Adam. (`optax.add_noise` has one variance for the whole training
    and draws noise in the dtype of the leaf: in bfloat16 it is coarse.)

    Args:
      noise_multiplier: z, non-negative: the standard deviation in units of `max_norm`. An
        accountant, such as `dp_accounting`, tells the privacy that it buys.
      max_norm: C, the limit of the clip; `update(..., max_norm=...)` accepts the one of that step.
      key: A PRNG key, or a number to make one of. The noise of update t comes from
        `jax.random.fold_in(key, t)`, the same on all devices.
      mean_of: n, above 0: the same as in the gradient of the mean; 1 for the sum.

    Returns:
      A transformation. Noise is drawn and added in at least float32 and the result rounded once,
      to the dtype of the leaf: pass gradients in float32 (`dtype=jnp.float32`).

    Raises:
      ValueError: For a number out of its range.

    >>> import gradclip_jax, jax.numpy as jnp, optax
    >>> noise = gradclip_jax.per_example.gaussian_noise(1.1, max_norm=1.0, key=0, mean_of=256)
    >>> optimizer = optax.chain(noise, optax.sgd(0.1))
    >>> params = {"w": jnp.zeros(10_000)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> print((updates["w"].std() / 0.1 * 256).round(1))
    1.1

    Abadi et al., *Deep Learning with Differential Privacy*, 2016,
    https://arxiv.org/abs/1607.00133, algorithm 1.
    """
    multiplier = check_number("noise_multiplier", noise_multiplier, "be a non-negative number", 0)
    check_in_range("noise_multiplier", multiplier)
    bound = check_max_norm(max_norm)
    if not isinstance(bound, jax.Array) and float(bound) > float(jnp.finfo(norm_dtype()).max):
        raise ValueError(f"`max_norm` must be finite: noise is measured by it, got {max_norm!r}.")
    divisor = check_in_range("mean_of", check_above("mean_of", mean_of, 0))
    if not any(isinstance(number, jax.Array) for number in (multiplier, bound, divisor)):
        deviation = float(multiplier) * float(bound) / float(divisor)
        check_in_range("noise_multiplier * max_norm / mean_of", deviation)

    def init(params: Any) -> NoiseState:
        del params
        made = jax.random.key(key) if isinstance(key, int) else jnp.copy(key)
        return NoiseState(jnp.zeros((), jnp.int32), made)

    def update(
        updates: Any, state: Any, params: Any = None, *, max_norm: Any = None, **extra_args: Any
    ) -> tuple[Any, NoiseState]:
        del params, extra_args
        check_type(state, NoiseState)
        scale = [multiplier, bound if max_norm is None else max_norm, divisor]
        z, c, n = (jnp.asarray(number).astype(norm_dtype()) for number in scale)
        deviation = jnp.where(z == 0, 0, z * c / n)  # c may be infinite
        leaves, treedef = jax.tree.flatten(updates)
        keys = jax.random.split(
            jax.random.fold_in(state.key, state.step_count), max(len(leaves), 1)
        )
        noised = [
            _noised(leaf, deviation, keys[i]) if is_gradient(leaf) else leaf
            for i, leaf in enumerate(leaves)
        ]
        # A counter at its end stays there: the same noise twice would reveal gradients.
        last = state.step_count == jnp.iinfo(jnp.int32).max
        after = jax.random.fold_in(state.key, jnp.uint32(2**31))
        key = jnp.where(last, after, state.key)
        count = jnp.where(last, state.step_count, state.step_count + 1)
        return treedef.unflatten(noised), NoiseState(count, key)

    return optax.GradientTransformationExtraArgs(init, update)


def _noised(leaf: jax.Array, deviation: jax.Array, key: jax.Array) -> jax.Array:
    wide = widen(leaf)
    noise = jax.random.normal(key, wide.shape, wide.dtype)
    if jnp.iscomplexobj(wide):
        # jax draws modulus 1, 1/sqrt(2) in each part; each is a coordinate, which needs 1.
        return (wide + noise * (math.sqrt(2) * deviation).astype(wide.dtype)).astype(leaf.dtype)
    return (wide + deviation.astype(wide.dtype) * noise).astype(leaf.dtype)


def quantile_step(
    max_norm: Any,
    *,
    seen: PerExample,
    mean_of: Any = None,
    quantile: float = 0.5,
    learning_rate: float = 0.2,
    noise_std: Any = 0.0,
    key: Any = None,
) -> jax.Array:
    r"""The next `max_norm`: a private step toward a quantile of the per-example norms.

    $$ C \leftarrow C \exp(-\eta (\tilde b - q)), \qquad
       \tilde b = \tfrac12 + \tfrac1n \Big( \mathcal N(0, \sigma_b^2)
       + \sum_{i=1}^N (b_i - \tfrac12) \Big), \qquad b_i = [\lVert g_i \rVert \le C] $$

    In equilibrium a share q of the examples is not clipped. Pass it on, to the noise as well.

    Args:
      max_norm: C of this step, above 0, scalar.
      seen: From `per_example.value_and_grad`, of the N examples of this step, with one norm each.
        One that is not finite is above any C.
      mean_of: n, above 0: by default N. Privacy needs a fixed number, such as the expected N.
      quantile: q, between 0 and 1 (exclusive).
      learning_rate: eta, above 0; 0.2 in the paper.
      noise_std: sigma_b, the noise on the count, non-negative; n / 20 in the paper.
        `per_example.split_noise` takes its share of the budget from the noise of the gradient.
      key: PRNG key of this step, needed for noise.

    Returns:
      The next C, a scalar in float32 (float64 under x64), above 0.

    Raises:
      ValueError: For a number out of its range, or noise without a key.

    >>> import jax, jax.numpy as jnp
    >>> from gradclip_jax import per_example
    >>> grad = per_example.value_and_grad(lambda w, x: (w * x).sum(), max_norm=None)
    >>> @jax.jit
    ... def step(max_norm, x):
    ...     (_, seen), grads = grad(jnp.float32(0.0), x, max_norm=max_norm)
    ...     return per_example.quantile_step(max_norm, seen=seen)
    >>> max_norm = jnp.float32(1.0)
    >>> for _ in range(100):
    ...     max_norm = step(max_norm, jnp.array([2.0, 4.0, 8.0, 16.0]))
    >>> bool(4 <= max_norm < 8)  # two of four are not clipped
    True

    Andrew, Thakkar, McMahan, Ramaswamy, *Differentially Private Learning with Adaptive Clipping*,
    2021, https://arxiv.org/abs/1905.03871, algorithm 1.
    """
    noise_std = check_number("noise_std", noise_std, "be a non-negative number", 0)
    check_in_range("noise_std", noise_std)
    divisor = seen.example_count
    if mean_of is not None:
        divisor = check_in_range("mean_of", check_above("mean_of", mean_of, 0))
    limit = running_quantile(quantile, learning_rate=learning_rate)
    number = norm_dtype()
    bound, above, count, n, deviation = (
        jnp.asarray(x).astype(number)
        for x in (max_norm, seen.above_count, seen.example_count, divisor, noise_std)
    )
    centred = count / 2 - above
    if key is not None:
        centred = centred + deviation * jax.random.normal(key, (), number)
    elif isinstance(noise_std, jax.Array) or noise_std != 0:
        raise ValueError("`key` must be given for noise: `noise_std` is not 0.")
    below = 0.5 + centred / jnp.where(n > 0, n, 1)
    _, down = limit.update(bound, bound)
    _, up = limit.update(jnp.asarray(jnp.inf, number), bound)
    # A share `below` of one step down, and the rest of one step up.
    return jnp.exp(below * jnp.log(down) + (1 - below) * jnp.log(up))


def split_noise(noise_multiplier: float, *, noise_std: float) -> float:
    r"""The noise multiplier of the gradient where the count of `quantile_step` is noised, too.

    $$ z_\Delta = (z^{-2} - (2 \sigma_b)^{-2})^{-1/2} $$

    Gradients with $z_\Delta$ and the count with $\sigma_b$ are together as private as gradients
    alone with z: tell the accountant z.

    Args:
      noise_multiplier: z, above 0.
      noise_std: sigma_b, above z / 2: below it the count alone would cost more.

    Raises:
      ValueError: For a number out of its range.

    >>> from gradclip_jax import per_example
    >>> round(per_example.split_noise(1.0, noise_std=5.0), 4)
    1.005

    Andrew et al. 2021, theorem 1: a count of $b_i - 1/2$ has sensitivity 1/2.
    """
    z = check_above("noise_multiplier", noise_multiplier, 0)
    deviation = check_above("noise_std", noise_std, float(z) / 2)
    return (z**-2 - (2 * deviation) ** -2) ** -0.5
