"""The upstream: who answers. Everything in this package speaks OpenAI wire bytes.

Promises to its callers:

* a reply, whatever its status, is returned as a `Reply`; nothing is raised for a 4xx or a 5xx;
* a failure before a status raises `ApiError` (502 `upstream_unreachable`, 504 `upstream_timeout`);
* a failure after it raises `UpstreamBroken` from the body;
* closing a reply, or cancelling the task that waits for it, cancels the call upstream at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from proxy.config import Config

Header = tuple[bytes, bytes]
"""One header as on the wire, its name in lower case."""

CHAT_PATH: Final = "/chat/completions"


class RootPath(str):
    """A path below the server root that base_url belongs to, not below base_url."""

    __slots__ = ()


class UpstreamBroken(Exception):
    """The upstream failed after its status was read: the body is incomplete. `str()` says how."""


class Reply(Protocol):
    """An answer whose status and headers are known and whose body may still be arriving.

    `headers` carry lower-case names; hop-by-hop headers are gone. On a chat reply content-length
    and content-encoding are gone too (the body is what `chunks` yields, decoded); on a forwarded
    reply they are kept, and the body is the raw bytes that they describe.
    """

    status: int
    headers: list[Header]

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, once, as it arrives. Raises `UpstreamBroken`."""
        ...

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises `UpstreamBroken`, also when it is longer than `limit_bytes`."""
        parts: list[bytes] = []
        size_bytes = 0
        chunks = self.chunks()
        async for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > limit_bytes:
                await chunks.aclose()
                raise UpstreamBroken(f"the upstream's answer is longer than {limit_bytes} bytes")
            parts.append(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def close(self) -> None:
        """Give the body up: the upstream call is cancelled at once. Harmless when repeated."""
        return


class Upstream(Protocol):
    """One configured provider. One per process, used from one event loop."""

    async def start(self) -> None:
        """Before the first request: what takes seconds is done. Raises ImportError."""
        return

    async def chat(self, body: bytes, headers: Sequence[Header], query: bytes = b"", path: str = CHAT_PATH) -> Reply:
        """POST `body` to {base_url}{path}; `headers` and `query` are the client's own."""
        ...

    async def forward(
        self, method: str, path: str, query: bytes, headers: Sequence[Header], body: AsyncIterator[bytes] | None
    ) -> Reply:
        """Any other call. `path` is what follows base_url as on the wire (percent-encoded), or a
        `RootPath`."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        return


class BytesReply(Reply):
    """A reply whose body is already here (errors of other providers, built-in answers)."""

    def __init__(self, status: int, headers: Iterable[Header], body: bytes) -> None:
        self.status = status
        self.headers = list(headers)
        self._body = body

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        if self._body:
            yield self._body


async def read_whole(call: Awaitable[Reply], limit_bytes: int) -> tuple[int, bytes]:
    """The status and the body of a call that is made beside the requests. Raises what the call does, and `UpstreamBroken`."""
    reply = await call
    try:
        return reply.status, await reply.read(limit_bytes)
    finally:
        await reply.close()


async def once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def make_upstream(config: Config) -> Upstream:
    """The upstream that the configuration names; heavy libraries load on first use."""
    if config.upstream.provider == "litellm":
        from proxy.upstream.litellm import LitellmUpstream

        return LitellmUpstream(config)
    if any(override.bridge is not None for override in config.models.values()):
        from proxy.upstream.responses import ResponsesBridge

        return ResponsesBridge(config)
    from proxy.upstream.openai import OpenAIUpstream

    return OpenAIUpstream(config)
