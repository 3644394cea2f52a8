"""The page table: the fold, the stored chunks, and the log that both are made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory import (
    CompressionLevel,
    MemoryPage,
    MutationLogLite,
    MutationType,
    PageMutation,
    PageTable,
    StorageTier,
)
from proxy.memory.eviction import EVICTION_COOLDOWN_TURNS
from proxy.memory.ids import make_page_id, media_page_id
from proxy.memory.models import DEFAULT_IMPORTANCE, PinKind
from proxy.memory.table import decode_log, encode_log
from tests.examples import examples
from tests.memory.doors import evict, fault_in, map_in, register_id
from tests.memory.strategies import histories

FIRST_OF_TWO = """
import sys, threading
from proxy.memory import MutationType, PageMutation
from proxy.memory.table import decode_log, encode_log

data = encode_log([PageMutation(MutationType.CREATE, "msg_0001", 1)])

def called(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.endswith("enum.py"):  # of a field's type
        sys.setprofile(None)
        other = threading.Thread(target=decode_log, args=(data,))
        other.start()
        other.join()

sys.setprofile(called)
decode_log(data)
"""


class Storage(dict[bytes, bytes]):
    """Blocks by reference; counts its reads."""

    reads = 0

    def load(self, ref: bytes) -> bytes | None:
        self.reads += 1
        return self.get(ref)


def conversation(pages: int, window: int = 0) -> PageTable:
    table = PageTable()
    for position in range(pages):
        inside = position >= pages - window
        tier = StorageTier.L0 if inside else StorageTier.L2
        register_id(table, make_page_id(position), 100, position, tier=tier)
    return table


def stored(table: PageTable) -> tuple[bytes, Storage]:
    root, blocks = table.checkpoint()
    return root, Storage(blocks)


# -- the fold


def test_register_as_in_the_seeds() -> None:
    table = PageTable()
    page = MemoryPage(page_id="msg_0001", content="hello", storage_tier=StorageTier.L0, pinned=True)
    entry = table.register(page)
    assert (entry.page_id, entry.tier, entry.pinned) == ("msg_0001", StorageTier.L0, True)
    assert (entry.position, entry.size_tokens) == (0, 2)
    assert table.lookup("msg_0001") is entry
    assert table.lookup("msg_0002") is None


def test_update_location_moves_between_tiers_and_back() -> None:
    table = PageTable()
    table.register(MemoryPage(page_id="msg_0001", content="x" * 40, storage_tier=StorageTier.L0))
    table.update_location("msg_0001", tier=StorageTier.L2, artifact_id="a1")
    entry = table.get_by_tier(StorageTier.L2)[0]
    assert (entry.artifact_id, entry.evicted_turn, entry.l0_tokens) == ("a1", 0, 0)
    assert table.resident() == []
    table.update_location("msg_0001", tier=StorageTier.L0)
    assert table.resident()[0].l0_tokens == 10
    table.update_location("msg_0001", tier=StorageTier.L3)
    table.update_location("msg_0001", tier=StorageTier.L4)
    assert table.get_stats().pages_by_tier == {StorageTier.L4: 1}


def test_resident_is_in_conversation_order_with_levels() -> None:
    table = PageTable()
    for position in (2, 0, 1):
        register_id(table, make_page_id(position), 100, 1)
    register_id(table, make_page_id(0, 2), 100, 1)
    map_in(table, make_page_id(2), 2, CompressionLevel.FULL)
    map_in(table, make_page_id(0, 2), 2, CompressionLevel.ABSTRACT, 20)
    map_in(table, make_page_id(0), 2, CompressionLevel.FULL)
    assert [(e.page_id, int(e.level)) for e in table.resident()] == [
        ("msg_0001", 0),
        ("msg_0001.2", 2),
        ("msg_0003", 0),
    ]
    assert table.get_stats().l0_tokens == 220


def test_refaults_within_the_cooldown_raise_importance_and_later_ones_do_not() -> None:
    table = PageTable()
    for name in ("msg_0001", "msg_0002"):
        register_id(table, name, 10, 1, tier=StorageTier.L0)
        evict(table, name, 2)
    soon = fault_in(table, "msg_0001", 2 + EVICTION_COOLDOWN_TURNS)
    late = fault_in(table, "msg_0002", 3 + EVICTION_COOLDOWN_TURNS)
    assert (soon.refault_count, late.refault_count) == (1, 0)
    assert soon.importance > DEFAULT_IMPORTANCE == late.importance


def test_errors_change_nothing() -> None:
    log = MutationLogLite()
    table = PageTable(log.append)
    register_id(table, "msg_0001", 10, 1)
    bad = [
        PageMutation(MutationType.CREATE, "msg_0001", 2),
        PageMutation(MutationType.EVICT, "msg_0001", 2, tier=StorageTier.L0),
        PageMutation(MutationType.COMPRESS, "msg_0001", 2),
        PageMutation(MutationType.UPDATE, "msg_0001", 2, tier=StorageTier.L0),
    ]
    for mutation in bad:
        with pytest.raises(ValueError, match=r"."):
            table.apply(mutation)
    with pytest.raises(KeyError, match="no page 'msg_0002'"):
        evict(table, "msg_0002", 2)
    assert (table.turn, len(log)) == (1, 1)
    assert log.replay() == table


@examples(15)
@given(histories())
def test_invariant_07_the_table_is_a_fold_of_its_log(history: list[PageMutation]) -> None:
    log = MutationLogLite()
    table = PageTable(log.append).replay(history)
    assert list(log.entries) == history
    assert log.replay() == table
    stats = table.get_stats()
    assert stats.total_pages == len(table) == sum(stats.pages_by_tier.values())
    for tier in StorageTier:
        assert all(entry.tier is tier for entry in table.get_by_tier(tier))
    assert all(e.l0_tokens == 0 for e in table if e.tier is not StorageTier.L0)


# -- the log


def test_get_context_at_turn_says_what_was_in_the_window() -> None:
    log = MutationLogLite()
    table = PageTable(log.append)
    register_id(table, "msg_0001", 10, 1, tier=StorageTier.L0)
    register_id(table, "msg_0002", 10, 2, tier=StorageTier.L0)
    evict(table, "msg_0001", 3)
    fault_in(table, "msg_0001", 5, CompressionLevel.REDUCED)
    contexts = [log.get_context_at_turn(turn) for turn in range(6)]
    assert contexts == [
        [],
        ["msg_0001"],
        ["msg_0001", "msg_0002"],
        ["msg_0002"],
        ["msg_0002"],
        ["msg_0001", "msg_0002"],
    ]
    assert log.replay(5).resident()[0].level is CompressionLevel.REDUCED


def test_get_context_at_turn_has_media_and_derived_pages_in_the_order_of_the_conversation() -> None:
    log = MutationLogLite()
    table = PageTable(log.append)
    pages = ["claim_0002", "img_0002_1", "msg_0002", "summary_seg_01", "msg_0001.2", "msg_0001.1",
             "img_0001_2"]  # fmt: skip
    for number, page in enumerate(pages):
        register_id(table, page, 10, number, tier=StorageTier.L0)
    assert log.get_context_at_turn(9) == [
        "claim_0002", "summary_seg_01", "msg_0001.1", "msg_0001.2", "img_0001_2", "msg_0002",
        "img_0002_1",
    ]  # fmt: skip
    assert log.get_context_at_turn(3) == ["claim_0002", "summary_seg_01", "msg_0002", "img_0002_1"]


@examples(15)
@given(histories())
def test_invariant_09_the_stored_log_alone_gives_table_and_context(
    history: list[PageMutation],
) -> None:
    log = MutationLogLite(decode_log(encode_log(history)))
    table = PageTable().replay(history)
    assert list(log.entries) == history
    assert log.replay() == table
    assert log.get_context_at_turn(table.turn) == [e.page_id for e in table.resident()]


def test_stored_rows_are_short() -> None:
    left = [PageMutation(MutationType.EVICT, f"msg_{at:04}", 5, tier=StorageTier.L2) for at in range(100)]
    assert len(encode_log(left)) < 100 * (9 + 1) + 60  # an id, and a step of the turn; what is the same is said once
    kept = encode_log([PageMutation(MutationType.PIN, "msg_0001", 4, pin_kind=PinKind.INFERRED)])
    assert decode_log(kept)[0].pin_kind is PinKind.INFERRED


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x91\x90", b"\x91\x93\xa1x\xa1p\x01", b"junk"])
def test_a_damaged_log_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_log(data)


# -- storage


@examples(15)
@given(histories(), st.lists(st.integers(0, 60), max_size=4))
def test_invariant_07_the_root_says_what_is_in_the_table_and_not_when_it_was_written(
    history: list[PageMutation], stops: list[int]
) -> None:
    storage = Storage()
    table, done = PageTable(), 0
    for stop in [*sorted(stops), len(history)]:
        table.replay(history[done:stop])
        done = max(done, min(stop, len(history)))
        root, blocks = table.checkpoint()
        storage.update(blocks)
        table = PageTable.open(root, storage.load)
    assert root == PageTable().replay(history).checkpoint().root
    assert table == PageTable().replay(history)


def test_a_small_change_writes_little_and_shares_the_rest() -> None:
    table = conversation(10_000, window=300)
    first = table.checkpoint()
    assert len(first.blocks) == 157 + 3 + 1  # chunks, groups of 64 of them, the root
    for position in range(9_990, 10_010):
        if position >= 10_000:
            register_id(table, make_page_id(position), 100, position, tier=StorageTier.L0)
        else:
            evict(table, make_page_id(position), 10_000)
    second = table.checkpoint()
    assert len(second.blocks) == 1 + 1 + 1  # a chunk of 64 positions, its group and the root
    assert sum(map(len, second.blocks.values())) < 6_000
    assert table.checkpoint() == (second.root, {})


def test_opening_reads_the_window_and_looking_up_one_chunk() -> None:
    root, storage = stored(conversation(20_000, window=100))
    table = PageTable.open(root, storage.load)
    assert len(table.resident()) == 100 == table.get_stats().pages_by_tier[StorageTier.L0]
    assert (len(table), storage.reads) == (20_000, 1 + 5 + 3)
    entry = table.lookup(make_page_id(7_000))
    assert entry is not None and entry.position == 7_000
    assert table.lookup(make_page_id(7_001)) is not None and table.lookup(make_page_id(20_000)) is None
    assert storage.reads == 1 + 5 + 3 + 1
    assert table.get_stats() == conversation(20_000, window=100).get_stats()
    assert table == conversation(20_000, window=100)


def test_what_is_stored_leaves_ram_and_comes_back() -> None:
    table, same = conversation(20_000, window=100), conversation(20_000, window=100)
    storage = Storage()
    table.rest(storage.load, PageTable, 8192)
    assert table.loaded == 20_000, "nothing of it is stored"
    storage.update(table.checkpoint().blocks)
    fault_in(table, make_page_id(64), 20_001)
    fault_in(same, make_page_id(64), 20_001)
    table.rest(storage.load, PageTable, 8192)
    assert table.loaded <= 131 * 64 and storage.reads == 0
    assert table.in_window(make_page_id(64)) is table.lookup(make_page_id(64)) is not None
    assert table == same and table.checkpoint().root == same.checkpoint().root


def test_two_threads_that_are_the_first_to_read_a_table_do_not_end_the_process() -> None:
    """msgspec looks up a struct's types at its first use, and lets go of the interpreter's lock meanwhile."""
    subprocess.run([sys.executable, "-c", FIRST_OF_TWO], check=True, cwd=Path(__file__).resolve().parents[2])


def test_pages_without_a_position_are_found_again() -> None:
    table = PageTable()
    names = [*(f"claim_{n:04d}" for n in range(300)), "system_prompt", "msg_0000", "x" * 300, "7" * 40]
    names += ["ünïcode", "summary_seg_03", media_page_id(3, 1, "img")]
    for name in names:
        register_id(table, name, 5, 1)
    root, storage = stored(table)
    opened = PageTable.open(root, storage.load)
    assert storage.reads == 1 + 3
    assert all(opened.lookup(name) == table.lookup(name) != None for name in names)  # noqa: E711
    fault_in(opened, "claim_0123", 2)
    assert len(opened.checkpoint().blocks) == 1 + 1 + 1


def test_invariant_06_branches_of_one_root_see_nothing_of_each_other() -> None:
    root, storage = stored(conversation(200))
    one, two = PageTable.open(root, storage.load), PageTable.open(root, storage.load)
    fault_in(one, make_page_id(5), 300)
    register_id(one, make_page_id(200), 1, 300)
    roots = {}
    for name, table in (("one", one), ("two", two)):
        roots[name], blocks = table.checkpoint()
        storage.update(blocks)
    assert roots["two"] == root != roots["one"]
    untouched = two.lookup(make_page_id(5))
    assert untouched is not None and untouched.fault_count == 0
    assert make_page_id(200) in one and make_page_id(200) not in two
    assert two == conversation(200)
    assert PageTable.open(roots["one"], storage.load) == one


@examples(15)
@given(histories(), st.data())
def test_invariant_06_what_is_lost_or_damaged_is_made_again_from_the_log(
    history: list[PageMutation], data: st.DataObject
) -> None:
    whole = PageTable().replay(history)
    root, storage = stored(whole)
    kept = dict(storage)
    for ref in data.draw(st.sets(st.sampled_from(sorted(storage)))):
        storage[ref] += b"."
    for ref in data.draw(st.sets(st.sampled_from(sorted(storage)))):
        del storage[ref]
    table = PageTable.open(root, storage.load, lambda: PageTable().replay(history))
    for page in {m.page_id for m in history}:
        if data.draw(st.booleans()):
            assert table.lookup(page) == whole.lookup(page)
    assert table.resident() == whole.resident() and table.get_stats() == whole.get_stats()
    assert table == whole
    again = table.checkpoint()
    assert again.root == root
    assert {**storage, **again.blocks} == kept, "and stored again"


def test_what_is_lost_with_its_log_is_told_and_changes_nothing() -> None:
    root, storage = stored(conversation(500, window=64))
    table = PageTable.open(root, storage.load)
    kept, stats = dict(storage), table.get_stats()
    storage.clear()
    with pytest.raises(LookupError, match="missing"):
        PageTable.open(root, storage.load)
    with pytest.raises(LookupError, match="missing"):
        evict(table, make_page_id(3), 900)
    assert (table.get_stats(), table.turn) == (stats, 499)
    storage.update({ref: data + b"." for ref, data in kept.items()})
    with pytest.raises(LookupError, match="damaged"):
        table.lookup(make_page_id(3))
    storage.update(kept)
    assert table == conversation(500, window=64)
