"""L2 in PostgreSQL: the store of any number of processes on any number of machines.

Promises what `DiskStore` does, and:
- `commit` returns when the server has answered, and asks it once: one statement stores a whole turn or nothing. What
  became of a commit whose connection was cut is found out: it is made once more, which changes nothing that is there.
  Heads have the time at which their writer last read as a version: what a server performs late, when its sender has
  long been gone, replaces nothing newer.
- `get` asks once; of a record it brings what was stored before it in the same conversation, as far as this process
  has not read it, so that a conversation that was never met here is read in a few round trips.
- A synchronous `get` never holds the event loop: below a `suspendable` it lets it go on (suspend.py), in a thread the
  thread waits. (Elsewhere on an event loop it blocks it, for a round trip; `blocked` counts that.)
- No lock is waited for on the request path, but for that of a row that another process is just writing. An erasure
  and the commits that began before it exclude each other by the one row of `llm_pager_store`.
- Tables are made and migrated by whoever is first, in one transaction; the others wait for it. Those of another
  version are refused, never read as empty.
- A server that is away for a moment is waited for, `AGAIN_S` at most; after that everything fails at once, and once a
  second somebody tries. When it is back, all that is known of it is asked anew: it may be an older copy. What began
  while it could not be read is not stored: it would go on from what it did not see.

A key's row is found by `tenant` (bytes 1..12 of the key, keys.py: scope and person), `path` (the next 6: the
conversation) and `key` (its letter and the rest), which keep the keys' order under each letter; str keys stand under no
tenant. What a conversation has one or few of is found by its letter, too: who lists conversations reads no turns. The
tables are partitioned by a hash of tenant and path, so no index grows with all of them and a partition is vacuumed, moved
or rewritten by itself. The statements are plain SQL as Citus, YugabyteDB and CockroachDB have it, too
(docs/postgresql.md says what of that was tried).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import asyncpg
from asyncpg import exceptions as pg
from cachetools import LRUCache

from proxy.errors import ErasedMeanwhile, StorageError
from proxy.keys import KINDS
from proxy.storage import suspend
from proxy.storage.l2 import JOIN_KEEP, JOIN_VALUE_BYTES, RETRY_S, after_all
from proxy.storage.sqlite import (
    ERASED,
    FORMAT,
    LOST_SUM,
    SECRET_BYTES,
    Damaged,
    Damages,
    Key,
    Repaired,
    checksum,
    packed,
    unpacked,
)

PARTITIONS = 16
SCHEMA = 1  # of the tables; FORMAT is what stands in them
AGAIN_S = 1.0  # how long a server that is away is waited for, before requests go on without memory
VALUE_LIMIT_BYTES = 256 << 20  # a message of the protocol has 1 GB at most, and a commit several values
_PAUSE_S = 0.02  # between two tries, doubled with each
_RELEASE_S = 2.0  # that a connection may take to be given back, or closed
_LOOK_S = 0.5  # what other processes erased is known so soon
_CONNECT_S = 5.0
_BESIDE_CONNECTIONS = 2  # of the loop for who has none
_AHEAD = (b"n", b"t")  # records and blocks (keys.py): what is read ahead, and what it is read ahead for
_AHEAD_ROWS, _AHEAD_BYTES = 256, 1 << 20
_KEPT_BYTES = 32 << 20  # of what was read ahead, until it is asked for
_PATHS = 65_536  # of which it is known how far they were read
_LAST_ADDS = 16  # that a server which comes back is asked for: it may be an older copy
_MEMBERS = 1024  # of a set that are read: it is pruned long before
_PRUNED = 1 / 16  # of the commits, in which sets are cut to their newest members: readers leave out the others
_DAMAGED_KEYS = 10_000
_PATIENT_S = 600.0  # what is done beside the requests, and may go through all tables
_BYTES_PER_S = 4 << 20  # that a commit is given time for
_UNHURRIED = f"SET LOCAL statement_timeout = {_PATIENT_S * 1000:.0f}"
_MANY = tuple(b"%c" % letter for letter in b"eilnpqtv")  # kinds (keys.py) of which a conversation has many
_PROBE = "probe"
_LOCK = 0x6C6C6D70  # "llmp", of the advisory lock


def _literal(letter: bytes) -> str:
    return f"'\\x{letter.hex()}'"


_LETTER_OF = "substr(key, 1, 1)"
_FEW = f"{_LETTER_OF} NOT IN ({', '.join(map(_literal, _MANY))})"  # is known of a statement that names its letter
_TABLES = """
CREATE TABLE llm_pager_store (
    id int PRIMARY KEY CHECK (id = 1), schema int NOT NULL, format int NOT NULL, secret bytea NOT NULL,
    erased bigint NOT NULL
);
CREATE TABLE llm_pager_values (
    tenant bytea NOT NULL, path bytea NOT NULL, key bytea NOT NULL, sum bigint NOT NULL, value bytea NOT NULL,
    stored bigint, version bigint NOT NULL DEFAULT 0, PRIMARY KEY (tenant, path, key)
) PARTITION BY HASH (tenant, path);
CREATE TABLE llm_pager_members (
    tenant bytea NOT NULL, path bytea NOT NULL, key bytea NOT NULL, member bytea NOT NULL, sum bigint NOT NULL,
    added bigint NOT NULL, PRIMARY KEY (tenant, path, key, member)
) PARTITION BY HASH (tenant, path);
CREATE INDEX llm_pager_ahead ON llm_pager_values (tenant, path, stored) WHERE stored IS NOT NULL;
""" + "".join(
    f"CREATE INDEX llm_pager_listed_{name} ON llm_pager_{name} (({_LETTER_OF}), tenant, path, key) WHERE {_FEW};"
    for name in ("values", "members")
) + "".join(
    f"CREATE TABLE llm_pager_{name}_{n:02} PARTITION OF llm_pager_{name}"
    f" FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {n});"
    for name in ("values", "members") for n in range(PARTITIONS)
) + "".join(  # zstd has been there
    f"ALTER TABLE llm_pager_values_{n:02} ALTER COLUMN value SET STORAGE EXTERNAL;" for n in range(PARTITIONS)
)  # fmt: skip
_MAKE = "INSERT INTO llm_pager_store VALUES (1, $1, $2, $3, 0) ON CONFLICT (id) DO NOTHING"
_OPEN = "SELECT schema, format, secret, erased, to_regclass('llm_pager_listed_values') FROM llm_pager_store WHERE id = 1"
_ADOPT = "UPDATE llm_pager_store SET secret = $1 WHERE id = 1"
_SIZE = "SELECT coalesce(sum(pg_column_size(value) + 120), 0) FROM llm_pager_values"  # with its place in the index
_THERE = """
SELECT count(*) FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS w (tenant, path, key)
JOIN llm_pager_values v ON v.tenant = w.tenant AND v.path = w.path AND v.key = w.key"""

_NOW_US = "(extract(epoch FROM now()) * 1000000)::bigint"  # of the transaction
_CLOCK_US = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"

# Rows: what it is (_VALUE ...), the key, the checksum, the value, when it was stored.
_VALUE, _MEMBER, _READ_AHEAD, _STORE = range(4)
# (LATERAL with a limit: an index is asked for each key, whatever is known of the tables' sizes.)
_READ = f"""
WITH w AS MATERIALIZED (SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS w (tenant, path, key))
SELECT {_VALUE} AS what, v.* FROM w CROSS JOIN LATERAL (
    SELECT tenant, path, key, sum, value, stored FROM llm_pager_values v
    WHERE v.tenant = w.tenant AND v.path = w.path AND v.key = w.key LIMIT 1) v
