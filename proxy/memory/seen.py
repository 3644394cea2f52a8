"""When a page was first seen: as a result shows it, and as a model asks for it. Pure: now is handed in. All times are UTC.

Promises: no text of a model's raises; one that says no time and names no page is told apart. A day, a month or a year
is the whole of it: `after` one begins with it, `before` one ends where it begins, and both of the same are that one.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from proxy.memory.ids import canonical_page_id, parse_page_id

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3_600, 86_400
_CLOSE_S = 600  # a path that was seen within so much needs no time of day to tell its pages apart ...
_FAR_S = 3 * _DAY_S  # ... nor one of more days than that
_MAX_CHARS = 64
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_UNITS = {"second": 1, "minute": _MINUTE_S, "min": _MINUTE_S, "hour": _HOUR_S, "day": _DAY_S, "week": 7 * _DAY_S,
          "month": 30 * _DAY_S, "year": 365 * _DAY_S}  # fmt: skip
_SECONDS, _MILLISECONDS = 10**8, 10**11  # a number from there on is Unix time
_AGO = re.compile(rf"(?:(\d{{1,4}}|an?|one|last|past)\s+)(?:few\s+)?({'|'.join(_UNITS)})s?(?:\s+ago)?")
_CLOCK = re.compile(
    r"(?:\bt|(?<=\d)t|\b)(\d{1,2})(?::(\d\d)(?::(\d\d)(?:\.\d+)?)?)?\s*(?:([ap])\.?m\b\.?)?\s*"
    r"(z\b|utc\b|gmt\b|[+-]\d\d:?\d\d)?"
)
_FILLER = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|\b(?:the|of|on|at|in|(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*)\b|[,.]")


class Bound(NamedTuple):
    """What a model says for `after` or `before`: a page's position along the path, or a time (Unix seconds, from its
    begin to its end)."""

    position: int | None = None
    begin_s: float = 0.0
    end_s: float = 0.0


def read_bound(said: object, now_s: float) -> Bound | None:
    """A page id, a date, a time, or words like "2 days ago"; None for anything else."""
    if isinstance(said, bool) or not isinstance(said, (str, int, float)):
        return None
    text = str(said).strip(" \t\r\n[]()\"'`").lower()
    if not text or len(text) > _MAX_CHARS:
        return None
    place = parse_page_id(canonical_page_id(text))
    if place is not None:
        return Bound(place[0])
    try:
        text = re.sub(r"(\d{4})(\d\d)(\d\d)", r"\1-\2-\3", text) if len(text) == len("20230507") else text
        return _instant(text) or _relative(text, now_s) or _dated(text, now_s)
    except (ValueError, OverflowError, OSError):  # there is no such day, or it is outside the calendar
        return None


def seen_text(at_s: int, span_s: int) -> str:
    """The time at which a page was seen, as precise as tells it from the others of its path, which were seen within
    `span_s` seconds."""
    precise = _CLOSE_S < span_s < _FAR_S
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%MZ") if precise else shown_day(at_s)


def shown_day(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d")


def _instant(text: str) -> Bound | None:
    """Unix time, or a number of a page."""
    if not re.fullmatch(r"\d+(?:\.\d+)?", text):
        return None
    number = float(text)
    if number >= _SECONDS:
        at_s = number / (1000 if number >= _MILLISECONDS else 1)
        datetime.fromtimestamp(at_s, UTC)  # ValueError, OverflowError
        return Bound(None, at_s, at_s)
    plain = text.isdigit() and (len(text) < 4 or not 1900 <= number < 2200) and 0 < number < 10**6
    return Bound(int(number) - 1) if plain else None


def _relative(text: str, now_s: float) -> Bound | None:
    if text == "now":
        return Bound(None, now_s, now_s)
    today = now_s // _DAY_S * _DAY_S
    if text in ("today", "yesterday"):
        begin = today - _DAY_S * (text == "yesterday")
        return Bound(None, begin, begin + _DAY_S)
    found = _AGO.fullmatch(text)
    if found is None:
        return None
    number, unit_s = found.group(1), _UNITS[found.group(2)]
    at_s = now_s - unit_s * (int(number) if number.isdigit() else 1)
    return Bound(None, at_s, at_s)


def _dated(text: str, now_s: float) -> Bound | None:
    """A date in figures or with an English month, a time of day, or both."""
    clock = next((m for m in _CLOCK.finditer(text) if m.group(2) or m.group(4)), None)
    rest = text if clock is None else f"{text[: clock.start()]} {text[clock.end() :]}"
    dots = bool(re.search(r"\d\.\d", rest))
    names = re.findall(r"[^\W\d_]+", _FILLER.sub(" ", rest))
    numbers = [int(n) for n in re.findall(r"\d+", rest)]
    year = next((n for n in numbers if n >= 1000), None)
    now = datetime.fromtimestamp(now_s, UTC)
    parts = [n for n in numbers if n is not year]
    if names:
        if len(names) > 1 or names[0][:3] not in _MONTHS or len(parts) > 1:
            return None
        month = _MONTHS.index(names[0][:3]) + 1
        if year is None:  # the last one that there was
            year = now.year - ((month, *parts) > (now.month, now.day))
        parts = [month, *parts]
    elif not numbers:
        if clock is None:
            return None
        year, parts = now.year, [now.month, now.day]
    elif year is None or len(parts) > 2:
        return None
    elif numbers[0] != year and len(parts) == 2 and (dots or parts[0] > 12):
        parts.reverse()  # 7.5.2023, 27/5/2023
    begin, end = _period(year, parts)
    if clock is None or len(parts) < 2:
        return Bound(None, begin.timestamp(), end.timestamp())
    hour, minute, second, half, zone = clock.groups()
    hours = int(hour) % 12 + 12 * (half == "p") if half else int(hour)
    at = begin.replace(hour=hours, minute=int(minute or 0), second=int(second or 0))
    at_s = at.timestamp() - _offset_s(zone or "")
    return Bound(None, at_s, at_s)


def _period(year: int, parts: list[int]) -> tuple[datetime, datetime]:
    """The begin and the end of a year, of a month or of a day of it. ValueError where there is none."""
    month, day = [*parts, 1, 1][:2]
    begin = datetime(year, month, day, tzinfo=UTC)
    if len(parts) == 2:
        return begin, begin + timedelta(days=1)
    if parts:
        return begin, datetime(year + parts[0] // 12, parts[0] % 12 + 1, 1, tzinfo=UTC)
    return begin, datetime(year + 1, 1, 1, tzinfo=UTC)


def _offset_s(zone: str) -> int:
    if zone[:1] not in ("+", "-"):
        return 0
    digits = zone[1:].replace(":", "")
    return (int(digits[:2]) * _HOUR_S + int(digits[2:]) * _MINUTE_S) * (1 if zone[0] == "+" else -1)
