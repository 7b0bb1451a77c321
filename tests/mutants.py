"""Faults that the tests must catch: one line of the library is broken at a time.

Run it by hand, `python tests/mutants.py`, for it takes many minutes. Each fault is put into a copy
of the package, and the tests of what it touches run until the first that fails. A fault that
survives is a claim without a test. What caught each fault stands in `mutants.md`.

To compare two suites, save the results of the first and give them to the second:

    python tests/mutants.py --suite old/tests --save before.json
    python tests/mutants.py --before before.json --out tests/mutants.md
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MOST_SECONDS = 1800  # a fault may make a test hang


class Mutant(NamedTuple):
    """A fault.

    `old` stands once in `file`, and `new` takes its place. `tests` are stems, the likeliest first:
    "norms" is every `test_norms.py` below the folder of the suite, "*laws" every `test_*laws.py`.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


NORMS = [
    Mutant(
        "the sums of a GPU: the plain one where it has overflowed",
        "_platforms.py",
        "jnp.where(scale < 1, down, jnp.where(scale > 1, up, plain))",
        "jnp.where(scale > 1, up, plain)",
        ("platforms",),
    ),
    Mutant(
        "the sums of a GPU: no bound, so that XLA folds the scales",
        "_safe.py",
        "jnp.clip(part * scale, -safe.up, safe.up)",
        "part * scale",
        ("platforms",),
    ),
    Mutant(
        "the sums of a GPU: the rows of one kind of batch are left out",
        "_reduce.py",
        "for batch in batches:",
        "for batch in batches[1:]:",
        ("platforms",),
    ),
    Mutant(
        "a state that keeps what it saw first",
        "_state.py",
        "return jnp.where(old == new, old, new)",
        "return old",
        ("strategy_laws", "metrics"),
    ),
    Mutant(
        "the limits of a stack in the order of another",
        "_platforms.py",
        "in zip(positions, *arrays, strict=True)",
        "in zip(positions[::-1], *arrays, strict=True)",
        ("platforms",),
    ),
    Mutant(
        "a missing psum",
        "_reduce.py",
        "totals = _at_once(functools.partial(collective, axis_name=split.reduced), totals)",
        "totals = list(totals)",
        ("devices", "hard_cases"),
    ),
    Mutant(
        "pmax for psum of the squares",
        "_platforms.py",
        "plan.over_devices(functools.partial(_bins, plan, branch=branch))",
        "plan.over_devices(functools.partial(_bins, plan, branch=branch), jax.lax.pmax)",
        ("devices", "hard_cases"),
    ),
    Mutant(
        "order 1: the larger of two parts over different mesh axes, not their sum",
        "_reduce.py",
        "return self.over_devices(of_shards)",
        "return self.over_devices(of_shards, jax.lax.psum, jnp.maximum)",
        ("devices", "hard_cases", "dual_norm", "norms"),
    ),
    Mutant(
        "order 1: moduli summed in bfloat16",
        "_safe.py",
        "return [jnp.abs(widen(leaf)) for leaf in _leaves(x)]",
        "return [jnp.abs(leaf) for leaf in _leaves(x)]",
        ("norms", "dual_norm", "*laws"),
    ),
    Mutant(
        "the real part alone for a complex leaf",
        "_safe.py",
        "[a.real, a.imag] if jnp.iscomplexobj(a)",
        "[a.real] if jnp.iscomplexobj(a)",
        ("norms", "spectral", "*laws"),
    ),
    Mutant(
        "a NaN in an imaginary part that is not seen",
        "_safe.py",
        "([a.real, a.imag] if jnp.iscomplexobj(a)",
        "([a.real] if jnp.iscomplexobj(a)",
        ("norms", "guards", "elementwise", "dual_norm", "classics", "*laws"),
    ),
    Mutant(
        "integers are scaled and counted",
        "_leaves.py",
        "jnp.issubdtype(dtype, jnp.inexact)",
        "jnp.issubdtype(dtype, jnp.number)",
        ("norms", "spectral", "*laws"),
    ),
    Mutant(
        "a plain sum of squares is believed below the safe range",
        "_safe.py",
        "self.low = float(info.tiny) / float(info.eps)",
        "self.low = float(info.tiny)",
        ("norms", "ghost", "*laws"),
    ),
    Mutant(
        "scaled up where it must be scaled down",
        "_safe.py",
        "jnp.where(plain > self.high, self.down, jnp.where(is_low, self.up, 1.0))",
        "jnp.where(plain > self.high, self.up, jnp.where(is_low, self.down, 1.0))",
        ("norms",),
    ),
    Mutant(
        "the device with the smaller norms is left out",
        "_safe.py",
        "hypot_of_norms(plain, small * safe.down)",
        "plain",
        ("devices", "hard_cases", "norms"),
    ),
    Mutant(
        "a group of leaves has the norm of the other labels",
        "_norms.py",
        "if label == name) for name in names)",
        "if label != name) for name in names)",
        ("norms", "classics"),
    ),
    Mutant(
        "a unit of a matrix is a row by default",
        "_norms.py",
        "return tuple(range(rank - 1)) if rank > 1",
        "return tuple(range(1, rank)) if rank > 1",
        ("norms", "*laws"),
    ),
    Mutant(
        "the size of a leaf is that on one device",
        "_norms.py",
        "* axis_size(reduced_axes(path, leaf, given, over, checked))",
        "* 1",
        ("devices", "skips", "classics"),
    ),
    Mutant(
        "the root has a derivative of NaN at zero",
        "_safe.py",
        "inside = jnp.where(x != 0, x, 1)\n    power",
        "inside = x\n    power",
        ("rescale", "windows", "*laws"),
    ),
    Mutant(
        "a replicated leaf is counted on every device",
        "_devices.py",
        "axes = axes & split if checked else axes",
        "axes = frozenset(axes)",
        ("devices", "hard_cases"),
    ),
    Mutant(
        "a flag of one device alone is not believed",
        "_devices.py",
        'sum_over_devices(flags.astype("int32"), axes) > 0',
        'sum_over_devices(flags.astype("int32"), axes) > 1',
        ("devices", "hard_cases", "spectral", "windows", "recurrences"),
    ),
    Mutant(
        "pmean for psum of clipped examples",
        "_devices.py",
        "return jax.lax.psum(tree, names)",
        "return jax.lax.pmean(tree, names)",
        ("per_example", "ghost"),
    ),
    Mutant(
        "a gradient in host memory comes out on the device",
        "_memory.py",
        "return _in_place(f, jax.memory.Space.Host, x, *numbers)",
        "return _in_place(f, jax.memory.Space.Device, x, *numbers)",
        ("devices", "hard_cases"),
    ),
    Mutant(
        "a gradient that is not averaged is clipped",
        "_state.py",
        "    check_averaged(updates, params)",
        "    del updates",
        ("devices", "hard_cases"),
    ),
]

