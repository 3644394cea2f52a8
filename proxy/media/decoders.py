"""What the bytes of an image, a sound, a film or a file hold: sizes, thumbnails, durations, keyframes, words.

Promises: formats are told by their own first bytes and opened as those and nothing else (a program is
never started, a playlist that points to files or hosts never followed); every decode has a named limit;
the same bytes give the same answer; broken or hostile data gives None or no frames. Pillow, PyAV and
pypdf do the decoding, imported when first needed; ours are the limits, the choice of keyframes, and the
length of sounds whose headers say nothing or the wrong thing.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

_T = TypeVar("_T")

# ---------------------------------------------------------------- images

MAX_PIXELS = 64_000_000  # a larger image is measured, never decoded
# Named, so that no decoder that starts a program (EPS) or renders a language is ever asked.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_JPEG_QUALITY = 70


class ImageInfo(NamedTuple):
    """An image's size in pixels and its format ("PNG", "JPEG", ...)."""

    width: int
    height: int
    format: str


class Jpeg(NamedTuple):
    """A re-encoded image of `width` x `height` pixels."""

    data: bytes
    width: int
    height: int


def image_info(data: bytes) -> ImageInfo | None:
    """From the header alone; None when `data` is no image that we read."""
    return _with_image(data, lambda image: ImageInfo(*image.size, image.format or ""))


def thumbnail(data: bytes, max_side_px: int) -> Jpeg | None:
    """The image with its longer side at most `max_side_px`, never enlarged.

    The first frame of an animation, upright as its EXIF says, on white where it is transparent.
    None for data that is no image, is broken, or has more than MAX_PIXELS.
    """

    def shrink(image: Image) -> Jpeg | None:
        if image.width * image.height > MAX_PIXELS:
            return None
        from PIL import ImageOps

        image.draft("RGB", (max_side_px, max_side_px))  # decodes at half, quarter or eighth size
        return _jpeg(_on_white(ImageOps.exif_transpose(image)), max_side_px)

    return _with_image(data, shrink)


