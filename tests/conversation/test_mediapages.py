"""Media in messages as pages of their own: numbered, untouched, and nothing raises on odd parts."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.mediapages import media_pages
from proxy.memory import Modality
from proxy.memory.ids import parse_page_id
from proxy.memory.models import MEDIA_PART
from proxy.tokens import get_counter
from tests.conversation.test_pathpages import pages_of
from tests.examples import examples
from tests.media import samples

COUNTER = get_counter("gpt-4o")
PICTURE = samples.image_part(samples.png(320, 240))
LINK = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
SOUND = samples.audio_part(samples.wav(3))
FILM = samples.video_part(samples.mp4(1, 1.0))
REPORT = samples.file_part(samples.pdf(["Signed by Maria Keller."]), "application/pdf", "report.pdf")
TEXT = {"type": "text", "text": "Look."}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_each_medium_is_a_page_numbered_over_all_kinds() -> None:
    found = media_pages(41, user(TEXT, PICTURE, SOUND, TEXT, FILM, REPORT, LINK), COUNTER)
    ids = [page.page_id for page in found]
    assert ids == ["img_0042_1", "aud_0042_2", "vid_0042_3", "file_0042_4", "img_0042_5"]
    assert [page.index for page in found] == [1, 2, 4, 5, 6]
    assert [page.content for page in found] == [PICTURE, SOUND, FILM, REPORT, LINK]
    assert [page.modality for page in found] == [
        Modality.IMAGE, Modality.AUDIO, Modality.VIDEO, Modality.TEXT, Modality.IMAGE,
    ]  # fmt: skip
    assert [parse_page_id(page.page_id) for page in found] == [(41, page.part) for page in found]
    assert found[0].part == MEDIA_PART + 1
    assert [page.tokens for page in found] == [COUNTER.part(page.content) for page in found]
    assert found[3].name == "report.pdf"


def test_an_answers_own_sound_is_a_page_with_its_transcript() -> None:
    data = SOUND["input_audio"]["data"]
    spoken = {"role": "assistant", "content": None, "audio": {"id": "a", "data": data, "transcript": "Yes."}}
    (page,) = media_pages(1, spoken, COUNTER)
    assert (page.page_id, page.index, page.modality) == ("aud_0002_1", -1, Modality.AUDIO)
    assert page.transcript == "Yes."
    assert page.content == {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    pages = pages_of([user(TEXT), spoken])
    assert pages.page("aud_0002_1").metadata["transcript"] == "Yes."
    assert pages.at("aud_0002_1", 1).content == "Yes."
    assert "Yes." in pages.text("msg_0002")


def test_a_sound_of_which_only_the_id_is_known_is_no_page() -> None:
    for audio in ({"id": "a"}, {"id": "a", "data": 7}, "a", None, 3, []):
        assert media_pages(1, {"role": "assistant", "content": None, "audio": audio}, COUNTER) == ()


def test_a_message_of_words_has_no_media() -> None:
    for content in ("text", None, [], [TEXT], [{"type": "refusal", "refusal": "no"}], 7, {"type": "image_url"}):
        assert media_pages(0, {"role": "user", "content": content}, COUNTER) == ()


def test_invariant_04_a_medium_at_level_0_is_the_clients_own_part() -> None:
    odd = {"type": "image_url", "image_url": {"url": LINK["image_url"]["url"], "x-new": [1]}, "cache": {}}  # type: ignore[index]
    pages = pages_of([user(TEXT, odd)])
    assert pages.page("img_0001_1").content == odd
    assert pages.at("img_0001_1", 0).content == odd


KINDS = ("image_url", "image", "input_image", "input_audio", "audio", "file", "input_file", "video_url", "video", "text", "x", 3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    | st.sampled_from(["data:image/png;base64,AA==", "data:,", "https://e.com/x", "AA==", "wav"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["url", "data", "format", "file_data", "file_id", "filename", "text", "a"]), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def odd_parts(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(KINDS))
    if draw(st.booleans()):
        return draw(JSON)
    return {"type": kind, str(kind): draw(JSON), **({"source": draw(JSON)} if draw(st.booleans()) else {})}


@examples(60)
@given(st.lists(odd_parts(), max_size=5), JSON)
def test_odd_parts_are_numbered_without_a_gap_or_left_alone(parts: list[Any], audio: Any) -> None:
    message = {"role": "user", "content": parts, "audio": audio}
    found = media_pages(3, message, COUNTER)
    assert [page.part for page in found] == [MEDIA_PART + n for n in range(1, len(found) + 1)]
    for page in found:
        assert page.index == -1 or page.content is parts[page.index]
        assert page.tokens >= 1
    pages = pages_of([json.loads(json.dumps({**message, "role": "user"}))])
    for wanted in pages.ids(0):
        for level in range(4):
            assert pages.at(wanted, level).compression_level == level
