"""What pages cost a codec or a model to be shown as: smaller media, a model's words. Made once, kept in L3.

Promises: a rendition is found by tenant, content and level, so nobody sees another's words about an
equal image (invariant 6); without L3 or a model it is made anew or said extractively, and the turn
goes on; what was damaged is made again; the original is never touched (invariant 4).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from proxy.api.memory import Memory
from proxy.config import Config
from proxy.conversation.derived import unwritten_page
from proxy.conversation.effects import Load
from proxy.conversation.pages import PathPages
from proxy.conversation.tree import TenantKey
from proxy.memory.artifacts_bridge import ArtifactError, ArtifactsBridge
from proxy.memory.models import CompressionLevel, MemoryPage, Modality, PageType
from proxy.storage.l2 import StorageError
from proxy.storage.l3 import ArtifactStore

log = logging.getLogger(__name__)

EXTRACTIVE, WRITTEN = "extractive", "written"  # made by our own rules; by a model
# What a model's words about a medium are in its metadata, and the level that they were written for.
_WORDS = {
    Modality.IMAGE: ("caption", CompressionLevel.ABSTRACT),
    Modality.AUDIO: ("transcript", CompressionLevel.REDUCED),
}


class Renditions:
    """One per process; `memory` keeps which rendition is which artifact, `tiers.l3.url` the artifacts."""

    def __init__(self, config: Config, memory: Memory) -> None:
        self._memory = memory
        url = config.tiers.l3.url or str(config.tiers.l2.path / "artifacts")
        self._bridge = ArtifactsBridge(ArtifactStore(url))
        models = config.compression
        self._written_by_models = bool(models.model or models.transcription_model)

    async def load(self, tenant: TenantKey, effect: Load, pages: PathPages) -> MemoryPage | None:
        """The page at a level: as a model wrote it, as it was made before, or made now. None for a summary
        that is not written yet."""
        level = CompressionLevel(effect.level)
        if (unwritten := unwritten_page(pages, effect.page_id)) is not None:
            return await self.find(tenant, unwritten, level, WRITTEN)
        page = pages.page(effect.page_id)
        if level is CompressionLevel.FULL:
            return page
        if pages.medium(effect.page_id) is not None:
            return await self._medium(tenant, await self._told(tenant, page), level, pages)
        in_words = self._written_by_models and page.page_type is PageType.TRANSCRIPT
        for source in range(level, -1, -1) if in_words else ():
            written = await self.find(tenant, page, CompressionLevel(source), WRITTEN)
            if written is not None:
                return pages.shown(written, level)
        return pages.at(effect.page_id, level)

    async def _medium(
        self, tenant: TenantKey, page: MemoryPage, level: CompressionLevel, pages: PathPages
    ) -> MemoryPage:
        kind = f"{EXTRACTIVE}/{pages.counter.name}"  # smaller by one model's rule, not by another's
        made = await self.find(tenant, page, level, kind)
        if made is None:
            made = await asyncio.to_thread(pages.shown, page, level)
            if not isinstance(made.content, str):  # words are made again in no time
                await self.keep(tenant, page, made, kind)
        return made

    async def _told(self, tenant: TenantKey, page: MemoryPage) -> MemoryPage:
        """A medium with the words that a model wrote about it, if any: its lower levels show them."""
        where = _WORDS.get(page.modality) if self._written_by_models else None
        if where is None:
            return page
        key, level = where
        written = await self.find(tenant, page, level, WRITTEN)
        if written is None:
            return page
        return page.model_copy(update={"metadata": {**page.metadata, key: written.content}})

    async def find(
        self, tenant: TenantKey, page: MemoryPage, level: CompressionLevel, kind: str
    ) -> MemoryPage | None:
        """A kept rendition, as a version of `page`."""
        key = self._key(tenant, page, level, kind)
        found: MemoryPage | None = self._memory.cache.get("rendition", key)
        if found is None:
            artifact = self._memory.get(key)
            if artifact is None:
                return None
            found = await self._read(artifact.decode())
            if found is None:  # L3 was emptied: it will be made again
                return None
            self._memory.cache.put("rendition", key, found, len(str(found.content)))
        about = {**found.metadata, **page.metadata}
        update = {"page_id": page.page_id, "provenance": page.provenance, "metadata": about}
        return found.model_copy(update=update)

    async def keep(
        self, tenant: TenantKey, page: MemoryPage, made: MemoryPage, kind: str
    ) -> None:
        """Store a rendition of `page` in L3; a failure is logged, and it will be made again."""
        key = self._key(tenant, page, made.compression_level, kind)
        try:
            artifact = await self._bridge.store_page(made)
            await self._memory.store.commit([(key, artifact.encode())])
        except (ArtifactError, StorageError) as error:
            log.warning("a smaller version of a page cannot be kept: %s", error)

    async def _read(self, artifact: str) -> MemoryPage | None:
        """The page of an artifact. A damaged one is dropped: its key must hold the bytes that it
        names, and it could not be stored again beside others."""
        try:
            return await self._bridge.load_page(artifact)
        except StorageError as error:
            log.warning("a smaller version of a page cannot be read: %s", error)
        except ArtifactError as error:
            log.warning("a smaller version of a page is made again: %s", error)
            with suppress(StorageError):
                await self._bridge.delete(artifact)
        return None

    def _key(
        self, tenant: TenantKey, page: MemoryPage, level: CompressionLevel, kind: str
    ) -> bytes:
        return self._memory.identity.rendition(tenant, page.version, int(level), kind)
