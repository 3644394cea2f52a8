"""HTTP as it comes in and goes through: which path is whose, which page may ask, what a body is when it is
decoded, and everything that is not ours passed on.

Promises, of each part where it begins: no spelling of a dot segment leaves the place that a path names;
the operator's key is spent by no foreign web page; no compressed body takes more RAM than is allowed; what
is passed on is verbatim, minus what belongs to one connection only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import unicodedata
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes, urlsplit

import brotli  # type: ignore[import-untyped]
import zstandard

from proxy.config import Config, is_loopback
from proxy.errors import ApiError
from proxy.upstream import CHAT_PATH, Header, Reply, RootPath, Upstream

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# ---------------------------------------------------------------- paths
# A chat request is one by the end of its path, whatever stands in front; everything that is not ours has a
# place below `upstream.base_url` or the server root that it belongs to. Percent-encoding, slashes and queries
# of what is passed on stay as they came. Standard: RFC 3986, 3.3 and 5.2.4.

_API: Final = "/v1"
_CHAT: Final = ["chat", "completions"]
_DEPLOYMENTS: Final = "deployments"
# What the segment behind /v1 can be in OpenAI's API. A client whose base URL lacks /v1 means these; all
# else without /v1 (/props, /slots, /tokenize, /api/tags, /) belongs to the server, not to its API.
_RESOURCES: Final = frozenset(
    "assistants audio batches chat completions containers conversations embeddings evals files"
    " fine_tuning images models moderations realtime responses threads uploads vector_stores"
    " videos".split()
)
_OURS: Final = frozenset(("/health", "/ready", "/metrics", "/vm"))
_DECODINGS: Final = 4  # times that a path is decoded to see what it may become; deeper is refused
# Dots and slashes that are no valid UTF-8, which lenient decoders still read as such.
_OVERLONG: Final = ((b"\xc0\xae", b"."), (b"\xc0\xaf", b"/"), (b"\xc1\x9c", b"\\"), (b"\xe0\x80\xae", b"."))
_PERCENT_U: Final = re.compile(rb"%u00([0-9a-fA-F]{2})")  # IIS's own encoding
_SEPARATORS: Final = re.compile(r"[/\\]")
_CACHED_PATHS: Final = 64  # clients have few; a path may be 64 KiB long


def is_ours(path: str) -> bool:
    """Answered by this server, whatever upstream has there. `path`: decoded."""
    return path in _OURS or path.startswith("/vm/")


def raw_path(scope: Scope) -> str:
    """The path of an ASGI scope as on the wire: percent-encoding untouched, without the query."""
    raw: bytes | None = scope.get("raw_path")
    return raw.decode("latin-1").partition("?")[0] if raw else quote(scope["path"])


@lru_cache(_CACHED_PATHS)
def is_chat(raw: str) -> bool:
    """A POST to it is a chat request: it ends in /chat/completions, however many slashes there are."""
    return _segments(raw)[-2:] == _CHAT


@lru_cache(_CACHED_PATHS)
def chat_target(raw: str) -> str:
    """Where upstream has the chat request that came to `raw`: `CHAT_PATH` below base_url, where it
    follows /v1 or nothing; else a `RootPath`, because a prefix names something (Azure's deployments)."""
    segments = _segments(raw)
    if _DEPLOYMENTS in segments:  # with or without a /v1 of the client's base URL in front
        if segments[0] == "v1":
            segments = segments[1:]
    elif segments == _CHAT or segments[-3] == "v1":
        return CHAT_PATH
    elif segments[0] == "v1":
        return "/" + "/".join(segments[1:])
    return RootPath("/" + "/".join(segments))


@lru_cache(_CACHED_PATHS)
def deployment(raw: str) -> str | None:
    """The deployment that Azure's form of the path names, in place of a model."""
    segments = _segments(raw)
    if len(segments) < 4 or segments[-4] != _DEPLOYMENTS:
        return None
    return unquote_to_bytes(segments[-3]).decode("utf-8", "replace") or None


def forward_target(raw: str) -> str:
    """Where any other request goes: below base_url what follows /v1 or names a resource of OpenAI's
    API, else a `RootPath`. ApiError 400 for dot segments."""
    refuse_dot_segments(raw)
    path = "/" + raw.lstrip("/")
    if path == _API or path.startswith(_API + "/"):
        return path.removeprefix(_API)
    if path[1:].partition("/")[0] in _RESOURCES:
        return path
    return RootPath(path)


def refuse_dot_segments(raw: str) -> None:
    """ApiError 400 for a path that some server may resolve to one above the place that it names."""
    if "%" not in raw and ".." not in raw:
        return
    path = raw.encode("latin-1", "replace")
    for _ in range(_DECODINGS):
        if _climbs(path):
            break
        decoded = unquote_to_bytes(_PERCENT_U.sub(rb"%\1", path))
        if decoded == path:
            return
        path = decoded
    raise ApiError(
        400, "The path has dot segments or is encoded several times; send the path that you mean.", code="invalid_path"
    )


def _climbs(path: bytes) -> bool:
    for overlong, plain in _OVERLONG:
        path = path.replace(overlong, plain)
    text = unicodedata.normalize("NFKC", path.decode("utf-8", "replace"))
    # Some servers drop ;parameters, and what a file name cannot have at its end.
    return any(segment.partition(";")[0].strip("\0\t\n\r ") == ".." for segment in _SEPARATORS.split(text))


def _segments(raw: str) -> list[str]:
    return [segment for segment in raw.split("/") if segment]


# ---------------------------------------------------------------- origins
# Without `server.cors_origins` an answer's CORS headers are upstream's own, and an error of ours is as
# readable as upstream's answers to the same origin were; a provider without an HTTP face of its own lets
# pages of this machine read, as long as we listen for this machine only. Where the server has a key of its
# own, a web page that is none of these is refused, and so is, on a loopback address, a host name that
# could be an attacker's (DNS rebinding); programs, which send no Origin, pass. Standard: Fetch, 3.2.

_ALLOW_ORIGIN: Final = b"access-control-allow-origin"
_REPEATED: Final = (_ALLOW_ORIGIN, b"access-control-allow-credentials")
_CORS: Final = b"access-control-"
_EXPOSED: Final = (
    b"*, x-llm-pager-channel, x-llm-pager-window-tokens, x-llm-pager-epoch, x-llm-pager-conversation,"
    b" x-llm-pager-rounds, x-llm-pager-billed-prompt-tokens, x-llm-pager-warning, x-request-id"
)
_PRIVATE_NETWORK: Final = b"access-control-allow-private-network"
_PREFLIGHT_S: Final = b"600"
_SEEN_ORIGINS: Final = 256  # that upstream's word is remembered of
_SEEN_CHARS: Final = 256
# Names that nobody can own in the public DNS (RFC 6761, 6762; ICANN for .internal).
_PRIVATE: Final = (".localhost", ".local", ".internal")


class Origins:
    """Whose pages may read our answers, and whose requests may spend the operator's key; one per process."""

    def __init__(self, config: Config) -> None:
        server, upstream = config.server, config.upstream
        self._cors = frozenset(origin.lower() for origin in server.cors_origins)
        self._hosts = frozenset(host.lower() for host in (*server.allowed_hosts, server.host))
        self._listed = bool(server.allowed_hosts)
        self._loopback = is_loopback(server.host)
        self._has_key = upstream.api_key is not None
        self._finds_keys = upstream.provider == "litellm"  # in the environment
        self._asks_upstream = upstream.provider == "openai" and not self._cors
        self._seen: dict[bytes, list[Header]] = {}

    # -- who may spend our key

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is not served, if it is not."""
        if not self._has_key and not self._finds_keys:
            return None
        host = origin = site = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"authorization" and not self._has_key:
                return None  # litellm takes this key, and none of ours
        if not self._is_our_name(host):
            return ApiError(
                403,
                f"This server has a key of its own and does not go by the name {_shown(host)}; if it"
                " is yours, add it to server.allowed_hosts.",
                code="unknown_host",
            )
        # A browser's own word, that a page cannot forge: behind a reverse proxy it knows better than Host.
        if site in (b"same-origin", b"none"):
            return None
        if not (self._is_trusted(origin, host) if origin else site != b"cross-site"):
            return ApiError(
                403,
                f"A web page of {_shown(origin) if origin else 'another site'} cannot use this server's"
                " key; if it is yours, add its origin to server.cors_origins.",
                code="cross_site_request",
            )
        return None

    def _is_our_name(self, value: bytes) -> bool:
        if not value or not (self._loopback or self._listed):
            return True  # behind a load balancer any name may be ours
        name = value.decode("latin-1")
        return is_private_name(name) or _host_name(name) in self._hosts

    def _is_trusted(self, origin: bytes, host: bytes = b"") -> bool:
        """Whether pages of `origin` may use the server: listed, its own, of this machine, or none of
        the web's (a browser's extension, a desktop application)."""
        text = origin.decode("latin-1").lower()
        if text in self._cors or "*" in self._cors:
            return True
        try:
            parts = urlsplit(text)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme not in ("http", "https"):
            return bool(parts.scheme)  # "null" has none
        if host and parts.netloc == host.decode("latin-1").lower():
            return True
        return self._loopback and is_loopback(name)

    # -- who may read our answers

    def preflight(self, scope: Scope, origin: bytes) -> list[Header] | None:
        """The head of the answer to a preflight, which is ours to give; None: upstream's, or no
        preflight at all."""
        if scope["method"] != "OPTIONS" or self._asks_upstream or not self._is_trusted(origin):
            return None
        asked = {name: value for name, value in scope["headers"] if name.startswith(_CORS)}
        method = asked.get(b"access-control-request-method")
        if method is None:
            return None
        return [
            *self._allowing(origin),
            (b"access-control-allow-methods", method),
            (b"access-control-allow-headers", asked.get(b"access-control-request-headers", b"*")),
            (b"access-control-max-age", _PREFLIGHT_S),
            *([(_PRIVATE_NETWORK, b"true")] if b"access-control-request-private-network" in asked else []),
        ]

    def readable(self, origin: bytes, send: Send) -> Send:
        """`send` for a request of a browser's page: heads say what its script may read."""

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Header] = [*message.get("headers", ())]
                if not self._asks_upstream:
                    headers = [header for header in headers if not header[0].startswith(_CORS)]
                    headers += self._allowing(origin) if self._is_trusted(origin) else []
                elif said := [header for header in headers if header[0] in _REPEATED]:
                    if len(self._seen) < _SEEN_ORIGINS and len(origin) <= _SEEN_CHARS:
                        self._seen[origin] = said
                elif message["status"] >= 400:  # as a rule an error of ours: upstream's own have them
                    headers += self._seen.get(origin, [])
                message = {**message, "headers": headers}
            await send(message)

        return labelled

    def _allowing(self, origin: bytes) -> list[Header]:
        everybody = "*" in self._cors
        return [
            (_ALLOW_ORIGIN, b"*" if everybody else origin),
            (b"access-control-expose-headers", _EXPOSED),
            *([] if everybody else [(b"vary", b"Origin")]),
        ]


