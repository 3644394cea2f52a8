"""What is shown of a page: every word that was asked for, at its place, within the tokens."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.passages import LEAST_TOKENS, MARK, find_passages, passage
from proxy.memory.words import STOP_WORDS
from proxy.search.terms import clean, tokenizer
from proxy.tokens import get_counter
from tests.examples import examples

count = get_counter("gpt-4o").text
_WORDS = st.sampled_from(
    "harbour harbours tide tides fee fees Berlin payment paying secret_key x1 3,5 2023-05-07 the of naïve café Straße"
    " Ключ ключи müde getX() {a:1} longwordwithoutanyspace"
    .split()
)  # fmt: skip
_JOINTS = st.sampled_from([" ", " ", " ", ". ", "\n", "\n\n", ", ", "; ", "\t"])
TEXTS = st.lists(st.tuples(_WORDS, _JOINTS), min_size=1, max_size=400).map(lambda said: "".join(w + j for w, j in said))
QUERIES = st.lists(st.lists(_WORDS, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=3)


def index_terms(text: str) -> set[str]:
    return set(tokenizer().terms(clean(text)))


def check_place(shown: str, text: str) -> None:
    """Parts of the text, in its order."""
    at = 0
    for part in shown.split(MARK):
        part = part.strip()
        at = text.index(part, at) + len(part)


@examples(45)
@given(TEXTS, QUERIES, st.integers(0, 300))
def test_every_asked_word_that_fits_is_shown_at_its_place_within_the_tokens(
    text: str, queries: list[str], max_tokens: int
) -> None:
    shown = passage(text, queries, max_tokens, count)
    assert count(shown) <= max_tokens
    assert shown == passage(text, queries, max_tokens, count)
    if count(text) <= max_tokens:
        assert shown == text
        return
    found = find_passages(text, queries, max_tokens, count)
    check_place(found, text)
    asked = set[str]()
    for query in queries:
        words = [w for w in query.replace("_", " ").split() if w.lower() not in STOP_WORDS]
        asked |= index_terms(" ".join(words or [query]))
    price: dict[str, int] = {}  # of each asked word, between two marks
    for word in text.replace("_", " ").split():
        for term in index_terms(word) & asked:
            price[term] = max(price.get(term, 0), count(word) + 3)
    if sum(price.values()) <= max_tokens:
        missing = set(price) - index_terms(found)
        assert not missing, f"{missing} are not in {found!r}"


@examples(30)
@given(st.text(st.characters(codec="utf-8"), max_size=400), st.text(max_size=60), st.integers(0, 80))
def test_any_text_and_query_give_passages_of_the_text(text: str, query: str, max_tokens: int) -> None:
    shown = passage(text, [query], max_tokens, count)
    assert count(shown) <= max_tokens
    if MARK not in text:
        check_place(find_passages(text, [query], max_tokens, count), text)


@examples(30)
@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(0, LEAST_TOKENS - 1))
def test_too_few_tokens_show_nothing(text: str, max_tokens: int) -> None:
    assert find_passages(text, [text], max_tokens, count) == ""


_random = random.Random(4)
FILLER = "The tide ran out and the crew waited for the pilot at the quay. " * 12
CODE = "".join(
    f"def berths_{k}(amount: float, days: int = {k}) -> float:\n    total = amount * {k} + days\n    return total\n\n"
    for k in range(40)
)
TABLE = "| town | berths | share |\n|---|---|---|\n" + "".join(
    f"| Town{k} | {k * 7 + 100} | {k},{k % 7} % |\n" for k in range(80)
)
OBJECT = {f"dock_{k}": {"owner": f"owner {k}", "max_draft_m": k / 4, "notes": "none yet"} for k in range(60)}
LOG = "".join(f"2026-03-{k % 28 + 1:02d} 12:00:{k % 60:02d} INFO worker {k} took job {k * 31}\n" for k in range(120))
THAI = "เรือออกจากท่าในตอนเช้าและกลับมาตอนเย็นทุกวัน" * 12
CASES = {
    "an identifier in code": (CODE + 'SECRET_BERTHS = "berths-4711"\n' + CODE, "SECRET_BERTHS", ['SECRET_BERTHS = "berths-4711"']),
    "a number in a table": (TABLE, "which town has 443 berths", ["| Town49 | 443 | 49,0 % |"]),
    "a key in pretty JSON": (json.dumps(OBJECT, indent=1).replace('dock_31"', 'dry_dock"'), "dry dock", ['"dry_dock": {', '"owner": "owner 31"']),
    "a key in compact JSON": (json.dumps(OBJECT).replace('dock_31"', 'dry_dock"'), "dry dock owner", ['"dry_dock": {"owner": "owner 31"']),
    "a line of a log": (LOG.replace("job 1705", "job 1705 failed: EPIPE"), "EPIPE failure", ["took job 1705 failed: EPIPE"]),
    "an inflected word in prose": (FILLER + "Mrs Ash agreed to the appraisal on Monday. " + FILLER, "appraising", ["Mrs Ash agreed to the appraisal on Monday."]),
    "words far from each other": (f"Ada keeps the ledger. {FILLER}{FILLER}The vault's code is 7719. {FILLER}", "Ada's vault", ["Ada keeps the ledger.", "The vault's code is 7719."]),
    "accents": (FILLER + "Le café de Zoë ferme à huit heures. " + FILLER, "cafe Zoe", ["Le café de Zoë ferme à huit heures."]),
    "Cyrillic": ("Корабль вышел из порта утром. " * 30 + "Пароль хранилища: липа-42. " + "Корабль вернулся. " * 30, "ПАРОЛЬ", ["Пароль хранилища: липа-42."]),
    "Japanese": ("船は朝に港を出た。" * 40 + "金庫の暗証番号は七七一九です。" + "船は夜に戻った。" * 40, "金庫の番号", ["金庫の暗証番号は七七一九です。"]),
    "Thai": (THAI + "รหัสตู้นิรภัยคือเจ็ดเจ็ดหนึ่งเก้า" + THAI, "รหัสตู้นิรภัย", ["รหัสตู้นิรภัย"]),
    "no line and no space": ("x" * 300 + "/" + "ab9f" * 300 + "/vaultkey/" + "cd" * 900, "vaultkey", ["vaultkey"]),
}  # fmt: skip


def test_passages_that_cost_more_together_than_by_themselves_are_few_looks_apart_from_what_fits() -> None:
    """What has to leave is found in a handful of looks, not one for each line."""
    looks: list[str] = []

    def dear(text: str) -> int:
        """A line's end costs as much as its words."""
        looks.append(text)
        return len(text.split()) + 9 * text.count("\n")

    text = "".join(f"berth {k} is free\n" for k in range(4_000))
    shown = find_passages(text, ["berth"], 4_000, dear)
    assert 3_980 < dear(shown) <= 4_000
    check_place(shown, text)
    assert 2 < sum(look.count("\n") > 2 for look in looks) < 20


