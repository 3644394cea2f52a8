"""Where a log is taken back to, and what was shown only behind that place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy.conversation.rewind import brought_since, differs_at, taken_back

from proxy.conversation.records import Record
from proxy.conversation.tree import Anchor, Node
from proxy.conversation.window import NATIVE, SYSTEM, VM, Entry, Window
from proxy.memory import MutationType, PageMutation, StorageTier
from proxy.memory.models import FaultReason
from proxy.memory.table import encode_log
from tests.examples import examples

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


@examples(300)
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
    cut = taken_back(log, at)
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