def _host_name(value: str) -> str:
    """The name in a Host header: without port, brackets and the root's dot."""
    name = value.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def is_private_name(host: str) -> bool:
    """A Host header that no public name stands in, so that no foreign page can be behind it (DNS rebinding)."""
    name = _host_name(host)
    if "." not in name or name.endswith(_PRIVATE):  # a container's, a machine's
        return True
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def _shown(value: bytes) -> str:
    return repr(value[:_SEEN_CHARS].decode("latin-1"))


# ---------------------------------------------------------------- compressed request bodies
# gzip, deflate (zlib's and raw), br and zstd, one upon another. Never more than the limit comes out, nor, above
# a few megabytes, `ratio` times what went in; what would be more is given up as soon as it is known, having
# taken no more RAM than that. An encoding that nobody knows, and bytes that are none of it, are None: upstream
# is their judge. Standard: RFC 9110, 8.4.

_AT_ONCE_BYTES: Final = 262_144  # of output
_IN_BYTES: Final = 65_536  # of input
_FREE_BYTES: Final = 8 << 20  # so much may come out of however little: text that repeats itself does
_MOST_ENCODINGS: Final = 4
_MOST_MEMBERS: Final = 8192  # of gzip or zstd in one body, counted now and then: empty ones cost time and say nothing
_ZSTD_IN_BYTES: Final = 128  # of input: at most 4 MiB of output
_ZSTD_WINDOW_BYTES: Final = 8 << 20  # RFC 8878 wants decoders to take at least this
_ENCODING: Final = b"content-encoding"

