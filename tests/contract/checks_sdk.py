"""The official Python client in front: it gets what it gets from upstream itself."""

from __future__ import annotations

import json
from typing import Any

from openai import APIError, BadRequestError, RateLimitError
from pydantic import BaseModel

from tests.contract import say
from tests.contract.model import ALL, BOTH, SHORT, STREAMS, Failed, check, equal, expect
from tests.contract.play import Play


class Depot(BaseModel):
    code: str


@check("sdk.answer", "an answer, whole and streamed", ALL)
async def answer(play: Play) -> None:
    play.says(say.text("The code is amber."))
    async with play.sdk() as client:
        sent: Any = {"model": play.target.model, "messages": play.ask()}
        if play.stream:
            text = ""
            async for chunk in await client.chat.completions.create(stream=True, **sent):
                text += chunk.choices[0].delta.content or ""
        else:
            made = await client.chat.completions.create(**sent)
            text = made.choices[0].message.content or ""
    equal(text, "The code is amber.", "the text")


@check("sdk.stream_helper", "the stream helper's final completion, with usage", STREAMS)
async def stream_helper(play: Play) -> None:
    calls = [say.call("call_1", "look", '{"word": "é"}'), say.call("call_2", "look")]
    play.says(say.calling(*calls, content="Let me see."))
    tools: Any = [say.tool("look", strict=True)]
    play.script.client_tools.add("look")
    messages: Any = play.ask()
    async with play.sdk() as client:
        async with client.chat.completions.stream(
            model=play.target.model, messages=messages, tools=tools,
            stream_options={"include_usage": True},
        ) as stream:
            done = await stream.get_final_completion()
    message = done.choices[0].message
    got = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    wanted = [(c["id"], "look", c["function"]["arguments"]) for c in calls]
    equal(got, wanted, "the tool calls")
    equal(message.content, "Let me see.", "the text")
    expect(done.usage is not None and done.usage.prompt_tokens > 0, "usage is missing")


@check("sdk.parse", "structured output parses", ALL)
async def parse(play: Play) -> None:
    play.says(say.text(json.dumps({"code": "amber"})))
    sent: Any = {"model": play.target.model, "messages": play.ask(), "response_format": Depot}
    async with play.sdk() as client:
        if play.stream:
            async with client.chat.completions.stream(**sent) as stream:
                parsed: Any = (await stream.get_final_completion()).choices[0].message.parsed
        else:
            parsed = (await client.chat.completions.parse(**sent)).choices[0].message.parsed
    equal(parsed, Depot(code="amber"), "the parsed object")


@check("sdk.retries", "its own retries work: 429 with retry-after-ms, then the answer", BOTH)
async def retries(play: Play) -> None:
    play.says(
        say.error(429, "Slow down.", headers=((b"retry-after-ms", b"10"),)), say.text("Yes."), inner=0
    )
    messages: Any = play.ask()
    async with play.sdk(max_retries=2) as client:
        made = await client.chat.completions.create(model=play.target.model, messages=messages)
    equal(made.choices[0].message.content, "Yes.", "the text")
    equal(len(play.calls), 2, "upstream calls")


@check("sdk.no_retry", "x-should-retry false keeps it from trying again", BOTH)
async def no_retry(play: Play) -> None:
    refusal = say.error(500, "No.", kind="server_error", headers=((b"x-should-retry", b"false"),))
    play.says(refusal, inner=0)
    messages: Any = play.ask()
    async with play.sdk(max_retries=2) as client:
        try:
            await client.chat.completions.create(model=play.target.model, messages=messages)
        except APIError:
            pass
    equal(len(play.calls), 1, "upstream calls")


@check("sdk.errors", "it raises the class, code and parameter of upstream's error", (SHORT,))
async def errors(play: Play) -> None:
    play.says(say.error(400, "Bad seed.", code="bad_seed", param="seed"))
    messages: Any = play.ask()
    async with play.sdk() as client:
        try:
            await client.chat.completions.create(model=play.target.model, messages=messages)
        except BadRequestError as error:
            equal((error.code, error.param), ("bad_seed", "seed"), "code and param")
        else:
            raise Failed("nothing was raised")


@check("sdk.rate_limit", "it raises RateLimitError with the request's id", BOTH)
async def rate_limit(play: Play) -> None:
    play.says(say.error(429, "Slow.", headers=((b"x-request-id", b"req_9"),)), inner=0)
    messages: Any = play.ask()
    async with play.sdk() as client:
        try:
            await client.chat.completions.create(model=play.target.model, messages=messages)
        except RateLimitError as error:
            equal(error.request_id, "req_9", "request_id")
        else:
            raise Failed("nothing was raised")


@check("sdk.stream_error", "it raises on an error event in mid-stream", STREAMS)
async def stream_error(play: Play) -> None:
    late = say.event({"error": {"message": "Overloaded.", "type": "server_error", "code": "x"}})
    play.says(lambda request: say.streamed([*say.chunks(request, say.text("word " * 60))[:20], late]))
    messages: Any = play.ask()
    async with play.sdk() as client:
        try:
            stream = await client.chat.completions.create(
                model=play.target.model, messages=messages, stream=True
            )
            async for _ in stream:
                pass
        except APIError as error:
            expect("Overloaded." in str(error), f"it raised {error}")
        else:
            raise Failed("nothing was raised")


@check("sdk.raw_headers", "with_raw_response shows upstream's headers", BOTH)
async def raw_headers(play: Play) -> None:
    headers = ((b"x-request-id", b"req_7"), (b"x-ratelimit-remaining-tokens", b"12"))
    play.says(lambda request: say.answer(request, say.text("Yes."), headers=headers), inner=0)
    messages: Any = play.ask()
    async with play.sdk() as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=play.target.model, messages=messages
        )
    equal(raw.headers.get("x-ratelimit-remaining-tokens"), "12", "x-ratelimit-remaining-tokens")
    equal(raw.parse()._request_id, "req_7", "the answer's request id")
