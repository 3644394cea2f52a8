"""What an answered turn adds to storage. Pure.

Promises: one commit holds the whole turn, so it is there or it is not; every answer on the path has
a record and every record its parent; a turn stored twice is stored once (keys are content).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from proxy.conversation.calibration import Bill
from proxy.conversation.derived import Derived
from proxy.conversation.effects import Append
from proxy.conversation.tree import (
    Identity,
    Node,
    Record,
    block_key,
    encode_record,
    record_key,
)
from proxy.conversation.window import Window, encode_change

_pack = msgspec.msgpack.encode


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
) -> list[Record]:
    """Records for the positions after `parent`; one for each run that ends with an answer.

    `path` ends with an answer; `last` are the last record's own fields (window, mutations,
    substitute, sent, bill), which describe the turn that is being stored, and `settled` those of the
    one before it. `known`: what the turn began with, for all but the last. `last`'s echo is that of
    the parent's answer: the first record's.
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
    tenant: bytes,
    names: SessionNames,
    blocks: Mapping[bytes, bytes],
) -> Append:
    """The effect that stores (path, records) of each choice; the first is the session's head.

    `blocks` are the page table's new ones, by their reference. Only delivered answers are found by
    their words: what came in a request proves nothing.
    """
    puts = {block_key(ref): block for ref, block in blocks.items()}
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
