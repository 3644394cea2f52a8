"""The indexes of many paths give what an index of one path alone gives."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.ids import Doc, Hit
from proxy.search.fts import PageIndex
from proxy.search.paths import PathIndexes
from tests.examples import examples

WORDS = "harbour violin ledger comet walnut glacier tram orchid copper lantern".split()
Path = tuple[int, ...]


def ids_of(path: Path) -> list[bytes]:
    """An id names all before it."""
    return [repr(path[: i + 1]).encode() for i in range(len(path))]


def doc(path: Path, position: int) -> Doc:
    rng = random.Random(path[position])
    return Doc(position, 0, "user", "", " ".join(rng.choices(WORDS, k=6)) + f" n{path[position]}")


def alone(path: Path, query: str) -> list[Hit]:
    index = PageIndex()
    index.extend(doc(path, i) for i in range(len(path)))
    hits = index.search(query, 5, lambda p, part: False)
    index.close()
    return hits


def search(indexes: PathIndexes, path: Path, query: str) -> list[Hit]:
    def docs(first: int, last: int) -> list[Doc]:
        return [doc(path, i) for i in range(first, last)]

    return indexes.search(ids_of(path), docs, query, 5, lambda p, part: False)


paths = st.lists(st.integers(0, 2), min_size=1, max_size=24).map(tuple)


@examples(12)
@given(st.lists(st.tuples(paths, st.sampled_from(WORDS)), min_size=1, max_size=8), st.integers(1, 60))
def test_invariant_06_no_branch_finds_or_feels_another(asked: list[tuple[Path, str]], limit: int) -> None:
    indexes = PathIndexes(limit)
    for number, (path, word) in enumerate(asked):
        assert 0 <= indexes.missing(ids_of(path)) <= len(path)
        assert search(indexes, path, word) == alone(path, word)
        assert indexes.missing(ids_of(path)) == 0
        if number == 3:
            indexes.clear()
    assert indexes.search([], lambda a, b: [], "x", 5, lambda p, part: False) == []


def test_invariant_10_the_pages_kept_are_bounded() -> None:
    indexes = PathIndexes(30)
    for root in range(20):
        path = tuple([root] * 20)
        search(indexes, path, "violin")
        kept = [b for branches in indexes._roots.values() for b in branches]
        assert sum(branch.weight for branch in kept) == indexes._pages and len(kept) == 1
    assert indexes.missing(ids_of(tuple([19] * 20))) == 0
    assert indexes.missing(ids_of(tuple([0] * 20))) == 20


def test_index_that_rests_is_packed_and_finds_the_same() -> None:
    indexes = PathIndexes(500)
    conversations = [tuple([root] * 20) for root in range(8)]
    for path in (*conversations, *conversations):
        assert search(indexes, (*path, 9), "violin") == alone((*path, 9), "violin")
        kept = [b for branches in indexes._roots.values() for b in branches]
        assert sum(branch.pages for branch in kept if branch.packed is None) <= 50
        assert sum(branch.weight for branch in kept) == indexes._pages


@examples(12)
@given(st.lists(st.tuples(paths, st.sampled_from(WORDS)), min_size=1, max_size=8), st.data())
def test_what_was_stored_of_an_index_gives_the_same(asked: list[tuple[Path, str]], data: st.DataObject) -> None:
    stored: dict[bytes, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.search.paths._PIECE", 4)
        patch.setattr("proxy.search.paths._FRESH", 2)
        patch.setattr("proxy.search.paths._LONG", 8)
        indexes = PathIndexes(10_000, get=stored.get)
        for path, word in asked:
            if data.draw(st.booleans()):
                indexes.clear()
            if stored and data.draw(st.booleans()):
                stored[data.draw(st.sampled_from(sorted(stored)))] = b"damaged"
            indexes.missing(ids_of(path))
            assert search(indexes, path, word) == alone(path, word)
            stored.update(indexes.due())
            assert indexes.missing(ids_of(path)) == 0


def test_a_restart_reads_no_text_of_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.search.paths._LONG", 1000)
    stored: dict[bytes, bytes] = {}
    path = tuple(number % 7 for number in range(1300))
    before = PathIndexes(10_000, get=stored.get)
    hits = search(before, path, "comet")
    stored.update(before.due())
    after, asked = PathIndexes(10_000, get=stored.get), list[int]()

    def docs(first: int, last: int) -> list[Doc]:
        asked.append(first)
        return [doc(path, i) for i in range(first, last)]

    ids = ids_of(path)
    assert after.search(ids, docs, "comet", 5, lambda p, part: False) == hits
    assert asked == [1024] and after.due() == [] and after.missing(ids) == 0
    assert after.missing(ids[:1290] + [b"another"] * 10) == 10


def test_many_threads_on_branches_of_one_conversation() -> None:
    indexes = PathIndexes(10_000)
    wrong: list[Path] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(15):
            path = tuple(rng.choices(range(3), k=rng.randint(1, 20)))
            if search(indexes, path, "comet") != alone(path, "comet"):
                wrong.append(path)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
