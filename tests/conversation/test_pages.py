"""A path as pages: whole, stable, and never a result without its call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.pages import Medium, Page, PathPages, group_start, groups_of
from proxy.conversation.records import new_records
from proxy.conversation.tree import Anchor, Identity, Node
from proxy.memory import Modality
from proxy.memory.ids import make_page_id, parse_page_id
from proxy.memory.message_text import message_text
from proxy.memory.models import MEDIA_PART
from proxy.tokens import TokenCounter, get_counter
from tests.bench.token_error import png_part
from tests.conversation.player import SECRET, call, calls
from tests.examples import examples
from tests.media import samples

COUNTER = get_counter("gpt-4o")


def pages_of(
    messages: list[dict[str, Any]], page_tokens: int = 64, counter: TokenCounter = COUNTER,
    anchors: Sequence[Anchor] = (),
) -> PathPages:
    raws = [(json.dumps(m).encode(), m) for m in messages]
    path = Identity(SECRET).extend(b"t", [], raws)
    return PathPages(path, counter, page_tokens, anchors=anchors)


@examples(20)
@given(st.lists(st.text(max_size=40).flatmap(lambda t: st.integers(0, 40).map(lambda n: t * n)),
                min_size=1, max_size=4), st.integers(8, 100))
def test_invariant_04_the_parts_of_a_message_are_the_message(texts: list[str], page_tokens: int) -> None:
    pages = pages_of([{"role": "user", "content": text} for text in texts], page_tokens)
    for position, text in enumerate(texts):
        ids = pages[position].ids
        assert "".join(pages[position].parts) == text
        assert [i for own in ids for i in pages.expand(own)] == list(ids)
        assert pages.expand(make_page_id(position)) == list(ids)
        assert "".join(pages.page(i).content for i in ids) == text
        assert sum(page.tokens for page in pages[position].pages) <= pages.tokens(position)
    docs = list(pages.docs(0, len(texts)))
    assert [d for d in docs if d.position == 0] == list(pages.docs(0, 1))
    assert "".join(d.text for d in docs) == "".join(texts)
    assert [make_page_id(d.position, d.part) for d in docs] == [i for p in range(len(texts)) for i in pages[p].ids]


def test_what_is_no_page_of_the_path_is_nowhere() -> None:
    pages = pages_of([{"role": "user", "content": "a"}])
    for wanted in ("msg_0002", "msg_0001.2", "msg_0000", "summary_seg_01", "", "x"):
        assert pages.expand(wanted) == []
    assert pages.expand("msg_0001.1") == pages.expand("msg_1") == ["msg_0001"]


def test_invariant_08_a_result_is_shown_with_its_call_and_a_call_with_its_results() -> None:
    pages = pages_of([
        calls(call("look", {"w": 1}, "a"), call("find", {"q": 2}, "b")),
        {"role": "tool", "tool_call_id": "a", "content": "seven"},
        {"role": "tool", "tool_call_id": "b", "content": "eight"},
        {"role": "tool", "tool_call_id": "zz", "content": "alone"},
    ])
    assert pages.text("msg_0001") == 'look({"w": 1})\nfind({"q": 2})\n-> seven\n-> eight\n-> alone'
    assert pages.text("msg_0003") == 'find({"q": 2}) -> eight'
    assert pages.text("msg_0004") == "alone"
    assert message_text(pages[2].message) == "eight"
    packed = pages.packer.pack([pages.at("msg_0002", 1)])
    assert packed.content.startswith("T (msg_0002, level 1): ")


@examples(30)
@given(st.lists(st.sampled_from(["user", "assistant", "tool", "function"]), max_size=12), st.data())
def test_invariant_08_groups_tile_the_path_and_never_begin_with_a_result(
    roles: list[str], data: st.DataObject
) -> None:
    path = [Node(b"", b"", role, b"{}") for role in ["user", *roles]]
    groups = groups_of(path, 0, len(path))
    assert [p for first, last in groups for p in range(first, last)] == list(range(len(path)))
    for first, last in groups:
        assert path[first].role not in ("tool", "function")
        assert all(node.role in ("tool", "function") for node in path[first + 1 : last])
        at = data.draw(st.integers(first, last - 1))
        assert group_start(path, at) == first


@pytest.mark.parametrize("model", ["gpt-4", "gpt-4o-mini", "claude-sonnet-4-5"])
def test_invariant_07_the_model_that_is_asked_changes_no_page(model: str) -> None:
    """A table and an index that were made for one model hold when the client asks another."""
    texts = ["日本語の文。naïve café 3.5 " * count for count in range(1, 24)]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": text}, png_part(600, 600)]} if i % 5 == 4
        else {"role": "user", "content": text}
        for i, text in enumerate(texts)
    ]
    usual, other = pages_of(messages), pages_of(messages, counter=get_counter(model))
    count = len(texts)
    assert any(usual.tokens(p) <= 64 < other.tokens(p) for p in range(count)) or model != "gpt-4"
    assert [other[p].ids for p in range(count)] == [usual[p].ids for p in range(count)]
    assert list(other.docs(0, count)) == list(usual.docs(0, count))


def test_invariant_09_what_is_indexed_of_a_message_does_not_depend_on_what_follows() -> None:
    """Branches share an index: the words of one's answer may not stand in it for the other."""
    photo = {"role": "user", "content": [{"type": "text", "text": "Look."}, png_part(300, 200)]}
    answers = [{"role": "assistant", "content": f"A {beast} on a wall."} for beast in ("cat", "dog")]
    alone = list(pages_of([photo]).docs(0, 1))
    for answer in answers:
        pages = pages_of([photo, answer])
        docs = list(pages.docs(0, 2))
        assert docs[: len(alone)] == alone
        assert list(pages.docs(1, 2)) == docs[len(alone) :]  # indexed at once or bit by bit
        found = {pages.id_of(doc.position, doc.part): doc.text for doc in docs}
        assert answer["content"] in found["img_0001_1"]  # and the image is found by its caption


