"""What is restored from storage alone is what the turn left in RAM (invariants 7 and 9)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.derived import table_root
from proxy.conversation.state import State, history, restore_state
from proxy.conversation.tree import Record, block_key, decode_record, record_key
from proxy.memory import PageTable, StorageTier
from proxy.memory.models import PageTableEntry
from proxy.memory.mutation_log import encode
from tests.conversation.player import Player, limits_of
from tests.conversation.scenario import Scenario, play, scenarios
from tests.conversation.test_derived import talk
from tests.examples import examples


class Bare:
    """Nothing but the stored bytes; notes what is read."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self.values = values
        self.records: list[bytes] = []

    def record(self, node_id: bytes) -> Record | None:
        self.records.append(node_id)
        data = self.values.get(record_key(node_id))
        return decode_record(data) if data is not None else None

    def block(self, ref: bytes) -> bytes | None:
        return self.values.get(block_key(ref))

    def restore(self, node_id: bytes) -> State:
        head = self.record(node_id)
        assert head is not None
        return restore_state(head, self.record, self.block)


def entries(table: PageTable) -> list[PageTableEntry]:
    return sorted(table, key=lambda entry: entry.page_id)


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
        assert entries(state.table.page_table) == entries(replayed)
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
    assert entries(stored.table.page_table) == entries(live.table.page_table)
    context = history(record, player.get_record).get_context_at_turn(record.turn)
    assert set(context) == {e.page_id for e in stored.table.get_by_tier(StorageTier.L0)}


def test_what_is_replayed_does_not_grow_with_the_conversation() -> None:
    """The table is opened at the last closing; the records before it are read for what they closed."""
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
@examples(20)
def test_a_missing_part_is_a_lookup_error_that_says_what_is_missing(data: st.DataObject) -> None:
    player = Player(limits_of(1500))
    played = talk(player, 16)
    head = played[-1].turn.record
    assert head is not None and head.window
    store = Bare(player.values)
    store.restore(head.id)
    lost = data.draw(st.sampled_from(sorted(set(store.records) - {head.id})))
    del player.values[record_key(lost)]
    with pytest.raises(LookupError, match="record that a window continues is missing from storage"):
        store.restore(head.id)


def test_a_missing_block_is_a_lookup_error() -> None:
    player = Player(limits_of(1500))
    head = next(p.turn.record for p in reversed(talk(player, 30)) if p.turn.record and p.turn.record.closing)
    assert table_root(head.closing)

    def nothing(_: bytes) -> None:
        return None

    with pytest.raises(LookupError) as caught:
        state = restore_state(head, Bare(player.values).record, nothing)
        entries(state.table.page_table)
    assert "page table" in str(caught.value) or "block" in str(caught.value)


def test_the_history_is_the_log_of_every_turn() -> None:
    player = Player(limits_of(1500))
    played = [one for one in talk(player, 20) if one.turn.window is not None]
    whole = [m for one in played for m in one.turn._paging.memory.log.entries]  # type: ignore[union-attr]
    head = played[-1].turn.record
    assert head is not None
    assert encode(history(head, player.get_record).entries) == encode(whole)
