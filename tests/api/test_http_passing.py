"""Pass-through over real sockets: client -> uvicorn -> passthrough -> aiohttp server."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
import uvicorn
from aiohttp import web
from yarl import URL

from proxy.api.http import Receive, Scope, Send, passthrough
from proxy.config import load_config
from proxy.upstream import make_upstream
from tests.waiting import happens


class Backend:
    """Echoes what it got, and streams under the tests' control."""

    def __init__(self) -> None:
        self.next_chunk = asyncio.Event()
        self.client_gone = asyncio.Event()
        self.streaming = asyncio.Event()
        self.got_piece = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/sse":
            return await self.sse(request)
        if request.path == "/v1/break":
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"half")
            assert request.transport is not None
            request.transport.close()
            return response
        if request.path == "/v1/upload":
            assert await request.content.readany() == b"one"
            self.got_piece.set()
            try:
                return web.Response(body=await request.read())
            except (asyncio.CancelledError, OSError):
                self.client_gone.set()
                raise
        if request.path == "/v1/zipped":
            return web.Response(body=gzip.compress(b"hello"), headers={"content-encoding": "gzip"})
        if request.path == "/v1/missing":
            return web.json_response({"error": {"message": "no such thing"}}, status=404)
        body = await request.read()
        headers = {"x-method": request.method, "x-target": request.raw_path, "x-own": "kept"}
        if "content-type" in request.headers:
            headers["x-type"] = request.headers["content-type"]
        return web.Response(body=body, headers=headers)

    async def sse(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        self.streaming.set()
        try:
            await asyncio.wait_for(self.next_chunk.wait(), 5)
        except asyncio.CancelledError:
            self.client_gone.set()
            raise
        await response.write(b"data: 2\n\n")
        return response


@asynccontextmanager
async def uvicorn_on(app: object) -> AsyncIterator[str]:
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http="httptools")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        await task


@asynccontextmanager
async def chain() -> AsyncIterator[tuple[aiohttp.ClientSession, str, Backend]]:
    backend = Backend()
    runner = web.ServerRunner(
        web.Server(backend.handle, handler_cancellation=True), shutdown_timeout=0.1
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    flags = {"upstream.base_url": f"http://127.0.0.1:{port}/v1"}
    upstream = make_upstream(load_config(None, {}, flags))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await passthrough(scope, receive, send, upstream)

    try:
        async with uvicorn_on(app) as base, aiohttp.ClientSession(auto_decompress=False) as client:
            yield client, base, backend
    finally:
        await upstream.close()
        await runner.cleanup()


async def test_methods_targets_and_binary_bodies_are_verbatim() -> None:
    blob = bytes(range(256)) * 4000
    async with chain() as (client, base, _):
        for method, body in [
            ("GET", None),
            ("POST", blob),
            ("PUT", blob),
            ("PATCH", b"p"),
            ("DELETE", None),
        ]:
            url = URL(base + "/v1/a%2Fb?limit=2&after=x%20y&k=%41+", encoded=True)
            async with client.request(method, url, data=body) as response:
                assert response.status == 200
                assert response.headers["x-method"] == method
                assert response.headers["x-target"] == "/v1/a%2Fb?limit=2&after=x%20y&k=%41+"
                assert response.headers["x-own"] == "kept"
                assert await response.read() == (body or b"")


async def test_head_has_the_headers_and_no_body() -> None:
    async with chain() as (client, base, _):
        async with client.head(base + "/v1/zipped") as response:
            assert response.status == 200
            assert response.headers["content-length"] == str(len(gzip.compress(b"hello")))
        async with client.get(base + "/v1/x") as response:  # the connection is still usable
            assert response.status == 200


async def test_content_encoding_survives() -> None:
    async with chain() as (client, base, _), client.get(base + "/v1/zipped") as response:
        assert response.headers["content-encoding"] == "gzip"
        assert gzip.decompress(await response.read()) == b"hello"


async def test_status_and_error_body_survive() -> None:
    async with chain() as (client, base, _), client.get(base + "/v1/missing") as response:
        assert response.status == 404
        assert await response.json() == {"error": {"message": "no such thing"}}


async def test_multipart_upload() -> None:
    form = aiohttp.FormData()
    form.add_field("purpose", "assistants")
    form.add_field("file", b"\x00\xff" * 1000, filename="a.bin")
    async with chain() as (client, base, _), client.post(base + "/v1/files", data=form) as response:
        body = await response.read()
        boundary = response.headers["x-type"].partition("boundary=")[2].strip('"').encode()
    assert body.startswith(b"--" + boundary) and b"\x00\xff" * 1000 in body


async def test_the_request_body_streams_up() -> None:
    async with chain() as (client, base, backend):

        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            await asyncio.wait_for(backend.got_piece.wait(), 5)
            yield b"two"

        async with client.post(base + "/v1/upload", data=pieces()) as response:
            assert await response.read() == b"two"


async def test_events_arrive_before_the_next_is_sent() -> None:
    async with chain() as (client, base, backend), client.get(base + "/v1/sse") as response:
        assert await response.content.readany() == b"data: 1\n\n"
        backend.next_chunk.set()
        assert await response.content.read() == b"data: 2\n\n"


async def test_a_client_that_leaves_cancels_the_upstream_call() -> None:
    async with chain() as (client, base, backend):
        response = await client.get(base + "/v1/sse")
        assert await happens(backend.streaming, 5)
        response.close()
        assert await happens(backend.client_gone, 5)


async def test_a_client_that_leaves_while_uploading_cancels_the_upstream_call() -> None:
    async with chain() as (client, base, backend):

        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            await asyncio.sleep(60)

        task = asyncio.create_task(client.post(base + "/v1/upload", data=pieces()))
        assert await happens(backend.got_piece, 5)
        task.cancel()
        assert await happens(backend.client_gone, 5)


async def test_a_break_upstream_is_a_break_for_the_client() -> None:
    async with chain() as (client, base, _), client.get(base + "/v1/break") as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_an_unreachable_upstream_is_openais_error_shape() -> None:
    upstream = make_upstream(load_config(None, {}, {"upstream.base_url": "http://127.0.0.1:9/v1"}))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await passthrough(scope, receive, send, upstream)

    async with (
        uvicorn_on(app) as base,
        aiohttp.ClientSession() as client,
        client.post(base + "/v1/embeddings", data=b"x") as response,
    ):
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_unreachable"
    await upstream.close()
