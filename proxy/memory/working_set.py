"""How many leave the window: its capacity, its watermarks, and the manager that watches over both.
(Who leaves is `eviction_policy`'s to say.)

Promises: the working set is a view of a page table and keeps no page's tier, level or pin itself;
watermarks are whole tokens with 0 <= low <= high <= room; what the manager lets in fits the room.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from proxy.memory.eviction import (
    AntiThrashPolicy,
    EvictionPolicy,
    ImportanceWeightedLRU,
    PinnedSet,
    PinReason,
)
from proxy.memory.models import (
    CompressionLevel,
    MemoryPage,
    MutationType,
    PageMutation,
    PageTableEntry,
    StorageTier,
)
from proxy.memory.table import PageTable
from proxy.memory.tlb import AnyTable

MAX_PENDING_IMPORTANCE = 1024  # pages whose importance was set before they came


class WorkingSetConfig(BaseModel):
    """Capacity of L0 in tokens and of L1 in pages, and when and how far L0 is emptied (fractions of
    the room)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_l0_tokens: int = Field(default=128_000, gt=0)
    max_l1_pages: int = Field(default=100, ge=0)
    reserved_tokens: int = Field(default=4_000, ge=0)
    eviction_threshold: float = Field(default=0.90, gt=0.0, le=1.0)
    target_utilization: float = Field(default=0.50, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _target_below_threshold(self) -> WorkingSetConfig:
        if self.target_utilization > self.eviction_threshold:
            raise ValueError("target_utilization must not be above eviction_threshold")
        return self


def watermarks(room_tokens: int, config: WorkingSetConfig) -> tuple[int, int]:
    """(high, low) in tokens for a window with `room_tokens` of room (L0 less reserve less its fixed
    part).

    Above high a new epoch begins; it is rebuilt down to low. No room gives (0, 0).
    """
    room = max(0, room_tokens)
    high = int(room * config.eviction_threshold)
    return high, min(high, int(room * config.target_utilization))


class TokenBudget(BaseModel):
    """Tokens of a window: `reserved` for what is no page (system, tools, the answer), `used` by
    pages."""

    model_config = ConfigDict(extra="forbid")

    total_limit: int = Field(default=128_000, ge=0)
    reserved: int = Field(default=4_000, ge=0)
    used: int = Field(default=0, ge=0)

    @property
    def available(self) -> int:
        """Tokens that pages may take, at least 0."""
        return max(0, self.total_limit - self.reserved)

    @property
    def remaining(self) -> int:
        """Tokens that pages may still take, at least 0."""
        return max(0, self.available - self.used)

    @property
    def utilization(self) -> float:
        """Used per available token; 1.0 when pages may take none."""
        return self.used / self.available if self.available else 1.0

    def can_fit(self, tokens: int) -> bool:
        """Whether so many tokens more stay within the budget."""
        return tokens <= self.available - self.used


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
    table's pages. The default pins and anti-thrash numbers are their modules'.
    """

    def __init__(
        self,
        config: WorkingSetConfig | None = None,
        budget: TokenBudget | None = None,
        table: AnyTable | None = None,
        policy: EvictionPolicy | None = None,
        pins: PinnedSet | None = None,
        anti_thrash: AntiThrashPolicy | None = None,
    ) -> None:
        self.config = WorkingSetConfig() if config is None else config
        self.table: AnyTable = PageTable() if table is None else table
        self.policy = ImportanceWeightedLRU() if policy is None else policy
        self.pins = PinnedSet() if pins is None else pins
        self.anti_thrash = AntiThrashPolicy() if anti_thrash is None else anti_thrash
        self._limits = budget
        self._turn = 0
        self._pending_importance: dict[str, float] = {}

    # how much

    @property
    def budget(self) -> TokenBudget:
        """The tokens as they stand now; changing the copy changes nothing."""
        config, limits = self.config, self._limits
        total, reserved, used = config.max_l0_tokens, config.reserved_tokens, self.tokens_used
        if limits is not None:
            if limits.available < max(0, total - reserved):
                total, reserved = limits.total_limit, limits.reserved
            used += limits.used
        return TokenBudget(total_limit=total, reserved=reserved, used=used)

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
        turn, tokens = self.turn, page.estimate_tokens()
        entry = self.table.lookup(page.page_id)
        inside = entry is not None and entry.tier is StorageTier.L0
        before = entry.l0_tokens if entry is not None else 0
        if (not inside or tokens > before) and not self.can_fit(tokens - before):
            return False
        if entry is None:
            self.table.register(page.model_copy(update={"storage_tier": StorageTier.L0}), turn)
        elif not inside:
            self.table.apply(
                PageMutation(
                    MutationType.MAP, page.page_id, turn, page.compression_level, tokens=tokens
                )
            )
        elif (entry.level, before) != (page.compression_level, tokens):
            self._apply(MutationType.COMPRESS, entry, level=page.compression_level, tokens=tokens)
        else:
            self._apply(MutationType.ACCESS, entry)
        waiting = self._pending_importance.pop(page.page_id, None)
        if waiting is not None:
            self.set_importance(page.page_id, waiting)
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
        """0..1, else ValueError. For a page that the table does not have it is remembered until the
        page is added (of at most MAX_PENDING_IMPORTANCE pages, the oldest go)."""
        if not 0.0 <= importance <= 1.0:
            raise ValueError(f"importance must be between 0 and 1, not {importance}")
        entry = self.table.lookup(page_id)
        if entry is not None:
            self._apply(MutationType.UPDATE, entry, importance=importance)
            return
        pending = self._pending_importance
        pending.pop(page_id, None)
        pending[page_id] = importance
        if len(pending) > MAX_PENDING_IMPORTANCE:
            del pending[next(iter(pending))]

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
        counts = self.table.get_stats()
        return WorkingSetStats(
            l0_pages=counts.pages_by_tier.get(StorageTier.L0, 0),
            l1_pages=counts.pages_by_tier.get(StorageTier.L1, 0),
            pinned_pages=counts.pinned_pages,
            tokens_used=counts.l0_tokens,
            tokens_remaining=budget.remaining,
            utilization=budget.utilization,
            needs_eviction=self.needs_eviction(),
            turn=self.turn,
        )

    def _pages_in(self, tier: StorageTier) -> int:
        return self.table.get_stats().pages_by_tier.get(tier, 0)

    def _apply(
        self,
        op: MutationType,
        entry: PageTableEntry,
        level: CompressionLevel | None = None,
        tokens: int | None = None,
        importance: float | None = None,
    ) -> None:
        self.table.apply(
            PageMutation(op, entry.page_id, self.turn, level, tokens=tokens, importance=importance)
        )
