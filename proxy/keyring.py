"""`llm-pager keys`: the keys of an encrypted storage, counted and rotated while servers run.

Promises: `list` changes nothing; `rotate` leaves every value readable whenever it is stopped, and the old master key can
go from the configuration when `list` names it no more; `rewrite` goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from proxy.config import Config
from proxy.errors import ConfigError
from proxy.storage import opened_store
from proxy.storage.sealing import Sealed
from proxy.terminal import progress, tell_json

_STATES = {
    "newest": "under their tenants' newest keys", "older": "under older ones", "unsealed": "not encrypted",
    "lost": "under keys that were dropped", "ids": "that are ids only",
}  # fmt: skip


def list_(config: Config, values: bool, as_json: bool) -> int:
    """Count the keys and, with `values`, what is stored under them. Raises ConfigError and StorageError."""

    async def work(store: Sealed) -> None:
        told = _counted(store, values, not as_json)
        if as_json:
            tell_json(told)
            return
        print(f"owners     {told['owners']} (tenants, credentials, the installation), with {told['keys']} keys")
        for master in told["masters"]:
            place = "the first" if master["first"] else "not the first: llm-pager keys rotate"
            print(f"master     {master['master']} wraps {master['keys']} keys; it is {place}")
        for state, count in told.get("values", {}).items():
            print(f"values     {count} {_STATES[state]}")

    return _with_keys(config, work)


def rotate(config: Config, rewrite: bool, as_json: bool) -> int:
    """Wrap all with the first master key, give each tenant a new one. Raises ConfigError and StorageError."""

    async def work(store: Sealed) -> None:
        told: dict[str, Any] = {"rotated": await store.ring.rotate(), "master": store.ring.master.hex()}
        if not as_json:
            print(f"rotated    {told['rotated']} owners' keys, with the master key {told['master']}", flush=True)
        if rewrite:
            told |= await _rewritten(store, as_json)
        if as_json:
            tell_json(told)

    return _with_keys(config, work)


def rewrite(config: Config, as_json: bool) -> int:
    """Encrypt again what is stored under older keys or not at all. Raises ConfigError and StorageError."""

    async def work(store: Sealed) -> None:
        told = await _rewritten(store, as_json)
        if as_json:
            tell_json(told)

    return _with_keys(config, work)


def _with_keys(config: Config, work: Callable[[Sealed], Awaitable[None]]) -> int:
    if not config.storage.encryption.keys:
        raise ConfigError("storage.encryption.keys is empty: nothing is encrypted.")

    async def main() -> int:
        async with opened_store(config) as store:
            assert isinstance(store, Sealed)
            await work(store)
        return 0

    return asyncio.run(main())


def _counted(store: Sealed, values: bool, shown: bool) -> dict[str, Any]:
    owners, versions, masters = 0, 0, Counter[bytes]()
    for page in store.ring.pages():
        owners += len(page)
        versions += sum(len(row) for _, _, row in page)
        masters.update(version.master for _, _, row in page for version in row)
    told: dict[str, Any] = {"owners": owners, "keys": versions, "masters": [
        {"master": master.hex(), "keys": count, "first": master == store.ring.master} for master, count in masters.items()
    ]}  # fmt: skip
    if values:
        states, after = Counter[str](), b""
        with progress("values", shown) as advance:
            while rows := store.inner.scan(b"", after):
                states.update(store.state(key, value) for key, value in rows)
                after = rows[-1][0]
                advance(states.total(), None)
        told["values"] = {state: states[state] for state in _STATES}
    return told


async def _rewritten(store: Sealed, as_json: bool) -> dict[str, int]:
    looked = done = 0
    with progress("values looked at", not as_json) as advance:
        async for now in store.rewrite():
            looked, done = now
            advance(looked, None)
    if not as_json:
        print(f"rewritten  {done} of {looked} values")
    return {"rewritten": done, "looked_at": looked}
