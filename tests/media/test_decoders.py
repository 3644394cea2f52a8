import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from proxy.media.decoders import (
    MAX_CHARS,
    MAX_PDF_PAGES,
    MAX_PIXELS,
    MAX_SAMPLES,
    audio_seconds,
    container_format,
    file_text,
    image_info,
    keyframes,
    thumbnail,
    video_info,
)
from tests.media.samples import encoded, jpeg, mp4, pdf, picture, png, wav

# ---------------------------------------------------------------- images


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_the_size_and_the_thumbnail_of_each_format(format: str) -> None:
    if not features.check("avif") and format == "AVIF":
        pytest.skip("this Pillow was built without AVIF")
    data = encoded(picture(640, 480), format)
    assert image_info(data) == (640, 480, format)
    small = thumbnail(data, 256)
    assert small is not None
    assert (small.width, small.height) == (256, 192)
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
    assert image_info(bomb) == (side, side, "PNG")
    assert thumbnail(bomb, 100) is None


@given(st.binary(max_size=200), st.integers(0, 400))
def test_broken_data_is_none(noise: bytes, cut: int) -> None:
    assert image_info(noise) is None
    assert thumbnail(noise, 64) is None
    part = png(64, 48)[:cut] + noise
    assert image_info(part) in (None, (64, 48, "PNG"))
    assert thumbnail(part, 64) is None or cut >= 33


def test_a_format_that_starts_a_program_is_not_read() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF"
    assert image_info(eps) is None


# ---------------------------------------------------------------- sound and film


def test_the_duration_of_a_wav() -> None:
    assert audio_seconds(wav(2.5), "wav") == 2.5
    assert audio_seconds(wav(2.5), None) == 2.5


def test_a_streamed_wav_has_as_much_sound_as_bytes() -> None:
    data = bytearray(wav(3.0))
    at = data.index(b"data") + 4
    for stated in (0xFFFFFFFF, 0):
        data[at : at + 4] = struct.pack("<I", stated)
        assert audio_seconds(bytes(data), "wav") == 3.0
    assert audio_seconds(wav(3.0)[: 44 + 16_000], "wav") == 1.0


@pytest.mark.parametrize(
    ("format", "bytes_a_second"), [("pcm16", 48_000), ("g711_ulaw", 8_000), ("g711_alaw", 8_000)]
)
def test_raw_samples_are_as_long_as_their_bytes(format: str, bytes_a_second: int) -> None:
    assert audio_seconds(b"\x01" * (bytes_a_second * 2), format) == 2.0


@pytest.mark.parametrize(
    ("codec", "container"),
    [("mpeg4", "mp4"), ("libx264", "mp4"), ("libx264", "matroska"), ("mpeg4", "avi")],
)
def test_a_film_is_told_by_its_first_bytes(codec: str, container: str) -> None:
    film = mp4(2, 1.0, codec=codec, format=container)
    assert container_format(film) == container
    info = video_info(film)
    assert info is not None
    assert (info.width, info.height) == (320, 240)
    assert info.seconds == pytest.approx(2.0, abs=0.2)
    assert audio_seconds(film, None) == pytest.approx(2.0, abs=0.2)


def test_keyframes_show_every_scene() -> None:
    film = mp4(scenes=4, seconds_per_scene=1.0)
    frames = keyframes(film, 4, 160)
    assert [frame.second for frame in frames] == pytest.approx([0.0, 1.0, 2.0, 3.0], abs=0.2)
    colours = []
    for frame in frames:
        assert (frame.jpeg.width, frame.jpeg.height) == (160, 120)
        with Image.open(io.BytesIO(frame.jpeg.data)) as image:
            colours.append(image.getpixel((150, 110)))
    navy, orange, white, green = colours
    assert navy[2] > 90 > navy[0] and orange[0] > 220 > 200 > orange[1]
    assert min(white) > 230 and green[1] > 70 > green[0]