UNION ALL SELECT {_MEMBER}, m.* FROM w CROSS JOIN LATERAL (
    SELECT tenant, path, key, sum, member, added FROM llm_pager_members m
    WHERE m.tenant = w.tenant AND m.path = w.path AND m.key = w.key LIMIT {_MEMBERS}) m
UNION ALL SELECT {_STORE}, secret, '', '', erased, '', {_CLOCK_US} FROM llm_pager_store"""
# `since`: how far the path was read; what was stored later, or all that was, where this record was read before
_READ_MORE = _READ + f"""
UNION ALL SELECT {_READ_AHEAD}, a.tenant, a.path, a.key, a.sum, a.value, a.stored
    FROM unnest($4::bytea[], $5::bytea[], $6::bytea[], $7::bigint[]) AS r (tenant, path, key, since)
    CROSS JOIN LATERAL (
        SELECT stored FROM llm_pager_values v
        WHERE v.tenant = r.tenant AND v.path = r.path AND v.key = r.key AND v.stored IS NOT NULL LIMIT 1
    ) v CROSS JOIN LATERAL (
        SELECT * FROM (
            SELECT n.*, sum(octet_length(n.value)) OVER (ORDER BY n.stored DESC, n.key) AS bytes FROM (
                SELECT * FROM llm_pager_values b WHERE b.tenant = r.tenant AND b.path = r.path AND b.stored <= v.stored
                    AND (b.stored > r.since OR v.stored <= r.since) AND b.key <> r.key
                ORDER BY b.stored DESC LIMIT {_AHEAD_ROWS}
            ) n
        ) s WHERE s.bytes <= {_AHEAD_BYTES}
    ) a"""  # fmt: skip

_PUT, _ADD, _JOIN = range(3)
# $1 the secret and $2 the erasures that it is for; $3 whether it is said again: what is there may be our own;
# then of each row what it is, its key, checksum and value, and whether it is read ahead; $11 when what is put was last
# read, by the server's clock: a commit whose sender is gone may be performed late, and replaces nothing that is newer.
_COMMIT = f"""
WITH store AS MATERIALIZED (
    SELECT secret, erased, ($1::bytea IS NULL OR secret = $1) AND ($2::bigint IS NULL OR erased = $2) AS may
    FROM llm_pager_store WHERE id = 1 FOR SHARE
), rows AS MATERIALIZED (
    SELECT r.*, {_NOW_US} AS now_us
    FROM unnest($4::int[], $5::bytea[], $6::bytea[], $7::bytea[], $8::bigint[], $9::bytea[], $10::boolean[])
        WITH ORDINALITY AS r (what, tenant, path, key, sum, value, ahead, number), store WHERE store.may
), put AS (
    INSERT INTO llm_pager_values AS v (tenant, path, key, sum, value, stored, version)
    SELECT tenant, path, key, sum, value, CASE WHEN ahead THEN now_us END, coalesce($11::bigint, now_us)
    FROM rows WHERE what = {_PUT} ORDER BY tenant, path, key
    ON CONFLICT (tenant, path, key) DO UPDATE SET sum = excluded.sum, value = excluded.value, version = excluded.version
    WHERE v.version <= excluded.version
        AND (excluded.stored IS NULL OR v.sum <> excluded.sum OR v.value <> excluded.value)
), added AS (
    INSERT INTO llm_pager_values AS v (tenant, path, key, sum, value, stored)
    SELECT tenant, path, key, sum, value, CASE WHEN ahead THEN now_us END FROM rows WHERE what = {_ADD}
    ORDER BY tenant, path, key
    ON CONFLICT (tenant, path, key) DO UPDATE SET sum = excluded.sum, value = excluded.value
    WHERE v.sum = {LOST_SUM} OR ($3 AND v.sum = excluded.sum AND v.value = excluded.value)
    RETURNING v.tenant, v.path, v.key
), joined AS (
    INSERT INTO llm_pager_members (tenant, path, key, member, sum, added)
    SELECT tenant, path, key, value, sum, now_us + number FROM rows WHERE what = {_JOIN}
    ORDER BY tenant, path, key, value
    ON CONFLICT (tenant, path, key, member) DO NOTHING
)
SELECT secret, erased, may, {_NOW_US} AS now_us, added.tenant, added.path, added.key {{more}}
FROM store LEFT JOIN added ON true"""
_LOCK_ROWS = """
SELECT v.tenant, v.path, v.key, v.sum, v.value FROM llm_pager_values v
JOIN unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS w (tenant, path, key)
    ON v.tenant = w.tenant AND v.path = w.path AND v.key = w.key ORDER BY v.tenant, v.path, v.key FOR UPDATE OF v"""
_SWAP = """
UPDATE llm_pager_values v SET sum = w.sum, value = w.value
FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::bigint[], $5::bytea[]) AS w (tenant, path, key, sum, value)
WHERE v.tenant = w.tenant AND v.path = w.path AND v.key = w.key"""
_PRUNE = f"""
DELETE FROM llm_pager_members d USING (
    SELECT *, row_number() OVER (PARTITION BY tenant, path, key ORDER BY added DESC, member DESC) AS place
    FROM llm_pager_members m WHERE m.tenant = $1 AND m.path = $2 AND m.key = $3
) o WHERE o.place > {JOIN_KEEP} AND d.tenant = $1 AND d.path = $2 AND d.key = $3 AND d.member = o.member"""
_LEAVE = "DELETE FROM llm_pager_members WHERE tenant = $1 AND path = $2 AND key = $3 AND member >= $4 AND member < $5"
_ERASE = "UPDATE llm_pager_store SET erased = erased + 1 WHERE id = 1 RETURNING erased"
# The table, not its row: who waits for it is next, however many share it by then.
_HOLD = "LOCK TABLE llm_pager_store IN EXCLUSIVE MODE"
_HELD = "SELECT erased FROM llm_pager_store WHERE id = 1"
_NEXT_LETTER = " UNION ALL ".join(
    f"(SELECT {_LETTER_OF} FROM llm_pager_{name} WHERE {_FEW} AND {_LETTER_OF} > $1 ORDER BY {_LETTER_OF} LIMIT 1)"
    for name in ("values", "members")
)
_SCAN_VALUES = "SELECT tenant, path, key, sum, value FROM llm_pager_values WHERE %s ORDER BY tenant, path, key LIMIT %d"
_SCAN_SETS = (
    "SELECT tenant, path, key, array_agg(member ORDER BY added, member) AS members,"
    " array_agg(sum ORDER BY added, member) AS sums FROM llm_pager_members WHERE %s"
    " GROUP BY tenant, path, key ORDER BY tenant, path, key LIMIT %d"
)
_DROP = ("DELETE FROM llm_pager_values WHERE %s", "DELETE FROM llm_pager_members WHERE %s")
_MARK_LOST = f"""
INSERT INTO llm_pager_values (tenant, path, key, sum, value)
SELECT tenant, path, key, {LOST_SUM}, '' FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS w (tenant, path, key)
ON CONFLICT (tenant, path, key) DO UPDATE SET sum = excluded.sum, value = excluded.value WHERE $4"""

_Columns = tuple[bytes, bytes, bytes]
_LETTER, _TENANT, _PATH = 1, 13, 19  # where they end in a key
_OWN = b"\0"  # the path of str keys, which have no tenant
_HERE_BYTES = 65_536  # of a commit that the event loop packs itself

# A server that is away, or is not what it was: it is asked again for a while.
_PASSING = (
    OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, pg.PostgresConnectionError, pg.AdminShutdownError, pg.CrashShutdownError,
    pg.CannotConnectNowError, pg.TooManyConnectionsError, pg.ReadOnlySQLTransactionError, pg.DeadlockDetectedError,
    pg.SerializationError, pg.QueryCanceledError, pg.IdleInTransactionSessionTimeoutError,
)  # fmt: skip
_NOT_PREPARED = (pg.InvalidSQLStatementNameError, pg.DuplicatePreparedStatementError, pg.InvalidCachedStatementError)
_WRONG = (  # somebody has to change something
    pg.InvalidAuthorizationSpecificationError, pg.InvalidCatalogNameError, pg.InsufficientPrivilegeError,
    pg.UndefinedObjectError, asyncpg.ClientConfigurationError,
)  # fmt: skip

log = logging.getLogger(__name__)
_T = TypeVar("_T")


_UNPREPARED = (
    "A pooler in front of %s does not keep prepared statements (%s): each takes another round trip. PgBouncer keeps them"
    " from 1.21 on, with max_prepared_statements."
)
_UNSET = (
    "A pooler in front of %s refuses settings (%s), so it is not known whether it keeps prepared statements: none is made,"
    " and each statement takes another round trip. Let it ignore plan_cache_mode and statement_timeout"
    " (ignore_startup_parameters), and set both for the role."
)


_UNLISTED = (
    "The tables in %s were made without the index that lists are read by: the list of conversations reads all turns."
    " docs/postgresql.md has the two statements that make it."
)


class _Connection(asyncpg.Connection):
    """Statements have names that no other connection's have: a pooler may hand a server's connection from one to
    the other, and a name of theirs must never stand for another statement here."""

    def _get_unique_id(self, prefix: str) -> str:
        return f"{prefix}_{uuid.uuid4().hex}"

    def get_reset_query(self) -> str:
        return ""  # nothing of a session's is ever set: giving a connection back costs no round trip


def _renaming(prefix: str) -> type[_Connection]:
    """Connections to a store of other tables in the same database."""

    class Renaming(_Connection):
        pass

    def renamed(method: Any) -> Any:
        def call(self: Any, query: str, *arguments: Any, **more: Any) -> Any:
            return method(self, query.replace("llm_pager_", prefix), *arguments, **more)

        return call

    for name in ("execute", "fetch", "fetchrow", "fetchval"):
        setattr(Renaming, name, renamed(getattr(_Connection, name)))
    return Renaming


class _Refused(StorageError):
    """Not by trouble: it is another store than was meant."""


class _Erased(_Refused, ErasedMeanwhile):
    """Likewise: a part of it is not there any more."""


class _Row(NamedTuple):
    """For `_COMMIT`."""

    what: int
    columns: _Columns
    sum: int
    value: bytes
    ahead: bool


class _Kept(NamedTuple):
    """What was read ahead, as it is stored."""

    sum: int
    stored: bytes


class PostgresStore:
    """As `DiskStore`. `url`: postgresql://user:password@host/database; `where` names it without its password.

    `connections`: of this process, at most; `timeout_s`: of one statement, and of the wait for a connection.
    `prepared`: whether statements are prepared; it is noticed when a pooler does not allow it.
    `tables`: what the names of its tables begin with. `synchronous_commit`: what to ask the server for in each commit (its own name); None: what it does by itself.
    """

    suspends = True
    repaired: Repaired | None = None

    def __init__(
        self, url: str, *, connections: int = 10, timeout_s: float = 5.0, prepared: bool = True,
        synchronous_commit: str | None = None, tables: str = "llm_pager",
    ) -> None:  # fmt: skip
        self._url = url
        self._connection = _Connection if tables == "llm_pager" else _renaming(f"{tables}_")
        self._connections, self._timeout_s, self._prepared = connections, timeout_s, prepared
        durable = f", set_config('synchronous_commit', '{synchronous_commit}', true)" if synchronous_commit else ""
        self._commit = _COMMIT.replace("{more}", durable)  # of the transaction that the statement is
        self.where = _without_password(url)
        self.damaged = Damages()
        self.generation = self.losses = self.erased = self.blocked = 0
        self._secret: bytes | None = None
        self._trouble: str | None = None
        self._trouble_s = self._retry_s = 0.0  # since when; when it is tried again
        self._turned_away = 0
        self._proved_s = self._looked_s = float("-inf")
        self._verified = self._closed = False
        self._busy: set[object] = set()  # works on their way
        # Plans are the same whatever a statement asks for, and are made once; what the client gave up ends by itself.
        self._settings = {
            "plan_cache_mode": "force_generic_plan",
            "statement_timeout": f"{timeout_s * 1000:.0f}",
        }  # fmt: skip
        self._pools: dict[asyncio.AbstractEventLoop, asyncio.Future[asyncpg.Pool[Any]]] = {}
        self._home: asyncio.AbstractEventLoop | None = None  # the requests'
        self._beside: asyncio.AbstractEventLoop | None = None  # for who has none
        self._lock = threading.Lock()  # of the little below; nothing waits under it
        self._kept: LRUCache[Key, _Kept] = LRUCache(_KEPT_BYTES, lambda kept: len(kept.stored))
        self._read: LRUCache[tuple[bytes, bytes], int] = LRUCache(_PATHS)  # how far each path was read
        self._last_adds: deque[_Columns] = deque(maxlen=_LAST_ADDS)
        self._bad: set[Key] = set()  # met damaged: who has them stores them again
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            self._now(self._fetch([]))
        except StorageError as error:
            if isinstance(error, _Refused) or isinstance(error.__cause__, _WRONG):
                self._stop_beside()
                raise
        self.blocked = 0

    # -- reading

    def get(self, key: Key) -> bytes | None:
        """The value last committed under `key`, or, once in a request, what `ahead` found. From any thread."""
        self._require_open()
        scope = suspend.scope()
        if scope is not None and key in scope.found:
            found = scope.found[key]
        elif (kept := self._taken(key)) is not None:
            found = self._value(key, kept.sum, kept.stored)
        else:
            try:
                found = self._now(self._fetch([key]))[key]
            except StorageError:
                if scope is not None:
                    scope.failed = True
                raise
        if isinstance(found, Damaged):
            raise self._met_damage(key, found)
        value: bytes | None = found
        return value

    def ahead(self, keys: Iterable[Key], alone: bool = False) -> None:
        """This request is going to `get` these, which are asked for now, at once. What cannot be is noted. `alone`: without
        what stands before a record, which a turn reads and a list does not."""
        scope = suspend.scope()
        if scope is None:
            return
        try:
            scope.found.update(self._now(self._fetch([key for key in keys if key not in self._kept], alone)))
        except StorageError:
            scope.failed = True

    def scan(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, bytes]]:
        """As DiskStore's. Sets are their newest members."""
        found: list[tuple[bytes, bytes]] = []
        for key, number, stored in self.rows(prefix, after, limit):
            value = stored if number is None else self._value(key, number, stored)
            if isinstance(value, bytes):
                found.append((key, value))
        return found

    def rows(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, int | None, bytes]]:
        """As `scan`, as it is stored: the key, the checksum and the packed value of each; None and the members of a
        set, or LOST_SUM where one of them is damaged."""
        self._require_open()
        return self._now(self._rows(prefix, after, limit))

    async def _rows(self, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, int | None, bytes]]:
        if not prefix:  # letter by letter: their order is that of the keys within one
            found: list[tuple[bytes, int | None, bytes]] = []
            letter: bytes | None = after[:_LETTER] or await self._next_letter(b"")
            while letter is not None:
                found += await self._rows(letter, after, limit - len(found))
                letter = await self._next_letter(letter) if len(found) < limit else None
            return found
        if after > prefix and not after.startswith(prefix):
            return []  # it comes after all of these
        where, values = _within(prefix, after)

        async def read(connection: Any, again: bool) -> list[list[Any]]:
            return [await connection.fetch(sql % (where, limit), *values) for sql in (_SCAN_VALUES, _SCAN_SETS)]

        rows, sets = await self._patiently(read)
        by_key: dict[bytes, tuple[int | None, bytes]] = {}
        for tenant, path, rest, number, stored in rows:
            by_key[_key(tenant, path, rest)] = number, stored
        for tenant, path, rest, members, sums in sets:
            key = _key(tenant, path, rest)
            before = self._value(key, *by_key[key]) if key in by_key else None  # type: ignore[arg-type]
            value = _set(key, list(zip(range(len(members)), members, sums, strict=True)), before)
            by_key[key] = (None, value) if isinstance(value, bytes) else (LOST_SUM, b"")
        return [(key, *by_key[key]) for key in sorted(by_key)[:limit]]

    async def _next_letter(self, letter: bytes) -> bytes | None:
        """The next one that keys may begin with."""
        few = await self._patiently(lambda connection, again: connection.fetch(_NEXT_LETTER, letter))
        return min([*(row[0] for row in few), *(many for many in _MANY if many > letter)], default=None)

    def size_bytes(self) -> int:
        """Of all values, as they are stored, with what a row takes beside. From any thread; reads no value."""
        self._require_open()
        rows = self._now(self._patiently(lambda connection, again: connection.fetch(_SIZE)))
        return int(rows[0][0])

    def look(self) -> None:
        """Learn of other processes' erasures: they change `erased`. Each read tells of them, too."""
        if time.monotonic() - self._looked_s > _LOOK_S:
            with suppress(StorageError):
                self._now(self._fetch([]))

    def secret(self) -> bytes:
        self._require_open()
        return self._secret if self._secret is not None else os.urandom(SECRET_BYTES)

    async def adopt(self, secret: bytes) -> None:
        """As DiskStore's."""
        await self._perform(lambda connection, again: connection.execute(_ADOPT, secret))
        self._secret = secret

    async def _fetch(self, keys: Sequence[Key], alone: bool = False) -> dict[Key, bytes | Damaged | None]:
        """What stands under the keys, in one round trip; what was read ahead beside it, unless `alone`, is kept."""
        columns = [_columns(key) for key in keys]
        arguments: list[Any] = [list(part) for part in zip(*columns, strict=True)] or [[], [], []]
        more = [] if alone else [c for key, c in zip(keys, columns, strict=True) if key[:1] in _AHEAD]
        statement = _READ
        if more:
            statement = _READ_MORE
            since = [self._read.get(c[:2], -1) for c in more]
            arguments += [*(list(part) for part in zip(*more, strict=True)), since]

        async def read(connection: Any, again: bool) -> list[Any]:
            found: list[Any] = await connection.fetch(statement, *arguments)
            return found

        found: dict[Key, bytes | Damaged | None] = dict.fromkeys(keys)
        members: dict[Key, list[tuple[int, bytes, int]]] = {}
        by_columns = dict(zip(columns, keys, strict=True))
        for what, tenant, path, rest, number, value, stored in await self._perform(read):
            if what == _STORE:
                self.erased, self._looked_s = self._learned(number), time.monotonic()
                if (scope := suspend.scope()) is not None:
                    scope.read_us = stored
                found.update({ERASED: number.to_bytes(8, "big")} if ERASED in found else {})
            elif what == _READ_AHEAD:
                self._keep(_key(tenant, path, rest), number, value)
            elif what == _MEMBER:
                members.setdefault(by_columns[tenant, path, rest], []).append((stored, value, number))
            else:
                key = by_columns[tenant, path, rest]
                found[key] = self._value(key, number, value)
                if more and stored is not None and key[:1] in _AHEAD:
                    with self._lock:
                        self._read[tenant, path] = max(stored, self._read.get((tenant, path), -1))
        for key, rows in members.items():
            found[key] = _set(key, rows, found[key])
        return found

    def _value(self, key: Key, number: int, stored: bytes) -> bytes | Damaged:
        try:
            if number == LOST_SUM or checksum(key, stored) != number:
                raise Damaged("a value is not what was stored")
            return unpacked(stored)
        except Damaged as error:
            return error

    def _met_damage(self, key: Key, error: Damaged) -> Damaged:
        kind = KINDS.get(key[:1], "value") if isinstance(key, bytes) else key
        if len(self._bad) < _DAMAGED_KEYS:
            self._bad.add(key)
        return self.damaged.met(kind, f"A {kind} in {self.where} is damaged: {error}; llm-pager check --storage finds all damage.")

    def _keep(self, key: bytes, number: int, stored: bytes) -> None:
        with self._lock, suppress(ValueError):  # larger than all that is kept
            self._kept[key] = _Kept(number, stored)

    def _taken(self, key: Key) -> _Kept | None:
        """L1 has it from here on."""
        with self._lock:
            kept: _Kept | None = self._kept.pop(key, None)
        return kept

    def _learned(self, erased: int) -> int:
        if erased != self.erased:
            self._forget()
        return erased

    def _forget(self) -> None:
        with self._lock:
            self._kept.clear()
            self._read.clear()

    # -- writing

    async def commit(
        self, puts: Sequence[tuple[Key, bytes]], joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (), secret: bytes | None = None, erased: int | None = None,
        drops: Sequence[bytes] = (), leaves: Sequence[tuple[bytes, bytes]] = (), erases: bool = False,
    ) -> frozenset[bytes]:  # fmt: skip
        """As DiskStore's. One round trip, but with drops, leaves, or what stands twice in it."""
        for _, value in joins:
            if len(value) != JOIN_VALUE_BYTES:
                raise ValueError(f"a joined value is {JOIN_VALUE_BYTES} bytes, not {len(value)}")
        for _, value in (*puts, *adds):
            if len(value) > VALUE_LIMIT_BYTES:
                raise StorageError(f"A value of {len(value)} bytes is too large to be stored.")
        self._require_open()
        if (scope := suspend.scope()) is not None and scope.failed:
            raise StorageError(f"{self.where} could not be read when this began: it is not stored.")
        read_us = scope.read_us if scope is not None else None
        wanted = _Commit(dict(puts), dict.fromkeys(joins), dict(reversed(adds)), secret, erased, drops, leaves, erases, read_us)
        if not wanted:
            return frozenset()
        bad = self._bad.intersection([*wanted.puts, *wanted.adds, *(key for key, _ in joins)]) if self._bad else ()
        for key in bad:  # what stands there is replaced
            if isinstance(key, bytes) and key in wanted.adds:
                wanted.puts[key] = wanted.adds.pop(key)
        large = sum(len(value) for _, value in (*puts, *adds)) > _HERE_BYTES
        rows = await asyncio.to_thread(wanted.rows) if large else wanted.rows()
        more_s = _PATIENT_S if drops or erases else sum(len(row.value) for row in rows) / _BYTES_PER_S
        added = await self._perform(partial(self._store, wanted, rows, [key for key, _ in joins if key in bad]), more_s)
        self._bad.difference_update(bad)
        self._proved_s = time.monotonic()
        if drops or erases:
            self._forget()
            self._last_adds.clear()
        self._last_adds.extend(_columns(key) for key in [*wanted.adds][-_LAST_ADDS:])
        if joins and random.random() < _PRUNED:
            self._start(self._prune([_columns(key) for key, _ in joins]))
        return frozenset(wanted.adds).difference(added)

    async def _store(
        self, wanted: _Commit, rows: Sequence[_Row], replaced: Sequence[bytes], connection: Any, again: bool
    ) -> set[bytes]:
        """The keys of adds that are new. Raises StorageError where the store is another, or something was erased."""
        both = wanted.adds.keys() & wanted.puts.keys()
        if not (wanted.drops or wanted.leaves or wanted.erases or replaced or both):
            return self._answered(wanted, await connection.fetch(self._commit, wanted.secret, wanted.erased, again, *_by_column(rows), wanted.read_us))
        async with connection.transaction():
            erased = wanted.erased
            if wanted.drops or wanted.erases:
                await connection.execute(_UNHURRIED)
                await connection.execute(_HOLD)
                if again and wanted.erases and erased is not None and await connection.fetchval(_HELD) == erased + 1:
                    erased += 1  # it was ours
            for prefix in wanted.drops:
                for statement in _DROP:
                    where, values = _within(prefix)
                    await connection.execute(statement % where, *values)
            for key, part in (*wanted.leaves, *((key, b"") for key in replaced)):
                await connection.execute(_LEAVE, *_columns(key), part, after_all(part))
            first = [row for row in rows if row.what != _PUT or not both]
            answer = await connection.fetch(self._commit, wanted.secret, erased, again, *_by_column(first), wanted.read_us)
            added = self._answered(wanted, answer)  # rolls back where it may not be
            if both:
                rest = [row for row in rows if row.what == _PUT]
                await connection.fetch(self._commit, None, None, again, *_by_column(rest), wanted.read_us)
            if wanted.erases:
                self.erased = await connection.fetchval(_ERASE)
            return added

    def _answered(self, wanted: _Commit, answer: Sequence[Any]) -> set[bytes]:
        if not answer:
            raise pg.UndefinedTableError("its row is gone")
        secret, erased, may, now_us = answer[0][:4]
        if not may:
            if wanted.secret not in (None, secret):
                raise _Refused(f"The storage in {self.where} was replaced meanwhile.")
            self.erased = self._learned(erased)
            raise _Erased("Something was erased meanwhile: what began before it is not stored.")
        with self._lock:
            for key in wanted.adds:
                if key[:1] in _AHEAD:
                    self._read[_columns(key)[:2]] = now_us
        return {_key(*row[4:7]) for row in answer if row[4] is not None}

    async def _prune(self, sets: Sequence[_Columns]) -> None:
        async def prune(connection: Any, again: bool) -> None:
            for columns in sets:
                await connection.execute(_PRUNE, *columns)

        with suppress(StorageError):
            await self._perform(prune)

    async def mark_lost(self, damaged: Sequence[bytes], missing: Sequence[bytes]) -> None:
        """Make these keys' values lost ones: who has them stores them again. What is missing may have come meanwhile."""
        for keys, replace in ((damaged, True), (missing, False)):
            columns = [list(part) for part in zip(*map(_columns, keys), strict=True)]
            if columns:
                await self._patiently(partial(_mark, [*columns, replace]))

    async def swap(self, rows: Sequence[tuple[bytes, bytes, bytes]]) -> frozenset[bytes]:
        """As DiskStore's."""
        news = {_columns(key): (key, old, new) for key, old, new in rows}
        columns = [list(part) for part in zip(*news, strict=True)]

        async def swap(connection: Any, again: bool) -> frozenset[bytes]:
            async with connection.transaction():
                swapped = []
                for tenant, path, rest, number, stored in await connection.fetch(_LOCK_ROWS, *columns):
                    key, old, new = news[tenant, path, rest]
                    found = self._value(key, number, stored)
                    if found == old or (again and found == new):
                        swapped.append(_row(_PUT, key, packed(new)))
                swapped_columns = _by_column(swapped)[1:6]  # a head's version stays: a turn may be on its way with a newer one
                await connection.execute(_SWAP, *swapped_columns)
                return frozenset(_key(*row.columns) for row in swapped)

        return await self._perform(swap) if rows else frozenset()

    async def scrub(self) -> None:
        """The rows that were dropped or replaced before are removed from the tables. On a connection of its own, since
        it takes its time. Raises StorageError."""
        try:
            connection = await asyncpg.connect(self._url, timeout=_CONNECT_S, statement_cache_size=0, connection_class=self._connection)
            try:
                await connection.execute("VACUUM llm_pager_values, llm_pager_members")
            finally:
                await connection.close(timeout=_RELEASE_S)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
            raise StorageError(f"The tables in {self.where} cannot be vacuumed: {_said(error)}.") from error

    async def check(self, proved_s: float = 0.0) -> None:
        """As DiskStore's."""
        self._require_open()
        now_s = time.monotonic()
        if self._trouble is not None and now_s < self._retry_s and proved_s:
            raise StorageError(self._trouble)
        if self._trouble is None and now_s - self._proved_s < proved_s:
            return
        self._retry_s = 0.0
        row = _Row(_PUT, _columns(_PROBE), 0, os.urandom(8), False)
        await self._perform(lambda connection, again: connection.fetch(self._commit, None, None, again, *_by_column([row]), None))
        self._proved_s = time.monotonic()

    @property
    def trouble(self) -> str | None:
        """Why it cannot be used, as far as is known."""
        return self._trouble

    async def close(self) -> None:
        """Finish what is on its way, then let the server go. Safe to call twice."""
        self._closed, until_s = True, time.monotonic() + self._timeout_s
        while self._busy and time.monotonic() < until_s:
            await asyncio.sleep(_PAUSE_S)
        pools, self._pools = self._pools, {}
        for loop, opening in pools.items():
            if loop is asyncio.get_running_loop():
                await _closed(opening)
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_closed(opening), loop))
        self._stop_beside()

    # -- the server

    async def _patiently(self, work: Callable[[Any, bool], Awaitable[_T]]) -> _T:
        """The same beside the requests: it may take its time, and what it fails by troubles nobody else."""

        async def unhurried(connection: Any, again: bool) -> _T:
            async with connection.transaction():
                await connection.execute(_UNHURRIED)
                return await work(connection, again)

        try:
            return await self._performed(unhurried, False, _PATIENT_S)
        except (*_PASSING, asyncpg.PostgresError) as error:
            raise StorageError(f"Cannot read from {self.where}: {_said(error)}.") from error

    async def _perform(self, work: Callable[[Any, bool], Awaitable[_T]], more_s: float = 0.0) -> _T:
        """What `work(connection, again)` returns; it is called once more, with True, when nobody knows what became of
        it: so it may be done twice. `more_s`: than a statement usually has. Raises StorageError."""
        now_s = time.monotonic()
        if self._trouble is not None:
            if now_s < self._retry_s:
                self._turned_away += 1
                raise StorageError(self._trouble)
            self._retry_s = now_s + RETRY_S  # the others do not wait for this one
        until_s: float | None = None  # from the first failure on: that may have taken its time
        pause_s, again, tables = _PAUSE_S, False, False
        while True:
            prepared = self._prepared
            self._busy.add(work)
            try:
                done = await self._performed(work, again, more_s)
            except (StorageError, asyncio.CancelledError):
                raise
            except _NOT_PREPARED as error:
                if not prepared:
                    raise self._failed(error) from error
                if self._prepared:
                    log.warning(_UNPREPARED, self.where, _said(error))
                    self._reconnect(self._settings)
            except (pg.UndefinedTableError, pg.UndefinedColumnError) as error:
                self._verified = False
                if tables:
                    raise self._failed(error) from error
                tables = True
            except _PASSING as error:
                if "startup parameter" in str(error):
                    if self._settings:
                        log.warning(_UNSET, self.where, _said(error))
                        self._reconnect({})
                    continue
                again, failed_s = True, time.monotonic()
                if self._trouble is not None or (until_s is not None and failed_s + pause_s > until_s):
                    raise self._failed(error) from error
                until_s = until_s or failed_s + AGAIN_S
                await asyncio.sleep(pause_s)
                pause_s *= 2
            except asyncpg.PostgresError as error:
                raise self._failed(error) from error
            else:
                if self._trouble is not None:
                    self._recovered()
                return done
            finally:
                self._busy.discard(work)

    async def _performed(self, work: Callable[[Any, bool], Awaitable[_T]], again: bool, more_s: float) -> _T:
        loop = asyncio.get_running_loop()
        if loop is not self._beside and (self._home is None or self._home.is_closed()):
            self._home = loop
        opening = self._pools.get(loop)
        if opening is None:
            opening = self._pools[loop] = asyncio.ensure_future(self._open_pool(loop))
        pool = await asyncio.shield(opening)
        async with asyncio.timeout(self._timeout_s):
            connection = await pool.acquire()
        try:
            async with asyncio.timeout(self._timeout_s + more_s):
                if not self._verified:
                    await self._verify(connection)
                return await work(connection, again)
        except pg.ReadOnlySQLTransactionError:  # a standby by now: the next connection may find the server that is none
            await pool.expire_connections()
            raise
        finally:
            await pool.release(connection, timeout=_RELEASE_S)

    async def _open_pool(self, loop: asyncio.AbstractEventLoop) -> asyncpg.Pool[Any]:
        return await asyncpg.create_pool(
            self._url, min_size=0, max_size=_BESIDE_CONNECTIONS if loop is self._beside else self._connections,
            connection_class=self._connection, statement_cache_size=100 if self._prepared else 0, timeout=_CONNECT_S,
            max_cached_statement_lifetime=0, server_settings=self._settings, init=self._verify,
        )  # fmt: skip

    def _reconnect(self, settings: dict[str, str]) -> None:
        """With these, and without prepared statements; who has a connection may finish with it."""
        self._settings, self._prepared = settings, False
        pools, self._pools = self._pools, {}
        for loop, opening in pools.items():
            loop.call_soon_threadsafe(self._start, _closed(opening))

    async def _verify(self, connection: Any) -> None:
        """It has our tables, of this version, and is the store that it was: asked of each new connection."""
        try:
            row = await connection.fetchrow(_OPEN)
        except pg.UndefinedTableError:
            row = None
        if row is None:
            await self._make(connection)
            row = await connection.fetchrow(_OPEN)
        schema, form, secret, erased, listed = row
        if (schema, form) != (SCHEMA, FORMAT):
            raise _Refused(
                f"The tables in {self.where} were written by another version of llm-pager (format {form}, schema {schema}),"
                " which this one does not read; set tiers.l2.url to another database."
            )
        before = self._secret
        if listed is None and before is None:
            log.warning(_UNLISTED, self.where)
        lost = before is not None and before != secret
        if before == secret and self._last_adds and erased == self.erased:
            asked = set(self._last_adds)
            self._last_adds.clear()  # one connection asks
            columns = [list(part) for part in zip(*asked, strict=True)]
            lost = await connection.fetchval(_THERE, *columns) < len(asked)
        if before is None or lost:
            self.generation += 1
        if lost:
            self.losses += 1
            what = "an older" if before == secret else "another"
            log.error("%s holds %s storage now: what was remembered %s is gone.", self.where, what,
                      "since" if before == secret else "before")  # fmt: skip
            self._last_adds.clear()
            self._forget()
        self._secret, self.erased, self._verified = secret, self._learned(erased), True

    async def _make(self, connection: Any) -> None:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            if await connection.fetchval("SELECT to_regclass('llm_pager_store') IS NULL"):
                await connection.execute(_TABLES)
            await connection.execute(_MAKE, SCHEMA, FORMAT, os.urandom(SECRET_BYTES))

    def _failed(self, error: Exception) -> StorageError:
        now_s = time.monotonic()
        if self._trouble is None:
            self._trouble_s = now_s
        if self._trouble != (trouble := f"Cannot use {self.where}: {_said(error)}."):
            log.error("%s Requests are answered without memory until it can be used.", trouble)
        self._trouble, self._retry_s = trouble, now_s + RETRY_S
        self._turned_away += 1
        return StorageError(trouble)

    def _recovered(self) -> None:
        log.warning(
            "%s can be used again, after %.0f s; %d requests to it were turned away meanwhile.",
            self.where, time.monotonic() - self._trouble_s, self._turned_away,
        )  # fmt: skip
        self._trouble, self._turned_away = None, 0

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError("The store is closed.")

    # -- event loops

    def _now(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What it returns or raises, wherever this is called."""
        if suspend.can_wait():
            return suspend.wait(work)
        home = self._home
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            if home is not None and home.is_running():
                return asyncio.run_coroutine_threadsafe(work, home).result()
        else:
            self.blocked += 1
        return asyncio.run_coroutine_threadsafe(work, self._loop_beside()).result()

    def _loop_beside(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._beside is None:
                self._beside = asyncio.new_event_loop()
                threading.Thread(target=self._beside.run_forever, name="l2-beside", daemon=True).start()
            return self._beside

    def _stop_beside(self) -> None:
        if self._beside is not None:
            self._beside.call_soon_threadsafe(self._beside.stop)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Commit(NamedTuple):
    puts: dict[Key, bytes]
    joins: dict[tuple[bytes, bytes], None]
    adds: dict[bytes, bytes]
    secret: bytes | None
    erased: int | None
    drops: Sequence[bytes]
    leaves: Sequence[tuple[bytes, bytes]]
    erases: bool
    read_us: int | None

    def __bool__(self) -> bool:
        return any((self.puts, self.joins, self.adds, self.drops, self.leaves, self.erases))

    def rows(self) -> list[_Row]:
        rows = [_row(_PUT, key, packed(value)) for key, value in self.puts.items()]
        rows += [_row(_ADD, key, packed(value)) for key, value in self.adds.items()]
        return rows + [_row(_JOIN, key, member) for key, member in self.joins]


def _row(what: int, key: Key, stored: bytes) -> _Row:
    return _Row(what, _columns(key), checksum(key, stored), stored, key[:1] in _AHEAD)


def _by_column(rows: Sequence[_Row]) -> list[list[Any]]:
    columns = [row.columns for row in rows]
    return [
        [row.what for row in rows], *([c[i] for c in columns] for i in range(3)), [row.sum for row in rows],
        [row.value for row in rows], [row.ahead for row in rows],
    ]  # fmt: skip


def _columns(key: Key) -> _Columns:
    """Where a key's row stands."""
    if isinstance(key, str):
        return b"", _OWN, key.encode()
    return key[_LETTER:_TENANT], key[_TENANT:_PATH], key[:_LETTER] + key[_PATH:]


def _key(tenant: bytes, path: bytes, rest: bytes) -> bytes:
    return rest[:_LETTER] + tenant + path + rest[_LETTER:]


def _within(prefix: bytes, after: bytes = b"") -> tuple[str, list[bytes]]:
    """The condition for keys that begin with `prefix` (a letter at least) and come after `after`, and its values: an index
    is read from there on."""
    letter = prefix[:_LETTER]
    conditions, values = ["path <> $1", f"{_LETTER_OF} = {_literal(letter)}"], [_OWN]

    def add(condition: str, *more: bytes) -> None:
        names = [f"${len(values) + n}" for n in range(1, len(more) + 1)]
        conditions.append(condition % tuple(names))
        values.extend(more)

    names, begun = ("tenant", "path", "key"), _columns(prefix)
    whole = (len(prefix) >= _TENANT) + (len(prefix) >= _PATH)  # of these, what the prefix says to its end
    for name, value in zip(names[:whole], begun, strict=False):
        add(f"{name} = %s", value)
    add(f"{names[whole]} < %s", after_all(begun[whole]))
    if whole < len(names) - 1:
        add("key >= %s AND key < %s", letter, after_all(letter))
    if after >= prefix:  # without another lower bound, from which the index would be read instead
        left = len(names) - whole
        add(f"({', '.join(names[whole:])}) > ({', '.join(['%s'] * left)})", *_columns(after)[whole:])
    else:
        add(f"{names[whole]} >= %s", begun[whole])
    return " AND ".join(conditions), values


def _set(key: Key, rows: Sequence[tuple[int, bytes, int]], before: bytes | Damaged | None) -> bytes | Damaged:
    """The newest members of a set, oldest first; `before`: what was put there as a whole."""
    if isinstance(before, Damaged) or any(checksum(key, member) != number for _, member, number in rows):
        return Damaged("a value is not what was stored")
    step, old = JOIN_VALUE_BYTES, before or b""
    members = dict.fromkeys(old[at : at + step] for at in range(0, len(old), step))
    members.update(dict.fromkeys(member for _, member, _ in sorted(rows)))
    return b"".join([*members][-JOIN_KEEP:])


async def _mark(arguments: Sequence[Any], connection: Any, again: bool) -> None:
    await connection.execute(_MARK_LOST, *arguments)


async def _closed(opening: asyncio.Future[asyncpg.Pool[Any]]) -> None:
    with suppress(Exception):
        pool = await opening
        try:
            async with asyncio.timeout(_RELEASE_S):
                await pool.close()
        except TimeoutError:
            pool.terminate()


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"PostgreSQL's database {parts.path.lstrip('/') or parts.username!r} at {parts.hostname or 'a local socket'}"


def _said(error: BaseException) -> str:
    """An error in words, without its end."""
    unsaid = "it does not answer" if isinstance(error, TimeoutError) else type(error).__name__
    return (str(error).partition("\n")[0] or unsaid).rstrip(".")
