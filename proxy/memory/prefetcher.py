"""Which pages are brought in before the model is called: several sources, one budget.

Promises: pages only; what is chosen stays within the budget in tokens and pages; a page is proposed
once, by the source that values it most; deterministic. Whether a page was worth it is measured by
what the answer took from it (`was_used`), and counted per source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

MIN_EVIDENCE = 0.8  # of one word that only this page has: less is no reason to bring a page in
LENGTH_POWER = 0.4  # measured on LoCoMo and BEAM (tests/bench/recall_memory.py)
_USED_TERMS = 2  # distinctive words that page and answer share, and the question does not have
_READ_CHARS = 20_000


class PrefetchSource(str, Enum):
    """Who proposed a page."""

    SEARCH = "search"  # the words of the user's message
    RECALL = "recall"  # a message that points back: "as we said", "remind me"
    SUMMARY = "summary"  # the last segment's summary
    CLAIM = "claim"  # what the conversation came to, the most used first
    TOOL = "tool"  # what went with the tools that are likely now


class Candidate(NamedTuple):
    """A page that a source proposes. `score` is comparable within one source; `evidence` as in
    `proxy.memory.ids.Hit`; `tokens` is the whole page's size.
    """

    page_id: str
    source: PrefetchSource
    score: float
    evidence: float
    tokens: int


class Prefetcher:
    """One decision: `propose` candidates, then `ranked` gives them by value for their tokens."""

    def __init__(self) -> None:
        self._found: dict[str, Candidate] = {}

    def propose(self, candidates: Iterable[Candidate]) -> None:
        """Take a source's pages; of one page proposed twice the better evidence counts."""
        for candidate in candidates:
            known = self._found.get(candidate.page_id)
            if candidate.evidence >= MIN_EVIDENCE and (
                known is None or candidate.evidence > known.evidence
            ):
                self._found[candidate.page_id] = candidate

    def ranked(self) -> list[Candidate]:
        """The best for its tokens first: long pages have every word somewhere."""
        return sorted(self._found.values(), key=_density)

    def choose(
        self, max_pages: int, max_tokens: int, price: Callable[[Candidate], int | None]
    ) -> list[Candidate]:
        """The best that fit; `price` gives a page's tokens as shown (None: it cannot be shown)."""
        chosen: list[Candidate] = []
        for candidate in self.ranked():
            if len(chosen) == max_pages:
                break
            tokens = price(candidate)
            if tokens is not None and tokens <= max_tokens:
                max_tokens -= tokens
                chosen.append(candidate)
        return chosen


def _density(candidate: Candidate) -> tuple[float, str]:
    return -candidate.score / max(1, candidate.tokens) ** LENGTH_POWER, candidate.page_id


# -- signals in a user's message

_QUESTION_MARKS = ("?", "？", "؟")
_REQUEST_CHARS = 160  # a longer text without a question mark tells something
_RECALL_STEMS = (  # looked for first: a pattern with alternatives costs more than all of them
    "remember", "remind", "recall", "recap", "summar", "earlier", "previously", "last time",
    "mention", "discuss", "we said", "we talked", "we agreed", "we decided", "i said", "you said",
    "i told", "you told", "go back to",
)  # fmt: skip
_RECALL = re.compile(
    r"\b(?:remember|remind|recall|recap|summar\w+|earlier|previously|last time|mention\w*"
    r"|discuss\w*|we (?:said|talked|agreed|decided)|(?:i|you) (?:said|told)|go back to)\b"
)


def points_back(text: str) -> bool:
    """Words that point back to what was said, in a question or a short request: a story that says
    "I remember" asks for nothing."""
    if len(text) > _REQUEST_CHARS and not any(mark in text for mark in _QUESTION_MARKS):
        return False
    low = text.lower()
    return any(stem in low for stem in _RECALL_STEMS) and bool(_RECALL.search(low))


def asks_back(text: str) -> bool:
    """A question, or words that point back: what the conversation already holds may be wanted.

    A statement is not worth the tokens, and a model that wants more can still fault.
    """
    return any(mark in text for mark in _QUESTION_MARKS) or points_back(text)


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
