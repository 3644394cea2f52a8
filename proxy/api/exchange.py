"""One client request on the wire: upstream calls out, one response back. The turn decides what.

Promises: status and headers of upstream reach the client; a stream starts when upstream's does and
each piece is sent as soon as the sieve lets it go; the end of a response is sent only after the turn
is stored; a client that leaves cancels the upstream call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import msgspec

from proxy.api.passthrough import Send
from proxy.conversation.effects import Complete, Refused, Said
from proxy.conversation.sieve import Sieve
from proxy.conversation.sse import DONE, Tee, as_event
from proxy.conversation.turn import Answer
from proxy.errors import ApiError
from proxy.upstream import Header, Reply, Upstream, UpstreamBroken

_QUOTED_BYTES = 2_000  # of an error page
_NOT_OURS = (b"content-length", b"transfer-encoding", b"connection", b"content-encoding")


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
        limit_bytes: int,
    ) -> None:
        self._send = send
        self._upstream = upstream
        self._headers = headers
        self._query = query
        self._stream = stream
        self._new_sieve = new_sieve
        self._limit_bytes = limit_bytes
        self._sieve: Sieve | None = None
        self._tee: Tee | None = None
        self._reply_headers: list[Header] = []
        self._body = b""  # the last whole response body
        self._status = 200
        self._started = False

    # -- Complete

    async def complete(self, effect: Complete) -> Said | Refused:
        """One upstream call. Raises ApiError before a status, UpstreamBroken in mid-answer."""
        reply = await self._upstream.chat(effect.body, self._headers, self._query)
        try:
            if not self._started:
                self._reply_headers = [h for h in reply.headers if h[0] not in _NOT_OURS]
            self._status = reply.status
            if reply.status >= 400:
                return Refused(reply.status, await reply.read(self._limit_bytes))
            if self._stream and _is_event_stream(reply):
                if effect.through and self._sieve is None:
                    return await self._through(reply)
                return await self._sift(reply, effect.offer)
            body = await reply.read(self._limit_bytes)
            return await self._rejoin(body, effect.offer) if self._started else self._whole(body)
        finally:
            await reply.close()

    def _whole(self, body: bytes) -> Said:
        self._body = body
        try:
            response = msgspec.json.decode(body)
            choices = response["choices"]
            messages = [{**choice["message"]} for choice in choices]
            usage = response.get("usage")
        except (ValueError, KeyError, TypeError, AttributeError):
            return Said([], None, None)  # not a chat answer: it goes to the client as it is
        reason = choices[0].get("finish_reason") if choices else None
        return Said(messages, reason, usage if isinstance(usage, dict) else None, response)

    async def _through(self, reply: Reply) -> Said:
        """A stream that needs no change; what was said is learned on the way."""
        self._tee = tee = Tee()
        await self._start(reply)
        async for data in reply.chunks():
            ready = tee.feed(data)
            if ready:
                await self._write(ready)
        return Said(tee.messages(), None, None)

    async def _sift(self, reply: Reply, offer: bool) -> Said:
        if self._sieve is None:
            self._sieve = self._new_sieve()
        sieve = self._sieve
        sieve.begin_round(offer)
        await self._start(reply)
        chunks = reply.chunks().__aiter__()
        while data := await self._next(chunks, sieve):
            await self._write(b"".join(sieve.feed(data, _now_ms())))
        return await self._end_round(sieve)

    async def _rejoin(self, body: bytes, offer: bool) -> Said:
        """A whole answer after a round that was streamed: the client goes on reading its stream."""
        said = self._whole(body)
        if said.response is None or not said.messages or self._sieve is None:
            await self._write(error_event(Refused(200, body)))
            raise UpstreamBroken("the upstream's later round is no chat answer")
        self._sieve.begin_round(offer)
        event = as_event(said.response)
        await self._write(b"".join(self._sieve.feed(event + DONE, _now_ms())))
        # Usage goes by itself: every whole answer has one, and the client may not have asked for it.
        return replace(await self._end_round(self._sieve), usage=said.usage)

    async def _end_round(self, sieve: Sieve) -> Said:
        ended, ready = sieve.end_round()
        if ended.error is not None or not ended.complete:
            await self._fail(ended.error)
            raise UpstreamBroken("the upstream's stream ended before its answer did")
        await self._write(b"".join(ready))
        return Said([ended.message], ended.finish_reason, ended.usage, None, sieve.shown())

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

    async def finish(self, answer: Answer, extra: list[Header]) -> None:
        """Send the end of the response; the turn is stored by now."""
        if answer.refused is not None:
            await self._refuse(answer.refused)
        elif self._started:
            await self._end_stream(answer)
        else:
            body = self._body if answer.body is None else answer.body
            headers = [*self._reply_headers, *extra, (b"content-length", b"%d" % len(body))]
            await self._send({"type": "http.response.start", "status": self._status, "headers": headers})
            await self._send({"type": "http.response.body", "body": body})

    async def _end_stream(self, answer: Answer) -> None:
        if self._sieve is not None and self._tee is None:
            last = b"".join(self._sieve.finish(answer.finish_reason, answer.usage))
        else:
            assert self._tee is not None
            last = self._tee.held
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def _refuse(self, refused: Refused) -> None:
        if self._started:  # a later round: the status is gone, so the stream says it
            await self._fail(error_event(refused))
            raise UpstreamBroken(f"the upstream answered {refused.status} in a later round")
        headers = [*self._reply_headers, (b"content-length", b"%d" % len(refused.body))]
        start = {"type": "http.response.start", "status": refused.status, "headers": headers}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": refused.body})

    async def fail(self, error: ApiError) -> None:
        """An error of ours, wherever the response stands."""
        if self._started:
            await self._fail(b"data: " + error.body() + b"\n\n")
            raise UpstreamBroken(error.message)
        body = error.body()
        headers: list[Header] = [(b"content-type", b"application/json")]
        headers += [(k.lower().encode(), v.encode("latin-1")) for k, v in error.headers.items()]
        headers.append((b"content-length", b"%d" % len(body)))
        await self._send(
            {"type": "http.response.start", "status": error.status, "headers": headers}
        )
        await self._send({"type": "http.response.body", "body": body})

    @property
    def started(self) -> bool:
        return self._started

    async def _fail(self, event: bytes | None) -> None:
        if event:
            await self._write(event)

    async def _start(self, reply: Reply) -> None:
        if self._started:
            return
        self._started = True
        headers = [h for h in reply.headers if h[0] not in _NOT_OURS]
        await self._send(
            {"type": "http.response.start", "status": reply.status, "headers": headers}
        )

    async def _write(self, data: bytes) -> None:
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})


async def _read_some(chunks: AsyncIterator[bytes]) -> bytes:
    async for data in chunks:
        if data:
            return data
    return b""


def _now_ms() -> float:
    return time.monotonic() * 1000


def _is_event_stream(reply: Reply) -> bool:
    kind = next((v for k, v in reply.headers if k == b"content-type"), b"text/event-stream")
    return not kind.startswith(b"application/json")


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
