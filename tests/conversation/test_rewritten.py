"""Clients that say their newest message otherwise in the next request: the prefix before it stays.

RAG front ends send it with the text that they retrieved and keep it without; agents put a system
message before it and take that along. A client without us loses its provider's cache from that
message on: so much, and no more, may it lose with us.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory import StorageTier
from tests.conversation.checks import goes_on
from tests.conversation.player import (
    Message,
    Model,
    Played,
    Player,
    call,
    calls,
    check_pairs,
    count_tokens,
    limits_of,
    says,
    script,
    tool_messages,
)
from tests.conversation.scenario import text_of
from tests.examples import examples

KINDS = ("retrieved", "system", "developer", "user")
BUDGET = 4000


@dataclass
class Client:
    """A history, and how its newest message is dressed up. `sent` are its requests' messages."""

    player: Player
    history: list[Message] = field(default_factory=list)
    sent: list[list[Message]] = field(default_factory=list)
    played: list[Played] = field(default_factory=list)

    def turn(
        self, kind: str, number: int, words: int = 200, model: Model | None = None, **extra: Any
    ) -> Played:
        rng = random.Random(number)
        asked = {"role": "user", "content": text_of(rng, 30, f"user{number}x")}
        more = text_of(rng, words, f"more{number}x")
        said = says(text_of(rng, 100, f"answer{number}x"))
        self.sent.append([*self.history, *dressed(kind, asked, more)])
        self.played.append(self.player.ask(self.sent[-1], model or script(said), **extra))
        message = self.played[-1].message
        assert message is not None
        self.history += [asked, {"role": "assistant", "content": message["content"]}]
        return self.played[-1]

    def epochs(self) -> int:
        return sum(played.answer.report.new_epoch for played in self.played)


def dressed(kind: str, asked: Message, more: str) -> list[Message]:
    """What stands behind the last answer; only `asked` is there in the next request."""
    if kind == "retrieved":
        return [{**asked, "content": f"Use this context: {more} Question: {asked['content']}"}]
    return [asked] if kind == "plain" else [{"role": kind, "content": f"Reminder: {more}"}, asked]


def shared(one: bytes, other: bytes) -> int:
    return len(os.path.commonprefix([one, other]))


def before_the_newest(client: Client, at: int) -> int:
    """Where in the upstream bytes of a request the part begins that the client takes back."""
    raw = client.played[at].messages_bytes()[0]
    return raw.rfind(b'{"role"', 0, raw.index(b"more%dx" % at))


