"""The suite itself: a gateway with known faults fails exactly the checks that are about them.

Promises: what reads streams here is checked without any gateway; the faulty gateway does what
careless proxies do (decodes and re-encodes, drops headers, tries again).
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from tests.contract import say, suite
from tests.contract.model import SHORT
from tests.contract.play import Target
from tests.contract.runner import play_all
from tests.contract.scripted import ScriptedUpstream
from tests.contract.wire import assemble, events_of

Handler = Callable[[web.Request], Awaitable[web.Response]]
UPSTREAM = web.AppKey("upstream", str)
KNOWN = {"model", "messages", "stream", "tools", "tool_choice", "seed"}
FAULTS = {
    "fields.unknown": "unknown fields are dropped",
    "fields.bytes": "bodies are written anew",
    "messages.unknown_keys": "unknown keys of messages are dropped",
    "headers.traceparent": "request headers are dropped",
    "headers.back_x_request_id": "response headers are dropped",
    "headers.query": "the query is dropped",
    "errors.status": "every error is a 500",
    "errors.once": "errors are tried again",
    "usage.asked": "what was asked about usage is dropped",
    "streams.broken": "a broken stream ends well",
    "network.cors_headers": "response headers are dropped",
}
SOUND = ("answers.text", "fields.seed", "tools.parallel_calls", "framing.crlf", "formats.spaces",
         "isolation.session_title", "identity.header_x-api-key", "sizes.session_json", "calls.alike_json",
         "encodings.gzip")
MIXED = {  # by a gateway for which everybody who names one session is one conversation
    "isolation.session_title", "isolation.session_new_chat", "isolation.session_two_at_once",
    "identity.header_x-api-key", "identity.query_key", "identity.body_user",
}


async def _careless(request: web.Request) -> web.Response:
    asked = json.loads(await request.read())
    sent = {k: v for k, v in asked.items() if k in KNOWN}
    keys = ("role", "content", "name", "tool_calls", "tool_call_id")
    sent["messages"] = [{k: m[k] for k in keys if k in m} for m in asked["messages"]]
    body, status = b"", 500
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(request.app[UPSTREAM], json=sent) as reply:
                status, body = reply.status, b""
                try:
                    async for data in reply.content.iter_any():
                        body += data
                except aiohttp.ClientError:
                    pass
            if status == 200:
                break
    kind = "text/event-stream" if sent.get("stream") and status == 200 else "application/json"
    return web.Response(body=body, status=200 if status == 200 else 500, content_type=kind)


SESSIONS = web.AppKey("sessions", dict[str, list[dict[str, object]]])


async def _mixing(request: web.Request) -> web.Response:
    """Shows a session's earlier messages to whoever names it."""
    asked = json.loads(await request.read())
    named = request.headers.get("x-session-id") or request.headers.get("x-llm-pager-session") or ""
    before = request.app[SESSIONS].setdefault(named, []) if named else []
    system, *own = asked["messages"]
    asked["messages"] = [system, *before, *own]
    before += own
    async with aiohttp.ClientSession() as session:
        async with session.post(request.app[UPSTREAM], json=asked) as reply:
            return web.Response(body=await reply.read(), status=reply.status, content_type=reply.content_type)


@asynccontextmanager
async def _careless_gateway(
    upstream: ScriptedUpstream, handler: Handler = _careless
) -> AsyncIterator[Target]:
    app = web.Application(client_max_size=2**24)
    app[UPSTREAM] = f"{upstream.base_url}/chat/completions"
    app[SESSIONS] = {}
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    url = f"http://{host}:{port}/v1"
    yield Target("careless", url, url)
    await runner.cleanup()


async def test_a_faulty_gateway_fails_the_checks_about_its_faults() -> None:
    wanted = [*FAULTS, *SOUND]
    chosen = [c for c in suite.cases() if c.check.id in wanted and not c.variant.long]
    async with ScriptedUpstream() as upstream:
        async with _careless_gateway(upstream) as target:
            found = await play_all(target, upstream, chosen)
    failed = {id.partition("[")[0] for id, outcome in found.items() if outcome.status == "failed"}
    assert failed == set(FAULTS)


async def test_a_gateway_that_mixes_conversations_fails_the_checks_about_them() -> None:
    wanted = {*MIXED, "isolation.other_system", "answers.text"}
    chosen = [c for c in suite.cases() if c.check.id in wanted and c.variant == SHORT]
    async with ScriptedUpstream() as upstream:
        async with _careless_gateway(upstream, _mixing) as target:
            found = await play_all(target, upstream, chosen)
    failed = {id.partition("[")[0] for id, outcome in found.items() if outcome.status == "failed"}
    assert failed == MIXED


def test_every_check_has_a_category_and_a_promise() -> None:
    checks = {case.check.id: case.check for case in suite.cases()}
    assert len(checks) > 450
    for one in checks.values():
        assert one.category != one.id
        assert one.promise
        assert "\n" not in one.promise


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_events_are_read_whatever_ends_their_lines(texts: list[str], end: str) -> None:
    stream = "".join(f": note{end}data: {text}{end}{end}" for text in texts)
    assert events_of(stream) == texts


def test_data_over_several_lines_is_joined() -> None:
    assert events_of("event: x\ndata: {\ndata:  1\ndata:}\n\n: ping\n\ndata: end") == [
        "{\n 1\n}", None, "end",
    ]


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_chunks_assemble_to_the_message_that_was_cut(piece: int) -> None:
    message = say.calling(
        say.call("call_1", "look", '{"word": "é"}', extra_content={"a": 1}),
        say.call("call_2", "look"),
        content="Let me see.",
        reasoning_content="Hm.",
        thinking_blocks=[{"type": "thinking", "thinking": "t"}],
    )
    events = say.chunks({"model": "m", "messages": []}, message, piece=piece)
    made = assemble([json.loads(event[6:]) for event in events[:-1]])
    assert made[0]["message"] == message
    assert made[0]["finish_reason"] == "tool_calls"


def test_calls_assemble_in_the_order_of_their_index() -> None:
    deltas = [
        {"tool_calls": [{"index": i, "id": f"call_{i}", "function": {"arguments": str(i)}}]}
        for i in range(5)
    ]
    random.Random(1).shuffle(deltas)
    made = assemble([{"choices": [{"index": 0, "delta": delta}]} for delta in deltas])
    assert [c["id"] for c in made[0]["message"]["tool_calls"]] == [f"call_{i}" for i in range(5)]
