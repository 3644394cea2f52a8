import base64
import copy
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from proxy.memory.compressor import ABSTRACT_TOKENS
from proxy.memory.levels import (
    AUDIO_REFERENCE_TOKENS,
    Compressor,
    CompressorRegistry,
    Step,
    TextCompressor,
    clock,
    content_tokens,
)
from proxy.memory.levels_json import SHAPE_TOKENS
from proxy.memory.models import Counts, MemoryPage, Modality
from proxy.tokens import get_counter
from tests.examples import examples
from tests.media import samples
from tests.media.samples import AreaCounts, TileCounts

REGISTRY = CompressorRegistry.default()
TILES, AREA = TileCounts(), AreaCounts()
SAID = (
    "We met on 3 May to talk about the launch. Maria Keller will own the billing migration. "
    "It rained all day and the coffee was cold. The deadline is 14 March and nobody objected. "
    "Somebody told a long story about a dog. We agreed to keep parse_invoice as it is for now."
)


def page(
    modality: Modality, content: Any, page_id: str = "img_0042_1", **metadata: Any
) -> MemoryPage:
    return MemoryPage(
        page_id=page_id,
        modality=modality,
        content=content,
        metadata=metadata,
        provenance=["msg_0041"],
        importance=0.7,
    )


def image(data: bytes | None = None, **metadata: Any) -> MemoryPage:
    return page(Modality.IMAGE, samples.image_part(data or samples.png(800, 600)), **metadata)


def audio(seconds: float = 42.0, **metadata: Any) -> MemoryPage:
    part = samples.audio_part(samples.wav(seconds))
    return page(Modality.AUDIO, part, "aud_0042_1", **metadata)


def video(**metadata: Any) -> MemoryPage:
    film = samples.mp4(scenes=4, seconds_per_scene=2.0)
    return page(Modality.VIDEO, samples.video_part(film), "vid_0042_1", **metadata)


def records(count: int) -> dict[str, Any]:
    rows = [
        {"id": index, "total": 9.5 + index, "status": "failed" if index == 30 else "paid"}
        for index in range(count)
    ]
    return {"orders": rows, "next": None, "note": "long " * 200}


def structured(value: Any) -> MemoryPage:
    return page(Modality.STRUCTURED, json.dumps(value, indent=1), "msg_0042")


def file(data: bytes, mime: str, name: str, **metadata: Any) -> MemoryPage:
    return page(Modality.TEXT, samples.file_part(data, mime, name), "file_0042_1", **metadata)


def every_page() -> dict[str, MemoryPage]:
    link = {"type": "image_url", "image_url": {"url": "https://x.test/a/b.png?sig=secret"}}
    return {
        "text": page(Modality.TEXT, SAID * 3, "msg_0042"),
        "short text": page(Modality.TEXT, "ok", "msg_0042"),
        "json": structured(records(60)),
        "small json": structured({"ok": True}),
        "not json": page(Modality.STRUCTURED, "[oops " + SAID, "msg_0042"),
        "json value": page(Modality.STRUCTURED, records(60), "msg_0042"),
        "png": image(),
        "jpeg": image(samples.jpeg(900, 700)),
        "captioned": image(caption="Bar chart of quarterly revenue in 2026, navy on green."),
        "icon": image(samples.png(16, 16)),
        "banner": image(samples.png(3000, 20)),
        "low": page(Modality.IMAGE, samples.image_part(samples.png(640, 480), detail="low")),
        "link": page(Modality.IMAGE, link),
        "data url": page(Modality.IMAGE, samples.data_url(samples.png(640, 480), "image/png")),
        "broken image": image(b"no image at all"),
        "wav": audio(),
        "transcribed": audio(120.0, transcript=SAID),
        "blip": audio(0.2, transcript=SAID),
        "assistant's audio": page(Modality.AUDIO, {"id": "audio_1", "transcript": SAID}),
        "mp4": video(),
        "described": video(summary="A red square wanders.", topic="colours"),
        "video link": page(Modality.VIDEO, {"type": "video_url", "video_url": "https://x.test/v"}),
        "broken video": page(Modality.VIDEO, samples.video_part(b"\x00\x00\x00\x18ftypmp42")),
        "pdf": file(samples.pdf([SAID.replace(". ", ".\n")] * 3), "application/pdf", "minutes.pdf"),
        "json file": file(json.dumps(records(60)).encode(), "application/json", "orders.json"),
        "zip": file(b"PK\x03\x04" * 300, "application/zip", "a.zip"),
        "nothing": page(Modality.TEXT, None, "msg_0042"),
    }


