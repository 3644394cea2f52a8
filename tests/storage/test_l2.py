"""The disk store under kills, crowds, full disks and bad paths: real processes and directories."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import diskcache
import pytest

from proxy.storage.l2 import JOIN_VALUE_BYTES, Damaged, DiskStore, StorageError
from proxy.storage.sqlite import PackedDisk, put_row

ROOT = Path(__file__).resolve().parents[2]


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A child running `code` with the repository on its path; stdout is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def execute(directory: Path, statement: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(directory / "cache.db", isolation_level=None)) as database:
        return database.execute(statement, values).fetchall()


def node(number: int) -> bytes:
    return number.to_bytes(JOIN_VALUE_BYTES, "big")


def nodes(joined: bytes | None) -> list[bytes]:
    joined, step = joined or b"", JOIN_VALUE_BYTES
    return [joined[at : at + step] for at in range(0, len(joined), step)]


@pytest.fixture
async def store(tmp_path: Path):
    opened = DiskStore(tmp_path / "l2", queue_records=100)
    yield opened
    await opened.close()


async def test_large_values_stay_in_the_transaction(store: DiskStore, tmp_path: Path) -> None:
    large = os.urandom(3 << 20)
    await store.commit([(b"large", b"x" * (2 << 20))])
    await store.commit([(b"large", large)])
    assert store.get(b"large") == large
    assert not list((tmp_path / "l2").rglob("*.val"))


async def test_a_value_too_large_for_sqlite_is_refused_before_it_harms_others(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.storage.l2.VALUE_LIMIT_BYTES", 100)
    good = [store.commit([(b"g%d" % n, b"v")]) for n in range(5)]
    bad = store.commit([(b"half", b"v"), (b"bad", b"x" * 101)])
    results = await asyncio.gather(*good, bad, return_exceptions=True)
    assert isinstance(results[5], StorageError) and "too large" in str(results[5])
    assert results[:5] == [frozenset()] * 5
    assert (store.get(b"half"), store.get(b"g4")) == (None, b"v")


async def test_the_directory_is_one_of_diskcache_s(store: DiskStore) -> None:
    """Made and read by it, also what was replaced, added, joined and is large; without its triggers afterwards."""
    large = os.urandom(3_000_000)
    await store.commit([(b"a", b"1"), (b"a", b"2"), (b"large", large)], [(b"set", node(7))], [(b"new", b"")])
    await store.close()
    with diskcache.Cache(str(store._path), disk=PackedDisk) as plain:
        assert [plain.get(key) for key in (b"a", b"large", b"set", b"new", b"none")] == [b"2", large, node(7), b"", None]
        assert plain.get(b"a", tag=True) == (b"2", put_row(b"a", b"2")[1])
        assert set(plain) >= {b"a", b"large", b"set", b"new"}
    again = DiskStore(store._path, 10)
    await again.commit([(b"a", b"3")])
    assert again.get(b"a") == b"3" and again.get(b"large") == large
    await again.close()
    names = execute(store._path, "SELECT name FROM sqlite_master WHERE type != 'table' AND sql NOT NULL")
    assert {name for (name,) in names} == {"Cache_key_raw", "Cache_expire_time"}


async def test_what_is_no_bytes_is_not_read(store: DiskStore) -> None:
    await store.commit([(b"a", b"1")])
    for value in ("text", 7):
        execute(store._path, "UPDATE Cache SET value = ? WHERE key = ?", value, b"a")
        with pytest.raises(Damaged):
            store.get(b"a")


async def test_transactions_are_bounded_and_commits_behind_them_wait(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "l2", queue_records=10)
    lock = sqlite3.connect(tmp_path / "l2" / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    commits = [
        asyncio.create_task(store.commit([(b"%d.%d" % (n, i), b"v") for i in range(4)]))
        for n in range(20)
    ]
    over = asyncio.create_task(store.commit([(b"over%d" % i, b"v") for i in range(50)]))
    await asyncio.sleep(0.05)  # the writer waits for the lock with its first commits
    assert not any(task.done() for task in commits)
    batch = store._batch()
    assert 10 <= sum(job.records for job in batch) < 10 + 4
    for job in batch:
        store._jobs.put(job)
    lock.execute("COMMIT")
    lock.close()
    await asyncio.gather(*commits, over)
    assert all(store.get(b"%d.3" % n) == b"v" for n in range(20)) and store.get(b"over49") == b"v"
    await store.close()


async def test_a_lock_that_never_opens_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.storage.l2.LOCK_WAIT_S", 0.1)
    store = DiskStore(tmp_path / "l2", 10)
    lock = sqlite3.connect(tmp_path / "l2" / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="other processes have held its lock"):
        await store.commit([(b"a", b"1")])
    assert store.get(b"a") is None
    lock.execute("COMMIT")
    lock.close()
    await store.check()
    await store.commit([(b"a", b"1")])
    assert store.get(b"a") == b"1"
    await store.close()


@pytest.mark.parametrize("found", [0, 9])
async def test_a_directory_of_another_version_is_refused(tmp_path: Path, found: int) -> None:
    store = DiskStore(tmp_path, 10)
    await store.commit([(b"nabc", b"a record")])
    await store.close()
    execute(tmp_path, f"PRAGMA user_version = {found}")
    with pytest.raises(StorageError, match="version .*of llm-pager, which this one does not read") as caught:
        DiskStore(tmp_path, 10)
    told = str(caught.value)
    assert str(tmp_path) in told and "tiers.l2.path" in told and "\n" not in told


async def test_a_process_killed_in_a_transaction_leaves_nothing_and_no_lock(
    tmp_path: Path,
) -> None:
    child = start(
        """
        import sys
        from pathlib import Path
        from proxy.storage.l2 import DiskStore
        store = DiskStore(Path(sys.argv[1]), 10)
        writer = store._database.writer
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO Cache (key, raw, tag, value) VALUES (?, 1, 0, ?)", (b"half", b"x" * 2_000_000))
        print("inside", flush=True)
        sys.stdin.read()
        import time; time.sleep(60)
        """,
        tmp_path / "l2",
    )
    assert child.stdout is not None and child.stdout.readline() == "inside\n"
    child.kill()
    child.wait()
    store = DiskStore(tmp_path / "l2", 10)
    assert store.get(b"half") is None
    await asyncio.wait_for(store.commit([(b"half", b"whole")]), 5)
    assert store.get(b"half") == b"whole"
    await store.close()


def test_a_path_that_is_no_directory_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/llm-pager")):
        with pytest.raises(StorageError, match=r"tiers\.l2\.path") as caught:
            DiskStore(path, 10)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


async def test_a_full_or_readonly_disk_fails_the_commit_and_can_recover(tmp_path: Path) -> None:
    # A limit on file sizes stands in for the full disk: it works for root as well.
    child = start(
        """
        import asyncio, os, resource, signal, sys
        from pathlib import Path
        from proxy.storage.l2 import DiskStore, StorageError
        async def main():
            store = DiskStore(Path(sys.argv[1]), 100)
            await store.commit([(b"before", b"1")])
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            for name in (b"big", b"big2"):
                try:
                    await store.commit([(name, os.urandom(5_000_000))])
                except StorageError as error:
                    print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            await store.check()
            await store.commit([(b"after", b"1")])
            print(store.get(b"before"), store.get(b"big"), store.get(b"after"))
            await store.close()
        asyncio.run(main())
        """,
        tmp_path / "l2",
    )
    lines = child.communicate(timeout=60)[0].splitlines()
    assert child.returncode == 0 and len(lines) == 3
    assert all(line.startswith(f"Cannot write to {tmp_path / 'l2'}: ") for line in lines[:2])
    assert lines[2] == "b'1' None b'1'"


async def test_check_fails_when_the_directory_has_gone(store: DiskStore, tmp_path: Path) -> None:
    await store.check()
    (tmp_path / "l2").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="was deleted or replaced"):
        await store.check()


async def test_the_directory_is_private(store: DiskStore, tmp_path: Path) -> None:
    assert (tmp_path / "l2").stat().st_mode & 0o077 == 0


def test_a_directory_that_may_only_be_read_is_refused() -> None:
    child = start(
        """
        import asyncio, os, shutil, tempfile
        from pathlib import Path
        from proxy.storage.l2 import DiskStore, StorageError
        path = Path(tempfile.mkdtemp())
        asyncio.run(DiskStore(path, 10).close())
        os.chmod(path / "cache.db", 0o444)
        os.chmod(path, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write everywhere: be nobody
        try:
            DiskStore(path, 10)
        except StorageError as error:
            print(error)
        if root:
            os.seteuid(0)
        os.chmod(path, 0o755)
        shutil.rmtree(path)
        """
    )
    out = child.communicate(timeout=60)[0].strip()
    assert out.startswith("Cannot use ") and "Permission denied" in out and "\n" not in out


async def test_what_fails_once_fails_at_once_until_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("proxy.storage.l2.LOCK_WAIT_S", 0.05)
    store = DiskStore(tmp_path / "l2", 10)
    with closing(sqlite3.connect(tmp_path / "l2" / "cache.db", isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        tried: list[None] = []
        stored = store._stored
        monkeypatch.setattr(store, "_stored", lambda *work: (tried.append(None), stored(*work))[1])
        for _ in range(5):
            with pytest.raises(StorageError, match="have held its lock"):
                await store.commit([(b"a", b"1")])
        with pytest.raises(StorageError):
            await store.check(1.0)
        assert len(tried) == 1 and store.trouble
        with pytest.raises(StorageError):
            await store.check()
        assert len(tried) == 2
    await store.check()
    await store.commit([(b"a", b"1")])
    assert store.trouble is None
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "WARNING"] and "can be written again" in caplog.messages[-1]
    await store.close()


@pytest.mark.parametrize("kept", ["nothing", "an older copy", "another store"])
async def test_files_that_are_deleted_or_replaced_are_not_written(tmp_path: Path, kept: str) -> None:
    path = tmp_path / "l2"
    store = DiskStore(path, 10)
    await store.commit([(b"a", b"1")])
    if kept == "another store":
        await DiskStore(tmp_path / "older", 10).close()
    elif kept == "an older copy":
        with closing(sqlite3.connect(path / "cache.db")) as source:
            (tmp_path / "older").mkdir()
            source.execute("VACUUM INTO ?", (str(tmp_path / "older" / "cache.db"),))
    secret = store.secret()
    await store.commit([(b"b", b"2")], secret=secret)
    shutil.rmtree(path)
    if kept != "nothing":
        shutil.copytree(tmp_path / "older", path)
    with pytest.raises(StorageError, match="deleted or replaced"):
        await store.commit([(b"c", b"3")], secret=secret)
    await store.check()
    assert store.losses == 1 and (store.secret() == secret) == (kept == "an older copy")
    with pytest.raises(StorageError, match="replaced meanwhile"):
        await store.commit([(b"c", b"3")], secret=b"another's")
    await store.commit([(b"d", b"4")], secret=store.secret())
    assert [store.get(key) for key in (b"a", b"b", b"d")] == [b"1" if kept == "an older copy" else None, None, b"4"]
    await store.close()
    again = DiskStore(path, 10)
    assert again.get(b"d") == b"4" and again.losses == 0
    await again.close()


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
async def test_a_deleted_log_is_saved_from_what_is_open(tmp_path: Path, suffix: str) -> None:
    store = DiskStore(tmp_path, 10)
    await store.commit([(b"a", b"1")])
    (tmp_path / f"cache.db{suffix}").unlink()
    await store.commit([(b"b", b"2")])
    child = start("import sys; from pathlib import Path; from proxy.storage.l2 import DiskStore\n"
                  "s = DiskStore(Path(sys.argv[1]), 10); print(s.get(b'a'), s.get(b'b'))", tmp_path)  # fmt: skip
    assert child.communicate(timeout=60)[0] == "b'1' b'2'\n"
    assert (store.losses, store.get(b"a"), store.get(b"b")) == (0, b"1", b"2")
    await store.close()


async def test_a_file_that_cannot_be_read_is_repaired_beside_the_commits(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 10)
    values = [(b"%d" % n, os.urandom(2000)) for n in range(200)]
    await store.commit(values)
    await store.close()
    data = bytearray((tmp_path / "cache.db").read_bytes())
    for page in range(7, len(data) // 4096, 5):  # behind what must be sound for it to be opened
        data[page * 4096 : (page + 1) * 4096] = bytes(4096)
    (tmp_path / "cache.db").write_bytes(data)
    store = DiskStore(tmp_path, 10)
    generation = store.generation
    found = []
    for key, _ in values:
        with suppress(StorageError):
            found.append(store.get(key))
    async with asyncio.timeout(10):
        while store.generation == generation or store._retry_s:  # the repair has a thread of its own
            await asyncio.sleep(0.01)
    await store.check()
    assert store.repaired is not None and store.repaired.lost > 0
    await store.commit(values)
    assert all(store.get(key) == value for key, value in values)
    await store.close()


async def test_a_small_commit_asks_no_thread_and_waits_for_no_lock(store: DiskStore, tmp_path: Path) -> None:
    """The event loop's own; where another process has the lock, the writer waits for it, and the loop does not."""
    asked: list[int] = []
    outcomes = store._outcomes
    store._outcomes = lambda jobs: asked.append(len(jobs)) or outcomes(jobs)  # type: ignore[method-assign, func-returns-value]
    await asyncio.gather(*(store.commit([(b"k%d" % n, b"v")]) for n in range(5)))
    assert not any(asked) and store.get(b"k4") == b"v"
    lock = sqlite3.connect(tmp_path / "l2" / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    waiting = asyncio.ensure_future(store.commit([(b"k5", b"v")]))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done and asked[-1] == 1
    lock.execute("COMMIT")
    await waiting
    assert store.get(b"k5") == b"v"
    await store.commit([(b"large", bytes(1 << 20))])
    assert asked[-1] == 1 and len(asked) > 1


async def test_a_scan_goes_on_where_it_was_and_walks_over_nothing(store: DiskStore) -> None:
    await store.commit([(b"n%05d" % n, b"v") for n in range(5000)])
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    store._database.reader.set_progress_handler(count, 10)
    taken = []
    for prefix, after in ((b"n", b""), (b"n", b"n04899"), (b"", b"n04899")):
        steps = 0
        assert len(store.scan(prefix, after, 100)) == 100
        taken.append(steps)
    assert max(taken) < 1.1 * min(taken), taken


async def test_drops_take_whole_prefixes_and_leave_no_bytes_behind(store: DiskStore, tmp_path: Path) -> None:
    marks = [os.urandom(200) for _ in range(50)]
    await store.commit([(b"a%02d" % n, mark) for n, mark in enumerate(marks)] + [(b"b", b"kept")])
    await store.commit([(b"a00", b"replaced"), (b"new", b"1")], drops=[b"a0", b"a1", b"a2", b"a3", b"a4"])
    assert store.scan(b"a") == [(b"a00", b"replaced")] and store.get(b"b") == b"kept"
    left = b"".join(path.read_bytes() for path in (tmp_path / "l2").iterdir())
    assert not any(mark[at : at + 20] in left for mark in marks for at in range(0, 180, 20))


async def test_a_scrub_leaves_no_copy_in_the_free_space_of_pages(tmp_path: Path) -> None:
    """SQLite overwrites what is deleted, and not what it leaves behind where rows move to another page. Other processes
    write meanwhile, with pages that they remember as they were."""
    left = [0, 0]
    for seed in range(3):
        made, path = random.Random(seed), tmp_path / str(seed)
        store, other = DiskStore(path, queue_records=100), DiskStore(path, queue_records=100)
        kept: dict[bytes, bytes] = {}
        for turn in range(300):
            whose = made.choice((b"A", b"B", b"C"))
            text = b"".join(b"<%s%d>" % (whose * 3, made.randrange(10**9)) for _ in range(made.choice((1, 3, 20, 30))))
            old = [key for key in kept if key[1:2] == whose] if made.random() < 0.4 else []
            key = made.choice(old) if old else made.choice((b"n", b"t", b"c")) + whose + made.randbytes(16)
            kept |= {key: text}
            await (store, other)[turn % 2].commit([(key, text)])
        await store.commit([], drops=[b"nA", b"tA", b"cA"], erases=True)
        kept = {key: text for key, text in kept.items() if key[1:2] != b"A"}
        left[0] += count(b"<AAA", path)
        writing = asyncio.gather(*(other.commit([(key, text + b"<")]) for key, text in kept.items()))
        await store.scrub()
        await writing
        await store.commit([], drops=[key for key in kept if key.startswith(b"n")])
        left[1] += count(b"<AAA", path)
        assert all(other.get(key) == text + b"<" for key, text in kept.items() if not key.startswith(b"n"))
        assert execute(path, "PRAGMA integrity_check") == [("ok",)]
        await store.close()
        await other.close()
        again = DiskStore(path, queue_records=100)
        assert (again.losses, again.generation) == (0, 1), "it is no older store, though its newest rows went"
        await again.close()
    assert left[0] > 0 == left[1]


def count(text: bytes, path: Path) -> int:
    """In the files of a directory; by another process, as in tests/leftovers.py."""
    done = subprocess.run(["grep", "-raoF", text.decode(), str(path)], capture_output=True, check=False)
    return len(done.stdout.splitlines())


# ---------------------------------------------------------------- losing power


@pytest.fixture(scope="session")
def power(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that keeps what a process fsynced; see power.c."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler, to see what is fsynced")
    library = tmp_path_factory.mktemp("power") / "power.so"
    source = Path(__file__).with_name("power.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


COMMIT_AND_WAIT = """
    import asyncio, sys, threading
    from pathlib import Path
    from proxy.storage.l2 import DiskStore
    async def main():
        store = DiskStore(Path(sys.argv[1]), 1000, durability=sys.argv[2])
        for n in range(int(sys.argv[3])):  # over several rounds of the write-ahead log
            await asyncio.gather(*[store.commit([(b"%d:%d" % (n, w), b"v" * 3000)]) for w in range(4)])
        print(store.secret().hex(), flush=True)
        sys.stdin.read()
    asyncio.run(main())
"""


@pytest.mark.parametrize(("durability", "rounds"), [("power", 1), ("power", 300), ("process", 20)])
async def test_invariant_5_what_was_committed_survives_losing_power(
    tmp_path: Path, power: Path, durability: str, rounds: int
) -> None:
    """The disk as it was fsynced when `commit` had returned has everything; without "power" it has not."""
    disk, bytes_ = tmp_path / "disk", tmp_path / "kept" / "bytes"
    disk.mkdir()
    bytes_.mkdir(parents=True)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COMMIT_AND_WAIT), tmp_path / "l2", durability, str(rounds)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(power), "POWER_FROM": str(tmp_path / "l2"),
             "POWER_TO": str(tmp_path / "kept")},
    )  # fmt: skip
    assert child.stdout is not None
    secret = child.stdout.readline().strip()
    child.kill()
    child.communicate()
    for line in (tmp_path / "kept" / "names").read_text().splitlines():
        name, inode = line.split()
        if (bytes_ / inode).exists():
            shutil.copy(bytes_ / inode, disk / name)
    store = DiskStore(disk, 10)
    found = [store.get(b"%d:%d" % (n, w)) for n in range(rounds) for w in range(4)]
    if durability == "power":
        assert found == [b"v" * 3000] * len(found) and store.secret().hex() == secret
    else:
        assert found[-1] is None  # what the other rows prove can fail
    await store.close()
