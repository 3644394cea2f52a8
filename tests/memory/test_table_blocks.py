import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.memory import CompressionLevel, MutationType, PageMutation, PageTable, StorageTier
from proxy.memory import table_blocks as module
from proxy.memory.pages import media_page_id, page_id
from proxy.memory.table_blocks import (
    MAX_CACHED_NODES,
    MissingBlockError,
    Root,
    TableBlocks,
    TreeRef,
    block_ref,
    decode_leaf,
    encode_leaf,
    leaf_number,
)
from tests.memory.strategies import histories


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
        table.register_id(page_id(position), 100, position, tier=tier)
    return table


@settings(max_examples=50, deadline=None)
@given(histories())
def test_a_leaf_gives_back_its_entries(history: list[PageMutation]) -> None:
    entries = list(PageTable().replay(history))
    assert decode_leaf(encode_leaf(reversed(entries))) == entries


@settings(max_examples=50, deadline=None)
@given(histories(), st.lists(st.integers(0, 60), max_size=4))
def test_invariant_07_the_root_says_what_is_in_the_table_and_not_when_it_was_written(
    history: list[PageMutation], stops: list[int]
) -> None:
    storage = Storage()
    table = PageTable(load=storage.load)
    done = 0
    for stop in [*sorted(stops), len(history)]:
        table.replay(history[done:stop])
        done = max(done, min(stop, len(history)))
        root, blocks = table.checkpoint()
        storage.update(blocks)
        table.shed()
    assert root == PageTable().replay(history).checkpoint().root
    assert PageTable.open(root, storage.load) == PageTable().replay(history)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.integers(0, 70) | st.integers(0, 300_000) | st.just((1 << 24) - 1),
            st.booleans(),
            max_size=6,
        ),
        max_size=5,
    )
)
@example([{0: True}, {262_144: False}])  # grows by three at once
def test_the_tree_is_a_map_of_its_leaves(rounds: list[dict[int, bool]]) -> None:
    storage = Storage()
    tree, now = module._Tree(TreeRef(), lambda ref: storage[ref]), {}
    for number, leaves in enumerate(rounds):
        changes = {
            leaf: (block_ref(b"%d" % (leaf + number)), inside) for leaf, inside in leaves.items()
        }
        now |= changes
        tree.state = tree.put(changes, storage)
        fresh = module._Tree(tree.state, lambda ref: storage[ref])
        assert list(fresh.leaves(resident_only=False)) == sorted(now)
        assert list(fresh.leaves(resident_only=True)) == sorted(i for i in now if now[i][1])
        for leaf in (*now, 1, 64, 4095, 500_000, 1 << 30):
            assert fresh.find(leaf) == now.get(leaf, (None, False))[0]
    once = module._Tree(TreeRef(), lambda ref: storage[ref])
    once.state = once.put(now, {})
    assert once.state == tree.state


def test_a_small_change_writes_little_and_shares_the_rest() -> None:
    storage = Storage()
    table = conversation(10_000, window=300)
    first = table.checkpoint()
    storage.update(first.blocks)
    assert (len(first.blocks), len(first.root) < 150) == (157 + 3 + 1, True)
    for position in range(9_990, 10_010):
        if position >= 10_000:
            table.register_id(page_id(position), 100, position, tier=StorageTier.L0)
        else:
            table.evict(page_id(position), 10_000)
    second = table.checkpoint()
    assert len(second.blocks) == 1 + 2  # one leaf of 64 positions and the nodes above it
    assert sum(map(len, second.blocks.values())) < 6_000
    assert table.checkpoint() == (second.root, {})


def test_opening_reads_the_window_and_looking_up_one_leaf() -> None:
    storage = Storage()
    root, blocks = conversation(20_000, window=100).checkpoint()
    storage.update(blocks)
    table = PageTable.open(root, storage.load)
    assert len(table.resident()) == 100 == table.get_stats().pages_by_tier[StorageTier.L0]
    assert storage.reads <= 6
    assert (len(table), table.in_ram <= 3 * 64) == (20_000, True)
    before = storage.reads
    entry = table.lookup(page_id(7_000))
    assert entry is not None and entry.position == 7_000
    assert storage.reads - before <= 3  # two nodes and a leaf
    assert table.lookup(page_id(7_001)) is not None and table.lookup(page_id(20_000)) is None
    assert storage.reads - before <= 3
    assert table.get_stats() == conversation(20_000, window=100).get_stats()


