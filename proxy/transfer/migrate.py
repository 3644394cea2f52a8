"""`llm-pager migrate FROM TO`: a whole store into another one, key by key, verbatim.

Promises: what reads the one reads the other: secret, ids, windows, sealed values are the same bytes, so the next requests
upstream are, too. A target that is another store, or that is whole already, is refused. It may be stopped and started again:
how far it came stands in the target, which no server opens before it is whole: when both were read at the end and compared,
value by value, and what differed was copied again. An older version's directory is converted (older.py).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from proxy import keys
from proxy.config import load_config
from proxy.errors import ConfigError, StorageError
from proxy.storage import MIGRATING, Engine, Store, open_engine
from proxy.storage.sqlite import DATABASE, FORMAT, MARK, format_of
from proxy.terminal import Advance, progress, tell_json
from proxy.transfer.desk import DONE, LEFT_OUT

WHOLE = b""
_AT_ONCE = 64  # values, which may be large
_PASSES = 5  # at most
_OWN = (MARK,)  # of a store's own values, which no scan has, those that belong to the others
_PATIENT_S = 60.0


def run(source: str, target: str, headers: Sequence[str], users: Sequence[str], as_json: bool) -> int:
    """`headers` and `users`: whose an older version's conversations may be. Raises ConfigError and StorageError."""
    directory = Path(source)
    if not is_url(source) and not (directory / DATABASE).exists():
        raise ConfigError(f"There is no storage in {source}.")
    if not is_url(source) and format_of(directory) != FORMAT:
        from proxy.transfer.older import convert

        return convert(directory, target, headers, users, as_json)
    return asyncio.run(_migrate(source, target, as_json))


async def _migrate(where: str, to: str, as_json: bool) -> int:
    source = engine_at(where)
    try:
        target = await opened_target(to, source.secret())
        try:
            copied = _Copy(source, target)
            with progress("values copied", not as_json) as advance:
                await copied.run(advance)
            await target.commit([(MIGRATING, WHOLE)])
        finally:
            await target.close()
    finally:
        await source.close()
    values, damaged = sum(copied.kinds.values()), sum(source.damaged.values())
    if as_json:
        tell_json({"values": values, "kinds": copied.kinds, "digest": copied.digest, "damaged": damaged})
        return LEFT_OUT if damaged else DONE
    kinds = ", ".join(f"{count} x {kind}" for kind, count in copied.kinds.most_common())
    print(f"verified   {values} values are the same on both sides: {kinds or 'none'}; digest {copied.digest}")
    if damaged:
        print(f"left out   {damaged} damaged values", file=sys.stderr)
    print(f"next       set {'tiers.l2.url' if is_url(to) else 'tiers.l2.path'} to TO, and start the servers")
    return LEFT_OUT if damaged else DONE


def is_url(where: str) -> bool:
    """Whether it is PostgreSQL's, and no directory."""
    return where.startswith(("postgresql://", "postgres://"))


def engine_at(where: str) -> Engine:
    """Raises ConfigError and StorageError."""
    flags = {"tiers.l2.url": where, "tiers.l2.timeout_s": _PATIENT_S} if is_url(where) else {"tiers.l2.path": where}
    engine = open_engine(load_config(Path(os.devnull), {}, flags).tiers.l2)
    if engine.trouble is not None:  # its secret is not known
        raise StorageError(engine.trouble)
    return engine


async def opened_target(where: str, secret: bytes) -> Engine:
    """An engine with this secret. Raises StorageError for one that has another and is not empty, or that is whole."""
    target = engine_at(where)
    try:
        empty = not await asyncio.to_thread(target.scan, b"", b"", 1)
        if empty and target.secret() != secret:
            await target.adopt(secret)
        if target.secret() != secret:
            raise StorageError(f"{target.where} holds another store: name an empty one.")
        if not empty and not target.get(MIGRATING):
            raise StorageError(f"{target.where} is whole, and may have been used since: name an empty one.")
    except BaseException:
        await target.close()
        raise
    return target


def so_far(after: bytes) -> tuple[str, bytes]:
    """What a target says of itself: all up to this key is there."""
    return MIGRATING, b"+" + after


class _Copy:
    """`kinds`: the values that were compared last; `digest`: of them."""

    def __init__(self, source: Store, target: Store) -> None:
        self._source, self._target = source, target
        self.kinds: Counter[str] = Counter()
        self.digest = ""

    async def run(self, advance: Advance) -> None:
        own = [(key, value) for key in _OWN if (value := self._source.get(key)) is not None]
        after = (self._target.get(MIGRATING) or WHOLE)[1:]
        await self._target.commit([*own, so_far(after)])
        await self._pass(after, True, advance)
        for _ in range(_PASSES):
            if not await self._pass(b"", False, advance):
                return
        raise StorageError("The source changes while it is copied: stop the servers that use it, and begin again.")

    async def _pass(self, after: bytes, first: bool, advance: Advance) -> int:
        """Make all behind a key the same; how many values were not."""
        changed, values, digest = 0, 0, blake2b(digest_size=16)
        self.kinds.clear()
        while True:
            here = dict(await asyncio.to_thread(self._source.scan, b"", after, _AT_ONCE))
            end = max(here, default=None)
            there = {} if first else await asyncio.to_thread(self._there, after, end)  # it is stored with how far it came
            puts = [(key, value) for key, value in here.items() if there.get(key) != value]
            drops = [key for key in there if key not in here]  # erased meanwhile
            if first or puts or drops:
                await self._target.commit([*puts, so_far(end or after)], drops=drops)
            changed += len(puts) + len(drops)
            for key, value in here.items():
                digest.update(len(key).to_bytes(4, "big") + key + len(value).to_bytes(8, "big") + value)
                self.kinds[keys.KINDS.get(key[:1], "other value")] += 1
            values += len(here)
            advance(values, None)
            if end is None:
                self.digest = digest.hexdigest()
                return changed
            after = end

    def _there(self, after: bytes, end: bytes | None) -> dict[bytes, bytes]:
        """The target's values behind a key, up to another (None: to the last)."""
        found: dict[bytes, bytes] = {}
        for key, value in keys.rows_of(self._target.scan, b"", _AT_ONCE, after):
            if end is not None and key > end:
                break
            found[key] = value
        return found
