"""What is stored of a conversation: the record of an answered turn, and all that is read back from it. Pure.

Promises: one commit holds a whole turn, so it is there or it is not; every answer on a path has a
record and every record its parent; a turn stored twice is stored once (keys are content). The same
record gives the same state on any replica, before and after a restart (invariants 7, 9). The table is
opened where it was last stored and only what happened since is replayed, so the cost
does not grow with the conversation; a block of it that is lost is made again from the whole log.

A record has the messages since the answer before, up to its own answer. Three chains run through them
(`a <- b`: b names a), each to what is stored already:

    parent   r1 <- r2 <- r3 <- r4 <- r5 <- r6       every answer on the path: its messages
    base           r2 <--------- r4 <- r5 <- r6     every turn that paged: its window and its mutations
    closed         r2 <--------------- r5           every turn that closed a segment: derived pages, table

Here r1 fitted the window, and r3 came in the request that r4 answered (the client wrote its history
anew, or it talked past us) and left no state, so r4 goes on from r2; where that turn settled what it
found answered, r3 has a state as if in a turn of its own, and r4 goes on from it. `r6.closed` is r5: the last one
along the bases with a `closing`. Messages are read along `parent`, a window along `base` up to the turn
that began its epoch, the table along `base` up to the last `closing` that has a root, and the whole
mutation log along `base` to the end.

What stands behind r3 may be said otherwise in two requests at once, which then both store r3; how much
room was left behind it may have made the two states differ. The first one stays, and `based` tells the
loser, whose r4 goes on from what is not there: it is a miss.

A client that says something else further up (an address that is signed anew, a note some messages before
the end) sends messages that are stored already, under other nodes. Those that the answer before it stands on
as well are not stored again: the record that is `Shared` says where they are read. No record ends in them.
A large message that moved (files that are always the newest message but one) is read `elsewhere`, too.
Where it does so with every request and nothing of a window can be kept from one to the next, its state is
`unkept` as well: it is as large as the history, and nobody goes on from it.

A path is read where it is looked at, so a turn costs the same however long it is: each record is found in a few
steps. Where a record's messages begin in another 64 positions than those of the record before it, a leaf of the
path's index is stored with it, of the records since the last leaf. It also has the references of all leaves before
it, as the frontier of a tree: those of the newest leaves, and of nodes of 32 leaves or nodes each. They are
content-addressed, so branches share them; what is lost of them is found along the records, one after the other.

The letters of the keys are in keys.py; what a record keeps in bytes:

    window     _WindowChange: the entries added since `base`, or the whole window of a new epoch
    mutations  `memory.table.encode_log`: this turn's mutations, from `base` on
    closing    `derived.Closing`: what this turn's epochs derived, and, now and then, the root of its page table
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import msgspec
import zstandard

from proxy import keys
from proxy.conversation.bill import Account
from proxy.conversation.calibration import Bill
from proxy.conversation.derived import Derived, restored, table_root
from proxy.conversation.effects import Append
from proxy.conversation.tree import HASH_BYTES, ContentId, Identity, Node, NodeId, Path, TenantKey
from proxy.conversation.window import Entry, Window
from proxy.memory.ids import parse_page_id
from proxy.memory.message_text import message_text
from proxy.memory.models import MutationType, PageMutation
from proxy.memory.table import GetBlock, MutationLogLite, PageTable, decode_log


class Sent(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """The request whose answer was delivered: what a history that lost its front is known by."""

    frame: bytes  # its front system messages and tools (`Identity.frame`)
    start: int = 0  # where its first message stands on the record's path
    moves: int = 0  # how many times in a row, up to this request, the client's front had moved on
    above: bytes = b""  # the record whose path the first message stood on, where that is another path
    above_at: int = 0  # and where it stood on it


class Shared(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Messages of a record that stand on another's path, with the same bytes: the last `count` of it but for
    the last `skip`. They follow the first `head` of the record's own."""

    record: bytes
    count: int
    skip: int
    head: int