RESCALING = [
    Mutant(
        ">= for > in `shrink`, so that a norm of 0 at a limit of 0 gives NaN",
        "_rescale.py",
        "over = norm > limit",
        "over = norm >= limit",
        ("rescale", "*laws"),
    ),
    Mutant(
        ">= for > in `drop`",
        "_rescale.py",
        "jnp.where(norm > limit, 0, 1)",
        "jnp.where(norm >= limit, 0, 1)",
        ("rescale", "*laws"),
    ),
    Mutant(
        "the wrong sign in the series of tanh",
        "_rescale.py",
        "1 - r * jnp.where(tiny, r, 0) / 3",
        "1 + r * jnp.where(tiny, r, 0) / 3",
        ("rescale", "*laws"),
    ),
    Mutant(
        "a factor of two steps that is applied twice",
        "_rescale.py",
        "Factor(response(norm, limit * raised / lowered), lowered / raised)",
        "Factor(response(norm, limit), lowered / raised)",
        ("rescale", "*laws"),
    ),
    Mutant(
        "an update that is not cast back",
        "_rescale.py",
        "(wide * power * scale).astype(x.dtype)",
        "(wide * power * scale)",
        ("rescale", "*laws"),
    ),
    Mutant(
        "`on_nonfinite` the other way round",
        "_rescale.py",
        'math.nan if on_nonfinite == "propagate"',
        'math.nan if on_nonfinite == "zero"',
        ("clip", "*laws"),
    ),
    Mutant(
        "lower and upper bound of a value swapped",
        "_rescale.py",
        "clipped = jnp.clip(wide, -low, high)",
        "clipped = jnp.clip(wide, -high, low)",
        ("classics", "*laws"),
    ),
    Mutant(
        "an infinite element is clipped to the bound",
        "_rescale.py",
        "return jnp.where(jnp.isfinite(wide), clipped",
        "return jnp.where(~jnp.isnan(wide), clipped",
        ("classics", "elementwise", "*laws"),
    ),
    Mutant(
        "the epsilon of PyTorch is left out",
        "_rescale.py",
        "norm = norm + eps if eps else norm",
        "norm = norm - eps if eps else norm",
        ("rescale", "interop", "parity"),
    ),
]

