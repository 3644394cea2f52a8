"""What one conversation's memory is made of: the page table, its log, and who acts on them.

Promises: the table changes only by applied mutations, each of which is in `log` (replaying it gives
the table); a page is compressed before it is evicted, and its full body is stored before the window
loses it (invariant 4); pinned pages stay, those just faulted in leave last. Making one costs
microseconds: what a caller never uses is never made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cached_property

from proxy.memory.artifacts_bridge import ArtifactsBridge
from proxy.memory.compressor import hint
from proxy.memory.context import (
    ESTIMATES,
    ContextPacker,
    page_tokens,
    page_words,
)
from proxy.memory.eviction import AntiThrashPolicy, EvictionPolicy, ImportanceWeightedLRU, PinnedSet
from proxy.memory.faults import PageFaultHandler
from proxy.memory.levels import CompressorRegistry
from proxy.memory.metrics import UserExperienceMetrics
from proxy.memory.models import (
    CompressionLevel,
    Counts,
    MemoryPage,
    MutationType,
    PageMutation,
    PageTableEntry,
    StorageTier,
    VMMode,
)
from proxy.memory.pack_cache import PackCache
from proxy.memory.segments import ProvenanceGraph
from proxy.memory.table import MutationLogLite, PageTable
from proxy.memory.tlb import AnyTable, PageTLB, TLBWithPageTable
from proxy.memory.working_set import TokenBudget, WorkingSetConfig, WorkingSetManager

_DEFAULT_CONFIG = WorkingSetConfig()
_DEFAULT_POLICY = ImportanceWeightedLRU()
HINT_WORDS = 10
TLB_ENTRIES = 512
_LEVELS_BEFORE_EVICTION = (CompressionLevel.REDUCED, CompressionLevel.ABSTRACT)

GetPage = Callable[[str], Awaitable[MemoryPage | None]]


class MemoryCore:
    """The memory of one session, without messages and requests.

    `table` and `log` may be those of a conversation that is already there (the log then has to
    replay to the table); `load` finds pages that neither RAM nor `storage` has. `model` only names
    the model in `build_request`.
    """

    def __init__(
        self,
        session_id: str = "",
        config: WorkingSetConfig = _DEFAULT_CONFIG,
        policy: EvictionPolicy = _DEFAULT_POLICY,
        registry: CompressorRegistry | None = None,
        *,
        mode: VMMode = VMMode.STRICT,
        model: str = "gpt-4o",
        storage: ArtifactsBridge | None = None,
        counts: Counts = ESTIMATES,
        max_faults_per_turn: int = 3,
        max_tokens_per_turn: int | None = None,
        table: AnyTable | None = None,
        log: MutationLogLite | None = None,
        load: GetPage | None = None,
    ) -> None:
        self.session_id = session_id
        self.config = config
        self.policy = policy
        self.mode = mode
        self.model = model
        self.turn = 1 if table is None else max(1, table.turn)
        self.log = MutationLogLite() if log is None else log
        self._own = table is None
        self.page_table: AnyTable = PageTable(on_apply=self.log.append) if table is None else table
        self._registry = registry
        self._storage = storage
        self._counts = counts
        self._limits = (max_faults_per_turn, max_tokens_per_turn)
        self._load = load
        self._messages = 0
        self._pages: dict[str, MemoryPage] = {}  # full bodies of what is in the window
        self._shown: dict[str, MemoryPage] = {}  # what the window shows of those that it compressed
        self._hints: dict[str, str] = {}
        self._segments = 0

    # -- the synchronous core

    def apply(self, mutation: PageMutation) -> None:
        """Change the table and log it. A table of one's own logs whoever changes it."""
        self.page_table.apply(mutation)
        if not self._own:
            self.log.append(mutation)

    def register(self, page: MemoryPage) -> PageTableEntry:
        """Enter a page that this turn brings; its body is kept while it is in the window."""
        tokens = page.size_tokens or page_tokens(page, self._counts)
        self.apply(
            PageMutation(
                MutationType.CREATE, page.page_id, self.turn, page.compression_level,
                page.storage_tier, tokens, importance=page.importance, modality=page.modality,
                page_type=page.page_type, artifact_id=page.artifact_id,
            )
        )  # fmt: skip
        if page.pinned:
            self.apply(PageMutation(MutationType.PIN, page.page_id, self.turn))
        self._pages[page.page_id] = page
        self._hints[page.page_id] = hint(page_words(page), HINT_WORDS)
        entry = self.page_table.lookup(page.page_id)
        assert entry is not None
        return entry

    def adopt(self, table: AnyTable, log: MutationLogLite) -> None:
        """Go on with a table and its log that were made elsewhere; what was registered here is gone
        but for the bodies."""
        self.page_table, self.log, self._own = table, log, False
        self.turn = max(self.turn, table.turn)
        for name in ("combined", "working_set", "fault_handler"):  # they hold the other table
            self.__dict__.pop(name, None)

    def new_turn(self) -> None:
        """The next turn begins, with nothing spent."""
        counts = self.page_table.get_stats()
        self.metrics.record_turn(counts.l0_tokens, counts.total_tokens)
        self.turn += 1
        self.fault_handler.new_turn(self.turn)

    def get_context_at_turn(self, turn: int) -> list[str]:
        """Ids of the pages that were in the window at the end of `turn`."""
        return self.log.get_context_at_turn(turn)

    # -- the components, made when they are first used

    @cached_property
    def tlb(self) -> PageTLB:
        """Recently used entries of the table."""
        return PageTLB(max_entries=TLB_ENTRIES)

    @cached_property
    def combined(self) -> TLBWithPageTable:
        """The table behind its TLB."""
        if isinstance(self.page_table, TLBWithPageTable):
            return self.page_table
        return TLBWithPageTable(self.page_table, self.tlb)

    @cached_property
    def working_set(self) -> WorkingSetManager:
        """The table's L0 and L1, seen as a budget."""
        budget = TokenBudget(
            total_limit=self.config.max_l0_tokens, reserved=self.config.reserved_tokens
        )
        return WorkingSetManager(
            self.config, budget, self.page_table, self.policy, self.pinned, self.anti_thrash
        )

    @cached_property
    def pinned(self) -> PinnedSet:
        """What may not be evicted, besides the table's own pins."""
        return PinnedSet()

    @cached_property
    def anti_thrash(self) -> AntiThrashPolicy:
        """Keeps what was just faulted in, cools down what was just evicted."""
        return AntiThrashPolicy()

    @cached_property
    def metrics(self) -> UserExperienceMetrics:
        """What the user notices of all this."""
        return UserExperienceMetrics()

    @cached_property
    def provenance(self) -> ProvenanceGraph:
        """Which derived page rests on which, walked both ways."""
        return ProvenanceGraph()

    @cached_property
    def storage(self) -> ArtifactsBridge:
        """Where evicted pages and checkpoints are (default: memory)."""
        return ArtifactsBridge() if self._storage is None else self._storage

    @cached_property
    def pack_cache(self) -> PackCache:
        """Lines that need not be quoted and counted again."""
        return PackCache()

    @cached_property
    def packer(self) -> ContextPacker:
        """Writes <VM:CONTEXT>."""
        return ContextPacker(self._counts, self.pack_cache)

    @cached_property
    def registry(self) -> CompressorRegistry:
        """The compressor of each modality."""
        return CompressorRegistry.default() if self._registry is None else self._registry

    @cached_property
    def fault_handler(self) -> PageFaultHandler:
        """Serves the model's faults."""
        return PageFaultHandler(
            self.page_table,
            self._get_page,
            *self._limits,
            apply=self.apply,
            registry=self.registry,
            counts=self._counts,
            turn=self.turn,
        )

    def _compress(self, page: MemoryPage, level: CompressionLevel) -> MemoryPage:
        return self.registry.compress(page, level, self._counts)

    async def _get_page(self, page_id: str) -> MemoryPage | None:
        """The full page: from RAM, the artifacts, or whoever else has it."""
        page = self._pages.get(page_id)
        entry = self.page_table.lookup(page_id)
        if page is None and entry is not None and entry.artifact_id is not None:
            page = await self.storage.load_page(entry.artifact_id)
        if page is None and self._load is not None:
            page = await self._load(page_id)
        return page

    # -- memory pressure

    async def check_and_evict(self) -> list[str]:
        """When the window is over its high watermark, bring it down to the low one.

        The least valuable pages are shown at lower levels first, then evicted. Returns the ids of
        the pages evicted.
        """
        to_free = self.working_set.calculate_eviction_target()
        if not self.working_set.needs_eviction():
            return []
        newest = self.page_table.resident()[-1]
        candidates = [i for i, _ in self.working_set.get_eviction_candidates() if i != newest.page_id]
        entries = [e for i in candidates if (e := self.page_table.lookup(i)) is not None]
        for level in _LEVELS_BEFORE_EVICTION:
            for entry in entries:
                if to_free <= 0:
                    return []
                to_free -= self._lower(entry, level)
        evicted: list[str] = []
        for entry in entries:
            if to_free <= 0:
                break
            to_free -= await self._evict(entry)
            evicted.append(entry.page_id)
        self.metrics.record_eviction(len(evicted))
        return evicted

    def _lower(self, entry: PageTableEntry, level: CompressionLevel) -> int:
        """Show a resident page at a level, if that saves tokens: so many. Its full body stays."""
        body = self._pages.get(entry.page_id)
        if body is None or entry.level >= level:
            return 0
        shown = self._compress(body, level)
        tokens = page_tokens(shown, self._counts)
        saved = entry.l0_tokens - tokens
        if saved <= 0:
            return 0
        self._shown[entry.page_id] = shown
        lower = PageMutation(MutationType.COMPRESS, entry.page_id, self.turn, level, tokens=tokens)
        self.apply(lower)
        return saved

    async def _evict(self, entry: PageTableEntry) -> int:
        """Store the full body, then let the window lose it; the tokens that this frees."""
        freed = entry.l0_tokens
        page_id, artifact_id = entry.page_id, entry.artifact_id
        body = self._pages.get(page_id)
        if body is not None and artifact_id is None:
            artifact_id = await self.storage.store_page(body)
        self.apply(
            PageMutation(
                MutationType.EVICT, page_id, self.turn, tier=StorageTier.L2, artifact_id=artifact_id
            )
        )
        self._pages.pop(page_id, None)
        self._shown.pop(page_id, None)
        return freed

    # -- checkpoints

    async def checkpoint(self, name: str) -> str:
        """Store the full pages of the window under a name; returns the checkpoint's id."""
        found = [await self._get_page(e.page_id) for e in self.page_table.resident()]
        return await self.storage.checkpoint([page for page in found if page is not None], name)
