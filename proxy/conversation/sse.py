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
_OPENING_BYTES = 65_536  # an event that is longer is no error
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

    @property
    def open_bytes(self) -> int:
        """Of an event that has not ended."""
        return len(self._buffer)

    def rest(self) -> bytes:
        """The bytes of an event that has not ended, which are then forgotten."""
        rest, self._buffer = self._buffer, b""
        return rest

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


def says_error(body: dict[str, Any]) -> bool:
    """An answer, or a chunk of one, that says nothing but that it failed: an error beside empty
    choices or none, a finish reason of that name, or a gateway's own form without choices."""
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict):
        said = first.get("delta") or first.get("message")
        if isinstance(said, dict) and (said.get("content") or said.get("tool_calls")):
            return False
        return bool(body.get("error")) or first.get("finish_reason") == "error"
    if body.get("error") or "error" in (body.get("object"), body.get("type")):
        return True
    detail = body.get("detail") or body.get("message")
    return "choices" not in body and bool(
        body.get("errors") or (detail and isinstance(detail, (str, list)))
    )


def error_in(event: Event) -> bytes | None:
    """What an event says that is an error in place of a chunk, in any of the ways to write one:
    `data:` with an error, `event: error`, a line `error:`, or bare JSON. None for all others."""
    raw = event.raw
    if b"error" not in raw and (b'"choices"' in raw or event.data == b"[DONE]" or raw[:1] == b":"):
        return None
    lines = _LINE.split(raw.removeprefix(_BOM))
    if event.data:
        chunk = decode_chunk(event.data)
        named = any(line.startswith(b"event:") and line[6:].strip() == b"error" for line in lines)
        return event.data if named or (chunk is not None and says_error(chunk)) else None
    line = next((line[6:].strip() for line in lines if line.startswith(b"error:")), None)
    if line is not None:
        return line
    chunk = decode_chunk(raw) if raw.lstrip()[:1] == b"{" else None
    return raw.strip() if chunk is not None and says_error(chunk) else None


class Opening:
    """The beginning of a stream, held back until it is known to be an answer or an error.

    Comments pass. `patient`: chunks without a word of the answer (its role) are held, too, because an
    error may follow them. After feed(), `over` says that all comes out again from here on; with
    `error`, what the error says, the rest stays in `held`, as it came.
    """

    def __init__(self, patient: bool) -> None:
        self._patient = patient
        self._parser = EventParser()
        self.held = b""
        self.over = False
        self.error: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """What may go to the client."""
        out = b""
        for event in self._parser.feed(data):
            out += self._event(event)
        self.over = self.over or (self.error is None and self._parser.open_bytes > _OPENING_BYTES)
        return out + self._end() if self.over else out

    def close(self) -> bytes:
        """The stream is at its end."""
        last = self._parser.rest()
        if last.strip():
            self._event(Event(last, _data(last)))
        else:
            self.held += last
        if self.error is not None:
            return b""
        self.over = True
        return self._end()

    def _event(self, event: Event) -> bytes:
        if not (self.over or self.error is not None):
            self.error = error_in(event)
            if self.error is None and not event.data and not self.held:
                return event.raw
            self.over = self.error is None and bool(event.data) and self._speaks(event)
        self.held += event.raw
        return b""

    def _speaks(self, event: Event) -> bool:
        if not self._patient or event.data == b"[DONE]":
            return True
        chunk = decode_chunk(event.data) or {}
        return any(
            choice.get("finish_reason") or any(v for k, v in choice["delta"].items() if k != "role")
            for choice in choices_of(chunk)
        )

    def _end(self) -> bytes:
        out, self.held = self.held + self._parser.rest(), b""
        return out

    def rest(self) -> bytes:
        """All that is held behind an error and with it."""
        return self._end()


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
