"""OpenAI's own Python client, sync and async, sees no difference between llm-pager and upstream."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.openai_client import (
    BOTH,
    STREAMS,
    Report,
    ask,
    client,
    echo,
    parsed,
    streamed,
)
from tests.clients.scenes import (
    AGENT_QUESTION,
    BUDGET_TOKENS,
    FUNCTIONS,
    MODEL,
    QUESTIONS,
    REPORT,
    REPORT_QUESTION,
    REPORT_SCHEMA,
    SCENES,
    TOOL_SCHEMAS,
    opening,
    opening_with_pictures,
    picture,
    user,
    user_with_picture,
)
from tests.clients.stage import (
    Stage,
    check_same,
    items,
    value,
)

pytestmark = BOTH


async def agent(made: Any, stream: bool, **fields: Any) -> list[Any]:
    """The tool loop as the documentation has it."""
    messages, seen = [*opening(), user(AGENT_QUESTION)], []
    for _ in SCENES["agent"]:
        message, what = await ask(made, messages, stream, tools=TOOL_SCHEMAS, **fields)
        messages.append(message)
        seen.append(what)
        for c in message.get("tool_calls") or ():
            result = FUNCTIONS[c["function"]["name"]](**json.loads(c["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": c["id"], "content": result})
    return [messages, seen]


@pytest.mark.parametrize(
    "stream, fields",
    [
        (False, {}),
        (True, {}),
        (True, {"stream_options": {"include_usage": False}}),
        (True, {"stream_options": {"include_usage": True}}),
    ],
    ids=["whole", "stream", "stream without usage", "stream with usage"],
)
async def test_talk(stage: Stage, client_class: str, stream: bool, fields: dict[str, Any]) -> None:

    async def run(url: str, key: str) -> Any:
        made, messages, seen = client(client_class, url, key), opening(), []
        for question in QUESTIONS:
            messages.append(user(question))
            message, what = await ask(made, messages, stream, **fields)
            messages.append(message)
            seen.append(what)
        return [messages, seen]

    messages, _ = await check_same(stage, "talk", run)
    assert messages[-1]["content"] == SCENES["talk"][-1].reply["content"]  # type: ignore[index]


@STREAMS
async def test_agent(stage: Stage, client_class: str, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        return await agent(client(client_class, url, key), stream)

    messages, _ = await check_same(stage, "agent", run)
    assert [len(m.get("tool_calls", ())) for m in messages if m["role"] == "assistant"][-3:] == [
        2,
        1,
        0,
    ]


async def test_stream_helper_with_tools(stage: Stage, client_class: str) -> None:
    """`chat.completions.stream`: the same events, and the same completion that they add up to."""
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in TOOL_SCHEMAS]

    async def run(url: str, key: str) -> Any:
        made, messages, seen = (
            client(client_class, url, key),
            [*opening(), user(AGENT_QUESTION)],
            [],
        )
        for _ in SCENES["agent"]:
            asked = {"model": MODEL, "messages": messages, "tools": strict}
            final, events = await streamed(made.chat.completions, asked)
            message = final.choices[0].message
            seen.append([events, final.model_dump(exclude={"id", "usage"})])
            messages.append(echo(message))
            for c in message.tool_calls or ():
                result = FUNCTIONS[c.function.name](**c.function.parsed_arguments)
                messages.append({"role": "tool", "tool_call_id": c.id, "content": result})
        return seen

    await check_same(stage, "agent", run)


@STREAMS
async def test_structured_output_as_json_schema(
    stage: Stage, client_class: str, stream: bool
) -> None:
    schema = {"name": "report", "strict": True, "schema": REPORT_SCHEMA}
    wanted = {"type": "json_schema", "json_schema": schema}

    async def run(url: str, key: str) -> Any:
        made, messages, seen = client(client_class, url, key), opening(), []
        for _ in SCENES["report"]:
            messages.append(user(REPORT_QUESTION))
            message, what = await ask(made, messages, stream, response_format=wanted)
            messages.append(message)
            seen.append([what, json.loads(message["content"])])
        return seen

    seen = await check_same(stage, "report", run)
    assert seen[0][1] == REPORT


@pytest.mark.parametrize("helper", ["parse", "stream"])
async def test_structured_output_parsed_by_the_client(
    stage: Stage, client_class: str, helper: str
) -> None:
    async def run(url: str, key: str) -> Any:
        made, messages, seen = client(client_class, url, key), opening(), []
        completions = made.chat.completions
        for _ in SCENES["report"]:
            messages.append(user(REPORT_QUESTION))
            asked = {"model": MODEL, "messages": messages, "response_format": Report}
            final, events = await (parsed if helper == "parse" else streamed)(completions, asked)
            message = final.choices[0].message
            assert isinstance(message.parsed, Report)
            seen.append([events, message.parsed.model_dump(), message.content])
            messages.append({"role": "assistant", "content": message.content})
        return seen

    seen = await check_same(stage, "report", run)
    assert seen[0][1] == REPORT


@STREAMS
async def test_images(stage: Stage, client_class: str, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made, messages, seen = client(client_class, url, key), opening_with_pictures(), []
        for blue in (0, 255):
            messages.append(user_with_picture("What is this?", picture(255 - blue, 0, blue)))
            message, what = await ask(made, messages, stream)
            messages.append(message)
            seen.append(what)
        return seen

    await check_same(stage, "images", run)


@STREAMS
async def test_choices_and_their_probabilities(
    stage: Stage, client_class: str, stream: bool
) -> None:
    async def run(url: str, key: str) -> Any:
        completions = client(client_class, url, key).chat.completions
        asked = {"model": MODEL, "messages": [*opening(), user("Heads?")], "n": 2, "logprobs": True}
        reply = await value(completions.create(**asked, stream=stream))
        if not stream:
            return reply.model_dump(exclude_unset=True)
        return [chunk.model_dump(exclude_unset=True) async for chunk in items(reply)]

    await check_same(stage, "choices", run, faults=False)


@STREAMS
async def test_usage_counts_the_window_once_and_all_that_was_said(
    stage: Stage, client_class: str, stream: bool
) -> None:
    """prompt_tokens is the last round's, a gauge; completion_tokens is the sum over the rounds."""
    used: list[Any] = []

    async def run(url: str, key: str) -> None:
        completions = client(client_class, url, key).chat.completions
        messages = opening()
        for question in QUESTIONS:
            messages.append(user(question))
            asked: dict[str, Any] = {"model": MODEL, "messages": messages, "stream": stream}
            if stream:
                asked["stream_options"] = {"include_usage": True}
                reply = await value(completions.create(**asked))
                used.append([chunk async for chunk in items(reply)][-1].usage)
            else:
                used.append((await value(completions.create(**asked))).usage)
            messages.append({"role": "assistant", "content": "Noted."})

    await check_same(stage, "talk", run)
    bare, paged = used[:3], used[3:]
    for before, after in zip(bare, paged, strict=True):
        assert before.prompt_tokens > BUDGET_TOKENS >= after.prompt_tokens
        assert after.total_tokens == after.prompt_tokens + after.completion_tokens
    said = [
        after.completion_tokens - before.completion_tokens
        for before, after in zip(bare, paged, strict=True)
    ]
    assert said[0] > said[1] > said[2] == 0  # three, one and no memory rounds


