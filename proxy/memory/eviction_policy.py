"""Who leaves the window. (How many leave is `working_set`'s to say.)

Promises, for every policy, checked by one contract test: a pure function of entry and turn; a
higher score means keep; a pinned page scores infinity and every other a finite number; a page
faulted in during the last `fault_protection_turns` turns scores above every unprotected one; being
used later or being more important never lowers a score. Refaults count through importance, which
the page table raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from proxy.memory.models import Modality, PageTableEntry, PageType

FAULT_PROTECTION_TURNS = 2
_PROTECTED = 1000.0  # above anything `_recency` and the weights can reach
_HALF_LIFE_TURNS = 16.0

# Claims are what a conversation came to; summaries and procedures can be rebuilt, at a price.
_TYPE_WEIGHT = {
    PageType.TRANSCRIPT: 1.0,
    PageType.ARTIFACT: 1.0,
    PageType.SUMMARY: 1.5,
    PageType.PROCEDURE: 1.5,
    PageType.INDEX: 2.0,
    PageType.CLAIM: 2.5,
}
# Media cost many tokens and keep well at a lower level, so they go first.
_MODALITY_WEIGHT = {
    Modality.TEXT: 1.0,
    Modality.STRUCTURED: 0.8,
    Modality.AUDIO: 0.6,
    Modality.IMAGE: 0.5,
    Modality.VIDEO: 0.4,
}


class EvictionPolicy(Protocol):
    """Scores one entry at one turn."""

    def score(self, entry: PageTableEntry, turn: int) -> float:
        """Higher = keep longer; infinity = never evict."""
        ...


@dataclass(frozen=True, slots=True)
class LRU:
    """Least recently used leaves first."""

    fault_protection_turns: int = FAULT_PROTECTION_TURNS

    def score(self, entry: PageTableEntry, turn: int) -> float:
        """Recency alone."""
        return _guard(entry, turn, self.fault_protection_turns, _recency(entry, turn))


@dataclass(frozen=True, slots=True)
class ImportanceWeightedLRU:
    """Recency, weighed by importance, page type and how often the page was faulted in."""

    importance_weight: float = 0.5
    fault_protection_turns: int = FAULT_PROTECTION_TURNS

    def score(self, entry: PageTableEntry, turn: int) -> float:
        """`_value` with this policy's weight."""
        value = _value(entry, turn, self.importance_weight)
        return _guard(entry, turn, self.fault_protection_turns, value)


@dataclass(frozen=True, slots=True)
class ModalityAwareLRU:
    """As `ImportanceWeightedLRU`, with heavy media leaving before text."""

    importance_weight: float = 0.5
    fault_protection_turns: int = FAULT_PROTECTION_TURNS

    def score(self, entry: PageTableEntry, turn: int) -> float:
        """`_value` times the modality's weight."""
        value = _value(entry, turn, self.importance_weight) * _MODALITY_WEIGHT[entry.modality]
        return _guard(entry, turn, self.fault_protection_turns, value)


def eviction_order(
    entries: Iterable[PageTableEntry], turn: int, policy: EvictionPolicy
) -> list[PageTableEntry]:
    """The entries that may leave, first to leave first; equal scores leave oldest first; pinned
    ones never.
    """
    scored = [(policy.score(e, turn), e.position, e.part, e.sequence, e) for e in entries]
    candidates = [row for row in scored if row[0] != math.inf]
    candidates.sort(key=lambda row: row[:4])
    return [row[4] for row in candidates]


def _guard(entry: PageTableEntry, turn: int, protection_turns: int, value: float) -> float:
    if entry.pinned:
        return math.inf
    if entry.faulted_turn is not None and turn - entry.faulted_turn < protection_turns:
        return _PROTECTED + value
    return value


def _recency(entry: PageTableEntry, turn: int) -> float:
    """1.0 for a page used in this turn, halved every `_HALF_LIFE_TURNS`, by a ratio that never
    reaches 0.
    """
    age = max(0, turn - entry.last_turn)
    return _HALF_LIFE_TURNS / (_HALF_LIFE_TURNS + age)


def _value(entry: PageTableEntry, turn: int, weight: float) -> float:
    use = 1.0 + 0.1 * min(entry.fault_count, 10)
    kept = (1.0 - weight) * _recency(entry, turn) + weight * entry.importance
    return kept * _TYPE_WEIGHT[entry.page_type] * use