ENGINE = [
    Mutant(
        "`clip_count` counts a norm at its limit",
        "_clip.py",
        "jnp.any(jnp.isfinite(norm) & (norm > limit))",
        "jnp.any(jnp.isfinite(norm) & (norm >= limit))",
        ("clip", "metrics", "recurrences", "windows", "*laws"),
    ),
    Mutant(
        "`nonfinite_count` stands still",
        "_state.py",
        "increment_if(state.nonfinite_count, nonfinite)",
        "state.nonfinite_count",
        ("clip", "metrics", "*laws"),
    ),
    Mutant(
        "a counter overflows",
        "_state.py",
        "jnp.where(flag & (count < jnp.iinfo(count.dtype).max), count + 1, count)",
        "jnp.where(flag, count + 1, count)",
        ("clip",),
    ),
    Mutant(
        "a counter with a weak type",
        "_state.py",
        "clip_count=jnp.zeros((), jnp.int32),",
        "clip_count=jnp.asarray(0),",
        ("clip", "*laws"),
    ),
    Mutant(
        "one array twice in the initial state, which cannot be donated",
        "_state.py",
        "    def full(number: float) -> Any:",
        "    @functools.cache\n    def full(number: float) -> Any:",
        ("clip", "windows", "*laws"),
    ),
    Mutant(
        "the factor in the state lacks its second step",
        "_clip.py",
        "return factor._replace(scale=scale), scale * factor.power, limit",
        "return factor._replace(scale=scale), scale, limit",
        ("clip", "metrics", "rescale", "*laws"),
    ),
]

LIMITS = [
    Mutant(
        "a NaN enters what a limit has learned, as a norm of 0",
        "_limits/limit.py",
        "jax.tree.map(lambda n, old: jnp.where(finite, n, old), new, state)",
        "jax.tree.map(lambda n, old: n, new, state)",
        ("limits", "windows", "recurrences"),
    ),
    Mutant(
        "an infinite norm enters what a limit has learned",
        "_limits/limit.py",
        "finite = jnp.isfinite(norm)",
        "finite = ~jnp.isnan(norm)",
        ("limits", "windows", "recurrences"),
    ),
    Mutant(
        "a schedule is one step ahead",
        "_limits/limit.py",
        "_filled(limit(count), norm)",
        "_filled(limit(count + 1), norm)",
        ("limits", "*laws"),
    ),
    Mutant(
        "the clock of a schedule overflows",
        "_limits/limit.py",
        "optax.safe_increment(count)",
        "count + 1",
        ("limits", "clip", "*laws"),
    ),
    Mutant(
        "the larger of two limits for the smaller",
        "_limits/limit.py",
        "_joined(jnp.minimum, a, b)",
        "_joined(jnp.maximum, a, b)",
        ("limits", "clip", "recurrences"),
    ),
    Mutant(
        "the moving average takes in norms as they are",
        "_limits/ema.py",
        "x = jnp.minimum(norm, limit)",
        "x = norm",
        ("recurrences",),
    ),
    Mutant(
        "a warm-up of one step too many",
        "_limits/ema.py",
        "warm = state.steps >= jnp",
        "warm = state.steps > jnp",
        ("recurrences",),
    ),
    Mutant(
        "the deviation is that from the old mean",
        "_limits/zscore.py",
        "share = weight * (1 - weight) * jnp.where(warm, 1 - weight, 1)",
        "share = weight * (1 - weight)",
        ("recurrences",),
    ),
    Mutant(
        "a norm of 0 enters what a limit has learned",
        "_limits/moments.py",
        "jnp.where(norm > 0, n, old)",
        "n",
        ("recurrences", "adagc"),
    ),
    Mutant(
        "< for <= in the quantile",
        "_limits/running_quantile.py",
        "(norm <= limit)",
        "(norm < limit)",
        ("recurrences", "per_example"),
    ),
    Mutant(
        "two digits of the constant of the MAD swapped",
        "_limits/median.py",
        "SIGMA_OF_MAD = 1.4826",
        "SIGMA_OF_MAD = 1.4286",
        ("windows",),
    ),
    Mutant(
        "the last rank of a percentile off by one",
        "_limits/window.py",
        "jnp.maximum(jnp.sum(finite, axis=0) - 1, 0)",
        "jnp.maximum(jnp.sum(finite, axis=0), 0)",
        ("windows",),
    ),
]

