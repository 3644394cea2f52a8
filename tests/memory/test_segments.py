"""What is kept of a segment, what its user marked, and both ways through what pages were made from."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.models import MemoryPage, PageType
from proxy.memory.segments import (
    CLAIM_TOKENS,
    CLAIMS_PER_SEGMENT,
    INDEX_TOKENS,
    Claim,
    ProvenanceGraph,
    claim_page,
    index_page,
    read_claims,
    summary_page,
)

SOURCES = ["msg_0004", "msg_0005", "msg_0009"]
STORY = [
    "The autumn regatta on Lake Orta will have 48 boats.",
    "Good! Who brings the boats to the lake?",
    "The harbour master Elio Ferri needs the list of 48 skippers two days before the regatta.",
]


def count(text: str) -> int:
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


def index(texts: list[str], number: int = 3) -> MemoryPage:
    return index_page(number, [f"msg_{n:04d}" for n in range(1, len(texts) + 1)], texts, count)


def test_index_says_what_a_segment_was_about_and_where_it_lies() -> None:
    page = index(STORY)
    assert (page.page_id, page.page_type) == ("index_seg_03", PageType.INDEX)
    assert page.text().startswith("seg 03 (msg_0001-msg_0003): ") and "regatta" in page.text()
    assert page.provenance == ["msg_0001", "msg_0003"]
    summary = summary_page(3, "A regatta.", ["msg_0001", "msg_0002"], count)
    assert (summary.page_id, summary.size_tokens) == ("summary_seg_03", 3)
    assert summary.provenance == ["msg_0001", "msg_0002"]


@given(st.lists(st.text(max_size=300), min_size=1, max_size=20))
def test_index_of_any_texts_is_short_and_the_same_again(texts: list[str]) -> None:
    page = index(texts)
    assert page == index(texts) and page.size_tokens == count(page.text()) <= INDEX_TOKENS


def test_index_of_a_long_segment_hears_all_of_it() -> None:
    assert "Zanzibar" in index([*["word " * 2_000] * 20, "Zanzibar Zanzibar Zanzibar Zanzibar"]).text()


ANSWER = """They planned the launch.
Two things are open.

```json
{"subject": "launch date", "text": "The launch is on April 9.", "source": "msg_0005"}
- {"subject": "database", "text": "They use\\n SQLite."},
{"subject": "half", "text":
{"text": "no subject"}
{"subject": "blank", "text": "  "}
```"""


def test_answer_lines_that_are_claims_are_no_summary() -> None:
    summary, claims = read_claims(ANSWER)
    assert claims == [
        Claim("launch date", "The launch is on April 9.", "msg_0005"),
        Claim("database", "They use SQLite."),
    ]
    assert summary.startswith("They planned the launch.\nTwo things are open.")
    assert "April" not in summary and "```" not in summary


def test_answer_of_claims_alone_is_its_own_summary() -> None:
    lines = [json.dumps({"subject": f"s{n}", "text": f"T{n}."}) for n in range(CLAIMS_PER_SEGMENT + 5)]
    summary, claims = read_claims("\n".join(lines))
    assert len(claims) == CLAIMS_PER_SEGMENT and summary.startswith("T0. T1. T2.")
    assert read_claims("Nothing new.") == ("Nothing new.", []) and read_claims("") == ("", [])


@given(st.text())
def test_answer_of_any_text_is_read(text: str) -> None:
    summary, claims = read_claims(text)
    assert len(claims) <= CLAIMS_PER_SEGMENT and isinstance(summary, str)


def test_claim_page_rests_on_the_page_that_it_names_or_on_the_whole_segment() -> None:
    page = claim_page(7, Claim("Launch  Date", "The launch is on April 9.", "msg_0005"), SOURCES, count)
    assert (page.page_id, page.page_type, page.provenance) == ("claim_0007", PageType.CLAIM, ["msg_0005"])
    assert page.metadata == {"subject": "launch date"}
    for source in ("", "msg_0001", "../x"):
        page = claim_page(8, Claim("x", "many words " * 200, source), SOURCES, count)
        assert page.provenance == ["msg_0004", "msg_0009"]
        assert page.size_tokens == count(page.text()) <= CLAIM_TOKENS
    assert claim_page(9, Claim("x", "y"), SOURCES[:1], count).provenance == ["msg_0004"]


# -- what rests on what


def page(page_id: str, *sources: str) -> MemoryPage:
    return MemoryPage(page_id=page_id, provenance=list(sources))


GRAPH = ProvenanceGraph(
    [page("summary_seg_01", "msg_0001", "msg_0002"), page("claim_0001", "msg_0002"),
     page("summary_seg_02", "summary_seg_01", "claim_0001")]
)  # fmt: skip


def test_provenance_both_ways() -> None:
    assert GRAPH.derived("msg_0002") == ["summary_seg_01", "claim_0001"]
    assert GRAPH.derives_from("summary_seg_02") == ["summary_seg_01", "claim_0001"]
    assert GRAPH.justifies("summary_seg_02") == ["msg_0001", "msg_0002"]
    assert GRAPH.justifies("claim_0001") == ["msg_0002"]
    assert GRAPH.derived("nothing") == GRAPH.derives_from("msg_0001") == GRAPH.justifies("msg_0001") == []


def test_provenance_of_a_cycle_is_walked_once_and_a_page_is_not_its_own_source() -> None:
    graph = ProvenanceGraph([page("a", "b", "a"), page("b", "c", "a"), page("c", "a", "root")])
    assert graph.derives_from("a") == ["b"]
    assert graph.justifies("a") == ["root"]


_IDS = st.sampled_from("abcdefgh")


@given(st.lists(st.tuples(_IDS, st.lists(_IDS, max_size=4)), max_size=20))
def test_provenance_agrees_in_both_ways(added: list[tuple[str, list[str]]]) -> None:
    graph = ProvenanceGraph(page(name, *sources) for name, sources in added)
    for a in "abcdefgh":
        for b in "abcdefgh":
            assert (b in graph.derives_from(a)) == (a in graph.derived(b))
        assert not any(graph.derives_from(ground) for ground in graph.justifies(a))
