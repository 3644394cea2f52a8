"""Reads a request body without decoding what is old.

Promises: the result is what a full JSON parse gives; a body that is not a chat request is refused
with one sentence. Most bodies begin with the bytes of one seen before, so the messages that both
share are recognised by comparing bytes, and only the tail is parsed. `msgspec.Raw` keeps values as
they were written: unknown fields pass through untouched. A recognised history is exact (bytes are
compared, not only hashed) and stays inside its scope (the tenant); forgetting all of them only costs
time (invariant 9); their bytes are bounded.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import xxhash

from proxy.conversation.tree import Anchor, KeyScope, Node, TenantKey
from proxy.errors import ApiError
from proxy.memory.models import SYSTEM_ROLES
from proxy.tokens import TokenCounter

# Possessive: a string is read once, whatever is in it. One that is cut off matches up to the end.
_TOKEN = re.compile(rb'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SPACE = b" \t\r\n"
_SKIP = re.compile(rb"[ \t\r\n]*")
_SYSTEM = re.compile(rb'"role"\s*:\s*"(?:system|developer)"')
_LEAST_BYTES, _LEAST_MESSAGES = 8192, 12  # of a body that is looked for
_ROLE = b'"role"'
_ROLE_FIRST = re.compile(rb'\{[ \t\r\n]*"role"[ \t\r\n]*:[ \t\r\n]*"(?!system"|developer"|[^"]*\\)')
_SMALLEST = 6  # histories are keyed by their first 64, 128, 256 ... bytes
_MOST_AROUND = 2  # times a history, of a body that is kept for it
_AWAKE = 64  # histories whose bytes are at hand
_BUCKET = 4  # how many histories with the same beginning are tried, newest first
_REST = "the rest of messages"  # stands for the array's tail, so that a second `messages` is seen
_OPEN_ARRAY = ord("[")
_COUNTED = ("tools", "functions", "response_format", "prediction")  # fields that are in the prompt
_HEAD_LIMIT_BYTES = 1 << 20  # a head larger than this is left to the full parse ...
_HEAD_TOKENS = 50_000  # ... and so is one of more brackets and strings, or a message of them: some milliseconds

Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(Fields).decode
_messages = msgspec.json.Decoder(list[msgspec.Raw]).decode
_object = msgspec.json.Decoder(dict[str, Any]).decode

_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

RawMessage = tuple[bytes, dict[str, Any]]  # as written, and decoded


@dataclass(slots=True, eq=False)
class Known:
    """A history seen before: its bytes, where its messages end in them, and what they mean."""

    _history: memoryview | None  # mostly of the request's body that had it: who copies megabytes takes a millisecond
    ends: list[int]  # offset after each message, mid-conversation system messages included
    counts: list[int]  # how many nodes those messages make: counts[i] <= i + 1
    path: Sequence[Node]  # from the root: only whole histories are kept
    anchors: list[Anchor]
    tenant: TenantKey  # whose path it is
    size_bytes: int = field(init=False)  # of what is kept with it

    def __post_init__(self) -> None:
        assert self._history is not None
        self.size_bytes = memoryview(self._history.obj).nbytes

    @property
    def history(self) -> memoryview:
        return self._history if self._history is not None else memoryview(self._joined())

    def rest(self) -> None:
        """Keep the messages' own bytes alone, where these make it again: most clients write nothing else between two."""
        if not self.anchors and isinstance(self.path, list) and self._history == memoryview(self._joined()):
            self._history = None

    def _joined(self) -> bytes:
        return b",".join([node.raw for node in self.path])


class Body(NamedTuple):
    """A split request. `known` holds the messages recognised by their bytes; `new` follow them."""

    fields: Fields  # every top-level field but `messages`, in the client's order
    order: list[str]  # the same with `messages` in its place
    system: list[bytes]  # leading system and developer messages, as written
    known: Known | None
    shared: int  # how many of `known`'s history messages this body begins with
    new: list[RawMessage]
    history: memoryview | None  # the bytes from the first non-system message to the last; None: not kept
    ends: Sequence[int] = ()  # in it, of the new messages

    @property
    def continued(self) -> Known | None:
        """The known history that this one has in it as a whole."""
        return self.known if self.known is not None and self.shared == len(self.known.ends) else None


