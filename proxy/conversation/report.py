"""What one turn did to its window: shown by the demo, read by observers; carries no text of anyone."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class FaultReport:
    """One page_fault call: `error` is None when the page was served, at `level`, for `tokens`."""

    page_id: str
    level: int
    tokens: int
    error: str | None = None
    refault: bool = False  # the page had left the window only lately


@dataclass(slots=True)
class SearchReport:
    """One search_pages call and the page ids that it returned, best first."""

    query: str
    results: list[str]


@dataclass(slots=True)
class PrefetchReport:
    """A page brought in before the call: by which source, and whether the answer took anything of it."""

    page_id: str
    source: str
    used: bool = False


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
    prefetched: list[PrefetchReport] = field(default_factory=list)
    faults: list[FaultReport] = field(default_factory=list)
    searches: list[SearchReport] = field(default_factory=list)
    rounds: int = 0
    reachable_tokens: int = 0  # of all pages of the conversation, in the window or not
    asked_back: bool = False  # the user's message points back
    taken_back: bool = False  # the window's log was cut where the client's system messages changed

    @property
    def prefetched_pages(self) -> list[str]:
        return [page.page_id for page in self.prefetched]
