"""The three channels as a client meets them: what goes upstream, and that it sees no VM tool.

Promises: for each thing that a client can ask for, the upstream request that results (tools, choice,
pages brought in) and an answer without a trace of the machinery; usage and headers over rounds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from tests.conversation.checks import without_evidence
from tests.e2e.harness import (
    Response,
    ServerProcess,
    Stream,
    answer,
    call,
    completion,
    count_request_tokens,
    free_port,
    in_process_server,
    message_of,
    sse_chunks,
)
from tests.e2e.talk import (
    CHAT,
    MODEL,
    VM_NAMES,
    Step,
    ask,
    assert_no_vm,
    assert_paged,
    body,
    config,
    fact,
    fault,
    names_of,
    new_key,
    raw,
    read_stream,
    results_of,
    scripted,
    search,
    talker,
    texts_of,
    tool,
)

PORT = free_port()
READ = tool("read_file", path={"type": "string"})
WRITE = tool("write_file", path={"type": "string"})
NAMED = {"type": "function", "function": {"name": "read_file"}}
QUESTION = "Which code has depot 3?"
FUNCTION = {"name": "read_file", "parameters": {"type": "object", "properties": {}}}
DONE = message_of("All right.")
WHOLE_AND_STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(config(PORT, prefetch={"max_pages": 2})) as process:
        yield process


@asynccontextmanager
async def told(server: ServerProcess, *steps: Step, **fields: Any) -> AsyncIterator[Any]:
    """One paged request; yields (upstream's calls, the client's text, headers)."""
    async with scripted(*steps, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(ask(QUESTION), **fields))
        assert response.status_code == 200, response.text
        assert_no_vm(response.text)
        yield upstream.calls, response.text, response.headers


def message_in(text: str) -> dict[str, Any]:
    """The message of a whole answer."""
    found: dict[str, Any] = json.loads(text)["choices"][0]["message"]
    return found


def chunks_in(text: str) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, checked for what every stream must be."""
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert lines.count("data: [DONE]") == 1
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    for key in ("id", "created", "model"):
        assert len({chunk[key] for chunk in chunks}) == 1, key
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in {choice["index"] for choice in choices}:
        own = [choice for choice in choices if choice["index"] == index]
        assert [c["finish_reason"] is not None for c in own] == [False] * (len(own) - 1) + [True]
        assert sum(bool(c["delta"].get("role")) for c in own) == 1
    return chunks


def text_in(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """One choice's text."""
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content") or "" for c in choices)


# ---------------------------------------------------------------- tool_choice


@WHOLE_AND_STREAM
@pytest.mark.parametrize("fields", [{}, {"tools": [READ]}, {"tools": [READ], "tool_choice": "auto"}])
async def test_the_model_may_call_vm_tools(
    server: ServerProcess, fields: dict[str, Any], stream: bool
) -> None:
    steps = [search("depot 5"), fault("msg_0001"), DONE]
    async with told(server, *steps, **fields, stream=stream) as (calls, text, headers):
        for request in calls:
            assert_paged(request)
            assert names_of(request) == [*(["read_file"] if fields else []), *VM_NAMES]
            assert request.json.get("tool_choice") == fields.get("tool_choice")
        assert len({json.dumps(c.json["tools"]) for c in calls}) == 1
        size = len(calls[0].json["messages"])  # the log only grows, until an epoch begins
        assert calls[1].json["messages"][:size] == calls[0].json["messages"]
        found, loaded = results_of(calls[2], 2)
        assert found["results"]
        assert fact(0) in loaded["page"]["content"]["text"]
        if stream:
            assert text_in(chunks_in(text)) == "All right."
        else:
            assert message_in(text)["content"] == "All right."
            assert headers["x-llm-pager-channel"] == "tools"


@WHOLE_AND_STREAM
@pytest.mark.parametrize("fields", [{"tools": [READ], "tool_choice": "none"}, {"logprobs": True}])
async def test_a_model_that_may_not_call_has_its_pages_brought_in(
    server: ServerProcess, fields: dict[str, Any], stream: bool
) -> None:
    """The tools array stays the same for the prompt cache; the choice is none."""
    async with told(server, DONE, **fields, stream=stream) as (calls, _, headers):
        assert_paged(calls[0])
        assert calls[0].json["tool_choice"] == "none"
        assert brought_in(calls[0])
        if not stream:
            assert headers["x-llm-pager-channel"] == "passive"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [READ], "tool_choice": "required"},
        {"functions": [FUNCTION]},
        {"functions": [FUNCTION], "function_call": {"name": "read_file"}},
        {"prediction": {"type": "content", "content": "x"}},
        {"web_search_options": {}},
        {"n": 2},
        {"tools": [READ], "logprobs": True},
        {"tools": [READ], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2},
    ],
    ids=lambda fields: "+".join(fields),
)
async def test_what_vm_tools_cannot_go_with_has_none(
    server: ServerProcess, fields: dict[str, Any]
) -> None:
    async with told(server, DONE, **fields) as (calls, _, headers):
        assert_paged(calls[0], tools=False)
        assert calls[0].json.get("tools") == fields.get("tools")
        for name, value in fields.items():
            assert calls[0].json[name] == value
        assert brought_in(calls[0])
        assert headers["x-llm-pager-channel"] == "passive"


