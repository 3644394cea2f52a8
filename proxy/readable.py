"""Numbers, times and other people's text as a person reads them, in a terminal and on the dashboard's pages."""

from __future__ import annotations

import time

# What would command a terminal: C0 but for the ends of lines and tabs, DEL, C1.
_CONTROLS = {at: f"\\u{at:04x}" for at in (*range(0x20), *range(0x7F, 0xA0)) if chr(at) not in "\n\t"}


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def short(value: float | None) -> str:
    """So many tokens or bytes, in three digits."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{0 if value >= 100 * size else 1}f} {unit}"
    return f"{value:.0f}"


def when(at_s: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at_s)) if at_s else "unknown"


def ago(at_s: float | None, now_s: float) -> str:
    if not at_s:
        return "unknown"
    seconds = max(0, int(now_s - at_s))
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return "just now" if seconds < 5 else f"{seconds} s ago"


def share(part: float | None, whole: float | None) -> str:
    return "–" if not whole or part is None else f"{100 * part / whole:.0f} %"


def url_of(host: str, port: int) -> str:
    """Where a server that listens there is reached from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def harmless(text: str) -> str:
    """The same for a terminal: what others wrote cannot command it. JSON stays what it is."""
    return text.translate(_CONTROLS)
