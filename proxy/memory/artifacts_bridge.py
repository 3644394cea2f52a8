"""Pages as artifacts: stored whole, found by content, gathered in checkpoints.

Promises: the same page gives the same artifact id, wherever and whenever it is stored; what is
loaded equals what was stored, content to the last character (invariant 4); an artifact that was
changed or cut is an `ArtifactError`, one that is not there is None; no name of a caller's becomes
part of a storage key. Where a page lives (`storage_tier`, `artifact_id`) is not part of the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Protocol

from proxy.memory.models import MemoryPage, StorageTier

FORMAT = 1  # of the bytes; a reader refuses what it does not know
_ID = re.compile(r"(page|checkpoint)_[0-9a-f]{40}")
_HERE = {"storage_tier", "artifact_id"}  # a page's place is its table entry's to say
_UNREADABLE = (ValueError, TypeError, LookupError, RecursionError)


class ArtifactError(Exception):
    """An artifact that cannot be stored or read; the message is one sentence."""


class Backend(Protocol):
    """Where artifacts are kept: bytes by key. Keys are `[a-z0-9_]`, at most 64 characters."""

    async def put(self, key: str, data: bytes) -> None:
        """Store durably; a key that exists has these bytes already."""
        ...

    async def get(self, key: str) -> bytes | None:
        """The bytes, or None."""
        ...

    async def delete(self, key: str) -> bool:
        """True when there was something to delete."""
        ...


class InMemoryBackend:
    """Artifacts in a dict, for tests and short-lived programs."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    async def put(self, key: str, data: bytes) -> None:
        self._data.setdefault(key, data)

    async def get(self, key: str) -> bytes | None:
        return self._data.get(key)

    async def delete(self, key: str) -> bool:
        return self._data.pop(key, None) is not None


def encode_page(page: MemoryPage) -> bytes:
    """The page as versioned JSON (ASCII); ArtifactError for content that would come back changed."""
    fields = page.model_dump(exclude=_HERE)
    fields |= {"content": page.content, "metadata": page.metadata}
    try:
        data = _encode("page", fields)
        exact = _decode("page", data) == fields
    except _UNREADABLE as error:
        raise ArtifactError(f"A page cannot be stored exactly: {error}.") from error
    if not exact:
        raise ArtifactError(f"The content of {page.page_id} cannot be stored exactly as JSON.")
    return data


def decode_page(data: bytes) -> MemoryPage:
    """The page that `encode_page` was given, with the defaults for its place."""
    try:
        return MemoryPage.model_validate(_decode("page", data))
    except _UNREADABLE as error:
        raise ArtifactError(f"An artifact holds no page: {type(error).__name__}.") from error


class ArtifactsBridge:
    """Stores pages and checkpoints in a backend (default: memory)."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend: Backend = InMemoryBackend() if backend is None else backend

    async def store_page(self, page: MemoryPage) -> str:
        """The page's artifact id; durable on return."""
        return await self._put("page", encode_page(page))

    async def load_page(self, artifact_id: str) -> MemoryPage | None:
        """The page as it was stored, placed in L3; None for an artifact that is not there."""
        data = await self._get("page", artifact_id)
        if data is None:
            return None
        place = {"artifact_id": artifact_id, "storage_tier": StorageTier.L3}
        return decode_page(data).model_copy(update=place)

    async def delete(self, artifact_id: str) -> bool:
        """Drop one artifact; True when it was there. Checkpoints that list a page do not keep it."""
        return _ID.fullmatch(artifact_id) is not None and await self.backend.delete(artifact_id)

    async def checkpoint(self, pages: Iterable[MemoryPage], name: str) -> str:
        """Store the pages, then the checkpoint that lists them in their order; returns its id."""
        artifacts = [await self.store_page(page) for page in pages]
        listed = {"name": name, "artifact_ids": artifacts}
        return await self._put("checkpoint", _encode("checkpoint", listed))

    async def load_checkpoint(self, checkpoint_id: str) -> list[MemoryPage]:
        """The pages of a checkpoint in their order; ArtifactError when it or one of them is gone."""
        data = await self._get("checkpoint", checkpoint_id)
        if data is None:
            raise ArtifactError(f"There is no checkpoint {checkpoint_id!r}.")
        pages: list[MemoryPage] = []
        for artifact_id in _decode("checkpoint", data)["artifact_ids"]:
            page = await self.load_page(artifact_id)
            if page is None:
                raise ArtifactError(f"{checkpoint_id} lists {artifact_id}, which is not there.")
            pages.append(page)
        return pages

    async def _put(self, kind: str, data: bytes) -> str:
        artifact_id = _artifact_id(kind, data)
        await self.backend.put(artifact_id, data)
        return artifact_id

    async def _get(self, kind: str, artifact_id: str) -> bytes | None:
        """The bytes, checked against their name."""
        named = _ID.fullmatch(artifact_id)
        data = await self.backend.get(artifact_id) if named and named[1] == kind else None
        if data is not None and _artifact_id(kind, data) != artifact_id:
            raise ArtifactError(f"{artifact_id} is damaged: its bytes are not what was stored.")
        return data


def _artifact_id(kind: str, data: bytes) -> str:
    return f"{kind}_{blake2b(data, digest_size=20).hexdigest()}"


def _encode(kind: str, value: dict[str, Any]) -> bytes:
    made = json.dumps(
        {"format": FORMAT, kind: value}, separators=(",", ":"), sort_keys=True, allow_nan=False
    )
    return made.encode("ascii")


def _decode(kind: str, data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if value["format"] != FORMAT:
        raise ArtifactError(f"An artifact is not in format {FORMAT}, the only one known here.")
    found: dict[str, Any] = value[kind]
    return found
