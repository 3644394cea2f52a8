"""Chunks of a streamed answer, put together into messages. Pure.

Promises: deltas of any provider assemble to the message that a non-streaming call would have returned,
unknown fields included; a stream that only passes keeps every byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import msgspec

from proxy.sse import Event, EventParser, EventTooLong, lines_of

_UNREAD_BYTES = 16_384  # of a stream that passes, before they are read
_PIECES = 512  # of a string that goes on, before they are joined
_OPENING_BYTES = 65_536  # an event that is longer is no error, nor is one behind so many
_OPEN_ITEMS = 64  # of a list, the last, that a piece may continue
# Values that come whole, if more than once: the later one counts, they do not add up.
_WHOLE = frozenset({"id", "type", "name", "format", "mime_type", "signature", "thought_signature"})
_GROWING = frozenset({"text", "thinking", "reasoning.text", "reasoning.summary"})
_decode = msgspec.json.Decoder().decode
DONE = b"data: [DONE]\n\n"


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
    return "choices" not in body and bool(body.get("errors") or (detail and isinstance(detail, (str, list))))


def error_in(event: Event) -> bytes | None:
    """What an event says that is an error in place of a chunk, in any of the ways to write one:
    `data:` with an error, `event: error`, a line `error:`, or bare JSON. None for all others."""
    raw = event.raw
    if b"error" not in raw and (b'"choices"' in raw or event.data == b"[DONE]" or raw[:1] == b":"):
        return None
    lines = lines_of(raw)
    if event.data:
        chunk = decode_chunk(event.data)
        named = any(line.startswith(b"event:") and line[6:].strip() == b"error" for line in lines)
        return event.data if named or (chunk is not None and says_error(chunk)) else None
    line = next((line[6:].strip() for line in lines if line.startswith(b"error:")), None)
    if line is not None:
        return line
    chunk = decode_chunk(raw) if raw.lstrip()[:1] == b"{" else None
    return raw.strip() if chunk is not None and says_error(chunk) else None


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


class _Growing(list[str]):
    """A string that goes on, in its pieces: joined only when the message is asked for."""


class MessageBuilder:
    """Assembles one choice's deltas, in time linear in their text."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {"role": "assistant", "content": None}
        self.finish_reason: str | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._last = -1
        self._growing: list[tuple[dict[str, Any], str]] = []  # where the strings are that go on

    def add(self, delta: dict[str, Any]) -> None:
        for key, value in delta.items():
            if key == "tool_calls":
                for call in tool_deltas(delta):
                    self.add_call(call)
            elif key == "role":
                self.message["role"] = value or "assistant"
            else:
                self._merge(self.message, key, value)

    def add_words(self, said: Sequence[_WordsChoice]) -> None:
        """Deltas with nothing else in them, one behind the other."""
        words = [one.delta.content for one in said if one.delta.content is not None]
        if words:
            self._merge(self.message, "content", "".join(words))
        for one in said:
            if one.delta.role is not msgspec.UNSET:
                self.message["role"] = one.delta.role or "assistant"
            self.finish_reason = one.finish_reason or self.finish_reason

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
                        self._grow(body, field, _as_text(piece))
                    elif piece or field not in body:
                        body[field] = piece
            elif key != "index" and (value or key not in call):
                call[key] = value
        return index

    def call(self, index: int) -> dict[str, Any]:
        self._join()
        return self._calls[index]

    def build(self) -> dict[str, Any]:
        """The message; tool calls in the order of their index."""
        self._join()
        if not self._calls:
            return self.message
        calls = [self._calls[index] for index in sorted(self._calls)]
        for call in calls:
            call.setdefault("type", "custom" if "custom" in call else "function")
        return {**self.message, "tool_calls": calls}

    def _grow(self, into: dict[str, Any], key: str, piece: str) -> None:
        old = into.get(key)
        if isinstance(old, _Growing):
            old.append(piece)
            if len(old) >= _PIECES:  # each costs 60 bytes beside its text
                old[:] = ("".join(old),)
        elif old and piece:
            into[key] = _Growing((old, piece))
            self._growing.append((into, key))
        else:
            into[key] = old or piece

    def _join(self) -> None:
        for into, key in self._growing:
            if isinstance(into[key], _Growing):
                into[key] = "".join(into[key])
        self._growing.clear()

    def _merge(self, into: dict[str, Any], key: str, value: Any) -> None:
        old: Any = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif isinstance(old, str | _Growing) and isinstance(value, str):
            if key in _WHOLE:
                into[key] = value
            else:
                self._grow(into, key, value)
        elif isinstance(value, list) or (isinstance(old, list) and isinstance(value, str)):
            into[key] = self._merged_list("".join(old) if isinstance(old, _Growing) else old, value)
        elif isinstance(old, dict) and isinstance(value, dict):
            for inner, piece in value.items():
                self._merge(old, inner, piece)
        else:
            into[key] = msgspec.to_builtins(value) if isinstance(value, dict) else value

    def _merged_list(self, old: Any, value: Any) -> list[Any]:
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
                self._merge(into, key, piece)
        return out


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


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _item_of(items: list[Any], piece: dict[str, Any]) -> dict[str, Any] | None:
    """The item that a piece continues, or None."""
    kind, index = piece.get("type"), piece.get("index")
    if isinstance(index, int):
        same = (i for i in reversed(items[-_OPEN_ITEMS:]) if isinstance(i, dict) and i.get("index") == index)
        return next((i for i in same if i.get("type") == kind or kind is None), None)
    if not items or not isinstance(items[-1], dict) or kind not in _GROWING:
        return None
    last: dict[str, Any] = items[-1]
    signed = bool(last.get("signature"))  # a signature ends a block of thinking
    return last if last.get("type") == kind and not signed and "index" not in last else None