@pytest.mark.parametrize("case", CASES)
def test_the_line_or_sentence_is_shown(case: str) -> None:
    text, query, wanted = CASES[case]
    shown = passage(text, [query], 128, count)
    assert count(shown) <= 128 and count(text) > 250
    check_place(shown, text)
    for part in wanted:
        assert part in shown
    less = passage(text, [query], 24, count)  # where not even the lines fit
    assert count(less) <= 24 and index_terms(less) & index_terms(query)


def test_the_first_query_counts_most_and_one_without_a_match_gives_an_extract() -> None:
    first, second = "The vault's code is 7719.", "Ada keeps the red ledger."
    text = f"{FILLER}{second} {FILLER}{first} {FILLER}"
    assert first in passage(text, ["vault code", "ledger"], 16, count)
    assert second in passage(text, ["red ledger", "vault"], 16, count)
    assert find_passages(text, ["zebra"], 64, count) == ""
    assert 0 < count(passage(text, ["zebra"], 64, count)) <= 64


def test_what_stands_beside_a_match_is_shown_before_anything_else() -> None:
    text = f"{FILLER}\nUser: Where is the vault?\nReply: Behind the third bookcase.\n{FILLER}"
    shown = passage(text, ["vault"], 40, count)
    assert "Where is the vault?\nReply: Behind the third bookcase." in shown


def test_time_is_linear_in_the_text() -> None:
    def seconds(times: int) -> float:
        text = (CODE + FILLER + LOG) * times
        began = time.process_time()
        find_passages(text, ["berths_7 total amount worker job 31 pilot quay"], 256, count)
        return time.process_time() - began

    seconds(1)
    small, large = min(seconds(2) for _ in range(3)), min(seconds(16) for _ in range(3))
    assert large < 24 * small
