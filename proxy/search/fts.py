"""The page index: which pages of ONE conversation path answer a question.

Promises:
- An index knows the pages it was given and nothing else: its statistics (how rare a word is, how
  long pages are, who speaks) come from this path alone, so no other conversation can change a
  result (invariant 6).
- The same pages give the same hits and scores, whatever extend/truncate calls led to them
  (invariant 7). Order: score, then the newer position, then the lower part.
- Any text is a valid query, and so are several. Time is bounded by the limits below.
- The scores of one search are comparable: where they fall, the answer ends.

How it ranks: BM25 over stems, and what beats it widely on both LoCoMo and BEAM
(tests/bench/recall_memory.py):
- stop words do not count, unless the query has nothing else;
- a word found in a neighbouring page counts for this page too, at a fraction and never on top of
  the page's own: what answers "Where did you go?" often shares no word with the question;
- where a word of about the same meaning stands instead of the asked one it counts, too, at a fraction: it
  ranks, and is no evidence;
- two words that stand side by side in the query count more where they do so in a page;
- a speaker named in the question favours that speaker's pages;
- a day, month or year in the question favours the pages that were seen then;
- where replies are much longer than what the user writes, replies weigh less and so do neighbours; where
  they are not, a long page is worth more than a short one;
- what the first hits speak of ranks the rest (a relevance model: Lavrenko and Croft 2001).
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import msgspec

from proxy.memory.ids import Doc, Hit
from proxy.memory.questions import Query
from proxy.search.dates import Date, days_asked, spans
from proxy.search.related import related
from proxy.search.speakers import speaker_label
from proxy.search.terms import (
    clean,
    languages_of,
    spoken,
    stop_terms,
    stops_of,
    tokenizer,
)

QUERY_CHARS = 4000  # a longer query is read at its beginning and at its end
QUERIES = 6  # of one search, that are read
QUERY_TERMS = 24  # the rarest terms of a query that are looked up
POSTINGS = 1500  # pages with a term that are read for one query, rarest terms first
CANDIDATES = 128  # the best by those, for which the other terms are read as well
SPREAD_POSTINGS = 800  # pages that also count for their neighbours

K1, B = 1.2, 0.75  # BM25
NEIGHBOUR_SHARE = (0.6, 0.4)  # of a term's weight, one and two pages away
ANSWER_SHARE = 1.3  # of that, where the page before ends by asking
RELATED_SHARE = 0.6  # of a term's weight, where a word of about the same meaning stands instead
RELATED_TERMS = 5  # such words of a term, the nearest that stand anywhere
RELATED_PAGES = 150  # a word that is on more tells nothing
RELATED_POSTINGS = 600  # of such words, that are read for one query
PAIR_SHARE = 0.25  # of two words' rarity, where they stand side by side
QUESTIONS_POWER = 0.75  # of several questions in one: 1 makes their best pages equal, 0 leaves the scores
CONTEXT_SHARE = 0.33  # of what the same words count in the question itself
CONTEXT_TERMS = 12
DATE_SHARE = 2.0  # of a day's, or a month's, rarity
SPEAKER_BOOST = 0.8
SPEAKER_PAGES = 1 / 3  # at least, that say who speaks: in fewer it is a heading ("Note: ...")
REPLY_DISCOUNT = 2.0
LENGTH_PRIOR = (3.0, 0.2)  # a page's length in average pages, at most; to this power, where replies are short
LONG_REPLIES = (1.5, 4.5)  # replies/user length: from here it matters, from there in full
LONG_REPLY_NEIGHBOURS = 0.5  # share of the neighbours' weight that remains then

SECOND_CANDIDATES = 64  # among which the first hits are
SECOND_PAGES = 6  # first hits whose words are read
SECOND_WORDS = 200  # of each of them
SECOND_TERMS = 24
SECOND_COMMON = 0.1  # a word that a larger share of the pages has tells nothing of them
SECOND_POSTINGS = 500
SECOND_SHARE = 0.15  # of the question's own weight

_ASKING = "?？؟"
_ASKING_CHARS = 120  # of a page's end
_TF_BITS = 8  # of a posting: row and how often the term stands there
_TF_MASK = (1 << _TF_BITS) - 1
_ID_BYTES = 4
_SAMPLED = 8  # every eighth score
_ROUNDED = 1e-6  # of a sum in another order
_PAGES_AT_ONCE = 256  # whose words are learned together


class _Term(NamedTuple):
    text: str
    rows: array[int]  # its postings
    docs: int  # as many


_Postings: TypeAlias = "array[int] | int"  # a term's; of most terms, which stand on one page, the one posting alone (0: there is none)


class _Rows(msgspec.Struct, array_like=True, gc=False):
    """Some rows of an index as they are stored. Numbers are as `_planes` has them; `new_terms`: after each row, how
    many first stood in these; `counts`: how many postings each of the terms `numbers` has in them."""

    keys: list[tuple[int, int]]
    chars: list[int]
    roles: list[str]
    names: list[str]
    asks: list[bool]
    lengths: list[int]
    new_terms: list[int]
    terms: list[str]
    counts: list[int]
    numbers: bytes
    postings: bytes
    words: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode_rows = msgspec.msgpack.Decoder(_Rows).decode


class _Asked(NamedTuple):
    """A query as it is looked up: its terms in order, each once, the stop words and what else is idle, the speakers
    that it names; what is looked up, the rarest first, and how much of that is read in full. `rarity`: what a page
    with that term, or of that date, proves; `words`: what one with all of them would."""

    query: Query
    sequence: list[str]
    asked: list[str]
    stops: frozenset[str]
    idle: frozenset[str]
    named: set[str]
    dates: dict[str, list[int]]
    terms: list[_Term]
    read: Sequence[_Term]
    rarity: dict[str, float]
    words: float


class _Numbers(dict[str, int]):
    """Term -> its number; a new one gets the next."""

    def __init__(self, postings: list[_Postings], texts: list[str]) -> None:
        self._postings, self._texts = postings, texts
        self._languages = languages_of()
        self.stops: dict[str, list[array[int]]] = {}  # language -> the postings of its stop words among them

    def __missing__(self, term: str) -> int:
        number = self[term] = len(self._texts)
        self._texts.append(term)
        languages = self._languages.get(term)
        if languages is None:
            self._postings.append(0)
            return number
        self._postings.append(rows := array("I"))
        for language in languages:
            self.stops.setdefault(language, []).append(rows)
        return number


class PageIndex:
    """The pages of one path, in ascending (position, part). Calls may come from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._postings: list[_Postings] = []  # by number
        self._texts: list[str] = []  # number -> term
        self._ids = _Numbers(self._postings, self._texts)  # and back
        self._keys: list[tuple[int, int]] = []  # row -> (position, part)
        self._words: list[bytes] = []  # row -> the numbers of its terms, in order
        self._terms_at: list[int] = []  # row -> how many terms there were after it: numbers follow from the pages
        self._chars: list[int] = []
        self._roles: list[str] = []
        self._names: list[str] = []
        self._asks: list[bool] = []
        self._speakers: Counter[str] = Counter()  # name -> pages
        self._name_terms: dict[str, frozenset[str]] = {}
        # Integers, so that taking away leaves exactly what adding less would have built.
        self._total_chars = 0
        self._role_chars: Counter[str] = Counter()
        self._role_messages: Counter[str] = Counter()
        self._spoken: tuple[str, ...] | None = None  # the languages of the pages, and
        self._weights: dict[int, float] = {}  # of a term in so many pages, as long as the pages are these

    def __len__(self) -> int:
        return len(self._keys)

    def close(self) -> None:
        """Free the memory. The index cannot be used afterwards."""
        with self._lock:
            for column in (self._postings, self._words, self._texts, self._ids.stops):
                column.clear()
            self._ids.clear()

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
            for at in range(0, len(new), _PAGES_AT_ONCE):
                self._add(new[at : at + _PAGES_AT_ONCE])
            self._weights.clear()
            self._spoken = None

    def truncate(self, position: int) -> None:
        """Drop every page at `position` or later."""
        with self._lock:
            first = bisect_left(self._keys, (position,))
            for row in reversed(range(first, len(self._keys))):
                for number in set(memoryview(self._words[row]).cast("I")):
                    if isinstance(postings := self._postings[number], int):
                        self._postings[number] = 0
                    else:
                        postings.pop()
                self._count(row, -1)
            terms = self._terms_at[first - 1] if first else 0
            for text in self._texts[terms:]:
                del self._ids[text]
            columns = (self._keys, self._words, self._chars, self._roles, self._names, self._asks, self._terms_at)
            for column in columns:
                del column[first:]
            del self._texts[terms:], self._postings[terms:]
            for stops in self._ids.stops.values():
                stops[:] = filter(None, stops)
            self._weights.clear()
            self._spoken = None

    def store(self, first: int, last: int) -> bytes:
        """The pages of positions first..last-1 as bytes, for `load` behind the pages before them."""
        with self._lock:
            begin, end = (bisect_left(self._keys, (position,)) for position in (first, last))
            words = b"".join(self._words[begin:end])
            terms = self._terms_at[begin - 1] if begin else 0
            numbers = array("I", sorted(set(memoryview(words).cast("I"))))
            found = array("I")
            counts = []
            for number in numbers:
                rows = self._rows(number)
                stand = rows[bisect_left(rows, begin << _TF_BITS) : bisect_left(rows, end << _TF_BITS)]
                found += stand
                counts.append(len(stand))
            texts = self._texts[terms : self._terms_at[end - 1]] if end else []
            return _encode(_Rows(
                self._keys[begin:end], self._chars[begin:end], self._roles[begin:end], self._names[begin:end],
                self._asks[begin:end], list(map(len, self._words[begin:end])),
                [count - terms for count in self._terms_at[begin:end]], texts, counts,
                _planes(numbers.tobytes()), _planes(found.tobytes()), _planes(words),
            ))  # fmt: skip

    def load(self, stored: bytes) -> None:
        """Add pages behind the last one, as `extend` would; a tenth of its work. ValueError for what `store` has not
        made, and nothing added."""
        rows = _decode_rows(stored)
        with self._lock:
            self._terms_at += [len(self._texts) + count for count in rows.new_terms]
            for text in rows.terms:
                self._ids[text]  # a new one gets the next number
            found, at, postings = _whole(rows.postings), 0, self._postings
            for number, count in zip(memoryview(_whole(rows.numbers)).cast("I"), rows.counts, strict=True):
                of_term = self._rows(number)
                of_term.frombytes(found[at : (at := at + count * _ID_BYTES)])
                if isinstance(postings[number], int):
                    postings[number] = of_term if len(of_term) > 1 else of_term[0]
            words, at = _whole(rows.words), 0
            for length in rows.lengths:
                self._words.append(words[at : (at := at + length)])
            self._keys += rows.keys
            self._chars += rows.chars
            self._roles += rows.roles
            self._names += rows.names
            self._asks += rows.asks
            for row in range(len(self._keys) - len(rows.keys), len(self._keys)):
                self._count(row, 1)
            self._weights.clear()
            self._spoken = None

    def search(
        self,
        queries: str | Sequence[str | Query],
        limit: int,
        skip: Callable[[int, int], bool] | None = None,
        seen_s: Callable[[int], int] | None = None,
        least: Callable[[float], float] | None = None,
    ) -> list[Hit]:
        """The best `limit` pages for which `skip(position, part)` is not true, best first. `seen_s(position)`: when
        that message was first seen (Unix seconds; they grow along the path, those that are not known are 0).
        `least(words)`: the evidence without which no page is wanted; where surely none has it, nothing is found.

        Of several queries, each is a question of its own: a page is worth what it is worth to the one it answers best.
        """
        asked = [
            Query(query) if isinstance(query, str) else query
            for query in ([queries] if isinstance(queries, str) else queries[:QUERIES])
        ]
        with self._lock:
            if limit <= 0 or not self._keys:
                return []
            read = [self._read(query, seen_s) for query in asked]
            words = min((query.words for query in read), default=0.0)
            if least is not None and not any(self._may_prove(query, least(words)) for query in read):
                return []
            scores, evidence = _merged([self._ask(query) for query in read])
            return [
                Hit(*self._keys[row], score, evidence.get(row, 0.0), words)
                for row, score in self._best(scores, limit, skip)
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

    # ------------------------------------------------------------ pages
    def _add(self, docs: Sequence[Doc]) -> None:
        texts = [_indexable(doc) for doc in docs]
        postings, number_of = self._postings, self._ids.__getitem__
        for doc, text, sequence in zip(docs, texts, tokenizer().sequences(texts), strict=True):
            if not text.isascii():
                sequence += tokenizer().syllables(text)
            row = len(self._keys)
            numbers = list(map(number_of, sequence))
            base = row << _TF_BITS
            for number, often in Counter(numbers).items():
                posting = base | (often if often < _TF_MASK else _TF_MASK)
                if not isinstance(rows := postings[number], int):
                    rows.append(posting)
                else:
                    postings[number] = array("I", (rows, posting)) if rows else posting
            self._words.append(array("I", numbers).tobytes())
            self._terms_at.append(len(self._texts))
            self._keys.append((doc.position, doc.part))
            self._chars.append(max(1, len(doc.text)))
            self._roles.append(doc.role)
            self._names.append(doc.name or speaker_label(doc.text))
            ends = doc.text[-_ASKING_CHARS:]
            self._asks.append("?" in ends or (not ends.isascii() and any(mark in ends for mark in _ASKING)))
            self._count(row, 1)

    def _rows(self, number: int) -> array[int]:
        """A term's postings."""
        rows = self._postings[number]
        return rows if not isinstance(rows, int) else array("I", (rows,) if rows else ())

    def _pages(self, text: str) -> int:
        """With that term."""
        number = self._ids.get(text)
        return 0 if number is None else len(self._rows(number))

    def _count(self, row: int, sign: int) -> None:
        """Add (1) or take away (-1) a row."""
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

    def _languages(self) -> tuple[str, ...]:
        """Told by how many pages have each stop word."""
        if self._spoken is None:
            pages = {language: sum(map(len, stops)) for language, stops in self._ids.stops.items()}
            self._spoken = spoken(pages)
        return self._spoken

    def _weight(self, docs: int) -> float:
        """What a term in so many pages counts: its rarity."""
        found = self._weights.get(docs)
        if found is None:
            found = self._weights[docs] = math.log(1 + (len(self._keys) - docs + 0.5) / (docs + 0.5))
        return found

    def _long_replies(self) -> float:
        """0 (replies as long as what the user writes) to 1 (much longer)."""
        user, reply = (
            self._role_chars[role] / max(1, self._role_messages[role])
            for role in ("user", "assistant")
        )
        low, high = LONG_REPLIES
        return min(1.0, max(0.0, (reply / user - low) / (high - low))) if user else 0.0

    # ------------------------------------------------------------ one query
    def _read(self, query: Query, seen_s: Callable[[int], int] | None) -> _Asked:
        """What is looked up for a query, and how much of it tells something."""
        text = _excerpt(query.text)
        sequence = tokenizer().sequence(text)
        asked = list(dict.fromkeys(sequence))
        stops, idle = stops_of(self._languages())
        content = [term for term in asked if term not in stops]
        named = self._named(content)
        plain = [t for t in content if not any(t in self._name_terms[n] for n in named)]
        days = days_asked(text) if seen_s else []
        dates = self._dated(days, seen_s) if days and seen_s else {}
        found = self._lookup(plain)
        terms = found if plain else self._lookup([] if dates else content or asked)
        unique = self._weight(1)
        rarity = {t.text: self._weight(t.docs) / unique for t in terms if t.text not in idle}
        for date, rows in itertools.islice(dates.items(), 1):  # the narrowest has the others in it
            rarity[date] = self._weight(len(rows)) / unique
        stand = {term.text for term in found}
        new = sum(1 for term in plain[:QUERY_TERMS] if term not in stand and term not in idle)
        words = math.fsum(rarity.values()) + new
        return _Asked(
            query, sequence, asked, stops, idle, named, dates, terms, self._affordable(terms), rarity, words
        )

    def _ask(self, query: _Asked) -> tuple[dict[int, float], dict[int, float]]:
        """Row -> score, row -> evidence."""
        _, sequence, asked, stops, idle, named, dates, terms, read, rarity, _ = query
        own = {term.text: self._worth(term, term.rows) for term in read}
        scores = self._score(self._with_related(own, asked, idle))
        for date, rows in dates.items():
            own[date] = dict.fromkeys(rows, DATE_SHARE * self._weight(len(rows)))
            _add(scores, own[date])
        if len(read) < len(terms):
            best = [row for row, _ in self._best(scores, CANDIDATES, None)]
            for term in terms[len(read) :]:
                there = own[term.text] = self._worth(term, _among(best, term.rows))
                for row, value in there.items():
                    scores[row] += value
        self._add_pairs(scores, own, sequence, terms)
        if query.query.context:
            self._add_context(scores, query.query.context, stops.union(asked))
        self._look_again(scores, idle.union(asked), terms, named)
        self._weigh(scores, named)
        evidence: dict[int, float] = {}
        for name, share in sorted(rarity.items()):
            for row in own.get(name, ()):
                evidence[row] = evidence.get(row, 0.0) + share
        return scores, evidence

    def _may_prove(self, query: _Asked, least: float) -> bool:
        """Whether any page may have so much evidence: told from the postings, without a score."""
        least -= _ROUNDED
        rest = [term for term in query.terms[len(query.read) :] if term.text in query.rarity]
        more = math.fsum(query.rarity[term.text] for term in rest)
        if more >= least:
            return True
        proven: dict[int, float] = {}
        get = proven.get
        for term in query.read:
            if (share := query.rarity.get(term.text)) is not None:
                for posting in term.rows:
                    row = posting >> _TF_BITS
                    proven[row] = get(row, 0.0) + share
        for date, rows in itertools.islice(query.dates.items(), 1):
            for row in rows:
                proven[row] = get(row, 0.0) + query.rarity[date]
        telling = sorted(((query.rarity[term.text], term.rows) for term in rest), key=itemgetter(0), reverse=True)
        for row, has in proven.items():
            most = has + more
            if most < least:
                continue
            for share, postings in telling:
                at = bisect_left(postings, row << _TF_BITS)
                if at == len(postings) or postings[at] >> _TF_BITS != row:
                    most -= share
                    if most < least:
                        break
            else:
                return True
        return False

    def _named(self, content: Sequence[str]) -> set[str]:
        """Speakers that the question names. One voice alone needs no telling apart."""
        if len(self._speakers) < 2 or sum(self._speakers.values()) < SPEAKER_PAGES * len(self._keys):
            return set()
        return {n for n, words in self._name_terms.items() if not words.isdisjoint(content)}

    def _dated(
        self, dates: Iterable[Date], seen_s: Callable[[int], int]
    ) -> dict[str, list[int]]:
        """The rows that were seen at each of these dates, where there are some."""
        positions = range(self._keys[-1][0] + 1)
        first, last = (
            datetime.fromtimestamp(seen_s(at), UTC).year
            for at in (min(bisect_left(positions, 1, key=seen_s), positions[-1]), positions[-1])
        )
        found: dict[str, list[int]] = {}
        for date in dates:
            rows: list[int] = []
            for span in spans(date, range(first, last + 1)):
                begin, end = (bisect_left(self._keys, (bisect_left(positions, at, key=seen_s),)) for at in span)
                rows += range(begin, end)
            if rows:
                found[str(date)] = rows
        return found

    def _lookup(self, terms: Sequence[str]) -> list[_Term]:
        """The rarest terms that stand anywhere, ordered by rarity."""
        numbers = ((text, self._ids.get(text)) for text in terms)
        rows = ((text, self._rows(n)) for text, n in numbers if n is not None and self._postings[n])
        found = [_Term(text, postings, len(postings)) for text, postings in rows]
        found.sort(key=lambda term: (term.docs, term.text))
        return found[:QUERY_TERMS]

    def _affordable(self, terms: Sequence[_Term]) -> Sequence[_Term]:
        """Terms that are read in full, rarest first: as many as POSTINGS allows."""
        spent = itertools.accumulate(term.docs for term in terms)
        return terms[: sum(total <= POSTINGS for total in spent) or 1]

    def _worth(self, term: _Term, postings: Iterable[int], share: float = 1.0) -> dict[int, float]:
        """Row -> what the term is worth there."""
        weight = share * self._weight(term.docs) * (K1 + 1)
        floor = K1 * (1 - B)
        slope = K1 * B * len(self._keys) / max(1, self._total_chars)
        chars = self._chars
        found: dict[int, float] = {}
        for posting in postings:
            row, times = posting >> _TF_BITS, posting & _TF_MASK
            found[row] = weight * times / (times + floor + slope * chars[row])
        return found

    def _score(self, own: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
        """Row -> the sum, over terms, of the best of its own and its neighbours' share of it."""
        keep = 1 - (1 - LONG_REPLY_NEIGHBOURS) * self._long_replies()
        near, far = (share * keep for share in NEIGHBOUR_SHARE)
        asks = self._asks
        scores: dict[int, float] = {}
        spent = 0
        for worth in own.values():
            spent += len(worth)
            reached = worth
            if spent <= SPREAD_POSTINGS:
                reached = dict(worth)
                get = reached.get
                for row, value in worth.items():
                    shared = value * near
                    if get(row - 1, 0.0) < shared:
                        reached[row - 1] = shared
                    if asks[row]:
                        shared *= ANSWER_SHARE
                    if get(row + 1, 0.0) < shared:
                        reached[row + 1] = shared
                    shared = value * far
                    if get(row - 2, 0.0) < shared:
                        reached[row - 2] = shared
                    if get(row + 2, 0.0) < shared:
                        reached[row + 2] = shared
            _add(scores, reached)
        rows, reach = len(self._keys), len(NEIGHBOUR_SHARE)
        for row in (*range(-reach, 0), *range(rows, rows + reach)):
            scores.pop(row, None)  # neighbours that do not exist
        return scores

    def _with_related(
        self, own: Mapping[str, Mapping[int, float]], asked: Sequence[str], idle: frozenset[str]
    ) -> Mapping[str, Mapping[int, float]]:
        """What the terms are worth by row, with the rows where a related word stands instead."""
        names = frozenset[str]().union(*self._name_terms.values())
        known, found, spent = idle.union(names, asked), dict(own), 0
        rarest = sorted((self._pages(text), text) for text in asked if text not in idle and text not in names)
        for pages, text in rarest[:QUERY_TERMS]:
            most, worth = self._weight(max(1, pages)), dict(found.get(text, ()))
            near = (term for term in related(text) if term not in known and 0 < self._pages(term) <= RELATED_PAGES)
            for term in itertools.islice(near, RELATED_TERMS):
                rows = self._rows(self._ids[term])
                spent += len(rows)
                if spent > RELATED_POSTINGS:
                    return found
                share = RELATED_SHARE * min(1.0, most / self._weight(len(rows)))
                for row, value in self._worth(_Term(term, rows, len(rows)), rows, share).items():
                    if value > worth.get(row, 0.0):
                        worth[row] = value
            if worth:
                found[text] = worth
        return found

    def _add_pairs(
        self,
        scores: dict[int, float],
        own: Mapping[str, Mapping[int, float]],
        sequence: Sequence[str],
        terms: Sequence[_Term],
    ) -> None:
        """What two terms that stand side by side in the query add where they do so in a page."""
        weights = {term.text: self._weight(term.docs) for term in terms}
        average = self._total_chars / len(self._keys)
        chars, words, ids = self._chars, self._words, self._ids
        for first, second in dict.fromkeys(itertools.pairwise(sequence)):
            if first not in weights or second not in weights:
                continue
            pattern = array("I", (ids[first], ids[second])).tobytes()
            worth = PAIR_SHARE * (weights[first] + weights[second])
            for row in own[first].keys() & own[second].keys():
                at = words[row].find(pattern)
                while at > 0 and at % _ID_BYTES:
                    at = words[row].find(pattern, at + 1)
                if at >= 0:
                    scores[row] += worth * min(1.0, math.sqrt(average / max(1, chars[row])))

    def _add_context(self, scores: dict[int, float], context: str, known: frozenset[str]) -> None:
        """What the words around the question add, as far as the pages that have them are few."""
        words = [term for term in tokenizer().terms(_excerpt(context)) if term not in known]
        for term in self._affordable(self._lookup(words)[:CONTEXT_TERMS]):
            _add(scores, self._worth(term, term.rows, CONTEXT_SHARE))

    def _weigh(self, scores: dict[int, float], named: set[str]) -> dict[int, float]:
        """The same scores, by who speaks and, in a chat of short messages, how long: "Take care!" is all of few words."""
        long_replies = self._long_replies()
        if long_replies > 0:
            roles, reply = self._roles, 1 / (1 + REPLY_DISCOUNT * long_replies)
            for row in scores:
                if roles[row] == "assistant":
                    scores[row] *= reply
        if long_replies < 1:
            chars, unit = self._chars, len(self._keys) / max(1, self._total_chars)
            most, power = LENGTH_PRIOR[0], LENGTH_PRIOR[1] * (1 - long_replies)
            for row in scores:
                length = chars[row] * unit
                scores[row] *= (length if length < most else most) ** power
        if named:
            boost, names = 1 + SPEAKER_BOOST, self._names
            for row in scores:
                if names[row] in named:
                    scores[row] *= boost
        return scores

    def _look_again(
        self, scores: dict[int, float], idle: frozenset[str], terms: Sequence[_Term], named: set[str]
    ) -> None:
        """Add what the pages share with the first hits, as a part of the question's own weight."""
        best = self._weigh(dict(self._best(scores, SECOND_CANDIDATES, None)), named)
        first = self._best(best, SECOND_PAGES, None)
        total = math.fsum(self._weight(term.docs) for term in terms)
        if not first or not total:
            return
        names = frozenset[str]().union(*self._name_terms.values())
        floor, slope = K1 * (1 - B), K1 * B * len(self._keys) / max(1, self._total_chars)
        texts, postings = self._texts, self._postings
        spoken: dict[int, float] = {}
        told = spoken.get
        for row, score in first:
            share, norm = score / first[0][1], floor + slope * self._chars[row]
            head = memoryview(self._words[row]).cast("I")[:SECOND_WORDS]
            for number, times in Counter(head).items():
                spoken[number] = told(number, 0.0) + share * times / (times + norm)
        most, weigh = SECOND_COMMON * len(self._keys), self._weight
        weighed = heapq.nsmallest(SECOND_TERMS, [
            (-value * weigh(pages), text, number)
            for number, value in spoken.items()
            if not isinstance(rows := postings[number], int) and 1 < (pages := len(rows)) <= most
            and (text := texts[number]) not in idle and text not in names
        ])  # fmt: skip
        added: dict[int, float] = {}
        get, chars, spent, weight = added.get, self._chars, 0, 0.0
        for value, _, number in weighed:
            rows = self._rows(number)
            spent += len(rows)
            if spent > SECOND_POSTINGS:
                break
            share = value / weighed[0][0] * self._weight(len(rows))
            weight += share
            for posting in rows:
                row, times = posting >> _TF_BITS, posting & _TF_MASK
                added[row] = get(row, 0.0) + share * times / (times + floor + slope * chars[row])
        part = SECOND_SHARE * (K1 + 1) * total / weight if weight else 0.0
        _add(scores, {row: part * worth for row, worth in added.items()})

    def _best(
        self, scores: dict[int, float], limit: int, skip: Callable[[int, int], bool] | None
    ) -> list[tuple[int, float]]:
        """The first `limit` unskipped rows. Widens step by step: sorting all would cost more."""
        keys = self._keys
        wanted = limit if skip is None else 2 * limit + 16
        while True:
            best = [(-score, -keys[row][0], keys[row][1], row) for row, score in _highest(scores, wanted)]
            best.sort()
            seen = ((row, -less) for less, _, _, row in best if skip is None or not skip(*keys[row]))
            chosen = list(itertools.islice(seen, limit))
            if len(chosen) == limit or wanted >= len(scores):
                return chosen
            wanted *= 8


def _highest(scores: Mapping[int, float], count: int) -> Iterable[tuple[int, float]]:
    """So many rows, and those with the score of the last of them, in any order. Sorting all would cost more: a sample
    tells about how high they are."""
    if count >= len(scores):
        return scores.items()
    sample = sorted(itertools.islice(scores.values(), 0, None, _SAMPLED))
    rank = count * len(sample) // len(scores) + _SAMPLED
    found: Iterable[tuple[int, float]] = scores.items()
    if rank < len(sample):
        least = sample[-rank]
        some = [pair for pair in found if pair[1] >= least]
        found = some if len(some) >= count else found
    least = sorted([score for _, score in found])[-count]
    return [pair for pair in found if pair[1] >= least]


def _add(scores: dict[int, float], more: Mapping[int, float]) -> None:
    if not scores:
        scores.update(more)
        return
    get = scores.get
    for row, value in more.items():
        scores[row] = get(row, 0.0) + value


def _merged(
    found: Sequence[tuple[dict[int, float], dict[int, float]]],
) -> tuple[dict[int, float], dict[int, float]]:
    """Several questions' scores and evidence in one: of each the best that a page has. The questions are brought near
    each other, as far as they have words that few pages have: a long one would have all the first places."""
    if len(found) < 2:
        return found[0] if found else ({}, {})
    tops = [max(scores.values(), default=0.0) for scores, _ in found]
    best: dict[int, float] = {}
    proven: dict[int, float] = {}
    for (scores, evidence), top in zip(found, tops, strict=True):
        factor = (max(tops) / top) ** QUESTIONS_POWER if top else 0.0
        factor *= min(1.0, max(evidence.values(), default=0.0))
        for row, score in scores.items():
            if score * factor > best.get(row, 0.0):
                best[row] = score * factor
        for row, share in evidence.items():
            if share > proven.get(row, 0.0):
                proven[row] = share
    return best, proven


def _among(rows: Iterable[int], postings: array[int]) -> Iterable[int]:
    """The postings of these rows."""
    for row in rows:
        at = bisect_left(postings, row << _TF_BITS)
        if at < len(postings) and postings[at] >> _TF_BITS == row:
            yield postings[at]


def _planes(numbers: bytes) -> bytes:
    """Numbers of four bytes, all first bytes first: most of the others are alike, and compress."""
    return b"".join(numbers[plane::_ID_BYTES] for plane in range(_ID_BYTES))


def _whole(planes: bytes) -> bytes:
    out, size = bytearray(len(planes)), len(planes) // _ID_BYTES
    for plane in range(_ID_BYTES):
        out[plane::_ID_BYTES] = planes[plane * size : (plane + 1) * size]
    return bytes(out)


def _indexable(doc: Doc) -> str:
    return clean(f"{doc.name}: {doc.text}" if doc.name else doc.text)


def _excerpt(text: str) -> str:
    if len(text) <= QUERY_CHARS:
        return clean(text)
    half = QUERY_CHARS // 2
    return clean(f"{text[:half]} {text[-half:]}")
