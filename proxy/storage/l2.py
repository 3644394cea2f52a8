"""L2, the source of truth: records in one directory, durable before `commit` returns.

Promises:
- `commit` returns only when its records survive SIGKILL (invariant 5): they are in SQLite's write-ahead log by then.
  With durability "power" they survive losing power, too: the log is fsynced by then, once for all commits that
  arrived meanwhile, and never by the event loop.
- One commit is stored whole or not at all, whatever happens to the process in the middle.
- Commits that arrive together share one transaction: small ones the event loop's own, as long as nobody holds the
  lock and the disk is quick, because a thread for them costs a short turn a fifth more; all others one writer's.
- Any number of processes may share the directory; a join never loses another process's join.
- Every failure is a `StorageError` of one sentence. Nothing is evicted, expired or culled here.
- A directory of another version's is refused, never read as empty.
- Trouble is noticed at once and costs no waiting: the commit that fails says so, those behind it fail without
  touching the disk, and every second one of them tries again. Nothing is written into files that were deleted or
  replaced under us. When it can be, the directory is opened again: as it was, or as a new store, which the log says.
- What is dropped is overwritten, in the file and its log; a commit that began before an erasure is refused.
- What is damaged is `Damaged` to its reader, and written anew by the next commit that has it; a file that SQLite
  cannot make sense of is repaired (sqlite.py) beside the requests.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import queue
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from proxy.errors import ErasedMeanwhile
from proxy.errors import StorageError as StorageError
from proxy.keys import KINDS
from proxy.storage.sqlite import (
    ADD,
    DROP,
    ERASED,
    OWN_ROWS,
    PUT,
    SCAN,
    SECRET,
    SECRET_BYTES,
    Damages,
    Inodes,
    Key,
    Opened,
    Repaired,
    connect,
    get_value,
    inodes,
    is_damage,
    newest_row,
    open_database,
    put_row,
    sound_value,
    sync_commits,
    sync_directory,
    used_bytes,
    value_of,
    write_mark,
)
from proxy.storage.sqlite import Damaged as Damaged

JOIN_VALUE_BYTES = 34  # a node's id
JOIN_KEEP = 32
LOCK_WAIT_S = 2.0  # longest wait for other processes' transactions before a commit fails ...
_LOCK_WAIT_AGAIN_S = 0.05  # ... and while they go on
VALUE_LIMIT_BYTES = 900_000_000  # SQLite refuses rows of 1e9 bytes
RETRY_S = 1.0  # between two tries of a store that cannot be written
_HERE_BYTES = 65_536  # of a commit that the event loop makes itself ...
_HERE_S = 0.02  # ... unless the last one took longer, in the last ...
_SLOW_S = 10.0
_LOG_BYTES = 4 << 20  # of the write-ahead log, about, that the writer copies to the database, not the event loop
_PAGES_BYTES = 8192  # that a record takes there, beside its value
_MARK_S = 1.0  # between two marks of how far the store has come
_REPAIRING = float("inf")  # when a commit is tried again while a repair runs
_REPAIRS_S = 60.0  # between two repairs: a bad disk may damage the new file, too
_PROBE = "probe"
_PROBE_VALUE = bytes(65_536)  # about what a turn writes: a disk with less room is full
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN)

log = logging.getLogger(__name__)

_Answer: TypeAlias = "asyncio.Future[frozenset[bytes]]"


class _Job(NamedTuple):
    """One commit on its way. Its answer: the keys of `adds` that were there before."""

    puts: Sequence[tuple[Key, bytes]]
    joins: Sequence[tuple[bytes, bytes]]
    adds: Sequence[tuple[bytes, bytes]]
    answer: _Answer | None  # None: it only wakes the writer
    secret: bytes | None = None  # of the store that it is for; None: of any
    erased: int | None = None  # erasures that it knows of; None: it holds no text
    drops: Sequence[bytes] = ()
    leaves: Sequence[tuple[bytes, bytes]] = ()
    erases: bool = False
    swaps: Sequence[tuple[bytes, bytes, bytes]] = ()

    @property
    def records(self) -> int:
        return sum(map(len, (self.puts, self.joins, self.adds, self.drops, self.leaves, self.swaps)))


class _Gone(Exception):
    """The files that were open do not stand in the directory any more."""


class _Database:
    """A store that is open. Its readers are one connection a thread; nothing of it is used again once its files
    were replaced."""

    def __init__(self, directory: Path, opened: Opened, power: bool) -> None:
        self.directory = directory
        if power:
            sync_commits(opened.connection)
            sync_directory(directory)
        self.inodes: Inodes = opened.inodes
        self.secret = opened.secret
        self.rowid = opened.rowid
        self.writer: sqlite3.Connection | None = opened.connection  # the writer thread's
        self.here: sqlite3.Connection | None = None  # the event loop's, for commits: it waits for no lock
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self.reader.execute("SELECT 1 FROM Cache LIMIT 1")  # as long as it is open, no other file has its inode

    @property
    def reader(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = connect(self.directory)
            self._readers.append(found)
        return found

    def begin_here(self) -> sqlite3.Connection:
        """The event loop's connection, in a transaction. Raises sqlite3.Error at once where another has one."""
        if self.here is None:
            self.here = connect(self.directory, 0.0)
            self.here.execute("PRAGMA wal_autocheckpoint = 0")
        self.here.execute("BEGIN IMMEDIATE")
        return self.here

    def close_here(self) -> None:
        """Rolls back what it was in."""
        if self.here is not None:
            with suppress(sqlite3.Error):
                self.here.close()
            self.here = None

    def close_writer(self) -> None:
        """Rolls back what it was in."""
        if self.writer is not None:
            with suppress(sqlite3.Error):
                self.writer.close()
            self.writer = None

    def close(self) -> None:
        """A reader in another thread gets an error. SQLite deletes no log of a database that has been moved."""
        self.close_writer()
        self.close_here()
        for reader in self._readers:
            with suppress(sqlite3.Error):
                reader.close()


