"""What Gemini is given and what its answers become; and litellm's way to it, over a socket."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config import load_config
from proxy.errors import ApiError
from proxy.upstream import Upstream, make_upstream
from proxy.upstream.dialects import GEMINI, Chunks, prepare, whole_answer
from tests.e2e.answers import Response, Stream
from tests.e2e.providers import Call, Said, json_response
from tests.e2e.providers.gemini import GeminiServer

LIMIT = 1 << 20
USER = {"role": "user", "content": "Hi."}
SIGNED = {"extra_content": {"google": {"thought_signature": "QUJD"}}}
Json = dict[str, Any]


def call(arguments: str = "{}", **more: Any) -> Json:
    function = {"name": "look", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function, **more}


def asked(*messages: Json, **fields: Any) -> Json:
    request = {"model": "m", "messages": list(messages), **fields}
    before = copy.deepcopy(request)
    out = prepare(request, GEMINI)
    assert request == before, "the caller's request is not changed"
    return out


def said(*messages: Json) -> list[Json]:
    """What becomes of them behind a user's."""
    out: list[Json] = asked(USER, *messages)["messages"]
    return out[1:]


# ---------------------------------------------------------------- requests


def test_what_gemini_takes_is_left_alone() -> None:
    request = {"model": "m", "messages": [USER, {"role": "assistant", "content": "Yes.", "x": 1}, USER]}
    assert prepare(request, GEMINI) == request


def test_no_text_is_empty() -> None:
    parts = [{"type": "text", "text": ""}, {"type": "text", "text": "a"}]
    calling = {"role": "assistant", "content": "", "tool_calls": [call()]}
    out = said(
        {"role": "system", "content": ""},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": ""},
        calling,
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
    )
    assert [m["content"] for m in out] == [parts[1:], " ", None, ""]
    assert out[2]["tool_calls"] == [call()]


def test_a_refusal_is_a_text() -> None:
    part = {"type": "refusal", "refusal": "I must not."}
    out = said(
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "assistant", "content": [part]},
    )
    assert out[0]["content"] == "I cannot."
    assert out[1]["content"] == [{"type": "text", "text": "I must not."}]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("", {}),
        ('{"word": 1}', {"word": 1}),
        ("depot 3", {"arguments": "depot 3"}),
        ("[1]", {"arguments": "[1]"}),
        ('{"word": "dep', {"arguments": '{"word": "dep'}),
    ],
)
def test_arguments_are_an_object(written: str, wanted: Json) -> None:
    (out,) = said({"role": "assistant", "content": None, "tool_calls": [call(written)]})
    assert json.loads(out["tool_calls"][0]["function"]["arguments"]) == wanted
    function = {"name": "look", "arguments": written}
    (legacy,) = said({"role": "assistant", "content": None, "function_call": function})
    assert json.loads(legacy["function_call"]["arguments"]) == wanted


def test_signatures_stand_where_litellm_reads_them() -> None:
    (calling,) = said({"role": "assistant", "content": None, "tool_calls": [call(**SIGNED)]})
    assert calling["tool_calls"][0]["provider_specific_fields"] == {"thought_signature": "QUJD"}
    (text,) = said({"role": "assistant", "content": "Yes.", **SIGNED})
    assert text["provider_specific_fields"] == {"thought_signatures": ["QUJD"]}
    (nothing,) = said({"role": "assistant", "content": None, **SIGNED})
    assert nothing["content"] == "", "a signature alone has to come back, too"


def test_a_conversation_begins_with_the_user() -> None:
    system, answer = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hello."}
    out = prepare({"messages": [system, answer, USER]}, GEMINI)["messages"]
    assert [m["role"] for m in out] == ["system", "user", "assistant", "user"]
    unknown = {"messages": [system, answer, USER]}
    assert prepare(unknown, None) is unknown