class Request(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """The upstream request that was answered (envelope.py): the block with its envelope, the hash of all its bytes, and what
    makes them of those that the envelope gives, where these are others."""

    envelope: bytes
    digest: bytes
    patch: bytes = b""


class Record(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one answered turn adds to the tree; stored under the id of its last node, immutable.

    A record ends with an assistant message; `parent` is the id of the record before it (b"" for
    the first), `first` the position of its first message along the path. The lists leave out what is `shared`.
    """

    parent: bytes
    first: int
    ids: list[NodeId]
    contents: list[ContentId]
    roles: list[str]
    raws: list[bytes]
    tokens: list[int]
    turn: int
    echo: bytes = b""  # what makes the client's own bytes of the previous answer's, where they differ
    base: bytes = b""  # the record after whose state this turn's window and table were continued
    window: bytes = b""  # empty: never evicted
    mutations: bytes = b""
    substitute: list[bytes] = []  # messages that go upstream in place of the answer's echo (mixed calls)
    counter: str = ""  # what `tokens` were counted with
    closing: bytes = b""
    closed: bytes = b""  # the last record before this one, along the bases, that has a `closing`
    sent: Sent | None = None  # None: this answer came in a request, nobody delivered it here
    bill: Bill | None = None  # of the turn's last upstream request, and what was known after it
    account: Account | None = None  # what the path was billed up to here; None: this answer came in a request
    seen_s: int = 0  # when its messages were first seen (Unix time; 0: in a version that did not say)
    answered_s: int = 0  # and its answer (0 as well: it came in the first request of its conversation)
    based: bytes = b""  # the digest of the state of `base`, which was stored in the same commit
    shared: Shared | None = None
    elsewhere: list[tuple[int, bytes, int]] = []  # a message without bytes: the record and the place that has them
    unkept: bool = False  # it paged, and its state is not here: who goes on from it begins anew
    leaf: bytes = b""  # of the path's index: where the records before it are
    request: Request | None = None  # None: this answer came in a request

    @property
    def id(self) -> NodeId:
        return self.ids[-1]

    @property
    def end(self) -> int:
        """The position after its last message."""
        return self.first + len(self.ids) + (self.shared.count if self.shared else 0)

    @property
    def log(self) -> list[PageMutation]:
        """Its mutations."""
        return decode_log(self.mutations) if self.mutations else []

    @property
    def others(self) -> list[bytes]:
        """Records whose messages it reads or goes on from, perhaps on another conversation's path."""
        found = [other for _, other, _ in self.elsewhere]
        if self.shared is not None:
            found.append(self.shared.record)
        if self.sent is not None and self.sent.above:
            found.append(self.sent.above)
        return found


class _Leaf(msgspec.Struct, array_like=True, gc=False):
    """Records one behind the other. `frontier`: by height, leaves (0) and nodes that are in no node yet."""

    rows: _Rows
    frontier: list[_Rows]


class _WindowChange(msgspec.Struct, array_like=True, omit_defaults=True):
    """An entry without bytes has those of the message at its position on the path. `evidence`: of those with pages
    in front of the message, in their order, what makes it of the message and the pages' own."""

    covered: int
    entries: tuple[Entry, ...] = ()
    snapshot: Window | None = None
    kept: int = -1  # of the entries before, the first so many; -1: all of them
    evidence: list[bytes] = []


_LEAF_BITS = 6  # positions
_CHILDREN = 32  # of a node
_KEPT_LEAVES = 8
_KEPT_NODES = 4096  # of a path in RAM, at least: what is read is kept up to twice as many

_Rows = list[tuple[int, bytes]]  # where the messages begin, and what has them: a record, a leaf or a node
_AS_IT_IS = zstandard.DICT_TYPE_RAWCONTENT
_LEAST_ALIKE = 2  # messages that are not stored again
_LARGE_BYTES = 1024  # a message that is looked for near the end of the path before it
_NEAR = 4  # records
_TIME_BYTES = 4
_TITLE_CHARS, _TITLE_READ_CHARS = 160, 4096

GetRecord = Callable[[bytes], Record | None]
GetStoredBlock = Callable[[bytes, bytes], bytes | None]  # by its owner and its reference
RawAt = Callable[[int], bytes | None]  # a message's bytes, as they are stored; None: they are not

_encode = msgspec.msgpack.Encoder().encode
encode_record = _encode
decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_change = msgspec.msgpack.Decoder(_WindowChange).decode
_decode_leaf = msgspec.msgpack.Decoder(_Leaf).decode
_decode_rows = msgspec.msgpack.Decoder(_Rows).decode
_replace = msgspec.structs.replace
NO_LARGE: Mapping[bytes, tuple[bytes, int]] = {}


def record_key(node_id: bytes) -> bytes:
    return keys.RECORD + node_id


def block_key(owner: bytes, ref: bytes) -> bytes:
    return keys.BLOCK + owner + ref


def conversation_key(owner: bytes) -> bytes:
    return keys.CONVERSATION + owner


def tip_key(node_id: bytes) -> bytes:
    return keys.TIP + owner_of(node_id) + node_id[keys.OWNER_BYTES :]


def owner_of(node_id: bytes) -> bytes:
    """Whose a node is: the first bytes of its id (keys.py)."""
    return node_id[: keys.OWNER_BYTES]


def conversation_name(owner: bytes) -> str:
    """By which people know a conversation: of its owner what differs within a tenant, in hexadecimal."""
    return owner[keys.TENANT_BYTES :].hex()


def link_key(owner: bytes, other: bytes) -> bytes:
    """Says of two conversations of a tenant that what is erased of one has to be erased of both."""
    return keys.LINK + owner + other


class LastUse(NamedTuple):
    """What stands under a conversation's key: its last answer, and when that was given (Unix time)."""

    head: NodeId
    used_s: int

    def encode(self) -> bytes:
        return self.head + self.used_s.to_bytes(_TIME_BYTES, "big")

    @staticmethod
    def order(data: bytes) -> bytes:
        """Of what is encoded: the later one's is the greater."""
        return data[-_TIME_BYTES:]

    @classmethod
    def decode(cls, data: bytes) -> LastUse:
        return cls(NodeId(data[:-_TIME_BYTES]), int.from_bytes(data[-_TIME_BYTES:], "big"))


class Title(NamedTuple):
    """What people recognise a conversation by: when it began (Unix time), and how."""

    began_s: int
    words: str

    @classmethod
    def of(cls, first: Node, seen_s: int) -> Title:
        """Of a conversation's first message."""
        text = message_text(msgspec.json.decode(first.raw))[:_TITLE_READ_CHARS]
        words = " ".join(text.split(None, _TITLE_CHARS // 2 + 1)[: _TITLE_CHARS // 2 + 1])  # of a letter each: too long
        if len(words) > _TITLE_CHARS:
            words = words[: _TITLE_CHARS - 1].rpartition(" ")[0] + " …"
        return cls(seen_s, words.lstrip())

    def encode(self) -> bytes:
        return self.began_s.to_bytes(_TIME_BYTES, "big") + self.words.encode("utf-8", "replace")

    @classmethod
    def decode(cls, data: bytes) -> Title:
        return cls(int.from_bytes(data[:_TIME_BYTES], "big"), data[_TIME_BYTES:].decode("utf-8", "replace"))


def blocks_of(owner: bytes, get_block: GetStoredBlock) -> GetBlock:
    """A conversation's blocks by their reference alone."""
    return partial(get_block, owner)


# -- reading: a path and its state. LookupError where a record is missing that was written before, or in
#    one commit with, the one that names it: a damaged store


class State(NamedTuple):
    """The state after a turn. The table is the caller's to change."""

    window: Window | None
    table: PageTable
    derived: Derived


def deepest_record(path: Sequence[Node], get: GetRecord) -> Record | None:
    """The record of the deepest answered node on the path, or None for a path never seen.

    A node is stored with all of its ancestors, so "is stored" is monotone along the path: the last
    answer is nearly always the one, else a binary search finds it.
    """
    last = next((i for i in range(len(path) - 1, -1, -1) if path[i].role == "assistant"), None)
    if last is None:
        return None
    found = get(path[last].id)
    if found is not None:
        return found
    answers = [i for i in range(last) if path[i].role == "assistant"]
    if not answers or get(path[answers[0]].id) is None:
        return None
    return get(path[answers[bisect_left(answers, True, 1, key=lambda i: get(path[i].id) is None) - 1]].id)


def load_path(head: Record, get: GetRecord, get_block: GetStoredBlock, identity: Identity | None) -> Path:
    """The path from the root to the head's last message: each node with the bytes last seen of it, read where it
    is looked at. `identity`: None where nobody asks for ids."""
    return Path(StoredPath(head, get, get_block, identity), head.end, [])


class StoredPath(Sequence[Node]):
    """The nodes up to a record's last message; `path[i]` alone is its interface."""

    def __init__(self, head: Record, get: GetRecord, get_block: GetStoredBlock, identity: Identity | None) -> None:
        self._end = head.end
        self._get, self._get_block, self._identity = get, blocks_of(owner_of(head.id), get_block), identity
        self._newest = [head]  # the newest records, back to the last with a leaf or further
        self._nodes: dict[int, Node] = {}
        self._leaves: dict[bytes, _Leaf] = {}  # that were decoded, the last few

    def __len__(self) -> int:
        return self._end

    def __getitem__(self, at: int) -> Node:  # type: ignore[override]  # slices are `Path`'s
        node = self._nodes.get(at)
        if node is None:
            if len(self._nodes) >= 2 * _KEPT_NODES:
                self._nodes = dict(islice(self._nodes.items(), _KEPT_NODES, None))
            record = self.record(at)
            after = self.record(record.end) if record.end < self._end else None
            nodes = nodes_of(record, after, self._get, self._identity)
            self._nodes.update(enumerate(nodes, record.first))
            node = self._nodes[at]
        return node

    def record(self, position: int) -> Record:
        """The record that has the position."""
        newest = self._newest
        while position < newest[-1].first:
            oldest = newest[-1]
            found = self._find(oldest.leaf, position) if oldest.leaf else None
            if found is not None:
                return found
            newest.append(needed(oldest.parent, self._get))
        return newest[bisect_left(newest, True, key=lambda record: record.first <= position)]

    def _find(self, ref: bytes, position: int) -> Record | None:
        """The record before a leaf's that has the position; None where the index is damaged."""
        leaf = self._leaf(ref)
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
            leaf = self._leaf(_row(rows, position))
            if leaf is None:
                return None
            break
        return needed(_row(leaf.rows, position), self._get)

    def _leaf(self, ref: bytes) -> _Leaf | None:
        leaf = self._leaves.get(ref)
        if leaf is None and (leaf := _leaf(ref, self._get_block)) is not None:
            if len(self._leaves) >= _KEPT_LEAVES:
                del self._leaves[next(iter(self._leaves))]
            self._leaves[ref] = leaf
        return leaf


def _row(rows: _Rows, position: int) -> bytes:
    return rows[bisect_right(rows, position, key=lambda row: row[0]) - 1][1]


def _leaf(ref: bytes, get_block: GetBlock) -> _Leaf | None:
    data = get_block(ref)
    return _decode_leaf(data) if data is not None and _ref(data) == ref else None


def nodes_of(record: Record, after: Record | None, get: GetRecord, identity: Identity | None) -> list[Node]:
    """The record's nodes; `after`: the record behind it on the path."""
    nodes = list(islice(backwards(record, get), record.end - record.first))[::-1]
    if after is not None and after.echo:
        nodes[-1].raw = other(after.echo, nodes[-1].raw)
    before: bytes = record.parent
    for node in nodes:
        if not node.id and identity is not None:  # a shared one
            node.id = identity.child(before, node.content)
        before = node.id
    return nodes


def backwards(head: Record, get: GetRecord) -> Iterator[Node]:
    """The nodes from the head's last message to the root; those that are shared have no id."""
    record, at = head, len(head.ids) - 1  # the next message: of the record's own
    within: list[tuple[int, Record]] = []  # whose shared messages are read, and how many are told with them
    told, skip, echo = 0, 0, b""
    while True:
        if at < 0:
            if not record.parent:
                break
            echo, record = record.echo, needed(record.parent, get)
            at = len(record.ids) - 1
        if skip:
            skip -= 1
        else:
            yield Node(
                NodeId(b"") if within else record.ids[at], record.contents[at], record.roles[at],
                other(echo, record.raws[at]) if echo else _raw(record, at, get), record.tokens[at], record.counter,
                seen_s=record.answered_s if at == len(record.ids) - 1 else record.seen_s,
            )  # fmt: skip
            told += 1
        echo, shared = b"", record.shared
        if shared is not None and at == shared.head:
            until = told + shared.count
            within.append((min(until, within[-1][0]) if within else until, record))
            skip, record = shared.skip, needed(shared.record, get)
            at = len(record.ids)
        at -= 1
        while within and within[-1][0] == told:
            _, record = within.pop()
            at, skip = (record.shared.head if record.shared else 0) - 1, 0


def _raw(record: Record, at: int, get: GetRecord) -> bytes:
    for place, other, there in record.elsewhere:
        if place == at:
            return needed(other, get).raws[there]
    return record.raws[at]


def large_messages(record: Record, get: GetRecord) -> dict[bytes, tuple[bytes, int]]:
    """Which record, and at which place, has the bytes of the large messages that stand near the end of `record`'s
    path."""
    found: dict[bytes, tuple[bytes, int]] = {}
    near: Record | None = record
    for _ in range(_NEAR):
        if near is None:
            break
        refs = {place: (other, there) for place, other, there in near.elsewhere}
        for at in range(len(near.raws)):
            raw = _raw(near, at, get)
            if len(raw) >= _LARGE_BYTES:
                found.setdefault(raw, refs.get(at, (near.id, at)))
        near = get(near.parent) if near.parent else None
    return found


class Alike(NamedTuple):
    """So many messages of a path, from the position `first` on, that `record`'s path has at its end but for
    `skip`."""

    record: Record
    first: int
    messages: int
    skip: int

    @property
    def again(self) -> bool:
        """That path had been changed in the same way."""
        return self.record.shared is not None


def find_alike(path: Sequence[Node], first: int, end: int, record: Record, get: GetRecord) -> Alike | None:
    """How much of positions first..end-1, but for the first of them, `record`'s path ends with, by its bytes
    (an answer at its very end may be echoed in other ones). None: too little to be worth it."""
    at, skip = end, 0
    try:
        for node in backwards(record, get):
            if at - 1 <= first or path[at - 1].content != node.content:
                break
            if path[at - 1].raw != node.raw:
                if at < end:
                    break
                skip = 1
            at -= 1
    except LookupError:  # of another path: this one is stored whole
        return None
    count = end - skip - at
    return Alike(record, at, count, skip) if count >= _LEAST_ALIKE else None


def record_at(head: Record, turn: int, get: GetRecord, get_block: GetStoredBlock) -> Record:
    """The record of a turn (1 to that of `head`) on the way to `head`, in a few steps: turns are about equally long as a
    rule; every second step halves what is left, where they are not. A turn whose answer came in a request may have none,
    where its client had changed what stands before it: then the one before it, or the first."""
    path, low, high = StoredPath(head, get, get_block, None), 0, head.end - 1
    record, first, last, halve = head, 1, head.turn, False
    while record.turn != turn and low <= high:
        share = 0.5 if halve else (turn - first) / max(1, last - first)
        record, halve = path.record(low + round((high - low) * share)), not halve
        if record.turn < turn:
            low, first = record.end, record.turn + 1
        else:
            high, last = record.first - 1, record.turn - 1
    return needed(record.parent, get) if record.turn > turn and record.parent else record


def epoch_begun(record: Record) -> int | None:
    """The number of the epoch that began in the record's turn, or whose window was counted anew in it; None: it went on."""
    snapshot = _decode_change(record.window).snapshot if record.window else None
    return snapshot.epoch if snapshot is not None else None


def restore_state(head: Record, get: GetRecord, get_block: GetStoredBlock) -> State:
    """The state after `head`."""
    table = restore_table(head, get, get_block)
    return State(restore_window(head, get, get_block), table, restore_derived(head, get))


def restore_table(head: Record, get: GetRecord, get_block: GetStoredBlock) -> PageTable:
    """The page table of that state, a new one."""
    _check_bases(head, get)
    logs: list[bytes] = []
    table = PageTable()
    for record in _bases(head, get):
        if record.closing and (root := table_root(record.closing)):
            table = PageTable.open(root, blocks_of(owner_of(head.id), get_block), partial(replayed, record, get))
            break
        logs.append(record.mutations)
    for log in reversed(logs):
        table.replay(decode_log(log))
    return table


def replayed(head: Record, get: GetRecord) -> PageTable:
    """That table, made of the whole log."""
    return history(head, get).replay()


def restore_window(head: Record, get: GetRecord, get_block: GetStoredBlock) -> Window | None:
    """The window after the record's turn; None for a conversation that was never evicted from."""
    changes: list[_WindowChange] = []
    path = load_path(head, get, get_block, None)
    for record in _bases(head, get):
        if not record.window:
            break
        change = _read_change(record, path)
        if change.snapshot is not None:
            window = change.snapshot
            for later in reversed(changes):
                if later.kept >= 0:
                    window = window.until(later.kept, later.covered)
                window = window.append(later.entries, later.covered)
            return window
        changes.append(change)
    if changes:
        raise LookupError("the beginning of an epoch's window is missing from storage")
    return None


def _read_change(record: Record, path: Sequence[Node]) -> _WindowChange:
    """What the record stored of its window, every entry with its bytes; `path`: its own, and perhaps more behind it."""
    change = _decode_change(record.window)
    entries = change.entries if change.snapshot is None else change.snapshot.entries
    evidence = iter(change.evidence)

    def whole(entry: Entry) -> Entry:
        if entry.raw:
            return entry
        if not entry.shown:
            return _replace(entry, raw=path[entry.position].raw)
        quoted = _quoted(entry, lambda at: path[at].raw)
        return _replace(entry, raw=other(next(evidence), quoted or b""))

    entries = tuple(map(whole, entries))
    if change.snapshot is None:
        change.entries = entries
    else:
        change.snapshot = _replace(change.snapshot, entries=entries)
    return change


def restore_derived(head: Record, get: GetRecord) -> Derived:
    """All that the closed segments left, from the first to the last."""
    closings: list[bytes] = []
    at: Record | None = head
    while at is not None:
        if at.closing:
            closings.append(at.closing)
        at = needed(at.closed, get) if at.closed else None
    return restored(reversed(closings))


def history(head: Record, get: GetRecord) -> MutationLogLite:
    """The whole mutation log of a path, from its first page to `head`."""
    log = MutationLogLite()
    for encoded in reversed([record.mutations for record in _bases(head, get) if record.mutations]):
        log.extend(decode_log(encoded))
    return log


def brought_since(head: Record, position: int, get: GetRecord) -> list[str]:
    """The pages that were brought into the window, unplanned, by turns whose newest message stands at
    `position` or behind it."""
    found: dict[str, None] = {}
    for record in _bases(head, get):
        if record.end <= position:
            break
        for m in record.log:
            if m.op is MutationType.FAULT_IN or (m.op is MutationType.MAP and m.reason is not None):
                found[m.page_id] = None
    return list(found)


def _bases(head: Record, get: GetRecord) -> Iterator[Record]:
    """The record, and those whose windows its own goes on from, backwards."""
    yield head
    while head.base:
        head = needed(head.base, get)
        yield head


def _check_bases(head: Record, get: GetRecord) -> None:
    """LookupError when the state that this one goes on from was never stored: another request's was, of
    the same messages, in the moment before the commit."""
    while head.based:
        base = needed(head.base, get)
        if state_digest(base) != head.based:
            raise LookupError("two requests at once stored the same messages, and this is the later one")
        head = base


def state_digest(record: Record) -> bytes:
    """Of the state that it stores: what `based` of the next one names."""
    state = (record.base, record.based, record.window, record.mutations, record.closing)
    return _ref(_encode(state))


def needed(record_id: bytes, get: GetRecord) -> Record:
    """A record that another one names. LookupError where it is not there."""
    record = get(record_id)
    if record is None:
        raise LookupError("a record that others continue is missing from storage")
    return record


# -- writing: what an answered turn adds


class Stored(NamedTuple):
    """A state as a record keeps it: the window, and since the state that it was continued from the
    encoded mutations and what its epochs derived. `blocks` are the page table's new ones, by reference;
    `end` is the position after the messages that it is the state after."""

    end: int
    window: Window
    mutations: bytes
    closing: bytes
    blocks: Mapping[bytes, bytes]
    derived: Derived

    def fields(self, before: Window | None, record: Record | None, raw_at: RawAt) -> dict[str, object]:
        """A record's fields; `before` is the window after `record`, which it was continued from; `raw_at`: see
        `encode_change`."""
        fields: dict[str, object] = {
            "window": encode_change(before, self.window, raw_at),
            "mutations": self.mutations,
            "closing": self.closing,
        }
        if before is not None and record is not None:
            fields["base"] = record.id
            fields["closed"] = record.id if record.closing else record.closed
        return fields


class SessionNames(NamedTuple):
    """The storage keys of what a request calls its session: the answers given under the name, and,
    for a client that sends only what is new, the head. None: it calls it nothing."""

    label: bytes | None = None
    delta: bytes | None = None


NO_NAMES = SessionNames()


def encode_change(before: Window | None, after: Window, raw_at: RawAt = lambda _: None) -> bytes:
    """What a turn stores: the entries added (behind those kept), or the whole window when a new
    epoch began in it, or when it was counted anew. `raw_at`: of what stands on the path, which is read from there
    and not said again."""
    if before is None or _measure(before) != _measure(after):
        entries, evidence = _without(raw_at, after.entries)
        snapshot = _replace(after, entries=entries)
        return _encode(_WindowChange(after.covered, snapshot=snapshot, evidence=evidence))
    old, new = before.entries, after.entries
    pairs = enumerate(zip(old, new, strict=False))
    kept = next((i for i, (a, b) in pairs if a is not b and a != b), min(len(old), len(new)))
    added, evidence = _without(raw_at, new[kept:])
    return _encode(_WindowChange(after.covered, added, kept=-1 if kept == len(old) else kept, evidence=evidence))


def _without(raw_at: RawAt, entries: Sequence[Entry]) -> tuple[tuple[Entry, ...], list[bytes]]:
    out: list[Entry] = []
    evidence: list[bytes] = []
    for entry in entries:
        if entry.shown:
            quoted = _quoted(entry, raw_at)
            if quoted is not None:
                evidence.append(difference(entry.raw, quoted))
        if quoted is not None if entry.shown else entry.position >= 0 and raw_at(entry.position) == entry.raw:
            entry = _replace(entry, raw=b"")
        out.append(entry)
    return tuple(out), evidence


def difference(data: bytes, source: bytes) -> bytes:
    """What `other` makes the data of, again, and of no other source."""
    dictionary = zstandard.ZstdCompressionDict(source, _AS_IT_IS)
    return zstandard.ZstdCompressor(3, dictionary, write_checksum=True).compress(data)


def other(difference: bytes, source: bytes) -> bytes:
    try:
        return zstandard.ZstdDecompressor(zstandard.ZstdCompressionDict(source, _AS_IT_IS)).decompress(difference)
    except zstandard.ZstdError as error:
        raise LookupError("what a message was made of is not what is stored") from error


def _quoted(entry: Entry, raw_at: RawAt) -> bytes | None:
    """What a message with evidence is made of: its own bytes and those of the pages; None where one is not stored."""
    places = filter(None, map(parse_page_id, entry.shown))
    raws = [raw_at(position) for position in (*dict.fromkeys(at for at, _ in places), entry.position)]
    if None in raws:
        return None
    return b"".join(filter(None, raws))


def _measure(window: Window) -> tuple[int, str, float]:
    return window.epoch, window.counter, window.factor


def answered_by(path: Sequence[Node], record: Record | None) -> list[int]:
    """The positions behind the path's answers that have no record yet: each ends one, and counts as a turn."""
    first = record.end if record else 0
    return [i + 1 for i in range(first, len(path)) if path[i].role == "assistant"]


def new_records(
    path: Sequence[Node], parent: Record | None, last: dict[str, object], states: Sequence[Stored] = (),
    before: Window | None = None, known: Bill | None = None, alike: Alike | None = None,
    large: Mapping[bytes, tuple[bytes, int]] = NO_LARGE, seen_s: int = 0,
    account: Callable[[int], Account | None] = lambda _: None, stored: Sequence[Node] = (),
) -> list[Record]:  # fmt: skip
    """Records for the positions after `parent`; one for each run that ends with an answer, but from what is
    `alike` on one for all. `large`: see `large_messages`.

    `path` ends with an answer; `last` are the last record's own fields (substitute, sent, bill, account), which
    describe the turn that is being stored; its echo is that of the parent's answer: the first record's.
    `states`, in the order of the path, were continued one from the other, the first one from `before`,
    the window after `parent` (None: it began anew). For all but the last: `known`, what the turn began with,
    and `account`, of the path up to a position. `seen_s`: when the request came (Unix time). `stored`: the path
    up to `parent`, as it is stored.
    """
    records: list[Record] = []
    first = first_new = parent.end if parent else 0
    turn = parent.turn if parent else 0
    counter = path[-1].counter or next((n.counter for n in reversed(path) if n.counter), "")
    above = parent.id if parent else b""
    for position in range(first, len(path)):
        if path[position].role != "assistant":
            continue
        turn += 1
        shared, run = None, path[first : position + 1]
        if alike is not None and position >= alike.first:
            if position + 1 < len(path):
                continue
            shared = Shared(alike.record.id, alike.messages, alike.skip, alike.first - first)
            run = [*path[first : alike.first], *path[alike.first + alike.messages :]]
        # (Its last message is read by itself.)
        refs = {at: large[node.raw] for at, node in enumerate(run[:-1]) if node.raw in large} if large else {}
        records.append(Record(
            above, first, [node.id for node in run], [node.content for node in run], [node.role for node in run],
            [b"" if at in refs else node.raw for at, node in enumerate(run)],
            [node.tokens if node.counter == counter else -1 for node in run],
            turn, counter=counter, bill=known, account=account(position + 1), shared=shared,
            elsewhere=[(at, *ref) for at, ref in refs.items()],
            seen_s=run[0].seen_s or seen_s,
            answered_s=run[-1].seen_s or ((run[0].seen_s or seen_s) if parent else 0),
        ))  # fmt: skip
        first, above = position + 1, run[-1].id
    if not records:
        return []
    echo = last.get("echo")
    records[-1] = _replace(records[-1], **{k: v for k, v in last.items() if k != "echo"})
    if isinstance(echo, bytes) and echo and parent is not None:
        records[0] = _replace(records[0], echo=difference(echo, parent.raws[-1]))
    at, base, known_end = 0, parent, max(0, first_new - 1)

    def raw_at(position: int) -> bytes | None:
        node = path[position]
        if position >= known_end or node.stored:  # the last answer's, too: its echo is in the first of these records
            return node.raw
        try:
            raw = stored[position].raw if stored else None
        except LookupError:  # damaged: what it says is said again
            return None
        node.stored = raw == node.raw
        return raw

    for state in states:
        while records[at].end < state.end:
            at += 1
        record = records[at]
        fields = state.fields(before, base, raw_at)
        if base is not parent and base is not None:
            fields["based"] = state_digest(base)
        base = records[at] = _replace(record, **fields)
        before = state.window
    return records


def indexed(
    records: Sequence[Record], parent: Record | None, get: GetRecord, get_block: GetStoredBlock
) -> tuple[list[Record], dict[bytes, bytes]]:
    """The new records behind `parent`, with the references of their leaves, and the leaves by reference."""
    out: list[Record] = []
    blocks: dict[bytes, bytes] = {}
    stored = blocks_of(owner_of(records[0].id) if records else b"", get_block)
    fresh: dict[bytes, Record] = {}
    for record in records:
        if parent is not None and record.first >> _LEAF_BITS != parent.first >> _LEAF_BITS:
            leaf = _new_leaf(parent, lambda i: fresh.get(i) or get(i), lambda r: blocks.get(r) or stored(r), blocks)
            record = _replace(record, leaf=_add(blocks, leaf))
        fresh[record.id] = parent = record
        out.append(record)
    return out, blocks


def _new_leaf(last: Record, get: GetRecord, get_block: GetBlock, blocks: dict[bytes, bytes]) -> _Leaf:
    rows: _Rows = []
    at: Record | None = last
    before: _Leaf | None = None
    ref = b""
    while at is not None:
        rows.append((at.first, at.id))
        before = _leaf(ref := at.leaf, get_block) if at.leaf else None
        at = needed(at.parent, get) if at.parent and before is None else None
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
    return blake2b(data, digest_size=HASH_BYTES).digest()


def append_effect(
    heads: Sequence[tuple[Sequence[Node], list[Record]]], identity: Identity, tenant: TenantKey, names: SessionNames,
    blocks: Mapping[bytes, bytes],
) -> Append:  # fmt: skip
    """The effect that stores (path, records) of each choice; the first is the session's head.

    `blocks` are the page table's new ones, by their reference. Only delivered answers are found by
    their words: what came in a request proves nothing.
    """
    puts: dict[bytes, bytes] = {}
    if heads and heads[0][1]:
        last = heads[0][1][-1]
        owner = owner_of(last.id)
        puts = {block_key(owner, ref): block for ref, block in blocks.items()}
        if (first := heads[0][1][0]).first == 0:
            puts[keys.TITLE + owner] = Title.of(heads[0][0][0], first.seen_s).encode()
        puts[conversation_key(owner)] = LastUse(last.id, last.answered_s or last.seen_s).encode()
    joins: list[tuple[bytes, bytes]] = []
    records: list[Record] = []
    for path, new in heads:
        for record in new:
            puts[record_key(record.id)] = encode_record(record)
            at = record.end - 1
            if at > 0 and record.sent is not None:
                joins.append((identity.pair(tenant, path[at - 1].content, path[at].content), record.id))
            own = owner_of(record.id)
            for other in {owner_of(other) for other in record.others} - {own}:
                puts[link_key(own, other)] = puts[link_key(other, own)] = b""
            records.append(record)
    if heads and names.label is not None:
        joins.append((names.label, heads[0][0][-1].id))
    if heads and names.delta is not None:
        puts[names.delta] = heads[0][0][-1].id
    return Append(list(puts.items()), joins, records)
