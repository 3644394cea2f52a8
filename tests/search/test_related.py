"""Words that say about the same: what the table knows, and how it was made."""

from __future__ import annotations

import pytest

from proxy.search.related import related
from proxy.search.terms import idle_terms, tokenizer


def test_words_that_say_about_the_same_are_related_both_ways_by_their_stems() -> None:
    for one, other in (("dog", "pet"), ("job", "career"), ("doctor", "hospital"), ("trip", "travel")):
        a, b = tokenizer().terms(f"{one} {other}")
        assert b in related(a) and a in related(b)
    assert "dog" not in related("invoic") and related("dog") != related("invoic")


def test_a_word_that_is_not_in_the_table_or_says_nothing_has_none() -> None:
    assert related("xyzzy") == related("") == related("12") == []
    assert not any(related(term) for term in idle_terms())


def test_the_table_is_what_its_program_makes() -> None:
    pytest.importorskip("wordllama", reason="needs the extra [semantic]")
    from tests.bench.related import lines

    made = dict(line.split(" ", 1) for line in lines(every=400))
    assert len(made) >= 15
    assert {term: " ".join(related(term)) for term in made} == made
