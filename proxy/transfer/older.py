"""`llm-pager migrate` from a directory of format 4, in which keys did not carry their owner.

Promises: answers, windows, bills, sessions and what was learned of models come over as they are, so that a client's next
request goes upstream as it would have gone, where it is proved whose they are; nobody's come under another's. What is
made of pages (search indexes, thumbnails, captions, vectors) is made again.

What proves an owner: the ids of first messages are made of the tenant's hash (of credentials and user). That hash stood in
the keys of conversations that paged; for a client without a user it is also the credentials', which stood in the keys of
what was learned of their models; and it is known of clients whose headers and users are given. The first part of an owner is the
credentials': of a tenant with a user it is known only where these are given. What belongs to nobody known is written to a file that `import` reads.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import msgspec

from proxy import keys
from proxy.api.caller import caller_of
from proxy.config import SessionsConfig
from proxy.conversation.derived import table_root
from proxy.conversation.exported import exported, header
from proxy.conversation.records import (
    LastUse,
    Record,
    backwards,
    block_key,
    conversation_key,
    decode_record,
    encode_record,
    indexed,
    link_key,
    owner_of,
    record_key,
    state_digest,
)
from proxy.conversation.tree import HASH_BYTES, ContentId, Identity, NodeId, TenantKey
from proxy.errors import StorageError
from proxy.memory.table import blocks_under
from proxy.storage import MIGRATING
from proxy.storage.sqlite import (
    OLDER,
    SECRET,
    Connection,
    Damaged,
    Failure,
    connect,
    format_of,
    get_value,
    value_of,
)
from proxy.terminal import progress, tell_json
from proxy.transfer.desk import DONE, LEFT_OUT, batches
from proxy.transfer.exports import whole_file
from proxy.transfer.migrate import WHOLE, opened_target, so_far
from proxy.whose import headers_of, lines_of

UNCLAIMED = "unclaimed.jsonl"  # beside the new database
_LOCK_WAIT_S = 5.0
_NOBODY = bytes(keys.SCOPE_BYTES)

_replace = msgspec.structs.replace


class Older:
    """What stands in such a directory. `given`: tenants whose headers were given; `lost`: values that cannot be read, or
    that nothing leads to; `joins`: see `adds`."""

    def __init__(self, connection: Connection, identity: Identity, given: list[TenantKey]) -> None:
        self._connection, self._identity = connection, identity
        self.lost = 0
        self.joins: list[tuple[bytes, bytes]] = []
        self._parents: dict[bytes, tuple[bytes, int]] = {}  # of a record: the one before it, its first position
        self._begins: dict[bytes, tuple[bytes, ContentId]] = {}  # of a first record: its first message's id and content
        for key, value in self.values(keys.RECORD):
            record = decode_record(value)
            self._parents[key[1:]] = record.parent, record.first
            if not record.parent:
                self._begins[key[1:]] = record.ids[0], record.contents[0]
        self._owners: dict[bytes, bytes] = {}  # by a first message
        self._find_owners(given)
        self._digests: dict[bytes, bytes] = {}
        self._firsts: dict[bytes, bytes | None] = {}

    def values(self, letter: bytes) -> Iterator[tuple[bytes, bytes]]:
        last = bytes([letter[0] + 1])
        for row in self._connection.execute("SELECT key, tag, value FROM Cache WHERE key >= ? AND key < ?", (letter, last)):
            try:
                yield row[0], value_of(row)
            except Damaged:
                self.lost += 1

    def _find_owners(self, given: list[TenantKey]) -> None:
        scopes = {key[1 : 1 + HASH_BYTES] for letter in keys.OF_SCOPE for key, _ in self.values(letter)}
        tenants = {key[1 : 1 + HASH_BYTES] for key, _ in self.values(keys.CONVERSATION)} | scopes
        known = {tenant: TenantKey(tenant[: keys.SCOPE_BYTES] + tenant) for tenant in scopes}
        known.update((tenant[keys.SCOPE_BYTES :], tenant) for tenant in given)
        unproved = [known.get(tenant, TenantKey(_NOBODY + tenant)) for tenant in tenants | known.keys()]
        roots = {tenant[keys.SCOPE_BYTES :]: self._identity.root(tenant) for tenant in unproved}
        paged = {key[1 + HASH_BYTES :]: key[1 : 1 + HASH_BYTES] for key, _ in self.values(keys.CONVERSATION)}
        for first, content in self._begins.values():
            likely = paged.get(first[: keys.SCOPE_BYTES])
            tried = chain([roots[likely]] if likely else [], roots.values())
            found = (node for root in tried if (node := self._identity.child(root, content))[-HASH_BYTES:] == first)
            nobody = NodeId(_NOBODY + first[: keys.SCOPE_BYTES] + first)
            self._owners[first] = owner_of(next(found, nobody))

    # -- ids

    def _first(self, name: bytes) -> bytes | None:
        """The first message of the conversation of a record."""
        way: list[bytes] = []
        at = name
        while at in self._parents and at not in self._firsts and self._parents[at][0]:
            way.append(at)
            at = self._parents[at][0]
        first = self._firsts[at] if at in self._firsts else self._begins.get(at, (None,))[0]
        self._firsts.update(dict.fromkeys([*way, at], first))
        return first

    def owner(self, name: bytes) -> bytes | None:
        """Of a record; None: what it goes on from is lost."""
        first = self._first(name)
        return self._owners[first] if first is not None else None

    def conversations(self) -> dict[bytes, list[bytes]]:
        """The records by their owner, a parent before its child."""
        found: dict[bytes, list[bytes]] = {}
        for name in sorted(self._parents, key=lambda name: (self._parents[name][1], name)):
            owner = self.owner(name)
            if owner is not None:
                found.setdefault(owner, []).append(name)
            else:
                self.lost += 1
        return found

    def get(self, letter: bytes, name: bytes) -> bytes | None:
        try:
            return get_value(self._connection, letter + name)
        except Damaged:
            return None

    # -- values

    def record(self, name: bytes) -> Record | None:
        """As it is now, but for the references of its path's index."""
        data, owner = self.get(keys.RECORD, name), self.owner(name)
        if data is None or owner is None:
            return None
        record = decode_record(data)

        def new(old: bytes) -> bytes:
            return (self.owner(old) or owner) + old if old else b""

        sent, shared = record.sent, record.shared
        record = _replace(
            record, parent=new(record.parent), base=new(record.base), closed=new(record.closed), leaf=b"",
            ids=[NodeId(owner + i) for i in record.ids],
            sent=_replace(sent, above=new(sent.above)) if sent is not None else None,
            shared=_replace(shared, record=new(shared.record)) if shared is not None else None,
            elsewhere=[(at, new(other), there) for at, other, there in record.elsewhere],
            based=self._digests.get(record.base, b"") if record.based else b"",
        )  # fmt: skip
        self._digests[name] = state_digest(record)
        return record

    def adds(self, owner: bytes, names: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """All that a conversation has now; `joins` gets what its answers are found by."""
        made: dict[bytes, Record] = {}
        leaves: dict[bytes, bytes] = {}
        last: Record | None = None
        for name in names:
            record = self.record(name)
            if record is None or (record.parent and record.parent not in made):
                self.lost += 1
                continue
            (record,), blocks = indexed([record], made.get(record.parent), made.get, lambda _, ref: leaves.get(ref))
            if record.sent is not None and record.end > 1:
                answer, asked = islice(backwards(record, lambda node_id: self.record(node_id[-HASH_BYTES:])), 2)
                self.joins.append((self._identity.pair(owner, asked.content, answer.content), record.id))
            made[record.id] = record
            leaves.update(blocks)
            if record.closing and (root := table_root(record.closing)):
                blocks = {**blocks, **blocks_under(root, lambda ref: self.get(keys.BLOCK, ref))}
            yield from ((block_key(owner, ref), block) for ref, block in blocks.items())
            yield record_key(record.id), encode_record(record)
            for other in {owner_of(other) for other in record.others} - {owner}:
                yield from ((link, b"") for link in (link_key(owner, other), link_key(other, owner)))
            if last is None or _time_s(record) >= _time_s(last):
                last = record
        if last is not None:
            yield conversation_key(owner), LastUse(last.id, _time_s(last)).encode()

    def named(self) -> Iterator[tuple[bytes, bytes]]:
        """What leads to records by a name, and what was learned of models."""
        for letter in (keys.LABEL, keys.SESSION):
            for key, value in self.values(letter):
                names = [value[at : at + HASH_BYTES] for at in range(0, len(value), HASH_BYTES)]
                ids = [owner + name for name in names if (owner := self.owner(name)) and is_proved(owner)]
                if ids:
                    yield letter + ids[0][: keys.TENANT_BYTES] + key[1:], b"".join(ids)
        for letter in keys.OF_SCOPE:
            for key, value in self.values(letter):
                yield letter + key[1 : 1 + keys.SCOPE_BYTES] + key[1:], value


def is_proved(owner: bytes) -> bool:
    return not owner.startswith(_NOBODY)


def _time_s(record: Record) -> int:
    return record.answered_s or record.seen_s


def convert(directory: Path, to: str, headers: Sequence[str], users: Sequence[str], as_json: bool) -> int:
    """Raises ConfigError and StorageError."""
    if (version := format_of(directory)) != OLDER:
        raise StorageError(f"{directory} has format {version}, which no command of this llm-pager converts.")
    try:
        with closing(connect(directory, _LOCK_WAIT_S)) as connection:
            return asyncio.run(_convert(connection, to, headers, users, as_json))
    except (OSError, Failure) as error:
        raise StorageError(f"{directory} cannot be read: {error}.") from error


async def _convert(connection: Connection, to: str, of_headers: Sequence[str], of_users: Sequence[str], as_json: bool) -> int:
    if (secret := get_value(connection, SECRET)) is None:
        raise StorageError("The storage has lost its secret: nothing in it can be found any more.")
    identity = Identity(secret)
    headers, users = headers_of(of_headers), lines_of("--user", of_users)
    named = [[], *([("user", user)] for user in users)]
    callers = [caller_of(headers, fields, SessionsConfig()) for fields in named] if of_headers or users else []
    given = [identity.tenant(who.credentials, who.person) for who in callers]
    older = await asyncio.to_thread(Older, connection, identity, given)
    target = await opened_target(to, secret)
    try:
        conversations, unclaimed = older.conversations(), list[bytes]()
        await target.commit([so_far(b"")])
        with progress("conversations", not as_json) as advance:
            for number, (owner, names) in enumerate(conversations.items()):
                if is_proved(owner):
                    for batch in batches(older.adds(owner, names)):
                        await target.commit((), adds=batch)
                    await target.commit((), joins=older.joins)
                    older.joins.clear()
                else:
                    unclaimed.append(owner)
                advance(number + 1, len(conversations))
        for batch in batches(older.named()):
            await target.commit((), adds=batch)
        if unclaimed:
            beside = Path(to) if Path(to).is_dir() else Path()
            with whole_file(str(beside / UNCLAIMED)) as out:
                out.write(header(unclaimed, int(time.time())))
                for owner in unclaimed:
                    out.writelines(_exported(older, identity, owner, conversations[owner]))
        await target.commit([(MIGRATING, WHOLE)])
    finally:
        await target.close()
    carried = len(conversations) - len(unclaimed)
    if as_json:
        tell_json({"conversations": carried, "unclaimed": len(unclaimed), "lost": older.lost})
    else:
        print(f"converted  {carried} conversations, with their windows, sessions and bills")
        if older.lost:
            print(f"left out   {older.lost} values that cannot be read", file=sys.stderr)
        if unclaimed:
            print(f"unclaimed  {len(unclaimed)} conversations of clients that are not known are in {beside / UNCLAIMED}: begin again\n"
                  "           with an empty TO and their --header and --user, or give them to llm-pager import")  # fmt: skip
    return LEFT_OUT if unclaimed or older.lost else DONE


def _exported(older: Older, identity: Identity, owner: bytes, names: list[bytes]) -> Iterator[bytes]:
    """The lines of a conversation."""
    rows = dict(older.adds(owner, names))
    order = sorted(rows)

    def scan(prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        return [(key, rows[key]) for key in order if key.startswith(prefix) and key > after][:limit]

    def get(key: bytes) -> bytes | None:
        if key in rows or not key.startswith(keys.RECORD):
            return rows.get(key)
        other = older.record(key[-HASH_BYTES:])  # of another conversation
        return encode_record(other) if other is not None else None

    return exported(owner, scan, get, identity, [])
