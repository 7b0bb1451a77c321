"""The public call: `jax.value_and_grad` of a sum over examples, each gradient clipped."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from .._checks import check_above, check_whole_number
from .._devices import sum_over_devices, varying_along
from .._export import exportable
from .._leaves import norm_dtype
from .._norms import global_norm
from .._rescale import Response, check_response, shrink
from .ghost import ghost_gradients
from .microbatches import Clipping, over_examples
from .modules import Argument, flax_nnx, split_argument
from .rule import Rule, Share, check_in_range, check_mask, check_max_norm, equal_shares
from .sharding import batch_axes, mesh_of, replicate_axis0
from .users import check_user_ids, over_users


@exportable
class PerExample(NamedTuple):
    """What was seen of the examples of a batch. These numbers are not private.

    Attributes:
      example_count: Number of examples (with `user_ids`, of users) that count, int32.
      clip_count: How many of them were finite and above the limit, int32; if an example has
        several norms, one for each of them.
      nonfinite_count: How many of them were not finite and added nothing, int32.
      norms: With `return_norms`, the norms before the clip, as `measure` returns them, each
        [examples]: 0 where the mask is False. With `user_ids`, those of users in the order
        of their ids, and then zeros. Otherwise None.
      aux: With `has_aux`, the auxiliary output of `fun`, with a leading axis [examples].
        Otherwise None.
    """

    example_count: jax.Array
    clip_count: Any
    nonfinite_count: jax.Array
    norms: Any
    aux: Any

    @property
    def above_count(self) -> Any:
        """How many examples were above the limit or not finite."""
        return jax.tree.map(lambda count: count + self.nonfinite_count, self.clip_count)


def value_and_grad(
    fun: Callable[..., Any],
    *,
    max_norm: Any,
    argnums: Any = 0,
    batch_argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    microbatch_size: int | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    mean_of: Any = None,
    measure: Callable[..., Any] = global_norm,
    share: Share = equal_shares,
    response: Response = shrink,
    pre_clip: Callable[[Any], Any] | None = None,
    average_users: bool = False,
    return_norms: bool = False,
    dtype: Any = None,
    ghost: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` of a sum over examples, each gradient clipped before the sum (DP-SGD).

    $$ \sum_i g_i \, \text{response}(\lVert g_i \rVert, C), \quad g_i = \nabla \text{fun}(w, x_i) $$

    Args:
      fun: As for `jax.value_and_grad`, of a batch of one example; it must not change a module.
      max_norm: C, the largest norm that one example adds: non-negative, or None for no limit.
      argnums: Which arguments to differentiate, by number or `nnx.DiffState`; also Flax modules.
      batch_argnums: Which arguments have examples along axis 0; by default all other positional.
      has_aux: Whether `fun` returns a pair, of which only the first is differentiated.
      keep_batch_dim: Whether `fun` gets an example as a batch of one, [1, ...], or as [...].
      microbatch_size: How many gradients exist at one time, at least 1; None for all.
      reduction: `"sum"`, or `"mean"` to divide by the number of examples (or users) that count.
      mean_of: Another number to divide a mean by, above 0: privacy needs a fixed one.
      measure: `global_norm`, `leaf_norms` or `functools.partial(group_norms, labels=...)`.
      share: How several norms share the squared limit: `per_example.equal_shares` or another.
      response: As in `clip_to_limit`, or `responses.automatic`; it must leave at most the limit.
      pre_clip: What to do with one gradient before its norm: from a tree to one of its shapes.
      average_users: Whether gradients of a user are averaged, not summed, before the clip.
      return_norms: Whether to return the norms before the clip.
      dtype: Of the gradients; by default that of each parameter.
      ghost: Whether to use ghost clipping for Flax layers where that takes less memory.
      axis_name: In `pmap`, or `shard_map` with `check_vma=False`: mesh axes of the batch, or `()`.

    Returns:
      `(*args, max_norm=None, mask=None, user_ids=None, **kwargs) -> ((value, seen), grads)`, with
      a `per_example.PerExample`. `mask` has a boolean for each example: those without True add
      nothing. Examples with one number in `user_ids` are clipped together, as one.

    Raises:
      ValueError: For an argument out of its range, or a batch that does not fit together.

    >>> import gradclip_jax, jax.numpy as jnp, numpy as np
    >>> f = gradclip_jax.per_example.value_and_grad(lambda w, x: (x @ w).sum(), max_norm=1.0)
    >>> (_, seen), grads = f(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.3, 0.0], [jnp.nan, 0.0]]))
    >>> print(np.asarray(grads).round(2), seen.clip_count, seen.nonfinite_count)
    [0.9 0.8] 1 1

    Abadi et al., *Deep Learning with Differential Privacy*, 2016, algorithm 1,
    https://arxiv.org/abs/1607.00133; of arrays and users, McMahan et al. 2018.
    """
    of_all_calls = check_max_norm(max_norm)
    diff = tuple(argnums) if isinstance(argnums, tuple | list) else (argnums,)
    if reduction not in ("sum", "mean"):
        raise ValueError(f'`reduction` must be "sum" or "mean", got {reduction!r}.')
    if mean_of is not None:
        if reduction == "sum":
            raise ValueError('`mean_of` must be given with `reduction="mean"` alone.')
        check_in_range("mean_of", check_above("mean_of", mean_of, 0))
    if microbatch_size is not None:
        check_whole_number("microbatch_size", microbatch_size)
    check_response(response)
    rule = Rule(measure, share, response)

    # Not `functools.wraps`: it takes three arguments more than `fun`.
    def clipped(
        *args: Any, max_norm: Any = None, mask: Any = None, user_ids: Any = None, **kwargs: Any
    ) -> Any:
        positions = _positions("argnums", [getattr(i, "argnum", i) for i in diff], len(args))
        batched = _batched(batch_argnums, positions, len(args))
        limit = of_all_calls if max_norm is None else check_max_norm(max_norm)
        which = dict(zip(positions, diff, strict=True))
        arguments = [
            split_argument(arg, which[i]) if i in which else Argument(arg)
            for i, arg in enumerate(args)
        ]
        batch = [jax.tree.map(jnp.asarray, args[i]) for i in batched]
        count = _length(batch, batched)
        mask = check_mask(mask, count)
        user_ids = check_user_ids(user_ids, count)
        several = isinstance(argnums, tuple | list)
        pieces = tuple(arguments[i].params for i in positions)
        params = jax.tree.map(_as_array, pieces if several else pieces[0])
        if count == 0:
            first_id = None if user_ids is None else jnp.zeros(1, jnp.int32)
            of_one = functools.partial(clipped, max_norm=max_norm, user_ids=first_id, **kwargs)
            return _of_no_example(of_one, args, batched, params)
        axes = batch_axes(params, [batch, mask, user_ids, limit, kwargs], axis_name)

        def value_of(
            params: Any, example: Sequence[Any], prepare: Callable[[Any], None] | None = None
        ) -> tuple[Any, Any]:
            parts = [argument.params for argument in arguments]
            for position, part in zip(positions, params if several else (params,), strict=True):
                parts[position] = part
            for position, part in zip(batched, example, strict=True):
                parts[position] = jax.tree.map(lambda x: x[None], part) if keep_batch_dim else part
            merged = [one.merged(part) for one, part in zip(arguments, parts, strict=True)]
            if prepare is not None:
                prepare(merged[positions[0]])
            result = fun(*merged, **kwargs)
            for argument, module in zip(arguments, merged, strict=True):
                argument.check_unchanged(module)
            return result if has_aux else (result, None)

        params = jax.tree.map(functools.partial(varying_along, axes=axes.varying), params)
        each = None
        is_direct = user_ids is not None or several or pre_clip is not None
        if ghost and not is_direct and arguments[positions[0]].graph is not None:
            one = jax.tree.map(lambda x: replicate_axis0(x)[0], batch)
            each = ghost_gradients(flax_nnx(), value_of, params, one)
        clip = Clipping(
            each=functools.partial(_direct, value_of) if each is None else each,
            params=params,
            max_norm=limit,
            rule=rule,
            pre_clip=pre_clip,
            average_users=average_users,
            return_norms=return_norms,
            axes=axes.varying,
        )
        mask = varying_along(mask, axes.varying)
        size = count if microbatch_size is None else min(microbatch_size, count)
        with mesh_of((params, batch)):
            if user_ids is None:
                sums = over_examples(clip, batch, mask, size)
            else:
                sums = over_users(clip, batch, mask, user_ids, size)
        # The only collective.
        value, totals, counts = sum_over_devices(sums.summed, axes.summed)
        seen = PerExample(*counts, norms=sums.norms, aux=sums.aux)
        if reduction == "mean":
            divisor = seen.example_count if mean_of is None else mean_of
            value, totals = _divided(value, totals, divisor)
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(totals, leaves, strict=True)
        grads = treedef.unflatten(
            [total.astype(leaf.dtype if dtype is None else dtype) for total, leaf in pairs]
        )
        return (value, seen), grads

    return clipped


