"""A conversation with all its branches as lines of JSON, and back (docs/export.md is for people). Pure.

    {"format": "llm-pager", "version": 1, "created_s": 1790000000, "tenants": ["..."]}
    {"conversation": "4f1d02aa93c7", "title": "", "last_s": 1790000000, "tenant": "..."}
    {"n": 0, "message": {"role": "user", "content": "..."}, "seen_s": 1790000000}
    {"n": 1, "parent": 0, "message": {...}, "seen_s": 1790000003, "delivered": true, "head": true}

Promises: every message of every branch stands there once, after its parent, as its client sent it (but for line breaks
between the tokens of its JSON); what is read from these lines and stored makes the same ids in a tenant, so reading twice
stores once, and a client that sends the messages of a branch is on it. A window is not exported: where a conversation is
continued, it is paged anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from proxy import keys
from proxy.conversation.records import (
    GetRecord,
    GetStoredBlock,
    LastUse,
    Record,
    block_key,
    conversation_key,
    conversation_name,
    decode_record,
    deepest_record,
    encode_record,
    indexed,
    needed,
    new_records,
    nodes_of,
    owner_of,
    record_key,
)
from proxy.conversation.tree import Identity, Node, NodeId, TenantKey
from proxy.keys import Scan

FORMAT, VERSION = "llm-pager", 1

Row = tuple[bytes, bytes]  # of the store: a key and its value

_AT_ONCE = 64  # records, which may be large
_KEPT_BYTES = 32 << 20  # of a conversation's, which are not read again
_json = msgspec.json.encode


class Header(msgspec.Struct):
    """The first line. `tenants`: whose conversations follow."""

    format: str
    version: int
    created_s: int = 0
    tenants: list[str] = []


class Heading(msgspec.Struct, omit_defaults=True):
    """What a conversation begins with; its messages follow. `last_s`: when it was last used (Unix time)."""

    conversation: str
    title: str = ""
    last_s: int = 0
    tenant: str = ""


class Line(msgspec.Struct, omit_defaults=True):
    """A message. `n`: its number in the conversation; `parent`: that of the message before it; `seen_s`: when it was first
    seen (Unix time); `delivered`: an answer that this proxy delivered; `head`: the newest branch ends with it."""

    n: int
    message: msgspec.Raw
    parent: int | None = None
    seen_s: int = 0
    delivered: bool = False
    head: bool = False


class Conversation(NamedTuple):
    """One that was read: `name` and `title` as they were elsewhere."""

    name: str
    title: str
    lines: list[Line]
    last_s: int = 0


class Tree:
    """Lines as they are made: the same message after the same one is one."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._known: dict[tuple[int | None, bytes], int] = {}
        self.head: int | None = None

    def add(self, parent: int | None, message: Mapping[str, Any], seen_s: int) -> int:
        raw = _json(message)
        n = self._known.setdefault((parent, raw), len(self._lines))
        if n == len(self._lines):
            self._lines.append(Line(n, msgspec.Raw(raw), parent, seen_s))
        return n

    def lines(self) -> list[Line]:
        if self.head is not None:
            self._lines[self.head].head = True
        return self._lines


def header(owners: Iterable[bytes], created_s: int) -> bytes:
    tenants = dict.fromkeys(owner[: keys.TENANT_BYTES].hex() for owner in owners)
    return _json(Header(FORMAT, VERSION, created_s, list(tenants))) + b"\n"


def written(conversation: Conversation) -> Iterator[bytes]:
    """The lines of one that was read."""
    for each in (Heading(conversation.name, conversation.title, conversation.last_s), *conversation.lines):
        yield _json(each) + b"\n"


# -- from the store


def owners(scan: Scan[Row], prefix: bytes = b"") -> Iterator[bytes]:
    """Of all conversations, those whose owner begins with `prefix`."""
    return (keys.owner(key) for key, _ in keys.rows_of(scan, keys.CONVERSATION + prefix, _AT_ONCE))


