"""Whether and when a request that upstream refused for the moment is sent again.

Promises: bounded in number and in seconds, over one client request; upstream's own word on how long
to wait is kept, and when it is longer than what is left, there is no wait at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from math import isfinite

from proxy.upstream import Header

_FOR_THE_MOMENT = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_WAIT_S = 0.5  # where upstream does not say; doubled each time


class Patience:
    """One per client request: `retries` times, `wait_s` seconds in all."""

    def __init__(self, retries: int, wait_s: float) -> None:
        self._retries = retries
        self._left_s = wait_s
        self._next_s = _FIRST_WAIT_S

    def wait_s(self, status: int, headers: Sequence[Header], now_s: float) -> float | None:
        """Seconds to wait before the next try, which it counts; None: no more tries.

        `headers`: the refusal's; `now_s`: the time since the epoch.
        """
        given = dict(headers)
        if status not in _FOR_THE_MOMENT or given.get(b"x-should-retry") == b"false":
            return None
        told_s = _told_s(given, now_s)
        wait_s = self._next_s if told_s is None else max(0.0, told_s)
        if self._retries <= 0 or wait_s > self._left_s:
            return None
        self._retries -= 1
        self._left_s -= wait_s
        self._next_s *= 2
        return wait_s


def _told_s(headers: Mapping[bytes, bytes], now_s: float) -> float | None:
    """What retry-after-ms says, or retry-after (seconds or a date), or None."""
    for name, unit_s in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        try:
            told_s = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if isfinite(told_s):
            return told_s
    try:
        return parsedate_to_datetime(headers[b"retry-after"].decode("latin-1")).timestamp() - now_s
    except (KeyError, ValueError, OverflowError):
        return None
