"""What an image, a sound, a film or a file says of itself, read from its bytes without a codec.

Promises: pure arithmetic over the bytes; at most _STEPS boxes, segments or blocks are looked at, so that the
work has a bound whatever the bytes claim; the same bytes say the same everywhere; broken or hostile data says
nothing (None). Libraries that read headers do more than that: Pillow makes a WebP's canvases when it opens one,
FFmpeg decodes frames to find out what they are; and a count cannot wait for a process that may be killed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from struct import unpack_from
from typing import NamedTuple

MAX_SECONDS = 1_000_000.0
_STEPS = 4_096  # a few milliseconds

# ---------------------------------------------------------------- images


class ImageInfo(NamedTuple):
    """An image's size in pixels and its format ("PNG", "JPEG", ...)."""

    width: int
    height: int
    format: str


def image_info(data: bytes) -> ImageInfo | None:
    """None when `data` is no image whose size is told here."""
    for magic, at, format, measure in _IMAGES:
        if data.startswith(magic, at):
            with suppress(struct.error, IndexError):
                size = measure(data)
                if size is not None and min(size) > 0:
                    return ImageInfo(*size, format)
    return None


_Size = tuple[int, int]


def _png(data: bytes) -> _Size | None:
    width, height = unpack_from(">II", data, 16)
    return (width, height) if data[12:16] == b"IHDR" else None


def _gif(data: bytes) -> _Size:
    width, height = unpack_from("<HH", data, 6)
    return width, height


def _bmp(data: bytes) -> _Size:
    old = unpack_from("<I", data, 14)[0] == 12
    width, height = unpack_from("<HH" if old else "<ii", data, 18)
    return width, abs(height)  # rows from the top down are a negative height


def _jpeg(data: bytes) -> _Size | None:
    at = 2
    for _ in range(_STEPS):
        at = data.find(b"\xff", at)
        if at < 0:
            return None
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame's head
            height, width = unpack_from(">HH", data, at + 5)
            return width, height
        if kind == 0xFF:
            at += 1
        elif kind <= 0x01 or 0xD0 <= kind <= 0xD8:  # marks without a length
            at += 2
        else:
            at += 2 + unpack_from(">H", data, at + 2)[0]
    return None


def _webp(data: bytes) -> _Size | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _tiff(data: bytes) -> _Size:
    order = "<" if data[:2] == b"II" else ">"
    at = unpack_from(order + "I", data, 4)[0]
    sides = [0, 0]
    for entry in range(min(_STEPS, unpack_from(order + "H", data, at)[0])):
        tag, kind = unpack_from(order + "HH", data, at + 2 + 12 * entry)
        if tag in (256, 257):
            sides[tag - 256] = unpack_from(order + ("H" if kind == 3 else "I"), data, at + 10 + 12 * entry)[0]
    return sides[0], sides[1]


def _avif(data: bytes) -> _Size | None:
    """The largest of the pictures in it: a thumbnail may stand beside the whole, or its tiles."""
    sizes: list[_Size] = []
    at = 0
    while (at := data.find(b"ispe", at, 65_536) + 4) > 4 and len(sizes) < _STEPS:
        sizes.append(unpack_from(">II", data, at + 4))
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    return width, height


# A format's first bytes, where they stand, and what measures it.
_IMAGES: tuple[tuple[bytes, int, str, Callable[[bytes], _Size | None]], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "PNG", _png),
    (b"\xff\xd8\xff", 0, "JPEG", _jpeg),
    (b"GIF8", 0, "GIF", _gif),
    (b"WEBP", 8, "WEBP", _webp),
    (b"BM", 0, "BMP", _bmp),
    (b"II*\0", 0, "TIFF", _tiff),
    (b"MM\0*", 0, "TIFF", _tiff),
    (b"ftypavi", 4, "AVIF", _avif),
    (b"ftypmif1", 4, "AVIF", _avif),
)

# ---------------------------------------------------------------- sound and film

# Formats without a header, by the names that the APIs give them: bytes a second
_RAW_AUDIO = {"pcm16": 48_000, "pcm": 48_000, "g711_ulaw": 8_000, "g711_alaw": 8_000}
_MAGIC = (
    (b"\x1aE\xdf\xa3", "matroska"),
    (b"OggS", "ogg"),
    (b"fLaC", "flac"),
    (b"ID3", "mp3"),
    (b"FLV", "flv"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"#!AMR", "amr"),
    (b"FORM", "aiff"),
)


class VideoInfo(NamedTuple):
    """Duration in seconds (0.0 when unknown) and the picture's size in pixels."""

    seconds: float
    width: int
    height: int


