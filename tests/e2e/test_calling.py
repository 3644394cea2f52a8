"""A model that never calls loses the VM tools at an epoch, one that calls keeps them; over a restart, streamed or not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from tests.conversation.scenario import WORDS
from tests.e2e.harness import Answer, RecordingUpstream, ServerProcess, answer, message_of

MODEL = "house-model"
TOLD = 24  # turns that tell something, before those that ask for it
Message = dict[str, Any]


def offers(request: Message) -> bool:
    return "search_pages" in {tool["function"]["name"] for tool in request.get("tools", ())}


def replies(request: Message, searching: bool) -> Answer:
    last = request["messages"][-1]
    if searching and offers(request) and last["role"] == "user" and "What did I say" in json.dumps(last):
        function = {"name": "search_pages", "arguments": json.dumps({"query": last["content"][-60:]})}
        return answer(request, message_of(None, [{"id": "call_1", "type": "function", "function": function}]))
    return answer(request, message_of("I do not know."), piece_chars=64)


async def talk(server: ServerProcess, searching: bool, turns: int, history: list[Message], restart_at: int) -> None:
    async with httpx.AsyncClient(timeout=30, headers={"authorization": "Bearer k"}) as http:
        for turn in range(turns):
            if turn == restart_at:
                server.kill()
                await asyncio.to_thread(server.restart)
            text = f"Number {turn} has a {WORDS[turn % TOLD]}, as all of the town knows by heart. " * 3
            if turn >= TOLD:
                text = f"What did I say of the {WORDS[turn % TOLD]} of number {turn % TOLD}?"
            history.append({"role": "user", "content": text})
            request = {"model": MODEL, "messages": history, "stream": turn % 2 == 1}
            (await http.post(f"{server.base_url}/chat/completions", json=request)).raise_for_status()
            history.append({"role": "assistant", "content": "I do not know."})


async def learned(server: ServerProcess) -> Message:
    async with httpx.AsyncClient(headers={"authorization": "Bearer k"}) as http:
        rows = (await http.get(f"{server.base_url.removesuffix('/v1')}/vm/models")).json()["models"]
    found: Message = next(row for row in rows if row["model"] == MODEL)["vm_calls"]["value"]
    return found


def epochs(requests: list[Message]) -> list[list[Message]]:
    """First requests of turns that were paged, one list for each epoch's developer message."""
    found: dict[str, list[Message]] = {}
    for request in requests:
        head = json.dumps(request["messages"][0])
        if "<VM:RULES>" in head and request["messages"][-1]["role"] == "user":
            found.setdefault(head, []).append(request)
    return list(found.values())


async def test_tools_that_nobody_calls_go_at_an_epoch_and_stay_away_after_a_restart() -> None:
    async with RecordingUpstream(lambda request, _: replies(request, False)) as upstream:
        config = {
            "upstream": {"provider": "openai", "base_url": upstream.base_url},
            "tiers": {"l0": {"tokens": 1600}},
        }
        with ServerProcess(config) as server:
            await talk(server, False, 76, [], restart_at=50)
            facts = await learned(server)
            assert "go without the VM tools" in server.log
        requests = [call.json for call in upstream.calls]
        made = epochs(requests)
        assert [offers(epoch[0]) for epoch in (made[0], made[-1])] == [True, False]
        for epoch in made:
            assert len({json.dumps(request.get("tools")) for request in epoch}) == 1
        assert not facts["tools_offered"] and facts["turns_missed"] == 24
        assert "search_pages" not in json.dumps(requests[-1])


async def test_tools_that_are_called_stay() -> None:
    async with RecordingUpstream(lambda request, _: replies(request, True)) as upstream:
        config = {
            "upstream": {"provider": "openai", "base_url": upstream.base_url},
            "tiers": {"l0": {"tokens": 1600}},
        }
        with ServerProcess(config) as server:
            await talk(server, True, 60, [], restart_at=40)
            facts = await learned(server)
        assert facts["tools_offered"] and facts["turns_helped"] > 9
        assert all(offers(request) for epoch in epochs([call.json for call in upstream.calls]) for request in epoch)
