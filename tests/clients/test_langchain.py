"""LangChain's ChatOpenAI sees no difference between llm-pager and upstream."""

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
    opening,
    opening_with_pictures,
    picture,
    user,
    user_with_picture,
)
from tests.clients.stage import Library, Stage, check_same

pytestmark = pytest.mark.asyncio(loop_scope="module")  # LangChain shares connections by base URL
langchain_openai = Library("langchain_openai", "langchain-openai")
langchain_messages = Library("langchain_core.messages", "langchain-openai")
langchain_tools = Library("langchain_core.tools", "langchain-openai")
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Report(BaseModel):
    """A report on a depot."""

    depot: int
    code: str
    notes: list[str]


def chat(url: str, key: str, **fields: Any) -> Any:
    fields = {"max_retries": 0, "stream_usage": True, **fields}
    return langchain_openai.ChatOpenAI(
        model=MODEL, base_url=url, api_key=key, timeout=20, use_responses_api=False, **fields
    )


async def ask(model: Any, messages: list[Any], stream: bool) -> Any:
    """The answer as one AIMessage."""
    if not stream:
        return await model.ainvoke(messages)
    whole = None
    async for chunk in model.astream(messages):
        whole = chunk if whole is None else whole + chunk
    return whole


def seen_of(message: Any) -> list[Any]:
    """All that LangChain makes of an answer, but ids and counts."""
    metadata = {
        k: v for k, v in message.response_metadata.items() if k not in ("token_usage", "id")
    }
    counts = sorted(message.usage_metadata or ())
    extra = {k: v for k, v in message.additional_kwargs.items() if k != "parsed"}
    return [message.text, message.tool_calls, message.invalid_tool_calls, metadata, counts, extra]


@STREAMS
async def test_talk(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        model, messages, seen = chat(url, key), langchain_messages.convert_to_messages(opening()), []
        for question in QUESTIONS:
            messages += langchain_messages.convert_to_messages([user(question)])
            messages.append(await ask(model, messages, stream))
            seen.append(seen_of(messages[-1]))
        return seen

    await check_same(stage, "talk", run)


@STREAMS
async def test_agent(stage: Stage, stream: bool) -> None:
    """bind_tools, and the loop around it: parallel calls, then one more."""

    async def run(url: str, key: str) -> Any:
        tools = [langchain_tools.tool(function) for function in FUNCTIONS.values()]
        model, by_name = chat(url, key).bind_tools(tools), {t.name: t for t in tools}
        messages, seen = langchain_messages.convert_to_messages([*opening(), user(AGENT_QUESTION)]), []
        for _ in SCENES["agent"]:
            messages.append(await ask(model, messages, stream))
            seen.append(seen_of(messages[-1]))
            for made in messages[-1].tool_calls:
                messages.append(await by_name[made["name"]].ainvoke(made))
                seen.append(messages[-1].content)
        return seen

    seen = await check_same(stage, "agent", run)
    assert [c["name"] for c in seen[0][1]] == ["weather", "weather"]


async def test_structured_output_as_json_schema(stage: Stage) -> None:
    async def run(url: str, key: str) -> Any:
        model = chat(url, key).with_structured_output(Report, include_raw=True)
        messages, seen = langchain_messages.convert_to_messages(opening()), []
        for _ in SCENES["report"]:
            messages += langchain_messages.convert_to_messages([user(REPORT_QUESTION)])
            found = await model.ainvoke(messages)
            messages.append(found["raw"])
            seen.append([found["parsed"].model_dump(), found["parsing_error"]])
        return seen

    assert (await check_same(stage, "report", run))[0][0] == REPORT


async def test_structured_output_streamed(stage: Stage) -> None:
    async def run(url: str, key: str) -> Any:
        model = chat(url, key).with_structured_output(Report)
        messages, seen = langchain_messages.convert_to_messages(opening()), []
        for _ in SCENES["report"]:
            messages += langchain_messages.convert_to_messages([user(REPORT_QUESTION)])
            seen.append([found.model_dump() async for found in model.astream(messages)][-1])
        return seen

    assert (await check_same(stage, "report", run))[0] == REPORT


@STREAMS
async def test_structured_output_as_forced_tool(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        model = chat(url, key).with_structured_output(Report, method="function_calling")
        messages = langchain_messages.convert_to_messages([*opening(), user(REPORT_QUESTION)])
        return (await ask_parsed(model, messages, stream)).model_dump()

    assert await check_same(stage, "forced", run, faults=False) == REPORT


async def ask_parsed(model: Any, messages: list[Any], stream: bool) -> Any:
    if stream:
        return [found async for found in model.astream(messages)][-1]
    return await model.ainvoke(messages)


@STREAMS
async def test_images(stage: Stage, stream: bool) -> None:
    async def run(url: str, key: str) -> Any:
        model, messages, seen = chat(url, key), langchain_messages.convert_to_messages(opening_with_pictures()), []
        for blue in (0, 255):
            asked = user_with_picture("What is this?", picture(255 - blue, 0, blue))
            messages += langchain_messages.convert_to_messages([asked])
            messages.append(await ask(model, messages, stream))
            seen.append(seen_of(messages[-1]))
        return seen

    await check_same(stage, "images", run)


@STREAMS
@pytest.mark.parametrize("scene", ["limited", "limited later", "failed later"])
async def test_error_is_retried_by_the_client(stage: Stage, stream: bool, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        messages = langchain_messages.convert_to_messages([*opening(), user(QUESTIONS[0])])
        return seen_of(await ask(chat(url, key, max_retries=3), messages, stream))

    await check_same(stage, scene, run)


@STREAMS
@pytest.mark.parametrize(
    "scene, status", [("always limited", 429), ("refused", 400)], ids=["429", "400"]
)
async def test_errors(stage: Stage, stream: bool, scene: str, status: int) -> None:
    async def run(url: str, key: str) -> Any:
        try:
            messages = langchain_messages.convert_to_messages([*opening(), user(QUESTIONS[0])])
            return seen_of(await ask(chat(url, key), messages, stream))
        except openai.APIStatusError as e:
            return [e.status_code, type(e).__name__, str(e), e.body, e.code, e.request_id]

    assert (await check_same(stage, scene, run))[0] == status


@pytest.mark.parametrize("scene", ["broken", "late error"])
async def test_stream_that_ends_badly(stage: Stage, scene: str) -> None:
    async def run(url: str, key: str) -> Any:
        model, messages = chat(url, key), langchain_messages.convert_to_messages([*opening(), user(QUESTIONS[0])])
        with pytest.raises(Exception) as caught:  # which one it is is compared
            await ask(model, messages, True)
        error = [type(caught.value).__module__, type(caught.value).__name__, str(caught.value)]
        return [error, seen_of(await ask(model, messages, True))]

    await check_same(stage, scene, run)
