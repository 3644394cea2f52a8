"""Who leaves the window. (How many leave is `working_set`'s to say.)

Promises, for every policy, checked by one contract test: a pure function of entry and turn; a
higher score means keep; a page that somebody pinned scores infinity while the pin holds (see
`pins`) and every other a finite number; a page faulted in during the last `fault_protection_turns`
turns (see `anti_thrash`) scores above every unprotected one; being used later or being more
important never lowers a score. Refaults count through importance, which the page table raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from proxy.memory.anti_thrash import FAULT_PROTECTION_TURNS, is_protected
from proxy.memory.models import Modality, PageTableEntry, PageType
from proxy.memory.pins import is_held

_PROTECTED = 1000.0  # above anything `_recency` and the weights can reach
# Chosen with tests/bench/policies.py, on a plateau: the numbers matter little, the shapes more.
# What is taken up again is mostly of the last turns, but old pages never stop being needed:
# the chance falls as 1 / age, not exponentially, and not below `_FLOOR`.
_HALF_LIFE_TURNS = 0.5
_FLOOR = 0.02
_FETCHED = 1.5  # a page that had to be fetched before is needed again sooner

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
    """Recency, weighed by importance, page type and whether the page had to be faulted in before.

    `importance_weight`: 0 leaves importance out; 1 makes a page of importance 1 three times as
    valuable as one of importance 0.
    """

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
    if is_held(entry, turn):
        return math.inf
    return _PROTECTED + value if is_protected(entry, turn, protection_turns) else value


def _recency(entry: PageTableEntry, turn: int) -> float:
    """1.0 for a page used in this turn, half of it after `_HALF_LIFE_TURNS`, then as 1 / age; never
    0.
    """
    age = max(0, turn - entry.last_turn)
    return _HALF_LIFE_TURNS / (_HALF_LIFE_TURNS + age)


def _value(entry: PageTableEntry, turn: int, weight: float) -> float:
    recency = _FLOOR + (1.0 - _FLOOR) * _recency(entry, turn)
    importance = 1.0 + weight * (entry.importance - 0.5)
    fetched = _FETCHED if entry.fault_count else 1.0
    return recency * importance * _TYPE_WEIGHT[entry.page_type] * fetched
