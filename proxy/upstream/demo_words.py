"""Words and sentences for the demo reader: light stemming, stop words, sentence ends.

Promises: pure and deterministic; `stems` and `content_terms` of one text are always the same.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?\d*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9À-Þ])|\n+")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Nr|No|ca|approx|vs|e\.g|i\.e|etc)\.$", re.IGNORECASE)
_ASKING = re.compile(
    r"^(?:(?:and|so|ok|okay|well|now|also|please|hey|but)[\s,]+)*"
    r"(?:what|when|where|which|who|whose|whom|why|how|can|could|would|will|do|does|did|is|are|was|were"
    r"|has|have|had|should|remind|tell|list|name|summari[sz]e|describe|explain|show|recall|find"
    r"|compare|give|based|according|considering)\b",
    re.IGNORECASE,
)
_STOP_WORDS = """
    a an the and or but if then than that this these those there here of in on at to for from by
    with without about into onto over under up down out off as is are was were be been being am do
    does did done doing have has had having i me my mine we us our ours you your yours he him his she
    her hers it its they them their theirs who whom whose which what when where why how not no nor so
    too very can could would should will shall may might must just also again once ever never any some
    all both each few more most other such own same s t don didn isn wasn doesn hasn haven ll ve re d m
    please tell told say said mention mentioned remember remind recall earlier before ago now still yet
    get got give list name know think exactly actually really let us based according kind many much
    one thing things way something anything first go went make made use used
"""
_STOP = frozenset(_STOP_WORDS.split())
_IRREGULAR = {
    "paid": "pay", "bought": "buy", "sold": "sell", "chose": "choose", "chosen": "choose",
    "came": "come", "took": "take", "taken": "take", "found": "find", "gave": "give", "given": "give",
    "kept": "keep", "left": "leave", "lent": "lend", "built": "build", "broke": "break",
    "broken": "break", "wrote": "write", "written": "write", "spent": "spend", "cost": "cost",
    "met": "meet", "saw": "see", "seen": "see", "began": "begin", "begun": "begin", "drew": "draw",
    "grew": "grow", "won": "win", "lost": "lose", "held": "hold", "taught": "teach", "ran": "run",
    "sent": "send", "brought": "bring", "caught": "catch", "fell": "fall", "drove": "drive",
    "ate": "eat", "weighs": "weigh", "weight": "weigh", "children": "child", "women": "woman",
    "men": "man", "feet": "foot", "hung": "hang", "stood": "stand", "swam": "swim", "slept": "sleep",
}  # fmt: skip


class Term(NamedTuple):
    word: str  # as written, lower case
    stem: str
    key: bool  # a name or a number: an answer's passage must have it


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A light stem of one word: case, possessive, plural, -ed, -ing, -ly, a final e."""
    w = word.lower().replace("’", "'")
    w = w.split("'")[0] or w
    if w[:1].isdigit():
        return w.replace(",", "")
    if w in _IRREGULAR:
        return _IRREGULAR[w].rstrip("e")
    for end, put, least in (("ies", "y", 5), ("sses", "ss", 5), ("ing", "", 6), ("edly", "", 7),
                            ("ed", "", 5), ("ly", "", 6), ("es", "", 5), ("s", "", 4)):  # fmt: skip
        if w.endswith(end) and len(w) >= least and not w.endswith(("ss", "us", "is")):
            w = w[: -len(end)] + put
            break
    if len(w) > 4 and w[-1] == w[-2] and w[-1] not in "aeiouls":
        w = w[:-1]
    return w[:-1] if w.endswith("e") and len(w) > 3 else w


@lru_cache(maxsize=8192)
def stems(text: str) -> frozenset[str]:
    """The stems of all words of a text."""
    return frozenset(stem(w) for w in _WORD.findall(text))


def sentences(text: str) -> list[str]:
    """A text in sentences; abbreviations do not end one."""
    out: list[str] = []
    for piece in _SENTENCE_END.split(text):
        piece = piece.strip()
        if not piece:
            continue
        if out and _ABBREVIATION.search(out[-1]):
            out[-1] = f"{out[-1]} {piece}"
        else:
            out.append(piece)
    return out


def is_question(text: str) -> bool:
    """Whether the text asks: a sentence that ends in a question mark, or a request to tell."""
    said = sentences(text)
    if any(s.rstrip("\"'”’) ").endswith("?") for s in said):
        return True
    return len(said) == 1 and len(text) < 400 and _ASKING.match(text.strip()) is not None


def content_terms(text: str) -> list[Term]:
    """The content words of the part of the text that asks (of all of it when that has too few)."""
    asking = [s for s in sentences(text) if s.rstrip("\"'”’) ").endswith("?")]
    terms = _terms(asking) if asking else []
    return terms if len({t.stem for t in terms}) >= 3 else _terms(sentences(text))


def _terms(said: list[str]) -> list[Term]:
    found: dict[str, Term] = {}
    for s in said:
        for i, w in enumerate(_WORD.findall(s)):
            lower = w.lower().replace("’", "'")
            if lower in _STOP or lower.split("'")[0] in _STOP or (len(lower) < 2 and not lower.isdigit()):
                continue
            key = w[0].isdigit() or (w[0].isupper() and i > 0 and lower != "i")
            found.setdefault(stem(w), Term(lower.split("'")[0], stem(w), key))
    return list(found.values())