def test_choices_are_said_in_geminis_words() -> None:
    named = {"type": "function", "function": {"name": "look"}}
    assert asked(USER, function_call={"name": "look"})["tool_choice"] == named
    assert asked(USER, function_call="none")["tool_choice"] == "none"
    for mode, word in (("required", "ANY"), ("auto", "VALIDATED")):
        allowed = {"mode": mode, "tools": [named]}
        out = asked(USER, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        config = {"mode": word, "allowedFunctionNames": ["look"]}
        assert out["extra_body"] == {"toolConfig": {"functionCallingConfig": config}}
        assert "tool_choice" not in out


def test_defaults_are_left_out_and_nothing_else() -> None:
    out = asked(USER, store=False, verbosity="medium", logit_bias={}, seed=1)
    assert out == {"model": "m", "messages": [USER], "seed": 1}
    assert asked(USER, store=True)["store"] is True, "litellm says that it cannot be"
    out = asked(USER, logprobs=True, top_logprobs=3)
    assert out["logprobs"] is True and "top_logprobs" not in out
    assert out["extra_body"] == {"generationConfig": {"logprobs": 3}}


def test_custom_tools_are_refused_with_a_sentence() -> None:
    with pytest.raises(ApiError, match="custom tools") as caught:
        asked(USER, tools=[{"type": "custom", "custom": {"name": "sql"}}])
    assert (caught.value.status, caught.value.param) == (400, "tools")
    custom = {"id": "c", "type": "custom", "custom": {"name": "sql", "input": "1"}}
    with pytest.raises(ApiError, match="custom tools"):
        asked(USER, {"role": "assistant", "content": None, "tool_calls": [custom]})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["role", "content", "type", "text", "tool_calls", "function", "arguments", "name", "refusal",
         "extra_content", "google", "thought_signature", "allowed_tools", "mode", "tools"]
    ), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
_ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "x"])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.fixed_dictionaries({"role": _ROLES}, optional={"content": _JSON, "tool_calls": _JSON,
             "function_call": _JSON, "extra_content": _JSON, "refusal": st.none() | st.text()}), max_size=5),
    st.fixed_dictionaries({}, optional={"tool_choice": _JSON, "function_call": _JSON, "tools": st.lists(_JSON)}),
)  # fmt: skip
def test_odd_requests_raise_nothing_and_settle(messages: list[Json], fields: Json) -> None:
    request = {"messages": messages, **fields}
    once = prepare(request, GEMINI)
    again = prepare({"messages": messages, **fields}, GEMINI)
    assert once == again, "the same messages give the same words"
    assert len(once["messages"]) <= len(messages) + 1


# ---------------------------------------------------------------- answers


def test_signatures_come_where_google_has_them() -> None:
    signed = call(provider_specific_fields={"thought_signature": "QUJD"})
    fields = {"thought_signatures": ["QUJD", "REVG"]}
    message = {"role": "assistant", "content": "Yes.", "tool_calls": [signed], "images": [],
               "provider_specific_fields": fields, "thinking_blocks": []}  # fmt: skip
    answer = whole_answer({"choices": [{"message": message}], "vertex_ai_safety_results": []})
    (choice,) = answer["choices"]
    assert "vertex_ai_safety_results" not in answer
    assert choice["message"] == {
        "role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": [call(**SIGNED)],
        "extra_content": {"google": {"thought_signature": "REVG"}},
    }  # fmt: skip


def test_a_streamed_thoughts_signature_makes_a_block() -> None:
    chunks = Chunks()
    pieces: list[Json] = [
        {"role": "assistant", "reasoning_content": "Hm, "},
        {"reasoning_content": "so.", "provider_specific_fields": {"thought_signatures": ["QUJD"]}},
        {"content": "Yes."},
        {"provider_specific_fields": {"thought_signatures": ["REVG"]}},
    ]
    out = [chunks.chunk({"choices": [{"index": 0, "delta": p}]})["choices"][0]["delta"] for p in pieces]
    assert out[0] == {"role": "assistant", "reasoning_content": "Hm, "}
    block = {"type": "thinking", "thinking": "Hm, so.", "signature": "QUJD"}
    assert out[1] == {"reasoning_content": "so.", "thinking_blocks": [block]}
    assert out[2:] == [{"content": "Yes."}, {"extra_content": {"google": {"thought_signature": "REVG"}}}]


# ---------------------------------------------------------------- over a socket


