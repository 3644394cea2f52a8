"""Figure 3: a conversation that fits goes through as it is (invariant 2), and streams live.

The same bytes are sent over a raw socket to the upstream directly and through `llm-pager serve`:
what the upstream records and what the client reads back must be identical. Liveness is shown with
events: the upstream sends chunk k+1 only after the client has read chunk k.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.e2e.harness import (
    Answer,
    Recorded,
    RecordingUpstream,
    Response,
    ServerProcess,
    Stream,
    answer,
    call,
    error,
    message_of,
    sse_chunks,
)
from tests.e2e.script import LOOKUP, MODEL, SYSTEM, TAG, Chat, Script, fault, paged_config, talk

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
ITS_OWN = {*HOP_BY_HOP, "date", "host", "accept-encoding", "x-llm-pager-channel"}  # of each connection or moment, and ours

# ---------------------------------------------------------------- requests, as bytes

ASK = '{"role":"user","content":"hello there"}'
LONGER = (
    '{"role":"user","content":"one"},{"role":"assistant","content":"two","x_note":[1,2]} ,'
    '\n{"role":"user","content":"three"}'
)
IMAGE = (
    '{"role":"user","content":[{"type":"text","text":"what?"},{"type":"image_url","image_url":'
    '{"url":"data:image/png;base64,iVBORw0KGgo=","detail":"low"}}]}'
)
CALLED = (
    '{"role":"user","content":"use it"},{"content":null,"tool_calls":[{"id":"c1","type":"function",'
    '"function":{"name":"lookup","arguments":"{ \\"word\\" :1}"}}],"role":"assistant"},'
    '{"role":"tool","tool_call_id":"c1","content":""}'
)
TOOLS = json.dumps([LOOKUP], indent=1)
BODIES = {
    "odd key order": '{"stream":%s,"temperature":1e0,"messages":[' + ASK + '],"top_p":1.00,"model":"gpt-4o"}',
    "unknown fields": '{"model":"gpt-4o","x_new":{"b":1,"a":[null,-0.0]},"messages":[' + LONGER
    + '],"stream":%s,"":0}',
    "unicode escapes": '{"model":"gpt-4o","messages":[{"role":"user","content":"\\u00e9 é \\ud83d\\ude00 '
    '\\/ \\u0000 \U0001f600"}],"stream":%s}',
    "extra whitespace": ' \n{ "model" :\t"gpt-4o" , "messages" : [ \r\n ' + LONGER + ' ] , "stream" : %s }\n ',
    "tools": '{"model":"gpt-4o","messages":[{"role":"system","content":"s"},' + CALLED + '],"tools":'
    + TOOLS + ',"tool_choice":"auto","parallel_tool_calls":false,"stream":%s}',
    "images": '{"model":"gpt-4o","messages":[' + IMAGE + '],"stream":%s}',
    "n": '{"model":"gpt-4o","n":2,"messages":[' + ASK + '],"stream":%s}',
    "logprobs": '{"model":"gpt-4o","logprobs":true,"top_logprobs":2,"messages":[' + ASK + '],"stream":%s}',
    "usage": '{"model":"gpt-4o","messages":[' + ASK + '],"stream":%s,"stream_options":{"include_usage":true}}',
    "late system": '{"model":"gpt-4o","messages":[' + LONGER + ',{"role":"system","content":"be brief"},'
    + ASK + '],"stream":%s,"model":"gpt-4o"}',
    "refused": '{"model":"gpt-4o","messages":[' + ASK + '],"stream":%s,"seed":429}',
    "failed": '{"model":"gpt-4o","messages":[' + ASK + '],"stream":%s,"seed":500}',
    "not a chat answer": '{"model":"gpt-4o","messages":[' + ASK + '],"stream":%s,"seed":200}',
}
HEADERS = (
    (b"x-request-id", b"req_\xe9 1"),
    (b"openai-processing-ms", b"12"),
    (b"x-ratelimit-remaining-tokens", b"149"),
    (b"set-cookie", b"a=1; Path=/"),
    (b"set-cookie", b"b=2"),
)


def respond(request: dict[str, Any], index: int) -> Answer:
    """What depends on the request only, with headers that a client may look at."""
    seed = request.get("seed")
    kind = ((b"content-type", b"application/json"),)
    if seed == 429:
        late = ((b"retry-after", b"7"), *HEADERS)
        return error(429, "Rate limit reached", type="requests", code="rate_limit", headers=late)
    if seed == 500:
        return Response(b"<html>oops</html>", 500, ((b"content-type", b"text/html"), *HEADERS))
    if seed == 200:
        return Response(b'{"odd" : [1, 2]}\n', 200, (*kind, *HEADERS))
    message = message_of("An answer\u2028 with \u00e9.", [call("c9", "lookup", "{}")] if "tools" in request else ())
    if not request.get("stream"):
        made = answer(request, message)
        assert isinstance(made, Response)
        body = many(made.body) if request.get("n") == 2 else made.body
        return Response(body + b" \n", 200, (*kind, *HEADERS))
    chunks = sse_chunks(request, message, piece_chars=3)
    if request.get("n") == 2:
        chunks[1:1] = [c.replace(b'"index":0', b'"index":1') for c in chunks[:-1]]
    odd = [b": keep-alive\r\n\r\n", *chunks[:2], chunks[2][:9], chunks[2][9:] + b"event: x\n", *chunks[3:]]
    return Stream([*odd, b": after\n\n"], 200, ((b"content-type", b"text/event-stream"), *HEADERS))


def many(body: bytes) -> bytes:
    whole = json.loads(body)
    whole["choices"].append({**whole["choices"][0], "index": 1})
    return json.dumps(whole, indent=2).encode()


# ---------------------------------------------------------------- a client without a library


@dataclass
class Read:
    """A response as it came over the socket."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


