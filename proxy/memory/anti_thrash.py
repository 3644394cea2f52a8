"""Against thrashing: who must not leave yet, who should not come back unasked, what was a mistake.

Promises: views of page table entries, pure in entry and turn. A page faulted in is *protected* for
`fault_protection_turns` turns, the fault's own included. A page outside the window *cools* until
`eviction_cooldown_turns` turns after its eviction: nothing brings it back speculatively, and a fault
on it is a *refault*, which raises its importance. Every number about this has its home here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy.memory.models import PageTableEntry, StorageTier

EVICTION_COOLDOWN_TURNS = 3
FAULT_PROTECTION_TURNS = 2
REFAULT_GAIN = 0.15  # added to the importance of a page that left too early, up to 1.0
MAX_RECORDED_PAGES = 4096  # turns remembered per kind for callers without a table


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


@dataclass(slots=True)
class AntiThrashPolicy:
    """The same with numbers of one's own. Callers without a page table tell it what happens
    (`record_eviction`, `record_fault`) and ask with page ids; that record is bounded.
    """

    eviction_cooldown_turns: int = EVICTION_COOLDOWN_TURNS
    fault_protection_turns: int = FAULT_PROTECTION_TURNS
    _evicted: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _faulted: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.eviction_cooldown_turns < 0 or self.fault_protection_turns < 0:
            raise ValueError("eviction_cooldown_turns and fault_protection_turns are at least 0")

    def protected(self, entry: PageTableEntry, turn: int) -> bool:
        """Whether the page came in so recently that it should not leave."""
        return is_protected(entry, turn, self.fault_protection_turns)

    def cooling(self, entry: PageTableEntry, turn: int) -> bool:
        """Whether the page left so recently that it should not be brought back on a guess."""
        return is_cooling(entry, turn, self.eviction_cooldown_turns)

    def is_refault(self, page: PageTableEntry | str, turn: int) -> bool:
        """Whether a fault on the page in this turn would show that it left too early. For an entry,
        ask before the fault is applied."""
        if isinstance(page, PageTableEntry):
            return self.cooling(page, turn)
        left = self._evicted.get(page)
        return left is not None and turn - left <= self.eviction_cooldown_turns

    def can_evict(self, page: PageTableEntry | str, turn: int) -> bool:
        """Whether the page is not protected."""
        if isinstance(page, PageTableEntry):
            return not self.protected(page, turn)
        came = self._faulted.get(page)
        return came is None or turn - came >= self.fault_protection_turns

    def record_eviction(self, page_id: str, turn: int) -> None:
        """For callers without a table: the page left the window."""
        _remember(self._evicted, page_id, turn)

    def record_fault(self, page_id: str, turn: int) -> None:
        """For callers without a table: the page was faulted in (ask `is_refault` first)."""
        _remember(self._faulted, page_id, turn)
        self._evicted.pop(page_id, None)


def _remember(turns: dict[str, int], page_id: str, turn: int) -> None:
    turns.pop(page_id, None)
    turns[page_id] = turn
    if len(turns) > MAX_RECORDED_PAGES:
        del turns[next(iter(turns))]
