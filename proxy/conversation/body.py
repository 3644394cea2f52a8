"""Reads a request body without decoding what is old.

Promises: the result is what a full JSON parse gives; a body that is not a chat request is refused
with one sentence. Most bodies begin with the bytes of one seen before, so the messages that both
share are recognised by comparing bytes, and only the tail is parsed. `msgspec.Raw` keeps values as
they were written: unknown fields pass through untouched.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from proxy.conversation.history import HistoryCache, Known
from proxy.errors import ApiError
from proxy.tokens import TokenCounter

# Possessive: a string is read once, whatever is in it. One that is cut off matches up to the end.
_TOKEN = re.compile(rb'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SPACE = b" \t\r\n"
_SKIP = re.compile(rb"[ \t\r\n]*")
_SYSTEM = re.compile(rb'"role"\s*:\s*"(?:system|developer)"')
_REST = "the rest of messages"  # stands for the array's tail, so that a second `messages` is seen
_OPEN_ARRAY = ord("[")
_COUNTED = ("tools", "functions", "response_format", "prediction")  # fields that are in the prompt
_HEAD_LIMIT_BYTES = 1 << 20  # a head larger than this is left to the full parse

Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(Fields).decode
_messages = msgspec.json.Decoder(list[msgspec.Raw]).decode
_object = msgspec.json.Decoder(dict[str, Any]).decode

_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

RawMessage = tuple[bytes, dict[str, Any]]  # as written, and decoded


class Body(NamedTuple):
    """A split request. `known` holds the messages recognised by their bytes; `new` follow them."""

    fields: Fields  # every top-level field but `messages`, in the client's order
    order: list[str]  # the same with `messages` in its place
    system: list[bytes]  # leading system and developer messages, as written
    known: Known | None
    shared: int  # how many of `known`'s history messages this body begins with
    new: list[RawMessage]
    history: bytes | None  # the bytes from the first non-system message to the last; None: not kept


def read_body(body: bytes, scope: bytes, cache: HistoryCache) -> Body:
    """Split a chat request. `scope` (the tenant) bounds whose histories it is compared with.

    Raises ApiError 400 in OpenAI's shape for malformed JSON and wrong types.
    """
    head = _locate(body)
    if head is not None:
        found = cache.find(scope, body, head.history)
        if found is not None:
            split = _read_tail(body, head, *found)
            if split is not None:
                return split
    return _read_all(body, head)


class _Head(NamedTuple):
    array: int  # offset just after the `[` of the messages array
    system: list[tuple[int, int]]  # offsets of the leading system messages
    history: int  # offset of the first other message


def _locate(body: bytes) -> _Head | None:
    """Find the messages array by walking the tokens of the head only; None when it is unusual."""
    if body[:1] != b"{":
        return None
    depth, key = 0, b""
    for match in _TOKEN.finditer(body):
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
        end = _object_end(body, start)
        if end is None:
            return None
        try:
            if not _is_system(body[start:end]):
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


def _object_end(body: bytes, start: int) -> int | None:
    depth = 0
    for match in _TOKEN.finditer(body, start):
        first = body[match.start()]  # not the token: it may be megabytes
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
            if depth == 0:
                return match.end()
    return None


def _is_system(raw: bytes) -> bool:
    if not _SYSTEM.search(raw):  # cheap: most messages do not name the role at all
        return False
    return _role(_object(raw)) in ("system", "developer")


def _role(message: dict[str, Any]) -> str:
    return str(message.get("role"))


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
    return Body({**before, **after}, order, system, known, shared, new, _history(body, head, new, at))


def _history(body: bytes, head: _Head, new: list[RawMessage], at: int) -> bytes:
    """The bytes from the first history message to the last, given that `new` begin at `at`."""
    end = at
    for raw, _ in new:
        end = body.index(raw, end) + len(raw)
    return body[head.history : end].rstrip(_SPACE + b",")


def _read_all(body: bytes, head: _Head | None) -> Body:
    fields = _decode_fields(body)
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
    while count < len(messages) and _role(messages[count][1]) in ("system", "developer"):
        count += 1
    system = [raw for raw, _ in messages[:count]]
    history = None
    if head is not None and [body[a:b] for a, b in head.system] == system:
        text = bytes(array)
        if body.startswith(text, head.array - 1):  # the head was found where the parser found it
            end = head.array - 1 + len(text.rstrip(_SPACE + b"]"))
            history = body[head.history : end]
    return Body(fields, order, system, None, 0, messages[count:], history)


def _decode_fields(body: bytes) -> Fields:
    try:
        return _fields(body)
    except msgspec.ValidationError:
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_type") from None
    except _MALFORMED as error:
        raise _not_json(error) from None


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


def fixed_tokens(
    system: tuple[bytes, ...], counted: tuple[bytes, ...], counter: TokenCounter
) -> int:
    """Tokens of what every request of a conversation carries beside its history; `counted`: see
    `counted_fields`."""
    total = sum(counter.message(msgspec.json.decode(raw)) for raw in system)
    for raw in counted:
        value = msgspec.json.decode(raw)
        total += counter.tools(value if isinstance(value, list) else [value]) if value else 0
    return total


def message_ends(history: bytes, raws: list[bytes], start: int = 0) -> list[int]:
    """Offsets in `history` after each of the messages `raws`, the first of which is at `start`."""
    ends, at = [], start
    for raw in raws:
        at = history.index(raw, at) + len(raw)
        ends.append(at)
    return ends
