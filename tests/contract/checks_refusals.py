"""Overflow and refusals: a gateway that changes requests makes good what its changes break.

The scenarios run where requests are kept below a window: a gateway that changes nothing has nothing
to make good, and relays the refusal (checks errors.*).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.contract import say
from tests.contract.checks_fields import SCHEMA
from tests.contract.model import PAGED, Check, Scenario, add, check, equal, expect, quote
from tests.contract.play import Play
from tests.e2e.answers import Response

CUT_SHARE = 0.5  # of the first request's tokens: what a silent truncator reads
REAL_SHARE = 0.85  # of the first request's tokens: what upstream takes
Json = dict[str, Any]

OVERFLOWS: dict[str, tuple[int, str, str | None]] = {
    "openai": (
        400,
        "This model's maximum context length is {window} tokens. However, your messages resulted in "
        "{sent} tokens. Please reduce the length of the messages.",
        "context_length_exceeded",
    ),
    "openai_input": (
        400, "Input tokens exceed the configured limit of {window} tokens. Your messages resulted in "
        "{sent} tokens. Please reduce the length of the messages.", "context_length_exceeded",
    ),
    "vllm": (
        400,
        "This model's maximum context length is {window} tokens. However, you requested {sent} tokens "
        "({sent} in the messages, 0 in the completion).", None,
    ),
    "anthropic": (400, "prompt is too long: {sent} tokens > {window} maximum", None),
    "gemini": (
        400, "The input token count ({sent}) exceeds the maximum number of tokens allowed ({window}).",
        None,
    ),
    "llama_cpp": (
        400, "the request exceeds the available context size ({window} tokens), try increasing it", None,
    ),
    "openrouter": (
        400, "This endpoint's maximum context length is {window} tokens. However, you requested about "
        "{sent} tokens.", None,
    ),
    "mistral": (
        400, "Prompt contains {sent} tokens and 0 draft tokens, too large for model with {window} maximum "
        "context length", None,
    ),
    "groq": (413, "Request too large for model: please reduce the length of the messages or completion.",
             "context_length_exceeded"),
    "bedrock": (400, "Input is too long for requested model.", None),
}


def _overflow(status: int, words: str, code: str | None) -> Scenario:
    async def scenario(play: Play) -> None:
        real: list[int] = []

        def judge(request: Json) -> Any:
            sent = play.wire.tokens(request)
            if not real:
                real.append(int(sent * REAL_SHARE))
            if sent <= real[0]:
                return say.answer(request, say.text("Yes."))
            return say.error(status, words.format(window=real[0], sent=sent), code=code)

        play.says(judge, inner=0)
        messages = play.ask()
        reply = await play.chat(messages)
        equal(reply.content(), "Yes.", "the answer")
        play.script.calls.clear()
        await play.chat([*messages, say.text("Yes."), {"role": "user", "content": "And now?"}])
        equal(len(play.calls), 1, "upstream calls of the next turn (it has to have learned)")

    return scenario


for _name, _what in OVERFLOWS.items():
    add(Check(f"refusals.overflow_{_name}", f"a context overflow in {_name}'s words is learned, the request "
              "shrunk and sent again", _overflow(*_what), PAGED, "window"))


@check("refusals.truncator", "an upstream that cuts silently (prompt_tokens below what was sent) is noticed: "
       "later requests fit", (PAGED[0],), needs="window")
async def truncator(play: Play) -> None:
    real: list[int] = []

    def cut(request: Json) -> Any:
        sent = play.wire.tokens(request)
        if not real:
            real.append(int(sent * CUT_SHARE))
        prompt = min(sent, real[0])
        usage = {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}
        return say.answer(request, say.text("Yes."), usage=usage)

    play.says(cut, inner=0)
    messages = play.ask()
    for turn in range(4):
        await play.chat(messages)
        more = f"And now, {turn}? " + "It has grown late since the last one. " * 20
        messages = [*messages, say.text("Yes."), {"role": "user", "content": more}]
    sent = [play.wire.tokens(recorded.json) for recorded in play.calls]
    expect(sent[-1] <= real[0], f"tokens sent, turn by turn: {sent}, of which upstream reads {real[0]}")


@check("refusals.truncator_slow", "an upstream that cuts silently is noticed within three turns though the "
       "conversation grows by a percent a turn", (PAGED[0],), needs="window")
async def truncator_slow(play: Play) -> None:
    real: list[int] = []

    def cut(request: Json) -> Any:
        sent = play.wire.tokens(request)
        if not real:
            real.append(sent + 1)
        prompt = min(sent, real[0])
        usage = {"prompt_tokens": prompt, "completion_tokens": 2, "total_tokens": prompt + 2}
        return say.answer(request, say.text("Yes."), usage=usage)

    play.says(cut, inner=0)
    messages = play.ask()
    for turn in range(5):
        await play.chat(messages)
        messages = [*messages, say.text("Yes."), {"role": "user", "content": f"And now, {turn}?"}]
    sent = [play.wire.tokens(recorded.json) for recorded in play.calls]
    expect(sent[-1] <= real[0], f"tokens sent, turn by turn: {sent}, of which upstream reads {real[0]}")


def _picky(refuses: Callable[[Json], bool], status: int, words: str, code: str | None = None) -> Scenario:
    async def scenario(play: Play) -> None:
        def judge(request: Json) -> Any:
            if refuses(request):
                return say.error(status, words, code=code)
            return say.answer(request, say.text("Yes."))

        play.says(judge, inner=0)
        messages = play.ask()
        messages[0]["role"] = "user" if "system" in words else "system"
        reply = await play.chat(messages)
        equal(reply.content(), "Yes.", "the answer")
        play.script.calls.clear()
        await play.chat([*messages, say.text("Yes."), {"role": "user", "content": "And now?"}])
        equal(len(play.calls), 1, "upstream calls of the next turn (it has to have learned)")

    return scenario


def _roles(request: Json) -> list[str]:
    return [m["role"] for m in request["messages"]]


def _has_tools(request: Json) -> bool:
    return bool(request.get("tools"))


REFUSALS: dict[str, tuple[str, Scenario]] = {
    "tools": ("names tools", _picky(_has_tools, 400, "gpt-4o does not support tools")),
    "tools_404": (
        "says that no endpoint supports tool use",
        _picky(_has_tools, 404, "No endpoints found that support tool use."),
    ),
    "tools_vllm": (
        "says that auto tool choice is not enabled",
        _picky(_has_tools, 400, '"auto" tool choice requires --enable-auto-tool-choice and '
               "--tool-call-parser to be set"),
    ),
    "tools_reasoning": (
        "says that function tools need another endpoint",
        _picky(_has_tools, 400, "Function tools with reasoning_effort are not supported for this model in "
               "/v1/chat/completions. Please use /v1/responses instead."),
    ),
    "developer": (
        "names the developer role",
        _picky(lambda r: "developer" in _roles(r), 400,
               "Invalid value: 'developer'. Supported values are: 'system', 'assistant', 'user'.",
               "unsupported_value"),
    ),
    "developer_422": (
        "names the developer role as an unknown variant",
        _picky(lambda r: "developer" in _roles(r), 422, "messages[1].role: unknown variant `developer`, "
               "expected one of `system`, `user`, `assistant`, `tool`"),
    ),
    "late_system": (
        "takes a system message at the beginning only",
        _picky(lambda r: any(role in ("system", "developer") for role in _roles(r)[1:]), 400,
               "System message must be at the beginning."),
    ),
    "several_system": (
        "takes one system message only",
        _picky(lambda r: sum(role in ("system", "developer") for role in _roles(r)) > 1, 400,
               "Only one system message is allowed."),
    ),
}
for _name, (_promise, _scenario) in REFUSALS.items():
    add(Check(f"refusals.{_name}", f"a refusal that {_promise} is made good and remembered", _scenario,
              PAGED, "window"))


@check("refusals.tools_with_json", "a refusal of tools beside JSON is made good and remembered, for JSON alone",
       PAGED, needs="window")
async def tools_with_json(play: Play) -> None:
    def judge(request: Json) -> Any:
        if request.get("tools") and request.get("response_format"):
            return say.error(400, "Function calling with a response mime type: 'application/json' is unsupported")
        return say.answer(request, say.text("{}"))

    play.says(judge, inner=0)
    messages = play.ask()
    wanted = {"type": "json_schema", "json_schema": SCHEMA}
    for calls in (2, 1):
        play.script.calls.clear()
        reply = await play.chat(messages, response_format=wanted)
        equal(reply.content(), "{}", "the answer")
        expect(len(play.calls) <= calls, f"{len(play.calls)} upstream calls, more than {calls}")
        messages = [*messages, say.text("{}"), {"role": "user", "content": "And now?"}]
    await play.chat(messages)
    play.offered()


@check("refusals.unchanged", "a request that was changed and is refused for no known reason is sent "
       "unchanged", PAGED, needs="window")
async def unchanged(play: Play) -> None:
    messages = play.ask()

    def judge(request: Json) -> Any:
        if not play.same_messages(request, messages):
            return say.error(400, "I do not like this.")
        return say.answer(request, say.text("Yes."))

    play.says(judge, inner=0)
    body = play.body(messages)
    reply = (await play.send(body)).ok()
    equal(reply.content(), "Yes.", "the answer")
    equal(len(play.calls), 2, "upstream calls")
    expect(play.same_messages(play.last.json, messages), "the last request upstream was changed")
    equal(play.last.json.get("tools"), None, "tools of the last request upstream")
    if play.wire.verbatim:
        equal(play.last.json, body, "the last request upstream")


@check("refusals.both", "when the unchanged request is refused too, the client gets upstream's words once",
       PAGED, needs="window")
async def both(play: Play) -> None:
    refusal = say.error(400, "I do not like you.", code="dislike")
    play.says(refusal, inner=0)
    reply = await play.send(play.body())
    play.same_error(reply, refusal)
    expect(len(play.calls) <= 3, f"{len(play.calls)} upstream calls")


@check("refusals.later_tools", "a later round that is refused still ends in an answer or upstream's words",
       PAGED, needs="loop")
async def later_tools(play: Play) -> None:
    def judge(request: Json) -> Any:
        if any(m["role"] == "tool" for m in request["messages"]):
            return say.error(400, "tool messages are not supported")
        return say.answer(request, say.text("Yes."))

    play.says(judge)
    reply = await play.send(play.body())
    if reply.status == 200 and "tool messages are not supported" not in reply.text:
        equal(reply.ok().content(), "Yes.", "the answer")
        return
    expect("tool messages are not supported" in reply.text, f"{reply.status} {quote(reply.text)}")


@check("refusals.html_overflow", "a 413 page of a web server in front of upstream comes back or is made good",
       (PAGED[0],))
async def html_overflow(play: Play) -> None:
    page = b"<html><title>413 Request Entity Too Large</title></html>"
    refusal = Response(page, 413, ((b"content-type", b"text/html"),))
    play.says(refusal, inner=0)
    play.same_error(await play.send(play.body()), refusal)