def brought_in(request: Any) -> bool:
    """The page that the question is about stands before the user's own text, as quoted data."""
    newest = request.json["messages"][-1]["content"]
    assert newest.endswith(QUESTION)
    assert "<VM:CONTEXT>" in newest
    return fact(3) in newest


async def test_a_named_tool_choice_stays(server: ServerProcess) -> None:
    read = message_of(None, [call("call_1", "read_file", {"path": "/a"})])
    fields = {"tools": [READ, WRITE], "tool_choice": NAMED}
    async with told(server, read, **fields) as (calls, text, _):
        assert calls[0].json["tool_choice"] == NAMED
        assert_paged(calls[0])
        assert brought_in(calls[0])
        assert message_in(text)["tool_calls"][0]["function"]["name"] == "read_file"


async def test_an_allowed_tools_choice_stays(server: ServerProcess) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    async with told(server, DONE, tools=[READ], tool_choice=choice) as (calls, _, _headers):
        assert calls[0].json["tool_choice"] == choice


async def test_the_clients_required_tool_is_forwarded(server: ServerProcess) -> None:
    read = message_of(None, [call("call_1", "read_file", {"path": "/a"})])
    fields = {"tools": [READ], "tool_choice": "required", "stream": True}
    async with told(server, read, **fields) as (_, text, _headers):
        chunks = chunks_in(text)
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


# ---------------------------------------------------------------- other shapes of an answer


@WHOLE_AND_STREAM
async def test_two_choices(server: ServerProcess, stream: bool) -> None:
    def two(request: dict[str, Any]) -> Response | Stream:
        if not stream:
            whole = json.loads(completion(request, message_of("one")).body)
            other = {**whole["choices"][0], "index": 1, "message": message_of("two")}
            return Response(json.dumps({**whole, "choices": [*whole["choices"], other]}).encode())
        one = sse_chunks(request, message_of("one"))[:-1]
        other_events = sse_chunks(request, message_of("two"))
        return Stream([*one, *(e.replace(b'"index":0', b'"index":1') for e in other_events)])

    more = [*ask(QUESTION), message_of("two"), {"role": "user", "content": "and depot 5?"}]
    async with scripted(two, DONE, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(ask(QUESTION), n=2, stream=stream))
        assert response.content == bytes(upstream.calls[0].sent)  # nothing to hide: verbatim
        if stream:
            chunks = chunks_in(response.text)
            assert [text_in(chunks, i) for i in (0, 1)] == ["one", "two"]
        assert (await client.post(CHAT, json=body(more))).status_code == 200
    # whichever choice the client goes on with, its window goes on: no epoch begins anew
    first, second = (c.json["messages"] for c in upstream.calls)
    assert second[: len(first)] == [without_evidence(message) for message in first]


