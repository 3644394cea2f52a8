"""What we send upstream and what we answer, judged by OpenAI's own published schema.

Each kind of turn once: bypassed, paged, with faults, a mixed call, a preamble, JSON, two choices,
legacy functions, everything that a message may carry; whole and streaming, with and without usage.
What two upstreams of ours build (the demo, the bridge to Responses) is judged without a server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from proxy.demo.upstream import DemoUpstream
from proxy.upstream.responses_translation import ChatStream, to_chat
from tests.contract import say
from tests.e2e.harness import (
    Answer,
    ServerProcess,
    Stream,
    call,
    completion,
    free_port,
    message_of,
    sse_chunks,
)
from tests.e2e.schema import CHUNK, REQUEST, RESPONSE, needs_schema, problems, stream_problems
from tests.e2e.talk import (
    CHAT,
    MODEL,
    Step,
    ask,
    config,
    fault,
    raw,
    scripted,
    search,
    tool,
)

PORT = free_port()
READ = tool("read_file", path={"type": "string"})
RUN = {"type": "custom", "custom": {"name": "run", "description": "Runs a line"}}
LOOK = {"name": "look", "description": "Looks", "parameters": {"type": "object", "properties": {}}}
DONE = message_of("All right.")
PREAMBLE = message_of("Let me look.", [call("c0", "page_fault", {"page_id": "msg_0001"})])
MIXED = message_of(
    "I look.", [call("c1", "read_file", {"path": "a"}), call("c2", "page_fault", {"page_id": "msg_0001"})]
)
SCHEMA_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}},
}
TOKEN = {"token": "All", "logprob": -0.25, "bytes": [65, 108, 108]}
LOGPROBS = {"content": [{**TOKEN, "top_logprobs": [TOKEN]}], "refusal": None}
CITATION = {"type": "url_citation", "url_citation": {
    "url": "https://example.org", "title": "T", "start_index": 0, "end_index": 3}}  # fmt: skip
SOUND = {"id": "audio_1", "data": "UklGRg==", "expires_at": 2_000_000_000, "transcript": "Hi."}


def said(message: dict[str, Any], **more: Any) -> Step:
    """An answer with any key of a message; `choice`: further fields of its choice."""
    return lambda request: say.answer(request, message, **more)


def whole(request: dict[str, Any]) -> Answer:
    """Not streamed, whatever was asked for: such servers are."""
    return completion(request, DONE)


def twice(request: dict[str, Any]) -> Answer:
    """Two choices that say the same."""
    if not request.get("stream"):
        body = json.loads(completion(request, DONE).body)
        body["choices"] += [{**choice, "index": 1} for choice in body["choices"]]
        return body
    events: list[bytes] = []
    for event in sse_chunks(request, DONE):
        events.append(event)
        if b'"index":0' in event:
            events.append(event.replace(b'"index":0', b'"index":1'))
    return Stream(events)


TURNS: list[tuple[str, Sequence[Step], dict[str, Any]]] = [
    ("bypassed", [DONE], {"messages": ask(pairs=1)}),
    ("paged", [DONE], {}),
    ("faults", [search("depot 5"), fault("msg_0001"), DONE], {}),
    ("faults and tools", [fault("msg_0001"), DONE], {"tools": [READ], "parallel_tool_calls": True}),
    ("a preamble", [PREAMBLE, DONE], {}),
    ("mixed", [MIXED], {"tools": [READ]}),
    ("a client's call", [message_of(None, [call("c1", "read_file", {"path": "a"})])], {"tools": [READ]}),
    ("limits", [fault("msg_0001"), DONE], {"max_completion_tokens": 300, "stop": ["END"], "seed": 7}),
    ("json", [fault("msg_0001"), message_of('{"a": 1}')], {"response_format": {"type": "json_object"}}),
    ("json schema", [fault("msg_0001"), message_of('{"a": 1}')], {"response_format": SCHEMA_FORMAT}),
    ("required", [message_of(None, [call("c1", "read_file", {})])],
     {"tools": [READ], "tool_choice": "required"}),
    ("reasoning", [{**fault("msg_0001"), "reasoning_content": "hm"}, DONE], {"reasoning_effort": "low"}),
    ("a refusal", [fault("msg_0001"), said({**message_of(None), "refusal": "No."})], {}),
    ("log probabilities", [said(DONE, choice={"logprobs": LOGPROBS})], {"logprobs": True, "top_logprobs": 1}),
    ("citations", [said({**DONE, "annotations": [CITATION]})], {"web_search_options": {}}),
    ("sound", [said({**message_of(None), "audio": SOUND})],
     {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}),
    ("a custom tool", [fault("msg_0001"), said(say.calling({"id": "c1", "type": "custom", "custom": {
        "name": "run", "input": "ls"}}))], {"tools": [RUN]}),
    ("a later round that is not streamed", [fault("msg_0001"), whole], {}),
    ("two choices", [twice], {"n": 2}),
    ("legacy functions", [said({**message_of(None), "function_call": {"name": "look", "arguments": "{}"}})],
     {"functions": [LOOK], "function_call": "auto"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    needs_schema()
    with ServerProcess(config(PORT, prefetch={"max_pages": 2})) as process:
        yield process


@pytest.mark.parametrize(
    ("steps", "fields", "stream"),
    # All as they are and as a stream; every second stream asks for usage, and so does the turn with faults.
    [(*t[1:], s) for n, t in enumerate(TURNS) for s in (None, n % 2 == 0)],
    ids=[f"{t[0]}-{s}" for n, t in enumerate(TURNS) for s in ("whole", "stream with usage" if n % 2 == 0 else "stream")],
)
async def test_every_request_and_answer_fits_the_published_schema(
    server: ServerProcess, steps: Sequence[Step], fields: dict[str, Any], stream: bool | None
) -> None:
    more: dict[str, Any] = {} if stream is None else {"stream": True}
    if stream:
        more["stream_options"] = {"include_usage": True}
    may_loop = fields.keys().isdisjoint({"messages", "n"})  # then we ask for usage ourselves
    async with scripted(*steps, port=PORT) as upstream, raw(server.base_url) as client:
        sent = {"model": MODEL, "messages": ask(), **fields, **more}
        response = await client.post(CHAT, json=sent)
        assert response.status_code == 200, response.text
        for recorded in upstream.calls:
            assert problems(REQUEST, recorded.json) == []
            asked = (recorded.json.get("stream_options") or {}).get("include_usage", False)
            assert asked is (bool(more) if may_loop else bool(stream))
        if more:
            assert stream_problems(response.text) == []
            assert ('"usage"' in response.text) is bool(stream)
        else:
            assert problems(RESPONSE, response.json()) == []


DEMO: dict[str, dict[str, Any]] = {
    "text": {"messages": ask(pairs=3)},
    "two choices": {"messages": ask(pairs=1), "n": 2},
    "calls": {
        "messages": ask("Who wrote to the lighthouse keeper?", pairs=1),
        "tools": [tool("search_pages", query={"type": "string"})],
    },
}


@pytest.mark.parametrize("stream", [None, False, True], ids=["whole", "stream", "stream with usage"])
@pytest.mark.parametrize("fields", DEMO.values(), ids=DEMO)
async def test_what_the_demo_answers_fits_too(fields: dict[str, Any], stream: bool | None) -> None:
    needs_schema()
    more: dict[str, Any] = {} if stream is None else {"stream": True}
    if stream:
        more["stream_options"] = {"include_usage": True}
    request = {"model": "demo", **fields, **more}
    assert problems(REQUEST, request) == []
    reply = await DemoUpstream().chat(json.dumps(request).encode(), [])
    text = (await reply.read(1 << 20)).decode()
    assert reply.status == 200
    assert ("search_pages" in text) is ("tools" in fields)
    assert (stream_problems(text) if more else problems(RESPONSE, json.loads(text))) == []


RESPONSES_ITEMS: list[dict[str, Any]] = [
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Why."}]},
    {"type": "message", "id": "m", "content": [{"type": "output_text", "text": "One.", "annotations": [
        {"type": "url_citation", "url": "https://a.org", "title": "t", "start_index": 0, "end_index": 1},
        {"type": "file_citation", "file_id": "f", "filename": "a.txt", "index": 0}]}]},
    {"type": "message", "id": "n", "content": [{"type": "refusal", "refusal": "No."}]},
    {"type": "function_call", "id": "f", "call_id": "c1", "name": "look", "arguments": "{}"},
    {"type": "custom_tool_call", "id": "g", "call_id": "c2", "name": "run", "input": "ls"},
]  # fmt: skip
TOKENS = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}


@pytest.mark.parametrize("usage", [TOKENS, None], ids=["usage", "no usage"])
def test_what_the_responses_bridge_builds_fits_too(usage: dict[str, int] | None) -> None:
    """Every kind of item, also those that the tests' server does not give."""
    needs_schema()
    response = {
        "id": "resp_1", "created_at": 5.5, "model": "m", "status": "completed", "service_tier": "flex",
        "output": RESPONSES_ITEMS, "usage": usage,
    }  # fmt: skip
    assert problems(RESPONSE, to_chat(response)) == []
    stream = ChatStream(include_usage=True)
    chunks = [chunk for event in _events(response) for chunk in stream.feed(event)]
    assert stream.ended
    assert [p for chunk in chunks for p in problems(CHUNK, chunk)] == []
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    for key in ("role", "content", "refusal", "annotations", "tool_calls", "reasoning_content"):
        assert any(delta.get(key) for delta in deltas), key
    cited = [note["type"] for delta in deltas for note in delta.get("annotations") or ()]
    assert cited == ["url_citation"], "the only kind that Chat Completions has"


