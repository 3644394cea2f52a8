"""Verbatim HTTP to any OpenAI-compatible server, over one pool of kept-alive connections.

Promises: bytes, unknown headers and unknown fields survive both ways; body bytes are handed on as
they arrive; redirects are not followed; a status of any kind is a reply, never an exception.
A pooled connection that the upstream had closed meanwhile is replaced once, by a fresh one; a POST
on a fresh connection is never repeated, because it may have been paid for.

`chat()` is the hot path: it adds one header filter to what a bare `session.post` costs.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.payload import BytesPayload
from yarl import URL

from proxy.errors import ApiError
from proxy.upstream import CHAT_PATH, Header, Reply, Upstream, UpstreamBroken
from proxy.upstream.routing import HOP_BY_HOP, Proxy, chat_url, end_to_end, forward_url, proxy_for

if TYPE_CHECKING:
    from proxy.config import Config

_CHAT_REPLY_DROPS: Final = HOP_BY_HOP | {b"content-length", b"content-encoding"}
# `expect` was answered by our own server before the body was read.
_FORWARD_DROPS: Final = HOP_BY_HOP | {b"host", b"expect"}
_CHAT_DROPS: Final = _FORWARD_DROPS | {b"content-length", b"content-encoding", b"accept-encoding"}
_OURS: Final = b"x-llm-pager-"  # said to us, and not to another of us upstream
# What aiohttp would add of its own when the client did not send it.
_AUTO_HEADERS: Final = ("accept", "accept-encoding", "user-agent", "content-type")
# Providers put long cookies and policies in headers; aiohttp's own limit is 8190 bytes.
_HEADER_LIMIT_BYTES: Final = 65_536
_READ_BUFFER_BYTES: Final = 16_384  # of an answer; twice that is read ahead of its client
# Of so much at once each loop iteration hands one piece on, whatever the number of streams that came in a burst: else
# the work of all stands between a small request and its answer.
_LARGE_BYTES: Final = 4_096
# A transport takes this much without waiting, so aiohttp's read timeout runs at once; a larger
# request could wait for ever to be written and gets a bound of its own (3 us of CPU).
_UNBUFFERED_BYTES: Final = 32_768
_KEEPALIVE_S: Final = 60.0

log = logging.getLogger(__name__)

_reused: ContextVar[bool] = ContextVar("_reused", default=False)


class _Connector(aiohttp.TCPConnector):
    """A pool that tells the task that asked whether its connection has served before."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[aiohttp.tracing.Trace],
        timeout: aiohttp.ClientTimeout,
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        state = vars(connection.protocol)
        _reused.set("llm_pager_served" in state)
        state["llm_pager_served"] = True
        return connection


    async def _wrap_create_connection(
        self, *args: Any, **kwargs: Any
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        factory, *more = args
        made: Any = await super()._wrap_create_connection(lambda: _Sips(factory()), *more, **kwargs)
        return made[0], made[1].handler


class _Sips(asyncio.BufferedProtocol):
    """A connection read in pieces of our size: uvloop's own are of 256 KB, and an aiohttp that wants no more for now
    keeps what it has been given."""

    def __init__(self, handler: ResponseHandler) -> None:
        self.handler = handler
        self._buffer = memoryview(bytearray(_READ_BUFFER_BYTES))
        self.connection_made = handler.connection_made  # type: ignore[method-assign]
        self.connection_lost = handler.connection_lost  # type: ignore[method-assign]
        self.eof_received = handler.eof_received  # type: ignore[method-assign]
        self.pause_writing = handler.pause_writing  # type: ignore[method-assign]
        self.resume_writing = handler.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.handler.data_received(bytes(self._buffer[:nbytes]))


class _Body(BytesPayload):
    """Request bytes. aiohttp warns above 1 MB for callers who could stream; ours is in RAM."""

    def __init__(self, value: bytes) -> None:
        super().__init__(b"")
        self._value = value
        self._size = len(value)

    async def write_with_length(
        self, writer: AbstractStreamWriter, content_length: int | None
    ) -> None:
        # aiohttp joins the request head with the first write: not with a copy of megabytes.
        value = self._value
        if len(value) <= _UNBUFFERED_BYTES:
            await writer.write(value)
            return
        view = memoryview(value)
        await writer.write(view[:_UNBUFFERED_BYTES])
        await writer.write(view[_UNBUFFERED_BYTES:])


class HttpReply(Reply):
    """A `Reply` over one connection; reading its end gives the connection back to the pool."""

    def __init__(
        self, response: aiohttp.ClientResponse, drops: frozenset[bytes], turns: asyncio.Lock
    ) -> None:
        self.status = response.status
        self._turns = turns
        self._response = response
        raw = [(name.lower(), value) for name, value in response.raw_headers]
        self.headers = end_to_end(raw, drops)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        response = self._response
        read = response.content.read
        try:
            while chunk := await read(_READ_BUFFER_BYTES):
                if len(chunk) >= _LARGE_BYTES:
                    async with self._turns:
                        await asyncio.sleep(0)
                yield chunk
        except TimeoutError as error:
            raise UpstreamBroken("timeout") from error
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            raise UpstreamBroken(f"the upstream's answer broke off: {error!r}") from error
        finally:
            # Does nothing after the end; before it, the upstream sees the disconnect now.
            response.close()

    async def close(self) -> None:
        self._response.close()


class OpenAIUpstream(Upstream):
    """`Upstream` over HTTP. The session is made lazily, on the loop of the first call."""

    def __init__(self, config: Config) -> None:
        upstream = config.upstream
        self._base_url = upstream.base_url.rstrip("/")
        self._authorization = upstream.api_key and f"Bearer {upstream.api_key}"
        self._timeout_s = upstream.timeout_s
        self._connect_timeout_s = upstream.connect_timeout_s
        self._max_connections = upstream.max_connections
        self._proxy = _proxy(self._base_url)
        self._turns = asyncio.Lock()  # of all replies
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # by whether connections are kept

    async def chat(
        self,
        body: bytes,
        headers: Sequence[Header],
        query: bytes = b"",
        path: str = CHAT_PATH,
    ) -> Reply:
        pairs = self._headers(headers, _CHAT_DROPS)
        pairs.append(("Accept-Encoding", "identity"))
        url = chat_url(self._base_url, path)
        if query:  # Azure's api-version
            url = f"{url}?{query.decode('latin-1')}"
        large = len(body) > _UNBUFFERED_BYTES
        try:
            async with asyncio.timeout(self._timeout_s) if large else nullcontext():
                response = await self._request("POST", url, pairs, _Body(body), decode=True)
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(error) from error
        return HttpReply(response, _CHAT_REPLY_DROPS, self._turns)

    async def forward(
        self,
        method: str,
        path: str,
        query: bytes,
        headers: Sequence[Header],
        body: AsyncIterator[bytes] | None,
    ) -> Reply:
        url = forward_url(self._base_url, path).replace("#", "%23")
        if query:
            url += "?" + query.decode("latin-1").replace("#", "%23")
        pairs = self._headers(headers, _FORWARD_DROPS)
        try:
            response = await self._request(method, url, pairs, body, decode=False)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._failure(error) from error
        return HttpReply(response, HOP_BY_HOP, self._turns)

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def _request(
        self,
        method: str,
        url: str,
        pairs: list[tuple[str, str]],
        body: _Body | AsyncIterator[bytes] | None,
        *,
        decode: bool,
    ) -> aiohttp.ClientResponse:
        target = URL(url, encoded=True)
        proxy, proxy_headers = None, None
        if self._proxy is not None:
            proxy = self._proxy.url
            if (authorization := self._proxy.authorization) is not None:
                if target.scheme == "https":  # for the tunnel alone
                    proxy_headers = {"Proxy-Authorization": authorization}
                else:
                    pairs.append(("Proxy-Authorization", authorization))
        send = partial(
            aiohttp.ClientSession.request,
            method=method,
            url=target,
            headers=pairs,
            data=body,
            allow_redirects=False,
            auto_decompress=decode,
            proxy=proxy,
            proxy_headers=proxy_headers,
        )
        _reused.set(False)
        try:
            return await send(self._session(keep=True))
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            if not _reused.get() or not _repeatable(error, body):
                raise
        return await send(self._session(keep=False))

    def _session(self, *, keep: bool) -> aiohttp.ClientSession:
        if keep in self._sessions:
            return self._sessions[keep]
        session = self._sessions[keep] = aiohttp.ClientSession(
            connector=_Connector(
                limit=self._max_connections,
                force_close=not keep,
                keepalive_timeout=_KEEPALIVE_S if keep else None,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),  # one client's cookies are not another's
            auto_decompress=False,
            skip_auto_headers=_AUTO_HEADERS,
            timeout=aiohttp.ClientTimeout(
                total=None,  # a long answer is fine as long as bytes keep coming
                connect=self._timeout_s,  # includes the wait for a free connection
                sock_connect=self._connect_timeout_s,
                sock_read=self._timeout_s,
            ),
            read_bufsize=_READ_BUFFER_BYTES,
            max_line_size=_HEADER_LIMIT_BYTES,
            max_field_size=_HEADER_LIMIT_BYTES,
        )
        return session

    def _headers(self, headers: Sequence[Header], drops: frozenset[bytes]) -> list[tuple[str, str]]:
        if self._authorization is not None:
            drops = drops | {b"authorization"}
        pairs = [
            (name.decode("latin-1"), _text(value))
            for name, value in end_to_end(headers, drops)
            if not name.startswith(_OURS)
        ]
        if self._authorization is not None:
            pairs.append(("Authorization", self._authorization))
        return pairs

    def _failure(self, error: Exception) -> ApiError:
        """What failed before a status, as the client is told it."""
        if isinstance(error, TimeoutError):
            waited = f"did not answer within {self._timeout_s:g} s (connecting: {self._connect_timeout_s:g} s)."
            return ApiError(504, f"The upstream {self._base_url} {waited}", "api_error", "upstream_timeout")
        words = f"The upstream {self._base_url} could not be reached: {error}"
        return ApiError(502, words, "api_error", "upstream_unreachable")


def _proxy(base_url: str) -> Proxy | None:
    try:
        return proxy_for(base_url, os.environ)
    except ValueError as error:
        log.warning("%s The upstream is asked without a proxy.", error)
        return None


def _text(value: bytes) -> str:
    """A header value such that aiohttp, which writes UTF-8, puts the same bytes on the wire."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _repeatable(error: aiohttp.ClientError, body: _Body | AsyncIterator[bytes] | None) -> bool:
    """True when nothing of an answer was read and the body can be sent a second time."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return False
    if isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str):
        return False  # the message is a half-read response
    return body is None or isinstance(body, _Body)
