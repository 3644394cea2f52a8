"""Images, films and PDFs decoded: thumbnails, keyframes, words. Runs in a process that may be killed (proxy/decoder.py).

Promises: formats are told by their own first bytes and opened as those and nothing else (a program is
never started, a playlist that points to files or hosts never followed); every decode has a named limit;
broken or hostile data gives nothing; `OutOfTime`, raised anywhere within, ends a decode with what it has so
far. Pillow, PyAV and pypdf do the decoding, imported when first needed; ours are the limits and the choice
of keyframes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from proxy.media.headers import container_format

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

Codec = Literal["image", "video", "pdf"]

SIDES_PX = (512, 384, 256, 192, 128)  # of smaller pictures, at most; 512: what low detail is scaled to where it has a rule
MAX_KEYFRAMES = 4
MAX_PIXELS = 40_000_000  # of a picture that is decoded, where no configuration says so


class OutOfTime(BaseException):
    """Raised into a decode that has used up its time."""


def load(codec: Codec) -> None:
    """Import what decodes it, which takes memory and time of its own."""
    if codec == "pdf":
        import pypdf  # noqa: F401
    elif codec == "video":
        import av  # noqa: F401
    if codec != "pdf":
        import PIL.Image
        import PIL.ImageOps

        PIL.Image.preinit()


def decode(codec: Codec, data: bytes, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """What a medium's lower levels show, as JSON; {} when nothing of it can be decoded.

    image: {"images": [JPEG in base64, of at most each of SIDES_PX]}, never enlarged, each once;
    video: {"frames": [[second, [JPEG in base64, of at most every second of SIDES_PX]]]};
    pdf: {"text": words}.
    """
    if codec == "image":
        images = [_in_base64(image) for image in thumbnails(data, SIDES_PX, max_pixels)]
        return {"images": images} if images else {}
    if codec == "video":
        frames = keyframes(data, MAX_KEYFRAMES, SIDES_PX[::2])
        return {"frames": [[f.second, [_in_base64(i) for i in f.images]] for f in frames]} if frames else {}
    text = pdf_text(data)
    return {"text": text} if text else {}


def _in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# ---------------------------------------------------------------- images

# Named, so that no decoder that starts a program (EPS) or renders a language is ever asked.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_JPEG_QUALITY = 70
_PLAIN_MODES = ("RGB", "L")  # resized as they are; all others are converted, which copies every pixel
_THINNED = 4  # times the side that is asked for: a picture is converted when it is no larger


def thumbnails(data: bytes, sides_px: tuple[int, ...], max_pixels: int = MAX_PIXELS) -> list[bytes]:
    """JPEGs of the image with its longer side at most each of `sides_px` (largest first), never enlarged.

    The first frame of an animation, upright as its EXIF says, on white where it is transparent.
    [] for data that is no image, is broken, or has more than `max_pixels`.
    """
    from PIL import Image as images
    from PIL import ImageOps

    made: list[bytes] = []
    # Decoders meet hostile bytes here: whatever they raise means "not an image that we can read".
    with suppress(Exception, OutOfTime), images.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as opened:
        opened.draft("RGB", (sides_px[0], sides_px[0]))  # decodes at half, quarter or eighth size
        if opened.width * opened.height > max_pixels:
            return []
        image: Image = opened
        most = sides_px[0] * _THINNED
        if image.mode not in _PLAIN_MODES and max(image.size) > most:
            image = image.resize(_within(image.size, most), images.Resampling.NEAREST)
            image.info = opened.info
        image = _on_white(ImageOps.exif_transpose(image))
        image = _resized(image, sides_px[0])
        made.append(_jpeg(image))
        made += [_jpeg(_resized(image, side)) for side in sides_px[1:] if side < max(image.size)]
    return made


def _within(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    scale = min(1.0, side_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(image: Image, side_px: int) -> Image:
    size = _within(image.size, side_px)
    return image if size == image.size else image.resize(size, reducing_gap=3.0)


def _jpeg(image: Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return out.getvalue()

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


# ---------------------------------------------------------------- film

MAX_DECODED_FRAMES = 600  # about 20 s of film; a longer one is looked at in places
MAX_DECODED_PIXELS = 1_000_000_000  # of all frames together: a few seconds of CPU at most
MAX_SAMPLES = 32  # pictures kept while the keyframes are chosen
MAX_FRAME_PIXELS = 36_000_000  # 8K
_SCENE_CHANGE = 16.0  # mean difference of 16x16 luma, 0..255; camera motion stays below
_SIGNATURE_SIDE_PX = 16


class Frame(NamedTuple):
    """One picture of a film, as JPEGs from the largest down, and its time in seconds."""

    second: float
    images: tuple[bytes, ...]


class _Sample(NamedTuple):
    second: float
    image: Image
    signature: bytes


def keyframes(data: bytes, count: int, sides_px: tuple[int, ...]) -> list[Frame]:
    """At most `count` frames that tell the film, in order: the first, the clearest changes of
    scene, then the middles of the longest stretches without one.

    JPEGs, longer side at most each of `sides_px` (largest first), never enlarged. [] when nothing can be
    decoded.
    """
    samples: list[_Sample] = []  # outside: a film that breaks midway still shows its start

    def read(container: InputContainer) -> None:
        for frame in _sampled(container):
            image = _small_image(frame, sides_px[0])
            square = (_SIGNATURE_SIDE_PX, _SIGNATURE_SIDE_PX)
            signature = image.convert("L").resize(square).tobytes()
            samples.append(_Sample(max(0.0, round(float(frame.time or 0.0), 3)), image, signature))

    _with_container(data, read)
    samples.sort(key=lambda sample: sample.second)
    shown = (samples[index] for index in _chosen(samples, count))
    return [Frame(s.second, tuple(_jpeg(_resized(s.image, side)) for side in sides_px)) for s in shown]


def _with_container(data: bytes, use: Callable[[InputContainer], None]) -> None:
    name = container_format(data)
    if name is None:
        return
    # Demuxers and decoders meet hostile bytes here: whatever they raise means "cannot be read".
    with suppress(Exception, OutOfTime):
        import av

        options = {"protocol_whitelist": "", "format_whitelist": name}
        with av.open(io.BytesIO(data), "r", format=name, container_options=options, io_open=_refuse) as container:
            use(container)


def _refuse(url: str, flags: int, options: Any) -> NoReturn:
    raise PermissionError("media may not open anything else")


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
    seconds = float(container.duration or 0) / 1_000_000
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


def _after_jumps(container: InputContainer, stream: VideoStream, seconds: float) -> Iterator[VideoFrame]:
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
    width, height = _within((frame.width, frame.height), side)
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


# ---------------------------------------------------------------- PDF

MAX_PDF_PAGES = 200
MAX_PDF_BYTES = 50_000_000
MAX_PDF_CHARS = 262_144  # no level is made of more


def pdf_text(data: bytes) -> str | None:
    """The words of the pages in their order; None when there are none."""
    if len(data) > MAX_PDF_BYTES:
        return None
    pieces: list[str] = []
    # The parser meets hostile bytes here: whatever it raises ends the text where it stands.
    with suppress(Exception, OutOfTime):
        from pypdf import PdfReader

        reader = PdfReader(io.BytesIO(data), strict=False)
        left = MAX_PDF_CHARS
        for index in range(min(len(reader.pages), MAX_PDF_PAGES)):
            words = reader.pages[index].extract_text()[:left].strip()
            pieces.append(words)
            left -= len(words)
            if left <= 0:
                break
    return "\n\n".join(piece for piece in pieces if piece) or None
