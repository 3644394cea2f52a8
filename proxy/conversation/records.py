"""What is stored of a conversation: the record of an answered turn, and all that is read back from it. Pure.

Promises: one commit holds a whole turn, so it is there or it is not; every answer on a path has a
record and every record its parent; a turn stored twice is stored once (keys are content). The same
record gives the same state on any replica, before and after a restart (invariants 7, 9). The table is
opened at the last turn that closed a segment and only what happened since is replayed, so the cost
does not grow with the conversation; a block of it that is lost is made again from the whole log.

A record has the messages since the answer before, up to its own answer. Three chains run through them
(`a <- b`: b names a), each to what is stored already:

    parent   r1 <- r2 <- r3 <- r4 <- r5 <- r6       every answer on the path: its messages
    base           r2 <--------- r4 <- r5 <- r6     every turn that paged: its window and its mutations
    closed         r2 <--------------- r5           every turn that closed a segment: derived pages, table

Here r1 fitted the window, and r3 came in the request that r4 answered (the client regenerated, or it
talked past us), so r4 goes on from r2; where that turn settled what it found answered, r3 has a state
too, and r2 for its base. `r6.closed` is r5: the last one along the bases with a `closing`. Messages are
read along `parent`, a window along `base` up to the turn that began its epoch, the table along `base`
up to the last `closing`, which has its root, and the whole mutation log along `base` to the end.

The letters of the keys are in keys.py; what a record keeps in bytes:

    window     _WindowChange: the entries added since `base`, or the whole window of a new epoch
    mutations  `memory.table.encode_log`: this turn's mutations, from `base` on
    closing    `derived.Closing`: what this turn's epochs derived, and the root of its page table
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from proxy.conversation import keys
from proxy.conversation.bill import Account
from proxy.conversation.calibration import Bill
from proxy.conversation.derived import NO_DERIVED, Derived, grown, table_root
from proxy.conversation.effects import Append
from proxy.conversation.tree import ContentId, Identity, Node, NodeId, TenantKey
from proxy.conversation.window import Entry, Window
from proxy.memory.models import MutationType
from proxy.memory.table import GetBlock, MutationLogLite, PageTable, decode_log


class Sent(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """The request whose answer was delivered: what a history that lost its front is known by."""

    frame: bytes  # its front system messages and tools (`Identity.frame`)
    start: int = 0  # where its first message stands on the record's path
    moves: int = 0  # how many times in a row, up to this request, the client's front had moved on
    above: bytes = b""  # the record whose path the first message stood on, where that is another path
    above_at: int = 0  # and where it stood on it


class Record(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one answered turn adds to the tree; stored under the id of its last node, immutable.

    A record ends with an assistant message; `parent` is the id of the record before it (b"" for
    the first), `first` the position of its first message along the path.
    """

    parent: bytes
    first: int
    ids: list[NodeId]
    contents: list[ContentId]
    roles: list[str]
    raws: list[bytes]
    tokens: list[int]
    turn: int
    echo: bytes = b""  # the previous answer in the client's own bytes, where they differ
    base: bytes = b""  # the record after which this turn's window and table were continued
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

    @property
    def id(self) -> NodeId:
        return self.ids[-1]

    @property
    def end(self) -> int:
        """The position after its last message."""
        return self.first + len(self.ids)


class _WindowChange(msgspec.Struct, array_like=True, omit_defaults=True):
    covered: int
    entries: tuple[Entry, ...] = ()
    snapshot: Window | None = None
    kept: int = -1  # of the entries before, the first so many; -1: all of them


GetRecord = Callable[[bytes], Record | None]
CONVERSATION_BYTES = 6  # of its first node's id, by which people know it

encode_record = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_encode_change = msgspec.msgpack.Encoder().encode
_decode_change = msgspec.msgpack.Decoder(_WindowChange).decode


def decode_record(data: bytes) -> Record:
    return _decode_record(data)


def record_key(node_id: bytes) -> bytes:
    return keys.RECORD + node_id


def block_key(ref: bytes) -> bytes:
    return keys.BLOCK + ref


