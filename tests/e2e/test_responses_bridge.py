"""`models.<name>.bridge: responses`: the fault loop over an upstream's /v1/responses, over real
sockets; and what becomes of the same model without the bridge.

The server checks each request against the official package's types and refuses function tools on
Chat Completions, as OpenAI does for its reasoning models.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.e2e.answers import Response, Stream
from tests.e2e.processes import ServerProcess
from tests.e2e.providers import Call, Json, Said
from tests.e2e.providers.responses import ResponsesServer
from tests.e2e.providers.talk import PAGED, outgrow, said_in
from tests.e2e.schema import check_requests, judged
from tests.e2e.script import LOOKUP, SYSTEM, Chat, filler

pytestmark = pytest.mark.asyncio(loop_scope="module")

BRIDGED, NOT_BRIDGED = "gpt-5.9-bridged", "gpt-5.9"
BOTH = pytest.mark.parametrize("stream", [False, True])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers() -> AsyncIterator[tuple[ResponsesServer, ServerProcess]]:
    async with ResponsesServer() as upstream:
        config = {
            "upstream": {"provider": "openai", "base_url": upstream.base_url},
            **PAGED,
            "models": {
                "*-bridged": {"bridge": "responses", "window_tokens": 100_000},
                NOT_BRIDGED: {"window_tokens": 100_000},
            },
        }
        with ServerProcess(config) as server:
            yield upstream, server


@pytest_asyncio.fixture(loop_scope="module")
async def client(
    servers: tuple[ResponsesServer, ServerProcess], request: pytest.FixtureRequest
) -> AsyncIterator[AsyncOpenAI]:
    """Each test's own key; what it got has to fit Chat Completions' own schema."""
    upstream, server = servers
    async with judged() as http:
        yield AsyncOpenAI(
            api_key=request.node.name, base_url=server.base_url, max_retries=0, http_client=http
        )
    upstream.check()
    check_requests(c for c in upstream.calls if c.target.endswith("/chat/completions"))


@pytest.fixture
def upstream(servers: tuple[ResponsesServer, ServerProcess]) -> ResponsesServer:
    return servers[0]


def paths(upstream: ResponsesServer) -> list[str]:
    return [call.target for call in upstream.calls]


@BOTH
async def test_faults_are_served_and_reasoning_goes_back(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool
) -> None:
    """The server refuses reasoning that is not what it gave, and calls without their results."""
    chat = Chat(client, model=BRIDGED, reasoning_effort="low")
    await outgrow(chat, upstream)
    calls = [Call(f"call_{i}", "page_fault", {"page_id": f"msg_000{i}"}) for i in (1, 2)]
    search = Call("call_s", "search_pages", {"query": "Noted a2q"})
    upstream.plan(
        Said("Let me look.", calls, thinking="The first note."),
        Said(calls=[search], thinking="Another."),
        Said("It was u0q.", thinking="Done."),
    )
    got = await chat.say("What did I note first?", "", stream=stream)
    assert (got.text, got.finish, got.calls) == ("It was u0q.", "stop", [])
    assert set(paths(upstream)) == {"/v1/responses"}
    one, two, three = (body["input"] for body in upstream.bodies())
    assert two[: len(one)] == one and three[: len(two)] == two, "the cached prefix"
    added = [item["type"] for item in three[len(one) :]]
    assert added == [
        "reasoning", "message", "function_call", "function_call",
        "function_call_output", "function_call_output",
        "reasoning", "function_call", "function_call_output",
    ]  # fmt: skip
    outputs = [item["output"] for item in three[len(one) :] if item["type"].endswith("output")]
    assert "u0q" in outputs[0] and "a0q" in outputs[1] and "msg_0006" in outputs[2]


@BOTH
async def test_an_exchange_stays_in_the_prefix_with_its_reasoning(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool
) -> None:
    chat = Chat(client, model=BRIDGED)
    await outgrow(chat, upstream)
    page = Call("call_p", "page_fault", {"page_id": "msg_0001"})
    upstream.plan(Said(calls=[page], thinking="The first."), Said("It was u0q."), Said("Sure."))
    await chat.say("What did I note first?", "", stream=stream)
    assert (await chat.say("Sure?", "", stream=stream)).text == "Sure."
    _, answered, later = (body["input"] for body in upstream.bodies())
    assert later[: len(answered)] == answered
    assert [item["type"] for item in answered[-3:]] == [
        "reasoning", "function_call", "function_call_output",
    ]  # fmt: skip


@BOTH
async def test_the_clients_own_tools_in_parallel(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool
) -> None:
    chat = Chat(client, model=BRIDGED, tools=[LOOKUP], parallel_tool_calls=True)
    await outgrow(chat, upstream)
    asked = [Call("call_a", "lookup", {"word": "fjord"}), Call("call_b", "lookup", {"word": "kelp"})]
    upstream.plan(Said("Looking both up.", asked, thinking="Two."), Said("A fjord has kelp."))
    got = await chat.say("Look both up.", "", stream=stream)
    assert got.finish == "tool_calls" and got.text == "Looking both up."
    assert [(c["id"], json.loads(c["function"]["arguments"])) for c in got.calls] == [
        (c.id, c.input) for c in asked
    ]
    chat.messages.append({"role": "tool", "tool_call_id": "call_a", "content": "an inlet"})
    assert (await chat.result("call_b", "a weed", "", stream=stream)).text == "A fjord has kelp."
    first, last = upstream.bodies()
    assert [tool["name"] for tool in last["tools"]] == ["lookup", "page_fault", "search_pages"]
    assert first["tools"] == last["tools"] and not any(tool["strict"] for tool in last["tools"])
    assert last["parallel_tool_calls"] is True and last["store"] is False


@BOTH
async def test_mixed_calls_are_put_together_again(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool
) -> None:
    chat = Chat(client, model=BRIDGED, tools=[LOOKUP])
    await outgrow(chat, upstream)
    page = Call("call_p", "page_fault", {"page_id": "msg_0001"})
    upstream.plan(
        Said(calls=[page, Call("call_w", "lookup", {"word": "fjord"})], thinking="Both."),
        Said("u0q, an inlet."),
    )
    got = await chat.say("The first note, and a word.", "", stream=stream)
    assert [c["id"] for c in got.calls] == ["call_w"] and got.finish == "tool_calls"
    assert (await chat.result("call_w", "an inlet", "", stream=stream)).text == "u0q, an inlet."
    items = upstream.bodies()[1]["input"][-5:]
    assert [item["type"] for item in items[:3]] == ["reasoning", "function_call", "function_call"]
    assert {item["call_id"] for item in items[3:]} == {"call_p", "call_w"}


async def test_every_setting_in_the_other_apis_words(
    upstream: ResponsesServer, client: AsyncOpenAI
) -> None:
    """The server's types refuse a setting in the wrong shape."""
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    upstream.plan(Said('{"word": "kelp"}'))
    reply = await client.chat.completions.create(
        model=BRIDGED,
        messages=[
            {"role": "developer", "content": "Answer in JSON."},
            {"role": "user", "name": "ann", "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
            ]},
        ],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "word", "schema": schema, "strict": True},
        },
        tools=[LOOKUP],  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "lookup"}},
        parallel_tool_calls=False,
        max_completion_tokens=500,
        reasoning_effort="high",
        verbosity="low",
        metadata={"a": "b"},
        prompt_cache_key="k",
        safety_identifier="s",
        service_tier="flex",
        seed=7,
        n=1,
        stop=None,
    )
    assert reply.choices[0].message.content == '{"word": "kelp"}'
    (body,) = upstream.bodies()
    assert body["text"] == {
        "format": {"type": "json_schema", "name": "word", "schema": schema, "strict": True},
        "verbosity": "low",
    }
    assert body["reasoning"] == {"effort": "high"} and body["max_output_tokens"] == 500
    assert body["tool_choice"] == {"type": "function", "name": "lookup"}
    assert body["prompt_cache_key"] == "k" and body["service_tier"] == "flex"
    assert [part["type"] for part in body["input"][1]["content"]] == ["input_text", "input_image"]


