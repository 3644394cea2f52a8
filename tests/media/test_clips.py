import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from proxy.media.clips import (
    MAX_SAMPLES,
    audio_seconds,
    container_format,
    keyframes,
    video_info,
)
from tests.media.samples import mp4, png, wav


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
        assert (frame.width, frame.height) == (160, 120)
        with Image.open(io.BytesIO(frame.data)) as image:
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


def test_a_count_or_a_side_that_makes_no_sense() -> None:
    assert keyframes(mp4(), 0, 100) == []
    assert len(keyframes(mp4(), 1, -5)) == 1


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