PAGES = every_page()


def tokens(full: MemoryPage, counts: Counts) -> int:
    return content_tokens(full.content, counts)


@pytest.mark.parametrize("name", PAGES)
def test_levels_keep_their_promises(name: str) -> None:
    """Each costs at most what the one above costs (invariant 3), says what it is, leaves the page as it
    was (4) and comes out the same again (7); from a page that is at a level, the way only goes down.
    """
    full, again = PAGES[name], every_page()[name]
    before = copy.deepcopy(full.model_dump())
    assert REGISTRY.compress(full, 0, TILES) is full
    for counts in (TILES, AREA):
        above = tokens(full, counts)
        reduced = REGISTRY.compress(full, 1, counts)
        for level in (1, 2, 3):
            lower = REGISTRY.compress(full, level, counts)
            assert tokens(lower, counts) == lower.size_tokens
            assert tokens(lower, counts) <= above
            above = tokens(lower, counts)
            assert lower.compression_level == level
            same = ("page_id", "modality", "page_type", "provenance", "importance", "artifact_id")
            assert all(getattr(lower, key) == getattr(full, key) for key in same)
            if level >= 2:
                assert isinstance(lower.content, str)
                assert above <= (ABSTRACT_TOKENS if level == 2 else 24)
            if counts is TILES:
                assert REGISTRY.compress(again, level, counts) == lower
            stepped = REGISTRY.compress(reduced, level, counts)
            assert (stepped is reduced) == (level == 1)
            assert tokens(stepped, counts) <= tokens(reduced, counts)
            reduced = stepped
    assert full.model_dump() == before


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4.1-mini"])
def test_levels_cost_less_by_a_providers_rules(model: str) -> None:
    counts = get_counter(model)
    for name in ("json", "jpeg", "banner", "transcribed", "mp4", "pdf"):
        sizes = [tokens(PAGES[name], counts)]
        sizes += [tokens(REGISTRY.compress(PAGES[name], n, counts), counts) for n in (1, 2, 3)]
        assert sizes == sorted(sizes, reverse=True), name


@pytest.mark.parametrize("name", ["png", "captioned", "link", "transcribed", "mp4", "described"])
def test_levels_say_in_two_steps_what_they_say_in_one(name: str) -> None:
    full = PAGES[name]
    for middle, last in ((1, 2), (1, 3), (2, 3)):
        two = REGISTRY.compress(REGISTRY.compress(full, middle, TILES), last, TILES)
        assert two.content == REGISTRY.compress(full, last, TILES).content


# ---------------------------------------------------------------- what each level says


def test_image_becomes_a_thumbnail_a_caption_and_a_name() -> None:
    full = image(samples.png(1600, 1200), caption="Twelve navy bars.")
    one, two, three = (REGISTRY.compress(full, level, TILES) for level in (1, 2, 3))
    shown = one.content["image_url"]
    assert (one.content["type"], shown["detail"]) == ("image_url", "low")
    with Image.open(io.BytesIO(base64.b64decode(shown["url"].partition(",")[2]))) as small:
        assert small.size == (512, 384)
    assert (one.size_tokens, tokens(full, TILES)) == (85, 765)
    assert two.content.startswith("Twelve navy bars.; image 1600x1200 PNG ")
    assert three.content == "image:img_0042_1"


def test_image_is_cheaper_by_a_rule_of_area_too() -> None:
    full = image(samples.png(1600, 1200))
    one = REGISTRY.compress(full, 1, AREA)
    assert tokens(one, AREA) * 2 <= tokens(full, AREA)
    small = image(samples.png(320, 240))
    assert tokens(REGISTRY.compress(small, 1, AREA), AREA) < tokens(small, AREA)


def test_image_without_a_caption_is_described_by_its_facts() -> None:
    full = image(topic="quarterly revenue")
    two = REGISTRY.compress(full, 2, TILES).content
    assert two.startswith("image 800x600 PNG ") and two.endswith("; quarterly revenue")
    link = REGISTRY.compress(PAGES["link"], 2, TILES).content
    assert link == "image x.test/b.png"