def test_without_a_change_of_scene_keyframes_are_spread_evenly() -> None:
    frames = keyframes(mp4(scenes=1, seconds_per_scene=3.0), 3, 64)
    assert [frame.second for frame in frames] == pytest.approx([0.0, 0.8, 1.6], abs=0.4)


def test_a_long_film_is_looked_at_from_end_to_end() -> None:
    film = mp4(scenes=6, seconds_per_scene=12.0, width=64, height=48)
    frames = keyframes(film, 32, 64)
    assert len(frames) <= MAX_SAMPLES
    assert frames[0].second == 0.0 and frames[-1].second > 60


def test_invariant_07_the_same_film_gives_the_same_frames() -> None:
    assert keyframes(mp4(), 4, 100) == keyframes(mp4(), 4, 100)


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1/</BaseURL></MPD>",
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"\x00\x00\x00\x18ftypmp42" + b"\xff" * 200,
        b"",
    ],
)
def test_playlists_and_broken_containers_are_nothing(data: bytes) -> None:
    assert audio_seconds(data, "mp4") is None
    assert video_info(data) is None
    assert keyframes(data, 4, 100) == []


def test_a_picture_is_no_film() -> None:
    assert video_info(png(32, 32)) is None
    assert video_info(wav(0.1)) is None


@settings(max_examples=40)
@given(st.integers(0, 5000), st.binary(min_size=1, max_size=40))
def test_damaged_films_never_raise(at: int, noise: bytes) -> None:
    film = mp4(2, 0.5, width=64, height=48)
    at %= len(film)
    damaged = film[:at] + noise + film[at + len(noise) :]
    for data in (damaged, film[:at]):
        assert len(keyframes(data, 2, 32)) <= 2
        info = video_info(data)
        assert info is None or info.width > 0


# ---------------------------------------------------------------- files


def test_the_words_of_a_pdf_in_the_order_of_its_pages() -> None:
    data = pdf(["Invoice 42\nTotal 1,299.00", "Signed by Maria Keller"])
    assert file_text(data, "application/pdf", "a.pdf") == (
        "Invoice 42\nTotal 1,299.00\n\nSigned by Maria Keller"
    )
    assert file_text(data, "", None) is not None  # the bytes decide


def test_invariant_10_a_long_pdf_is_read_to_its_limit() -> None:
    words = file_text(pdf([f"page-{n}." for n in range(MAX_PDF_PAGES + 20)]), "", None)
    assert words is not None
    assert f"page-{MAX_PDF_PAGES - 1}." in words and f"page-{MAX_PDF_PAGES}." not in words


@pytest.mark.parametrize(
    ("mime", "name"),
    [
        ("text/plain", None),
        ("text/x-python; charset=utf-8", None),
        ("application/json", None),
        ("application/ld+json", None),
        ("application/octet-stream", "main.rs"),
        ("", "NOTES.MD"),
    ],
)
def test_text_by_its_type_or_its_name(mime: str, name: str | None) -> None:
    assert file_text("größe: 3".encode(), mime, name) == "größe: 3"


def test_other_kinds_have_no_words() -> None:
    assert file_text(png(8, 8), "image/png", "a.png") is None
    assert file_text(b"\x00\x01\x02", "text/plain", "a.txt") is None
    assert file_text(b"  \n", "text/plain", None) is None
    assert file_text(b"PK\x03\x04", "application/zip", "a.zip") is None


def test_utf_16_and_a_text_over_the_limit() -> None:
    assert file_text("naïve".encode("utf-16"), "text/plain", None) == "naïve"
    assert len(file_text(b"x" * (MAX_CHARS + 10), "text/plain", None) or "") == MAX_CHARS


@given(st.binary(max_size=300), st.integers(0, 900))
def test_broken_files_never_raise(noise: bytes, at: int) -> None:
    whole = pdf(["Some words"])
    words = file_text(whole[:at] + noise + whole[at + len(noise) :], "application/pdf", None)
    assert words is None or words.strip()
