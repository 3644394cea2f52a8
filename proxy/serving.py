"""What our server needs of uvicorn that it does not do: answers for HTTP/1.0 clients.

Promises: a client that speaks HTTP/1.0 gets no chunks, which it does not know: a body whose length
is not told ends with the connection, and streams until then.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGISendEvent


class Protocol(HttpToolsProtocol):
    """uvicorn's, with another cycle for HTTP/1.0."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            cycle.__class__ = _UntilClose
        super()._start_asgi_task(cycle, app)


class _UntilClose(RequestResponseCycle):
    """One request and its answer, whose end may be the connection's."""

    async def send(self, message: ASGISendEvent) -> None:
        event: Any = message
        if event["type"] == "http.response.start":
            names = {name.lower() for name, _ in event.get("headers", ())}
            if b"content-length" not in names and event["status"] not in (204, 304):
                self.chunked_encoding = False
                self.expected_content_length = sys.maxsize
        elif self.expected_content_length > sys.maxsize // 2 and not event.get("more_body", False):
            self.expected_content_length = len(event.get("body", b""))
        await super().send(message)
