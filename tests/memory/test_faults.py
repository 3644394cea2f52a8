"""Page faults: their limits, their levels, their answers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.faults import (
    RESULT_OVERHEAD,
    FaultResult,
    Load,
    PageFaultHandler,
    Room,
)
from proxy.memory.models import (
    CompressionLevel,
    FaultReason,
    MemoryPage,
    Modality,
    MutationType,
    StorageTier,
)
from proxy.memory.table import MutationLogLite, PageTable
from tests.examples import examples
from tests.memory.doors import evict

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png", "detail": "low"}}
_TOPICS = "weather gardens trains music soup paint clouds boots chess rivers bread lamps".split()
LONG = "The deadline is 14 March. " + " ".join(
    f"Then we talked for a while about {topic} and its colours." for topic in _TOPICS * 2
)


class Setting:
    """Three evicted pages, one of them an image, and one in the window."""

    def __init__(self, **options: Any) -> None:
        self.log = MutationLogLite()
        self.table = PageTable(on_apply=self.log.append)
        self.asked: list[str] = []
        self.pages = {
            p.page_id: p
            for p in (
                MemoryPage(page_id="msg_0001", content="short", storage_tier=StorageTier.L2),
                MemoryPage(page_id="msg_0002", content=LONG, storage_tier=StorageTier.L3),
                MemoryPage(page_id="img_0003_1", content=IMAGE, modality=Modality.IMAGE,
                           storage_tier=StorageTier.L2, metadata={"caption": "a cat"}),
                MemoryPage(page_id="msg_0004", content="here", storage_tier=StorageTier.L0),
            )
        }  # fmt: skip
        for page in self.pages.values():
            self.table.register(page)
        options.setdefault("turn", 2)
        self.handler = PageFaultHandler(self.table, self.get_page, **options)

    async def get_page(self, page_id: str) -> MemoryPage | None:
        self.asked.append(page_id)
        return self.pages.get(page_id)


async def test_a_page_comes_back_and_is_in_the_window_from_then_on() -> None:
    it = Setting()
    result = await it.handler.handle_fault("msg_0002", 0)
    assert result.success and result.page is not None and result.error is None
    assert result.page.content == LONG and result.page.storage_tier is StorageTier.L3
    entry = it.table.lookup("msg_0002")
    assert entry is not None and entry.tier is StorageTier.L0 and entry.fault_count == 1
    last = it.log.entries[-1]
    assert (last.op, last.turn) == (MutationType.FAULT_IN, 2)
    assert last.reason is FaultReason.RESOLVE_REFERENCE and last.tokens == result.tokens
    assert it.pages["msg_0002"].storage_tier is StorageTier.L3  # the caller's page is untouched


async def test_the_default_level_is_key_points() -> None:
    it = Setting()
    result = await it.handler.handle_fault("msg_0002")
    assert result.page is not None and result.page.compression_level is CompressionLevel.ABSTRACT
    assert 0 < len(result.page.content) < len(LONG) / 4


async def test_a_page_in_the_window_costs_nothing() -> None:
    it = Setting(max_faults_per_turn=1)
    before = len(it.log)
    for _ in range(2):
        result = await it.handler.handle_fault("msg_0004", 1)
        assert result.success and result.resident and result.page is not None and result.tokens == 0
    assert it.handler.get_metrics().faults_this_turn == 0 and len(it.log) == before


async def test_a_refault_is_of_a_page_that_left_only_lately() -> None:
    it = Setting()
    assert not (await it.handler.handle_fault("msg_0001", 0)).refault  # it never was in the window
    evict(it.table, "msg_0004", 2)
    assert (await it.handler.handle_fault("msg_0004", 0)).refault
    entry = it.table.lookup("msg_0004")
    assert entry is not None and entry.refault_count == 1


async def test_a_spiral_is_cut_short() -> None:
    it = Setting(max_faults_per_turn=9, max_tokens_per_turn=RESULT_OVERHEAD + 100)
    assert Setting().handler.tokens_left is None
    first = await it.handler.handle_fault("msg_0002", 0)
    assert first.page is not None and first.page.compression_level > 0  # the full page does not fit
    asked = len(it.asked)
    again = await it.handler.handle_fault("msg_0002", 0)
    assert not again.success and "already given" in (again.error or "")
    assert len(it.asked) == asked and it.handler.get_metrics().faults_this_turn == 1


async def test_limits_hold_and_a_new_turn_lifts_them() -> None:
    it = Setting(max_faults_per_turn=1)
    assert it.handler.can_fault()
    assert (await it.handler.handle_fault("msg_0001", 0)).success
    assert not it.handler.can_fault()
    refused = await it.handler.handle_fault("msg_0002", 0)
    assert not refused.success and "limit of 1" in (refused.error or "") and refused.page is None
    it.handler.new_turn()
    assert it.handler.turn == 3 and it.handler.can_fault()
    assert (await it.handler.handle_fault("msg_0002", 0)).success
    assert it.handler.get_metrics().faults_this_turn == 1 and not it.handler.can_fault()


async def test_unknown_and_lost_pages_are_a_sentence() -> None:
    it = Setting()
    unknown = await it.handler.handle_fault("msg_0099", 0)
    assert not unknown.success and "There is no page msg_0099" in (unknown.error or "")
    del it.pages["msg_0001"]
    lost = await it.handler.handle_fault("msg_0001", 0)
    assert not lost.success and "could not be loaded" in (lost.error or "")
    assert it.handler.get_metrics().faults_this_turn == 0
    with pytest.raises(ValueError, match="4"):
        await it.handler.handle_fault("msg_0001", 4)


async def test_a_long_messages_own_id_gives_all_its_parts_in_order() -> None:
    it = Setting()
    for part, text in ((1, "one, "), (2, "two, "), (3, "three")):
        page = MemoryPage(page_id=f"msg_0005.{part}", content=text, storage_tier=StorageTier.L2)
        it.pages[page.page_id] = page
        it.table.register(page)
    result = await it.handler.handle_fault("msg_0005", 0)
    assert result.page is not None and result.page.content == "one, two, three"
    assert result.page.page_id == "msg_0005"
    parts = [it.table.lookup(f"msg_0005.{n}") for n in (1, 2, 3)]
    assert all(entry and entry.tier is StorageTier.L0 for entry in parts)
    assert (await it.handler.handle_fault("msg_0005.2", 0)).resident


async def test_an_image_comes_with_its_part_and_words_about_it() -> None:
    it = Setting()
    result = await it.handler.handle_fault("img_0003_1", 0)
    assert result.page is not None and result.parts == [IMAGE]
    told = json.loads(it.handler.build_tool_result(result.page).model_dump_json())
    assert told["page"]["content"] == {"text": "a cat"} and told["page"]["modality"] == "image"
    assert told["effects"]["tokens_est"] == result.tokens > 85
    caption = await it.handler.handle_fault("img_0003_1", 2)
    assert caption.resident  # what is there is better


def served(it: Setting, *asked: Any) -> tuple[FaultResult, list[Load]]:
    """The end of a dialogue, and what it asked for."""
    dialogue, loads = it.handler.resolve(*asked), list[Load]()
    page: MemoryPage | None = None
    try:
        while True:
            loads.append(dialogue.send(page))
            page = it.pages[loads[-1].page_id]
    except StopIteration as end:
        return end.value, loads


def test_a_fault_asks_for_one_level_after_another_until_one_fits() -> None:
    room = Room(RESULT_OVERHEAD + 90, 10_000)
    result, loads = served(Setting(), "msg_0002", 0, FaultReason.TOOL_PREREQUISITE, room)
    assert [load.level for load in loads] == list(CompressionLevel)[: len(loads)]
    assert result.success and result.tokens <= 90
    assert result.page is not None and result.page.compression_level == loads[-1].level > 0


@pytest.mark.parametrize(("times", "whole"), [(3, True), (1, False)])
def test_a_fault_fits_as_the_json_that_is_sent(times: int, whole: bool) -> None:
    it = Setting()
    page = it.pages["msg_0002"] = MemoryPage(page_id="msg_0002", content='"\\"\n' * 100)
    room = Room(10_000, RESULT_OVERHEAD + times * page.estimate_tokens())
    result, _ = served(it, "msg_0002", 0, FaultReason.RESOLVE_REFERENCE, room)
    assert result.page is not None and (result.page.compression_level == 0) == whole


@examples(20)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["msg_0001", "msg_0002", "img_0003_1", "msg_0004", "msg_9"]),
            st.integers(0, 3),
            st.none() | st.builds(Room, st.integers(-5, 400), st.integers(-5, 400)),
        ),
        max_size=12,
    ),
    st.integers(0, 4),
    st.none() | st.integers(0, 500),
)
def test_invariant_10_a_turn_loads_no_more_than_its_limits(
    asked: list[tuple[str, int, Room | None]], faults: int, limit: int | None
) -> None:
    it = Setting(max_faults_per_turn=faults, max_tokens_per_turn=limit)
    for page_id, level, room in asked:
        result, _ = served(it, page_id, level, FaultReason.RESOLVE_REFERENCE, room)
        assert room is None or result.tokens <= max(0, min(room))
        assert result.success == (result.error is None)
        assert (result.page is not None) == (result.success and not result.resident)
        if result.page is not None:
            assert result.page.compression_level >= level
    metrics = it.handler.get_metrics()
    assert metrics.faults_this_turn <= faults
    assert limit is None or metrics.tokens_this_turn <= limit
    replayed = it.log.replay()
    assert replayed == it.table
