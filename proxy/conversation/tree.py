"""Identity: a conversation is recognised by its content, like a commit by its hash.

Promises: the same history finds the same node, on any replica; an edited, regenerated or forked
history shares only its ancestors; two tenants share nothing, whatever they say. Stored identities
are keyed BLAKE2b, so nobody can aim at another's node without the installation's secret.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from proxy.conversation.calibration import Bill
from proxy.conversation.canonical import canonical

ID_BYTES = 16


class Node(msgspec.Struct, gc=False):
    """One message on a path. `id` names the whole history up to it; `content` only itself."""

    id: bytes
    content: bytes
    role: str
    raw: bytes  # the message's JSON; the client's own bytes whenever the client sends it
    tokens: int = -1  # -1: not counted yet
    counter: str = ""  # the name of the counter that counted them
    cuts: tuple[int, tuple[int, ...]] | None = None  # a text's hash, and where its pages end


class Anchor(msgspec.Struct, gc=False):
    """A system or developer message in mid-conversation: it stands before `position`."""

    position: int
    raw: bytes
    tokens: int = -1  # as a node's
    counter: str = ""
    digest: bytes = b""  # of `raw`; made when it is first asked for

    @property
    def said(self) -> bytes:
        """By which it is known again: the digest of its bytes."""
        self.digest = self.digest or blake2b(self.raw, digest_size=ID_BYTES).digest()
        return self.digest


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
    ids: list[bytes]
    contents: list[bytes]
    roles: list[str]
    raws: list[bytes]
    tokens: list[int]
    turn: int
    echo: bytes = b""  # the previous answer in the client's own bytes, where they differ
    base: bytes = b""  # the record after which this turn's window and table were continued
    window: bytes = b""  # the window's change since `base` (see window.py); empty: never evicted
    mutations: bytes = b""  # this turn's part of the mutation log
    substitute: list[bytes] = []
    counter: str = ""  # what `tokens` were counted with
    closing: bytes = b""  # what this turn's epochs closed: segments and the table's root (closing.py)
    closed: bytes = b""  # the last record before this one, along the bases, that has a `closing`
    sent: Sent | None = None  # None: this answer came in a request, nobody delivered it here
    bill: Bill | None = None  # of the turn's last upstream request, and what was known after it

    @property
    def id(self) -> bytes:
        return self.ids[-1]

    @property
    def end(self) -> int:
        """The position after its last message."""
        return self.first + len(self.ids)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)
encode_record = _encoder.encode


def decode_record(data: bytes) -> Record:
    return _decoder.decode(data)


GetRecord = Callable[[bytes], Record | None]


class Identity:
    """Hashes contents, nodes and tenants with the installation's secret (32 bytes)."""

    def __init__(self, secret: bytes) -> None:
        self._key = secret

    def _hash(self, *parts: bytes) -> bytes:
        h = blake2b(digest_size=ID_BYTES, key=self._key)
        for part in parts:
            h.update(len(part).to_bytes(8, "big"))
            h.update(part)
        return h.digest()

    def tenant(self, credentials: str, person: str) -> bytes:
        """The tenant of what a request presents and of whom it names. Neither is kept."""
        parts = (text.encode("utf-8", "surrogatepass") for text in (credentials, person))
        return self._hash(b"tenant", *parts)

    def root(self, tenant: bytes) -> bytes:
        return self._hash(b"root", tenant)

    def session(self, tenant: bytes, name: str) -> bytes:
        """The storage key of the head of a session of new messages, inside its tenant."""
        return b"s" + self._hash(b"session", tenant, name.encode("utf-8", "surrogatepass"))

    def label(self, tenant: bytes, name: str) -> bytes:
        """The storage key of the answers that were given under a session's name."""
        return b"l" + self._hash(b"label", tenant, name.encode("utf-8", "surrogatepass"))

    def frame(self, system: Sequence[bytes], tools: bytes) -> bytes:
        """What stands in front of a history, as written: another frame is another application."""
        return self._hash(b"frame", *system, b"", tools)

    def pair(self, tenant: bytes, before: bytes, answer: bytes) -> bytes:
        """The storage key under which nodes with this answer after this message are found."""
        return b"p" + self._hash(b"pair", tenant, before, answer)

    def rendition(self, tenant: bytes, version: str, level: int, kind: str) -> bytes:
        """The storage key under which a tenant's version of a page at a level is found."""
        return b"v" + self._hash(
            b"rendition", tenant, version.encode(), b"%d" % level, kind.encode()
        )

    def content(self, message: dict[str, Any]) -> bytes:
        return self._hash(b"message", canonical(message))

    def child(self, parent: bytes, content: bytes) -> bytes:
        return blake2b(parent + content, digest_size=ID_BYTES, key=self._key).digest()

    def extend(
        self, tenant: bytes, path: list[Node], messages: Sequence[tuple[bytes, dict[str, Any]]]
    ) -> list[Node]:
        """The path with (raw, decoded) messages chained on; `path` itself is not changed."""
        nodes = list(path)
        parent = nodes[-1].id if nodes else self.root(tenant)
        for raw, message in messages:
            content = self.content(message)
            parent = self.child(parent, content)
            nodes.append(Node(parent, content, str(message.get("role")), raw))
        return nodes

    def rechain(
        self, path: list[Node], nodes: Sequence[Node], root: bytes = b""
    ) -> list[Node]:
        """`nodes`' messages as descendants of `path` (or of `root`, when that is empty): the same
        contents with other ids."""
        out = list(path)
        parent = out[-1].id if out else root
        for node in nodes:
            parent = self.child(parent, node.content)
            out.append(
                Node(parent, node.content, node.role, node.raw, node.tokens, node.counter)
            )
        return out


def record_key(node_id: bytes) -> bytes:
    return b"n" + node_id


def block_key(ref: bytes) -> bytes:
    """The storage key of a block of a page table."""
    return b"t" + ref


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
        parent = get(records[-1].parent)
        if parent is None:  # written in one commit with or after its parent, so: a damaged store
            raise LookupError(f"the record before position {records[-1].first} is missing")
        records.append(parent)
    nodes: list[Node] = []
    for record in reversed(records):
        if record.echo and nodes:
            nodes[-1].raw = record.echo
        for fields in zip(
            record.ids, record.contents, record.roles, record.raws, record.tokens, strict=True
        ):
            nodes.append(Node(*fields, record.counter))
    return nodes


def overlap(path: Sequence[Node], nodes: Sequence[Node]) -> tuple[int, int]:
    """(start, length): where along `path` the client's `nodes` begin, and for how many they agree.

    The longest agreement that starts with the client's first message; (0, 0) if there is none. Of
    equal ones the latest counts. Linear in the path but for repeated messages.
    """
    best = (0, 0)
    if not nodes:
        return best
    first = nodes[0].content
    for start in range(len(path) - 1, -1, -1):
        if path[start].content != first:
            continue
        length = 1
        limit = min(len(path) - start, len(nodes))
        while length < limit and path[start + length].content == nodes[length].content:
            length += 1
        if length > best[1]:
            best = (start, length)
    return best
