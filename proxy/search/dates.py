"""Dates as words: the days that a question names, as spans of time.

Promises: pure; a question names what can be read out of it: `8 May 2023`, `May 8th`, `in July`, `2023-05-08`,
`08.05.2023`. A month's name alone that is a word as well ("may", "march") is none. All times are UTC.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta

Date = tuple[int, ...]  # (month), (month, 0, day), (year, month), (year, month, day)

_MONTHS = (
    "january february march april may june july august september october november december".split()
)
_NUMBER = {name: month for month, name in enumerate(_MONTHS, 1)}
_NUMBER |= {name[:3]: month for name, month in _NUMBER.items()} | {"sept": 9}
_ALSO_WORDS = ("may", "mar", "march", "sept", "jan", "dec")
_WORD = re.compile(r"[a-z]+|\d+")
_DIGITS = re.compile(r"\b(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})\b|\b(\d{1,2})[./](\d{1,2})[./](\d{4})\b")
_NEAR = 3  # words around a month that may be its day and year


def spans(date: Date, years: Iterable[int]) -> Iterator[tuple[int, int]]:
    """From when to when (Unix seconds) that was, in each of those years where it names none."""
    day = date[2] if len(date) == 3 else 0
    for year in [date[0]] if date[0] > 12 else years:
        month = date[0] if date[0] <= 12 else date[1]
        try:
            begin = datetime(year, month, day or 1, tzinfo=UTC)
        except ValueError:  # there is no such day
            continue
        end = begin + timedelta(days=1 if day else 32)
        yield int(begin.timestamp()), int((end if day else end.replace(day=1)).timestamp())


def days_asked(text: str) -> list[Date]:
    """The dates that a question names, the narrowest first."""
    found: dict[Date, None] = {}
    low = text.lower()
    for match in _DIGITS.finditer(low):
        year, month, day, first, second, last = (int(n) if n else 0 for n in match.groups())
        year, month, day = (year, month, day) if year else (last, second, first)
        if month > 12:
            month, day = day, month  # the American order
        found |= dict.fromkeys(((year, month, day), (year, month)))
    words = _WORD.findall(low)
    for at, word in enumerate(words):
        month = _NUMBER.get(word, 0)
        if not month:
            continue
        near = words[max(0, at - _NEAR) : at] + words[at + 1 : at + 1 + _NEAR]
        numbers = [int(n) for n in near if n.isdigit() and len(n) <= 4]
        year = next((n for n in numbers if 1900 <= n < 2100), 0)
        day = next((n for n in numbers if 1 <= n <= 31), 0)
        if year or day or word not in _ALSO_WORDS:
            whole = (year, month) if year else (month,)
            found |= dict.fromkeys(((year, month, day) if year else (month, 0, day), whole) if day else (whole,))
    return sorted(found, key=len, reverse=True)
