"""One client request on the wire: upstream calls out, one response back. The turn decides what.

Promises: status and headers of upstream reach the client; a stream starts when upstream's does and
each piece is sent as soon as the sieve lets it go; the end of a response is sent only after the turn
is stored; a client that leaves cancels the upstream call; a client that waits for inner rounds sees
that its stream lives; a later round that upstream refuses for the moment is sent again in time, within
`retries` and `retry_wait_s`, because the client, who has the status by then, could not.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from math import isfinite

import msgspec

from proxy.api.http import Send, send_error
from proxy.config import Config
from proxy.conversation.chunks import DONE, Tee, as_event, decode_chunk, says_error
from proxy.conversation.compose import with_usage
from proxy.conversation.effects import Complete, Refused, Said
from proxy.conversation.sieve import Sieve
from proxy.conversation.turn import Answer
from proxy.errors import ApiError
from proxy.sse import EventTooLong
from proxy.upstream import Header, Reply, Upstream, UpstreamBroken

_AT_ONCE_BYTES = 16_384  # of a stream, read without a pause: thousands of events may be in them
_QUOTED_BYTES = 2_000  # of an error page
_PATIENT_BYTES = 6_000  # a request that may be too long: its stream's first words are waited for
_AFTER_DONE_S = 0.2  # wait for the end of a stream that has said [DONE]
_KEEP_ALIVE = b": keep-alive\n\n"
_MEMORY_LOST = b": x-llm-pager-memory: lost\n"  # a line: it may stand in front of an event's end
_FIRST_ROUND_ONLY = b"idempotency-key"  # a later round is another request, so it needs another key
_NOT_OURS = (b"content-length", b"transfer-encoding", b"connection", b"content-encoding")
_FOR_THE_MOMENT = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_WAIT_S = 0.5  # where upstream does not say; doubled each time


@dataclass(frozen=True, slots=True)
class _Came:
    """How a refusal came, to be sent on when nothing helps: `stream` is its whole stream from the
    error on, `event` the error alone where the rest was not kept."""

    status: int
    headers: list[Header]
    stream: bytes = b""
    event: bytes = b""


class Exchange:
    """Performs `Complete` for one request and sends the response."""

    def __init__(
        self,
        send: Send,
        upstream: Upstream,
        headers: list[Header],
        query: bytes,
        stream: bool,
        new_sieve: Callable[[], Sieve],
        config: Config,
    ) -> None:
        self._send = send
        self._upstream = upstream
        self.headers = headers  # of the next round
        self._query = query
        self._stream = stream
        self._new_sieve = new_sieve
        self._limit_bytes = config.server.body_limit_bytes
        self._event_limit_bytes = config.stream.event_limit_bytes
        self._keepalive_s = config.stream.keepalive_s
        self._retries = config.upstream.retries, config.upstream.retry_wait_s
        self._patience: Patience | None = None  # from the first refusal of a later round on
        self._sieve: Sieve | None = None
        self._tee: Tee | None = None
        self._opened = b""  # what the client has of a stream that passed until an error came
        self._answered = False  # a round was answered: what comes is a later one
        self._reply_headers: list[Header] = []
        self._last_headers: list[Header] = []  # of the reply that came last
        self._body = b""  # the last whole response body
        self._status = 200
        self.started = False
        self._opening: Reply | None = None  # its status and headers go out with the first bytes
        self._refused = False  # a round was: the next one's status waits until it is an answer
        self.asked = False  # upstream was called: what it said may have been paid for
        self._written_s = 0.0
        self._alive: asyncio.Task[None] | None = None  # sends comments

    # -- Complete

    async def complete(self, effect: Complete) -> Said | Refused:
        """One round. Raises ApiError before a status, UpstreamBroken in mid-answer.

        A refusal of the first round is the client's to judge; a later one is sent again while
        that is likely to help.
        """
        while isinstance(said := await self._call(effect), Refused):
            self._refused = True
            if not self._answered:
                return said
            self._patience = self._patience or Patience(*self._retries)
            wait_s = self._patience.wait_s(said.status, self._last_headers, time.time())
            if wait_s is None:
                return said
            await asyncio.sleep(wait_s)
        self._answered = True
        return said

    async def _call(self, effect: Complete) -> Said | Refused:
        headers = self.headers
        if self.asked:
            headers = [header for header in headers if header[0] != _FIRST_ROUND_ONLY]
        self.asked = True
        reply = await self._upstream.chat(effect.body, headers, self._query)
        self._last_headers = reply.headers
        try:
            if not self.started:
                self._reply_headers = _ours(reply)
            self._status = reply.status
            if reply.status >= 400:
                return Refused(reply.status, await reply.read(self._limit_bytes), self._came(reply))
            whole = any(k == b"content-type" and v.startswith(b"application/json") for k, v in reply.headers)
            if self._stream and not whole:
                if effect.through and self._sieve is None and not self._opened:
                    return await self._through(reply, len(effect.body) > _PATIENT_BYTES)
                return await self._sift(reply, effect)
            body = await reply.read(self._limit_bytes)
            said = self._whole(reply, body)
            if isinstance(said, Refused) or not self.started:
                return said
            return await self._rejoin(said, body, effect)
        finally:
            await reply.close()

    def _came(self, reply: Reply, stream: bytes = b"", event: bytes = b"") -> _Came:
        return _Came(reply.status, _ours(reply), stream, event)

    def _whole(self, reply: Reply, body: bytes) -> Said | Refused:
        self._body = body
        try:
            response = msgspec.json.decode(body)
            if isinstance(response, dict) and says_error(response):
                return Refused(_status_of(body), body, self._came(reply))
            choices = response["choices"]
            messages = [{**choice["message"]} for choice in choices]
            usage = response.get("usage")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Said([], None, None)  # not a chat answer: it goes to the client as it is
        reason = choices[0].get("finish_reason") if choices else None
        return Said(messages, reason, usage if isinstance(usage, dict) else None, response)

    async def _through(self, reply: Reply, patient: bool) -> Said | Refused:
        """A stream that needs no change; what was said is learned on the way."""
        await self._open(reply)
        chunks = reply.chunks().__aiter__()
        tee = Tee(patient, self._event_limit_bytes, not self._refused)
        while not tee.done and tee.error is None:
            data = await _read_some(chunks)
            if not data:
                await self._write(tee.close())
                break
            for at in range(0, len(data), _AT_ONCE_BYTES):
                if out := tee.feed(data[at : at + _AT_ONCE_BYTES]):
                    if not self.started:
                        await self._start(reply)
                    await self._send({"type": "http.response.body", "body": out, "more_body": True})
                if tee.error is not None:
                    tee.held += data[at + _AT_ONCE_BYTES :]
                    break
                if len(data) > _AT_ONCE_BYTES:
                    await asyncio.sleep(0)
        if tee.error is not None:
            self._opened = tee.opening
            stream = tee.held
            while len(stream) < self._limit_bytes and (data := await _read_some(chunks)):
                stream += data
            return Refused(_status_of(tee.error), tee.error, self._came(reply, stream=stream))
        if tee.done:
            tee.feed(await _rest(chunks))
        await self._start(reply)
        self._tee = tee
        return Said(tee.messages(), None, tee.usage)

    async def _sift(self, reply: Reply, effect: Complete) -> Said | Refused:
        if self._sieve is None:
            self._sieve = self._new_sieve()
            self._sieve.opened(self._opened)
        sieve = self._sieve
        sieve.begin_round(effect.offer, not effect.through, not self._refused or self.started)
        await self._open(reply)
        chunks = reply.chunks().__aiter__()
        while data := await self._next(chunks, sieve):
            if self.started and self._keepalive_s > 0 and self._alive is None:
                self._written_s = time.monotonic()
                self._alive = asyncio.ensure_future(self._comment())
            for at in range(0, len(data), _AT_ONCE_BYTES):
                try:
                    ready = sieve.feed(data[at : at + _AT_ONCE_BYTES], _now_ms())
                except EventTooLong as error:
                    message = f"The upstream's answer cannot be read: {error}."
                    raise ApiError(502, message, "api_error", "event_too_long") from None
                await self._write(b"".join(ready))
                if len(data) > _AT_ONCE_BYTES:
                    await asyncio.sleep(0)
            if sieve.done:
                await _rest(chunks)
                break
        return await self._end_round(sieve, reply)

    async def _rejoin(self, said: Said, body: bytes, effect: Complete) -> Said | Refused:
        """A whole answer after a round that was streamed: the client goes on reading its stream."""
        if said.response is None or not said.messages or self._sieve is None:
            await self._write(error_event(Refused(200, body)))
            raise UpstreamBroken("the upstream's later round is no chat answer")
        self._sieve.begin_round(effect.offer, not effect.through)
        event = as_event(said.response)
        await self._write(b"".join(self._sieve.feed(event + DONE, _now_ms())))
        # Usage goes by itself: every whole answer has one, and the client may not have asked for it.
        ended = await self._end_round(self._sieve)
        return replace(ended, usage=said.usage) if isinstance(ended, Said) else ended

    async def _end_round(self, sieve: Sieve, reply: Reply | None = None) -> Said | Refused:
        error = sieve.refusal
        if error is None:
            ended, ready = sieve.end_round()
            error = sieve.refusal
        if error is not None and reply is not None:  # nothing of an answer was shown: as good as a status
            return Refused(_status_of(error.data), error.data, self._came(reply, event=error.raw))
        if reply is not None:
            await self._start(reply)
        if ended.error is not None or not ended.complete:
            await self._write(ended.error or b"")
            raise UpstreamBroken("the upstream's stream ended before its answer did")
        await self._write(b"".join(ready))
        shown = sieve.shown()
        return Said([ended.message], ended.finish_reason, ended.usage, None, shown, ended.unread)

    async def _next(self, chunks: AsyncIterator[bytes], sieve: Sieve) -> bytes:
        """The next bytes, b"" at the end. Held text leaves at its deadline, whatever comes or not."""
        if sieve.deadline_ms is None:
            return await _read_some(chunks)
        pending = asyncio.ensure_future(_read_some(chunks))
        try:
            while not pending.done() and (deadline := sieve.deadline_ms) is not None:
                await asyncio.wait((pending,), timeout=max(0.0, deadline - _now_ms()) / 1000)
                if not pending.done():
                    await self._write(b"".join(sieve.poll(_now_ms())))
            return await pending
        finally:
            pending.cancel()

    # -- the response

    async def finish(self, answer: Answer, extra: list[Header], lost: bool = False) -> None:
        """Send the end of the response; the turn is stored by now, or `lost`: a stream whose head is gone says so in a
        comment, and in its usage."""
        await self.close()
        if answer.refused is not None:
            await self._refuse(answer.refused)
        elif self.started:
            usage = answer.usage
            if self._tee is not None:
                last = self._tee.held
            else:
                assert self._sieve is not None
                if lost and usage is not None and "vm" in usage:
                    usage = {**usage, "vm": {**usage["vm"], "memory": "lost"}}
                last = b"".join(self._sieve.finish(answer.finish_reason, usage))
            last = _MEMORY_LOST + last if lost else last
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            body = self._body if answer.body is None else answer.body
            if answer.body is None and answer.ours and answer.usage is not None:
                body = with_usage(body, answer.usage)
            await self._send_whole(self._status, [*self._reply_headers, *extra], body)

    async def _send_whole(self, status: int, headers: list[Header], body: bytes) -> None:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _refuse(self, refused: Refused) -> None:
        came = refused.as_came
        if not isinstance(came, _Came):  # the turn's own word: no answer came of any round
            came = _Came(refused.status, [(b"content-type", b"application/json")])
        if self.started:  # the status is gone, so the stream says it
            await self._write(came.stream or came.event or error_event(refused))
            if came.stream:  # upstream's own, to its end
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            raise UpstreamBroken(f"the upstream answered {refused.status} in a later round")
        await self._send_whole(came.status, came.headers, came.stream or came.event or refused.body)

    async def fail(self, error: ApiError) -> None:
        """An error of ours, wherever the response stands."""
        await self.close()
        if self.started:
            await self._write(b"data: " + error.body() + b"\n\n")
            raise UpstreamBroken(error.message)
        await send_error(self._send, error)

    async def _open(self, reply: Reply) -> None:
        """A stream begins; behind a refusal, with its first bytes: it may be refused, too."""
        self._opening = reply
        if not self._refused:
            await self._start(reply)

    async def _start(self, reply: Reply) -> None:
        if self.started:
            return
        self.started = True
        await self._send(
            {"type": "http.response.start", "status": reply.status, "headers": _ours(reply)}
        )

    async def _write(self, data: bytes) -> None:
        if data:
            if self._opening is not None:
                await self._start(self._opening)
            self._written_s = time.monotonic()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _comment(self) -> None:
        """A comment whenever nothing was written for a while, only in streams that are written event by
        event: it must not fall into one."""
        while True:
            left_s = self._written_s + self._keepalive_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            self._written_s = time.monotonic()
            await self._send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})

    async def close(self) -> None:
        """No more comments. Harmless when repeated."""
        self._keepalive_s = 0.0
        if self._alive is not None:
            self._alive.cancel()
            await asyncio.wait((self._alive,))
            self._alive = None


class Patience:
    """Whether and when a request that upstream refused for the moment is sent again: `retries` times and
    `wait_s` seconds in all. Upstream's own word on how long to wait is kept; when that is longer than what
    is left, there is no wait at all."""

    def __init__(self, retries: int, wait_s: float) -> None:
        self._retries = retries
        self._left_s = wait_s
        self._next_s = _FIRST_WAIT_S

    def wait_s(self, status: int, headers: Sequence[Header], now_s: float) -> float | None:
        """Seconds to wait before the next try, which it counts; None: no more tries.

        `headers`: the refusal's; `now_s`: the time since the epoch.
        """
        given = dict(headers)
        if status not in _FOR_THE_MOMENT or given.get(b"x-should-retry") == b"false":
            return None
        told_s = _told_s(given, now_s)
        wait_s = self._next_s if told_s is None else max(0.0, told_s)
        if self._retries <= 0 or wait_s > self._left_s:
            return None
        self._retries -= 1
        self._left_s -= wait_s
        self._next_s *= 2
        return wait_s


def _told_s(headers: dict[bytes, bytes], now_s: float) -> float | None:
    """What retry-after-ms says, or retry-after (seconds or a date), or None."""
    for name, unit_s in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        try:
            told_s = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if isfinite(told_s):
            return told_s
    try:
        return parsedate_to_datetime(headers[b"retry-after"].decode("latin-1")).timestamp() - now_s
    except (KeyError, ValueError, OverflowError):
        return None


def _ours(reply: Reply) -> list[Header]:
    """A reply's headers, for a body that we send."""
    return [header for header in reply.headers if header[0] not in _NOT_OURS]


