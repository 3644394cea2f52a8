"""Who leaves the window. (How many leave, and at which level the others stay, is `planner`'s to say.)

Promises, all of them views of a page table entry, pure in entry and turn, and checked by one contract
test for every policy:

- A higher score means keep. Being used later or being more important never lowers a score. Refaults
  count through importance, which the page table raises.
- *Pinned*: a page that somebody pinned scores infinity while the pin holds. An explicit pin holds until
  it is taken back; one that we inferred (a standing instruction) decays when the page goes unused.
- *Protected*: a page just faulted in scores above every page that is not, which still is finite, so
  that a window can always be brought under its budget.
- *Cooling*: a page that just left is not brought back on a guess, and a fault on it is a *refault*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from proxy.memory.models import Modality, PageTableEntry, PageType, PinKind, StorageTier

PIN_LAST_N_TURNS = 3
PIN_DECAY_TURNS = 50
FAULT_PROTECTION_TURNS = 2  # the fault's own included
EVICTION_COOLDOWN_TURNS = 3
REFAULT_GAIN = 0.15  # added to the importance of a page that left too early, up to 1.0


# -- what an entry says of itself


def is_held(entry: PageTableEntry, turn: int, decay_turns: int = PIN_DECAY_TURNS) -> bool:
    """Whether somebody pinned the page and the pin has not decayed: then it never leaves."""
    if not entry.pinned:
        return False
    return entry.pin_kind is not PinKind.INFERRED or _in_use(entry, turn, decay_turns)


def is_protected(
    entry: PageTableEntry, turn: int, protection_turns: int = FAULT_PROTECTION_TURNS
) -> bool:
    """Whether the page was faulted in during the last `protection_turns` turns."""
    return entry.faulted_turn is not None and turn - entry.faulted_turn < protection_turns


def is_cooling(
    entry: PageTableEntry, turn: int, cooldown_turns: int = EVICTION_COOLDOWN_TURNS
) -> bool:
    """Whether the page is outside the window and left it `cooldown_turns` turns ago or later."""
    if entry.tier is StorageTier.L0 or entry.evicted_turn is None:
        return False
    return turn - entry.evicted_turn <= cooldown_turns


def _in_use(entry: PageTableEntry, turn: int, decay_turns: int) -> bool:
    return turn - max(entry.last_turn, entry.pinned_turn or 0) <= decay_turns


# -- the policies


class EvictionPolicy(Protocol):
    """Scores one entry at one turn."""

    def score(self, entry: PageTableEntry, turn: int) -> float:
        """Higher = keep longer; infinity = never evict."""
        ...


_PROTECTED = 1000.0  # above anything that a policy's `worth` can reach
# Chosen on access traces of real conversations (tests/bench/policies.py at commit 8fa8a4e), on a plateau: the numbers matter
# little, the shapes more, and recall not at all (tests/bench/ablation.py).
# What is taken up again is mostly of the last turns, but old pages never stop being needed:
# the chance falls as 1 / age, not exponentially, and not below `_FLOOR`.
_HALF_LIFE_TURNS = 0.5
_FLOOR = 0.02
_FETCHED = 1.5  # a page that had to be fetched before is needed again sooner
_IMPORTANCE = 0.5  # how far a page's importance (0..1) moves its worth, up and down together

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


class LRU:
    """Least recently used leaves first."""

    def worth(self, entry: PageTableEntry, turn: int) -> float:
        """1.0 for a page used in this turn, half of it after `_HALF_LIFE_TURNS`, then as 1 / age;
        never 0."""
        age = max(0, turn - entry.last_turn)
        return _HALF_LIFE_TURNS / (_HALF_LIFE_TURNS + age)

    def score(self, entry: PageTableEntry, turn: int) -> float:
        """`worth`, above all others for a protected page, infinity for a pinned one."""
        if is_held(entry, turn):
            return math.inf
        worth = self.worth(entry, turn)
        return _PROTECTED + worth if is_protected(entry, turn) else worth


class ImportanceWeightedLRU(LRU):
    """Recency, weighed by importance, page type and whether the page had to be faulted in before."""

    def worth(self, entry: PageTableEntry, turn: int) -> float:
        """Recency above its floor, times the weights."""
        recency = _FLOOR + (1.0 - _FLOOR) * super().worth(entry, turn)
        importance = 1.0 + _IMPORTANCE * (entry.importance - 0.5)
        fetched = _FETCHED if entry.fault_count else 1.0
        return recency * importance * _TYPE_WEIGHT[entry.page_type] * fetched


class ModalityAwareLRU(ImportanceWeightedLRU):
    """As `ImportanceWeightedLRU`, with heavy media leaving before text."""

    def worth(self, entry: PageTableEntry, turn: int) -> float:
        """The same, times the modality's weight."""
        return super().worth(entry, turn) * _MODALITY_WEIGHT[entry.modality]