STRATEGIES = [
    Mutant(
        "AutoClip leaves out the norm of this step",
        "_strategies/autoclip.py",
        "return percentile_of(norms, percentile), norms",
        "return percentile_of(norms[1:], percentile), norms",
        ("windows", "peers"),
    ),
    Mutant(
        "AdaGC: an array with a NaN stops the others",
        "_strategies/adagc.py",
        "jnp.where(jnp.isfinite(norm), norm, 0) for norm in norms",
        "norm for norm in norms",
        ("adagc",),
    ),
    Mutant(
        "AGC: eps is added to the norm of the weights",
        "_strategies/clip_by_param_norm.py",
        "* jnp.maximum(norm, floor)",
        "* (norm + floor)",
        ("adaptive_grad_clip", "*laws"),
    ),
    Mutant(
        "a block RMS without the size of the block",
        "_strategies/clip_by_block_rms.py",
        "limit * math.sqrt(size)",
        "limit + 0 * size",
        ("classics", "*laws"),
    ),
    Mutant(
        "Clippy: a weight that may not move at all bounds nothing",
        "_strategies/clippy.py",
        "jnp.where(u != 0, jnp.finfo(u.dtype).max, 0)",
        "0",
        ("clippy",),
    ),
    Mutant(
        "Clippy: the inverse of the root is applied once",
        "_strategies/clippy.py",
        "return Factor(scale, inverse), ratio",
        "return Factor(scale, one), ratio",
        ("clippy",),
    ),
    Mutant(
        "a ratio to the weights counts those that are frozen",
        "_strategies/clip_by_param_norm.py",
        "lambda u, w: w if is_gradient(u) else None",
        "lambda u, w: w",
        ("param_norm",),
    ),
    Mutant(
        "a norm at the second limit is dropped",
        "_strategies/clip_or_drop.py",
        "jnp.where(norm > largest, 0, limit)",
        "jnp.where(norm >= largest, 0, limit)",
        ("clip_or_drop", "*laws"),
    ),
    Mutant(
        "a block RMS pools the layers of a stack",
        "_norms.py",
        "return tuple(axis for axis in given if -leaf.ndim <= axis < leaf.ndim) or every",
        "return every",
        ("classics", "*laws"),
    ),
    Mutant(
        "StableAdamW: the second moment keeps the bias of its start",
        "_guards/update_rms.py",
        "nu = nu / -jnp.expm1(steps * math.log(decay))",
        "nu = nu * jnp.ones_like(steps)",
        ("update_rms",),
    ),
    Mutant(
        "StableAdamW: the method of a tuple is taken for its count",
        "_guards/update_rms.py",
        'node.count if "count" in node._fields else None',
        "node.count",
        ("update_rms",),
    ),
    Mutant(
        "AdaClip: the elements below the mean are shrunk, too",
        "_strategies/stable_spam.py",
        "(jnp.abs(widen(x)) <= limit) & is_finite",
        "(jnp.abs(widen(x)) < 0) & is_finite",
        ("stable_spam",),
    ),
    Mutant(
        "AdaGN: the decays of mean and square swapped",
        "_strategies/stable_spam.py",
        "weight, share = _weights(state.root, b2)",
        "weight, share = _weights(state.root, b1)",
        ("stable_spam",),
    ),
    Mutant(
        "ACClip: a NaN enters the momentum",
        "_strategies/acclip.py",
        "m = jnp.where(finite, _times(b1, m) + _times(1 - b1, x), m)",
        "m = _times(b1, m) + _times(1 - b1, x)",
        ("acclip",),
    ),
    Mutant(
        "ACClip: the momentum overflows where its sign turns",
        "_strategies/acclip.py",
        "_times(b1, m) + _times(1 - b1, x), m)",
        "m + _times(1 - b1, x - m), m)",
        ("acclip",),
    ),
    Mutant(
        "another growth by default",
        "_strategies/limit_norm_growth.py",
        "ratio: Threshold = 1.01,",
        "ratio: Threshold = 1.1,",
        ("recurrences",),
    ),
    Mutant(
        "SPAM: a warm-up of one step too many",
        "_strategies/spam_clip.py",
        "(state.step_count < warmup_steps)",
        "(state.step_count <= warmup_steps)",
        ("elementwise",),
    ),
    Mutant(
        "QK-Clip: the key takes the share of the query",
        "_strategies/qk_clip.py",
        '"key": gamma ** (1 - share),',
        '"key": gamma**share,',
        ("qk_clip",),
    ),
    Mutant(
        "QK-Clip: weights before the step are rescaled",
        "_strategies/qk_clip.py",
        "scale * (old + step.astype(wide)) - old",
        "scale * old - old + step.astype(wide)",
        ("qk_clip",),
    ),
    Mutant(
        "QK-Clip: no bound on how far one step shrinks a weight",
        "_strategies/qk_clip.py",
        "jnp.maximum(factors[view.role], least)",
        "factors[view.role]",
        ("qk_clip",),
    ),
    Mutant(
        "two digits of a coefficient of Muon swapped",
        "_balls.py",
        "3.4445, -4.7750, 2.0315",
        "3.4445, -4.7750, 2.0135",
        ("dual_norm",),
    ),
    Mutant(
        "singular values lack the second step of their factor",
        "_strategies/spectral_clip.py",
        "scaled(u, sigma * factor.power * factor.scale)",
        "scaled(u, sigma * factor.scale)",
        ("spectral",),
    ),
    Mutant(
        "what is below the limit is not undone by its last power",
        "_polynomials.py",
        "INVERSE = (2.33264254, 0.219556821, 0.0561162975)",
        "INVERSE = (2.33264254, 0.219556821, 0.0)",
        ("spectral",),
    ),
    Mutant(
        "the limit is looked for a step too early",
        "_polynomials.py",
        "after = jnp.where(i == approached + 1, gram, after)",
        "after = jnp.where(i == approached, gram, after)",
        ("spectral",),
    ),
]