async def _read_some(chunks: AsyncIterator[bytes]) -> bytes:
    async for data in chunks:
        if data:
            return data
    return b""


async def _rest(chunks: AsyncIterator[bytes]) -> bytes:
    """What follows [DONE]: white space, and the end, so that the connection can be used again. Some
    servers keep it open, or break it: the answer is whole, so that is no failure."""
    rest = b""
    with contextlib.suppress(TimeoutError, UpstreamBroken):
        async with asyncio.timeout(_AFTER_DONE_S):
            while len(rest) < _QUOTED_BYTES and (data := await _read_some(chunks)):
                rest += data
    return rest


def _status_of(error: bytes) -> int:
    """The HTTP status that an error under a status of 200 stands for."""
    whole = decode_chunk(error) or {}
    body = whole.get("error")
    body = body if isinstance(body, dict) else {}
    for said in (body, whole):
        for name in ("code", "status", "status_code"):
            status = str(said.get(name))
            if status.isdecimal() and 400 <= int(status[:9]) <= 599:
                return int(status)
    return 400 if body.get("type") == "invalid_request_error" else 500


def _now_ms() -> float:
    return time.monotonic() * 1000


def error_event(refused: Refused) -> bytes:
    """A refusal as one SSE event that clients raise: in OpenAI's shape, whatever upstream sent."""
    try:
        body = msgspec.json.decode(refused.body)
    except ValueError:  # not JSON, or not UTF-8
        body = None
    if not (isinstance(body, dict) and body.get("error")):
        text = refused.body[:_QUOTED_BYTES].decode("utf-8", "replace").strip()
        message = f"The upstream answered {refused.status}: {text}" if text else (
            f"The upstream answered {refused.status} without a body."
        )
        error = ApiError(refused.status, message, "api_error", "upstream_error")
        return b"data: " + error.body() + b"\n\n"
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
