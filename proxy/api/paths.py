"""Which path is whose, and where it goes upstream. Pure.

Promises: a chat request is one by the end of its path, whatever stands in front; everything that is
not ours has a place below `upstream.base_url` or the server root that it belongs to, and no spelling
of a dot segment leaves them. Percent-encoding, slashes and queries of what is passed on stay as they
came. Standard: RFC 3986, 3.3 and 5.2.4.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from proxy.errors import ApiError
from proxy.upstream import CHAT_PATH, RootPath

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


def raw_path(scope: object) -> str:
    """The path of an ASGI scope as on the wire: percent-encoding untouched, without the query."""
    raw = scope.get("raw_path")  # type: ignore[attr-defined]
    if raw:
        return str(raw.decode("latin-1").partition("?")[0])
    return quote(scope["path"])  # type: ignore[index]


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
        400,
        "The path has dot segments or is encoded several times; send the path that you mean.",
        code="invalid_path",
    )


def _climbs(path: bytes) -> bool:
    for overlong, plain in _OVERLONG:
        path = path.replace(overlong, plain)
    text = unicodedata.normalize("NFKC", path.decode("utf-8", "replace"))
    # Some servers drop ;parameters, and what a file name cannot have at its end.
    return any(
        segment.partition(";")[0].strip("\0\t\n\r ") == ".." for segment in _SEPARATORS.split(text)
    )


def _segments(raw: str) -> list[str]:
    return [segment for segment in raw.split("/") if segment]
