"""How many leave the window: its capacity, its watermarks, and a page table's L0 and L1 seen as a budget.
(Who leaves is `eviction`'s to say.)

Promises: watermarks are whole tokens with 0 <= low <= high <= room; `WorkingSetManager` keeps no page's
tier, level or pin itself, and what it lets in fits the room.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field, model_validator

from proxy.memory.eviction import (
    AntiThrashPolicy,
    EvictionPolicy,
    ImportanceWeightedLRU,
    PinnedSet,
    PinReason,
)
from proxy.memory.models import MemoryPage, MutationType, PageMutation, StorageTier
from proxy.memory.table import PageTable

CACHED_PRICE = 0.1  # of a token that was in the prompt before, as most providers bill it
_REBUILD_SHARE = 0.5
_LEAST_TARGET = 4


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


def rebuild_target(low_tokens: int, high_tokens: int, growth_tokens: float, cached_price: float) -> int:
    """Down to how many tokens an epoch is rebuilt: `low_tokens`, or less where the window soon is full again.

    A rebuilt window of `t` tokens is read uncached, for (1 - cached_price) * t more, once in (high - t) /
    growth requests; without that, a request costs its growth and the cached window, half full on the average.
    A rebuild may cost at most `_REBUILD_SHARE` of it: the largest target of which that holds, in sixteenths of
    `low_tokens`, at least `_LEAST_TARGET` of them: what leaves can only be found again.
    """
    for share in range(16, _LEAST_TARGET, -1):
        target = low_tokens * share // 16
        rebuilds = (1 - cached_price) * target * growth_tokens / max(1, high_tokens - target)
        if rebuilds <= _REBUILD_SHARE * (growth_tokens + cached_price * (target + high_tokens) / 2):
            return target
    return low_tokens * _LEAST_TARGET // 16


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
    def utilization(self) -> float:
        """Used per available token; 1.0 when pages may take none."""
        return self.used / self.available if self.available else 1.0

    def can_fit(self, tokens: int) -> bool:
        """Whether so many tokens more stay within the budget."""
        return tokens <= self.available - self.used


# -- the guide's view of a table

_L0, _L1 = StorageTier.L0, StorageTier.L1


class WorkingSetStats(BaseModel):
    """The working set at one moment. `utilization` is the used share of the room."""

    l0_pages: int = 0
    tokens_used: int = 0
    utilization: float = 0.0


class WorkingSetManager:
    """The window's pages, seen through a page table: a private one, unless one is handed in.

    The room is what both `config` and `budget` allow; `budget.used` says what is taken besides the
    table's pages. `change` takes importances (default: the table's `apply`). Changes are at the table's
    latest turn.
    """

    def __init__(
        self,
        config: WorkingSetConfig | None = None,
        budget: TokenBudget | None = None,
        table: PageTable | None = None,
        policy: EvictionPolicy | None = None,
        pins: PinnedSet | None = None,
        anti_thrash: AntiThrashPolicy | None = None,
        change: Callable[[PageMutation], object] | None = None,
    ) -> None:
        self.config = config or WorkingSetConfig()
        self.table = PageTable() if table is None else table
        self.policy = policy or ImportanceWeightedLRU()
        self.pins = PinnedSet() if pins is None else pins
        self.anti_thrash = anti_thrash or AntiThrashPolicy()
        self._change = change or self.table.apply
        self._budget = budget

    # how much

    @property
    def budget(self) -> TokenBudget:
        """The tokens as they stand now; changing the copy changes nothing."""
        config, given = self.config, self._budget
        budget = TokenBudget(total_limit=config.max_l0_tokens, reserved=config.reserved_tokens)
        if given is not None:
            budget = min(budget, given, key=lambda one: one.available)
        used = self.table.get_stats().l0_tokens + (given.used if given is not None else 0)
        return budget.model_copy(update={"used": used})

    def can_fit(self, tokens: int) -> bool:
        """Whether so many tokens more fit the room."""
        return self.budget.can_fit(tokens)

    def needs_eviction(self, tier: StorageTier = _L0) -> bool:
        """Whether L0 is above its high watermark, or L1 above its number of pages."""
        if tier is _L0:
            budget = self.budget
            return budget.used > watermarks(budget.available, self.config)[0]
        return self.calculate_eviction_target(tier) > 0

    def calculate_eviction_target(self, tier: StorageTier = _L0) -> int:
        """How much must go: tokens down to L0's low watermark, or pages down to L1's number; 0 for
        the tiers below, which have no limit here."""
        if tier is _L0:
            budget = self.budget
            return max(0, budget.used - watermarks(budget.available, self.config)[1])
        return max(0, self._pages_in(_L1) - self.config.max_l1_pages) if tier is _L1 else 0

    def get_stats(self) -> WorkingSetStats:
        """Counts of pages and tokens."""
        return WorkingSetStats(
            l0_pages=self._pages_in(_L0),
            tokens_used=self.table.get_stats().l0_tokens,
            utilization=self.budget.utilization,
        )

    def _pages_in(self, tier: StorageTier) -> int:
        return self.table.get_stats().pages_by_tier.get(tier, 0)

    # who

    def get_eviction_candidates(self, from_tier: StorageTier = _L0) -> list[tuple[str, float]]:
        """(page id, the policy's score) of the pages that may leave, first to leave first.

        Pages that somebody pinned are left out. Those pinned by a rule (claims, the last turns) come
        last, before them those that were just faulted in; a window must always be able to shrink.
        """
        turn = self.table.turn
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
            self.table.register(page.model_copy(update={"storage_tier": _L0}))
        else:
            level, turn = page.compression_level, self.table.turn
            self.table.apply(PageMutation(MutationType.MAP, page.page_id, turn, level, _L0, tokens))
        return True

    def remove_from_l0(self, page_id: str, page: MemoryPage | None = None) -> bool:
        """Take a page out of the window, to L2; False when it is not there. `page` may say where its body
        was kept."""
        entry = self.table.lookup(page_id)
        if entry is None or entry.tier is not _L0:
            return False
        self.table.update_location(page_id, StorageTier.L2, page.artifact_id if page is not None else None)
        return True

    def set_importance(self, page_id: str, importance: float) -> None:
        """0..1, else ValueError; nothing happens for a page that the table does not have."""
        if not 0.0 <= importance <= 1.0:
            raise ValueError(f"importance must be between 0 and 1, not {importance}")
        if self.table.lookup(page_id) is not None:
            turn = self.table.turn
            self._change(PageMutation(MutationType.UPDATE, page_id, turn, importance=importance))
