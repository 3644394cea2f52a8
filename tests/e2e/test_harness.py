"""The harness checked against a direct connection: what it records, flags, counts and breaks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
import tiktoken
from openai import AsyncOpenAI

from tests.e2e.harness import (
    Break,
    Drop,
    Hang,
    Recorded,
    RecordingUpstream,
    Response,
    Stream,
    answer,
    call,
    check_openai_rules,
    count_request_tokens,
    error,
    load_beam,
    load_locomo,
    load_trajectories,
    message_of,
    messages_span,
    sse_chunks,
    tools_of,
)

USER = {"role": "user", "content": "hello"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
STRICT = {**TOOL, "function": {**FUNCTION, "strict": True}}  # the client's stream helper wants it
CALLS = message_of(None, [call("a", "f", {}), call("b", "f", {"x": 1})])


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "ok"}


def request(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": list(messages), **fields}


@pytest.mark.parametrize(
    "good",
    [
        request(USER),
        request({"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "x"}),
        request(USER, CALLS, result("b"), result("a"), USER),
        request(USER, CALLS, result("a"), result("b"), CALLS, result("a"), result("b")),
        request(USER, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}),
        request({"role": "user", "content": [{"type": "text", "text": "t"}]}),
        request({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}),
    ],
)
def test_good_requests_pass(good: dict[str, Any]) -> None:
    assert check_openai_rules(good) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (request(), "empty"),
        ({"model": "m"}, "missing"),
        ({"messages": [USER]}, "model"),
        (request({"role": "robot", "content": "x"}), "unknown"),
        (request({"role": "user", "content": None}), "null"),
        (request({"role": "assistant", "content": None}), "null"),
        (request({"role": "assistant", "content": None, "tool_calls": []}), "null"),
        (request({"role": "assistant", "content": "x", "tool_calls": []}), "empty"),
        (request({"role": "user", "content": []}), "empty"),
        (request({"role": "user", "content": 7}), "neither"),
        (request({"role": "user", "content": [{"type": "refusal", "refusal": "n"}]}), "allowed"),
        (request({"role": "tool", "content": "x", "tool_call_id": "a"}), "answers"),
        (request(USER, result("a"), CALLS, result("a"), result("b")), "answers"),
        (request(USER, CALLS, result("a"), USER, result("b")), "before the results"),
        (request(USER, CALLS, result("a"), result("a"), result("b")), "answers"),
        (request(USER, CALLS, result("a")), "at the end"),
        (
            request(USER, message_of(None, [call("a", "f", {}), call("a", "f", {})]), result("a")),
            "twice",
        ),
        (request(USER, message_of(None, [call("a", "f g", {})]), result("a")), "not allowed"),
        (request(USER, tools=[]), "empty"),
        (request(USER, tools=[TOOL, TOOL]), "twice"),
        (request(USER, tools=[TOOL] * 129), "more than 128"),
        (request(USER, tool_choice="auto"), "only allowed when tools"),
        (request(USER, tools=[TOOL], tool_choice="maybe"), "unknown"),
        (
            request(USER, tools=[TOOL], tool_choice={**TOOL, "function": {"name": "g"}}),
            "not in tools",
        ),
        ({**request(USER, tools=[TOOL]), "messages": "x"}, "not an array"),
    ],
)
def test_bad_requests_are_flagged(bad: dict[str, Any], says: str) -> None:
    violations = check_openai_rules(bad)
    assert any(says in v for v in violations), violations


def test_counts_agree_with_tiktoken() -> None:
    text = "A café, 漢字 and <|endoftext|> as plain text."
    n = len(tiktoken.get_encoding("o200k_base").encode(text, disallowed_special=()))
    assert count_request_tokens(request({"role": "user", "content": text})) == 3 + 1 + n + 3
    named = request({"role": "user", "content": text, "name": "Ann"})
    assert count_request_tokens(named) == 3 + 1 + n + (1 + 1) + 3
    parts = request({"role": "user", "content": [{"type": "text", "text": text}]})
    assert count_request_tokens(parts) == 3 + 1 + n + 3


def test_counts_tools_by_the_cookbook() -> None:
    """The cookbook's own example: gpt-4o bills 101 tokens for it."""
    weather = {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {
                    "type": "string",
                    "description": "The city and state, e.g. San Francisco, CA",
                },
                "unit": {
                    "type": "string",
                    "description": "The unit of temperature to return",
                    "enum": ["celsius", "fahrenheit"],
                },
            },
            "required": ["location"],
        },
    }
    messages = (
        {
            "role": "system",
            "content": "You are a helpful assistant that can answer to questions about the"
            " weather.",
        },
        {"role": "user", "content": "What's the weather like in San Francisco?"},
    )
    tools = [{"type": "function", "function": weather}]
    assert count_request_tokens(request(*messages, tools=tools)) == 101


