"""What derives from a path: made by epochs, stored with them, and never changed afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.derived import (
    NO_DERIVED,
    Derived,
    derive,
    encode_closing,
    entered,
    restored,
    table_root,
    unwritten_page,
)
from proxy.conversation.effects import Load
from proxy.conversation.limits import Limits
from proxy.conversation.pages import PathPages
from proxy.memory import MemoryPage, MutationType, StorageTier
from proxy.memory.segments import Claim, claim_page, index_page, summary_page
from proxy.tokens import get_counter
from tests.conversation.player import Message, Played, Player, limits_of, says
from tests.conversation.test_pages import pages_of
from tests.examples import examples

COUNTER = get_counter("gpt-4o")
WRITES = limits_of(2000, written_by_models=True)
SAID = (
    Claim("deadline", "The deadline is March 3."),
    Claim("deadline", "The deadline is April 9."),
    Claim("seats", "Aisle seats."),
    Claim("name", "The user is Ines."),
    Claim("", "The port is 8443."),
)
segments = st.lists(st.lists(st.sampled_from(SAID), max_size=4), max_size=6)


def made(derived: Derived, claims: Iterable[Claim]) -> list[MemoryPage]:
    """What an epoch makes of one more message: its segment's line, a summary and claims."""
    number, ids = derived.segments + 1, [f"msg_{derived.segments + 1:04d}"]
    first = derived.claims_made + 1
    return [
        index_page(number, ids, ["Words."], len),
        summary_page(number, "A summary of it.", ids, len),
        *(claim_page(n, claim, ids, len) for n, claim in enumerate(claims, first)),
    ]


def grow(derived: Derived, *claims: Claim, max_claims: int = 128) -> Derived:
    return derived.grown(made(derived, claims), derived.end + 1, max_claims)


def said(derived: Derived) -> dict[str, str]:
    return {page_id: derived.text(page_id) for page_id in derived.pages}


@examples(20)
@given(segments, st.integers(1, 5))
def test_derived_grows_by_pages_and_never_changes_what_it_was(claims: list[list[Claim]], most: int) -> None:
    steps, before, pages, closings = [NO_DERIVED], [said(NO_DERIVED)], list[MemoryPage](), list[bytes]()
    for some in claims:
        new = made(steps[-1], some)
        pages += new
        closings.append(encode_closing(b"root", new, len(steps), most))
        steps.append(grow(steps[-1], *some, max_claims=most))
        before.append(said(steps[-1]))
    assert [said(step) for step in steps] == before
    last = steps[-1]
    assert last == NO_DERIVED.grown(pages, len(claims), most), "it is the same in one step"
    assert last == restored(closings)
    kept = {i for i in last.pages if i.startswith("claim_")}
    assert len(kept) <= most and last.claims_made == sum(map(len, claims))
    subjects = [page.metadata["subject"] for page in last.holding if page.metadata["subject"]]
    assert len(set(subjects)) == len(subjects), "one claim holds about one subject"
    assert set(last.superseded) <= kept


@examples(20)
@given(segments)
def test_derived_pages_rest_on_messages_that_name_them_in_turn(claims: list[list[Claim]]) -> None:
    derived = NO_DERIVED
    for some in claims:
        derived = grow(derived, *some)
    for page_id, page in derived.pages.items():
        ground = derived.provenance.justifies(page_id)
        assert ground and ground == list(dict.fromkeys(page.provenance))
        for message in ground:
            assert message.startswith("msg_") and page_id in derived.provenance.derived(message)


def test_claim_whose_place_was_taken_says_so() -> None:
    first = grow(NO_DERIVED, SAID[0])
    assert first.text("claim_0001") == "The deadline is March 3. [msg_0001]"
    second = grow(first, SAID[1])
    assert second.superseded == {"claim_0001": "claim_0002"}
    assert second.text("claim_0001").startswith("(superseded by claim_0002) The deadline is March 3.")
    assert second.text("claim_0002") == "The deadline is April 9. [msg_0002]"
    assert first.superseded == {} and "superseded" not in first.text("claim_0001")


def test_claim_said_again_rests_on_more() -> None:
    again = grow(grow(NO_DERIVED, SAID[3]), SAID[3])
    assert list(again.pages["claim_0001"].provenance) == ["msg_0001", "msg_0002"]
    assert "claim_0002" not in again.pages and again.claims_made == 2
    assert "claim_0001" in again.provenance.derived("msg_0002")
    assert len(grow(grow(NO_DERIVED, SAID[4]), SAID[4]).holding) == 2, "of no subject nothing is known"


