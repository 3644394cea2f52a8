"""A path as it is stored: its nodes are read where they are looked at. Pure.

Promises: a turn costs the same however long the path is: it reads the records of the messages that it looks at, each
found in a few steps; every node has the bytes last seen of it; what of the index is missing or damaged is found along
the records instead, one after the other, so losing it changes no answer (invariants 6, 9). LookupError where a record
is missing.

The index is written along: where a record's messages begin in another 64 positions than those of the record before
it, a leaf is stored with it, of the records since the last leaf. A leaf also has the references of all leaves before
it, as the frontier of a tree: those of the newest leaves, and of nodes of 32 leaves or nodes each. Leaves and nodes
are content-addressed, so branches share them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice

import msgspec

from proxy.conversation.records import GetRecord, Record, backwards
from proxy.conversation.tree import ID_BYTES, Identity, Node, Path
from proxy.memory.table import GetBlock

_LEAF_BITS = 6  # positions
_CHILDREN = 32  # of a node
_KEPT_NODES = 4096  # of a path in RAM, at least: what is read is kept up to twice as many

_Rows = list[tuple[int, bytes]]  # where the messages begin, and what has them: a record, a leaf or a node


class _Leaf(msgspec.Struct, array_like=True, gc=False):
    """Records one behind the other. `frontier`: by height, leaves (0) and nodes that are in no node yet."""

    rows: _Rows
    frontier: list[_Rows]


_encode = msgspec.msgpack.Encoder().encode
_decode_leaf = msgspec.msgpack.Decoder(_Leaf).decode
_decode_rows = msgspec.msgpack.Decoder(_Rows).decode


def load_path(head: Record, get: GetRecord, get_block: GetBlock, identity: Identity) -> Path:
    """The path from the root to the head's last message."""
    return Path(StoredPath(head, get, get_block, identity), head.end, [])


class StoredPath(Sequence[Node]):
    """The nodes up to a record's last message; `path[i]` alone is its interface."""

    def __init__(self, head: Record, get: GetRecord, get_block: GetBlock, identity: Identity) -> None:
        self._end = head.end
        self._get, self._get_block, self._identity = get, get_block, identity
        self._newest = [head]  # the newest records, back to the last with a leaf or further
        self._nodes: dict[int, Node] = {}

    def __len__(self) -> int:
        return self._end

    def __getitem__(self, at: int) -> Node:  # type: ignore[override]  # slices are `Path`'s
        node = self._nodes.get(at)
        if node is None:
            if len(self._nodes) >= 2 * _KEPT_NODES:
                self._nodes = dict(islice(self._nodes.items(), _KEPT_NODES, None))
            record = self._record(at)
            after = self._record(record.end) if record.end < self._end else None
            nodes = nodes_of(record, after, self._get, self._identity)
            self._nodes.update(enumerate(nodes, record.first))
            node = self._nodes[at]
        return node

    def _record(self, position: int) -> Record:
        newest = self._newest
        while position < newest[-1].first:
            oldest = newest[-1]
            found = self._find(oldest.leaf, position) if oldest.leaf else None
            if found is not None:
                return found
            newest.append(_need(oldest.parent, self._get))
        low, high = 0, len(newest) - 1
        while low < high:  # the first, that is the newest one, that begins here or before
            middle = (low + high) // 2
            low, high = (low, middle) if newest[middle].first <= position else (middle + 1, high)
        return newest[low]

    def _find(self, ref: bytes, position: int) -> Record | None:
        """The record before a leaf's that has the position; None where the index is damaged."""
        leaf = _leaf(ref, self._get_block)
        if leaf is None:
            return None
        for height, rows in enumerate(leaf.frontier):
            if leaf.rows[0][0] <= position:
                break
            if not rows or position < rows[0][0]:
                continue
            for _ in range(height):
                data = self._get_block(_row(rows, position))
                if data is None:
                    return None
                rows = _decode_rows(data)
            leaf = _leaf(_row(rows, position), self._get_block)
            if leaf is None:
                return None
            break
        return _need(_row(leaf.rows, position), self._get)


def _row(rows: _Rows, position: int) -> bytes:
    return rows[bisect_right(rows, position, key=lambda row: row[0]) - 1][1]


def _leaf(ref: bytes, get_block: GetBlock) -> _Leaf | None:
    data = get_block(ref)
    return _decode_leaf(data) if data is not None and _ref(data) == ref else None


def nodes_of(record: Record, after: Record | None, get: GetRecord, identity: Identity) -> list[Node]:
    """The record's nodes; `after`: the record behind it on the path."""
    nodes = list(islice(backwards(record, get), record.end - record.first))[::-1]
    if after is not None and after.echo:
        nodes[-1].raw = after.echo
    before: bytes = record.parent
    for node in nodes:
        if not node.id:  # a shared one
            node.id = identity.child(before, node.content)
        before = node.id
    return nodes


def indexed(
    records: Sequence[Record], parent: Record | None, get: GetRecord, get_block: GetBlock
) -> tuple[list[Record], dict[bytes, bytes]]:
    """The new records behind `parent`, with the references of their leaves, and the leaves by reference."""
    out: list[Record] = []
    blocks: dict[bytes, bytes] = {}
    fresh: dict[bytes, Record] = {}
    for record in records:
        if parent is not None and record.first >> _LEAF_BITS != parent.first >> _LEAF_BITS:
            leaf = _new_leaf(parent, blocks, lambda i: fresh.get(i) or get(i), lambda r: blocks.get(r) or get_block(r))
            record = msgspec.structs.replace(record, leaf=_add(blocks, leaf))
        fresh[record.id] = parent = record
        out.append(record)
    return out, blocks


def _new_leaf(last: Record, blocks: dict[bytes, bytes], get: GetRecord, get_block: GetBlock) -> _Leaf:
    rows: _Rows = []
    at: Record | None = last
    before: _Leaf | None = None
    ref = b""
    while at is not None:
        rows.append((at.first, at.id))
        before = _leaf(ref := at.leaf, get_block) if at.leaf else None
        at = _need(at.parent, get) if at.parent and before is None else None
    frontier = [list(level) for level in before.frontier] if before is not None else []
    new = (before.rows[0][0], ref) if before is not None else None
    height = 0
    while new is not None:
        if height == len(frontier):
            frontier.append([])
        level = frontier[height]
        level.append(new)
        new = None
        if len(level) == _CHILDREN:
            new = (level[0][0], _add(blocks, level))
            frontier[height] = []
            height += 1
    return _Leaf(rows[::-1], frontier)


def _add(blocks: dict[bytes, bytes], value: object) -> bytes:
    data = _encode(value)
    blocks[ref := _ref(data)] = data
    return ref


def _ref(data: bytes) -> bytes:
    return blake2b(data, digest_size=ID_BYTES).digest()


def _need(record_id: bytes, get: GetRecord) -> Record:
    record = get(record_id)
    if record is None:
        raise LookupError("a record that others continue is missing from storage")
    return record
