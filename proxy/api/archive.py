"""What happens to old pages beside the turns: smaller versions, checkpoints, words from models.

Promises: nothing here delays an answer or fails one but for a page that a turn asks for; every
segment that was closed has a checkpoint in L3 soon after, and its id in L2; bounded work at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

from proxy.api.memory import Memory
from proxy.api.renditions import Renditions
from proxy.api.writer import Writer
from proxy.config import Config
from proxy.conversation.context import TurnContext
from proxy.conversation.effects import Load
from proxy.conversation.pages import PathPages
from proxy.conversation.turn import Turn
from proxy.memory.artifacts_bridge import ArtifactError, ArtifactsBridge
from proxy.memory.models import CompressionLevel, MemoryPage, Modality
from proxy.memory.segments import Segment
from proxy.storage.l2 import StorageError
from proxy.storage.l3 import ArtifactStore
from proxy.upstream import Header, Upstream

log = logging.getLogger(__name__)

_SAVES_AT_ONCE = 64  # checkpoints being written; further ones are left out and said in the log


class Archive:
    """One per process."""

    def __init__(self, config: Config, memory: Memory, upstream: Upstream) -> None:
        url = config.tiers.l3.url or str(config.tiers.l2.path / "artifacts")
        self.bridge = ArtifactsBridge(ArtifactStore(url))
        self._memory = memory
        self._summary_tokens = config.segments.summary_tokens
        models = config.compression
        written = models.model is not None or models.transcription_model is not None
        self._renditions = Renditions(memory, self.bridge, written)
        self.writer = Writer(models, upstream, self._renditions)
        self._saving: set[asyncio.Task[None]] = set()

    async def load(self, tenant: bytes, effect: Load, pages: PathPages) -> MemoryPage:
        """A page at a level, for a turn."""
        return await self._renditions.load(tenant, effect, pages)

    def after(self, turn: Turn, context: TurnContext, headers: Sequence[Header]) -> None:
        """An answered turn: save the segments that it closed, have shown pages written about."""
        saves: dict[int, list[bytes]] = {}  # by how many segments were closed when a record was made
        if turn.settled is not None:
            saves[len(turn.settled[1].segments)] = [turn.settled[0].id]
        if turn.record is not None:
            saves.setdefault(len(turn.segments), []).append(turn.record.id)
        for count, records in saves.items():
            if count:
                pages = [page for segment in turn.segments[:count] for page in segment.pages()]
                self._save(records, pages)
        if self.writer.active:
            wanted = [*turn.shown, *_sounds(turn.segments, turn.pages)]
            self.writer.submit(
                context.tenant, headers, turn.pages, context.counter, wanted, self._summary_tokens
            )

    async def checkpoint_of(self, record_id: bytes) -> str | None:
        """The id of the checkpoint that a turn's record made."""
        found = self._memory.store.get(b"c" + record_id)
        return found.decode() if found else None

    async def close(self) -> None:
        await self.writer.close()
        await asyncio.gather(*self._saving, return_exceptions=True)

    def _save(self, records: Sequence[bytes], pages: Sequence[MemoryPage]) -> None:
        if len(self._saving) >= _SAVES_AT_ONCE:
            log.warning("too many checkpoints at once: one was left out")
            return
        task = asyncio.ensure_future(self._checkpoint(records, pages))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _checkpoint(self, records: Sequence[bytes], pages: Sequence[MemoryPage]) -> None:
        try:
            made = await self.bridge.checkpoint(pages, records[-1].hex())
            await self._memory.store.commit([(b"c" + i, made.encode()) for i in records])
        except (ArtifactError, StorageError) as error:
            log.warning("a checkpoint could not be saved: %s", error)


def _sounds(segments: Sequence[Segment], pages: PathPages) -> Iterator[Load]:
    """The sounds of segments that were closed: shown or not, below level 0 they are a transcript."""
    for segment in segments:
        first, last = pages.position(segment.first_page_id), pages.position(segment.last_page_id)
        for position in range(first, last + 1):
            for page in pages[position].media:
                if page.modality is Modality.AUDIO:
                    yield Load(page.id, CompressionLevel.REDUCED)
