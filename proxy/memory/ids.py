"""The names of pages: `msg_0042`, `msg_0042.2`, `img_0042_1`, and the place along the path that each names.

Promises: an id and its place (0-based position, part) are one-to-one. Part 0 is a whole message; 1, 2, ...
are the parts of one too large for a page; from MEDIA_PART on it is a medium.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from proxy.media.parts import Kind
from proxy.memory.models import MEDIA_PART, Modality

_MAX_ID_DIGITS = 9
_MAX_ID_CHARS = 32  # no id is longer
_PARSED = 8192  # ids, kept with their places: a turn asks for each of its pages several times


class MediaKind(NamedTuple):
    """How the ids of one kind of media begin, and what kind of page such a medium is."""

    prefix: str
    modality: Modality


MEDIA_KINDS: dict[Kind, MediaKind] = {
    "image": MediaKind("img", Modality.IMAGE),
    "audio": MediaKind("aud", Modality.AUDIO),
    "video": MediaKind("vid", Modality.VIDEO),
    "file": MediaKind("file", Modality.TEXT),  # its words are its content
}
_MEDIA_PREFIXES = {kind.prefix for kind in MEDIA_KINDS.values()}


class Doc(NamedTuple):
    """One page's bare text and place."""

    position: int
    part: int
    role: str
    name: str
    text: str


class Hit(NamedTuple):
    """One page found. `score` orders the hits of one search (higher is better) and has no unit.

    `evidence`: the summed rarity of the query's content terms that the page itself contains, in
    units of a term that stands on one page only. It tells a question from small talk ("Tell me
    more" has one common term); 0 for a page found by its neighbours alone. `words`: what it would be
    of a page with all of the query's words, of which each that nobody has said is one.
    """

    position: int
    part: int
    score: float
    evidence: float = 0.0
    words: float = 0.0


def make_page_id(position: int, part: int = 0) -> str:
    """The id of the message at the 0-based `position` along the path: 0 -> "msg_0001"; part 2 ->
    "msg_0001.2". A medium's id is `media_page_id`'s to make: ValueError.
    """
    if not part:
        return f"msg_{position + 1:04d}"
    if part >= MEDIA_PART:
        raise ValueError("a medium's page id needs its prefix: see media_page_id")
    return f"msg_{position + 1:04d}.{part}"


def media_page_id(position: int, number: int, prefix: str) -> str:
    """The id of the `number`-th medium (from 1, all kinds counted together) of the message at
    `position`: (41, 1, "img") -> "img_0042_1". ValueError for a prefix of no kind.
    """
    if prefix not in _MEDIA_PREFIXES or number < 1:
        raise ValueError(f"no medium has the page id prefix {prefix!r} and the number {number}")
    return f"{prefix}_{position + 1:04d}_{number}"


def parse_page_id(text: str) -> tuple[int, int] | None:
    """(position, part) of a message's or a medium's page id, leading zeros optional; a medium's part
    is MEDIA_PART + its number. None for other strings, derived pages included.
    """
    return _parsed(text) if len(text) <= _MAX_ID_CHARS else None


@lru_cache(_PARSED)
def _parsed(text: str) -> tuple[int, int] | None:
    if text.startswith("msg_"):
        number, mark, part = text[4:].partition(".")
        first = 0
    else:
        prefix, _, rest = text.partition("_")
        if prefix not in _MEDIA_PREFIXES:
            return None
        number, mark, part = rest.partition("_")
        if not mark:
            return None
        first = MEDIA_PART
    if not (_is_number(number) and (not mark or _is_number(part))):
        return None
    position, piece = int(number) - 1, int(part) if mark else 0
    if position < 0 or piece >= MEDIA_PART or (mark and piece < 1):
        return None
    return position, first + piece


def canonical_page_id(text: str) -> str:
    """A message's or a medium's page id, however a model spells it, as we do ("MSG_42" ->
    "msg_0042", "img_42_01" -> "img_0042_1"); any other string as it is.
    """
    place = parse_page_id(text.lower())
    if place is None:
        return text
    position, part = place
    if part < MEDIA_PART:
        return make_page_id(position, part)
    return media_page_id(position, part - MEDIA_PART, text.lower().partition("_")[0])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_ID_DIGITS
