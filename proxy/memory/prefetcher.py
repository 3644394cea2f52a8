"""Which pages are brought in before the model is called, and whether one was worth it.

Promises: what is chosen stays within its budget in tokens and pages; the best for its tokens comes first;
deterministic. Whether a page was worth it is measured by what the answer took from it (`was_used`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

MIN_EVIDENCE = 0.8  # of one word that only this page has: less is no reason to bring a page in
LENGTH_POWER = 0.4  # measured on LoCoMo and BEAM (tests/bench/recall_memory.py)
_USED_TERMS = 2  # distinctive words that page and answer share, and the question does not have
_READ_CHARS = 20_000


class Candidate(NamedTuple):
    """A page that a search proposes: `score` and `evidence` as in `proxy.memory.ids.Hit`; `tokens` is the
    whole page's size."""

    page_id: str
    score: float
    evidence: float
    tokens: int


class Prefetcher(NamedTuple):
    """One decision's budget."""

    max_pages: int
    max_tokens: int

    def choose(
        self, candidates: Iterable[Candidate], price: Callable[[Candidate, int], int | None]
    ) -> list[Candidate]:
        """The best for their tokens that fit: long pages have every word somewhere. `price` gives the tokens
        of a page as shown in at most so many (None: it does not fit)."""
        chosen: list[Candidate] = []
        left = self.max_tokens
        for candidate in sorted((c for c in candidates if c.evidence >= MIN_EVIDENCE), key=_density):
            if len(chosen) == self.max_pages:
                break
            tokens = price(candidate, left)
            if tokens is not None:
                left -= tokens
                chosen.append(candidate)
        return chosen


def _density(candidate: Candidate) -> tuple[float, str]:
    return -candidate.score / max(1, candidate.tokens) ** LENGTH_POWER, candidate.page_id


# -- whether it was worth it

_TERM = re.compile(r"[^\W_]{4,}|\d{2,}|\w*[_\d]\w*", re.UNICODE)


def fresh_terms(question: str, answer: str) -> frozenset[str]:
    """The distinctive words of an answer that the question does not have."""
    return frozenset(_terms(answer) - _terms(question))


def was_used(page_text: str, fresh: frozenset[str]) -> bool:
    """The answer says something that stands on the page: `fresh_terms` are what it could have from
    there.

    A lexical measure: it misses a paraphrase and may be fooled by two common words.
    """
    shared = fresh & _terms(page_text) if fresh else fresh
    return len(shared) >= _USED_TERMS or any(any(c.isdigit() for c in term) for term in shared)


def _terms(text: str) -> set[str]:
    return set(_TERM.findall(text[:_READ_CHARS].lower()))
