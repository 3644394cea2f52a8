"""Identity: the same history, the same node."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.tree import Identity, Node, overlap
from tests.conversation.player import SECRET
from tests.examples import examples

many = examples(100)
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
