"""Clients that say their newest messages otherwise in the next request, over real sockets.

A chat with retrieval sends its question with what was retrieved and keeps it without; a role play takes its note along,
some messages further up (tests/conversation/test_rewritten.py: whoever else says something otherwise). The part before that goes
upstream with the same bytes, also by a server that was killed in between, and the answers' pages are all
still there.
"""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.e2e.harness import Recorded, ServerProcess, message_of, messages_span, together
from tests.e2e.script import Chat, Message, Script, complete, developer, fault, filler, ransack
from tests.e2e.story import assert_same
from tests.e2e.test_kill import client_of, scripted

TURNS = 20
KILLED = (11, 16)  # before these turns
FAULTS = (13, 17)  # turns in which the model looks something up
KINDS = ("user", "note")
DEPTH = 4  # messages behind a note


def dressed(kind: str, turn: int, kept: list[Message]) -> list[Message]:
    """The messages as they are sent; the last one is the question, kept as `question` has it."""
    text = question(turn)["content"]
    retrieved = f"retrieved{turn}q. {filler(str(turn), 120)}"
    if kind == "user":
        return [*kept, {"role": "user", "content": f"Use this context: {retrieved} Question: {text}"}]
    at = max(0, len(kept) - DEPTH + 1)
    return [*kept[:at], {"role": "user", "content": f"Reminder: {retrieved}"}, *kept[at:], question(turn)]


def question(turn: int) -> Message:
    return {"role": "user", "content": f"Note asked{turn}q. {filler(f'u{turn}', 40)}"}


async def converse(script: Script, chat: Chat, kind: str, server: ServerProcess | None) -> None:
    for turn in range(TURNS):
        if server is not None and turn in KILLED:
            server.kill()
            await asyncio.to_thread(server.restart)
        said = message_of(f"Noted answered{turn}q. {filler(f'a{turn}', 60)}")
        script.plan(f"turn{turn}", *([fault("msg_0003")] if turn in FAULTS else []), said)
        sent = dressed(kind, turn, chat.messages)
        got = await complete(chat.client, sent, f"turn{turn}", stream=turn % 2 == 0)
        chat.messages += [question(turn), got.message]


def paged(requests: list[Recorded]) -> list[Recorded]:
    return [recorded for recorded in requests if developer(recorded)]


@pytest.mark.parametrize("kind", KINDS)
async def test_invariants_5_and_7_only_the_rewritten_part_is_sent_anew_also_after_sigkill(
    kind: str,
) -> None:
    async with scripted() as (one, config_one), scripted() as (two, config_two):
        with together(ServerProcess(config_one), ServerProcess(config_two)) as (server, quiet):
            async with client_of(server.base_url) as a, client_of(quiet.base_url) as b:
                chats = Chat(a), Chat(b)
                await asyncio.gather(
                    converse(one, chats[0], kind, server), converse(two, chats[1], kind, None)
                )
                marks = [f"{word}{turn}q" for turn in range(TURNS) for word in ("asked", "answered")]
                found = await ransack(one, chats[0], "all", 2 * TURNS, marks)
    assert_same(one, two)  # of the turns that both were told
    assert not (missing := [mark for mark in marks if mark not in found]), missing
    assert not [turn for turn in range(TURNS) if f"retrieved{turn}q" in found]
    rounds = [paged(one.calls[f"turn{turn}"]) for turn in range(TURNS)]
    epochs = {developer(recorded) for made in rounds for recorded in made}
    assert len(epochs) <= 4, f"{len(epochs)} epochs"
    kept = 0
    for turn in range(1, TURNS):
        if not rounds[turn - 1] or developer(rounds[turn - 1][-1]) != developer(rounds[turn][0]):
            continue
        before, now = messages_span(rounds[turn - 1][-1].body), messages_span(rounds[turn][0].body)
        at = before.rfind('{"role"', 0, before.index(f"retrieved{turn - 1}q"))
        assert os.path.commonprefix([before, now]).startswith(before[:at])
        assert f"retrieved{turn - 1}q" not in now
        kept += 1
    assert kept >= 6, "the window has to live longer than a turn"