@BOTH
async def test_usage_tells_cached_and_reasoning_tokens(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool
) -> None:
    chat = Chat(client, model=BRIDGED)
    await outgrow(chat, upstream)
    page = Call("call_p", "page_fault", {"page_id": "msg_0001"})
    upstream.plan(Said(calls=[page], thinking="Hm."), Said("u0q."))
    asked: Any = [*chat.messages, {"role": "user", "content": "The first?"}]
    if stream:
        options: Any = {"include_usage": True}
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=BRIDGED, messages=asked, stream=True, stream_options=options
            )
        ]
        assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
        assert sum(1 for c in chunks if c.choices and c.choices[0].delta.role) == 1
        assert all(chunk.usage is None for chunk in chunks[:-1]) and chunks[-1].choices == []
        usage = chunks[-1].usage
    else:
        reply = await client.chat.completions.create(model=BRIDGED, messages=asked)
        usage = reply.usage
    assert usage is not None and usage.prompt_tokens_details and usage.completion_tokens_details
    assert usage.prompt_tokens_details.cached_tokens == 64
    assert usage.completion_tokens_details.reasoning_tokens == 7
    assert (usage.model_extra or {})["vm"]["rounds"] == 2
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@BOTH
async def test_an_answer_that_was_cut(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool
) -> None:
    chat = Chat(client, model=BRIDGED)
    upstream.plan(Said("Once upon a", stop="max_output_tokens"))
    got = await chat.say("A tale.", "", stream=stream)
    assert (got.text, got.finish) == ("Once upon a", "length")