def audio_seconds(data: bytes, format: str | None) -> float | None:
    """How long the sound is; None when it cannot be told.

    `format` is the API's name ("wav", "mp3", "pcm16", ...); it only matters for raw samples.
    """
    bytes_a_second = _RAW_AUDIO.get((format or "").lower())
    if bytes_a_second and data[:4] != b"RIFF":
        return _sane(len(data) / bytes_a_second)
    film = _film(data)
    return _sane(film.seconds) if film is not None else None


def video_info(data: bytes) -> VideoInfo | None:
    """Duration and size; None when `data` holds no film whose size is told here."""
    film = _film(data)
    if film is None or film.width < 1 or film.height < 1:
        return None
    return film._replace(seconds=_sane(film.seconds) or 0.0)


def container_format(data: bytes) -> str | None:
    """FFmpeg's name for the container that `data` begins like; None for one that nobody opens here."""
    head = data[:16]
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if head[:4] == b"RIFF":
        return {b"AVI ": "avi", b"WAVE": "wav"}.get(head[8:12])
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # an MPEG audio frame
        return "aac" if head[1] & 0xF6 == 0xF0 else "mp3"
    if data[:1] == b"G" and data[188:189] in (b"G", b""):
        return "mpegts"
    return None


def _film(data: bytes) -> VideoInfo | None:
    measure = _CONTAINERS.get(container_format(data) or "")
    if measure is not None:
        with suppress(struct.error, IndexError, ZeroDivisionError, OverflowError):
            return measure(data)
    return None


def _sane(seconds: float) -> float | None:
    return round(seconds, 3) if 0.0 < seconds <= MAX_SECONDS else None


def _sound(seconds: float) -> VideoInfo:
    return VideoInfo(seconds, 0, 0)


def _wav(data: bytes) -> VideoInfo | None:
    """From the chunks themselves: streamed WAVs state sizes of 0 or 4 GB, so the bytes decide."""
    at, rate = 12, 0
    for _ in range(_STEPS):
        kind, size = unpack_from("<4sI", data, at)
        body = at + 8
        if kind == b"fmt ":
            rate = unpack_from("<I", data, body + 8)[0]
        elif kind == b"data":
            there = len(data) - body
            return _sound((min(size, there) if size else there) / rate)
        at = body + size + (size & 1)
    return None


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the bodies of MP4's boxes."""
    at = start
    for _ in range(_STEPS):
        if at + 8 > end:
            return
        size, kind = unpack_from(">I4s", data, at)
        body = at + 8
        if size == 1:
            size, body = unpack_from(">Q", data, body)[0], body + 8
        past = at + size if size else end
        if past < body:
            return
        yield kind, body, min(past, end)
        at = past


def _mp4(data: bytes) -> VideoInfo:
    seconds, width, height = 0.0, 0, 0
    head = next((box for box in _boxes(data, 0, len(data)) if box[0] == b"moov"), (b"", 0, 0))
    for kind, start, end in _boxes(data, head[1], head[2]):
        if kind == b"mvhd":
            large = data[start] == 1
            scale, length = unpack_from(">IQ" if large else ">II", data, start + (20 if large else 12))
            seconds = 0.0 if length >= 0xFFFFFFFF else length / scale
        elif kind == b"trak" and not width:
            for inner, _, last in _boxes(data, start, end):
                if inner == b"tkhd":
                    width, height = (side >> 16 for side in unpack_from(">II", data, last - 8))
    return VideoInfo(seconds, width, height)


_ENTERED = {0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675}  # Segment, Info, Tracks, a track, its Video, Cluster
_BLOCKS = (0xA3, 0xA1)


def _matroska(data: bytes) -> VideoInfo:
    """The duration that is stated, else the time of the last block: recorders of live streams state none."""
    at, scale, stated, cluster, last = 0, 1_000_000, 0.0, 0, 0
    width = height = 0
    for _ in range(_STEPS):
        if at >= len(data):
            break
        kind, at = _vint(data, at, keep=True)
        size, at = _vint(data, at)
        if kind in _ENTERED:
            if kind == 0x1F43B675 and stated:
                break
            continue
        value = int.from_bytes(data[at : at + min(size, 8)], "big")
        if kind == 0x2AD7B1:
            scale = value
        elif kind == 0x4489:
            stated = unpack_from(">f" if size == 4 else ">d", data, at)[0]
        elif kind == 0xB0:
            width = width or value
        elif kind == 0xBA:
            height = height or value
        elif kind == 0xE7:
            cluster = last = value
        elif kind in _BLOCKS:
            last = max(last, cluster + unpack_from(">h", data, _vint(data, at)[1])[0])
        at += size
    return VideoInfo((stated or last) * scale / 1e9, width, height)