def _as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _direct(value_of: Callable[..., Any], params: Any, examples: Any) -> Any:
    """`((values, aux), grads)` of examples, each gradient formed."""
    differentiated = jax.value_and_grad(value_of, has_aux=True)
    result, grads = jax.vmap(differentiated, in_axes=(None, 0))(params, examples)
    return result, grads


def _divided(value: Any, totals: list[jax.Array], number: Any) -> tuple[Any, list[jax.Array]]:
    """Means from sums; where nothing counts the sums, which are 0."""
    divisor = jnp.asarray(number).astype(norm_dtype())
    divisor = jnp.where(divisor > 0, divisor, 1)
    return value / divisor, [total / divisor.astype(total.dtype) for total in totals]


def _of_no_example(
    of_one: Callable[..., Any], args: Any, batched: Sequence[int], params: Any
) -> Any:
    """Zeros for an empty batch, which Poisson sampling may draw, shaped as those of one example."""

    def of_batch(batch: Any) -> Any:
        given = dict(zip(batched, batch, strict=True))
        return of_one(*(given.get(i, arg) for i, arg in enumerate(args)))

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype)

    def none(x: Any) -> jax.Array:
        return jnp.zeros((0, *x.shape[1:]), x.dtype)

    batch = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), part)
        for part in (jax.tree.map(jnp.asarray, args[i]) for i in batched)
    ]
    (value, seen), grads = jax.eval_shape(of_batch, batch)
    found = PerExample(
        *jax.tree.map(zeros, tuple(seen[:3])), *jax.tree.map(none, (seen.norms, seen.aux))
    )
    grads = jax.tree.map(lambda leaf, x: jnp.zeros_like(leaf, dtype=x.dtype), params, grads)
    return (zeros(value), found), grads