def test_a_short_text_beside_a_medium_stays_whole_at_every_shorter_level() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    words = {"type": "text", "text": "Here is the bell of the harbour."}
    pages = pages_of([{"role": "user", "content": [words, sound]}], 1024)
    whole = pages.page("msg_0001").content
    assert whole.startswith(words["text"]) and "aud_0001_1" in whole
    assert pages.at("msg_0001", 1).content == whole


def test_a_spoken_answer_that_is_echoed_by_its_id_keeps_its_words() -> None:
    told = {"role": "assistant", "content": None,
            "audio": {"id": "audio_1", "data": "", "transcript": "The bell is from 1847."}}
    echo = {"role": "assistant", "audio": {"id": "audio_1"}}
    identity = Identity(SECRET)
    raws = [(json.dumps(m).encode(), m) for m in ({"role": "user", "content": "bell?"}, told)]
    (record,) = new_records(identity.extend(b"t", [], raws), None, {})
    path = identity.extend(b"t", [], [raws[0], (json.dumps(echo).encode(), echo)])
    assert path[-1].id == record.id  # the echo says the same
    pages = PathPages(path, COUNTER, 64, get_record={record.id: record}.get)
    assert "The bell is from 1847." in pages.text("msg_0002")
    assert pages[1].message == echo


# -- media: pages of their own, numbered, untouched; nothing raises on odd parts

PICTURE = samples.image_part(samples.png(320, 240))
LINK = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
SOUND = samples.audio_part(samples.wav(3))
FILM = samples.video_part(samples.mp4(1, 1.0))
REPORT = samples.file_part(samples.pdf(["Signed by Maria Keller."]), "application/pdf", "report.pdf")
TEXT = {"type": "text", "text": "Look."}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def media_of(message: dict[str, Any], position: int = 0) -> tuple[Page, ...]:
    before = [{"role": "user", "content": "x"}] * position
    return pages_of([*before, message])[position].media


def medium(page: Page) -> Medium:
    assert page.medium is not None
    return page.medium


def test_each_medium_is_a_page_numbered_over_all_kinds() -> None:
    found = media_of(user(TEXT, PICTURE, SOUND, TEXT, FILM, REPORT, LINK), 41)
    ids = [page.id for page in found]
    assert ids == ["img_0042_1", "aud_0042_2", "vid_0042_3", "file_0042_4", "img_0042_5"]
    assert [medium(page).index for page in found] == [1, 2, 4, 5, 6]
    assert [medium(page).content for page in found] == [PICTURE, SOUND, FILM, REPORT, LINK]
    assert [page.modality for page in found] == [
        Modality.IMAGE, Modality.AUDIO, Modality.VIDEO, Modality.TEXT, Modality.IMAGE,
    ]  # fmt: skip
    assert [parse_page_id(page.id) for page in found] == [(41, page.part) for page in found]
    assert found[0].part == MEDIA_PART + 1
    assert [page.tokens for page in found] == [COUNTER.part(medium(page).content) for page in found]
    assert medium(found[3]).name == "report.pdf"


def test_an_answers_own_sound_is_a_page_with_its_transcript() -> None:
    data = SOUND["input_audio"]["data"]
    spoken = {"role": "assistant", "content": None, "audio": {"id": "a", "data": data, "transcript": "Yes."}}
    (page,) = media_of(spoken, 1)
    assert (page.id, medium(page).index, page.modality) == ("aud_0002_1", -1, Modality.AUDIO)
    assert medium(page).transcript == "Yes."
    assert medium(page).content == {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    pages = pages_of([user(TEXT), spoken])
    assert pages.page("aud_0002_1").metadata["transcript"] == "Yes."
    assert pages.at("aud_0002_1", 1).content == "Yes."
    assert "Yes." in pages.text("msg_0002")


def test_a_sound_of_which_only_the_id_is_known_is_no_page() -> None:
    for audio in ({"id": "a"}, {"id": "a", "data": 7}, "a", None, 3, []):
        assert media_of({"role": "assistant", "content": None, "audio": audio}) == ()


def test_a_message_of_words_has_no_media() -> None:
    for content in ("text", None, [], [TEXT], [{"type": "refusal", "refusal": "no"}], 7, {"type": "image_url"}):
        assert media_of({"role": "user", "content": content}) == ()


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


@examples(20)
@given(st.lists(odd_parts(), max_size=5), JSON)
def test_odd_parts_are_numbered_without_a_gap_or_left_alone(parts: list[Any], audio: Any) -> None:
    message = {"role": "user", "content": parts, "audio": audio}
    found = media_of(message, 3)
    assert [page.part for page in found] == [MEDIA_PART + n for n in range(1, len(found) + 1)]
    for page in found:
        assert medium(page).index == -1 or medium(page).content == parts[medium(page).index]
        assert page.tokens >= 1
    pages = pages_of([json.loads(json.dumps({**message, "role": "user"}))])
    for wanted in pages[0].ids:
        for level in range(4):
            assert pages.at(wanted, level).compression_level == level
