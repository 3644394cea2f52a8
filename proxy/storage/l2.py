"""L2, the source of truth: records in one directory, durable before `commit` returns.

Promises:
- `commit` returns only when its records survive SIGKILL (invariant 5): they are in SQLite's
  write-ahead log by then. (Losing power is another matter: the log is not fsynced per commit.)
- One commit is stored whole or not at all, whatever happens to the process in the middle.
- Commits that arrive together share one transaction, made by one writer thread; one that fails
  takes no other with it.
- Any number of processes may share the directory; a join never loses another process's join.
- Every failure is a `StorageError` of one sentence. Nothing is evicted, expired or culled here.

Values stay inside SQLite whatever their size. diskcache's own value files are not part of its
transactions: a replaced file is unlinked when the inner `set` ends, before the outer COMMIT, so a
kill in between would lose the old body and the new one (invariant 4). For the same reason of
trust nothing is ever pickled: `_BytesDisk` takes bytes and gives bytes.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diskcache  # type: ignore[import-untyped, unused-ignore]

JOIN_VALUE_BYTES = 16
JOIN_KEEP = 32
SECRET_BYTES = 32
LOCK_WAIT_S = 30.0  # longest wait for other processes' transactions before a commit fails
BUSY_TIMEOUT_S = 2.0  # SQLite's own wait inside one attempt; also bounds a blocked `get`
VALUE_LIMIT_BYTES = 900_000_000  # SQLite refuses rows of 1e9 bytes

_DATABASE = "cache.db"  # diskcache's file name, looked at only by `check`
_PROBE_KEY = "probe"  # str keys are ours: callers' keys are bytes, and SQLite keeps the two apart

_Key = bytes | str


class StorageError(Exception):
    """The directory cannot do what was asked; the message is one sentence for the operator."""


class _BytesDisk(diskcache.Disk):  # type: ignore[misc]
    """Bytes in, the same bytes out, always in the row: no value files and no pickle."""

    def put(self, key: _Key) -> tuple[_Key, bool]:
        return key, True

    def get(self, key: _Key, raw: bool) -> _Key:
        return key

    def store(
        self, value: bytes, read: bool, key: object = None
    ) -> tuple[int, int, str | None, bytes]:
        if type(value) is not bytes:
            raise TypeError(f"values are bytes, not {type(value).__name__}")
        if len(value) > VALUE_LIMIT_BYTES:
            raise ValueError(f"a value of {len(value)} bytes is over {VALUE_LIMIT_BYTES}")
        return 0, diskcache.core.MODE_RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: bytes, read: bool) -> bytes:
        if mode != diskcache.core.MODE_RAW or type(value) is not bytes:
            raise StorageError("A record in the storage directory was not written by llm-pager.")
        return value


class _Job(NamedTuple):
    """One commit on its way: its records, and where its answer goes."""

    puts: Sequence[tuple[_Key, bytes]]
    joins: Sequence[tuple[bytes, bytes]]
    adds: Sequence[tuple[bytes, bytes]]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[frozenset[bytes]]
    present: set[bytes]  # keys of `adds` that were there before

    @property
    def records(self) -> int:
        return len(self.puts) + len(self.joins) + len(self.adds)


class DiskStore:
    """`get` from any thread; `commit`, `check` and `close` from any event loop.

    `queue_records` bounds the records handed to the writer and not yet durable, and thereby the
    size of one transaction. A commit that finds no room waits its turn, first come first served
    (one larger than the whole queue goes alone).
    """

    def __init__(self, path: Path, queue_records: int) -> None:
        if queue_records < 1:
            raise ValueError("queue_records must be at least 1")
        self._path = Path(path)
        self._queue_records = queue_records
        self._cache = _open(self._path)
        self._ready: deque[_Job] = deque()  # admitted: the writer takes all of it at once
        self._waiting: deque[_Job] = deque()  # no room yet, in order of arrival
        self._inflight_records = 0
        self._closed = False
        self._wake = threading.Condition(threading.Lock())
        # A daemon, so that a process that forgot close() still ends; it loses only commits that
        # nobody was told about.
        self._writer = threading.Thread(target=self._write, name="l2-writer", daemon=True)
        self._writer.start()

    # ---------------------------------------------------------------- reading
    def get(self, key: bytes) -> bytes | None:
        """The value last committed under `key`, by any process; None when there is none."""
        if self._closed:
            raise StorageError(_CLOSED)
        try:
            value: bytes | None = self._cache.get(key)
        except sqlite3.Error as error:
            raise StorageError(f"Cannot read from {self._path}: {error}.") from error
        return value

    def secret(self, name: str) -> bytes:
        """32 random bytes, made once per directory and the same in every process."""
        key = f"secret:{name}"
        if self._closed:
            raise StorageError(_CLOSED)
        deadline = time.monotonic() + LOCK_WAIT_S
        try:
            found: bytes | None = self._cache.get(key)
            if found is None:
                with _Transaction(self._cache, deadline):
                    found = self._cache.get(key)
                    if found is None:
                        found = os.urandom(SECRET_BYTES)
                        self._cache.set(key, found)
        except _FAILURES as error:
            raise _explain(self._path, error) from error
        return found

    # ---------------------------------------------------------------- writing
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
        return await self._submit(puts, joins, adds)

    async def check(self) -> None:
        """Raises StorageError unless a record can be committed to the directory right now."""
        if not os.access(self._path / _DATABASE, os.W_OK) or not os.access(self._path, os.W_OK):
            raise StorageError(f"The storage directory {self._path} is gone or not writable.")
        await self._submit(((_PROBE_KEY, b"1"),))

    async def close(self) -> None:
        """Finish what was handed in, then release the directory. Safe to call twice."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        await asyncio.to_thread(self._writer.join)
        self._cache.close()

    async def _submit(
        self,
        puts: Sequence[tuple[_Key, bytes]],
        joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (),
    ) -> frozenset[bytes]:
        loop = asyncio.get_running_loop()
        job = _Job(puts, joins, adds, loop, loop.create_future(), set())
        if not job.records:
            return frozenset()
        with self._wake:
            if self._closed:
                raise StorageError(_CLOSED)
            if self._waiting or not self._has_room(job):
                self._waiting.append(job)
            else:
                self._admit(job)
        return await job.future

    # The three below are called with the lock held.
    def _has_room(self, job: _Job) -> bool:
        held = self._inflight_records
        return not held or held + job.records <= self._queue_records

    def _admit(self, job: _Job) -> None:
        self._inflight_records += job.records
        self._ready.append(job)
        if len(self._ready) == 1:
            self._wake.notify()

    def _release(self, batch: list[_Job]) -> None:
        self._inflight_records -= sum(job.records for job in batch)
        while self._waiting and self._has_room(self._waiting[0]):
            self._admit(self._waiting.popleft())

    # ---------------------------------------------------------------- the writer thread
    def _write(self) -> None:
        done: list[_Job] = []
        while True:
            with self._wake:
                self._release(done)
                while not self._ready:
                    if self._closed:  # nothing ready means nothing waiting: _release saw to it
                        self._cache.close()
                        return
                    self._wake.wait()
                done = list(self._ready)
                self._ready.clear()
            live = [job for job in done if not job.future.cancelled()]
            _answer(self._store(live))

    def _store(self, batch: list[_Job]) -> list[tuple[_Job, StorageError | None]]:
        """One transaction for the batch; when a record in it is at fault, one for each commit."""
        if not batch:
            return []
        error = self._try(batch)
        if error is None or len(batch) == 1 or isinstance(error, diskcache.Timeout):
            failure = None if error is None else _explain(self._path, error)
            return [(job, failure) for job in batch]
        answers: list[tuple[_Job, StorageError | None]] = []
        for job in batch:
            error = self._try([job])
            answers.append((job, None if error is None else _explain(self._path, error)))
        return answers

    def _try(self, batch: list[_Job]) -> Exception | None:
        try:
            with _Transaction(self._cache, time.monotonic() + LOCK_WAIT_S):
                for job in batch:
                    job.present.clear()  # it may be tried again
                    for key, value in job.adds:
                        if not self._cache.add(key, value):
                            job.present.add(key)
                    for name, value in job.puts:
                        self._cache.set(name, value)
                    for key, value in job.joins:
                        self._join(key, value)
        except Exception as error:  # noqa: BLE001 - whoever awaits the commit gets it
            # In case the failed COMMIT or ROLLBACK left the connection inside a transaction: closing
            # rolls back, and diskcache opens another one for this thread at the next use.
            self._cache.close()
            return error
        return None

    def _join(self, key: bytes, value: bytes) -> None:
        old: bytes = self._cache.get(key) or b""
        step = JOIN_VALUE_BYTES
        if any(old[at : at + step] == value for at in range(0, len(old), step)):
            return
        self._cache.set(key, (old + value)[-JOIN_KEEP * step :])


