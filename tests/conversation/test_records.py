"""What is stored of a turn: paths come back whole, and what is restored from storage alone is what the
turn left in RAM (invariants 7 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import keys
from proxy.conversation import turn_window
from proxy.conversation.records import (
    LastUse,
    Record,
    Sent,
    SessionNames,
    State,
    append_effect,
    block_key,
    conversation_key,
    decode_record,
    deepest_record,
    encode_record,
    history,
    load_path,
    new_records,
    owner_of,
    record_key,
    restore_state,
)
from proxy.conversation.tree import Node
from proxy.memory import PageTable, StorageTier
from proxy.memory.models import PageTableEntry
from tests.conversation.player import Player, limits_of
from tests.conversation.scenario import Scenario, play, scenarios
from tests.conversation.test_derived import talk
from tests.conversation.test_tree import IDENTITY, TENANT, many, path_of, turns
from tests.examples import examples


class Store(dict[bytes, Record]):
    def keep(self, path: Sequence[Node]) -> None:
        """Store a path that ends with an answer, above what is there already."""
        for record in new_records(path, deepest_record(path[:-1], self.get), {}):
            self[record.id] = record

    def path(self, head: Record) -> list[Node]:
        return list(load_path(head, self.get, lambda _: None, IDENTITY))


class Bare:
    """Nothing but the stored bytes; notes what is read."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self.values = values
        self.records: list[bytes] = []

    def record(self, node_id: bytes) -> Record | None:
        self.records.append(node_id)
        data = self.values.get(record_key(node_id))
        return decode_record(data) if data is not None else None

    def block(self, owner: bytes, ref: bytes) -> bytes | None:
        return self.values.get(block_key(owner, ref))

    def restore(self, node_id: bytes) -> State:
        head = self.record(node_id)
        assert head is not None
        return restore_state(head, self.record, self.block)


def entries(table: PageTable) -> list[PageTableEntry]:
    return sorted(table, key=lambda entry: entry.page_id)


# -- paths


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
    assert store.path(head) == path[: kept[-1] + 1]
    assert sum(1 for i in answers if i <= kept[-1]) == len(store)  # one record for each answer
    assert decode_record(encode_record(head)) == head
    assert [r.turn for r in sorted(store.values(), key=lambda r: r.end)] == list(range(1, len(store) + 1))