def exported(
    owner: bytes, scan: Scan[Row], get: Callable[[bytes], bytes | None], identity: Identity, lost: list[NodeId]
) -> Iterator[bytes]:
    """A conversation's lines. `lost` gets the answers that cannot be read, because a record is missing or damaged."""

    kept: dict[bytes, bytes] = {}
    kept_bytes = 0

    def get_record(node_id: bytes) -> Record | None:
        key = record_key(node_id)
        data = kept.get(key) or get(key)
        return decode_record(data) if data is not None else None

    order: list[tuple[int, NodeId]] = []
    continued: dict[bytes, NodeId] = {}
    for key, value in keys.rows_of(scan, keys.RECORD + owner, _AT_ONCE):
        record = decode_record(value)
        order.append((record.first, record.id))
        continued.setdefault(record.parent, record.id)
        if (kept_bytes := kept_bytes + len(value)) <= _KEPT_BYTES:
            kept[key] = value
    order.sort()  # a parent comes before its child
    last = get(conversation_key(owner))
    head, used_s = LastUse.decode(last) if last is not None else (b"", 0)
    yield _json(Heading(conversation_name(owner), "", used_s, owner[: keys.TENANT_BYTES].hex())) + b"\n"
    numbers: dict[bytes, int] = {}
    for _, name in order:
        try:
            record = needed(name, get_record)
            following = continued.get(name)  # its client said how it had got this answer
            parent = numbers[record.parent] if record.parent else None
            nodes = nodes_of(record, get_record(following) if following else None, get_record, identity)
        except LookupError:
            lost.append(name)
            continue
        for node in nodes:
            if node.id not in numbers:
                numbers[node.id] = len(numbers)
                answered = node.id == name
                raw = node.raw.replace(b"\n", b" ").replace(b"\r", b" ")  # in a text they are escaped
                yield _json(Line(
                    numbers[node.id], msgspec.Raw(raw), parent, node.seen_s,
                    answered and record.sent is not None, answered and name == head,
                )) + b"\n"  # fmt: skip
            parent = numbers[node.id]


# -- to the store


class Grown:
    """The lines of a conversation as what a tenant's store has of it. Raises ValueError for lines that are none.

    `head`: the answer that the newest branch ends with, or the last one; `heads`: the same of each conversation that they
    make (one by its first message), and when it was given. `unanswered`: messages behind the last answer of their branch,
    which are not stored.
    """

    head: NodeId  # where `heads` is not empty

    def __init__(self, lines: Sequence[Line], identity: Identity, tenant: TenantKey) -> None:
        self._identity = identity
        self._nodes: dict[int, Node] = {}
        self._parents: dict[int, int | None] = {}
        systems: dict[int, int | None] = {}  # these are in no path
        for line in lines:
            parent = systems.get(line.parent, line.parent) if line.parent is not None else None
            if line.n in self._nodes or line.n in systems or (parent is not None and parent not in self._nodes):
                raise ValueError(f"message {line.n} is there twice, or does not stand behind its parent")
            raw = bytes(line.message)
            message = msgspec.json.decode(raw)
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"message {line.n} is no message with a role")
            if message["role"] in ("system", "developer"):
                systems[line.n] = parent
                continue
            before = [self._nodes[parent]] if parent is not None else []
            node = identity.extend(tenant, before, [(raw, message)])[-1]
            node.seen_s = line.seen_s
            self._nodes[line.n], self._parents[line.n] = node, parent
        answers = [n for n, node in self._nodes.items() if node.role == "assistant"]
        continued: set[int | None] = set()  # with an answer further down
        for n in reversed(list(self._nodes)):
            if n in continued or self._nodes[n].role == "assistant":
                continued.add(self._parents[n])
        self._ends = [n for n in answers if n not in continued]
        self.unanswered = len(self._nodes) - len(set(answers) | continued - {None})
        newest = {line.n for line in lines if line.head} & set(answers)
        self.heads: dict[bytes, LastUse] = {}
        for n in sorted({*self._ends, *newest}, key=lambda n: (n in newest, self._nodes[n].seen_s, n)):
            self.head = self._nodes[n].id
            self.heads[owner_of(self.head)] = LastUse(self.head, self._nodes[n].seen_s)

    def _up(self, n: int | None) -> Iterator[int]:
        while n is not None and n in self._parents:
            yield n
            n = self._parents[n]

    def branches(self, get: GetRecord, get_block: GetStoredBlock) -> Iterator[list[Row]]:
        """Of each branch the records that are not stored yet, in their order, behind the blocks that they name. Each is to
        be stored before the next is asked for."""
        for end in self._ends:
            path = [self._nodes[n] for n in self._up(end)][::-1]
            parent = deepest_record(path, get)
            if parent is None or parent.end < len(path):
                records, blocks = indexed(new_records(path, parent, {}), parent, get, get_block)
                owner = owner_of(path[0].id)
                yield [*((block_key(owner, ref), block) for ref, block in blocks.items()),
                       *((record_key(record.id), encode_record(record)) for record in records)]  # fmt: skip

    def has(self, node_id: bytes) -> bool:
        """Whether a stored head is one of these messages: what follows it here is newer."""
        return any(node.id == node_id for node in self._nodes.values())
