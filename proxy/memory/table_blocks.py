"""The page table on disk: a persistent radix tree of entries, copy-on-write and content-addressed.

Promises: a block never changes; its reference is the hash of its bytes, and a block that is missing
or has other bytes is a `MissingBlockError`. The same entries give the same blocks and the same root,
whenever and however often they were written. Writing touches the leaves that changed and the nodes
above them; two trees share every block in which they agree. Finding an entry reads one leaf and
log64(n) nodes. No I/O: reading is by the function that was handed in, writing returns the new blocks.

A leaf holds the entries of 64 consecutive positions, parts and media included. Derived pages have no
position; they are in a tree of their own, by the number at the end of their id. A node knows which
of its children hold pages of the window, so these are found without reading the rest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from proxy.memory.codes import MODALITIES, PAGE_TYPES, PIN_KINDS, TIERS, codes_of, member_of
from proxy.memory.ids import parse_page_id
from proxy.memory.models import CompressionLevel, PageTableEntry, StorageTier

Load = Callable[[bytes], bytes | None]  # a block's bytes by its reference; None: not there

REF_BYTES = 16
MAX_CACHED_NODES = 512  # nodes kept in RAM per tree, each at most 64 references
_FAN_BITS = 6  # 64 children of a node, 64 positions of a leaf
_FAN_MASK = (1 << _FAN_BITS) - 1
_MAX_NUMBER_DIGITS = 9
_UNNUMBERED_SLOTS = 4096
_VERSION = 1

_TIER_CODES = codes_of(TIERS)
_MODALITY_CODES = codes_of(MODALITIES)
_TYPE_CODES = codes_of(PAGE_TYPES)
_PIN_CODES = codes_of(PIN_KINDS)
_LEVELS = tuple(CompressionLevel)
# A row's fields and what is left out at its end when it is this.
_DEFAULTS = (*[None] * 8, 0, 0, 0, 0, 0.5, 0, 0, 0, *[None] * 4)


class MissingBlockError(LookupError):
    """A block that the page table refers to cannot be read."""


class Checkpoint(NamedTuple):
    """A page table as stored: its root record and the blocks that are new since the last one."""

    root: bytes
    blocks: dict[bytes, bytes]


class TreeRef(NamedTuple):
    """A tree: `height` nodes above each leaf; no `ref`: empty. `resident`: it has pages in L0."""

    height: int = 0
    ref: bytes | None = None
    resident: bool = False


class Root(NamedTuple):
    """The root record: both trees, and the counts that nobody wants to scan for.

    `tiers` and `modalities` are counts of pages in the order of `codes`.
    """

    turn: int
    size: int
    tokens: int
    l0_tokens: int
    pinned: int
    tiers: list[int]
    modalities: list[int]
    messages: TreeRef
    derived: TreeRef

    def encode(self) -> bytes:
        """The record's bytes, about 100."""
        return msgspec.msgpack.encode((_VERSION, *self))

    @classmethod
    def decode(cls, data: bytes) -> Root:
        """What `encode` was given; ValueError for bytes that it cannot have written."""
        try:
            version, *fields = msgspec.msgpack.decode(data)
            if version != _VERSION:
                raise ValueError(f"version {version}")
            *plain, messages, derived = fields
            return cls._make((*plain, TreeRef(*messages), TreeRef(*derived)))
        except (TypeError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise ValueError("these bytes are no page table's root record") from error


def leaf_number(page_id: str, position: int) -> int:
    """Which leaf holds a page: 0 and up for messages, below 0 for derived pages (position -1)."""
    if position >= 0:
        return position >> _FAN_BITS
    digits = page_id[len(page_id.rstrip("0123456789")) :][-_MAX_NUMBER_DIGITS:]
    if digits:
        slot = int(digits)
    else:
        slot = zlib.crc32(page_id.encode("utf-8", "surrogatepass")) % _UNNUMBERED_SLOTS
    return -1 - (slot >> _FAN_BITS)


def encode_leaf(entries: Iterable[PageTableEntry]) -> bytes:
    """The bytes of a leaf; the entries in order of registration, whatever order they come in."""
    return msgspec.msgpack.encode([_row(e) for e in sorted(entries, key=lambda e: e.sequence)])


def _row(e: PageTableEntry) -> list[Any]:
    row = [
        e.page_id, e.sequence, e.size_tokens, e.created_turn, e.last_turn, _TIER_CODES[e.tier],
        _MODALITY_CODES[e.modality], _TYPE_CODES[e.page_type],
        int(e.level), e.l0_tokens, e.access_count, e.fault_count, e.importance, e.refault_count,
        int(e.pinned), e.pinned_turn or 0, e.evicted_turn, e.faulted_turn,
        _PIN_CODES[e.pin_kind], e.artifact_id,
    ]  # fmt: skip
    while row[-1] == _DEFAULTS[len(row) - 1]:
        row.pop()
    return row


def decode_leaf(data: bytes) -> list[PageTableEntry]:
    """The entries of a leaf in order of registration."""
    return [_entry(row) for row in msgspec.msgpack.decode(data)]


def _entry(row: list[Any]) -> PageTableEntry:
    full = [*row, *_DEFAULTS[len(row) :]]
    page_id, sequence, size, created, last, tier, modality, kind = full[:8]
    level, l0_tokens, accesses, faults, importance, refaults, pinned = full[8:15]
    pinned_turn, evicted, faulted, pin, artifact = full[15:20]
    position, part = parse_page_id(page_id) or (-1, 0)
    return PageTableEntry(
        page_id,
        position,
        part,
        sequence,
        member_of(MODALITIES, modality),
        member_of(PAGE_TYPES, kind),
        member_of(TIERS, tier),
        _LEVELS[level],
        size,
        l0_tokens,
        importance,
        last,
        bool(pinned),
        accesses,
        faults,
        refaults,
        evicted,
        faulted,
        artifact,
        created,
        None if pin is None else member_of(PIN_KINDS, pin),
        pinned_turn if pinned else None,
    )


class _Node(NamedTuple):
    children: dict[int, bytes]  # reference by slot 0..63
    resident: int  # bit per slot: that child has pages of the window


class _Tree:
    """One radix tree over leaf numbers 0 and up. `state` is all there is to it; nodes are a cache."""

    def __init__(self, state: TreeRef, read: Callable[[bytes], bytes]) -> None:
        self.state = state
        self._read = read
        self._nodes: dict[bytes, _Node] = {}

    def find(self, number: int) -> bytes | None:
        """The reference of a leaf, or None."""
        height, ref, _ = self.state
        if number >> (_FAN_BITS * height):
            return None
        for above in range(height - 1, -1, -1):
            if ref is None:
                return None
            ref = self._node(ref).children.get(number >> (_FAN_BITS * above) & _FAN_MASK)
        return ref

    def leaves(self, resident_only: bool) -> Iterator[int]:
        """The numbers of all leaves, or of those with pages of the window, ascending."""
        height, ref, resident = self.state
        if ref is not None and (resident or not resident_only):
            yield from self._below(ref, height, 0, resident_only)

    def _below(self, ref: bytes, height: int, first: int, resident_only: bool) -> Iterator[int]:
        if height == 0:
            yield first
            return
        node = self._node(ref)
        for slot, child in sorted(node.children.items()):
            if node.resident >> slot & 1 or not resident_only:
                number = first << _FAN_BITS | slot
                yield from self._below(child, height - 1, number, resident_only)

    def put(self, changes: dict[int, tuple[bytes, bool]], blocks: dict[bytes, bytes]) -> TreeRef:
        """The tree with other leaves: reference and whether it has pages of the window, by number.
        New nodes are added to `blocks`; `state` is the caller's to set."""
        if not changes:
            return self.state
        height = self.state.height
        while max(changes) >> (_FAN_BITS * height):
            height += 1
        return self._put(self.state, height, changes, blocks)

    def _put(
        self,
        at: TreeRef,
        height: int,
        changes: dict[int, tuple[bytes, bool]],
        blocks: dict[bytes, bytes],
    ) -> TreeRef:
        """The subtree `at` brought to `height` and changed; numbers count from its first leaf."""
        if not changes and (at.height == height or at.ref is None):
            return TreeRef(height, at.ref, at.resident)
        if height == 0:
            return TreeRef(0, *changes[0])
        by_slot: dict[int, dict[int, tuple[bytes, bool]]] = {}
        shift = _FAN_BITS * (height - 1)
        for number, change in changes.items():
            below = by_slot.setdefault(number >> shift, {})
            below[number & ((1 << shift) - 1)] = change
        node = _Node({}, 0)
        if at.height == height and at.ref is not None:
            node = self._node(at.ref)
        elif at.ref is not None:  # the tree grows: what was there is the first child
            by_slot.setdefault(0, {})
        children, resident = dict(node.children), node.resident
        for slot, below in by_slot.items():
            old = TreeRef(height - 1, children.get(slot), bool(resident >> slot & 1))
            if slot == 0 and at.height < height:
                old = at
            new = self._put(old, height - 1, below, blocks)
            if new.ref is not None:
                children[slot] = new.ref
            resident = resident & ~(1 << slot) | new.resident << slot
        return TreeRef(height, self._write(_Node(children, resident), blocks), resident != 0)

    def _write(self, node: _Node, blocks: dict[bytes, bytes]) -> bytes:
        slots = sorted(node.children)
        refs = b"".join(node.children[slot] for slot in slots)
        present = sum(1 << slot for slot in slots)
        data = msgspec.msgpack.encode((present, node.resident, refs))
        ref = block_ref(data)
        blocks[ref] = data
        self._keep(ref, node)
        return ref

    def _node(self, ref: bytes) -> _Node:
        node = self._nodes.get(ref)
        if node is None:
            present, resident, refs = msgspec.msgpack.decode(self._read(ref))
            slots = [slot for slot in range(1 << _FAN_BITS) if present >> slot & 1]
            starts = range(0, len(refs), REF_BYTES)
            cut = (refs[start : start + REF_BYTES] for start in starts)
            node = _Node(dict(zip(slots, cut, strict=True)), resident)
            self._keep(ref, node)
        return node

    def _keep(self, ref: bytes, node: _Node) -> None:
        if len(self._nodes) >= MAX_CACHED_NODES:
            self._nodes.clear()
        self._nodes[ref] = node


class TableBlocks:
    """Both trees of a page table by leaf number (see `leaf_number`)."""

    def __init__(self, messages: TreeRef, derived: TreeRef, load: Load | None) -> None:
        self._load = load
        self._messages = _Tree(messages, self._read)
        self._derived = _Tree(derived, self._read)

    @property
    def refs(self) -> tuple[TreeRef, TreeRef]:
        """The trees of message pages and of derived pages, for the root record."""
        return self._messages.state, self._derived.state

    @property
    def readable(self) -> bool:
        """Whether what was written can be read back."""
        return self._load is not None

    def read(self, leaf: int) -> list[PageTableEntry]:
        """The entries of a leaf, new objects; [] for one that was never written."""
        ref = self._messages.find(leaf) if leaf >= 0 else self._derived.find(-1 - leaf)
        return [] if ref is None else decode_leaf(self._read(ref))

    def leaves(self, resident_only: bool = False) -> Iterator[int]:
        """The numbers of all leaves, or of those that have pages in L0."""
        yield from self._messages.leaves(resident_only)
        for number in self._derived.leaves(resident_only):
            yield -1 - number

    def write(self, leaves: dict[int, list[PageTableEntry]]) -> dict[bytes, bytes]:
        """Replace whole leaves; returns the new blocks by reference."""
        blocks: dict[bytes, bytes] = {}
        messages: dict[int, tuple[bytes, bool]] = {}
        derived: dict[int, tuple[bytes, bool]] = {}
        for leaf, entries in sorted(leaves.items()):
            data = encode_leaf(entries)
            ref = block_ref(data)
            blocks[ref] = data
            change = ref, any(e.tier is StorageTier.L0 for e in entries)
            if leaf >= 0:
                messages[leaf] = change
            else:
                derived[-1 - leaf] = change
        states = self._messages.put(messages, blocks), self._derived.put(derived, blocks)
        self._messages.state, self._derived.state = states  # both, or neither when a read failed
        return blocks

    def _read(self, ref: bytes) -> bytes:
        data = self._load(ref) if self._load is not None else None
        if data is None:
            raise MissingBlockError(f"block {ref.hex()} of the page table is not in storage")
        if block_ref(data) != ref:
            raise MissingBlockError(f"block {ref.hex()} of the page table is damaged in storage")
        return data


def block_ref(data: bytes) -> bytes:
    """The reference of a block: the hash of its bytes."""
    return blake2b(data, digest_size=REF_BYTES).digest()
