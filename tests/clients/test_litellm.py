"""litellm as a client sees no difference between llm-pager and upstream."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.scenes import (
    AGENT_QUESTION,
    FUNCTIONS,
    MODEL,
    QUESTIONS,
    REPORT,
    REPORT_QUESTION,
    SCENES,
    TOOL_SCHEMAS,
    Message,
    opening,
    opening_with_pictures,
    picture,
    user,
    user_with_picture,
)
from tests.clients.stage import Library, Stage, check_same, usage_fields

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),  # litellm keeps its connections between calls
    pytest.mark.filterwarnings("ignore:::litellm"),
]
litellm = Library("litellm", "litellm")
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Report(BaseModel):
    depot: int
    code: str
    notes: list[str]


async def ask(
    url: str, key: str, messages: list[Message], stream: bool, **fields: Any
) -> tuple[Message, Any]:
    """One request: the message to echo, and what else was seen."""
    asked = {"max_retries": 0, **fields}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    reply = await litellm.acompletion(
        model=f"openai/{MODEL}", api_base=url, api_key=key, messages=messages, timeout=20, **asked
    )
    if stream:
        chunks = [chunk async for chunk in reply]
        assert len({chunk.id for chunk in chunks}) == 1
        reply = litellm.stream_chunk_builder(chunks, messages=messages)
    choice = reply.choices[0]
    message = choice.message.model_dump(exclude_none=True)
    message.pop("provider_specific_fields", None)
    seen = [message, choice.finish_reason, reply.model, reply.object, usage_fields(reply.usage)]
    return message, seen


@STREAMS
async def test_talk(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        messages, seen = opening(), []
        for question in QUESTIONS:
            messages.append(user(question))
            message, what = await ask(url, key, messages, stream)
            messages.append(message)
            seen.append(what)
        return seen

    await check_same(stage, "talk", run)


@STREAMS
async def test_agent(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        messages, seen = [*opening(), user(AGENT_QUESTION)], []
        for _ in SCENES["agent"]:
            message, what = await ask(url, key, messages, stream, tools=TOOL_SCHEMAS)
            messages.append(message)
            seen.append(what)
            for c in message.get("tool_calls") or ():
                result = FUNCTIONS[c["function"]["name"]](**json.loads(c["function"]["arguments"]))
                messages.append({"role": "tool", "tool_call_id": c["id"], "content": result})
        return seen

    seen = await check_same(stage, "agent", run)
    assert [len(what[0].get("tool_calls") or ()) for what in seen] == [2, 1, 0]


@STREAMS
async def test_structured_output(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        messages, seen = opening(), []
        for _ in SCENES["report"]:
            messages.append(user(REPORT_QUESTION))
            message, what = await ask(url, key, messages, stream, response_format=Report)
            messages.append(message)
            seen.append([Report.model_validate_json(message["content"]).model_dump(), what])
        return seen

    assert (await check_same(stage, "report", run))[0][0] == REPORT


@STREAMS
async def test_images(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        messages, seen = opening_with_pictures(), []
        for blue in (0, 255):
            messages.append(user_with_picture("What is this?", picture(255 - blue, 0, blue)))
            message, what = await ask(url, key, messages, stream)
            messages.append(message)
            seen.append(what)
        return seen

    await check_same(stage, "images", run)


@STREAMS
@pytest.mark.parametrize("scene", ["limited", "limited later", "failed later"])
async def test_error_is_retried_by_the_client(stage: Stage, stream: bool, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        return await ask(url, key, [*opening(), user(QUESTIONS[0])], stream, max_retries=3)

    await check_same(stage, scene, run)


@STREAMS
@pytest.mark.parametrize(
    "scene, error", [("always limited", "RateLimitError"), ("refused", "BadRequestError")]
)
async def test_errors(stage: Stage, stream: bool, scene: str, error: str) -> None:
    async def run(url: str, key: str) -> Any:
        try:
            return await ask(url, key, [*opening(), user(QUESTIONS[0])], stream)
        except openai.APIStatusError as e:  # litellm's own are made from these
            return [type(e).__name__, str(e), e.status_code, e.body]

    assert (await check_same(stage, scene, run))[0] == error


@pytest.mark.parametrize("scene", ["broken", "late error"])
async def test_stream_that_ends_badly(stage: Stage, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        messages = [*opening(), user(QUESTIONS[0])]
        with pytest.raises(Exception) as caught:  # which one it is is compared
            await ask(url, key, messages, True)
        error = [type(caught.value).__name__, str(caught.value)]
        return [error, await ask(url, key, messages, True)]

    await check_same(stage, scene, run)
