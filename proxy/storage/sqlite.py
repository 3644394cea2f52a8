"""L2's file: diskcache's table of values in SQLite's write-ahead log, what is known of its state, and its repair.

Promises: a value is never read as another one: each carries a checksum over itself and its key, so what was
scribbled over is `Damaged`. A damaged file gives up every row that still stands in any of its pages, whatever
became of its index, its tree or its first page; the rows go to a new file, which takes the place of the old one
whole or not at all, also after a kill in the middle; the old one stays beside it as `cache.db.damaged`. A key whose
value is lost and that still stands somewhere, in the index as a rule, stays damaged until somebody stores it again:
who would lose text by it is told. What is
opened is compared with what a small file beside it says of the last time (`Mark`): an older copy, another store
and an emptied directory are told apart. Of several processes that open or repair, one does at a time.

The directory is diskcache's: it makes the file, its tables and settings, opens it at each start, and reads every value
with `diskcache.Cache(directory, disk=PackedDisk).get(key)` (the checksum is its `tag`). Values stay inside SQLite
whatever their size: diskcache's own value files are not part of its transactions. The connections in use are our own:
diskcache waits a minute for a lock, says Timeout for each failure to begin, and opens by name what was deleted or
replaced meanwhile.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import diskcache  # type: ignore[import-untyped, unused-ignore]
import msgspec
import zstandard
from xxhash import xxh3_64_intdigest

from proxy.errors import StorageError

if sys.platform != "win32":
    import fcntl

FORMAT = 5  # of everything that is stored; another one with each change that old records do not fit
OLDER = 4  # which `llm-pager migrate` converts
DATABASE = "cache.db"  # diskcache's name for its file
DAMAGED = f"{DATABASE}.damaged"  # what a repair left behind, the latest
SECRET_BYTES = 32
_REPAIRED = f"{DATABASE}.repaired"  # whole, and about to take its place
_UNFINISHED = f"{DATABASE}.unfinished"  # a directory, in which diskcache makes another one
_MARK = f"{DATABASE}.mark"
_LOCK = f"{DATABASE}.lock"
_LOCK_WAIT_S = 5.0  # for another process that opens or repairs
_READ_WAIT_S = 0.02  # readers wait for nobody but a process that has just found a dead one's log
_PAGE_BYTES, _HEADER_BYTES, _WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 4096, 100, 32, 24
_TABLE_LEAF, _TABLE_INNER, _INDEX_LEAF, _INDEX_INNER = 0x0D, 0x05, 0x0A, 0x02
_TREE_PAGES = (_TABLE_LEAF, _TABLE_INNER, _INDEX_LEAF, _INDEX_INNER)
_MOST_PAGES = 1 << 25  # of one that is scrubbed: with more, a page that begins with the number of another may look like a tree's
_MOST_ROW_BYTES = 1_000_000_000  # SQLite's own limit
_PACKED_BYTES = 512  # of a value that is compressed: half of the bytes, for some 10 µs in the writer's thread
_PLAIN, _PACKED = b"\0", b"\1"  # what a stored value begins with
SEALED = b"\xc1LP\1"  # what a sealed one does (sealing.py), and nothing in MessagePack: it was packed before
SECRET = "secret:identity"
MARK = "sealed"  # the row by which a store is known to be sealed (sealing.py), and with whose keys
REPAIRED = "repaired"
ERASED = "erased"  # how many erasures there were
SCRUBBED = "scrubbed"  # another value each time
OWN_ROWS = 2  # of a store that holds nothing yet: its secret, a probe
_SETTINGS = {
    "eviction_policy": "none", "cull_limit": 0, "size_limit": 2**62, "disk_min_file_size": 2**62, "statistics": 0,
    "sqlite_auto_vacuum": 0, "sqlite_mmap_size": 0,
}  # fmt: skip
# Nothing expires here: an index that would be written with each row, as one of the same name that stays empty.
_MADE = f"""
DROP INDEX Cache_expire_time;
CREATE INDEX Cache_expire_time ON Cache (expire_time) WHERE expire_time IS NOT NULL;
PRAGMA user_version = {FORMAT};
"""
_COLUMNS = "key, raw, mode, tag, value"  # raw 1, mode 1: bytes in the row as they are; tag: the checksum
PUT = (
    f"INSERT INTO Cache ({_COLUMNS}) VALUES (?, 1, 1, ?, ?)"
    " ON CONFLICT (key, raw) DO UPDATE SET tag = excluded.tag, value = excluded.value"
)
ADD = f"INSERT INTO Cache ({_COLUMNS}) VALUES (?, 1, 1, ?, ?) ON CONFLICT (key, raw) DO NOTHING"
GET = "SELECT key, tag, value FROM Cache WHERE key = ? AND raw = 1"
SCAN = "SELECT key, tag, value FROM Cache WHERE key >= ? AND key < ? AND raw = 1 ORDER BY key LIMIT ?"
DROP = "DELETE FROM Cache WHERE key >= ? AND key < ?"

log = logging.getLogger(__name__)

Connection: TypeAlias = sqlite3.Connection
Failure: TypeAlias = sqlite3.Error
Key: TypeAlias = bytes | str  # str keys are our own; SQLite keeps the two apart
Inodes: TypeAlias = tuple[tuple[int, int] | None, ...]


LOST_SUM = -1  # of a value that is lost: no checksum is that


class Damaged(StorageError):
    """A value is there and cannot be read."""


class Damages(Counter[str]):
    """How often damaged values were met, by kind. Each kind is told once: a conversation meets it with every request."""

    def met(self, kind: str, sentence: str) -> Damaged:
        self[kind] += 1
        if self[kind] == 1:
            log.error("%s It is taken as missing, and stored again where a request has it.", sentence)
        return Damaged(sentence)


class Row(NamedTuple):
    rowid: int
    key: Key
    sum: int
    value: bytes


def checksum(key: Key, value: bytes) -> int:
    """Of a value under its key: 63 bits, since SQLite's integers are signed."""
    name = key.encode() if isinstance(key, str) else key
    return xxh3_64_intdigest(value, seed=xxh3_64_intdigest(name)) & 0x7FFF_FFFF_FFFF_FFFF


