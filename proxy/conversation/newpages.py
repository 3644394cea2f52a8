"""A path's new messages as pages: how they enter the table. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from proxy.conversation.pathpages import PathPages
from proxy.memory.ids import make_page_id
from proxy.memory.importance import importance_of, is_standing
from proxy.memory.models import (
    MEDIA_PART,
    CompressionLevel,
    MutationType,
    PageMutation,
    PageTableEntry,
    PageType,
    StorageTier,
)
from proxy.memory.page_table import DEFAULT_IMPORTANCE
from proxy.memory.tlb import TLBWithPageTable


def new_pages(
    pages: PathPages, first: int, floor: int, turn: int
) -> Iterator[PageMutation]:
    """The messages from position `first` on stand in the window, but for those before `floor`;
    standing instructions are pinned."""
    for position in range(first, len(pages.path)):
        tier = StorageTier.L0 if position >= floor else StorageTier.L2
        role, text = pages.path[position].role, pages.own_text(position)
        weight = importance_of(role, text)
        ids = pages.ids(position)
        for i, tokens in zip(ids, pages.sizes(position), strict=True):
            kind = pages.page_type(position, MEDIA_PART if pages.is_medium(i) else 0)
            yield PageMutation(
                MutationType.CREATE, i, turn, None, tier, tokens,
                importance=None if weight == DEFAULT_IMPORTANCE else weight,
                modality=pages.modality(i),
                page_type=None if kind is PageType.TRANSCRIPT else kind,
            )  # fmt: skip
        if is_standing(role, text, pages.text_tokens(position)):
            yield PageMutation(MutationType.PIN, ids[0], turn)


def renewed(
    pages: PathPages, first: int, last: int, table: TLBWithPageTable, turn: int
) -> Iterator[PageMutation]:
    """The pages of positions first..last-1, which the table has, where these are others now because
    the system messages behind them changed. They are where those before them were."""
    for position in range(first, last):
        ids, sizes = pages.ids(position), pages.sizes(position)
        known = [table.lookup(i) for i in ids]
        if all(known):
            for i, entry, tokens in zip(ids, known, sizes, strict=True):
                if entry is not None and entry.size_tokens != tokens:
                    yield PageMutation(MutationType.UPDATE, i, turn, tokens=tokens)
            continue
        old = _stale(position, ids, table)
        before = [*old, *(e for e in known[: len(pages.parts(position))] if e is not None)]
        inside = bool(before) and all(e.tier is StorageTier.L0 and not e.level for e in before)
        for entry in old:
            if entry.tier is StorageTier.L0:
                yield PageMutation(MutationType.EVICT, entry.page_id, turn, tier=StorageTier.L2)
        for i, entry, tokens in zip(ids, known, sizes, strict=True):
            if entry is None:
                tier = StorageTier.L0 if inside else StorageTier.L2
                yield PageMutation(MutationType.CREATE, i, turn, None, tier, tokens)
            elif inside and entry.tier is not StorageTier.L0:
                yield PageMutation(MutationType.MAP, i, turn, CompressionLevel.FULL, StorageTier.L0, tokens)


def _stale(
    position: int, ids: tuple[str, ...], table: TLBWithPageTable
) -> list[PageTableEntry]:
    """The text pages of a message that the table has under other ids."""
    names = [make_page_id(position)]
    while table.lookup(more := make_page_id(position, len(names))) is not None:
        names.append(more)
    found = (table.lookup(name) for name in names if name not in ids)
    return [entry for entry in found if entry is not None]
