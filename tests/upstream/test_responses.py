"""The bridge's own wire: which requests it takes, and streams cut anywhere. Whole conversations over
it are in tests/e2e/test_responses_bridge.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import Config
from proxy.upstream import Header, Reply, UpstreamBroken, make_upstream
from proxy.upstream.openai import OpenAIUpstream
from proxy.upstream.responses import ResponsesBridge, StreamReply
from tests.e2e.answers import Hang, Response, Stream
from tests.e2e.providers import Call, Said
from tests.e2e.providers.responses import ResponsesServer, response_events, response_of
from tests.e2e.recording import Recorded

LIMIT = 1 << 20


class Arrived(Reply):
    """A reply whose body came in these pieces."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.status = 200
        self.headers: list[Header] = [(b"content-type", b"text/event-stream")]
        self.pieces, self.closed = pieces, False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for piece in self.pieces:
            yield piece

    async def close(self) -> None:
        self.closed = True


def wire(newline: str = "\n") -> bytes:
    body = {"model": "m", "input": [], "include": ["reasoning.encrypted_content"]}
    request = Recorded(0, "POST", "/v1/responses", [], b"", b"", b"", body)
    said = Said("Grüße.", [Call("a", "look", {"word": "ß"})], thinking="Hm.")
    output = list(ResponsesServer().output(request, said))
    events = response_events(response_of(request, output, None), output)
    lines = (f"event: {e['type']}\ndata: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events)
    return "".join([": hello\n\n", *lines]).replace("\n", newline).encode()


def through(pieces: Sequence[bytes]) -> bytes:
    return asyncio.run(StreamReply(Arrived(pieces), True, LIMIT).read(LIMIT))


WHOLE = through([wire()])


@given(st.lists(st.integers(0, len(wire()) - 1), max_size=30), st.sampled_from(["\n", "\r\n", "\r"]))
def test_a_stream_cut_at_any_byte(cuts: list[int], newline: str) -> None:
    sent, at = wire(newline), [0, *sorted(cuts), len(wire(newline))]
    assert through([sent[a:b] for a, b in pairwise(at) if b > a]) == WHOLE
    assert WHOLE.endswith(b"data: [DONE]\n\n") and "Grüße".encode()[:3] in WHOLE


def test_upstreams_comments_stay() -> None:
    assert WHOLE.startswith(b": hello\n\n") and WHOLE.count(b": hello") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (', "', ',\ndata: "'),
        ("data: ", "data:"),
        ("data: ", "id: 7\nretry: 100\ndata: "),
        ("\n\n", "\n\n\n\n"),
    ],
    ids=["several lines", "no space", "other fields", "more blank lines"],
)
def test_events_in_other_framings_that_end_without_a_blank_line(old: str, new: str) -> None:
    sent = wire().replace(old.encode(), new.encode())
    assert sent != wire()
    assert through([sent.rstrip(b"\n")]) == WHOLE


def test_a_stream_that_ends_early_has_no_end() -> None:
    sent = wire()
    assert b"[DONE]" not in through([sent[: sent.rindex(b"event:")]])


