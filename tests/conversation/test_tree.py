"""Identity: the same history, the same node; stored paths come back whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.commit import SessionNames, append_effect, new_records
from proxy.conversation.tree import (
    Identity,
    Node,
    Record,
    Sent,
    decode_record,
    deepest_record,
    encode_record,
    load_path,
    overlap,
    record_key,
)
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


class Store(dict[bytes, Record]):
    def keep(self, path: list[Node]) -> None:
        """Store a path that ends with an answer, above what is there already."""
        for record in new_records(path, deepest_record(path[:-1], self.get), {}):
            self[record.id] = record


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
@given(turns, st.lists(st.integers(0, 12), max_size=3))
def test_invariant_04_a_stored_path_comes_back_whole_from_its_deepest_answer(
    said: list[Any], ends: list[int]
) -> None:
    path = path_of(said)
    answers = [i for i, node in enumerate(path) if node.role == "assistant"]
    store = Store()
    kept = sorted({answers[end % len(answers)] for end in ends}) if answers else []
    for end in kept:
        store.keep(path[: end + 1])
    head = deepest_record(path, store.get)
    if not kept:
        assert head is None
        return
    assert head is not None and head.end == kept[-1] + 1
    assert load_path(head, store.get) == path[: kept[-1] + 1]
    assert sum(1 for i in answers if i <= kept[-1]) == len(store)  # one record for each answer
    assert decode_record(encode_record(head)) == head
    assert [r.turn for r in sorted(store.values(), key=lambda r: r.end)] == list(range(1, len(store) + 1))


def test_a_missing_ancestor_is_an_error_and_not_a_shorter_path() -> None:
    store = Store()
    path = path_of([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    store.keep(path)
    del store[path[1].id]
    with pytest.raises(LookupError, match="missing"):
        load_path(store[path[3].id], store.get)


def test_the_clients_own_bytes_of_an_answer_come_back() -> None:
    store = Store()
    path = path_of([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    store.keep(path[:2])
    for record in new_records(path, store[path[1].id], {"echo": b"echoed"}):
        store[record.id] = record
    assert [n.raw for n in load_path(store[path[3].id], store.get)][1] == b"echoed"


def test_the_clients_own_bytes_come_back_when_more_than_one_answer_is_new() -> None:
    store = Store()
    path = path_of([(role, f"{role}{i}") for i in range(3) for role in ("user", "assistant")])
    store.keep(path[:2])
    for record in new_records(path, store[path[1].id], {"echo": b"echoed", "window": b"w"}, {"window": b"s"}):
        store[record.id] = record
    raws = [b"echoed" if i == 1 else node.raw for i, node in enumerate(path)]
    assert [n.raw for n in load_path(store[path[5].id], store.get)] == raws
    assert [store[path[i].id].window for i in (3, 5)] == [b"s", b"w"]


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


@many
@given(turns)
def test_one_commit_has_the_whole_turn_once(said: list[Any]) -> None:
    path = path_of([*said, ("user", "q"), ("assistant", "x")])
    records = new_records(path, None, {"echo": b"e", "sent": Sent(b"frame")})
    assert [i for r in records for i in r.ids] == [n.id for n in path]
    assert records[0].echo == b"e" and not any(r.echo for r in records[1:])
    assert [r.parent for r in records] == [b"", *(r.id for r in records[:-1])]
    effect = append_effect([(path, records), (path, records)], IDENTITY, TENANT, SessionNames(b"label", b"session"), {})
    puts = dict(effect.puts)
    assert len(puts) == len(effect.puts) == len(records) + 1 and puts[b"session"] == path[-1].id
    assert all(decode_record(puts[record_key(r.id)]) == r for r in records)
    assert [r.sent is not None for r in records] == [False] * (len(records) - 1) + [True]
    found = IDENTITY.pair(TENANT, path[-2].content, path[-1].content), path[-1].id
    assert list(effect.joins) == [found, found, (b"label", path[-1].id)], "only what was delivered"
    assert append_effect([], IDENTITY, TENANT, SessionNames(b"label", b"session"), {}).puts == []