async def test_logprobs_come_through(server: ServerProcess) -> None:
    def with_logprobs(request: dict[str, Any]) -> Response:
        whole = json.loads(completion(request, DONE).body)
        whole["choices"][0]["logprobs"] = {"content": [{"token": "All", "logprob": -0.5}]}
        return Response(json.dumps(whole).encode())

    async with told(server, with_logprobs, logprobs=True) as (_, text, _headers):
        assert json.loads(text)["choices"][0]["logprobs"]["content"][0]["token"] == "All"


async def test_legacy_functions(server: ServerProcess) -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "read_file", "arguments": "{}"}}
    result = {"role": "function", "name": "read_file", "content": "the file"}
    fields = {"functions": [FUNCTION]}
    async with scripted(called, DONE, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(ask(QUESTION), **fields))
        assert message_in(response.text)["function_call"]["name"] == "read_file"
        following = [*ask(QUESTION), called, result]
        assert (await client.post(CHAT, json=body(following, **fields))).status_code == 200
    assert [m["role"] for m in upstream.calls[1].json["messages"]][-2:] == ["assistant", "function"]
    assert_paged(upstream.calls[1], tools=False)


OBJECT = {"depot": 3, "code": fact(3), "why": "it is written in a long and winding sentence " * 4}


@WHOLE_AND_STREAM
async def test_a_json_answer_is_valid_json_whatever_came_before_it(
    server: ServerProcess, stream: bool
) -> None:
    """Words before a VM call are longer than stream.hold_tokens, and still do not reach the client."""
    chatter = message_of('{"thinking": "' + "let me look " * 40 + '"}', search("depot 3")["tool_calls"])
    steps = [chatter, message_of(json.dumps(OBJECT))]
    fields = {"response_format": {"type": "json_object"}, "stream": stream}
    async with told(server, *steps, **fields) as (calls, text, _):
        got = text_in(chunks_in(text)) if stream else message_in(text)["content"]
        assert json.loads(got) == OBJECT
        assert all(c.json["response_format"] == {"type": "json_object"} for c in calls)


@WHOLE_AND_STREAM
async def test_a_short_preamble_of_a_vm_call_is_dropped(server: ServerProcess, stream: bool) -> None:
    steps = [message_of("Let me look.", search("depot 3")["tool_calls"]), DONE]
    async with told(server, *steps, stream=stream) as (_, text, _headers):
        assert (text_in(chunks_in(text)) if stream else message_in(text)["content"]) == "All right."


# ---------------------------------------------------------------- the client's own tools


@WHOLE_AND_STREAM
async def test_client_tools_with_the_names_of_vm_tools_are_kept_apart(
    server: ServerProcess, stream: bool
) -> None:
    """`page_fault` is the client's here; ours is vm_page_fault."""
    own = [tool("page_fault", page={"type": "string"}), tool("search_pages"), tool("vm_search_pages")]
    ours = message_of(None, [call("call_v", "vm_page_fault", {"page_id": "msg_0001"})])
    theirs = message_of(None, [call("call_c", "page_fault", {"page": "msg_0007"})])
    async with scripted(ours, theirs, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(ask(QUESTION), tools=own, stream=stream))
    assert names_of(upstream.calls[0]) == [
        "page_fault", "search_pages", "vm_search_pages", "vm_page_fault", "vm_vm_search_pages",
    ]
    assert "vm_page_fault" in upstream.calls[0].json["messages"][0]["content"]  # the rules name it
    assert fact(0) in results_of(upstream.calls[1])[0]["page"]["content"]["text"]
    if stream:
        deltas = [c["choices"][0]["delta"] for c in chunks_in(response.text) if c["choices"]]
        calls = [t for d in deltas for t in d.get("tool_calls") or ()]
        assert {t["index"] for t in calls} == {0}
        assert "".join(t["function"]["arguments"] for t in calls) == '{"page": "msg_0007"}'
        assert calls[0]["id"] == "call_c"
    else:
        assert message_in(response.text)["tool_calls"] == theirs["tool_calls"]
    assert "call_v" not in response.text and "vm_" not in response.text