Decoder = Callable[[bytes], Iterator[bytes]]


class _Broken(Exception):
    """The bytes are none of their encoding, or end too early."""


def encodings(headers: Sequence[Header]) -> list[str]:
    """The body's encodings in the order in which they were applied; [] for a plain body."""
    named = [value for name, value in headers if name == _ENCODING]
    if not named:
        return []
    names = (name.strip().lower() for name in b",".join(named).decode("latin-1").split(","))
    return [name for name in names if name not in ("", "identity")]


def plain_headers(headers: Sequence[Header]) -> list[Header]:
    """The headers of the decoded body: its length is the server's to say."""
    return [header for header in headers if header[0] not in (_ENCODING, b"content-length")]


def decoded(body: bytes, names: Sequence[str], limit_bytes: int, ratio: int) -> bytes | None:
    """The plain body; None when it cannot be read. ApiError 413 when it is longer than allowed."""
    if len(names) > _MOST_ENCODINGS or any(name not in _DECODERS for name in names):
        return None
    allowed = min(limit_bytes, max(_FREE_BYTES, len(body) * ratio))
    for name in reversed(names):
        out, size = [], 0
        try:
            for piece in _DECODERS[name](body):
                size += len(piece)
                if size > allowed:
                    raise ApiError(
                        413,
                        f"The request body is more than {allowed} bytes when it is decoded"
                        " (server.body_limit_bytes, server.body_ratio).",
                        code="request_too_large",
                    )
                out.append(piece)
        except (_Broken, zlib.error, brotli.error, zstandard.ZstdError):
            return None
        body = b"".join(out)
    return body


