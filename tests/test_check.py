"""`llm-pager check --storage`: what it finds, does and says."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from proxy import keys
from proxy.cli import main
from proxy.config import load_config
from proxy.conversation import turn_window
from proxy.storage import open_store
from proxy.storage.demotion import Demotion
from proxy.storage.sqlite import PUT, SEALED, put_row, unpacked
from tests.api.test_chat import answered, client
from tests.api.test_damage import L0, Talk

TURNS = 25


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The database of a paged conversation."""
    path = tmp_path_factory.mktemp("made")

    async def talk() -> None:
        async with client(path, **{"tiers.l0": L0}) as one:
            await Talk(one).until(TURNS)
            one.upstream.replies = [answered()]
            await one.ask({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]},
                          (b"x-llm-pager-session", b"s"))  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turn_window, "CHECKPOINT", 0)
        asyncio.run(talk())
    return (path / "data" / "cache.db").read_bytes()


@pytest.fixture
def data(tmp_path: Path, made: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_PAGER_TIERS__L2__PATH", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache.db").write_bytes(made)
    return tmp_path / "data"


def change(data: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(data / "cache.db", isolation_level=None)) as database:
        assert database.execute(statement, values).rowcount > 0


def dump(data: Path) -> list[str]:
    """All that stands in it; diskcache writes its settings anew whenever it opens a directory, the same ones."""
    with closing(sqlite3.connect(data / "cache.db")) as database:
        return sorted(database.iterdump())


