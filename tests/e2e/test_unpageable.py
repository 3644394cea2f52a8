"""What cannot be paged is larger than the window, over real sockets: upstream answers, we never refuse.

Promises: tools, schemas and system messages that exceed `tiers.l0.tokens`, a model whose window is
only assumed, and `max_tokens` never end in a refusal of ours; what is small enough goes up with the
client's bytes, what grows is paged in the room that is left, with its prefix kept; a header says
which key to change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.conversation.checks import goes_on
from tests.e2e.harness import (
    Answer,
    Recorded,
    RecordingUpstream,
    answer,
    count_request_tokens,
    error,
    in_process_server,
    message_of,
    messages_span,
)
from tests.e2e.script import developer, filler
from tests.e2e.talk import CHAT, raw, tool

Message = dict[str, Any]
HELLO: list[Message] = [{"role": "user", "content": "Look at the harbour page."}]
WARNING = "x-llm-pager-warning"


def tools(count: int) -> list[Message]:
    return [tool(f"tool_{i}", **{f"of_{i}_{j}": {"type": "string"} for j in range(6)}) for i in range(count)]


def schema(fields: int) -> Message:
    """A browser agent's: one action after the other, each described."""
    actions = {
        f"action_{i}": {"type": "string", "description": f"Does step {i}. {filler(str(i), 20)}"}
        for i in range(fields)
    }
    whole = {"type": "object", "properties": actions}
    return {"type": "json_schema", "json_schema": {"name": "agent", "schema": whole}}


UNPAGEABLE: dict[str, Message] = {
    "tools": {"tools": tools(80)},
    "as many tools as there may be": {"tools": tools(128)},
    "schema": {"response_format": schema(130)},
    "functions": {"functions": [one["function"] for one in tools(80)]},
}


def config(upstream: RecordingUpstream, l0: int | str, **sections: Any) -> Message:
    return {
        "upstream": {"base_url": upstream.base_url},
        "tiers": {"l0": {"tokens": l0}},
        "prefetch": {"max_pages": 0},
        **sections,
    }


def says(request: Message, index: int) -> Answer:
    return answer(request, message_of(f"Seen {index}. {filler(f'a{index}', 60)}"))


async def post(client: httpx.AsyncClient, messages: Sequence[Message], **fields: Any) -> httpx.Response:
    sent = {"model": "gpt-4o", "messages": list(messages), **fields}
    return await client.post(CHAT, json=sent)


@pytest.mark.parametrize("kind", [*UNPAGEABLE, "system"])
async def test_what_fits_only_a_larger_window_goes_up_as_it_came(kind: str) -> None:
    system: list[Message] = [{"role": "system", "content": filler("s", 4000)}] if kind == "system" else []
    sent = {"messages": [*system, *HELLO], **UNPAGEABLE.get(kind, {})}
    cases = [(m, stream) for m in ("gpt-4o", "nobody-knows-me") for stream in (False, True)]
    bodies = [json.dumps({"model": m, "stream": stream, **sent}).encode() for m, stream in cases]
    async with RecordingUpstream(says) as upstream:
        with in_process_server(config(upstream, 4000)) as url:
            async with raw(url) as client:
                for (_, stream), body in zip(cases, bodies, strict=True):
                    got = await client.post(
                        CHAT, content=body, headers={"content-type": "application/json"}
                    )
                    assert got.status_code == 200, got.text
                    if not stream:
                        assert "tiers.l0.tokens" in got.headers[WARNING] and got.headers[WARNING].isascii()
    assert [recorded.body for recorded in upstream.calls] == bodies


async def test_an_assumed_window_refuses_nothing() -> None:
    """32,000 is our guess; the key that the warning names is the model's."""
    async with RecordingUpstream(says) as upstream:
        with in_process_server(config(upstream, "auto")) as url:
            async with raw(url) as client:
                system = {"role": "system", "content": filler("s", 25_000)}
                got = await post(client, [system, *HELLO], model="nobody-knows-me")
    assert got.status_code == 200 and len(upstream.calls) == 1
    assert "models.<name>.window_tokens" in got.headers[WARNING]