class _Compressors(threading.local):
    """A compressor serves one thread at a time, and a new one for each value costs as much as the work."""

    def __init__(self) -> None:
        self.pack = zstandard.ZstdCompressor(level=1).compress
        self.unpack = zstandard.ZstdDecompressor().decompress


_compressors = _Compressors()


def packed(value: bytes) -> bytes:
    """As it stands in a row."""
    if len(value) < _PACKED_BYTES or value.startswith(SEALED):
        return _PLAIN + value
    return _PACKED + _compressors.pack(value)


def unpacked(stored: bytes) -> bytes:
    """Raises Damaged."""
    if not stored.startswith(_PACKED):
        return stored[1:]
    try:
        return _compressors.unpack(stored[1:])
    except zstandard.ZstdError:
        raise Damaged("a value is not what was stored") from None


class PackedDisk(diskcache.Disk):  # type: ignore[misc, unused-ignore]
    """How diskcache reads what stands in a row."""

    def fetch(self, mode: int, filename: str | None, value: bytes, read: bool) -> bytes:
        return unpacked(super().fetch(mode, filename, value, read))


def put_row(key: Key, value: bytes) -> tuple[Key, int, bytes]:
    """For `PUT` and `ADD`."""
    stored = packed(value)
    return key, checksum(key, stored), stored


def get_value(connection: sqlite3.Connection, key: Key) -> bytes | None:
    """The value, or None. Raises Damaged, and sqlite3.Error."""
    row = connection.execute(GET, (key,)).fetchone()
    return None if row is None else value_of(row)


