"""An upstream that records every byte it gets.

Promises: it speaks HTTP/1.1 itself, so what it records is what came over the socket; a request that
breaks the API's rules is answered with 400 in OpenAI's error shape; it waits for events and never
for a time; a client that leaves early is recorded as an event that tests can await.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from tests.e2e.answers import (
    Answer,
    Break,
    Drop,
    Hang,
    Headers,
    Respond,
    Response,
    Step,
    Stream,
    answer,
    error,
)
from tests.e2e.rules import check_openai_rules


@dataclass
class Recorded:
    """One request as it came over the socket, and what became of its answer."""

    index: int  # position among the chat calls, or among the others
    method: str
    target: str  # path and query
    headers: list[tuple[bytes, bytes]]  # as sent, names not lower-cased
    head: bytes  # request line and headers with the blank line
    body: bytes  # decoded when it came chunked
    raw: bytes  # every byte of the request
    json: Any = None  # the decoded body; None when it is not JSON
    violations: list[str] = field(default_factory=list)
    sent: bytearray = field(default_factory=bytearray)  # body bytes of the answer
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)  # client left too early
    finished: asyncio.Event = field(default_factory=asyncio.Event)  # answered to the end

    def header(self, name: str) -> str | None:
        """The first header of that name, whatever its case."""
        wanted = name.lower().encode()
        return next((v.decode() for k, v in self.headers if k.lower() == wanted), None)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; one request at a time, the next one waits in the buffer."""

    def __init__(self, upstream: RecordingUpstream) -> None:
        self.upstream = upstream
        self.buffer = bytearray()
        self.current: Recorded | None = None
        self.task: asyncio.Task[None] | None = None
        self.need = 0  # bytes of the request once its head is known; 0: not known yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.upstream.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.connections.discard(self)
        if self.current is not None and not self.current.finished.is_set():
            self.current.disconnected.set()
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.pump()

    def pump(self) -> None:
        if self.task is not None:
            return
        request = self.parse()
        if request is not None:
            self.current = request
            self.task = asyncio.ensure_future(self.run(request))

    async def run(self, request: Recorded) -> None:
        try:
            await self.upstream.handle(self, request)
        except asyncio.CancelledError:
            return  # the client left: `disconnected` says so
        except Exception as e:  # noqa: BLE001 (a test's own `respond` failed: show it on both ends)
            self.upstream.failures.append(e)
            await self.send(request, error(500, f"the test's upstream raised {e!r}"))
        self.current, self.task = None, None
        if not self.transport.is_closing():
            self.pump()

    def parse(self) -> Recorded | None:
        if self.need > len(self.buffer):
            return None
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return None
        head = bytes(self.buffer[:end])
        lines = head[:-4].split(b"\r\n")
        method, target, _ = lines[0].decode("latin-1").split(" ")
        headers = []
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers.append((name, value.strip()))
        known = {k.lower(): v for k, v in headers}
        if known.get(b"transfer-encoding", b"").lower() == b"chunked":
            found = _dechunk(self.buffer, end)
            if found is None:
                return None
            body, stop = found
        else:
            stop = end + int(known.get(b"content-length", b"0"))
            self.need = stop
            if len(self.buffer) < stop:
                return None
            body = bytes(self.buffer[end:stop])
        raw = bytes(self.buffer[:stop])
        del self.buffer[:stop]
        self.need = 0
        return Recorded(-1, method, target, headers, head, body, raw)

    async def send(self, request: Recorded, reply: Answer) -> None:
        if isinstance(reply, dict):
            reply = Response(json.dumps(reply).encode())
        if isinstance(reply, Hang):
            await asyncio.Event().wait()
        elif isinstance(reply, Drop):
            self.transport.abort()
        elif isinstance(reply, Response):
            length = (b"content-length", str(len(reply.body)).encode())
            self.transport.write(_head(reply.status, (*reply.headers, length)) + reply.body)
            request.sent += reply.body
            request.finished.set()
        elif isinstance(reply, Stream):
            chunked = (b"transfer-encoding", b"chunked")
            self.transport.write(_head(reply.status, (*reply.headers, chunked)))
            for step in reply.steps:
                await self.step(request, step)
                if self.transport.is_closing():
                    return
            self.transport.write(b"0\r\n\r\n")
            request.finished.set()

    async def step(self, request: Recorded, step: Step) -> None:
        if isinstance(step, bytes):
            self.transport.write(b"%x\r\n%b\r\n" % (len(step), step))
            request.sent += step
            if not self.upstream.bursts:
                await asyncio.sleep(0)  # let the loop flush, so that chunks are seen one by one
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, Break):
            self.transport.abort()
        elif isinstance(step, Hang):
            await asyncio.Event().wait()
        else:
            step()


