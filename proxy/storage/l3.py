"""L3: artifacts as files, in a directory or behind any fsspec URL.

Promises: an artifact is there whole or not at all, also after a kill in the middle of its writing;
a key never changes its bytes (other bytes under it are a `StorageError`); a key is checked before
it becomes part of a path; work is done in threads, never in the event loop. Every failure is a
`StorageError` or, at the start, a `ConfigError` of one sentence.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any

import fsspec  # type: ignore[import-untyped, unused-ignore]

from proxy.errors import ConfigError
from proxy.storage.l2 import StorageError

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_TEMPORARY = "."  # begins the names of files that are not whole yet; no key begins with it
_WHOLE_FAILURES = (Exception,)  # each object store's client has its own


class ArtifactStore:
    """Bytes by key under one URL: a path, `file://`, `memory://`, `s3://`, ...

    `options` go to the file system (credentials, endpoint). ConfigError for a URL that nothing here
    can open.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            protocol = url.partition("://")[0]
            raise ConfigError(
                f"The artifact store {protocol}:// needs a package that is not installed ({error})."
            ) from error
        except ValueError as error:
            raise ConfigError(f"The artifact store's URL cannot be used: {error}.") from error
        self._root = str(root).rstrip("/")
        protocol = self._fs.protocol  # a name, or several
        self._local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    async def put(self, key: str, data: bytes) -> None:
        """Store; durable on return. Nothing happens when these bytes are there already."""
        await asyncio.to_thread(self._put, key, data)

    async def get(self, key: str) -> bytes | None:
        """The bytes, or None."""
        return await asyncio.to_thread(self._get, key)

    async def delete(self, key: str) -> bool:
        """True when there was something to delete."""
        return await asyncio.to_thread(self._delete, key)

    # -- for a check of them all

    def all(self) -> Iterator[tuple[str, bytes]]:
        """Every artifact, whole. Raises StorageError."""
        try:
            names = [PurePosixPath(path).name for path in self._fs.find(self._root)]
        except FileNotFoundError:
            return
        except _WHOLE_FAILURES as error:
            raise StorageError(f"The artifacts in {self._root} could not be listed: {error}.") from error
        for key in names:
            if _KEY.fullmatch(key) and (data := self._get(key)) is not None:
                yield key, data

    def drop(self, key: str) -> None:
        self._delete(key)

    # -- in a thread

    def _put(self, key: str, data: bytes) -> None:
        path, found = self._path(key), self._get(key)
        if found is None:
            try:
                if self._local:
                    found = _write_whole(path, data)
                else:  # object stores and memory show a file when its writing has ended
                    self._fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
                    self._fs.pipe_file(path, data)
            except _WHOLE_FAILURES as error:
                raise StorageError(f"The artifact {key} could not be written: {error}.") from error
        if found is not None and found != data:
            raise StorageError(f"The artifact {key} is there with other bytes; it was not changed.")

    def _get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            return bytes(self._fs.cat_file(path))
        except FileNotFoundError:
            return None
        except _WHOLE_FAILURES as error:
            raise StorageError(f"The artifact {key} could not be read: {error}.") from error

    def _delete(self, key: str) -> bool:
        path = self._path(key)
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return False
        except _WHOLE_FAILURES as error:
            raise StorageError(f"The artifact {key} could not be deleted: {error}.") from error
        return True

    def _path(self, key: str) -> str:
        """256 directories, so that none grows too large. ValueError for a key that is no name."""
        if _KEY.fullmatch(key) is None:
            raise ValueError(f"an artifact's key cannot be {key[:80]!r}")
        shard = blake2b(key.encode("ascii"), digest_size=1).hexdigest()
        return f"{self._root}/{shard}/{key}"


def _write_whole(path: str, data: bytes) -> bytes | None:
    """Write beside, then link into place; the bytes of another writer that was faster, if any."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    beside = os.path.join(folder, f"{_TEMPORARY}{name}.{secrets.token_hex(8)}")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)  # unlike a rename, this never replaces
        except FileExistsError:
            with open(path, "rb") as file:
                return file.read()
        except OSError:  # no hard links here: keys name their content, so replacing is harmless
            os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)
    return None