GUARDS = [
    Mutant(
        "the state of the optimizer advances in a skipped step",
        "_guards/unless.py",
        "jax.tree.map(_as_kind, state, kept)",
        "jax.tree.map(_as_kind, move(*data)[1], kept)",
        ("skips",),
    ),
    Mutant(
        "an accelerator selects the updates of a skipped step",
        "_guards/unless.py",
        "jax.lax.select(bad, old, x)",
        "x",
        ("skips",),
    ),
    Mutant(
        "the derivative of a skipped step is that of the optimizer",
        "_guards/unless.py",
        "move(skipped, *_unread(skipped, read))",
        "move(*data)",
        ("skips",),
    ),
    Mutant(
        "skips in a row are never reset",
        "_guards/skip.py",
        "jnp.where(is_spike, increment_if(state.skips_in_a_row, skipped), 0)",
        "increment_if(state.skips_in_a_row, skipped)",
        ("skips",),
    ),
    Mutant(
        ">= for > in what a spike is",
        "_guards/skip.py",
        "norm > highest_norm",
        "norm >= highest_norm",
        ("skips", "peers"),
    ),
    Mutant(
        "a loss of NaN is not skipped",
        "_guards/skip.py",
        "finite & jnp.isfinite(loss), is_high",
        "finite, is_high",
        ("skips",),
    ),
    Mutant(
        "a spike of the norm or the loss alone is not skipped",
        "_guards/skip.py",
        "is_high | (loss > highest_loss)",
        "is_high & (loss > highest_loss)",
        ("skips",),
    ),
    Mutant(
        "the sum of the losses of all devices for their mean",
        "_guards/skip.py",
        "return (above - below) / leaf_sizes(value, axis_name=mesh_axes)",
        "return above - below",
        ("skips",),
    ),
    Mutant(
        "the carry has the wrong sign",
        "_guards/error_feedback.py",
        "rest = wanted - clipped.astype(wanted.dtype)",
        "rest = clipped.astype(wanted.dtype) - wanted",
        ("error_feedback",),
    ),
    Mutant(
        "Clip21: an infinite gradient moves the estimate",
        "_guards/clip21.py",
        "kept = jnp.isfinite(new) & jnp.isfinite(gradient)",
        "kept = jnp.isfinite(new)",
        ("error_feedback",),
    ),
    Mutant(
        "the cotangent passes as it is",
        "_backward.py",
        "return clip.update(cotangent, clip.init(cotangent))[0]",
        "return cotangent",
        ("backward",),
    ),
]

