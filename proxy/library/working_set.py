"""WorkingSetManager: a page table's L0 and L1 seen as a budget.

Promises: a view that keeps no page's tier, level or pin itself; what it lets in fits the room.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from proxy.memory.eviction import (
    AntiThrashPolicy,
    EvictionPolicy,
    ImportanceWeightedLRU,
    PinnedSet,
    PinReason,
)
from proxy.memory.models import MemoryPage, MutationType, PageMutation, StorageTier
from proxy.memory.table import PageTable
from proxy.memory.tlb import AnyTable
from proxy.memory.working_set import TokenBudget, WorkingSetConfig, watermarks


class WorkingSetStats(BaseModel):
    """The working set at one moment. `utilization` is the used share of the room."""

    l0_pages: int = 0
    l1_pages: int = 0
    pinned_pages: int = 0
    tokens_used: int = 0
    tokens_remaining: int = 0
    utilization: float = 0.0
    needs_eviction: bool = False
    turn: int = 0


class WorkingSetManager:
    """The window's pages, seen through a page table: a private one, unless one is handed in.

    The room is what both `config` and `budget` allow; `budget.used` says what is taken besides the
    table's pages. `change` takes pins and importances (default: the table's `apply`).
    """

    def __init__(
        self,
        config: WorkingSetConfig | None = None,
        budget: TokenBudget | None = None,
        table: AnyTable | None = None,
        policy: EvictionPolicy | None = None,
        pins: PinnedSet | None = None,
        anti_thrash: AntiThrashPolicy | None = None,
        change: Callable[[PageMutation], object] | None = None,
    ) -> None:
        self.config = config or WorkingSetConfig()
        self.table: AnyTable = PageTable() if table is None else table
        self.policy = policy or ImportanceWeightedLRU()
        self.pins = PinnedSet() if pins is None else pins
        self.anti_thrash = anti_thrash or AntiThrashPolicy()
        self._change = change or self.table.apply
        self._budget = budget
        self._turn = 0

    # how much

    @property
    def budget(self) -> TokenBudget:
        """The tokens as they stand now; changing the copy changes nothing."""
        config, given = self.config, self._budget
        own = TokenBudget(total_limit=config.max_l0_tokens, reserved=config.reserved_tokens)
        if given is None:
            return own.model_copy(update={"used": self.tokens_used})
        smaller = min(own, given, key=lambda budget: budget.available)
        return smaller.model_copy(update={"used": self.tokens_used + given.used})

    @property
    def tokens_used(self) -> int:
        """Tokens of the pages in L0, each at its present level."""
        return self.table.get_stats().l0_tokens

    def can_fit(self, tokens: int) -> bool:
        """Whether so many tokens more fit the room."""
        return self.budget.can_fit(tokens)

    def needs_eviction(self, tier: StorageTier = StorageTier.L0) -> bool:
        """Whether L0 is above its high watermark, or L1 above its number of pages."""
        if tier is StorageTier.L0:
            budget = self.budget
            return budget.used > watermarks(budget.available, self.config)[0]
        return self.calculate_eviction_target(tier) > 0

    def calculate_eviction_target(self, tier: StorageTier = StorageTier.L0) -> int:
        """How much must go: tokens down to L0's low watermark, or pages down to L1's number; 0 for
        the tiers below, which have no limit here."""
        if tier is StorageTier.L0:
            budget = self.budget
            return max(0, budget.used - watermarks(budget.available, self.config)[1])
        if tier is StorageTier.L1:
            return max(0, self._pages_in(tier) - self.config.max_l1_pages)
        return 0

    # who

    def get_eviction_candidates(
        self, from_tier: StorageTier = StorageTier.L0
    ) -> list[tuple[str, float]]:
        """(page id, the policy's score) of the pages that may leave, first to leave first.

        Pages that somebody pinned are left out. Those pinned by a rule (claims, the last turns) come
        last, before them those that were just faulted in; a window must always be able to shrink.
        """
        turn = self.turn
        rows = []
        for entry in self.table.get_by_tier(from_tier):
            reason = self.pins.reason(entry, turn)
            if reason < PinReason.INFERRED:
                score = self.policy.score(entry, turn)
                order = entry.position, entry.part, entry.sequence
                protected = self.anti_thrash.protected(entry, turn)
                rows.append((reason, protected, score, order, entry.page_id))
        return [(row[4], row[2]) for row in sorted(rows)]

    def get_l0_page_ids(self) -> list[str]:
        """The pages of the window in conversation order."""
        return [entry.page_id for entry in self.table.resident()]

    # changing: all of it through the table

    def add_to_l0(self, page: MemoryPage) -> bool:
        """Put a page into the window at its level; a page that is there is brought up to date.

        False, and nothing is changed, when it does not fit the room: evict first.
        """
        tokens, entry = page.estimate_tokens(), self.table.lookup(page.page_id)
        more = tokens - (entry.l0_tokens if entry is not None else 0)
        if more > 0 and not self.can_fit(more):
            return False
        if entry is None:
            page = page.model_copy(update={"storage_tier": StorageTier.L0})
            self.table.register(page, self.turn)
        else:
            level, tier = page.compression_level, StorageTier.L0
            self.table.apply(PageMutation(MutationType.MAP, page.page_id, self.turn, level, tier, tokens))
        return True

    def remove_from_l0(
        self, page_id: str, page: MemoryPage | None = None, tier: StorageTier = StorageTier.L2
    ) -> bool:
        """Take a page out of the window, to `tier`; False when it is not there. `page` may say where
        its body was kept."""
        entry = self.table.lookup(page_id)
        if entry is None or entry.tier is not StorageTier.L0:
            return False
        artifact = page.artifact_id if page is not None else None
        self.table.update_location(page_id, tier, artifact, turn=self.turn)
        return True

    def set_importance(self, page_id: str, importance: float) -> None:
        """0..1, else ValueError; nothing happens for a page that the table does not have."""
        if not 0.0 <= importance <= 1.0:
            raise ValueError(f"importance must be between 0 and 1, not {importance}")
        if self.table.lookup(page_id) is not None:
            self._change(PageMutation(MutationType.UPDATE, page_id, self.turn, importance=importance))

    @property
    def turn(self) -> int:
        """The present turn: the manager's own, or the table's when that is further."""
        return max(self._turn, self.table.turn)

    def new_turn(self) -> int:
        """Begin the next turn and return its number."""
        self._turn = self.turn + 1
        return self._turn

    def get_stats(self) -> WorkingSetStats:
        """Counts of pages and tokens."""
        budget = self.budget
        return WorkingSetStats(
            l0_pages=self._pages_in(StorageTier.L0),
            l1_pages=self._pages_in(StorageTier.L1),
            pinned_pages=self.table.get_stats().pinned_pages,
            tokens_used=self.tokens_used,
            tokens_remaining=budget.remaining,
            utilization=budget.utilization,
            needs_eviction=self.needs_eviction(),
            turn=self.turn,
        )

    def _pages_in(self, tier: StorageTier) -> int:
        return self.table.get_stats().pages_by_tier.get(tier, 0)
