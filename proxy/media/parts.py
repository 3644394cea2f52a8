"""Content parts of a message that hold a medium, in every shape that clients send them.

Promises: reads the shapes of Chat Completions, of the Responses API and of the common providers
behind OpenAI-compatible gateways; base64 is decoded when it is asked for, once, and only up to
MAX_ENCODED_CHARS or MAX_ESCAPED_CHARS; odd input gives None or a Medium that knows less, never an exception.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

Kind = Literal["image", "audio", "video", "file"]

MAX_ENCODED_CHARS = 140_000_000  # about 100 MB of data

MAX_ESCAPED_CHARS = 1_000_000  # of data that is not in base64, which costs a hundred times as much

# What a part is sent as, by its type. The one home of this: text, pages and counts ask `kind_of`.
_KINDS: dict[str, Kind] = {
    "image_url": "image", "image": "image", "input_image": "image", "input_audio": "audio", "audio_url": "audio",
    "audio": "audio", "output_audio": "audio", "video_url": "video", "video": "video", "input_video": "video",
    "file": "file", "input_file": "file", "document": "file",
}  # fmt: skip
_UNKNOWN_MIME = "application/octet-stream"
_MIME_OF_ENDING = {
    "pdf": "application/pdf", "json": "application/json", "txt": "text/plain", "md": "text/markdown", "csv": "text/csv",
    "html": "text/html", "htm": "text/html", "jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png",
    "gif": "image/gif", "webp": "image/webp", "mp3": "audio/mpeg", "wav": "audio/wav", "mp4": "video/mp4",
    "mov": "video/quicktime", "webm": "video/webm",
}  # fmt: skip
_BODY_KEYS = ("image_url", "input_audio", "video_url", "audio_url", "file", "audio")
# Where a part keeps its payload, in the order of trust.
_PAYLOAD_KEYS = ("file_data", "data", "url", "image_url", "video_url", "audio_url", "file_url")
_DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{1,15}://")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")


@dataclass(eq=False)
class Medium:
    """What a part says of its medium.

    `kind` is what the part is sent as; `mime` is "" when nothing tells it; `url` is a link (never a
    data URL); `detail` the image's; `name` a file's name or id; `format` as the API names it
    ("wav"); `transcript` the words of a sound, where the part carries them.
    """

    kind: Kind
    mime: str
    url: str | None
    detail: str | None
    name: str | None
    format: str | None
    transcript: str | None
    encoded: str | None
    is_base64: bool

    @cached_property
    def data(self) -> bytes | None:
        """The decoded bytes; None for a link, an id, or what cannot be decoded."""
        encoded = self.encoded
        if encoded is None or len(encoded) > MAX_ENCODED_CHARS:
            return None
        if not self.is_base64:
            if len(encoded) > MAX_ESCAPED_CHARS:
                return None
            return unquote_to_bytes(encoded.encode("utf-8", "surrogatepass")) or None
        return _from_base64(encoded)


def read_part(part: Mapping[str, Any]) -> Medium | None:
    """The medium in a content part (or in an assistant message's `audio` object); None for text
    and for anything else.
    """
    kind = kind_of(part)
    if kind is None:
        return None
    body = _body(part)
    encoded, is_base64, url, mime = _payload(body)
    format = _text(body, "format")
    name = _text(body, "filename", "file_name", "name", "title") or _text(part, "filename", "title")
    mime = mime or _text(body, "media_type", "mime_type") or ""
    if not mime and format:
        mime = format if "/" in format else _mime_of(kind, format)
    if not mime:
        mime = _mime_of(kind, (name or _last_of(url)).rpartition(".")[2])
    if kind == "audio" and not format and "/" in mime:
        format = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav"}.get(mime.partition("/")[2], mime.partition("/")[2])
    return Medium(
        kind=kind, mime=mime.lower(), url=url, detail=_text(body, "detail") or _text(part, "detail"),
        name=name or _text(body, "file_id", "id"), format=format, transcript=_text(body, "transcript"), encoded=encoded,
        is_base64=is_base64,
    )  # fmt: skip


def kind_of(part: Mapping[str, Any]) -> Kind | None:
    """What kind of medium a content part is sent as; None for text and for anything else."""
    named = part.get("type")
    if isinstance(named, str):
        return _KINDS.get(named)
    for key in _BODY_KEYS:
        if isinstance(part.get(key), (str, Mapping)):  # gateways that leave the type out
            return _KINDS[key]
    if isinstance(part.get("transcript"), str) and "text" not in part:
        return "audio"  # the `audio` object of an assistant's message
    return None


def _body(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that holds the payload: under the part's own type, `source`, or the part."""
    named = part.get("type")
    for key in (named, *_BODY_KEYS, "source"):
        inner = part.get(key) if isinstance(key, str) else None
        if isinstance(inner, Mapping):
            return inner
        if isinstance(inner, str):
            return {**part, "url": inner}
    return part


def _payload(body: Mapping[str, Any]) -> tuple[str | None, bool, str | None, str | None]:
    """(encoded data, whether it is base64, link, type) of the first payload found."""
    for key in _PAYLOAD_KEYS:
        value = body.get(key)
        if isinstance(value, Mapping):
            value = value.get("url")
        if not isinstance(value, str) or not value:
            continue
        match = _DATA_URL.match(value)
        if match is not None:
            is_base64 = ";base64" in match[2].lower()
            return value[match.end() :], is_base64, None, match[1].strip() or None
        if _SCHEME.match(value):
            return None, True, value, None
        if key == "url" and len(value) < 256 and ("." in value or "/" in value[:2]):
            return None, True, value, None  # a relative link; base64 has no full stop
        return value, True, None, None
    return None, True, None, None


def _text(body: Mapping[str, Any], *keys: str) -> str | None:
    for key in keys:
        value = body.get(key)
        if isinstance(value, str) and value:
            return value
    return None


def _last_of(url: str | None) -> str:
    return (url or "").partition("?")[0].partition("#")[0].rpartition("/")[2]


def _mime_of(kind: Kind, ending: str) -> str:
    known = _MIME_OF_ENDING.get(ending.lower())
    if known is not None:
        return known
    if kind == "audio" and ending.isalnum() and len(ending) <= 10:
        return f"audio/{ending.lower()}"
    return _UNKNOWN_MIME if kind == "file" else ""


def _from_base64(encoded: str) -> bytes | None:
    """Both alphabets, with or without padding and line breaks."""
    try:
        return base64.b64decode(encoded, validate=True) or None
    except (binascii.Error, ValueError):
        pass  # rarer spellings below
    plain = _NOT_BASE64.sub("", encoded.replace("-", "+").replace("_", "/"))
    if len(plain) < len(encoded) * 0.9:
        return None
    plain = plain[: len(plain) - (len(plain) % 4 == 1)]
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4)) or None
    except (binascii.Error, ValueError):
        return None
