"""The mutation log: what happened to the pages, in order, and what that says about any turn.

Promises: append-only; replaying the log over an empty table gives the table; `decode(encode(x)) ==
x`, and the encoded form is tuples of str, int, float and None only, so that any serializer takes
it. Code numbers never change: new enum members are added at the end of the lists below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from proxy.memory.models import (
    Actor,
    CompressionLevel,
    FaultReason,
    Modality,
    MutationType,
    PageMutation,
    PageType,
    StorageTier,
)
from proxy.memory.page_table import PageTable

# The durable code of a member is its place here.
_OPS = (
    MutationType.CREATE,
    MutationType.FAULT_IN,
    MutationType.EVICT,
    MutationType.COMPRESS,
    MutationType.PIN,
    MutationType.UNPIN,
    MutationType.UPDATE,
    MutationType.MAP,
    MutationType.ACCESS,
)
_TIERS = (StorageTier.L0, StorageTier.L1, StorageTier.L2, StorageTier.L3, StorageTier.L4)
_ACTORS = (Actor.SYSTEM, Actor.USER, Actor.MODEL, Actor.TOOL)
_REASONS = (
    FaultReason.USER_REQUESTED_RECALL,
    FaultReason.RESOLVE_REFERENCE,
    FaultReason.TOOL_PREREQUISITE,
    FaultReason.SPECULATIVE,
)
_MODALITIES = (
    Modality.TEXT,
    Modality.IMAGE,
    Modality.AUDIO,
    Modality.VIDEO,
    Modality.STRUCTURED,
)
_PAGE_TYPES = (
    PageType.TRANSCRIPT,
    PageType.SUMMARY,
    PageType.ARTIFACT,
    PageType.CLAIM,
    PageType.PROCEDURE,
    PageType.INDEX,
)
_OP_CODES = {member: code for code, member in enumerate(_OPS)}
_TIER_CODES: dict[StorageTier | None, int | None] = {t: c for c, t in enumerate(_TIERS)}
_ACTOR_CODES = {member: code for code, member in enumerate(_ACTORS)}
_REASON_CODES: dict[FaultReason | None, int | None] = {r: c for c, r in enumerate(_REASONS)}
_MODALITY_CODES: dict[Modality | None, int | None] = {m: c for c, m in enumerate(_MODALITIES)}
_TYPE_CODES: dict[PageType | None, int | None] = {t: c for c, t in enumerate(_PAGE_TYPES)}
_WIDTH = len(PageMutation._fields)


class MutationLogLite:
    """Append-only list of mutations of one path."""

    def __init__(self, entries: Iterable[PageMutation] = ()) -> None:
        self._entries: list[PageMutation] = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Sequence[PageMutation]:
        """All mutations in the order of their happening; not to be changed."""
        return self._entries

    def append(self, mutation: PageMutation) -> None:
        """Add one mutation at the end."""
        self._entries.append(mutation)

    def extend(self, mutations: Iterable[PageMutation]) -> None:
        """Add several mutations at the end."""
        self._entries.extend(mutations)

    def replay(self, table: PageTable | None = None) -> PageTable:
        """Apply the whole log to `table` (a new one by default) and return it."""
        return (PageTable() if table is None else table).replay(self._entries)

    def get_context_at_turn(self, turn: int) -> list[str]:
        """Ids of the pages that were in L0 at the end of `turn`, in conversation order."""
        return [page_id for page_id, _ in self.get_levels_at_turn(turn)]

    def get_levels_at_turn(self, turn: int) -> list[tuple[str, CompressionLevel]]:
        """The same, with the level at which each page was shown."""
        table = PageTable().replay(m for m in self._entries if m.turn <= turn)
        return [(entry.page_id, entry.level) for entry in table.resident()]


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
            _TIER_CODES.get(m.tier),
            m.tokens,
            _ACTOR_CODES[m.actor] or None,
            _REASON_CODES.get(m.reason),
            m.importance,
            _MODALITY_CODES.get(m.modality),
            _TYPE_CODES.get(m.page_type),
            m.artifact_id,
        ]
        while row[-1] is None:
            row.pop()
        encoded.append(tuple(row))
    return encoded


_Member = TypeVar("_Member")


def _member(members: tuple[_Member, ...], code: int) -> _Member:
    if code < 0:  # Python would count from the end
        raise IndexError(code)
    return members[code]


def decode(encoded: Iterable[Sequence[Any]]) -> list[PageMutation]:
    """The mutations that `encode` was given; a row it cannot have written is a `ValueError`."""
    decoded: list[PageMutation] = []
    for row in encoded:
        if not 3 <= len(row) <= _WIDTH:
            raise ValueError(f"mutation record has {len(row)} fields, expected 3 to {_WIDTH}")
        full = [*row, *[None] * (_WIDTH - len(row))]
        op, page_id, turn, level, tier, tokens, actor, reason, weight, modality, kind, art = full
        try:
            decoded.append(
                PageMutation(
                    _member(_OPS, op),
                    page_id,
                    turn,
                    None if level is None else CompressionLevel(level),
                    None if tier is None else _member(_TIERS, tier),
                    tokens,
                    _member(_ACTORS, actor or 0),
                    None if reason is None else _member(_REASONS, reason),
                    weight,
                    None if modality is None else _member(_MODALITIES, modality),
                    None if kind is None else _member(_PAGE_TYPES, kind),
                    art,
                )
            )
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"mutation record {tuple(row)!r} has an unknown code") from error
    return decoded