def _positions(name: str, given: Sequence[Any], count: int) -> list[int]:
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in given)
    if not whole or not all(-count <= i < count for i in given):
        raise ValueError(
            f"`{name}` must be among the {count} positional arguments of the call, "
            f"got {', '.join(map(repr, given))}."
        )
    return [i % count for i in given]


def _batched(batch_argnums: Any, positions: list[int], count: int) -> list[int]:
    if batch_argnums is None:
        found = [i for i in range(count) if i not in positions]
    else:
        several = isinstance(batch_argnums, tuple | list)
        found = _positions("batch_argnums", batch_argnums if several else (batch_argnums,), count)
    if not found or len({*found, *positions}) < len(found) + len(positions):
        raise ValueError(
            f"`batch_argnums` and `argnums` must name each argument once, and some batch, "
            f"got {tuple(found)} and {tuple(positions)}."
        )
    return found


def _length(batch: Sequence[Any], batched: Sequence[int]) -> int:
    """The number of examples, on which all arrays of the batch must agree."""
    shapes = [
        (i, leaf.shape)
        for i, part in zip(batched, batch, strict=True)
        for leaf in jax.tree.leaves(part)
    ]
    lengths = {shape[:1] for _, shape in shapes}
    if len(lengths) != 1 or lengths == {()}:
        found = ", ".join(f"argument {i} {list(shape)}" for i, shape in shapes)
        raise ValueError(
            "`batch_argnums` must name arguments whose arrays have the same number of examples "
            f"along their first axis, got {found or 'no array'}. What is not a batch goes by "
            "keyword."
        )
    return lengths.pop()[0]
