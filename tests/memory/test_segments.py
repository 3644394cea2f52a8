"""What closing a segment makes, and of what."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.memory.claims import CLAIMS_PER_SEGMENT, Claim, claim_of, fold_claims
from proxy.memory.models import PageType, StorageTier
from proxy.memory.procedures import MIN_CALLS
from proxy.memory.segments import (
    INDEX_TOKENS,
    SUMMARY_TOKENS,
    Segment,
    close_segment,
    decode_segment,
)
from proxy.memory.sentences import SegmentDoc


def count(text: str) -> int:
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


def close(docs: list[SegmentDoc], existing: tuple[Claim, ...] = (), number: int = 1, first: int = 1, **more: int) -> Segment:
    return close_segment(number, docs, existing, first, 9, count, **more)


def talk(*texts: str, start: int = 1, role: str = "") -> list[SegmentDoc]:
    roles = (role, role) if role else ("user", "assistant")
    return [SegmentDoc(f"msg_{i:04d}", roles[i % 2 - 1], "", t) for i, t in enumerate(texts, start)]


STORY = talk(
    "The autumn regatta on Lake Orta will have 48 boats.",
    "Good! Who brings the boats to the lake?",
    "Our deadline is September 12. We decided to use SQLite as the database.",
    "Noted: September 12, and SQLite.",
    "Thanks. Hm, let me see.",
    "The harbour master Elio Ferri needs the list of 48 skippers two days before the start.",
)


def test_a_segment_has_a_summary_claims_and_an_index() -> None:
    segment = close(STORY, number=3, first=7)
    summary = segment.summary
    assert (summary.page_id, summary.page_type) == ("summary_seg_03", PageType.SUMMARY)
    assert "msg_0003 User: Our deadline is September 12." in summary.content
    assert "msg_0006 Assistant: The harbour master Elio Ferri" in summary.content
    assert [page.page_id for page in segment.claims] == ["claim_0007", "claim_0008"]
    assert [page.content for page in segment.claims] == [
        "User: Our deadline is September 12",
        "User: We decided to use SQLite as the database",
    ]
    assert all(page.provenance == ["msg_0003"] for page in segment.claims)
    assert (segment.first_page_id, segment.last_page_id) == ("msg_0001", "msg_0006")
    assert segment.index.content.startswith("seg 03 (msg_0001-msg_0006): ")
    assert "September" in segment.index.content and segment.index.page_type is PageType.INDEX
    assert {page.storage_tier for page in segment.pages()} == {StorageTier.L2}


def test_a_summarys_provenance_is_what_it_quotes() -> None:
    summary = close(STORY).summary
    quoted = re.findall(r"^(msg_\d{4}) ", summary.content, re.MULTILINE)
    assert summary.provenance == quoted and quoted == sorted(quoted)
    texts = {doc.page_id: doc.text for doc in STORY}
    for line in summary.content.splitlines():
        page_id, said = line.split(" ", 1)
        assert said.split(": ", 1)[1].split("…")[0][:40] in texts[page_id]


def test_the_summary_covers_the_whole_segment() -> None:
    docs = talk(*(f"Station {i} measured {100 + i} millimetres of rain at dawn." for i in range(1, 101)))
    summary = close(docs).summary
    quoted = [int(page[4:]) for page in summary.provenance]
    assert quoted[0] <= 10 and quoted[-1] >= 90
    assert max(b - a for a, b in pairwise(quoted)) <= 20
    assert SUMMARY_TOKENS // 2 < (summary.size_tokens or 0) <= SUMMARY_TOKENS


def test_decisions_numbers_and_names_are_quoted_before_small_talk() -> None:
    chat = ["Sounds really nice, I think so too.", "Yes, that would be great, thanks a lot!"] * 15
    chat[17] = "We decided to move the regatta to October 3 because Elio Ferri is away."
    assert "msg_0018" in close(talk(*chat, role="user"), summary_tokens=64).summary.provenance


def test_a_later_segment_supersedes_and_merges() -> None:
    first = close(STORY)
    known = fold_claims((), [c for p in first.claims if (c := claim_of(p))], first.superseded, first.merged)
    later = talk("The deadline has been moved to September 20.", "OK.", "We decided to use SQLite as our database.", start=7)
    second = close(later, known, number=2, first=3)
    assert second.superseded == (("claim_0001", "claim_0003"),)
    assert second.merged == (("claim_0002", "msg_0009"),)
    assert [page.content for page in second.claims] == ["User: The deadline has been moved to September 20"]
    claims = fold_claims(known, [c for p in second.claims if (c := claim_of(p))], second.superseded, second.merged)
    assert [(c.claim_id, c.superseded_by) for c in claims] == [
        ("claim_0001", "claim_0003"), ("claim_0002", ""), ("claim_0003", ""),
    ]  # fmt: skip
    assert claims[1].provenance == ("msg_0003", "msg_0009")


def test_claims_can_be_turned_off() -> None:
    segment = close_segment(1, STORY, (), 1, 9, count, claims_enabled=False)
    assert segment.claims == () and segment.summary.provenance


def test_a_tool_used_again_and_again_makes_a_procedure() -> None:
    docs = []
    for i in range(MIN_CALLS):
        docs += [
            SegmentDoc(f"msg_{2 * i + 1:04d}", "assistant", "", f'Looking.\nget_order({{"order_id":"A{i}"}})'),
            SegmentDoc(f"msg_{2 * i + 2:04d}", "tool", "", '{"status":"paid"}'),
            SegmentDoc(f"msg_{2 * i + 3:04d}", "assistant", "", 'ship({"id":1})'),
        ]
    docs.append(SegmentDoc("msg_0099", "assistant", "", 'note({"x":[1,'))
    first, second = close(docs, number=2).procedures
    assert first.page_id == "procedure_seg_02_1" and first.page_type is PageType.PROCEDURE
    assert first.content == (
        'get_order(order_id): called 3 times, e.g. get_order({"order_id":"A2"}); ship usually came next'
    )
    assert first.provenance == ["msg_0001", "msg_0003", "msg_0005"] and second.metadata["tool"] == "ship"
    assert close(docs[:4]).procedures == ()


def test_tool_outputs_without_prose_are_quoted_by_their_start() -> None:
    docs = [SegmentDoc("msg_0001", "tool", "", '{"order_id": "A17", "status": "paid"}')]
    assert close(docs).summary.content == 'msg_0001 Tool: {"order_id": "A17", "status": "paid"}'


def test_a_segment_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        close([])


def test_stored_bytes_read_back() -> None:
    segment = close(STORY)
    assert decode_segment(segment.encode()) == segment
    with pytest.raises(ValueError):
        decode_segment(b"\x93nonsense")


def test_invariant_10_a_segment_is_bounded() -> None:
    docs = talk(*(f"I visited Town{i} in 19{i % 90 + 10}." for i in range(200)), role="user")
    segment = close(docs)
    assert len(segment.claims) == CLAIMS_PER_SEGMENT
    long = [SegmentDoc("msg_0001", "user", "", "The port is 8443 and the gate is Q4. " * 3000)]
    assert (close(long).summary.size_tokens or 0) <= SUMMARY_TOKENS


_TEXT = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.sampled_from(["Our deadline is May 3. ", "I live in Porto. ", 'f({"a":1})\n', "\ud800", "\n```\n", "So? "]),
    ),
    max_size=12,
).map("".join)
_DOCS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool", ""]), st.text(max_size=5), _TEXT), min_size=1, max_size=12)


@settings(max_examples=150)
@given(_DOCS, st.integers(8, 200))
def test_invariant_07_any_pages_close_the_same_way_twice(rows: list[tuple[str, str, str]], limit: int) -> None:
    docs = [SegmentDoc(f"msg_{i:04d}", *row) for i, row in enumerate(rows, 1)]
    segment = close(docs, summary_tokens=limit)
    assert segment.encode() == close(docs, summary_tokens=limit).encode()
    assert decode_segment(segment.encode()) == segment
    assert count(segment.summary.content) == segment.summary.size_tokens <= limit
    assert count(segment.index.content) <= INDEX_TOKENS
    ids = [doc.page_id for doc in docs]
    for page in segment.pages():
        assert set(page.provenance) <= set(ids)


def test_closing_is_linear() -> None:
    texts = [f"Boat {i} of Elio crossed the line at {i} past nine, and I like the wind of Orta here. " * 5 for i in range(100)]

    def seconds(docs: list[SegmentDoc]) -> float:
        best = 9.0
        for _ in range(3):
            begun = time.process_time()
            close(docs)
            best = min(best, time.process_time() - begun)
        return best

    small, large = seconds(talk(*texts)), seconds(talk(*texts * 8))
    assert large < 8 * small * 3, "eight times the text, about eight times the work"
    assert small < 0.1
