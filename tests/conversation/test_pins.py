"""Pins of a person's, told as dialogues: they come with the next turn, stay, and are the log's."""

from __future__ import annotations

from typing import Any

from proxy.conversation.pins import MOST, Pin, decode_pins, encode_pins, with_pin
from proxy.conversation.records import history
from proxy.conversation.tree import NodeId
from proxy.memory.models import Actor, MutationType, StorageTier
from tests.conversation.player import Message, Played, Player, limits_of, says

WORDS = "lantern violin harbour comet walnut meadow "


class Pinning(Player):
    """A player with a person beside it."""

    pins: tuple[Pin, ...] = ()

    def _perform(self, turn: Any, context: Any, played: Any, model: Any) -> None:
        context.pins = lambda: self.pins
        super()._perform(turn, context, played, model)


def talked(player: Player, messages: list[Message], turns: int, words: int = 40) -> Played:
    for number in range(turns):
        messages.append({"role": "user", "content": f"{number}: {WORDS * (words // 6)}"})
        played = player.ask(messages, lambda _: says(WORDS * (words // 6)))
        messages.append(says(WORDS * (words // 6)))
    return played


def pin(played: Played, page_id: str, position: int, pinned: bool = True) -> Pin:
    return Pin(page_id, played.turn.path[position].id, pinned, 1)


def began() -> tuple[Pinning, list[Message], Played]:
    player, messages = Pinning(limits_of(2000)), [{"role": "user", "content": "The master is called Olgamark."}, says("Yes.")]
    played = talked(player, messages, 24)
    assert played.turn.table.lookup("msg_0001").tier is not StorageTier.L0  # type: ignore[union-attr]
    return player, messages, played


def test_pinned_page_comes_with_an_epoch_stays_and_is_in_the_log() -> None:
    player, messages, played = began()
    player.pins = (pin(played, "msg_0001", 0),)
    played = talked(player, messages, 1)
    assert played.answer.report.new_epoch and b"Olgamark" in played.bodies[-1]
    epochs = sum(talked(player, messages, 1).answer.report.new_epoch for _ in range(6))
    played = talked(player, messages, 1)
    assert b"Olgamark" in played.bodies[-1] and epochs < 4, "it stays, and does not begin an epoch each turn"
    assert played.turn.record is not None
    told = [m for m in history(played.turn.record, player.get_record).entries if m.actor is Actor.USER]
    assert [m.op for m in told] == [MutationType.PIN, MutationType.MAP]
    player.pins = (pin(played, "msg_0001", 0, pinned=False),)
    assert not talked(player, messages, 1).turn.table.lookup("msg_0001").pinned  # type: ignore[union-attr]


def test_pin_of_a_page_that_is_there_as_evidence_stays_when_the_evidence_leaves() -> None:
    player, messages, played = began()
    messages.append({"role": "user", "content": "What is the master called, Olgamark?"})
    player.ask(messages, lambda _: says("So."))
    messages.append(says("So."))
    player.pins = (pin(played, "msg_0001", 0),)
    for _ in range(3):
        played = talked(player, messages, 1, 12)
        assert b"Olgamark." in b"".join(played.messages_bytes())
    found = played.turn.table.lookup("msg_0001")
    assert found is not None and found.pinned and found.tier is StorageTier.L0


def test_pin_names_a_message_not_a_place() -> None:
    player, messages, played = began()
    player.pins = (Pin("msg_0001", NodeId(b"x" * 34), True, 1), Pin("msg_9999", played.turn.path[0].id, True, 1))
    entry = talked(player, messages, 1).turn.table.lookup("msg_0001")
    assert entry is not None and not entry.pinned


def test_pins_are_bounded_and_the_last_word_counts() -> None:
    pins: list[Pin] = []
    for number in range(MOST + 5):
        pins = with_pin(pins, Pin(f"msg_{number:04d}", NodeId(b"n"), True, number))
    pins = with_pin(pins, Pin("msg_0100", NodeId(b"n"), False, 9))
    assert len(pins) == MOST and pins[-1] == Pin("msg_0100", NodeId(b"n"), False, 9)
    assert decode_pins(encode_pins(pins)) == pins and decode_pins(None) == []