def conversation_key(tenant: TenantKey, root: bytes) -> bytes:
    """`root`: the first `CONVERSATION_BYTES` of a path's first node's id."""
    return keys.CONVERSATION + tenant + root


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
    answers = [i for i, node in enumerate(path) if node.role == "assistant"]
    if get(path[answers[0]].id) is None:
        return None
    low, high = 0, len(answers) - 1  # answers[low] is stored, answers[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if get(path[answers[middle]].id) is None:
            high = middle
        else:
            low = middle
    return get(path[answers[low]].id)


def load_path(head: Record, get: GetRecord) -> list[Node]:
    """All nodes from the root to the head's last message, each with the bytes last seen of it."""
    records = [head]
    while records[-1].parent:
        records.append(_need(records[-1].parent, get))
    nodes: list[Node] = []
    for record in reversed(records):
        if record.echo and nodes:
            nodes[-1].raw = record.echo
        for fields in zip(
            record.ids, record.contents, record.roles, record.raws, record.tokens, strict=True
        ):
            nodes.append(Node(*fields, record.counter, seen_s=record.seen_s))
        nodes[-1].seen_s = record.answered_s
    return nodes


def restore_state(head: Record, get: GetRecord, get_block: GetBlock) -> State:
    """The state after `head`."""
    table = restore_table(head, get, get_block)
    return State(restore_window(head, get), table, _restore_derived(head, get))


def restore_table(head: Record, get: GetRecord, get_block: GetBlock) -> PageTable:
    """The page table of that state, a new one."""
    logs: list[bytes] = []
    table = PageTable()
    for record in _bases(head, get):
        if record.closing:
            replayed = partial(_replayed, record, get)
            table = PageTable.open(table_root(record.closing), get_block, replayed)
            break
        logs.append(record.mutations)
    for log in reversed(logs):
        table.replay(decode_log(log))
    return table


def _replayed(head: Record, get: GetRecord) -> PageTable:
    return history(head, get).replay()


def restore_window(head: Record, get: GetRecord) -> Window | None:
    """The window after the record's turn; None for a conversation that was never evicted from."""
    changes: list[_WindowChange] = []
    for record in _bases(head, get):
        if not record.window:
            break
        change = _decode_change(record.window)
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


def _restore_derived(head: Record, get: GetRecord) -> Derived:
    """All that the closed segments left, from the first to the last."""
    closings: list[bytes] = []
    at: Record | None = head
    while at is not None:
        if at.closing:
            closings.append(at.closing)
        at = _need(at.closed, get) if at.closed else None
    derived = NO_DERIVED
    for closing in reversed(closings):
        derived = grown(derived, closing)
    return derived


def history(head: Record, get: GetRecord) -> MutationLogLite:
    """The whole mutation log of a path, from its first page to `head`."""
    log = MutationLogLite()
    for encoded in reversed([record.mutations for record in _bases(head, get)]):
        if encoded:
            log.extend(decode_log(encoded))
    return log


def brought_since(head: Record, position: int, get: GetRecord) -> list[str]:
    """The pages that were brought into the window, unplanned, by turns whose newest message stands at
    `position` or behind it."""
    found: dict[str, None] = {}
    for record in _bases(head, get):
        if record.end <= position:
            break
        for m in decode_log(record.mutations) if record.mutations else ():
            mapped = m.op is MutationType.MAP and m.reason is not None
            if mapped or m.op is MutationType.FAULT_IN:
                found[m.page_id] = None
    return list(found)


def _bases(head: Record, get: GetRecord) -> Iterator[Record]:
    """The record, and those whose windows its own goes on from, backwards."""
    yield head
    while head.base:
        head = _need(head.base, get)
        yield head


def _need(record_id: bytes, get: GetRecord) -> Record:
    record = get(record_id)
    if record is None:
        raise LookupError("a record that others continue is missing from storage")
    return record


# -- writing: what an answered turn adds