PER_EXAMPLE = [
    Mutant(
        "the mean divides by examples that do not count, too",
        "_per_example/call.py",
        "divisor = seen.example_count if mean_of is None",
        "divisor = count if mean_of is None",
        ("per_example",),
    ),
    Mutant(
        "the mask is ignored in the sum of the gradients",
        "_per_example/rule.py",
        "keep = mask & finite",
        "keep = finite",
        ("per_example",),
    ),
    Mutant(
        "examples that fill the last micro-batch count twice",
        "_per_example/microbatches.py",
        "(jnp.arange(steps * size) < count).reshape(size, steps) & in_columns(mask)",
        "in_columns(mask)",
        ("per_example",),
    ),
    Mutant(
        "an example may add more than the limit, by rounding",
        "_per_example/rule.py",
        "limit * (1 - _margin(len(leaves)))",
        "limit",
        ("per_example",),
    ),
    Mutant(
        "noise for a sum in a mean",
        "_per_example/noise.py",
        "jnp.where(z == 0, 0, z * c / n)",
        "jnp.where(z == 0, 0, z * c)",
        ("per_example",),
    ),
    Mutant(
        "the same noise in each array",
        "_per_example/noise.py",
        "_noised(leaf, deviation, keys[i])",
        "_noised(leaf, deviation, keys[0])",
        ("per_example",),
    ),
    Mutant(
        "the noise of a count is taken for twice as large",
        "_per_example/noise.py",
        "(z**-2 - (2 * deviation) ** -2)",
        "(z**-2 - (4 * deviation) ** -2)",
        ("per_example",),
    ),
    Mutant(
        "a ghost norm without the products of different positions",
        "_per_example/ghost_layers.py",
        "squares = jnp.sum(inputs * outputs, axis=(1, 2))",
        "squares = jnp.sum(jnp.diagonal(inputs * outputs, axis1=1, axis2=2), axis=1)",
        ("ghost",),
    ),
    Mutant(
        "a ghost norm whose positions all have the scale of the largest",
        "_per_example/ghost_layers.py",
        "of_inputs = (both - whole[:, None]) // 2 - inputs",
        "of_inputs = jnp.zeros_like(both) - jnp.max(inputs, axis=1, keepdims=True)",
        ("ghost",),
    ),
    Mutant(
        "a ghost norm that rounding may make too small",
        "_per_example/ghost_layers.py",
        "lost = unit * (roundings + 2 * positions + 8)",
        "lost = 0 * roundings",
        ("ghost",),
    ),
]

