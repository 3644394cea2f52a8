"""Which pages stay in the window whatever their worth, and until when.

Promises: views of page table entries, pure in entry and turn. An explicit pin holds until it is
taken back. Every other pin decays when the page goes unused for `decay_turns` turns: one that we
inferred (a standing instruction), and those that follow from a rule: claims. The pages of the last
`pin_last_n_turns` turns are pinned by their age. What was pinned (explicit, inferred) never leaves
the window; what a rule pins leaves last, so that a window can always be brought under its budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

from proxy.memory.models import PageTableEntry, PageType, PinKind

PIN_LAST_N_TURNS = 3
PIN_DECAY_TURNS = 50
MAX_PINS = 4096  # explicit pins of one PinnedSet


class PinReason(IntEnum):
    """Why a page is pinned, the firmest last."""

    NONE = 0
    RECENT = 1  # of the last turns
    CLAIM = 2
    INFERRED = 3
    EXPLICIT = 4


def is_held(entry: PageTableEntry, turn: int, decay_turns: int = PIN_DECAY_TURNS) -> bool:
    """Whether somebody pinned the page and the pin has not decayed: then it never leaves."""
    if not entry.pinned:
        return False
    return entry.pin_kind is not PinKind.INFERRED or _in_use(entry, turn, decay_turns)


def _in_use(entry: PageTableEntry, turn: int, decay_turns: int) -> bool:
    used = entry.last_turn
    if entry.pinned_turn is not None and entry.pinned_turn > used:
        used = entry.pinned_turn
    return turn - used <= decay_turns


class PinnedSet:
    """The rules with numbers of one's own, and explicit pins by page id: for pages outside the
    conversation (the system prompt) and callers without a page table. A page that has a table entry
    is better pinned there, by a PIN mutation.

    `pin_last_n_turns`: 0 pins no page by its age. ValueError for negative numbers.
    """

    def __init__(
        self, pin_last_n_turns: int = PIN_LAST_N_TURNS, decay_turns: int = PIN_DECAY_TURNS
    ) -> None:
        if pin_last_n_turns < 0 or decay_turns < 0:
            raise ValueError("pin_last_n_turns and decay_turns are at least 0")
        self.pin_last_n_turns = pin_last_n_turns
        self.decay_turns = decay_turns
        self._explicit: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._explicit)

    def __iter__(self) -> Iterator[str]:
        """The ids pinned here, in the order of pinning."""
        return iter(self._explicit)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._explicit

    def pin(self, page_id: str) -> None:
        """Pin explicitly. ValueError above MAX_PINS."""
        if page_id not in self._explicit and len(self._explicit) >= MAX_PINS:
            raise ValueError(f"no more than {MAX_PINS} pages can be pinned")
        self._explicit[page_id] = None

    def unpin(self, page_id: str) -> None:
        """Take an explicit pin back; nothing happens to a page that has none."""
        self._explicit.pop(page_id, None)

    def is_pinned(self, page: PageTableEntry | str, turn: int = 0) -> bool:
        """Whether the page is pinned at `turn`, for any reason; of a bare id only explicit pins are
        known."""
        if isinstance(page, str):
            return page in self._explicit
        return self.reason(page, turn) is not PinReason.NONE

    def held(self, entry: PageTableEntry, turn: int) -> bool:
        """Whether the page never leaves: pinned explicitly, or inferred and not decayed."""
        return self.reason(entry, turn) >= PinReason.INFERRED

    def reason(self, entry: PageTableEntry, turn: int) -> PinReason:
        """The firmest reason for which the page is pinned at `turn`."""
        if entry.page_id in self._explicit:
            return PinReason.EXPLICIT
        if is_held(entry, turn, self.decay_turns):
            inferred = entry.pin_kind is PinKind.INFERRED
            return PinReason.INFERRED if inferred else PinReason.EXPLICIT
        if entry.page_type is PageType.CLAIM and _in_use(entry, turn, self.decay_turns):
            return PinReason.CLAIM
        if turn - entry.created_turn < self.pin_last_n_turns:
            return PinReason.RECENT
        return PinReason.NONE