class _WordsDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: str | msgspec.UnsetType | None = msgspec.UNSET
    content: str | None = None


class _WordsChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: _WordsDelta
    index: int = 0
    finish_reason: str | None = None
    logprobs: None = None


class _Words(msgspec.Struct, gc=False):
    """A chunk that says nothing but words: most are. What else it may have at its top does not count here."""

    choices: list[_WordsChoice]
    usage: None = None
    error: None = None


_decode_words = msgspec.json.Decoder(list[_Words]).decode
_INDEX = attrgetter("index")
_USUAL = re.compile(rb"data: ([^\r\n]+)\n\n")
_USUAL_MARKS = 8  # bytes of it beside its data
_TRIED = 4


class Tee:
    """Lets a stream through byte for byte while it learns what was said.

    Its beginning is held until it is known to be an answer or an error; comments pass. `patient`: chunks without
    a word of the answer (its role) are not yet one, because an error may follow them; they pass (`opening`), or
    are held until then where the client's stream must not be opened by them (`opens`). `data: [DONE]`
    is held, so that the turn can be stored before the client can know that it is over. feed() and close()
    return what may go to the client now; `held` is the rest; `error` is what an error says that came in
    place of an answer. A stream with an event of more than `limit_bytes` passes, and nothing is learned.
    """

    _MARK = re.compile(rb"[\r\n]data: ?\[DONE\]")

    def __init__(self, patient: bool, limit_bytes: int, opens: bool = True) -> None:
        self.held = b""
        self.opening = b""  # events that have passed before the first word
        self._opens = opens
        self.error: bytes | None = None
        self.done = False  # from [DONE] on all is held
        self._patient = patient
        self._opening = True
        self._silent = True  # no event but comments has come
        self._carry = b"\n"  # what passed last: the mark may be cut
        self._parser = EventParser(limit_bytes)
        self._unread: list[bytes] = []  # passed already: read many at once, which costs a third
        self._unread_bytes = 0
        self._builders: dict[int, MessageBuilder] = {}
        self._plain = _TRIED  # chunks that say more than words until all are read as such
        self._ended = False  # it said so
        self._lost = False  # it cannot be remembered
        self.usage: dict[str, Any] | None = None  # the last that was told

    def feed(self, data: bytes) -> bytes:
        if not self._opening:
            self._unread.append(data)
            self._unread_bytes += len(data)
            if self._unread_bytes > _UNREAD_BYTES:
                self._read(b"")
            return self._pass(data)
        events = self._read(data)
        self.held += data
        return self._open(events, self._lost or self._parser.open_bytes > _OPENING_BYTES)

    def close(self) -> bytes:
        """The stream is at its end."""
        self._read(b"")
        events = self._parser.close()
        self._learn(events)
        return self._open(events, True) if self._opening else b""

    def _read(self, data: bytes) -> list[Event]:
        """Learn from what was not read yet and from `data`."""
        data = b"".join((*self._unread, data))
        self._unread, self._unread_bytes = [], 0
        if not self._opening and not self._lost and not self._parser.open_bytes:
            said = _USUAL.findall(data)
            if sum(map(len, said)) + _USUAL_MARKS * len(said) == len(data):  # and nothing else
                self._learn_many(said)
                return []
        try:
            events = [] if self._lost else self._parser.feed(data)
        except EventTooLong:
            events, self._lost = [], True
        self._learn(events)
        return events

    def _open(self, events: Iterable[Event], enough: bool) -> bytes:
        """The next events of the beginning; `enough`: no more are waited for."""
        gone, opening = 0, []  # bytes that pass
        for event in events:
            self.error = error_in(event)
            if self.error is not None:
                break
            if event.data and self._speaks(event):
                enough = True
                break
            if event.data or not self._silent:
                self._silent = False
                if not self._opens:
                    continue
                opening.append(event.raw)
            gone += len(event.raw)
        passed, self.held = self.held[:gone], self.held[gone:]
        self.opening += b"".join(opening)
        if self.error is not None or not (enough or len(self.held) + len(self.opening) > _OPENING_BYTES):
            return passed
        self._opening = False
        held, self.held = self.held, b""
        return passed + self._pass(held)

    def _speaks(self, event: Event) -> bool:
        if not self._patient or event.data == b"[DONE]":
            return True
        return any(
            choice.get("finish_reason") or any(v for k, v in choice["delta"].items() if k != "role")
            for choice in choices_of(decode_chunk(event.data) or {})
        )

    def _pass(self, data: bytes) -> bytes:
        if self.done:
            self.held += data
            return b""
        window = self._carry + data
        match = self._MARK.search(window) if b"[DONE]" in window else None
        if match is None:
            self._carry = window[-13:]
            return data
        cut = max(window.index(b"data:", match.start()) - len(self._carry), 0)
        self.held, self.done = data[cut:], True
        return data[:cut]

    def _learn(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.data:
                self._learn_data(event.data)

    def _learn_many(self, datas: Sequence[bytes]) -> None:
        """Those of several events: nearly always they say words alone, and are read as one."""
        done = datas[-1:] == [b"[DONE]"]
        if not self._learn_words(datas[:-1] if done else datas):
            for data in datas:
                self._learn_data(data)
        elif done:
            self._learn_data(datas[-1])

    def _learn_words(self, datas: Sequence[bytes]) -> bool:
        """Whether they say nothing but words, which are learned then."""
        if not self._plain:
            return False
        try:
            chunks = _decode_words(b"[%b]" % b",".join(datas))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._plain -= 1
            return False
        if len(chunks) != len(datas):
            return False
        for index, said in groupby((choice for chunk in chunks for choice in chunk.choices), _INDEX):
            self._builder(index).add_words(list(said))
        return True

    def _learn_data(self, data: bytes) -> None:
        if self._lost or data == b"[DONE]":
            self._ended = self._ended or not self._lost
            return
        if self._learn_words([data]):
            return
        chunk = decode_chunk(data)
        if chunk is None or chunk.get("error"):
            self._lost = True
            return
        if isinstance(usage := chunk.get("usage"), dict):
            self.usage = usage
        for choice in choices_of(chunk):
            index = choice.get("index")
            builder = self._builder(index if isinstance(index, int) else 0)
            builder.add(choice["delta"])
            builder.finish_reason = choice.get("finish_reason") or builder.finish_reason

    def _builder(self, index: int) -> MessageBuilder:
        found = self._builders.get(index)
        if found is None:
            found = self._builders[index] = MessageBuilder()
        return found

    def messages(self) -> list[dict[str, Any]]:
        """The complete messages by choice; empty when the stream broke off or carried an error."""
        self._read(b"")
        self._learn(self._parser.close())  # [DONE] may have no blank line
        builders = [self._builders[index] for index in sorted(self._builders)]
        whole = self._ended or all(builder.finish_reason for builder in builders)
        return [builder.build() for builder in builders] if whole and not self._lost else []