def _inflated(body: bytes, wbits: int) -> Iterator[bytes]:
    """One or more members of zlib's formats."""
    member, members = None, 0
    for at in range(0, len(body), _IN_BYTES):
        rest, full = body[at : at + _IN_BYTES], False
        while rest or full:
            if member is None:
                if members and wbits == zlib.MAX_WBITS | 16:
                    rest = rest.lstrip(b"\0")  # gzip's padding
                    if not rest:
                        break
                members += 1
                member = zlib.decompressobj(wbits)
            piece = member.decompress(rest, _AT_ONCE_BYTES)
            yield piece
            full = len(piece) == _AT_ONCE_BYTES and not member.eof
            rest = member.unused_data if member.eof else member.unconsumed_tail
            member = None if member.eof else member
        if members > _MOST_MEMBERS:
            raise _Broken
    if member is not None or not members:
        raise _Broken


def _deflated(body: bytes) -> Iterator[bytes]:
    """zlib's format as the standard says, or raw deflate, as some clients read it."""
    is_zlib = len(body) >= 2 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
    yield from _inflated(body, zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


def _unbrotlied(body: bytes) -> Iterator[bytes]:
    stream = brotli.Decompressor()
    for at in range(0, len(body), _IN_BYTES):
        yield stream.process(body[at : at + _IN_BYTES], output_buffer_limit=_AT_ONCE_BYTES)
        while not stream.is_finished() and (
            piece := stream.process(b"", output_buffer_limit=_AT_ONCE_BYTES)
        ):
            yield piece
    if not stream.is_finished():
        raise _Broken


def _unzstandarded(body: bytes) -> Iterator[bytes]:
    """One or more frames. The library does not bound what one piece of input becomes; a block of 4
    bytes becomes 128 KiB, so the pieces are small."""
    frame, frames = None, 0
    for at in range(0, len(body), _ZSTD_IN_BYTES):
        if frames > _MOST_MEMBERS:
            raise _Broken
        rest = body[at : at + _ZSTD_IN_BYTES]
        while rest:
            if frame is None:
                frames += 1
                frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _Broken


_DECODERS: Final[dict[str, Decoder]] = {
    "gzip": partial(_inflated, wbits=zlib.MAX_WBITS | 16), "x-gzip": partial(_inflated, wbits=zlib.MAX_WBITS | 16),
    "deflate": _deflated, "br": _unbrotlied, "zstd": _unzstandarded,
}  # fmt: skip


# ---------------------------------------------------------------- passing on
# Method, path, query, status, headers and bodies are verbatim; both directions stream; a client that leaves
# cancels the upstream call; an answer that breaks upstream breaks for the client too, instead of ending as if
# it were whole.

_QUEUED_PIECES: Final = 1  # each what a socket brings at once, some hundred KiB


async def passthrough(scope: Scope, receive: Receive, send: Send, upstream: Upstream) -> None:
    """Serve one ASGI `http` request from `upstream.forward`.

    Raises `UpstreamBroken` when the body breaks off, so that the server closes the connection.
    """
    has_body = any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )
    pieces: asyncio.Queue[bytes | None] | None = asyncio.Queue(_QUEUED_PIECES) if has_body else None
    answer = asyncio.ensure_future(_answer(scope, send, upstream, pieces))
    client = asyncio.ensure_future(_follow_client(receive, pieces))
    try:
        await asyncio.wait((answer, client), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (answer, client):
            task.cancel()
        await asyncio.wait((answer, client))
    for task in (client, answer):
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def _follow_client(receive: Receive, pieces: asyncio.Queue[bytes | None] | None) -> None:
    """Hand the request body on as it arrives; return when the client is gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if pieces is None:
            continue
        if body := message.get("body", b""):
            await pieces.put(body)
        if not message.get("more_body", False):
            await pieces.put(None)
            pieces = None


async def _body(pieces: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (piece := await pieces.get()) is not None:
        yield piece


async def _answer(scope: Scope, send: Send, upstream: Upstream, pieces: asyncio.Queue[bytes | None] | None) -> None:
    body = None if pieces is None else _body(pieces)
    method: str = scope["method"]
    try:
        reply = await upstream.forward(
            method, forward_target(raw_path(scope)), scope.get("query_string", b""), scope["headers"], body
        )
    except ApiError as error:
        await send_error(send, error)
        return
    await relay(reply, send)


async def relay(reply: Reply, send: Send) -> None:
    """Answer with an upstream reply, whatever it is, as it arrives. Raises `UpstreamBroken`."""
    try:
        headers = reply.headers
        if reply.status == 304:  # its length speaks of a body that is not sent
            headers = [header for header in headers if header[0] != b"content-length"]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for chunk in reply.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await reply.close()


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with the error's status and its body in OpenAI's shape."""
    body = error.body()
    headers: list[Header] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    for name, value in (error.headers or {}).items():
        headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
