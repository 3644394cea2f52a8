"""Turns without a server: what is asked twice is the same, and what was not answered never happened.
(That they are the proxy's own is in `test_like_the_proxy`.)"""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.library.local import LocalConversation
from proxy.memory import ImportanceWeightedLRU, MutationType, PageMutation, StorageTier, VMMode
from proxy.tokens import get_counter
from tests.conversation.player import limits_of

MODEL = "gpt-4o"


def conversation(budget_tokens: int, **changes: Any) -> LocalConversation:
    limits = limits_of(budget_tokens, **changes)
    return LocalConversation("s", MODEL, limits, get_counter(MODEL), ImportanceWeightedLRU())


def user(turn: int) -> dict[str, str]:
    return {"role": "user", "content": f"Question {turn} about topic{turn}. " + "filler words " * 15}


def answer(turn: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"Answer {turn} is {turn * 7}. " + "other words " * 15}


def grown(turns: int = 20, **changes: Any) -> LocalConversation:
    local = conversation(1500, **changes)
    for turn in range(turns):
        local.add(user(turn))
        local.answer(answer(turn))
    return local


def test_a_request_is_the_same_until_something_is_said() -> None:
    local = conversation(1500)
    assert local.request()["messages"] == [] and not local.paged
    for turn in range(20):
        local.add(user(turn))
        assert local.request() == local.request()
        local.answer(answer(turn))
        assert local.request() == local.request()
    assert local.request()["messages"][-1]["content"] == answer(19)["content"]


def test_a_turn_that_is_given_up_leaves_no_trace() -> None:
    local, other = grown(), grown()
    local.request()
    local.add(user(20))
    local.request()
    local.add(user(21))
    assert local.table.page_table == other.table.page_table == local.log.replay()
    other.add(user(20), user(21))
    assert local.request() == other.request()


def test_vm_calls_are_welcome_only_while_the_turn_is_open() -> None:
    asked = {"page_id": "msg_0001"}
    call = {"id": "c1", "type": "function",
            "function": {"name": "page_fault", "arguments": json.dumps(asked)}}  # fmt: skip
    local = conversation(1500, mode=VMMode.STRICT)
    assert local.vm_calls([call]) is None
    local = grown(mode=VMMode.STRICT)
    assert local.vm_calls([call]) is None
    local.add({"role": "user", "content": "go on"})
    before = local.request()["messages"]
    told = local.vm_calls([call])
    assert told is not None and told[0]["tool_call_id"] == "c1"
    assert "Question 0" in json.loads(told[0]["content"])["page"]["content"]["text"]
    assert local.request()["messages"] == [*before, {"role": "assistant", "content": None, "tool_calls": [call]}, *told]


def test_pages_of_the_path_are_given_whole_and_a_long_message_in_its_parts() -> None:
    local = conversation(1500, page_tokens=64)
    local.add(user(0), {"role": "user", "content": "many words " * 90})
    assert [page.content for page in local.pages("msg_0001")] == [user(0)["content"]]
    parts = local.pages("msg_0002")
    assert len(parts) > 1 and "".join(page.text() for page in parts) == "many words " * 90
    assert local.pages("msg_0003") == local.pages("nothing") == []


def test_the_table_is_there_before_a_turn_pages() -> None:
    local = conversation(100_000)
    local.add(user(0))
    local.answer(answer(0))
    local.add(user(1))
    entries = [(e.page_id, e.tier, e.created_turn) for e in local.table.page_table]
    assert entries == [(f"msg_{n:04d}", StorageTier.L0, 1 + n // 3) for n in (1, 2, 3)]
    assert local.log.replay() == local.table.page_table


def test_pins_and_importances_of_the_caller_hold_for_the_turns_and_get_into_the_log() -> None:
    local = conversation(1500)
    local.add(user(0))
    local.change(PageMutation(MutationType.PIN, "msg_0001", 1))  # before anything pages
    for turn in range(20):
        if turn:
            local.add(user(turn))
        local.request()
        local.answer(answer(turn))
    entry = local.table.lookup("msg_0001")
    assert entry is not None and entry.pinned and entry.tier is StorageTier.L0
    local.add(user(20))
    local.request()
    local.change(PageMutation(MutationType.UPDATE, "msg_0003", 20, importance=0.9))
    local.add(user(21))  # the turn that was open is given up
    entry = local.table.lookup("msg_0003")
    assert entry is not None and entry.importance == 0.9
    local.answer(answer(21))
    assert local.log.replay() == local.table.page_table
    entry = local.log.replay().lookup("msg_0003")
    assert entry is not None and entry.importance == 0.9
    with pytest.raises(ValueError, match="the turns' own"):
        local.change(PageMutation(MutationType.EVICT, "msg_0001", 21, tier=StorageTier.L2))
    with pytest.raises(KeyError):
        local.change(PageMutation(MutationType.PIN, "msg_0999", 21))
