"""Where the scenes are played: a bare upstream, and llm-pager in front of the same upstream.

Promises: `same` plays a scene on both and fails unless the client saw the same; it and `both` fail when a
request broke the API's rules, when the window was not smaller than the conversation, when an answer
of the scene was left over, or when the memory rounds that belong to the scene did not happen.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.clients.scenes import (
    BUDGET_TOKENS,
    L0_TOKENS,
    RESERVE_TOKENS,
    SCENES,
    Message,
    Turn,
)
from tests.e2e.harness import (
    Answer,
    Recorded,
    RecordingUpstream,
    Response,
    ServerProcess,
    Stream,
    answer,
    count_request_tokens,
)
from tests.e2e.talk import VM_NAMES, assert_no_vm, config, names_of, texts_of

# What a provider sends beside every answer; the clients offer it to programs.
HEADERS = (
    (b"x-request-id", b"req_0123456789"),
    (b"openai-processing-ms", b"12"),
    (b"openai-organization", b"org-test"),
    (b"openai-version", b"2020-10-01"),
    (b"x-ratelimit-limit-requests", b"10000"),
    (b"x-ratelimit-remaining-tokens", b"149984"),
    (b"x-ratelimit-reset-tokens", b"6ms"),
)

Run = Callable[[str, str], Any | Awaitable[Any]]


class Library:
    """A client's library, imported when a test first asks it for something: every process that collects the tests would
    import it for seconds. The test is skipped where it is not installed."""

    def __init__(self, module: str, package: str) -> None:
        self._module, self._package = module, package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks every name of a module whether it is a test or a fixture
            raise AttributeError(name)
        module = pytest.importorskip(self._module, reason=f"{self._package} is not installed: pip install '.[clients]'")
        return getattr(module, name)


@dataclass
class Play:
    """One client in one scene: what it has asked and how far the model has come."""

    key: str
    turns: tuple[Turn, ...]
    at: int = 0  # the turn that is answered next
    rounds: int = 0  # memory messages already made in it
    memory_calls: int = 0  # in the whole play
    calls: list[Recorded] = field(default_factory=list)

    def respond(self, recorded: Recorded) -> Answer:
        """The model's next message. To who asks again, the last reply is said again, without
        its memory calls."""
        self.calls.append(recorded)
        request = recorded.json
        turn = self.turns[min(self.at, len(self.turns) - 1)]
        again = self.at >= len(self.turns)
        offered = request.get("tool_choice") != "none" and VM_NAMES[0] in names_of(recorded)
        if offered and not again and self.rounds < len(turn.first):
            self.rounds += 1
            self.memory_calls += 1
            return answer(request, turn.first[self.rounds - 1])
        self.at, self.rounds = self.at + 1, 0
        if callable(turn.reply):
            return turn.reply(request)
        if not isinstance(turn.reply, dict):
            return turn.reply
        reply: Message = turn.reply
        if offered and not again and turn.beside:
            self.memory_calls += len(turn.beside)
            reply = {**reply, "tool_calls": [*turn.beside, *reply["tool_calls"]]}
        return answer(request, reply)


class Stage:
    """The two base URLs, and the plays by their API keys."""

    _numbers = itertools.count(1)

    def __init__(self, upstream: RecordingUpstream, server: ServerProcess) -> None:
        self.bare, self.paged = upstream.base_url, server.base_url
        self.plays: dict[str, Play] = {}

    def play(self, scene: str) -> Play:
        """A client with an API key of its own, about to play the scene."""
        play = Play(f"sk-client-{next(self._numbers)}", SCENES[scene])
        self.plays[play.key] = play
        return play

    def respond(self, recorded: Recorded) -> Answer:
        key = (recorded.header("authorization") or "").removeprefix("Bearer ")
        reply = self.plays[key].respond(recorded)
        if isinstance(reply, Response | Stream):
            return replace(reply, headers=(*reply.headers, *HEADERS))
        return reply


@contextmanager
def upstream_in_a_thread(
    respond: Callable[[Recorded], Answer], other: Callable[[Recorded], Answer] | None = None
) -> Iterator[RecordingUpstream]:
    """The recording upstream with a loop of its own, since clients block the thread of the test."""
    upstream = RecordingUpstream(lambda request, i: respond(upstream.calls[i]), other=other)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(upstream.start(), loop).result(10)
    try:
        yield upstream
    finally:
        asyncio.run_coroutine_threadsafe(upstream.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def stage() -> Iterator[Stage]:
    """The upstream in a thread, and the server as its own process."""
    made: list[Stage] = []
    l0 = {"tokens": L0_TOKENS, "reserve_tokens": RESERVE_TOKENS}
    with upstream_in_a_thread(lambda recorded: made[0].respond(recorded)) as upstream:
        with ServerProcess(config(upstream, tiers={"l0": l0})) as server:
            made.append(Stage(upstream, server))
            yield made[0]
    assert not upstream.failures, upstream.failures


async def check_same(stage: Stage, scene: str, run: Run, *, faults: bool = True) -> Any:
    """Plays the scene on the bare upstream and on llm-pager; what the client saw, which is the same.

    `run(base_url, api_key)` is the client; it returns JSON-like data. `faults`: whether the
    client's requests leave room for memory tools (it forces no tool).
    """
    expected, seen = await both(stage, scene, run, faults=faults)
    assert seen == expected
    return seen


async def both(stage: Stage, scene: str, run: Run, *, faults: bool = True) -> tuple[Any, Any]:
    """What the client saw on the bare upstream and on llm-pager, for what cannot be the same."""
    plays = stage.play(scene), stage.play(scene)
    expected = await value(run(stage.bare, plays[0].key))
    seen = await value(run(stage.paged, plays[1].key))
    check_plays(*plays, faults=faults)
    assert_no_vm(json.dumps(seen, default=repr))
    return expected, seen


def check_plays(bare: Play, paged: Play, *, faults: bool = True) -> None:
    """Both plays came to their end, and the second one went through the window."""
    for play in bare, paged:
        violations = [v for c in play.calls for v in c.violations]
        assert not violations, violations
        assert play.at >= len(play.turns), f"{play.at} of {len(play.turns)} turns were asked for"
    assert bare.memory_calls == 0
    assert count_request_tokens(bare.calls[0].json) > BUDGET_TOKENS, "nothing had to be paged"
    assert "<VM:RULES>" in texts_of(paged.calls[0])
    for recorded in paged.calls:
        if "<VM:RULES>" in texts_of(recorded):
            assert count_request_tokens(recorded.json) <= BUDGET_TOKENS
    wanted = sum(len(t.first) + len(t.beside) for t in paged.turns) if faults else 0
    assert paged.memory_calls == wanted, f"{paged.memory_calls} of {wanted} memory calls"


async def value(result: Any) -> Any:
    """What a client returned, whether it is the sync or the async one."""
    return await result if inspect.isawaitable(result) else result


async def items(stream: Any) -> Any:
    """The items of a stream, sync or async."""
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item


def usage_fields(usage: Any) -> list[str]:
    """The names of the fields that a client's usage has, without ours."""
    found = usage if isinstance(usage, dict) else usage.model_dump(exclude_unset=True)
    return sorted(set(found) - {"vm"})
