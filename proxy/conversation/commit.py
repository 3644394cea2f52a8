"""What an answered turn adds to storage. Pure.

Promises: one commit holds the whole turn, so it is there or it is not; every answer on the path has
a record and every record its parent; a turn stored twice is stored once (keys are content).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from proxy.conversation.effects import Append
from proxy.conversation.tree import (
    Identity,
    Node,
    Record,
    block_key,
    encode_record,
    record_key,
)

_pack = msgspec.msgpack.encode


def new_records(
    path: Sequence[Node], parent: Record | None, last: dict[str, object]
) -> list[Record]:
    """Records for the positions after `parent`; one for each run that ends with an answer.

    `path` ends with an answer; `last` are the last record's own fields (echo, window, mutations,
    substitute), which describe the turn that is being stored.
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
            )
        )
        first, above = position + 1, run[-1].id
    return [*records[:-1], msgspec.structs.replace(records[-1], **last)] if records else []


def append_effect(
    heads: Sequence[tuple[list[Node], list[Record]]],
    identity: Identity,
    tenant: bytes,
    session_key: bytes | None,
    blocks: Mapping[bytes, bytes],
) -> Append:
    """The effect that stores (path, records) of each choice; the first is the session's head.

    `blocks` are the page table's new ones, by their reference.
    """
    puts = {block_key(ref): block for ref, block in blocks.items()}
    joins: list[tuple[bytes, bytes]] = []
    records: list[Record] = []
    for path, new in heads:
        for record in new:
            puts[record_key(record.id)] = encode_record(record)
            at = record.end - 1
            if at > 0:
                key = identity.pair(tenant, path[at - 1].content, path[at].content)
                joins.append((key, record.id))
            records.append(record)
    if session_key is not None and heads:
        puts[session_key] = heads[0][0][-1].id
    return Append(list(puts.items()), joins, records)
