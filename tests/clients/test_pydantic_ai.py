"""Agents of Pydantic AI run through llm-pager as they run on upstream."""

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
    REPORT_QUESTION,
    SCENES,
    SYSTEM,
    Message,
    opening,
    opening_with_pictures,
    picture,
)
from tests.clients.stage import Library, Stage, check_same

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the clients close their connections late
pydantic_ai, parts, models, providers = (
    Library(module, "pydantic-ai-slim[openai]")
    for module in ("pydantic_ai", "pydantic_ai.messages", "pydantic_ai.models.openai", "pydantic_ai.providers.openai")
)
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Report(BaseModel):
    depot: int
    code: str
    notes: list[str]


def agent(url: str, key: str, retries: int = 0, **fields: Any) -> Any:
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=retries, timeout=20)
    model = models.OpenAIChatModel(MODEL, provider=providers.OpenAIProvider(openai_client=client))
    return pydantic_ai.Agent(model, instructions=SYSTEM, **fields)


def past(messages: list[Message]) -> list[Any]:
    """Messages as Pydantic AI keeps them."""
    out: list[Any] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            out.append(parts.ModelResponse(parts=[parts.TextPart(content)]))
        elif message["role"] == "user":
            if isinstance(content, list):
                content = [content[0]["text"], pydantic_ai.ImageUrl(content[1]["image_url"]["url"])]
            out.append(parts.ModelRequest(parts=[parts.UserPromptPart(content)]))
    return out


def seen_of(result: Any) -> list[Any]:
    """Every part of the run's new messages, and the names of the counts."""
    seen: list[Any] = []
    for message in result.new_messages():
        for part in message.parts:
            content = getattr(part, "content", None)
            called = [getattr(part, k, None) for k in ("tool_name", "args", "tool_call_id")]
            seen.append([part.part_kind, repr(content), called])
        if message.kind == "response":
            seen.append([message.model_name, message.finish_reason, message.usage.total_tokens > 0])
    return [*seen, result.usage.requests, result.usage.tool_calls]


def collapsed(kinds: list[str]) -> list[str]:
    """Equal neighbours once: where a text is cut is nobody's business."""
    return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


async def play(
    made: Any, prompt: Any, history: list[Any], stream: bool
) -> tuple[Any, list[Any], Any]:
    """A run to its end: its output, what it went through, and the result with its messages."""
    if not stream:
        result = await made.run(prompt, message_history=history)
        return result.output, seen_of(result), result
    async with made.run_stream(prompt, message_history=history) as result:
        outputs = [output async for output in result.stream_output(debounce_by=None)]
        return outputs[-1], seen_of(result), result


@STREAMS
async def test_talk(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made, history, seen = agent(url, key), past(opening()), []
        for question in QUESTIONS:
            output, what, result = await play(made, question, history, stream)
            history = result.all_messages()
            seen.append([output, what])
        return seen

    seen = await check_same(stage, "talk", run)
    assert seen[-1][0] == SCENES["talk"][-1].reply["content"]  # type: ignore[index]


@STREAMS
async def test_agent(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        """`run_stream` ends at the first text, which the model says beside a call; this goes on."""
        made, events = agent(url, key, tools=list(FUNCTIONS.values())), []

        async def watch(_: Any, streamed: Any) -> None:
            events.extend([event.event_kind async for event in streamed])

        asked = {"event_stream_handler": watch} if stream else {}
        result = await made.run(AGENT_QUESTION, message_history=past(opening()), **asked)
        assert bool(events) is stream
        return [result.output, seen_of(result), collapsed(events)]

    assert (await check_same(stage, "agent", run))[0] == "Both are 4 degrees; the code is 23757."


@STREAMS
async def test_output_type_as_json_schema(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made = agent(url, key, output_type=pydantic_ai.NativeOutput(Report))
        history, seen = past(opening()), []
        for _ in SCENES["report"]:
            output, what, result = await play(made, REPORT_QUESTION, history, stream)
            history = result.all_messages()
            seen.append([output.model_dump(), what])
        return seen

    assert (await check_same(stage, "report", run))[0][0] == REPORT


@STREAMS
async def test_output_type_as_tool(stage: Stage, stream: bool) -> None:
    """Pydantic AI's default: every request says `tool_choice: required`."""

    async def run(url: str, key: str) -> Any:
        made = agent(url, key, tools=list(FUNCTIONS.values()), output_type=Report)
        output, what, _ = await play(made, AGENT_QUESTION, past(opening()), stream)
        return [output.model_dump(), what]

    assert (await check_same(stage, "output tool", run, faults=False))[0] == REPORT


@STREAMS
async def test_images(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        made, history, seen = agent(url, key), past(opening_with_pictures()), []
        for blue in (0, 255):
            prompt = ["What is this?", pydantic_ai.ImageUrl(picture(255 - blue, 0, blue))]
            output, what, result = await play(made, prompt, history, stream)
            history = result.all_messages()
            seen.append([output, what])
        return seen

    await check_same(stage, "images", run)


@STREAMS
@pytest.mark.parametrize("scene", ["limited", "limited later", "failed later"])
async def test_error_is_retried_by_the_client(stage: Stage, stream: bool, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        made = agent(url, key, retries=3)
        return (await play(made, QUESTIONS[0], past(opening()), stream))[:2]

    await check_same(stage, scene, run)


@STREAMS
@pytest.mark.parametrize(
    "scene, status", [("always limited", 429), ("refused", 400)], ids=["429", "400"]
)
async def test_errors(stage: Stage, stream: bool, scene: str, status: int) -> None:
    async def run(url: str, key: str) -> Any:
        with pytest.raises(pydantic_ai.ModelHTTPError) as caught:
            await play(agent(url, key), QUESTIONS[0], past(opening()), stream)
        e = caught.value
        return [e.status_code, e.body, str(e), e.model_name]

    assert (await check_same(stage, scene, run))[0] == status


@pytest.mark.parametrize("scene", ["broken", "late error"])
async def test_stream_that_ends_badly(stage: Stage, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        made = agent(url, key)
        with pytest.raises(Exception) as caught:  # which one it is is compared
            await play(made, QUESTIONS[0], past(opening()), True)
        error = [type(caught.value).__module__, type(caught.value).__name__, str(caught.value)]
        return [error, (await play(made, QUESTIONS[0], past(opening()), True))[:2]]

    await check_same(stage, scene, run)
