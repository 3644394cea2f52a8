"""Sizes, durations and words, told without a codec: as the codecs tell them, and in bounded time."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import features

from proxy.media.headers import (
    MAX_CHARS,
    audio_seconds,
    container_format,
    file_text,
    image_info,
    video_info,
)
from tests.cpu import cpu_within
from tests.examples import examples
from tests.media.samples import encoded, mp4, pdf, picture, png, sound, wav

# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "icc_profile": b"x" * 90_000}), ("GIF", {}),
        ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif"}), ("BMP", {}), ("TIFF", {}),
        ("AVIF", {}),
    ],
)  # fmt: skip
def test_the_size_of_each_format(format: str, options: dict[str, object]) -> None:
    if not features.check("avif") and format == "AVIF":
        pytest.skip("this Pillow was built without AVIF")
    for width, height in ((640, 480), (37, 401)):
        assert image_info(encoded(picture(width, height), format, **options)) == (width, height, format)


@given(st.binary(max_size=200), st.integers(24, 400))
def test_broken_images_are_none_or_their_head(noise: bytes, cut: int) -> None:
    for magic in (b"", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"RIFF\0\0\0\0WEBPVP8 ", b"\0\0\0\x18ftypavif", b"BM"):
        info = image_info(magic + noise)
        assert info is None or min(info[:2]) > 0
    assert image_info(png(64, 48)[:cut] + noise) == (64, 48, "PNG")


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
    ("format", "codec", "rate"),
    [
        ("mp3", "libmp3lame", 48_000), ("mp3", "libmp3lame", 22_050), ("mp3", "libmp3lame", 11_025),
        ("ogg", "libopus", 48_000), ("flac", "flac", 44_100), ("mp4", "aac", 44_100), ("webm", "libopus", 48_000),
    ],
)  # fmt: skip
def test_the_duration_of_compressed_sound(format: str, codec: str, rate: int) -> None:
    data = sound(format, codec, rate, 3.0)
    assert audio_seconds(data, None) == pytest.approx(3.0, abs=0.15)
    if format == "webm":  # as a recorder writes it: no duration is stated
        live = data.replace(b"\x44\x89\x88", b"\x44\x8a\x88", 1)
        assert live != data and audio_seconds(live, None) == pytest.approx(3.0, abs=0.15)


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


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"\x00\x00\x00\x18ftypmp42" + b"\xff" * 200,
        png(32, 32),
        b"",
    ],
)
def test_playlists_pictures_and_broken_containers_are_nothing(data: bytes) -> None:
    assert audio_seconds(data, "mp4") is None
    assert video_info(data) is None


def test_a_sound_is_no_film() -> None:
    assert video_info(wav(0.1)) is None


@examples(20)
@given(
    st.sampled_from([mp4(2, 0.5, width=64, height=48, codec=c, format=f) for c, f in
                     (("mpeg4", "mp4"), ("libx264", "matroska"), ("mpeg4", "avi"))]),
    st.integers(0, 5000), st.binary(min_size=1, max_size=40),
)  # fmt: skip
def test_damaged_films_never_raise(film: bytes, at: int, noise: bytes) -> None:
    at %= len(film)
    for data in (film[:at] + noise + film[at + len(noise) :], film[:at]):
        info = video_info(data)
        assert info is None or info.width > 0
        assert (audio_seconds(data, None) or 1.0) > 0


_MEGABYTE = 1 << 20
_HOSTILE: dict[str, bytes] = {  # what is looked at again and again, or claims more than there is
    "jpeg of fill bytes": b"\xff\xd8" + b"\xff" * _MEGABYTE,
    "jpeg of empty segments": b"\xff\xd8" + b"\xff\xe0\x00\x02" * (_MEGABYTE // 4),
    "avif of boxes": b"\0\0\0\x18ftypavif" + (b"ispe" + bytes(12)) * (_MEGABYTE // 16),
    "tiff of entries": b"II*\0\x08\0\0\0\xff\xff" + bytes(_MEGABYTE),
    "gif": b"GIF89a\xff\xff\xff\xff" + b"!\xfe\x01a" * (_MEGABYTE // 4),
    "webp": b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(8) + b"\xff" * 6 + bytes(_MEGABYTE),
    "mp4 of empty boxes": b"\0\0\0\x08ftyp" + b"\0\0\0\x08moov" * (_MEGABYTE // 8),
    "mp4 that claims exabytes": b"\0\0\0\x01ftyp" + b"\xff" * 8 + bytes(_MEGABYTE),
    "matroska of empty elements": b"\x1aE\xdf\xa3\x80" + b"\xa3\x80" * (_MEGABYTE // 2),
    "matroska in itself": b"\x1aE\xdf\xa3\x80" + b"\x18\x53\x80\x67\xff" * (_MEGABYTE // 5),
    "wav of chunks": b"RIFF\xff\xff\xff\xffWAVE" + b"junk\0\0\0\0" * (_MEGABYTE // 8),
    "wav of gigabytes": wav(0.1)[:40] + b"\xff\xff\xff\xff" + bytes(8000),
    "mp3 without a frame": b"ID3\4\0\0\0\0\0\0" + b"\xff" * _MEGABYTE,
    "mp3 of billions of frames": b"\xff\xfb\x90\x00" + bytes(32) + b"Xing\0\0\0\1\xff\xff\xff\xff" + bytes(100),
    "ogg": b"OggS" + bytes(24) + b"OpusHead" + b"OggS" * (_MEGABYTE // 4),
    "flac": b"fLaC\0\0\0\x22" + b"\xff" * 64,
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_invariant_10_no_header_costs_more_than_some_milliseconds(name: str) -> None:
    data = _HOSTILE[name]
    measures: tuple[Callable[[], object], ...] = (
        lambda: image_info(data), lambda: video_info(data), lambda: audio_seconds(data, None),
    )  # fmt: skip
    for measure in measures:
        with cpu_within(0.06):
            told = [measure() for _ in range(3)]
        assert told[0] == told[1] == told[2]


# ---------------------------------------------------------------- files


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
    assert file_text(pdf(["Words"]), "application/pdf", "a.pdf") is None  # a decoder's


def test_utf_16_and_a_text_over_the_limit() -> None:
    assert file_text("naïve".encode("utf-16"), "text/plain", None) == "naïve"
    assert len(file_text(b"x" * (MAX_CHARS + 10), "text/plain", None) or "") == MAX_CHARS