class _Head(NamedTuple):
    array: int  # offset just after the `[` of the messages array
    system: list[tuple[int, int]]  # offsets of the leading system messages
    history: int  # offset of the first other message


class Recognised(NamedTuple):
    """Where a body's messages are, and the history seen before that they begin with."""

    head: _Head | None
    known: Known | None
    shared: int  # whole messages that it shares

    @property
    def end(self) -> int:
        """Where the bytes begin that have to be parsed."""
        if self.head is None or self.known is None:
            return 0
        return self.head.history + self.known.ends[self.shared - 1]


NOT_SEEN = Recognised(None, None, 0)  # nor will it be: its history is not kept


def is_short(body: bytes) -> bool:
    """It is parsed sooner than looked for."""
    return len(body) < _LEAST_BYTES and body.count(_ROLE) <= _LEAST_MESSAGES


def recognise(body: bytes, scope: KeyScope, cache: HistoryCache) -> Recognised:
    """How much of a body is known. Quick for any: bytes are compared, none are decoded. `scope` (the tenant) bounds
    whose histories it is compared with."""
    head = _locate(body)
    found = cache.find(scope, body, head.history) if head is not None else None
    return Recognised(head, *(found or (None, 0)))


def split_body(body: bytes, seen: Recognised) -> Body:
    """Split a chat request of which so much was seen before. As slow as the rest is long.

    Raises ApiError 400 in OpenAI's shape for malformed JSON and wrong types.
    """
    if seen.head is not None and seen.known is not None:
        split = _read_tail(body, seen.head, seen.known, seen.shared)
        if split is not None:
            return split
    return _read_all(body, seen.head)


def _locate(body: bytes) -> _Head | None:
    """Find the messages array by walking the tokens of the head only; None when it is unusual."""
    if body[:1] != b"{":
        return None
    depth, key = 0, b""
    for match in islice(_TOKEN.finditer(body), _HEAD_TOKENS):
        start = match.start()
        if start > _HEAD_LIMIT_BYTES:
            return None
        if body[start] in b"{[":
            depth += 1
            if depth == 2 and body[start] == _OPEN_ARRAY and key == b'"messages"':
                return _skip_system(body, match.end())
        elif body[start] in b"}]":
            depth -= 1
        elif depth == 1:
            after = _skip(body, match.end())
            if body[after : after + 1] == b":":
                key = match.group()
    return None


def _skip_system(body: bytes, array: int) -> _Head | None:
    system: list[tuple[int, int]] = []
    at = array
    while True:
        start = _skip(body, at)
        if body[start : start + 1] != b"{":
            return None
        if _ROLE_FIRST.match(body, start):  # however long; a second role that is the system's is found by the full parse
            return _Head(array, system, start)
        end, depth = start, 0
        for match in islice(_TOKEN.finditer(body, start), _HEAD_TOKENS):
            first = body[match.start()]  # not the token: it may be megabytes
            depth += (first in b"{[") - (first in b"}]")
            if depth == 0:
                end = match.end()
                break
        if end == start:
            return None
        try:
            raw = body[start:end]  # most messages do not name the role at all
            if not (_SYSTEM.search(raw) and is_system(_object(raw))):
                return _Head(array, system, start)
        except _MALFORMED:
            return None
        system.append((start, end))
        comma = _skip(body, end)
        if body[comma : comma + 1] != b",":
            return None
        at = comma + 1


def _skip(body: bytes, at: int) -> int:
    match = _SKIP.match(body, at)
    return match.end() if match else at


def is_system(message: dict[str, Any]) -> bool:
    return message.get("role") in SYSTEM_ROLES


