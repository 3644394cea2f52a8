"""What upstream bills decides budgets, so it is part of the log: a server that is killed again and
again sends the requests of one that was not, whatever its upstream bills (invariants 5 and 7).

And an upstream that reads only the end of a long prompt, and says so by its bill alone, is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import httpx

from tests.e2e.harness import (
    Answer,
    RecordingUpstream,
    answer,
    count_request_tokens,
    message_of,
    together,
)
from tests.e2e.processes import ServerProcess
from tests.e2e.script import filler, paged_config

FULL = os.environ.get("LLM_PAGER_E2E_FULL") == "1"
TURNS = 44
# The turns in which the server is killed. "between": after the answer was read. "asked": while upstream
# is at work, so that nothing of the turn is stored. "unread": it is stored, and the client has to ask again.
MOMENTS = ("between", "asked", "unread")
KILLS = {3 + 4 * i + i % 3: MOMENTS[i % 3] for i in range(9)}
Message = dict[str, Any]


class Billed:
    """An upstream that bills `factor` times what a request has, and one conversation with it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.upstream = RecordingUpstream(self._respond)
        self.before_answer: Callable[[], object] | None = None
        self.bodies: list[list[bytes]] = []  # of each turn

    def _respond(self, request: Message, index: int) -> Answer:
        if (call := self.before_answer) is not None:
            self.before_answer = None
            call()
        self.bodies[-1].append(self.upstream.calls[index].body)
        asked = str(request["messages"][-1]["content"])[-9:]
        said = message_of(f"Noted {asked}. {filler(asked, 25)}")
        return answer(request, said, factor=self.factor)

    async def tell(self, server: ServerProcess, kills: dict[int, str]) -> None:
        """The whole conversation; every third turn is streamed."""
        history: list[Message] = []
        async with httpx.AsyncClient(timeout=30) as client:
            for turn in range(TURNS):
                self.bodies.append([])
                text = f"Note this: {filler(f'u{turn}', 45)} word{turn:05d}"
                history.append({"role": "user", "content": text})
                body = {"model": "house-model", "messages": history, "stream": turn % 3 == 2}
                moment = kills.get(turn)
                if moment == "asked":
                    self.before_answer = server.kill
                    with contextlib.suppress(httpx.HTTPError):
                        await said(client, server, body)
                    await asyncio.to_thread(server.restart)
                answered = await said(client, server, body)
                if moment in ("between", "unread"):
                    server.kill()
                    await asyncio.to_thread(server.restart)
                if moment == "unread":
                    assert await said(client, server, body) == answered
                history.append(message_of(answered))


async def said(client: httpx.AsyncClient, server: ServerProcess, body: Message) -> str:
    reply = await client.post(f"{server.base_url}/chat/completions", json=body)
    reply.raise_for_status()
    if not body["stream"]:
        return str(reply.json()["choices"][0]["message"]["content"])
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    deltas = [c["delta"] for event in events for c in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


async def killed_and_quiet(factor: float) -> tuple[Billed, Billed]:
    one, two = Billed(factor), Billed(factor)
    async with one.upstream, two.upstream:
        l0 = {"l0": {"tokens": 2000, "reserve_tokens": 256}}
        servers = [ServerProcess(paged_config(b.upstream, tiers=l0)) for b in (one, two)]
        with together(*servers) as (server, quiet):
            await asyncio.gather(one.tell(server, KILLS), two.tell(quiet, {}))
    assert not one.upstream.failures and not two.upstream.failures
    return one, two


async def test_invariant_7_a_kill_changes_no_request_whatever_upstream_bills() -> None:
    assert len(KILLS) == 9 and max(KILLS) < TURNS
    pairs = await asyncio.gather(*map(killed_and_quiet, (1.13, 1.4) if FULL else (1.4,)))
    for killed, quiet in pairs:
        again = [turn for turn, bodies in enumerate(killed.bodies) if len(bodies) > 1]
        assert again == [turn for turn, moment in KILLS.items() if moment != "between"]
        assert all(len(bodies) == 1 for bodies in quiet.bodies)
        differ = [
            turn
            for turn in range(TURNS)
            if any(body != quiet.bodies[turn][0] for body in killed.bodies[turn])
        ]
        assert not differ, f"at factor {killed.factor} these turns' requests differ: {differ}"
        paged = [turn for turn in range(TURNS) if b"<VM:RULES>" in quiet.bodies[turn][0]]
        assert len(paged) > TURNS // 2, "the story is too short to be paged"
        sizes = [count_request_tokens(json.loads(quiet.bodies[turn][0])) for turn in paged]
        assert max(sizes[-20:]) * killed.factor <= 2000, "what was learned is in use"
