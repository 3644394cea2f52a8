"""The word vectors of the wheel: what they know, and that they are exact."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

pytest.importorskip("wordllama", reason="needs the extra [semantic]")

from proxy.memory.ids import Doc
from proxy.search.paths import PathIndexes, make_encoder
from proxy.search.static import StaticEncoder, static_encoder
from proxy.search.vectors import SCALE


def likeness(a: str, b: str) -> float:
    one, other = static_encoder().encode([a, b])
    return float(one.astype(int) @ other.astype(int)) / SCALE**2


def test_what_means_the_same_is_nearer_than_what_does_not() -> None:
    same = likeness("Our kitten is three months old", "What age does the cat have?")
    assert same > 2 * abs(likeness("The invoice is due on Friday", "What age does the cat have?")) > 0
    assert likeness("the same", "the same") == pytest.approx(1, abs=0.01)


def test_invariant_07_a_text_has_one_vector_whatever_it_is_encoded_with() -> None:
    rng = random.Random(3)
    texts = ["", "x", "naïve 雪 \ud800 text", *(" ".join(rng.choices("sea ice tram fox".split(), k=n)) for n in range(1, 40))]
    together = static_encoder().encode(texts)
    alone = [StaticEncoder.encode(static_encoder(), [text])[0] for text in texts]
    assert all((a == b).all() for a, b in zip(together, alone, strict=True))
    assert len(together[0]) == 0 and {len(vector) for vector in together[1:]} == {256}
    assert any((a != b).any() for a, b in pairwise(together[3:]))


def test_a_question_without_a_word_of_its_answer_finds_it() -> None:
    assert make_encoder("none") is make_encoder("upstream") is None
    talk = [f"We talked about the invoice number {n} of the supplier." for n in range(40)]
    talk[7] = "My kitten is three months now, and so playful!"
    docs = [Doc(i, 0, "user", "", text) for i, text in enumerate(talk)]

    def search(encoder: StaticEncoder | None) -> list[int]:
        indexes = PathIndexes(1000, encoder)
        ids = [b"%d" % i for i in range(len(docs))]
        found = indexes.search(ids, lambda a, b: docs[a:b], "What age has the cat?", 3, lambda p, q: False)
        return [hit.position for hit in found]

    assert search(None) == [] and search(make_encoder("static"))[0] == 7
