"""The stream sieve: several upstream rounds in, one stream for the client out. Pure; time is given.

Promises: text leaves as it arrives, except the first few tokens of a round that may still turn out
to be a preamble of a VM call (bounded in tokens and milliseconds), and all of a round's text under
`response_format`; and except text that may become a VM call written as text (`textcalls.Watch`: what
does not begin like one is not held), which ends as a call like any other. Nothing of a round leaves
before it is known to be the client's, but the first round's opening delta, which says no more than that an answer comes; a round with a call of the client's is the client's, all of its text included, and the
text that came before a call leaves before it. No VM call, VM result or inner finish reason ever leaves. The client sees one id,
one `created`, one role delta, tool calls numbered from 0, one finish reason and one `[DONE]`, and usage
only if it asked for it: null on every chunk, and one last chunk with the numbers and no choices.
Events that need no change leave as the bytes that came. The finish waits until the caller has stored the
turn (`finish()`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from proxy.conversation.channel import Channel
from proxy.conversation.chunks import (
    DONE,
    MessageBuilder,
    choices_of,
    decode_chunk,
    error_in,
    tool_deltas,
)
from proxy.conversation.textcalls import (
    THOUGHT_END,
    Spoken,
    Watch,
    as_message,
    as_tool_calls,
    calls_in,
    said_text,
    unwrapped,
)
from proxy.sse import EVENT_LIMIT_BYTES, Event, EventParser

# A round is in one of these states. Its bytes leave only in the last one; `_held` has what may leave yet.
#
#   held      the model may still call the VM: nothing of ours is shown. It ends in `flowing` when more than
#             `hold_tokens` or `hold_ms` have come (feed, poll), when a call of the client's opens
#             (_open_client_call), or at the round's end when it was an answer (end_round).
#   watched   what came last may become a call written as text (`Watch`): held, whatever the limits of `held`,
#             till it is known to be none. Also behind `flowing`: text that had begun to leave stops here.
#   VM called a call of ours has come: what is held waits for a call of the client's, and is dropped at the
#             round's end if there is none.
#   flowing   text and calls of the client's leave as they come. Rounds in which no VM tool is on offer begin here.
#
# A call of the round is of nobody's until its name is whole (_call_event, _settle), then the VM's or the
# client's; only the client's are numbered and sent.

_encode = msgspec.json.encode
_COUNTED_CHARS = 8_192  # of a piece of text: more tokens than these are never held
_IDENTITY = ("id", "created", "model", "system_fingerprint", "service_tier")
Chunk = dict[str, Any]


@dataclass(slots=True)
class Round:
    """What one upstream round said."""

    message: dict[str, Any]
    finish_reason: str | None
    usage: dict[str, Any] | None
    complete: bool  # False: the stream ended before its finish reason
    error: bytes | None = None  # a late error event, as received
    unread: bool = False  # it was a VM call as text that cannot be read


@dataclass(slots=True)
class _Call:
    """A tool call in the current round whose owner may not be known yet."""

    owner: str | None = None  # None: unknown yet | "vm" | "client"
    out: int = -1  # its index in the client's stream
    queue: list[Any] | None = None


class Sieve:
    """One per streamed request. `channel` (None: nothing is ours) tells whose a call is; `count` gives a
    text's tokens; `talked`: see `calls_in`."""

    def __init__(
        self, channel: Channel | None, hold_tokens: int, hold_ms: float, hold_text: bool, include_usage: bool,
        count: Callable[[str], int], talked: Callable[[], bool] = lambda: False,
        event_limit_bytes: int = EVENT_LIMIT_BYTES,
    ) -> None:  # fmt: skip
        self._channel = channel
        self._talked = talked
        self._hold_tokens = hold_tokens
        self._hold_ms = hold_ms
        self._hold_text = hold_text
        self._include_usage = include_usage
        self._count = count
        self._event_limit_bytes = event_limit_bytes
        self._identity: Chunk | None = None
        self._fixed: list[tuple[str, Any]] = []  # of it, what every chunk of the stream has
        self._shown = MessageBuilder()  # what the client has been sent
        self._role_sent = False
        self._out_calls = 0
        self._rounds = 0
        self._error: Event | None = None

    # -- rounds

    def begin_round(self, offer: bool, inside: bool = True, opens: bool = True) -> None:
        """A new upstream stream; `offer`: the model may call VM tools in it; `inside`: what is not the
        client's can be answered inside (False: all of it is the client's); `opens`: its opening delta may
        leave before its first words (False: an error in their place has to find the client's stream unopened)."""
        self._rounds += 1
        self._opens = opens
        self._parser = EventParser(self._event_limit_bytes)
        self._said = MessageBuilder()
        self._calls: dict[int, _Call] = {}
        self._opening: Chunk = {}  # the empty fields beside calls (content: null), not sent yet
        self._held: list[tuple[Event, Chunk]] = []
        self._held_tokens = 0
        self._held_since: float | None = None
        self._flowing = not offer and not self._hold_text
        self._ours = self._channel if inside else None
        self._watch = Watch() if self._ours is not None else None
        self._watched = False  # what came last may be a call as text: it is held, however long
        self._vm_called = False
        self.done = False  # the round said [DONE]
        self._usage: dict[str, Any] | None = None
        self._error = None
        self._finish: tuple[Event, Chunk] | None = None
        self._usage_event: tuple[Event, Chunk] | None = None

    def opened(self, data: bytes) -> None:
        """The client has these opening events of an earlier stream, which came to nothing."""
        for event in EventParser(self._event_limit_bytes).feed(data):
            chunk = decode_chunk(event.data) or {}
            if choices_of(chunk):
                self._identify(chunk)
                self._emit(event, chunk, [])

    def feed(self, data: bytes, now_ms: float) -> list[bytes]:
        """Bytes from upstream in, events for the client out. Raises EventTooLong."""
        out: list[bytes] = []
        for event in self._parser.feed(data):
            self._event(event, now_ms, out)
        return out

    def end_round(self) -> tuple[Round, list[bytes]]:
        """The round's message, and what was held and turned out to be the client's."""
        out: list[bytes] = []
        for event in self._parser.close():  # it lacks its blank line, and more may follow
            self._event(Event(event.raw + b"\n\n", event.data), 0.0, out)
        said = self._said
        message = said.build()
        spoken = self._spoken(message)
        for index, call in self._calls.items():
            if call.owner is None:
                self._settle(index, call, out, self._template())
        if spoken is not None:  # thinking that the client has begun to read comes to its end
            text = said_text(message)
            told = len(text) - sum(len(said_text(_delta(chunk))) for _, chunk in self._held)
            end = text.rfind(THOUGHT_END) + len(THOUGHT_END)
            if 0 < told < end and THOUGHT_END in text:
                self._emit(None, _with_delta(self._template(), {"content": text[told:end]}), out)
        elif not self._vm_called:
            self._release(out)
        self._held.clear()  # the preamble of a round that stays inside
        complete = said.finish_reason is not None or self.done
        error = self._error.raw if self._error is not None else None
        if spoken and self._ours is not None:
            message = as_message(message, spoken, self._ours)
        ended = Round(message, said.finish_reason, self._usage, complete, error, spoken == [])
        return ended, out

    def _spoken(self, message: dict[str, Any]) -> list[Spoken] | None:
        """The calls that the round's text is, if it is held still."""
        if self._ours is None or not (self._watched or not self._flowing):
            return None
        return calls_in(said_text(message), self._ours, self._talked)

    @property
    def refusal(self) -> Event | None:
        """The error that came in place of an answer: nothing of one was shown, in any round."""
        told = any(v for k, v in self._shown.build().items() if k != "role")
        return self._error if self._error is not None and not told else None

    @property
    def deadline_ms(self) -> float | None:
        """When held text must leave; the caller calls poll() then."""
        if self._held_since is None or self._flowing or self._hold_text:
            return None
        if self._vm_called or self._watched:
            return None
        return self._held_since + self._hold_ms

    def poll(self, now_ms: float) -> list[bytes]:
        out: list[bytes] = []
        deadline = self.deadline_ms
        if deadline is not None and now_ms >= deadline:
            self._release(out)
        return out

    def shown(self) -> dict[str, Any]:
        """The message as the client has received it: what it will echo in its next request."""
        return self._shown.build()

    def finish(self, finish_reason: str | None, usage: dict[str, Any] | None) -> list[bytes]:
        """The end of the client's stream: finish reason, usage if it asked for it, [DONE]."""
        out: list[bytes] = []
        template = self._finish[1] if self._finish else self._template()
        delta = {} if self._role_sent else {"role": "assistant"}
        choice = {**_choice(template), "index": 0, "delta": delta, "finish_reason": finish_reason}
        chunk = {**template, "choices": [choice]}
        unchanged = self._finish is not None and _delta(self._finish[1]) == delta
        unchanged = unchanged and _choice(template).get("finish_reason") == finish_reason
        told = usage is not None and not self._include_usage and isinstance(chunk.get("usage"), dict)
        if told:  # upstream tells it there, asked or not
            chunk = {**chunk, "usage": usage}
            unchanged = unchanged and template.get("usage") == usage
        self._emit(self._finish[0] if self._finish and unchanged else None, chunk, out, told)
        if usage is not None and self._include_usage:
            event, chunk = self._usage_event or (None, {**self._template(), "choices": []})
            same = event is not None and chunk.get("usage") == usage
            self._write(event if same else None, {**chunk, "usage": usage}, out)
        out.append(DONE)
        return out

    # -- events

    def _event(self, event: Event, now_ms: float, out: list[bytes]) -> None:
        if (error := error_in(event)) is not None:
            self._error = Event(event.raw, error)
            return
        if not event.data:
            if self._rounds == 1:  # comments and keep-alives
                out.append(event.raw)
            return
        if event.data == b"[DONE]":
            self.done = True
            return
        chunk = decode_chunk(event.data)
        if chunk is None:
            self._error = event
            return
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        if not _choice(chunk) and not choices_of(chunk):
            if isinstance(usage, dict):
                self._usage_event = event, chunk
            elif self._flowing:
                self._emit_bare(event, chunk, out)
            else:
                self._held.append((event, chunk))
            return
        if self._identity is None:
            self._identify(chunk)
        self._choice_event(event, chunk, now_ms, out)

    def _identify(self, chunk: Chunk) -> None:
        self._identity = {k: v for k, v in chunk.items() if k not in ("choices", "usage")}
        self._fixed = [(k, chunk[k]) for k in _IDENTITY if k in chunk]

    def _choice_event(self, event: Event, chunk: Chunk, now_ms: float, out: list[bytes]) -> None:
        choice = _choice(chunk)
        delta = _delta(chunk)
        if "function_call" in delta and self._ours is not None:
            delta = as_tool_calls(delta, self._ours)
            chunk, event = _with_delta(chunk, delta), Event(b"", b"")
        calls = tool_deltas(delta) if "tool_calls" in delta else []
        self._said.add({k: v for k, v in delta.items() if k != "tool_calls"} if calls else delta)
        if choice.get("finish_reason"):
            self._said.finish_reason = choice["finish_reason"]
            self._finish = event, chunk
            if not _has_delta(chunk):
                return
            chunk = {**chunk, "choices": [{**choice, "finish_reason": None}]}
            event = Event(b"", b"")
        if calls:
            if any(v for k, v in delta.items() if k not in ("tool_calls", "role")):
                rest = {k: v for k, v in delta.items() if k != "tool_calls"}
                self._text(Event(b"", b""), _with_delta(chunk, rest), now_ms, out)
            self._call_event(event, chunk, calls, out)
        else:
            self._text(event, chunk, now_ms, out)

    def _text(self, event: Event, chunk: Chunk, now_ms: float, out: list[bytes]) -> None:
        delta = _delta(chunk)
        if self._watch is not None and (piece := said_text(delta)):
            watched, self._watched = self._watched, self._watch.feed(piece)
            if watched and self._flowing and not self._watched:
                self._release(out)
        if self._flowing and not self._watched:
            self._emit(event if event.raw else None, chunk, out)
            return
        if self._opens and not self._role_sent and delta.get("role"):  # it tells nothing but that an answer comes
            self._send_held(out)  # chunks without choices
            if not _has_delta(chunk):
                self._emit(event if event.raw else None, chunk, out)
                return
            self._emit(None, _with_delta(self._template(), {"role": delta["role"], **_empty_fields(chunk)}), out)
        self._held.append((event, chunk))
        if self._vm_called or not _has_delta(chunk):
            return
        text = "".join(v for k, v in delta.items() if isinstance(v, str) and k != "role")
        if self._held_since is None:  # whatever it is: audio has a deadline too
            self._held_since = now_ms
        if text:
            self._held_tokens += self._count(text[:_COUNTED_CHARS])
            full = self._held_tokens > self._hold_tokens and not self._hold_text
            if full and not self._watched:
                self._release(out)

    def _call_event(self, event: Event, chunk: Chunk, calls: list[Any], out: list[bytes]) -> None:
        plain = event.raw and len(calls) == 1 and not any(
            v for k, v in _delta(chunk).items() if k not in ("tool_calls", "role")
        )
        self._opening.update(_empty_fields(chunk))
        for delta in calls:
            index = self._said.add_call(delta)
            if index not in self._calls:  # names before it are whole: the calls keep their order
                for before, other in self._calls.items():
                    if other.owner is None:
                        self._settle(before, other, out, chunk)
            call = self._calls.setdefault(index, _Call(queue=[]))
            if call.owner is None:
                call.owner = self._owner(index)
                if call.owner is None:
                    assert call.queue is not None
                    call.queue.append(delta)
                    continue
                if call.owner == "client":
                    self._open_client_call(call, chunk, out)
                else:
                    self._vm_called = True  # what is held waits for a call of the client's
            if call.owner == "client":
                self._send_call(event if plain else None, chunk, call, delta, out)

    def _owner(self, index: int) -> str | None:
        call = self._said.call(index)
        if "custom" in call and (self._ours is None or self._ours.client_calls):
            return "client"
        ours, name = self._ours, (call.get("function") or {}).get("name")
        if ours is None:
            return "client"
        if not name:
            return None
        if name in ours.client:
            return "client"
        if ours.tool(name) is not None:
            return "vm"
        return None if ours.client_calls else "vm"  # nobody's: answered inside

    def _open_client_call(self, call: _Call, chunk: Chunk, out: list[bytes]) -> None:
        if self._watched and self._spoken(self._said.build()) is not None:
            self._held.clear()  # a call of ours as text, beside the client's
        else:
            self._release(out)
        call.out = self._out_calls
        self._out_calls += 1
        for earlier in call.queue or ():
            self._send_call(None, chunk, call, earlier, out)
        call.queue = None

    def _settle(self, index: int, call: _Call, out: list[bytes], chunk: Chunk) -> None:
        """The round is over and the name stayed open: it is what it is."""
        call.owner = "client"
        if self._ours is not None:
            body = self._said.call(index).get("function") or {}
            if not self._ours.client_calls or unwrapped(body.get("arguments"), self._ours):
                call.owner = "vm"
        if call.owner == "client":
            self._open_client_call(call, chunk, out)
        else:
            self._vm_called = True

    def _send_call(self, event: Event | None, chunk: Chunk, call: _Call, delta: Chunk, out: list[bytes]) -> None:
        if delta.get("index") != call.out or bool(_delta(chunk).get("role")) is self._role_sent:
            event = None  # it needs another number, or the one role that a stream has
        calls = [{**delta, "index": call.out}]
        opening = {} if self._role_sent else {"role": "assistant", **self._opening}
        delta = {**opening, **_empty_fields(chunk), "tool_calls": calls}
        self._emit(event, _with_delta(chunk, delta), out)

    # -- output

    def _release(self, out: list[bytes]) -> None:
        self._flowing = True
        self._held_since = None
        self._send_held(out)

    def _send_held(self, out: list[bytes]) -> None:
        held, self._held = self._held, []
        for event, chunk in held:
            if choices_of(chunk):
                self._emit(event if event.raw else None, chunk, out)
            else:
                self._emit_bare(event, chunk, out)

    def _template(self) -> Chunk:
        identity = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": ""}
        choice = {"index": 0, "delta": {}, "finish_reason": None}
        return {**identity, **(self._identity or {}), "choices": [choice]}

    def _emit(self, event: Event | None, chunk: Chunk, out: list[bytes], told: bool = False) -> None:
        """Send a chunk: `event`'s own bytes when nothing has to change, else re-encoded. `told`:
        its usage is for the client."""
        delta = _delta(chunk)
        if self._role_sent and delta.get("role"):
            delta = {k: v for k, v in delta.items() if k != "role"}
            if not any(delta.values()):
                return
            chunk, event = _with_delta(chunk, delta), None
        self._role_sent = self._role_sent or bool(delta.get("role"))
        self._shown.add(delta)
        if self._include_usage:
            if chunk.get("usage", 0) is not None:
                chunk, event = {**chunk, "usage": None}, None
        elif "usage" in chunk and not told:
            chunk, event = {k: v for k, v in chunk.items() if k != "usage"}, None
        self._write(event, chunk, out)

    def _emit_bare(self, event: Event, chunk: Chunk, out: list[bytes]) -> None:
        """Send a chunk without choices, such as Azure's prompt filter results, with an empty id:
        those of the round that the client sees first."""
        if self._role_sent:
            return
        if self._include_usage or "usage" not in chunk:
            out.append(event.raw)
        else:
            out.append(b"data: " + _encode({k: v for k, v in chunk.items() if k != "usage"}) + b"\n\n")

    def _write(self, event: Event | None, chunk: Chunk, out: list[bytes]) -> None:
        different = {k: v for k, v in self._fixed if k in chunk and chunk[k] != v}
        if event is not None and not different:
            out.append(event.raw)
            return
        chunk = {**chunk, **different}
        out.append(b"data: " + _encode(chunk) + b"\n\n")


def _choice(chunk: Chunk) -> Chunk:
    try:
        first = chunk["choices"][0]
    except (LookupError, TypeError):
        return {}
    return first if isinstance(first, dict) else {}


def _delta(chunk: Chunk) -> Chunk:
    try:
        delta = chunk["choices"][0]["delta"]
    except (LookupError, TypeError):
        return {}
    return delta if isinstance(delta, dict) else {}


def _has_delta(chunk: Chunk) -> bool:
    return any(v for k, v in _delta(chunk).items() if k != "role")


def _empty_fields(chunk: Chunk) -> Chunk:
    """The fields beside a delta's calls that say nothing, such as `content: null`."""
    return {k: v for k, v in _delta(chunk).items() if k not in ("role", "tool_calls") and not v}


def _with_delta(chunk: Chunk, delta: Chunk) -> Chunk:
    return {**chunk, "choices": [{**_choice(chunk), "delta": delta}]}
