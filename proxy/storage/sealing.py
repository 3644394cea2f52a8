"""Values sealed at rest, with a key for each tenant; the keys, in a store of their own.

A value is compressed and sealed (AES-256-GCM) with its tenant's key; the key that it is stored under is authenticated
with it. Tenants' keys are random, wrapped with the operator's master key, and stand in the `Keyring`, which is no part of
a backup of the values: whose key is dropped can be read by nobody any more, wherever copies of the values are.

    sealed     SEALED (4 bytes), key's id (8), nonce (12), AES-256-GCM of what `packed` makes of the value (16 more)
    key row    b"K" + tenant -> versions, newest first: [id, the master key's id, when (Unix time), nonce + wrapped key]

Promises:
- `Sealed` is a store like the one around which it is: what comes back is what was stored. What was changed, or stands
  under another key, is `Damaged`; a value whose key was dropped is a miss, and is stored anew by the next commit of it.
- Nothing is stored under a key that is not durable first. Wrong or missing keys are a StorageError at the start, and
  are never made anew over those that there are.
- What stands unsealed was stored before the store was sealed, and is read until all of it has been sealed.

Not sealed: what a row is named by and the sets and heads of ids that engines join and read (`keys.IDS_ONLY`: keyed hashes), and
the engine's own rows (str keys: its secret, its counters).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from proxy.errors import ConfigError, StorageError
from proxy.keys import IDS_ONLY, sealer
from proxy.storage.sqlite import MARK, SEALED, Damaged, Damages, Key, packed, unpacked

if TYPE_CHECKING:
    from proxy.config import Config
    from proxy.storage import Store
    from proxy.storage.tiered import Tiered

MASTER_BYTES = 32
_INSTALLATION = b""  # the owner of the key that seals it
_KEY = b"K"  # + owner: its keys
_UNSEALED = b"U"  # a row beside them: some values may stand unsealed
KEY_TABLES = "llm_pager_keys"  # of those in PostgreSQL: a dump can leave them out
_REWRITTEN = b"R"  # up to which key the values have been sealed again
_NONCE_BYTES = 12
_HEAD_BYTES = len(SEALED) + 8
_AT_ONCE_BYTES = 65_536  # more is sealed in a thread: 0.4 ms
_CHECK_S = 1.0  # between two looks whether the key store is still there
_JUST_S = 0.001  # a commit of then proves that a store can be written
_AT_ONCE = 500  # owners or values of one commit of a rotation


class Version(NamedTuple):
    """One of an owner's keys."""

    id: bytes
    master: bytes  # the id of the one that wraps it
    made_s: int
    wrapped: bytes


_NO_KEYS: dict[bytes, AESGCM] = {}
_encode_row = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(list[Version]).decode


def read_masters(keys: Sequence[str]) -> list[bytes]:
    """The master keys that `storage.encryption.keys` names, newest first. Raises ConfigError, which shows none."""
    found = []
    for at, text in enumerate(keys):
        name = f"storage.encryption.keys[{at}]"
        if text.startswith("file:"):
            path = text.removeprefix("file:")
            try:
                text = Path(path).expanduser().read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{name}: the file {path} cannot be read: {error}.") from None
            name += f" (in {path})"
        try:
            key = base64.b64decode(text, validate=True)
        except binascii.Error:
            key = b""
        if len(key) != MASTER_BYTES:
            raise ConfigError(f"{name} must be 32 bytes in base64, as `openssl rand -base64 32` makes them.")
        found.append(key)
    return found


def _named(random: bytes) -> bytes:
    """An id that tells damage from another one."""
    return random + sha256(b"llm-pager key" + random).digest()[:4]


