"""The opponent of the overhead bench: the usual honest way to write a passthrough.

Promises: a FastAPI route that reads the body, posts it with one pooled aiohttp session and gives
the answer back, streamed when the upstream streams. It looks at nothing in between. Run with
`uvicorn tests.bench.passthrough_app:app` and the variable UPSTREAM_URL.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

URL = os.environ.get("UPSTREAM_URL", "http://127.0.0.1:9/v1") + "/chat/completions"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        app.state.session = session
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    body = await request.body()
    headers = {"content-type": "application/json"}
    if "authorization" in request.headers:
        headers["authorization"] = request.headers["authorization"]
    reply = await request.app.state.session.post(URL, data=body, headers=headers)
    kind = reply.headers.get("content-type", "application/json")
    if kind.startswith("text/event-stream"):

        async def chunks() -> AsyncIterator[bytes]:
            async with reply:
                async for chunk in reply.content.iter_any():
                    yield chunk

        return StreamingResponse(chunks(), status_code=reply.status, media_type=kind)
    async with reply:
        return Response(await reply.read(), status_code=reply.status, media_type=kind)
