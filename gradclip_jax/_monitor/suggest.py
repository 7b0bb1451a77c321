"""Choose a limit from measured norms, and count how often other limits would have fired."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .._checks import check_between_0_and_1


class RuleOfThumb(NamedTuple):
    """Limits that a family of models is trained with."""

    family: str
    max_norms: tuple[float, ...]
    source: str


RULES_OF_THUMB = (
    RuleOfThumb("AWD-LSTM", (0.25,), "Merity et al. 2017, arXiv 1708.02182"),
    RuleOfThumb("PPO", (0.5,), "CleanRL, max_grad_norm"),
    RuleOfThumb("LSTM, music", (0.5, 1.0), "Bai et al. 2018, arXiv 1803.01271"),
    RuleOfThumb("GPT", (1.0,), "nanoGPT, grad_clip"),
    RuleOfThumb("LLaMA", (1.0,), "Touvron et al. 2023, arXiv 2302.13971"),
    RuleOfThumb("LSTM, summed loss", (5.0,), "Zaremba et al. 2014, arXiv 1409.2329"),
    RuleOfThumb("RNN, music", (8.0,), "Pascanu et al. 2013, arXiv 1211.5063"),
    RuleOfThumb("large LSTM, summed loss", (10.0,), "Zaremba et al. 2014, arXiv 1409.2329"),
)
"""Limits on the global norm. The losses are means over tokens or steps, or, where the family says
so, sums over the unrolled steps and means over the batch."""

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A limit, and the norms behind it; `print` shows all of it.

    Attributes:
      max_norm: The limit suggested, rounded to two digits.
      rate: Share of the norms above it, the clip rate to expect.
      candidates: Limits in ascending order, each with the share of norms above it; percentiles
        of the norms by default.
      rules: Usual limits of families of models, with their sources and the shares above them.
      count: Number of finite norms.
      nonfinite: Number of NaN and infinite norms, which are left out.
      smallest, median, mean, largest: Of the finite norms.
    """

    max_norm: float
    rate: float
    candidates: tuple[tuple[float, float], ...]
    rules: tuple[tuple[RuleOfThumb, tuple[float, ...]], ...]
    count: int
    nonfinite: int
    smallest: float
    median: float
    mean: float
    largest: float

    def __str__(self) -> str:
        """A page of text."""
        left_out = f"; {self.nonfinite} not finite, left out" if self.nonfinite else ""
        low, high = 0.5 * self.mean, 10 * self.mean
        lines = [
            f"max_norm={self.max_norm:g} would have clipped {percent(self.rate)} of {self.count} "
            f"norms",
            f"(smallest {self.smallest:.3g}, median {self.median:.3g}, largest "
            f"{self.largest:.3g}{left_out}).",
            "",
            "  max_norm  clip rate",
            *(f"{limit:>10.3g}{percent(rate):>11}" for limit, rate in self.candidates),
            "",
            "Usual limits, and how often they would have fired here:",
            "",
            "  max_norm  clip rate  where",
        ]
        for rule, rates in self.rules:
            for limit, rate in zip(rule.max_norms, rates, strict=True):
                where = f"{rule.family} ({rule.source})"
                lines.append(f"{limit:>10.3g}{percent(rate):>11}  {where}")
        lines.append(
            f"{low:>10.3g} to {high:.3g}: half to ten times the mean norm "
            "(Pascanu et al. 2013, section 3.2)"
        )
        return "\n".join(lines)


