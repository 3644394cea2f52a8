"""What the commands have in common: a store for a thread, whose the conversations are, a progress bar."""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from proxy.api.caller import caller_of
from proxy.config import Config, SessionsConfig
from proxy.conversation import keys
from proxy.conversation.tree import Identity, TenantKey
from proxy.errors import ConfigError, StorageError
from proxy.storage import Store, open_store
from proxy.storage.l2 import Damaged

DONE, LEFT_OUT = 0, 3  # exit statuses
_COMMIT_BYTES = 4 << 20  # about
Advance = Callable[[int, int | None], None]  # done so far, of how many


class Desk:
    """A store for one command's thread."""

    def __init__(self, store: Store, identity: Identity, loop: asyncio.AbstractEventLoop) -> None:
        self.store, self.identity = store, identity
        self._loop = loop
        self.stopped = threading.Event()

    def get(self, key: bytes) -> bytes | None:
        """The value; None also where it is damaged: the store says so in the log."""
        with suppress(Damaged):
            return self.store.get(key)
        return None

    def commit(self, **what: Any) -> frozenset[bytes]:
        """As the store's. Raises StorageError."""
        if self.stopped.is_set():
            raise KeyboardInterrupt
        done = asyncio.run_coroutine_threadsafe(self.store.commit(**what), self._loop)
        return done.result()


def with_store(config: Config, work: Callable[[Desk], int]) -> int:
    """Run it, in a thread beside the store's event loop."""

    async def main() -> int:
        store = open_store(config, keys)
        try:
            if store.trouble is not None:  # its secret is not known
                raise StorageError(store.trouble)
            store.look()
            desk = Desk(store, Identity(store.secret(), store.erased), asyncio.get_running_loop())
            try:
                return await asyncio.to_thread(work, desk)
            finally:
                desk.stopped.set()
        finally:
            await store.close()

    return asyncio.run(main())


def tenant_of(headers: Sequence[tuple[bytes, bytes]], fields: Sequence[tuple[str, str]], identity: Identity) -> TenantKey:
    """Whose requests have these headers, and these fields that name somebody."""
    who = caller_of(headers, fields, SessionsConfig())
    return identity.tenant(who.credentials, who.person)


def tenant_asked(args: argparse.Namespace, identity: Identity) -> TenantKey | None:
    """None: the arguments name nobody. Raises ConfigError."""
    fields = [(name, value) for name, _, value in (field.partition("=") for field in args.field)]
    fields += [("user", args.user)] if args.user is not None else []
    return tenant_of(headers_of(args.header), fields, identity) if args.header or fields else None


def headers_of(given: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Raises ConfigError."""
    headers: list[tuple[bytes, bytes]] = []
    for line in lines_of("--header", given):
        name, colon, value = line.partition(":")
        if not colon:
            raise ConfigError("--header has a name, a colon and a value, such as 'authorization: Bearer sk-...'.")
        headers.append((name.strip().lower().encode(), value.strip().encode()))
    return headers


def lines_of(option: str, given: Sequence[str]) -> list[str]:
    """What was given, or stands in the file that was: command lines can be read by others. Raises ConfigError."""
    lines: list[str] = []
    for text in given:
        try:
            lines += Path(text[1:]).read_text("utf-8").splitlines() if text.startswith("@") else [text]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option} {text}: the file cannot be read ({error}).") from error
    return list(filter(str.strip, lines))


def batches(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """For one commit each."""
    batch: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in rows:
        batch.append((key, value))
        size += len(value)
        if size > _COMMIT_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def progress(what: str, shown: bool) -> Iterator[Advance]:
    """A bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (shown and sys.stderr.isatty()), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