_FAILURES = (sqlite3.Error, diskcache.Timeout, OSError, TypeError, ValueError, StorageError)
_CLOSED = "The store is closed."


class _Transaction:
    """`cache.transact()` that waits for other processes' locks until `deadline`.

    diskcache reports every failure of BEGIN as Timeout; only a busy database is worth waiting
    for, so the others are raised as what they are.
    """

    def __init__(self, cache: Any, deadline: float) -> None:
        self._cache = cache
        self._deadline = deadline
        self._open: Any = None

    def __enter__(self) -> None:
        while True:
            transaction = self._cache.transact()
            try:
                transaction.__enter__()
            except diskcache.Timeout as timeout:
                cause = timeout.__context__
                code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_BUSY) & 0xFF
                if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise cause or timeout from None
                if time.monotonic() >= self._deadline:
                    raise
            else:
                self._open = transaction
                return

    def __exit__(self, *exc: Any) -> Any:
        return self._open.__exit__(*exc)


def _open(path: Path) -> Any:
    try:
        # It will hold conversations and keys: for the owner only. An existing one is left as it is.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return diskcache.Cache(
            str(path),
            timeout=BUSY_TIMEOUT_S,
            disk=_BytesDisk,
            eviction_policy="none",
            cull_limit=0,
            size_limit=2**62,
            statistics=0,
        )
    except (OSError, sqlite3.Error, diskcache.Timeout) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"Cannot use {path} as the storage directory: {reason}; "
            "set tiers.l2.path to a directory that can be written."
        ) from error


def _explain(path: Path, error: Exception) -> StorageError:
    if isinstance(error, StorageError):
        return error
    if isinstance(error, diskcache.Timeout):
        return StorageError(
            f"Cannot write to {path}: other processes held its lock for {LOCK_WAIT_S:.0f} s."
        )
    return StorageError(f"Cannot write to {path}: {error}.")


def _answer(answers: list[tuple[_Job, StorageError | None]]) -> None:
    """Resolve the futures: one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, StorageError | None]]] = {}
    for answer in answers:
        by_loop.setdefault(answer[0].loop, []).append(answer)
    for loop, theirs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, theirs)
        except RuntimeError:
            # The loop is closed: the coroutines that waited went with it. The records are stored.
            continue


def _resolve(answers: list[tuple[_Job, StorageError | None]]) -> None:
    for job, error in answers:
        if job.future.done():
            continue
        if error is None:
            job.future.set_result(frozenset(job.present))
        else:
            job.future.set_exception(error)
