"""`llm-pager check --storage`: every damage of a storage, found, repaired and told to a person.

Promises: all of it is read: SQLite's own check of the file, each value against its checksum, each turn's record
against the ids that it is made of and the records and blocks that it names, each object and pack against its name. What can
be read stays as it is; a value that cannot is marked as lost, so that the next request that has it stores it again,
and a client that would lose text by it is told. A server may run meanwhile: it goes on with the repaired file.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from proxy import keys
from proxy.config import Config
from proxy.conversation.derived import table_root
from proxy.conversation.erasure import is_tombstone
from proxy.conversation.records import LastUse, Record, block_key, decode_record, record_key
from proxy.conversation.tree import Identity
from proxy.errors import StorageError
from proxy.memory.table import block_ref
from proxy.storage import open_store
from proxy.storage.packs import values_of
from proxy.storage.sqlite import (
    DATABASE,
    LOST_SUM,
    SECRET,
    Damaged,
    Failure,
    Key,
    checksum,
    connect,
    get_value,
    is_damage,
    mark_lost,
    open_database,
    repair,
    unpacked,
)
from proxy.storage.tiered import OBJECT, Tiered, is_stub, is_whole, named_pack, object_name
from proxy.terminal import Advance, Told, progress

if TYPE_CHECKING:  # an extra
    from proxy.storage.objects import Objects
    from proxy.storage.postgres import PostgresStore

SOUND, REPAIRED = 0, 3  # exit statuses: there was no damage; there was, and it is repaired as far as it can be
_LOCK_WAIT_S = 5.0
_TOLD = 5  # of SQLite's findings
_TOLD_EACH = 256  # values: the bar moves
_REPAIRED = "repaired"


def check_storage(config: Config, as_json: bool) -> int:
    """Tells what was found and done. Raises StorageError for a storage that cannot be used at all."""
    tell = Told(as_json)
    try:
        with progress("values", not as_json) as advance:
            result = _checked_tables(config, tell, advance) if config.tiers.l2.url is not None else _checked(config, tell, advance)
    except (OSError, Failure) as error:
        raise StorageError(f"The storage in {config.tiers.l2.path} cannot be checked: {error}.") from error
    tell("result", result)
    tell.end(result=result)
    return REPAIRED if result == _REPAIRED else SOUND


def _checked(config: Config, tell: Told, advance: Advance) -> str:
    path = config.tiers.l2.path
    tell("storage", f"{path.absolute()}")
    if not (path / DATABASE).exists():
        return "there is none yet"
    opened = open_database(path, _LOCK_WAIT_S)  # what cannot even be opened is repaired here
    opened.connection.close()
    damage = bool(opened.told)
    for sentence in opened.told:
        tell("found", sentence)

    def mark(lost: list[bytes]) -> None:
        with closing(connect(path, _LOCK_WAIT_S)) as connection:
            mark_lost(connection, lost)

    store = open_store(config)  # refused where it is encrypted with other keys
    try:
        found = _file(path, store, advance)
        if found.damage:
            damage = True
            _tell_damage(found, tell)
            asyncio.run(store.close())
            tell("repaired", repair(path).told(path))
            store = open_store(config)
            found = _file(path, store, advance)
        damage |= _compared(found, store, mark, tell)
    finally:
        asyncio.run(store.close())
    size = (path / DATABASE).stat().st_size
    tell("file", f"{DATABASE}: {size / 1e6:.1f} MB, {_counted(found.sound) or 'empty'}")
    if found.wrong:
        damage = True
        mark(list(found.wrong))
    _tell_lost(found, tell)
    return _REPAIRED if damage else "sound"


def _checked_tables(config: Config, tell: Told, advance: Advance) -> str:
    """As `_checked`, in PostgreSQL; its own checks of its files are not ours (pg_amcheck)."""
    tiered = open_store(config)
    store = cast("PostgresStore", tiered.engine)
    tell("storage", store.where)
    try:
        if store.trouble is not None:
            raise StorageError(store.trouble)
        found, rows = _Found(Identity(store.secret()), tiered), keys.rows_of(store.rows, b"")
        found.read(rows, advance)
        damage = _compared(found, tiered, lambda lost: asyncio.run(store.mark_lost((), lost)), tell)
        for key in [key for key in found.wrong if key not in found.there and store.get(key) is not None]:
            del found.wrong[key]  # a server may run meanwhile
        _tell_damage(found, tell)
        tell("tables", _counted(found.sound) or "empty")
        if found.damaged or found.wrong:
            asyncio.run(store.mark_lost([*found.damaged, *(key for key in found.wrong if key in found.there)],
                                        [key for key in found.wrong if key not in found.there]))  # fmt: skip
        found.lost.update(map(_kind, found.damaged))
        _tell_lost(found, tell)
    finally:
        asyncio.run(store.close())
    return _REPAIRED if damage or found.damage or found.wrong else "sound"


def _tell_damage(found: _Found, tell: Told) -> None:
    for line, count in found.damage.items():
        tell("found", line + (f" ({count} times)" if count > 1 else ""))


def _tell_lost(found: _Found, tell: Told) -> None:
    for (kind, why), count in Counter((_kind(key), why) for key, why in found.wrong.items()).items():
        tell("found", f"{count} x {kind} {why}")
    found.lost.update(map(_kind, found.wrong))
    if found.lost:
        tell("lost", f"{_counted(found.lost)}: each is stored again when a client sends what it held;")
        tell("", "a session of new messages that needs one is told to send its whole history")
    if found.dropped:
        tell("erased", f"{_counted(found.dropped)}: they are encrypted with keys that were dropped")


def _file(path: Path, store: Tiered, advance: Advance) -> _Found:
    """What stands in a directory's database."""
    with closing(connect(path, _LOCK_WAIT_S)) as connection:
        found = _Found(Identity(get_value(connection, SECRET) or b""), store)
        try:
            for (line,) in connection.execute(f"PRAGMA integrity_check({_TOLD})"):
                if line != "ok":
                    found.damage.update(str(line).splitlines()[:_TOLD])
            (total,) = connection.execute("SELECT count(*) FROM Cache").fetchone()
            found.read(connection.execute("SELECT key, tag, value FROM Cache"), advance, total)
        except Failure as error:
            if not is_damage(error):
                raise
            found.damage[f"the file cannot be read to its end: {error}"] += 1
    return found


