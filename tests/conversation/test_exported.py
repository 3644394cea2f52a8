"""Every branch of every conversation as lines, and back into another store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import keys
from proxy.conversation.exported import Grown, Line, Tree, exported, owners
from proxy.conversation.records import (
    Record,
    block_key,
    decode_record,
    deepest_record,
    load_path,
    record_key,
)
from proxy.conversation.tree import Identity, NodeId, TenantKey
from tests.conversation.player import Message, Player, limits_of, says, script
from tests.examples import examples

Values = dict[bytes, bytes]
_line = msgspec.json.Decoder(Line).decode


def scanned(values: Values, prefix: bytes, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
    return [(key, values[key]) for key in sorted(values) if key.startswith(prefix) and key > after][:limit]


def lines_of(values: Values, owner: bytes, identity: Identity) -> list[Line]:
    lost: list[NodeId] = []
    _, *lines = exported(owner, lambda *asked: scanned(values, *asked), values.get, identity, lost)
    assert not lost
    return [_line(line) for line in lines]


def branches(lines: Sequence[Line]) -> dict[int, tuple[str, ...]]:
    """All that was said up to each message, as it is told; the same only once."""
    said: dict[int, tuple[str, ...]] = {}
    for line in lines:
        before = said[line.parent] if line.parent is not None else ()
        said[line.n] = (*before, bytes(line.message).decode())
    assert len({tuple(map(plain, path)) for path in said.values()}) == len(said)
    return said


def plain(raw: str) -> str:
    return json.dumps(json.loads(raw), sort_keys=True)


class Store:
    """What an import stores."""

    def __init__(self, secret: bytes) -> None:
        self.values: Values = {}
        self.identity = Identity(secret)
        self.tenant = self.identity.tenant("key", "ann")

    def get_record(self, node_id: bytes) -> Record | None:
        data = self.values.get(record_key(node_id))
        return decode_record(data) if data is not None else None

    def get_block(self, owner: bytes, ref: bytes) -> bytes | None:
        return self.values.get(block_key(owner, ref))

    def take(self, lines: Sequence[Line]) -> tuple[Grown, int]:
        """And how many values were new."""
        grown, before = Grown(lines, self.identity, self.tenant), len(self.values)
        for branch in grown.branches(self.get_record, self.get_block):
            for key, value in branch:
                self.values.setdefault(key, value)
        return grown, len(self.values) - before


steps = st.lists(st.sampled_from(["say", "say", "again", "back", "rewrite", "anew", "tool"]), min_size=1, max_size=12)


@given(steps=steps, words=st.integers(1, 300))
@examples(12)
def test_all_that_was_said_comes_out_and_goes_into_another_store(steps: list[str], words: int) -> None:
    player = Player(limits_of(100_000))
    history: list[Message] = []
    expected: set[tuple[str, ...]] = set()
    for number, step in enumerate(steps):
        if step == "anew":
            history = []
        elif step == "again" and history:  # regenerated
            history = history[:-2]
        elif step == "back":
            history = history[: len(history) // 4 * 2]
        elif step == "rewrite" and history:  # its client says its first message otherwise, as one with a clock does
            history[0] = {**history[0], "content": f"It is {number} o'clock.\n" + "word " * words}
        said: Message = {"role": "user", "content": f"Question {number}: é " + "word " * words}
        if step == "tool" and history:
            call = {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            history[-1] = {"role": "assistant", "content": None, "tool_calls": [call]}
            said = {"role": "tool", "tool_call_id": f"c{number}", "content": "42"}
        history = [*history, said]
        player.now_s = 1000.0 + number
        played = player.ask(history, script(says(f"Answer {number}.")))
        assert played.message is not None
        history.append({"role": "assistant", "content": played.message["content"]})
        path = tuple(plain(json.dumps(message)) for message in history)
        expected.update(path[: end + 1] for end in range(len(path)))

    scan = lambda *asked: scanned(player.values, *asked)  # noqa: E731
    store, told = Store(bytes(32)), set()
    for owner in owners(scan):
        lines = lines_of(player.values, owner, player.identity)
        told.update(tuple(map(plain, path)) for path in branches(lines).values())
        grown, new = store.take(lines)
        assert new and grown.unanswered == 0 and sum(line.head for line in lines) == 1
        assert store.take(lines)[1] == 0
        (mine,) = grown.heads
        back = lines_of(store.values, mine, store.identity)
        assert sorted(branches(back).values()) == sorted(branches(lines).values())
        assert {line.seen_s for line in back} == {line.seen_s for line in lines}
        for path in branches(back).values():
            if json.loads(path[-1])["role"] == "assistant":
                check_found(store, path)
    assert told == expected


def check_found(store: Store, path: Sequence[str]) -> None:
    """A client that sends these messages is on a path with these bytes."""
    nodes = store.identity.extend(store.tenant, [], [(raw.encode(), json.loads(raw)) for raw in path])
    record = deepest_record(nodes, store.get_record)
    assert record is not None and record.id == nodes[-1].id
    found = load_path(record, store.get_record, store.get_block, store.identity)
    assert [found[at].raw.decode() for at in range(len(found))] == list(path)


def test_an_answer_that_is_lost_is_told_and_the_others_come_out() -> None:
    player = Player(limits_of(100_000))
    history: list[Message] = []
    for number in range(4):
        history.append({"role": "user", "content": str(number)})
        played = player.ask(history if number < 3 else history[:2] + history[-1:], script(says(f"a{number}")))
        assert played.message is not None
        history.append({"role": "assistant", "content": played.message["content"]})
    records = sorted((decode_record(v) for k, v in player.values.items() if k.startswith(keys.RECORD)), key=lambda r: r.turn)
    del player.values[record_key(records[1].id)]
    lost: list[NodeId] = []
    (owner,) = owners(lambda *asked: scanned(player.values, *asked))
    told = list(exported(owner, lambda *asked: scanned(player.values, *asked), player.values.get, player.identity, lost))
    assert [json.loads(line)["message"]["content"] for line in told[1:]] == ["0", "a0", "3", "a3"]
    assert lost == [records[-1].id]


@pytest.mark.parametrize(
    "broken", ['{"n": 0, "parent": 7, "message": {"role": "user"}}', '{"n": 0, "message": [1]}', '{"n": 0, "message": {}}']
)
def test_lines_that_are_none_are_refused(broken: str) -> None:
    with pytest.raises(ValueError, match="message 0"):
        Grown([_line(broken)], Identity(bytes(32)), TenantKey(bytes(22)))


def test_system_messages_are_in_no_path_and_what_is_not_answered_is_told() -> None:
    tree = Tree()
    at: int | None = None
    for role in ("system", "user", "assistant", "developer", "user", "user"):
        at = tree.add(at, {"role": role, "content": f"{role}{at}"}, 0)
    store = Store(bytes(32))
    grown, _ = store.take(tree.lines())
    assert grown.unanswered == 2
    (owner,) = grown.heads
    said: list[Any] = [json.loads(bytes(line.message))["role"] for line in lines_of(store.values, owner, store.identity)]
    assert said == ["user", "assistant"]
