"""Any request body, small and beyond the window: upstream's to judge, never a failure of ours.

The upstream here answers every chat request and refuses the rest as OpenAI would. Whatever the body
is, the client gets an answer or upstream's refusal, within seconds, and the next good request of the
same caller is served.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.api.chat import ChatApi
from proxy.api.memory import Memory
from proxy.api.renditions import Renditions
from proxy.api.visit import Stats
from proxy.api.writer import Writer
from proxy.config import Config, load_config
from proxy.upstream import BytesReply, Header, Reply
from tests.examples import examples

WAIT_S = 20
JSON = [(b"content-type", b"application/json")]
WORDS = "amber basin cedar delta ember fjord grove heron inlet juniper".split()
HISTORY = [
    {"role": ("user", "assistant")[i % 2], "content": " ".join(f"{w}{i}{j}" for j in range(4) for w in WORDS)}
    for i in range(24)
]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=6)
    | st.sampled_from(["auto", "required", "user", "text", "json_schema", "function", "page_fault"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "text", "role", "content", "name", "function", "arguments", "id",
                         "tool_calls", "tool_call_id", "image_url", "url", "input_audio", "audio",
                         "file", "parameters", "properties", "session_id", "include_usage"]),
        inner, max_size=4,
    ),
    max_leaves=10,
)  # fmt: skip
roles = st.sampled_from(["user", "assistant", "tool", "system", "developer", "function", "critic"])
messages = st.fixed_dictionaries(
    {},
    optional={"role": roles | values, "content": st.text(max_size=9) | values, "name": values,
              "tool_calls": values, "tool_call_id": values, "audio": values, "function_call": values},
)  # fmt: skip
FIELDS = ["model", "messages", "stream", "n", "tools", "tool_choice", "metadata", "stream_options",
          "response_format", "max_tokens", "max_completion_tokens", "stop", "logprobs", "functions",
          "function_call", "user", "safety_identifier", "prediction", "web_search_options",
          "prompt_cache_key", "temperature", "odd"]  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    sent: dict[str, Any] = {"model": "gpt-4o", "messages": []}
    if draw(st.booleans()):
        sent["messages"] += HISTORY
    sent["messages"] = sent["messages"] + draw(st.lists(messages | values, max_size=4))
    sent.update(draw(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4)))
    body = json.dumps(sent, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 5)) == 0:  # cut, or with bytes that do not belong there
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=4)) + body[at + draw(st.integers(0, 4)) :]
    return body


class Judge:
    """Answers what is a chat request; 400 for the rest. Streams when it is asked to."""

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"") -> Reply:
        try:
            request = json.loads(body)
            assert isinstance(request["messages"], list)
            assert request["messages"]
        except (ValueError, KeyError, TypeError, AssertionError):
            return BytesReply(400, JSON, b'{"error":{"message":"not a chat request"}}')
        head = {"id": "c", "created": 1, "model": "m"}
        message = {"role": "assistant", "content": "yes"}
        if request.get("stream") is True:
            chunk = {**head, "choices": [{"index": 0, "delta": message, "finish_reason": "stop"}]}
            events = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
            return BytesReply(200, [(b"content-type", b"text/event-stream")], events)
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {**head, "object": "chat.completion", "choices": [choice]}
        return BytesReply(200, JSON, json.dumps(whole).encode())

    async def forward(self, *_: Any) -> Reply:
        raise AssertionError("chat only")

    async def close(self) -> None:
        pass


async def ask(api: ChatApi, body: bytes) -> tuple[int, bytes]:
    sent = [{"type": "http.request", "body": body, "more_body": False}]
    status, out = 0, b""

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        nonlocal status, out
        status = message.get("status", status)
        out += message.get("body", b"")

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await asyncio.wait_for(api(scope, receive, send), WAIT_S)
    return status, out


async def play(config: Config, sent: Sequence[bytes]) -> list[tuple[int, bytes]]:
    memory, judge = Memory(config), Judge()
    renditions = Renditions(config, memory)
    writer = Writer(config, judge, renditions)
    try:
        api = ChatApi(config, judge, memory, renditions, writer, Stats(memory, writer), None)
        return [await ask(api, body) for body in sent]
    finally:
        await writer.close()
        await memory.close()


def small(folder: Path) -> Config:
    l0 = {"tokens": 2000, "reserve_tokens": 500}
    file = folder / "config.yaml"
    file.write_text(json.dumps({"tiers": {"l0": l0, "l2": {"path": str(folder / "data")}}}))
    return load_config(file, {}, {})


@settings(examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(bodies(), min_size=1, max_size=6))
def test_no_body_makes_us_fail_or_hang(tmp_path: Path, sent: list[bytes]) -> None:
    good = {"model": "gpt-4o", "messages": [*HISTORY, {"role": "user", "content": "and now?"}]}
    *found, (last, said) = asyncio.run(play(small(tmp_path), [*sent, json.dumps(good).encode()]))
    for body, (status, out) in zip(sent, found, strict=True):
        refused = status == 400 and b"not a chat request" in out
        assert status == 200 or refused, (body[-300:], status, out[:300])
    assert last == 200
    assert b"yes" in said
