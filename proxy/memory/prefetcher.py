"""Which pages are shown unasked before the model is called, and whether one was worth it.

Promises: what is chosen stays within its budget in tokens and pages, which is a limit and no aim: the best for its
tokens comes first, and what is far below it for its own is left out; deterministic. Whether a page was worth it is measured by
what the answer took from it (`was_used`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

MIN_EVIDENCE = 0.8  # of one word that only this page has: less is no reason to show a page to who only tells
ASKED_EVIDENCE = 0.6  # and to who asks: a word that one page in twenty has ("pet" where two people speak of theirs)
LENGTH_POWER = 0.2  # of a page's tokens, in what it is worth; this and the falls: on LoCoMo and BEAM (tests/bench/recall.py)
_ASKED_FALL = 0.26  # of the best score, where the user asks
_LINE_TOKENS, _MOST_TIMES = 48, 2.5  # a page that is longer has to be better by as much, or by so much, but for the best one: the rest can be searched
_RESIDENT_FALL = 0.3  # of the best score in the window: where that is what is meant, older pages add less
_TOLD_FALL = 0.6  # and where the user tells, for whom there is less room:
_TOLD_SHARE = 4  # of the tokens
_TOLD_EVIDENCE = 4.0  # and what is shown has as much of the message's own rare words,
_TOLD_WORDS = 0.5  # or this share of them
_USED_TERMS = 2  # distinctive words that page and answer share, and the question does not have
_READ_CHARS = 20_000

# A base and a small share of the window, but at most a third of it.
_WINDOW_SHARE, _BASE_TOKENS, _MOST_SHARE = 32, 3000, 3
# A small model is right less often with more lines: the 0.5B of ../shared/README.md does best with some 600.
_MODEL_TOKENS = 1000  # for each billion of parameters
_LEAST_MODEL_TOKENS = 600


def evidence_tokens(l0_tokens: int, parameters_b: float | None = None) -> int:
    """What evidence may take of a window, by default; `parameters_b`: the model's billions of parameters, where
    its name says them."""
    tokens = min(l0_tokens // _MOST_SHARE, _BASE_TOKENS + l0_tokens // _WINDOW_SHARE)
    if parameters_b is None:
        return tokens
    return min(tokens, max(_LEAST_MODEL_TOKENS, int(_MODEL_TOKENS * parameters_b)))


def told_evidence(words: float) -> float:
    """The evidence that a page needs to be shown where the user only tells something, of what is worth `words`."""
    return max(MIN_EVIDENCE, min(_TOLD_EVIDENCE, words * _TOLD_WORDS))


class Candidate(NamedTuple):
    """A page that a search proposes: `score`, `evidence` and `words` as in `proxy.memory.ids.Hit`; `tokens` is
    the whole page's size, or about it."""

    page_id: str
    score: float
    evidence: float
    tokens: int
    words: float = 0.0

    @property
    def is_meant(self) -> bool:
        """What is said has mostly this page's words: who tells something new uses others."""
        return self.evidence >= told_evidence(self.words)


class Prefetcher(NamedTuple):
    """One decision's budget. `asked`: the user asks for something; to what is only told, a page has to say
    something itself. `alone`: the model cannot search for what is not shown."""

    max_pages: int
    max_tokens: int
    asked: bool = True
    alone: bool = False

    @property
    def least_evidence(self) -> float:
        """Of the best page: less is no reason to show any."""
        return ASKED_EVIDENCE if self.asked else MIN_EVIDENCE

    @property
    def fall(self) -> float:
        """Of the best score: what has less is left out."""
        return _ASKED_FALL if self.asked else _TOLD_FALL

    def choose(
        self, candidates: Iterable[Candidate], price: Callable[[Candidate, int], int | None], best: float = 0.0
    ) -> list[Candidate]:
        """The best for their tokens that fit: long pages have every word somewhere. Nothing where no page has
        evidence: then the query names nobody's words. `price` gives the tokens of a page as shown in at
        most so many (None: it does not fit); `best` is the score of what is in the window already."""
        chosen: list[Candidate] = []
        left = self.max_tokens if self.asked else self.max_tokens // _TOLD_SHARE
        offered = list(candidates)
        if all(c.evidence < self.least_evidence for c in offered):
            return chosen
        top = max(c.score for c in offered)
        least = max(best * _RESIDENT_FALL, self.fall * top)
        ranked = [
            c for c in offered
            if c.score >= least * (1 if self.alone or c.score == top else _times(c.tokens)) and (self.asked or c.is_meant)
        ]
        ranked.sort(key=lambda c: (-_worth(c), c.page_id))
        for candidate in ranked:
            if len(chosen) == self.max_pages:
                break
            tokens = price(candidate, left)
            if tokens is not None:
                left -= tokens
                chosen.append(candidate)
        return chosen


def _times(tokens: int) -> float:
    return min(_MOST_TIMES, max(1.0, tokens / _LINE_TOKENS))


def _worth(candidate: Candidate) -> float:
    return candidate.score / float(max(1, candidate.tokens) ** LENGTH_POWER)


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
    shared = shared_terms(page_text, fresh)
    return len(shared) >= _USED_TERMS or any(any(c.isdigit() for c in term) for term in shared)


def shared_terms(page_text: str, terms: frozenset[str]) -> frozenset[str]:
    """Those of the terms that stand on the page."""
    low = page_text[:_READ_CHARS].lower()
    inside = [term for term in terms if term in low]  # perhaps as a part of a word
    if all(map(str.isalpha, inside)):
        return frozenset([term for term in inside if _stands(term, low)])
    return terms.intersection(_TERM.findall(low))


def _stands(letters: str, low: str) -> bool:
    """Whether `_TERM` finds this word of letters in the text: cheaper than all that it finds."""
    at = low.find(letters)
    while at >= 0:
        end = at + len(letters)
        begins = at == 0 or not (low[at - 1].isalnum() or low[at - 1] == "_")
        if begins and not low[end : end + 1].isalnum():
            return True
        at = low.find(letters, at + 1)
    return False


def _terms(text: str) -> set[str]:
    return set(_TERM.findall(text[:_READ_CHARS].lower()))