def _vint(data: bytes, at: int, keep: bool = False) -> tuple[int, int]:
    """EBML's integer at `at`, without its length's mark unless `keep`, and where it ends."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return value if keep else value & (1 << 7 * length) - 1, at + length


def _ogg(data: bytes) -> VideoInfo | None:
    head = data[:256]
    if (at := head.find(b"\x01vorbis")) >= 0:
        rate = unpack_from("<I", head, at + 12)[0]
    elif b"OpusHead" in head:
        rate = 48_000
    else:
        return None
    return _sound(unpack_from("<q", data, data.rfind(b"OggS") + 6)[0] / rate)


def _flac(data: bytes) -> VideoInfo:
    rate, samples = int.from_bytes(data[18:21], "big") >> 4, int.from_bytes(data[21:26], "big")
    return _sound((samples & (1 << 36) - 1) / rate)


_KBITS = {  # of MPEG 1's and MPEG 2's layer III
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mp3(data: bytes) -> VideoInfo | None:
    """From the frames that its first one counts (Xing, VBRI), else by that one's bit rate."""
    start = 0
    if data.startswith(b"ID3"):
        a, b, c, d = data[6:10]
        start = 10 + (a << 21 | b << 14 | c << 7 | d)
    for at in range(start, min(start + 4096, len(data) - 4)):
        first, second, third, fourth = data[at : at + 4]
        version, layer = second >> 3 & 3, second >> 1 & 3
        if first == 0xFF and second >= 0xE0 and version != 1 and layer == 1 and third >> 4 < 15 and third & 12 != 12:
            break
    else:
        return None
    rate = (44_100, 48_000, 32_000)[third >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[version]
    samples, mono = (1152 if version == 3 else 576), fourth >> 6 == 3
    xing = at + 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))
    if data[xing : xing + 4] in (b"Xing", b"Info") and data[xing + 7] & 1:
        return _sound(unpack_from(">I", data, xing + 8)[0] * samples / rate)
    if data[at + 36 : at + 40] == b"VBRI":
        return _sound(unpack_from(">I", data, at + 50)[0] * samples / rate)
    return _sound((len(data) - at) / (_KBITS[3 if version == 3 else 2][third >> 4] * 125))


def _avi(data: bytes) -> VideoInfo:
    at = data.index(b"avih", 0, 512) + 8 if b"avih" in data[:512] else len(data)
    frame_us, frames = unpack_from("<I12xI", data, at)
    width, height = unpack_from("<II", data, at + 32)
    return VideoInfo(frame_us * frames / 1e6, width, height)


_CONTAINERS: dict[str, Callable[[bytes], VideoInfo | None]] = {
    "wav": _wav, "mp4": _mp4, "matroska": _matroska, "ogg": _ogg, "flac": _flac, "mp3": _mp3, "avi": _avi,
}  # fmt: skip

# ---------------------------------------------------------------- files

MAX_CHARS = 1_000_000
_TEXT_MIMES = frozenset(
    """
    application/json application/xml application/javascript application/x-yaml application/yaml
    application/toml application/sql application/x-sh application/x-ndjson application/csv
    image/svg+xml
    """.split()
)
_TEXT_ENDINGS = frozenset(
    """
    txt md markdown rst csv tsv json jsonl ndjson yaml yml toml ini cfg conf log xml html htm svg
    css js mjs ts tsx jsx py pyi rb go rs java kt c h cc cpp hpp cs php sh sql tex diff patch
    """.split()
)


def is_pdf(data: bytes) -> bool:
    return data[:1024].lstrip()[:5] == b"%PDF-"


def file_text(data: bytes, mime: str, filename: str | None) -> str | None:
    """The words of a file that is text by its type or its name's ending; None for any other kind, or when
    it has none."""
    kind = mime.partition(";")[0].strip().lower()
    ending = (filename or "").rpartition(".")[2].lower()
    known = kind.startswith("text/") or kind in _TEXT_MIMES or kind.endswith(("+json", "+xml"))
    if not known and ending not in _TEXT_ENDINGS:
        return None
    data = data[: MAX_CHARS * 4]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", "replace")
    elif b"\0" in data[:4096]:
        return None  # binary, whatever its name says
    else:
        text = data.decode("utf-8-sig", "replace")
    return text[:MAX_CHARS] if text.strip() else None
