"""search_pages without an index: ranks pages by the words of their hints.

Promises: deterministic; a page without a word in common with the query is no result; a rare word
counts for more than one that every page has; of equal pages the earlier one given comes first.
Linear in the pages; for the whole text of a conversation there is `proxy.search`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import lru_cache

from proxy.memory.manifest import AvailablePageEntry
from proxy.memory.models import Modality
from proxy.memory.vm_tools import (
    DEFAULT_SEARCH_LIMIT,
    MAX_SEARCH_LIMIT,
    SearchResultEntry,
    SearchToolResult,
)

_WORD = re.compile(r"[^\W_]+")
# Scripts without spaces: each pair of characters is a word.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
_STOP = frozenset(
    """
    a about an and any are as at be but by can did do does for from had has have he her his how i in
    is it its me my no not of on or our she so that the their them then there they this to us was we
    were what when where which who why will with would you your
    """.split()
)
_ENDINGS = ("ations", "ation", "ingly", "edly", "ing", "ies", "ed", "es", "ly", "s", "e", "y")
_SHORTEST_STEM = 3
_NAMED = 1000.0  # a query that names the page itself
_HINT_CHARS = 4_000  # of one hint that are read
_QUERY_CHARS = 1_000
_HINTS_IN_RAM = 2_048


def terms(text: str) -> list[str]:
    """The words of a text without their endings, in order; stop words are left out."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if word in _STOP:
            continue
        if word.isascii():
            found.append(_stem(word))
            continue
        rest = _UNSPACED.sub(" ", word)
        found.extend(_stem(part) for part in rest.split())
        for run in _UNSPACED.findall(word):
            found.extend(run[i : i + 2] for i in range(max(1, len(run) - 1)))
    return found


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            stem = word[: -len(ending)]
            return stem[:-1] if len(stem) > _SHORTEST_STEM and stem[-1] == stem[-2] else stem
    return word


@lru_cache(maxsize=_HINTS_IN_RAM)
def _counted(hint: str) -> tuple[tuple[tuple[str, int], ...], int]:
    """(terms with their times, how many in all): most pages are the same at the next epoch."""
    counts = Counter(terms(hint))
    return tuple(counts.items()), counts.total()


class PageSearchHandler:
    """Searches the pages it was given; `hint` is what is known of each (as far as it is read)."""

    def __init__(self, available_pages: Iterable[AvailablePageEntry] = ()) -> None:
        self._pages: list[AvailablePageEntry] = []
        self._lengths: list[int] = []
        self._found_in: dict[str, dict[int, int]] = {}  # term -> page's number -> times
        for page in available_pages:
            self.add(page)

    def add(self, page: AvailablePageEntry) -> None:
        """One more page to search."""
        counts, length = _counted(page.hint[:_HINT_CHARS])
        for term, times in counts:
            self._found_in.setdefault(term, {})[len(self._pages)] = times
        self._pages.append(page)
        self._lengths.append(length)

    def search(
        self,
        query: str,
        modality: Modality | str | None = None,
        limit: int = DEFAULT_SEARCH_LIMIT,
    ) -> SearchToolResult:
        """The best `limit` pages (1..20) of that modality (None: any), best first."""
        kind = modality.value if isinstance(modality, Modality) else modality
        named = set(query.lower().split())
        rows = [
            (page, (_NAMED if page.page_id.lower() in named else 0.0) + score)
            for page, score, _ in self._scored(query, named)
            if kind is None or page.modality == kind
        ]
        rows.sort(key=lambda row: -row[1])  # stable: of equal ones the earlier given first
        results = [
            SearchResultEntry(**page.model_dump(), relevance=round(score, 3))
            for page, score in rows[: max(1, min(MAX_SEARCH_LIMIT, limit))]
        ]
        return SearchToolResult(results=results, total_available=len(self._pages))

    def ranked(self, query: str) -> list[tuple[str, float, float]]:
        """(page id, score, summed rarity of the query's words on it) of all pages found, best first."""
        rows = [(page.page_id, score, rarity) for page, score, rarity in self._scored(query)]
        return sorted(rows, key=lambda row: -row[1])

    def _scored(
        self, query: str, named: Collection[str] = ()
    ) -> list[tuple[AvailablePageEntry, float, float]]:
        """Pages with a term of the query (or a `named` id) in the order given, score and rarity.

        The score is the rarity of the shared terms; a repeated term adds a little, a long hint takes
        some.
        """
        scores: dict[int, tuple[float, float]] = {}
        for term in dict.fromkeys(terms(query[:_QUERY_CHARS])):
            pages = self._found_in.get(term, {})
            if not pages:
                continue
            rarity = math.log(1.0 + len(self._pages) / len(pages))
            for number, times in pages.items():
                score, rare = scores.get(number, (0.0, 0.0))
                score += rarity * (1.0 + 0.2 * min(times - 1, 3))
                scores[number] = score, rare + rarity
        for number, page in enumerate(self._pages) if named else ():
            if page.page_id.lower() in named:
                scores.setdefault(number, (0.0, 0.0))
        found = []
        for number in sorted(scores):
            score, rare = scores[number]
            found.append((self._pages[number], score / (1.0 + 0.02 * self._lengths[number]), rare))
        return found
