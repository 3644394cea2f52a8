"""OpenAI's own Python client, sync and async, sees no difference between llm-pager and upstream."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from tests.clients.scenes import (
    AGENT_QUESTION,
    FUNCTIONS,
    MODEL,
    QUESTIONS,
    REPORT,
    REPORT_QUESTION,
    REPORT_SCHEMA,
    SCENES,
    TOOL_SCHEMAS,
    Message,
    opening,
    opening_with_pictures,
    picture,
    user,
    user_with_picture,
)
from tests.clients.stage import Run, Stage, items, same, usage_fields, value

openai = pytest.importorskip("openai", reason="openai is not installed: pip install '.[clients]'")
from pydantic import BaseModel  # noqa: E402 (after the check)

pytestmark = pytest.mark.parametrize("client_class", ["OpenAI", "AsyncOpenAI"])
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Report(BaseModel):
    depot: int
    code: str
    notes: list[str]


def client(name: str, url: str, key: str, max_retries: int = 0) -> Any:
    made = getattr(openai, name)
    return made(base_url=url, api_key=key, max_retries=max_retries, timeout=20)


def shape(chunk: Any) -> list[Any]:
    """A chunk without its id and its text: what a strict reader of streams depends on."""
    head = [chunk.object, chunk.created, chunk.model, chunk.system_fingerprint]
    for choice in chunk.choices:
        delta = choice.delta.model_dump(exclude_unset=True)
        calls = delta.pop("tool_calls", None) or []
        kinds = [[c["index"], sorted(c), sorted(c["function"])] for c in calls]
        head.append([choice.index, delta.get("role"), sorted(delta), kinds, choice.finish_reason])
    extra = usage_fields(chunk.usage) if chunk.usage else None
    return [*head, sorted(chunk.model_fields_set - {"usage"}), extra, "usage" in chunk.model_fields_set]


def collapsed(shapes: list[Any]) -> list[Any]:
    """Equal neighbours once: where a text is cut is nobody's business."""
    return [s for i, s in enumerate(shapes) if i == 0 or shapes[i - 1] != s]


async def ask(made: Any, messages: list[Message], stream: bool, **fields: Any) -> tuple[Message, Any]:
    """One request: the message to echo, and what else was seen."""
    if not stream:
        reply = await value(
            made.chat.completions.create(model=MODEL, messages=messages, **fields)
        )
        choice = reply.choices[0]
        message = choice.message.model_dump(exclude_none=True)
        whole = reply.model_dump(exclude_unset=True, exclude={"id", "usage"})
        return message, [whole, usage_fields(reply.usage)]
    seen = await value(
        made.chat.completions.create(model=MODEL, messages=messages, stream=True, **fields)
    )
    message = {"role": "assistant", "content": None}
    calls: dict[int, Message] = {}
    shapes, names = [], set()
    async for chunk in items(seen):
        shapes.append(shape(chunk))
        names.add(chunk.id)
        for choice in chunk.choices:
            if choice.delta.content:
                message["content"] = (message["content"] or "") + choice.delta.content
            for part in choice.delta.tool_calls or ():
                entry = calls.setdefault(part.index, part.model_dump(exclude_none=True))
                if entry["id"] != part.id and part.id is None:
                    entry["function"]["arguments"] += part.function.arguments
    if calls:
        message["tool_calls"] = [
            {k: v for k, v in calls[i].items() if k != "index"} for i in sorted(calls)
        ]
    assert len(names) == 1, "one stream, one id"
    return message, [message, collapsed(shapes)]


def echo(message: Any) -> Message:
    """A parsed message as the API takes it: the helpers leave deltas' fields in it."""
    made = {"role": "assistant", "content": message.content}
    for c in message.tool_calls or ():
        function = {"name": c.function.name, "arguments": c.function.arguments}
        calls = made.setdefault("tool_calls", [])
        calls.append({"id": c.id, "type": "function", "function": function})
    return made


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


@STREAMS
@pytest.mark.parametrize("include_usage", [None, False, True])
async def test_talk(
    stage: Stage, client_class: str, stream: bool, include_usage: bool | None
) -> None:
    fields = {}
    if include_usage is not None:
        if not stream:
            pytest.skip("stream_options belong to streams")
        fields["stream_options"] = {"include_usage": include_usage}

    async def run(url: str, key: str) -> Any:
        made, messages, seen = client(client_class, url, key), opening(), []
        for question in QUESTIONS:
            messages.append(user(question))
            message, what = await ask(made, messages, stream, **fields)
            messages.append(message)
            seen.append(what)
        return [messages, seen]

    messages, _ = await same(stage, "talk", run)
    assert messages[-1]["content"] == SCENES["talk"][-1].reply["content"]  # type: ignore[index]


