"""Words as the index matches them: its own tokenizer is the judge."""

from __future__ import annotations

import unicodedata
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.stems import RUN, WORD, folded, stem
from proxy.search.terms import tokenizer
from tests.examples import examples

ENDINGS = (
    "s es ed ing eed ies y ational tional enci anci izer logi bli alli entli eli ousli ization ation ator alism iveness"
    " fulness ousness aliti iviti biliti icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement"
    " ment ent ion sion ou ism ate iti ous ive ize e ll ate ble"
).split()
STARTS = "a sky hop trou condi sens pon yes".split()


def test_every_english_ending_is_taken_off_as_the_index_does() -> None:
    words = sorted({start + one + two for start, one, two in product(STARTS, ["", *ENDINGS], ["", *ENDINGS])})
    found = tokenizer().sequence(" ".join(words))
    assert len(words) > 15_000
    assert [(w, t) for w, t in zip(words, found, strict=True) if stem(w) != t] == []
    assert [word for word in words if not word.startswith(stem(word)[:-1])] == []  # what a pattern looks for


@examples(60)
@given(st.text(st.sampled_from("aeiouybcdfglmnstzé1İß"), min_size=1, max_size=70))
def test_any_word_is_stemmed_as_the_index_does(word: str) -> None:
    ours = [stem(w) for w in WORD.findall(folded(word))]
    if "İ" not in word:  # two characters in lower case: here it stays one
        assert ours == tokenizer().sequence(word)


@examples(60)
@given(st.text())
def test_folding_keeps_every_characters_place(text: str) -> None:
    low = folded(text)
    assert len(low) == len(text)
    for was, now in zip(text, low, strict=True):
        assert now in (was, was.lower()) or unicodedata.normalize("NFKD", was)[0].lower() == now


def test_scripts_without_spaces_are_runs() -> None:
    assert [m.group() for m in RUN.finditer("in 東京タワー and ภาษาไทย, 서울 too")] == ["東京タワー", "ภาษาไทย", "서울"]
    assert WORD.findall("पानी की बूँद") == ["पानी", "की", "बूँद"]