# -- the rules with numbers of one's own


class PinReason(IntEnum):
    """Why a page is pinned, the firmest last. From INFERRED on it never leaves; what a rule pins
    leaves last."""

    NONE = 0
    RECENT = 1  # of the last turns
    CLAIM = 2
    INFERRED = 3
    EXPLICIT = 4


class PinnedSet:
    """Which pages are pinned, and why: by their table entries, by rules, and by id (`pin`).

    A page that has a table entry is better pinned there, by a PIN mutation. `pin_last_n_turns`: 0 pins
    no page by its age. ValueError for negative numbers.
    """

    def __init__(
        self, pin_last_n_turns: int = PIN_LAST_N_TURNS, decay_turns: int = PIN_DECAY_TURNS
    ) -> None:
        if pin_last_n_turns < 0 or decay_turns < 0:
            raise ValueError("pin_last_n_turns and decay_turns are at least 0")
        self.pin_last_n_turns = pin_last_n_turns
        self.decay_turns = decay_turns
        self._by_id: set[str] = set()

    def pin(self, page_id: str) -> None:
        """Pin a page by its id, one outside the conversation (the system prompt) for example."""
        self._by_id.add(page_id)

    def is_pinned(self, page: PageTableEntry | str, turn: int = 0) -> bool:
        """Whether the page is pinned at `turn`, for any reason; of a bare id only `pin` is known."""
        if isinstance(page, str):
            return page in self._by_id
        return self.reason(page, turn) is not PinReason.NONE

    def reason(self, entry: PageTableEntry, turn: int) -> PinReason:
        """The firmest reason for which the page is pinned at `turn`."""
        if entry.page_id in self._by_id:
            return PinReason.EXPLICIT
        if is_held(entry, turn, self.decay_turns):
            inferred = entry.pin_kind is PinKind.INFERRED
            return PinReason.INFERRED if inferred else PinReason.EXPLICIT
        if entry.page_type is PageType.CLAIM and _in_use(entry, turn, self.decay_turns):
            return PinReason.CLAIM
        if turn - entry.created_turn < self.pin_last_n_turns:
            return PinReason.RECENT
        return PinReason.NONE


@dataclass(frozen=True, slots=True)
class AntiThrashPolicy:
    """Who is protected and who is cooling, with turns of one's own (at least 0, else ValueError)."""

    eviction_cooldown_turns: int = EVICTION_COOLDOWN_TURNS
    fault_protection_turns: int = FAULT_PROTECTION_TURNS

    def __post_init__(self) -> None:
        if self.eviction_cooldown_turns < 0 or self.fault_protection_turns < 0:
            raise ValueError("eviction_cooldown_turns and fault_protection_turns are at least 0")

    def protected(self, entry: PageTableEntry, turn: int) -> bool:
        """Whether the page came in so recently that it should not leave."""
        return is_protected(entry, turn, self.fault_protection_turns)

    def cooling(self, entry: PageTableEntry, turn: int) -> bool:
        """Whether the page left so recently that it should not be brought back on a guess; a fault
        on it (ask before it is applied) is a refault."""
        return is_cooling(entry, turn, self.eviction_cooldown_turns)
