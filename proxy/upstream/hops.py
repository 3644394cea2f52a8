"""Headers that speak about one connection and not about the message: they end at each proxy. Pure.

Source: RFC 9110, 7.6.1, and its forerunners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from proxy.upstream import Header

HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
PLAIN_CONNECTION: Final = ("keep-alive", "close")  # names no header but those above


def without_named(headers: Sequence[Header], connection: str) -> list[Header]:
    """Without the connection header and those that it names."""
    named = {name.strip().lower().encode("latin-1") for name in connection.split(",")}
    named.add(b"connection")
    return [header for header in headers if header[0] not in named]


def end_to_end(headers: Sequence[Header]) -> list[Header]:
    """Without the headers of the connection and those that it names."""
    for name, value in headers:
        if name == b"connection":
            headers = without_named(headers, value.decode("latin-1"))
    return [header for header in headers if header[0] not in HOP_BY_HOP]
