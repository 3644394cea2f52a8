"""The litellm upstream: what is said and answered over mocked HTTP, what has to do with time over a
socket (litellm is imported once)."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import respx
from aiohttp import web

from proxy.config import load_config
from proxy.errors import ApiError
from proxy.upstream import Upstream, UpstreamBroken, make_upstream
from tests.waiting import happens

LIMIT = 1 << 20
BASE_URL = "http://provider.test/v1"
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CLIENT_KEY = [(b"authorization", b"Bearer sk-client")]


def upstream_at(base_url: str, **options: object) -> Upstream:
    flags: dict[str, object] = {"upstream.provider": "litellm", "upstream.base_url": base_url}
    for name, value in options.items():
        flags[name if "." in name else f"upstream.{name}"] = value
    return make_upstream(load_config(None, {}, flags))


def request(wish: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": wish}]
    return json.dumps({"model": "openai/test-model", "messages": messages, **fields}).encode()


def events(raw: bytes) -> list[Any]:
    lines = raw.decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def completion(message: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    head = {"id": "c1", "object": "chat.completion", "created": 1, "model": "test-model"}
    return {**head, "choices": [choice], "usage": usage}


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "test-model"}
    return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"


def streamed(*chunks: str) -> httpx.Response:
    text = "".join(chunks) + "data: [DONE]\n\n"
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


# ---------------------------------------------------------------- what is said


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[respx.MockRouter]:
    monkeypatch.setenv("DISABLE_AIOHTTP_TRANSPORT", "True")  # litellm's own under httpx
    litellm: Any = importlib.import_module("litellm")
    litellm.in_memory_llm_clients_cache.flush_cache()  # which other tests' clients have
    with respx.mock(base_url=BASE_URL, assert_all_called=False) as mock:
        mock.post("/chat/completions", name="chat").respond(json=completion({"content": "hello"}))
        yield mock


def asked(provider: respx.MockRouter) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(provider.calls.last.request.content)
    return body


async def test_an_answer_is_openais_json(provider: respx.MockRouter) -> None:
    reply = await upstream_at(BASE_URL).chat(request("hi", temperature=0.5, odd_field=[1]), CLIENT_KEY)
    assert (reply.status, reply.headers[0]) == (200, (b"content-type", b"application/json"))
    answer = json.loads(await reply.read(LIMIT))
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert answer["usage"]["total_tokens"] == 5
    assert provider.calls.last.request.headers["authorization"] == "Bearer sk-client"
    body = asked(provider)
    assert (body["model"], body["temperature"], body["odd_field"]) == ("test-model", 0.5, [1])


async def test_a_provider_of_another_protocol_is_turned_into_openais(provider: respx.MockRouter) -> None:
    told = {"id": "m1", "type": "message", "role": "assistant", "model": "claude-test",
            "content": [{"type": "text", "text": "bonjour"}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 3, "output_tokens": 2}}  # fmt: skip
    provider.post(path__regex="/messages$").respond(json=told)
    body = request("hi").replace(b"openai/test-model", b"anthropic/claude-test")
    reply = await upstream_at(BASE_URL, api_key="sk-ours").chat(body, CLIENT_KEY)
    choice = json.loads(await reply.read(LIMIT))["choices"][0]
    assert "max_tokens" in asked(provider), "this went out in Anthropic's protocol"
    assert (choice["message"]["content"], choice["finish_reason"]) == ("bonjour", "stop")


@pytest.mark.parametrize("model", [b"anthropic/claude-test", b"gemini/gemini-3-pro-preview"])
async def test_a_providers_own_status_stays(provider: respx.MockRouter, model: bytes) -> None:
    """litellm makes 500 of 529."""
    error = {"type": "overloaded_error", "status": "OVERLOADED_ERROR", "message": "Overloaded"}
    provider.post(path__regex=".*").respond(529, json={"type": "error", "error": error})
    body = request("hi").replace(b"openai/test-model", model)
    reply = await upstream_at(BASE_URL).chat(body, CLIENT_KEY)
    told = json.loads(await reply.read(LIMIT))["error"]
    assert (reply.status, told["message"], told["code"]) == (529, "Overloaded", "overloaded_error")


@pytest.mark.parametrize("drop", [False, True])
async def test_a_field_that_the_provider_does_not_have_is_refused_or_by_configuration_left_out(
    provider: respx.MockRouter, drop: bool
) -> None:
    provider.post(path__regex="/messages$").respond(529)
    body = request("hi", seed=7).replace(b"openai/test-model", b"anthropic/claude-test")
    reply = await upstream_at(BASE_URL, drop_params=drop).chat(body, CLIENT_KEY)
    if drop:
        assert reply.status == 529 and "seed" not in asked(provider)
    else:
        error = json.loads(await reply.read(LIMIT))["error"]
        assert (reply.status, error["param"]) == (400, "seed")
        assert "upstream.drop_params" in error["message"] and not provider.calls


async def test_the_configured_key_wins(provider: respx.MockRouter) -> None:
    await upstream_at(BASE_URL, api_key="sk-ours").chat(request("hi"), CLIENT_KEY)
    assert provider.calls.last.request.headers["authorization"] == "Bearer sk-ours"


async def test_tool_calls_keep_a_null_content(provider: respx.MockRouter) -> None:
    provider["chat"].respond(json=completion({"content": None, "tool_calls": [TOOL_CALL]}))
    reply = await upstream_at(BASE_URL).chat(request("tools", tools=[TOOL]), CLIENT_KEY)
    message = json.loads(await reply.read(LIMIT))["choices"][0]["message"]
    assert asked(provider)["tools"] == [TOOL]
    assert message["content"] is None and message["tool_calls"] == [TOOL_CALL]


async def test_streamed_tool_calls_are_openais(provider: respx.MockRouter) -> None:
    opened = chunk({"role": "assistant", "tool_calls": [{"index": 0, **TOOL_CALL}]})
    provider["chat"].mock(streamed(opened, chunk({}, "tool_calls")))
    reply = await upstream_at(BASE_URL).chat(request("tools", tools=[TOOL], stream=True), CLIENT_KEY)
    chunks = events(await reply.read(LIMIT))
    [call] = chunks[0]["choices"][0]["delta"]["tool_calls"]
    assert call["function"] == TOOL_CALL["function"] and call["index"] == 0
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls" and chunks[-1] == "data: [DONE]"


async def test_a_stream_is_openais_events(provider: respx.MockRouter) -> None:
    parts = chunk({"role": "assistant", "content": "hel"}), chunk({"content": "lo"}), chunk({}, "stop")
    provider["chat"].mock(streamed(*parts))
    reply = await upstream_at(BASE_URL).chat(request("hi", stream=True), CLIENT_KEY)
    assert reply.headers[0] == (b"content-type", b"text/event-stream; charset=utf-8")
    chunks = events(await reply.read(LIMIT))
    assert chunks[-1] == "data: [DONE]"
    deltas = [choice["delta"] for chunk in chunks[:-1] for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "hello"
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["finish_reason"] is None
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_rate_limit_keeps_status_and_retry_after(provider: respx.MockRouter, stream: bool) -> None:
    error = {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}
    provider["chat"].respond(429, json={"error": error}, headers={"retry-after": "7"})
    reply = await upstream_at(BASE_URL).chat(request("hi", stream=stream), CLIENT_KEY)
    assert reply.status == 429 and (b"retry-after", b"7") in reply.headers
    assert "slow down" in json.loads(await reply.read(LIMIT))["error"]["message"]
    assert len(provider.calls) == 1, "nothing is retried here"


@pytest.mark.parametrize("failure", [httpx.ConnectError, httpx.ReadError])
async def test_an_unreachable_provider_is_502(provider: respx.MockRouter, failure: type[Exception]) -> None:
    provider["chat"].mock(side_effect=failure)
    with pytest.raises(ApiError) as caught:
        await upstream_at(BASE_URL).chat(request("hi"), CLIENT_KEY)
    assert (caught.value.status, caught.value.code) == (502, "upstream_unreachable")


@pytest.mark.parametrize(
    "field", ["api_base", "base_url", "api_key", "mock_response", "vertex_credentials", "aws_role"]
)
async def test_a_client_cannot_set_the_librarys_settings(provider: respx.MockRouter, field: str) -> None:
    with pytest.raises(ApiError) as caught:
        await upstream_at(BASE_URL).chat(request("hi", **{field: "http://evil.example"}), CLIENT_KEY)
    assert (caught.value.status, caught.value.param) == (400, field) and not provider.calls


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": "m"}'])
async def test_an_unusable_body_is_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        await upstream_at(BASE_URL).chat(body, CLIENT_KEY)
    assert caught.value.status == 400


async def test_forward_lists_models_and_refuses_the_rest() -> None:
    upstream = upstream_at(BASE_URL)
    reply = await upstream.forward("GET", "/models", b"", [], None)
    assert json.loads(await reply.read(LIMIT)) == {"object": "list", "data": []}
    with pytest.raises(ApiError) as caught:
        await upstream.forward("POST", "/embeddings", b"", [], None)
    assert caught.value.status == 404 and "litellm" in caught.value.message


# ---------------------------------------------------------------- over a socket


class Provider:
    """An OpenAI-compatible server; the last user message says how it behaves."""

    def __init__(self) -> None:
        self.client_gone = asyncio.Event()
        self.go_on = asyncio.Event()
        self.asked = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self.answer(request, (await request.json())["messages"][-1]["content"])
        except asyncio.CancelledError:
            self.client_gone.set()
            raise

    async def answer(self, request: web.BaseRequest, wish: str) -> web.StreamResponse:
        if wish == "silent":
            self.asked.set()
            await asyncio.sleep(5)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if wish == "headers only":
            self.asked.set()
            await asyncio.sleep(5)
        await response.write(chunk({"role": "assistant", "content": "hel"}).encode())
        if wish == "wait":
            await asyncio.wait_for(self.go_on.wait(), 5)
        if wish == "break":
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write((chunk({"content": "lo"}) + chunk({}, "stop") + "data: [DONE]\n\n").encode())
        return response


@asynccontextmanager
async def providing(**options: object) -> AsyncIterator[tuple[Upstream, Provider]]:
    provider = Provider()
    runner = web.ServerRunner(web.Server(provider.handle, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream = upstream_at(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", **options)
    try:
        yield upstream, provider
    finally:
        await upstream.close()
        await runner.cleanup()


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
