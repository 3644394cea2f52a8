"""Turns whose requests are refused: what the next try is, and what is learned from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.conversation.capability import Capabilities, capabilities, describe, within
from proxy.conversation.effects import Refused
from tests.conversation.player import (
    Message,
    Player,
    call,
    calls,
    check_pairs,
    count_tokens,
    limits_of,
    says,
    script,
)
from tests.conversation.scenario import grown, tools_of

MORE = {"role": "user", "content": "and now?"}


def refusal(words: str, status: int = 400) -> Refused:
    return Refused(status, json.dumps({"error": {"message": words}}).encode())


def too_long(limit: int) -> Any:
    """An upstream with a smaller window than anybody knows."""

    def model(request: Message) -> Message | Refused:
        tokens = count_tokens(request)
        if tokens > limit:
            return refusal(
                f"This model's maximum context length is {limit} tokens. However, your messages "
                f"resulted in {tokens} tokens."
            )
        return says("fits")

    return model


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_never_left_its_window_shrinks_to_the_real_one(stream: bool) -> None:
    player = Player(limits_of(100_000))
    messages = [*grown(player, 30), MORE]
    played = player.ask(messages, too_long(2500), stream=stream)
    assert [count_tokens(r) <= 2500 for r in played.requests] == [False, True]
    assert played.requests[0]["messages"] == messages
    assert played.answer.learned == {"window_tokens": 2500}
    assert played.message is not None and played.message["content"] == "fits"


@pytest.mark.parametrize("stream", [False, True])
def test_a_paged_prompt_shrinks_too_and_is_sent_once_more_only(stream: bool) -> None:
    player = Player(limits_of(3000))
    messages = [*grown(player, 40), MORE]
    played = player.ask(messages, too_long(1800), stream=stream)
    assert len(played.bodies) == 2
    assert count_tokens(played.requests[1]) <= 1800
    assert played.answer.learned == {"window_tokens": 1800}
    check_pairs(played.requests[1])


def test_upstreams_own_count_says_what_its_tokens_are() -> None:
    """It counts each of our tokens as two, so its window is half as large as it says."""

    def model(request: Message) -> Message | Refused:
        tokens = 2 * count_tokens(request)
        if tokens > 5000:
            return refusal(f"prompt is too long: {tokens} tokens > 5000 maximum")
        return says("fits")

    player = Player(limits_of(100_000))
    played = player.ask([*grown(player, 30), MORE], model)
    assert len(played.bodies) == 2 and played.answer.refused is None


def test_a_window_without_a_number_is_guessed_from_what_was_sent() -> None:
    no_number = refusal("Your input exceeds the context window of this model.")
    player = Player(limits_of(100_000))
    played = player.ask([*grown(player, 30), MORE], script(no_number, says("fits")))
    first, second = (count_tokens(r) for r in played.requests)
    assert second < 0.8 * first
    assert 0.7 * first < played.answer.learned["window_tokens"] < 0.8 * first


def test_what_never_fits_ends_with_upstreams_first_refusal() -> None:
    never = refusal("This model's maximum context length is 4000 tokens.")
    player = Player(limits_of(100_000))
    played = player.ask([*grown(player, 30), MORE], script(never))
    assert len(played.bodies) == 2 and played.answer.refused == never
    assert played.answer.learned == {}


def test_stream_options_are_left_out_for_who_refuses_them() -> None:
    def picky(request: Message) -> Message | Refused:
        return refusal("Unknown parameter: 'stream_options'.") if "stream_options" in request else says("ok")

    player = Player(limits_of(1500))
    messages = [*grown(player, 12), MORE]
    played = player.ask(messages, picky, stream=True)
    first, second = played.requests
    assert first.pop("stream_options") == {"include_usage": True}
    assert first == second, "the rest of the request is the same"
    assert played.answer.learned == {"stream_usage": False}


def test_system_messages_become_one_for_who_takes_no_second() -> None:
    def picky(request: Message) -> Message | Refused:
        roles = [m["role"] for m in request["messages"]]
        if any(role in ("system", "developer") for role in roles[1:]):
            return refusal("System message must be at the beginning.")
        return says("ok")

    player = Player(limits_of(1500))
    system = {"role": "system", "content": "Be kind."}
    messages = [system, *grown(player, 12), MORE]
    played = player.ask(messages, picky)
    last = played.requests[-1]["messages"]
    assert last[0]["role"] == "system"
    assert last[0]["content"].startswith("Be kind.\n\n<VM:RULES>")
    assert played.answer.learned == {"mid_system": False}


def test_a_model_without_tools_is_paged_when_the_whole_would_not_fit() -> None:
    def picky(request: Message) -> Message | Refused:
        return refusal("this model does not support tools") if request.get("tools") else says("ok")

    player = Player(limits_of(1500, window_tokens=1600))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky)
    assert len(played.bodies) == 2 and "tools" not in played.requests[1]
    assert count_tokens(played.requests[1]) <= 1500
    assert played.answer.learned == {"tools": False}
    assert played.answer.report.channel == "passive"


def test_a_model_that_takes_no_tools_beside_json_loses_them_for_json_alone() -> None:
    def picky(request: Message) -> Message | Refused:
        if request.get("tools") and request.get("response_format"):
            return refusal("Function calling with a response mime type: 'application/json' is unsupported")
        return says("{}")

    player = Player(limits_of(1500, window_tokens=1600))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky, response_format={"type": "json_object"})
    assert len(played.bodies) == 2 and "tools" not in played.requests[1]
    assert played.answer.learned == {"tools_with_json": False}
    knowing = Player(limits_of(1500, window_tokens=1600, tools_with_json=False))
    messages = [*grown(knowing, 20), MORE]
    assert "tools" not in knowing.ask(messages, picky, response_format={"type": "json_object"}).requests[0]
    assert "tools" in knowing.ask(messages, picky).requests[0]


@pytest.mark.parametrize("tools", [0, 1])
def test_a_call_that_stop_cut_is_asked_again_without_vm_tools(tools: int) -> None:
    cut = calls(call("page_fault", '{"page_id": "msg_0', "c1"))
    player = Player(limits_of(1500))
    more = {"tools": tools_of(tools)} if tools else {}
    messages = [*grown(player, 12, **more), MORE]
    played = player.ask(messages, script(cut, says("ok")), stop=["001"], **more)
    assert played.message is not None and played.message["content"] == "ok"
    again = played.requests[1]
    names = [t["function"]["name"] for t in again.get("tools") or ()]
    if tools:
        assert names == [t["function"]["name"] for t in tools_of(1)], "they may still be called"
    else:
        assert again["tool_choice"] == "none"
    assert "c1" not in json.dumps(again["messages"])


def test_one_length_limit_holds_for_all_rounds() -> None:
    fault = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"))
    player = Player(limits_of(1500))
    messages = [*grown(player, 12), MORE]
    for name in ("max_tokens", "max_completion_tokens"):
        played = player.ask(messages, script(fault, says("ok")), **{name: 300})
        assert [r[name] for r in played.requests] == [300, 293]  # a round of the player bills 7


def test_a_field_that_excludes_tools_makes_its_requests_passive_and_no_others() -> None:
    def picky(request: Message) -> Message | Refused:
        if request.get("tools") and request.get("dry_run"):
            return refusal("tools cannot be combined with dry_run")
        return says("ok")

    player = Player(limits_of(1500, window_tokens=1600))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky, dry_run=True)
    assert [("tools" in r, r["dry_run"]) for r in played.requests] == [(True, True), (False, True)]
    assert played.answer.learned == {"not_with_tools": ["dry_run"]}
    assert played.answer.report.channel == "passive"


def test_a_template_without_a_system_role_hears_the_memory_from_the_user() -> None:
    def picky(request: Message) -> Message | Refused:
        if any(m["role"] in ("system", "developer") for m in request["messages"]):
            return refusal("System role not supported")
        return says("ok")

    player = Player(limits_of(1500, developer_role="system"))
    played = player.ask([*grown(player, 12), MORE], picky)
    assert len(played.bodies) == 2 and played.answer.learned == {"system_role": False}
    first = played.requests[1]["messages"][0]
    assert first["role"] == "user" and first["content"].startswith("<VM:RULES>")


def test_a_template_without_a_place_for_calls_gets_pages_as_text() -> None:
    """It counts every message, and a call with its result is no turn of the user's."""

    def picky(request: Message) -> Message | Refused:
        spoken = [m["role"] for m in request["messages"] if m["role"] not in ("system", "developer")]
        if any((role == "user") != (i % 2 == 0) for i, role in enumerate(spoken)):
            return refusal("Conversation roles must alternate user/assistant/user/assistant/...")
        return says("ok") if len(spoken) > 99 or not request.get("tools") else asks

    asks = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"))
    player = Player(limits_of(1500, window_tokens=1600, developer_role="system"))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky)
    assert played.message is not None and played.message["content"] == "ok"
    assert len(played.bodies) == 3 and played.answer.learned["tools"] is False
    last = played.requests[2]
    assert "tools" not in last and "msg_0001" in last["messages"][-1]["content"]


def test_facts_come_from_overrides_then_lessons_then_assumptions() -> None:
    known = capabilities(
        {"stream_usage": True, "window_tokens": None},
        {"stream_usage": False, "window_tokens": 9000},
        {"prompt_cache_key": True},
    )
    assert known == Capabilities(prompt_cache_key=True, window_tokens=9000)
    row = describe("m", {"tools": None, "mid_system": True}, {"tools": False}, {"tools": True, "x": 1})
    assert row == {
        "model": "m",
        "mid_system": {"value": True, "from": "override"},
        "tools": {"value": False, "from": "learned"},
        "x": {"value": 1, "from": "assumed"},
    }
    assert capabilities({}, {"window_tokens": 12, "tokens_factor": "?"}, {}) == Capabilities()


def test_limits_within_a_window_keep_room_for_the_answer() -> None:
    limits = limits_of(10_000)
    smaller = within(limits, 2000, None)
    assert (smaller.working_set.max_l0_tokens, smaller.budget_tokens) == (2000, 1900)
    assert within(limits, 2000, 5000).budget_tokens == 1000
    assert within(limits, 50_000, None).budget_tokens == limits.budget_tokens
