"""Finds a request's place in the tree: which path it is on, and what of it the client sent.

Promises: a full history is placed by its content alone; a trimmed one gets its ancestors back only
when the overlap is at least two consecutive messages, one of them an answer, says more than a
greeting, and matches exactly one path; a session's new messages continue its head. Everything stays inside the tenant, and what
is ambiguous matches nothing (invariant 6). Pure: storage is handed in as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from proxy.conversation.body import Body
from proxy.conversation.tree import (
    ID_BYTES,
    Anchor,
    GetRecord,
    Identity,
    Node,
    Record,
    deepest_record,
    overlap,
)
from proxy.memory.pages import message_text

_TELLING_MESSAGES = 4  # an overlap of fewer messages must have
_TELLING_CHARS = 64  # so much text to count as proof
_CANDIDATES = 32  # paths that a trimmed history is compared with; as many as storage keeps

LoadPath = Callable[[Record], list[Node]]


@dataclass(slots=True)
class Place:
    """A request on its path (see TurnInput for the fields)."""

    path: list[Node]
    start: int
    floor: int
    anchors: list[Anchor]
    record: Record | None


@dataclass(slots=True)
class Library:
    """What identification reads: records by id, whole paths, and raw values by key."""

    get_record: GetRecord
    load_path: LoadPath
    get: Callable[[bytes], bytes | None]


def chain(body: Body, identity: Identity, tenant: bytes) -> tuple[list[Node], list[Anchor]]:
    """The client's messages as a path from the root, and its mid-conversation system messages."""
    path: list[Node] = []
    anchors: list[Anchor] = []
    if body.known is not None:
        count = body.known.counts[body.shared - 1]
        path = body.known.path[:count]
        if body.known.tenant != tenant:  # another user behind the same key began alike
            path = identity.rechain([], path, identity.root(tenant))
        anchors = body.known.anchors[: body.shared - count]
    new: list[tuple[bytes, dict[str, Any]]] = []
    for raw, message in body.new:
        if message.get("role") in ("system", "developer"):
            anchors = [*anchors, Anchor(len(path) + len(new), raw)]
        else:
            new.append((raw, message))
    return identity.extend(tenant, path, new), anchors


def place(
    nodes: list[Node],
    anchors: list[Anchor],
    identity: Identity,
    tenant: bytes,
    library: Library,
    session_key: bytes | None,
    reattach: bool,
) -> Place:
    """Place the client's `nodes` (a path from the root, not empty) on the path they belong to."""
    whole = Place(nodes, 0, 0, anchors, deepest_record(nodes, library.get_record))
    if whole.record is not None:
        return whole
    if session_key is not None:
        head = library.get(session_key)
        record = library.get_record(head) if head else None
        if record is not None:
            found = _in_session(nodes, anchors, identity, library, record)
            return found or whole
    if reattach:
        return _reattach(nodes, anchors, identity, tenant, library) or whole
    return whole


def _in_session(
    nodes: Sequence[Node],
    anchors: Sequence[Anchor],
    identity: Identity,
    library: Library,
    head: Record,
) -> Place | None:
    """The request as the continuation of its session; None: a history of its own."""
    path = library.load_path(head)
    start, length = overlap(path, nodes)
    if length and start == 0:
        return None  # it begins as the session began: said again from the start, not new
    answered = any(node.role == "assistant" for node in nodes[:length])
    if length and (start + length == len(path) or (length >= 2 and answered)):
        return _join(path, start, length, nodes, anchors, identity, library)
    if any(node.role == "assistant" for node in nodes):
        return None  # a client of new messages never sends answers: this is another history
    joined = identity.rechain(path, nodes)
    moved = [Anchor(a.position + len(path), a.raw) for a in anchors]
    return Place(joined, len(path), 0, moved, head)


def _join(
    path: list[Node],
    start: int,
    length: int,
    nodes: Sequence[Node],
    anchors: Sequence[Anchor],
    identity: Identity,
    library: Library,
) -> Place:
    """`nodes` agree with path[start : start + length]; the rest of them follows there."""
    shared = [
        Node(
            old.id, old.content, old.role, new.raw,
            old.tokens if old.raw == new.raw else -1, old.counter,
        )
        for old, new in zip(path[start : start + length], nodes, strict=False)
    ]
    joined = identity.rechain([*path[:start], *shared], nodes[length:])
    moved = [Anchor(a.position + start, a.raw) for a in anchors]
    return Place(joined, start, start, moved, deepest_record(joined, library.get_record))


def _reattach(
    nodes: list[Node],
    anchors: Sequence[Anchor],
    identity: Identity,
    tenant: bytes,
    library: Library,
) -> Place | None:
    """A trimmed history on the one path that has it, or None."""
    answer = next((i for i, n in enumerate(nodes) if i and n.role == "assistant"), None)
    if answer is None:
        return None
    joined = library.get(identity.pair(tenant, nodes[answer - 1].content, nodes[answer].content))
    ids = [joined[i : i + ID_BYTES] for i in range(0, len(joined or b""), ID_BYTES)] if joined else []
    best: list[tuple[int, Record]] = []
    for node_id in ids[-_CANDIDATES:]:
        record = library.get_record(node_id)
        if record is None or not _ends_with(record, nodes[: answer + 1], library.get_record):
            continue
        length = answer + 1 + _agreement(node_id, nodes[answer + 1 :], identity, library)
        best.append((length, record))
    if not best:
        return None
    longest = max(length for length, _ in best)
    matches = [record for length, record in best if length == longest]
    if len(matches) != 1 or not _telling(nodes[:longest]):
        return None
    path = library.load_path(matches[0])
    start = len(path) - (answer + 1)
    return _join(path, start, answer + 1, nodes, anchors, identity, library)


def _telling(nodes: Sequence[Node]) -> bool:
    """More than a greeting and its answer, which any conversation may begin with."""
    if len(nodes) >= _TELLING_MESSAGES:
        return True
    texts = (message_text(msgspec.json.decode(node.raw)) for node in nodes)
    return sum(map(len, texts)) >= _TELLING_CHARS


def _ends_with(record: Record, nodes: Sequence[Node], get: GetRecord) -> bool:
    """The path of `record` ends with the contents of `nodes`, and something stands before them."""
    wanted = [node.content for node in nodes]
    at: Record | None = record
    while wanted:
        if at is None:
            return False
        have = at.contents[-len(wanted) :]
        if have != wanted[len(wanted) - len(have) :]:
            return False
        before = len(at.contents) > len(wanted) or at.first > 0
        wanted = wanted[: len(wanted) - len(have)]
        at = get(at.parent) if at.parent else None
    return before


def _agreement(
    node_id: bytes, nodes: Sequence[Node], identity: Identity, library: Library
) -> int:
    """How many of `nodes` continue the path of `node_id` as it is stored (up to its last answer)."""
    length, parent = 0, node_id
    for count, node in enumerate(nodes, 1):
        parent = identity.child(parent, node.content)
        if node.role == "assistant":
            if library.get_record(parent) is None:
                break
            length = count
    return length
