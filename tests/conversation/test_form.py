"""The form of messages: what a template reads, and what it would refuse."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.form import Form, Piece, formed

RULES, PLAIN = "the rules", Form()
ASK, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}


def made(head: list[Any], pieces: list[tuple[Any, bool]], form: Form = PLAIN, text: str = RULES) -> list[Any]:
    raws = [Piece(json.dumps(message).encode(), ours) for message, ours in pieces]
    return [json.loads(raw) for raw in formed([json.dumps(m).encode() for m in head], text, "system", raws, form)]


def client(*messages: Any) -> list[tuple[Any, bool]]:
    return [(message, False) for message in messages]


def test_memorys_text_is_a_part_of_the_clients_system_message() -> None:
    system = {"role": "system", "content": "Be kind.", "name": "house"}
    assert made([system], client(ASK)) == [{**system, "content": "Be kind.\n\nthe rules"}, ASK]
    assert made([], client(ASK)) == [{"role": "system", "content": RULES}, ASK]
    assert made([], client(ASK), text="") == [ASK]


def test_several_system_messages_in_front_become_one_of_texts_or_parts() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    developer, system = {"role": "developer", "content": parts}, {"role": "system", "content": "b"}
    [first, *rest] = made([developer, system], client(ASK))
    assert rest == [ASK] and first["role"] == "developer"
    assert first["content"] == [*parts, {"type": "text", "text": "b"}, {"type": "text", "text": RULES}]
    plain = {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert made([plain], [])[0]["content"] == "a\n\nb\n\nthe rules"


def test_model_that_surely_reads_several_gets_them_as_they_are() -> None:
    system = {"role": "system", "content": "b"}
    assert made([system], client(ASK), Form(several=True)) == [system, {"role": "system", "content": RULES}, ASK]


def test_late_system_message_stays_until_it_was_refused() -> None:
    late = {"role": "system", "content": "c", "name": "n"}
    assert made([], client(ASK, late, SAY))[2] == late
    refused = made([], client(ASK, late, SAY), Form(late=False))
    assert refused == [{"role": "system", "content": RULES}, {"role": "user", "content": "ask\n\nc"}, SAY]


def test_template_without_a_system_role_hears_all_of_it_from_the_user() -> None:
    form = Form(late=False, system=False, alternate=True)
    system = {"role": "system", "content": "Be kind."}
    assert made([system], client(ASK, SAY), form) == [{"role": "user", "content": "Be kind.\n\nthe rules\n\nask"}, SAY]
    assert made([], client(SAY), form) == [{"role": "user", "content": RULES}, SAY]


def test_neighbours_of_one_role_join_only_where_one_is_ours() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    ours = {"role": "user", "content": [{"type": "text", "text": "page"}, image]}
    joined = {"role": "user", "content": [*ours["content"], {"type": "text", "text": "ask"}]}
    assert made([], [(ours, True), (ASK, False), (ASK, False)], text="") == [joined, ASK]
    assert made([], client(ASK, ASK, SAY, SAY), text="") == [ASK, ASK, SAY, SAY]
    twice = made([], client(ASK, ASK, SAY, SAY), Form(alternate=True), text="")
    assert twice == [{"role": "user", "content": "ask\n\nask"}, {"role": "assistant", "content": "say\n\nsay"}]


def test_calls_and_results_are_never_joined() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in "12"]
    messages = [ASK, call, *results, SAY, call, *results]
    assert made([], client(*messages), Form(alternate=True), text="") == messages


ROLES = st.sampled_from(["user", "assistant", "system"])
MESSAGES = st.lists(st.tuples(st.builds(lambda r, t: {"role": r, "content": t}, ROLES, st.text("ab", min_size=1)), st.booleans()))


@given(MESSAGES, st.booleans(), st.booleans())
def test_nothing_is_lost_and_a_prefix_stays_a_prefix(messages: list[Any], system: bool, alternate: bool) -> None:
    form = Form(late=False, system=system, alternate=alternate)
    shown = made([], messages, form)
    texts = "".join(m["content"] for m in shown).replace("\n\n", "")
    assert texts == RULES + "".join(m["content"] for m, _ in messages)
    assert [m["role"] for m in shown[1:]].count("system") == 0
    if alternate:
        assert all(a["role"] != b["role"] for a, b in pairwise(shown))
    longer = made([], [*messages, (SAY, False)], form)
    assert longer[: len(shown) - 1] == shown[:-1]