def _events(response: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The response as events, each text in one piece."""
    yield {"type": "response.created", "response": response}
    for index, item in enumerate(response["output"]):
        at = {"output_index": index}
        yield {"type": "response.output_item.added", "item": item, **at}
        for part in item.get("summary") or ():
            yield {"type": "response.reasoning_summary_text.delta", "delta": part["text"], **at}
        for part in item.get("content") or ():
            kind = "refusal" if part["type"] == "refusal" else "text"
            name = "refusal" if kind == "refusal" else "output_text"
            yield {"type": f"response.{name}.delta", "delta": part[kind], **at}
            for note in part.get("annotations") or ():
                yield {"type": "response.output_text.annotation.added", "annotation": note, **at}
        yield {"type": "response.output_item.done", "item": item, **at}
    yield {"type": "response.completed", "response": response}


def test_the_judge_finds_what_is_wrong() -> None:
    needs_schema()
    assert problems(REQUEST, {"model": "m"})
    assert problems(RESPONSE, {"id": "x", "choices": []})
    assert problems(CHUNK, {"id": "c", "created": 1, "model": "m", "object": "chunk", "choices": []})
    assert stream_problems("data: [DONE]\n\n")


def test_the_judge_requires_what_the_schema_requires() -> None:
    """Without exemptions: the fields that are null most of the time, too."""
    needs_schema()
    whole = json.loads(completion({"model": "m", "messages": ask(pairs=1)}, DONE).body)
    choice = whole["choices"][0]
    assert problems(RESPONSE, whole) == []
    for key in choice:
        assert problems(RESPONSE, {**whole, "choices": [_without(choice, key)]}), key
    for key in ("role", "content", "refusal"):
        message = _without(choice["message"], key)
        assert problems(RESPONSE, {**whole, "choices": [{**choice, "message": message}]}), key
    odd = {**whole, "model": "\ud83d"}  # half a character: valid JSON
    assert problems(RESPONSE, odd) == [] and problems(RESPONSE, _without(odd, "id"))


def _without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != key}
