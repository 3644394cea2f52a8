"""Lower levels of text: fewer tokens, in the page's own words.

Promises: deterministic; level 0 is the text itself, never shortened; a higher level is at most
`max_tokens` and at most its level's own limit; linear in the text, and only the short result is
tokenised. Extractive: sentences are ranked by the damped frequency of their terms, with a bonus for
what is costly to lose (numbers, names, identifiers, decisions); what it keeps of them is measured by
tests/bench/levels.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import chain

from proxy.memory.models import CompressionLevel
from proxy.memory.words import SENTENCE_END, STOP_WORDS

ABSTRACT_TOKENS = 48
REFERENCE_TOKENS = 12
_REDUCED_SHARE = 3  # level 1 keeps about a third
_SMALL_CHARS = 160  # a text this short is its own level 1
_ABSTRACT_CHARS = 190
_CHARS_PER_TOKEN = 4

_READ_CHARS = 262_144  # of a text, its beginning: some 0.2 s
_LONGEST_PIECE_CHARS = 320  # text without sentences or lines is ranked in runs of this length

_PIECE_END = re.compile(rf"{SENTENCE_END}|\n\s*")
_WORD = re.compile(r"\w{3,}|\d+")
_TERM = re.compile(r"\w{2,}")
# What a conversation decided or was told to keep.
_DECISION = frozenset(
    """
    decide decided decision agree agreed must never always prefer prefers important remember
    deadline conclude concluded conclusion
    """.split()
)
# Why it did, and what it asked.
_QUESTION = frozenset("because should will what when where which who why how".split())
_IDLE = STOP_WORDS | frozenset(
    """
    aren because come didn get going good great hello hey isn know let like long make many much new
    okay old one only put really say see sure take thank thanks think time two use want wasn way
    well won yeah
    """.split()
)
_NO_TOPIC = _IDLE | _DECISION | _QUESTION


def compress_text(
    text: str,
    level: CompressionLevel | int,
    max_tokens: int | None,
    count: Callable[[str], int],
) -> str:
    """`text` at `level`: 0 itself, 1 about a third, 2 key points (<= 48 tokens), 3 topic tags (<=
    12 tokens).

    `max_tokens` is a further limit on levels 1 to 3 (None: only the level's own).
    """
    if level == CompressionLevel.FULL:
        return text
    text = text[:_READ_CHARS]
    if level == CompressionLevel.REDUCED:
        budget_chars = max(_SMALL_CHARS, len(text) // _REDUCED_SHARE)
        limit = max_tokens
    elif level == CompressionLevel.ABSTRACT:
        budget_chars = min(_ABSTRACT_CHARS, max(_SMALL_CHARS // 2, len(text) // 6))
        limit = ABSTRACT_TOKENS if max_tokens is None else min(ABSTRACT_TOKENS, max_tokens)
    else:
        cap = REFERENCE_TOKENS if max_tokens is None else min(REFERENCE_TOKENS, max_tokens)
        tags = _tags(text, cap)
        return clip(tags if len(tags) <= len(text) else text.strip(), cap, count)
    if limit is not None:
        budget_chars = min(budget_chars, limit * _CHARS_PER_TOKEN)
    slack_chars = budget_chars // 5 if level == CompressionLevel.REDUCED else 0
    short = _select(text, budget_chars, slack_chars)
    return short if limit is None else clip(short, limit, count)


def clip(text: str, max_tokens: int, count: Callable[[str], int]) -> str:
    """The longest start of `text`, cut at a word where there is one, that is surely within
    `max_tokens`.
    """
    if max_tokens <= 0:
        return ""
    text = text[: max_tokens * 16]  # no counter is asked about a megabyte to keep a line
    while text and len(text.encode("utf-8", "surrogatepass")) > max_tokens:
        tokens = count(text)
        if tokens <= max_tokens:
            return text
        length = min(len(text) - 1, int(len(text) * max_tokens / tokens * 0.95))
        space = text.rfind(" ", length // 2, length + 1)
        text = text[: space if space > 0 else length].rstrip(" ,")
    return text


def hint(text: str, max_words: int = 10) -> str:
    """One line that says what a page is about: its start without greeting, whitespace folded, "…"
    if cut.
    """
    words = text[:600].split()
    skip = 0
    # "Sure!", "Hey Mel!" and the like say nothing; a short exclamation in front of more is passed
    # over.
    for index, word in enumerate(words[:4]):
        if word[-1] == "!" and len(words) > index + 4:
            skip = index + 1
    chosen = [word[:32] for word in words[skip : skip + max_words]]
    line = " ".join(chosen)[: max_words * 9]
    cut = len(words) - skip > max_words or len(text) > 600
    return f"{line}…" if cut and line else line


def _select(text: str, budget_chars: int, slack_chars: int) -> str:
    """The best ranked pieces that fit in `budget_chars`, in their original order.

    The last one taken may overrun by `slack_chars`: a good sentence beats the filler that fits.
    """
    if len(text) <= budget_chars:
        return text.strip()
    spans, ranked = _ranked(text)
    left, chosen = budget_chars, []
    taken: set[str] = set()  # logs and lists repeat themselves: once is enough
    for rank, index in ranked:
        start, end = spans[index]
        length = end - start
        if left < 16 or rank > 0.5 * ranked[0][0]:  # what is left is filler beside the best
            break
        if length < left + slack_chars and text[start:end] not in taken:
            taken.add(text[start:end])
            chosen.append(index)
            left -= length + 1
    if not chosen:
        start = spans[ranked[0][1]][0] if ranked else 0
        return text[start : start + budget_chars].strip()
    chosen.sort()
    return _join(text, [spans[index] for index in chosen])


@lru_cache(maxsize=4)  # the levels of one page are asked for in a row
def _ranked(text: str) -> tuple[list[tuple[int, int]], list[tuple[float, int]]]:
    """(the text's pieces, (minus the score, index) of each that has words, best first)."""
    spans = _pieces(text)
    words = [_WORD.findall(text, start, end) for start, end in spans]
    frequency = Counter(chain.from_iterable(words))
    worth = {word: _worth(word, times) for word, times in frequency.items()}
    ranked: list[tuple[float, int]] = []
    for index, said in enumerate(words):
        if said:
            score = _score(said, worth)
            if text[spans[index][1] - 1] in ":*#":  # a heading, a list's opening: little without its rest
                score *= 0.6
            ranked.append((-(score + 0.4 if index == 0 else score), index))
    ranked.sort()
    return spans, ranked


def _pieces(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence, line or bounded run, without the whitespace after it."""
    spans: list[tuple[int, int]] = []
    start = 0
    for match in (*_PIECE_END.finditer(text), None):
        stop = len(text) if match is None else match.end()
        while stop - start > _LONGEST_PIECE_CHARS:
            space = text.rfind(" ", start + _LONGEST_PIECE_CHARS // 2, start + _LONGEST_PIECE_CHARS)
            middle = space + 1 if space > 0 else start + _LONGEST_PIECE_CHARS
            spans.append((start, middle))
            start = middle
        end = start + len(text[start:stop].rstrip())
        if end > start:
            spans.append((start, end))
        start = stop
    return spans


def _worth(word: str, times: int) -> float:
    """Damped: a text's topic is in every piece of it, and must not outweigh what is said of it."""
    weight = 1.0 + math.log(times)
    if not word.islower():  # a number, a name, CamelCase, a CONSTANT
        return weight + 1.5
    if word in _IDLE:
        return 0.0
    return weight if word.isalpha() else weight + 2.0  # snake_case, utf8


def _score(words: list[str], worth: dict[str, float]) -> float:
    """Worth per square root of length, so that neither long nor tiny pieces win by size."""
    total = sum(map(worth.__getitem__, dict.fromkeys(words)))
    if not _DECISION.isdisjoint(words):
        total += 4.0
    elif not _QUESTION.isdisjoint(words):
        total += 1.0
    return total / math.sqrt(6.0 + len(words))


def _join(text: str, spans: list[tuple[int, int]]) -> str:
    """Pieces side by side; a line's end stays a line's end."""
    out: list[str] = []
    for start, end in spans:
        out.append(text[start:end].strip())
        out.append("\n" if text[end : end + 1] == "\n" else " ")
    return "".join(out[:-1])


def _tags(text: str, max_tokens: int) -> str:
    """The most telling terms, in order of appearance, as "a, b, c"."""
    worth: dict[str, tuple[float, int, str]] = {}
    for index, (term, times) in enumerate(Counter(_TERM.findall(text[:8000])).items()):
        key = term if term.islower() else term.lower()
        if key in _NO_TOPIC or (len(key) < 3 and key.isalpha()):
            continue
        seen, at, shown = worth.get(key, (0.0, index, term[:24]))
        bonus = (len(term) > 5) + (not term.islower()) + (not term.isalpha())
        worth[key] = (max(seen, bonus) + times, at, shown)
    best = sorted(worth.values(), key=lambda row: (-row[0], row[1]))[: max(1, max_tokens // 3)]
    best.sort(key=lambda row: row[1])
    return ", ".join(shown for _, _, shown in best) or hint(text, 4)
