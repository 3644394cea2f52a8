"""What one turn did to its window: shown by the demo, read by observers; carries no text of anyone."""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy.conversation.bill import Break, Sums
from proxy.conversation.limits import Limits
from proxy.memory.metrics import UserExperienceMetrics
from proxy.memory.models import StorageTier

_REQUESTS_AN_EPOCH = 4  # what a window has to hold beside what stays, to be worth a cache


@dataclass(slots=True)
class FaultReport:
    """One page_fault call: `error` is None when the page was served, at `level`, for `tokens`."""

    page_id: str
    level: int
    tokens: int
    error: str | None = None
    refault: bool = False  # the page had left the window only lately
    tier: StorageTier = StorageTier.L1  # the coldest that the request had read from by then
    ms: float = 0.0  # it took to load it
    reason: str = "failed"  # `FaultReason`'s values; resident: it was there; failed: there is no such page, or no room


@dataclass(slots=True)
class SearchReport:
    """One search_pages call and the page ids that it returned, best first."""

    query: str
    results: list[str]


@dataclass(slots=True)
class TurnReport:
    """One answered turn. Tokens count the whole upstream request of the last round."""

    model: str
    channel: str  # bypass | tools | passive
    turn: int
    epoch: int = 0
    new_epoch: bool = False
    budget_tokens: int = 0
    used_tokens: int = 0
    native_pages: list[str] = field(default_factory=list)
    context_pages: list[str] = field(default_factory=list)
    evicted_pages: list[str] = field(default_factory=list)
    prefetched_pages: list[str] = field(default_factory=list)  # brought in before the call
    evidence_left: bool = False  # what was shown for the last message was taken out of the log
    prefetched_used: int = 0  # of them those that the answer took something from
    faults: list[FaultReport] = field(default_factory=list)
    searches: list[SearchReport] = field(default_factory=list)
    rounds: int = 0
    segments: int = 0  # closed so far
    reachable_tokens: int = 0  # of all pages of the conversation, in the window or not
    asked_back: bool = False  # the user asks, and older pages say something of it
    crowded: bool = False  # the epoch's window is full again with the next request, or nearly
    rewritten_at: int | None = None  # from this message on, the client says something else than it did
    billed: Sums | None = None  # by upstream's usage; None: the answer could not be remembered
    broke: Break | None = None  # the provider's cache did not have what it could have
    warning: str | None = None  # one ASCII sentence for the operator: what did not fit, which key to change
    epoch_cause: str = ""  # first | full | rewritten: the client says something else | pinned: a page was | round: the VM exchange needed the room

    def record(self, metrics: UserExperienceMetrics) -> None:
        """Add a turn that paged to the counts."""
        metrics.turns += 1
        metrics.l0_tokens += self.used_tokens
        metrics.reachable_tokens += self.reachable_tokens
        metrics.evictions += len(self.evicted_pages)
        served = [fault for fault in self.faults if fault.error is None]
        metrics.recalls += len(self.faults) + len(self.searches)
        metrics.recalls_succeeded += len(served) + sum(bool(s.results) for s in self.searches)
        new = [fault for fault in served if fault.tokens]  # the others were in the window
        metrics.faults += len(new)
        metrics.refaults += sum(fault.refault for fault in new)
        metrics.prefetched += len(self.prefetched_pages)
        metrics.prefetched_used += self.prefetched_used


def stretched_window(limits: Limits) -> str:
    """The warning of a turn whose window is larger than the one configured (`limits`)."""
    key, tokens = _window_key(limits), limits.working_set.max_l0_tokens
    return (
        f"System messages, tools and schemas, which cannot be paged, leave too little of the {tokens}"
        f" tokens of {key} for messages, so the window was stretched: raise {key}."
    )


def crowded_window(limits: Limits, left_tokens: int, growth_tokens: int) -> str:
    """The warning of a window that is rebuilt nearly each time: so much of it is left after a rebuild, so much
    a request brings."""
    key, config = _window_key(limits), limits.working_set
    more = (_REQUESTS_AN_EPOCH * growth_tokens - left_tokens) / config.eviction_threshold
    enough = -(-(config.max_l0_tokens + int(more)) // 1000) * 1000
    return (
        f"A window of {config.max_l0_tokens} tokens is too small for this conversation: each request brings about"
        f" {growth_tokens}, and {max(0, left_tokens)} are free after a rebuild, so nearly each one rebuilds it, which costs"
        f" the prompt cache: raise {key} to {enough}."
    )


def as_it_is(limits: Limits) -> str:
    """The warning of a turn that pages nothing because nothing that could leave makes it fit."""
    key, tokens = _window_key(limits), limits.working_set.max_l0_tokens
    return (
        f"What cannot be paged does not fit the {tokens} tokens of {key}, so the request went upstream"
        f" as it came: shorten system messages and tools, or raise {key}."
    )


def _window_key(limits: Limits) -> str:
    """The setting that the window's size comes from, or could come from."""
    own = limits.working_set.max_l0_tokens >= limits.window_tokens
    return "models.<name>.window_tokens" if own else "tiers.l0.tokens"
