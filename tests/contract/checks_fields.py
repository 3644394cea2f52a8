"""Fields of a request: each reaches upstream as the client sent it, in every round."""

from __future__ import annotations

import json
from typing import Any

from tests.contract import say
from tests.contract.model import BOTH, SHORT, Check, Scenario, add, check, equal, expect, quote
from tests.contract.play import Play, encode

FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {
    "name": "depot",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
        "additionalProperties": False,
    },
}
ALLOWED: dict[str, dict[str, Any]] = {
    "unknown": {
        "x_vendor": {"deep": [1, None, "é", {"a": True}]},
        "top_k": 40,
        "chat_template_kwargs": {"enable_thinking": False},
        "guided_regex": "\\d+",
    },
    "temperature": {"temperature": 0.25, "top_p": 0.5},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": -0.5},
    "seed": {"seed": 20241121},
    "stop_string": {"stop": "END"},
    "stop_list": {"stop": ["\n\n", "###", "é"]},
    "logit_bias": {"logit_bias": {"50256": -100, "1": 5}},
    "verbosity": {"verbosity": "low"},
    "reasoning_effort": {"reasoning_effort": "high"},
    "reasoning": {"reasoning": {"effort": "low", "exclude": False}},
    "user": {"user": "user-1234"},
    "safety_identifier": {"safety_identifier": "hash-of-a-user"},
    "metadata": {"metadata": {"ticket": "17", "team": "blue"}},
    "store": {"store": True},
    "service_tier": {"service_tier": "flex"},
    "prompt_cache_key": {"prompt_cache_key": "my-own-key"},
    "prompt_cache_retention": {"prompt_cache_retention": "24h"},
    "prompt_cache_options": {"prompt_cache_options": {"mode": "explicit"}},
    "moderation": {"moderation": {"model": "omni-moderation-latest"}},
    "modalities": {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
    "prediction": {"prediction": {"type": "content", "content": "The code is amber."}},
    "web_search_options": {"web_search_options": {"search_context_size": "low"}},
    "n": {"n": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "response_format_text": {"response_format": {"type": "text"}},
    "response_format_object": {"response_format": {"type": "json_object"}},
    "response_format_schema": {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
    "functions": {"functions": [FUNCTION]},
    "function_call": {"functions": [FUNCTION], "function_call": {"name": "look"}},
    "include_obfuscation": {"stream": True, "stream_options": {"include_obfuscation": False}},
    "null_values": {
        "stop": None, "logit_bias": None, "user": None, "n": None, "seed": None, "logprobs": None,
        "response_format": None, "metadata": None, "temperature": None, "functions": None,
    },
    "stream_false": {"stream": False},
    "stream_null": {"stream": None, "stream_options": None},
}


def _passes(fields: dict[str, Any]) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(say.text("The code."))
        await play.chat(**fields)
        for name, value in fields.items():
            if name == "stream_options" and value is not None:  # usage may be asked for beside it
                for recorded in play.calls:
                    got = recorded.json.get(name) or {}
                    equal({k: got.get(k) for k in value}, value, name)
            else:
                play.every(name, value)

    return scenario


for _name, _fields in ALLOWED.items():
    _keys = ", ".join(_fields)
    add(Check(f"fields.{_name}", f"{_keys}: as sent, in every round", _passes(_fields), BOTH))


@check("fields.bytes", "a short request reaches upstream byte for byte", (SHORT,))
async def request_bytes(play: Play) -> None:
    sent = (
        '{"temperature":1e0, "x_big":123456789012345678901234567890,"top_p":1.00,\n "messages":'
        '[{"content":"caf\\u00e9 \\ud83d\\ude00 \\/ ' + play.ask()[0]["content"] + '","role":"user"}],'
        '"model":"gpt-4o"}'
    ).encode()
    play.says(say.text("Yes."))
    (await play.send(sent)).ok()
    equal(play.last.body, sent, "the request's bytes")


@check("fields.numbers", "numbers keep their spelling: 1e0, 1.00, thirty digits")
async def numbers(play: Play) -> None:
    body = encode(play.body())
    sent = body[:-1] + b',"temperature":1e0,"top_p":1.00,"x_big":123456789012345678901234567890}'
    play.says(say.text("Yes."))
    (await play.send(sent)).ok()
    for recorded in play.calls:
        for part in (b"1e0", b"1.00", b"123456789012345678901234567890"):
            expect(part in recorded.body, f"{part!r} is not in {quote(recorded.body[-300:])}")


@check("fields.max_tokens", "max_tokens is one budget over all rounds")
async def max_tokens(play: Play) -> None:
    await _budget(play, "max_tokens")


@check("fields.max_completion_tokens", "max_completion_tokens is one budget over all rounds")
async def max_completion_tokens(play: Play) -> None:
    await _budget(play, "max_completion_tokens")


async def _budget(play: Play, name: str) -> None:
    play.says(say.text("Yes."))
    fields: dict[str, Any] = {name: 200}
    await play.chat(**fields)
    name = play.wire.field(name, 200)[0]
    equal(play.calls[0].json.get(name), 200, f"{name} in the first round")
    for number, recorded in enumerate(play.calls[1:], start=1):
        most = 200 - number * say.COMPLETION_TOKENS
        got = recorded.json.get(name)
        if not (isinstance(got, int) and 0 < got <= most):
            play.script.calls[:] = [recorded]
            equal(got, f"at most {most}", f"{name} in round {number}, after completion tokens were used")


@check("fields.order", "fields and message keys keep their order")
async def order(play: Play) -> None:
    play.says(say.text("Yes."))
    body = {"top_p": 0.5, **play.body(), "seed": 1, "n": 1}
    (await play.send(body)).ok()
    got = [k for k in json.loads(play.last.body) if k in body]
    equal(got, list(body), "the order of fields")


@check("fields.model", "the model's name reaches upstream as sent, and the answer's comes back")
async def model(play: Play) -> None:
    play.says(say.text("Yes."))
    reply = await play.chat()
    sent = play.wire.model(play.target.model)
    play.every("model", sent)
    equal(reply.json()["model"], f"{sent}-2024", "model of the answer")