SEEING = [
    Mutant(
        "what a guard met hides what the clip met",
        "_metrics.py",
        "here if known is None else known + here",
        "here",
        ("metrics",),
    ),
    Mutant(
        "the largest factor of several groups for the smallest",
        "_metrics.py",
        "return jnp.min(jnp.stack(smallest))",
        "return jnp.max(jnp.stack(smallest))",
        ("metrics",),
    ),
    Mutant(
        "a norm of another order is called the norm",
        "_measures.py",
        "(known and is_euclidean)",
        "known",
        ("metrics",),
    ),
    Mutant(
        "the norm of a stack is that of the layers of one device",
        "_per_layer.py",
        "    return given[axis]",
        "    return None",
        ("per_layer",),
    ),
    Mutant(
        "norms of layers stay those of the first update",
        "_clip.py",
        "overwritten(state.layer_norms, layers)",
        "state.layer_norms",
        ("per_layer",),
    ),
    Mutant(
        "two clips under one name tell the last alone",
        "_metrics.py",
        "if not names or all_names.count(names) > 1:",
        "if not names:",
        ("metrics",),
    ),
    Mutant(
        "a clip that begins to keep norms of layers forgets its limit",
        "_upgrade.py",
        "x._replace(layer_norms=()) if _is_state(x) else x",
        "x",
        ("upgrade",),
    ),
    Mutant(
        "a clip of one group in many is taken for one of all",
        "_monitor/conditions.py",
        'rate = min(rate, recent.increase_of("clip_count") / updates)',
        'rate = max(rate, recent.increase_of("clip_count") / updates)',
        ("monitor",),
    ),
    Mutant(
        "norms that stand still while gradients are accumulated are called frozen",
        "_monitor/wiring.py",
        "STEPS = 100",
        "STEPS = 10",
        ("monitor", "no_op_clip"),
    ),
]

ELSEWHERE = [
    Mutant(
        "a threshold of 0 clips everything to 0, where Keras does not clip",
        "_interop/frameworks.py",
        "float(value) <= 0)",
        "float(value) < 0)",
        ("interop",),
    ),
    Mutant(
        "another norm by default than in Transformers",
        "_interop/frameworks.py",
        "max_grad_norm: Threshold = 1.0,",
        "max_grad_norm: Threshold = 5.0,",
        ("interop",),
    ),
    Mutant(
        "a config gets another ball",
        "_interop/config.py",
        "return BALLS[_checked(value, BALLS, name, where)]",
        'return BALLS["spectral"]',
        ("interop",),
    ),
]

MUTANTS = [
    *NORMS, *RESCALING, *ENGINE, *LIMITS, *STRATEGIES, *GUARDS, *PER_EXAMPLE, *SEEING, *ELSEWHERE,
]  # fmt: skip


class Result(NamedTuple):
    """What caught a fault, empty where nothing did, and after how many seconds."""

    what: str
    file: str
    caught: str
    seconds: int


