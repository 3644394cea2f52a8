"""The server's side of a socket: uvicorn's HTTP protocol, with limits.

Promises: a head is no longer than `server.head_limit_bytes`, nor what stands between a body's pieces (trailers,
chunk extensions); head and body come in time, the body at a least speed, else 408; a client that does not read its
answer loses its connection after `server.send_timeout_s`, whoever waits for whom; connections are limited, in all and
by address, and for a new one the longest idle is closed before anybody is refused. A refusal is an answer in
OpenAI's error shape wherever one can be given still, and is read to its end by a client that goes on sending. Nothing
is asked of a request in time: one sweep a second looks at all connections. A client that speaks HTTP/1.0 gets no
chunks, which it does not know: a body whose length is not told ends with the connection, and streams until then.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import sys
from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from proxy.config import ServerConfig
from proxy.errors import ApiError

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGISendEvent

log = logging.getLogger(__name__)

_HEADER_BYTES: Final = 32  # what a header costs beside its text: RFC 9113, 6.5.2
_LINGER_S: Final = 2.0  # that a refused client has to read why, while what it still sends is dropped
_UNSENT_BYTES: Final = 16_384  # of an answer, before its handler waits for the client; the kernel has some, too
_SWEEPS: Final = 8  # in the shortest of the times, one a second at most
_LOOKED_AT: Final = 64  # connections, for an idle one among them
_DESCRIPTORS: Final = 65_536
_IDLE, _HEAD, _BODY = range(3)  # what a connection is about to receive


class Door:
    """The connections of one process. Its file descriptors are a limit, too: each
    connection may need one more to the upstream."""

    def __init__(self, server: ServerConfig) -> None:
        self.server = server
        self._most = min(server.connections, _descriptors() // 2)
        self._open = 0
        self._by_address: dict[str, Mates] = {}
        self._proxies = [ipaddress.ip_network(network) for network in server.trusted_proxies]
        self._is_proxy = lru_cache(1024)(self._looked_up)
        self._every_s = min(1.0, min(server.receive_timeout_s, server.send_timeout_s) / _SWEEPS)
        self._sweeping = False

    def enter(self, protocol: Protocol) -> None:
        """A connection is made; one too many costs one that is idle, or is refused."""
        address = protocol.address
        protocol.mates = mates = self._by_address.setdefault(address, OrderedDict())
        mates[protocol] = None
        self._open += 1
        if not self._sweeping:
            self._sweeping = True
            protocol.loop.call_later(self._every_s, self._sweep, protocol.loop)
        if self._open > self._most:
            mates = max(self._by_address.values(), key=len)  # whose address has most
            said = f"{self._most} in all (server.connections)"
        elif len(mates) > self.server.connections_per_address and not self._is_proxy(address):
            said = (
                f"{self.server.connections_per_address} from {address} (server.connections_per_address; a load"
                " balancer's address belongs into server.trusted_proxies)"
            )
        else:
            return
        for _ in range(min(_LOOKED_AT, len(mates))):
            longest = next(iter(mates))
            if longest.is_idle and longest is not protocol:
                longest.transport.close()
                return
            mates.move_to_end(longest)
        protocol.refuse(ApiError(
            503, f"There are too many connections to this server: {said}. Try again in a moment.",
            "api_error", "too_many_connections", headers={"retry-after": "1"},
        ))  # fmt: skip

    def leave(self, protocol: Protocol) -> None:
        self._open -= 1
        protocol.mates.pop(protocol, None)
        if not protocol.mates:
            self._by_address.pop(protocol.address, None)

    def _looked_up(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:  # a socket file's
            return True
        return any(parsed in network for network in self._proxies)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        for protocol in [protocol for mates in self._by_address.values() for protocol in mates]:
            protocol.check(now_s)
        self._sweeping = bool(self._open)
        if self._sweeping:
            loop.call_later(self._every_s, self._sweep, loop)


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._door: Door = getattr(self.app, "door", None) or _usual_door()
        self._server = self._door.server
        self._awaits = _IDLE
        self._came = False  # of the bytes that are being parsed: a request's beginning, a piece of a body, an end
        self._between_bytes = 0  # received since then
        self._chunk_bytes = 0
        self._body_bytes = self._seen_bytes = self._mark_bytes = 0  # received; at the last sweep; since the mark
        self._moved_s = self._mark_s = 0.0
        self._unsent_bytes, self._unsent_s = 0, 0.0  # written and not taken; since when it has not become less
        self.address = ""  # without its port
        self.mates: Mates = OrderedDict()
        self._refused_s: float | None = None  # when it was: what comes is dropped
        self.since_s = 0.0  # when what is awaited began to be

    # -- what is received

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(_UNSENT_BYTES)
        self.since_s = self.loop.time()
        self.address = self.client[0] if self.client else ""
        self._door.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._door.leave(self)

    def data_received(self, data: bytes) -> None:
        if self._refused_s is not None:
            return
        self._came, self._chunk_bytes = False, len(data)
        super().data_received(data)
        self._between_bytes = 0 if self._came else self._between_bytes + len(data)
        if self._between_bytes > self._server.head_limit_bytes and self._refused_s is None:
            self.refuse(self._too_long())

    def on_message_begin(self) -> None:
        self._came, self._awaits, self.since_s = True, _HEAD, self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        limit = self._server.head_limit_bytes
        if self._between_bytes + self._chunk_bytes + _HEADER_BYTES * len(self.headers) > limit:
            size = sum(len(name) + len(value) + _HEADER_BYTES for name, value in self.headers)
            if size + len(self.url) > limit:
                self._give_up(self._too_long())
        if len(self.pipeline) >= self._server.pipelined_requests:
            self._give_up(ApiError(
                503, "Too many requests wait on one connection (server.pipelined_requests); read the answers first.",
                "api_error", "too_many_requests",
            ))  # fmt: skip
        self._came, self._awaits = True, _BODY
        self._mark_s = self._moved_s = self.since_s = self.loop.time()
        self._mark_bytes = self._body_bytes
        super().on_headers_complete()
        self.headers = []  # trailers are no headers: they are let go

    def on_body(self, body: bytes) -> None:
        self._came = True
        self._body_bytes += len(body)
        cycle: Any = self.cycle
        if not cycle.body:
            cycle.body = b""  # nothing and a piece are that piece: it is not copied twice more
        elif isinstance(cycle.body, bytes):
            cycle.body = bytearray(cycle.body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._came, self._awaits, self.since_s = True, _IDLE, self.loop.time()
        self.mates.move_to_end(self)
        super().on_message_complete()

    # -- what is refused

    def _too_long(self) -> ApiError:
        limit = self._server.head_limit_bytes
        return ApiError(
            431, f"The request's head is longer than {limit} bytes (server.head_limit_bytes).", code="head_too_large"
        )

    def _give_up(self, error: ApiError) -> NoReturn:
        """Within the parser: no more of what has come is read."""
        self.refuse(error)
        raise error

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of bytes that are no HTTP, and of what the parser was told to give up."""
        if self._refused_s is None:
            self.refuse(ApiError(400, "The request is no valid HTTP.", code="invalid_http"))

    def refuse(self, error: ApiError) -> None:
        """Answer what is being received with the error, where an answer is not under way, and end the connection."""
        self._refused_s = self.loop.time()
        log.info("refused: %d %s", error.status, error.code)
        cycle, own = self.cycle, self._awaits == _BODY
        if own:  # its handler is to stop waiting for the body
            cycle.disconnected = True
            cycle.message_event.set()
        answering = bool(self.pipeline) or (cycle is not None and not cycle.response_complete and not own)
        if answering or (own and (cycle.response_started or cycle.response_complete)):
            self.transport.close()
            return
        body = error.body()
        head = [STATUS_LINE[error.status], b"content-type: application/json\r\nconnection: close\r\n"]
        head += [f"{name}: {value}\r\n".encode() for name, value in error.headers.items()]
        self.transport.write(b"".join([*head, b"content-length: %d\r\n\r\n" % len(body), body]))
        # Closed now, with bytes unread, the connection would be reset, and the answer lost with it.
        if self.transport.can_write_eof():
            self.transport.write_eof()

    # -- what is overdue

    @property
    def is_idle(self) -> bool:
        """Nothing of a request is here but the beginning of its head, and nothing of an answer is under way."""
        return self._awaits != _BODY and self._is_free and not self.transport.is_closing()

    @property
    def _is_free(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def check(self, now_s: float) -> None:
        """Once a sweep: end what takes too long."""
        server = self._server
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent_bytes:
            self._unsent_bytes, self._unsent_s = unsent, now_s
        elif now_s - self._unsent_s > server.send_timeout_s:
            log.info("closed: the client has read nothing of its answer for %g s", server.send_timeout_s)
            self.transport.abort()
            return
        if self._refused_s is not None:
            if now_s - self._refused_s > _LINGER_S:
                self.transport.close()
        elif self._awaits == _BODY:
            self._check_body(now_s)
        elif not self._is_free:  # the next head may have begun: its time comes when it is its turn
            self.since_s = now_s
        elif self._awaits == _HEAD:
            if now_s - self.since_s > server.receive_timeout_s:
                self.refuse(ApiError(
                    408, f"The request's head did not come within {server.receive_timeout_s:g} s"
                    " (server.receive_timeout_s).", code="request_timeout",
                ))  # fmt: skip
        elif self.timeout_keep_alive_task is None and now_s - self.since_s > self.timeout_keep_alive:
            self.transport.close()  # empty lines end uvicorn's own timer

    def _check_body(self, now_s: float) -> None:
        within_s = self._server.receive_timeout_s
        if self.flow.read_paused:  # it is we who do not read
            self._mark_s = self._moved_s = now_s
            self._mark_bytes = self._body_bytes
        if self._body_bytes != self._seen_bytes:
            self._seen_bytes, self._moved_s = self._body_bytes, now_s
        late = now_s - self._moved_s > within_s
        if now_s - self._mark_s > within_s:
            late = late or self._body_bytes - self._mark_bytes < within_s * self._server.receive_bytes_per_s
            self._mark_s, self._mark_bytes = now_s, self._body_bytes
        if late:
            self.refuse(ApiError(
                408, f"The request's body came too slowly: nothing for {within_s:g} s, or less than"
                f" {self._server.receive_bytes_per_s} bytes a second (server.receive_timeout_s,"
                " server.receive_bytes_per_s).", code="request_timeout",
            ))  # fmt: skip

    # -- what is answered

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        cycle.__class__ = _UntilClose if cycle.scope["http_version"] == "1.0" else _Cycle
        super()._start_asgi_task(cycle, app)


Mates = OrderedDict[Protocol, None]  # the connections of an address; who had a request last is last


@lru_cache(1)
def _usual_door() -> Door:
    """Of an application that has none of its own."""
    return Door(ServerConfig())


class _Cycle(RequestResponseCycle):
    """One request and its answer. A head and the body that comes with it are one write: each takes a twentieth of a
    short turn. A piece of a stream is written at once, as long as its client reads."""

    async def send(self, message: ASGISendEvent) -> None:
        event: Any = message
        if event["type"] == "http.response.start":
            self.transport = cast(asyncio.Transport, _HeadFirst(self.transport))
        elif self.chunked_encoding and event.get("more_body") and (body := event.get("body")) and self._flows:
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
            return
        await super().send(message)

    @property
    def _flows(self) -> bool:
        return not (self.flow.write_paused or self.disconnected or self.response_complete or self.scope["method"] == "HEAD")


class _HeadFirst:
    """A transport that has its first bytes wait for those that follow in the same round of the event loop."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
        else:
            head, self._head = self._head, b""
            self._transport.write(head + data if head else data)

    def _flush(self) -> None:
        if self._head and not self.is_closing():  # its client may have left in between
            self.write(b"")

    def close(self) -> None:
        self._flush()
        self._transport.close()


class _UntilClose(_Cycle):
    """One request and its answer, whose end may be the connection's."""

    async def send(self, message: ASGISendEvent) -> None:
        event: Any = message
        if event["type"] == "http.response.start":
            names = {name.lower() for name, _ in event.get("headers", ())}
            if b"content-length" not in names and event["status"] not in (204, 304):
                self.chunked_encoding = False
                self.expected_content_length = sys.maxsize
        elif self.expected_content_length > sys.maxsize // 2 and not event.get("more_body", False):
            self.expected_content_length = len(event.get("body", b""))
        await super().send(message)


def _descriptors() -> int:
    """Files that this process may have open. The soft limit is raised to the hard one, which is what that is for, as
    far as we need it: some systems' is a thousand million."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    raised = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if raised > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return max(soft, raised)
