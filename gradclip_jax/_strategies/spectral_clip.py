"""Clip the singular values of matrices: exactly, or softly by matrix products alone."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._checks import check_threshold, check_whole_number
from .._clip import factors_of_norms, measured_types
from .._compiled import compiled
from .._devices import any_device, replicate_matrices, reshard_like, varying_like
from .._inject import strategy
from .._leaves import widen
from .._limits import constant
from .._matrices import adjoint, check_whole_matrices, identities, matrix_norms, product, scaled
from .._memory import to_device, to_memory_of
from .._polynomials import hold_singular_values
from .._rescale import (
    OnNonfinite,
    Response,
    check_response,
    factors,
    nonfinite_fill,
    rescale,
    shrink,
    smooth_sqrt,
)
from .._safe import powers_near
from .._state import (
    ClipState,
    check_norms,
    check_trees,
    init_threshold,
    initial_state,
    next_state,
    read_threshold,
    transformation,
)
from .._types import AxisName, Params, Threshold, Updates

Change = Callable[..., tuple[jax.Array, jax.Array]]
"""`(option, matrices, norm, limit) -> (clipped matrices, largest singular values)`."""


@strategy("max_norm")
def spectral_clip(
    max_norm: Threshold,
    *,
    response: Response = shrink,
    exact: bool = False,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the singular values of each matrix.

    $$ G = U \operatorname{diag}(\sigma) V^\top \leftarrow
       U \operatorname{diag}(\min(\sigma, \text{max\_norm})) V^\top $$

    For gradients in which a few directions carry the spike: the others keep their length, where
    `clip_by_norm` would shrink them all. CPU decompose each matrix; accelerators, where that is
    slow, find the same by products of matrices (Polar Express polynomials). The page of strategies
    has their error, and when the branches are taken.

    Args:
      max_norm: Largest singular value that passes, non-negative. 0 gives zeros; `inf` or None
        clips nothing and still measures. May be a schedule.
      response: From a singular value and the limit to a factor that never enlarges: `shrink`, one
        of the smooth responses, or `drop`. All but `shrink` need the decomposition.
      exact: Whether accelerators decompose as well.
      axis_name: See `global_norm`. Inside `shard_map` a leaf must hold whole matrices: it may be
        split along its leading axes (tell it by PartitionSpecs), and vectors along any.
      on_nonfinite: See `clip_to_limit`; a matrix with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one `clip_measure` for each matrix. The last two axes
      of an array are a matrix and all before them a stack; a vector is held by its norm. A matrix
      at or below the limit passes bit for bit.

    Raises:
      ValueError: For a threshold that may not be; inside `shard_map`, for split matrices.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.spectral_clip(1.0)
    >>> grads = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5]]), "b": jnp.array([3.0, 4.0])}
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates["w"].round(4), updates["b"])
    [[1.  0. ]
     [0.  0.5]] [0.6 0.8]

    Jiang, Semenov, Stich, *Enhancing LLM Training via Spectral Clipping* (SPECTRA), ICML 2026,
    https://arxiv.org/abs/2603.14315, the hard form. We depart in vectors, which it leaves alone.
    """
    check_response(response)
    change = _by_decomposition if exact or response is not shrink else _by_platform
    return _of_matrices(max_norm, change, response, response, axis_name, on_nonfinite)


