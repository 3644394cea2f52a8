"""What the tests of identity, recovery and replicas share: a scripted model and a client that talks.

Promises: what the model says depends on the turn's tag (a header that goes upstream, not a part of
the body) and on the round within it, so that two servers given the same turns get the same answers
and their upstream requests can be compared byte for byte; a client keeps its history as the
official client gives it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from tests.e2e.harness import (
    Answer,
    Recorded,
    RecordingUpstream,
    ServerProcess,
    answer,
    call,
    message_of,
)
from tests.e2e.schema import check_requests

MODEL = "gpt-4o"
TAG = "x-turn-tag"
Message = dict[str, Any]
Round = Message | Callable[[Message], Answer]

SYSTEM: Message = {"role": "system", "content": "You keep notes. Today is a day."}
LOOKUP: Message = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a word up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


def paged_config(upstream: RecordingUpstream, **sections: Any) -> dict[str, Any]:
    """A window that a dozen of `text_of` turns outgrow; faults are only bounded by the room."""
    return {
        "upstream": {"provider": "openai", "base_url": upstream.base_url},
        "tiers": {"l0": {"tokens": 4000, "reserve_tokens": 1000}},
        "faults": {"max_per_turn": 64, "max_tokens_per_turn": 100_000, "max_rounds": 24},
        "prefetch": {"max_pages": 2, "max_tokens": 300},
        "manifest": {"max_tokens": 300},
        **sections,
    }


def filler(seed: str, words: int) -> str:
    """Plain words that differ with the seed and carry nothing that a test looks for."""
    stems = "amber basin cedar delta ember fjord grove heron inlet juniper kelp lagoon".split()
    start = sum(seed.encode())
    return " ".join(f"{stems[(start + 5 * i) % 12]}{(start * 7 + i) % 89}" for i in range(words))


class Script:
    """The model's side: `rounds[tag]` are its messages in the turn with that tag, in order.

    A round may be a function of the request that returns any answer. After the last round of a
    turn, or for a tag without any, the model says `Answer to <tag>.`
    """

    def __init__(self) -> None:
        self.rounds: dict[str, Sequence[Round]] = {}
        self.calls: dict[str, list[Recorded]] = {}
        self.upstream = RecordingUpstream(self._respond)
        self.on_call: Callable[[Recorded], object] | None = None  # before each answer
        self.on_plan: Callable[[], object] | None = None  # before each turn

    def _respond(self, request: Message, index: int) -> Answer:
        recorded = self.upstream.calls[index]
        tag = recorded.header(TAG) or ""
        made = self.calls.setdefault(tag, [])
        made.append(recorded)
        if self.on_call is not None:
            self.on_call(recorded)
        rounds = self.rounds.get(tag, ())
        if len(made) > len(rounds):
            return answer(request, message_of(f"Answer to {tag}."))
        said = rounds[len(made) - 1]
        return said(request) if callable(said) else answer(request, said)

    def plan(self, tag: str, *rounds: Round) -> None:
        """What the model says in the next turn with this tag."""
        self.rounds[tag] = rounds
        self.calls.pop(tag, None)
        if self.on_plan is not None:
            self.on_plan()

    def bodies(self, tag: str) -> list[bytes]:
        """The upstream request bodies of one turn."""
        return [recorded.body for recorded in self.calls.get(tag, ())]

    def check(self) -> None:
        """No request broke the API's rules and no round raised."""
        assert not self.upstream.failures, self.upstream.failures[0]
        assert not self.upstream.violations, self.upstream.violations[:3]
        check_requests(self.upstream.calls)


@dataclass
class Got:
    """What the client read: the message as it would echo it."""

    message: Message
    finish: str | None
    chunks: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.message.get("content") or ""

    @property
    def calls(self) -> list[Message]:
        return self.message.get("tool_calls") or []


async def complete(
    client: AsyncOpenAI, messages: Sequence[Message], tag: str, *, stream: bool = False,
    headers: dict[str, str] | None = None, **fields: Any,
) -> Got:
    """One request of the official client, read to its end."""
    sent: dict[str, Any] = {
        "model": MODEL,
        "messages": list(messages),
        "extra_headers": {TAG: tag, **(headers or {})},
        **fields,
    }
    if not stream:
        reply = await client.chat.completions.create(**sent)
        choice = reply.choices[0]
        return Got(choice.message.model_dump(exclude_none=True), choice.finish_reason)
    got = Got({"role": "assistant", "content": None}, None)
    calls: dict[int, Message] = {}
    async for chunk in await client.chat.completions.create(stream=True, **sent):
        got.chunks.append(chunk)
        for choice in chunk.choices:
            got.finish = choice.finish_reason or got.finish
            if choice.delta.content:
                got.message["content"] = got.text + choice.delta.content
            for delta in choice.delta.tool_calls or ():
                _add_call(calls, delta)
    if calls:
        got.message["tool_calls"] = [calls[i] for i in sorted(calls)]
    return got


def _add_call(calls: dict[int, Message], delta: Any) -> None:
    made = calls.setdefault(delta.index, call(delta.id or "", "", ""))
    if delta.function and delta.function.name:
        made["function"]["name"] += delta.function.name
    if delta.function and delta.function.arguments:
        made["function"]["arguments"] += delta.function.arguments


