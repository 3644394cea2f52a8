"""The log of an epoch: stored as changes, restored byte for byte, rendered with or without tools."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.form import Form
from proxy.conversation.records import Record, brought_since, encode_change, restore_window
from proxy.conversation.tree import Anchor, Node
from proxy.conversation.window import (
    MIXED,
    NATIVE,
    SYSTEM,
    VM,
    Entry,
    Window,
    differs_at,
    render,
    without_oldest_round,
)
from proxy.memory import MutationType, PageMutation, StorageTier
from proxy.memory.models import FaultReason
from proxy.memory.table import encode_log
from tests.conversation.player import call, check_pairs
from tests.examples import examples

EMPTY = Window(1, "rules", 3, 0, 0, (), 3)
entries = st.lists(
    st.builds(Entry, st.binary(min_size=1, max_size=8), st.integers(0, 99), st.integers(-1, 9), st.integers(0, 3)),
    max_size=4,
)


@examples(60)
@given(st.lists(st.tuples(st.booleans(), entries, st.integers(0, 9)), min_size=1, max_size=8))
def test_invariant_07_a_window_comes_back_from_its_changes(
    turns: list[tuple[bool, list[Entry], int]],
) -> None:
    """Also from changes that took it back: to the first `kept` entries."""
    store: dict[bytes, Record] = {}
    before: Window | None = None
    for number, (new_epoch, added, kept) in enumerate(turns):
        if before is None or new_epoch:
            window = Window(number + 1, f"rules {number}", 5, 0, 0, (), 5).append(added)
        else:
            window = before.until(kept, number).append(added, number)
            assert window.entries == (*before.entries[:kept], *added)
            assert window.tokens == 5 + sum(entry.tokens for entry in window.entries)
        record = Record(b"", 0, [bytes([number])], [b""], ["assistant"], [b""], [0], number)
        record.window = encode_change(before, window)
        record.base = bytes([number - 1]) if before else b""
        store[record.id] = record
        before = window
        assert restore_window(record, store.get, lambda _: None) == window
    assert restore_window(Record(b"", 0, [b"x"], [], [], [], [], 0), store.get, lambda _: None) is None


def test_invariant_07_a_window_comes_back_with_the_factor_that_its_budget_is_in() -> None:
    grown = msgspec.structs.replace(EMPTY.append([Entry(b"1", 1)]), factor=1.25)
    first = Record(b"", 0, [b"a"], [b""], ["assistant"], [b""], [0], 1, window=encode_change(None, EMPTY))
    then = Record(b"a", 1, [b"b"], [b""], ["assistant"], [b""], [0], 2, base=b"a")
    then.window = encode_change(EMPTY, grown)
    last = Record(b"b", 2, [b"c"], [b""], ["assistant"], [b""], [0], 3, base=b"b")
    last.window = encode_change(grown, grown.append([Entry(b"2", 1)]))
    store = {record.id: record for record in (first, then, last)}
    found = restore_window(last, store.get, lambda _: None)
    assert found == grown.append([Entry(b"2", 1)]) and found.factor == 1.25


def test_invariant_07_a_window_comes_back_where_an_entry_before_its_last_one_is_another() -> None:
    old = EMPTY.append([Entry(b"asked, with evidence", 9), Entry(b"said", 1)])
    new = EMPTY.append([Entry(b"asked", 2), old.entries[1], Entry(b"next", 1)])
    first = Record(b"", 0, [b"a"], [b""], ["assistant"], [b""], [0], 1, window=encode_change(None, old))
    then = Record(b"a", 1, [b"b"], [b""], ["assistant"], [b""], [0], 2, base=b"a", window=encode_change(old, new))
    assert restore_window(then, {record.id: record for record in (first, then)}.get, lambda _: None) == new


def test_a_missing_beginning_is_an_error() -> None:
    record = Record(b"", 0, [b"b"], [b""], ["assistant"], [b""], [0], 2)
    record.base, record.window = b"a", encode_change(EMPTY, EMPTY.append([]))
    with pytest.raises(LookupError):
        restore_window(record, {}.get, lambda _: None)


def native(message: dict[str, object], kind: int = NATIVE) -> Entry:
    return Entry(json.dumps(message).encode(), 1, 0, kind)


def test_without_tools_an_exchange_becomes_the_pages_that_it_brought() -> None:
    mixed = {"role": "assistant", "tool_calls": [call("page_fault", {}, "v2"), call("look", {}, "c1")]}
    window = EMPTY.append([
        native({"role": "user", "content": "a"}),
        native({"role": "assistant", "tool_calls": [call("page_fault", {}, "v1")]}, VM),
        native({"role": "tool", "tool_call_id": "v1", "content": "page one"}, VM),
        native({"role": "assistant", "content": "b"}),
        native(mixed, MIXED),
        native({"role": "tool", "tool_call_id": "v2", "content": "page two"}, VM),
        native({"role": "tool", "tool_call_id": "c1", "content": "seven"}),
    ])
    plain = json.loads(render([b'{"role":"system"}'], window, "developer", False, Form(several=True)))
    assert plain[0] == {"role": "system"} and plain[1] == {"role": "developer", "content": "rules"}
    check_pairs({"messages": plain})
    shown = json.loads(render([], window, "system", True, Form(several=True)))
    check_pairs({"messages": shown})
    assert [m["role"] for m in shown] == ["system", "user", "user", "assistant", "user", "assistant", "tool"]
    assert "page one" in shown[2]["content"] and "page two" in shown[4]["content"]
    assert [c["id"] for c in shown[5]["tool_calls"]] == ["c1"]
    bare = EMPTY.append([native({"role": "user", "content": "a"})])
    assert render([], bare, "system", True, Form()) == render([], bare, "system", False, Form())


def test_a_round_is_the_models_message_and_all_that_answers_it() -> None:
    roles = ["assistant", "tool", "tool", "user", "assistant", "tool"]
    tail = [Entry(json.dumps({"role": role}).encode(), 1) for role in roles]
    assert without_oldest_round(tail) == tuple(tail[4:])
    assert without_oldest_round(tail[4:]) == ()


# -- taken back to where the client's own messages differ

END = 6
PATH = [Node(b"", b"", "user", b"")] * (END + 1)


def window(anchors: list[Anchor], native_from: int = 0) -> Window:
    """Six messages with the client's system messages, and an exchange of the VM behind each."""
    log = Window(1, "rules", 3, native_from, 0, (), 3)
    for position in range(native_from, END + 1):
        system = [Entry(a.raw, 5, position, SYSTEM) for a in anchors if a.position == position]
        native = [Entry(b"m%d" % position, 7, position, NATIVE), Entry(b"vm", 2, -1, VM)]
        log = log.append([*system, *(native if position < END else [])], min(position + 1, END))
    return log


