"""The passages of a text that a query is about: what is shown of a page that is too long to be shown whole. Pure.

Promises: within `max_tokens`, as the counter counts; text of the page, in the page's order, "…" where something is
left out; when the tokens take the query's words that stand in the page, one by one with the marks between them, each of
them is shown, the rare ones first; what is left shows them in their lines (code, logs, tables) or sentences (prose),
then what stands around those. The same arguments give the same passages; linear in the text, of which little more than
what is shown is tokenised.

The matching is a light one of its own (stems.py: the index's stems, without the index). The index could name the stems
that it matched, not where they stand: it reads a page with spaces in it that the page has not, and without the call
that a result is shown with; and a page that is faulted in, or shown unasked, was found by no search.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from proxy.memory.compressor import compress_text
from proxy.memory.models import CompressionLevel
from proxy.memory.stems import RUN, WORD, folded, stem
from proxy.memory.words import SENTENCE_END, STOP_WORDS

MARK = "…"
_MARK_TOKENS = 3  # of a mark with the white space around it, at most
LEAST_TOKENS = _MARK_TOKENS + 1  # with fewer, no passage is found
_TERMS = 24  # of one query, from both of its ends
_QUERY_CHARS = 2_000  # of one query, at each of its ends
_LATER_QUERIES = 0.5  # a word of theirs, beside the same word of the first
_LINE_CHARS = 200  # a longer line is shown by its sentences
_LONGEST_PIECE_CHARS = 320
_AROUND_CHARS = 48  # of a word's line or sentence, where the whole of it has no room
_SUPPORT = 0.5  # what a word counts for in a piece where it need not be shown
_NEXT, _PREVIOUS, _AGAIN = 0.8, 0.7, 0.1  # what a piece behind, before, or like one that is shown is worth of it
_SHORT_CHARS = 40  # a piece is worth its words by the square root of its length and this
_CHARS_PER_TOKEN = 16  # no piece with more is counted: it does not fit
_GAP_CHARS = 3  # a shorter gap is shown rather than marked
_SPACE_CHARS = 40  # white space that is kept as it is

_SENTENCE = re.compile(SENTENCE_END)
_BETWEEN = re.compile(r"[^\w\s]")  # where a run without spaces may be cut
Count = Callable[[str], int]
Span = tuple[int, int]


def passage(text: str, queries: Sequence[str], max_tokens: int, count: Count) -> str:
    """What is shown of `text` in `max_tokens`: all of it where that fits, else the passages around the words of
    `queries` (the first counts most), else, where none of them stands in it, the text's own most telling sentences."""
    if len(text) <= max_tokens * _CHARS_PER_TOKEN and count(text) <= max_tokens:
        return text
    found = find_passages(text, queries, max_tokens, count)
    return found or compress_text(text, CompressionLevel.REDUCED, max_tokens, count)


def find_passages(text: str, queries: Sequence[str], max_tokens: int, count: Count) -> str:
    """The passages of `text` around the words of `queries`; "" where none of them stands in it, or fits."""
    asked, heads, runs = _all_asked(tuple(queries))
    low = folded(text)
    matches = sorted([*_words_in(low, asked, heads), *_runs_in(low, runs)])
    if not matches:
        return ""
    return _Selection(text, matches, asked, max_tokens, count).shown()


# -- words


class _Match(NamedTuple):
    start: int
    end: int
    term: str


@lru_cache(maxsize=16)
def _all_asked(
    queries: tuple[str, ...],
) -> tuple[Mapping[str, float], Collection[str], Mapping[str, None]]:
    """What each stem of the queries counts, what the words begin with that may have them, and their runs of scripts
    without spaces: once for all pages that they are shown of."""
    asked: dict[str, float] = {}
    runs: dict[str, None] = {}
    for number, query in enumerate(queries):
        words, unspaced = _asked(query)
        for word in words:
            asked.setdefault(word, _LATER_QUERIES if number else 1.0)
        runs.update(unspaced)
    # A word begins with its stem, but for the stem's last letter (tests/memory/test_stems.py).
    return asked, {one[:-1] or one for one in asked if one}, runs


