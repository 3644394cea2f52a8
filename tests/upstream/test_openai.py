"""The HTTP upstream against a scripted server on a real socket."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from proxy.config import load_config
from proxy.errors import ApiError
from proxy.upstream import Upstream, UpstreamBroken, make_upstream

LIMIT = 1 << 20
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Request(NamedTuple):
    connection: int
    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


async def read_request(reader: asyncio.StreamReader, connection: int) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    headers = []
    for line in head[1:]:
        name, _, value = line.partition(b":")
        headers.append((name.lower(), value.strip()))
    request = Request(connection, head[0], headers, b"")
    body = b""
    if length := request.header(b"content-length"):
        body = await reader.readexactly(int(length[0]))
    elif request.header(b"transfer-encoding"):
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    return request._replace(body=body)


Handler = Callable[[Request, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(
    handler: Handler, **options: object
) -> AsyncIterator[tuple[Upstream, list[Request]]]:
    """A server that calls `handler` per request, and an upstream that points at it."""
    seen: list[Request] = []
    connections = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        number = connections
        try:
            while not writer.is_closing():
                request = await read_request(reader, number)
                seen.append(request)
                await handler(request, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client closed: what several tests wait for elsewhere
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    flags: dict[str, object] = {"upstream.base_url": f"http://127.0.0.1:{port}/deep/v1/"}
    flags.update({f"upstream.{name}": value for name, value in options.items()})
    upstream = make_upstream(load_config(None, {}, flags))
    try:
        yield upstream, seen
    finally:
        await upstream.close()
        server.close()


def replying(data: bytes) -> Handler:
    async def handler(
        request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(data)
        await writer.drain()

    return handler


async def test_request_and_reply_are_verbatim() -> None:
    body = b'{"model": "m",  "unknown": [1.0, "\xc3\xa9"]}'
    reply_body = b'{"choices": [],\n "extra": 1}'
    data = (
        b"HTTP/1.1 418 Odd\r\nX-Request-ID: r1\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n"
        b"connection: keep-alive\r\ncontent-length: %d\r\n\r\n" % len(reply_body)
    ) + reply_body
    async with serving(replying(data)) as (upstream, seen):
        headers = [
            (b"host", b"proxy:8080"),
            (b"authorization", b"Bearer sk-client"),
            (b"x-odd", b"caf\xc3\xa9"),
            (b"accept-encoding", b"gzip, br"),
            (b"connection", b"keep-alive"),
            (b"content-length", b"999"),
        ]
        reply = await upstream.chat(body, headers)
        assert reply.status == 418
        assert reply.headers == [
            (b"x-request-id", b"r1"),
            (b"set-cookie", b"a=1"),
            (b"set-cookie", b"b=2"),
        ]
        assert await reply.read(LIMIT) == reply_body
    [request] = seen
    assert request.line == b"POST /deep/v1/chat/completions HTTP/1.1"
    assert request.body == body
    assert request.header(b"authorization") == [b"Bearer sk-client"]
    assert request.header(b"x-odd") == [b"caf\xc3\xa9"]
    assert request.header(b"accept-encoding") == [b"identity"]
    assert request.header(b"content-length") == [str(len(body)).encode()]
    assert {name for name, _ in request.headers} == {
        *(b"host", b"authorization", b"x-odd", b"accept-encoding", b"content-length")
    }


async def test_configured_key_replaces_the_clients() -> None:
    async with serving(replying(OK), api_key="sk-ours") as (upstream, seen):
        await (await upstream.chat(b"{}", [(b"authorization", b"Bearer theirs")])).read(LIMIT)
    assert seen[0].header(b"authorization") == [b"Bearer sk-ours"]


async def test_a_large_body_arrives_whole() -> None:
    body = bytes(range(256)) * 20_000
    async with serving(replying(OK)) as (upstream, seen):
        assert await (await upstream.chat(body, [])).read(LIMIT) == b"ok"
    assert seen[0].body == body


async def test_a_compressed_chat_reply_is_decoded_although_identity_was_asked() -> None:
    packed = gzip.compress(b"hello")
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with serving(replying(head + packed)) as (upstream, _):
        reply = await upstream.chat(b"{}", [])
        assert await reply.read(LIMIT) == b"hello"
        assert reply.headers == []


async def test_chunks_arrive_before_the_next_one_is_sent() -> None:
    first_seen = asyncio.Event()

    async def handler(
        request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(CHUNKED + b"3\r\none\r\n")
        await asyncio.wait_for(first_seen.wait(), 5)
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        await writer.drain()

    async with serving(handler) as (upstream, _):
        chunks = (await upstream.chat(b"{}", [])).chunks()
        assert await anext(chunks) == b"one"
        first_seen.set()
        assert [chunk async for chunk in chunks] == [b"two"]


@pytest.mark.parametrize("way", ["close", "cancel", "aclose", "cancel before the status"])
async def test_giving_up_reaches_the_server(way: str) -> None:
    gone = asyncio.Event()
    asked = asyncio.Event()

    async def handler(
        request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if way != "cancel before the status":
            writer.write(CHUNKED + b"3\r\none\r\n")
        asked.set()
        assert await reader.read() == b""
        gone.set()
        writer.close()

    async with serving(handler) as (upstream, _):
        if way == "cancel before the status":
            task = asyncio.create_task(upstream.chat(b"{}", []))
            await asked.wait()
            task.cancel()
        else:
            reply = await upstream.chat(b"{}", [])
            chunks = reply.chunks()
            assert await anext(chunks) == b"one"
            if way == "close":
                waiting = asyncio.ensure_future(anext(chunks))
                await asyncio.sleep(0)
                await reply.close()
                with pytest.raises(UpstreamBroken):
                    await waiting
            elif way == "cancel":
                waiting = asyncio.ensure_future(anext(chunks))
                await asyncio.sleep(0)
                waiting.cancel()
            else:
                await chunks.aclose()  # type: ignore[attr-defined]
        await asyncio.wait_for(gone.wait(), 5)


async def test_refused_connection_is_502() -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    flags = {"upstream.base_url": f"http://127.0.0.1:{port}/v1"}
    upstream = make_upstream(load_config(None, {}, flags))
    with pytest.raises(ApiError) as caught:
        await upstream.chat(b"{}", [])
    assert (caught.value.status, caught.value.code) == (502, "upstream_unreachable")
    assert caught.value.type == "api_error"
    with pytest.raises(ApiError) as caught:
        await upstream.forward("GET", "/models", b"", [], None)
    assert caught.value.status == 502
    await upstream.close()


@pytest.mark.parametrize("size_bytes", [2, 8 << 20])
async def test_silence_before_the_status_is_504(size_bytes: int) -> None:
    """Also for a server that never reads: a large request then cannot even be written."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    flags = {
        "upstream.base_url": f"http://127.0.0.1:{port}/v1",
        "upstream.timeout_s": 0.2,
        "upstream.connect_timeout_s": 0.2,
    }
    upstream = make_upstream(load_config(None, {}, flags))
    with pytest.raises(ApiError) as caught:
        await upstream.chat(b"x" * size_bytes, [])
    assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")
    await upstream.close()
    server.close()