class Stored(NamedTuple):
    """A state as a record keeps it: the window, and since the state that it was continued from the
    encoded mutations and what its epochs derived. `blocks` are the page table's new ones, by reference."""

    window: Window
    mutations: bytes
    closing: bytes
    blocks: Mapping[bytes, bytes]
    derived: Derived

    def fields(self, before: Window | None, record: Record | None) -> dict[str, object]:
        """A record's fields; `before` is the window after `record`, which it was continued from."""
        fields: dict[str, object] = {
            "window": encode_change(before, self.window),
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


def encode_change(before: Window | None, after: Window) -> bytes:
    """What a turn stores: the entries added (behind those kept), or the whole window when a new
    epoch began in it, or when it was counted anew."""
    if before is None or _measure(before) != _measure(after):
        return _encode_change(_WindowChange(after.covered, snapshot=after))
    old, new = before.entries, after.entries
    pairs = enumerate(zip(old, new, strict=False))
    kept = next((i for i, (a, b) in pairs if a is not b and a != b), min(len(old), len(new)))
    all_of_them = kept == len(old)
    return _encode_change(_WindowChange(after.covered, new[kept:], kept=-1 if all_of_them else kept))


def _measure(window: Window) -> tuple[int, str, float]:
    return window.epoch, window.counter, window.factor


def answered_by(path: Sequence[Node], record: Record | None) -> tuple[int, int]:
    """(end of the answered messages that have no record yet, 0 if all have; this turn's number)."""
    first, turn = (record.end, record.turn) if record else (0, 0)
    answers = [i for i in range(first, len(path)) if path[i].role == "assistant"]
    return (answers[-1] + 1 if answers else 0), turn + len(answers) + 1


def new_records(
    path: Sequence[Node],
    parent: Record | None,
    last: dict[str, object],
    settled: dict[str, object] | None = None,
    known: Bill | None = None,
    seen_s: int = 0,
) -> list[Record]:
    """Records for the positions after `parent`; one for each run that ends with an answer.

    `path` ends with an answer; `last` are the last record's own fields (window, mutations,
    substitute, sent, bill, account), which describe the turn that is being stored, and `settled` those of
    the one before it. `known`: what the turn began with, for all but the last. `last`'s echo is that of
    the parent's answer: the first record's. `seen_s`: when the request came (Unix time).
    """
    records: list[Record] = []
    first = parent.end if parent else 0
    turn = parent.turn if parent else 0
    counter = path[-1].counter or next((n.counter for n in reversed(path) if n.counter), "")
    above = parent.id if parent else b""
    for position in range(first, len(path)):
        if path[position].role != "assistant":
            continue
        run = path[first : position + 1]
        turn += 1
        records.append(
            Record(
                above,
                first,
                [node.id for node in run],
                [node.content for node in run],
                [node.role for node in run],
                [node.raw for node in run],
                [node.tokens if node.counter == counter else -1 for node in run],
                turn,
                counter=counter,
                bill=known,
                seen_s=run[0].seen_s or seen_s,
                answered_s=run[-1].seen_s or ((run[0].seen_s or seen_s) if parent else 0),
            )
        )
        first, above = position + 1, run[-1].id
    if not records:
        return []
    replace = msgspec.structs.replace
    echo = last.get("echo", b"")
    records[-1] = replace(records[-1], **{k: v for k, v in last.items() if k != "echo"})
    records[0] = replace(records[0], echo=echo)
    if settled and len(records) > 1:
        records[-2] = replace(records[-2], **settled)
    return records


def append_effect(
    heads: Sequence[tuple[list[Node], list[Record]]],
    identity: Identity,
    tenant: TenantKey,
    names: SessionNames,
    blocks: Mapping[bytes, bytes],
) -> Append:
    """The effect that stores (path, records) of each choice; the first is the session's head.

    `blocks` are the page table's new ones, by their reference. Only delivered answers are found by
    their words: what came in a request proves nothing.
    """
    puts = {block_key(ref): block for ref, block in blocks.items()}
    if heads and heads[0][1] and heads[0][1][-1].window:
        path = heads[0][0]
        puts[conversation_key(tenant, path[0].id[:CONVERSATION_BYTES])] = path[-1].id
    joins: list[tuple[bytes, bytes]] = []
    records: list[Record] = []
    for path, new in heads:
        for record in new:
            puts[record_key(record.id)] = encode_record(record)
            at = record.end - 1
            if at > 0 and record.sent is not None:
                key = identity.pair(tenant, path[at - 1].content, path[at].content)
                joins.append((key, record.id))
            records.append(record)
    if heads and names.label is not None:
        joins.append((names.label, heads[0][0][-1].id))
    if heads and names.delta is not None:
        puts[names.delta] = heads[0][0][-1].id
    return Append(list(puts.items()), joins, records)