def _head(status: int, headers: Headers) -> bytes:
    reason = http.client.responses.get(status, "").encode()
    lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, reason, lines)


def _dechunk(buffer: bytearray, at: int) -> tuple[bytes, int] | None:
    body = bytearray()
    while True:
        line = buffer.find(b"\r\n", at)
        if line < 0:
            return None
        size = int(bytes(buffer[at:line]).split(b";")[0], 16)
        at = line + 2
        if len(buffer) < at + size + 2:
            return None
        body += buffer[at : at + size]
        at += size + 2
        if size == 0:
            return bytes(body), at


class RecordingUpstream:
    """An OpenAI-compatible upstream on 127.0.0.1, in the running loop.

    `respond(request, index)` returns (or awaits) an answer; without it the demo reader answers.
    `other(recorded)` answers every path that is not .../chat/completions.
    `calls` are the chat requests in order, `others` the rest, `failures` what `respond` raised.
    """

    def __init__(
        self,
        respond: Respond | None = None,
        *,
        other: Callable[[Recorded], Answer] | None = None,
        enforce_rules: bool = True,
        bursts: bool = False,  # True: many chunks may leave in one packet
    ) -> None:
        self.respond = respond or demo_respond
        self.other = other or (lambda recorded: {"object": "list", "data": []})
        self.enforce_rules = enforce_rules
        self.bursts = bursts
        self.calls: list[Recorded] = []
        self.others: list[Recorded] = []
        self.failures: list[Exception] = []
        self.connections: set[_Connection] = set()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._arrived = asyncio.Condition()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def violations(self) -> list[str]:
        """Every broken rule of every chat call, with the call's index."""
        return [f"call {c.index}: {v}" for c in self.calls for v in c.violations]

    async def start(self) -> RecordingUpstream:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Closes the port and cuts what is open; `start` opens the same port again."""
        if self._server is not None:
            self._server.close()
            for connection in list(self.connections):
                connection.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> RecordingUpstream:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def wait_for_calls(self, count: int, timeout_s: float = 20.0) -> Recorded:
        """Waits until `count` chat calls have arrived; returns the last of these."""

        async def wait() -> None:
            async with self._arrived:
                await self._arrived.wait_for(lambda: len(self.calls) >= count)

        await asyncio.wait_for(wait(), timeout_s)
        return self.calls[count - 1]

    async def handle(self, connection: _Connection, request: Recorded) -> None:
        """Records one request and sends its answer."""
        with contextlib.suppress(ValueError):
            request.json = json.loads(request.body)
        path = request.target.partition("?")[0]
        if request.method != "POST" or not path.endswith("/chat/completions"):
            request.index = len(self.others)
            self.others.append(request)
            await connection.send(request, self.other(request))
            return
        request.index = len(self.calls)
        request.violations = check_openai_rules(request.json)
        self.calls.append(request)
        async with self._arrived:
            self._arrived.notify_all()
        if request.violations and self.enforce_rules:
            reply: Answer = error(400, "; ".join(request.violations))
        else:
            found = self.respond(request.json, request.index)
            reply = await found if isinstance(found, Awaitable) else found
        await connection.send(request, reply)


def demo_respond(request: dict[str, Any], index: int) -> Answer:
    """The default: the built-in demo reader, streaming when asked to."""
    from proxy.demo.reader import read  # late: only tests that use it need it

    return answer(request, read(request))


_DECODER = json.JSONDecoder()


def messages_span(body: bytes) -> str:
    """The serialised messages array of a request, exactly as it stands in the body. The text is
    UTF-8 decoded, which is one to one, so prefixes of it are prefixes of the bytes."""
    text = body.decode()
    at = text.index("{") + 1
    while True:
        key, at = _DECODER.raw_decode(text, _skip(text, at))
        at = _skip(text, _skip(text, at) + 1)  # over the colon
        _, end = _DECODER.raw_decode(text, at)
        if key == "messages":
            return text[at:end]
        at = _skip(text, end)
        if text[at] != ",":
            raise ValueError("no messages in the body")
        at += 1


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at
