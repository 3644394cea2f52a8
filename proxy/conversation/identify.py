"""Finds a request's place in the tree: which path it is on, and what of it the client sent.

Promises: a full history is placed by its content alone. What the client did not send is put before
its messages only when it is proved to be the same conversation (invariant 6): in a session of new
messages, which the client asked for, and in a history that lost its front, when all of this holds:
the same tenant, system messages and tools; everything up to the last answer stands at the end of one
path, and of exactly one; that answer was delivered here, and says more than a greeting; and the front
has moved on in each of the last turns, as a window does and a deletion does not. Until then such a
history is a conversation of its own. A session's name proves nothing. Pure: storage is handed in as
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from proxy.conversation.body import Body, is_system
from proxy.conversation.records import GetRecord, Record, Sent, backwards, deepest_record
from proxy.conversation.tree import ID_BYTES, Anchor, Identity, Node, TenantKey, grown, overlap
from proxy.errors import StorageError
from proxy.memory.message_text import message_text

_TELLING_MESSAGES = 4  # an overlap of fewer messages must have
_TELLING_CHARS = 64  # so much text to count as proof
_CANDIDATES = 32  # paths that a trimmed history is compared with; as many as storage keeps
_TRIED = 2  # of a request's answers, the newest: behind them a client may put a pair of its own
_SOUGHT = 1024  # of a session's messages, the newest: among them a request of it may begin
_MOVES = 3  # turns in a row in which the front moved on: one or two may be deletions

LoadPath = Callable[[Record], Sequence[Node]]


@dataclass(slots=True)
class Place:
    """A request on its path (see TurnInput for the fields)."""

    path: Sequence[Node]
    start: int
    floor: int
    anchors: list[Anchor]
    record: Record | None
    sent: Sent | None = None
    alike: tuple[Record, int] | None = None  # another path's, whose answer is also before this position here


@dataclass(slots=True)
class Library:
    """What identification reads: records by id, whole paths, and raw values by key. What cannot be read is None;
    `get_head`, of a session, raises StorageError instead: its client would lose what it does not send."""

    identity: Identity
    get_record: GetRecord
    load_path: LoadPath
    get: Callable[[bytes], bytes | None]
    get_head: Callable[[bytes], bytes | None]


def chain(body: Body, identity: Identity, tenant: TenantKey) -> tuple[Sequence[Node], list[Anchor]]:
    """The client's messages as a path from the root, and its mid-conversation system messages."""
    path: Sequence[Node] = []
    anchors: list[Anchor] = []
    if body.known is not None:
        count = body.known.counts[body.shared - 1]
        path = body.known.path[:count]
        if body.known.tenant != tenant:  # another user behind the same key began alike
            path = identity.rechain([], path, identity.root(tenant))
        anchors = body.known.anchors[: body.shared - count]
    new: list[tuple[bytes, dict[str, Any]]] = []
    for raw, message in body.new:
        if is_system(message):
            anchors = [*anchors, Anchor(len(path) + len(new), raw)]
        else:
            new.append((raw, message))
    return identity.extend(tenant, path, new), anchors


def place(
    nodes: Sequence[Node], anchors: list[Anchor], tenant: TenantKey, library: Library, frame: bytes,
    session_key: bytes | None, reattach: bool,
) -> Place:  # fmt: skip
    """Place the client's `nodes` (a path from the root, not empty) on the path they belong to.

    `frame` is `Identity.frame` of the request; `session_key` that of a session of new messages. LookupError and
    StorageError where what the messages follow on cannot be read.
    """
    known = deepest_record(nodes, library.get_record)
    alike = _alike(nodes, known, tenant, library)
    whole = Place(nodes, 0, 0, anchors, known, Sent(frame), alike)
    if known is not None and (known.sent is not None or session_key is not None):
        return whole  # else no answer was delivered on it: its first request, said again
    if session_key is not None:
        try:
            head = library.get_head(session_key)
            if head is not None:
                record = library.get_record(head)
                if record is None:
                    raise LookupError("the last answer of a session is missing from storage")
                return _in_session(whole, library, record, frame) or whole
        except (LookupError, StorageError):
            if any(node.role == "assistant" for node in nodes):
                return whole  # a client of new messages never sends answers: this is a history
            raise
    return _trimmed(whole, tenant, library, frame) if reattach else whole


def _alike(
    nodes: Sequence[Node], known: Record | None, tenant: TenantKey, library: Library
) -> tuple[Record, int] | None:
    """An answer delivered on another path that is also one of the newest here that have no record, and the
    position behind it: the client has changed something before it. Both need not agree in more."""
    first = max(1, known.end if known is not None else 0)
    answers = (i for i in range(len(nodes) - 1, first - 1, -1) if nodes[i].role == "assistant")
    for at in islice(answers, _TRIED):
        ids = library.get(library.identity.pair(tenant, nodes[at - 1].content, nodes[at].content))
        record = library.get_record(ids[-ID_BYTES:]) if ids else None
        if record is not None:
            return record, at + 1
    return None


def _in_session(whole: Place, library: Library, head: Record, frame: bytes) -> Place | None:
    """The request as the continuation of its session; None: a history of its own."""
    nodes, path = whole.path, library.load_path(head)
    if _unheard(path[-1], nodes[0]):
        path = path[:-1]
    start, length = _agreement(path, nodes)
    if length and start == 0:
        return None  # it begins as the session began: said again from the start, not new
    answered = any(node.role == "assistant" for node in nodes[:length])
    if length and (start + length == len(path) or (length >= 2 and answered)):
        return _join(path, start, length, whole, library, Sent(frame, start))
    if any(node.role == "assistant" for node in nodes):
        return None  # a client of new messages never sends answers: this is another history
    joined = library.identity.rechain(path, nodes)
    moved = [Anchor(a.position + len(path), a.raw) for a in whole.anchors]
    record = head if len(path) == head.end else deepest_record(joined, library.get_record)
    return Place(joined, len(path), 0, moved, record, Sent(frame, len(path)))