@asynccontextmanager
async def behind() -> AsyncIterator[tuple[Upstream, GeminiServer]]:
    async with GeminiServer() as server:
        flags: dict[str, object] = {"upstream.provider": "litellm", "upstream.base_url": server.base_url}
        upstream = make_upstream(load_config(None, {}, flags))
        try:
            yield upstream, server
        finally:
            await upstream.close()
        server.check()


def request(*messages: Json, **fields: Any) -> bytes:
    return json.dumps({"model": "gemini/gemini-3-pro-preview", "messages": messages, **fields}).encode()


KEY = [(b"authorization", b"Bearer sk-client")]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_providers_headers_come_back(stream: bool) -> None:
    async with behind() as (upstream, server):

        def answer(body: Json) -> Any:
            made = server.put(server.calls[-1], Said("Yes."))
            told = ((b"x-request-id", b"req_1"), (b"set-cookie", b"a=b"))
            assert isinstance(made, Response | Stream)
            return replace(made, headers=(*made.headers, *told))

        server.plan(answer)
        reply = await upstream.chat(request(USER, stream=stream), KEY)
        assert b"Yes." in await reply.read(LIMIT)
    names = dict(reply.headers)
    assert names[b"x-request-id"] == b"req_1" and b"set-cookie" not in names


async def test_an_answer_that_cannot_be_read_is_502() -> None:
    async with behind() as (upstream, server):
        server.plan(json_response({"odd": True}), Response(b"<html>", 200))
        for _ in range(2):
            with pytest.raises(ApiError, match="cannot be read") as caught:
                await upstream.chat(request(USER), KEY)
            assert caught.value.status == 502


async def test_a_redirect_is_not_followed() -> None:
    async with behind() as (upstream, server):
        where = ((b"location", b"http://127.0.0.1:1/elsewhere"),)
        server.plan(Response(b"", 307, where), Response(b"", 307, where))
        for stream in (False, True):
            reply = await upstream.chat(request(USER, stream=stream), KEY)
            assert reply.status == 307
            assert dict(reply.headers)[b"location"] == where[0][1]
            await reply.close()


async def test_geminis_own_words_reach_it() -> None:
    """Judged by the strict server: what OpenAI's API takes is no 400 of Gemini's."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "look"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    async with behind() as (upstream, server):
        server.plan(Said(calls=[Call("c", "look", {"word": "kelp"})], thinking="Hm."))
        reply = await upstream.chat(
            request(
                {"role": "assistant", "content": "Hello."}, {"role": "user", "content": ""},
                tools=[tool], tool_choice=choice, logprobs=True, top_logprobs=2,
            ), KEY,
        )  # fmt: skip
        assert reply.status == 200
        (body,) = server.bodies()
        message = json.loads(await reply.read(LIMIT))["choices"][0]["message"]
    assert body["toolConfig"]["functionCallingConfig"]["allowedFunctionNames"] == ["look"]
    assert body["generationConfig"]["logprobs"] == 2
    signature = message["tool_calls"][0]["extra_content"]["google"]["thought_signature"]
    assert server.signed[signature] == "look"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_overflow_has_openais_code(stream: bool) -> None:
    async with behind() as (upstream, server):
        words = "The input token count (5000) exceeds the maximum number of tokens allowed (4000)."
        server.plan(server.refuse(400, words))
        reply = await upstream.chat(request(USER, stream=stream), KEY)
        error = json.loads(await reply.read(LIMIT))["error"]
    assert (reply.status, error["code"], error["message"]) == (400, "context_length_exceeded", words)


async def test_an_error_within_the_stream_has_the_providers_words() -> None:
    async with behind() as (upstream, server):

        def broken(body: Json) -> Any:
            whole = server.put(server.calls[-1], Said("The beginning of an answer that is longer than a piece."))
            assert isinstance(whole, Stream)
            detail = {"code": 503, "message": "Overloaded.", "status": "UNAVAILABLE"}
            return Stream([*whole.steps[:1], f"data: {json.dumps({'error': detail})}\r\n\r\n".encode()])

        server.plan(broken)
        reply = await upstream.chat(request(USER, stream=True), KEY)
        *_, last = [line for line in (await reply.read(LIMIT)).decode().split("\n\n") if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["message"] == "Overloaded." and error["code"] == "unavailable"
