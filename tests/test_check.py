"""`llm-pager check --storage`: what it finds, does and says."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from proxy.cli import main
from proxy.conversation import keys, turn_window
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


def test_what_cannot_be_checked_is_one_sentence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(data / "cache.db", isolation_level=None)) as database:
        database.execute("PRAGMA user_version = 9")
    assert main(["check", "--storage"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "another version (format 9)" in said
