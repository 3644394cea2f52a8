import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from proxy.media.images import MAX_PIXELS, image_format, image_size, thumbnail
from tests.media.samples import encoded, jpeg, picture, png


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_the_size_and_the_thumbnail_of_each_format(format: str) -> None:
    if not features.check("avif") and format == "AVIF":
        pytest.skip("this Pillow was built without AVIF")
    data = encoded(picture(640, 480), format)
    assert image_size(data) == (640, 480)
    assert image_format(data) == format
    small = thumbnail(data, 256)
    assert small is not None
    assert (small.mime, small.width, small.height) == ("image/jpeg", 256, 192)
    with Image.open(io.BytesIO(small.data)) as image:
        assert (image.format, image.size) == ("JPEG", (256, 192))


def test_a_thumbnail_is_smaller_and_never_enlarged() -> None:
    data = jpeg()
    small = thumbnail(data, 512)
    assert small is not None and len(small.data) < len(data) / 2
    kept = thumbnail(png(40, 30), 512)
    assert kept is not None and (kept.width, kept.height) == (40, 30)


def test_transparency_becomes_white_and_a_photo_stands_upright() -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    small = thumbnail(encoded(clear, "PNG"), 20)
    assert small is not None
    with Image.open(io.BytesIO(small.data)) as image:
        assert min(image.convert("L").tobytes()) > 250
    turned = Image.Exif()
    turned[0x0112] = 6  # held sideways
    photo = encoded(picture(400, 200), "JPEG", exif=turned)
    upright = thumbnail(photo, 200)
    assert upright is not None and (upright.width, upright.height) == (100, 200)


def test_invariant_07_the_same_bytes_give_the_same_thumbnail() -> None:
    assert thumbnail(png(), 300) == thumbnail(png(), 300)


def test_invariant_10_a_picture_over_the_limit_is_measured_and_never_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    bomb = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert image_size(bomb) == (side, side)
    assert thumbnail(bomb, 100) is None


@given(st.binary(max_size=200), st.integers(0, 400))
def test_broken_data_is_none(noise: bytes, cut: int) -> None:
    assert image_size(noise) is None
    assert thumbnail(noise, 64) is None
    part = png(64, 48)[:cut] + noise
    assert image_size(part) in (None, (64, 48))
    assert thumbnail(part, 64) is None or cut >= 33


def test_a_format_that_starts_a_program_is_not_read() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF"
    assert image_size(eps) is None
