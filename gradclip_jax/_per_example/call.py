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
from .._rescale import Response, shrink
from .ghost import ghost_gradients
from .microbatches import Clipping, over_examples
from .modules import Argument, flax_nnx, split_argument
from .rule import Rule, Share, check_in_range, check_mask, check_max_norm, equal_shares
from .sharding import batch_axes, mesh_of, replicate_axis0
from .users import check_user_ids, over_users

_TRACED = ("max_norm", "mask", "user_ids")


@exportable
class PerExample(NamedTuple):
    """What was seen of the examples of a batch. None of it is private.

    Attributes:
      example_count: Number of examples (with `user_ids`, of users) that count, int32.
      clip_count: How many of them were finite and above the limit, int32; if an example has
        several norms, one for each of them.
      nonfinite_count: How many of them were not finite and added nothing, int32.
      norms: With `return_norms`, the norms before the clip, as `measure` returns them, each
        [examples]: 0 where an example does not count. With `user_ids`, those of users in the order
        of their ids, and zeros behind them. Otherwise None.
      aux: With `has_aux`, what the loss returned beside its value, with a leading axis [examples].
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


def clipped_value_and_grad(
    loss: Callable[..., Any],
    max_norm: Any,
    *,
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
    r"""`jax.value_and_grad` of a sum over examples, the gradient of each of them clipped.

    $$ \sum_i g_i \cdot \text{response}(\lVert g_i \rVert, C), \qquad
       g_i = \nabla \, \text{loss}(w, x_i) $$

    For private training, and against single examples that lead astray. Only the gradients of one
    micro-batch exist at a time, so memory does not grow with the batch.

    Args:
      loss: As for `jax.value_and_grad`; its batch arguments come with a batch of one example.
      max_norm: C, the largest norm of what one example adds: non-negative, a number, a traced
        value or None for no limit. A call accepts another one: `f(..., max_norm=c)`.
      argnums: Which arguments to differentiate: a number or several, or `nnx.DiffState`s. Those
        that contain Flax NNX modules are differentiated as by `nnx.value_and_grad`, by default with
        respect to `nnx.Param`. The loss must not change the state of a module.
      batch_argnums: Which arguments have examples along the first axis of their arrays. By default
        all positional ones that are not differentiated; keyword arguments never do.
      has_aux: Whether the loss returns a pair, of which only the first is differentiated.
      keep_batch_dim: Whether the loss gets its example as a batch of one, [1, ...], or as [...]:
        then an example may be a batch itself, as all records of a user.
      microbatch_size: Number of examples whose gradients exist at one time, at least 1; None for
        all. If it does not divide the batch, that is padded. A multiple of the number of devices
        over which `jit` splits the batch, and there the devices meet once for each micro-batch; of
        those on one device inside `shard_map`, where they meet once. XLA on CPU runs convolutions
        in a loop slowly (https://github.com/jax-ml/jax/issues/12868): there one micro-batch is
        faster.
      reduction: `"sum"`, or `"mean"` to divide value and gradient by the number of examples that
        count, of users with `user_ids`.
      mean_of: For the mean, another number to divide by, above 0. Privacy needs a fixed one.
      measure: What is held to the limit: `global_norm`, or for several norms with a share of the
        limit each `leaf_norms`, or `functools.partial(group_norms, labels=...)`. It gets the norms
        of the arrays of an example, as a tree of scalars.
      share: How several norms share the squared limit: `equal_shares`, `size_shares`, or a
        function from their numbers of elements to numbers of sum 1.
      response: As in `clip_to_limit`, or `automatic`. What it lets through must be at most the
        limit; that of `shrink`, `normalize`, `smooth`..., `drop` and `automatic` is.
      pre_clip: What is done with the gradient of one example (of one user with `user_ids`) before
        its norm: a function from a tree to one of the same structure and shapes, as to leave
        arrays out or to scale them. Then `ghost` goes the direct way.
      average_users: Whether the gradients of a user are averaged, not summed, before the clip.
      return_norms: Whether to return the norms.
      dtype: Of the gradients; by default that of each parameter.
      ghost: Whether the gradients of kernels of `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Conv`,
        and of tables of `nnx.Embed`, stay two factors for each example, of which norm and sum
        follow: much less memory and time where an example has few positions (of time, of an
        image) and a layer has many units. Also inside an `nnx.RNN` with one of Flax's LSTM, GRU
        and simple cells, called with `initial_carry`. Other parameters, those used elsewhere too
        or inside other `nnx.scan`, `jit` and the like, and those for which it would not pay go the
        direct way, as all do with `user_ids`, several `argnums` and without modules.
      axis_name: Needed only inside `pmap`, or `shard_map` with `check_vma=False`: the mesh axes
        along which the batch is split, `()` for none.

    Returns:
      A function that returns `(value, seen), grads`, with a `PerExample` for `seen`, and accepts,
      beside the arguments of the loss and `max_norm`:

      | keyword | what |
      |---|---|
      | `mask` | which examples count, booleans [examples]: the others, as padding, add nothing |
      | `user_ids` | int32 [examples]: the examples of a user are clipped together, as one |

      Inside `shard_map` and `pmap` each device clips its own examples and results are those over
      all devices (norms and aux: of its own). There the examples of a user must be on one device.
      Under `jit` with explicit mesh axes each device computes all of what they cannot split: users,
      and micro-batches that are no multiple of the number of devices.

    Raises:
      ValueError: For an argument that may not be; for batch arguments of different lengths,
        parameters that are split inside `shard_map`, a missing `axis_name`, and a loss that
        changes the state of a module.

    The bound holds in float32 (float64 under x64), whatever the dtype of the parameters: norms are
    held to C (1 - 2^-16 - K 2^-23), K the number of arrays, so that with all roundings the
    norm of what an example adds is at most C, exactly; sums are in float32, too. Rounded to
    bfloat16, the sums with and without an example may differ by more than C, by one unit in the
    last place of each element: pass `dtype=jnp.float32` and add noise before rounding. An example
    of which the gradient has a NaN or infinity, or a norm that overflows, adds exactly nothing
    (its value is in the sum of values as it is).

    Ghost clipping keeps the bound for every finite input: a power of two for each position keeps
    all products in range, and the norm is taken larger by what rounding may hide where positions
    cancel (the docs of per-example clipping say why that is enough). With T positions, x_t and d_t
    the two factors at one, and S the sum of |x_t| |d_t|, that is the root of square + c S^2, and
    (T + 4) 2^-24 S; c is near 2^-16. It is about 1e-5 of the norm where nothing cancels.
    An example of which S overflows counts as not finite. Ghosts take the place of a
    gradient where 2 T^2 is at most its size, T the number of positions at which the parameter
    serves in one example: norms need two matrices [T, T] (Bu, Mao, Xu, *Scalable and Efficient
    Training of Large Convolutional Neural Networks with Differential Privacy*, 2022,
    https://arxiv.org/abs/2205.10683, section 4).

    With `user_ids` the batch is first sorted by them, and a user may have any number of examples:
    the gradient of one who is not done is carried from micro-batch to micro-batch. One example
    that is not finite drops its user.

    A batch of no examples, as Poisson sampling may draw, gives zeros and counts of 0. Parameters
    may be Python numbers.

    >>> import gradclip_jax, jax.numpy as jnp, numpy as np
    >>> def loss(w, x, y):
    ...     return ((x @ w - y) ** 2).mean()
    >>> f = gradclip_jax.clipped_value_and_grad(loss, 1.0, microbatch_size=2)
    >>> x, y = jnp.array([[3.0, 4.0], [0.1, 0.0], [jnp.nan, 0.0]]), jnp.array([1.0, 1.0, 1.0])
    >>> (value, seen), grads = f(jnp.zeros(2), x, y)
    >>> print(np.asarray(grads).round(2), seen.clip_count, seen.nonfinite_count)
    [-0.8 -0.8] 1 1

    Abadi et al., *Deep Learning with Differential Privacy*, 2016,
    https://arxiv.org/abs/1607.00133, algorithm 1; per array, McMahan et al. 2018 (see
    `equal_shares`). The gradients of users: McMahan et al. 2018, too.
    """
    given = check_max_norm(max_norm)
    diff = tuple(argnums) if isinstance(argnums, tuple | list) else (argnums,)
    if reduction not in ("sum", "mean"):
        raise ValueError(f'`reduction` must be "sum" or "mean", got {reduction!r}.')
    if mean_of is not None:
        if reduction == "sum":
            raise ValueError('`mean_of` must be given with `reduction="mean"` alone.')
        check_in_range("mean_of", check_above("mean_of", mean_of, 0))
    if microbatch_size is not None:
        check_whole_number("microbatch_size", microbatch_size)
    rule = Rule(measure, share, response)

    # Not `functools.wraps`: it takes three arguments more than the loss.
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        traced = {name: kwargs.pop(name, None) for name in _TRACED}
        positions = _positions("argnums", [getattr(i, "argnum", i) for i in diff], len(args))
        batched = _batched(batch_argnums, positions, len(args))
        limit = given if traced["max_norm"] is None else check_max_norm(traced["max_norm"])
        which = dict(zip(positions, diff, strict=True))
        arguments = [
            split_argument(arg, which[i]) if i in which else Argument(arg)
            for i, arg in enumerate(args)
        ]
        batch = [jax.tree.map(jnp.asarray, args[i]) for i in batched]
        count = _length(batch, batched)
        mask = check_mask(traced["mask"], count)
        ids = check_user_ids(traced["user_ids"], count)
        several = isinstance(argnums, tuple | list)
        pieces = tuple(arguments[i].params for i in positions)
        params = jax.tree.map(_as_array, pieces if several else pieces[0])
        if count == 0:
            names = {"max_norm": traced["max_norm"], "user_ids": ids}
            return _of_no_example(value_and_grad, args, {**kwargs, **names}, batched, params)
        axes = batch_axes(params, [batch, mask, ids, limit, kwargs], axis_name)

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
            result = loss(*merged, **kwargs)
            for argument, module in zip(arguments, merged, strict=True):
                argument.check_unchanged(module)
            return result if has_aux else (result, None)

        params = jax.tree.map(functools.partial(varying_along, axes=axes.varying), params)
        each = None
        direct = ids is not None or several or pre_clip is not None
        if ghost and not direct and arguments[positions[0]].graph is not None:
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
            if ids is None:
                sums = over_examples(clip, batch, mask, size)
            else:
                sums = over_users(clip, batch, mask, ids, size)
        # The only collective.
        value, totals, counts = sum_over_devices(sums.summed, axes.summed)
        seen = PerExample(*counts, norms=sums.norms, aux=sums.aux)
        if reduction == "mean":
            divisor = seen.example_count if mean_of is None else mean_of
            divisor = jnp.asarray(divisor).astype(norm_dtype())
            divisor = jnp.where(divisor > 0, divisor, 1)
            value = value / divisor
            totals = [total / divisor.astype(total.dtype) for total in totals]
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(totals, leaves, strict=True)
        grads = treedef.unflatten(
            [total.astype(leaf.dtype if dtype is None else dtype) for total, leaf in pairs]
        )
        return (value, seen), grads

    return value_and_grad


def _as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _of_no_example(
    function: Callable[..., Any], args: Any, kwargs: Any, batched: Sequence[int], params: Any
) -> Any:
    """Zeros, as Poisson sampling may draw no example: what one example would give tells which."""

    def of_one(batch: Any) -> Any:
        given = dict(zip(batched, batch, strict=True))
        ids = None if kwargs["user_ids"] is None else jnp.zeros(1, jnp.int32)
        one = [given.get(i, arg) for i, arg in enumerate(args)]
        return function(*one, **{**kwargs, "user_ids": ids})

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype)

    def none(x: Any) -> jax.Array:
        return jnp.zeros((0, *x.shape[1:]), x.dtype)

    batch = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), part)
        for part in (jax.tree.map(jnp.asarray, args[i]) for i in batched)
    ]
    (value, seen), grads = jax.eval_shape(of_one, batch)
    found = PerExample(
        *jax.tree.map(zeros, tuple(seen[:3])), *jax.tree.map(none, (seen.norms, seen.aux))
    )
    grads = jax.tree.map(lambda leaf, x: jnp.zeros_like(leaf, dtype=x.dtype), params, grads)
    return (zeros(value), found), grads


def _direct(value_of: Callable[..., Any], params: Any, examples: Any) -> Any:
    differentiated = jax.value_and_grad(value_of, has_aux=True)
    result, grads = jax.vmap(differentiated, in_axes=(None, 0))(params, examples)
    return result, grads


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
