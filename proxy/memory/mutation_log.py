"""The mutation log: what happened to the pages, in order, and what that says about any turn.

Promises: append-only; replaying the log over an empty table gives the table; `decode(encode(x)) ==
x`, and the encoded form is tuples of str, int, float and None only, so that any serializer takes
it. Code numbers never change (see `codes`), and new fields of a mutation come at the end.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from proxy.memory.codes import (
    ACTORS,
    MODALITIES,
    OPS,
    PAGE_TYPES,
    PIN_KINDS,
    REASONS,
    TIERS,
    codes_of,
    member_of,
)
from proxy.memory.ids import parse_page_id
from proxy.memory.models import CompressionLevel, MutationType, PageMutation, StorageTier
from proxy.memory.page_table import PageTable

_OP_CODES = codes_of(OPS)
_TIER_CODES = codes_of(TIERS)
_ACTOR_CODES = codes_of(ACTORS)
_REASON_CODES = codes_of(REASONS)
_MODALITY_CODES = codes_of(MODALITIES)
_TYPE_CODES = codes_of(PAGE_TYPES)
_PIN_CODES = codes_of(PIN_KINDS)
SNAPSHOT_MUTATIONS = 512  # between two snapshots of the window, at first
MAX_SNAPSHOTS = 64
_WIDTH = len(PageMutation._fields)


class _Window:
    """The pages of the window and their levels, folded from mutations as the page table does it."""

    def __init__(self) -> None:
        self.levels: dict[str, CompressionLevel] = {}  # of the pages in L0
        self.below: dict[str, CompressionLevel] = {}  # of others, where it is not FULL
        self.read = 0  # mutations folded

    def copy(self) -> _Window:
        other = _Window()
        other.levels, other.below, other.read = self.levels.copy(), self.below.copy(), self.read
        return other

    def apply(self, m: PageMutation) -> None:
        self.read += 1
        page_id, op = m.page_id, m.op
        if op in (MutationType.CREATE, MutationType.MAP, MutationType.FAULT_IN):
            level = self.levels.get(page_id, self.below.pop(page_id, CompressionLevel.FULL))
            enters = op is not MutationType.CREATE or m.tier is StorageTier.L0
            self._set(page_id, level if m.level is None else m.level, enters)
        elif op is MutationType.EVICT:
            self.levels.pop(page_id, None)
            self._set(page_id, m.level or CompressionLevel.FULL, False)
        elif op in (MutationType.COMPRESS, MutationType.UPDATE) and m.level is not None:
            self._set(page_id, m.level, page_id in self.levels)

    def _set(self, page_id: str, level: CompressionLevel, resident: bool) -> None:
        if resident:
            self.levels[page_id] = level
        elif level:
            self.below[page_id] = level
        else:
            self.below.pop(page_id, None)


class MutationLogLite:
    """Append-only list of mutations of one path.

    What was in the window at a turn is folded from the nearest of at most MAX_SNAPSHOTS snapshots,
    which the first question takes.
    """

    def __init__(self, entries: Iterable[PageMutation] = ()) -> None:
        self._entries: list[PageMutation] = []
        self._turns: list[int] = []
        self._sorted = True  # turns never went back, as in every log of the proxy's
        self._snapshots: list[_Window] = [_Window()]
        self._stride = SNAPSHOT_MUTATIONS
        self.extend(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Sequence[PageMutation]:
        """All mutations in the order of their happening; not to be changed."""
        return self._entries

    def append(self, mutation: PageMutation) -> None:
        """Add one mutation at the end."""
        if self._turns and mutation.turn < self._turns[-1]:
            self._sorted = False
        self._turns.append(mutation.turn)
        self._entries.append(mutation)

    def extend(self, mutations: Iterable[PageMutation]) -> None:
        """Add several mutations at the end."""
        for mutation in mutations:
            self.append(mutation)

    def replay(self, table: PageTable | None = None) -> PageTable:
        """Apply the whole log to `table` (a new one by default) and return it."""
        return (PageTable() if table is None else table).replay(self._entries)

    def get_context_at_turn(self, turn: int) -> list[str]:
        """Ids of the pages that were in L0 at the end of `turn`, in conversation order."""
        return [page_id for page_id, _ in self.get_levels_at_turn(turn)]

    def get_levels_at_turn(self, turn: int) -> list[tuple[str, CompressionLevel]]:
        """The same, with the level at which each page was shown."""
        window = self._window_at(turn)
        born = self._births(window.levels)
        return sorted(window.levels.items(), key=lambda item: born[item[0]])

    def _window_at(self, turn: int) -> _Window:
        if not self._sorted:
            window = _Window()
            for mutation in self._entries:
                if mutation.turn <= turn:
                    window.apply(mutation)
            return window
        end = bisect.bisect_right(self._turns, turn)
        self._take_snapshots(end)
        nearest = bisect.bisect_right([window.read for window in self._snapshots], end) - 1
        window = self._snapshots[nearest].copy()
        for mutation in self._entries[window.read : end]:
            window.apply(mutation)
        return window

    def _take_snapshots(self, end: int) -> None:
        """Up to `end` mutations; twice as far apart, and half of them, when there are too many."""
        while (last := self._snapshots[-1]).read + self._stride <= end:
            window = last.copy()
            for mutation in self._entries[last.read : last.read + self._stride]:
                window.apply(mutation)
            self._snapshots.append(window)
            if len(self._snapshots) > MAX_SNAPSHOTS:
                del self._snapshots[1::2]
                self._stride *= 2

    def _births(self, wanted: Collection[str]) -> dict[str, tuple[int, int, int]]:
        """Conversation order of pages: place along the path, then order of creation."""
        places = {page_id: parse_page_id(page_id) or (-1, 0) for page_id in wanted}
        shared = len(set(places.values())) < len(places)
        order: dict[str, int] = {}
        if shared:  # derived pages: the log says which came first
            for index, mutation in enumerate(self._entries):
                if mutation.op is MutationType.CREATE and mutation.page_id in places:
                    order[mutation.page_id] = index
        return {i: (*place, order.get(i, 0)) for i, place in places.items()}


def encode(mutations: Iterable[PageMutation]) -> list[tuple[Any, ...]]:
    """Compact tuples for storage: enums as code numbers, None and the default actor at the end left
    out.
    """
    encoded: list[tuple[Any, ...]] = []
    for m in mutations:
        row = [
            _OP_CODES[m.op],
            m.page_id,
            m.turn,
            None if m.level is None else int(m.level),
            _TIER_CODES[m.tier],
            m.tokens,
            _ACTOR_CODES[m.actor] or None,
            _REASON_CODES[m.reason],
            m.importance,
            _MODALITY_CODES[m.modality],
            _TYPE_CODES[m.page_type],
            m.artifact_id,
            _PIN_CODES[m.pin_kind],
        ]
        while row[-1] is None:
            row.pop()
        encoded.append(tuple(row))
    return encoded


def decode(encoded: Iterable[Sequence[Any]]) -> list[PageMutation]:
    """The mutations that `encode` was given; a row it cannot have written is a `ValueError`."""
    decoded: list[PageMutation] = []
    for row in encoded:
        if not 3 <= len(row) <= _WIDTH:
            raise ValueError(f"mutation record has {len(row)} fields, expected 3 to {_WIDTH}")
        full = [*row, *[None] * (_WIDTH - len(row))]
        op, page_id, turn, level, tier, tokens, actor, reason, weight, modality, kind, art, pin = (
            full
        )
        try:
            decoded.append(
                PageMutation(
                    member_of(OPS, op),
                    page_id,
                    turn,
                    None if level is None else CompressionLevel(level),
                    None if tier is None else member_of(TIERS, tier),
                    tokens,
                    member_of(ACTORS, actor or 0),
                    None if reason is None else member_of(REASONS, reason),
                    weight,
                    None if modality is None else member_of(MODALITIES, modality),
                    None if kind is None else member_of(PAGE_TYPES, kind),
                    art,
                    None if pin is None else member_of(PIN_KINDS, pin),
                )
            )
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"mutation record {tuple(row)!r} has an unknown code") from error
    return decoded
