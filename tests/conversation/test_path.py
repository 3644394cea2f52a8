"""Paths that are read where they are looked at: whole, in few steps, and whatever is lost of their index."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.records import Record, indexed, load_path, new_records
from proxy.conversation.tree import Node, Path
from tests.conversation.test_tree import IDENTITY, TENANT, many


class Store:
    """Records and blocks, and how many were read."""

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}
        self.blocks: dict[bytes, bytes] = {}
        self.reads = 0

    def record(self, record_id: bytes) -> Record | None:
        self.reads += 1
        return self.records.get(record_id)

    def block(self, owner: bytes, ref: bytes) -> bytes | None:
        self.reads += 1
        return self.blocks.get(ref)

    def grow(self, path: list[Node], messages: int, name: str = "m", echo: bytes = b"") -> list[Node]:
        """The path with so many messages more, stored in one turn each two."""
        while messages > 0:
            said = [{"role": role, "content": f"{name}{len(path)} {role}"} for role in ("user", "assistant")]
            parent = self.records[path[-1].id] if path else None
            path = [*IDENTITY.extend(TENANT, path, [(msgspec.json.encode(m), m) for m in said])]
            records, blocks = indexed(new_records(path, parent, {"echo": echo}), parent, self.record, self.block)
            self.records.update((record.id, record) for record in records)
            self.blocks.update(blocks)
            messages -= 2
        return path

    def load(self, path: list[Node]) -> Path:
        return load_path(self.records[path[-1].id], self.record, self.block, IDENTITY)


@pytest.fixture(scope="module")
def long() -> Iterator[tuple[Store, list[Node]]]:
    store = Store()
    yield store, store.grow([], 6000)


def test_a_path_comes_back_whole_wherever_it_is_looked_at(long: tuple[Store, list[Node]]) -> None:
    store, path = long
    assert list(store.load(path)) == path
    assert [store.load(path)[at] for at in range(0, len(path), 7)] == path[::7]
    assert store.load(path[:4002])[-4002] == path[0]


def test_a_look_at_any_place_takes_few_steps(long: tuple[Store, list[Node]]) -> None:
    store, path = long
    for at in (0, 1, 63, 2999, 5800, 5998):
        loaded, store.reads = store.load(path), 0
        assert loaded[at] == path[at]
        assert store.reads <= 64 // 2 + 8


def test_what_is_lost_of_the_index_is_found_along_the_records(long: tuple[Store, list[Node]]) -> None:
    whole, path = long
    store = Store()
    store.records = whole.records
    for kept in (2, 3):
        store.blocks = dict(list(whole.blocks.items())[::kept])
        assert [store.load(path)[at] for at in (5, 2048, 4100)] == [path[5], path[2048], path[4100]]
        longer = store.grow(path, 128)
        assert [store.load(longer)[at] for at in (5, 6001)] == [path[5], longer[6001]]


def test_a_missing_record_is_an_error_where_it_is_looked_at() -> None:
    store = Store()
    path = store.grow([], 300)
    del store.records[path[101].id]
    assert store.load(path)[200] == path[200]
    with pytest.raises(LookupError, match="missing"):
        store.load(path)[100]


def test_a_branch_shares_what_stands_before_it_and_nothing_else() -> None:
    store = Store()
    path = store.grow([], 400)
    other = store.grow(path[:202], 200, "other", echo=b"as the client says it")
    for branch, kept in ((path, path), (other, other)):
        assert [n.id for n in store.load(branch)] == [n.id for n in kept]
    raws = [n.raw for n in store.load(other)[:203]]
    assert raws[199] == path[199].raw and raws[201] == b"as the client says it"


@many
@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_a_path_behaves_as_the_list_that_it_stands_for(sizes: list[int], data: st.DataObject) -> None:
    numbers = iter(range(1000))

    def some(count: int) -> list[Node]:
        return [Node(b"%d" % next(numbers), b"", "user", b"") for _ in range(count)]  # type: ignore[arg-type]

    old = some(5)
    path, same = Path(old, 5, []), list(old)
    for size in sizes:
        end = data.draw(st.integers(0, len(same)))
        cut, more = path[:end], some(size)
        assert isinstance(cut, Path)
        path, same = cut.grown(more), [*same[:end], *more]
        assert list(path) == same and len(path) == len(same)
        start = data.draw(st.integers(-3, len(same)))
        assert list(path[start:]) == same[start:]
        assert not same or path[-1] == same[-1]
