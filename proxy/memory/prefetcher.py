"""Which pages are brought in before the model is called, when, and whether one was worth it.

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
