"""Words as SQLite takes them; scripts without spaces; whose stop words count."""

from __future__ import annotations

import sqlite3
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.search.terms import TOKENIZER, clean, languages_of, spoken, tokenizer
from tests.examples import examples

SPACED = st.text(st.characters(max_codepoint=0x0DFF), max_size=60)


def by_sqlite(text: str) -> list[str]:
    db = sqlite3.connect(":memory:")
    db.execute(f"CREATE VIRTUAL TABLE t USING fts5(text, tokenize='{TOKENIZER}')")
    db.execute("CREATE VIRTUAL TABLE v USING fts5vocab('t', 'instance')")
    db.execute("INSERT INTO t VALUES (?)", (clean(text),))
    rows = db.execute("SELECT offset, CAST(term AS BLOB) FROM v").fetchall()
    db.close()
    return [term.decode("utf-8", "replace") for _, term in sorted(rows)]


@examples(45)
@given(SPACED)
def test_spaced_scripts_have_the_terms_that_sqlite_has(text: str) -> None:
    assert tokenizer().sequence(text) == by_sqlite(text)


def test_case_accents_and_endings_do_not_count() -> None:
    assert tokenizer().terms("Running Cafés, RUNS café's") == ["run", "cafe", "s"]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("吉他", ["吉他"]),
        ("猫", ["猫"]),
        ("买了一把 guitar", ["买了", "了一", "一把", "guitar"]),
        ("กีตาร์", ["กีต", "ตา", "าร์"]),  # what is written above a letter stays with it
    ],
)
def test_unspaced_scripts_are_cut_into_pairs_of_syllables(text: str, pairs: list[str]) -> None:
    assert tokenizer().sequence(text) == pairs


def test_a_conversations_languages_are_told_by_its_stop_words() -> None:
    def languages(*texts: str) -> tuple[str, ...]:
        known = languages_of()
        return spoken(Counter(name for text in texts for term in tokenizer().terms(text) for name in known.get(term, ())))

    assert languages("what is it that you said to me about the old house and the garden") == ()
    assert "de" in languages("das ist nicht das Haus, von dem ich dir gestern mit dem Auto erzählt habe")
    assert "es" in languages("esta es la casa de la que te hablé ayer cuando estaba en el coche con ella")
    assert languages() == ()