anchors = st.lists(
    st.builds(Anchor, st.integers(1, END), st.sampled_from([b"a", b"b"])), max_size=4
).map(lambda found: sorted(found, key=lambda anchor: anchor.position))


@examples(90)
@given(anchors, anchors, st.integers(0, 3), st.booleans())
def test_it_is_cut_where_the_clients_system_messages_first_differ(
    old: list[Anchor], new: list[Anchor], start: int, strict: bool
) -> None:
    log = window(old)
    at = differs_at(log, PATH, new, start, strict)

    def of(found: list[Anchor], position: int) -> list[bytes]:
        return [a.raw for a in found if a.position == position]

    differ = [p for p in range(start + 1, END) if of(old, p) != of(new, p)]
    last, here = of(old, END), of(new, END)
    if differ:
        assert at == differ[0]
    else:
        assert at == (END if (here or strict) and here[: len(last)] != last else None)
    if at is None:
        return
    cut = log.taken_back(at)
    assert cut.entries == log.entries[: len(cut.entries)] and cut.covered == at
    assert all(entry.position < at for entry in cut.entries)
    assert {e.position for e in cut.entries if e.kind == NATIVE} == set(range(at))
    assert cut.tokens == 3 + sum(entry.tokens for entry in cut.entries)


def test_system_messages_in_front_of_the_log_are_not_in_it() -> None:
    log = window([Anchor(4, b"a")], native_from=2)
    assert differs_at(log, PATH, [Anchor(1, b"new"), Anchor(4, b"a")], 0) is None


def record(number: int, *mutations: PageMutation) -> Record:
    """The turn that answered at position 2 * number + 1."""
    at = [b"%d" % number] * 2
    made = Record(b"", 2 * number, at, at, ["user", "assistant"], at, [1, 1], number + 1)
    made.base = b"%d" % (number - 1) if number else b""
    made.mutations = encode_log(mutations)
    return made


def test_what_was_brought_behind_a_position_is_found_and_nothing_that_was_planned() -> None:
    l0 = StorageTier.L0
    turns = [
        record(0, PageMutation(MutationType.MAP, "kept", 1, 0, l0, 5)),
        record(1, PageMutation(MutationType.FAULT_IN, "before", 2, 0, l0, 5)),
        record(2, PageMutation(MutationType.CREATE, "new", 3, 0, l0, 5),
               PageMutation(MutationType.MAP, "fetched", 3, 0, l0, 5, reason=FaultReason.SPECULATIVE)),
        record(3, PageMutation(MutationType.FAULT_IN, "faulted", 4, 0, l0, 5),
               PageMutation(MutationType.MAP, "planned", 4, 1, l0, 5)),
    ]  # fmt: skip
    store = {one.id: one for one in turns}
    assert brought_since(turns[3], 6, store.get) == ["faulted"]
    assert sorted(brought_since(turns[3], 4, store.get)) == ["faulted", "fetched"]
    assert sorted(brought_since(turns[3], 0, store.get)) == ["before", "faulted", "fetched"]
    del store[turns[1].id]
    with pytest.raises(LookupError, match="missing"):
        brought_since(turns[3], 0, store.get)