async def exchange(port: int, body: bytes) -> Read:
    """Posts a body over a fresh connection and reads the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json"
        f"\r\nAuthorization: Bearer sk-raw\r\nX-Custom: a  b\r\nUser-Agent: raw/1\r\nAccept: */*"
        f"\r\nOpenAI-Organization: org\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    try:
        return await asyncio.wait_for(read_response(reader), 20)
    finally:
        writer.close()


async def read_response(reader: asyncio.StreamReader) -> Read:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    headers = [(n.lower(), v.strip()) for n, _, v in (line.partition(":") for line in lines[1:])]
    known = dict(headers)
    if known.get("transfer-encoding") == "chunked":
        out = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            out += (await reader.readexactly(size + 2))[:-2]
    else:
        out = await reader.readexactly(int(known["content-length"]))
    return Read(int(lines[0].split(" ")[1]), headers, out)


def end_to_end(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted((n, v) for n, v in headers if n not in ITS_OWN)


def as_text(recorded: Recorded) -> list[tuple[str, str]]:
    return [(n.decode("latin-1").lower(), v.decode("latin-1")) for n, v in recorded.headers]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fitting() -> AsyncIterator[tuple[RecordingUpstream, int]]:
    """An upstream and the port of a server before it, with the default window."""
    upstream = RecordingUpstream(respond)
    async with upstream:
        with ServerProcess({"upstream": {"base_url": upstream.base_url}}) as server:
            yield upstream, server.port


async def assert_untouched(upstream: RecordingUpstream, port: int, body: bytes) -> Read:
    first = len(upstream.calls)
    direct = await exchange(upstream.port, body)
    through = await exchange(port, body)
    here, there = upstream.calls[first:]
    assert there.body == here.body == body
    assert (there.method, there.target) == (here.method, here.target)
    assert end_to_end(as_text(there)) == end_to_end(as_text(here))
    assert through.status == direct.status
    assert through.body == direct.body
    assert end_to_end(through.headers) == end_to_end(direct.headers)
    assert not upstream.failures, upstream.failures[0]
    return through


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", BODIES)
async def test_invariant_2_what_fits_is_not_touched(
    fitting: tuple[RecordingUpstream, int], name: str, stream: bool
) -> None:
    body = (BODIES[name] % json.dumps(stream)).encode()
    for _ in range(2):  # the second time RAM and storage know the history
        read = await assert_untouched(*fitting, body)
    assert read.status == {"refused": 429, "failed": 500}.get(name, 200)
    assert ("set-cookie", "b=2") in read.headers
    if stream and read.status == 200 and name != "not a chat answer":
        assert read.body.count(b"\n\n") > 4 and b"data: [DONE]\n\n: after\n\n" in read.body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_invariant_2_a_growing_conversation_is_not_touched(
    fitting: tuple[RecordingUpstream, int], stream: bool
) -> None:
    """Every turn begins with the bytes of the one before, written as its client writes them."""
    messages = '{"role": "system", "content":"as of %d"},\t{"role":"user","content":"start"}'
    for turn in range(6):
        told = (messages % turn).encode()
        body = b'{"messages": [' + told + b'],"model":"gpt-4o","stream":' + json.dumps(stream).encode() + b"}"
        await assert_untouched(*fitting, body)
        messages += f', {{"content":"An answer\\u2028 with \\u00e9.","role":"assistant"}},{{"role":"user","content": "{turn}"}}'


# ---------------------------------------------------------------- liveness


@dataclass
class Gated:
    """A stream that goes on when the client says so: a gate after each event but the last."""

    events: list[bytes]
    gates: list[asyncio.Event]

    @staticmethod
    def of(events: list[bytes], ungated_tail: int) -> Gated:
        return Gated(events, [asyncio.Event() for _ in events[:-ungated_tail]])

    def stream(self) -> Stream:
        steps: list[Any] = []
        for i, event in enumerate(self.events):
            steps.append(event)
            if i < len(self.gates):
                steps.append(self.gates[i])
        return Stream(steps)


async def follow(client: AsyncOpenAI, tag: str, gated: Gated, request: dict[str, Any]) -> list[Any]:
    """Reads the stream, opening gate k when chunk k has been read. Ends in time or fails."""
    chunks: list[Any] = []
    async with asyncio.timeout(15):
        stream = await client.chat.completions.create(
            stream=True, extra_headers={TAG: tag}, **request
        )
        async for chunk in stream:
            if len(chunks) < len(gated.gates):
                gated.gates[len(chunks)].set()
            chunks.append(chunk)
    return chunks


def written(events: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(e[6:]) for e in events if e.startswith(b"data: {")]


async def test_a_stream_that_fits_is_live(fitting: tuple[RecordingUpstream, int]) -> None:
    """Chunk k is with the client before upstream sends chunk k+1, the finish included."""
    upstream, port = fitting
    request = {"model": MODEL, "messages": [{"role": "user", "content": "live"}]}
    gated = Gated.of(sse_chunks({**request, "stream": True}, message_of("Piece by piece. " * 4)), 1)
    upstream.respond, before = (lambda *_: gated.stream()), upstream.respond
    try:
        base_url = f"http://127.0.0.1:{port}/v1"
        async with AsyncOpenAI(api_key="live", base_url=base_url, max_retries=0) as client:
            chunks = await follow(client, "live", gated, request)
    finally:
        upstream.respond = before
    assert [c.model_dump(exclude_unset=True) for c in chunks] == written(gated.events)
    assert len(gated.gates) == len(chunks) > 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def paged() -> AsyncIterator[tuple[Script, Chat]]:
    """A paged conversation. The hold is short in tokens and its time bound is out of reach."""
    script = Script()
    hold = {"hold_tokens": 8, "hold_ms": 60_000}
    async with script.upstream:
        with ServerProcess(paged_config(script.upstream, stream=hold)) as server:
            async with AsyncOpenAI(api_key="k", base_url=server.base_url, max_retries=0) as client:
                chat = Chat(client, [SYSTEM], tools=[LOOKUP])
                await talk(chat, script, "talk", 12, [])
                yield script, chat
    script.check()


OPENING = "These words are more than the few that are held back at first. "


@pytest.mark.parametrize("inner", [False, True], ids=["at once", "after a fault"])
@pytest.mark.parametrize("calls", [False, True], ids=["text", "client call"])
async def test_a_paged_stream_is_live_after_the_hold(
    paged: tuple[Script, Chat], inner: bool, calls: bool
) -> None:
    """The tools channel: from the first text that outgrows the hold each chunk comes at once; the
    deltas of a client's call as soon as its name is known. Only the finish waits for storage."""
    script, chat = paged
    made = [call("call_c", "lookup", {"word": "a long word indeed"})] if calls else []
    request = {"model": MODEL, "messages": [*chat.messages, {"role": "user", "content": "Live?"}],
               "tools": [LOOKUP]}
    events = sse_chunks({**request, "stream": True}, message_of("Then come small pieces. " * 2, made), 6)
    opening = written(events[:2])[1]
    opening["choices"][0]["delta"]["content"] = OPENING
    events.insert(1, b"data: " + json.dumps(opening).encode() + b"\n\n")
    gated = Gated.of(events, 2)
    gated.gates[0].set()  # the opening delta is held with the text
    tag = f"live/{inner}/{calls}"
    script.plan(tag, *([fault("msg_0002")] if inner else []), lambda _: gated.stream())
    chunks = await follow(chat.client, tag, gated, request)
    assert len(script.calls[tag]) == 1 + inner
    assert all(gate.is_set() for gate in gated.gates)
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == OPENING + "Then come small pieces. " * 2
    arguments = [d.function.arguments for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert "".join(arguments) == (made[0]["function"]["arguments"] if made else "")
    assert len(chunks) == len(gated.events) - 1


async def test_the_hold_ends_by_time(paged: tuple[Script, Chat]) -> None:
    """A few words and then silence: they are not kept for ever."""
    script = Script()
    async with script.upstream:
        config = paged_config(script.upstream, stream={"hold_tokens": 1000, "hold_ms": 20})
        with ServerProcess(config) as server:
            async with AsyncOpenAI(api_key="k", base_url=server.base_url, max_retries=0) as client:
                chat = Chat(client, [SYSTEM], tools=[LOOKUP])
                chat.messages = list(paged[1].messages)
                history = [*chat.messages, {"role": "user", "content": "Live?"}]
                request = {"model": MODEL, "messages": history, "tools": [LOOKUP]}
                gated = Gated.of(sse_chunks({**request, "stream": True}, message_of("A word or two.")), 2)
                gated.gates[0].set()  # the opening delta is held with the text
                script.plan("time", lambda _: gated.stream())
                chunks = await follow(client, "time", gated, request)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "A word or two."