def _read_tail(body: bytes, head: _Head, known: Known, shared: int) -> Body | None:
    """Parse the head's fields and what follows the shared messages; None: parse it all instead."""
    at = _skip(body, head.history + known.ends[shared - 1])
    if body[at : at + 1] == b",":
        at += 1
        if not body.startswith(b"{", _skip(body, at)):
            return None
    elif body[at : at + 1] != b"]":
        return None
    try:
        before = _fields(body[: head.array - 1] + b"0}")
        after = _fields(b'{"' + _REST.encode() + b'":[' + body[at:])
        rest = bytes(after.pop(_REST))
        if not body.startswith(rest[1:], at):
            return None  # the client has a field of that name
        raws = [bytes(raw) for raw in _messages(rest)]
        new = [(raw, _object(raw)) for raw in raws]
    except _MALFORMED:
        return None
    order = [*before, *after]
    del before["messages"]
    if len(order) != len(set(order)):
        return None  # a doubled key: the last one counts, which only the full parse knows
    system = [body[a:b] for a, b in head.system]
    history, ends = _history(body, head, raws, known.ends[shared - 1])
    return Body({**before, **after}, order, system, known, shared, new, history, ends)


def _history(body: bytes, head: _Head, raws: Sequence[bytes], known: int = 0) -> tuple[memoryview, list[int]]:
    """A body's history, and where these messages end in it, the first of which begin behind the byte `known`."""
    at, ends = head.history + known, list[int]()
    for raw in raws:
        at = body.index(raw, at) + len(raw)
        ends.append(at - head.history)
    history = memoryview(body)[head.history : at]
    if _MOST_AROUND * len(history) < len(body):  # the rest would be kept with it
        history = memoryview(bytes(history))
    return history, ends


def _read_all(body: bytes, head: _Head | None) -> Body:
    try:
        fields = _fields(body)
    except msgspec.ValidationError:
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_type") from None
    except _MALFORMED as error:
        raise _not_json(error) from None
    array = fields.get("messages")
    if array is None:
        raise ApiError(400, "Missing required parameter: 'messages'.", param="messages",
                       code="missing_required_parameter")
    order = list(fields)
    del fields["messages"]
    try:
        raws = [bytes(raw) for raw in _messages(array)]
        messages = [(raw, _object(raw)) for raw in raws]
    except msgspec.ValidationError:
        raise ApiError(400, "Invalid type for 'messages': expected an array of objects.",
                       param="messages", code="invalid_type") from None
    except _MALFORMED as error:
        raise _not_json(error) from None
    if not messages:
        raise ApiError(400, "Invalid 'messages': empty array. Expected an array with minimum length"
                       " 1, but got an empty array instead.", param="messages", code="empty_array")
    count = 0
    while count < len(messages) and is_system(messages[count][1]):
        count += 1
    system, history, ends = raws[:count], None, list[int]()
    found = head is not None and [body[a:b] for a, b in head.system] == system
    if head is not None and found and body.startswith(array, head.array - 1):  # where the parser found it
        history, ends = _history(body, head, raws[count:])
    return Body(fields, order, system, None, 0, messages[count:], history, ends)


def _not_json(error: Exception) -> ApiError:
    if isinstance(error, UnicodeDecodeError):
        return ApiError(400, "The JSON body of the request is not valid UTF-8.", code="invalid_json")
    hint = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return ApiError(400, "We could not parse the JSON body of your request. (HINT: This likely"
                    f" means you aren't using your HTTP library correctly: {hint}.)",
                    code="invalid_json")


def counted_fields(fields: Fields) -> tuple[bytes, ...]:
    """The fields that are in the prompt, as written."""
    return tuple(bytes(fields[name]) for name in _COUNTED if name in fields)


def fixed_tokens(system: Sequence[bytes], counted: Sequence[bytes], counter: TokenCounter) -> int:
    """Tokens of what every request of a conversation carries beside its history; `counted`: see
    `counted_fields`."""
    total = sum(counter.message(msgspec.json.decode(raw)) for raw in system)
    for raw in counted:
        value = msgspec.json.decode(raw)
        total += counter.tools(value if isinstance(value, list) else [value]) if value else 0
    return total


# -- histories seen before


