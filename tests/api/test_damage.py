"""A store that lost something, seen through the chat API: a miss of memory, never of an answer (6)."""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from proxy import keys
from proxy.conversation import turn_window
from proxy.conversation.records import Record, State, decode_record
from proxy.conversation.tree import TenantKey
from proxy.errors import StorageError
from proxy.upstream import BytesReply
from tests.api.test_chat import JSON, Client, answered, client

L0 = {"tokens": 4000, "reserve_tokens": 500}
TURNS = 40
DAMAGED = 30  # turns before something is lost


def question(turn: int) -> dict[str, Any]:
    words = random.Random(turn).sample(("harbour", "ledger", "copper", "orchard", "signal", "violin"), 3)
    return {"role": "user", "content": f"Turn {turn}: what of the {' and the '.join(words)}? " + "Say more. " * 40}


def answer(turn: int) -> str:
    return f"On turn {turn} the answer is {turn * 7919}. " + "It is a long story. " * 30


def calling(name: str, **arguments: str) -> BytesReply:
    function = {"name": name, "arguments": json.dumps(arguments)}
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    return BytesReply(200, JSON, json.dumps({"id": "c", "choices": [choice]}).encode())


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
            assert self.database("DELETE FROM Cache WHERE key = ?", key).rowcount == 1
        self.at.memory.forget()

    def stored(self, letter: bytes) -> list[bytes]:
        return sorted(key for (key,) in self.database("SELECT key FROM Cache WHERE substr(key, 1, 1) = ?", letter))

    def database(self, statement: str, *values: object) -> sqlite3.Cursor:
        path = self.at.memory.store.engine._path / "cache.db"
        return sqlite3.connect(path, isolation_level=None).execute(statement, values)

    def records(self) -> list[Record]:
        """In the order of the conversation."""
        found = [self.at.memory.store.get(key) for key in self.stored(keys.RECORD)]
        return sorted((decode_record(data) for data in found if data), key=lambda r: r.end)


@pytest.fixture(autouse=True)
def one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal requests of two stores are equal in their `prompt_cache_key`, too."""
    monkeypatch.setattr("proxy.storage.sqlite.os.urandom", lambda size: bytes(size))


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


async def test_invariant_6_what_is_lost_in_the_middle_of_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its page table reads a part of itself only when it is asked for, and that is gone by then."""
    async with client(tmp_path, **{"tiers.l0": L0}) as one:
        talk = Talk(one)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(turn_window, "CHECKPOINT", 0)
            await talk.until(TURNS)
        one.memory.forget()
        restored = one.memory.state_after

        async def and_lost(record: Record, tenant: TenantKey) -> State | None:
            state = await restored(record, tenant)
            monkeypatch.undo()
            talk.lose(*talk.stored(keys.BLOCK), *talk.stored(keys.RECORD))
            return state

        monkeypatch.setattr(one.memory, "state_after", and_lost)
        talk.history.append(question(TURNS))
        one.upstream.replies = [calling("page_fault", page_id="msg_0001"), answered(answer(TURNS))]
        status, said = await one.ask({"model": "gpt-4o", "messages": talk.history})
        assert (status, said["choices"][0]["message"]["content"]) == (200, answer(TURNS))
        assert "what is stored of it cannot be used" in caplog.text
        assert len(one.upstream.bodies) == TURNS + 2 and b"VM:MANIFEST" in one.upstream.bodies[-1]
        talk.history.append(said["choices"][0]["message"])
        await talk.until(TURNS + 2)
        assert talk.records()[-1].end == 2 * (TURNS + 2)


async def test_invariant_6_an_answer_whose_turn_cannot_be_put_together_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise LookupError("a record that others continue is missing from storage")

    async with client(tmp_path, **{"tiers.l0": L0}) as one:
        talk = Talk(one)
        await talk.until(DAMAGED)
        monkeypatch.setattr("proxy.conversation.turn.append_effect", missing)
        await talk.until(DAMAGED + 1)
        assert len(one.upstream.bodies) == DAMAGED + 1 and "an answer is not remembered" in caplog.text
        monkeypatch.undo()
        await talk.until(DAMAGED + 2)
        assert talk.records()[-1].end == 2 * (DAMAGED + 2)


async def test_invariant_06_of_a_long_history_each_beginning_that_is_stored_is_whole(tmp_path: Path) -> None:
    """It is stored some records at a time; the store fails before the last ones."""
    said: list[dict[str, Any]] = []
    for turn in range(700):
        said += [{"role": "user", "content": f"Say {turn}."}, {"role": "assistant", "content": f"{turn}."}]
    asked = {"model": "gpt-4o", "messages": [*said, question(701)]}
    async with client(tmp_path, **{"tiers.l0": L0}) as one:
        talk = Talk(one)
        one.upstream.replies = [answered("One."), answered("Two.")]
        store, sizes = talk.at.memory.store, list[int]()
        commit = store.commit

        async def commit_twice(*what: Any) -> frozenset[bytes]:
            sizes.append(len(what[2]) if len(what) > 2 else 0)
            if len(sizes) > 1:
                raise StorageError("The disk is full.")
            return await commit(*what)

        store.commit = commit_twice  # type: ignore[method-assign]
        status, _ = await talk.at.ask(asked)
        assert status == 200 and sizes[0] == 256
        records = sorted(talk.records(), key=lambda record: record.first)
        assert [record.first for record in records] == list(range(0, 2 * 256, 2))
        assert [record.parent for record in records[1:]] == [record.id for record in records[:-1]]
        store.commit = commit  # type: ignore[method-assign]
        talk.at.memory.forget()
        status, _ = await talk.at.ask(asked)
        assert status == 200 and len(talk.records()) == 701
