"""What is a claim, what is none, and which claim takes the place of which."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.claims import (
    CLAIMS_PER_PAGE,
    MAX_SOURCES,
    Claim,
    claim_of,
    claim_page,
    claim_text,
    extract_claims,
    fold_claims,
    most_important,
    place_claims,
    restated,
    supersede,
)
from proxy.memory.models import PageType
from proxy.memory.sentences import SegmentDoc, clauses, sentences, spoken


def claims(*texts: str, role: str = "user", name: str = "") -> list[Claim]:
    return extract_claims([SegmentDoc(f"msg_{i:04d}", role, name, t) for i, t in enumerate(texts, 1)])


def one(text: str, role: str = "user", name: str = "") -> Claim:
    (claim,) = claims(text, role=role, name=name)
    return claim


@pytest.mark.parametrize(
    ("text", "kind", "subject", "value"),
    [
        ("After a long talk, we decided to use Postgres as the database.", "decision", ("database",), "postgres"),
        ("We've decided to use PostgreSQL.", "decision", ("database",), "postgres"),
        ("Let's go with option 2.", "decision", ("use", "option"), "2"),
        ("Agreed: the launch is on May 5.", "decision", ("launch",), "may 5"),
        ("OK, we'll use Redis for caching.", "decision", ("caching",), "redis"),
        ("We decided to move the launch to June 9.", "decision", ("launch",), "june 9"),
        ("I've decided to drop the mobile app.", "decision", ("user", "drop", "mobile", "app"), ""),
        ("My name is Ines.", "fact", ("user", "name"), "ines"),
        ("I'm Ines, a nurse from Porto.", "fact", ("user", "name"), "ines"),
        ("I live in Porto.", "fact", ("user", "home"), "porto"),
        ("We moved to Lyon last year.", "fact", ("user", "home"), "lyon last year"),
        ("I work as a nurse.", "fact", ("user", "job"), "nurse"),
        ("I'm allergic to peanuts.", "fact", ("user", "allergic", "peanut"), ""),
        ("I'm vegan.", "fact", ("user", "is", "vegan"), ""),
        ("Our deadline is March 3rd.", "fact", ("deadline",), "march 3"),
        ("The deadline has been moved to March 10.", "fact", ("deadline",), "march 10"),
        ("The port is 8443.", "fact", ("port",), "8443"),
        ("The budget for the party is $1,200.", "fact", ("budget", "party"), "1200"),
        ("We have a deadline of May 4.", "fact", ("deadline",), "may 4"),
        ("I'm using Flask v2.3.1 here, can you help?", "fact", ("use", "flask"), "2.3.1"),
        ("I adopted a puppy.", "fact", ("user", "event", "adopted", "puppy"), ""),
        ("Yesterday I went to a concert in Turin.", "fact", ("user", "event", "went to", "concert", "turin"), ""),
        ("My sister works at the Lisbon zoo.", "fact", ("user", "sister", "works", "lisbon", "zoo"), ""),
        ("I'm building a tide table app.", "fact", ("user", "doing", "building", "tide", "table", "app"), ""),
        ("I'd prefer aisle seats.", "preference", ("user", "prefer", "seat"), "aisle"),
        ("I prefer tea to coffee.", "preference", ("user", "prefer", "coffee", "tea"), "tea"),
        ("I'd rather travel by train.", "preference", ("user", "prefer", "travel", "train"), ""),
        ("My favourite painter is Klee.", "preference", ("user", "favorite", "painter"), "klee"),
        ("I really love long hikes.", "preference", ("user", "like", "long", "hike"), ""),
        ("Please always answer in French.", "preference", ("rule", "answer", "french"), ""),
    ],
)
def test_what_is_stated_is_a_claim(text: str, kind: str, subject: tuple[str, ...], value: str) -> None:
    claim = one(text)
    assert (claim.kind, claim.subject, claim.value, claim.polarity) == (kind, subject, value, True)
    assert claim.provenance == ("msg_0001",) and claim.text.startswith("User: ")
    assert claim.text.removeprefix("User: ") in text


@pytest.mark.parametrize(
    "text",
    [
        "Should we use Postgres?",
        "If we decided to use Postgres, what would break?",
        "Maybe we'll use Postgres for the orders.",
        "I might move to Porto next year.",
        "I'm not sure our deadline is March 3.",
        "We haven't decided to use Postgres.",
        "Suppose the port is 8443.",
        "Can you tell me whether the budget is $500?",
        "She said we decided to use Postgres.",
        'The page says "our deadline is March 3".',
        "> our deadline is March 3",
        "```\nthe port is 8443\nI live in Porto.\n```",
        "```\nI live in Porto, and the block never ends.",
        "| the port is 8443 |",
        "# Our deadline is March 3",
        "I decided to keep it.",
        "I bought it yesterday.",
        "I love that!",
        "I love the colours and the light.",
        "I started a few days ago.",
        "My code is not working.",
        "Our server is down.",
        "I'm a bit tired today.",
        "Never mind.",
        "[image: my name is Ines]",
        "I wish I lived in Porto.",
        "",
    ],
)
def test_what_is_asked_supposed_quoted_or_vague_is_none(text: str) -> None:
    assert claims(text) == []


def test_an_assistants_suggestion_is_no_decision_but_its_confirmation_is() -> None:
    for text in ("Let's go with Postgres.", "We'll use Postgres.", "I prefer tea to coffee.", "I live in Porto."):
        assert claims(text, role="assistant") == []
    assert one("You've decided to use Postgres.", role="assistant").subject == ("database",)
    done = one("Your reservation AB12CD has been successfully cancelled.", role="assistant")
    assert (done.subject, done.value) == (("status", "reservation", "ab12cd"), "cancelled")
    assert claims("My name is Ines.", role="tool") == []


def test_in_a_chat_of_two_people_both_state_facts() -> None:
    talk = ["Ada: I live in Porto.", "Bo: Nice! I live in Lyon.", "Ada: How is it?", "Bo: Always here for you!"]
    docs = [SegmentDoc(f"msg_{i}", ("user", "assistant")[i % 2], "", t) for i, t in enumerate(talk)]
    assert [c.text for c in extract_claims(docs)] == ["Ada: I live in Porto", "Bo: I live in Lyon"]
    assert [c.subject for c in extract_claims(docs)] == [("ada", "home"), ("bo", "home")]


def test_a_label_before_a_colon_is_no_speaker() -> None:
    docs = [SegmentDoc("msg_0001", "user", "", "Note: x y z."), SegmentDoc("msg_0002", "user", "", "Note: a b.")]
    assert {who.label for who in spoken(docs)} == {"User"}
    assert spoken([SegmentDoc("msg_0001", "assistant", "planner", "Hi")])[0] == ("planner", True, 0, True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Our deadline is March 3.", "The deadline has been moved to March 10."),
        ("The port is 8443.", "The port is now 9000."),
        ("We decided to use Postgres.", "We switched from Postgres to MySQL."),
        ("I live in Porto.", "I moved to Lyon."),
        ("I prefer tea to coffee.", "I prefer coffee to tea."),
        ("I like cold showers.", "I don't like cold showers."),
        ("We decided to rewrite the parser.", "We decided not to rewrite the parser."),
        ("Let's go with option 2.", "I'll go with option 3."),
        ("I'd prefer aisle seats.", "I'd prefer window seats."),
    ],
)
def test_a_later_contradiction_supersedes(before: str, after: str) -> None:
    first, second = claims(before, after)
    known = Claim(**{**_fields(first), "claim_id": "claim_0007"})
    assert supersede([known], second) == "claim_0007" and restated([known], second) is None
    taken = Claim(**{**_fields(known), "superseded_by": "claim_0008"})
    assert supersede([taken], second) is None, "what was superseded already is not superseded again"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Our deadline is March 3.", "The deadline is Friday March 3rd."),
        ("I'm using Bootstrap 5.3.0 for styling.", "I'm using Bootstrap v5.3.0 for the grid."),
        ("My name is Ines.", "Call me Ines please."),
    ],
)
def test_a_restatement_merges(before: str, after: str) -> None:
    claim = one_of(before, after)
    assert claim.provenance == ("msg_0001", "msg_0002")
    known = Claim(**{**_fields(claim), "claim_id": "claim_0001"})
    assert restated([known], claim) == "claim_0001" and supersede([known], claim) is None


def one_of(*texts: str) -> Claim:
    (claim,) = claims(*texts)
    return claim


def _fields(claim: Claim) -> dict[str, object]:
    return {name: getattr(claim, name) for name in claim.__struct_fields__}


@pytest.mark.parametrize(
    ("one_text", "other"),
    [
        ("The deadline for the report is March 3.", "The deadline for the launch is May 5."),
        ("We have a deadline of March 3 to send the report.", "We have a deadline of May 5 to hire a cook."),
        ("My reservation number is AB12.", "My reservation number is CD34."),
        ("I'm allergic to peanuts.", "I'm allergic to cats."),
        ("The port is 8443.", "The budget is $8,443."),
    ],
)
def test_different_subjects_never_supersede(one_text: str, other: str) -> None:
    first, second = claims(one_text, other)
    assert supersede([first], second) is None and restated([first], second) is None


def _claim(i: int, importance: float = 0.5, by: str = "", subject: str = "") -> Claim:
    return Claim(
        f"c{i}", "fact", (subject or f"s{i}",), f"v{i}", importance=importance,
        claim_id=f"claim_{i:04d}", superseded_by=by,
    )  # fmt: skip


def test_placing_numbers_merges_and_supersedes() -> None:
    existing = [_claim(1, subject="a"), _claim(2, subject="b")]
    found = [
        Claim("x", "fact", ("a",), "v9", provenance=("msg_0005",)),
        Claim("y", "fact", ("b",), "v2", provenance=("msg_0006",)),
        Claim("z", "fact", ("a",), "v10", provenance=("msg_0007",)),
    ]
    placed = place_claims(existing, found, 3)
    assert [c.claim_id for c in placed.new] == ["claim_0003", "claim_0004"]
    assert placed.superseded == [("claim_0001", "claim_0003"), ("claim_0003", "claim_0004")]
    assert placed.merged == [("claim_0002", "msg_0006")]
    after = {c.claim_id: c for c in fold_claims(existing, placed.new, placed.superseded, placed.merged)}
    assert after["claim_0001"].superseded_by == "claim_0003" and not after["claim_0004"].superseded_by
    assert after["claim_0002"].provenance == ("msg_0006",)


def test_invariant_10_claims_are_bounded() -> None:
    kept = fold_claims([_claim(1, by="claim_0003"), _claim(2, 0.3), _claim(3, 0.9), _claim(4, 0.9)], [], [], [], 2)
    assert [c.claim_id for c in kept] == ["claim_0003", "claim_0004"]
    assert [c.text for c in most_important([_claim(1, 0.9), _claim(2), _claim(3)], 2)] == ["c1", "c3"]
    many = " ".join(f"I visited Town{i} in 19{i:02d}." for i in range(30))
    assert len(claims(many)) == CLAIMS_PER_PAGE
    assert len(one_of(*["I live in Porto."] * 40).provenance) == MAX_SOURCES


def test_a_claim_page_says_when_it_was_superseded_and_reads_back() -> None:
    claim = Claim(**{**_fields(one("Our deadline is March 3.")), "claim_id": "claim_0007"})
    page = claim_page(claim, 9, turn=4)
    assert (page.page_id, page.page_type, page.size_tokens) == ("claim_0007", PageType.CLAIM, 9)
    assert claim_text(page, None) == "User: Our deadline is March 3"
    assert claim_text(page, "claim_0009") == "(superseded by claim_0009) User: Our deadline is March 3"
    assert claim_of(page) == claim
    assert claim_of(page.model_copy(update={"page_type": PageType.SUMMARY})) is None


def test_a_long_sentence_is_ended_at_a_natural_place() -> None:
    claim = one("I moved to Porto, " + "where the houses are blue and the hills are steep, " * 6)
    assert claim.text == "User: I moved to Porto"
    long = one("I prefer trains with big windows and a quiet coach " + "and a table " * 20)
    assert len(long.text) < 170 and long.text.endswith(("table", "coach"))


_WORDS = st.sampled_from(
    "I we my our the let's decided to use Postgres for is are March 3 , ; . ? ! if and but not prefer love "
    "deadline bought ``` \n [ ] ( ) \" ' ’ İ ß \ud800 \x00 msg_0001 Ada: — -> 2.3.1 $5,000 please always".split(" ")
)


@given(st.lists(st.one_of(_WORDS, st.text(max_size=8)), max_size=60), st.sampled_from(["user", "assistant", "tool"]))
def test_invariant_07_any_text_is_read_the_same_way_twice(words: list[str], role: str) -> None:
    text = " ".join(words)
    found = claims(text, role=role)
    assert found == claims(text, role=role)
    for claim in found:
        assert claim.subject and len(claim.text) <= 190 and claim.provenance == ("msg_0001",)


@given(st.text(alphabet="a .!?\n`[*,;—İ。", max_size=300))
def test_sentences_and_clauses_invent_nothing(text: str) -> None:
    for sentence in sentences(text):
        assert sentence.strip() == sentence and len(sentence) >= 8
        assert all(piece in sentence for piece in clauses(sentence))


@pytest.mark.parametrize(
    "unit", ["I ", "a, ", ". ", "and the a ", "```\n", "[", "\n", "- ", "we decided to use ", "İ ", "I'm a, so "]
)
def test_reading_is_linear(unit: str) -> None:
    def seconds(times: int) -> float:
        begun = time.process_time()
        claims((unit * times)[:30_000])
        return time.process_time() - begun

    assert seconds(30_000) < 0.5, "30,000 characters are read in milliseconds, whatever they are"
