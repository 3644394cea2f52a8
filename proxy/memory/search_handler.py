"""search_pages without an index: ranks pages by the words of their hints.

Promises: deterministic; a page without a word in common with the query is no result; a rare word counts for
more than one that every page has; of equal pages the earlier one given comes first. For the whole text of a conversation there is `proxy.search`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from proxy.memory.manifest import AvailablePageEntry
from proxy.memory.models import Modality
from proxy.memory.stems import RUN, WORD, folded, stem
from proxy.memory.vm_tools import (
    DEFAULT_SEARCH_LIMIT,
    MAX_SEARCH_LIMIT,
    SearchResultEntry,
    SearchToolResult,
)
from proxy.memory.words import STOP_WORDS

_HINT_CHARS = 4_000  # of one hint that are read
_QUERY_CHARS = 1_000


def terms(text: str) -> list[str]:
    """The stems of a text's words, in order, without stop words; a run of a script without spaces is its pairs
    of characters."""
    low = folded(text)
    found = [stem(word) for word in WORD.findall(RUN.sub(" ", low)) if word not in STOP_WORDS]
    for match in RUN.finditer(low):
        run = match.group()
        found.extend(run[i : i + 2] for i in range(max(1, len(run) - 1)))
    return found


class PageSearchHandler:
    """Searches the pages it was given; `hint` is what is known of each (as far as it is read)."""

    def __init__(self, available_pages: Iterable[AvailablePageEntry] = ()) -> None:
        self._pages = {page.page_id: page for page in available_pages}
        self._words = {i: Counter(terms(page.hint[:_HINT_CHARS])) for i, page in self._pages.items()}
        self._pages_with = Counter(term for words in self._words.values() for term in words)

    def search(
        self,
        query: str,
        modality: Modality | str | None = None,
        limit: int = DEFAULT_SEARCH_LIMIT,
    ) -> SearchToolResult:
        """The best pages for `query`."""
        kind = modality.value if isinstance(modality, Modality) else modality
        found = [row for row in self.ranked(query) if kind in (None, self._pages[row[0]].modality)]
        results = [
            SearchResultEntry(**self._pages[i].model_dump(), relevance=round(score, 3))
            for i, score in found[: max(1, min(MAX_SEARCH_LIMIT, limit))]
        ]
        return SearchToolResult(results=results, total_available=len(self._pages))

    def ranked(self, query: str) -> list[tuple[str, float]]:
        """(page id, score) of all pages found, best first. The score is the rarity of the shared terms; a
        repeated term adds a little, a long hint takes some."""
        asked = dict.fromkeys(terms(query[:_QUERY_CHARS]))
        total, docs = len(self._pages), self._pages_with
        rarity = {term: math.log(1.0 + total / docs[term]) for term in asked if docs[term]}
        rows: list[tuple[str, float]] = []
        for page_id, words in self._words.items():
            shared = [(weight, words[term]) for term, weight in rarity.items() if term in words]
            if shared:
                score = sum(weight * (1.0 + 0.2 * min(times - 1, 3)) for weight, times in shared)
                rows.append((page_id, score / (1.0 + 0.02 * words.total())))
        return sorted(rows, key=lambda row: -row[1])