def test_a_missing_ancestor_is_an_error_and_not_a_shorter_path() -> None:
    store = Store()
    path = path_of([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    store.keep(path)
    del store[path[1].id]
    with pytest.raises(LookupError, match="missing"):
        store.path(store[path[3].id])


def test_the_clients_own_bytes_of_an_answer_come_back() -> None:
    store = Store()
    path = path_of([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    store.keep(path[:2])
    for record in new_records(path, store[path[1].id], {"echo": b"echoed"}):
        store[record.id] = record
    assert [n.raw for n in store.path(store[path[3].id])][1] == b"echoed"


def test_the_clients_own_bytes_come_back_when_more_than_one_answer_is_new() -> None:
    store = Store()
    path = path_of([(role, f"{role}{i}") for i in range(3) for role in ("user", "assistant")])
    store.keep(path[:2])
    for record in new_records(path, store[path[1].id], {"echo": b"echoed"}):
        store[record.id] = record
    raws = [b"echoed" if i == 1 else node.raw for i, node in enumerate(path)]
    assert [n.raw for n in store.path(store[path[5].id])] == raws


def test_nothing_new_is_nothing_to_store() -> None:
    path = path_of([("user", "a"), ("assistant", "b")])
    records = new_records(path, None, {})
    assert new_records(path, records[0], {}) == []


def test_each_choice_is_a_branch_of_its_own_and_the_first_is_the_sessions_head() -> None:
    one = path_of([("user", "a"), ("assistant", "b")])
    two = path_of([("user", "a"), ("assistant", "c")])
    heads = [(path, new_records(path, None, {})) for path in (one, two)]
    effect = append_effect(heads, IDENTITY, TENANT, SessionNames(b"l", b"s"), {})
    assert [r.id for r in effect.records] == [one[1].id, two[1].id]
    assert dict(effect.puts)[b"s"] == one[1].id == dict(effect.joins)[b"l"]


@many
@given(turns)
def test_one_commit_has_the_whole_turn_once(said: list[Any]) -> None:
    path = path_of([*said, ("user", "q"), ("assistant", "x")])
    records = new_records(path, None, {"echo": b"e", "sent": Sent(b"frame")})
    assert [i for r in records for i in r.ids] == [n.id for n in path]
    assert not any(r.echo for r in records), "there is no answer before it"
    assert [r.parent for r in records] == [b"", *(r.id for r in records[:-1])]
    effect = append_effect([(path, records), (path, records)], IDENTITY, TENANT, SessionNames(b"label", b"session"), {})
    puts = dict(effect.puts)
    assert len(puts) == len(effect.puts) == len(records) + 3 and puts[b"session"] == path[-1].id
    assert LastUse.decode(puts[conversation_key(owner_of(path[0].id))]).head == path[-1].id
    assert all(decode_record(puts[record_key(r.id)]) == r for r in records)
    assert [r.sent is not None for r in records] == [False] * (len(records) - 1) + [True]
    found = IDENTITY.pair(TENANT, path[-2].content, path[-1].content), path[-1].id
    assert list(effect.joins) == [found, found, (b"label", path[-1].id)], "only what was delivered"
    assert append_effect([], IDENTITY, TENANT, SessionNames(b"label", b"session"), {}).puts == []


# -- states


@examples(12)
@given(scenarios(turns=10))
def test_invariants_07_and_09_a_bare_store_gives_the_live_state(scenario: Scenario) -> None:
    player = Player(scenario.limits())
    for played in play(scenario, player).played:
        record, window = played.turn.record, played.turn.window
        if record is None or window is None or player.get_record(record.id) is not record:
            continue  # not paged, refused, or the same answer was stored before
        state = Bare(player.values).restore(record.id)
        assert (state.window, state.derived) == (window, played.turn.pages.derived)
        replayed = history(record, Bare(player.values).record).replay()
        assert entries(state.table) == entries(replayed)
        assert state.table.get_stats() == replayed.get_stats()


def test_the_live_state_after_many_segments_is_restored() -> None:
    player = Player(limits_of(1500))
    closed = 0
    for played in talk(player, 40):
        record, turn = played.turn.record, played.turn
        if turn.window is None:
            continue
        assert record is not None
        closed += bool(record.closing)
        state = Bare(player.values).restore(record.id)
        assert (state.window, state.derived) == (turn.window, turn.pages.derived)
    assert closed > 5 and state.derived.segments == closed
    live, stored = player._states[record.id], state
    assert entries(stored.table) == entries(live.table)
    context = history(record, player.get_record).get_context_at_turn(record.turn)
    assert set(context) == {e.page_id for e in stored.table.get_by_tier(StorageTier.L0)}


def test_what_is_replayed_does_not_grow_with_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is opened where it was stored; the records before it are read for what they closed."""
    monkeypatch.setattr(turn_window, "CHECKPOINT", 0)
    player = Player(limits_of(1500))
    played = [one for one in talk(player, 40) if one.turn.window is not None]
    records = [one.turn.record for one in played]
    closed = sum(1 for record in records if record and record.closing)
    last_closed = max(n for n, record in enumerate(records) if record and record.closing)
    store = Bare(player.values)
    assert records[-1] is not None
    store.restore(records[-1].id)
    assert len(set(store.records)) <= closed + 2 * (len(records) - last_closed)


@given(st.data())
@examples(12)
def test_a_missing_part_is_a_lookup_error_that_says_what_is_missing(data: st.DataObject) -> None:
    player = Player(limits_of(1500))
    played = talk(player, 16)
    head = played[-1].turn.record
    assert head is not None and head.window
    store = Bare(player.values)
    store.restore(head.id)
    lost = data.draw(st.sampled_from(sorted(set(store.records) - {head.id})))
    del player.values[record_key(lost)]
    with pytest.raises(LookupError, match="record that others continue is missing"):
        store.restore(head.id)


def test_the_history_is_the_log_of_every_turn() -> None:
    player = Player(limits_of(1500))
    played = [one for one in talk(player, 20) if one.turn.window is not None]
    whole = [m for one in played for m in one.turn._paging.mutations]  # type: ignore[union-attr]
    head = played[-1].turn.record
    assert head is not None
    assert list(history(head, player.get_record).entries) == whole


@examples(10)
@given(st.data())
def test_a_missing_block_is_made_again_from_the_log(data: st.DataObject) -> None:
    player = Player(limits_of(1500))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turn_window, "CHECKPOINT", 0)
        head = talk(player, 16)[-1].turn.record
    assert head is not None
    whole = Bare(player.values).restore(head.id)
    blocks = sorted(key for key in player.values if key.startswith(keys.BLOCK))
    for key in data.draw(st.sets(st.sampled_from(blocks), min_size=1)):
        del player.values[key]
    state = Bare(player.values).restore(head.id)
    assert (state.window, state.derived) == (whole.window, whole.derived)
    assert state.table == whole.table
