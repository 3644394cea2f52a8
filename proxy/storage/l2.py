"""L2, the source of truth: records in one directory, durable before `commit` returns.

Promises:
- `commit` returns only when its records survive SIGKILL (invariant 5): they are in SQLite's
  write-ahead log by then. (Losing power is another matter: the log is not fsynced per commit.)
- One commit is stored whole or not at all, whatever happens to the process in the middle.
- Commits that arrive together share one transaction, made by one writer thread.
- Any number of processes may share the directory; a join never loses another process's join.
- Every failure is a `StorageError` of one sentence. Nothing is evicted, expired or culled here.
- A directory of another version's is refused, never read as empty.

Values stay inside SQLite whatever their size. diskcache's own value files are not part of its
transactions: a replaced file is unlinked when the inner `set` ends, before the outer COMMIT, so a
kill in between would lose the old body and the new one (invariant 4). Keys and values are bytes (str
keys are ours: SQLite keeps the two apart), so nothing is ever pickled, and a pickle that somebody put
there is not read.

What happens at every turn is one statement a record, on diskcache's connection to its table, without what we do not
use of it (expiry, counts of rows and bytes kept by triggers): a third of what its `set` costs.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import diskcache  # type: ignore[import-untyped, unused-ignore]

FORMAT = b"1"  # of everything that is stored; another one with each change that old records do not fit
JOIN_VALUE_BYTES = 16
JOIN_KEEP = 32
SECRET_BYTES = 32
LOCK_WAIT_S = 30.0  # longest wait for other processes' transactions before a commit fails
VALUE_LIMIT_BYTES = 900_000_000  # SQLite refuses rows of 1e9 bytes

DATABASE = "cache.db"  # diskcache's name for its file
_FORMAT_KEY, _PROBE_KEY, _SECRET_KEY = "format", "probe", "secret:"
_FAILURES = (sqlite3.Error, diskcache.Timeout, OSError)

# As diskcache writes bytes: `raw` keys, and values in the row (mode 1).
_COLUMNS = "INTO Cache (key, raw, mode, store_time, access_time, value) VALUES (?, 1, 1, 0, 0, ?)"
_ADD = f"INSERT OR IGNORE {_COLUMNS}"
_PUT = f"INSERT {_COLUMNS} ON CONFLICT (key, raw) DO UPDATE SET mode = 1, value = excluded.value"
_GET = "SELECT value, mode FROM Cache WHERE key = ? AND raw = 1"
_UNUSED = "SELECT type, name FROM sqlite_master WHERE type = 'trigger' OR name = 'Cache_expire_time'"


class StorageError(Exception):
    """The directory cannot do what was asked; the message is one sentence for the operator."""


_Answer: TypeAlias = "asyncio.Future[frozenset[bytes]]"


class _Job(NamedTuple):
    """One commit on its way. Its answer: the keys of `adds` that were there before."""

    puts: Sequence[tuple[bytes | str, bytes]]
    joins: Sequence[tuple[bytes, bytes]]
    adds: Sequence[tuple[bytes, bytes]]
    answer: _Answer

    @property
    def records(self) -> int:
        return len(self.puts) + len(self.joins) + len(self.adds)


class DiskStore:
    """`get` from any thread; `commit`, `check` and `close` from any event loop.

    `queue_records` bounds one transaction: it ends with the commit that reaches so many records, and
    the commits behind it wait their turn.
    """

    def __init__(self, path: Path, queue_records: int) -> None:
        self._path = Path(path)
        self._queue_records = queue_records
        self._cache = _open(self._path)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: no more will come
        self._closed = False
        self._lock = threading.Lock()  # nothing is handed in behind the None
        # A daemon, so that a process that forgot close() still ends; it loses only commits that
        # nobody was told about.
        self._writer = threading.Thread(target=self._write, name="l2-writer", daemon=True)
        self._writer.start()

    # -- reading

    def get(self, key: bytes) -> bytes | None:
        """The value last committed under `key`, by any process; None when there is none."""
        self._require_open()
        try:
            return _value(self._cache, key)
        except sqlite3.Error as error:
            raise StorageError(f"Cannot read from {self._path}: {error}.") from error

    def secret(self, name: str) -> bytes:
        """32 random bytes, made once per directory and the same in every process."""
        self._require_open()
        try:
            self._cache.add(_SECRET_KEY + name, os.urandom(SECRET_BYTES))
            return _value(self._cache, _SECRET_KEY + name) or b""
        except _FAILURES as error:
            raise _explain(self._path, error) from error

    # -- writing

    async def commit(
        self,
        puts: Sequence[tuple[bytes, bytes]],
        joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (),
    ) -> frozenset[bytes]:
        """Store all of it or nothing; durable against SIGKILL on return.

        puts: insert or replace. adds: insert what is not there; what is there stays, and its keys
        are returned. joins: append a 16-byte value to the ordered set under the key; a
        value already there keeps its place; the newest 32 stay. Read the set with `get`: the
        values one after another, oldest first. Raises StorageError. A commit cancelled while it
        waits is withdrawn if the writer has not taken it yet, and is stored whole otherwise.
        """
        for _, value in joins:
            if len(value) != JOIN_VALUE_BYTES:
                raise ValueError(f"a joined value is {JOIN_VALUE_BYTES} bytes, not {len(value)}")
        for _, value in (*puts, *adds):
            if len(value) > VALUE_LIMIT_BYTES:
                raise StorageError(f"A value of {len(value)} bytes is too large to be stored.")
        return await self._submit(_Job(puts, joins, adds, asyncio.get_running_loop().create_future()))

    async def check(self) -> None:
        """Raises StorageError unless a record can be committed to the directory right now."""
        if not os.access(self._path / DATABASE, os.W_OK) or not os.access(self._path, os.W_OK):
            raise StorageError(f"The storage directory {self._path} is gone or not writable.")
        await self._submit(_Job([(_PROBE_KEY, b"1")], (), (), asyncio.get_running_loop().create_future()))

    async def close(self) -> None:
        """Finish what was handed in, then release the directory. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)
        self._cache.close()

    async def _submit(self, job: _Job) -> frozenset[bytes]:
        if not job.records:
            return frozenset()
        with self._lock:
            self._require_open()
            self._jobs.put(job)
        return await job.answer

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError("The store is closed.")

    # -- the writer thread

    def _write(self) -> None:
        while batch := self._batch():
            live = [job for job in batch if not job.answer.cancelled()]
            outcomes: list[frozenset[bytes] | StorageError]
            try:
                with self._cache.transact():
                    outcomes = [self._store(job) for job in live]
            except Exception as error:  # noqa: BLE001 - whoever awaits a commit gets it
                # In case the failed COMMIT or ROLLBACK left the connection inside a transaction: closing
                # rolls back, and diskcache opens another one for this thread at the next use.
                self._cache.close()
                outcomes = [_explain(self._path, error)] * len(live)
            _tell([job.answer for job in live], outcomes)
        self._cache.close()

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

    def _store(self, job: _Job) -> frozenset[bytes]:
        execute = self._cache._con.execute
        present = frozenset(key for key, value in job.adds if not execute(_ADD, (key, value)).rowcount)
        for put in job.puts:
            execute(_PUT, put)
        for key, value in job.joins:
            old, step = _value(self._cache, key) or b"", JOIN_VALUE_BYTES
            if not any(old[at : at + step] == value for at in range(0, len(old), step)):
                execute(_PUT, (key, (old + value)[-JOIN_KEEP * step :]))
        return present


