"""A segment is closed when messages leave the window: what it reads, makes, stores and switches off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

import msgspec
import pytest

from proxy.conversation.closing import close_segment, created, encode_closing, grown, table_root
from proxy.conversation.derived import NO_DERIVED
from proxy.conversation.limits import Limits
from proxy.conversation.pages import PathPages
from proxy.memory import MutationType, StorageTier
from proxy.tokens import get_counter
from tests.conversation.player import Message, Played, Player, limits_of, says
from tests.conversation.test_pages import pages_of

COUNTER = get_counter("gpt-4o")
LIMITS = limits_of(2000)


def messages_of(count: int, first: int = 0) -> list[Message]:
    return [{"role": "user", "content": f"The port of depot{n} is {8000 + n}."} for n in range(first, first + count)]


def reading(count: int) -> PathPages:
    return pages_of(messages_of(count))


def kinds(page_ids: Iterable[str]) -> set[str]:
    return {page_id.partition("_")[0] for page_id in page_ids}


@pytest.mark.parametrize(("count", "most"), [(30, 5), (300, 5), (300, 40)])
def test_no_more_than_max_messages_are_read_the_newest_ones(count: int, most: int) -> None:
    pages = reading(count)
    segment = close_segment(pages, count - 4, limits_of(2000, segment_messages=most), 1, COUNTER)
    assert segment is not None and pages.derived.end == count - 4
    assert set(pages._messages) == set(range(count - 4 - most, count - 4))
    assert (segment.first_page_id, segment.last_page_id) == (f"msg_{count - 3 - most:04d}", f"msg_{count - 4:04d}")


def test_segments_continue_one_another_and_an_empty_one_is_none() -> None:
    pages = reading(40)
    first = close_segment(pages, 12, LIMITS, 1, COUNTER)
    assert close_segment(pages, 12, LIMITS, 2, COUNTER) is None
    assert close_segment(pages, 5, LIMITS, 2, COUNTER) is None
    second = close_segment(pages, 31, LIMITS, 2, COUNTER)
    assert first is not None and second is not None
    assert (second.number, second.first_page_id, second.last_page_id) == (2, "msg_0013", "msg_0031")
    names = [page.page_id for page in (*first.claims, *second.claims)]
    assert names == [f"claim_{n:04d}" for n in range(1, len(names) + 1)] and second.claims


@pytest.mark.parametrize(
    ("changes", "made"),
    [({}, {"summary", "claim", "index"}), ({"summary_tokens": 0}, {"claim", "index"}),
     ({"max_claims": 0}, {"summary", "index"}), ({"summary_tokens": 0, "max_claims": 0}, set())],
)  # fmt: skip
def test_summaries_and_claims_can_be_switched_off(changes: dict[str, int], made: set[str]) -> None:
    player = Player(limits_of(1500, **changes))
    played = talk(player, 20)[-1]
    assert played.turn.window is not None and played.turn.window.epoch > 1
    derived = played.turn.pages.derived
    assert kinds(derived.pages) == made
    assert bool(derived.segments) is bool(made)
    entered = {e.page_id for e in played.turn.table if e.position < 0}
    assert entered == set(derived.pages)
    assert played.turn.record is not None
    player.forget()
    restored = player._state_after(played.turn.record)
    assert restored is not None and restored.derived == derived


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


def test_new_pages_stand_in_the_window_and_those_whose_place_was_taken_leave_it() -> None:
    texts = ["Our deadline is March 3.", "Our deadline is April 9.", "My name is Ines."]
    pages = pages_of([{"role": "user", "content": text} for text in texts])
    first = close_segment(pages, 1, LIMITS, 1, COUNTER)
    assert first is not None
    tiers = {m.page_id: m.tier for m in created(first, pages, 1)}
    assert tiers == {"summary_seg_01": StorageTier.L0, "claim_0001": StorageTier.L0, "index_seg_01": StorageTier.L2}
    second = close_segment(pages, 2, LIMITS, 2, COUNTER)
    assert second is not None
    gone = [m for m in created(second, pages, 2) if m.op is MutationType.EVICT]
    assert [(m.page_id, m.tier, m.turn) for m in gone] == [("claim_0001", StorageTier.L2, 2)]


def test_invariant_06_a_claim_that_is_not_kept_any_more_leaves_the_window() -> None:
    """What stays in L0 without a page is shown with the newest message's words under the claim's id."""

    def check(played: Played) -> None:
        derived = played.turn.pages.derived
        resident = {entry.page_id for entry in played.turn.table.resident() if entry.position < 0}
        assert resident <= set(derived.pages)
        for page_id, words in re.findall(r"^\w \((claim_\d+)\): (.*)$", developer_of(played), re.M):
            assert json.loads(words) == derived.text(page_id)

    played = talk(Player(limits_of(1500, max_claims=2)), 30, check)[-1]
    assert played.turn.pages.derived.claims_made > 20 and "(claim_" in developer_of(played)


def developer_of(played: Played) -> str:
    return "".join(m["content"] for m in played.requests[-1]["messages"] if m["role"] == "developer")


def test_what_is_stored_of_a_closing_is_enough_to_grow_by_it() -> None:
    pages = reading(20)
    limits: Limits = limits_of(2000, max_claims=7)
    segments = [close_segment(pages, last, limits, 1, COUNTER) for last in (8, 15)]
    stored = encode_closing(b"root", [s for s in segments if s is not None], 15, 7)
    assert table_root(stored) == b"root" and grown(NO_DERIVED, stored) == pages.derived
    assert len(pages.derived.claims) == 7 < pages.derived.claims_made
    with pytest.raises(msgspec.DecodeError):
        table_root(stored[:-1])
