"""What pages cost a codec or a model to be shown as: smaller media, a model's words. Made once, kept.

Promises: a rendition is found by conversation, content and level, so nobody sees another's words about an
equal image (invariant 6); a medium is decoded once, in a process of its own, and that it cannot be decoded is
kept as well; without a store, a model or a decoder that has time it is made anew or said extractively, and the turn
goes on; what was damaged is made again; the original is never touched (invariant 4).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

from cachetools import LRUCache

from proxy import keys
from proxy.api.decoding import Decoders, Killed, Patience
from proxy.api.memory import Memory
from proxy.config import Config
from proxy.conversation.derived import unwritten_page
from proxy.conversation.effects import Load
from proxy.conversation.pages import PathPages
from proxy.conversation.tree import Identity, TenantKey
from proxy.media.decoders import Codec
from proxy.memory.artifacts_bridge import ArtifactError, decode_page, encode_page
from proxy.memory.levels import DECODED, codec_of
from proxy.memory.models import CompressionLevel, MemoryPage, Modality, PageType, json_text
from proxy.storage.l2 import StorageError

log = logging.getLogger(__name__)

_KILLED = 1024  # media that were not decoded in time, remembered
WRITTEN = "written"  # made by a model
# What a model's words about a medium are in its metadata, and the level that they were written for.
_WORDS = {
    Modality.IMAGE: ("caption", CompressionLevel.ABSTRACT),
    Modality.AUDIO: ("transcript", CompressionLevel.REDUCED),
}


class Renditions:
    """One per process; `memory` keeps them, as the bytes of artifacts."""

    def __init__(self, config: Config, memory: Memory, decoders: Decoders | None = None) -> None:
        self.memory = memory
        self._decoders = Decoders(config) if decoders is None else decoders
        self._wait_s = config.decoders.wait_s
        self._killed: LRUCache[bytes, bool] = LRUCache(_KILLED)
        self._decoding: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()  # by what is decoded
        models = config.compression
        self._written_by_models = bool(models.model or models.transcription_model)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a decoder."""
        return self._decoders.waiting

    async def close(self) -> None:
        await self._decoders.close()

    def patience(self) -> Patience:
        """A new request's."""
        return Patience(self._wait_s)

    async def load(
        self, tenant: TenantKey, effect: Load, pages: PathPages, patience: Patience | None = None,
        identity: Identity | None = None,
    ) -> MemoryPage | None:
        """The page at a level: as a model wrote it, as it was made before, or made now. None for a summary
        that is not written yet. `patience`, `identity`: its request's."""
        level = CompressionLevel(effect.level)
        if (unwritten := unwritten_page(pages, effect.page_id)) is not None:
            return await self.find(pages.owner, unwritten, level, WRITTEN)
        page = pages.page(effect.page_id)
        if level is CompressionLevel.FULL:
            return page
        if pages.medium(effect.page_id) is not None:
            told, patience = await self._told(pages.owner, page), patience or self.patience()
            return await self._medium(tenant, told, level, pages, patience, identity or self.memory.identity)
        in_words = self._written_by_models and page.page_type is PageType.TRANSCRIPT
        for source in range(level, -1, -1) if in_words else ():
            written = await self.find(pages.owner, page, CompressionLevel(source), WRITTEN)
            if written is not None:
                return pages.shown(written, level)
        return pages.at(effect.page_id, level)

    async def _medium(
        self, tenant: TenantKey, page: MemoryPage, level: CompressionLevel, pages: PathPages, patience: Patience,
        identity: Identity,
    ) -> MemoryPage:  # fmt: skip
        codec, version, data = await asyncio.to_thread(_coded, page, level)
        kind = f"shown/{pages.counter.name}"  # smaller by one model's rule, not by another's
        key = identity.rendition(pages.owner, version, int(level), kind)
        made: MemoryPage | None = self.memory.cache.get("rendition", key)
        if made is None:
            decoded: dict[str, Any] | None = {}
            if codec is not None:
                key_decoded = identity.rendition(pages.owner, version.partition("/")[0], 0, f"decoded/{codec}")
                decoded = await self._decoded(tenant, key_decoded, codec, data, patience, identity)
            about = {**page.metadata, DECODED: decoded or {}}
            made = await asyncio.to_thread(pages.shown, page.model_copy(update={"metadata": about}), level)
            if decoded is not None:
                self.memory.cache.put("rendition", key, made, len(json_text(made.content)))
        return made.model_copy(update={"page_id": page.page_id, "provenance": page.provenance})

    async def _decoded(
        self, tenant: TenantKey, key: bytes, codec: Codec, data: bytes, patience: Patience, identity: Identity
    ) -> dict[str, Any] | None:
        """What a medium's bytes hold, decoded once; None: not now."""
        lock = self._decoding.setdefault(key, asyncio.Lock())
        with suppress(TimeoutError):
            async with patience, lock:
                page = await self._found(key)
                if page is None:
                    try:
                        decoded = await self._decoders.decode(tenant, codec, data)
                    except Killed as error:
                        log.warning("%s", error)
                        decoded = {} if key in self._killed else None  # once may be the machine
                        self._killed[key] = True
                    if decoded is None:
                        return None
                    page = MemoryPage(page_id=DECODED, content=decoded)
                    self.memory.cache.put("rendition", key, page, len(json_text(decoded)))
                    await self._keep(key, page, identity)
                content: dict[str, Any] = page.content
                return content
        return None

    async def _told(self, owner: bytes, page: MemoryPage) -> MemoryPage:
        """A medium with the words that a model wrote about it, if any: its lower levels show them."""
        where = _WORDS.get(page.modality) if self._written_by_models else None
        if where is None:
            return page
        key, level = where
        written = await self.find(owner, page, level, WRITTEN)
        if written is None:
            return page
        return page.model_copy(update={"metadata": {**page.metadata, key: written.content}})

    async def find(self, owner: bytes, page: MemoryPage, level: CompressionLevel, kind: str) -> MemoryPage | None:
        """A kept rendition, as a version of `page`."""
        found = await self._found(self._key(owner, page, level, kind))
        if found is None:
            return None
        about = {**found.metadata, **page.metadata}
        update = {"page_id": page.page_id, "provenance": page.provenance, "metadata": about}
        return found.model_copy(update=update)

    async def _found(self, key: bytes) -> MemoryPage | None:
        found: MemoryPage | None = self.memory.cache.get("rendition", key)
        if found is None:
            artifact = self.memory.get(key)
            if artifact is None:
                return None
            try:
                found = decode_page(artifact)
            except ArtifactError as error:
                log.warning("a smaller version of a page is made again: %s", error)
                return None
            self.memory.cache.put("rendition", key, found, len(str(found.content)))
        return found

    async def keep(
        self, owner: bytes, page: MemoryPage, made: MemoryPage, kind: str, identity: Identity | None = None
    ) -> None:
        """Store a rendition of `page`; a failure is logged, and it will be made again. `identity`: what the page was read
        with."""
        await self._keep(self._key(owner, page, made.compression_level, kind), made, identity or self.memory.identity)

    async def _keep(self, key: bytes, made: MemoryPage, identity: Identity) -> None:
        try:
            await self.memory.keep(keys.owner(key), identity, [(key, encode_page(made))])
        except (ArtifactError, StorageError) as error:
            log.warning("a smaller version of a page cannot be kept: %s", error)

    def _key(self, owner: bytes, page: MemoryPage, level: CompressionLevel, kind: str) -> bytes:
        return self.memory.identity.rendition(owner, page.version, int(level), kind)


def _coded(page: MemoryPage, level: CompressionLevel) -> tuple[Codec | None, str, bytes]:
    """What decodes a medium for a level, what is shown of it known by (first its bytes, then what is said of
    it), and the bytes. Slow for large ones."""
    coded = codec_of(page, level)
    about = blake2b(json_text(page.metadata).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    if coded is None:
        return None, f"{page.version}/{about}", b""
    codec, medium = coded
    data = medium.data or b""
    return codec, f"{blake2b(data, digest_size=16).hexdigest()}/{about}", data
