"""What the model says comes back: every field of an answer, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

from tests.contract import say
from tests.contract.model import (
    ALL,
    BOTH,
    SHORT,
    SHORT_STREAM,
    STREAMS,
    Check,
    Scenario,
    add,
    check,
    equal,
    expect,
    quote,
)
from tests.contract.play import Play
from tests.e2e.answers import Response

LOGPROBS = {"content": [{"token": "The", "logprob": -0.25, "bytes": [84], "top_logprobs": []}]}
CITATION = {"type": "url_citation", "url_citation": {
    "url": "https://example.org", "title": "T", "start_index": 0, "end_index": 3}}
THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}

MESSAGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text": ("the text", {}, {}),
    "unicode": ("any character", {"content": "\U0001f600 é \u2028 \u0000 \\ \" </s> data: [DONE]"}, {}),
    "empty": ("empty text", {"content": ""}, {}),
    "refusal": ("a refusal", {"content": None, "refusal": "I cannot help with that."}, {}),
    "annotations": (
        "annotations of a web search", {"annotations": [CITATION]}, {"web_search_options": {}},
    ),
    "audio": (
        "audio with its transcript",
        {"content": None, "audio": {"id": "audio_1", "data": "UklGRg==", "expires_at": 1, "transcript": "Hi."}},
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
    ),
    "reasoning_content": ("reasoning_content", {"reasoning_content": "Let me think about this."}, {}),
    "reasoning": (
        "reasoning and reasoning_details",
        {"reasoning": "Hm, so.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]},
        {},
    ),
    "thinking_blocks": ("thinking_blocks", {"thinking_blocks": [THINKING]}, {}),
    "extra_content": (
        "extra_content and unknown keys of a message",
        {"extra_content": {"google": {"thought_signature": "QUJD"}}, "x_note": {"a": [1]}},
        {},
    ),
}


def _comes_back(keys: dict[str, Any], fields: dict[str, Any]) -> Scenario:
    async def scenario(play: Play) -> None:
        said = say.text("The code is amber.") | keys
        play.says(said)
        reply = await play.chat(**fields)
        got = reply.message()
        for key, value in said.items():
            mine = got.get(key)
            if play.stream and value in (None, ""):
                mine, value = mine or "", value or ""
            equal(mine, value, f"message.{key}")
        equal(reply.finish(), "stop", "finish_reason")

    return scenario


for _name, (_promise, _keys, _fields) in MESSAGES.items():
    add(Check(f"answers.{_name}", f"{_promise}: comes back", _comes_back(_keys, _fields), ALL))


@check("answers.bytes", "the answer to a short request comes back byte for byte", (SHORT, SHORT_STREAM))
async def answer_bytes(play: Play) -> None:
    body = (
        '{ "choices":[{"message":{"content":"caf\\u00e9 é","role":"assistant"},"index":0,'
        '"finish_reason":"stop","x":1e0}],\n"model":"gpt-4o","object":"chat.completion",'
        '"created":1,"id":"a"}'
    ).encode()
    if play.stream:
        body = b": hi\n\nevent: message\ndata:" + body.replace(b'"message"', b'"delta"').replace(b"\n", b"")
        body += b"\r\n\r\ndata: [DONE]\n\n"
    play.says(say.streamed([body]) if play.stream else Response(body))
    equal((await play.chat()).body, body, "the answer's bytes")


@check("answers.unknown_fields", "unknown fields of an answer and of a choice come back", ALL)
async def unknown_fields(play: Play) -> None:
    more: dict[str, Any] = {"x_provider": {"region": "eu"}, "citations": ["https://example.org"]}
    choice = {"x_matched": 7, "content_filter_results": {"hate": {"filtered": False}}}
    play.says(lambda request: say.answer(request, say.text("Yes."), more=more, choice=choice))
    reply = await play.chat()
    wholes = reply.chunks() if play.stream else [reply.json()]
    for key, value in more.items():
        expect(any(w.get(key) == value for w in wholes), f"{key} did not come back")
    got = [c for w in wholes for c in w["choices"]]
    for key, value in choice.items():
        expect(any(c.get(key) == value for c in got), f"choices[].{key} did not come back")


@check("answers.service_tier", "service_tier and system_fingerprint come back", ALL)
async def service_tier(play: Play) -> None:
    play.says(lambda request: say.answer(request, say.text("Yes."), more={"service_tier": "flex"}))
    reply = await play.chat()
    wholes = reply.chunks() if play.stream else [reply.json()]
    for key, value in (("service_tier", "flex"), ("system_fingerprint", "fp_contract")):
        expect(any(w.get(key) == value for w in wholes), f"no {key} {value!r}: {quote(reply.text)}")


def _finish(reason: str) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(lambda request: say.answer(request, say.text("Ye"), finish=reason))
        reply = await play.chat()
        equal(reply.finish(), reason, "finish_reason")
        equal(reply.content(), "Ye", "the text")

    return scenario


for _reason in ("length", "content_filter"):
    add(Check(f"answers.finish_{_reason}", f"finish_reason {_reason} comes back", _finish(_reason), ALL))


@check("answers.logprobs", "logprobs come back", ALL)
async def logprobs(play: Play) -> None:
    play.says(lambda request: say.answer(request, say.text("The", ), choice={"logprobs": LOGPROBS}))
    choice = (await play.chat(logprobs=True, top_logprobs=1)).choices()[0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    expect(tokens and tokens[0] == LOGPROBS["content"][0], f"logprobs: got {choice.get('logprobs')}")


@check("answers.n", "several choices come back, each with its own text and reason", ALL)
async def several(play: Play) -> None:
    def two(request: dict[str, Any]) -> Any:
        if not play.stream:
            made = json.loads(say.whole(request, say.text("one")).body)
            other = {**made["choices"][0], "index": 1, "finish_reason": "length"}
            other["message"] = say.text("two")
            return Response(json.dumps({**made, "choices": [*made["choices"], other]}).encode())
        first = say.chunks(request, say.text("one"), piece=1)[:-1]
        second = say.chunks(request, say.text("two"), piece=1, finish="length")
        second = [e.replace(b'"index":0', b'"index":1') for e in second]
        mixed = [e for pair in zip(first, second, strict=False) for e in pair]
        return say.streamed([*mixed, say.DONE])

    play.says(two)
    reply = await play.chat(n=2)
    choices = reply.choices()
    equal([c["message"].get("content") for c in choices], ["one", "two"], "texts of the choices")
    equal([c["finish_reason"] for c in choices], ["stop", "length"], "their finish reasons")


ODD: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "null_calls": ("tool_calls null", {"tool_calls": None, "function_call": None}, {}, {}),
    "empty_calls": ("tool_calls []", {"tool_calls": []}, {}, {}),
    "null_finish": ("no finish_reason", {}, {"finish_reason": None}, {}),
    "null_identity": ("id, created and model null", {}, {}, {"id": None, "created": None, "model": None}),
    "null_usage": ("usage null", {}, {}, {"usage": None}),
    "odd_usage": ("usage of nulls and texts", {}, {}, {
        "usage": {"prompt_tokens": None, "completion_tokens": "7", "total_tokens": 1.5,
                  "prompt_tokens_details": None}}),
}


def _odd(message: dict[str, Any], choice: dict[str, Any], more: dict[str, Any]) -> Scenario:
    async def scenario(play: Play) -> None:
        said = {"role": "assistant", "content": "The code is amber.", **message}
        play.says(lambda request: say.whole(request, said, choice=choice, more=more))
        equal((await play.chat()).content(), "The code is amber.", "the text")

    return scenario


for _name, (_promise, _message, _choice, _more) in ODD.items():
    add(Check(f"answers.{_name}", f"an answer with {_promise}: the text comes back",
              _odd(_message, _choice, _more), BOTH))


@check("answers.stream_only_deltas", "a stream's chunks carry deltas and the right object", STREAMS)
async def stream_only_deltas(play: Play) -> None:
    play.says(say.text("The code is amber."))
    for chunk in (await play.chat()).chunks():
        equal(chunk.get("object"), "chat.completion.chunk", "object")
        for choice in chunk["choices"]:
            expect("delta" in choice and "message" not in choice, f"a choice is {choice}")
