"""A store that lost something, seen through the chat API: a miss of memory, never of an answer (6)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from proxy.conversation import keys, turn_window
from proxy.conversation.records import Record, decode_record
from tests.api.test_chat import Client, answered, client

L0 = {"tokens": 4000, "reserve_tokens": 500}
TURNS = 40
DAMAGED = 30  # turns before something is lost


def question(turn: int) -> dict[str, Any]:
    words = random.Random(turn).sample(("harbour", "ledger", "copper", "orchard", "signal", "violin"), 3)
    return {"role": "user", "content": f"Turn {turn}: what of the {' and the '.join(words)}? " + "Say more. " * 40}


def answer(turn: int) -> str:
    return f"On turn {turn} the answer is {turn * 7919}. " + "It is a long story. " * 30


class Talk:
    """One conversation of a client that sends its whole history."""

    def __init__(self, at: Client) -> None:
        self.at = at
        self.history: list[dict[str, Any]] = []

    async def until(self, last: int) -> None:
        while len(self.history) < 2 * last:
            turn = len(self.history) // 2
            self.history.append(question(turn))
            self.at.upstream.replies = [answered(answer(turn))]
            status, said = await self.at.ask({"model": "gpt-4o", "messages": self.history})
            assert status == 200, said
            self.history.append(said["choices"][0]["message"])

    def lose(self, *lost: bytes) -> None:
        for key in lost:
            assert self.at.memory.store._cache.delete(key)
        self.at.memory.forget()

    def stored(self, letter: bytes) -> list[bytes]:
        return sorted(key for key in self.at.memory.store._cache if key[:1] == letter)

    def records(self) -> list[Record]:
        """In the order of the conversation."""
        found = [self.at.memory.store.get(key) for key in self.stored(keys.RECORD)]
        return sorted((decode_record(data) for data in found if data), key=lambda r: r.end)


@pytest.fixture(autouse=True)
def one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal requests of two stores are equal in their `prompt_cache_key`, too."""
    monkeypatch.setattr("proxy.storage.l2.os.urandom", lambda size: bytes(size))


async def test_lost_blocks_of_the_page_table_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_window, "CHECKPOINT", 0)
    async with client(tmp_path / "whole", **{"tiers.l0": L0}) as one:
        talk = Talk(one)
        await talk.until(TURNS)
        expected = one.upstream.bodies
    assert b"VM:MANIFEST" in expected[DAMAGED]
    for number in range(3):
        async with client(tmp_path / str(number), **{"tiers.l0": L0}) as one:
            talk = Talk(one)
            await talk.until(DAMAGED)
            blocks = talk.stored(keys.BLOCK)
            assert len(blocks) > 4
            some = random.Random(number).sample(blocks, len(blocks) // 2) if number else blocks
            talk.lose(*some)
            await talk.until(DAMAGED + 4)
            assert one.upstream.bodies == expected[: DAMAGED + 4]
            one.memory.forget()
            await talk.until(TURNS)
            assert one.upstream.bodies == expected


async def test_lost_records_are_a_miss_and_the_request_is_paged_anew(tmp_path: Path) -> None:
    async with client(tmp_path / "whole", **{"tiers.l0": L0}) as one:
        talk = Talk(one)
        await talk.until(DAMAGED)
        paged = [r for r in talk.records() if r.window]
        lost = {
            "the latest": [paged[-1]],
            "the one before": [paged[-2]],
            "where the epoch began": [next(r for r in reversed(paged) if r.closing)],
            "all but the first and the last": talk.records()[1:-1],
        }
    for number, records in enumerate(lost.values()):
        async with client(tmp_path / str(number), **{"tiers.l0": L0}) as one:
            talk = Talk(one)
            await talk.until(DAMAGED)
            talk.lose(*(keys.RECORD + record.id for record in records))
            await talk.until(TURNS)
            for body in one.upstream.bodies[DAMAGED:]:
                assert b"VM:MANIFEST" in body and len(body) < 4 * L0["tokens"] * 2
            one.memory.forget()
            await talk.until(TURNS + 1)
            ends = {record.end for record in talk.records()}
            assert ends >= {2 * turn for turn in range(DAMAGED + 1, TURNS + 2)}, "it goes on being stored"


async def test_a_session_of_new_messages_that_lost_its_history_is_told(tmp_path: Path) -> None:
    header = (b"x-llm-pager-session", b"s")
    async with client(tmp_path) as one:
        for turn in range(3):
            one.upstream.replies = [answered(answer(turn))]
            asked = {"model": "gpt-4o", "messages": [question(turn)]}
            assert (await one.ask(asked, header))[0] == 200
        talk = Talk(one)
        talk.lose(keys.RECORD + talk.records()[0].id)
        status, said = await one.ask({"model": "gpt-4o", "messages": [question(3)]}, header)
    assert (status, said["error"]["code"]) == (500, "storage_damaged"), json.dumps(said)
