"""Real media, built in the test: PNG and JPEG (Pillow), WAV (wave), MP4 (PyAV), PDF (by hand).

The same arguments give the same bytes. Nothing here is random: pictures are gradients and shapes.
"""

from __future__ import annotations

import base64
import io
import json
import math
import wave
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import av
from PIL import Image, ImageDraw

from proxy.media.decoders import pdf_text
from proxy.media.headers import audio_seconds, file_text, image_info, is_pdf, video_info
from proxy.media.parts import read_part
from proxy.tokens import get_counter


def picture(width: int = 1600, height: int = 1200) -> Image.Image:
    """A gradient with shapes and words: compresses like a screenshot, not like noise."""
    red = Image.linear_gradient("L").resize((width, height))
    green = Image.radial_gradient("L").resize((width, height))
    image = Image.merge("RGB", (red, green, Image.new("L", (width, height), 128)))
    draw = ImageDraw.Draw(image)
    for index in range(12):
        left = index * width // 12
        draw.rectangle((left, height // 2, left + width // 24, height - 1), fill="navy")
    draw.text((width // 10, height // 10), "Quarterly revenue 2026", fill="white")
    return image


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@lru_cache(maxsize=16)
def png(width: int = 1600, height: int = 1200) -> bytes:
    return encoded(picture(width, height), "PNG")


@lru_cache(maxsize=16)
def jpeg(width: int = 1600, height: int = 1200, quality: int = 85) -> bytes:
    return encoded(picture(width, height), "JPEG", quality=quality)


@lru_cache(maxsize=16)
def wav(seconds: float = 42.0, rate: int = 8000) -> bytes:
    """A 440 Hz tone, mono, 16 bit."""
    one = b"".join(
        int(8000 * math.sin(2 * math.pi * 440 * index / rate)).to_bytes(2, "little", signed=True)
        for index in range(rate)
    )
    samples = (one * math.ceil(seconds))[: int(seconds * rate) * 2]
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples)
    return out.getvalue()


COLOURS = ("navy", "orange", "white", "darkgreen", "purple", "gold")


@lru_cache(maxsize=16)
def mp4(
    scenes: int = 3,
    seconds_per_scene: float = 2.0,
    rate: int = 10,
    width: int = 320,
    height: int = 240,
    codec: str = "mpeg4",
    format: str = "mp4",
) -> bytes:
    """A film of `scenes` colours, each with a square that wanders slowly."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for scene in range(scenes):
            for index in range(int(seconds_per_scene * rate)):
                image = Image.new("RGB", (width, height), COLOURS[scene % len(COLOURS)])
                left = 10 + index * 2
                ImageDraw.Draw(image).rectangle((left, 10, left + 30, 40), fill="red")
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return out.getvalue()


@lru_cache(maxsize=16)
def sound(format: str, codec: str, rate: int, seconds: float) -> bytes:
    """A 440 Hz tone, mono, compressed."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        resampler = av.AudioResampler(
            format=stream.format.name, layout=stream.layout.name, rate=rate, frame_size=stream.frame_size or 1024
        )
        frame = av.AudioFrame(format="s16", layout="mono", samples=int(rate * seconds))
        frame.planes[0].update(wav(seconds, rate)[44:].ljust(frame.planes[0].buffer_size, b"\0"))
        frame.sample_rate = rate
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return out.getvalue()


def pdf(pages: Sequence[str]) -> bytes:
    """A PDF with one line of Helvetica for each line of each page."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    kids = []
    for text in pages:
        lines = text.replace("\\", "").replace("(", "").replace(")", "").splitlines()
        shown = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
        stream = f"BT /F1 12 Tf 72 720 Td {shown} ET".encode("latin-1", "replace")
        content = len(objects) + 1
        objects.append(b"<</Length %d>>\nstream\n%s\nendstream" % (len(stream), stream))
        kids.append(len(objects) + 1)
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
            b"/Contents %d 0 R>>" % content
        )
    refs = b" ".join(b"%d 0 R" % kid for kid in kids)
    objects[1] = b"<</Type/Pages/Kids[%s]/Count %d>>" % (refs, len(kids))
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return out + b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1,
        start,
    )


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, mime: str = "image/png", detail: str | None = None) -> dict[str, Any]:
    image: dict[str, Any] = {"url": data_url(data, mime)}
    if detail is not None:
        image["detail"] = detail
    return {"type": "image_url", "image_url": image}


def audio_part(data: bytes, format: str = "wav") -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": format}}


def video_part(data: bytes, mime: str = "video/mp4") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, mime)}}


def file_part(data: bytes, mime: str, filename: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": data_url(data, mime), "filename": filename}}


class TileCounts:
    """The published rules, small: gpt-4o's tiles, 10 tokens a second of sound, 258 of film."""

    def text(self, text: str) -> int:
        return get_counter("gpt-4o").text(text)

    def part(self, part: dict[str, Any]) -> int:
        medium = read_part(part)
        if medium is None:
            text = part.get("text")
            return self.text(text if isinstance(text, str) else json.dumps(part, default=str))
        data = medium.data or b""
        if medium.kind == "image":
            info = image_info(data)
            return self.image(medium.detail, info[:2] if info else None)
        if medium.kind == "audio":
            return math.ceil(10 * (audio_seconds(data, medium.format) or 1.0))
        if medium.kind == "video":
            info = video_info(data)
            return math.ceil(258 * (info.seconds if info else 1.0))
        words = pdf_text(data) if is_pdf(data) else file_text(data, medium.mime, medium.name)
        return self.text(words or "no words " * 100)

    def image(self, detail: str | None, size: tuple[int, int] | None) -> int:
        if detail == "low":
            return 85
        width, height = size or (2048, 2048)
        scale = min(1.0, 2048 / max(width, height))
        scale = min(scale, 768 / (min(width, height) * scale)) if min(width, height) else 1.0
        tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
        return 85 + 170 * max(1, tiles)


class AreaCounts(TileCounts):
    """The rule of a provider without `detail`: a token for 750 pixels of at most 1.15 megapixels."""

    def image(self, detail: str | None, size: tuple[int, int] | None) -> int:
        width, height = size or (1000, 1000)
        return max(1, math.ceil(min(width * height, 1_150_000) / 750))
