"""`llm-pager check --storage`: every damage of a storage, found, repaired and told to a person.

Promises: all of it is read: SQLite's own check of the file, each value against its checksum, each turn's record
against the ids that it is made of and the records and blocks that it names, each artifact against its name. What can
be read stays as it is; a value that cannot is marked as lost, so that the next request that has it stores it again,
and a client that would lose text by it is told. A server may run meanwhile: it goes on with the repaired file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from proxy.config import Config
from proxy.conversation import keys
from proxy.conversation.derived import table_root
from proxy.conversation.records import LastUse, Record, block_key, decode_record, record_key
from proxy.conversation.tree import Identity
from proxy.errors import StorageError
from proxy.memory.artifacts_bridge import is_intact
from proxy.memory.table import block_ref
from proxy.storage.l3 import ArtifactStore
from proxy.storage.sqlite import (
    DATABASE,
    LOST_SUM,
    SECRET,
    Connection,
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

SOUND, REPAIRED = 0, 3  # exit statuses: there was no damage; there was, and it is repaired as far as it can be
_LOCK_WAIT_S = 5.0
_TOLD = 5  # of SQLite's findings


def check_storage(config: Config) -> int:
    """Prints what was found and done. Raises StorageError for a storage that cannot be used at all."""
    try:
        return _checked(config, config.tiers.l2.path)
    except (OSError, Failure) as error:
        raise StorageError(f"The storage in {config.tiers.l2.path} cannot be checked: {error}.") from error


def _checked(config: Config, path: Path) -> int:
    print(f"storage    {path.absolute()}")
    if not (path / DATABASE).exists():
        print("result     there is none yet")
        return SOUND
    opened = open_database(path, _LOCK_WAIT_S)  # what cannot even be opened is repaired here
    opened.connection.close()
    damage = bool(opened.told)
    for sentence in opened.told:
        print(f"found      {sentence}")
    found = _File(path)
    if found.damage:
        damage = True
        for line, count in found.damage.items():
            print(f"found      {line}" + (f" ({count} times)" if count > 1 else ""))
        print(f"repaired   {repair(path).told(path)}")
        found = _File(path)
    size = (path / DATABASE).stat().st_size
    print(f"file       {DATABASE}: {size / 1e6:.1f} MB, {_counted(found.sound) or 'empty'}")
    if found.wrong:
        damage = True
        for (kind, why), count in Counter((_kind(key), why) for key, why in found.wrong.items()).items():
            print(f"found      {count} x {kind} {why}")
        with closing(connect(path, _LOCK_WAIT_S)) as connection:
            mark_lost(connection, found.wrong)
        found.lost.update(map(_kind, found.wrong))
    if found.lost:
        print(f"lost       {_counted(found.lost)}: each is stored again when a client sends what it held;")
        print("           a session of new messages that needs one is told to send its whole history")
    url = config.tiers.l3.url or str(path / "artifacts")
    kept, dropped = _artifacts(ArtifactStore(url))
    if kept or dropped:
        print(f"artifacts  {kept} in {url}")
    if dropped:
        damage = True
        print(f"dropped    {dropped} damaged artifacts: they are made again when they are shown")
    print("result     " + ("repaired" if damage else "sound"))
    return REPAIRED if damage else SOUND


class _File:
    """What stands in a database: `damage` in its file, in sentences; `sound` and `lost` values, by kind; `wrong`:
    keys of those that were stored like this or are missing, and why."""

    def __init__(self, path: Path) -> None:
        self.damage: Counter[str] = Counter()
        self.sound: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.wrong: dict[bytes, str] = {}
        self._there: set[bytes] = set()
        self._named: dict[bytes, str] = {}  # keys that others name: how
        with closing(connect(path, _LOCK_WAIT_S)) as connection:
            try:
                self._read(connection)
            except Failure as error:
                if not is_damage(error):
                    raise
                self.damage[f"the file cannot be read to its end: {error}"] += 1
        missing = {key: how for key, how in self._named.items() if key not in self._there}
        self.wrong.update({key: f"that {how} is missing" for key, how in missing.items()})

    def _read(self, connection: Connection) -> None:
        for (line,) in connection.execute(f"PRAGMA integrity_check({_TOLD})"):
            if line != "ok":
                self.damage.update(str(line).splitlines()[:_TOLD])
        identity = Identity(get_value(connection, SECRET) or b"")
        for key, number, value in connection.execute("SELECT key, tag, value FROM Cache"):
            kind = _kind(key)
            if isinstance(key, bytes):
                self._there.add(key)
            if number == LOST_SUM:
                self.lost[kind] += 1
            elif type(value) is not bytes or checksum(key, value) != number:
                self.damage[f"a {kind} is not what was stored"] += 1
            else:
                self.sound[kind] += 1
                if isinstance(key, bytes) and (why := self._verified(key, unpacked(value), identity)):
                    self.wrong[key] = why

    def _verified(self, key: bytes, value: bytes, identity: Identity) -> str:
        """Why the value of a key is not one of ours; "" for one that is. What it names is noted."""
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
            if record_key(record.id) != key or not all(_chained(record, identity)):
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
        yield not raw or identity.content(msgspec.json.decode(raw)) == content
        before = node


def _kind(key: Key) -> str:
    return keys.KINDS.get(key[:1], "value") if isinstance(key, bytes) else "value of the storage's own"


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def _artifacts(store: ArtifactStore) -> tuple[int, int]:
    """Those that are kept, and the damaged ones, which are deleted."""
    kept = dropped = 0
    for key, data in store.all():
        if is_intact(key, data):
            kept += 1
        else:
            store.drop(key)
            dropped += 1
    return kept, dropped
