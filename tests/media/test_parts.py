import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.media.parts import Medium, read_part

DATA = b"\x89PNG some bytes?>"
B64 = base64.b64encode(DATA).decode()
URL = f"data:image/png;base64,{B64}"


@pytest.mark.parametrize(
    ("part", "kind", "mime"),
    [
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, "image", "image/png"),
        ({"type": "image_url", "image_url": URL}, "image", "image/png"),
        ({"image_url": {"url": URL}}, "image", "image/png"),
        ({"type": "input_image", "image_url": URL}, "image", "image/png"),
        (
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/jpeg", "data": B64},
            },
            "image",
            "image/jpeg",
        ),
        (
            {"type": "input_audio", "input_audio": {"data": B64, "format": "mp3"}},
            "audio",
            "audio/mpeg",
        ),
        ({"type": "audio_url", "audio_url": {"url": URL}}, "audio", "image/png"),
        (
            {"type": "file", "file": {"file_data": B64, "filename": "a.pdf"}},
            "file",
            "application/pdf",
        ),
        ({"type": "file", "file": {"file_data": URL, "filename": "a.pdf"}}, "file", "image/png"),
        ({"type": "input_file", "file_data": B64, "filename": "a.csv"}, "file", "text/csv"),
        (
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": B64},
            },
            "file",
            "application/pdf",
        ),
        ({"type": "video_url", "video_url": {"url": URL}}, "video", "image/png"),
        (
            {"type": "input_video", "input_video": {"data": B64, "format": "mp4"}},
            "video",
            "video/mp4",
        ),
        ({"id": "audio_1", "data": B64, "transcript": "hello"}, "audio", ""),
    ],
)
def test_every_shape_gives_its_bytes(part: dict[str, Any], kind: str, mime: str) -> None:
    medium = read_part(part)
    assert medium is not None
    assert (medium.kind, medium.mime, medium.data, medium.url) == (kind, mime, DATA, None)


def test_what_else_a_part_says() -> None:
    image = read_part({"type": "image_url", "image_url": {"url": URL, "detail": "high"}})
    assert image is not None and image.detail == "high"
    file = read_part({"type": "file", "file": {"file_id": "file-7"}})
    assert file is not None and (file.name, file.data) == ("file-7", None)
    sound = read_part({"type": "input_audio", "input_audio": {"data": B64, "format": "wav"}})
    assert sound is not None and sound.format == "wav"
    typed = read_part({"type": "audio_url", "audio_url": {"url": f"data:audio/mpeg;base64,{B64}"}})
    assert typed is not None and typed.format == "mp3"
    answer = read_part({"id": "audio_1", "transcript": "hello"})
    assert answer is not None and answer.transcript == "hello"


@pytest.mark.parametrize("link", ["https://x.test/a.png?k=1", "gs://b/a.png", "/media/a.png"])
def test_a_link_is_a_link(link: str) -> None:
    medium = read_part({"type": "image_url", "image_url": {"url": link}})
    assert medium is not None
    assert (medium.url, medium.data, medium.mime) == (link, None, "image/png")


@pytest.mark.parametrize(
    "spelling",
    [
        B64.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        f"{B64[:10]}\n{B64[10:]}",
    ],
)
def test_rarer_spellings_of_base64(spelling: str) -> None:
    medium = read_part({"type": "input_audio", "input_audio": {"data": spelling}})
    assert medium is not None and medium.data == DATA


def test_a_data_url_without_base64() -> None:
    medium = read_part({"type": "image_url", "image_url": "data:image/svg+xml,%3Csvg%2F%3E"})
    assert medium is not None and (medium.mime, medium.data) == ("image/svg+xml", b"<svg/>")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "hi"},
        {"type": "refusal", "refusal": "no"},
        {"type": "tool_result"},
        {"type": 3, "image_url": None},
        {"text": "x", "transcript": "y"},
        {},
    ],
)
def test_anything_else_is_no_medium(part: dict[str, Any]) -> None:
    assert read_part(part) is None


def test_bad_base64_has_no_data() -> None:
    medium = read_part({"type": "input_audio", "input_audio": {"data": "!!! no !!!"}})
    assert medium is not None and medium.data is None


KEYS = st.sampled_from(
    "type image_url input_audio video_url file audio source url data file_data format detail "
    "filename file_id media_type transcript image video".split()
)
SCALARS = (
    st.none()
    | st.integers()
    | st.text(max_size=12)
    | st.sampled_from(["image_url", "image", "input_audio", "file", "video", "data:,", URL, B64])
)
ODD = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, ODD, max_size=6))
def test_odd_parts_never_raise(part: dict[str, Any]) -> None:
    medium = read_part(part)
    if medium is not None:
        assert medium.kind in ("image", "audio", "video", "file")
        assert medium.data is None or isinstance(medium.data, bytes)


def test_invariant_10_data_that_is_escaped_has_a_limit_of_its_own() -> None:
    def medium(count: int) -> Medium | None:
        return read_part({"type": "image_url", "image_url": {"url": "data:text/plain," + "%41" * count}})

    small, large = medium(300_000), medium(400_000)
    assert small and large and small.data == b"A" * 300_000 and large.data is None
