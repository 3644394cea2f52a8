"""Where derived pages come from, walked both ways: what msg_0042 led to, what justifies claim_0007.

Promises: adding is incremental and idempotent; answers are in a fixed order (nearest first, then as
added) whatever the history; a cycle in what was added is walked once around; both the graph and every
answer are bounded. Edges come from pages' `provenance` and from merges of claims, nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from proxy.memory.models import MemoryPage

MAX_EDGES = 200_000  # of one conversation: every page of 100,000 messages quoted twice
MAX_WALK = 4096  # pages in one answer
MAX_DEPTH = 16


class ProvenanceGraph:
    """Pages and the pages that they derive from.

    `add` returns how many edges were new; edges beyond `max_edges` are not kept (`full` says so), so
    that what was answered before stays true.
    """

    def __init__(self, max_edges: int = MAX_EDGES) -> None:
        self._sources: dict[str, dict[str, None]] = {}
        self._derived: dict[str, dict[str, None]] = {}
        self._edges = 0
        self._max_edges = max_edges

    def __len__(self) -> int:
        """The number of edges."""
        return self._edges

    @property
    def full(self) -> bool:
        return self._edges >= self._max_edges

    def add(self, page_id: str, sources: Iterable[str]) -> int:
        """`page_id` derives from each of `sources`; a page never derives from itself."""
        before = self._edges
        for source in sources:
            if self.full:
                break
            if source == page_id or source in self._sources.get(page_id, ()):
                continue
            self._sources.setdefault(page_id, {})[source] = None
            self._derived.setdefault(source, {})[page_id] = None
            self._edges += 1
        return self._edges - before

    def add_page(self, page: MemoryPage) -> int:
        """Enter a page with its `provenance`."""
        return self.add(page.page_id, page.provenance)

    def derives_from(self, page_id: str, depth: int = 1) -> list[str]:
        """What the page was made from: its direct sources, or those up to `depth` steps back."""
        return _walk(self._sources, page_id, depth)

    def derived(self, page_id: str, depth: int = 1) -> list[str]:
        """What was made from the page: directly, or up to `depth` steps on."""
        return _walk(self._derived, page_id, depth)

    def justifies(self, page_id: str, depth: int = MAX_DEPTH) -> list[str]:
        """The pages that the claim rests on in the end: those among its ancestors that derive from
        nothing themselves."""
        return [p for p in self.derives_from(page_id, depth) if p not in self._sources]


def _walk(edges: Mapping[str, Mapping[str, None]], start: str, depth: int) -> list[str]:
    """Breadth first from `start`, which is not in the answer."""
    found: dict[str, None] = {}
    queue = deque([(start, 0)])
    while queue and len(found) < MAX_WALK:
        page, steps = queue.popleft()
        if steps >= min(depth, MAX_DEPTH):
            continue
        for other in edges.get(page, ()):
            if other != start and other not in found and len(found) < MAX_WALK:
                found[other] = None
                queue.append((other, steps + 1))
    return list(found)
