"""The page index: which pages of ONE conversation path answer a question.

Promises:
- An index knows the pages it was given and nothing else: its statistics (how rare a word is, how
  long pages are, who speaks) come from this path alone, so no other conversation can change a
  result (invariant 6).
- The same pages give the same hits and scores, whatever extend/truncate calls led to them
  (invariant 7). Order: score, then the newer position, then the lower part.
- Any text is a valid query. Nothing of it is ever parsed as FTS5 syntax: words go through the
  index's own tokenizer and are looked up one by one. Time is bounded by the limits below.

How it ranks. SQLite FTS5 (porter, unicode61) holds the postings; they are read through fts5vocab
and scored here, because its built-in bm25() can do none of the following, which together beat it
widely on both LoCoMo and BEAM (tests/bench/recall_memory.py):
- stop words do not count, unless the query has nothing else;
- a word found in a neighbouring page counts for this page too, at a fraction and never on top of
  the page's own: what answers "Where did you go?" often shares no word with the question;
- a speaker named in the question favours that speaker's pages;
- where replies are much longer than what the user writes, replies weigh less and so do neighbours.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sqlite3
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from proxy.memory.ids import Doc, Hit
from proxy.search.terms import (
    TOKENIZER,
    clean,
    connect,
    idle_terms,
    stop_terms,
    tokenizer,
)

QUERY_CHARS = 4000  # a longer query is read at its beginning and at its end
QUERY_TERMS = 10  # the rarest terms that are looked up
CANDIDATE_TERMS = 24  # distinct terms whose rarity is asked, from both ends of the query
POSTINGS = 800  # pages with a term that are read for one query, rarest terms first
SPREAD_POSTINGS = 400  # occurrences that also count for their neighbours

K1, B = 1.2, 0.75  # BM25
NEIGHBOUR_SHARE = (0.6, 0.4)  # of a term's weight, one and two pages away
SPEAKER_BOOST = 0.8
REPLY_DISCOUNT = 2.0
LONG_REPLIES = (1.5, 4.5)  # replies/user length: from here it matters, from there in full
LONG_REPLY_NEIGHBOURS = 0.5  # share of the neighbours' weight that remains then


class _Term(NamedTuple):
    text: str
    docs: int


class PageIndex:
    """The pages of one path, in ascending (position, part). Calls may come from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._db = connect()
        self._db.execute(f"CREATE VIRTUAL TABLE pages USING fts5(text, tokenize='{TOKENIZER}')")
        self._db.execute("CREATE VIRTUAL TABLE occurrence USING fts5vocab('pages', 'instance')")
        self._keys: list[tuple[int, int]] = []  # row -> (position, part); the row is FTS5's rowid
        self._chars: list[int] = []
        self._roles: list[str] = []
        self._names: list[str] = []
        self._speakers: Counter[str] = Counter()  # name -> pages
        self._name_terms: dict[str, frozenset[str]] = {}
        # Integers, so that taking away leaves exactly what adding less would have built.
        self._total_chars = 0
        self._role_chars: Counter[str] = Counter()
        self._role_messages: Counter[str] = Counter()
        self._frequency: Counter[str] = Counter()  # term -> pages that have it

    def __len__(self) -> int:
        return len(self._keys)

    def close(self) -> None:
        """Free the memory. The index cannot be used afterwards."""
        with self._lock:
            self._db.close()

    def extend(self, docs: Iterable[Doc]) -> None:
        """Add pages behind the last one. ValueError, and nothing added, when out of order."""
        new = list(docs)
        with self._lock:
            last = self._keys[-1] if self._keys else None
            for doc in new:
                key = (doc.position, doc.part)
                if last is not None and key <= last:
                    raise ValueError(f"page {key} comes after {last}")
                last = key
            first = len(self._keys)
            texts = [_indexable(doc) for doc in new]
            with _transaction(self._db):
                self._db.executemany(
                    "INSERT INTO pages(rowid, text) VALUES (?, ?)", enumerate(texts, first)
                )
            tokenizer().prepare(texts)
            for text in texts:
                self._frequency.update(tokenizer().terms(text))
            for doc in new:
                self._keys.append((doc.position, doc.part))
                self._chars.append(len(doc.text))
                self._roles.append(doc.role)
                self._names.append(doc.name)
            self._count(first, 1)

    def truncate(self, position: int) -> None:
        """Drop every page at `position` or later."""
        with self._lock:
            first = bisect_left(self._keys, (position,))
            if first == len(self._keys):
                return
            gone = self._db.execute("SELECT text FROM pages WHERE rowid >= ?", (first,))
            for (text,) in gone.fetchall():
                self._frequency.subtract(tokenizer().terms(text))
            with _transaction(self._db):
                self._db.execute("DELETE FROM pages WHERE rowid >= ?", (first,))
            self._count(first, -1)
            for column in (self._keys, self._chars, self._roles, self._names):
                del column[first:]

    def search(
        self, query: str, limit: int, skip: Callable[[int, int], bool] | None = None
    ) -> list[Hit]:
        """The best `limit` pages for which `skip(position, part)` is not true, best first."""
        with self._lock:
            if limit <= 0 or not self._keys:
                return []
            asked = tokenizer().terms(_excerpt(query))
            content = [term for term in asked if term not in stop_terms()]
            named = self._named(content)
            plain = [t for t in content if not any(t in self._name_terms[n] for n in named)]
            terms = self._lookup(plain or content or asked)
            read = self._affordable(terms)
            own = {term.text: self._postings(term) for term in read if term.docs}
            scores = self._weigh(self._score(own), named)
            best = self._best(scores, limit, skip)
            rarity = {t.text: self._rarity(t.docs) for t in read if t.text not in idle_terms()}
            unique = self._rarity(1)
            return [
                Hit(*self._keys[row], score, _evidence(row, own, rarity) / unique)
                for row, score in best
            ]

    def prior(self, query: str) -> tuple[str, Callable[[dict[int, float]], dict[int, float]]]:
        """For another ranking of the same pages: the query without the names of speakers, and what makes of
        scores by row what they are worth for who speaks."""
        with self._lock:
            text = _excerpt(query)
            named = self._named([t for t in tokenizer().terms(text) if t not in stop_terms()])
            if named:
                names = frozenset[str]().union(*(self._name_terms[name] for name in named))
                words = [word for word in text.split() if names.isdisjoint(tokenizer().terms(word))]
                text = " ".join(words) or text
            return text, partial(self._weigh, named=named)

    # ------------------------------------------------------------ statistics
    def _count(self, first: int, sign: int) -> None:
        """Add (1) or take away (-1) the rows from `first` on."""
        for row in range(first, len(self._keys)):
            chars, role, name = self._chars[row], self._roles[row], self._names[row]
            self._total_chars += sign * chars
            self._role_chars[role] += sign * chars
            self._role_messages[role] += sign * (self._keys[row][1] <= 1)
            if name:
                if name not in self._name_terms:
                    words = tokenizer().terms(_excerpt(name))
                    self._name_terms[name] = frozenset(words) - stop_terms()
                self._speakers[name] += sign
                if not self._speakers[name]:
                    del self._speakers[name], self._name_terms[name]

    def _rarity(self, docs: int) -> float:
        return math.log(1 + (len(self._keys) - docs + 0.5) / (docs + 0.5))

    def _long_replies(self) -> float:
        """0 (replies as long as what the user writes) to 1 (much longer)."""
        user, reply = (
            self._role_chars[role] / max(1, self._role_messages[role])
            for role in ("user", "assistant")
        )
        low, high = LONG_REPLIES
        return min(1.0, max(0.0, (reply / user - low) / (high - low))) if user else 0.0

    # ------------------------------------------------------------ the query
    def _named(self, content: Sequence[str]) -> set[str]:
        """Speakers that the question names. One voice alone needs no telling apart."""
        if len(self._speakers) < 2:
            return set()
        return {n for n, words in self._name_terms.items() if not words.isdisjoint(content)}

    def _lookup(self, terms: Sequence[str]) -> list[_Term]:
        """The rarest terms, ordered by rarity; one that is nowhere counts for coverage only."""
        found = [
            _Term(text, self._frequency[text]) for text in _both_ends(terms, CANDIDATE_TERMS)
        ]
        found.sort(key=lambda term: (term.docs, term.text))
        absent = [term for term in found if not term.docs]
        return absent + found[len(absent) :][:QUERY_TERMS]

    def _affordable(self, terms: Iterable[_Term]) -> list[_Term]:
        """Terms to read, rarest first: as many as POSTINGS allows, and one at least."""
        chosen: list[_Term] = []
        spent = 0
        for term in terms:
            if spent and spent + term.docs > POSTINGS:
                break
            spent += term.docs
            chosen.append(term)
        return chosen

    def _postings(self, term: _Term) -> dict[int, float]:
        """Row -> what the term is worth there. Of a term over the limit, the newest part only."""
        first = 0
        if term.docs > POSTINGS:
            first = len(self._keys) - len(self._keys) * POSTINGS // term.docs
        rows = self._db.execute(
            "SELECT doc FROM occurrence WHERE term = ? AND doc >= ?", (term.text, first)
        )
        counts = Counter(itertools.chain.from_iterable(rows.fetchall()))
        rarity = self._rarity(term.docs) * (K1 + 1)
        floor = K1 * (1 - B)
        slope = K1 * B * len(self._keys) / max(1, self._total_chars)
        chars = self._chars
        return {
            row: rarity * count / (count + floor + slope * chars[row])
            for row, count in counts.items()
        }

    # ------------------------------------------------------------ scores
    def _score(self, own: dict[str, dict[int, float]]) -> dict[int, float]:
        """Row -> the sum, over terms, of the best of its own and its neighbours' share of it."""
        keep = 1 - (1 - LONG_REPLY_NEIGHBOURS) * self._long_replies()
        spreads = [
            (step, share * keep)
            for distance, share in enumerate(NEIGHBOUR_SHARE, 1)
            for step in (-distance, distance)
        ]
        scores: dict[int, float] = {}
        spent = 0
        for worth in own.values():
            spent += len(worth)
            reached = worth
            if spent <= SPREAD_POSTINGS:
                reached = dict(worth)
                for step, share in spreads:
                    for row, value in worth.items():
                        there, shared = row + step, value * share
                        if reached.get(there, 0.0) < shared:
                            reached[there] = shared
            for row, value in reached.items():
                scores[row] = scores.get(row, 0.0) + value
        rows, reach = len(self._keys), len(NEIGHBOUR_SHARE)
        for row in (*range(-reach, 0), *range(rows, rows + reach)):
            scores.pop(row, None)  # neighbours that do not exist
        return scores

    def _weigh(self, scores: dict[int, float], named: set[str]) -> dict[int, float]:
        reply = 1 / (1 + REPLY_DISCOUNT * self._long_replies())
        if reply < 1:
            roles = self._roles
            scores = {r: s * reply if roles[r] == "assistant" else s for r, s in scores.items()}
        if named:
            boost, names = 1 + SPEAKER_BOOST, self._names
            scores = {r: s * boost if names[r] in named else s for r, s in scores.items()}
        return scores

    def _best(
        self, scores: dict[int, float], limit: int, skip: Callable[[int, int], bool] | None
    ) -> list[tuple[int, float]]:
        """The first `limit` unskipped rows. Widens step by step: sorting all would cost more."""
        keys = self._keys
        wanted = limit if skip is None else 2 * limit + 16
        while True:
            least = heapq.nlargest(wanted, scores.values())[-1] if scores else 0.0
            best = [(row, score) for row, score in scores.items() if score >= least]
            best.sort(key=lambda item: (-item[1], -keys[item[0]][0], keys[item[0]][1]))
            if skip is None:
                return best[:limit]
            seen = (item for item in best if not skip(*keys[item[0]]))
            chosen = list(itertools.islice(seen, limit))
            if len(chosen) == limit or wanted >= len(scores):
                return chosen
            wanted *= 8


def _evidence(row: int, own: dict[str, dict[int, float]], rarity: dict[str, float]) -> float:
    return math.fsum(worth for term, worth in rarity.items() if row in own.get(term, ()))


def _both_ends(terms: Sequence[str], limit: int) -> Sequence[str]:
    if len(terms) <= limit:
        return terms
    return [*terms[: limit // 2], *terms[-(limit // 2) :]]


def _indexable(doc: Doc) -> str:
    return clean(f"{doc.name}: {doc.text}" if doc.name else doc.text)


def _excerpt(text: str) -> str:
    if len(text) <= QUERY_CHARS:
        return clean(text)
    half = QUERY_CHARS // 2
    return clean(f"{text[:half]} {text[-half:]}")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One transaction. There is no journal to roll back with: what goes in was checked before."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("COMMIT")
