"""How well the memory serves: does recall work, does the window thrash, how much is within reach.

Promises: counts only, so that its size is bounded; every rate is 0.0 before the first event that it is
about. Whoever sees an event counts it.
"""

from __future__ import annotations

from pydantic import BaseModel, Field


class SourceMetrics(BaseModel):
    """What one prefetch source brought in, and how much of it was used."""

    prefetched: int = 0
    used: int = 0


class UserExperienceMetrics(BaseModel):
    """The memory system's figures of merit, over as many turns as were counted."""

    recalls: int = 0  # faults and searches: something older was needed
    recalls_succeeded: int = 0
    faults: int = 0  # pages faulted in
    refaults: int = 0  # of them those that had left the window only lately
    evictions: int = 0  # pages
    turns: int = 0
    l0_tokens: int = 0  # in the window, summed over turns
    reachable_tokens: int = 0  # of all pages that can be had, the window's included, summed over turns
    prefetch: dict[str, SourceMetrics] = Field(default_factory=dict)  # by `PrefetchReport.source`

    def recall_success_rate(self) -> float:
        """Recalls that found what was needed, 0..1."""
        return _ratio(self.recalls_succeeded, self.recalls)

    def thrash_index(self) -> float:
        """Refaults per fault, 0..1: 0 is a window that never lets go of what is needed soon."""
        return _ratio(self.refaults, self.faults)

    def effective_context(self) -> float:
        """How many times its window a conversation reaches: tokens within reach per token of the
        window, over all turns."""
        return _ratio(self.reachable_tokens, self.l0_tokens)

    def prefetch_hit_rates(self) -> dict[str, float]:
        """Used per prefetched page, by source, in the order of their names."""
        return {name: _ratio(c.used, c.prefetched) for name, c in sorted(self.prefetch.items())}

    def snapshot(self) -> dict[str, int | float | dict[str, float]]:
        """Counts and rates as plain values, for an API or a log."""
        counts: dict[str, int | float | dict[str, float]] = dict(
            self.model_dump(exclude={"prefetch", "l0_tokens", "reachable_tokens"})
        )
        return counts | {
            "recall_success_rate": self.recall_success_rate(),
            "thrash_index": self.thrash_index(),
            "effective_context": self.effective_context(),
            "prefetch_hit_rates": self.prefetch_hit_rates(),
        }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
