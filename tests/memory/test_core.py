"""One conversation's memory: every change is in the log, and nothing is lost on the way down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from proxy.memory import (
    ArtifactsBridge,
    CompressionLevel,
    MemoryPage,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    PageType,
    StorageTier,
    WorkingSetConfig,
)
from proxy.memory.core import MemoryCore
from proxy.memory.tlb import TLBWithPageTable
from tests.examples import examples
from tests.memory.strategies import histories

SMALL = WorkingSetConfig(max_l0_tokens=600, reserved_tokens=100)
ROOM_TOKENS = 500
MANY = [60] * 40


def body(number: int, words: int = 60) -> str:
    return f"Message {number} decides that p{number} is {number * 7}. " + "More words fill the page. " * (words // 5)


def page(number: int, words: int = 60, **fields: object) -> MemoryPage:
    values = {"page_id": f"msg_{number:04d}", "content": body(number, words), "storage_tier": StorageTier.L0}
    return MemoryPage.model_validate({**values, **fields})


async def told(core: MemoryCore, sizes: list[int]) -> list[str]:
    """A turn for each page; the ids of what was evicted."""
    evicted: list[str] = []
    for number, words in enumerate(sizes, 1):
        core.register(page(number, words))
        evicted += await core.check_and_evict()
        core.new_turn()
    return evicted


def used(core: MemoryCore) -> int:
    return core.page_table.get_stats().l0_tokens


@examples(25)
@given(st.lists(st.integers(5, 90), max_size=45))
async def test_invariants_03_and_04_under_pressure_nothing_is_lost_and_all_is_logged(sizes: list[int]) -> None:
    core = MemoryCore("s", SMALL)
    evicted = await told(core, sizes)
    high = ROOM_TOKENS * SMALL.eviction_threshold
    assert used(core) <= high
    assert sorted(core.log.replay(), key=lambda e: e.page_id) == sorted(core.page_table, key=lambda e: e.page_id)
    for number, words in enumerate(sizes, 1):
        found = await core._get_page(f"msg_{number:04d}")
        assert found is not None and found.content == body(number, words)
        entry = core.page_table.lookup(found.page_id)
        assert entry is not None
        assert entry.tier is StorageTier.L0 or (entry.artifact_id and found.page_id in evicted)
    assert core.metrics.evictions == len(evicted) == len(set(evicted))


async def test_pages_are_shown_shorter_before_one_is_evicted() -> None:
    core = MemoryCore("s", SMALL)
    evicted = await told(core, MANY)
    ops = [mutation.op for mutation in core.log.entries]
    assert MutationType.COMPRESS in ops[: ops.index(MutationType.EVICT)] and evicted
    newest = core.page_table.lookup("msg_0040")
    assert newest is not None and (newest.tier, newest.level) == (StorageTier.L0, CompressionLevel.FULL)


async def test_a_pinned_page_stays_whole() -> None:
    core = MemoryCore("s", SMALL)
    core.register(page(99, pinned=True))
    await told(core, MANY)
    entry = core.page_table.lookup("msg_0099")
    assert entry is not None and (entry.tier, entry.level) == (StorageTier.L0, CompressionLevel.FULL)


async def test_while_all_fits_nothing_happens() -> None:
    core = MemoryCore("s", SMALL)
    assert await told(core, [10] * 5) == []
    assert {m.op for m in core.log.entries} == {MutationType.CREATE}


async def test_the_context_at_a_turn_is_remembered() -> None:
    core = MemoryCore("s", SMALL)
    await told(core, MANY)
    assert core.get_context_at_turn(1) == ["msg_0001"]
    assert core.get_context_at_turn(core.turn) == [e.page_id for e in core.page_table.resident()]
    assert "msg_0001" not in core.get_context_at_turn(40)


async def test_an_evicted_page_is_found_in_storage_and_only_then_asked_elsewhere() -> None:
    asked: list[str] = []

    async def load(page_id: str) -> MemoryPage | None:
        asked.append(page_id)
        return page(7) if page_id == "msg_0007" else None

    core = MemoryCore("s", SMALL, storage=ArtifactsBridge(), load=load)
    evicted = await told(core, MANY)
    found = await core._get_page(evicted[0])
    assert found is not None and found.storage_tier is StorageTier.L3 and asked == []
    assert await core._get_page("msg_0777") is None and asked == ["msg_0777"]


async def test_a_checkpoint_has_the_full_pages_of_the_window() -> None:
    core = MemoryCore("s", SMALL)
    await told(core, [60] * 9)
    levels = [entry.level for entry in core.page_table.resident()]
    assert any(levels), "some are only shown shortened"
    kept = await core.storage.load_checkpoint(await core.checkpoint("end"))
    assert [p.page_id for p in kept] == [e.page_id for e in core.page_table.resident()]
    assert all(p.content == body(int(p.page_id[4:])) for p in kept)


@examples(25)
@given(histories(max_size=30), histories(max_size=10))
def test_a_table_that_was_made_elsewhere_is_logged_once_a_change(before: list[PageMutation], other: list[PageMutation]) -> None:
    """The proxy's table comes from storage; the log has this turn's changes alone."""
    table = TLBWithPageTable(PageTable())
    table.page_table.replay(before)
    core = MemoryCore(table=table, log=MutationLogLite())
    assert core.combined is table and core.turn == max(1, table.turn)
    base = PageTable().replay(before)
    new = [replace(m, page_id=f"new-{m.page_id}", turn=core.turn + m.turn) for m in other]
    for mutation in new:
        core.apply(mutation)
    assert list(core.log.entries) == new
    key = lambda entry: entry.page_id  # noqa: E731
    assert sorted(base.replay(core.log.entries), key=key) == sorted(table.page_table, key=key)


async def test_adopting_another_table_drops_what_held_the_old_one() -> None:
    core = MemoryCore("s", SMALL)
    await told(core, [10])
    assert (core.working_set, core.combined, core.fault_handler) and used(core) > 0
    log = MutationLogLite([PageMutation(MutationType.CREATE, "claim_0001", 9, None, StorageTier.L0, 12, page_type=PageType.CLAIM)])
    core.adopt(log.replay(), log)
    assert core.turn == 9 and used(core) == 12 == core.working_set.get_stats().tokens_used
    core.apply(PageMutation(MutationType.EVICT, "claim_0001", 9, tier=StorageTier.L2))
    assert len(log) == 2 and used(core) == 0


def test_a_core_makes_no_component_before_it_is_used() -> None:
    core = MemoryCore("s")
    made = {"tlb", "working_set", "metrics", "provenance", "storage", "packer", "fault_handler", "pinned"}
    assert not made & set(core.__dict__)
    assert core.metrics is core.metrics and "metrics" in core.__dict__


async def test_a_page_that_is_no_page_is_refused_before_anything_changes() -> None:
    core = MemoryCore("s", SMALL)
    with pytest.raises(KeyError):
        core.apply(PageMutation(MutationType.EVICT, "msg_0001", 1, tier=StorageTier.L2))
    assert len(core.page_table) == 0