@STREAMS
@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "depot_code"}}},
        {"tool_choice": "required", "parallel_tool_calls": False},
    ],
    ids=["required", "named", "required, not parallel"],
)
async def test_forced_calls(
    stage: Stage, client_class: str, stream: bool, fields: dict[str, Any]
) -> None:
    async def run(url: str, key: str) -> Any:
        messages = [*opening(), user(AGENT_QUESTION)]
        return await ask(
            client(client_class, url, key), messages, stream, tools=TOOL_SCHEMAS, **fields
        )

    await check_same(stage, "forced call", run, faults=False)


@STREAMS
async def test_headers(stage: Stage, client_class: str, stream: bool) -> None:
    """The raw response's headers: the provider's, and none of them changed."""

    async def run(url: str, key: str) -> Any:
        raw = client(client_class, url, key).chat.completions.with_raw_response
        asked = {"model": MODEL, "messages": [*opening(), user(QUESTIONS[0])], "stream": stream}
        seen = []
        for _ in SCENES["talk"]:
            reply = await value(raw.create(**asked))
            kept = {k: v for k, v in reply.headers.items() if k.startswith(("openai-", "x-r"))}
            seen.append([kept, reply.headers["content-type"], reply.status_code, reply.request_id])
            parsed = await value(reply.parse())
            if stream:
                assert [chunk async for chunk in items(parsed)]
        return seen

    assert (await check_same(stage, "talk", run))[0][3] == "req_0123456789"
