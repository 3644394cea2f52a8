"""Sizes and thumbnails of images.

Promises: reads PNG, JPEG, WEBP, GIF, BMP, TIFF and AVIF from memory and nothing else; an image over
MAX_PIXELS is never decoded; the same bytes give the same thumbnail; broken data gives None.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000
MAX_SIDE_PX = 65_535  # what a JPEG can hold
# Named, so that no decoder that starts a program (EPS) or renders a language is ever asked.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_T = TypeVar("_T")


class Small(NamedTuple):
    """A re-encoded image: `data` of type `mime`, `width` x `height` pixels."""

    data: bytes
    mime: str
    width: int
    height: int


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from the header alone; None when `data` is no image we read."""
    return _with_image(data, lambda image: (image.width, image.height))


def image_format(data: bytes) -> str | None:
    """The format's name ("PNG", "JPEG", ...) as the bytes say it; None when it is no image."""
    return _with_image(data, lambda image: image.format)


def thumbnail(data: bytes, max_side_px: int, quality: int = 70) -> Small | None:
    """The image as a JPEG whose longer side is at most `max_side_px`, never enlarged.

    The first frame of an animation, upright as its EXIF says, on white where it is transparent.
    None for data that is no image, is broken, or has more than MAX_PIXELS.
    """
    side = max(1, min(max_side_px, MAX_SIDE_PX))

    def shrink(image: Image) -> Small | None:
        if image.width * image.height > MAX_PIXELS:
            return None
        from PIL import ImageOps

        image.draft("RGB", (side, side))  # a JPEG decodes at half, quarter or eighth size
        return encode_jpeg(_on_white(ImageOps.exif_transpose(image)), side, quality)

    return _with_image(data, shrink)


def encode_jpeg(image: Image, max_side_px: int, quality: int = 70) -> Small:
    """An RGB image as a JPEG whose longer side is at most `max_side_px`."""
    scale = min(1.0, max_side_px / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if size == image.size else image.resize(size, reducing_gap=3.0)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality, optimize=True)
    return Small(out.getvalue(), "image/jpeg", *size)


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
    with suppress(Exception), images.open(io.BytesIO(data), formats=_FORMATS) as image:
        return use(image)
    return None
