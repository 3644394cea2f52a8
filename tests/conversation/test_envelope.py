"""Requests shown again from what is stored: byte for byte, whatever was said and however it was written."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given

from proxy.conversation.envelope import request_of
from proxy.conversation.records import Record, decode_record, record_key, restore_window
from proxy.keys import BLOCK
from tests.conversation.player import Message, Played, Player, limits_of, says
from tests.conversation.scenario import Scenario, play, scenarios
from tests.examples import examples

WORDS = "lantern violin harbour comet walnut "


def shown(player: Player, played: Played) -> bytes | None:
    """The request of a turn as a process finds it that has nothing in RAM; None: another's was stored."""
    ours = played.turn.record
    assert ours is not None
    stored = decode_record(player.values[record_key(ours.id)])
    if stored.request != ours.request:
        return None

    def get(node_id: bytes) -> Record | None:
        data = player.values.get(record_key(node_id))
        return None if data is None else decode_record(data)

    found = request_of(stored, get, player.get_block, lambda record: restore_window(record, get, player.get_block))
    assert found is not None and found.exact
    return found.body


@examples(12)
@given(scenarios())
def test_request_of_any_turn_comes_back_byte_for_byte(scenario: Scenario) -> None:
    player = Player(scenario.limits())
    for played in play(scenario, player).played:
        if played.answer.refused is None and played.turn.record is not None and not played.turn.record.unkept:
            assert shown(player, played) in (None, played.bodies[-1])


def test_request_of_an_untouched_turn_keeps_its_clients_writing() -> None:
    """Separators, spaces, escapes, numbers; a gap that is not the same everywhere; system messages in the middle."""
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "\u00e9 </"}, says("a") | {"refusal": 1.0}]
    messages += [{"role": "system", "content": "between"}, {"role": "user", "content": "b"}]
    whole: dict[str, Any] = {"model": "gpt-4o", "temperature": 1.0, "messages": messages, "tools": []}
    uneven = json.dumps(whole).replace('"b"}]', '"b"}  ]').replace('{"role": "system", "content": "b', ' {"role": "system", "content": "b')
    for body in (json.dumps(whole), json.dumps(whole, indent=2, ensure_ascii=False), json.dumps(whole, separators=(",", ":")), uneven):
        player = Player(limits_of(9000))
        played = player.ask([], lambda _: says("yes"), body=body.encode())
        assert shown(player, played) == played.bodies[-1] == body.encode()


def test_envelope_is_stored_once_and_a_new_date_costs_little() -> None:
    player, messages = Player(limits_of(3000)), list[Message]()
    tools = [{"type": "function", "function": {"name": f"tool_{n}", "description": WORDS * 9}} for n in range(9)]
    sizes: list[int] = []
    for turn in range(40):
        date = f"It is day {turn}." if turn >= 30 else "It is today."
        messages.append({"role": "user", "content": f"{turn}: {WORDS * 20}"})
        before = set(player.values)
        sent = [{"role": "system", "content": f"{WORDS * 9}{date}"}, *messages]
        played = player.ask(sent, lambda _: says(WORDS * 20), tools=tools)
        sizes.append(sum(len(player.values[key]) for key in set(player.values) - before if key[:1] == BLOCK))
        assert shown(player, played) == played.bodies[-1]
        messages.append(says(WORDS * 20))
    assert any(played_epoch for played_epoch in played.epochs), "it was never paged"
    assert sizes[0] > 3000 and sizes[31] < 600 and sorted(sizes[2:30])[10] == 0
