"""Server-sent events of Chat Completions: cut at any byte, put together into messages. Pure.

Promises: every byte fed comes back in exactly one event's `raw`; deltas of any provider assemble to
the message that a non-streaming call would have returned, unknown fields included.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_LINE = re.compile(rb"\r\n|\n|\r")
_decode = msgspec.json.Decoder().decode
DONE = b"data: [DONE]\n\n"


class Event(NamedTuple):
    raw: bytes  # as received, with its blank line
    data: bytes  # the joined `data:` lines; b"" for comments and keep-alives


class EventParser:
    """Splits a byte stream into events, whatever the framing (LF, CRLF, split anywhere)."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[Event]:
        buffer = self._buffer + data if self._buffer else data
        events: list[Event] = []
        at = 0
        for match in _END.finditer(buffer):
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
    lines = [line[5:] for line in _LINE.split(raw) if line.startswith(b"data:")]
    return b"\n".join(line[1:] if line.startswith(b" ") else line for line in lines)


def decode_chunk(data: bytes) -> dict[str, Any] | None:
    """The chunk object of an event's data, or None when it is not a JSON object."""
    try:
        chunk = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
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
                for call in value or ():
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
                        body[field] = (body.get(field) or "") + (piece or "")
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


def _name(call: dict[str, Any]) -> Any:
    body = call.get("function") or call.get("custom")
    return body.get("name") if isinstance(body, dict) else None


def _merge(into: dict[str, Any], key: str, value: Any) -> None:
    old: Any = into.get(key)
    if type(old) is type(value) and type(old) in (str, list):
        into[key] = old + value
    elif isinstance(old, dict) and isinstance(value, dict):
        for inner, piece in value.items():
            _merge(old, inner, piece)
    elif value is not None or key not in into:
        into[key] = dict(value) if isinstance(value, dict) else value


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
            for choice in chunk.get("choices") or ():
                builder = builders.setdefault(choice.get("index") or 0, MessageBuilder())
                builder.add(choice.get("delta") or {})
                builder.finish_reason = choice.get("finish_reason") or builder.finish_reason
        if not done and not all(builder.finish_reason for builder in builders.values()):
            return []
        return [builders[index].build() for index in sorted(builders)]