def test_messages_span_is_exact() -> None:
    body = '{"a": [1, "]}"], "messages" : [ {"role":"user","content":"x ] é"} ] ,"z":null}'.encode()
    assert messages_span(body) == '[ {"role":"user","content":"x ] é"} ]'
    with pytest.raises(ValueError, match="no messages"):
        messages_span(b'{"a": 1}')


async def test_recording_is_byte_exact() -> None:
    async with RecordingUpstream(lambda r, i: answer(r, message_of("hi"))) as upstream:
        body = b'{ "model":"gpt-4o",\n "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}]}'
        head = (
            b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: h\r\nX-ODD:  v \r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
        for piece in (head[:20], head[20:] + body[:5], body[5:], head + body):  # split, then again
            writer.write(piece)
            await writer.drain()
        await upstream.wait_for_calls(2)
        assert [c.raw for c in upstream.calls] == [head + body] * 2
        assert upstream.calls[0].target == "/v1/chat/completions?x=1"
        assert upstream.calls[0].header("x-odd") == "v"
        assert upstream.calls[0].headers[1][0] == b"X-ODD"
        writer.close()
        assert (await reader.read()).count(b"HTTP/1.1 200 OK") == 2


async def test_chunked_bodies_and_other_paths() -> None:
    async def pieces() -> Any:
        yield b"abc"
        yield b"defg"

    def echo(recorded: Recorded) -> Response:
        return Response(recorded.body, 201, [(b"x-a", b"1")])

    async with RecordingUpstream(other=echo) as upstream, httpx.AsyncClient() as client:
        reply = await client.put(upstream.base_url + "/files?q=%20", content=pieces())
        assert (reply.status_code, reply.content, reply.headers["x-a"]) == (201, b"abcdefg", "1")
        assert upstream.others[0].target == "/v1/files?q=%20"
        assert upstream.calls == []


@pytest.mark.parametrize("stream", [False, True])
async def test_the_openai_client_reads_every_kind_of_answer(stream: bool) -> None:
    mixed = message_of("look: ", [call("a", "f", {"x": "y" * 30}), call("b", "f", {})])
    async with RecordingUpstream(lambda r, i: answer(r, mixed, 4)) as upstream:
        client = AsyncOpenAI(api_key="k", base_url=upstream.base_url, max_retries=0)
        kwargs: Any = {"model": "gpt-4o", "messages": [USER], "tools": [STRICT]}
        if stream:
            async with client.chat.completions.stream(**kwargs) as events:
                got = (await events.get_final_completion()).choices[0]
        else:
            got = (await client.chat.completions.create(**kwargs)).choices[0]
        assert got.message.content == "look: "
        calls = got.message.tool_calls or []
        assert [c.id for c in calls] == ["a", "b"]
        assert [c.function.arguments for c in calls] == [json.dumps({"x": "y" * 30}), "{}"]  # type: ignore[union-attr]
        assert got.finish_reason == "tool_calls"
        assert upstream.violations == []
        await client.close()


async def test_violations_are_answered_with_400_and_recorded() -> None:
    async with RecordingUpstream() as upstream:
        client = AsyncOpenAI(api_key="k", base_url=upstream.base_url, max_retries=0)
        with pytest.raises(openai.BadRequestError, match="tool_choice is only allowed"):
            await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "x"}], tool_choice="auto"
            )
        assert upstream.violations == ["call 0: tool_choice is only allowed when tools are given"]
        await client.close()