def sound_value(connection: sqlite3.Connection, key: Key) -> bytes | None:
    """None also for a damaged one. Raises sqlite3.Error."""
    with suppress(Damaged):
        return get_value(connection, key)
    return None


def value_of(row: tuple[Key, int, bytes]) -> bytes:
    """Of a row of `GET` or `SCAN`. Raises Damaged."""
    key, number, value = row
    if type(value) is not bytes or checksum(key, value) != number:
        raise Damaged("a value is not what was stored")
    return unpacked(value)


def used_bytes(connection: sqlite3.Connection) -> int:
    """Of the file, without the pages that are free. Raises sqlite3.Error."""
    size, pages, free = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count"))
    return int(size * (pages - free))


def is_damage(error: BaseException) -> bool:
    """SQLite cannot make sense of the file."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, sqlite3.DatabaseError) and code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


# -- opening


class Mark(msgspec.Struct):
    """What was last known of a store: its secret in hexadecimal, its newest row, when that was (Unix time), and
    which files it stood in. `backup`: it is a copy that was made then."""

    secret: str
    rowid: int
    written_s: float
    inodes: Inodes
    backup: bool = False


_read_mark = msgspec.json.Decoder(Mark).decode


def connect(directory: Path, wait_s: float = _READ_WAIT_S, create: bool = False) -> sqlite3.Connection:
    """A connection that may be used in any one thread at a time. No memory map: a file that is cut under it
    would kill the process."""
    connection = sqlite3.connect(
        f"{(directory / DATABASE).absolute().as_uri()}?mode={'rwc' if create else 'rw'}",
        timeout=wait_s, isolation_level=None, check_same_thread=False, uri=True,
    )  # fmt: skip
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA mmap_size = 0")
    connection.execute("PRAGMA secure_delete = ON")  # what is dropped or replaced is overwritten
    return connection


def sync_commits(connection: sqlite3.Connection) -> None:
    """From now on `COMMIT` returns when the disk has it."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: its fsync alone leaves it in the disk's cache


