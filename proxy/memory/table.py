"""The page table: where every page is, at which level, and the log of how that came to be.

Promises: the table is the fold of its mutations. `apply` is the only writer; replaying the same
mutations gives an equal table, in the same order, and what was in the window at a turn is the table
replayed up to it. No turn is read from anywhere but a mutation. An unknown page is a `KeyError`, a
second CREATE a `ValueError`; what raises changes nothing.

A stored table is chunks of entries, each under the hash of its bytes, as are the groups that list them and
the root that lists these: the same entries give the same root, whenever and however often they were written,
and a chunk that did not change keeps its reference. A chunk has the pages of 64 positions, parts and
media included; derived pages have no position and go by the number at the end of their id. `open`
reads the root and the chunks with pages in the window, and the others when they are asked for. What
is missing or damaged is made again from the log: losing blocks changes no answer (invariants 6, 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import msgspec

from proxy.memory.eviction import REFAULT_GAIN, is_cooling
from proxy.memory.ids import make_page_id, parse_page_id
from proxy.memory.models import (
    DEFAULT_IMPORTANCE,
    MEDIA_PART,
    ChunkRef,
    CompressionLevel,
    MemoryPage,
    Modality,
    MutationType,
    PageId,
    PageMutation,
    PageTableEntry,
    PageTableStats,
    PageType,
    PinKind,
    StorageTier,
)

REF_BYTES = 16
_CHUNK_BITS = 6  # 64 positions
_GROUP_BITS = 6  # 64 chunks
_MAX_NUMBER_DIGITS = 9

_L0 = StorageTier.L0
_CREATE, _MAP, _FAULT_IN = MutationType.CREATE, MutationType.MAP, MutationType.FAULT_IN
_EVICT, _COMPRESS, _ACCESS = MutationType.EVICT, MutationType.COMPRESS, MutationType.ACCESS
_PIN, _UNPIN = MutationType.PIN, MutationType.UNPIN

GetBlock = Callable[[bytes], bytes | None]  # a block's bytes by its reference; None: not there


_NO_PAGES = dict.fromkeys(StorageTier, 0)


class Checkpoint(NamedTuple):
    """A table as stored: the root's reference, and the blocks that are new since the last one."""

    root: ChunkRef
    blocks: dict[bytes, bytes]


class _Root(msgspec.Struct, array_like=True, gc=False):
    """What a table knows without its entries."""

    turn: int = 0  # the latest of any applied mutation
    pages: int = 0
    tokens: int = 0
    l0_tokens: int = 0
    tiers: dict[StorageTier, int] = msgspec.field(default_factory=_NO_PAGES.copy)
    groups: dict[int, ChunkRef] = msgspec.field(default_factory=dict)  # of the chunks' references
    resident: list[int] = msgspec.field(default_factory=list)  # the chunks with pages in the window


