"""How well the memory serves: does recall work, does the window thrash, how much is within reach.

Promises: counts only, so that its size is bounded and two of them can be added; every rate is 0.0
before the first event that it is about. What to call an event is the caller's to know.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from proxy.memory.eviction import is_cooling
from proxy.memory.models import PageTableEntry

MAX_SOURCES = 16  # prefetch sources told apart; further ones are counted as OTHER_SOURCE
OTHER_SOURCE = "other"


class SourceMetrics(BaseModel):
    """What one prefetch source brought in, and how much of it was used."""

    model_config = ConfigDict(extra="forbid")

    prefetched: int = Field(default=0, ge=0)
    used: int = Field(default=0, ge=0)

    def hit_rate(self) -> float:
        """Used per prefetched page."""
        return _ratio(self.used, self.prefetched)


class UserExperienceMetrics(BaseModel):
    """The memory system's figures of merit, over as many turns as were recorded."""

    model_config = ConfigDict(extra="forbid")

    recalls: int = Field(default=0, ge=0)
    recalls_succeeded: int = Field(default=0, ge=0)
    faults: int = Field(default=0, ge=0)
    refaults: int = Field(default=0, ge=0)
    evictions: int = Field(default=0, ge=0)
    turns: int = Field(default=0, ge=0)
    l0_tokens: int = Field(default=0, ge=0)  # summed over turns
    reachable_tokens: int = Field(default=0, ge=0)  # summed over turns
    prefetch: dict[str, SourceMetrics] = Field(default_factory=dict)

    def record_recall(self, success: bool) -> None:
        """Something older was needed (a fault, a search): was it found?"""
        self.recalls += 1
        self.recalls_succeeded += bool(success)

    def record_fault(
        self, page: PageTableEntry | str, turn: int, refault: bool | None = None
    ) -> None:
        """A page is faulted in. Whether it is a refault is read from its entry as it stands before
        the fault is applied, unless it is said; of a bare id it must be said."""
        if refault is None:
            refault = isinstance(page, PageTableEntry) and is_cooling(page, turn)
        self.faults += 1
        self.refaults += refault

    def record_eviction(self, pages: int = 1) -> None:
        """So many pages left the window."""
        self.evictions += pages

    def record_turn(self, l0_tokens: int, reachable_tokens: int) -> None:
        """A turn ended: tokens in the window, and tokens of all pages that can be had, those of the
        window included."""
        self.turns += 1
        self.l0_tokens += l0_tokens
        self.reachable_tokens += reachable_tokens

    def record_prefetch(self, source: str, pages: int = 1, used: int = 0) -> None:
        """A source brought in pages, of which so many were used. What is used only later is told
        with `pages=0`."""
        if source not in self.prefetch and len(self.prefetch) >= MAX_SOURCES:
            source = OTHER_SOURCE
        counts = self.prefetch.setdefault(source, SourceMetrics())
        counts.prefetched += pages
        counts.used += used

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
        return {source: self.prefetch[source].hit_rate() for source in sorted(self.prefetch)}

    def merge(self, other: UserExperienceMetrics) -> UserExperienceMetrics:
        """Add another's counts to these; returns itself."""
        for name in type(self).model_fields:
            if name != "prefetch":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        for source, counts in sorted(other.prefetch.items()):
            self.record_prefetch(source, counts.prefetched, counts.used)
        return self

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
