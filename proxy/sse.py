"""Server-sent events: a byte stream, cut anywhere, into events. Pure; whoever reads a stream reads it here.

Promises: every byte fed comes back in exactly one event's `raw`, wherever the stream is cut; the work is
linear in the bytes, however many the pieces; of an event that never ends no more than a limit is kept.
"""

from __future__ import annotations

import re
from typing import NamedTuple

EVENT_LIMIT_BYTES = 64 << 20  # where no configuration says so
# Two line ends; CRLF is never taken for two. Many more of them are one event that says nothing.
_END = re.compile(rb"(?:\r\n?+|\n)(?:\r\n?+|\n)((?:\r\n?+|\n){8,}+)?+")
_LINE = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class EventTooLong(Exception):
    """An event that goes on beyond the limit; the message is a sentence."""


class Event(NamedTuple):
    raw: bytes  # as received, with its blank line
    data: bytes  # the joined `data:` lines; b"" for comments and keep-alives


class EventParser:
    """Splits a byte stream into events, whatever the framing (LF, CRLF, CR, split anywhere).

    A CR that comes last may be half of a CRLF: it is waited for where the line before ended in LF, and
    ends the event at once behind another CR.
    """

    def __init__(self, limit_bytes: int = EVENT_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._open = bytearray()  # of the event that has not ended, but for ...
        self._seam = b""  # ... its last bytes, in which its end may have begun

    def feed(self, data: bytes) -> list[Event]:
        """The events that are complete now. Raises EventTooLong, after which nothing more may be fed."""
        buffer = self._seam + data if self._seam else data
        events: list[Event] = []
        at = 0
        for match in _END.finditer(buffer, 0, len(buffer) - buffer.endswith(b"\n\r")):
            end = match.end() if match.start(1) < 0 else match.start(1)
            raw = buffer[at:end]
            if self._open:
                raw = bytes(self._open) + raw
                self._open.clear()
            events.append(Event(raw, _data(raw)))
            if end < match.end():
                events.append(Event(match.group(1), b""))
            at = match.end()
        seam = max(at, len(buffer) - 3)
        self._open += buffer[at:seam]
        self._seam = buffer[seam:]
        if self.open_bytes > self._limit_bytes:
            raise EventTooLong(
                f"an event of the upstream is longer than {self._limit_bytes} bytes (stream.event_limit_bytes)"
            )
        return events

    @property
    def open_bytes(self) -> int:
        """Of an event that has not ended."""
        return len(self._open) + len(self._seam)

    def close(self) -> list[Event]:
        """The last event, when the stream ended without a blank line."""
        rest = bytes(self._open) + self._seam
        self._open, self._seam = bytearray(), b""
        return [Event(rest, _data(rest))] if rest.strip() else []


def lines_of(raw: bytes) -> list[bytes]:
    """The lines of an event, without their ends."""
    return _LINE.split(raw.removeprefix(_BOM))


def _data(raw: bytes) -> bytes:
    if b"data" not in raw:
        return b""
    if raw.startswith(b"data: ") and raw.find(b"\n", 0, -2) < 0 and b"\r" not in raw:
        return raw[6:].rstrip(b"\n")  # the common case: one line
    lines = [line[5:] for line in lines_of(raw) if line.startswith(b"data:")]
    return b"\n".join(line.removeprefix(b" ") for line in lines)
