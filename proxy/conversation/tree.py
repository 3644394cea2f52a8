"""Identity: a conversation is recognised by its content, like a commit by its hash.

Promises: the same history finds the same node, on any replica; an edited, regenerated or forked
history shares only its ancestors; two tenants share nothing, whatever they say. Stored identities
are keyed BLAKE2b, so nobody can aim at another's node without the installation's secret. What a message
says counts, not how it is written: the provider's answer and the client's echo of it without `refusal`,
`annotations`, reasoning or null fields are one; messages that say different things are not.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NewType, overload

import msgspec

from proxy import keys

NodeId = NewType("NodeId", bytes)  # names a whole history: its owner (keys.py), and its last message and all before it
ContentId = NewType("ContentId", bytes)  # names a message by itself
TenantKey = NewType("TenantKey", bytes)  # whose: of a key and its user; begins with scope and person (keys.py)
KeyScope = NewType("KeyScope", bytes)  # of a key alone: what is learned of a model holds for it
NO_SCOPE = KeyScope(b"")

HASH_BYTES = 16
ID_BYTES = keys.OWNER_BYTES + HASH_BYTES
_ROOTS = 1024  # of tenants, that are kept
_encode = msgspec.json.Encoder(order="sorted").encode
_COUNTED = threading.Lock()


class Node(msgspec.Struct, gc=False):
    """One message on a path. `id` names the whole history up to it; `content` only itself."""

    id: NodeId
    content: ContentId
    role: str
    raw: bytes  # the message's JSON; the client's own bytes whenever the client sends it
    tokens: int = -1  # -1: not counted yet
    counter: str = ""  # the name of the counter that counted them
    cuts: tuple[int, tuple[int, ...]] | None = None  # a text's hash, and where its pages end
    seen_s: int = 0  # when it was first seen, where it was read from a record (Unix time)
    stored: bool = False  # `raw` is what its path's records have

    def counted(self, tokens: int, counter: str) -> None:
        """Keep its count; once in its life: requests in other threads may see the same node."""
        with _COUNTED:
            if self.tokens < 0:
                self.counter = counter
                self.tokens = tokens


class Path(Sequence[Node]):
    """The first `end` nodes of a path that is read where it is looked at (`before`), and more behind them: it
    takes and grows without a look at the old ones."""

    __slots__ = ("_before", "_end", "_nodes")

    def __init__(self, before: Sequence[Node], end: int, nodes: list[Node]) -> None:
        self._before, self._end, self._nodes = before, end, nodes

    def __len__(self) -> int:
        return self._end + len(self._nodes)

    @overload
    def __getitem__(self, at: int) -> Node: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Node]: ...
    def __getitem__(self, at: int | slice) -> Node | Sequence[Node]:
        length, end = len(self), self._end
        if isinstance(at, slice):
            start, stop, step = at.indices(length)
            if start or step != 1:
                return [self[position] for position in range(start, stop, step)]
            return Path(self._before, min(stop, end), self._nodes[: max(0, stop - end)])
        at += length * (at < 0)
        if not 0 <= at < length:
            raise IndexError(at)
        return self._before[at] if at < end else self._nodes[at - end]

    def grown(self, nodes: Sequence[Node]) -> Path:
        return Path(self._before, self._end, [*self._nodes, *nodes])


def grown(path: Sequence[Node], nodes: Sequence[Node]) -> Sequence[Node]:
    """The path and what follows it; `path` itself is not changed."""
    return path.grown(nodes) if isinstance(path, Path) else [*path, *nodes]


class Anchor(msgspec.Struct, gc=False):
    """A system or developer message in mid-conversation: it stands before `position`."""

    position: int
    raw: bytes
    kept: tuple[int, str] | None = None  # its tokens, and the name of the counter that counted them
    digest: bytes = b""  # of `raw`; made when it is first asked for

    @property
    def said(self) -> bytes:
        """By which it is known again: the digest of its bytes."""
        self.digest = self.digest or blake2b(self.raw, digest_size=HASH_BYTES).digest()
        return self.digest


class Identity:
    """Hashes contents, nodes and tenants with the installation's secret (32 bytes)."""

    def __init__(self, secret: bytes, erased: int = 0) -> None:
        self._key = secret
        self.root = lru_cache(_ROOTS)(self._root)
        self._no_frame = self._hash(b"frame", b"", b"")
        self.erased = erased  # erasures in the store before it: what is made with these ids knows of them

    @property
    def secret(self) -> bytes:
        """Of the store that these ids are for."""
        return self._key

    def _hash(self, *parts: bytes) -> bytes:
        data = b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "big"), part)])
        return blake2b(data, digest_size=HASH_BYTES, key=self._key).digest()

    def tenant(self, credentials: str, person: str) -> TenantKey:
        """The tenant of what a request presents and of whom it names. Neither is kept."""
        scope = self._hash(b"tenant", credentials.encode("utf-8", "surrogatepass"), b"")
        parts = (text.encode("utf-8", "surrogatepass") for text in (credentials, person))
        return TenantKey(scope[: keys.SCOPE_BYTES] + self._hash(b"tenant", *parts))

    def scope(self, credentials: str) -> KeyScope:
        """The scope of what a request presents."""
        return KeyScope(self.tenant(credentials, ""))

    def _root(self, tenant: TenantKey) -> bytes:
        """What the ids of a tenant's first messages are made of."""
        return tenant[: keys.TENANT_BYTES] + self._hash(b"root", tenant[keys.SCOPE_BYTES :])

    def session(self, tenant: TenantKey, name: str) -> bytes:
        """The storage key of the head of a session of new messages, inside its tenant."""
        return keys.SESSION + tenant[: keys.TENANT_BYTES] + self._hash(b"session", tenant[keys.SCOPE_BYTES :], name.encode("utf-8", "surrogatepass"))

    def label(self, tenant: TenantKey, name: str) -> bytes:
        """The storage key of the answers that were given under a session's name."""
        return keys.LABEL + tenant[: keys.TENANT_BYTES] + self._hash(b"label", tenant[keys.SCOPE_BYTES :], name.encode("utf-8", "surrogatepass"))

    def frame(self, system: Sequence[bytes], tools: bytes) -> bytes:
        """What stands in front of a history, as written: another frame is another application."""
        return self._hash(b"frame", *system, b"", tools) if system or tools else self._no_frame

    def pair(self, tenant: bytes, before: bytes, answer: bytes) -> bytes:
        """The storage key under which nodes with this answer after this message are found; of `tenant` the first
        `TENANT_BYTES` count."""
        tenant = tenant[: keys.TENANT_BYTES]
        return keys.PAIR + tenant + self._hash(b"pair", tenant, before, answer)

    def rendition(self, owner: bytes, version: str, level: int, kind: str) -> bytes:
        """The storage key under which a conversation's version of a page at a level is found."""
        return keys.RENDITION + owner + self._hash(
            b"rendition", owner, version.encode(), b"%d" % level, kind.encode()
        )

    def vector(self, owner: bytes, model: str, text: str) -> bytes:
        """The storage key of a text's vector, a model's, for that conversation."""
        said = text.encode("utf-8", "surrogatepass")
        return keys.VECTOR + owner + self._hash(b"vector", owner, model.encode(), said)

    def vectors(self, tenant: TenantKey, model: str) -> bytes:
        """The storage key of what changes whenever vectors of the tenant's arrive."""
        return keys.VECTORS + tenant[: keys.TENANT_BYTES] + self._hash(b"vectors", tenant, model.encode())

    def near(self, model: str, history: bytes, query: str) -> bytes:
        """The storage key of what a query about a history found by meaning; `history` begins with its owner."""
        said = query.encode("utf-8", "surrogatepass")
        return keys.NEAR + history[: keys.OWNER_BYTES] + self._hash(b"near", model.encode(), history, said)

    def content(self, message: dict[str, Any]) -> ContentId:
        return ContentId(self._hash(b"message", canonical(message)))

    def child(self, parent: bytes, content: ContentId) -> NodeId:
        """`parent`: a node's id, or a tenant's root, whose child begins a conversation."""
        name = blake2b(parent[-HASH_BYTES:] + content, digest_size=HASH_BYTES, key=self._key).digest()
        if len(parent) == ID_BYTES:
            return NodeId(parent[: keys.OWNER_BYTES] + name)
        return NodeId(parent[: keys.TENANT_BYTES] + name[: keys.OWNER_BYTES - keys.TENANT_BYTES] + name)

    def extend(
        self, tenant: TenantKey, path: Sequence[Node], messages: Sequence[tuple[bytes, dict[str, Any]]]
    ) -> Sequence[Node]:
        """The path with (raw, decoded) messages chained on; `path` itself is not changed."""
        nodes: list[Node] = []
        parent = path[-1].id if path else self.root(tenant)
        for raw, message in messages:
            content = self.content(message)
            parent = self.child(parent, content)
            nodes.append(Node(parent, content, str(message.get("role")), raw))
        return grown(path, nodes)

    def rechain(
        self, path: Sequence[Node], nodes: Sequence[Node], root: bytes = b""
    ) -> Sequence[Node]:
        """`nodes`' messages as descendants of `path` (or of `root`, when that is empty): the same
        contents with other ids."""
        out: list[Node] = []
        parent = path[-1].id if path else root
        for node in nodes:
            parent = self.child(parent, node.content)
            out.append(
                Node(
                    parent, node.content, node.role, node.raw, node.tokens, node.counter, seen_s=node.seen_s
                )
            )
        return grown(path, out)