class Chat:
    """A client with its own history. `keep`: how many of its last messages it sends beside its
    system message (None: all)."""

    def __init__(
        self, client: AsyncOpenAI, messages: Sequence[Message] = (SYSTEM,), *,
        keep: int | None = None, headers: dict[str, str] | None = None, **fields: Any,
    ) -> None:
        self.client = client
        self.messages = list(messages)
        self.keep, self.headers, self.fields = keep, headers, fields

    def fork(self, upto: int | None = None) -> Chat:
        """Another client of the same kind with the history's first `upto` messages."""
        return Chat(
            self.client, self.messages[:upto], keep=self.keep, headers=self.headers, **self.fields
        )

    async def say(self, text: str, tag: str, *, stream: bool = False) -> Got:
        return await self.send({"role": "user", "content": text}, tag, stream=stream)

    async def result(self, call_id: str, text: str, tag: str, *, stream: bool = False) -> Got:
        reply = {"role": "tool", "tool_call_id": call_id, "content": text}
        return await self.send(reply, tag, stream=stream)

    async def send(self, message: Message, tag: str, *, stream: bool = False) -> Got:
        """Send the history with one more message; both it and the answer stay in the history."""
        history = [*self.messages, message]
        sent = history
        if self.keep is not None:
            leading = 1 if history[0]["role"] == "system" else 0
            sent = history[:leading] + history[leading:][-self.keep :]
        got = await complete(
            self.client, sent, tag, stream=stream, headers=self.headers, **self.fields
        )
        self.messages = [*history, got.message]
        return got


async def talk(chat: Chat, script: Script, name: str, turns: int, marks: list[str]) -> None:
    """`turns` turns of about 320 tokens. Each has two marks, one in what the user says and one in
    the answer; they are added to `marks`."""
    for turn in range(turns):
        said, answered = f"{name}u{turn}q", f"{name}a{turn}q"
        tag = f"{name}/{turn}"
        script.plan(tag, message_of(f"Noted {answered}. {filler(answered, 60)}"))
        await chat.say(f"Note {said}. {filler(said, 60)}", tag, stream=turn % 2 == 1)
        marks += [said, answered]


def fault(*pages: str, prefix: str = "f") -> Message:
    """The model faults pages in, one call each."""
    calls = [call(f"call_{prefix}_{p}", "page_fault", {"page_id": p}) for p in pages]
    return message_of(None, calls)


def search(*queries: str, prefix: str = "s") -> Message:
    """The model searches."""
    calls = [call(f"call_{prefix}_{i}", "search_pages", {"query": q}) for i, q in enumerate(queries)]
    return message_of(None, calls)


def ids(first: int, last: int) -> list[str]:
    """Page ids of the first..last message, both 1-based."""
    return [f"msg_{i:04d}" for i in range(first, last + 1)]


async def ransack(script: Script, chat: Chat, name: str, pages: int, words: Sequence[str]) -> str:
    """The model searches for every word and faults every page, a few in a turn, each turn a fork of
    the chat; what it was shown in all of them."""
    every = ids(1, pages)
    looks = [search(*words[i : i + 8]) for i in range(0, len(words), 8)]
    looks += [fault(*every[i : i + 3]) for i in range(0, pages, 3)]
    made: list[Recorded] = []
    for i, look in enumerate(looks):
        tag = f"{name}/ransack/{i}"
        script.plan(tag, look)
        await chat.fork().say("Look everywhere.", tag)
        assert len(script.calls[tag]) == 2, f"{tag}: the memory tools were not on offer"
        made += script.calls[tag]
    return shown_to_model(made)


def shown_to_model(requests: Sequence[Recorded]) -> str:
    """Every text in the requests but the arguments of calls, which are the model's own words."""
    out: list[str] = []
    for recorded in requests:
        for message in recorded.json["messages"]:
            content = message.get("content")
            out.append(content if isinstance(content, str) else json.dumps(content))
    return "\n".join(out)


def developer(recorded: Recorded) -> str | None:
    """The message with the rules: it changes with the epoch and only then."""
    texts = [m["content"] for m in recorded.json["messages"] if m["role"] in ("system", "developer")]
    return next((t for t in texts if isinstance(t, str) and "<VM:RULES>" in t), None)


class Stand:
    """A server with its upstream, and clients whose keys no other test has."""

    _made = 0

    def __init__(self, script: Script, server: ServerProcess) -> None:
        self.script, self.server = script, server
        self._clients: dict[str, AsyncOpenAI] = {}
        Stand._made += 1
        self._prefix = f"test{Stand._made}"

    def client(self, key: str = "k") -> AsyncOpenAI:
        """The test's client with this key: the same one each time."""
        if key not in self._clients:
            self._clients[key] = AsyncOpenAI(
                api_key=f"{self._prefix}-{key}", base_url=self.server.base_url, max_retries=0, timeout=20
            )
        return self._clients[key]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


class Workers:
    """The worker processes of a server, each reachable by itself."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server

    @contextlib.asynccontextmanager
    async def client(self, which: int, key: str = "k") -> AsyncIterator[AsyncOpenAI]:
        """A client with one new connection, which the worker `which` has accepted: the others are
        stopped while it is made, and it is kept alive for the request that follows."""
        others = [pid for i, pid in enumerate(self.server.worker_pids) if i != which]
        only = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        async with httpx.AsyncClient(limits=only, timeout=20, verify=False) as http:
            for pid in others:
                os.kill(pid, signal.SIGSTOP)
            try:
                for pid in others:
                    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                        await asyncio.sleep(0)  # the signal is sent; it takes effect at once
                root = self.server.base_url.removesuffix("/v1")
                assert (await http.get(f"{root}/health")).status_code == 200
            finally:
                for pid in others:
                    os.kill(pid, signal.SIGCONT)
            yield AsyncOpenAI(
                api_key=key, base_url=self.server.base_url, http_client=http, max_retries=0
            )
