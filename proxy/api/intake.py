"""A request's body, read whole.

Promises: one body is no longer than `server.body_limit_bytes`; all that are being read are together no more than
`server.bodies_limit_bytes` and one body, however many clients begin to send and do not end. What does not fit
waits, while its client's socket does; of those that hold up others, one that has sent nothing for a moment is
given up. The oldest always goes on, so that not all can wait for each other.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from proxy.api.http import Receive, Scope
from proxy.errors import ApiError

_SILENT_S: Final = 1.0  # without a byte: others go first
_WAIT_S: Final = 10.0  # for room
_LOOK_S: Final = 0.25  # whether there is some
_WAITING: Final = 64  # bodies; each holds what its socket brought at once, some hundred KiB


@dataclass(eq=False, slots=True)
class _Body:
    limit: asyncio.Timeout
    bytes: int = 0
    asks: bool = False  # more bytes are asked for, and have not come
    since_s: float = field(default_factory=time.monotonic)


class Intake:
    """The bodies that are being read; one per process."""

    def __init__(self, body_limit_bytes: int, bodies_limit_bytes: int) -> None:
        self._limit_bytes = body_limit_bytes
        self._total_bytes = bodies_limit_bytes
        self._used_bytes = self._waiting = 0
        self._bodies: dict[_Body, None] = {}  # the oldest first

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. ApiError 413 as soon as it is known to be too large, 503 where there is no room."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._limit_bytes:
                raise self._too_large()
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            part: bytes = message.get("body", b"")
            if len(part) > self._limit_bytes:
                raise self._too_large()
            return part
        try:
            async with asyncio.timeout(None) as limit:
                body = _Body(limit)
                self._bodies[body] = None
                try:
                    return await self._rest(body, message.get("body", b""), message["type"], receive)
                finally:
                    del self._bodies[body]
                    self._used_bytes -= body.bytes
        except TimeoutError:
            raise _no_room() from None

    async def _rest(self, body: _Body, part: bytes, kind: str, receive: Receive) -> bytes:
        parts: list[bytes] = []
        more = True
        while True:
            if kind == "http.disconnect":
                raise ApiError(400, "The client left while it sent the body.")
            if body.bytes + len(part) > self._limit_bytes:
                raise self._too_large()
            if self._used_bytes + len(part) > self._total_bytes:
                await self._room(body, len(part))
            body.bytes += len(part)
            self._used_bytes += len(part)
            parts.append(part)
            if not more:
                return b"".join(parts)
            body.asks, body.since_s = True, time.monotonic()
            message = await receive()
            body.asks = False
            kind, part, more = message["type"], message.get("body", b""), bool(message.get("more_body"))

    async def _room(self, body: _Body, size: int) -> None:
        if self._waiting >= _WAITING:
            raise _no_room()
        self._waiting += 1
        try:
            await self._wait(body, size)
        finally:
            self._waiting -= 1

    async def _wait(self, body: _Body, size: int) -> None:
        until_s = time.monotonic() + _WAIT_S
        while self._used_bytes + size > self._total_bytes and body is not next(iter(self._bodies)):
            now_s = time.monotonic()
            silent = [b for b in self._bodies if b.asks and b.bytes and now_s - b.since_s > _SILENT_S]
            if silent:
                longest = min(silent, key=lambda b: b.since_s)
                longest.limit.reschedule(asyncio.get_running_loop().time())
                longest.asks = False  # asked to go
            elif now_s > until_s:
                raise _no_room()
            await asyncio.sleep(0 if silent else _LOOK_S)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request body is larger than {self._limit_bytes} bytes (server.body_limit_bytes).",
            code="request_too_large",
        )


def _no_room() -> ApiError:
    return ApiError(
        503,
        "Too many large request bodies are being received (server.bodies_limit_bytes), and others came faster. Try again.",
        "api_error", "too_many_bodies", headers={"retry-after": "1"},
    )  # fmt: skip
