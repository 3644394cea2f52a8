"""Smaller pictures, keyframes and words of media that the tests make; hostile ones: tests/api/test_decoding.py."""

import base64
import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from proxy.media.decoders import (
    MAX_PDF_PAGES,
    MAX_SAMPLES,
    SIDES_PX,
    OutOfTime,
    decode,
    keyframes,
    pdf_text,
    thumbnails,
)
from tests.examples import examples
from tests.media.samples import encoded, jpeg, mp4, pdf, picture, png, wav


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_thumbnails_of_each_format(format: str) -> None:
    if not features.check("avif") and format == "AVIF":
        pytest.skip("this Pillow was built without AVIF")
    (small,) = thumbnails(encoded(picture(640, 480), format), (256,))
    assert (opened(small).format, opened(small).size) == ("JPEG", (256, 192))


def test_thumbnails_are_smaller_and_never_enlarged() -> None:
    made = thumbnails(jpeg(), SIDES_PX)
    assert [max(opened(image).size) for image in made] == list(SIDES_PX)
    assert all(len(small) < len(large) for large, small in pairwise(made)) and len(made[0]) < len(jpeg()) / 2
    (kept,) = thumbnails(png(40, 30), SIDES_PX)
    assert opened(kept).size == (40, 30)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("side", [20, 3000])
def test_thumbnails_of_each_mode_are_white_where_nothing_is(mode: str, side: int) -> None:
    clear = Image.new("RGBA", (side, 20), (255, 255, 255, 0)) if mode in ("LA", "P", "RGBA") else Image.new(mode, (side, 20))
    clear = clear.convert(mode)
    (small,) = thumbnails(encoded(clear, "TIFF" if mode in ("CMYK", "F") else "PNG"), (20,))
    tones = opened(small).convert("L").tobytes()
    assert min(tones) > 250 if mode in ("LA", "P", "RGBA", "CMYK") else max(tones) < 5


def test_a_photo_stands_upright() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # held sideways
    (upright,) = thumbnails(encoded(picture(400, 200), "JPEG", exif=turned), (200,))
    assert opened(upright).size == (100, 200)


def test_invariant_07_the_same_bytes_give_the_same_thumbnail() -> None:
    assert thumbnails(png(), (300,)) == thumbnails(png(), (300,))


def test_invariant_10_a_picture_over_the_limit_is_never_decoded_but_as_a_small_jpeg() -> None:
    assert thumbnails(png(1000, 800), (100,), max_pixels=799_999) == []
    assert len(thumbnails(jpeg(1600, 1200), (100,), max_pixels=799_999)) == 1


@given(st.binary(max_size=200), st.integers(0, 400))
def test_broken_data_is_nothing(noise: bytes, cut: int) -> None:
    assert decode("image", noise) == {}
    assert decode("image", png(64, 48)[:cut] + noise) == {} or cut >= 33


def test_a_format_that_starts_a_program_is_not_read() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF"
    assert thumbnails(eps, (100,)) == []


# ---------------------------------------------------------------- film


def test_keyframes_show_every_scene() -> None:
    frames = keyframes(mp4(scenes=4, seconds_per_scene=1.0), 4, (160, 80))
    assert [frame.second for frame in frames] == pytest.approx([0.0, 1.0, 2.0, 3.0], abs=0.2)
    colours = []
    for frame in frames:
        assert [opened(image).size for image in frame.images] == [(160, 120), (80, 60)]
        colours.append(opened(frame.images[0]).getpixel((150, 110)))
    navy, orange, white, green = colours
    assert navy[2] > 90 > navy[0] and orange[0] > 220 > 200 > orange[1]
    assert min(white) > 230 and green[1] > 70 > green[0]


def test_without_a_change_of_scene_keyframes_are_spread_evenly() -> None:
    frames = keyframes(mp4(scenes=1, seconds_per_scene=3.0), 3, (64,))
    assert [frame.second for frame in frames] == pytest.approx([0.0, 0.8, 1.6], abs=0.4)


def test_a_long_film_is_looked_at_from_end_to_end() -> None:
    frames = keyframes(mp4(scenes=6, seconds_per_scene=12.0, width=64, height=48), 32, (64,))
    assert len(frames) <= MAX_SAMPLES
    assert frames[0].second == 0.0 and frames[-1].second > 60


def test_invariant_07_the_same_film_gives_the_same_frames() -> None:
    assert decode("video", mp4()) == decode("video", mp4())


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1/</BaseURL></MPD>",
        b"\x00\x00\x00\x18ftypmp42" + b"\xff" * 200,
        b"",
        png(32, 32),
        wav(0.1),
    ],
)
def test_playlists_broken_containers_and_sounds_have_no_frames(data: bytes) -> None:
    assert decode("video", data) == {}


@examples(15)
@given(st.integers(0, 5000), st.binary(min_size=1, max_size=40))
def test_damaged_films_never_raise(at: int, noise: bytes) -> None:
    film = mp4(2, 0.5, width=64, height=48)
    at %= len(film)
    for data in (film[:at] + noise + film[at + len(noise) :], film[:at]):
        assert len(keyframes(data, 2, (32,))) <= 2


# ---------------------------------------------------------------- PDF


def test_the_words_of_a_pdf_in_the_order_of_its_pages() -> None:
    data = pdf(["Invoice 42\nTotal 1,299.00", "Signed by Maria Keller"])
    assert pdf_text(data) == "Invoice 42\nTotal 1,299.00\n\nSigned by Maria Keller"


def test_invariant_10_a_long_pdf_is_read_to_its_limit() -> None:
    words = pdf_text(pdf([f"page-{n}." for n in range(MAX_PDF_PAGES + 20)]))
    assert words is not None
    assert f"page-{MAX_PDF_PAGES - 1}." in words and f"page-{MAX_PDF_PAGES}." not in words


@given(st.binary(max_size=300), st.integers(0, 900))
def test_broken_files_never_raise(noise: bytes, at: int) -> None:
    whole = pdf(["Some words"])
    words = pdf_text(whole[:at] + noise + whole[at + len(noise) :])
    assert words is None or words.strip()


def test_what_was_decoded_in_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from pypdf import PageObject

    read = PageObject.extract_text

    def second_is_slow(page: PageObject) -> str:
        words = read(page)
        if "second" in words:
            raise OutOfTime
        return words

    monkeypatch.setattr(PageObject, "extract_text", second_is_slow)
    assert decode("pdf", pdf(["The first.", "The second."])) == {"text": "The first."}
    assert base64.b64decode(decode("image", png(8, 8))["images"][0])[:2] == b"\xff\xd8"