def sync_directory(directory: Path) -> None:
    """The names in it, and its own, survive losing power."""
    if sys.platform == "win32":
        return
    for path in (directory, directory.absolute().parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def inodes(directory: Path) -> Inodes:
    """Which files stand in the directory under the database's names now: the database, its log, its shared memory."""
    return tuple(map(_inode, _names(directory)))


@lru_cache(maxsize=16)
def _names(directory: Path) -> tuple[str, ...]:
    """Made once: they are looked at with every commit."""
    return tuple(map(str, (directory / DATABASE, *_beside(directory))))


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _beside(directory: Path) -> tuple[Path, Path]:
    return directory / f"{DATABASE}-wal", directory / f"{DATABASE}-shm"


class Opened(NamedTuple):
    """A database that can be used. `told`: what is remarkable about it, in sentences; `lost`: it is not, or not all
    of, what the mark says; `repaired`: the last time that it was."""

    connection: sqlite3.Connection
    inodes: Inodes
    secret: bytes
    rowid: int
    told: list[str]
    lost: bool
    repaired: Repaired | None


def open_database(directory: Path, wait_s: float) -> Opened:
    """Open or make it; what is damaged so that it cannot be opened is repaired. Raises OSError and sqlite3.Error;
    StorageError for what we did not write, or another version did."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # for the owner only; an existing one stays as it is
    told: list[str] = []
    with _alone(directory):
        _finish_repair(directory)
        mark = _mark(directory)
        if mark is not None:
            _drop_log_of_another(directory, mark, told)
        try:
            connection, secret, rowid = _opened_as(directory, mark, wait_s, told)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            told.append(_repair(directory).told(directory))
            connection, secret, rowid = _opened_as(directory, mark, wait_s, told)
    lost = mark is not None and (mark.secret != secret.hex() or mark.rowid > rowid)
    if mark is not None and lost:
        what = "an older copy, or its write-ahead log was deleted"
        if mark.secret != secret.hex():
            what = "empty" if rowid <= OWN_ROWS else "another one"
        told.append(
            f"The storage in {directory} is {what}: what was remembered on {_day(mark.written_s)} is gone, or a part of it."
        )
    elif mark is not None and mark.backup:
        told.append(f"The storage in {directory} is a backup of {_day(mark.written_s)}: what was remembered since is gone.")
    return Opened(connection, inodes(directory), secret, rowid, told, lost, last_repair(connection))


def _opened_as(directory: Path, mark: Mark | None, wait_s: float, told: list[str]) -> tuple[sqlite3.Connection, bytes, int]:
    """A connection, the store's secret, and its newest row."""
    connection = _checked(directory, wait_s)
    try:
        secret, rowid = sound_value(connection, SECRET), newest_row(connection)
        if secret is None:
            known = bytes.fromhex(mark.secret) if mark is not None and rowid else b""
            secret = known if len(known) == SECRET_BYTES else os.urandom(SECRET_BYTES)
            if rowid:
                after = "it stood beside and is there again" if secret == known else "nothing in it can be found any more"
                told.append(f"The secret of the storage in {directory} was lost: {after}.")
            connection.execute(PUT, put_row(SECRET, secret))
            rowid = newest_row(connection)
    except BaseException:
        connection.close()
        raise
    return connection, secret, rowid


def format_of(directory: Path) -> int:
    """The format of the database that stands there. Raises StorageError."""
    try:
        with closing(connect(directory, _LOCK_WAIT_S)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error as error:
        raise StorageError(f"Cannot read {directory / DATABASE}: {error}.") from error


def _drop_log_of_another(directory: Path, mark: Mark, told: list[str]) -> None:
    """A log that is still the one of before, beside another file: SQLite would take it for this one's."""
    found = inodes(directory)
    if found[1] is not None and found[1] == mark.inodes[1] and found[0] != mark.inodes[0]:
        told.append(f"{directory / DATABASE} is another file, and the log beside it is not of it: it is dropped.")
        for path in _beside(directory):
            path.unlink(missing_ok=True)


def newest_row(connection: sqlite3.Connection) -> int:
    """It only grows as long as a store lives."""
    found: int = connection.execute("SELECT ifnull(max(rowid), 0) FROM Cache").fetchone()[0]
    return found


def write_mark(directory: Path, secret: bytes, rowid: int, files: Inodes, backup: bool = False) -> None:
    """Raises OSError."""
    beside = directory / f"{_MARK}.{os.getpid()}"
    beside.write_bytes(msgspec.json.encode(Mark(secret.hex(), rowid, time.time(), files, backup)))
    beside.chmod(0o600)
    os.replace(beside, directory / _MARK)


def _mark(directory: Path) -> Mark | None:
    with suppress(OSError, ValueError):
        return _read_mark((directory / _MARK).read_bytes())
    return None


def _checked(directory: Path, wait_s: float) -> sqlite3.Connection:
    """A connection to a database of this format, which is made where there is none."""
    connection = connect(directory, wait_s, create=True)
    try:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        new = not version and names <= {"Settings", "Cache"} and not ("Cache" in names and newest_row(connection))
        if not new and (version != FORMAT or "Cache" not in names):
            of = f"another version (format {version})" if version else "an older version"
            do = "set tiers.l2.path to another directory, or delete this one to begin anew"
            if version == OLDER:
                do = f"`llm-pager migrate {directory} NEW_DIRECTORY` converts it: set tiers.l2.path to the new one then"
            raise StorageError(
                f"The storage directory {directory} was written by {of} of llm-pager, which this one does not read; {do}."
            )
        if os.path.expandvars(directory.absolute()) != str(directory.absolute()):  # as diskcache would
            raise StorageError(f"Cannot use {directory} as the storage directory: write its $ out in tiers.l2.path.")
        try:
            # What is locked fails here, before diskcache waits for it; and diskcache would believe damaged settings.
            forget = "DELETE FROM Settings;" if "Settings" in names else ""
            connection.executescript(f"BEGIN IMMEDIATE; {forget} COMMIT;")
            diskcache.Cache(str(directory.absolute()), disk=PackedDisk, **_SETTINGS).close()
            # Its counts of rows and bytes, which nobody reads, cost two thirds of a commit.
            triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
            drop = "".join(f"DROP TRIGGER IF EXISTS {name};" for (name,) in triggers)
            connection.executescript(f"BEGIN IMMEDIATE; {drop} {_MADE if new else ''} COMMIT;")
        except sqlite3.OperationalError:
            connection.rollback()
            if new:
                raise
            # It can be read at least; the next commit learns why it cannot be written.
        for path in (directory / DATABASE, *_beside(directory)) if new else ():
            path.chmod(0o600)
        connection.execute("SELECT 1 FROM Cache LIMIT 1").fetchone()  # its log and shared memory are there now
    except BaseException:
        connection.close()
        raise
    return connection


def _day(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """No other process opens or repairs meanwhile. Raises OSError after a while."""
    if sys.platform == "win32":
        yield
        return
    with open(directory / _LOCK, "a") as lock:
        until_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.01)
        yield


# -- copying


def back_up(directory: Path, to: Path) -> tuple[int, int]:
    """Copy the database as it stands at one moment, while others write, to a directory where it replaces an older
    copy. Returns its rows and bytes. Raises StorageError, OSError, sqlite3.Error."""
    if not (directory / DATABASE).exists():
        raise StorageError(f"There is no storage in {directory} that could be copied.")
    if to.exists() and (any(path.exists() for path in _beside(to)) or to.resolve() == directory.resolve()):
        raise StorageError(f"{to} is a storage that is in use, and no place for a copy: name another directory.")
    to.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = to / f"{DATABASE}.new"
    copy.unlink(missing_ok=True)
    with closing(connect(directory, _LOCK_WAIT_S)) as source:
        source.execute("VACUUM INTO ?", (str(copy),))  # without what stands in free pages
    copy.chmod(0o600)
    with closing(sqlite3.connect(copy)) as made:
        secret, rowid = sound_value(made, SECRET) or b"", newest_row(made)
        rows = made.execute("SELECT count(*) FROM Cache").fetchone()[0]
    with open(copy, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    (to / _MARK).unlink(missing_ok=True)  # never of another copy
    os.replace(copy, to / DATABASE)
    write_mark(to, secret, rowid, (None, None, None), backup=True)
    sync_directory(to)
    return rows, size


# -- repairing


def mark_lost(connection: sqlite3.Connection, lost: Iterable[Key]) -> None:
    """Make these keys' values damaged ones. Raises sqlite3.Error."""
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(PUT, [(key, LOST_SUM, b"") for key in lost])
    connection.execute("COMMIT")


class Repaired(msgspec.Struct):
    """Values that could be read and that are lost, as far as is known, and when (Unix time)."""

    kept: int
    lost: int
    at_s: float

    def told(self, directory: Path) -> str:
        return (
            f"{directory / DATABASE} was damaged and has been made anew: {self.kept} values could be read,"
            f" {self.lost} are lost; the damaged file stands beside as {DAMAGED}."
        )


_read_repaired = msgspec.json.Decoder(Repaired).decode


def last_repair(connection: sqlite3.Connection) -> Repaired | None:
    with suppress(ValueError):
        return _read_repaired(sound_value(connection, REPAIRED) or b"")
    return None


def repair(directory: Path) -> Repaired:
    """Put all rows that can be read into a new file, in the place of the old one. Raises OSError, sqlite3.Error."""
    with _alone(directory):
        _finish_repair(directory)
        return _repair(directory)


def _repair(directory: Path) -> Repaired:
    old: sqlite3.Connection | None = None
    with suppress(sqlite3.Error):
        old = connect(directory, _LOCK_WAIT_S)
        old.execute("BEGIN IMMEDIATE")  # who still writes to it waits, and finds another file then
    try:
        return _rebuilt(directory)
    finally:
        if old is not None:
            old.close()


def _rebuilt(directory: Path) -> Repaired:
    unfinished = directory / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    insert = f"INSERT OR REPLACE INTO Cache (rowid, {_COLUMNS}) VALUES (?, ?, 1, 1, ?, ?)"
    last, mark = 0, _mark(directory)
    found = RawDatabase(directory)
    with closing(found), closing(_checked(unfinished, _LOCK_WAIT_S)) as new:
        new.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
        for row in found.rows():
            if checksum(row.key, row.value) == row.sum:
                new.execute(insert, row)
                last = max(last, row.rowid)
        for rowid, key in found.named():
            new.execute(insert.replace("REPLACE", "IGNORE"), (rowid, key, LOST_SUM, b""))
            last = max(last, rowid)
        last = max(last, mark.rowid if mark is not None else 0)  # rows are numbered one by one
        kept = new.execute("SELECT count(*) FROM Cache WHERE tag != ?", (LOST_SUM,)).fetchone()[0]
        done = Repaired(kept, last - kept, time.time())
        if (before := sound_value(new, REPAIRED)) is not None:
            new.execute("UPDATE Cache SET key = ?, tag = ?, value = ? WHERE key = ?", (*put_row(f"{REPAIRED}:{last}", before), REPAIRED))
        # Behind all that was: the store is not an older one.
        new.execute(insert, (last + 1, *put_row(REPAIRED, msgspec.json.encode(done))))
        new.execute("COMMIT")
        new.execute("PRAGMA journal_mode = WAL")
    with open(unfinished / DATABASE, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished / DATABASE, directory / _REPAIRED)
    shutil.rmtree(unfinished, ignore_errors=True)
    _finish_repair(directory)
    return done


def _finish_repair(directory: Path) -> None:
    """The old log first: it must never be read with the new file."""
    if not (directory / _REPAIRED).exists():
        return
    for path in _beside(directory):
        path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        os.replace(directory / DATABASE, directory / DAMAGED)
    os.replace(directory / _REPAIRED, directory / DATABASE)


class RawDatabase:
    """The rows that stand in a database's pages, read without SQLite (sqlite.org/fileformat2.html): every leaf of a
    table is looked for page by page, so no other page has to be whole. Its write-ahead log is read over it."""

    def __init__(self, directory: Path) -> None:
        self._file = _opened(directory / DATABASE)
        self._log = _opened(_beside(directory)[0])
        header = self._read(self._file, 0, _HEADER_BYTES)
        size = int.from_bytes(header[16:18], "big")
        size = 65536 if size == 1 else size
        logged = self._read(self._log, 0, _WAL_HEADER_BYTES)
        if not header.startswith(b"SQLite format 3\0") and len(logged) == _WAL_HEADER_BYTES:
            size = int.from_bytes(logged[8:12], "big")
        self._page_bytes = size if 512 <= size <= 65536 and size & (size - 1) == 0 else _PAGE_BYTES
        reserved = header[20] if header.startswith(b"SQLite format 3\0") else 0
        self._usable = self._page_bytes - reserved
        self._overlay = self._frames(logged)  # page -> where it stands in the log
        bytes_ = os.fstat(self._file.fileno()).st_size if self._file else 0
        self.pages = max([-(-bytes_ // self._page_bytes), *self._overlay])

    def close(self) -> None:
        for file in (self._file, self._log):
            if file is not None:
                file.close()

    def rows(self) -> Iterator[Row]:
        """Unverified: compare each with its checksum."""
        for page, pointer, _ in self._cells(_TABLE_LEAF):
            with suppress(IndexError, ValueError):
                size, at = _varint(page, pointer)
                rowid, at = _varint(page, at)
                _, key, _, _, _, _, _, number, _, _, _, value = _values(self._payload(page, at, size), 12)
                if isinstance(key, bytes | str) and isinstance(number, int) and isinstance(value, bytes):
                    yield Row(rowid, key, number, value)

    def named(self) -> Iterator[tuple[int, Key]]:
        """The keys of all rows, by the index and by rows whose values cannot be read."""
        for row in self.rows():
            yield row.rowid, row.key
        for page, pointer, kind in self._cells(_INDEX_LEAF, _INDEX_INNER):
            with suppress(IndexError, ValueError):
                size, at = _varint(page, pointer + (4 if kind == _INDEX_INNER else 0))
                key, _, rowid = _values(page[at : at + size], 3)
                if isinstance(key, bytes | str) and isinstance(rowid, int) and 0 < rowid < self.pages * self._usable:
                    yield rowid, key

    def _cells(self, *kinds: int) -> Iterator[tuple[bytes, int, int]]:
        """(page, where the cell begins in it, kind) of all pages of these kinds that are in use."""
        free = self._free()
        for number in range(1, self.pages + 1):
            page = b"" if number in free else self._page(number)
            head = _HEADER_BYTES if number == 1 else 0
            if len(page) < self._page_bytes or page[head] not in kinds:
                continue
            first = head + (12 if page[head] == _INDEX_INNER else 8)
            for at in range(first, first + 2 * int.from_bytes(page[head + 3 : head + 5], "big"), 2):
                yield page, int.from_bytes(page[at : at + 2], "big"), page[head]

    @staticmethod
    def _read(file: BinaryIO | None, at: int, size: int) -> bytes:
        if file is None:
            return b""
        try:
            file.seek(at)
            return file.read(size)
        except OSError:  # a bad block
            return b""

    def _page(self, number: int) -> bytes:
        if number in self._overlay:
            return self._read(self._log, self._overlay[number], self._page_bytes)
        return self._read(self._file, (number - 1) * self._page_bytes, self._page_bytes)

    def _frames(self, header: bytes) -> dict[int, int]:
        """The committed pages of the log."""
        overlay, pending = dict[int, int](), dict[int, int]()
        at, salts = _WAL_HEADER_BYTES, header[16:24]
        while len(head := self._read(self._log, at, _FRAME_HEADER_BYTES)) == _FRAME_HEADER_BYTES:
            if head[8:16] != salts:  # of an earlier round
                break
            pending[int.from_bytes(head[:4], "big")] = at + _FRAME_HEADER_BYTES
            if head[4:8] != b"\0\0\0\0":
                overlay.update(pending)
                pending.clear()
            at += _FRAME_HEADER_BYTES + self._page_bytes
        return overlay

    def _free(self) -> set[int]:
        """Pages that are in no tree: what stands in them may be old."""
        free: set[int] = set()
        trunk = int.from_bytes(self._page(1)[32:36], "big")
        while 0 < trunk <= self.pages and trunk not in free:
            page = self._page(trunk)
            free.add(trunk)
            count = min(int.from_bytes(page[4:8], "big"), self._page_bytes // 4 - 2)
            free.update(int.from_bytes(page[8 + 4 * i : 12 + 4 * i], "big") for i in range(count))
            trunk = int.from_bytes(page[:4], "big")
        return free

    def _payload(self, page: bytes, at: int, size: int) -> bytes:
        usable = self._usable
        if size > min(_MOST_ROW_BYTES, self.pages * self._page_bytes):
            raise ValueError("no size of a row")
        if size <= usable - 35:
            return page[at : at + size]
        least = (usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (usable - 4)
        local = local if local <= usable - 35 else least
        parts, left = [page[at : at + local]], size - local
        following = int.from_bytes(page[at + local : at + local + 4], "big")
        while left > 0:
            if not 0 < following <= self.pages:
                raise ValueError("a row's end is missing")
            more = self._page(following)
            parts.append(more[4 : min(usable, 4 + left)])
            left -= usable - 4
            following = int.from_bytes(more[:4], "big")
        return b"".join(parts)


def _opened(path: Path) -> BinaryIO | None:
    with suppress(OSError):
        return open(path, "rb")
    return None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for _ in range(8):
        byte = data[at]
        at += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at
    return value << 8 | data[at], at + 1


_INTEGERS = (0, 1, 2, 3, 4, 6, 8)


def _values(payload: bytes, count: int) -> list[bytes | str | int | None]:
    """The columns of a record. IndexError and ValueError for one that is cut, or has not so many."""
    end, at = _varint(payload, 0)
    kinds: list[int] = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    if len(kinds) != count:
        raise ValueError("a row of another table")
    values: list[bytes | str | int | None] = []
    for kind in kinds:
        size = (kind - 12) // 2 if kind >= 12 else _INTEGERS[kind] if kind < 7 else 8 if kind == 7 else 0
        data = payload[end : end + size]
        if len(data) != size:
            raise ValueError("a row that is cut")
        end += size
        if kind >= 12:
            values.append(data.decode() if kind % 2 else data)
        elif kind in (8, 9):
            values.append(kind - 8)
        else:
            values.append(int.from_bytes(data, "big", signed=True) if 0 < kind < 7 else None)
    return values


# -- scrubbing


def scrub(directory: Path) -> None:
    """Leave no byte in the files of what was deleted or replaced. SQLite overwrites it (secure_delete), but for the
    copies that it leaves in the free space of a page whose rows moved to another one: these are zeroed here, in the file
    itself, while nobody writes and the log is empty; SQLite never reads free space. Raises OSError, sqlite3.Error and
    StorageError. For a process of its own: closing a file ends the process's locks on it, and it is closed last."""
    (directory / DAMAGED).unlink(missing_ok=True)
    with _alone(directory), open(directory / DATABASE, "r+b", buffering=0) as file:
        connection = connect(directory, _LOCK_WAIT_S)
        _begin_without_log(connection, directory)  # all that was dropped before is dropped in the file
        connection.execute("ROLLBACK")
        pages = os.fstat(file.fileno()).st_size // _PAGE_BYTES
        if pages > _MOST_PAGES:
            raise StorageError(f"{directory / DATABASE} is too large")
        found = [number for number, *_ in _leftovers(file, range(pages))]
        _begin_without_log(connection, directory)
        for _, at, size in _leftovers(file, found):
            os.pwrite(file.fileno(), bytes(size), at)
        os.fsync(file.fileno())
        connection.execute(PUT, put_row(SCRUBBED, os.urandom(8)))  # a change: nobody writes a page as he remembers it
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()


def _begin_without_log(connection: sqlite3.Connection, directory: Path) -> None:
    """Begin a transaction in which all that is stored stands in the database itself."""
    until_s = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < until_s:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("BEGIN IMMEDIATE")
        if _beside(directory)[0].stat().st_size == 0:
            return
        connection.execute("ROLLBACK")
    raise StorageError(f"the log in {directory} is being read all the time")


def _leftovers(file: BinaryIO, numbers: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(page, where, bytes) of what stands between the cells' places and the cells of a tree's page, and is not zeros."""
    for number in numbers:
        page = os.pread(file.fileno(), _PAGE_BYTES, number * _PAGE_BYTES)
        head = _HEADER_BYTES if number == 0 else 0
        if len(page) < _PAGE_BYTES or page[head] not in _TREE_PAGES:
            continue
        first = head + (12 if page[head] in (_TABLE_INNER, _INDEX_INNER) else 8) + 2 * int.from_bytes(page[head + 3 : head + 5], "big")
        size = (int.from_bytes(page[head + 5 : head + 7], "big") or 65536) - first
        if first < first + size <= _PAGE_BYTES and page.count(0, first, first + size) != size:
            yield number, number * _PAGE_BYTES + first, size


if __name__ == "__main__":
    if sys.argv[2:] == ["scrub"]:
        scrub(Path(sys.argv[1]))
    else:
        print(repair(Path(sys.argv[1])).told(Path(sys.argv[1])))
