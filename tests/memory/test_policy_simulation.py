"""The default policy against the others and against foresight, on a sample of real agent
transcripts.
"""

from __future__ import annotations

import pytest

from proxy.memory.eviction import ImportanceWeightedLRU
from proxy.memory.models import CompressionLevel
from proxy.tokens import get_counter
from tests.bench.policies import DEFAULT, OPTIMUM, POLICIES, measure
from tests.bench.policy_simulator import Foresight, Score, by_policy, foresee, replay
from tests.bench.policy_traces import Trace, distinctive, trace_of, traces_of
from tests.e2e.data import Conversation, load_trajectories

COUNTER = get_counter("gpt-4o")
ROOM_TOKENS = 2500
NOISE = 0.002  # of the hit rate: what a handful of accesses make
FILLER = "We talked at length about nothing in particular and went on doing so for a while. "


def small_trace() -> Trace:
    """A booking code in the first result, used again after much talk; long talk in between."""
    messages = [
        {"role": "user", "content": "Please look the booking up."},
        {"role": "assistant", "content": "It is QX77RT4 for Friday."},
    ]
    for n in range(12):
        messages.append({"role": "user", "content": FILLER * (n % 3 + 4)})
        messages.append({"role": "assistant", "content": "I see. " + FILLER * 3})
    messages += [
        {"role": "user", "content": "Now cancel it."},
        {"role": "assistant", "content": "Cancelled QX77RT4."},
    ]
    return trace_of(Conversation("small", messages), COUNTER)


def test_an_answer_needs_the_page_that_its_identifier_came_from() -> None:
    trace = small_trace()
    far = [
        (turn.end, access.page_id) for turn in trace.turns for access in turn.accesses if access.far
    ]
    assert far == [(27, "msg_0002")]
    assert distinctive("Mia took flight HAT-042 to Oslo. The end.") == {"hat-042", "oslo"}
    access = trace.turns[-1].accesses[-1]
    assert trace.shows(access, CompressionLevel.ABSTRACT, COUNTER)
    assert not trace.shows(trace.turns[0].accesses[0], CompressionLevel.REDUCED, COUNTER)


def test_foresight_keeps_what_will_be_needed() -> None:
    trace = small_trace()
    use = Foresight(trace).next_use("msg_0002", 3)
    assert use is not None and use[0] == len(trace.turns)
    seen = replay(trace, 600, foresee(trace), COUNTER)
    assert seen.hit_rate == 1.0 and seen.metrics.faults == 0 and seen.rebuilds > 2
    blind = replay(trace, 600, by_policy(ImportanceWeightedLRU()), COUNTER)
    assert blind.accesses == seen.accesses and blind.metrics.faults <= 1


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    """Every second transcript that outgrows the window."""
    return measure(traces_of(load_trajectories()[::2], COUNTER), ROOM_TOKENS, COUNTER)


def test_no_policy_is_better_than_the_default_on_agent_transcripts(
    scores: dict[str, Score],
) -> None:
    best = max(scores[name].hit_rate for name in POLICIES)
    assert scores[DEFAULT].hit_rate >= best - NOISE
    assert scores[DEFAULT].accesses > 500 and scores[DEFAULT].far > 150


def test_the_default_is_within_a_tenth_of_the_optimum(scores: dict[str, Score]) -> None:
    assert scores[OPTIMUM].hit_rate < 1.0  # the window is too small for all that is needed
    assert scores[DEFAULT].hit_rate >= 0.9 * scores[OPTIMUM].hit_rate