def _asked(query: str) -> tuple[list[str], dict[str, None]]:
    """The stems of a query's words, and its runs of scripts without spaces."""
    if len(query) > 2 * _QUERY_CHARS:
        query = f"{query[:_QUERY_CHARS]} {query[-_QUERY_CHARS:]}"
    low = folded(query)
    runs = [] if low.isascii() else list(dict.fromkeys(match.group() for match in RUN.finditer(low)))
    words = WORD.findall(RUN.sub(" ", low) if runs else low)
    telling = [word for word in words if word not in STOP_WORDS] or ([] if runs else words)
    stems = list(dict.fromkeys(map(stem, telling)))
    if len(stems) > _TERMS:
        stems = [*stems[: _TERMS // 2], *stems[-_TERMS // 2 :]]
    return stems, dict.fromkeys(runs[:_TERMS])


def _words_in(low: str, asked: Collection[str], heads: Iterable[str]) -> Iterator[_Match]:
    """Where the words of these stems stand in a folded text. (To compile a pattern takes longer than a short page.)"""
    starts: set[int] = set()
    for head in heads:
        at = low.find(head)
        while at >= 0:
            if not low[at - 1 : at].isalnum():
                starts.add(at)
            at = low.find(head, at + 1)
    end = 0
    for start in sorted(starts):
        if start >= end and (word := WORD.match(low, start)):
            end, term = word.end(), stem(word.group())
            if term in asked:
                yield _Match(start, end, term)


def _runs_in(low: str, runs: Collection[str]) -> list[_Match]:
    """Where pairs of the characters of these runs stand in it (triples of letters); single characters where no
    pair does."""
    grams: set[str] = set()
    for run in runs:
        match = RUN.fullmatch(run)
        size = min(len(run), 2 if match and match.group(1) else 3)
        grams.update(run[i : i + size] for i in range(len(run) - size + 1))
    if not grams:
        return []
    found: list[_Match] = []
    single: list[_Match] = []
    letters = "".join(sorted({re.escape(letter) for run in runs for letter in run}))
    for match in re.finditer(f"[{letters}]+", low):
        at, said = match.start(), match.group()
        for i, letter in enumerate(said):
            single.append(_Match(at + i, at + i + 1, letter))
            for gram in {said[i : i + size] for size in (1, 2, 3)} & grams:
                found.append(_Match(at + i, at + i + len(gram), gram))
    return found or single


# -- pieces


def _pieces(text: str, matches: Sequence[_Match]) -> list[Span]:
    """(start, end) of each line, sentence of a long line, or bounded run; a word that matches is not cut."""
    spans: list[Span] = []
    at = 0
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        ends = [match.end() for match in _SENTENCE.finditer(text, at, end)] if end - at > _LINE_CHARS else []
        for stop in (*ends, end):
            while stop - at > _LONGEST_PIECE_CHARS:
                cut = _cut(text, at, matches)
                spans.append((at, cut))
                at = cut
            shown = at + len(text[at:stop].rstrip())
            if shown > at:
                spans.append((at, shown))
            at = stop
        at = end + 1
    return spans


def _cut(text: str, start: int, matches: Sequence[_Match]) -> int:
    """Where a piece ends that begins at `start` and has no end of its own: behind a space, else behind a mark,
    else between any two characters."""
    middle, end = start + _LONGEST_PIECE_CHARS // 2, start + _LONGEST_PIECE_CHARS
    cut = text.rfind(" ", middle, end) + 1 or max((m.end() for m in _BETWEEN.finditer(text, middle, end)), default=end)
    at = bisect_right(matches, (cut,)) - 1
    if at >= 0 and matches[at].start < cut < matches[at].end:
        return matches[at].start if matches[at].start > start else matches[at].end
    return cut


# -- what is shown


class _Selection:
    """One text's passages: what of it is chosen, and what that costs."""

    def __init__(
        self, text: str, matches: Sequence[_Match], asked: Mapping[str, float], max_tokens: int, count: Count
    ) -> None:
        self._text, self._max, self._count = text, max_tokens, count
        self._pieces = _pieces(text, matches)
        starts = [start for start, _ in self._pieces]
        self._terms: dict[int, dict[str, Span]] = {}  # piece -> its terms, each where it stands first
        for match in matches:
            piece = max(0, bisect_right(starts, match.start) - 1)
            self._terms.setdefault(piece, {}).setdefault(match.term, (match.start, match.end))
            start, end = self._pieces[piece]
            self._pieces[piece] = start, max(end, match.end)  # pairs of characters overlap
        pieces_with = Counter(term for terms in self._terms.values() for term in terms)
        self._worth = {
            term: math.log(1 + len(self._pieces) / pieces) * asked.get(term, 1.0) for term, pieces in pieces_with.items()
        }

    def shown(self) -> str:
        """The passages, "" when not even one word fits."""
        cover = self._cover()
        whole = [self._pieces[piece] for piece, _ in cover]
        chosen = self._filled(whole) if self._price(whole) <= self._max else self._squeezed(cover)
        said = self._said(chosen)
        if self._count(said) > self._max:  # prices are of each by itself: together they may, rarely, count more
            whole = chosen
            kept = bisect_left(range(len(whole)), True, key=lambda n: self._count(self._said(whole[: n + 1])) > self._max)
            chosen = whole[:kept]
            said = self._said(chosen)
        return said if chosen else ""

    def _value(self, piece: int) -> float:
        return math.fsum(self._worth[term] for term in self._terms.get(piece, ()))

    def _cover(self) -> list[tuple[int, list[Span]]]:
        """Pieces that have all terms, few and telling, the best first, each with where those terms stand in it
        that none before it has."""
        best: dict[frozenset[str], tuple[float, int]] = {}  # of the pieces with the same terms
        for piece, spans in self._terms.items():
            support = self._value(piece) + _SUPPORT * (self._value(piece - 1) + self._value(piece + 1))
            key = frozenset(spans)
            best[key] = max(best.get(key, (-1.0, 0)), (_SUPPORT * support, -piece))
        missing = set(self._worth)

        def gain(terms: frozenset[str]) -> tuple[float, int]:
            support, piece = best[terms]
            new = math.fsum(self._worth[term] for term in terms & missing)
            return (new + support if new else 0.0), piece

        cover: list[tuple[int, list[Span]]] = []
        while missing:
            terms = max(best, key=gain)
            piece = -best[terms][1]
            cover.append((piece, sorted(self._terms[piece][term] for term in terms & missing)))
            missing -= terms
        return cover

    # -- where the pieces have room

    def _filled(self, chosen: list[Span]) -> list[Span]:
        """These pieces, and others, by what their words and those beside them are worth."""
        numbers = {span: number for number, span in enumerate(self._pieces)}
        left, taken = self._max - self._price(chosen), {numbers[span] for span in chosen}
        queue = [(-self._rank(piece, _AGAIN * self._value(piece)), piece) for piece in self._terms if piece not in taken]
        heapify(queue)

        def beside(piece: int, value: float) -> None:
            for other, share in ((piece + 1, _NEXT), (piece - 1, _PREVIOUS)):
                if 0 <= other < len(self._pieces) and other not in taken:
                    heappush(queue, (-self._rank(other, share * value), other))

        for piece in sorted(taken):
            beside(piece, self._value(piece))
        while queue and left > _MARK_TOKENS:
            rank, piece = heappop(queue)
            span = self._pieces[piece]
            if piece in taken or (price := self._price([span])) > left:
                continue
            taken.add(piece)
            chosen.append(span)
            left -= price
            beside(piece, -rank * math.sqrt(_SHORT_CHARS + span[1] - span[0]))
        return chosen

    def _rank(self, piece: int, value: float) -> float:
        start, end = self._pieces[piece]
        return value / math.sqrt(_SHORT_CHARS + end - start)

    # -- where they have not

    def _squeezed(self, cover: Sequence[tuple[int, list[Span]]]) -> list[Span]:
        """The words first, then what is around each, then its whole piece, as far as the tokens go."""
        left = self._max
        steps: list[tuple[int, list[Span]]] = []
        for piece, spans in cover:
            kept: list[Span] = []
            for span in spans:
                if (price := self._price([span])) <= left:
                    kept.append(span)
                    left -= price
            steps.append((piece, kept))
        for widen in (self._around, self._whole):
            for number, (piece, spans) in enumerate(steps):
                if not spans:
                    continue
                wider = widen(piece, spans)
                if (price := self._price(wider) - self._price(spans)) <= left:
                    steps[number] = piece, wider
                    left -= price
        return [span for _, spans in steps for span in spans]

    def _whole(self, piece: int, spans: Sequence[Span]) -> list[Span]:
        return [self._pieces[piece]]

    def _around(self, piece: int, spans: Sequence[Span]) -> list[Span]:
        """Each with some characters of its piece on both sides, to a space where there is one; those that meet are
        one."""
        first, last = self._pieces[piece]
        wide: list[Span] = []
        for start, end in spans:
            low, high = start - _AROUND_CHARS, end + _AROUND_CHARS
            low = first if low <= first else self._text.find(" ", low, start) + 1 or low
            space = self._text.rfind(" ", end, high)
            high = last if high >= last else space if space >= 0 else high
            if wide and low <= wide[-1][1] + _GAP_CHARS:
                low, high = wide[-1][0], max(high, wide.pop()[1])
            wide.append((low, high))
        return wide

    def _price(self, spans: Sequence[Span]) -> int:
        """Tokens of these, each by itself between two marks."""
        total = 0
        for start, end in spans:
            fits = end - start <= self._max * _CHARS_PER_TOKEN
            total += _MARK_TOKENS + (self._count(self._text[start:end]) if fits else self._max)
        return total

    def _said(self, spans: Sequence[Span]) -> str:
        """These parts of the text in its order, with a mark for each part that is left out."""
        text, out, at = self._text, list[str](), 0
        for start, end in sorted(spans):
            if end <= at and out:
                continue
            start = max(start, at)
            gap = text[at:start]
            if not gap.strip() and out:
                out.append(gap if len(gap) <= _SPACE_CHARS else "\n" if "\n" in gap else " ")
            elif gap.strip() and out and len(gap) <= _GAP_CHARS:
                out.append(gap)
            elif gap.strip():
                before = "\n" if "\n" in gap and gap[-1] == "\n" else " "
                out.append(f"{before if out else ''}{MARK}{before}")
            out.append(text[start:end])
            at = end
        rest = text[at:]
        if rest.strip():
            out.append(f"\n{MARK}" if rest[0] == "\n" else f" {MARK}")
        return "".join(out)