def suggest_max_norm(
    norms: Any, *, rate: float = 0.05, candidates: Sequence[float] | None = None
) -> Suggestion:
    r"""A limit for `clip_by_global_norm` from the norms of a run without a clip.

    $$ \text{max\_norm} = \min\!\Big( q_{1-r},\;
       q_{0.5} \cdot \big( q_{0.5} / q_{0.16} \big)^{3} \Big) $$

    with the quantiles q of the norms and the clip rate r. The second term is three deviations
    above the median of the logarithm, with the deviation of its lower half, which spikes cannot
    move. It is the smaller term when a part of the run has exploded.

    Use it after some hundred steps with `max_norm=None`, which measures and clips nothing.

    Args:
      norms: Non-negative norms, one for each step, in any shape: an array, a sequence, or
        `Monitor.norms["grad_norm"]`. NaN and infinite norms are left out and counted.
      rate: Share of the steps to clip, between 0 and 1. The default of 0.05 is ours.
      candidates: Limits whose clip rates are wanted; None for percentiles of the norms.

    Returns:
      A `monitor.Suggestion`; `print` compares it with usual limits of some families of models, with
      their sources, and how often each would have fired.

    Raises:
      ValueError: When no norm is finite, one is negative, or `rate` is not in (0, 1).

    >>> import gradclip_jax, numpy as np
    >>> norms = [1.0, 1.2, 0.8, 1.1, 10.0, 0.9, 1.0, np.nan, 1.3, 0.7]
    >>> suggestion = gradclip_jax.suggest_max_norm(norms, rate=0.2)
    >>> print(suggestion.max_norm, suggestion.nonfinite)
    1.2 1
    >>> print(gradclip_jax.suggest_max_norm(norms, candidates=[0.5, 5.0]).candidates)
    ((0.5, 1.0), (5.0, 0.1111111111111111))

    The last row that `print` shows, half to ten times the mean norm, is from Pascanu, Mikolov,
    Bengio, *On the difficulty of training recurrent neural networks*, ICML 2013,
    https://arxiv.org/abs/1211.5063, section 3.2; the formula is ours.
    """
    share = float(check_between_0_and_1("rate", rate))
    values = np.asarray(norms, np.float64).reshape(-1)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ValueError(f"`norms` must hold a finite norm, got {values.size} of which none is.")
    if finite.min() < 0:
        raise ValueError(f"`norms` must be non-negative, got {finite.min():g}.")
    low, median, high = np.quantile(finite, (0.16, 0.5, 1 - share)).tolist()
    spread = (median / low) ** 3 if low > 0 else math.inf
    limit = rounded(min(high, median * spread)) if median > 0 else rounded(high)
    if candidates is None:
        wanted = [rounded(x) for x in np.percentile(finite, PERCENTILES)]
    else:
        wanted = check_candidates(candidates)

    def rate_of(limit: float) -> float:
        return float(np.mean(finite > limit))

    return Suggestion(
        max_norm=limit,
        rate=rate_of(limit),
        candidates=tuple((limit, rate_of(limit)) for limit in sorted(set(wanted))),
        rules=tuple((rule, tuple(map(rate_of, rule.max_norms))) for rule in RULES_OF_THUMB),
        count=finite.size,
        nonfinite=values.size - finite.size,
        smallest=float(finite.min()),
        median=median,
        mean=float(finite.mean()),
        largest=float(finite.max()),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Fired:
    """When a limit would have acted.

    Attributes:
      max_norm: The limit.
      count: Number of steps with a norm above it.
      rate: Their share of the steps whose norm was finite.
      first_step: The first of them; None if there is none.
      steps: All of them, int64.
    """

    max_norm: float
    count: int
    rate: float
    first_step: int | None
    steps: np.ndarray


def fired_at(steps: np.ndarray, norms: np.ndarray, candidates: Sequence[float]) -> list[Fired]:
    """A dry run of some limits over measured norms."""
    finite = np.isfinite(norms)
    found = []
    for limit in check_candidates(candidates):
        above = steps[finite & (norms > limit)]
        rate = above.size / max(int(finite.sum()), 1)
        first = int(above[0]) if above.size else None
        found.append(Fired(limit, above.size, rate, first, above))
    return found


def check_candidates(candidates: Sequence[float]) -> list[float]:
    """Return the limits as floats; raise for one that is not valid."""
    limits = [float(limit) for limit in candidates]
    for limit in limits:
        if not limit >= 0:
            raise ValueError(f"`candidates` must be non-negative, got {limit}.")
    return limits


def rounded(x: float) -> float:
    """Two significant digits."""
    return float(f"{x:.2g}")


def percent(share: float) -> str:
    """A share for a table: 5 %, 0.3 %, and never 0 % for what did happen."""
    hundredths = 100 * share
    if 0 < hundredths < 0.1:
        return "< 0.1 %"
    return f"{hundredths:.1f} %" if 0 < hundredths < 10 else f"{hundredths:.0f} %"