def test_pages_without_a_position_are_found_again() -> None:
    storage = Storage()
    table = PageTable(load=storage.load)
    names = [
        *(f"claim_{n:04d}" for n in range(300)),
        "system_prompt",
        "msg_0000",
        "x" * 300,
        "7" * 40,
    ]
    names += ["ünïcode", "summary_seg_03", media_page_id(3, 1, "img")]
    for name in names:
        table.register_id(name, 5, turn=1)
    root, blocks = table.checkpoint()
    storage.update(blocks)
    opened = PageTable.open(root, storage.load)
    assert opened.in_ram == 0
    assert all(opened.lookup(name) == table.lookup(name) != None for name in names)  # noqa: E711
    opened.fault_in("claim_0123", turn=2)
    assert len(opened.checkpoint().blocks) == 1 + 4  # a leaf and the nodes above


def test_positions_share_a_leaf_by_64() -> None:
    assert [leaf_number(page_id(p), p) for p in (0, 63, 64, 4096)] == [0, 0, 1, 64]
    assert leaf_number("claim_0007", -1) == leaf_number("claim_0063", -1) == -1
    assert leaf_number("claim_0064", -1) == -2


def test_invariant_06_branches_of_one_root_see_nothing_of_each_other() -> None:
    storage = Storage()
    root, blocks = conversation(200).checkpoint()
    storage.update(blocks)
    one, two = PageTable.open(root, storage.load), PageTable.open(root, storage.load)
    one.fault_in(page_id(5), turn=300)
    one.register_id(page_id(200), 1, turn=300)
    roots = {}
    for name, table in (("one", one), ("two", two)):
        made = table.checkpoint()
        storage.update(made.blocks)
        table.shed()
        roots[name] = made.root
    assert roots["two"] == root != roots["one"]
    untouched = two.lookup(page_id(5))
    assert untouched is not None and untouched.fault_count == 0
    assert page_id(200) in one and page_id(200) not in two
    assert two == conversation(200)


def test_a_missing_or_damaged_block_is_told_and_changes_nothing() -> None:
    storage = Storage()
    root, blocks = conversation(500, window=64).checkpoint()
    storage.update(blocks)
    table = PageTable.open(root, storage.load)
    kept = dict(storage)
    storage.clear()
    stats = table.get_stats()
    with pytest.raises(LookupError, match="not in storage"):
        table.lookup(page_id(3))
    with pytest.raises(MissingBlockError, match="not in storage"):
        table.evict(page_id(3), 900)
    assert (table.get_stats(), table.turn) == (stats, 499)
    storage.update({ref: data + b"." for ref, data in kept.items()})
    with pytest.raises(MissingBlockError, match="damaged"):
        table.lookup(page_id(3))
    storage.update(kept)
    assert table.lookup(page_id(3)) is not None
    assert table == conversation(500, window=64)


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x90", b"\x92\x01\x02", b"\x91\x09", b"junk"])
def test_bytes_that_are_no_root_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="root record"):
        Root.decode(data)


def test_invariant_10_the_cache_of_nodes_is_bounded() -> None:
    storage = Storage()
    writer = TableBlocks(TreeRef(), TreeRef(), storage.load)
    numbers = [n * 64 for n in range(MAX_CACHED_NODES + 100)]
    storage.update(writer.write({n: [] for n in numbers}))
    reader = TableBlocks(*writer.refs, storage.load)
    assert list(reader.leaves()) == numbers
    for tree in (writer._messages, reader._messages):
        assert len(tree._nodes) <= MAX_CACHED_NODES


def test_what_cannot_be_read_back_is_not_shed() -> None:
    table = conversation(100)
    table.checkpoint()
    assert (table.shed(), table.in_ram) == (0, 100)


def test_shedding_keeps_the_window_and_what_changed() -> None:
    storage = Storage()
    table = PageTable(load=storage.load)
    for position in range(100):
        tier = StorageTier.L0 if position >= 90 else StorageTier.L2
        table.register_id(page_id(position), 10, 1, tier=tier)
    assert table.shed() == 0  # nothing of it is stored
    storage.update(table.checkpoint().blocks)
    table.apply(PageMutation(MutationType.ACCESS, page_id(7), 2))
    assert table.shed(max_entries=50) == 50
    assert table.shed(keep=[page_id(80), page_id(3)]) == 50 - 12
    assert (table.in_ram, table.sheds) == (12, 2)
    kept = {e.page_id for e in table.resident()} | {page_id(7), page_id(80)}
    assert set(table._entries) == kept
    assert table.map(page_id(8), 3, CompressionLevel.FULL).access_count == 1
    seven = table.lookup(page_id(7))
    assert seven is not None and seven.access_count == 1
