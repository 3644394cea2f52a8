"""What goes wrong upstream reaches OpenAI's Python client through llm-pager as it does directly."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.openai_client import (
    BOTH,
    STREAMS,
    Report,
    ask,
    client,
    openai,
    parsed,
    streamed,
    told,
)
from tests.clients.scenes import (
    LONG_TEXT,
    MODEL,
    QUESTIONS,
    REPORT_QUESTION,
    SCENES,
    opening,
    user,
)
from tests.clients.stage import (
    Run,
    Stage,
    both,
    check_same,
    items,
    value,
)

pytestmark = BOTH


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
                final, events = await (parsed if helper == "parse" else streamed)(
                    completions, asked
                )
                message = final.choices[0].message
                seen.append([events, message.refusal, message.content or None, message.parsed is None])
            except openai.LengthFinishReasonError as e:
                seen.append([type(e).__name__, e.completion.choices[0].message.content])
        return seen

    await check_same(stage, scene, run)


async def test_client_that_leaves_early(stage: Stage, client_class: str) -> None:
    """It reads the beginning of a stream, closes it and asks something else."""

    async def run(url: str, key: str) -> Any:
        made, text = client(client_class, url, key), ""
        asked = {"model": MODEL, "messages": [*opening(), user(QUESTIONS[0])], "stream": True}
        stream = await value(made.chat.completions.create(**asked))
        async for chunk in items(stream):
            text += chunk.choices[0].delta.content or ""
            if len(text) > 20:
                break
        await value(stream.close())
        assert (LONG_TEXT * 20).startswith(text)
        return await ask(made, [*opening(), user(QUESTIONS[1])], True)

    await check_same(stage, "left", run)


@STREAMS
@pytest.mark.parametrize("scene", ["limited", "limited later", "failed later", "dropped later"])
async def test_error_is_retried_by_the_client(
    stage: Stage, client_class: str, stream: bool, scene: str
) -> None:
    async def run(url: str, key: str) -> Any:
        made = client(client_class, url, key, max_retries=3)
        return await ask(made, [*opening(), user(QUESTIONS[0])], stream)

    await check_same(stage, scene, run)


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
async def test_errors(
    stage: Stage, client_class: str, stream: bool, scene: str, error: str
) -> None:
    run = refused(client_class, stream)
    if not (stream and scene.endswith("later")):
        assert (await check_same(stage, scene, run))[0] == error
        return
    # A stream's status line leaves when upstream's first round answers, so that the client sees life
    # while memory rounds go on. An error that stays in a later round can then only be an event: the
    # client raises its base class, with upstream's message and code but without the status.
    expected, seen = await both(stage, scene, run)
    assert expected[0] == error
    assert seen[0] == "APIError" and seen[1] in expected[1]
    assert seen[2:] == expected[2:4]  # code and param


def refused(client_class: str, stream: bool) -> Run:
    async def run(url: str, key: str) -> Any:
        made, messages = client(client_class, url, key), [*opening(), user(QUESTIONS[0])]
        try:
            return await ask(made, messages, stream)
        except openai.OpenAIError as e:
            return told(e)

    return run


@pytest.mark.parametrize("scene", ["broken", "broken later", "late error"])
async def test_stream_that_ends_badly(stage: Stage, client_class: str, scene: str) -> None:
    """The same exception, nothing that was not said, and the next try goes well."""
    await check_same(stage, scene, ends_badly(client_class))


def ends_badly(client_class: str) -> Run:
    async def run(url: str, key: str) -> Any:
        made, messages = client(client_class, url, key), [*opening(), user(QUESTIONS[0])]
        try:
            first = await ask(made, messages, True)
        except Exception as e:  # which one it is is compared  # noqa: BLE001
            first = [type(e).__module__, *told(e)]
        return [first, await ask(made, messages, True)]

    return run
