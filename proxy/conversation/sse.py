"""Server-sent events of Chat Completions: cut at any byte, put together into messages. Pure.

Promises: every byte fed comes back in exactly one event's `raw`; deltas of any provider assemble to
the message that a non-streaming call would have returned, unknown fields included.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")  # two line ends; CRLF is never taken for two
_LINE = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"
# Values that come whole, if more than once: the later one counts, they do not add up.
_WHOLE = frozenset({"id", "type", "name", "format", "mime_type", "signature", "thought_signature"})
_GROWING = frozenset({"text", "thinking", "reasoning.text", "reasoning.summary"})
_decode = msgspec.json.Decoder().decode
DONE = b"data: [DONE]\n\n"


class Event(NamedTuple):
    raw: bytes  # as received, with its blank line
    data: bytes  # the joined `data:` lines; b"" for comments and keep-alives


class EventParser:
    """Splits a byte stream into events, whatever the framing (LF, CRLF, CR, split anywhere).

    A CRLF that is split after its CR ends the event at once; its LF then begins the next event's
    `raw`, where it means nothing.
    """

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[Event]:
        # The end may lie across the seam: the last byte before it is looked at again, no more.
        seen = max(len(self._buffer) - 1, 0)
        buffer = self._buffer + data if self._buffer else data
        events: list[Event] = []
        at = 0
        if seen and buffer[seen - 1 : seen + 1] == b"\r\n":
            seen -= 1
        for match in _END.finditer(buffer, seen):
            end = match.end()
            raw = buffer[at:end]
            events.append(Event(raw, _data(raw)))
            at = end
        self._buffer = buffer[at:]
        return events

    def close(self) -> list[Event]:
        """The last event, when the stream ended without a blank line."""
        rest, self._buffer = self._buffer, b""
        return [Event(rest, _data(rest))] if rest.strip() else []


def _data(raw: bytes) -> bytes:
    if raw.startswith(b"data: ") and raw.find(b"\n", 0, -2) < 0 and b"\r" not in raw:
        return raw[6:].rstrip(b"\n")  # the common case: one line
    lines = [line[5:] for line in _LINE.split(raw.removeprefix(_BOM)) if line.startswith(b"data:")]
    return b"\n".join(line[1:] if line.startswith(b" ") else line for line in lines)


def decode_chunk(data: bytes) -> dict[str, Any] | None:
    """The chunk object of an event's data, or None when it is not a JSON object."""
    try:
        chunk = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return chunk if isinstance(chunk, dict) else None


def as_event(response: dict[str, Any]) -> bytes:
    """The first choice of a whole response as one event of a stream, without its usage."""
    choice = dict(response["choices"][0])
    delta = {k: v for k, v in choice.pop("message").items() if v is not None and v != []}
    if "tool_calls" in delta:
        delta["tool_calls"] = [{**call, "index": i} for i, call in enumerate(delta["tool_calls"])]
    chunk = {k: v for k, v in response.items() if k != "usage"}
    chunk["object"] = "chat.completion.chunk"
    chunk["choices"] = [{"index": 0, **choice, "delta": delta}]
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


class MessageBuilder:
    """Assembles one choice's deltas."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {"role": "assistant", "content": None}
        self.finish_reason: str | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._last = -1

    def add(self, delta: dict[str, Any]) -> None:
        for key, value in delta.items():
            if key == "tool_calls":
                for call in tool_deltas(delta):
                    self.add_call(call)
            elif key == "role":
                self.message["role"] = value or "assistant"
            else:
                _merge(self.message, key, value)

    def call_index(self, call: dict[str, Any]) -> int:
        """Which call a delta belongs to; one without an index goes on with the last, or opens one."""
        index = call.get("index")
        if isinstance(index, int):
            return index
        if self._last < 0:
            return 0
        last = self._calls[self._last]
        if call.get("id"):
            opens = call["id"] != last.get("id")
        else:  # neither id nor index: a second name is a second call
            opens = bool(_name(call)) and bool(_name(last))
        return self._last + 1 if opens else self._last

    def add_call(self, delta: dict[str, Any]) -> int:
        index = self._last = self.call_index(delta)
        call = self._calls.setdefault(index, {})
        for key, value in delta.items():
            if key in ("function", "custom") and isinstance(value, dict):
                body = call.setdefault(key, {})
                for field, piece in value.items():
                    if field in ("arguments", "input"):
                        body[field] = (body.get(field) or "") + _as_text(piece)
                    elif piece or field not in body:
                        body[field] = piece
            elif key != "index" and (value or key not in call):
                call[key] = value
        return index

    def call(self, index: int) -> dict[str, Any]:
        return self._calls[index]

    def build(self) -> dict[str, Any]:
        """The message; tool calls in the order of their index."""
        if not self._calls:
            return self.message
        calls = [self._calls[index] for index in sorted(self._calls)]
        for call in calls:
            call.setdefault("type", "custom" if "custom" in call else "function")
        return {**self.message, "tool_calls": calls}


def tool_deltas(delta: dict[str, Any]) -> list[dict[str, Any]]:
    """The pieces of tool calls in a delta."""
    pieces = delta.get("tool_calls")
    return [p for p in pieces if isinstance(p, dict)] if isinstance(pieces, list) else []


def _as_text(piece: Any) -> str:
    """Arguments as a string: some servers send the object itself."""
    if isinstance(piece, str):
        return piece
    return msgspec.json.encode(piece).decode() if piece else ""


def choices_of(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """A chunk's choices, each with a delta that is an object."""
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return []
    found = [c for c in choices if isinstance(c, dict)]
    return [c if isinstance(c.get("delta"), dict) else {**c, "delta": {}} for c in found]