@pytest.mark.parametrize(("count", "fits"), [(126, True), (127, False), (128, False)])
async def test_128_tools(server: ServerProcess, count: int, fits: bool) -> None:
    """OpenAI takes 128 tools: where ours would be too many they stay away."""
    own = [{"type": "function", "function": {"name": f"t{i}"}} for i in range(count)]
    with in_process_server(config(PORT, tiers={"l0": {"tokens": 6000}})) as base_url:
        async with scripted(DONE, port=PORT) as upstream, raw(base_url) as client:
            response = await client.post(CHAT, json=body(ask(QUESTION, pairs=60), tools=own))
    assert response.status_code == 200
    names = names_of(upstream.calls[0])
    assert names == [*(f"t{i}" for i in range(count)), *(VM_NAMES if fits else ())]
    assert "<VM:RULES>" in texts_of(upstream.calls[0])


@WHOLE_AND_STREAM
async def test_a_mixed_call_forwards_the_clients_alone_and_is_put_back(
    server: ServerProcess, stream: bool
) -> None:
    mixed = message_of(
        None,
        [
            call("call_v", "page_fault", {"page_id": "msg_0001"}),
            call("call_c", "read_file", {"path": "/a"}),
        ],
    )
    async with scripted(mixed, DONE, port=PORT) as upstream, raw(server.base_url) as client:
        response = await client.post(CHAT, json=body(ask(QUESTION), tools=[READ], stream=stream))
        assert "call_v" not in response.text
        assert_no_vm(response.text)
        if stream:
            chunks = chunks_in(response.text)
            calls = [t for c in chunks for t in c["choices"][0]["delta"].get("tool_calls") or ()]
            assert {t["index"] for t in calls} == {0}
            assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        else:
            assert message_in(response.text)["tool_calls"] == [mixed["tool_calls"][1]]
        forwarded = message_of(None, [mixed["tool_calls"][1]])
        result = {"role": "tool", "tool_call_id": "call_c", "content": "the file"}
        following = body([*ask(QUESTION), forwarded, result], tools=[READ])
        assert (await client.post(CHAT, json=following)).status_code == 200
    tail = upstream.calls[1].json["messages"][-3:]
    assert [c["id"] for c in tail[0]["tool_calls"]] == ["call_v", "call_c"]
    assert [m["tool_call_id"] for m in tail[1:]] == ["call_v", "call_c"]
    assert fact(0) in tail[1]["content"]


# ---------------------------------------------------------------- memory.mode


async def test_mode_passive_never_offers_tools() -> None:
    settings = config(PORT, memory={"mode": "passive"}, prefetch={"max_pages": 2})
    with in_process_server(settings) as base_url:
        async with scripted(DONE, DONE, port=PORT) as upstream, raw(base_url) as client:
            for fields in ({}, {"tools": [READ]}):
                sent = body(ask(QUESTION), **fields)
                assert (await client.post(CHAT, json=sent)).status_code == 200
    for request in upstream.calls:
        assert_paged(request, tools=False)
        assert not any(name in texts_of(request) for name in VM_NAMES)  # the rules name no tool
        assert "<VM:MANIFEST_JSON>" not in texts_of(request)
        assert brought_in(request)


@WHOLE_AND_STREAM
async def test_a_call_of_vm_tools_that_are_not_listed_is_nobodys(stream: bool) -> None:
    """The model makes it up: it is asked once more, for the client has no such tool."""
    settings = config(PORT, memory={"mode": "passive"})
    made = call("call_1", "page_fault", {"page_id": "msg_0001"})
    with in_process_server(settings) as base_url:
        async with scripted(message_of(None, [made]), DONE, port=PORT) as upstream, raw(base_url) as client:
            response = await client.post(CHAT, json=body(ask(QUESTION), stream=stream))
    assert response.status_code == 200 and len(upstream.calls) == 2
    assert_no_vm(response.text)
    assert finish_in(response.text, stream) == "stop"


def finish_in(text: str, stream: bool) -> str:
    choice = chunks_in(text)[-1]["choices"][0] if stream else json.loads(text)["choices"][0]
    return str(choice["finish_reason"])


