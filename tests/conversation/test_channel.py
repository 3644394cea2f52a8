"""Which channel a request gets, and the tools array that goes with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.conversation.channel import (
    PASSIVE,
    TOOLS,
    Channel,
    choose_channel,
    client_names,
    tools_array,
    vm_names,
)
from proxy.memory import VMMode
from tests.conversation.player import limits_of

LOOK = {"type": "function", "function": {"name": "look"}}
FORCED = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("fields", "name", "listed"),
    [
        ({}, TOOLS, True),
        ({"tools": [LOOK], "tool_choice": "auto", "n": 1}, TOOLS, True),
        ({"tool_choice": "none"}, PASSIVE, True),
        ({"tools": [LOOK], "tool_choice": FORCED}, PASSIVE, True),
        ({"tools": [LOOK], "tool_choice": "required"}, PASSIVE, False),
        ({"logprobs": True}, PASSIVE, True),
        ({"logprobs": True, "tools": [LOOK]}, PASSIVE, False),
        ({"n": 2}, PASSIVE, False),
        ({"functions": [{"name": "f"}]}, PASSIVE, False),
        ({"prediction": {"type": "content"}}, PASSIVE, False),
        ({"web_search_options": {}}, PASSIVE, False),
        ({"tools": [LOOK] * 127}, PASSIVE, False),
        ({"tools": [{"googleSearch": {}}]}, PASSIVE, False),
        ({"tools": [LOOK] * 126}, TOOLS, True),
        ({"grammar": 'root ::= "yes" | "no"'}, PASSIVE, False),
        ({"guided_choice": ["yes", "no"]}, PASSIVE, False),
        ({"json_schema": {"type": "object"}}, PASSIVE, False),
        ({"structured_outputs": {"regex": "a+"}, "tools": [LOOK]}, PASSIVE, False),
        ({"grammar": "", "guided_json": None, "chat_template_kwargs": {"x": 1}, "top_k": 5}, TOOLS, True),
    ],
)
def test_request_chooses(fields: dict[str, Any], name: str, listed: bool) -> None:
    channel = choose_channel(fields, limits_of(2000))
    assert (channel.name, channel.listed, channel.offer) == (name, listed, name == TOOLS)


def test_mode_and_the_model_choose_first() -> None:
    for limits in (limits_of(2000, mode=VMMode.PASSIVE), limits_of(2000, model_takes_tools=False)):
        assert not choose_channel({}, limits).listed
    picky = limits_of(2000, tools_with_json=False)
    assert not choose_channel({"response_format": {"type": "json_object"}}, picky).listed
    assert choose_channel({"response_format": {"type": "text"}}, picky).offer
    assert choose_channel({}, picky).offer
    learned = limits_of(2000, not_with_tools=frozenset(["dry_run"]))
    assert not choose_channel({"dry_run": True}, learned).listed
    assert choose_channel({"dry_run": False}, learned).offer


def test_names_that_collide_are_prefixed_until_they_do_not() -> None:
    def named(*names: str) -> list[Any]:
        return [{"function": {"name": n}} for n in names] + [{"custom": {"name": "x"}}, {}, 7]

    assert vm_names(client_names(named("page_fault", "vm_page_fault")))["page_fault"] == "vm_vm_page_fault"
    assert vm_names(client_names(named("a"))) == {"page_fault": "page_fault", "search_pages": "search_pages"}
    assert client_names("odd") == client_names(None) == frozenset()


@pytest.mark.parametrize("client", [None, b"[]", b" [ ] ", b'[{"a" : 1}]', b'\n[ {"a":1} , {} ]\n'])
def test_clients_tools_keep_their_bytes_in_front_of_ours(client: bytes | None) -> None:
    channel = Channel(TOOLS, True, vm_names())
    array = tools_array(client, channel)
    assert array is not None
    tools, own = json.loads(array), json.loads(client or b"[]")
    assert tools[: len(own)] == own
    assert [t["function"]["name"] for t in tools[len(own) :]] == ["page_fault", "search_pages"]
    assert (client or b"[]").strip()[1:-1].strip() in array
    assert tools_array(client, Channel(PASSIVE, False, vm_names())) == client