@STREAMS
async def test_agent(stage: Stage, client_class: str, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        return await agent(client(client_class, url, key), stream)

    messages, _ = await same(stage, "agent", run)
    assert [len(m.get("tool_calls", ())) for m in messages if m["role"] == "assistant"][-3:] == [2, 1, 0]


async def test_stream_helper_with_tools(stage: Stage, client_class: str) -> None:
    """`chat.completions.stream`: the same events, and the same completion that they add up to."""
    strict = [
        {**t, "function": {**t["function"], "strict": True}} for t in TOOL_SCHEMAS
    ]

    async def run(url: str, key: str) -> Any:
        made, messages, seen = client(client_class, url, key), [*opening(), user(AGENT_QUESTION)], []
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

    await same(stage, "agent", run)


@STREAMS
async def test_structured_output_as_json_schema(stage: Stage, client_class: str, stream: bool) -> None:
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

    seen = await same(stage, "report", run)
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

    seen = await same(stage, "report", run)
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

    await same(stage, "images", run)


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

    await same(stage, "choices", run, faults=False)


@pytest.mark.parametrize("helper", ["parse", "stream"])
@pytest.mark.parametrize("scene", ["declined", "cut off"])
async def test_answers_that_cannot_be_parsed(
    stage: Stage, client_class: str, helper: str, scene: str
) -> None:
    async def run(url: str, key: str) -> Any:
        completions, seen = client(client_class, url, key).chat.completions, []
        messages = [*opening(), user(REPORT_QUESTION)]
        for _ in SCENES[scene]:
            try:
                asked = {"model": MODEL, "messages": messages, "response_format": Report}
                final, events = await (parsed if helper == "parse" else streamed)(completions, asked)
                message = final.choices[0].message
                seen.append([events, message.refusal, message.content, message.parsed is None])
            except openai.LengthFinishReasonError as e:
                seen.append([type(e).__name__, e.completion.choices[0].message.content])
        return seen

    await same(stage, scene, run)


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

    assert (await same(stage, "talk", run))[0][3] == "req_0123456789"


async def parsed(completions: Any, asked: dict[str, Any]) -> tuple[Any, list[str]]:
    return await value(completions.parse(**asked)), []


async def streamed(completions: Any, asked: dict[str, Any]) -> tuple[Any, list[str]]:
    """The stream helper: its completion, and the kinds of its events."""
    events = []
    async with contextlib.AsyncExitStack() as stack:
        manager = completions.stream(**asked)
        if hasattr(manager, "__aenter__"):
            entered = await stack.enter_async_context(manager)
        else:
            entered = stack.enter_context(manager)
        async for event in items(entered):
            events.append(event.type)
        return await value(entered.get_final_completion()), collapsed(events)


def told(e: Any) -> list[Any]:
    """All that a program can read from an exception of the client."""
    out = [type(e).__name__, str(e), getattr(e, "code", None), getattr(e, "param", None)]
    if isinstance(e, openai.APIStatusError):
        out += [e.status_code, e.body, e.request_id, e.response.headers.get("retry-after-ms")]
    return out


@STREAMS
@pytest.mark.parametrize(
    "scene", ["limited", "limited later", "failed later", "dropped later"]
)
async def test_error_is_retried_by_the_client(
    stage: Stage, client_class: str, stream: bool, scene: str
) -> None:
    async def run(url: str, key: str) -> Any:
        made = client(client_class, url, key, max_retries=3)
        return await ask(made, [*opening(), user(QUESTIONS[0])], stream)

    await same(stage, scene, run)


@STREAMS
@pytest.mark.parametrize(
    "scene, error",
    [
        ("always limited", "RateLimitError"),
        ("always limited later", "RateLimitError"),
        ("refused", "BadRequestError"),
        ("refused later", "BadRequestError"),
    ],
)
async def test_errors(stage: Stage, client_class: str, stream: bool, scene: str, error: str) -> None:
    async def run(url: str, key: str) -> Any:
        try:
            return await ask(client(client_class, url, key), [*opening(), user(QUESTIONS[0])], stream)
        except openai.OpenAIError as e:
            return told(e)

    assert (await same(stage, scene, run))[0] == error


@pytest.mark.parametrize("scene", ["broken", "broken later", "late error"])
async def test_stream_that_ends_badly(stage: Stage, client_class: str, scene: str) -> None:
    """The same exception, nothing that was not said, and the next try goes well."""
    await same(stage, scene, ends_badly(client_class))


def ends_badly(client_class: str) -> Run:
    async def run(url: str, key: str) -> Any:
        made, messages = client(client_class, url, key), [*opening(), user(QUESTIONS[0])]
        try:
            first = await ask(made, messages, True)
        except Exception as e:  # noqa: BLE001 (which one it is is compared)
            first = [type(e).__module__, *told(e)]
        return [first, await ask(made, messages, True)]

    return run