async def test_mode_strict_tells_the_model_to_cite_and_not_to_guess() -> None:
    with in_process_server(config(PORT, memory={"mode": "strict"})) as base_url:
        async with scripted(DONE, port=PORT) as upstream, raw(base_url) as client:
            assert (await client.post(CHAT, json=body(ask(QUESTION)))).status_code == 200
    assert_paged(upstream.calls[0])
    assert "never guess" in upstream.calls[0].json["messages"][0]["content"]


async def test_a_model_that_takes_no_tools_by_configuration() -> None:
    models = {"gpt-4o*": {"tools": False, "developer_role": "system"}}
    with in_process_server(config(PORT, models=models)) as base_url:
        async with scripted(DONE, port=PORT) as upstream, raw(base_url) as client:
            assert (await client.post(CHAT, json=body(ask(QUESTION)))).status_code == 200
    assert_paged(upstream.calls[0], tools=False)
    assert upstream.calls[0].json["messages"][0]["role"] == "system"


async def test_vm_exchanges_become_text_when_tools_go_away(server: ServerProcess) -> None:
    """A later request that forces a tool keeps what was loaded, without an unanswered call."""
    async with scripted(fault("msg_0001"), DONE, DONE, port=PORT) as upstream:
        async with raw(server.base_url) as client:
            assert (await client.post(CHAT, json=body(ask(QUESTION)))).status_code == 200
            more = [*ask(QUESTION), DONE, {"role": "user", "content": "Now read."}]
            sent = body(more, tools=[READ], tool_choice="required")
            assert (await client.post(CHAT, json=sent)).status_code == 200
    last = upstream.calls[2]
    assert_paged(last, tools=False)
    assert not any(m.get("tool_calls") for m in last.json["messages"])
    assert fact(0) in texts_of(last)


# ---------------------------------------------------------------- usage and headers


async def test_usage_and_headers_over_several_rounds(server: ServerProcess) -> None:
    steps = [search("depot 3"), fault("msg_0001"), DONE]
    async with told(server, *steps) as (calls, text, headers):
        prompts = [count_request_tokens(c.json) for c in calls]
        each = [json.loads(bytes(c.sent))["usage"] for c in calls]
        usage = json.loads(text)["usage"]
        assert usage["prompt_tokens"] == prompts[-1]
        assert usage["completion_tokens"] == sum(u["completion_tokens"] for u in each)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["vm"]["rounds"] == 3
        assert usage["vm"]["faults"] == 1
        assert usage["vm"]["prompt_tokens"] == sum(prompts)
        assert headers["x-llm-pager-channel"] == "tools"
        assert headers["x-llm-pager-rounds"] == "3"
        assert headers["x-llm-pager-billed-prompt-tokens"] == str(sum(prompts))
        first = json.loads(bytes(calls[0].sent))
        assert json.loads(text)["id"] == first["id"]


async def test_usage_of_one_round_is_upstreams_own_with_the_bill_beside(server: ServerProcess) -> None:
    async with told(server, DONE) as (calls, text, headers):
        got, sent = json.loads(text), json.loads(bytes(calls[0].sent))
        vm, billed = got["usage"].pop("vm"), sent["usage"]["prompt_tokens"]
        assert got == sent
        assert (vm["rounds"], vm["prompt_tokens"], vm["conversation_billed_tokens"]) == (1, billed, billed)
        assert all(type(value) is int for value in vm.values()) and vm["full_history_billed_tokens"] > billed
        assert headers["x-llm-pager-rounds"] == "1"
        assert headers["x-llm-pager-billed-prompt-tokens"] == str(billed)


async def test_a_bypassed_answer_says_so_and_nothing_else(server: ServerProcess) -> None:
    async with scripted(DONE, port=PORT), raw(server.base_url) as client:
        response = await client.post(CHAT, json=body([{"role": "user", "content": "hi"}]))
    ours = {k: v for k, v in response.headers.items() if k.startswith("x-llm-pager")}
    assert ours == {"x-llm-pager-channel": "bypass"}


