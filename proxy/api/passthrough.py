"""Every path that is not ours: the client's bytes up, the upstream's bytes down.

Promises: method, path, query, status, headers and bodies are verbatim, minus what belongs to one
connection only; both directions stream; a client that leaves cancels the upstream call; an answer
that breaks upstream breaks for the client too, instead of ending as if it were whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final

from proxy.api.paths import forward_target, raw_path
from proxy.errors import ApiError
from proxy.upstream import Header, Reply, Upstream

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_QUEUED_PIECES: Final = 4  # of at most 64 KiB each: uvicorn's own read limit


async def passthrough(scope: Scope, receive: Receive, send: Send, upstream: Upstream) -> None:
    """Serve one ASGI `http` request from `upstream.forward`.

    Raises `UpstreamBroken` when the body breaks off, so that the server closes the connection.
    """
    pieces: asyncio.Queue[bytes | None] | None = None
    if _has_body(scope["headers"]):
        pieces = asyncio.Queue(_QUEUED_PIECES)
    answer = asyncio.ensure_future(_answer(scope, send, upstream, pieces))
    client = asyncio.ensure_future(_follow_client(receive, pieces))
    try:
        await asyncio.wait((answer, client), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (answer, client):
            task.cancel()
        await asyncio.wait((answer, client))
    for task in (client, answer):
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def _follow_client(receive: Receive, pieces: asyncio.Queue[bytes | None] | None) -> None:
    """Hand the request body on as it arrives; return when the client is gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if pieces is None:
            continue
        if body := message.get("body", b""):
            await pieces.put(body)
        if not message.get("more_body", False):
            await pieces.put(None)
            pieces = None


async def _body(pieces: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (piece := await pieces.get()) is not None:
        yield piece


async def _answer(
    scope: Scope, send: Send, upstream: Upstream, pieces: asyncio.Queue[bytes | None] | None
) -> None:
    body = None if pieces is None else _body(pieces)
    method: str = scope["method"]
    try:
        reply = await upstream.forward(
            method, forward_target(raw_path(scope)), scope.get("query_string", b""), scope["headers"], body
        )
    except ApiError as error:
        await send_error(send, error)
        return
    await relay(reply, send)


async def relay(reply: Reply, send: Send) -> None:
    """Answer with an upstream reply, whatever it is, as it arrives. Raises `UpstreamBroken`."""
    try:
        headers = reply.headers
        if reply.status == 304:  # its length speaks of a body that is not sent
            headers = [header for header in headers if header[0] != b"content-length"]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for chunk in reply.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await reply.close()


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with the error's status and its body in OpenAI's shape."""
    body = error.body()
    headers: list[Header] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    for name, value in (error.headers or {}).items():
        headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _has_body(headers: list[Header]) -> bool:
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0"):
            return True
    return False
