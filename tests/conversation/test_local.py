"""A conversation without a server sends what the proxy would send."""

from __future__ import annotations

import json
from typing import Any

from proxy.conversation.local import LocalConversation
from proxy.memory import ImportanceWeightedLRU, VMMode
from proxy.tokens import get_counter
from tests.conversation.player import Player, limits_of, says, script

MODEL = "gpt-4o"


def conversation(budget_tokens: int, **changes: Any) -> LocalConversation:
    limits = limits_of(budget_tokens, **changes)
    return LocalConversation("s", MODEL, limits, get_counter(MODEL), ImportanceWeightedLRU())


def user(turn: int) -> dict[str, str]:
    return {"role": "user", "content": f"Question {turn} about topic{turn}. " + "filler words " * 15}


def answer(turn: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"Answer {turn} is {turn * 7}. " + "other words " * 15}


def test_it_sends_what_the_proxy_sends() -> None:
    """Word for word, as long as no search is in it: the proxy has an index, this has none."""
    quiet = {"prefetch_pages": 0}
    local, player = conversation(1500, **quiet), Player(limits_of(1500, **quiet))
    messages: list[dict[str, Any]] = []
    for turn in range(24):
        local.add(user(turn))
        messages.append(user(turn))
        played = player.ask(messages, script(says(answer(turn)["content"])))
        assert local.request() == json.loads(played.bodies[0])["messages"]
        local.answer(answer(turn))
        messages.append(answer(turn))
    assert local.paged and local.state is not None
    assert local.log.replay() == local.state.table


def test_a_request_is_the_same_until_something_is_said() -> None:
    local = conversation(1500)
    assert local.request() == [] and not local.paged
    for turn in range(20):
        local.add(user(turn))
        assert local.request() == local.request()
        local.answer(answer(turn))
        assert local.request() == local.request()
    assert local.request()[-1]["content"] == answer(19)["content"]


def test_vm_calls_are_welcome_only_while_the_turn_is_open() -> None:
    local = conversation(1500, mode=VMMode.STRICT)
    call = {"id": "c1", "type": "function",
            "function": {"name": "page_fault", "arguments": '{"page_id": "msg_0001"}'}}  # fmt: skip
    assert local.vm_call(call) is None
    for turn in range(20):
        local.add(user(turn))
        local.answer(answer(turn))
    assert local.vm_call(call) is None
    local.add({"role": "user", "content": "go on"})
    local.request()
    told = local.vm_call(call)
    assert told is not None and told[0]["tool_call_id"] == "c1"
    assert "Question 0" in json.loads(told[0]["content"])["page"]["content"]["text"]


def test_pages_of_the_path_are_given_whole() -> None:
    local = conversation(1500)
    local.add(user(0), answer(0))
    page = local.page("msg_0002")
    assert page is not None and page.content == answer(0)["content"]
    assert local.page("msg_0003") is None and local.page("nothing") is None