class DiskStore:
    """`get` from any thread; `commit`, `check` and `close` from any event loop.

    `queue_records` bounds one transaction: it ends with the commit that reaches so many records, and
    the commits behind it wait their turn.

    `damaged`: how often damaged values were met, by kind; `repaired`: what the file's last repair brought; `generation`: another number
    whenever the directory holds another file than before: what is known from it is to be forgotten; `losses`: how many
    times that was another store or an older one; `erased`: how many erasures there were, as far as this process knows;
    `durability`: what a commit survives, "process" or "power".
    """

    def __init__(self, path: Path, queue_records: int, durability: str = "process") -> None:
        self._path = Path(path)
        self.where = str(self._path)
        self._power = durability == "power"
        self._queue_records = queue_records
        self.damaged = Damages()
        self.generation = self.losses = self.erased = 0
        self.repaired: Repaired | None = None
        self._database: _Database | None = None
        self._trouble: str | None = None
        self._trouble_s = self._retry_s = 0.0  # since when; when it is tried again
        self._turned_away = 0  # commits since then
        self._proved_s = self._marked_s = self._repaired_s = float("-inf")  # when it was last written, ...
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: no more will come
        self._here: list[_Job] = []  # for the event loop to store, before it does anything else
        self._loop: asyncio.AbstractEventLoop | None = None  # whose they are
        self._slow_until_s = float("-inf")
        self._log_bytes = 0  # written by the event loop since the writer looked after the log
        self._repair_asked = False
        self._closed = False
        self._lock = threading.Lock()  # nothing is handed in behind the None
        self._open()
        # A daemon, so that a process that forgot close() still ends; it loses only commits that
        # nobody was told about.
        self._writer = threading.Thread(target=self._write, name="l2-writer", daemon=True)
        self._writer.start()

    # -- reading

    def get(self, key: Key) -> bytes | None:
        """The value last committed under `key`, by any process; None when there is none. Raises Damaged for one
        that cannot be read, StorageError when the store cannot be."""
        try:
            return get_value(self._opened_database().reader, key)
        except Damaged as error:
            raise self._met_damage(key, error) from None
        except sqlite3.Error as error:
            if is_damage(error):
                self._ask_for_repair()
                raise self._met_damage(key, error) from error
            raise StorageError(f"Cannot read from {self._path}: {error}.") from error

    def scan(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, bytes]]:
        """The first values whose keys begin with `prefix` and come after `after`, in the order of their keys; what
        cannot be read is left out. From any thread; blocks. Raises StorageError."""
        database = self._opened_database()
        found: list[tuple[bytes, bytes]] = []
        first, end = prefix, after_all(prefix)
        while not found:  # nothing is found only where there is nothing more
            first = max(first, after + b"\0")  # one bound: of two SQLite begins at the lower, and walks to the other
            try:
                rows = database.reader.execute(SCAN, (first, end, limit)).fetchall()
            except sqlite3.Error as error:
                raise StorageError(f"Cannot read from {self._path}: {error}.") from error
            for row in rows:
                try:
                    found.append((row[0], value_of(row)))
                except Damaged as error:
                    self._met_damage(row[0], error)
            if not rows:
                break
            after = rows[-1][0]
        return found

    def size_bytes(self) -> int:
        """What is held takes so much of the disk. From any thread. Raises StorageError."""
        try:
            return used_bytes(self._opened_database().reader)
        except sqlite3.Error as error:
            raise StorageError(f"Cannot read from {self._path}: {error}.") from error

    def _opened_database(self) -> _Database:
        self._require_open()
        if self._database is None:
            raise StorageError(self._trouble or f"The storage in {self._path} is not open.")
        return self._database

    def look(self) -> None:
        """Learn of other processes' erasures: they change `erased`."""
        with suppress(StorageError):
            self.erased = int.from_bytes(self.get(ERASED) or b"", "big")

    suspends = False

    def ahead(self, keys: Iterable[Key], alone: bool = False) -> None:
        """Nothing is gained."""

    def secret(self) -> bytes:
        """32 random bytes, made once per store and the same in every process; of a store that cannot be opened yet,
        for nobody else and for a while."""
        self._require_open()
        return self._database.secret if self._database is not None else os.urandom(SECRET_BYTES)

    async def adopt(self, secret: bytes) -> None:
        """Be the store with this secret from now on. It holds nothing yet. Raises StorageError."""
        await self.commit([(SECRET, secret)])
        if self._database is not None:
            self._database.secret = secret

    def _met_damage(self, key: Key, error: Exception) -> Damaged:
        kind = KINDS.get(key[:1], "value") if isinstance(key, bytes) else key
        return self.damaged.met(kind, f"A {kind} in {self._path} is damaged: {error}; llm-pager check --storage finds all damage.")

    def _ask_for_repair(self) -> None:
        if not self._repair_asked and time.monotonic() - self._repaired_s > _REPAIRS_S:
            self._repair_asked = True
            self._jobs.put(_Job((), (), (), None))

    # -- writing

    async def commit(
        self,
        puts: Sequence[tuple[Key, bytes]],
        joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (),
        secret: bytes | None = None,
        erased: int | None = None,
        drops: Sequence[bytes] = (),
        leaves: Sequence[tuple[bytes, bytes]] = (),
        erases: bool = False,
    ) -> frozenset[bytes]:
        """Store all of it or nothing; durable on return.

        puts: insert or replace. adds: insert what is not there; what is there stays, and its keys
        are returned. joins: append a 16-byte value to the ordered set under the key; a
        value already there keeps its place; the newest 32 stay. Read the set with `get`: the
        values one after another, oldest first. `secret`: of the store that it is for; `erased`: the erasures that what is stored knows of. Raises
        StorageError where the store's are others, and at once while it is known to be in trouble.

        drops: before all else, every key that begins with one of these goes, and its bytes with it. leaves: from
        the ordered set under the key goes every value that begins with the second. `erases`: it is an erasure. A commit cancelled while it waits is withdrawn if the writer has not taken it yet, and is stored
        whole otherwise.
        """
        for _, value in joins:
            if len(value) != JOIN_VALUE_BYTES:
                raise ValueError(f"a joined value is {JOIN_VALUE_BYTES} bytes, not {len(value)}")
        for _, value in (*puts, *adds):
            if len(value) > VALUE_LIMIT_BYTES:
                raise StorageError(f"A value of {len(value)} bytes is too large to be stored.")
        if self._trouble is not None and time.monotonic() < self._retry_s:
            self._turned_away += 1
            raise StorageError(self._trouble)
        return await self._submit(puts, joins, adds, secret, erased, drops, leaves, erases)

    async def swap(self, rows: Sequence[tuple[bytes, bytes, bytes]]) -> frozenset[bytes]:
        """Put the third under the key where the second stands, in one commit; the keys where that was so."""
        return await self._submit((), (), (), None, None, (), (), False, rows)

    async def scrub(self) -> None:
        """Afterwards no file has a byte of what was dropped or replaced before. Raises StorageError."""
        self._require_open()
        await asyncio.to_thread(_in_process, self._path, "scrubbed", "scrub")

    async def check(self, proved_s: float = 0.0) -> None:
        """Raises StorageError unless a turn can be committed right now. A commit of the last `proved_s` seconds
        is proof enough; while the store is in trouble, so is a failure of the last second, unless it is 0."""
        self._require_open()
        now_s, database = time.monotonic(), self._database
        if self._trouble is not None and now_s < self._retry_s and (proved_s or self._retry_s == _REPAIRING):
            raise StorageError(self._trouble)
        proved = self._trouble is None and now_s - self._proved_s < proved_s
        if proved and database is not None and database.inodes == inodes(self._path):
            return
        self._retry_s = 0.0
        await self._submit([(_PROBE, _PROBE_VALUE)], (), ())

    @property
    def trouble(self) -> str | None:
        """Why it cannot be written, as far as is known."""
        return self._trouble

    async def close(self) -> None:
        """Finish what was handed in, then release the directory. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for job in (*self._here, None):
                    self._jobs.put(job)
                self._here = []
        await asyncio.to_thread(self._writer.join)

    async def _submit(
        self,
        puts: Sequence[tuple[Key, bytes]],
        joins: Sequence[tuple[bytes, bytes]],
        adds: Sequence[tuple[bytes, bytes]],
        *more: Any,
    ) -> frozenset[bytes]:
        answer: _Answer = asyncio.get_running_loop().create_future()
        job = _Job(puts, joins, adds, answer, *more)
        if not job.records:
            return frozenset()
        loop, size = answer.get_loop(), sum(len(value) for _, value in (*puts, *adds))
        with self._lock:
            self._require_open()
            self._loop = self._loop or loop
            small = size <= _HERE_BYTES and not job.drops and not self._power
            if loop is self._loop and small and self._trouble is None and self._jobs.empty():
                if not self._here:
                    loop.call_soon(self._store_here)
                self._here.append(job)
            else:
                self._jobs.put(job)
        return await answer

    def _store_here(self) -> None:
        """What was handed in in this round of the event loop; by the writer, where that would wait for anything."""
        jobs, self._here = [job for job in self._here if job.answer and not job.answer.cancelled()], []
        database, began_s = self._database, time.monotonic()
        outcomes = None
        if jobs and database is not None and self._trouble is None and began_s > self._slow_until_s:
            try:
                if database.inodes == inodes(self._path):
                    outcomes = self._stored_by(database.begin_here(), database, jobs)
            except sqlite3.Error:  # the writer waits for the lock, or learns what it is
                database.close_here()
        if outcomes is None:
            for job in jobs:
                self._jobs.put(job)
            return
        _resolve([(job.answer, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if job.answer])
        self._proved_s = time.monotonic()
        if self._proved_s - began_s > _HERE_S:
            self._slow_until_s = self._proved_s + _SLOW_S
        self._log_bytes += sum(
            _PAGES_BYTES * job.records + sum(len(value) for _, value in (*job.puts, *job.adds)) for job in jobs
        )
        if self._log_bytes > _LOG_BYTES or self._proved_s - self._marked_s > _MARK_S:
            self._marked_s = self._proved_s
            self._jobs.put(_Job((), (), (), None))

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError("The store is closed.")

    # -- the writer thread

    def _write(self) -> None:
        while batch := self._batch():
            live = [(job, job.answer) for job in batch if job.answer and not job.answer.cancelled()]
            _tell([answer for _, answer in live], self._outcomes([job for job, _ in live]))
            if not live:
                self._look_after_log()
            if self._repair_asked and self._retry_s != _REPAIRING:
                self._begin_repair()
        if self._database is not None:
            self._mark(self._database, 0.0)
            self._database.close()

    def _batch(self) -> list[_Job]:
        """What has been handed in, up to the bound; [] when the store was closed behind it."""
        batch: list[_Job] = []
        records = 0
        while records < self._queue_records and not (batch and self._jobs.empty()):
            job = self._jobs.get()
            if job is None:
                if batch:
                    self._jobs.put(None)
                break
            batch.append(job)
            records += job.records
        return batch

    def _outcomes(self, jobs: Sequence[_Job]) -> list[frozenset[bytes] | StorageError]:
        if not jobs:
            return []
        if self._trouble is not None and time.monotonic() < self._retry_s:
            self._turned_away += len(jobs)
            return [StorageError(self._trouble) for _ in jobs]
        try:
            database = self._usable()
            outcomes = self._stored(database, jobs)
        except Exception as error:  # noqa: BLE001 - whoever awaits a commit gets it
            self._failed(error, len(jobs))
            return [StorageError(self._trouble) for _ in jobs]
        self._proved_s = time.monotonic()
        if self._trouble is not None:
            log.warning(
                "The storage in %s can be written again, after %.0f s; %d commits were turned away meanwhile.",
                self._path, self._proved_s - self._trouble_s, self._turned_away,
            )  # fmt: skip
            self._trouble, self._turned_away = None, 0
            if database.writer is not None:
                database.writer.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_S * 1000:.0f}")
        self._mark(database, _MARK_S)
        return outcomes

    def _stored(self, database: _Database, jobs: Sequence[_Job]) -> list[frozenset[bytes] | StorageError]:
        wait_s = LOCK_WAIT_S if self._trouble is None else _LOCK_WAIT_AGAIN_S
        if database.writer is None:
            database.writer = connect(self._path, wait_s)
            if self._power:
                sync_commits(database.writer)
        database.writer.execute("BEGIN IMMEDIATE")
        return self._stored_by(database.writer, database, jobs)

    def _stored_by(
        self, writer: sqlite3.Connection, database: _Database, jobs: Sequence[_Job]
    ) -> list[frozenset[bytes] | StorageError]:
        """In the transaction that it is in, which ends with them."""
        outcomes: list[frozenset[bytes] | StorageError] = []
        self.erased = int.from_bytes(sound_value(writer, ERASED) or b"", "big")
        for job in jobs:
            if job.secret not in (None, database.secret):
                outcomes.append(StorageError(f"The storage in {self._path} was replaced meanwhile."))
            elif job.erased not in (None, self.erased):
                outcomes.append(ErasedMeanwhile("Something was erased meanwhile: what began before it is not stored."))
            else:
                outcomes.append(self._store(writer, job))
        database.rowid = newest_row(writer)
        writer.execute("COMMIT")
        if any(job.drops for job in jobs):
            writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what was dropped stands in the log, too
        return outcomes

    def _look_after_log(self) -> None:
        """What the event loop does not do itself: it would wait for the disk."""
        database = self._database
        if database is None or database.writer is None or self._trouble is not None:
            return
        with suppress(sqlite3.Error):  # the next commit meets it
            if self._log_bytes > _LOG_BYTES:
                self._log_bytes = 0
                database.writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
                database.writer.execute("BEGIN IMMEDIATE")  # who begins the log anew waits for the disk
                self._stored_by(database.writer, database, [_Job([(_PROBE, b"")], (), (), None)])
            self._mark(database, 0.0)

    def _store(self, writer: sqlite3.Connection, job: _Job) -> frozenset[bytes]:
        newest = newest_row(writer) if job.drops else 0
        for prefix in job.drops:
            writer.execute(DROP, (prefix, after_all(prefix)))
        for key, part in job.leaves:
            old, step = sound_value(writer, key) or b"", JOIN_VALUE_BYTES
            values = (old[at : at + step] for at in range(0, len(old), step))
            left = b"".join(value for value in values if not value.startswith(part))
            writer.execute(*((PUT, put_row(key, left)) if left else (DROP, (key, key + b"\0"))))
        if job.erases:
            self.erased += 1
            writer.execute(PUT, put_row(ERASED, self.erased.to_bytes(8, "big")))
        if job.drops and newest_row(writer) < newest:  # the store is not an older one
            writer.execute("UPDATE Cache SET rowid = ? WHERE key = ?", (newest, SECRET))
        present = [key for key, value in job.adds if not self._add(writer, key, value)]
        if job.puts:
            writer.executemany(PUT, [put_row(key, value) for key, value in job.puts])
        for key, old, new in job.swaps:
            if sound_value(writer, key) == old:
                writer.execute(PUT, put_row(key, new))
                present.append(key)
        for key, value in job.joins:
            if writer.execute(ADD, put_row(key, value)).rowcount:
                continue  # the first one, as a rule
            old = sound_value(writer, key) or b""
            step = JOIN_VALUE_BYTES
            if not any(old[at : at + step] == value for at in range(0, len(old), step)):
                writer.execute(PUT, put_row(key, (old + value)[-JOIN_KEEP * step :]))
        return frozenset(present)

    @staticmethod
    def _add(writer: sqlite3.Connection, key: bytes, value: bytes) -> bool:
        """Whether it is new; what stands there damaged is replaced."""
        row = put_row(key, value)
        if writer.execute(ADD, row).rowcount:
            return True
        if sound_value(writer, key) is not None:
            return False
        writer.execute(PUT, row)
        return True

    # -- trouble

    def _open(self) -> None:
        """At the start. Raises StorageError for a directory that cannot be used before somebody changes something."""
        try:
            self._opened(open_database(self._path, LOCK_WAIT_S))
        except (OSError, sqlite3.Error, StorageError) as error:
            cannot_be_opened = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN
            passing = isinstance(error, OSError) and error.errno in _PASSING
            passing = passing or (isinstance(error, sqlite3.Error) and not cannot_be_opened)
            if not passing:
                if isinstance(error, StorageError):
                    raise
                reason = getattr(error, "strerror", None) or error
                raise StorageError(
                    f"Cannot use {self._path} as the storage directory: {reason}; "
                    "set tiers.l2.path to a directory that can be written."
                ) from error
            self._failed(error, 0)

    def _opened(self, opened: Opened) -> _Database:
        before = self._database
        for sentence in opened.told:
            log.error("%s", sentence)
        self._database, self.repaired = _Database(self._path, opened, self._power), opened.repaired
        database = self._database
        lost = before is not None and (before.secret != opened.secret or before.rowid > opened.rowid)
        self.losses += lost
        if before is None or lost or before.inodes[0] != database.inodes[0]:
            self.generation += 1
        if before is not None and before.secret != opened.secret:
            log.error("%s holds another storage now: what was remembered before is gone.", self._path)
        elif before is not None and before.rowid > opened.rowid and not opened.lost:
            log.error("%s holds an older storage now: what was remembered since is gone.", self._path)
        self._marked_s = float("-inf")
        log.info("The storage in %s %s.", self._path, "is empty" if opened.rowid <= OWN_ROWS else "is open")
        return database

    def _usable(self) -> _Database:
        """The open store, whose files are those in the directory; else what is there now. Raises what opening does,
        and _Gone when what was open is not there any more."""
        database = self._database
        if database is not None:
            found = inodes(self._path)
            if database.inodes == found:
                return database
            if database.inodes[0] == found[0] and database.writer is not None:  # we still have its log
                log.error("The write-ahead log or the shared memory in %s was deleted: what they hold is saved.", self._path)
                database.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            elif found[0] is None and self._trouble is None:
                raise _Gone
            database.close()
        opened = open_database(self._path, LOCK_WAIT_S if self._trouble is None else _LOCK_WAIT_AGAIN_S)
        there = database is None or (opened.secret == database.secret and opened.rowid >= database.rowid)
        found_now = self._opened(opened)
        if not there and self._trouble is None:  # what is to be stored goes on from what is not there
            raise _Gone
        return found_now

    def _failed(self, error: Exception, commits: int) -> None:
        """No commit is tried for a while; the connection is a new one then."""
        if self._database is not None:
            self._database.close_writer()
        now_s = time.monotonic()
        if self._trouble is None:
            self._trouble_s = now_s
        if self._trouble != (trouble := _explain(self._path, error)):
            log.error("%s Requests are answered without memory until it can be written.", trouble)
        self._trouble, self._retry_s = trouble, now_s + RETRY_S
        self._turned_away += commits
        if is_damage(error):
            self._repair_asked = now_s - self._repaired_s > _REPAIRS_S

    def _begin_repair(self) -> None:
        """Beside the writer, which lets all commits fail at once meanwhile: a large file takes its time."""
        self._repaired_s = time.monotonic()
        if self._trouble is None:
            self._trouble_s = self._repaired_s
        self._trouble, self._retry_s = f"The storage in {self._path} is damaged and being repaired.", _REPAIRING
        if self._database is not None:
            self._database.close_writer()
        threading.Thread(target=self._repair, name="l2-repair", daemon=True).start()

    def _repair(self) -> None:
        """Make the file anew of what can be read."""
        database, self._repair_asked = self._database, False
        try:
            if database is None or database.inodes[0] == inodes(self._path)[0]:  # else another process has done it
                log.error("%s", _in_process(self._path, "repaired"))
            opened = open_database(self._path, LOCK_WAIT_S)
        except Exception as error:  # noqa: BLE001 - it stays as it is
            self._failed(error, 0)
            return
        self._opened(opened)
        if database is not None:
            database.close()
        self._retry_s = 0.0

    def _mark(self, database: _Database, every_s: float) -> None:
        """Note how far the store has come, for the next one who opens it."""
        if database.writer is None or (now_s := time.monotonic()) - self._marked_s < every_s:
            return
        self._marked_s = now_s
        with suppress(OSError, sqlite3.Error):
            write_mark(self._path, database.secret, newest_row(database.writer), database.inodes)


def _in_process(path: Path, done_to_it: str, *what: str) -> str:
    """Repair or scrub the file in a process of its own: it takes its time, and opens files that this one has locked.
    Returns what to tell; raises StorageError and OSError."""
    command = [sys.executable, "-m", "proxy.storage.sqlite", str(path.absolute()), *what]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1].rstrip(".")
        raise StorageError(f"The storage in {path} cannot be {done_to_it}: {reason}.")
    return done.stdout.strip()


def after_all(prefix: bytes) -> bytes:
    """What comes after all keys that begin with it."""
    last = prefix.rstrip(b"\xff")
    return last[:-1] + bytes([last[-1] + 1]) if last else b"\xff" * 64


def _tell(answers: Sequence[_Answer], outcomes: Sequence[frozenset[bytes] | StorageError]) -> None:
    """Wake each event loop once, however many wait in it: a wake-up for each costs a tenth of a short turn."""
    told: dict[asyncio.AbstractEventLoop, list[tuple[_Answer, frozenset[bytes] | StorageError]]] = {}
    for answer, outcome in zip(answers, outcomes, strict=True):
        told.setdefault(answer.get_loop(), []).append((answer, outcome))
    for loop, rows in told.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, rows)


def _resolve(rows: Sequence[tuple[_Answer, frozenset[bytes] | StorageError]]) -> None:
    for answer, outcome in rows:
        if answer.done():  # cancelled after it was taken
            continue
        if isinstance(outcome, StorageError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


def _explain(path: Path, error: Exception) -> str:
    if isinstance(error, StorageError):
        return str(error)
    if isinstance(error, _Gone):
        return f"The storage directory {path} was deleted or replaced while it was in use: what it held is gone."
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"Cannot write to {path}: other processes have held its lock for {LOCK_WAIT_S:g} s."
    return f"Cannot write to {path}: {error}."