def main() -> int:
    """Break the library, and say by what each fault was caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", type=Path, default=ROOT / "tests", help="folder of the tests")
    parser.add_argument("--only", default="", help="faults whose description or file has this")
    parser.add_argument("--save", type=Path, help="write the results as JSON")
    parser.add_argument("--before", type=Path, help="results of another suite, for the table")
    parser.add_argument("--out", type=Path, help="write a table in Markdown")
    parser.add_argument("--cache", type=Path, help="folder of compiled programs, to be kept")
    options = parser.parse_args()
    suite = options.suite.resolve()
    chosen = [one for one in MUTANTS if options.only in one.what or options.only in one.file]
    for mutant in MUTANTS:
        broken(mutant)
        files_of(suite, mutant)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        cache = (options.cache or folder / "compiled").resolve()
        results = [result_of(mutant, suite, folder, cache) for mutant in chosen]
        results = believed(results, suite, folder, cache)
    if options.save:
        options.save.write_text(json.dumps([one._asdict() for one in results], indent=1) + "\n")
    if options.out:
        before = json.loads(options.before.read_text()) if options.before else []
        options.out.write_text(table(results, [Result(**one) for one in before]))
    caught = sum(bool(one.caught) for one in results)
    print(f"{caught} of {len(results)} caught")
    return int(caught < len(results))


def broken(mutant: Mutant) -> str:
    """The text of the file with the fault."""
    text = (ROOT / "gradclip_jax" / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        sys.exit(
            f"{mutant.what}: `{mutant.old}` must stand once in {mutant.file}, "
            f"got {text.count(mutant.old)}"
        )
    return text.replace(mutant.old, mutant.new)


def files_of(suite: Path, mutant: Mutant) -> list[Path]:
    """The tests of a fault, in the order in which they run."""
    found = []
    for stem in mutant.tests:
        files = sorted(suite.rglob(f"test_{stem}.py"))
        if not files:
            sys.exit(f"{mutant.what}: `tests` must name files in {suite}, got {stem}")
        found += files
    return found


def result_of(mutant: Mutant, suite: Path, folder: Path, cache: Path) -> Result:
    """Break a copy of the package, and run the tests until one fails."""
    copy = fresh_copy(folder)
    (copy / mutant.file).write_text(broken(mutant), encoding="utf-8")
    start = time.monotonic()
    failed = failures(["-x", *map(str, files_of(suite, mutant))], suite, copy, cache)
    seconds = round(time.monotonic() - start)
    caught = failed[0] if failed else ""
    said = f"caught by {caught} in {seconds} s" if caught else f"SURVIVED {seconds} s"
    print(f"{mutant.what}: {said}", flush=True)
    return Result(mutant.what, mutant.file, caught, seconds)


def believed(results: list[Result], suite: Path, folder: Path, cache: Path) -> list[Result]:
    """The results, without those of tests that fail in the library as it is.

    Only tests that caught a fault must pass there, so nothing else is run.
    """
    names = sorted({one.caught for one in results if "::" in one.caught})
    failed = failures(names, suite, fresh_copy(folder), cache) if names else []
    for name in failed:
        print(f"{name} fails without a fault, too: it catches nothing")
    return [one._replace(caught="") if one.caught in failed else one for one in results]


def fresh_copy(folder: Path) -> Path:
    """A copy of the package without a fault."""
    copy = folder / "gradclip_jax"
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(ROOT / "gradclip_jax", copy, ignore=shutil.ignore_patterns("*.pyc"))


def failures(arguments: list[str], suite: Path, copy: Path, cache: Path) -> list[str]:
    """Names of the tests that fail when they import the copy."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy.parent),
        # Files of one size and second would be taken for one another.
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        # -P: not the package in the working directory.
        return subprocess.run(
            [sys.executable, "-P", *command],
            cwd=suite.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )

    find = "import importlib.util; print(importlib.util.find_spec('gradclip_jax').origin)"
    found = run("-c", find).stdout.strip()
    if found != str(copy / "__init__.py"):
        sys.exit(f"the tests must import the copy in {copy}, got {found or 'nothing'}")
    options = ["-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    try:
        done = run("-m", "pytest", *options, *arguments)
    except subprocess.TimeoutExpired:
        return [f"its time of more than {MOST_SECONDS} s"]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != bool(failed):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed


def table(results: list[Result], before: list[Result]) -> str:
    """The results in Markdown, beside those of another suite."""
    known = {one.what: one for one in before}
    rows = [["fault", "file", *(["caught before"] if known else []), "caught by"]]
    rows.append(["---"] * len(rows[0]))
    for one in results:
        both = [*([known.get(one.what)] if known else []), one]
        cells = [cell(each.caught) if each else "not run" for each in both]
        rows.append([one.what, f"`{one.file}`", *cells])
    caught = sum(bool(one.caught) for one in results)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    head = "Faults that were put into the library, each with the first test that failed.\n"
    return "\n".join([head, *lines, "", f"{caught} of {len(results)} caught.", ""])


def cell(caught: str) -> str:
    """The name of a test without its folders."""
    file, _, test = caught.partition("::")
    name = f"{Path(file).name}::{test}" if test else caught
    return f"`{name}`".replace("|", r"\|") if caught else "**survived**"


if __name__ == "__main__":
    sys.exit(main())