def _value(cache: Any, key: bytes | str) -> bytes | None:
    """What is stored under a key. StorageError for what stands in no row as bytes: it is none of ours."""
    row = cache._con.execute(_GET, (key,)).fetchone()
    if row is None:
        return None
    value, mode = row
    if mode != 1 or type(value) is not bytes:
        raise StorageError("A record in the storage directory was not written by llm-pager.")
    return value


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


def _open(path: Path) -> Any:
    try:
        # It will hold conversations and keys: for the owner only. An existing one is left as it is.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache = diskcache.Cache(
            str(path),
            timeout=LOCK_WAIT_S,
            disk_min_file_size=2**62,
            eviction_policy="none",
            cull_limit=0,
            size_limit=2**62,
            statistics=0,
        )
        found = _value(cache, _FORMAT_KEY)
        with cache.transact():  # of several processes that begin with a new directory, one says it
            execute = cache._con.execute
            if found is None and execute("SELECT 1 FROM Cache LIMIT 1").fetchone() is None:
                execute(_PUT, (_FORMAT_KEY, FORMAT))
            found = _value(cache, _FORMAT_KEY)
            for kind, name in execute(_UNUSED).fetchall():
                execute(f"DROP {kind} {name}")
    except (*_FAILURES, StorageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"Cannot use {path} as the storage directory: {reason}; "
            "set tiers.l2.path to a directory that can be written."
        ) from error
    if found != FORMAT:
        cache.close()
        of = "an older version" if found is None else f"another version (format {found.decode()!r})"
        raise StorageError(
            f"The storage directory {path} was written by {of} of llm-pager, which this one does not "
            "read; set tiers.l2.path to another directory, or delete this one to begin anew."
        )
    return cache


def _explain(path: Path, error: Exception) -> StorageError:
    if isinstance(error, StorageError):
        return error
    if isinstance(error, diskcache.Timeout):  # diskcache's word for every failure of BEGIN
        cause = error.__context__
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_BUSY) & 0xFF
        if cause is None or code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            held = f"other processes held its lock for {LOCK_WAIT_S:.0f} s"
            return StorageError(f"Cannot write to {path}: {held}.")
        return StorageError(f"Cannot write to {path}: {cause}.")
    return StorageError(f"Cannot write to {path}: {error}.")
