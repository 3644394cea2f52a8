"""Our tools stay ours, over sockets: calls in other words and calls as text are answered inside.

Promises: the client gets the model's answer and nothing of the calls, streamed as well as whole, and the
same in both; the next turn's window has a clean exchange; where no answer comes, an error says so.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.harness import RecordingUpstream, answer, call, in_process_server, message_of
from tests.e2e.talk import CHAT, ask, assert_no_vm, body, config, names_of, raw, read_stream, tool

FAULT = {"page_id": "msg_0001"}
TEXTS = [
    '{{"name": "page_fault", "arguments": {"page_id": "msg_0001"}}}',
    'Let me look that up.\n\n<tool_call>\n{"name": "search_pages", "arguments": {"query": "depot"}}\n</tool_call>',
    '[TOOL_CALLS]search_pages[ARGS]{"query": "depot"}', "```tool_code\nprint(search_pages(query='depot'))\n```",
    '<|channel|>commentary to=functions.page_fault <|constrain|>json<|message|>{"page_id": "msg_0001"}',
    "<tool_call>\n<function=search_pages>\n<parameter=query>\ndepot\n</parameter>\n</function>\n</tool_call>",
    '[page_fault(page_id="msg_0001")]', '{"name": "search_pages", "arguments": {"quer',
]  # fmt: skip


async def asked(
    *says: dict[str, Any], stream: bool, piece_chars: int = 5, **fields: Any
) -> tuple[RecordingUpstream, dict[str, Any], str]:
    """(upstream, the client's message with its finish reason, the raw text) of a paged chat."""

    def reply(request: dict[str, Any], i: int) -> Any:
        return answer(request, says[min(i, len(says) - 1)], piece_chars)

    async with RecordingUpstream(reply) as upstream:
        with in_process_server(config(upstream)) as base_url:
            async with raw(base_url) as client:
                sent = body(ask(), stream=stream, **fields)
                if stream:
                    text, ended = await read_stream(client, sent)
                    assert ended
                else:
                    text = (await client.post(CHAT, json=sent)).text
    assert upstream.violations == [] and not upstream.failures
    return upstream, _message(text, stream), text


def _message(text: str, stream: bool) -> dict[str, Any]:
    if not stream:
        choice = json.loads(text)["choices"][0]
        return {**choice["message"], "finish_reason": choice["finish_reason"]}
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert sum("role" in choice["delta"] for choice in choices) == 1
    assert len({chunk["id"] for chunk in chunks}) == 1 and text.count("[DONE]") == 1
    return {"content": content, "finish_reason": choices[-1]["finish_reason"]}


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@both
@pytest.mark.parametrize("text", TEXTS)
async def test_a_call_as_text_never_reaches_the_client(text: str, stream: bool) -> None:
    upstream, message, got = await asked(message_of(text), message_of("It is amber."), stream=stream)
    assert message["content"] == "It is amber." and message["finish_reason"] == "stop"
    assert len(upstream.calls) == 2
    assert_no_vm(got)
    readable = not text.endswith("quer")
    made = [c["function"] for m in upstream.calls[1].json["messages"] for c in m.get("tool_calls") or ()]
    assert [f["name"] in ("page_fault", "search_pages") for f in made] == [True] * len(made)
    assert bool(made) is readable and bool(names_of(upstream.calls[1])) is readable


@both
@pytest.mark.parametrize("tools", [{}, {"tools": [tool("read_file", path={"type": "string"})]}], ids=["alone", "beside"])
async def test_a_decorated_call_never_reaches_the_client(stream: bool, tools: dict[str, Any]) -> None:
    says = [message_of(None, [call("c1", "functions.page_fault:0", FAULT)]),
            message_of(None, [call("c2", "SearchPages<|channel|>commentary", {"query": "depot"})]),
            message_of("It is amber.")]
    upstream, message, got = await asked(*says, stream=stream, **tools)
    assert message["content"] == "It is amber." and len(upstream.calls) == 3
    made = [c["function"]["name"] for m in upstream.calls[2].json["messages"] for c in m.get("tool_calls") or ()]
    assert made == ["page_fault", "search_pages"]  # as an API takes them
    assert_no_vm(got)


@both
async def test_a_call_as_text_in_a_round_without_tools_is_asked_again(stream: bool) -> None:
    upstream, message, got = await asked(
        message_of(TEXTS[0]), message_of("It is amber."), stream=stream, logprobs=True)
    assert message["content"] == "It is amber." and len(upstream.calls) == 2
    assert_no_vm(got)


@both
async def test_an_answer_in_json_or_code_is_left_alone(stream: bool) -> None:
    for text in ('{"name": "depot", "arguments": {"query": "amber"}}', "```python\nprint('page')\n```",
                 "The tool page_fault loads a page of this chat by its id."):
        upstream, message, _ = await asked(message_of(text), stream=stream)
        assert message["content"] == text and len(upstream.calls) == 1


async def test_a_model_that_never_answers_is_an_error() -> None:
    upstream, says = RecordingUpstream(lambda request, _: answer(request, message_of(TEXTS[-1]))), body(ask())
    async with upstream:
        with in_process_server(config(upstream)) as base_url:
            async with raw(base_url) as client:
                whole = await client.post(CHAT, json=says)
                lines: list[str] = []
                with pytest.raises(httpx.RemoteProtocolError):
                    async with client.stream("POST", CHAT, json={**says, "stream": True}) as response:
                        async for line in response.aiter_lines():
                            lines.append(line)
    assert whole.status_code == 502 and whole.json()["error"]["code"] == "no_answer"
    *_, last = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert last["error"]["code"] == "no_answer"
    assert len(upstream.calls) == 6