def test_claims_beyond_the_limit_leave_the_superseded_ones_first() -> None:
    derived = grow(grow(NO_DERIVED, SAID[2], SAID[0]), SAID[1], max_claims=2)
    assert [page.page_id for page in derived.holding] == ["claim_0001", "claim_0003"]
    assert derived.superseded == {} and derived.claims_made == 3
    with pytest.raises(KeyError):
        derived.text("claim_0002")
    assert [p.page_id for p in grow(derived, SAID[3], max_claims=2).holding] == ["claim_0003", "claim_0004"]


def test_search_finds_summaries_and_claims_but_no_index() -> None:
    derived = grow(NO_DERIVED, Claim("x", "A summary of words."))
    found = [page_id for page_id, *_ in derived.words.ranked("summary words")]
    assert set(found) == {"summary_seg_01", "claim_0001"} and "index_seg_01" in derived.pages


# -- in an epoch


def messages_of(count: int) -> list[Message]:
    return [{"role": "user", "content": f"The port of depot{n} is {8000 + n}."} for n in range(count)]


def reading(count: int) -> PathPages:
    return pages_of(messages_of(count))


def written(segment: MemoryPage, text: str = "A summary.", *claims: Claim) -> MemoryPage:
    """What the shell finds once a model has written about a segment."""
    return segment.model_copy(update={"content": text, "metadata": {"claims": [list(c) for c in claims]}})


def closed(pages: PathPages, last: int, limits: Limits, *replies: Any) -> list[MemoryPage]:
    """`derive`, told `replies` for what it asks for: None, or claims to write down."""
    dialogue = derive(pages, last, limits, COUNTER)
    reply: MemoryPage | None = None
    left = list(replies)
    try:
        while True:
            effect = dialogue.send(reply)
            assert isinstance(effect, Load)
            segment = unwritten_page(pages, effect.page_id)
            claims = left.pop(0)
            assert segment is not None
            reply = None if claims is None else written(segment, "A summary.", *claims)
    except StopIteration as end:
        assert not left
        found: list[MemoryPage] = end.value
        return found


@pytest.mark.parametrize(("count", "most"), [(30, 5), (300, 5), (300, 40)])
def test_segment_reads_no_more_than_max_messages_the_newest_ones(count: int, most: int) -> None:
    pages = reading(count)
    (index,) = closed(pages, count - 4, limits_of(2000, segment_messages=most))
    assert pages.derived.end == count - 4
    assert set(pages._messages) == set(range(count - 4 - most, count - 4))
    assert index.provenance == [f"msg_{count - 3 - most:04d}", f"msg_{count - 4:04d}"]


def test_segments_continue_one_another_and_an_empty_one_is_none() -> None:
    pages = reading(40)
    assert len(closed(pages, 12, limits_of(2000))) == 1
    assert closed(pages, 12, limits_of(2000)) == closed(pages, 5, limits_of(2000)) == []
    assert pages.derived.end == 12
    (second,) = closed(pages, 31, limits_of(2000))
    assert (second.page_id, second.provenance) == ("index_seg_02", ["msg_0013", "msg_0031"])


def test_segment_is_asked_for_until_it_is_written_and_then_never_again() -> None:
    pages = reading(60)
    closed(pages, 10, WRITES)
    assert pages.derived.unwritten == ["summary_seg_01"]
    assert [p.page_id for p in closed(pages, 20, WRITES, None)] == ["index_seg_02"]
    made = closed(pages, 30, WRITES, (SAID[0],), ())
    assert [p.page_id for p in made] == ["summary_seg_01", "claim_0001", "summary_seg_02", "index_seg_03"]
    assert made[0].provenance == [f"msg_{n:04d}" for n in range(1, 11)]
    made = closed(pages, 40, WRITES, (SAID[1],))
    assert [p.page_id for p in made] == ["summary_seg_03", "claim_0002", "index_seg_04"]
    assert pages.derived.superseded == {"claim_0001": "claim_0002"}
    for turn in range(5, 20):
        closed(pages, 36 + turn, WRITES, *[None] * min(turn - 4, 4))
    assert len(pages.derived.unwritten) == 4, "older ones are given up"


def test_segment_without_claims_where_none_are_kept() -> None:
    pages, limits = reading(30), limits_of(2000, written_by_models=True, max_claims=0)
    closed(pages, 10, limits)
    assert [p.page_id for p in closed(pages, 20, limits, SAID)] == ["summary_seg_01", "index_seg_02"]