class _Found:
    """What stands in a database: `damage`, in sentences; `sound` and `lost` values, by kind; `damaged`: keys whose
    values are not what was stored; `wrong`: keys of those that were stored like this or are missing, and why; `dropped`:
    values that nobody can decrypt any more."""

    def __init__(self, identity: Identity, store: Tiered) -> None:
        self._identity, self._opened = identity, store.opened
        self.dropped: Counter[str] = Counter()
        self.damage: Counter[str] = Counter()
        self.sound: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.wrong: dict[bytes, str] = {}
        self.damaged: list[bytes] = []
        self.there: set[bytes] = set()
        self._named: dict[bytes, str] = {}  # keys that others name: how
        self._stubs: dict[bytes, bytes] = {}  # of values in L3

    def compare(self, below: _Below) -> None:
        """With what stands in objects: then `wrong` is all of it."""
        self.lost.update(map(_kind, below.lost))
        for key, stub in self._stubs.items():
            value = below.object(key, stub)
            if why := "stands in an object that is lost" if value is None else self._verified(key, value):
                self.wrong[key] = why
        missing = {key: how for key, how in self.missing().items() if key not in below.packed}
        self.wrong.update({key: f"that {how} is missing" for key, how in missing.items()})

    def missing(self) -> dict[bytes, str]:
        """What is named and not there, and how it is named."""
        return {key: how for key, how in self._named.items() if key not in self.there}

    def read(self, rows: Iterable[tuple[Key, int | None, bytes]], advance: Advance, total: int | None = None) -> None:
        """(key, checksum, stored value) of all; None: the members of a set, which are sound."""
        for at, (key, number, value) in enumerate(rows):
            if not at % _TOLD_EACH:
                advance(at, total)
            kind = _kind(key)
            if isinstance(key, bytes):
                self.there.add(key)
            if number == LOST_SUM:
                self.lost[kind] += 1
            elif number is None:
                self.sound[kind] += 1
            elif type(value) is not bytes or checksum(key, value) != number:
                self.damage[f"a {kind} is not what was stored"] += 1
                if isinstance(key, bytes):
                    self.damaged.append(key)
            else:
                self.sound[kind] += 1
                if isinstance(key, bytes) and (why := self._verified(key, unpacked(value))):
                    self.wrong[key] = why

    def _verified(self, key: bytes, stored: bytes) -> str:
        """Why the value of a key is not one of ours; "" for one that is. What it names is noted."""
        if is_stub(stored):
            self._stubs[key] = stored
            return ""
        try:
            value = self._opened(key, stored)
        except Damaged:
            return "cannot be decrypted"
        if value is None:
            self.dropped[_kind(key)] += 1
            return ""
        if key.startswith(keys.BLOCK):
            return "" if block_key(keys.owner(key), block_ref(value)) == key else "has another name than its bytes say"
        if key.startswith(keys.SESSION):
            self._named[record_key(value)] = f"a {_kind(key)} names"
        if key.startswith(keys.CONVERSATION):
            self._named[record_key(LastUse.decode(value).head)] = f"a {_kind(key)} names"
        if not key.startswith(keys.RECORD):
            return ""
        try:
            record = decode_record(value)
            root = table_root(record.closing) if record.closing else b""
            if record_key(record.id) != key or not all(_chained(record, self._identity)):
                return "has another name than its messages say"
        except (ValueError, LookupError) as error:
            return f"cannot be read ({error})"
        others = [record.parent, record.base, record.closed, *(other for _, other, _ in record.elsewhere)]
        if record.shared is not None:
            others.append(record.shared.record)
        self._named.update((record_key(other), "a later turn goes on from") for other in others if other)
        if record.leaf:
            self._named[block_key(keys.owner(key), record.leaf)] = "a path is found by"
        if root:
            self._named[block_key(keys.owner(key), root)] = "a page table has as its root"
        return ""


