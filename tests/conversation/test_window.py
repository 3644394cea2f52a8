"""The log of an epoch: stored as changes, restored byte for byte, rendered with or without tools."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.compose import Form
from proxy.conversation.tree import Record
from proxy.conversation.window import (
    MIXED,
    NATIVE,
    VM,
    Entry,
    Window,
    encode_change,
    render,
    restore,
)
from tests.conversation.player import call, check_pairs
from tests.examples import examples

EMPTY = Window(1, "rules", 3, 0, 0, (), 3)
entries = st.lists(
    st.builds(Entry, st.binary(max_size=8), st.integers(0, 99), st.integers(-1, 9), st.integers(0, 3)),
    max_size=4,
)


@examples(200)
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
        assert restore(record, store.get) == window
    assert restore(Record(b"", 0, [b"x"], [], [], [], [], 0), store.get) is None


def test_invariant_07_a_window_comes_back_with_the_factor_that_its_budget_is_in() -> None:
    grown = msgspec.structs.replace(EMPTY.append([Entry(b"1", 1)]), factor=1.25)
    first = Record(b"", 0, [b"a"], [b""], ["assistant"], [b""], [0], 1, window=encode_change(None, EMPTY))
    then = Record(b"a", 1, [b"b"], [b""], ["assistant"], [b""], [0], 2, base=b"a")
    then.window = encode_change(EMPTY, grown)
    last = Record(b"b", 2, [b"c"], [b""], ["assistant"], [b""], [0], 3, base=b"b")
    last.window = encode_change(grown, grown.append([Entry(b"2", 1)]))
    store = {record.id: record for record in (first, then, last)}
    found = restore(last, store.get)
    assert found == grown.append([Entry(b"2", 1)]) and found.factor == 1.25


def test_a_missing_beginning_is_an_error() -> None:
    record = Record(b"", 0, [b"b"], [b""], ["assistant"], [b""], [0], 2)
    record.base, record.window = b"a", encode_change(EMPTY, EMPTY.append([]))
    with pytest.raises(LookupError):
        restore(record, {}.get)


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
