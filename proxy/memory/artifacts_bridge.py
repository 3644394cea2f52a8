"""Pages as artifacts: stored whole, found by content, gathered in checkpoints.

Promises: the same page gives the same artifact id, wherever and whenever it is stored; what is
loaded equals what was stored, content to the last character (invariant 4); an artifact that was
changed or cut is an `ArtifactError`, one that is not there is None; no name of a caller's becomes
part of a storage key. Where a page lives (`storage_tier`, `artifact_id`) is not part of the page.
"""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxy.memory.models import MemoryPage, StorageTier

FORMAT = 1  # of the bytes; a reader refuses what it does not know
MAX_NAME_CHARS = 200
MAX_MEMORY_BYTES = 1 << 30  # what an InMemoryBackend takes
_ID = re.compile(r"(page|checkpoint)_[0-9a-f]{40}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_HERE = {"storage_tier", "artifact_id"}  # a page's place is its table entry's to say
_BYTES_KEY = "llm-pager/base64"
_MAX_DEPTH = 100


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

    async def exists(self, key: str) -> bool: ...

    async def delete(self, key: str) -> bool:
        """True when there was something to delete."""
        ...

    async def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""
        ...


class InMemoryBackend:
    """Artifacts in a dict, for tests and short-lived programs; refuses more than `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_MEMORY_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._data: dict[str, bytes] = {}

    async def put(self, key: str, data: bytes) -> None:
        """Keep the bytes; what is there under the key stays."""
        if key in self._data:
            return
        if self._bytes + len(data) > self._max_bytes:
            raise ArtifactError(f"Memory for artifacts is full ({self._max_bytes} bytes).")
        self._data[key] = data
        self._bytes += len(data)

    async def get(self, key: str) -> bytes | None:
        """The bytes, or None."""
        return self._data.get(key)

    async def exists(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self._data

    async def delete(self, key: str) -> bool:
        """True when there was something to delete."""
        data = self._data.pop(key, None)
        self._bytes -= len(data or b"")
        return data is not None

    async def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""
        return sorted(key for key in self._data if key.startswith(prefix))


class Checkpoint(BaseModel):
    """Pages at one moment, in their order, as artifact ids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint_id: str
    name: str
    page_ids: list[str]
    artifact_ids: list[str]


class ArtifactStats(BaseModel):
    """What one bridge has done."""

    pages_stored: int = 0
    pages_loaded: int = 0
    checkpoints_stored: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    missing: int = Field(default=0, description="loads of artifacts that were not there")


def encode_page(page: MemoryPage) -> bytes:
    """The page as versioned JSON (ASCII); ArtifactError for content that JSON cannot say exactly."""
    fields = page.model_dump(mode="python", exclude=_HERE)
    fields |= {"modality": page.modality.value, "page_type": page.page_type.value}
    fields |= {"content": _plain(page.content), "metadata": _plain(page.metadata)}
    return _encode({"format": FORMAT, "page": fields})


def decode_page(data: bytes) -> MemoryPage:
    """The page that `encode_page` was given, with the defaults for its place."""
    fields = _decode(data, "page")
    try:
        restored = {key: _restored(fields[key]) for key in ("content", "metadata")}
        return MemoryPage.model_validate({**fields, **restored})
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ArtifactError(f"An artifact holds no page: {type(error).__name__}.") from error


class ArtifactsBridge:
    """Stores pages and checkpoints in a backend (default: memory)."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend: Backend = InMemoryBackend() if backend is None else backend
        self._stats = ArtifactStats()

    async def store_page(self, page: MemoryPage) -> str:
        """The page's artifact id; durable on return. Storing it again costs one look-up."""
        self._stats.pages_stored += 1
        return await self._put("page", encode_page(page))

    async def load_page(self, artifact_id: str) -> MemoryPage | None:
        """The page as it was stored, placed in L3; None for an artifact that is not there."""
        data = await self._get(artifact_id, "page")
        if data is None:
            return None
        self._stats.pages_loaded += 1
        place = {"artifact_id": artifact_id, "storage_tier": StorageTier.L3}
        return decode_page(data).model_copy(update=place)

    async def checkpoint(self, pages: Iterable[MemoryPage], name: str) -> str:
        """Store the pages, then the checkpoint that lists them; returns the checkpoint's id.

        ValueError for a name that is empty, over 200 characters or has control characters.
        """
        _check_name(name)
        kept = list(pages)
        artifacts = [await self.store_page(page) for page in kept]
        listed = {"name": name, "page_ids": [p.page_id for p in kept], "artifact_ids": artifacts}
        self._stats.checkpoints_stored += 1
        return await self._put("checkpoint", _encode({"format": FORMAT, "checkpoint": listed}))

    async def get_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """What a checkpoint lists; ArtifactError when it is not there."""
        data = await self._get(checkpoint_id, "checkpoint")
        if data is None:
            raise ArtifactError(f"There is no checkpoint {checkpoint_id!r}.")
        try:
            return Checkpoint(checkpoint_id=checkpoint_id, **_decode(data, "checkpoint"))
        except (TypeError, ValidationError) as error:
            raise ArtifactError(f"{checkpoint_id} holds no checkpoint.") from error

    async def load_checkpoint(self, checkpoint_id: str) -> list[MemoryPage]:
        """The pages of a checkpoint in their order; ArtifactError when it or one of them is gone."""
        pages: list[MemoryPage] = []
        for artifact_id in (await self.get_checkpoint(checkpoint_id)).artifact_ids:
            page = await self.load_page(artifact_id)
            if page is None:
                raise ArtifactError(f"{checkpoint_id} lists {artifact_id}, which is not there.")
            pages.append(page)
        return pages

    async def list_checkpoints(self) -> list[Checkpoint]:
        """All checkpoints of the backend, in the order of their ids."""
        ids = await self.backend.keys("checkpoint_")
        return [await self.get_checkpoint(i) for i in ids]

    async def has(self, artifact_id: str) -> bool:
        """Whether a page or checkpoint is there."""
        return _ID.fullmatch(artifact_id) is not None and await self.backend.exists(artifact_id)

    async def delete(self, artifact_id: str) -> bool:
        """Drop one artifact; True when it was there. Checkpoints that list a page do not keep it."""
        if _ID.fullmatch(artifact_id) is None:
            return False
        return await self.backend.delete(artifact_id)

    def get_stats(self) -> ArtifactStats:
        """A copy of the counts."""
        return self._stats.model_copy()

    async def _put(self, kind: str, data: bytes) -> str:
        artifact_id = _artifact_id(kind, data)
        if not await self.backend.exists(artifact_id):
            await self.backend.put(artifact_id, data)
            self._stats.bytes_written += len(data)
        return artifact_id

    async def _get(self, artifact_id: str, kind: str) -> bytes | None:
        """The bytes, checked against their name."""
        named = _ID.fullmatch(artifact_id)
        data = await self.backend.get(artifact_id) if named and named[1] == kind else None
        if data is None:
            self._stats.missing += 1
            return None
        if _artifact_id(kind, data) != artifact_id:
            raise ArtifactError(f"{artifact_id} is damaged: its bytes are not what was stored.")
        self._stats.bytes_read += len(data)
        return data


def _artifact_id(kind: str, data: bytes) -> str:
    return f"{kind}_{blake2b(data, digest_size=20).hexdigest()}"


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > MAX_NAME_CHARS or _CONTROL.search(name):
        raise ValueError(
            f"a checkpoint's name has 1 to {MAX_NAME_CHARS} characters and no control characters"
        )


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False).encode("ascii")


def _decode(data: bytes, kind: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("An artifact is not JSON.") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ArtifactError(f"An artifact is not in format {FORMAT}, the only one known here.")
    found = value.get(kind)
    if not isinstance(found, dict):
        raise ArtifactError(f"An artifact holds no {kind}.")
    return found


def _plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON can say it, bytes as base64; ArtifactError for what would come back changed."""
    if depth > _MAX_DEPTH:
        raise ArtifactError(f"Page content nested deeper than {_MAX_DEPTH} cannot be stored.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError("A page with NaN or infinity in it cannot be stored exactly.")
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {_BYTES_KEY: b64encode(value).decode("ascii")}
    if type(value) is list:
        return [_plain(item, depth + 1) for item in value]
    if type(value) is dict and _BYTES_KEY not in value and all(type(k) is str for k in value):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    raise ArtifactError(f"A page with {type(value).__name__} content cannot be stored exactly.")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_BYTES_KEY}:
            return b64decode(value[_BYTES_KEY])
        return {key: _restored(item) for key, item in value.items()}
    return value