def _chained(record: Record, identity: Identity) -> Iterator[bool]:
    """Whether each id follows from the one before and the message, and each message is what it is known by."""
    before = record.parent
    for at, (node, content, raw) in enumerate(zip(record.ids, record.contents, record.raws, strict=True)):
        if record.shared is not None and at == record.shared.head:
            before = b""  # others' messages stand in between
        yield not before or identity.child(before, content) == node
        yield not raw or is_tombstone(raw) or identity.content(msgspec.json.decode(raw)) == content
        before = node


def _kind(key: Key) -> str:
    return keys.KINDS.get(key[:1], "value") if isinstance(key, bytes) else "value of the storage's own"


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def _compared(found: _Found, store: Tiered, mark: Callable[[list[bytes]], None], tell: Told) -> bool:
    """Whether there was damage in objects; `mark`: keys as lost ones."""
    below = _Below(store, tell)
    if below.lost:
        mark(below.lost)
    found.compare(below)
    return below.damage


class _Below:
    """What stands in objects: `packed`: the keys of all values in packs; `lost`: of those that are lost now. A damaged
    pack's sound values go back to L2, and those that are lost are marked so there; damaged objects are deleted."""

    def __init__(self, store: Tiered, tell: Told) -> None:
        self._say = tell
        self.damage = False
        self.packed: set[bytes] = set()
        self.lost: list[bytes] = []
        self._sound: set[str] = set()
        self._l3 = store.l3
        asyncio.run(self._check(store))

    def object(self, key: bytes, stub: bytes) -> bytes | None:
        """A large value; None where it is lost. Raises StorageError."""
        if self._l3 is None:
            raise StorageError("Large values stand in L3; set tiers.l3.url to where they are.")
        name = object_name(key, stub)
        data = self._l3.get(name) if name in self._sound else None
        return None if data is None else unpacked(data)

    async def _check(self, store: Tiered) -> None:
        if store.l3 is not None:
            self._check_objects(store.l3)
        if store.l4 is not None:
            await self._check_packs(store, store.l4)
        elif store.engine.scan(keys.ARCHIVE, limit=1):
            raise StorageError("Conversations stand in L4; set tiers.l4.url to where they are.")

    def _check_objects(self, l3: Objects) -> None:
        damaged = 0
        for name, _ in l3.names():
            if name.endswith(OBJECT) and (data := l3.get(name)) is not None:
                if is_whole(name, data):
                    self._sound.add(name)
                else:
                    damaged += 1
                    l3.delete([name])
        self._say("L3", f"{len(self._sound)} sound objects in {l3.url}")
        self._tell(damaged, "damaged objects: they are stored again when a client sends what they held")

    async def _check_packs(self, store: Tiered, l4: Objects) -> None:
        sound_packs, bad, lost = set[tuple[bytes, bytes]](), set[tuple[bytes, bytes]](), list[bytes]()
        for name, _ in l4.names():
            if (named := named_pack(name)) is None or (data := l4.get(name)) is None:
                continue
            owner, pack = named
            try:
                sound, damaged = values_of(pack, data)
            except StorageError:  # its index is damaged
                bad.add(named)
                continue
            at = {rest: rest[:1] + owner + rest[1:] for rest in (*sound, *damaged)}
            self.packed.update(at.values())
            if self._l3 is not None:
                names = {at[rest]: object_name(at[rest], value) for rest, value in sound.items() if is_stub(value)}
                lost += [key for key, its in names.items() if its not in self._sound]
            if damaged:
                bad.add(named)
                lost += [at[rest] for rest in damaged]
                await store.engine.commit((), adds=[(at[rest], value) for rest, value in sound.items()])
            else:
                sound_packs.add(named)
        for owner in store.archived(b""):
            told = {(owner, pack) for pack in store.packs_of(owner, anew=True)}
            bad |= told - sound_packs  # with those that are not there
            await store.engine.commit((), leaves=[(keys.ARCHIVE + owner, owner + pack) for _, pack in told - sound_packs])
        l4.delete([store.pack_name(*named) for named in bad])
        self.lost = [key for key in lost if not _is_there(store, key)]
        self._say("L4", f"{len(sound_packs)} sound packs in {l4.url}")
        self._tell(len(bad), "damaged packs: what could be read of them is in L2 again")

    def _tell(self, count: int, what: str) -> None:
        if count:
            self.damage = True
            self._say("dropped", f"{count} {what}")


def _is_there(store: Tiered, key: bytes) -> bool:
    """In L2, damaged or not."""
    try:
        return store.engine.get(key) is not None
    except Damaged:
        return True