def test_unwritten_segment_is_known_by_all_that_was_said_up_to_its_end() -> None:
    def version(*texts: str) -> str:
        pages = pages_of([{"role": "user", "content": text} for text in texts])
        closed(pages, 2, WRITES)
        segment = unwritten_page(pages, "summary_seg_01")
        assert segment is not None and segment.provenance == ["msg_0001", "msg_0002"]
        return segment.version

    assert version("a", "b", "c") == version("a", "b", "d") != version("x", "b", "c")
    pages = reading(9)
    closed(pages, 5, WRITES)
    for other in ("summary_seg_02", "index_seg_01", "msg_0001", "claim_0001", "summary_seg_x", ""):
        assert unwritten_page(pages, other) is None


def test_new_pages_stand_in_the_window_and_those_whose_place_was_taken_leave_it() -> None:
    pages = reading(9)
    before = pages.derived
    mutations = entered(closed(pages, 3, WRITES), before, pages.derived, 1)
    assert [(m.page_id, m.tier) for m in mutations] == [("index_seg_01", StorageTier.L2)]
    made, before = closed(pages, 6, WRITES, SAID[:1]), pages.derived
    tiers = {m.page_id: m.tier for m in entered(made, NO_DERIVED, pages.derived, 2)}
    assert tiers == {"summary_seg_01": StorageTier.L0, "claim_0001": StorageTier.L0, "index_seg_02": StorageTier.L2}
    made = closed(pages, 8, WRITES, SAID[1:2])
    gone = [m for m in entered(made, before, pages.derived, 3) if m.op is MutationType.EVICT]
    assert [(m.page_id, m.tier, m.turn) for m in gone] == [("claim_0001", StorageTier.L2, 3)]


# -- in turns


def talk(player: Player, turns: int, after: Callable[[Played], None] = lambda _: None) -> list[Played]:
    """Turns of about 150 tokens, with a fact in each. The table is one and the same in all of them."""
    messages: list[Message] = []
    out: list[Played] = []
    for n in range(turns):
        text = f"The port of depot{n} is {8000 + n}. " + f"It rained again on day{n} of our trip. " * 12
        messages.append({"role": "user", "content": text})
        out.append(player.ask(messages, lambda _: says("Noted, and what a trip it was so far.")))
        assert out[-1].answer.refused is None and out[-1].message is not None
        messages.append({"role": "assistant", "content": out[-1].message["content"]})
        after(out[-1])
    return out


def developer_of(played: Played) -> str:
    return "".join(m["content"] for m in played.requests[-1]["messages"] if m["role"] == "developer")


def test_without_a_model_there_is_nothing_but_the_index() -> None:
    last = talk(Player(limits_of(1500)), 20)[-1]
    derived = last.turn.pages.derived
    assert derived.segments > 1 and {i.partition("_")[0] for i in derived.pages} == {"index"}
    assert "claim_" not in developer_of(last) and "summary_" not in developer_of(last)
    assert {e.page_id for e in last.turn.table if e.position < 0} == set(derived.pages)


def test_models_words_are_shown_from_the_next_epoch_on_and_restored() -> None:
    """What stays in L0 without a page is shown with the newest message's words under the claim's id."""
    player = Player(limits_of(1500, written_by_models=True, max_claims=2))
    claims = iter(range(1000))
    player.writes = lambda segment: written(
        segment, f"They went on by {segment.provenance[0]}.", Claim("port", f"The port is {next(claims)}.")
    )

    def check(played: Played) -> None:
        derived = played.turn.pages.derived
        resident = {entry.page_id for entry in played.turn.table.resident() if entry.position < 0}
        assert resident <= set(derived.pages)
        for page_id, words in re.findall(r"^\w \((claim_\d+)\): (.*)$", developer_of(played), re.M):
            assert json.loads(words) == derived.text(page_id)
        if derived.claims_made:
            assert {i for i in derived.pages if i.startswith("claim_")} == {p.page_id for p in derived.holding} | set(
                derived.superseded
            )

    last = talk(player, 40, check)[-1]
    derived = last.turn.pages.derived
    assert derived.claims_made > 3 and "(claim_" in developer_of(last) and "(summary_seg_" in developer_of(last)
    assert last.turn.record is not None
    player.forget()
    restored = player._state_after(last.turn.record)
    assert restored is not None and restored.derived == derived


def test_closing_that_is_damaged_is_no_closing() -> None:
    stored = encode_closing(b"root", made(NO_DERIVED, SAID), 1, 7)
    assert table_root(stored) == b"root"
    with pytest.raises(msgspec.DecodeError):
        table_root(stored[:-1])