def test_image_link_stays_the_link_at_low_detail() -> None:
    full = PAGES["link"]
    one = REGISTRY.compress(full, 1, TILES)
    assert one.content["image_url"] == {**full.content["image_url"], "detail": "low"}


def test_audio_becomes_its_transcript_its_summary_and_its_duration() -> None:
    full = PAGES["transcribed"]
    one, two, three = (REGISTRY.compress(full, level, TILES) for level in (1, 2, 3))
    assert one.content == SAID
    assert "14 March" in two.content or "parse_invoice" in two.content
    assert three.content.startswith("audio 2:00, ")
    assert (three.size_tokens or 0) <= AUDIO_REFERENCE_TOKENS
    assert REGISTRY.compress(PAGES["assistant's audio"], 1, TILES).content[:30] == SAID[:30]


def test_audio_without_a_transcript_says_how_long_it_is() -> None:
    full = audio(topic="standup")
    assert REGISTRY.compress(full, 1, TILES).content == "audio 0:42 WAV; standup"
    assert REGISTRY.compress(full, 3, TILES).content == "audio 0:42, standup"


def test_film_becomes_keyframes_scenes_and_a_name() -> None:
    full = PAGES["mp4"]
    one, two, three = (REGISTRY.compress(full, level, TILES) for level in (1, 2, 3))
    words, *frames = one.content
    assert words["text"].startswith("video 0:08 320x240 MP4 ")
    assert words["text"].endswith("; scenes at 0:00, 0:02.1, 0:04.2, 0:06")
    assert [part["image_url"]["detail"] for part in frames] == ["low"] * 4
    assert (one.size_tokens or 0) < tokens(full, TILES)
    assert two.content == words["text"]
    assert three.content == "video:vid_0042_1"
    described = REGISTRY.compress(
        video(summary="A red square wanders over four colours."), 2, TILES
    )
    assert described.content == "A red square wanders over four colours."


def test_film_that_is_short_shows_no_more_frames_than_it_costs() -> None:
    short = page(Modality.VIDEO, samples.video_part(samples.mp4(2, 0.5)), "vid_0042_1")
    one = REGISTRY.compress(short, 1, TILES)
    assert isinstance(one.content, list) and 2 <= len(one.content) <= 3
    assert tokens(one, TILES) < tokens(short, TILES) == 258


def test_json_stays_json_and_keeps_its_schema() -> None:
    full = structured(records(60))
    one = REGISTRY.compress(full, 1, TILES)
    value = json.loads(one.content)
    assert list(value) == ["orders", "next", "note"]
    *items, more = value["orders"]
    assert all(set(item) == {"id", "total", "status"} for item in items)
    assert more == f"… {60 - len(items)} more"
    assert {"id": 30, "total": 39.5, "status": "failed"} in items
    assert value["note"].endswith("…") and len(value["note"]) < 400
    assert tokens(one, TILES) < tokens(full, TILES) / 2


def test_json_becomes_key_facts_and_a_shape() -> None:
    full = structured(records(60))
    reduced = REGISTRY.compress(full, 1, TILES)
    for start in (full, reduced):
        facts = REGISTRY.compress(start, 2, TILES).content.split("; ")
        assert "orders: 60 items" in facts and "orders[0].id: 0" in facts
        assert any("failed" in fact for fact in facts)
        shape = REGISTRY.compress(start, 3, TILES)
        assert shape.content == "{orders: [60 x {id, total, status}], …}"
        assert (shape.size_tokens or 0) <= SHAPE_TOKENS


def test_json_tells_of_a_failure_first_and_of_what_is_empty_last() -> None:
    pad = {f"field_{number}": "nothing to see here" for number in range(30)}
    full = structured({"empty": None, **pad, "last": {"deep": {"status": "failed"}, "error": 7}})
    facts = REGISTRY.compress(full, 2, TILES).content
    assert "last.deep.status: failed" in facts and "last.error: 7" in facts
    assert "empty" not in facts and facts.index("field_0") < facts.index("last")