def _name(call: dict[str, Any]) -> Any:
    body = call.get("function") or call.get("custom")
    return body.get("name") if isinstance(body, dict) else None


def _merge(into: dict[str, Any], key: str, value: Any) -> None:
    old: Any = into.get(key)
    if value is None:
        into.setdefault(key, None)
    elif isinstance(old, str) and isinstance(value, str):
        into[key] = value if key in _WHOLE else old + value
    elif isinstance(value, list) or (isinstance(old, list) and isinstance(value, str)):
        into[key] = _merged_list(old, value)
    elif isinstance(old, dict) and isinstance(value, dict):
        for inner, piece in value.items():
            _merge(old, inner, piece)
    else:
        into[key] = msgspec.to_builtins(value) if isinstance(value, dict) else value


def _merged_list(old: Any, value: Any) -> list[Any]:
    """A list with the items of a delta: pieces of one item are put together.

    Pieces say which item they are of by an `index`, or they are text or thinking that goes on with
    the last item of their type. All else is an item of its own (annotations, images).
    """
    out: list[Any] = old if isinstance(old, list) else []
    if isinstance(old, str) and old:
        out.append(_text_part(old))
    for item in [_text_part(value)] if isinstance(value, str) else value:
        into = _item_of(out, item) if isinstance(item, dict) else None
        if into is None:
            out.append(msgspec.to_builtins(item) if isinstance(item, dict | list) else item)
            continue
        for key, piece in item.items():
            _merge(into, key, piece)
    return out


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _item_of(items: list[Any], piece: dict[str, Any]) -> dict[str, Any] | None:
    """The item that a piece continues, or None."""
    kind, index = piece.get("type"), piece.get("index")
    if isinstance(index, int):
        same = (i for i in items if isinstance(i, dict) and i.get("index") == index)
        return next((i for i in same if i.get("type") == kind or kind is None), None)
    if not items or not isinstance(items[-1], dict) or kind not in _GROWING:
        return None
    last: dict[str, Any] = items[-1]
    signed = bool(last.get("signature"))  # a signature ends a block of thinking
    return last if last.get("type") == kind and not signed and "index" not in last else None


class Tee:
    """Lets a stream through untouched while it learns what was said.

    Only `data: [DONE]` is held back, so that the turn can be stored before the client can know that
    it is over. feed() returns what may go to the client now; `held` is the rest.
    """

    _MARK = re.compile(rb"[\r\n]data: ?\[DONE\]")

    def __init__(self) -> None:
        self.held = b""
        self._parts: list[bytes] = []
        self._carry = b"\n"

    def feed(self, data: bytes) -> bytes:
        self._parts.append(data)
        if self.held:
            self.held += data
            return b""
        carry = len(self._carry)
        window = self._carry + data
        match = self._MARK.search(window)
        if match is None:
            self._carry = window[-13:]
            return data
        cut = max(window.index(b"data:", match.start()) - carry, 0)
        self.held = data[cut:]
        return data[:cut]

    def messages(self) -> list[dict[str, Any]]:
        """The complete messages by choice; empty when the stream broke off or carried an error."""
        parser = EventParser()
        builders: dict[int, MessageBuilder] = {}
        done = False
        for event in [*parser.feed(b"".join(self._parts)), *parser.close()]:
            if event.data == b"[DONE]":
                done = True
                continue
            chunk = decode_chunk(event.data) if event.data else {}
            if chunk is None or chunk.get("error"):
                return []
            for choice in choices_of(chunk):
                builder = builders.setdefault(choice.get("index") or 0, MessageBuilder())
                builder.add(choice["delta"])
                builder.finish_reason = choice.get("finish_reason") or builder.finish_reason
        if not done and not all(builder.finish_reason for builder in builders.values()):
            return []
        return [builders[index].build() for index in sorted(builders)]
