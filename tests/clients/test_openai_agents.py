"""Agents of the OpenAI Agents SDK run through llm-pager as they run on upstream."""

from __future__ import annotations

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
    SYSTEM,
    Message,
    opening,
    opening_with_pictures,
    picture,
    user,
)
from tests.clients.stage import Library, Stage, check_same

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the clients close their connections late
agents = Library("agents", "openai-agents")
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Report(BaseModel):
    depot: int
    code: str
    notes: list[str]


def agent(url: str, key: str, retries: int = 0, **fields: Any) -> Any:
    agents.set_tracing_disabled(True)  # no trace leaves this machine
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=retries, timeout=20)
    model = agents.OpenAIChatCompletionsModel(MODEL, openai_client=client)
    settings = agents.ModelSettings(include_usage=True)
    return agents.Agent(
        name="keeper", instructions=SYSTEM, model=model, model_settings=settings, **fields
    )


def tools() -> list[Any]:
    return [agents.function_tool(function) for function in FUNCTIONS.values()]


def inputs(messages: list[Message]) -> list[Any]:
    """Messages as the SDK takes them: the system message is the agent's instructions."""
    out = []
    for message in messages:
        if message["role"] == "system":
            continue
        content = message["content"]
        if isinstance(content, list):
            picture_part = {
                "type": "input_image",
                "image_url": content[1]["image_url"]["url"],
                "detail": "low",
            }
            content = [{"type": "input_text", "text": content[0]["text"]}, picture_part]
        out.append({"role": message["role"], "content": content})
    return out


async def play(made: Any, asked: list[Any], stream: bool) -> tuple[Any, list[Any]]:
    """A run to its end: its result, and everything that it went through."""
    seen: list[Any] = []
    if stream:
        result = agents.Runner.run_streamed(made, asked)
        async for event in result.stream_events():
            if event.type == "run_item_stream_event":
                seen.append([event.name, event.item.type])
            elif event.type == "raw_response_event" and seen[-1:] != [event.data.type]:
                seen.append(event.data.type)
    else:
        result = await agents.Runner.run(made, asked)
    for item in result.new_items:
        raw = item.raw_item if isinstance(item.raw_item, dict) else item.raw_item.model_dump()
        kept = ("name", "arguments", "call_id", "output", "content", "role", "status")
        seen.append([item.type, {k: raw[k] for k in kept if k in raw}])
    usage = result.context_wrapper.usage
    assert usage.input_tokens + usage.output_tokens == usage.total_tokens > 0
    seen.append(usage.requests)
    return result, seen


@STREAMS
async def test_talk(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made, asked, seen = agent(url, key), inputs(opening()), []
        for question in QUESTIONS:
            result, what = await play(made, [*asked, user(question)], stream)
            asked = result.to_input_list()
            seen.append([result.final_output, what])
        return seen

    await check_same(stage, "talk", run)


@STREAMS
async def test_agent(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made = agent(url, key, tools=tools())
        result, what = await play(made, inputs([*opening(), user(AGENT_QUESTION)]), stream)
        return [result.final_output, what]

    final, what = await check_same(stage, "agent", run)
    assert final == "Both are 4 degrees; the code is 23757."
    assert what[-1] == 3  # requests, as the SDK counts them


@STREAMS
async def test_agent_with_output_type(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made = agent(url, key, tools=tools(), output_type=Report)
        result, what = await play(made, inputs([*opening(), user(AGENT_QUESTION)]), stream)
        assert isinstance(result.final_output, Report)
        return [result.final_output.model_dump(), what]

    assert (await check_same(stage, "agent report", run))[0] == REPORT


@STREAMS
async def test_images(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made, asked, seen = agent(url, key), inputs(opening_with_pictures()), []
        for blue in (0, 255):
            parts = [
                {"type": "input_text", "text": "What is this?"},
                {"type": "input_image", "image_url": picture(255 - blue, 0, blue), "detail": "low"},
            ]
            result, what = await play(made, [*asked, {"role": "user", "content": parts}], stream)
            asked = result.to_input_list()
            seen.append([result.final_output, what])
        return seen

    await check_same(stage, "images", run)


@STREAMS
@pytest.mark.parametrize("scene", ["limited", "limited later", "failed later"])
async def test_error_is_retried_by_the_client(stage: Stage, stream: bool, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        made = agent(url, key, retries=3)
        return (await play(made, inputs([*opening(), user(QUESTIONS[0])]), stream))[1]

    await check_same(stage, scene, run)


@STREAMS
@pytest.mark.parametrize(
    "scene, status", [("always limited", 429), ("refused", 400)], ids=["429", "400"]
)
async def test_errors(stage: Stage, stream: bool, scene: str, status: int) -> None:
    async def run(url: str, key: str) -> Any:
        with pytest.raises(openai.APIStatusError) as caught:
            await play(agent(url, key), inputs([*opening(), user(QUESTIONS[0])]), stream)
        e = caught.value
        return [e.status_code, type(e).__name__, str(e), e.body, e.code, e.request_id]

    assert (await check_same(stage, scene, run))[0] == status


@pytest.mark.parametrize("scene", ["broken", "late error"])
async def test_stream_that_ends_badly(stage: Stage, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        made, asked = agent(url, key), inputs([*opening(), user(QUESTIONS[0])])
        with pytest.raises(Exception) as caught:  # which one it is is compared
            await play(made, asked, True)
        error = [type(caught.value).__module__, type(caught.value).__name__, str(caught.value)]
        return [error, (await play(made, asked, True))[1]]

    await check_same(stage, scene, run)