def overlap(path: Sequence[Node], nodes: Sequence[Node], least: int = 0) -> tuple[int, int]:
    """(start, length): where along `path`, from the position `least` on, the client's `nodes` begin, and for how
    many they agree.

    The longest agreement that starts with the client's first message; (0, 0) if there is none. Of
    equal ones the latest counts. Linear in the path but for repeated messages.
    """
    best = (0, 0)
    if not nodes:
        return best
    first = nodes[0].content
    for start in range(len(path) - 1, least - 1, -1):
        if path[start].content != first:
            continue
        length = 1
        limit = min(len(path) - start, len(nodes))
        while length < limit and path[start + length].content == nodes[length].content:
            length += 1
        if length > best[1]:
            best = (start, length)
            if length == len(nodes):
                break
    return best


def canonical(message: dict[str, Any]) -> bytes:
    """What a message says, apart from how it is written: the bytes that identity is made of. Never raises.

    Roles, names, text, media, tool calls and their ids count; whitespace around an assistant's text
    and the formatting of JSON arguments do not (clients strip the one and re-encode the other).
    """
    role = message.get("role")
    content = _content(message.get("content"))
    if role == "assistant":
        content = [part.strip() if isinstance(part, str) else part for part in content]
        content = [part for part in content if part != ""]
        refusal = message.get("refusal")
        if not content and isinstance(refusal, str):
            content = [refusal.strip()]
        audio = message.get("audio")
        if isinstance(audio, dict) and audio.get("id"):
            content.append({"audio": audio["id"]})
        calls = message.get("tool_calls") or ()
        said: list[Any] = [role, content]
        if isinstance(calls, list) and calls:
            said.append([_call(call) for call in calls])
        if message.get("function_call"):
            said.append({"function_call": _function(message["function_call"])})
        return _encode(said)
    said = [role, content]
    for key in ("tool_call_id", "name"):
        if message.get(key):
            said.append([key, message[key]])
    return _encode(said)


def _content(content: Any) -> list[Any]:
    """A string and an array with one text part say the same; null and empty say nothing."""
    if isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list):
        return [] if content is None else [content]
    return [_part(part) for part in content]


def _part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in ("text", "refusal"):
        text = part.get(part["type"])
        if isinstance(text, str):
            return text
    return part


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    body = call.get("function")
    if isinstance(body, dict):
        return [call.get("id"), _function(body)]
    return [call.get("id"), call.get("custom")]


def _function(function: Any) -> Any:
    if not isinstance(function, dict):
        return function
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            pass  # cut or malformed arguments are compared as they are
    return [function.get("name"), arguments]
