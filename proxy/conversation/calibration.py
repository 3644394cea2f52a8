"""What upstream's bill says about our count: one factor per model, learned from `usage`. Pure.

Promises: the factor says nothing (1.0) before MIN_SAMPLES bills; it moves in steps of 1/64, is
looked at anew only after 5, 8, 16, 32, 64 and then each 64 bills, and moves only when the evidence
left its step clearly: budgets follow it, and prompts must not flap. It does not depend on the order
of the bills between two looks. Memory is bounded.

Which way to err: counting too much wastes window; counting too little breaks the window's budget
(invariant 3), or makes upstream cut a prompt silently. So above 1.0 the factor follows the evidence
for every model. Below 1.0 it follows it only for a model whose encoding we guessed; where we know
the encoding (`exact`), a low bill mostly means one kind of request (a tool array billed below its
rule), and the factor goes below 1.0 only when nine bills in ten are clearly below our count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

MIN_TOKENS = 200  # smaller requests are mostly overhead, and say little about the encoding
MIN_RATIO, MAX_RATIO = 0.25, 4.0  # outside: not this model's bill, or not a bill at all
MIN_SAMPLES = 5
MIN_SAMPLES_TO_LOWER = 16  # of an exact encoding
MAX_SAMPLES = 256  # then the histogram is halved: older bills fade
STEPS = 64  # the factor is a multiple of 1/64
_DEAD_BAND = 0.75 / STEPS  # relative above 1.0; half a step would flap between two neighbours
_BINS_PER_E = 256  # ratios are kept as a histogram of their logarithm: bins of 0.4%
TRUNCATED_BELOW = 0.6  # no tokenizer is that much denser than the one that we count with


@dataclass(frozen=True, slots=True)
class Calibration:
    """Bills of one model over our counts. `bins` are (log bin, how many), sorted; `samples` is how
    many bills were taken in all; `factor` is billed / counted, to multiply counts (or divide
    budgets) by.
    """

    exact: bool = False
    samples: int = 0
    factor: float = 1.0
    bins: tuple[tuple[int, int], ...] = ()

    @property
    def ratio(self) -> float:
        """The estimate behind the factor: the mean of the middle half of the bills' ratios."""
        return _middle_mean(self.bins) if self.bins else 1.0

    def observe(self, counted_tokens: int, billed_tokens: int) -> Calibration:
        """With one more bill; `self` when it teaches nothing: small, absurd, or truncated."""
        if counted_tokens < MIN_TOKENS or billed_tokens < 1:
            return self
        ratio = billed_tokens / counted_tokens
        # Not by a factor above 1: two odd bills among the first would make all true ones look cut.
        cut = ratio < TRUNCATED_BELOW * min(1.0, self.factor)
        if not MIN_RATIO <= ratio <= MAX_RATIO or cut:
            return self
        bins = dict(self.bins)
        at = round(math.log(ratio) * _BINS_PER_E)
        bins[at] = bins.get(at, 0) + 1
        if sum(bins.values()) > MAX_SAMPLES:
            bins = _halved(bins)
        more = replace(self, samples=self.samples + 1, bins=tuple(sorted(bins.items())))
        return replace(more, factor=more._decided()) if _is_look(more.samples) else more

    def truncated(self, counted_tokens: int, billed_tokens: int) -> bool:
        """Whether upstream cut the prompt silently: it billed far less than was sent."""
        if counted_tokens < MIN_TOKENS or billed_tokens < 1:
            return False  # a bill of 0 is a missing one
        return billed_tokens < TRUNCATED_BELOW * counted_tokens * self.factor

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "exact": self.exact,
            "samples": self.samples,
            "factor": self.factor,
            "bins": [list(pair) for pair in self.bins],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration of `to_dict`. ValueError for anything else."""
        try:
            bins = tuple((int(at), int(count)) for at, count in data["bins"])
            out = cls(bool(data["exact"]), int(data["samples"]), float(data["factor"]), bins)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a calibration: {error!r}") from error
        if not MIN_RATIO <= out.factor <= MAX_RATIO or out.samples < sum(n for _, n in bins):
            raise ValueError("not a calibration: values out of range")
        return out

    def _decided(self) -> float:
        target = min(MAX_RATIO, max(MIN_RATIO, self.ratio))
        if self.exact and target < 1.0 and not self._surely_low():
            target = 1.0
        if abs(target - self.factor) <= _DEAD_BAND * max(1.0, target):
            return self.factor
        return round(target * STEPS) / STEPS

    def _surely_low(self) -> bool:
        return (
            self.samples >= MIN_SAMPLES_TO_LOWER
            and _quantile(self.bins, 0.9) <= 1.0 - 1.0 / STEPS
        )


def _is_look(samples: int) -> bool:
    """Whether the factor is decided anew after this many bills."""
    if samples < STEPS:
        return samples == MIN_SAMPLES or (samples >= 8 and samples & (samples - 1) == 0)
    return samples % STEPS == 0


def _halved(bins: Mapping[int, int]) -> dict[int, int]:
    """Every second bill in order of ratio: the same distribution, half as heavy."""
    out: dict[int, int] = {}
    passed = 0
    for at, count in sorted(bins.items()):
        kept = (passed + count) // 2 - passed // 2
        passed += count
        if kept:
            out[at] = kept
    return out


def _ratios(bins: Iterable[tuple[int, int]]) -> Iterable[tuple[float, int]]:
    return ((math.exp(at / _BINS_PER_E), count) for at, count in bins)


def _middle_mean(bins: tuple[tuple[int, int], ...]) -> float:
    """Mean without the lowest and the highest quarter; a bin is cut where a quarter ends."""
    total = sum(count for _, count in bins)
    low, high = total / 4, total * 3 / 4
    weight = amount = passed = 0.0
    for ratio, count in _ratios(bins):
        inside = min(high, passed + count) - max(low, passed)
        if inside > 0:
            weight += inside
            amount += inside * ratio
        passed += count
    return amount / weight


def _quantile(bins: tuple[tuple[int, int], ...], share: float) -> float:
    total = sum(count for _, count in bins)
    passed = 0
    for ratio, count in _ratios(bins):
        passed += count
        if passed >= share * total:
            return ratio
    return 1.0
