"""A closed segment: one line that says what it was about, what a model wrote of it, and what rests on what.

Promises: pure and deterministic; every derived page names the pages that it was made from. What a segment makes,
by page type: index (its topics, first and last page) at once; summary (one) and claims when a configured model has
written them. Transcript and artifact pages are the messages themselves; nobody makes procedure pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from proxy.memory.compressor import clip, compress_text
from proxy.memory.models import CompressionLevel, MemoryPage, PageType, StorageTier

SUMMARY_IMPORTANCE = 0.7
INDEX_TOKENS = 48
_READ_CHARS = 8_000  # of a segment, in equal shares of its messages, for its topics
_NUMBER = re.compile(r"\b\d+\b")


def index_id(number: int) -> str:
    return f"index_seg_{number:02d}"


def summary_id(number: int) -> str:
    return f"summary_seg_{number:02d}"


def index_page(
    number: int, ids: Sequence[str], texts: Sequence[str], turn: int, count: Callable[[str], int]
) -> MemoryPage:
    """`seg 03 (msg_0040-msg_0088): Postgres, deadline, migration`, for the manifest. Segments count from 1; `ids`
    and `texts` are its messages', at least one."""
    share = max(80, _READ_CHARS // len(texts))
    read = "\n".join(_NUMBER.sub(" ", text[:share]) for text in texts)
    topics = compress_text(read, CompressionLevel.REFERENCE, None, count)
    line = clip(f"seg {number:02d} ({ids[0]}-{ids[-1]}): {topics}".rstrip(": "), INDEX_TOKENS, count)
    return _derived(index_id(number), PageType.INDEX, line, [ids[0], ids[-1]], turn, count)


def summary_page(
    number: int, text: str, sources: Sequence[str], turn: int, count: Callable[[str], int]
) -> MemoryPage:
    """What a model wrote of the segment whose messages are `sources`."""
    return _derived(summary_id(number), PageType.SUMMARY, text, list(sources), turn, count)


def _derived(
    page_id: str, page_type: PageType, text: str, sources: list[str], turn: int, count: Callable[[str], int]
) -> MemoryPage:
    return MemoryPage(
        page_id=page_id,
        page_type=page_type,
        content=text,
        storage_tier=StorageTier.L2,
        size_tokens=count(text),
        provenance=sources,
        importance=SUMMARY_IMPORTANCE,
        metadata={"turn": turn},
    )


# -- what rests on what

MAX_WALK = 4096  # pages in one answer
MAX_DEPTH = 16


class ProvenanceGraph:
    """Pages and the pages that they derive from, walked both ways: what msg_0042 led to, what justifies
    claim_0007. Answers are in a fixed order (nearest first, then as added); a cycle is walked once around."""

    def __init__(self, pages: Iterable[MemoryPage] = ()) -> None:
        self._sources: dict[str, dict[str, None]] = {}
        self._derived: dict[str, dict[str, None]] = {}
        for page in pages:
            self.add_page(page)

    def add_page(self, page: MemoryPage) -> None:
        """Enter a page with its `provenance`; a page never derives from itself."""
        for source in page.provenance:
            if source != page.page_id:
                self._sources.setdefault(page.page_id, {})[source] = None
                self._derived.setdefault(source, {})[page.page_id] = None

    def derives_from(self, page_id: str) -> list[str]:
        """What the page was made from."""
        return list(self._sources.get(page_id, ()))

    def derived(self, page_id: str) -> list[str]:
        """What was made from the page."""
        return list(self._derived.get(page_id, ()))

    def justifies(self, page_id: str) -> list[str]:
        """The pages that the claim rests on in the end: its ancestors that derive from nothing themselves."""
        return [p for p in _walk(self._sources, page_id) if p not in self._sources]


def _walk(edges: Mapping[str, Mapping[str, None]], start: str) -> list[str]:
    """Breadth first from `start`, which is not in the answer."""
    found: list[str] = []
    layer, seen = [start], {start}
    for _ in range(MAX_DEPTH):
        layer = list(dict.fromkeys(other for page in layer for other in edges.get(page, ()) if other not in seen))
        seen.update(layer)
        found += layer
    return found[:MAX_WALK]