async def test_errors_breaks_and_drops() -> None:
    script = [
        error(429, "slow down", type="rate_limit", headers=[(b"retry-after", b"7")]),
        Drop(),
        Stream([b"data: {}\n\n", Break()]),
    ]
    async with RecordingUpstream(lambda r, i: script[i]) as upstream, httpx.AsyncClient() as client:
        url = upstream.base_url + "/chat/completions"
        reply = await client.post(url, json=request(USER))
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")
        assert reply.json()["error"]["type"] == "rate_limit"
        with pytest.raises(httpx.TransportError):
            await client.post(url, json=request(USER))
        seen = b""
        with pytest.raises(httpx.TransportError):
            async with client.stream("POST", url, json=request(USER, stream=True)) as streamed:
                async for chunk in streamed.aiter_raw():
                    seen += chunk
        assert seen == b"data: {}\n\n"


async def test_pauses_and_early_disconnects_are_events() -> None:
    gate, reached = asyncio.Event(), asyncio.Event()

    def respond(r: dict[str, Any], index: int) -> Stream | Hang:
        return Stream([b"data: 1\n\n", reached.set, gate, b"data: 2\n\n"]) if index == 0 else Hang()

    async with RecordingUpstream(respond) as upstream, httpx.AsyncClient() as client:
        url = upstream.base_url + "/chat/completions"
        async with client.stream("POST", url, json=request(USER, stream=True)) as streamed:
            chunks = streamed.aiter_raw()
            assert await anext(chunks) == b"data: 1\n\n"
            await asyncio.wait_for(reached.wait(), 5)
            gate.set()
            assert b"".join([c async for c in chunks]) == b"data: 2\n\n"
        assert upstream.calls[0].finished.is_set()
        assert not upstream.calls[0].disconnected.is_set()

        waiting = asyncio.create_task(client.post(url, json=request(USER)))
        recorded = await upstream.wait_for_calls(2)
        waiting.cancel()
        await asyncio.wait_for(recorded.disconnected.wait(), 5)


async def test_a_stopped_upstream_comes_back_on_its_port() -> None:
    upstream = await RecordingUpstream(lambda r, i: answer(r, message_of("x"))).start()
    url = upstream.base_url + "/chat/completions"
    await upstream.stop()
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.post(url, json=request(USER))
        await upstream.start()
        assert (await client.post(url, json=request(USER))).status_code == 200
    await upstream.stop()


async def test_the_default_answer_is_the_demo_readers() -> None:
    async with RecordingUpstream() as upstream, httpx.AsyncClient() as client:
        ask = request(
            {"role": "user", "content": "My dog Rex is nine years old."},
            {"role": "assistant", "content": "Noted."},
            {"role": "user", "content": "How old is my dog Rex?"},
        )
        reply = await client.post(upstream.base_url + "/chat/completions", json=ask)
        assert "nine" in reply.json()["choices"][0]["message"]["content"]


def test_the_same_request_gets_the_same_bytes() -> None:
    ask = request(USER, stream=True, stream_options={"include_usage": True})
    events = sse_chunks(ask, message_of("some text"))
    assert events == sse_chunks(ask, message_of("some text"))
    assert events[-1] == b"data: [DONE]\n\n"
    assert json.loads(events[-2][6:])["usage"]["completion_tokens"] == 2


def test_the_data_sets_load_and_keep_the_rules() -> None:
    assert [len(c.messages) for c in load_locomo()] == [419, 369, 629, 689, 509]
    assert (len(load_beam()), len(load_trajectories())) == (10, 158)
    for conversation in (*load_locomo(), *load_beam(), *load_trajectories()):
        tools = tools_of(conversation)
        body = request(*conversation.messages, **({"tools": tools} if tools else {}))
        assert check_openai_rules(body) == [], conversation.id
        for question in conversation.questions:
            assert all(0 <= i < len(conversation.messages) for i in question.evidence)