async def test_what_responses_cannot_say_stays_with_chat_completions(
    upstream: ResponsesServer, client: AsyncOpenAI
) -> None:
    upstream.plan(Said("Two."))
    messages: Any = [{"role": "user", "content": "Hi."}]
    await client.chat.completions.create(model=BRIDGED, messages=messages, n=2, stop=["x"])
    assert paths(upstream) == ["/v1/chat/completions"]
    assert upstream.bodies()[0] == {"model": BRIDGED, "messages": messages, "n": 2, "stop": ["x"]}


async def test_a_model_that_does_not_reason(
    upstream: ResponsesServer, client: AsyncOpenAI
) -> None:
    """It refuses to be asked for its reasoning: once."""
    upstream.plain_models = frozenset({"plain-bridged"})
    chat = Chat(client, model="plain-bridged")
    upstream.plan(Said("Hello."), Said("Hello again."))
    assert (await chat.say("Hi.", "")).text == "Hello."
    assert (await chat.say("Hi.", "", stream=True)).text == "Hello again."
    first, second, third = upstream.calls
    assert first.violations == ["Encrypted content is not supported with this model."]
    assert "include" not in second.json and "include" not in third.json
    upstream.calls.remove(first)


# ---------------------------------------------------------------- errors


@BOTH
@pytest.mark.parametrize(
    ("status", "raised"),
    [(429, openai.RateLimitError), (500, openai.InternalServerError), (401, openai.AuthenticationError)],
)
async def test_a_refusal_is_upstreams_own(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool, status: int,
    raised: type[openai.APIStatusError],
) -> None:  # fmt: skip
    refusal = upstream.refuse(status, "Not now.", "some_type")
    upstream.plan(Response(refusal.body, status, (*refusal.headers, (b"retry-after", b"3"))))
    with pytest.raises(raised) as caught:
        await client.chat.completions.create(
            model=BRIDGED, messages=[{"role": "user", "content": "Hi."}], stream=stream
        )
    assert caught.value.type == "some_type"
    assert caught.value.response.headers["retry-after"] == "3"


async def test_a_failed_response_is_an_error(
    upstream: ResponsesServer, client: AsyncOpenAI
) -> None:
    def failed(body: Json) -> Any:
        whole = upstream.put(upstream.calls[-1], Said("Never said."))
        error = {"code": "rate_limit_exceeded", "message": "Too many."}
        if isinstance(whole, Response):
            response = json.loads(whole.body)
            told = {**response, "status": "failed", "error": error, "output": []}
            return Response(json.dumps(told).encode())
        assert isinstance(whole, Stream)
        first = json.loads(bytes(whole.steps[0]).partition(b"data: ")[2])["response"]  # type: ignore[arg-type]
        event = {"type": "response.failed", "sequence_number": 9}
        event["response"] = {**first, "status": "failed", "error": error}
        return Stream([*whole.steps[:6], f"data: {json.dumps(event)}\n\n".encode()])

    upstream.plan(failed, failed)
    messages: Any = [{"role": "user", "content": "Hi."}]
    with pytest.raises(openai.RateLimitError, match="Too many"):
        await client.chat.completions.create(model=BRIDGED, messages=messages)
    with pytest.raises(openai.APIError, match="Too many"):
        async for _ in await client.chat.completions.create(
            model=BRIDGED, messages=messages, stream=True
        ):
            pass


# ---------------------------------------------------------------- without the bridge


@BOTH
async def test_without_the_bridge_such_a_model_gets_pages_before_the_call(
    upstream: ResponsesServer, client: AsyncOpenAI, stream: bool
) -> None:
    """The first paged request is refused for its tools and goes once more unchanged; from then on
    the model's pages are brought in without tools."""
    chat = Chat(client, model=NOT_BRIDGED)
    refused = 0
    upstream.plan(*(Said(f"Noted a{turn}q. {filler(f'a{turn}', 60)}") for turn in range(14)))
    for turn in range(14):
        got = await chat.say(f"Note u{turn}q. {filler(f'u{turn}', 60)}", "", stream=stream)
        assert got.text.startswith(f"Noted a{turn}q.")
    refused = [call for call in upstream.calls if call.violations]
    assert len(refused) == 1 and said_in(refused[0].json, "page_fault")
    after = upstream.calls[upstream.calls.index(refused[0]) + 1 :]
    assert not said_in(after[0].json, "<VM:"), "as the client sent it"
    assert all(said_in(call.json, "<VM:RULES>") for call in after[1:]) and len(after) >= 4
    assert not any("tools" in call.json for call in after)
    assert set(paths(upstream)) == {"/v1/chat/completions"}
    assert said_in(after[-1].json, str(SYSTEM["content"]))
    upstream.calls.remove(refused[0])
