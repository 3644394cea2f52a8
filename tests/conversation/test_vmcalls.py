"""A round's tool calls: whose they are, and an exchange that upstream and the window take."""

from __future__ import annotations

from proxy.conversation.channel import choose_channel
from proxy.conversation.vmcalls import split_calls
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
from tests.conversation.scenario import grown


def test_a_call_is_ours_by_its_listed_name_only() -> None:
    fault, own = call("page_fault", {}, "c1"), call("vm_page_fault", {}, "c2")
    said, limits = calls(fault, own), limits_of(1500)
    assert split_calls(said, choose_channel({}, limits)) == ([fault], [own])
    taken = {"tools": [{"type": "function", "function": {"name": "page_fault"}}]}
    assert split_calls(said, choose_channel(taken, limits)) == ([own], [fault])
    assert split_calls(said, choose_channel({"n": 2}, limits)) == ([], [fault, own])
    assert split_calls(says("x"), choose_channel({}, limits)) == ([], [])


def test_equal_ids_in_one_round_are_told_apart() -> None:
    player = Player(limits_of(2500))
    messages = [*grown(player, 20), {"role": "user", "content": "and now?"}]
    same = calls(*(call("page_fault", {"page_id": "msg_0001"}, "same") for _ in range(50)))
    played = player.ask(messages, script(same, says("so")))
    request = played.requests[-1]
    check_pairs(request)
    assert len(tool_messages(request)) == 8


def test_a_round_that_the_window_cannot_take_is_not_kept() -> None:
    player = Player(limits_of(1300))
    messages = [*grown(player, 14), {"role": "user", "content": "and now?"}]
    chatty = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"), text="well " * 900)
    played = player.ask(messages, script(chatty, chatty))
    assert len(played.bodies) == 2 and played.requests[1]["tool_choice"] == "none"
    assert count_tokens(played.requests[1]) <= 1300
    assert played.message is not None and "tool_calls" not in played.message