async def test_nothing_is_said_where_everything_fits() -> None:
    async with RecordingUpstream(says) as upstream:
        with in_process_server(config(upstream, 16_000)) as url:
            async with raw(url) as client:
                got = await post(client, HELLO, tools=tools(20))
    assert got.status_code == 200 and WARNING not in got.headers


@pytest.mark.parametrize("window", [{"window_tokens": 3000}, {"window_tokens": 6000}])
async def test_a_configured_window_is_upstreams_to_defend(window: Message) -> None:
    """Even there the request goes up as it is, and upstream's own words come back."""

    def refuses(request: Message, index: int) -> Answer:
        return error(400, "This is upstream's own sentence: no.")

    async with RecordingUpstream(refuses) as upstream:
        with in_process_server(config(upstream, "auto", models={"gpt-4o": window})) as url:
            async with raw(url) as client:
                got = await post(client, [{"role": "system", "content": filler("s", 8000)}, *HELLO])
    assert got.status_code == 400 and "upstream's own sentence" in got.text
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    ("l0", "kind", "asked"),
    [
        (4000, "tools", {}),
        (8000, "schema", {"max_completion_tokens": 100_000}),
        (24_000, "system", {"max_tokens": 8000}),
    ],
)
async def test_a_conversation_grows_in_what_is_left_and_keeps_its_prefix(
    l0: int, kind: str, asked: Message
) -> None:
    """Sixty turns: epochs, not a rebuild each turn, and never near the model's own window."""
    words = 9500  # of a coding agent's system prompt: about 19,000 tokens
    system = [{"role": "system", "content": filler("s", words)}] if kind == "system" else []
    fields = {**UNPAGEABLE.get(kind, {}), **asked}
    messages: list[Message] = [*system]
    rebuilt = 0
    async with RecordingUpstream(says) as upstream:
        with in_process_server(config(upstream, l0)) as url:
            async with raw(url) as client:
                for turn in range(60):
                    messages.append({"role": "user", "content": f"Turn {turn}. {filler(f'u{turn}', 60)}"})
                    got = await post(client, messages, **fields)
                    assert got.status_code == 200, got.text
                    assert "tiers.l0.tokens" in got.headers[WARNING]
                    messages.append(got.json()["choices"][0]["message"])
    calls = [c for c in upstream.calls if developer(c)]
    fixed = count_request_tokens({**upstream.calls[0].json, "messages": [*system]})
    assert len(calls) > 30, "it never paged"
    for call in calls:
        assert count_request_tokens(call.json) <= fixed + max(l0 // 4, 1024) + 64
    for before, now in pairwise(calls):
        rebuilt += not kept(before, now)
    assert rebuilt <= 30
    assert not upstream.violations


def kept(before: Recorded, now: Recorded) -> bool:
    return goes_on(messages_span(before.body).encode(), messages_span(now.body).encode())


async def test_a_terminal_agents_outputs_are_paged_over_sockets() -> None:
    """All tool outputs are system messages, and each is answered: no user speaks but once."""
    messages: list[Message] = [
        {"role": "system", "content": "You run commands."},
        {"role": "user", "content": "Read every module."},
    ]
    async with RecordingUpstream(says) as upstream:
        with in_process_server(config(upstream, 12_000)) as url:
            async with raw(url) as client:
                for turn in range(40):
                    got = await post(client, messages)
                    assert got.status_code == 200, got.text
                    output = {"role": "system", "content": f"Ran heron{turn}q. {filler(f'o{turn}', 700)}"}
                    messages += [got.json()["choices"][0]["message"], output]
    last = upstream.calls[-1]
    assert developer(last) and "heron38q" in last.body.decode()
    for call in upstream.calls:
        assert count_request_tokens(call.json) <= 12_000
    assert not upstream.violations