@pytest.mark.parametrize("include", [True, False])
async def test_a_stream_over_several_rounds_has_one_usage_chunk(
    server: ServerProcess, include: bool
) -> None:
    steps: list[Step] = [search("depot 3"), fault("msg_0001"), DONE]
    fields = {"stream_options": {"include_usage": True}} if include else {}
    async with told(server, *steps, stream=True, **fields) as (calls, text, _):
        chunks = chunks_in(text)
        usages = [c for c in chunks if c.get("usage")]
        assert len(usages) == include
        if include:
            prompts = [count_request_tokens(c.json) for c in calls]
            assert usages[0] is chunks[-1]
            assert usages[0]["choices"] == []
            assert usages[0]["usage"]["prompt_tokens"] == prompts[-1]
            assert usages[0]["usage"]["vm"]["prompt_tokens"] == sum(prompts)
            assert usages[0]["usage"]["vm"]["rounds"] == 3


async def test_the_sdks_stream_helper_reads_several_rounds(server: ServerProcess) -> None:
    steps: list[Step] = [search("depot 3"), fault("msg_0001"), message_of("word " * 80)]
    async with scripted(*steps, port=PORT), talker(server.base_url) as client:
        async with client.chat.completions.stream(
            model=MODEL, messages=ask(QUESTION), stream_options={"include_usage": True}
        ) as stream:
            done = await stream.get_final_completion()
    assert done.choices[0].message.content == "word " * 80
    assert done.choices[0].finish_reason == "stop"
    assert done.usage is not None and done.usage.completion_tokens > 80


async def test_upstreams_headers_reach_a_stream_and_a_whole_answer(server: ServerProcess) -> None:
    extra = ((b"x-request-id", b"req_7"), (b"openai-version", b"2020"), (b"x-ratelimit-limit", b"9"))

    def with_headers(request: dict[str, Any]) -> Any:
        reply = answer(request, DONE)
        assert isinstance(reply, Response | Stream)
        return dataclasses.replace(reply, headers=(*reply.headers, *extra))

    for stream in (False, True):
        async with told(server, with_headers, stream=stream) as (_, _text, headers):
            for name, value in extra:
                assert headers[name.decode()] == value.decode()


async def test_a_round_flows_while_upstream_still_speaks(server: ServerProcess) -> None:
    """Real streaming: text beyond the held tokens arrives before the round has ended."""
    go_on = asyncio.Event()

    def slow(request: dict[str, Any]) -> Stream:
        events = sse_chunks(request, message_of("word " * 60))
        return Stream([*events[:20], go_on, *events[20:]])

    async with scripted(search("depot 3"), slow, port=PORT):
        async with talker(server.base_url) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=ask(QUESTION), stream=True
            )
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if len(text) > 150:
                    go_on.set()  # without streaming this is never reached, and the client times out
    assert text == "word " * 60


async def test_held_text_leaves_after_hold_ms(server: ServerProcess) -> None:
    """A few words and then a pause: they arrive although the round is not over."""
    go_on = asyncio.Event()

    def pausing(request: dict[str, Any]) -> Stream:
        events = sse_chunks(request, message_of("Just a moment, please"))
        return Stream([*events[:2], go_on, *events[2:]])

    async with scripted(pausing, port=PORT), talker(server.base_url, new_key()) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=ask(QUESTION), stream=True
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text:
                go_on.set()
    assert text == "Just a moment, please"


async def test_a_json_stream_holds_its_text_to_the_end(server: ServerProcess) -> None:
    """Nothing of the object leaves before the round has ended: here it never does. Other text has
    left by then."""

    def endless(request: dict[str, Any]) -> Stream:
        return Stream(sse_chunks(request, message_of(json.dumps(OBJECT)))[:-3])  # no finish, no end

    for fields, flows in (({}, True), ({"response_format": {"type": "json_object"}}, False)):
        async with scripted(endless, port=PORT), raw(server.base_url) as client:
            sent = body(ask(QUESTION), stream=True, **fields)
            text, ended = await read_stream(client, sent)
        assert not ended
        assert ("winding" in text) == flows
