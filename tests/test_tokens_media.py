"""What images, sounds, films and files cost: real sizes, the published arithmetic, bounded work."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from proxy.tokens import get_counter
from tests.bench.token_error import PATCHES, SIZES, TILES, Published, png_part, wav_part
from tests.examples import examples

Message = dict[str, Any]

COUNTER = get_counter("gpt-4o")
many = examples(30)


# -- images


@pytest.mark.parametrize("model", sorted({*TILES, *PATCHES}))
def test_images_cost_what_the_vision_guide_says(model: str) -> None:
    counter, published = get_counter(model), Published(model)
    for width, height in SIZES:
        for detail in (None, "auto", "high", *(("low",) if model in TILES else ())):
            part = png_part(width, height, detail)
            assert counter.part(part) == published.part(part), (width, height, detail)


@pytest.mark.parametrize(
    ("model", "size", "detail", "tokens"),
    [
        ("gpt-4o", (1024, 1024), "high", 765),  # the guide's own examples
        ("gpt-4o", (2048, 4096), "high", 1105),
        ("gpt-4o", (4096, 8192), "low", 85),
        ("gpt-4.1-mini", (1024, 1024), "auto", 1659),
        ("gpt-4.1-mini", (1800, 2400), "auto", 2353),  # 1452 patches
        ("gpt-4o", (2049, 513), "auto", 1445),  # as billed: 1453 and 773 with their words
        ("gpt-4o", (2050, 513), "auto", 765),
        ("gpt-5.2", (4000, 3000), "auto", 1743),
        ("gpt-5.2", (4000, 3000), "original", 11_868),
        ("claude-sonnet-4-5", (1000, 1000), None, 1296),
        ("anthropic/claude-opus-4.7", (1000, 1000), None, 1296),
        ("anthropic.claude-3-haiku", (3000, 3000), None, 1521),
        ("claude-opus-4-7", (8000, 8000), None, 4761),
        ("gemini-2.5-flash", (384, 384), None, 258),
        ("google/gemini-2.5-pro", (1000, 700), None, 516),
        ("nobody/knows-it", (1024, 1024), None, 765),
        ("ft:gpt-4o-mini-2024-07-18:org::id", (100, 100), None, 8500),
    ],
)  # fmt: skip
def test_an_image_of_a_family(model: str, size: tuple[int, int], detail: str | None, tokens: int) -> None:
    assert get_counter(model).images.tokens(size, detail) == tokens


@many
@given(
    st.integers(1, 60_000), st.integers(1, 60_000), st.sampled_from([None, "low", "original"]),
    st.sampled_from(["gpt-4o", "gpt-4o-mini", "gpt-5-mini", "gpt-5.4", "claude-x", "claude-opus-4-8", "gemini-x"]),
)  # fmt: skip
def test_no_image_passes_its_rules_bound(width: int, height: int, detail: str | None, model: str) -> None:
    rule = get_counter(model).images
    assert 1 <= rule.tokens((width, height), detail) <= rule.max_tokens
    assert rule.tokens(None, detail) >= rule.tokens((width, height), detail)


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        ({"type": "image_url", "image_url": {"url": "https://a/b.png"}}, 1445),
        ({"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "low"}}, 85),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,bm9pbWFnZQ=="}}, 1445),
        ({"type": "image_url", "image_url": None}, 1445),
        ({"type": "image_url", "image_url": {"url": "x" * 9999}}, 1445),
    ],
)  # fmt: skip
def test_an_image_of_unknown_size_costs_the_bound(part: Message, tokens: int) -> None:
    assert COUNTER.part(part) == tokens


# -- sound, film, files


@pytest.mark.parametrize("seconds", [0.4, 3.0, 30.0, 300.0])
def test_sound_costs_ten_tokens_a_second(seconds: float) -> None:
    tokens = COUNTER.part(wav_part(seconds))
    assert seconds * 10 <= tokens <= seconds * 10 * 1.005 + 1
    samples = base64.b64encode(bytes(round(48_000 * seconds))).decode()
    raw = COUNTER.part({"type": "input_audio", "input_audio": {"data": samples, "format": "pcm16"}})
    assert seconds * 10 - 1 <= raw <= seconds * 10 * 1.005 + 1


def test_an_answers_sound_counts_by_its_words_or_its_length() -> None:
    bare = {"role": "assistant", "content": None}
    words = "Welcome! I am your assistant, here to help you with whatever you need."
    by_words = COUNTER.message({**bare, "audio": {"id": "a", "transcript": words}})
    assert by_words == 4 + COUNTER.text(words) + 2 * len(words)
    data = wav_part(5.0)["input_audio"]["data"]
    assert COUNTER.message({**bare, "audio": {"id": "a", "data": data}}) == 4 + 100
    assert COUNTER.message({**bare, "audio": {"id": "a"}}) == 4 + 400


def _file(data: bytes, mime: str, name: str) -> Message:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return {"type": "file", "file": {"filename": name, "file_data": url}}


def test_a_text_file_costs_its_words_and_a_pdf_its_pages() -> None:
    words = "The quick brown fox jumps over the lazy dog. " * 20
    assert COUNTER.part(_file(words.encode(), "text/plain", "a.txt")) == COUNTER.text(words)
    large = COUNTER.part(_file((words * 400).encode(), "text/plain", "a.txt"))
    assert large == pytest.approx(COUNTER.text(words * 400), rel=0.02)
    page = b"<< /Type /Page /Parent 2 0 R >>\n"
    pdf = b"%PDF-1.4\n<< /Type /Pages /Count 3 >>\n" + page * 3 + bytes(1000)
    assert COUNTER.part(_file(pdf, "application/pdf", "a.pdf")) == 3 * (500 + 765)
    assert COUNTER.part({"type": "file", "file": {"file_id": "file-1"}}) == 512


def test_a_film_costs_a_small_picture_each_second() -> None:
    link = {"type": "video_url", "video_url": {"url": "https://a/b.mp4"}}
    assert COUNTER.part(link) == 60 * 85
    assert get_counter("gemini-2.5-pro").part(link) == 60 * 258


def test_a_large_medium_is_counted_from_its_head_in_milliseconds() -> None:
    noise = os.urandom(3_900_000)
    out = io.BytesIO()
    Image.effect_noise((2000, 1500), 90).save(out, "JPEG", quality=98, icc_profile=noise[:90_000])
    parts = {
        "jpeg": {"type": "image_url", "image_url": {"url": _url(out.getvalue() + noise, "image/jpeg")}},
        "noise": {"type": "image_url", "image_url": {"url": _url(noise, "image/png")}},
        "wav": wav_part(120.0),
        "text": _file(b"plain words " * 330_000, "text/plain", "a.txt"),
        "pdf": _file(b"%PDF-1.4" + noise, "application/pdf", "a.pdf"),
    }
    assert COUNTER.part(parts["jpeg"]) == 765
    for name, part in parts.items():
        assert len(json.dumps(part)) > 3_500_000
        best = min(_seconds(part) for _ in range(5))
        assert best < 0.01, name  # measured 0.2 to 0.8 ms; decoding it all would take longer


def _url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _seconds(part: Message) -> float:
    start = time.perf_counter()
    COUNTER.part(part)
    return time.perf_counter() - start
