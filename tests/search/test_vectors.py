"""Pages by meaning, with an encoder that knows five things: exact, by neighbours, late vectors, branches."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest

np = pytest.importorskip("numpy", reason="needs the extra [semantic]")

from proxy.memory.ids import Doc, Hit  # noqa: E402
from proxy.search.paths import PathIndexes  # noqa: E402
from proxy.search.vectors import (  # noqa: E402
    NO_VECTOR,
    SCALE,
    WEIGHTS,
    Vector,
    VectorIndex,
    page_text,
    vector_of,
    whole,
)

THINGS = ("cat kitten feline", "boat ship vessel wherry", "bread loaf toast", "snow frost ice", "song tune melody")


class Topics:
    """A number for each thing that a text speaks of, whatever word it uses; `unknown` have no vector yet."""

    def __init__(self, unknown: Sequence[str] = ()) -> None:
        self.version = b"1"
        self.unknown = set(unknown)
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> list[Vector | None]:
        self.asked += texts
        return [None if text in self.unknown else self._one(text) for text in texts]

    def _one(self, text: str) -> Vector:
        words = re.findall(r"\w+", text.lower())
        return whole([sum(word in thing.split() for word in words) for thing in THINGS])


def docs_of(texts: Sequence[str]) -> list[Doc]:
    return [Doc(position, 0, "user", "", text) for position, text in enumerate(texts)]


def index_of(texts: Sequence[str], encoder: Topics) -> VectorIndex:
    index = VectorIndex()
    index.extend(docs_of(texts), len(texts), encoder)
    return index


def as_it_is(scores: dict[int, float]) -> dict[int, float]:
    return scores


def near(index: VectorIndex, query: str) -> list[int]:
    return [hit.position for hit in index.nearest(Topics()._one(query), as_it_is)]


def nothing(position: int, part: int) -> bool:
    return False


def test_a_page_is_found_in_other_words_and_its_neighbours_behind_it() -> None:
    texts = ["plain"] * 40
    texts[12] = "A kitten"
    found = index_of(texts, Topics()).nearest(Topics()._one("feline?"), as_it_is)
    assert [hit.position for hit in found] == [12, 13, 11, 14, 10, 15, 9]
    assert [round(hit.score - found[-1].score) for hit in found[::2]] == [
        SCALE**2 * (WEIGHTS[step] - WEIGHTS[3]) for step in range(4)
    ]
    assert found[0].evidence == 0.0
    assert near(index_of(texts, Topics()), "nothing of it") == []


def test_invariant_07_a_score_is_exact_in_whatever_order_it_is_added() -> None:
    rng = random.Random(1)
    rows = [whole([rng.gauss(0, 1) for _ in range(1536)]) for _ in range(50)]
    matrix = np.stack(rows).astype(np.float32)
    exact = np.stack(rows).astype(np.int64) @ rows[0].astype(np.int64)
    assert (matrix @ matrix[0] == exact).all() and (matrix[:, ::-1] @ matrix[0, ::-1] == exact).all()
    assert abs(exact[0] / SCALE**2 - 1) < 0.01 and (vector_of(rows[3].tobytes()) == rows[3]).all()
    assert len(whole([0.0, 0.0])) == len(whole([float("nan"), 1])) == len(vector_of(b"odd")) == 0


def test_who_speaks_is_not_encoded_and_neither_is_the_end_of_a_long_page() -> None:
    assert page_text(Doc(0, 0, "user", "Ann", "Ann: a ship")) == "a ship"
    assert page_text(Doc(0, 0, "user", "", "Ann: a ship")) == "a ship"
    assert page_text(Doc(0, 0, "user", "", "here it is: a ship")) == "here it is: a ship"
    assert len(page_text(Doc(0, 0, "user", "", "x" * 5000))) == 1024


def test_a_vector_that_was_late_counts_from_then_on_as_if_it_had_been_there() -> None:
    texts = [f"{thing.split()[0]} {number}" for number in range(4) for thing in THINGS]
    late = Topics(unknown=texts[3:6])
    index = index_of(texts, late)
    assert near(index, "loaf")[0] == 17 and near(index, "ice")[0] == 18  # 3 is not known yet
    assert index.due(late) == len(texts)  # nothing arrived
    late.unknown, late.version, late.asked = {texts[5]}, b"2", []
    assert index.due(late) == 3
    index.extend(docs_of(texts)[3:], len(texts), late)
    assert late.asked == texts[3:]
    late.unknown, late.version = set(), b"3"
    assert index.due(late) == 5
    index.extend(docs_of(texts)[5:], len(texts), late)
    whole_index = index_of(texts, Topics())
    for word in ("cat", "ship", "toast", "frost", "tune"):
        query = Topics()._one(word)
        assert index.nearest(query, as_it_is) == whole_index.nearest(query, as_it_is)
    late.version = b"4"
    assert index.due(late) == len(texts)


def test_an_index_that_went_back_is_as_one_that_never_went_on() -> None:
    texts = ["cat", "ship", "bread"] * 40
    index = index_of(texts, Topics())
    index.truncate(50)
    assert index.messages == 50
    index.extend([Doc(50, 0, "user", "", "a loaf")], 51, Topics())
    other = index_of([*texts[:50], "a loaf"], Topics())
    query = Topics()._one("toast")
    assert index.nearest(query, as_it_is) == other.nearest(query, as_it_is)
    assert index.weight >= 1 and VectorIndex().weight == 0
    assert VectorIndex().nearest(query, as_it_is) == index.nearest(NO_VECTOR, as_it_is) == []


class Talk:
    """A path through `PathIndexes` with that encoder."""

    def __init__(self, texts: Sequence[str], speakers: Sequence[str] = ("",)) -> None:
        self.docs = [
            Doc(i, 0, "user", speakers[i % len(speakers)], text) for i, text in enumerate(texts)
        ]
        self.ids = [repr(texts[: i + 1]).encode() for i in range(len(texts))]

    def search(self, indexes: PathIndexes, query: str, limit: int = 3) -> list[Hit]:
        return indexes.search(self.ids, lambda a, b: self.docs[a:b], query, limit, nothing)


def test_a_path_is_searched_by_words_and_by_meaning_at_once() -> None:
    talk = Talk([*["We walked along the harbour"] * 30, "The kitten sleeps", *["All is well"] * 9])
    by_words, both = PathIndexes(1000), PathIndexes(1000, Topics())
    assert talk.search(by_words, "Is the feline here?") == []
    (found, *_) = talk.search(both, "Is the feline here?")
    assert found.position == 30 and found.evidence == 0.0
    (found, *_) = talk.search(both, "Which harbour?")
    assert found == talk.search(by_words, "Which harbour?")[0] and found.evidence > 0
    assert indexes_weight(both) == indexes_weight(by_words) + 2  # 64 rows of five numbers


def indexes_weight(indexes: PathIndexes) -> int:
    (branches,) = indexes._roots.values()
    assert sum(branch.weight for branch in branches) == indexes._pages
    return indexes._pages


def test_a_speaker_who_is_named_is_preferred_and_not_encoded() -> None:
    talk = Talk(["A song about boats", "A melody of mine"] * 10, ["Ann", "Ben"])
    encoder = Topics()
    indexes = PathIndexes(1000, encoder)
    found = talk.search(indexes, "Which tune does Ben's band play?", limit=10)
    assert "Which tune does band play?" in encoder.asked
    assert {hit.position % 2 for hit in found[:5]} == {1}
    assert indexes.asked(talk.ids, lambda a, b: talk.docs[a:b], "Ann sings?") == ["sings?"]


def test_invariant_06_no_branch_finds_or_feels_another_by_meaning() -> None:
    rng = random.Random(7)
    words = [word for thing in THINGS for word in thing.split()]
    indexes = PathIndexes(400, Topics())
    for _ in range(40):
        talk = Talk([rng.choice(words) for _ in range(rng.randint(1, 24))])
        query = rng.choice(words)
        alone = PathIndexes(10_000, Topics())
        assert talk.search(indexes, query) == talk.search(alone, query)


def test_vectors_of_elsewhere_are_read_for_one_search_and_fused_in_the_next() -> None:
    texts = ["Rain"] * 10 + ["A wherry"] + ["Rain"] * 10
    talk, indexes, stored = Talk(texts), PathIndexes(1000), Topics(unknown=["A wherry"])

    def docs(first: int, last: int) -> list[Doc]:
        return talk.docs[first:last]

    query = Topics()._one("boat")
    assert talk.search(indexes, "boat") == []
    assert indexes.nearest(talk.ids, docs, "boat", [query], stored) == []
    stored.unknown, stored.version = set(), b"2"
    found = indexes.nearest(talk.ids, docs, "boat", [query], stored)
    assert found[0].position == 10
    fused = indexes.search(talk.ids, docs, "boat", 2, lambda position, part: position == 10, near=found)
    assert [hit.position for hit in fused] == [11, 9]
