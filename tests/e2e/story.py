"""One conversation with everything in it, told to two servers whose upstream requests must agree.

It has a client's tool, faults, a search, a mixed call and an epoch that begins within a turn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from openai import AsyncOpenAI

from tests.e2e.harness import call, message_of
from tests.e2e.script import (
    LOOKUP,
    SYSTEM,
    Chat,
    Script,
    developer,
    fault,
    filler,
    ids,
    ransack,
    search,
    talk,
)

MIXED = message_of(
    None, [call("call_m1", "page_fault", {"page_id": "msg_0005"}), call("call_m2", "lookup", {"word": "m"})]
)


@dataclass
class Teller:
    """The client and the model of one server; `disturb(point)` is called at each named point."""

    script: Script
    chat: Chat
    disturb: Callable[[str], Awaitable[None]]
    marks: list[str] = field(default_factory=list)

    async def story(self) -> None:
        """Every step ends with an answer that the client has read to its end."""
        script, chat = self.script, self.chat
        await self.turns("short", 3)
        script.plan("tool", message_of(None, [call("call_1", "lookup", {"word": "toolword"})]))
        got = await chat.say("Use your tool: askedmark.", "tool", stream=True)
        assert got.calls[0]["id"] == "call_1"
        await self.disturb("a client's tool call is open, nothing was evicted")
        script.plan("tool/result", message_of("The tool said resultmark, so answermark."))
        await chat.result("call_1", f"resultmark {filler('r', 30)}", "tool/result")
        self.marks += ["askedmark", "resultmark", "answermark"]
        await self.turns("long", 9)
        assert developer(script.calls["long/8"][0]), "the story is too short to be paged"
        await self.disturb("an epoch has begun")
        await self.turns("between", 1)
        script.plan("faults", fault("msg_0002", "msg_0007"), message_of("Faulted, faultmark."))
        await chat.say("What was it?", "faults", stream=True)
        self.marks.append("faultmark")
        await self.disturb("pages were faulted in")
        script.plan("mixed", MIXED)
        got = await chat.say("Do both.", "mixed")
        assert [c["id"] for c in got.calls] == ["call_m2"]
        await self.disturb("a client's call of a mixed message is open")
        script.plan("mixed/result", search("short", "tool"), message_of("Both done, mixedmark."))
        await chat.result("call_m2", "The word m.", "mixed/result", stream=True)
        self.marks.append("mixedmark")
        await self.epoch_within_a_turn()
        await self.disturb("an epoch began within a turn")
        await self.turns("late", 3)

    async def turns(self, name: str, count: int) -> None:
        await talk(self.chat, self.script, name, count, self.marks)

    async def epoch_within_a_turn(self) -> None:
        script = self.script
        pages = ids(1, 12)
        rounds = [fault(*pages[i : i + 3], prefix=f"e{i}") for i in range(0, 12, 3)]
        script.plan("epoch", *rounds, message_of("Read them all, epochmark."))
        await self.chat.say("Read everything again.", "epoch", stream=True)
        made = [developer(recorded) for recorded in script.calls["epoch"]]
        assert len(made) > 2 and made[0] != made[-1], "no epoch began within the turn"
        self.marks.append("epochmark")


def chat_of(client: AsyncOpenAI) -> Chat:
    return Chat(client, [SYSTEM], tools=[LOOKUP])


async def nothing(point: str) -> None:
    """The undisturbed server."""


def assert_same(disturbed: Script, quiet: Script) -> None:
    """Every turn that both were told went upstream with the same bytes, round by round."""
    assert quiet.calls
    for tag in quiet.calls:
        one, other = disturbed.bodies(tag), quiet.bodies(tag)
        assert len(one) == len(other), f"{tag}: {len(one)} rounds, undisturbed {len(other)}"
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert a == b, f"{tag}, round {number}: {difference(a, b)}"


def difference(a: bytes, b: bytes) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"at byte {at}: {a[at - 60 : at + 60]!r} is not {b[at - 60 : at + 60]!r}"


async def reread(teller: Teller) -> str:
    """All pages, read by a client that sends its last four messages only: the rest is the server's."""
    chat = teller.chat.fork()
    chat.keep = 4
    assert teller.marks[0] not in str(chat.messages[-4:])
    await talk(chat, teller.script, "moves", 3, [])  # its front has to move on before it is believed
    return await ransack(teller.script, chat, "reread", len(chat.messages), teller.marks)
