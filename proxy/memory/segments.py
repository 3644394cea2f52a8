"""A closed segment: its summary, its claims, how its tools were used and what it was about.

Promises: pure and deterministic; linear in the segment's text; the summary quotes the whole segment, not only
its start, each line with page id and speaker, and is at most `summary_tokens`; everything derived names the
pages that it was made from. What a segment makes, by page type: summary (one), claim (at most
CLAIMS_PER_SEGMENT), procedure (at most PROCEDURES_PER_SEGMENT: a tool used again and again), index (one line:
topics and first and last page). Transcript and artifact pages are the messages themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from proxy.memory.claims import Claim, claim_page, claims_in, place_claims
from proxy.memory.compressor import clip, hint
from proxy.memory.models import MemoryPage, PageType, StorageTier
from proxy.memory.procedures import procedure_pages
from proxy.memory.sentences import PageText, ReadPage, read_pages

SUMMARY_TOKENS = 400
SUMMARY_IMPORTANCE = 0.7
INDEX_TOKENS = 48
TOPICS = 6

_LINE_TOKENS = 32  # about one quoted sentence with its mark
_CHARS_PER_TOKEN = 4
_SENTENCE_CHARS = 150
_SENTENCES_PER_PAGE = 40  # of a long reply, its start
_TOOL_WORDS = 24
_ROLE_WEIGHT = {"user": 1.3, "assistant": 1.0}
_TOOL_WEIGHT = 0.6
_CLAIM_BONUS = 3.0

_TERM_CHARS = 5  # shorter words in lower case say little of what a text is about
_EDGES = ".,!?;:\"'()[]{}*`…“”‘’ "
_COMMON = frozenset(
    """
    about after again almost along already always among another anything aren't around because been before
    being below between bring can't certainly could couldn't didn't different doesn't doing don't during
    either enough every everything example excited experience feeling first found going getting great
    happy haven't having hello helps however i'd i'll i'm i've important including instead isn't it's
    keep know later let's likely little looking maybe might moment more never nothing other people please
    pretty probably provide quite ready really right should since small someone something sometimes soon start
    still stuff super support sure taking thank thanks that that's their them there these they things think
    this those though thought through today together totally trying under until using wanted wasn't what what's
    when where which while will without wonderful would wouldn't yeah years you'd you'll you're you've your
    here hear heard hope hey wow also make made want need like love good look some such very well have with
    from into then than just been were does done each both much many most only over same take time user assistant
    and are but can for how not now our the too use was who why yes you let did had has its see way
    https http url com www html
    """.split()
)
_SKIPPED = _COMMON | {word.capitalize() for word in _COMMON}


@dataclass(frozen=True, slots=True)
class Segment:
    """What closing a segment made. `superseded`: (old claim, new claim); `merged`: (known claim,
    page that says it again). Derived pages lie in L2 until something maps them.
    """

    number: int
    first_page_id: str
    last_page_id: str
    summary: MemoryPage
    index: MemoryPage
    claims: tuple[MemoryPage, ...] = ()
    procedures: tuple[MemoryPage, ...] = ()
    superseded: tuple[tuple[str, str], ...] = ()
    merged: tuple[tuple[str, str], ...] = ()

    def pages(self) -> list[MemoryPage]:
        """Every derived page, in a fixed order."""
        return [self.summary, *self.claims, *self.procedures, self.index]

    def encode(self) -> bytes:
        """As stored bytes; `decode_segment` reads them back."""
        stored = _Stored(
            self.number,
            self.first_page_id,
            self.last_page_id,
            self.summary.model_dump(mode="json"),
            self.index.model_dump(mode="json"),
            [page.model_dump(mode="json") for page in self.claims],
            [page.model_dump(mode="json") for page in self.procedures],
            self.superseded,
            self.merged,
        )
        return msgspec.msgpack.encode(stored)


class _Stored(msgspec.Struct, array_like=True):
    number: int
    first_page_id: str
    last_page_id: str
    summary: dict[str, Any]
    index: dict[str, Any]
    claims: list[dict[str, Any]]
    procedures: list[dict[str, Any]]
    superseded: tuple[tuple[str, str], ...]
    merged: tuple[tuple[str, str], ...]


def decode_segment(data: bytes) -> Segment:
    """What `encode` wrote. ValueError for other bytes."""
    stored = msgspec.msgpack.decode(data, type=_Stored)  # its errors are ValueErrors
    return Segment(
        stored.number,
        stored.first_page_id,
        stored.last_page_id,
        MemoryPage.model_validate(stored.summary),
        MemoryPage.model_validate(stored.index),
        tuple(MemoryPage.model_validate(page) for page in stored.claims),
        tuple(MemoryPage.model_validate(page) for page in stored.procedures),
        stored.superseded,
        stored.merged,
    )


def close_segment(
    number: int,
    docs: Sequence[PageText],
    existing_claims: Sequence[Claim],
    first_claim_number: int,
    turn: int,
    count: Callable[[str], int],
    summary_tokens: int = SUMMARY_TOKENS,
    claims_enabled: bool = True,
) -> Segment:
    """Segment `number` (from 1) of the pages `docs`, in their order; its new claims are numbered
    from `first_claim_number`. ValueError without pages.
    """
    if not docs:
        raise ValueError("a segment has at least one page")
    docs = [_valid(doc) for doc in docs]
    pages = read_pages(docs)
    found = claims_in(pages) if claims_enabled else []
    placed = place_claims(existing_claims, found, first_claim_number)
    candidates = list(_candidates(docs, pages))
    frequency = Counter(term for c in candidates for term in c.terms)
    text, sources = _summary(candidates, frequency, len(docs), found, summary_tokens, count)
    first, last = docs[0].page_id, docs[-1].page_id
    line = clip(_index_line(number, frequency, first, last), INDEX_TOKENS, count)
    return Segment(
        number=number,
        first_page_id=first,
        last_page_id=last,
        summary=_derived(f"summary_seg_{number:02d}", PageType.SUMMARY, text, sources, turn, count),
        index=_derived(f"index_seg_{number:02d}", PageType.INDEX, line, [first, last], turn, count),
        claims=tuple(claim_page(claim, count(claim.text), turn) for claim in placed.new),
        procedures=tuple(procedure_pages(number, docs, turn, count)),
        superseded=tuple(placed.superseded),
        merged=tuple(placed.merged),
    )


def _derived(
    page_id: str,
    page_type: PageType,
    text: str,
    sources: list[str],
    turn: int,
    count: Callable[[str], int],
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


# ---------------------------------------------------------------- the summary


class _Candidate(NamedTuple):
    place: int  # of the page in the segment
    number: int  # of the sentence in the page
    page_id: str
    label: str
    text: str
    weight: float
    terms: list[str]


def _candidates(docs: Sequence[PageText], pages: Sequence[ReadPage]) -> Iterator[_Candidate]:
    """Every sentence that the summary may quote; of a page without prose, how it begins."""
    for place, (doc, page) in enumerate(zip(docs, pages, strict=True)):
        weight = _ROLE_WEIGHT.get(page.role, _TOOL_WEIGHT)
        prose = page.sentences[:_SENTENCES_PER_PAGE]
        if not prose:
            start = hint(doc.text, _TOOL_WORDS)
            prose, weight = ([start] if start else []), weight / 2
        for number, text in enumerate(prose):
            words = [w for w in text.split() if len(w) >= _TERM_CHARS or not w.islower()]
            terms = [t for w in words if (t := w.strip(_EDGES)) and t not in _SKIPPED]
            yield _Candidate(place, number, page.page_id, page.speaker.label, text, weight, terms)


def _summary(
    candidates: list[_Candidate],
    frequency: Counter[str],
    places: int,
    claims: Sequence[Claim],
    limit: int,
    count: Callable[[str], int],
) -> tuple[str, list[str]]:
    """(text, quoted page ids): the best sentence of each stretch of the segment, then the best of
    all, as long as there is room."""
    claimed: dict[str, list[str]] = {}
    for claim in claims:
        claimed.setdefault(claim.provenance[0], []).append(claim.text.partition(": ")[2])
    worth = {term: _worth(term, times) for term, times in frequency.items()}
    scores = [_score(c, worth, claimed.get(c.page_id, ())) for c in candidates]
    order = sorted(range(len(candidates)), key=scores.__getitem__, reverse=True)
    stretches = max(1, min(places, limit // _LINE_TOKENS))
    best: dict[int, int] = {}
    for i in order:
        best.setdefault(candidates[i].place * stretches // places, i)
    first = sorted(best.values(), key=scores.__getitem__, reverse=True)
    ranked, seen, used = [], set[str](), 0
    for i in dict.fromkeys((*first, *order)):
        if used >= limit * _CHARS_PER_TOKEN:
            break
        if candidates[i].text not in seen:
            seen.add(candidates[i].text)
            ranked.append(candidates[i])
            used += min(len(candidates[i].text), _SENTENCE_CHARS) + len(candidates[i].page_id) + 12
    text = _lines(ranked)
    tokens = count(text)
    while tokens > limit and len(ranked) > 1:
        ranked = ranked[: max(1, min(len(ranked) - 1, len(ranked) * limit // tokens))]
        text = _lines(ranked)
        tokens = count(text)
    if tokens > limit:
        text = clip(text, limit, count)
    ids = {c.place: c.page_id for c in ranked}
    return text, [ids[place] for place in sorted(ids)] if text else []


def _worth(term: str, times: int) -> float:
    """What comes up often matters more, and so does a number or a name."""
    return (1.0 if term.islower() else 1.7) + 0.5 * math.log2(times)


def _score(candidate: _Candidate, worth: Mapping[str, float], claimed: Sequence[str]) -> float:
    """Telling terms per square root of length; a claim's sentence is worth most."""
    weight = candidate.weight * sum(map(worth.__getitem__, candidate.terms))
    score = weight / math.sqrt(30.0 + min(len(candidate.text), 3 * _SENTENCE_CHARS))
    if claimed and any(text in candidate.text for text in claimed):
        score += _CLAIM_BONUS
    return score


