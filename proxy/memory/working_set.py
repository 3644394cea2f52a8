"""How many leave the window: its capacity and its watermarks. (Who leaves is `eviction`'s to say.)

Promises: watermarks are whole tokens with 0 <= low <= high <= room.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
