"""Identity: the same history, the same node; what counts in a message, and what does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.tree import Identity, Node, canonical, overlap
from tests.conversation.player import SECRET
from tests.examples import examples

many = examples(30)
IDENTITY = Identity(SECRET)
TENANT = IDENTITY.tenant("key", "")
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.sampled_from("abc")), max_size=12)


def path_of(said: list[tuple[str, str]], tenant: bytes = TENANT) -> list[Node]:
    messages: list[tuple[bytes, dict[str, Any]]] = []
    for role, text in said:
        message = {"role": role, "content": text}
        messages.append((json.dumps(message).encode(), message))
    return IDENTITY.extend(tenant, [], messages)


@many
@given(turns, turns)
def test_equal_histories_and_no_others_have_equal_nodes(one: list[Any], two: list[Any]) -> None:
    a, b = path_of(one), path_of(two)
    common = 0
    while common < min(len(a), len(b)) and one[common] == two[common]:
        common += 1
    ids, others = [n.id for n in a], [n.id for n in b]
    assert ids[:common] == others[:common] and not set(ids[common:]) & set(others[common:])
    assert len(set(ids)) == len(ids)


@many
@given(turns.filter(bool))
def test_invariant_06_two_tenants_share_no_node(said: list[Any]) -> None:
    others = [IDENTITY.tenant("key", "user"), IDENTITY.tenant("keyu", "ser"), IDENTITY.tenant("", "key")]
    ids = {n.id for n in path_of(said)}
    for tenant in others:
        assert not ids & {n.id for n in path_of(said, tenant)}
        assert IDENTITY.session(tenant, "s") != IDENTITY.session(TENANT, "s")
        assert IDENTITY.pair(tenant, b"a", b"b") != IDENTITY.pair(TENANT, b"a", b"b")
    assert not ids & {n.id for n in Identity(bytes(32)).extend(TENANT, [], [(b"", {"role": "user"})])}


@many
@given(turns, turns)
def test_rechaining_is_extending(one: list[Any], two: list[Any]) -> None:
    expected = path_of([*one, *two])
    if one:
        assert IDENTITY.rechain(path_of(one), path_of(two)) == expected
    assert IDENTITY.rechain([], path_of(two, b"other"), IDENTITY.root(TENANT)) == path_of(two)


@many
@given(turns, turns)
def test_overlap_is_the_longest_agreement_with_the_first_message(one: list[Any], two: list[Any]) -> None:
    path, nodes = path_of(one), path_of(two)
    best = (0, 0)
    for start in range(len(one)):
        length = 0
        while start + length < len(one) and length < len(two) and one[start + length] == two[length]:
            length += 1
        if length and length >= best[1]:
            best = (start, length)
    assert overlap(path, nodes) == best


# -- what a message says


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    ["role", "content", "tool_calls", "function_call", "refusal", "name", "tool_call_id", "audio", "x"]
)


def said(**fields: Any) -> bytes:
    return canonical({"role": "assistant", **fields})


def a_call(arguments: str, **more: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}


@examples(30)
@given(st.dictionaries(keys, anything | st.lists(st.dictionaries(keys, anything), max_size=2)))
def test_invariant_01_no_message_raises(message: dict[str, Any]) -> None:
    assert canonical(message) == canonical(json.loads(json.dumps(message)))


@pytest.mark.parametrize("arguments", ["[" * 100_000, '"\\ud800"', "{cut", "", "1e999", "9" * 400])
def test_invariant_01_no_arguments_raise(arguments: str) -> None:
    assert said(tool_calls=[a_call(arguments)]) != said(tool_calls=[a_call(arguments + "x")])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"content": "a"}, {"content": " a\n"}),
        ({"content": "a"}, {"content": "a", "refusal": None, "annotations": [], "reasoning": "hm"}),
        ({"content": "a"}, {"content": [{"type": "text", "text": "a"}]}),
        ({"content": None}, {"content": ""}),
        ({"content": None}, {}),
        ({"content": None, "refusal": "no"}, {"content": [{"type": "refusal", "refusal": "no"}]}),
        ({"tool_calls": [a_call('{"a":1,"b":2}')]}, {"tool_calls": [a_call('{ "b": 2, "a": 1 }', index=0)]}),
        ({"content": None, "audio": {"id": "x", "data": "..."}}, {"audio": {"id": "x"}}),
        ({"content": "a", "tool_calls": []}, {"content": "a", "tool_calls": None}),
    ],
)
def test_echo_is_the_answer(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert said(**one) == said(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"content": "a"}, {"content": "b"}),
        ({"content": "a b"}, {"content": "ab"}),
        ({"content": None, "refusal": "a"}, {"content": None}),
        ({"tool_calls": [a_call("{}")]}, {"tool_calls": [a_call("{}", id="d")]}),
        ({"tool_calls": [a_call("{}")]}, {"content": "f({})"}),
        ({"audio": {"id": "x"}}, {"audio": {"id": "y"}}),
        ({"function_call": {"name": "f", "arguments": "1"}}, {"function_call": {"name": "f", "arguments": "2"}}),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"content": "ab"}),
    ],
)
def test_what_says_something_else_is_something_else(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert said(**one) != said(**other)


def test_what_the_user_typed_counts_to_the_space() -> None:
    assert canonical({"role": "user", "content": "a "}) != canonical({"role": "user", "content": "a"})
    assert canonical({"role": "user", "content": "a", "name": "x"}) != canonical({"role": "user", "content": "a"})
    assert canonical({"role": "tool", "content": "a", "tool_call_id": "1"}) != canonical(
        {"role": "tool", "content": "a", "tool_call_id": "2"}
    )
