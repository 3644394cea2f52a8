"""The demo's upstream on the wire."""

import json
from typing import Any

import pytest

from proxy.demo.upstream import DemoUpstream
from tests.demo.test_reader import RIGGER, TOOLS, request, user


async def chunks(body: dict[str, Any]) -> list[bytes]:
    reply = await DemoUpstream().chat(json.dumps(body).encode(), [])
    assert reply.status == 200
    return [chunk async for chunk in reply.chunks()]


async def test_streams_small_chunks_with_usage_and_the_same_text_as_the_whole_answer() -> None:
    body = request(user(RIGGER), user("How much does Odile want for the forestay?"))
    whole = await DemoUpstream().chat(json.dumps(body).encode(), [])
    answer = json.loads(await whole.read(100_000))
    events = await chunks({**body, "stream": True, "stream_options": {"include_usage": True}})
    assert events[-1] == b"data: [DONE]\n\n" and len(events) > 5
    decoded = [json.loads(e[6:]) for e in events[:-1]]
    text = "".join(c["delta"].get("content") or "" for e in decoded for c in e["choices"])
    assert text == answer["choices"][0]["message"]["content"]
    assert decoded[-1]["choices"] == [] and decoded[-1]["usage"] == answer["usage"]
    assert all(e["usage"] is None for e in decoded[:-1])
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_streamed_tool_calls_join_to_the_whole_call() -> None:
    body = request(user("What colour did Bernard pick for the hull?"), tools=TOOLS, stream=True)
    decoded = [json.loads(e[6:]) for e in (await chunks(body))[:-1]]
    deltas = [d for e in decoded for d in e["choices"][0]["delta"].get("tool_calls", [])]
    arguments = "".join(d["function"]["arguments"] for d in deltas)
    assert json.loads(arguments)["query"] and "usage" not in decoded[-1]
    assert decoded[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_usage_counts_a_cached_prefix_in_steps_of_128() -> None:
    upstream = DemoUpstream()
    history = [user("The larch plank cost 165 pounds. " * 200), user("Fine.")]
    for _ in range(2):
        reply = await upstream.chat(json.dumps(request(*history)).encode(), [])
        usage = json.loads(await reply.read(100_000))["usage"]
        history.append(user("And more."))
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 1024 <= cached < usage["prompt_tokens"] and cached % 128 == 0


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"messages": [1]}', b'{"messages": [{"role": "user"}], "n": 0}'])
async def test_what_is_no_chat_request_gets_openais_400(body: bytes) -> None:
    reply = await DemoUpstream().chat(body, [])
    assert reply.status == 400 and "message" in json.loads(await reply.read(10_000))["error"]


async def test_models_are_listed_and_requests_are_heard() -> None:
    heard: list[dict[str, Any]] = []
    upstream = DemoUpstream(heard.append)
    await upstream.chat(json.dumps(request(user("Hi."))).encode(), [])
    assert heard == [request(user("Hi."))]
    models = await upstream.forward("GET", "/models", b"", [], None)
    assert json.loads(await models.read(1000))["data"][0]["id"] == "demo"
    assert (await upstream.forward("POST", "/embeddings", b"", [], None)).status == 404