def checked(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(["check", "--storage"])
    return status, capsys.readouterr().out


def test_a_sound_storage_is_said_to_be(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = dump(data)
    status, told = checked(capsys)
    assert (status, told.splitlines()[-1]) == (0, "result     sound")
    assert f"{TURNS + 1} x {keys.KINDS[keys.RECORD]}" in told and "lost" not in told
    assert dump(data) == before
    (data / "cache.db").unlink()
    assert checked(capsys) == (0, f"storage    {data}\nresult     there is none yet\n")


@pytest.mark.parametrize(
    ("damage", "found", "lost"),
    [
        (lambda data: change(data, "UPDATE Cache SET value = zeroblob(9) WHERE rowid % 9 = 0 AND typeof(key) = 'blob'"),
         "is not what was stored", "lost       "),
        (lambda data: change(data, "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE substr(key, 1, 1)"
                             " = ? LIMIT 3)", keys.RECORD), "goes on from is missing", "3 x record of a turn"),
        (lambda data: change(data, "DELETE FROM Cache WHERE substr(key, 1, 1) = ?", keys.BLOCK),
         "has as its root is missing", "block of a page table"),
        (lambda data: change(data, "UPDATE Cache SET key = CAST('n' || substr(key, 2) AS BLOB) WHERE rowid IN"
                             " (SELECT rowid FROM Cache WHERE substr(key, 1, 1) = ? LIMIT 1)", keys.BLOCK),
         "is not what was stored", "record of a turn"),
        (lambda data: (data / "cache.db").write_bytes(bytes(4096) + (data / "cache.db").read_bytes()[4096:]),
         "was damaged and has been made anew", ""),
        (lambda data: (data / "cache.db").write_bytes((data / "cache.db").read_bytes()[:30_000]),
         "has been made anew", "lost       "),
        (lambda data: (data / "cache.db").write_bytes(b"no database"), "has been made anew: 0 values", ""),
    ],
)  # fmt: skip
def test_damage_is_found_and_repaired_once(
    data: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], found: str, lost: str
) -> None:
    damage(data)
    status, told = checked(capsys)
    assert (status, told.splitlines()[-1]) == (3, "result     repaired")
    assert found in told and lost in told, told
    status, told = checked(capsys)
    assert (status, told.splitlines()[-1]) == (0, "result     sound")
    assert lost in told


@pytest.fixture
def below(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with its large values in L3, and its conversations in L4 as well."""
    for tier in ("l3", "l4"):
        monkeypatch.setenv(f"LLM_PAGER_TIERS__{tier.upper()}__URL", str(data.parent / tier))
    monkeypatch.setenv("LLM_PAGER_TIERS__L3__MIN_BYTES", "1024")

    async def demoted() -> None:
        store = open_store(load_config(None, os.environ, {}))
        large = [row for row in store.scan(keys.RECORD) if len(row[1]) >= 1024]
        await store.commit(large)
        worker = Demotion(store, 60, 0, None, lambda: time.time() + 9, rest=0)
        await worker.run_once()
        await worker.run_once()
        await store.commit((), adds=[row for row in store.scan(keys.RECORD) if row in large])
        await store.close()

    asyncio.run(demoted())
    return data.parent


def test_what_stands_in_objects_is_checked_too(below: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys)
    assert (status, told.splitlines()[-1]) == (0, "result     sound"), told
    assert "sound objects in" in told and "2 sound packs in" in told and keys.KINDS[keys.RECORD] not in told


def test_a_damaged_pack_gives_back_what_can_be_read(below: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = max((below / "l4").rglob("*.pack"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[-5] ^= 1  # its only frame
    pack.write_bytes(data)
    status, told = checked(capsys)
    assert status == 3 and "dropped    1 damaged packs" in told and f"{TURNS} x {keys.KINDS[keys.RECORD]}" in told, told
    assert not pack.exists()
    status, told = checked(capsys)
    assert status == 0 and "1 sound packs" in told and "lost       " in told, told


def test_a_damaged_object_is_told_with_the_value_that_it_was(below: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one, *_) = sorted((below / "l3").rglob("*.value"))
    one.write_bytes(b"\0scribbled")
    status, told = checked(capsys)
    assert status == 3 and "dropped    1 damaged objects" in told and f"lost       1 x {keys.KINDS[keys.RECORD]}" in told, told
    assert not one.exists() and checked(capsys)[0] == 0


def test_a_store_whose_values_stand_elsewhere_is_not_judged_without_them(
    below: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dump(below / "data")
    monkeypatch.delenv("LLM_PAGER_TIERS__L4__URL")
    assert main(["check", "--storage"]) == 1
    assert "stand in L4; set tiers.l4.url" in capsys.readouterr().err and dump(below / "data") == before


def test_an_encrypted_storage_is_read_with_its_keys(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_PAGER_STORAGE__ENCRYPTION__KEYS", "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=")
    assert main(["keys", "rewrite"]) == 0 and "rewritten" in capsys.readouterr().out
    assert main(["keys", "list", "--values", "--json"]) == main(["keys", "rotate", "--rewrite", "--json"]) == main(["backup", "copy", "--json"]) == 0
    counted, changed, copied = map(json.loads, capsys.readouterr().out.splitlines())
    assert [master["first"] for master in counted["masters"]] == [True] and counted["values"]["unsealed"] == 0 < counted["values"]["newest"]
    assert changed["rotated"] == counted["owners"] and 0 < changed["rewritten"] <= changed["looked_at"]
    assert copied["rows"] > changed["looked_at"] and copied["bytes"] == Path(copied["file"]).stat().st_size
    status, told = checked(capsys)
    assert (status, told.splitlines()[-1]) == (0, "result     sound") and f"{TURNS + 1} x record of a turn" in told
    put = put_row(*next((key, value[:-1] + b"x") for key, value in sealed_rows(data) if key.startswith(keys.RECORD)))
    change(data, "UPDATE Cache SET tag = ?, value = ? WHERE key = ?", put[1], put[2], put[0])
    status, told = checked(capsys)
    assert status == 3 and "1 x record of a turn cannot be decrypted" in told
    assert checked(capsys)[0] == 0

    async def drop() -> None:
        store = open_store(load_config(None, os.environ, {}))
        for owner in {keys.sealer(key) for key, _ in sealed_rows(data)}:
            await store.drop_key(owner)
        await store.close()

    asyncio.run(drop())
    status, told = checked(capsys)
    assert status == 0 and f"erased     {TURNS} x record of a turn" in told, told
    monkeypatch.delenv("LLM_PAGER_STORAGE__ENCRYPTION__KEYS")
    assert main(["check", "--storage"]) == 1 and "is encrypted" in capsys.readouterr().err


def sealed_rows(data: Path) -> list[tuple[bytes, bytes]]:
    with closing(sqlite3.connect(data / "cache.db")) as database:
        rows = database.execute("SELECT key, value FROM Cache WHERE typeof(key) = 'blob'").fetchall()
    return [(key, value) for key, value in ((key, unpacked(value)) for key, value in rows) if value.startswith(SEALED)]


def test_what_cannot_be_checked_is_one_sentence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(data / "cache.db", isolation_level=None)) as database:
        database.execute("PRAGMA user_version = 9")
    assert main(["check", "--storage"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "another version (format 9)" in said


def test_a_conversation_is_shown_unless_it_is_damaged_or_its_name_is_anothers_too(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> tuple[int, str, str]:
        return main(words), *capsys.readouterr()

    (row,) = [row for row in json.loads(told("sessions", "--json")[1])["conversations"] if row["paged"]]
    whole, name = row["conversation"], row["conversation"][-12:]
    assert told("show", name)[0] == told("search", name, "turn")[0] == 0
    with closing(sqlite3.connect(data / "cache.db", isolation_level=None)) as database:
        owner = bytes.fromhex(whole)
        key, other = keys.CONVERSATION + owner, keys.CONVERSATION + bytes(keys.TENANT_BYTES) + owner[keys.TENANT_BYTES :]
        (value,) = database.execute("SELECT value FROM Cache WHERE key = ?", (key,)).fetchone()
        database.execute(PUT, put_row(other, unpacked(value)))
    for words in ("show", name), ("search", name, "turn"), ("export", name, "--out", "-"), ("forget", "conversation", name, "--yes"):
        status, out, err = told(*words)
        assert (status, out) == (2, "") and "Several tenants have a conversation" in err
        assert words[0] == "forget" or told(*words[:1], whole, *words[2:])[0] == 0
    change(data, "DELETE FROM Cache WHERE substr(key, 1, 1) = ?", keys.RECORD)
    for words in ("show", whole), ("search", whole, "word"):
        assert told(*words) == (1, "", "llm-pager: The storage is damaged: a conversation's last answer is missing from storage;"
                                       " llm-pager check --storage finds all of it.\n")  # fmt: skip