@pytest.mark.parametrize(
    "partial",
    [
        CHUNKED + b"3\r\none\r\n5\r\ntw",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\none",
    ],
)
async def test_a_body_that_breaks_off_is_upstream_broken(partial: bytes) -> None:
    async def handler(
        request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(partial)
        await writer.drain()
        writer.close()

    async with serving(handler) as (upstream, _):
        reply = await upstream.chat(b"{}", [])
        assert reply.status == 200
        with pytest.raises(UpstreamBroken):
            await reply.read(LIMIT)


async def test_silence_within_the_body_is_upstream_broken_timeout() -> None:
    async def handler(
        request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(CHUNKED + b"3\r\none\r\n")
        await reader.read()
        writer.close()

    async with serving(handler, timeout_s=0.2, connect_timeout_s=0.2) as (upstream, _):
        chunks = (await upstream.chat(b"{}", [])).chunks()
        assert await anext(chunks) == b"one"
        with pytest.raises(UpstreamBroken, match=r"^timeout$"):
            await anext(chunks)


async def test_a_body_over_the_limit_is_refused() -> None:
    async with serving(replying(OK)) as (upstream, _):
        with pytest.raises(UpstreamBroken, match="longer than 1 bytes"):
            await (await upstream.chat(b"{}", [])).read(1)


async def test_a_stale_pooled_connection_is_replaced_once() -> None:
    async def handler(
        request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if request.connection == 1 and request.body == b"second":
            writer.close()  # closed as if it had idled too long, without a byte of an answer
        else:
            writer.write(OK)
            await writer.drain()

    async with serving(handler) as (upstream, seen):
        for body in (b"first", b"second"):
            assert await (await upstream.chat(body, [])).read(LIMIT) == b"ok"
    assert [(r.connection, r.body) for r in seen] == [(1, b"first"), (1, b"second"), (2, b"second")]


async def test_a_fresh_connection_is_never_retried() -> None:
    async def handler(
        request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.close()

    async with serving(handler) as (upstream, seen):
        with pytest.raises(ApiError) as caught:
            await upstream.chat(b"{}", [])
        assert caught.value.status == 502
    assert len(seen) == 1


async def test_forward_keeps_the_target_encoding_and_length() -> None:
    packed = gzip.compress(b"hello")
    head = b"HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
    async with serving(replying(head % len(packed) + packed)) as (upstream, seen):
        reply = await upstream.forward(
            "GET", "/files/a%2Fb%20c", b"q=%41&r=a+b&q=%zz", [(b"accept-encoding", b"gzip")], None
        )
        assert reply.status == 302
        assert await reply.read(LIMIT) == packed
        assert (b"content-encoding", b"gzip") in reply.headers
        assert (b"content-length", str(len(packed)).encode()) in reply.headers
    assert seen[0].line == b"GET /deep/v1/files/a%2Fb%20c?q=%41&r=a+b&q=%zz HTTP/1.1"
    assert seen[0].header(b"accept-encoding") == [b"gzip"]


async def test_forward_streams_the_request_body() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    async with serving(replying(OK)) as (upstream, seen):
        for headers in ([], [(b"content-length", b"6")]):
            reply = await upstream.forward("PUT", "/files", b"", headers, pieces())
            assert await reply.read(LIMIT) == b"ok"
    assert [r.body for r in seen] == [b"onetwo", b"onetwo"]
    assert seen[0].header(b"transfer-encoding") == [b"chunked"]
    assert seen[1].header(b"content-length") == [b"6"]


@pytest.mark.parametrize("path", ["@evil.example/x", "//evil.example/x", "#x", ""])
async def test_forward_never_leaves_the_configured_host(path: str) -> None:
    async with serving(replying(OK), api_key="sk-ours") as (upstream, seen):
        await (await upstream.forward("GET", path, b"", [], None)).read(LIMIT)
    assert seen[0].line.startswith(b"GET /deep/v1")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_statuses_without_a_body(status: bytes) -> None:
    async with serving(replying(b"HTTP/1.1 " + status + b"\r\netag: x\r\n\r\n")) as (
        upstream,
        seen,
    ):
        for _ in range(2):
            reply = await upstream.forward("GET", "/x", b"", [], None)
            assert (reply.status, await reply.read(LIMIT)) == (int(status[:3]), b"")
    assert [r.connection for r in seen] == [1, 1]


async def test_head_keeps_the_length_and_has_no_body() -> None:
    data = b"HTTP/1.1 200 OK\r\ncontent-length: 77\r\n\r\n"
    async with serving(replying(data)) as (upstream, _):
        reply = await upstream.forward("HEAD", "/x", b"", [], None)
        assert reply.headers == [(b"content-length", b"77")]
        assert await reply.read(LIMIT) == b""


async def test_headers_named_by_connection_stay_on_their_connection() -> None:
    reply = (
        b"HTTP/1.1 200 OK\r\nconnection: keep-alive, X-Hop\r\nx-hop: 1\r\nx-request-id: r\r\n"
        b"content-length: 2\r\n\r\nok"
    )

    async def handler(_: Request, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)

    sent = [(b"connection", b"close, X-Mine"), (b"x-mine", b"1"), (b"traceparent", b"t")]
    async with serving(handler) as (upstream, seen):
        for _ in range(2):
            got = await upstream.chat(b"{}", sent)
            assert [h for h in got.headers if h[0].startswith(b"x-")] == [(b"x-request-id", b"r")]
            await got.read(LIMIT)
    assert all(not request.header(b"x-mine") for request in seen)
    assert all(request.header(b"traceparent") == [b"t"] for request in seen)
