"""Compressed request bodies, decoded: gzip, deflate (zlib's and raw), br and zstd, one upon another.

Promises: never more than `limit_bytes` come out, nor, above a few megabytes, `ratio` times what went
in; what would be more is given up as soon as it is known, having taken no more RAM than that. An
encoding that nobody knows, and bytes that are none of it, are None: upstream is their judge.
Standard: RFC 9110, 8.4.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import brotli  # type: ignore[import-untyped]
import zstandard

from proxy.errors import ApiError
from proxy.upstream import Header

_AT_ONCE_BYTES: Final = 262_144  # of output
_IN_BYTES: Final = 65_536  # of input
_FREE_BYTES: Final = 8 << 20  # so much may come out of however little: text that repeats itself does
_MOST_ENCODINGS: Final = 4
_ZSTD_IN_BYTES: Final = 128  # of input: at most 4 MiB of output
_ZSTD_WINDOW_BYTES: Final = 8 << 20  # RFC 8878 wants decoders to take at least this
_NAME: Final = b"content-encoding"

Decoder = Callable[[bytes], Iterator[bytes]]


class _Broken(Exception):
    """The bytes are none of their encoding, or end too early."""


def encodings(headers: Sequence[Header]) -> list[str]:
    """The body's encodings in the order in which they were applied; [] for a plain body."""
    named = b",".join(value for name, value in headers if name == _NAME)
    names = (name.strip().lower() for name in named.decode("latin-1").split(","))
    return [name for name in names if name not in ("", "identity")]


def plain_headers(headers: Sequence[Header]) -> list[Header]:
    """The headers of the decoded body: its length is the server's to say."""
    return [header for header in headers if header[0] not in (_NAME, b"content-length")]


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
    while body:
        member = zlib.decompressobj(wbits)
        rest = body
        while not member.eof:
            piece = member.decompress(rest, _AT_ONCE_BYTES)
            rest = member.unconsumed_tail
            if piece:
                yield piece
            elif not rest and not member.eof:
                raise _Broken
        body = member.unused_data
        if wbits == zlib.MAX_WBITS | 16:
            body = body.lstrip(b"\0")  # gzip's padding


def _gunzipped(body: bytes) -> Iterator[bytes]:
    yield from _inflated(body, zlib.MAX_WBITS | 16)


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
    frame = None
    for at in range(0, len(body), _ZSTD_IN_BYTES):
        rest = body[at : at + _ZSTD_IN_BYTES]
        while rest:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _Broken


_DECODERS: Final[dict[str, Decoder]] = {
    "gzip": _gunzipped,
    "x-gzip": _gunzipped,
    "deflate": _deflated,
    "br": _unbrotlied,
    "zstd": _unzstandarded,
}