def _unheard(answer: Node, said: Node) -> bool:
    """The session's last answer has calls, and what comes is no result of them: its client did not get it, or
    gave it up. A model is never shown calls without their results (invariant 8)."""
    if answer.role != "assistant" or b"tool_calls" not in answer.raw:
        return False
    calls = msgspec.json.decode(answer.raw).get("tool_calls") or ()
    ids = {call.get("id") for call in calls if isinstance(call, dict)}
    return bool(ids) and msgspec.json.decode(said.raw).get("tool_call_id") not in ids


def _agreement(path: Sequence[Node], nodes: Sequence[Node]) -> tuple[int, int]:
    """As `overlap`: with the end of the path, or else among its newest messages, or with its beginning. Of a
    request without answers it matters only whether it begins as the path does."""
    for length in range(min(len(path), len(nodes)), 0, -1):
        start = len(path) - length
        if all(path[start + i].content == nodes[i].content for i in range(length)):
            return start, length
    begins = path[0].content == nodes[0].content
    if not begins and all(node.role != "assistant" for node in nodes):
        return 0, 0
    newest = overlap(path, nodes, max(0, len(path) - _SOUGHT))
    return newest if newest[1] or not begins else (0, 1)


def _join(path: Sequence[Node], start: int, length: int, whole: Place, library: Library, sent: Sent) -> Place:
    """The request's messages agree with path[start : start + length]; the rest of them follows there."""
    nodes = whole.path
    shared = [
        Node(
            old.id, old.content, old.role, new.raw,
            old.tokens if old.raw == new.raw else -1, old.counter, seen_s=old.seen_s,
        )
        for old, new in zip(path[start : start + length], nodes, strict=False)
    ]
    joined = library.identity.rechain(grown(path[:start], shared), nodes[length:])
    moved = [Anchor(a.position + start, a.raw) for a in whole.anchors]
    return Place(joined, start, start, moved, deepest_record(joined, library.get_record), sent)


def _trimmed(whole: Place, tenant: TenantKey, library: Library, frame: bytes) -> Place:
    """A history of which no beginning is known: `whole`, or, once it is proved that its client drops
    the oldest messages, on the path that it is the end of."""
    nodes = whole.path
    last = next((i for i in range(len(nodes) - 1, 0, -1) if nodes[i].role == "assistant"), None)
    if last is None:
        return whole
    record = _ending(nodes[: last + 1], tenant, library, frame)
    if record is None or record.sent is None or not _telling(nodes[: last + 1]):
        return whole
    before, start = record.sent, record.end - (last + 1)
    sent_before = record.end - 1 - before.start  # messages
    goes_on = 2 * (last + 1) > sent_before  # a window that had moved is not suddenly a short history
    moves = min(before.moves + 1, _MOVES) if goes_on else 1
    if moves < _MOVES:
        whole.sent = Sent(frame, 0, moves, record.id, start)
        return whole
    path = library.load_path(record)
    if before.above:
        front, identity = _front(before, library), library.identity
        path = identity.rechain([], [*front, *path], identity.root(tenant))
        start += len(front)
    return _join(path, start, last + 1, whole, library, Sent(frame, start, moves))


def _ending(nodes: Sequence[Node], tenant: TenantKey, library: Library, frame: bytes) -> Record | None:
    """The delivered answer of this frame that `nodes` end with and whose path they are the end of,
    with something before them; None also when there are two."""
    ids = library.get(library.identity.pair(tenant, nodes[-2].content, nodes[-1].content)) or b""
    found: list[Record] = []
    for at in range(max(0, len(ids) - _CANDIDATES * ID_BYTES), len(ids), ID_BYTES):
        record = library.get_record(ids[at : at + ID_BYTES])
        if record is None or record.sent is None or record.sent.frame != frame:
            continue
        if _ends_with(record, nodes, library.get_record):
            found.append(record)
    return found[0] if len(found) == 1 else None


def _front(sent: Sent, library: Library) -> list[Node]:
    """What stood before the first message of a request whose front had moved on."""
    front: list[Node] = []
    at: Sent | None = sent
    while at is not None and at.above:
        above = library.get_record(at.above)
        if above is None:  # written before the record that names it, so: a damaged store
            raise LookupError("the record that a trimmed history continues is missing")
        front = [*library.load_path(above)[: at.above_at], *front]
        at = above.sent
    return front


def _telling(nodes: Sequence[Node]) -> bool:
    """More than a greeting and its answer, which any conversation may begin with."""
    if len(nodes) >= _TELLING_MESSAGES:
        return True
    texts = (message_text(msgspec.json.decode(node.raw)) for node in nodes)
    return sum(map(len, texts)) >= _TELLING_CHARS


def _ends_with(record: Record, nodes: Sequence[Node], get: GetRecord) -> bool:
    """The path of `record` ends with the contents of `nodes`, and something stands before them."""
    told = backwards(record, get)
    try:
        for node in reversed(nodes):
            other = next(told, None)
            if other is None or other.content != node.content:
                return False
        return next(told, None) is not None
    except LookupError:  # what is missing proves nothing
        return False
