"""Refusals: which may be tried again without our changes, and what they say of the model."""

from __future__ import annotations

import pytest

from proxy.conversation.effects import Refused
from proxy.conversation.refusal import learn
from tests.conversation.player import Player, limits_of, script
from tests.conversation.scenario import grown


@pytest.mark.parametrize(
    ("status", "window", "tries"), [(400, 1600, 1), (429, 128_000, 1), (500, 128_000, 1), (422, 128_000, 2)]
)
def test_invariant_01_only_a_repairable_refusal_that_would_fit_is_tried_again(
    status: int, window: int, tries: int
) -> None:
    player = Player(limits_of(1500, window_tokens=window))
    messages = [*grown(player, 12), {"role": "user", "content": "and now?"}]
    stored = dict(player.values)
    played = player.ask(messages, script(Refused(status, b"no")))
    assert len(played.bodies) == tries
    assert played.answer.refused == Refused(status, b"no")
    assert player.values == stored  # nothing of a refused turn is remembered


def test_what_a_refusal_says_of_the_model() -> None:
    limits = limits_of(1500)
    assert learn(b"Unsupported role: developer", limits) == {"developer_role": "system"}
    for refusal in (
        b"FUNCTION calling is not supported by this model",
        b'{"error":{"message":"registry/x does not support tools"}}',
        b'"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
    ):
        assert learn(refusal, limits) == {"tools": False}, refusal
    flagged = b"Your prompt was flagged: 'tool abuse'"
    assert learn(flagged, limits) == {}
    error = b'{"error": {"message": "%s", "type": "invalid_request_error"}}' % flagged
    assert learn(error, limits) == {}
    assert learn(b"\xff", limits) == {}