@strategy("max_norm")
def soft_spectral_clip(
    max_norm: Threshold,
    *,
    iterations: int = 10,
    axis_name: AxisName = None,
    on_nonfinite: OnNonfinite = "zero",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the singular values of each matrix softly, by matrix products alone.

    $$ G \leftarrow (I + G G^\top / c^2)^{-1/2} G, \qquad
       \sigma \leftarrow \sigma / \sqrt{1 + \sigma^2 / c^2}, \quad c = \text{max\_norm} $$

    The clip of `spectral_clip(response=smooth_sqrt)` for 33 products of matrices: a coupled
    Newton-Schulz iteration whose steps are scaled by a bound of the smallest eigenvalue.

    Args:
      max_norm: The limit c that singular values approach, non-negative; see `spectral_clip`.
      iterations: Newton-Schulz steps, at least 1; 10 in the paper, enough for float32. A step
        brings the smallest singular value 2.6 times nearer; float64 takes 20.
      axis_name: See `spectral_clip`.
      on_nonfinite: See `clip_to_limit`; a matrix with a NaN becomes zero, the others pass.

    Returns:
      A transformation with a `ClipState` of one `clip_measure` for each matrix: a bound of the
      largest singular value. Within 0.3 % of c; nothing is enlarged, and nothing is above c by
      more than 0.2 %. The page of strategies says which small singular values become too small.

    Raises:
      ValueError: As `spectral_clip`; for `iterations` that are not a whole number of at least 1.

    >>> import gradclip_jax, jax.numpy as jnp
    >>> clip = gradclip_jax.soft_spectral_clip(1.0)
    >>> grads = jnp.array([[1.0, 0.0], [0.0, 100.0]])
    >>> updates, state = clip.update(grads, clip.init(grads))
    >>> print(updates.round(3))
    [[0.707 0.   ]
     [0.    1.   ]]

    Jiang, Semenov, Stich, *Enhancing LLM Training via Spectral Clipping* (SPECTRA), ICML 2026,
    https://arxiv.org/abs/2603.14315, the soft form. We depart in float32 for bfloat16, in scaled
    steps (10 plain ones serve a largest singular value up to 20 c), and in vectors.
    """
    iterations = check_whole_number("iterations", iterations)
    return _of_matrices(
        max_norm, _by_newton_schulz, iterations, smooth_sqrt, axis_name, on_nonfinite
    )


def _of_matrices(
    max_norm: Threshold,
    change: Change,
    option: Any,
    response: Response,
    axis_name: AxisName,
    on_nonfinite: OnNonfinite,
) -> optax.GradientTransformationExtraArgs:
    """A clip of singular values; `change` does it to a stack of matrices and measures them.

    Its option is handed on apart: two partials are never equal, and each clip would be compiled
    anew where it is called eagerly.
    """
    limit = constant(check_threshold("max_norm", max_norm))
    nonfinite_fill(on_nonfinite)

    def init(params: Params) -> ClipState:
        norms = measured_types(matrix_norms, params, axis_name)
        return initial_state(norms, init_threshold(limit), are_norms=False)

    def update(
        updates: Updates, state: ClipState, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del extra_args
        check_trees(updates, params)
        check_whole_matrices(updates, axis_name)
        value, limit_state = read_threshold(limit, state.limit_state)
        norms = matrix_norms(updates, axis_name=axis_name)
        check_norms(norms, state, are_norms=False)
        leaves, tree = jax.tree.flatten(updates)
        measured = [i for i, norm in enumerate(tree.flatten_up_to(norms)) if norm is not None]
        changed, *of_norms, flags = _clip_matrices(
            [replicate_matrices(to_device(leaves[i])) for i in measured],
            jax.tree.leaves(norms),
            value,
            change=change,
            option=option,
            response=response,
            on_nonfinite=on_nonfinite,
        )
        for i, leaf in zip(measured, changed, strict=True):
            leaves[i] = to_memory_of(reshard_like(leaf, leaves[i]), leaves[i])
        flags = any_device(flags, axis_name)
        return tree.unflatten(leaves), next_state(
            state,
            *(jax.tree.structure(norms).unflatten(arrays) for arrays in of_norms),
            clipped=flags[0],
            nonfinite=flags[1],
            limit_state=limit_state,
        )

    return transformation(init, update)


@compiled(static=("change", "option", "response", "on_nonfinite"))
def _clip_matrices(
    leaves: list[jax.Array],
    norms: list[jax.Array],
    limit: jax.Array,
    *,
    change: Change,
    option: Any,
    response: Response,
    on_nonfinite: OnNonfinite,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array], list[jax.Array], jax.Array]:
    """Clipped leaves; largest singular value, limit and factor of each matrix; two flags."""
    fill = nonfinite_fill(on_nonfinite)
    clipped, tops = list(leaves), list(norms)
    alike: dict[Any, list[Any]] = {}
    of_norms, _, limits, _ = factors_of_norms(norms, [limit] * len(norms), response, on_nonfinite)
    for i, (x, norm, factor) in enumerate(zip(leaves, norms, of_norms, strict=True)):
        if x.ndim < 2 or not x.size:
            (clipped[i],) = rescale([x], [factor])
        else:
            finite = jnp.isfinite(norm)
            clipped[i] = wide = jnp.where(finite, widen(x), 0)
            needs = finite & (factor.scale * factor.power != 1)
            alike.setdefault(jax.typeof(wide), []).append((i, (needs, wide, norm, limits[i])))
    for stack in alike.values():
        each, arrays = zip(*stack, strict=True)
        changed = _changed(functools.partial(change, option), arrays)
        for i, (needs, wide, norm, _), (result, top) in zip(each, arrays, changed, strict=True):
            result = jnp.where(jnp.isfinite(norm), jnp.where(needs, result, wide), fill)
            clipped[i], tops[i] = result.astype(leaves[i].dtype), jnp.where(needs, top, norm)
    _, of_tops, limits, flags = factors_of_norms(tops, limits, response, on_nonfinite)
    return clipped, tops, limits, of_tops, flags


def _changed(by: Callable[..., Any], arrays: Sequence[tuple[jax.Array, ...]]) -> list[Any]:
    """What `by` makes of arrays of one type, and of each largest singular value, if need be.

    One program serves all of them, one after the other: XLA would compile the same one again for
    each, which takes TPU most of a minute. The branches stay on GPU, though the host waits there:
    for the matrices of GPT-2 on an H200 they cost 2 ms, and the products that they save 150 ms.
    """

    def of_one(array: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        needs, *rest = array
        return jax.lax.cond(jnp.any(needs), by, lambda x, norm, _: (x, norm), *rest)

    def of_all() -> list[tuple[jax.Array, jax.Array]]:
        stacks = [jnp.stack(of_each) for of_each in zip(*arrays, strict=True)]
        clipped, tops = jax.lax.map(of_one, stacks)
        return [(clipped[i], tops[i]) for i in range(len(arrays))]

    if len(arrays) == 1:
        return [of_one(arrays[0])]
    needed = functools.reduce(jnp.logical_or, [jnp.any(needs) for needs, *_ in arrays])
    return jax.lax.cond(needed, of_all, lambda: [(x, norm) for _, x, norm, _ in arrays])


def _by_decomposition(
    response: Response, x: jax.Array, norm: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each singular value times its factor; and the largest."""
    down = powers_near(norm)
    u, sigma, vh = jnp.linalg.svd(scaled(x, *down), full_matrices=False)
    sigma = sigma[..., None, :] * (1 / down[0]) * (1 / down[1])
    factor = factors(sigma, limit, response)
    pass_all = jnp.all(factor.scale * factor.power == 1, axis=-1, keepdims=True)
    held = product(scaled(u, sigma * factor.power * factor.scale), vh)
    return jnp.where(pass_all, x, held), jnp.max(sigma, axis=-1, keepdims=True)


def _by_polynomials(
    response: Response, x: jax.Array, norm: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The hard form of it by products of matrices; and a bound of the largest."""
    del response
    return hold_singular_values(x, norm, limit)


def _by_platform(
    response: Response, x: jax.Array, norm: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.lax.platform_dependent(
        x,
        norm,
        limit,
        cpu=functools.partial(_by_decomposition, response),
        default=functools.partial(_by_polynomials, response),
    )


def _by_newton_schulz(
    iterations: int, x: jax.Array, norm: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(I + X X^T / c^2)^(-1/2) X; and a bound of the largest singular value.

    With b at least the largest eigenvalue of X X^T and s = 1 / sqrt(1 + b / c^2), that is
    s A^(-1/2) X with A = s^2 I + (1 - s^2) X X^T / b, whose eigenvalues lie between s^2 and 1.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if is_tall else x
    down = powers_near(norm)
    near = scaled(x, *down)
    gram = product(near, adjoint(near))
    moduli = jnp.abs(jax.lax.stop_gradient(gram))
    rows = jnp.max(jnp.sum(moduli, axis=-1, keepdims=True), axis=-2, keepdims=True)
    whole = jnp.sqrt(jnp.sum(moduli * moduli, axis=(-2, -1), keepdims=True))
    bound = jnp.minimum(rows, whole)
    bound = jnp.where(bound > 0, bound, 1)
    up = (1 / down[0], 1 / down[1])
    top = jnp.sqrt(bound) * up[0] * up[1]
    factor = factors(top, limit, smooth_sqrt)
    # What the rounding of A hides would be a negative eigenvalue, from which the steps diverge.
    hidden = 4 * math.sqrt(x.shape[-2]) * jnp.finfo(top.dtype).eps
    least = jnp.maximum((factor.scale * factor.power) ** 2, hidden)
    a = scaled(identities(gram), least) + scaled(gram, (1 - least) / bound)
    root = _inverse_root(a, jax.lax.stop_gradient(least), iterations)
    # One power each, so that neither product leaves the range.
    held = scaled(product(root, near), up[0] * factor.power, up[1] * factor.scale)
    return (jnp.swapaxes(held, -1, -2) if is_tall else held), top


def _inverse_root(a: jax.Array, least: jax.Array, iterations: int) -> jax.Array:
    """A^(-1/2) of matrices with eigenvalues between `least` and 1.

    Y and Z go to the root of A and its inverse. The eigenvalues of Z Y go to 1: with w their
    root, w to r w (3 - r^2 w^2) / 2, where r makes the most of all w being at least `low`.
    """
    three = 3 * identities(a)

    def step(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y, z, low = carry
        r = jnp.sqrt(3 / (1 + low + low * low))
        t = scaled(three - scaled(product(z, y), r * r), r / 2)
        return product(y, t), product(t, z), jnp.minimum(r * low * (3 - r * r * low * low) / 2, 1)

    # Split as `a` is, also where no mesh is set: there `zeros_like` (jax 0.12) makes whole arrays.
    one = varying_like(0 * a + identities(a), a)
    return jax.lax.fori_loop(0, iterations, step, (a, one, jnp.sqrt(least)))[1]
