"""Real agent transcripts, replayed with a small budget over real sockets, streaming.

The client sends what its author recorded; the upstream answers with the recorded assistant turn, and
asks the memory for a page first wherever it may (every third turn). What the client reads has to be
the recorded turn, whatever went on inside. `LLM_PAGER_E2E_FULL=1` replays all transcripts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from proxy.conversation.chunks import MessageBuilder, choices_of
from proxy.sse import EventParser
from tests.e2e.harness import (
    Answer,
    Conversation,
    RecordingUpstream,
    answer,
    call,
    count_request_tokens,
    in_process_server,
    load_trajectories,
    message_of,
    tools_of,
)
from tests.e2e.schema import needs_schema, request_problems, stream_problems

FULL = os.environ.get("LLM_PAGER_E2E_FULL") == "1"
EVERY = 1 if FULL else 12  # of 158
L0_TOKENS, RESERVE_TOKENS = 4500, 500
BUDGET_TOKENS = L0_TOKENS - RESERVE_TOKENS
FAULT_EVERY = 3  # turns


@dataclass
class Replayed:
    """What went wrong, sentence by sentence, and how much was played."""

    turns: int = 0
    faults: int = 0
    paged: int = 0
    texts: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    budget: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)


class Model:
    """Says `recorded`; before that, in a turn that `faults`, asks for a page if it is offered one."""

    def __init__(self, replayed: Replayed) -> None:
        self.replayed = replayed
        self.recorded: dict[str, Any] = {}
        self.faults = False
        self.upstream = RecordingUpstream(self._respond)

    def _respond(self, request: dict[str, Any], index: int) -> Answer:
        names = [tool["function"]["name"] for tool in request.get("tools") or ()]
        if self.faults and "page_fault" in names and request.get("tool_choice") != "none":
            self.faults = False
            self.replayed.faults += 1
            wanted = call(f"call_vm_{index}", "page_fault", {"page_id": "msg_0002"})
            return answer(request, message_of(None, [wanted]))
        return answer(request, self.recorded)


def test_a_transcript_is_replayed_as_it_was_recorded(replayed: Replayed) -> None:
    assert replayed.turns > 100
    assert replayed.paged > 50, "the budget was not small enough"
    assert replayed.faults > 20, "the memory was hardly asked"
    assert not replayed.texts, "\n".join(replayed.texts[:5])


def test_invariant_08_no_call_and_no_result_is_orphaned(replayed: Replayed) -> None:
    assert not replayed.rules, "\n".join(replayed.rules[:5])


def test_invariant_03_every_request_is_within_the_budget(replayed: Replayed) -> None:
    assert not replayed.budget, "\n".join(replayed.budget[:5])


def test_requests_and_chunks_fit_the_apis_own_schema(replayed: Replayed) -> None:
    needs_schema()
    assert len(replayed.requests) == replayed.turns + replayed.faults
    found = [p for request in replayed.requests for p in request_problems(request)]
    assert not found, "\n".join(found[:5])
    assert len(replayed.streams) == replayed.turns
    found = [p for stream in replayed.streams for p in stream_problems(stream)]
    assert not found, "\n".join(found[:5])


@pytest.fixture(scope="module")
def replayed() -> Iterator[Replayed]:
    """All sampled transcripts, one after the other, through one server."""
    import asyncio

    load_trajectories()  # skips here where the data is absent
    out = Replayed()
    asyncio.run(_replay_all(out))
    yield out


async def _replay_all(out: Replayed) -> None:
    model = Model(out)
    async with model.upstream:
        config = {
            "upstream": {"base_url": model.upstream.base_url},
            "tiers": {"l0": {"tokens": L0_TOKENS, "reserve_tokens": RESERVE_TOKENS}},
        }
        with in_process_server(config) as base_url:
            async with httpx.AsyncClient(timeout=60) as client:
                for transcript in load_trajectories()[::EVERY]:
                    await _replay(client, base_url, model, transcript)
    assert not model.upstream.failures, model.upstream.failures[0]


async def _replay(
    client: httpx.AsyncClient, base_url: str, model: Model, transcript: Conversation
) -> None:
    out, tools = model.replayed, tools_of(transcript)
    headers = {"authorization": f"Bearer {transcript.id}"}
    for turn, at in enumerate(_answers(transcript)):
        model.recorded = transcript.messages[at]
        model.faults = turn % FAULT_EVERY == FAULT_EVERY - 1
        request = {"model": "gpt-4o", "stream": True, "messages": transcript.messages[:at]}
        if tools:
            request["tools"] = tools
        before = len(model.upstream.calls)
        reply = await client.post(f"{base_url}/chat/completions", json=request, headers=headers)
        where = f"{transcript.id}, turn {turn}"
        out.turns += 1
        if reply.status_code != 200:
            out.texts.append(f"{where}: {reply.status_code} {reply.text[:300]}")
            continue
        got = _message(reply.content)
        if not _same(got, model.recorded):
            out.texts.append(f"{where}: got {str(got)[:300]}, not {str(model.recorded)[:300]}")
        for recorded in model.upstream.calls[before:]:
            out.rules += [f"{where}: {violation}" for violation in recorded.violations]
            out.requests.append(recorded.json)
            if recorded.json["messages"] == request["messages"]:
                continue  # the client's own bytes
            out.paged += 1
            tokens = count_request_tokens(recorded.json)
            if tokens > BUDGET_TOKENS:
                out.budget.append(f"{where}: {tokens} tokens")
        out.streams.append(reply.text)


def _answers(transcript: Conversation) -> list[int]:
    """Indexes of the model's turns, after a user's message or after results."""
    roles = [message["role"] for message in transcript.messages]
    return [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]]


def _message(stream: bytes) -> dict[str, Any]:
    parser, builder = EventParser(), MessageBuilder()
    for event in [*parser.feed(stream), *parser.close()]:
        if event.data and event.data != b"[DONE]":
            for choice in choices_of(json.loads(event.data)):
                builder.add(choice["delta"])
    return builder.build()


def _same(got: dict[str, Any], recorded: dict[str, Any]) -> bool:
    calls = [[c["id"], c["function"]] for c in got.get("tool_calls") or ()]
    wanted = [[c["id"], c["function"]] for c in recorded.get("tool_calls") or ()]
    return (got.get("content") or "") == (recorded.get("content") or "") and calls == wanted
