"""The cost of a turn does not grow with the pages outside the window: counted in function calls."""

from __future__ import annotations

import cProfile
import pstats

from tests.bench.core import Conversation

TURNS = 40  # at least two rebuilds
GROWTH = 1.3  # from 150 pages to ten times as many, where the log is 1.5


def calls_of(pages: int) -> int:
    """Function calls of TURNS turns after a conversation of so many pages."""
    conversation = Conversation(pages)
    profile = cProfile.Profile()
    profile.enable()
    conversation.run(TURNS)
    profile.disable()
    assert len(conversation.times.rebuild) >= 2 and len(conversation.times.append) > TURNS // 2
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_invariant_10_a_turn_costs_no_more_in_a_conversation_ten_times_as_long() -> None:
    assert calls_of(1500) < GROWTH * calls_of(150)
