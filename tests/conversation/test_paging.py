"""This turn's window: the client's own system messages in it, and the room that a page gets."""

from __future__ import annotations

import json
import random

import pytest

from proxy.memory import StorageTier, VMMode, WorkingSetConfig
from proxy.tokens import get_counter
from tests.conversation.player import (
    Player,
    call,
    calls,
    check_pairs,
    count_tokens,
    limits_of,
    says,
    script,
    tool_messages,
)
from tests.conversation.scenario import grown, text_of


@pytest.mark.parametrize("tokens", [900, 1000, 1020])
def test_a_full_page_can_be_loaded_in_a_window_of_4000_tokens(tokens: int) -> None:
    small = WorkingSetConfig(max_l0_tokens=4000, reserved_tokens=1000)
    player = Player(limits_of(3000, working_set=small))
    count = get_counter("gpt-4o").text
    words = text_of(random.Random(7), 900, "long7x").split()
    while count(" ".join(words)) > tokens:
        words.pop()
    words[-1] = "lastword"
    text = " ".join(words)
    messages = [{"role": "user", "content": text}]
    player.ask(messages, script(says("noted")))
    messages.append({"role": "assistant", "content": "noted"})
    for turn in range(20):
        messages.append({"role": "user", "content": text_of(random.Random(turn), 60, f"user{turn}x")})
        answer = text_of(random.Random(turn), 60, f"answer{turn}x")
        player.ask(messages, script(says(answer)))
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": "and now"})
    fault = calls(call("page_fault", {"page_id": "msg_0001", "target_level": 0}, "c1"))
    played = player.ask(messages, script(fault, says("there it is")))
    assert words[-1].encode() not in played.bodies[0]  # it was evicted
    page = json.loads(tool_messages(played.requests[-1])[-1]["content"])["page"]
    assert (page["level"], page["content"]["text"]) == (0, text)
    entry = played.turn.table.lookup("msg_0001")
    assert entry is not None and entry.tier is StorageTier.L0
    assert all(count_tokens(request) <= 3000 for request in played.requests)


# -- the client's own system messages


def test_system_messages_in_mid_conversation_stay_where_they_are_and_count() -> None:
    player = Player(limits_of(1500))
    messages = grown(player, 6)
    for i in (2, 5, 8):
        note = {"role": "system", "content": text_of(random.Random(i), 30, f"note{i}x")}
        messages.insert(i, note)
    for i in range(6):
        messages.append({"role": "user", "content": text_of(random.Random(90 + i), 60, f"late{i}x")})
        played = player.ask(messages, script(says("yes")))
        for request in played.requests:
            assert count_tokens(request) <= 1500
            text = json.dumps(request["messages"])
            assert [text.count(f"note{i}x") for i in (2, 5, 8)] == [1, 1, 1]
        messages.append({"role": "assistant", "content": "yes"})


def test_a_system_message_that_the_client_took_back_is_gone() -> None:
    player = Player(limits_of(1500))
    messages = grown(player, 14)
    messages.append({"role": "system", "content": "note1x"})
    for i in range(3):
        messages.append({"role": "user", "content": f"say more {i}"})
        player.ask(messages, script(says(f"yes {i}")))
        messages.append({"role": "assistant", "content": f"yes {i}"})
    kept = [m for m in messages if m["role"] != "system"]
    kept.append({"role": "user", "content": "and now"})
    assert b"note1x" not in player.ask(kept, script(says("yes"))).bodies[0]


def test_a_second_system_message_behind_the_first_is_seen_at_once() -> None:
    player = Player(limits_of(1500))
    messages = [*grown(player, 14), {"role": "user", "content": "one"}]
    messages.append({"role": "system", "content": "note1x"})
    player.ask(messages, script(says("yes")))
    messages += [{"role": "system", "content": "note2x"}, {"role": "assistant", "content": "yes"},
                 {"role": "user", "content": "two"}]
    body = player.ask(messages, script(says("yes"))).bodies[0]
    assert b"note1x" in body and b"note2x" in body


def test_a_system_message_behind_the_newest_survives_an_epoch_in_mid_turn() -> None:
    player = Player(limits_of(1200, page_tokens=200))
    messages = [*grown(player, 30, words=30), {"role": "user", "content": "one"}]
    messages.append({"role": "system", "content": "note1x"})
    rounds = [
        calls(*(call("page_fault", {"page_id": f"msg_{i:04d}"}, f"c{i}") for i in (n, n + 1)))
        for n in (1, 3, 5)
    ]
    played = player.ask(messages, script(*rounds, says("yes")))
    assert len(set(played.epochs)) > 1
    for request in played.requests:
        assert json.dumps(request["messages"]).count("note1x") == 1
        check_pairs(request)


@pytest.mark.parametrize("formatted", [True, False])
def test_strict_mode_asks_for_citations_but_never_where_the_answer_is_json(formatted: bool) -> None:
    """The rule leaves for that request only: the next one continues the cached prefix."""
    player = Player(limits_of(1500, mode=VMMode.STRICT))
    messages = grown(player, 14)
    extra = {"response_format": {"type": "json_object"}} if formatted else {}
    messages.append({"role": "user", "content": "in JSON, please"})
    asked = player.ask(messages, script(says("{}")), **extra).requests[0]
    messages += [{"role": "assistant", "content": "{}"}, {"role": "user", "content": "and now?"}]
    then = player.ask(messages, script(says("so"))).requests[0]
    rules = [next(m["content"] for m in r["messages"] if m["role"] == "developer") for r in (asked, then)]
    assert ("cite the page" in rules[0]) is not formatted
    assert "cite the page" in rules[1] and "never guess" in rules[0]
