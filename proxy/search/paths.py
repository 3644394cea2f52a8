"""The search index of each conversation path that is in use. Derived: it can be rebuilt any time.

Promises: an index holds the pages of one path only, whichever branch asks (invariant 6); the pages
kept over all paths are bounded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from proxy.memory.ids import Doc, Hit
from proxy.memory.questions import Query
from proxy.search.fts import PageIndex
from proxy.search.terms import languages_of

_BRANCHES = 4  # indexes kept for branches of one conversation
_INDEX_PAGES = 1  # what an empty index weighs, in pages
_STEP_BACK = 8  # messages an index is cut by before another branch gets an index of its own

DocsOf = Callable[[int, int], Iterable[Doc]]


class _Branch:
    """An index and the keys of the messages whose pages it holds."""

    def __init__(self) -> None:
        self.index = PageIndex()
        self.ids: list[bytes] = []
        self.lock = threading.Lock()

    @property
    def weight(self) -> int:
        """What it counts against the limit, in pages."""
        return len(self.index) + _INDEX_PAGES


class PathIndexes:
    """Indexes by conversation, least recently used ones dropped above `limit_pages` pages."""

    def __init__(self, limit_pages: int) -> None:
        self._limit = limit_pages
        self._roots: OrderedDict[bytes, list[_Branch]] = OrderedDict()
        self._pages = 0
        self._lock = threading.Lock()
        languages_of()  # what takes its time once in a process takes it before the first request

    def search(
        self,
        ids: Sequence[bytes],
        docs: DocsOf,
        queries: str | Sequence[str | Query],
        limit: int,
        skip: Callable[[int, int], bool],
        seen_s: Callable[[int], int] | None = None,
    ) -> list[Hit]:
        """The best pages of the path with the keys `ids` (each names all before it); `docs(first, last)`
        gives new pages; the rest is as `PageIndex.search` takes it.

        Blocks while it indexes; may be called from any thread.
        """
        if not ids:
            return []
        branch = self._branch(ids)
        with branch.lock:
            size = len(branch.index)
            same = _common(branch.ids, ids)
            if same < len(branch.ids):
                branch.index.truncate(same)
                del branch.ids[same:]
            if same < len(ids):
                branch.index.extend(docs(same, len(ids)))
                branch.ids.extend(ids[same:])
            hits = branch.index.search(queries, limit, skip, seen_s)
            grown = len(branch.index) - size
        self._trim(grown)
        return hits

    def missing(self, ids: Sequence[bytes]) -> int:
        """How many messages of the path the nearest index lacks."""
        with self._lock:
            branches = self._roots.get(ids[0], ())
            best = max((_common(branch.ids, ids) for branch in branches), default=0)
        return len(ids) - best

    def clear(self) -> None:
        with self._lock:
            self._roots.clear()
            self._pages = 0

    def _branch(self, ids: Sequence[bytes]) -> _Branch:
        """The index nearest to this path, or a new one rather than undoing another branch's."""
        with self._lock:
            branches = self._roots.setdefault(ids[0], [])
            self._roots.move_to_end(ids[0])
            near = [(_common(branch.ids, ids), branch) for branch in branches]
            usable = [n for n in near if len(n[1].ids) - n[0] <= _STEP_BACK]
            if usable:
                best = max(usable, key=lambda n: n[0])[1]
                branches.remove(best)
            else:
                if len(branches) == _BRANCHES:
                    self._pages -= branches.pop(0).weight
                best = _Branch()
                self._pages += best.weight
            branches.append(best)
            return best

    def _trim(self, grown: int) -> None:
        with self._lock:
            self._pages += grown
            while self._pages > self._limit and len(self._roots) > 1:
                _, branches = self._roots.popitem(last=False)
                self._pages -= sum(branch.weight for branch in branches)


def _common(have: Sequence[bytes], wanted: Sequence[bytes]) -> int:
    """Length of the common beginning. An id names all before it, so bisection is exact."""
    low, high = 0, min(len(have), len(wanted))
    while low < high:
        middle = (low + high + 1) // 2
        if have[middle - 1] == wanted[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
