"""The litellm upstream against a local OpenAI-compatible server (litellm is imported once)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from proxy.config import load_config
from proxy.errors import ApiError
from proxy.upstream import Upstream, UpstreamBroken, make_upstream
from tests.waiting import happens

LIMIT = 1 << 20
TOOL_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look", "arguments": '{"at": 1}'},
}

ANTHROPIC_ANSWER = {
    "id": "m1",
    "type": "message",
    "role": "assistant",
    "model": "claude-test",
    "content": [{"type": "text", "text": "bonjour"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 2},
}


class Provider:
    """An OpenAI-compatible server; the last user message says how it behaves."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.client_gone = asyncio.Event()
        self.go_on = asyncio.Event()
        self.asked = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("authorization"))
        if request.path.endswith("/messages"):
            return web.json_response(ANTHROPIC_ANSWER)
        wish = body["messages"][-1]["content"]
        if wish == "limit":
            error = {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}
            return web.json_response({"error": error}, status=429, headers={"retry-after": "7"})
        if wish == "silent":
            self.asked.set()
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                self.client_gone.set()
                raise
        if body.get("stream"):
            return await self.stream(request, wish)
        message: dict[str, Any] = {"role": "assistant", "content": "hello"}
        if wish == "tools":
            message = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {
                "id": "c1",
                "object": "chat.completion",
                "created": 1,
                "model": "test-model",
                "choices": [choice],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            }
        )

    async def stream(self, request: web.BaseRequest, wish: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def event(delta: dict[str, Any], finish: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1}
            data = json.dumps({**chunk, "model": "test-model", "choices": [choice]})
            await response.write(f"data: {data}\n\n".encode())

        if wish == "tools":
            await event({"role": "assistant", "tool_calls": [{"index": 0, **TOOL_CALL}]})
            await event({}, "tool_calls")
        else:
            if wish == "headers only":
                self.asked.set()
                try:
                    await asyncio.sleep(5)
                except asyncio.CancelledError:
                    self.client_gone.set()
                    raise
            await event({"role": "assistant", "content": "hel"})
            if wish == "wait":
                try:
                    await asyncio.wait_for(self.go_on.wait(), 5)
                except asyncio.CancelledError:
                    self.client_gone.set()
                    raise
            if wish == "break":
                assert request.transport is not None
                request.transport.close()
                return response
            await event({"content": "lo"})
            await event({}, "stop")
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def providing(**options: object) -> AsyncIterator[tuple[Upstream, Provider]]:
    provider = Provider()
    server = web.Server(provider.handle, handler_cancellation=True)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    flags: dict[str, object] = {
        "upstream.provider": "litellm",
        "upstream.base_url": f"http://127.0.0.1:{runner.addresses[0][1]}/v1",
    }
    for name, value in options.items():
        flags[name if "." in name else f"upstream.{name}"] = value
    upstream = make_upstream(load_config(None, {}, flags))
    try:
        yield upstream, provider
    finally:
        await upstream.close()
        await runner.cleanup()


def request(wish: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": wish}]
    return json.dumps({"model": "openai/test-model", "messages": messages, **fields}).encode()


CLIENT_KEY = [(b"authorization", b"Bearer sk-client")]


def events(raw: bytes) -> list[Any]:
    lines = raw.decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


async def test_an_answer_is_openais_json() -> None:
    async with providing() as (upstream, provider):
        reply = await upstream.chat(request("hi", temperature=0.5, odd_field=[1]), CLIENT_KEY)
        assert (reply.status, reply.headers) == (200, [(b"content-type", b"application/json")])
        answer = json.loads(await reply.read(LIMIT))
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert answer["usage"]["total_tokens"] == 5
    assert provider.keys == ["Bearer sk-client"]
    assert provider.requests[0]["model"] == "test-model"
    assert provider.requests[0]["temperature"] == 0.5
    assert provider.requests[0]["odd_field"] == [1]


async def test_a_provider_of_another_protocol_is_turned_into_openais() -> None:
    async with providing(api_key="sk-ours") as (upstream, provider):
        body = request("hi").replace(b"openai/test-model", b"anthropic/claude-test")
        reply = await upstream.chat(body, CLIENT_KEY)
        answer = json.loads(await reply.read(LIMIT))
    assert "max_tokens" in provider.requests[0], "this went out in Anthropic's protocol"
    assert answer["choices"][0]["message"]["content"] == "bonjour"
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("drop", [False, True])
async def test_a_field_that_the_provider_does_not_have_is_refused_or_by_configuration_left_out(
    drop: bool,
) -> None:
    async with providing(drop_params=drop) as (upstream, provider):
        body = request("hi", seed=7).replace(b"openai/test-model", b"anthropic/claude-test")
        reply = await upstream.chat(body, CLIENT_KEY)
        answer = json.loads(await reply.read(LIMIT))
    if drop:
        assert reply.status == 200 and "seed" not in provider.requests[0]
    else:
        assert (reply.status, answer["error"]["param"]) == (400, "seed")
        assert "upstream.drop_params" in answer["error"]["message"] and not provider.requests


async def test_cancelling_before_the_answer_reaches_the_provider() -> None:
    async with providing() as (upstream, provider):
        task = asyncio.create_task(upstream.chat(request("silent"), CLIENT_KEY))
        assert await happens(provider.asked, 10)
        task.cancel()
        assert await happens(provider.client_gone, 5)
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("leaving", ["close", "cancel"])
async def test_a_streams_head_comes_before_its_first_chunk_and_leaving_then_reaches_the_provider(
    leaving: str,
) -> None:
    async with providing() as (upstream, provider):
        reply = await upstream.chat(request("headers only", stream=True), CLIENT_KEY)
        assert reply.status == 200
        task = asyncio.create_task(reply.read(LIMIT))
        assert await happens(provider.asked, 10)
        if leaving == "close":
            await reply.close()
        else:
            task.cancel()
        assert await happens(provider.client_gone, 5)
        with pytest.raises((asyncio.CancelledError, UpstreamBroken)):
            await task


async def test_a_silent_stream_is_kept_alive_with_comments() -> None:
    async with providing(**{"stream.keepalive_s": 0.05}) as (upstream, provider):
        reply = await upstream.chat(request("wait", stream=True), CLIENT_KEY)
        said = b""
        async for piece in reply.chunks():
            said += piece
            if said.count(b": keep-alive") == 2:
                provider.go_on.set()
    assert said.index(b"hel") < said.index(b": keep-alive") < said.index(b'"lo"')


async def test_the_configured_key_wins() -> None:
    async with providing(api_key="sk-ours") as (upstream, provider):
        await upstream.chat(request("hi"), CLIENT_KEY)
    assert provider.keys == ["Bearer sk-ours"]


async def test_tool_calls_keep_a_null_content() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    async with providing() as (upstream, provider):
        reply = await upstream.chat(request("tools", tools=tools), CLIENT_KEY)
        message = json.loads(await reply.read(LIMIT))["choices"][0]["message"]
        streamed = await upstream.chat(request("tools", tools=tools, stream=True), CLIENT_KEY)
        chunks = events(await streamed.read(LIMIT))
    assert provider.requests[0]["tools"] == tools
    assert message["content"] is None
    assert message["tool_calls"] == [TOOL_CALL]
    [call] = chunks[0]["choices"][0]["delta"]["tool_calls"]
    assert call["function"] == TOOL_CALL["function"] and call["index"] == 0
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-1] == "data: [DONE]"


async def test_a_stream_is_openais_events() -> None:
    async with providing() as (upstream, _):
        reply = await upstream.chat(request("hi", stream=True), CLIENT_KEY)
        assert reply.headers[0] == (b"content-type", b"text/event-stream; charset=utf-8")
        chunks = events(await reply.read(LIMIT))
    assert chunks[-1] == "data: [DONE]"
    deltas = [choice["delta"] for chunk in chunks[:-1] for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "hello"
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["finish_reason"] is None
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_events_arrive_before_the_next_is_sent() -> None:
    async with providing() as (upstream, provider):
        chunks = (await upstream.chat(request("wait", stream=True), CLIENT_KEY)).chunks()
        assert b"hel" in await anext(chunks)
        provider.go_on.set()
        assert b"[DONE]" in [chunk async for chunk in chunks][-1]


@pytest.mark.parametrize("reading", [False, True])
async def test_close_cancels_the_providers_call(reading: bool) -> None:
    async with providing() as (upstream, provider):
        reply = await upstream.chat(request("wait", stream=True), CLIENT_KEY)
        chunks = reply.chunks()
        await anext(chunks)
        if reading:
            waiting = asyncio.ensure_future(anext(chunks))
            await asyncio.sleep(0)
            await reply.close()
            with pytest.raises(UpstreamBroken):
                await waiting
        else:
            await reply.close()
        assert await happens(provider.client_gone, 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_rate_limit_keeps_status_and_retry_after(stream: bool) -> None:
    async with providing() as (upstream, provider):
        reply = await upstream.chat(request("limit", stream=stream), CLIENT_KEY)
        error = json.loads(await reply.read(LIMIT))["error"]
    assert reply.status == 429
    assert (b"retry-after", b"7") in reply.headers
    assert "slow down" in error["message"]
    assert len(provider.requests) == 1, "nothing is retried here"


async def test_a_break_in_the_stream_is_its_last_event() -> None:
    async with providing() as (upstream, _):
        reply = await upstream.chat(request("break", stream=True), CLIENT_KEY)
        chunks = events(await reply.read(LIMIT))
    assert set(chunks[-1]) == {"error"}
    assert chunks[-1]["error"]["message"]


async def test_silence_is_504() -> None:
    async with providing(timeout_s=0.3, connect_timeout_s=0.3) as (upstream, _):
        with pytest.raises(ApiError) as caught:
            await upstream.chat(request("silent"), CLIENT_KEY)
    assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")


async def test_an_unreachable_provider_is_502() -> None:
    async with providing(base_url="http://127.0.0.1:9/v1") as (upstream, _):
        with pytest.raises(ApiError) as caught:
            await upstream.chat(request("hi"), CLIENT_KEY)
    assert (caught.value.status, caught.value.code) == (502, "upstream_unreachable")


@pytest.mark.parametrize(
    "field", ["api_base", "base_url", "api_key", "mock_response", "vertex_credentials", "aws_role"]
)
async def test_a_client_cannot_set_the_librarys_settings(field: str) -> None:
    async with providing(api_key="sk-ours") as (upstream, provider):
        with pytest.raises(ApiError) as caught:
            await upstream.chat(request("hi", **{field: "http://evil.example"}), CLIENT_KEY)
    assert (caught.value.status, caught.value.param) == (400, field)
    assert provider.requests == []


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": "m"}'])
async def test_an_unusable_body_is_400(body: bytes) -> None:
    async with providing() as (upstream, _):
        with pytest.raises(ApiError) as caught:
            await upstream.chat(body, CLIENT_KEY)
    assert caught.value.status == 400


async def test_forward_lists_models_and_refuses_the_rest() -> None:
    async with providing() as (upstream, _):
        reply = await upstream.forward("GET", "/models", b"", [], None)
        assert json.loads(await reply.read(LIMIT)) == {"object": "list", "data": []}
        with pytest.raises(ApiError) as caught:
            await upstream.forward("POST", "/embeddings", b"", [], None)
    assert caught.value.status == 404 and "litellm" in caught.value.message