def _jpeg(image: Image, max_side_px: int) -> Jpeg:
    scale = min(1.0, max_side_px / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if size == image.size else image.resize(size, reducing_gap=3.0)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return Jpeg(out.getvalue(), *size)


def _on_white(image: Image) -> Image:
    """The picture without transparency: JPEG has none, and black would swallow dark lines."""
    from PIL import Image as images

    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA", "PA"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    page = images.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page


def _with_image(data: bytes, use: Callable[[Image], _T]) -> _T | None:
    from PIL import Image as images

    # Decoders meet hostile bytes here: whatever they raise means "not an image that we can read".
    with suppress(Exception), images.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
        return use(image)
    return None


# ---------------------------------------------------------------- sound and film

MAX_DECODED_FRAMES = 600  # about 20 s of film; a longer one is looked at in places
MAX_DECODED_PIXELS = 1_000_000_000  # of all frames together: a few seconds of CPU at most
MAX_SAMPLES = 32  # pictures kept while the keyframes are chosen
MAX_FRAME_PIXELS = 36_000_000  # 8K
MAX_PACKETS = 200_000  # read at most to find a duration that no header states
MAX_SECONDS = 1_000_000.0
_SCENE_CHANGE = 16.0  # mean difference of 16x16 luma, 0..255; camera motion stays below
_SIGNATURE_SIDE_PX = 16

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


class Frame(NamedTuple):
    """One picture of a film and its time in seconds."""

    second: float
    jpeg: Jpeg


class _Sample(NamedTuple):
    second: float
    image: Image
    signature: bytes


def audio_seconds(data: bytes, format: str | None) -> float | None:
    """How long the sound is; None when it cannot be told.

    `format` is the API's name ("wav", "mp3", "pcm16", ...); it only matters for raw samples.
    """
    bytes_a_second = _RAW_AUDIO.get((format or "").lower())
    if bytes_a_second and data[:4] != b"RIFF":
        return _sane(len(data) / bytes_a_second)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _wav_seconds(data)
    return _with_container(data, lambda container: _sane(_seconds(container)))


def video_info(data: bytes) -> VideoInfo | None:
    """Duration and size from the container; None when `data` holds no film that we read."""

    def read(container: InputContainer) -> VideoInfo | None:
        if not container.streams.video:
            return None
        codec = container.streams.video[0].codec_context
        if codec.width < 1 or codec.height < 1:
            return None
        return VideoInfo(_sane(_seconds(container)) or 0.0, codec.width, codec.height)

    return _with_container(data, read)


def keyframes(data: bytes, count: int, max_side_px: int) -> list[Frame]:
    """At most `count` frames that tell the film, in order: the first, the clearest changes of
    scene, then the middles of the longest stretches without one.

    JPEGs, longer side at most `max_side_px`, never enlarged. [] when nothing can be decoded.
    """
    samples: list[_Sample] = []  # outside: a film that breaks midway still shows its start

    def read(container: InputContainer) -> None:
        for frame in _sampled(container):
            image = _small_image(frame, max_side_px)
            square = (_SIGNATURE_SIDE_PX, _SIGNATURE_SIDE_PX)
            signature = image.convert("L").resize(square).tobytes()
            samples.append(_Sample(max(0.0, round(float(frame.time or 0.0), 3)), image, signature))

    _with_container(data, read)
    samples.sort(key=lambda sample: sample.second)
    shown = (samples[index] for index in _chosen(samples, count))
    return [Frame(sample.second, _jpeg(sample.image, max_side_px)) for sample in shown]


def container_format(data: bytes) -> str | None:
    """FFmpeg's name for the container that `data` begins like; None for one that we do not open."""
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


def _with_container(data: bytes, use: Callable[[InputContainer], _T]) -> _T | None:
    name = container_format(data)
    if name is None:
        return None
    # Demuxers and decoders meet hostile bytes here: whatever they raise means "cannot be read".
    with suppress(Exception):
        import av

        options = {"protocol_whitelist": "", "format_whitelist": name}
        with av.open(
            io.BytesIO(data), "r", format=name, container_options=options, io_open=_refuse
        ) as container:
            return use(container)
    return None


def _refuse(url: str, flags: int, options: Any) -> NoReturn:
    raise PermissionError("media may not open anything else")


def _seconds(container: InputContainer) -> float:
    """The container's duration, else the end of the last packet."""
    if container.duration:
        return _seconds_stated(container)
    end = 0.0
    for index, packet in enumerate(container.demux()):
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if index >= MAX_PACKETS:
            break
    return end


def _seconds_stated(container: InputContainer) -> float:
    return float(container.duration or 0) / 1_000_000


def _sane(seconds: float) -> float | None:
    return round(seconds, 3) if 0.0 < seconds <= MAX_SECONDS else None


def _wav_seconds(data: bytes) -> float | None:
    """From the chunks themselves: streamed WAVs state sizes of 0 or 4 GB, so the bytes decide."""
    at, rate = 12, 0
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        body = at + 8
        if kind == b"fmt " and body + 12 <= len(data):
            rate = struct.unpack_from("<I", data, body + 8)[0]
        elif kind == b"data":
            there = len(data) - body
            return _sane((min(size, there) if size else there) / rate) if rate else None
        at = body + size + (size & 1)
    return None


def _sampled(container: InputContainer) -> Iterator[VideoFrame]:
    """At most MAX_SAMPLES frames: every k-th of a short film, else one after each of as many
    jumps.
    """
    stream = container.streams.video[0]
    stream.thread_type = "NONE"  # the same frames on any machine, and no threads to wait for
    codec = stream.codec_context
    pixels = codec.width * codec.height
    if pixels > MAX_FRAME_PIXELS:
        return
    most = min(MAX_DECODED_FRAMES, max(MAX_SAMPLES, MAX_DECODED_PIXELS // max(1, pixels)))
    seconds = _seconds_stated(container)
    expected = stream.frames or int(seconds * float(stream.average_rate or 25))
    if expected > most:
        yield from _after_jumps(container, stream, seconds)
        return
    step = max(1, -(-expected // MAX_SAMPLES))
    for index, frame in enumerate(container.decode(stream)):
        if index >= most or index // step >= MAX_SAMPLES:
            return
        if index % step == 0:
            yield frame


def _after_jumps(
    container: InputContainer, stream: VideoStream, seconds: float
) -> Iterator[VideoFrame]:
    seen: set[float] = set()
    for index in range(MAX_SAMPLES):
        container.seek(int(index * seconds / MAX_SAMPLES * 1_000_000))
        frame = next(iter(container.decode(stream)), None)
        if frame is not None and float(frame.time or 0.0) not in seen:
            seen.add(float(frame.time or 0.0))
            yield frame


def _small_image(frame: VideoFrame, side: int) -> Image:
    if frame.width * frame.height > MAX_FRAME_PIXELS:  # it may change within the stream
        raise ValueError("frame too large")
    scale = min(1.0, side / max(frame.width, frame.height))
    width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    image: Image = frame.to_image(width=width, height=height)  # type: ignore[no-untyped-call]
    return image


def _chosen(samples: list[_Sample], count: int) -> list[int]:
    """Indices of the samples that `keyframes` shows, in order."""
    if not samples:
        return []
    changes = []
    for index in range(1, len(samples)):
        before, here = samples[index - 1].signature, samples[index].signature
        difference = sum(abs(a - b) for a, b in zip(before, here, strict=True)) / len(here)
        if difference >= _SCENE_CHANGE:
            changes.append((-difference, index))
    changes.sort()
    chosen = {0, *(index for _, index in changes[: count - 1])}
    while len(chosen) < min(count, len(samples)):
        marks = [*sorted(chosen), len(samples)]
        gap, start = max((b - a, -a) for a, b in pairwise(marks))
        chosen.add(-start + gap // 2)
    return sorted(chosen)


# ---------------------------------------------------------------- files

MAX_CHARS = 1_000_000
MAX_PDF_PAGES = 200
MAX_PDF_BYTES = 50_000_000
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
    """The words of a text, JSON or PDF file; None for any other kind, or when it has none.

    What the bytes are decides for PDF; for text the type, or the name's ending.
    """
    if is_pdf(data):
        return _pdf_text(data)
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


def _pdf_text(data: bytes) -> str | None:
    if len(data) > MAX_PDF_BYTES:
        return None
    pieces: list[str] = []
    # The parser meets hostile bytes here: whatever it raises ends the text where it stands.
    with suppress(Exception):
        from pypdf import PdfReader

        reader = PdfReader(io.BytesIO(data), strict=False)
        left = MAX_CHARS
        for index in range(min(len(reader.pages), MAX_PDF_PAGES)):
            words = reader.pages[index].extract_text()[:left].strip()
            pieces.append(words)
            left -= len(words)
            if left <= 0:
                break
    return "\n\n".join(piece for piece in pieces if piece) or None