class Keyring:
    """The owners' keys in a store, wrapped with the first of the `masters`; what was read is kept for `kept_s` seconds, of
    `kept` owners. From any thread."""

    def __init__(self, store: Store, masters: Sequence[bytes], kept: int, kept_s: float) -> None:
        self.store = store
        self._masters = {sha256(b"llm-pager master" + key).digest()[:4]: AESGCM(key) for key in masters}
        self.master = next(iter(self._masters))  # the id of the newest
        self._kept = dict[bytes, tuple[float, dict[bytes, AESGCM]]]()  # owner -> until when, its keys; oldest first
        self._most_kept, self._kept_s = kept, kept_s
        self._forgotten = 0  # how many times
        self._lock = threading.Lock()

    def newest(self, owner: bytes) -> tuple[bytes, AESGCM] | None:
        """The id and the cipher for what an owner stores now; None: it has no key."""
        return next(iter(self._keys(owner).items()), None)

    def find(self, owner: bytes, key_id: bytes) -> AESGCM | None:
        """None: it was dropped, or never was."""
        return self._keys(owner).get(key_id) or self._keys(owner, anew=True).get(key_id)

    def _keys(self, owner: bytes, anew: bool = False) -> dict[bytes, AESGCM]:
        until_s, found = self._kept.get(owner, (0.0, _NO_KEYS))
        now_s = time.monotonic()
        if anew or now_s > until_s:
            forgotten, row = self._forgotten, self.store.get(_KEY + owner)
            found = {version.id: AESGCM(self._unwrapped(owner, version)) for version in _decode_row(row or b"\x90")}
            with self._lock:
                self._kept.pop(owner, None)
                if found and forgotten == self._forgotten:  # what was read before that may have been dropped since
                    self._kept[owner] = now_s + self._kept_s, found
                if len(self._kept) > self._most_kept:
                    del self._kept[next(iter(self._kept))]
        return found

    async def make(self, owners: Iterable[bytes]) -> None:
        """Each has a key from now on; of several processes that make one for the same owner the first is heard."""
        now_s = time.monotonic()
        missing = [owner for owner in owners if now_s > self._kept.get(owner, (0.0, _NO_KEYS))[0]]
        missing = [owner for owner in missing if not await asyncio.to_thread(self._keys, owner)]
        if missing:
            now_s = int(time.time())
            await self.store.commit((), adds=[(_KEY + owner, _encode_row([self._made(owner, now_s)])) for owner in missing])
            for owner in missing:
                await asyncio.to_thread(self._keys, owner, True)

    async def drop(self, owner: bytes) -> None:
        """All keys of a tenant, or of a credential with those of its tenants."""
        assert owner, "the installation's key is nobody's to drop"
        await self.store.commit((), drops=[_KEY + owner])
        self.forget()

    def forget(self) -> None:
        """Other processes dropped keys, or made new ones."""
        with self._lock:
            self._kept.clear()
            self._forgotten += 1

    # -- rotation

    def pages(self) -> Iterator[list[tuple[bytes, bytes, list[Version]]]]:
        """Every owner, its row and what it says."""
        after = b""
        while found := self.store.scan(_KEY, after, _AT_ONCE):
            yield [(key[len(_KEY) :], row, _decode_row(row)) for key, row in found]
            after = found[-1][0]

    async def rotate(self) -> int:
        """Wrap all keys with the newest master key, and give each owner a new one for what it stores from now on.
        Returns how many owners. What is made, changed or dropped meanwhile stays so."""
        began_s, done = int(time.time()), 0
        await self.store.commit((), drops=[_REWRITTEN])  # that was for the keys before
        for installation in (False, True):  # the last: who can open its key can open all
            changed = True
            while changed:
                changed = False
                for page in self.pages():
                    swaps = []
                    for owner, row, versions in page:
                        stale = versions[0].made_s <= began_s or any(version.master != self.master for version in versions)
                        if (owner == _INSTALLATION) is installation and stale:
                            again = [self._wrapped(owner, v.id, v.made_s, self._unwrapped(owner, v)) for v in versions]
                            swaps.append((_KEY + owner, row, _encode_row([self._made(owner, began_s + 1), *again])))
                    if swaps:
                        changed = True
                        done += len(await self.store.swap(swaps))
        self.forget()
        return done

    # -- wrapping

    def _made(self, owner: bytes, made_s: int) -> Version:
        return self._wrapped(owner, _named(os.urandom(4)), made_s, AESGCM.generate_key(256))

    def _wrapped(self, owner: bytes, key_id: bytes, made_s: int, key: bytes) -> Version:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._masters[self.master].encrypt(nonce, key, _KEY + owner + key_id)
        return Version(key_id, self.master, made_s, nonce + sealed)

    def _unwrapped(self, owner: bytes, version: Version) -> bytes:
        master = self._masters.get(version.master)
        if master is None:
            raise StorageError(
                f"The tenants' keys are wrapped with the master key {version.master.hex()}, which is not in "
                "storage.encryption.keys: put it back there."
            )
        nonce, sealed = version.wrapped[:_NONCE_BYTES], version.wrapped[_NONCE_BYTES:]
        try:
            return master.decrypt(nonce, sealed, _KEY + owner + version.id)
        except InvalidTag:
            raise Damaged("A tenant's key is not what was stored in the key store.") from None


