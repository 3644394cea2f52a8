"""`llm-pager keys`: the keys of an encrypted storage, counted and rotated while servers run.

Promises: `list` changes nothing; `rotate` leaves every value readable whenever it is stopped, and the old master key can
go from the configuration when `list` names it no more; `rewrite` goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from proxy.storage.sealing import Sealed

_TOLD_S = 2.0  # between two lines of progress


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    keys = commands.add_parser("keys", help="the keys of an encrypted storage: list, rotate, rewrite")
    keys.add_argument("what", choices=("list", "rotate", "rewrite"),
                      help="count them | wrap all with the first of storage.encryption.keys, and give each tenant a new "
                           "one for what is stored from now on | encrypt again what is stored under older ones or not at all")  # fmt: skip
    keys.add_argument("--config", type=Path, metavar="FILE", help="instead of ./config.yaml, which may be absent")
    keys.add_argument("--values", action="store_true", help="list: count the stored values, too; reads all of them")
    keys.add_argument("--rewrite", action="store_true", help="rotate: and rewrite")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError and StorageError."""
    from proxy.config import load_config
    from proxy.conversation import keys
    from proxy.storage import open_store
    from proxy.storage.sealing import Sealed

    config = load_config(args.config, os.environ, {})
    if not config.storage.encryption.keys:
        raise ConfigError("storage.encryption.keys is empty: nothing is encrypted.")
    store = open_store(config, keys)
    assert isinstance(store, Sealed)
    return asyncio.run(_run(args, store))


async def _run(args: argparse.Namespace, store: Sealed) -> int:
    try:
        if store.trouble is not None:
            raise StorageError(store.trouble)
        if args.what == "rotate":
            print(f"rotated    {await store.ring.rotate()} owners' keys, with the master key {store.ring.master.hex()}")
        if args.what == "rewrite" or args.rewrite:
            await _rewrite(store)
        if args.what == "list":
            _list(store, args.values)
    finally:
        await store.close()
    return 0


def _list(store: Sealed, values: bool) -> None:
    owners, versions, masters = 0, 0, Counter[bytes]()
    for page in store.ring.pages():
        owners += len(page)
        versions += sum(len(row) for _, _, row in page)
        masters.update(version.master for _, _, row in page for version in row)
    print(f"owners     {owners} (tenants, credentials, the installation), with {versions} keys")
    for master, count in masters.items():
        place = "the first" if master == store.ring.master else "not the first: llm-pager keys rotate"
        print(f"master     {master.hex()} wraps {count} keys; it is {place}")
    if values:
        states, after = Counter[str](), b""
        while rows := store.inner.scan(b"", after):
            states.update(store.state(key, value) for key, value in rows)
            after = rows[-1][0]
        told = {"newest": "under their tenants' newest keys", "older": "under older ones", "unsealed": "not encrypted",
                "lost": "under keys that were dropped", "ids": "that are ids only"}  # fmt: skip
        for state, what in told.items():
            print(f"values     {states[state]} {what}")


async def _rewrite(store: Sealed) -> None:
    told_s, looked, done = time.monotonic(), 0, 0
    async for looked, done in store.rewrite():
        if time.monotonic() - told_s > _TOLD_S:
            told_s = time.monotonic()
            print(f"rewriting  {done} of {looked} values so far", flush=True)
    print(f"rewritten  {done} of {looked} values")