@pytest.mark.parametrize("event", [b'{"type": "response.created"}', b"{", b'{"type": "response.output_text.delta"}'])
def test_an_event_of_another_kind_is_a_broken_answer(event: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        through([b"data: " + event + b"\n\n"])


async def test_giving_up_closes_upstreams_reply() -> None:
    arrived = Arrived([wire()])
    reply = StreamReply(arrived, False, LIMIT)
    await reply.close()
    assert arrived.closed


def config(server: ResponsesServer, bridge: bool = True) -> Config:
    models = {"bridged*": {"bridge": "responses"}} if bridge else {}
    return Config.model_validate({"upstream": {"base_url": server.base_url}, "models": models})


async def test_other_models_and_odd_bodies_keep_their_bytes() -> None:
    async with ResponsesServer() as server:
        upstream = make_upstream(config(server))
        assert isinstance(upstream, ResponsesBridge)
        other = b'{ "model":"other",  "messages":[{"role":"user","content":"Hi."}] }'
        no_text = b'{"model":"bridged-1","messages":[{"role":"user","content":"\xff"}]}'
        for body in (other, b'{"model": "bridged-1", "messages": []', b"[]", no_text):
            reply = await upstream.chat(body, [(b"content-type", b"application/json")])
            await reply.read(LIMIT)
        await upstream.close()
    assert (server.calls[0].body, server.calls[-1].body) == (other, no_text)
    assert all(call.target == "/v1/chat/completions" for call in server.calls)


async def test_without_a_bridge_there_is_none() -> None:
    async with ResponsesServer() as server:
        upstream = make_upstream(config(server, bridge=False))
        assert isinstance(upstream, OpenAIUpstream)
        await upstream.close()


async def test_headers_and_query_go_along_and_a_client_that_leaves_is_seen() -> None:
    async with ResponsesServer() as server:
        first = b"data: " + json.dumps({"type": "response.in_progress"}).encode() + b"\n\n"
        server.plan(Stream([first, Hang()]))
        upstream = make_upstream(config(server))
        body = b'{"model":"bridged-1","stream":true,"messages":[{"role":"user","content":"Hi."}]}'
        headers = [(b"authorization", b"Bearer k"), (b"content-length", b"999")]
        reply = await upstream.chat(body, headers, b"api-version=1")
        await reply.close()
        [call] = server.calls
        await asyncio.wait_for(call.disconnected.wait(), 5)
        await upstream.close()
    assert call.target == "/v1/responses?api-version=1"
    assert call.header("authorization") == "Bearer k"
    assert call.header("content-length") == str(len(call.body))


async def test_text_arrives_before_the_next_is_sent() -> None:
    async with ResponsesServer() as server:
        go_on = asyncio.Event()

        def waiting(body: dict[str, object]) -> Stream:
            whole = server.put(server.calls[-1], Said("One. " * 40))
            assert isinstance(whole, Stream)
            return Stream([*whole.steps[:5], go_on, *whole.steps[5:]])

        server.plan(waiting)
        upstream = make_upstream(config(server))
        body = b'{"model":"bridged-1","stream":true,"messages":[{"role":"user","content":"Hi."}]}'
        reply = await upstream.chat(body, [])
        seen = b""
        async for data in reply.chunks():
            seen += data
            if b"One. " in seen:
                go_on.set()
        await upstream.close()
    assert go_on.is_set() and seen.endswith(b"data: [DONE]\n\n")


async def test_a_body_that_is_no_response_reaches_the_client() -> None:
    async with ResponsesServer() as server:
        odd = [{"object": "something"}, {"output": 5}]
        server.plan(*odd)
        upstream = make_upstream(config(server))
        body = b'{"model":"bridged-1","messages":[{"role":"user","content":"Hi."}]}'
        for expected in odd:
            assert json.loads(await (await upstream.chat(body, [])).read(LIMIT)) == expected
        await upstream.close()


STREAMED = b'{"model":"bridged-1","stream":true,"messages":[{"role":"user","content":"Hi."}]}'


async def test_the_end_arrives_though_upstream_keeps_its_connection() -> None:
    async with ResponsesServer() as server:

        def open_end(body: dict[str, object]) -> Stream:
            whole = server.put(server.calls[-1], Said("Yes."))
            assert isinstance(whole, Stream)
            return Stream([*whole.steps, Hang()])

        server.plan(open_end)
        upstream = make_upstream(config(server))
        reply = await upstream.chat(STREAMED, [])
        seen = b""
        async with asyncio.timeout(5):
            async for data in reply.chunks():
                seen += data
                if b"[DONE]" in seen:
                    break
        await reply.close()
        await upstream.close()
    assert seen.endswith(b"data: [DONE]\n\n")


async def test_a_whole_answer_to_a_streams_request_is_a_whole_answer() -> None:
    async with ResponsesServer() as server:

        def whole(body: dict[str, object]) -> Response:
            request = replace(server.calls[-1], json={**body, "stream": False})
            answer = server.put(request, Said("Yes."))
            assert isinstance(answer, Response)
            return answer

        server.plan(whole, {"object": "something"}, Response(b"", 307, ((b"location", b"/elsewhere"),)))
        upstream = make_upstream(config(server))
        answer = json.loads(await (await upstream.chat(STREAMED, [])).read(LIMIT))
        assert answer["choices"][0]["message"]["content"] == "Yes."
        odd = await upstream.chat(STREAMED, [])
        assert json.loads(await odd.read(LIMIT)) == {"object": "something"}
        moved = await upstream.chat(STREAMED, [])
        assert (moved.status, await moved.read(LIMIT)) == (307, b"")
        await upstream.close()
