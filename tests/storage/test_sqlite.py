"""L2's file: what is read of a damaged one, and that nothing is ever read as something else."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import diskcache
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.errors import StorageError
from proxy.storage import sqlite
from proxy.storage.sqlite import (
    DAMAGED,
    DATABASE,
    LOST_SUM,
    PUT,
    Damaged,
    RawDatabase,
    Row,
    connect,
    get_value,
    open_database,
    put_row,
    repair,
    write_mark,
)

PAGE_BYTES = 4096


def made(directory: Path, values: dict[bytes, bytes], checkpoint: bool = True) -> sqlite3.Connection:
    """A database with these values; the connection keeps what is not in a checkpoint in its log."""
    connection = open_database(directory, 1.0).connection
    connection.execute("BEGIN")
    connection.executemany(PUT, [put_row(key, value) for key, value in values.items()])
    connection.execute("COMMIT")
    if checkpoint:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return connection


def stored(directory: Path) -> dict[bytes, bytes | None]:
    """What can be read; None for what is known to be lost."""
    found: dict[bytes, bytes | None] = {}
    with closing(connect(directory)) as connection:
        for (key,) in connection.execute("SELECT key FROM Cache WHERE typeof(key) = 'blob'").fetchall():
            try:
                found[key] = get_value(connection, key)
            except Damaged:
                found[key] = None
    return found


def some(seed: int, count: int = 300) -> dict[bytes, bytes]:
    rng = random.Random(seed)
    sizes = [rng.choice((0, 30, 300, 2_000, 4_060, 9_000, 70_000)) for _ in range(count)]
    return {rng.randbytes(17): rng.randbytes(size) for size in sizes}


@pytest.mark.parametrize("checkpoint", [True, False], ids=["in the file", "in the log"])
def test_every_row_is_read_without_sqlite(tmp_path: Path, checkpoint: bool) -> None:
    with closing(made(tmp_path, some(1), checkpoint)) as connection:
        connection.execute("UPDATE Cache SET value = CAST(x'00' || value AS BLOB) WHERE rowid % 7 = 0")
        connection.execute("DELETE FROM Cache WHERE rowid % 11 = 0")
        rows = {Row(*row) for row in connection.execute("SELECT rowid, key, tag, value FROM Cache")}
        with closing(RawDatabase(tmp_path)) as raw:
            assert set(raw.rows()) == rows
            assert set(raw.named()) == {(row.rowid, row.key) for row in rows}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 9), hits=st.lists(st.tuples(st.floats(0, 0.999), st.sampled_from("zero noise cut bits".split())), max_size=4))
def test_invariant_6_what_is_read_of_a_damaged_file_is_what_was_stored(
    tmp_path: Path, seed: int, hits: list[tuple[float, str]]
) -> None:
    """And of a page that is lost, no more is lost than what stood in it."""
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    values = some(seed, 60)
    made(tmp_path, values).close()
    data = bytearray((tmp_path / DATABASE).read_bytes())
    rng = random.Random(seed)
    for where, how in hits:
        at = int(where * len(data)) // PAGE_BYTES * PAGE_BYTES
        if how == "cut":
            del data[at + 100 :]
        elif how == "bits":
            for _ in range(3):
                data[min(len(data) - 1, at + rng.randrange(PAGE_BYTES))] ^= 1 << rng.randrange(8)
        else:
            page = bytes(PAGE_BYTES) if how == "zero" else rng.randbytes(PAGE_BYTES)
            data[at : at + PAGE_BYTES] = page
    (tmp_path / DATABASE).write_bytes(data)
    done = repair(tmp_path)
    found = {key: value for key, value in stored(tmp_path).items() if value is not None}
    assert found.items() <= values.items()
    assert done.kept + done.lost == len(values) + 1 or "cut" in {how for _, how in hits} or not done.kept
    if not hits:
        assert found == values
    with closing(open_database(tmp_path, 1.0).connection) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_key_of_a_lost_value_stays_damaged(tmp_path: Path) -> None:
    values = {b"k%03d" % n: b"%d" % n * 300 for n in range(100)}
    made(tmp_path, values).close()
    data = bytearray((tmp_path / DATABASE).read_bytes())
    at = data.index(values[b"k050"]) // PAGE_BYTES * PAGE_BYTES
    data[at : at + PAGE_BYTES] = bytes(PAGE_BYTES)
    (tmp_path / DATABASE).write_bytes(data)
    done = repair(tmp_path)
    after = stored(tmp_path)
    assert after.keys() == values.keys() and after[b"k050"] is None
    assert 0 < done.lost == sum(value is None for value in after.values()) < 20
    assert (tmp_path / DAMAGED).read_bytes() == data
    again = repair(tmp_path)  # nothing more is lost
    assert (again.kept, again.lost) == (done.kept + 1, done.lost)


@pytest.mark.parametrize("moment", ["unlink", "replace"])
def test_a_repair_that_is_killed_is_finished_by_the_next_one_who_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    values = some(2, 40)
    made(tmp_path, values, checkpoint=False)  # never closed: its log stands beside it
    data = (tmp_path / DATABASE).read_bytes()
    finish = sqlite._finish_repair
    calls: list[str] = []

    def killed(directory: Path) -> None:
        if (directory / f"{DATABASE}.repaired").exists():
            calls.append(moment)
            if moment == "replace":
                for path in sqlite._beside(directory):
                    path.unlink(missing_ok=True)
                os.replace(directory / DATABASE, directory / DAMAGED)
            raise KeyboardInterrupt
        finish(directory)

    monkeypatch.setattr(sqlite, "_finish_repair", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(tmp_path)
    monkeypatch.undo()
    assert calls and data
    open_database(tmp_path, 1.0).connection.close()
    assert stored(tmp_path) == values


def test_what_is_opened_is_told_apart_from_what_was_there(tmp_path: Path) -> None:
    here, old = tmp_path / "here", tmp_path / "old"

    def told() -> str:
        opened = open_database(here, 1.0)
        opened.connection.close()
        assert opened.lost == bool(opened.told)
        return " ".join(opened.told)

    assert told() == ""
    shutil.copytree(here, old)
    made(here, some(3, 5)).close()
    opened = open_database(here, 1.0)
    write_mark(here, opened.secret, opened.rowid, opened.inodes)
    opened.connection.close()
    assert told() == ""
    shutil.copy(old / DATABASE, here / DATABASE)
    assert "is an older copy" in told()
    (here / DATABASE).unlink()
    assert "is empty" in told()
    made(tmp_path / "other", some(3, 5)).close()
    shutil.copy(tmp_path / "other" / DATABASE, here / DATABASE)
    assert "is another one" in told()


def test_a_log_beside_another_file_is_not_read(tmp_path: Path) -> None:
    first = made(tmp_path, {b"a": b"old"})
    shutil.copy(tmp_path / DATABASE, tmp_path / "copy")
    first.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    first.execute(PUT, put_row(b"a", b"new"))
    opened = open_database(tmp_path, 1.0)
    write_mark(tmp_path, opened.secret, opened.rowid, opened.inodes)
    (tmp_path / "copy").replace(tmp_path / DATABASE)  # and the log of the newer one stays
    opened = open_database(tmp_path, 1.0)
    assert get_value(opened.connection, b"a") == b"old" and "it is dropped" in opened.told[0]


def test_a_lost_secret_stands_beside(tmp_path: Path) -> None:
    opened = open_database(tmp_path, 1.0)
    write_mark(tmp_path, opened.secret, opened.rowid, opened.inodes)
    opened.connection.execute("UPDATE Cache SET tag = ? WHERE typeof(key) = 'text'", (LOST_SUM,))
    opened.connection.close()
    again = open_database(tmp_path, 1.0)
    assert again.secret == opened.secret and "is there again" in again.told[0]


def test_what_diskcache_says_of_a_directory_is_not_believed(tmp_path: Path) -> None:
    """Killed before it was ours, it is made again; a setting that is damaged, or another program's, is forgotten."""
    diskcache.Cache(str(tmp_path)).close()
    with closing(made(tmp_path, {b"a": b"1"})) as connection:
        connection.execute("UPDATE Settings SET key = x'00ff' WHERE key = 'cull_limit'")
        connection.execute("UPDATE Settings SET value = 'least-recently-used' WHERE key = 'eviction_policy'")
        with closing(open_database(tmp_path, 0.0).connection):
            assert diskcache.Cache(str(tmp_path)).eviction_policy == "none"
        connection.execute("BEGIN IMMEDIATE")  # who holds the lock keeps nobody from reading
        with closing(open_database(tmp_path, 0.0).connection) as other:
            assert get_value(other, b"a") == b"1"


def test_another_program_s_database_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE)) as other:
        other.execute("CREATE TABLE theirs (a)")
    with pytest.raises(StorageError, match="does not read"):
        open_database(tmp_path, 1.0)
    diskcache.Cache(str(tmp_path / "other")).set("a", 1)
    with pytest.raises(StorageError, match="does not read"):
        open_database(tmp_path / "other", 1.0)
