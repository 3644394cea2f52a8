"""How well the memory serves: does recall work, does the window thrash, how much is within reach.

Promises: counts only, so that its size is bounded; every rate is 0.0 before the first event that it is
about. Whoever sees an event counts it.
"""

from __future__ import annotations

from pydantic import BaseModel


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
    prefetched: int = 0  # pages brought in before the call
    prefetched_used: int = 0  # of them those that the answer took something from

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

    def prefetch_hit_rate(self) -> float:
        """Used per prefetched page, 0..1."""
        return _ratio(self.prefetched_used, self.prefetched)

    def snapshot(self) -> dict[str, int | float]:
        """Counts and rates as plain values, for an API or a log."""
        return self.model_dump(exclude={"l0_tokens", "reachable_tokens"}) | {
            "recall_success_rate": self.recall_success_rate(),
            "thrash_index": self.thrash_index(),
            "effective_context": self.effective_context(),
            "prefetch_hit_rate": self.prefetch_hit_rate(),
        }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