class PageTable:
    """Entries by page id, with an index of the window.

    `on_apply` is called with each mutation after it was applied (a log's `append`, for instance).
    """

    def __init__(self, on_apply: Callable[[PageMutation], object] | None = None) -> None:
        self._on_apply = on_apply
        self._entries: dict[str, PageTableEntry] = {}
        self._window: dict[str, PageTableEntry] = {}
        self._chunks: dict[int, list[PageTableEntry]] = {}  # those in RAM, in order of registration
        self._refs: dict[int, ChunkRef] = {}  # of all chunks, as they were last stored
        self._stored: set[int] = set()  # chunks that are in storage only
        self._changed: set[int] = set()  # chunks that are not in storage as they are
        self._root = _Root()
        self.unstored = 0  # mutations since the last checkpoint
        self._ref: ChunkRef | None = None  # of the root, as it was last stored
        self._get: GetBlock | None = None
        self._rebuild: Callable[[], PageTable] | None = None

    @classmethod
    def open(
        cls,
        root: bytes,
        get: GetBlock,
        rebuild: Callable[[], PageTable] | None = None,
    ) -> PageTable:
        """The table of a checkpoint. `rebuild` replays its log, when a block is missing or damaged;
        without it that is a `LookupError`, then or at a later look-up."""
        ref = ChunkRef(root)
        table, data = cls(), _intact(ref, get)
        if data is not None:
            table._root, table._ref = _decode_root(data), ref
            groups = [_intact(group, get) for group in table._root.groups.values()]
        if data is None or None in groups:
            if rebuild is None:
                raise LookupError(f"the page table's root {ref.hex()} is missing or damaged")
            return rebuild()
        table._get, table._rebuild = get, rebuild
        for group in filter(None, groups):
            table._refs.update(_decode_group(group))
        table._stored = set(table._refs)
        for number in table._root.resident:
            table._read(number)
        table._window = {i: e for i, e in table._entries.items() if e.tier is _L0}
        return table

    # -- reading

    @property
    def turn(self) -> int:
        """The latest turn of any applied mutation."""
        return self._root.turn

    def __len__(self) -> int:
        return self._root.pages

    def __contains__(self, page_id: object) -> bool:
        return isinstance(page_id, str) and self.lookup(page_id) is not None

    def __iter__(self) -> Iterator[PageTableEntry]:
        """All entries in order of registration; reads what is not in RAM."""
        for number in sorted(self._stored):
            self._read(number)
        return iter(sorted(self._entries.values(), key=lambda entry: entry.sequence))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageTable):
            return NotImplemented
        return self.turn == other.turn and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def lookup(self, page_id: str) -> PageTableEntry | None:
        """The live entry, or None for a page that this path does not have."""
        entry = self._entries.get(page_id)
        if entry is None and self._stored:
            number = _chunk_number(page_id, (parse_page_id(page_id) or (-1, 0))[0])
            if number in self._stored:
                self._read(number)
                entry = self._entries.get(page_id)
        return entry

    def get_by_tier(self, tier: StorageTier) -> list[PageTableEntry]:
        """The pages of one tier in conversation order; reads what is not in RAM, but for L0."""
        if tier is _L0:
            return sorted(self._window.values(), key=_conversation_order)
        return sorted((e for e in self if e.tier is tier), key=_conversation_order)

    def resident(self) -> list[PageTableEntry]:
        """The pages in L0 (each with its level) in conversation order."""
        return self.get_by_tier(_L0)

    @property
    def total_tokens(self) -> int:
        """Of all pages at their current size, in the window or not."""
        return self._root.tokens

    def get_stats(self) -> PageTableStats:
        """Counts; tiers without pages are left out."""
        root = self._root
        return PageTableStats(
            total_pages=root.pages,
            total_tokens=root.tokens,
            l0_tokens=root.l0_tokens,
            pages_by_tier={tier: count for tier, count in root.tiers.items() if count},
        )

    # -- storage

    def checkpoint(self) -> Checkpoint:
        """The root and the blocks that changed since the last checkpoint, which the caller stores.
        Nothing changed: the same root, no blocks."""
        if self._ref is not None and not self._changed:
            return Checkpoint(self._ref, {})
        root, blocks = self._root, dict[bytes, bytes]()
        for number in self._changed:
            self._refs[number] = _add_block(blocks, _columns(self._chunks[number]))
        for group in {number >> _GROUP_BITS for number in self._changed}:
            first = group << _GROUP_BITS
            here = {n: self._refs[n] for n in range(first, first + (1 << _GROUP_BITS)) if n in self._refs}
            root.groups[group] = _add_block(blocks, here)
        self._changed.clear()
        root.groups = dict(sorted(root.groups.items()))
        root.resident = sorted({_chunk_of(entry) for entry in self._window.values()})
        self._ref = _add_block(blocks, root)
        self.unstored = 0
        return Checkpoint(self._ref, blocks)

    def rest(self, get: GetBlock, rebuild: Callable[[], PageTable], entries: int) -> None:
        """Forget of what was stored all but some `entries` that were read last, beside those of the window. `get`,
        `rebuild`: as in `open`."""
        self._get, self._rebuild = get, rebuild
        spare = len(self._chunks) - (entries >> _CHUNK_BITS)
        if spare <= 0:
            return
        kept = {*self._changed, *map(_chunk_of, self._window.values())}
        for number in [n for n in self._chunks if n in self._refs and n not in kept][:spare]:
            for entry in self._chunks.pop(number):
                del self._entries[entry.page_id]
            self._stored.add(number)

    @property
    def loaded(self) -> int:
        """How many entries are in RAM."""
        return len(self._entries)

    def _read(self, number: int) -> None:
        """Bring a stored chunk into RAM."""
        ref = self._refs[number]
        data = _intact(ref, self._get)
        if data is not None:
            self._bring(number, _decode_chunk(data))
        elif self._rebuild is not None:
            made = self._rebuild()
            self._changed |= self._stored  # for the next checkpoint to store again
            for lost in sorted(self._stored):
                self._bring(lost, made._chunks[lost])
        else:
            raise LookupError(f"chunk {ref.hex()} of the page table is missing or damaged")

    def _bring(self, number: int, entries: list[PageTableEntry]) -> None:
        self._stored.discard(number)
        self._chunks[number] = entries
        self._entries.update((entry.page_id, entry) for entry in entries)

    def in_window(self, page_id: str) -> PageTableEntry | None:
        """The entry of a page in L0; None for any other, without a look into storage."""
        return self._window.get(page_id)

    # -- the one writer

    def apply(self, mutation: PageMutation) -> PageTableEntry:
        """Change the table as the mutation says and return the entry, or raise and change nothing."""
        op = mutation.op
        if op is _CREATE:
            entry = self._create(mutation)
        else:
            entry = self._known(mutation.page_id)
            if op is _MAP or op is _FAULT_IN:
                self._enter_l0(entry, mutation)
            elif op is _EVICT:
                self._leave_l0(entry, mutation)
            elif op is _ACCESS:
                self._use(entry, mutation)
            elif op is _COMPRESS:
                self._set_level(entry, mutation)
            elif op is _PIN or op is _UNPIN:
                self._set_pin(entry, mutation)
            else:
                self._update(entry, mutation)
        if mutation.artifact_id is not None:
            entry.artifact_id = mutation.artifact_id
        self.unstored += 1
        self._root.turn = max(self._root.turn, mutation.turn)
        self._changed.add(_chunk_of(entry))
        if self._on_apply is not None:
            self._on_apply(mutation)
        return entry

    def replay(self, mutations: Iterable[PageMutation]) -> PageTable:
        """Apply all of them in order; returns the table itself."""
        for mutation in mutations:
            self.apply(mutation)
        return self

    def _known(self, page_id: str) -> PageTableEntry:
        entry = self.lookup(page_id)
        if entry is None:
            raise KeyError(f"no page {page_id!r} in this page table")
        return entry

    def _create(self, m: PageMutation) -> PageTableEntry:
        if self.lookup(m.page_id) is not None:
            raise ValueError(f"page {m.page_id!r} was created before; pages are immutable")
        root, tokens = self._root, m.tokens or 0
        position, part = parse_page_id(m.page_id) or (-1, 0)
        entry = PageTableEntry(
            page_id=PageId(m.page_id),
            position=position,
            part=part,
            sequence=root.pages,
            size_tokens=tokens,
            tier=m.tier or StorageTier.L2,
            last_turn=m.turn,
            created_turn=m.turn,
            level=m.level or CompressionLevel.FULL,
            importance=DEFAULT_IMPORTANCE if m.importance is None else m.importance,
            modality=m.modality or Modality.TEXT,
            page_type=m.page_type or PageType.TRANSCRIPT,
            estimated=m.estimated,
        )
        self._entries[m.page_id] = entry
        self._chunks.setdefault(_chunk_of(entry), []).append(entry)
        root.pages += 1
        root.tokens += tokens
        root.tiers[entry.tier] += 1
        if entry.tier is _L0:
            self._window[m.page_id] = entry
            entry.l0_tokens = tokens
            root.l0_tokens += tokens
        return entry

    def _move(self, entry: PageTableEntry, tier: StorageTier, l0_tokens: int) -> None:
        """The only way to another tier, or to another cost in the window (0 outside it)."""
        self._root.l0_tokens += l0_tokens - entry.l0_tokens
        entry.l0_tokens = l0_tokens
        was = entry.tier
        if was is tier:
            return
        self._root.tiers[was] -= 1
        self._root.tiers[tier] += 1
        entry.tier = tier
        if tier is _L0:
            self._window[entry.page_id] = entry
        elif was is _L0:
            del self._window[entry.page_id]

    def _enter_l0(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.op is _FAULT_IN:
            if is_cooling(entry, m.turn):
                entry.refault_count += 1
                entry.importance = min(1.0, entry.importance + REFAULT_GAIN)
            entry.fault_count += 1
            entry.faulted_turn = m.turn
        self._move(entry, _L0, entry.size_tokens if m.tokens is None else m.tokens)
        if m.level is not None:
            entry.level = m.level
        self._use(entry, m)

    def _use(self, entry: PageTableEntry, m: PageMutation) -> None:
        entry.access_count += 1
        entry.last_turn = max(entry.last_turn, m.turn)

    def _leave_l0(self, entry: PageTableEntry, m: PageMutation) -> None:
        tier = m.tier or StorageTier.L2
        if tier is _L0:
            raise ValueError("an eviction needs a tier below L0")
        self._move(entry, tier, 0)
        # Below L0 a page is its full body; a level only describes how it is shown in the window.
        entry.level = CompressionLevel.FULL if m.level is None else m.level
        entry.evicted_turn = m.turn

    def _set_level(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.level is None:
            raise ValueError("COMPRESS needs a level")
        entry.level = m.level
        if m.tokens is not None and entry.tier is _L0:
            self._move(entry, _L0, m.tokens)

    def _set_pin(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.op is _UNPIN:
            entry.pin_kind = entry.pinned_turn = None
            return
        if entry.pin_kind is not PinKind.EXPLICIT:  # no guess weakens what somebody asked for
            entry.pin_kind = m.pin_kind or PinKind.EXPLICIT
        entry.pinned_turn = m.turn

    def _update(self, entry: PageTableEntry, m: PageMutation) -> None:
        if m.tier is not None and m.tier is not entry.tier:
            if _L0 in (m.tier, entry.tier):
                raise ValueError("only MAP, FAULT_IN and EVICT move a page into or out of L0")
            self._move(entry, m.tier, 0)
        if m.level is not None:
            entry.level = m.level
        if m.tokens is not None:
            self._root.tokens += m.tokens - entry.size_tokens
            entry.size_tokens, entry.estimated = m.tokens, False
        if m.importance is not None:
            entry.importance = m.importance

    # -- the seeds' doors: each is one mutation (two for a pinned page), at the table's latest turn

    def register(self, page: MemoryPage) -> PageTableEntry:
        """Enter a page."""
        entry = self.apply(
            PageMutation(
                _CREATE, page.page_id, self.turn, page.compression_level, page.storage_tier,
                page.estimate_tokens(), importance=page.importance, modality=page.modality,
                page_type=page.page_type, artifact_id=page.artifact_id,
            )
        )  # fmt: skip
        return self.apply(PageMutation(_PIN, page.page_id, self.turn)) if page.pinned else entry

    def update_location(
        self, page_id: str, tier: StorageTier, artifact_id: str | None = None
    ) -> PageTableEntry:
        """Move a page: out of L0 is an EVICT, into L0 a MAP, anything else an UPDATE."""
        was = self._known(page_id).tier
        op = MutationType.UPDATE
        if _L0 in (was, tier) and was is not tier:
            op = _EVICT if was is _L0 else _MAP
        return self.apply(PageMutation(op, page_id, self.turn, None, tier, artifact_id=artifact_id))


class MutationLogLite:
    """Append-only list of mutations of one path; replaying it over an empty table gives the table."""

    def __init__(self, entries: Iterable[PageMutation] = ()) -> None:
        self._entries = list(entries)

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

    def replay(self, turn: int | None = None) -> PageTable:
        """The table after the log, or as it was at the end of `turn`."""
        if turn is None:
            return PageTable().replay(self._entries)
        return PageTable().replay(m for m in self._entries if m.turn <= turn)

    def get_context_at_turn(self, turn: int) -> list[str]:
        """Ids of the pages that were in L0 at the end of `turn`, in conversation order."""
        return [entry.page_id for entry in self.replay(turn).resident()]


# -- the stored form: columns of fields, which compress to half of what rows do. One value for all is said once (so
#    a field that nobody uses is a byte), and of what grows from row to row the steps are said.

_Row = TypeVar("_Row", PageTableEntry, PageMutation)
_GROWS = ("position", "sequence", "created_turn", "turn")

_encode = msgspec.msgpack.Encoder().encode
_decode_root = msgspec.msgpack.Decoder(_Root).decode
_decode_group = msgspec.msgpack.Decoder(dict[int, ChunkRef]).decode
_decode_columns = msgspec.msgpack.Decoder(tuple[int, list[Any]]).decode
for _kind in (PageTableEntry, PageMutation):  # msgspec looks up a struct's types at its first use: two threads that are the first at once end the process
    msgspec.convert([], list[_kind])  # type: ignore[valid-type]


def encode_log(mutations: Iterable[PageMutation]) -> bytes:
    """Mutations for storage."""
    return _encode(_columns(list(mutations)))


def decode_log(data: bytes) -> list[PageMutation]:
    """The mutations that `encode_log` was given; ValueError for bytes that it cannot have made."""
    return _structs(data, PageMutation)


def _id_at(position: int, part: int) -> str:
    return make_page_id(position, part) if position >= 0 and part < MEDIA_PART else ""


def _decode_chunk(data: bytes) -> list[PageTableEntry]:
    return _structs(data, PageTableEntry)


def _columns(structs: Sequence[_Row]) -> tuple[int, list[object]]:
    out: list[object] = []
    if structs:
        names: tuple[str, ...] = structs[0].__struct_fields__
        columns: list[Sequence[Any]] = list(zip(*map(msgspec.structs.astuple, structs), strict=True))
        if names[0] == "page_id":  # an entry's, which mostly follows from its place
            columns[0] = ["" if i == _id_at(at, part) else i for i, at, part in zip(*columns[:3], strict=True)]
        values: Sequence[Any]
        for name, values in zip(names, columns, strict=True):
            column = [now - before for before, now in pairwise([0, *values])] if name in _GROWS else list(values)
            same = column.count(column[0]) == len(column)
            out.append(column[0] if same else column)
    return len(structs), out


def _structs(data: bytes, kind: type[_Row]) -> list[_Row]:
    count, columns = _decode_columns(data)
    whole = [column if isinstance(column, list) else [column] * count for column in columns]
    for at, name in enumerate(kind.__struct_fields__[: len(whole)]):
        if name in _GROWS:
            whole[at] = list(accumulate(whole[at]))
    if count and kind is PageTableEntry:
        whole[0] = [i or _id_at(at, part) for i, at, part in zip(*whole[:3], strict=True)]
    return msgspec.convert(list(zip(*whole, strict=True)), list[kind])  # type: ignore[valid-type]


def _add_block(blocks: dict[bytes, bytes], value: object) -> ChunkRef:
    data = _encode(value)
    ref = block_ref(data)
    blocks[ref] = data
    return ref


def block_ref(data: bytes) -> ChunkRef:
    return ChunkRef(blake2b(data, digest_size=REF_BYTES).digest())


def blocks_under(root: bytes, get: GetBlock) -> dict[bytes, bytes]:
    """The blocks of a stored table, by their references; those that are there."""
    found: dict[bytes, bytes] = {}

    def take(ref: ChunkRef) -> bytes | None:
        data = _intact(ref, get)
        if data is not None:
            found[ref] = data
        return data

    data = take(ChunkRef(root))
    groups = map(take, _decode_root(data).groups.values()) if data is not None else ()
    for group in filter(None, groups):
        for ref in _decode_group(group).values():
            take(ref)
    return found


def _intact(ref: ChunkRef, get: GetBlock | None) -> bytes | None:
    data = get(ref) if get is not None else None
    return data if data is not None and block_ref(data) == ref else None


def _chunk_of(entry: PageTableEntry) -> int:
    return _chunk_number(entry.page_id, entry.position)


def _chunk_number(page_id: str, position: int) -> int:
    """0 and up for messages, below 0 for pages without a position."""
    if position >= 0:
        return position >> _CHUNK_BITS
    digits = page_id[len(page_id.rstrip("0123456789")) :][-_MAX_NUMBER_DIGITS:]
    return -1 - (int(digits or 0) >> _CHUNK_BITS)


def _conversation_order(entry: PageTableEntry) -> tuple[int, int, int]:
    return (entry.position, entry.part, entry.sequence)