def new_player(budget: int = BUDGET, **changes: Any) -> Player:
    return Player(limits_of(budget, page_tokens=512, **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_before_the_newest_message_stays(kind: str) -> None:
    client, linear = Client(new_player()), Client(new_player())
    client.history.append({"role": "system", "content": "You help."})
    kept = 0
    for number in range(40):
        played = client.turn(kind, number)
        linear.turn("plain", number)
        for request in played.requests:
            assert count_tokens(request) <= BUDGET
        if number == 0 or client.played[-2].turn.window is None or played.answer.report.new_epoch:
            continue
        before, now = client.played[-2].messages_bytes()[-1], played.messages_bytes()[0]
        assert shared(before, now) >= before_the_newest(client, number - 1)
        assert b"more%dx" % (number - 1) not in now
        kept += 1
    assert kept >= 15
    assert client.epochs() <= linear.epochs() + 2, "an epoch for nothing but another last message"


@pytest.mark.parametrize("kind", KINDS)
def test_invariant_07_the_same_request_gives_the_same_bytes_cold_and_again(kind: str) -> None:
    client, cold = Client(new_player()), new_player()
    for number in range(30):
        said = says(text_of(random.Random(number + 99), 100, f"answer{number}y"))
        played = client.turn(kind, number, model=script(said))
        other = cold.ask(client.sent[-1], script(said))
        assert other.bodies == played.bodies
        assert cold.values == client.player.values
        again = new_player()
        again.values = dict(cold.values)
        assert again.ask(client.sent[-1], script(says("Another answer."))).bodies == played.bodies
        cold = new_player()
        cold.values = dict(client.player.values)
    assert played.turn.window is not None


def grown(kind: str, turns: int = 30, **changes: Any) -> Client:
    client = Client(new_player(**changes))
    for number in range(turns):
        client.turn(kind, number)
    assert client.played[-1].turn.window is not None
    return client


def with_room(client: Client, kind: str) -> Client:
    """At the beginning of an epoch, so that the next turns go on in it."""
    while not client.turn(kind, len(client.sent)).answer.report.new_epoch:
        pass
    return client


def fault_of(page: str, name: str = "f") -> Message:
    return calls(call("page_fault", {"page_id": page, "target_level": 0}, f"{name}_{page}"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_loaded_behind_the_message_is_gone_and_can_be_loaded_again(kind: str) -> None:
    """Invariant 4: "you have it above" would be a lie, and the words would be lost."""
    client = with_room(grown(kind), kind)
    first = client.turn(kind, len(client.sent), model=script(fault_of("msg_0003"), says("one")))
    loaded = json.loads(tool_messages(first.requests[-1])[-1]["content"])["page"]
    mark = loaded["content"]["text"].split()[0]
    assert mark in ("user1x", "answer0x")  # a first message taken back is what a trimming client does
    again = client.turn(kind, len(client.sent), model=script(fault_of("msg_0003"), says("two")))
    assert not again.answer.report.new_epoch
    assert not [m for m in tool_messages(again.requests[0]) if mark in m["content"]]
    assert json.loads(tool_messages(again.requests[-1])[-1]["content"])["page"] == loaded
    for request in again.requests:
        check_pairs(request)


def test_pages_brought_in_before_the_call_go_with_the_message() -> None:
    client = with_room(grown("retrieved"), "retrieved")
    number = len(client.sent)
    question = {"role": "user", "content": "What did we say about user1x and answer1x before?"}
    sent = [*client.history, {**question, "content": f"more{number}x {question['content']}"}]
    played = client.player.ask(sent, script(says("This.")))
    brought = played.answer.report.prefetched_pages
    assert brought and played.turn.settled is not None
    state = played.turn.settled[1]
    sent = [*client.history, question, {"role": "assistant", "content": "This."},
            {"role": "user", "content": "And now?"}]  # fmt: skip
    then = client.player.ask(sent, script(says("That.")))
    assert then.place.record is not None and not then.answer.report.new_epoch
    assert played.settled is not None and then.messages_bytes()[0].startswith(played.settled)
    for page in brought:
        entry = then.turn.table.lookup(page)
        assert entry is not None and entry.tier is not StorageTier.L0
    assert state.window.entries == then.turn.window.entries[: len(state.window.entries)]


def test_invariant_06_two_that_differ_in_the_newest_message_do_not_mix_even_at_once() -> None:
    """The second is placed, asked and stored while the first waits for its model."""
    client = with_room(grown("retrieved"), "retrieved")
    rng = random.Random(2)
    sent = {
        name: [*client.history, {"role": "user", "content": f"{name}7x {text_of(rng, size, 's')}"}]
        for name, size in (("outer", 5), ("inner", 300))
    }
    played: dict[str, Played] = {}

    def asks_meanwhile(_: Message) -> Message:
        played["inner"] = client.player.ask(sent["inner"], script(says("inner")))
        return says("outer")

    played["outer"] = client.player.ask(sent["outer"], asks_meanwhile)
    stored = [one.turn.settled for one in played.values()]
    assert stored[0] and stored[1] and stored[0][0].id == stored[1][0].id
    for name, foreign in (("outer", b"inner7x"), ("inner", b"outer7x")):
        client.player.forget()
        answer = {"role": "assistant", "content": name}
        history = [*sent[name], answer, {"role": "user", "content": "And so?"}]
        then = client.player.ask(history, script(says("So.")))
        assert not then.answer.report.new_epoch
        assert then.messages_bytes()[0].startswith(played[name].messages_bytes()[-1][:-1])
        assert foreign not in then.bodies[0] + played[name].bodies[0]


@pytest.mark.parametrize("words", [900, 1600, 3500])
def test_a_retrieved_text_that_is_large_for_the_window_is_shown_within_the_budget(words: int) -> None:
    client = Client(new_player())
    for number in range(24):
        played = client.turn("retrieved", number, words=words if number > 10 else 50)
        for request in played.requests:
            assert count_tokens(request) <= BUDGET
            assert b"user%dx" % number in played.bodies[0]
            assert not number or b"more%dx" % (number - 1) not in played.bodies[0]


def test_an_agents_results_are_new_messages_too() -> None:
    """A call and its results stay whole when the answers before them are new as well (invariant 8)."""
    client = grown("plain", 40)
    wanted = calls(call("lookup", {"word": "x"}, "c1"))
    rng = random.Random(5)
    other = [{"role": role, "content": text_of(rng, 100, f"other{i}x")}
             for i in range(30) for role in ("user", "assistant")]  # fmt: skip
    for history, words in ((other, 200), (client.history, 200), (client.history, 2400)):
        result = {"role": "tool", "tool_call_id": "c1", "content": text_of(rng, words, "result1x")}
        asked = {"role": "user", "content": f"look {words}"}
        played = client.player.ask([*history, asked, wanted, result], script(says("found")))
        again = client.player.ask([*history, asked, wanted, result], script(says("once more")))
        assert again.bodies == played.bodies
        check_pairs(played.requests[0])
        assert b"result1x" in played.bodies[0]
    assert played.answer.report.new_epoch and played.turn.settled is not None


def test_the_window_begins_with_a_question_when_only_the_last_answer_has_room() -> None:
    rng = random.Random(5)
    history = [{"role": role, "content": text_of(rng, 100, f"old{i}x")}
               for i in range(20) for role in ("user", "assistant")]  # fmt: skip
    history += [{"role": "user", "content": text_of(rng, 3600, "long1x")},
                {"role": "assistant", "content": "short1x"}]  # fmt: skip
    sent = [*history, {"role": "user", "content": text_of(rng, 100, "new1x")}]
    played = new_player().ask(sent, script(says("so")))
    assert played.turn.settled is not None
    assert [m["role"] for m in played.requests[0]["messages"]] == ["developer", "user"]


kinds = st.sampled_from(("plain", *KINDS))


@examples(40)
@given(
    st.lists(st.tuples(kinds, st.sampled_from((5, 60, 300))), min_size=25, max_size=40),
    st.sampled_from((2500, 4000)), st.integers(0, 999),
)  # fmt: skip
def test_no_more_is_lost_than_a_client_without_us_loses(
    turns: list[tuple[str, int]], budget: int, seed: int
) -> None:
    """Within an epoch: up to the first message of the client's that is another than before."""
    client = Client(new_player(budget))
    for number, (kind, words) in enumerate(turns):
        rng = random.Random(seed + number)
        loads = fault_of(f"msg_{rng.randint(1, 2 * number + 1):04d}", f"t{number}")
        model = script(loads, says(f"said{number}x")) if rng.random() < 0.3 else None
        played = client.turn(kind, number, words, model)
        for request in played.requests:
            assert count_tokens(request) <= budget
            check_pairs(request)
        if rng.random() < 0.3:
            client.player.forget()
        if len(client.sent) == 1 or played.answer.report.new_epoch:
            continue
        before = client.played[-2]
        if before.turn.window is None or before.epochs[-1] != played.epochs[0]:
            continue  # a bare request, or an epoch began where this one does not go on
        one, other = client.sent[-2], client.sent[-1]
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
        raw = before.messages_bytes()[-1]
        if same < len(one):
            mark = b"more%dx" % (number - 1)
            assert mark in json.dumps(one[same]).encode()
            raw = raw[: raw.rfind(b'{"role"', 0, raw.index(mark))]
        assert goes_on(raw[:-1] + b"]", played.messages_bytes()[0])


@pytest.mark.parametrize("kind", ["retrieved", "plain"])
def test_a_turn_with_an_answer_that_came_with_it_counts_as_two(kind: str) -> None:
    """What the prefix did is of the turn before: a request that comes again finds it done."""
    client = grown(kind)
    turn = client.played[-1].turn
    assert turn.record is not None and turn.report.turn == turn.record.turn == turn.table.turn
    newest = turn.table.lookup(f"msg_{len(turn.path) - 1:04d}")
    assert newest is not None and newest.created_turn == turn.report.turn
    assert (turn.settled is not None) is (kind == "retrieved")
    if turn.settled is not None:
        before = turn.table.lookup(f"msg_{len(turn.path) - 2:04d}")
        assert before is not None and before.created_turn == turn.settled[0].turn == turn.report.turn - 1


def test_a_long_answer_does_not_take_the_room_of_what_comes_after_it() -> None:
    """It may leave, as any message that is not the newest; what stays begins with a question."""
    client = Client(new_player())
    counted = 0
    for number in range(30):
        long = says(text_of(random.Random(number), 750, f"answer{number}x"))  # 0.35 of the window
        played = client.turn("retrieved", number, words=600, model=script(long))
        if played.turn.settled is None or not played.answer.report.new_epoch:
            continue
        assert len(played.epochs) == 1 and played.turn.window is not None
        assert played.turn.window.tokens <= 0.7 * BUDGET
        assert [m["role"] for m in played.requests[0]["messages"]][:2] == ["developer", "user"]
        counted += 1
    assert counted > 3


def test_a_message_that_was_cut_is_not_put_back_whole_behind_the_tables_back() -> None:
    """A reminder moves on while the message behind it is shown by its ends only; the next request
    comes to a server with more room."""
    client = grown("system")
    number = len(client.sent)
    asked = {"role": "user", "content": text_of(random.Random(1), 3200, "long1x")}
    sent = [*client.history, {"role": "system", "content": "Reminder: first"}, asked]
    played = client.player.ask(sent, script(says("cut")))
    window = played.turn.window
    assert window is not None and b"are not shown" in played.bodies[0]
    larger = new_player(2 * BUDGET)
    larger.values = dict(client.player.values)
    sent = [*client.history, asked, {"role": "assistant", "content": "cut"},
            {"role": "system", "content": "Reminder: second"},
            {"role": "user", "content": f"user{number}x"}]  # fmt: skip
    then = larger.ask(sent, script(says("so")))
    assert b"Reminder: first" not in then.bodies[0] and then.turn.window is not None
    for entry in then.turn.window.entries:
        if entry.position >= 0 and entry.raw == then.turn.path[entry.position].raw:
            pages = [then.turn.table.lookup(i) for i in then.turn.pages[entry.position].ids]
            assert all(page and page.tier is StorageTier.L0 for page in pages)