def test_file_becomes_its_words_and_then_its_name() -> None:
    full = PAGES["pdf"]
    one, two, three = (REGISTRY.compress(full, level, TILES) for level in (1, 2, 3))
    for kept in ("Maria Keller", "14 March", "parse_invoice"):
        assert kept in one.content
    assert two.content and two.content.split()[0] in one.content
    assert three.content == "file:minutes.pdf"
    assert list(json.loads(REGISTRY.compress(PAGES["json file"], 1, TILES).content)) == [
        "orders",
        "next",
        "note",
    ]
    assert REGISTRY.compress(PAGES["zip"], 1, TILES).content.startswith("file a.zip")


def test_clock() -> None:
    assert [clock(s) for s in (0, 2.55, 42.7, 725, 3723)] == [
        "0:00",
        "0:02.5",
        "0:42",
        "12:05",
        "1:02:03",
    ]


# ---------------------------------------------------------------- the registry


def test_registry_takes_other_compressors() -> None:
    class Shout(Compressor):
        def content_at(self, page: MemoryPage, step: Step) -> Any:
            return page.text().upper()

    registry = CompressorRegistry.default()
    registry.register(Modality.TEXT, Shout())
    assert registry.compress(page(Modality.TEXT, "hi"), 1, TILES).content == "HI"
    assert isinstance(REGISTRY.get(Modality.TEXT), TextCompressor)
    with pytest.raises(KeyError):
        CompressorRegistry().get(Modality.TEXT)
    with pytest.raises(ValueError):
        REGISTRY.compress(page(Modality.TEXT, "hi"), 4, TILES)


# ---------------------------------------------------------------- odd content

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=12), inner, max_size=6)
    ),
    max_leaves=40,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["image_url", "input_audio", "video_url", "file", "text", "odd"])},
    optional={
        "image_url": JSON,
        "input_audio": st.dictionaries(st.sampled_from(["data", "format"]), JSON),
        "video_url": st.sampled_from(["data:video/mp4;base64,AAAA", "https://x.test/v", "", "?"]),
        "file": st.dictionaries(st.sampled_from(["file_data", "filename", "file_id"]), JSON),
        "text": st.text(max_size=40),
    },
)
METADATA = st.dictionaries(
    st.sampled_from(["caption", "transcript", "summary", "topic", "facts", "duration"]),
    st.text(max_size=60) | st.integers() | st.none(),
)


class RoughCounts:
    """A counter that needs no tokenizer: fast, and blind to what a part holds."""

    def text(self, text: str) -> int:
        return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4

    def part(self, part: dict[str, Any]) -> int:
        return 100 if part.get("type") == "image_url" else self.text(repr(part))


@examples(40)
@given(st.sampled_from(Modality), JSON | PARTS | st.text(max_size=300), METADATA)
def test_levels_of_every_content_and_modality_go_down(
    modality: Modality, content: Any, metadata: dict[str, Any]
) -> None:
    full = page(modality, content, **metadata)
    counts = RoughCounts()
    above = tokens(full, counts)
    for level in (1, 2, 3):
        lower = REGISTRY.compress(full, level, counts)
        assert tokens(lower, counts) <= above
        above = tokens(lower, counts)


@examples(40)
@given(JSON.filter(lambda value: isinstance(value, (dict, list))))
def test_json_truncated_is_json(value: Any) -> None:
    original = json.dumps(value)
    one = REGISTRY.compress(page(Modality.STRUCTURED, original), 1, RoughCounts())
    assert isinstance(json.loads(one.content), type(value))  # cut, and the same kind of value


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 900 + "1" + "}" * 900,
        json.dumps({f"key_{index}": "x" * 50 for index in range(5000)}),
        json.dumps([list(range(2000))] * 20),
        '{"n": 1e999, "m": NaN, "big": ' + "9" * 5000 + "}",
    ],
    ids=["deep", "nested", "wide", "numbers", "not finite"],
)
def test_invariant_10_hostile_json_is_bounded(content: str) -> None:
    full = page(Modality.STRUCTURED, content)
    sizes = [
        tokens(REGISTRY.compress(full, level, RoughCounts()), RoughCounts()) for level in (1, 2, 3)
    ]
    assert sizes[0] <= RoughCounts().text(content) / 2.5
    assert sizes[1] <= ABSTRACT_TOKENS and sizes[2] <= SHAPE_TOKENS
