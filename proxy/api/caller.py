"""Who asks: the credentials that a request presents, and the session that its headers name.

Promises: all credential headers count together, because upstream checks one of them, and one that it
does not check must not choose whose history is seen; a session id is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from proxy.api.request import checked_session
from proxy.upstream import Header

_CREDENTIALS = (b"authorization", b"api-key", b"x-api-key")


def presented(
    headers: Sequence[Header], session_headers: Collection[str]
) -> tuple[str, str | None]:
    """The credentials as one text, and the explicit session, if any. ApiError 400 for a bad one."""
    keys: list[str] = []
    session: str | None = None
    for name, value in headers:
        if name in _CREDENTIALS:
            keys.append(f"{name.decode()}: {value.decode('latin-1')}")
        elif name.decode("latin-1") in session_headers and session is None:
            session = checked_session(value.decode("latin-1"), name.decode("latin-1"))
    return "\n".join(sorted(keys)), session