def _lines(chosen: Sequence[_Candidate]) -> str:
    """One line per page, in the segment's order: `msg_0042 Ada: ...`."""
    by_page: dict[int, list[_Candidate]] = {}
    for candidate in sorted(chosen, key=lambda c: (c.place, c.number)):
        by_page.setdefault(candidate.place, []).append(candidate)
    lines = []
    for said in by_page.values():
        lines.append(f"{said[0].page_id} {said[0].label}: {' '.join(_short(c.text) for c in said)}")
    return "\n".join(lines)


def _short(text: str) -> str:
    if len(text) <= _SENTENCE_CHARS:
        return text
    space = text.rfind(" ", _SENTENCE_CHARS // 2, _SENTENCE_CHARS)
    return text[: space if space > 0 else _SENTENCE_CHARS].rstrip(" ,;:") + "…"


# ---------------------------------------------------------------- the index


def _index_line(number: int, frequency: Counter[str], first: str, last: str) -> str:
    """`seg 03 (msg_0040-msg_0088): Postgres, deadline, migration`: the manifest's hint."""
    topics: dict[str, str] = {}
    for term, _ in frequency.most_common(4 * TOPICS):
        if len(topics) == TOPICS:
            break
        shown = term.rstrip("'.,:/%-").removesuffix("'s")[:24]
        if len(shown) > 2 and not shown.isdigit():
            topics.setdefault(shown.lower(), shown)
    return f"seg {number:02d} ({first}-{last}): {', '.join(topics.values())}".rstrip(": ")


class _ValidDoc(NamedTuple):
    page_id: str
    role: str
    name: str
    text: str


def _valid(doc: PageText) -> PageText:
    """Halves of surrogate pairs cannot be stored: each becomes U+FFFD."""
    if doc.text.isascii() and doc.name.isascii():
        return doc
    text, name = (s.encode("utf-8", "replace").decode("utf-8") for s in (doc.text, doc.name))
    return _ValidDoc(doc.page_id, doc.role, name, text)
