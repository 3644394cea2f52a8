"""Bytes by name in an object store: a directory, `file://`, `s3://`, `gs://`, `az://`. What L3 and L4 are made of.

Promises: an object is there whole or not at all, and durable when `put` returns, also against a loss of power where
it is a file; all objects of a conversation, of a tenant or of a credential stand under one prefix, so that they can
be listed and deleted. A store that does not answer is asked again only after a while: those in between fail
at once. Every failure is a `StorageError` of one sentence, at the start a `ConfigError`. All is synchronous, for a
thread; no secret of the options is ever said.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from proxy.errors import ConfigError, StorageError

_CONNECT_S = 5.0
_RETRIES = 2  # of one call, within its time
_DOWN_S = 5.0  # between two calls of a store that does not answer
_LISTED_AT_ONCE = 1000
_FAILURES = (BaseError, OSError, ValueError)

log = logging.getLogger(__name__)
_T = TypeVar("_T")


def owner_path(owner: bytes) -> str:
    """The folder of an owner: of a credential (6 bytes), of a tenant (12) or of a conversation (18)."""
    return "/".join(owner[at : at + 6].hex() for at in range(0, len(owner), 6))


class Objects:
    """One store. `name`: its setting, for people; `options`: the provider's own names (endpoint, region, ...), over
    what its environment variables say; `timeout_s`: of one call."""

    def __init__(self, url: str, options: Mapping[str, str], timeout_s: float, name: str) -> None:
        self.url, self._name = _plain(url), name
        self.trouble: str | None = None  # why it does not answer, as far as is known
        self._again_s = 0.0
        self._directory = _directory(url)
        self._store: Any = None
        if self._directory is None:
            client = {"timeout": timedelta(seconds=timeout_s), "connect_timeout": timedelta(seconds=min(_CONNECT_S, timeout_s)),
                      "allow_http": True}  # fmt: skip  # the endpoint says which
            retries = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=timeout_s)}
            try:
                self._store = from_url(url, config=dict(options) or None, client_options=client, retry_config=retries)  # type: ignore[call-overload]
            except _FAILURES as error:
                raise ConfigError(f"{name}.url: {self.url} cannot be used: {_first_line(error)}.") from error

    def put(self, name: str, data: bytes) -> None:
        """Store, or replace."""

        def work() -> None:
            obstore.put(self._opened(), name, data)
            if self._directory is not None:
                _sync(self._directory, name)

        self._asked(f"write {name}", work)

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """The object's bytes from `start` up to `end`, fewer where it is shorter; None: it is not there."""

        def work() -> bytes:
            if end is None:
                return bytes(obstore.get(self._opened(), name).bytes())
            return bytes(obstore.get_range(self._opened(), name, start=start, end=end))

        return self._asked(f"read {name}", work)

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """All objects under a folder, in no order, with their sizes in bytes."""

        def stream() -> Any:
            return iter(obstore.list(self._opened(), prefix or None, chunk_size=_LISTED_AT_ONCE))

        listed = self._asked("list its objects", stream)
        while listed is not None:
            chunk = self._asked("list its objects", lambda: next(listed, None))
            if chunk is None:
                return
            yield from ((meta["path"], meta["size"]) for meta in chunk)

    def delete(self, names: Sequence[str]) -> None:
        """Those that are not there are deleted already."""

        def work() -> None:
            try:
                obstore.delete(self._opened(), list(names))
            except FileNotFoundError:  # but on S3 and Azure it ends the others' deletion
                for name in names:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._opened(), name)

        if names:
            self._asked("delete objects", work)

    async def drop(self, owner: bytes) -> list[str]:
        """Delete all objects of a conversation, a tenant or a credential (`keys.owner`), and what a kill left of
        others; their names. Idempotent."""
        return await asyncio.to_thread(self._drop, owner_path(owner))

    def _drop(self, folder: str) -> list[str]:
        names = [name for name, _ in self.names(folder)]
        for at in range(0, len(names), _LISTED_AT_ONCE):
            self.delete(names[at : at + _LISTED_AT_ONCE])
        if self._directory is not None:  # with files that are half written, which no list names
            self._asked(f"delete {folder}", lambda: shutil.rmtree(self._directory / folder))  # type: ignore[operator]
        return names

    # -- asking

    def _opened(self) -> Any:
        if self._store is None:
            assert self._directory is not None
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._store = LocalStore(self._directory)
        return self._store

    def _asked(self, what: str, work: Callable[[], _T]) -> _T | None:
        """What `work` returns; None for what is not there. Raises StorageError."""
        if self.trouble is not None and time.monotonic() < self._again_s:
            raise StorageError(self.trouble)
        try:
            found: _T | None = work()
        except FileNotFoundError:
            found = None
        except _FAILURES as error:
            trouble = f"Cannot {what} in {self.url} ({self._name}.url): {_first_line(error)}."
            if self.trouble is None:
                log.error("%s What is there cannot be read or written until it answers.", trouble)
            self.trouble, self._again_s = trouble, time.monotonic() + _DOWN_S
            raise StorageError(trouble) from error
        if self.trouble is not None:
            log.warning("The object store %s answers again.", self.url)
            self.trouble = None
        return found


def _directory(url: str) -> Path | None:
    """Of a plain path or a file:// URL."""
    if "://" not in url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _plain(url: str) -> str:
    """Without credentials, to be told."""
    scheme, found, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if found else url


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _sync(directory: Path, name: str) -> None:
    """The file, and the folders that it is found by: what stood above it is dropped next."""
    path = directory / name
    for part in (path, *path.parents):
        with suppress(PermissionError):  # a folder that may be written and not read
            handle = os.open(part, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        if part == directory:
            return
