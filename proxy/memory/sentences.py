"""Messages as sentences: who speaks, what is prose, where a clause ends.

Promises: pure and linear in the text; code, tables, quotations and placeholders are left out, the
rest is the author's own words in order; nothing raises, whatever the text is. The rules of claims and the
summaries of segments both read messages through here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

MAX_SENTENCE_CHARS = 480  # longer runs are no sentences of a person's: lists, dumps, minified code
MAX_READ_CHARS = 32_000  # of one page: about two pages of the largest size that the proxy cuts

_FENCE = re.compile(r"^[ \t]*(```|~~~)", re.MULTILINE)
_ASIDE = re.compile(r"\[[^\[\]]{0,400}\]")  # [image img_0042_1], [shares image: ...], [1]
# Headings, quotations, tables, markup, JSON, comments, shell and stack traces are not sentences.
_NOT_PROSE = re.compile(
    r"[#>|<{}\[\]$@/\\=+]|\t| {8}|-{3}|(?:def|class|import|from \S+ import|File \") "
)
_MARKER = re.compile(r"\s*(?:[-*•+]\s+|\(?\d{1,2}[.)]\s+)+")
_END = re.compile(r"[.!?…][\"')\]”’*]*\s+|[。！？]\s*")
_SHORT_FORMS = frozenset("dr mr mrs ms st vs e.g i.e eg ie approx no jr sr inc ltd fig etc".split())
_SPEAKER = re.compile(r"\s*([^\W\d_][\w.'’\-]{0,23}(?: [^\W\d_][\w.'’\-]{0,23})?): ?")
_NO_SPEAKER = frozenset(
    """
    note notes warning error update summary question answer example result results thought action
    observation todo step context output input task edit ps tip agreed decision decided re fyi http
    https user assistant important reminder goal title subject
    """.split()
)
# Where a new statement begins after a space, and more of them after a comma. Lower case and with a
# literal in front of each alternative: the search then skips from one such character to the next.
_AFTER_SPACE = (
    r"but\b|although\b|though\b|whereas\b|[-–—]{1,2} "
    r"|and (?:(?:[Ii]|we|my|our|can|could|would|do|is|are|what|how|it|that|this|he|she|they|you|please)\b"
    r"|the [\w ]{2,30} (?:is|are)\b)"
)
_AFTER_COMMA = (
    r"(?:so|since|while|which|where|what|how|can|could|would|will|should|do|does|is|are|any|please"
    r"|[Ii]|we|my|our|let's|it|that|you|he|she|they|who|when|as|especially|then|plus)\b"
)
_CLAUSE_END = re.compile(rf"; |->|—| (?={_AFTER_SPACE})|, (?={_AFTER_SPACE}|{_AFTER_COMMA})")
_DASH = " -–—"


class PageText(Protocol):
    """A page's bare text and whose it is. `name` is "" where the message has none."""

    @property
    def page_id(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


class SegmentDoc(NamedTuple):
    """The plain `PageText`."""

    page_id: str
    role: str
    name: str
    text: str


class Spoken(NamedTuple):
    """A page with its speaker: `label` is a name, or the role; `person` is False for an assistant
    or a tool without a name of its own; `start` is where the words begin in the text."""

    label: str
    person: bool
    start: int
    named: bool = False


def spoken(docs: Sequence[PageText]) -> list[Spoken]:
    """Who speaks on each page: the message's name, else a "Name: " that opens at least two of the
    pages, else the role."""
    opens = [_SPEAKER.match(doc.text[:64]) for doc in docs]
    times = Counter(match.group(1) for match in opens if match is not None)
    out = []
    for doc, match in zip(docs, opens, strict=True):
        if doc.role not in ("user", "assistant"):
            out.append(Spoken(doc.role.capitalize() or "Tool", False, 0))
            continue
        said = match is not None and times[match.group(1)] > 1 and _is_name(match.group(1))
        start = match.end() if match is not None and said else 0
        name = doc.name or (match.group(1) if match is not None and said else "")
        out.append(
            Spoken(
                name or doc.role.capitalize(), bool(name) or doc.role == "user", start, bool(name)
            )
        )
    return out


class ReadPage(NamedTuple):
    """A page with its speaker and its prose."""

    page_id: str
    role: str
    speaker: Spoken
    sentences: list[str]


def read_pages(docs: Sequence[PageText]) -> list[ReadPage]:
    """The pages in their order, each read once."""
    return [
        ReadPage(doc.page_id, doc.role, speaker, sentences(doc.text, speaker.start))
        for doc, speaker in zip(docs, spoken(docs), strict=True)
    ]


def _is_name(text: str) -> bool:
    return text[0].isupper() and text.lower() not in _NO_SPEAKER


def sentences(text: str, start: int = 0) -> list[str]:
    """The prose of `text` from `start` on, sentence by sentence, list markers and emphasis taken
    off."""
    text = text[start : start + MAX_READ_CHARS].replace("’", "'")
    if "`" in text or "~~~" in text:
        text = _without_code(text)
    if "[" in text:
        text = _ASIDE.sub(" ", text)
    if "**" in text:
        text = text.replace("**", "")
    out: list[str] = []
    for line in text.splitlines():
        if line and not _NOT_PROSE.match(line):
            _split_line(line, out)
    return out


def _without_code(text: str) -> str:
    """`text` without fenced blocks; a fence that never closes runs to the end."""
    kept, inside, at = [], False, 0
    for match in _FENCE.finditer(text):
        if not inside:
            kept.append(text[at : match.start()])
        inside, at = not inside, match.start()
        if not inside:
            line_end = text.find("\n", match.end())
            at = len(text) if line_end < 0 else line_end
    if not inside:
        kept.append(text[at:])
    return "".join(kept)


def _split_line(line: str, out: list[str]) -> None:
    marker = _MARKER.match(line)
    start = marker.end() if marker else 0
    for match in _END.finditer(line, start):
        stop = match.start()
        if line[stop] == ".":
            before = line[max(start, stop - 6) : stop].rpartition(" ")[2].lower()
            if before in _SHORT_FORMS or (len(before) == 1 and before.isalpha()):
                continue
        _keep(line[start : match.end()].strip(), out)
        start = match.end()
    _keep(line[start:].strip(), out)


def _keep(sentence: str, out: list[str]) -> None:
    if 8 <= len(sentence) <= MAX_SENTENCE_CHARS:
        out.append(sentence)


def clauses(sentence: str) -> list[str]:
    """The sentence cut where a new statement or question may begin; each piece is verbatim."""
    pieces, start = [], 0
    for match in _CLAUSE_END.finditer(sentence):
        pieces.append(sentence[start : match.start()])
        start = match.end()
    pieces.append(sentence[start:])
    return [piece.strip(_DASH) for piece in pieces if piece]