def remembered(split: Body, path: Sequence[Node], anchors: list[Anchor], tenant: TenantKey) -> Known | None:
    """The history of a body that was found on this path, so that the next one is recognised by its
    bytes; None: it is not kept."""
    if split.history is None:
        return None
    known, shared = split.known, split.shared
    ends = [*(known.ends[:shared] if known else ()), *split.ends]
    counts = known.counts[:shared] if known else []
    nodes = counts[-1] if counts else 0
    for _, message in split.new:
        nodes += not is_system(message)
        counts.append(nodes)
    return Known(split.history, ends, counts, path, anchors, tenant)


_Key = tuple[bytes, int, bytes]


class HistoryCache:
    """Least recently used histories, up to `limit_bytes` of them."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._buckets: dict[_Key, list[Known]] = {}
        self._keys: OrderedDict[int, tuple[Known, list[_Key]]] = OrderedDict()
        self._awake: OrderedDict[int, Known] = OrderedDict()  # those that were kept last

    def clear(self) -> None:
        self._buckets.clear()
        self._keys.clear()
        self._awake.clear()
        self._bytes = 0

    def find(self, scope: KeyScope, body: bytes, start: int) -> tuple[Known, int] | None:
        """The history that shares most with body[start:], and how many whole messages it shares."""
        likely: Sequence[Known] = ()
        for key in _keys_of(scope, memoryview(body)[start:]):
            bucket = self._buckets.get(key)
            if bucket is None:
                break
            likely = bucket
            if len(bucket) == 1:  # more of the body needs not be hashed
                break
        best: tuple[int, Known] | None = None
        for known in reversed(likely):
            common = _common(known.history, body, start)
            if best is None or common > best[0]:
                best = common, known
        if best is None:
            return None
        shared = bisect_right(best[1].ends, best[0])
        if shared == 0:
            return None
        self._keys.move_to_end(id(best[1]))
        return best[1], shared

    def add(self, scope: KeyScope, known: Known, continued: Known | None) -> None:
        """Keep a history; `continued`, which it has in it as a whole, goes."""
        hashed = self.forget(continued) if continued is not None else []
        size = known.size_bytes
        if size > self._limit or size < 1 << _SMALLEST:
            return
        keys = list(_keys_of(scope, known.history, hashed))
        for key in keys:
            bucket = self._buckets.setdefault(key, [])
            bucket.append(known)
            if len(bucket) > _BUCKET:
                del bucket[0]
        self._keys[id(known)] = known, keys
        self._awake[id(known)] = known
        if len(self._awake) > _AWAKE:
            self._awake.popitem(last=False)[1].rest()
        self._bytes += size
        while self._bytes > self._limit:
            self.forget(next(iter(self._keys.values()))[0])

    def forget(self, known: Known) -> list[_Key]:
        """Drop one history, if it is kept; its keys."""
        entry = self._keys.pop(id(known), None)
        if entry is None:
            return []
        self._bytes -= known.size_bytes
        self._awake.pop(id(known), None)
        for key in entry[1]:
            bucket = self._buckets.get(key, [])
            kept = [other for other in bucket if other is not known]
            if kept:
                self._buckets[key] = kept
            else:
                self._buckets.pop(key, None)
        return entry[1]


def _keys_of(scope: KeyScope, view: memoryview, known: Sequence[_Key] = ()) -> Iterator[_Key]:
    """Keys of its first 64, 128, ... bytes, the first of which are `known`. Each byte is read once, when it is needed."""
    yield from known
    hasher, done = xxhash.xxh3_128(), 0
    for level in range(_SMALLEST + len(known), len(view).bit_length()):
        hasher.update(view[done : 1 << level])
        done = 1 << level
        yield scope, level, hasher.digest()


def _common(history: memoryview, body: bytes, start: int) -> int:
    """Length of the longest common beginning of `history` and body[start:], by bisection."""
    if body.startswith(history, start):
        return len(history)
    low, high = 0, min(len(history), len(body) - start)
    while low < high:  # invariant: the first `low` bytes agree, the first high + 1 do not
        middle = (low + high + 1) // 2
        if body.startswith(history[low:middle], start + low):
            low = middle
        else:
            high = middle - 1
    return low
