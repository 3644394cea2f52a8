"""`llm-pager forget` asks first, and says in its exit status what became of it; tests/e2e/test_erasure.py has what goes."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest

from proxy import keys
from proxy.cli import main
from proxy.conversation.records import conversation_name, owner_of
from proxy.storage.l2 import DiskStore
from tests.conversation.player import Player, limits_of, says, script


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_asks_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"tiers": {"l2": {"path": str(tmp_path / "data")}}}))
    player = Player(limits_of(4000))
    played = player.ask([{"role": "user", "content": "Words."}], script(says("More words.")))
    owner = owner_of(played.turn.path[0].id)

    async def fill() -> None:
        store = DiskStore(tmp_path / "data", 100)
        await store.commit(list(player.values.items()))
        await store.close()

    def records() -> int:
        store = DiskStore(tmp_path / "data", 100)
        found = len(store.scan(keys.RECORD))
        asyncio.run(store.close())
        return found

    def forget(*words: str, answer: str | None = None) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO() if answer is None else Terminal(answer))
        return main(["forget", *words, "--config", str(config)])

    asyncio.run(fill())
    name = conversation_name(owner)
    assert forget("conversation", "0" * 12, "--yes") == 1 and "no such conversation" in capsys.readouterr().err
    assert forget("message", name, "msg_0007", "--yes") == forget("user", "--header", "authorization: Bearer x", "--yes") == 1
    assert forget("conversation", name) == 2 and "add --yes" in capsys.readouterr().err
    assert forget("user", "--header", "authorization") == 2 and "a colon and a value" in capsys.readouterr().err
    assert forget("conversation", name, answer="n\n") == 1 and records() == 1
    assert forget("conversation", name, answer="y\n") == 0 and records() == 0
    told = capsys.readouterr()
    assert "Erase this conversation for good? [y/N]" in told.err and "2 messages" in told.out and "Words" not in told.out
    assert forget("conversation", name, "--yes") == 1