def sealed(inner: Tiered, config: Config) -> Sealed:
    """As `storage.encryption` says. Raises ConfigError and StorageError."""
    encryption = config.storage.encryption
    ring = Keyring(key_store(config), read_masters(encryption.keys), encryption.cache_keys, encryption.cache_s)
    return Sealed(inner, ring)


def key_store(config: Config) -> Store:
    """Where the tenants' keys stand. Raises ConfigError and StorageError."""
    from proxy.storage import open_engine

    named, l2 = config.storage.encryption.key_store, config.tiers.l2
    if named is None and l2.url is not None:
        return open_engine(config.tiers.l2, KEY_TABLES)
    is_url = named is not None and "://" in named
    there = {"url": named} if is_url else {"url": None, "path": Path(named or l2.path / "keys").expanduser()}
    return open_engine(l2.model_copy(update={**there, "durability": "power"}))


class Sealed:
    """The store `inner`, sealed."""

    def __init__(self, inner: Tiered, ring: Keyring) -> None:
        self.inner, self.ring = inner, ring
        self._unsealed = True  # of the values some may be
        self._marked: tuple[int, int] | None = None  # the generations that are known to belong together
        self._known_erased = inner.erased
        self._checked_s = -inf
        self._dropped = False  # keys, that may still stand in free pages of the key store
        self._damaged = Damages()
        try:
            if self.trouble is None:  # else before the first commit
                self._verify()
        except StorageError:
            if self.trouble is None:
                raise

    def _verify(self) -> None:
        """Raises StorageError where the values are not sealed with keys of this key store."""
        stored, sound, ours = True, False, self.ring.newest(_INSTALLATION) is not None
        with suppress(Damaged):  # a mark that is damaged is stored again
            mark = self.inner.get(MARK)
            stored = mark is not None
            sound = mark is not None and ours and self.unseal(_INSTALLATION, MARK.encode(), mark) is not None
            ours = sound or not stored
        if not ours:
            raise StorageError(
                f"The storage in {self.inner.where} is encrypted, and its keys are not in the key store {self.ring.store.where}: "
                "restore that one, or set tiers.l2 to another storage to begin anew."
            )
        if stored:
            self._unsealed = self.ring.store.get(_UNSEALED) is not None
        if sound:
            self._marked = self._generations

    @property
    def _generations(self) -> tuple[int, int]:
        return self.inner.generation, self.ring.store.generation

    # -- reading

    def get(self, key: Key) -> bytes | None:
        """As the inner store's; None, too, for a value whose key was dropped."""
        value = self.inner.get(key)
        return value if value is None or isinstance(key, str) else self.opened(key, value)

    def scan(self, prefix: bytes, after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, bytes]]:
        """As the inner store's, which is at its end when nothing is found."""
        while rows := self.inner.scan(prefix, after, limit):
            found = []
            for key, value in rows:
                with suppress(Damaged):
                    opened = self.opened(key, value)
                    if opened is not None:
                        found.append((key, opened))
            if found:
                return found
            after = rows[-1][0]
        return []

    def opened(self, key: bytes, value: bytes) -> bytes | None:
        """A value as the inner store has it; as `unseal`."""
        return value if key[:1] in IDS_ONLY else self.unseal(sealer(key), key, value)

    def unseal(self, tenant: bytes, name: bytes, value: bytes) -> bytes | None:
        """What was sealed under a name; None where its key was dropped. Raises Damaged; StorageError where the
        keys cannot be read."""
        if not value.startswith(SEALED):
            if self._unsealed:
                return value
            raise self._met_damage("it is not sealed")
        key_id, nonce = value[len(SEALED) : _HEAD_BYTES], value[_HEAD_BYTES : _HEAD_BYTES + _NONCE_BYTES]
        self._look()
        cipher = self.ring.find(tenant, key_id)
        if cipher is None:
            if _named(key_id[:4]) != key_id:
                raise self._met_damage("there is no such key")
            return None
        try:
            return unpacked(cipher.decrypt(nonce, value[_HEAD_BYTES + _NONCE_BYTES :], name))
        except (InvalidTag, ValueError):
            raise self._met_damage("it is not what was stored there") from None

    def _look(self) -> None:
        """Erasures drop keys."""
        if self._known_erased != self.inner.erased:
            self._known_erased = self.inner.erased
            self.ring.forget()

    def _met_damage(self, why: str) -> Damaged:
        return self._damaged.met("sealed value", f"A value in {self.inner.where} is damaged: {why}.")

    # -- writing

    async def commit(
        self, puts: Sequence[tuple[Key, bytes]], joins: Sequence[tuple[bytes, bytes]] = (),
        adds: Sequence[tuple[bytes, bytes]] = (), secret: bytes | None = None, erased: int | None = None,
        drops: Sequence[bytes] = (), leaves: Sequence[tuple[bytes, bytes]] = (), erases: bool = False,
    ) -> frozenset[bytes]:  # fmt: skip
        """As the inner store's."""
        self._look()
        tenants, size = set[bytes](), 0
        for key, value in (*puts, *adds):
            if isinstance(key, bytes) and key[:1] not in IDS_ONLY:
                tenants.add(sealer(key))
                size += len(value)
        if not tenants:
            return await self.inner.commit(puts, joins, adds, secret, erased, drops, leaves, erases)
        if (now_s := time.monotonic()) - self._checked_s > _CHECK_S:  # no longer are keys in use that were deleted under us
            await self.ring.store.check(inf)
            self._checked_s = now_s
        marks, generations = () if self._marked == self._generations else await self._marks(), self._generations
        await self.ring.make(tenants)
        work = partial(self._sealed, puts), partial(self._sealed, adds)
        large = size > _AT_ONCE_BYTES
        sealed_puts, sealed_adds = [await asyncio.to_thread(part) if large else part() for part in work]
        sealed_puts += marks
        try:
            there = await self.inner.commit(sealed_puts, joins, sealed_adds, secret, erased, drops, leaves, erases)
        except StorageError:
            self._checked_s = -inf  # what became of this one may have become of the other
            raise
        self._marked = generations
        if there and (lost := await asyncio.to_thread(self._lost, there)):  # what stands there is nothing
            await self.inner.commit([row for row in sealed_adds if row[0] in lost], secret=secret, erased=erased)
            there -= lost
        return there

    async def _marks(self) -> Sequence[tuple[Key, bytes]]:
        """What is stored with the first sealed values of a store."""
        await self.inner.check(_JUST_S)  # what was deleted could still be read
        self.ring.forget()
        await asyncio.to_thread(self._verify)
        if self._marked == self._generations:
            return ()
        await self.ring.make([_INSTALLATION])
        self._unsealed = bool(await asyncio.to_thread(self.inner.scan, b"", b"", 1))
        if self._unsealed:
            await self.ring.store.commit([(_UNSEALED, b"")])
        else:
            await self.ring.store.commit((), drops=[_UNSEALED])
        return [(MARK, self._seal(self._newest(_INSTALLATION), MARK.encode(), b""))]

    def _lost(self, keys: Collection[bytes]) -> frozenset[bytes]:
        """Of the keys those whose values cannot be read any more."""
        lost = set()
        for key in keys:
            try:
                if self.get(key) is None:
                    lost.add(key)
            except Damaged:
                lost.add(key)
        return frozenset(lost)

    def _sealed(self, rows: Sequence[tuple[Any, bytes]]) -> list[tuple[Any, bytes]]:
        newest = dict[bytes, tuple[bytes, AESGCM]]()
        made = []
        for key, value in rows:
            if isinstance(key, bytes) and key[:1] not in IDS_ONLY:
                tenant = sealer(key)
                value = self._seal(newest.get(tenant) or newest.setdefault(tenant, self._newest(tenant)), key, value)
            made.append((key, value))
        return made

    def _newest(self, tenant: bytes) -> tuple[bytes, AESGCM]:
        newest = self.ring.newest(tenant)
        if newest is None:
            raise StorageError("The key of a tenant was dropped meanwhile: what it was to seal is not stored.")
        return newest

    @staticmethod
    def _seal(newest: tuple[bytes, AESGCM], name: bytes, value: bytes) -> bytes:
        key_id, cipher = newest
        nonce = os.urandom(_NONCE_BYTES)
        return b"".join((SEALED, key_id, nonce, cipher.encrypt(nonce, packed(value), name)))

    async def drop_key(self, owner: bytes) -> None:
        """Of a tenant, or of a credential with all of its tenants: what was sealed for them, here and in every copy, is
        read by nobody any more. Before they are dropped from here: a turn that begins behind that has a new key."""
        await self.ring.drop(owner)
        self._dropped = True

    async def scrub(self) -> None:
        await self.inner.scrub()
        if self._dropped:
            await self.ring.store.scrub()
            self._dropped = False

    # -- sealing again

    def state(self, key: bytes, value: bytes) -> str:
        """Of a value as the inner store has it."""
        if key[:1] in IDS_ONLY:
            return "ids"
        if not value.startswith(SEALED):
            return "unsealed"
        key_id, newest = value[len(SEALED) : _HEAD_BYTES], self.ring.newest(sealer(key))
        if newest is not None and newest[0] == key_id:
            return "newest"
        return "older" if self.ring.find(sealer(key), key_id) is not None else "lost"

    async def rewrite(self) -> AsyncIterator[tuple[int, int]]:
        """Seal with its tenant's newest key what is not yet; yields how many values were looked at and sealed. Goes on
        where the last one was stopped. What is replaced or dropped meanwhile stays so."""
        await self.ring.store.check()
        if self._marked != self._generations and (marks := await self._marks()):
            await self.inner.commit(marks)
        after, looked, done = self.ring.store.get(_REWRITTEN) or b"", 0, 0
        while rows := self.inner.scan(b"", after, _AT_ONCE):
            states = [(key, value, self.state(key, value)) for key, value in rows]
            await self.ring.make({sealer(key) for key, _, state in states if state == "unsealed"})
            swaps = []
            for key, value, state in states:
                if state in ("unsealed", "older"):
                    with suppress(Damaged):
                        opened = self.unseal(sealer(key), key, value)
                        if opened is not None:
                            swaps.append((key, value, self._seal(self._newest(sealer(key)), key, opened)))
            if swaps:
                done += len(await self.inner.swap(swaps))
            looked, after = looked + len(rows), rows[-1][0]
            await self.ring.store.commit([(_REWRITTEN, after)])
            yield looked, done
        await self.inner.scrub()
        await self.ring.store.commit((), drops=[_REWRITTEN, _UNSEALED])

    # -- all else is the inner store's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def suspends(self) -> bool:
        return self.inner.suspends or self.ring.store.suspends

    async def check(self, proved_s: float = 0.0) -> None:
        await self.inner.check(proved_s)
        await self.ring.store.check(inf if self.ring.store.trouble is None else proved_s)

    async def close(self) -> None:
        await self.inner.close()
        await self.ring.store.close()

    @property
    def trouble(self) -> str | None:
        return self.inner.trouble or self.ring.store.trouble

    @property
    def damaged(self) -> Mapping[str, int]:
        return {**self.inner.damaged, **self._damaged}
