"""Clients that say their newest messages otherwise in the next request: the prefix before these stays.

RAG front ends send the newest one with the text that they retrieved and keep it without; agents put a
system message before it and take that along, or a pair with the files in front of it; others have a note
some messages before the end, drop thoughts, or cut older results. A client without us loses its
provider's cache from the first message on that it rewrites: so much, and no more, may it lose with us.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.records import record_key
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
    assert brought and played.turn.settled
    state = played.turn.settled[-1][1]
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
    assert played["inner"].turn.settled and not played["outer"].turn.settled, "the first one's stays"
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
    assert played.answer.report.new_epoch and played.turn.settled


def test_the_window_begins_with_a_question_when_only_the_last_answer_has_room() -> None:
    rng = random.Random(5)
    history = [{"role": role, "content": text_of(rng, 100, f"old{i}x")}
               for i in range(20) for role in ("user", "assistant")]  # fmt: skip
    history += [{"role": "user", "content": text_of(rng, 3600, "long1x")},
                {"role": "assistant", "content": "short1x"}]  # fmt: skip
    sent = [*history, {"role": "user", "content": text_of(rng, 100, "new1x")}]
    played = new_player().ask(sent, script(says("so")))
    assert played.turn.settled
    assert [m["role"] for m in played.requests[0]["messages"]] == ["developer", "user"]


kinds = st.sampled_from(("plain", *KINDS))


@examples(6)
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
    assert bool(turn.settled) is (kind == "retrieved")
    if turn.settled:
        before = turn.table.lookup(f"msg_{len(turn.path) - 2:04d}")
        assert before is not None and before.created_turn == turn.settled[-1][0].turn == turn.report.turn - 1


def test_a_long_answer_does_not_take_the_room_of_what_comes_after_it() -> None:
    """It may leave, as any message that is not the newest; what stays begins with a question."""
    client = Client(new_player())
    counted = 0
    for number in range(30):
        long = says(text_of(random.Random(number), 750, f"answer{number}x"))  # 0.35 of the window
        played = client.turn("retrieved", number, words=600, model=script(long))
        if not played.turn.settled or not played.answer.report.new_epoch:
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


# -- rewritten further from the end

Way = Callable[[list[Message], Message, int], list[Message]]  # of what was said, the question, its number


def at_depth(depth: int) -> Way:
    """As SillyTavern's author's note."""

    def way(said: list[Message], asked: Message, number: int) -> list[Message]:
        sent = [*said, asked]
        at = max(0, len(sent) - depth)
        return [*sent[:at], {"role": "user", "content": f"Keep to note{number}x."}, *sent[at:]]

    return way


def with_files(words: int, often: int) -> Way:
    """As aider: what the files say now, and that this was read, in front of the newest message."""

    def way(said: list[Message], asked: Message, number: int) -> list[Message]:
        text = text_of(random.Random(1), words, "file")
        files = {"role": "user", "content": f"The files: note{number // often}x {text}"}
        return [*said, files, {"role": "assistant", "content": "I have read them."}, asked]

    return way


def without_thoughts(said: list[Message], asked: Message, number: int) -> list[Message]:
    """But for the last answer's."""
    return [*(drop(m, "note") if i < len(said) - 1 else m for i, m in enumerate(said)), asked]


def with_short_results(said: list[Message], asked: Message, number: int) -> list[Message]:
    """What is older than three turns is cut."""
    return [*(drop(m, "note") if i < len(said) - 6 else m for i, m in enumerate(said)), asked]


def with_a_memory(said: list[Message], asked: Message, number: int) -> list[Message]:
    """A pair that is edited now and then."""
    memory = {"role": "user", "content": f"Remember note{number // 3}x."}
    return [*said[:-6], memory, {"role": "assistant", "content": "Yes."}, *said[-6:], asked]


def drop(message: Message, word: str) -> Message:
    words = str(message["content"]).split()
    return {**message, "content": " ".join(w for w in words if not w.startswith(word))}


def with_signature_at(position: int) -> Way:
    """An address that is signed anew for every request, in a message that does not move."""

    def way(said: list[Message], asked: Message, number: int) -> list[Message]:
        image = {"role": "user", "content": f"Look: https://b.example/p.png?signature={number:040d}"}
        return [*said[:position], image, {"role": "assistant", "content": "A cat."}, *said[position:], asked]

    return way


WAYS: dict[str, Way] = {
    **{f"note {depth}": at_depth(depth) for depth in (1, 4, 8)},
    "files": with_files(120, 1), "thoughts": without_thoughts, "results": with_short_results, "memory": with_a_memory,
}  # fmt: skip


STEADY: dict[str, Way] = {"signed 0": with_signature_at(0), "signed 4": with_signature_at(4), "large files": with_files(900, 20)}


class Writer:
    """A client that builds its requests in a way."""

    def __init__(self, player: Player, way: Way) -> None:
        self.player, self.way = player, way
        self.said: list[Message] = []
        self.sent: list[list[Message]] = []
        self.played: list[Played] = []

    def turn(self, words: int = 60, model: Model | None = None) -> Played:
        number = len(self.sent)
        rng = random.Random(number)
        asked = {"role": "user", "content": text_of(rng, words, f"user{number}x")}
        more = f"note{number}x " if self.way in (without_thoughts, with_short_results) else ""
        answer = says(more + text_of(rng, 60, f"answer{number}x"))
        self.sent.append(self.way(self.said, asked, number))
        self.played.append(self.player.ask(self.sent[-1], model or script(answer)))
        message = self.played[-1].message
        assert message is not None
        self.said += [asked, {"role": "assistant", "content": message["content"]}]
        return self.played[-1]

    def windows(self) -> int:
        """How many windows it had one after the other."""
        requests = (request for played in self.played for request in played.requests)
        fronts = [m["content"] for request in requests if (m := request["messages"][0])["role"] == "developer"]
        return 1 + sum(before != now for before, now in pairwise(fronts))

    def check(self) -> bool:
        """The newest request has all of the one before that the client still had; False: not to be compared."""
        if len(self.played) < 2 or self.played[-2].turn.window is None:
            return False
        before, now = self.played[-2:]
        one, other = self.sent[-2:]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        had, has = before.requests[-1]["messages"], now.requests[0]["messages"]
        if had[0] != has[0] or now.answer.report.new_epoch:  # or an older one, of a way that it comes back to
            return False
        if same == len(one):  # it rewrote nothing
            return False
        behind = one[same:].count(one[same])  # messages may say the same
        found = [i for i, m in enumerate(had) if m == one[same]]
        at = found[-behind] if len(found) >= behind else 0  # 0: it had left the window
        assert had[:at] == has[:at]
        return at > 0


@pytest.mark.parametrize("name", WAYS)
def test_no_more_is_lost_than_what_the_client_rewrote_at_any_depth(name: str) -> None:
    client, linear = Writer(new_player(), WAYS[name]), Writer(new_player(), lambda said, asked, _: [*said, asked])
    cold, kept = new_player(), 0
    for number in range(48):
        played = client.turn()
        linear.turn()
        cold.values = {**client.player.values} if number % 7 == 0 else cold.values
        if number % 5 == 0:
            client.player.forget()
        for request in played.requests:
            assert count_tokens(request) <= BUDGET
        kept += client.check()
        gone = set(range(number)) - {int(n) for n in NOTE.findall(json.dumps(client.sent[-1]))}
        assert not gone & {int(n) for n in NOTE.findall(played.bodies[0].decode())}, "invariant 6"
    assert kept >= 15 and 2 <= client.windows() <= 2 + linear.windows()


LOOKUP_TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
NOTE = re.compile(r"note(\d+)x")


@pytest.mark.parametrize("name", ["note 4", "thoughts", "files"])
def test_invariant_07_a_rewritten_history_gives_the_same_bytes_cold_and_again(name: str) -> None:
    client, cold = Writer(new_player(), WAYS[name]), Writer(new_player(), WAYS[name])
    for number in range(36):
        model = script(fault_of("msg_0003", f"f{number}"), says(f"Loaded answer{number}x.")) if number % 4 == 3 else None
        played = client.turn(model=model)
        other = cold.turn(model=model and script(fault_of("msg_0003", f"f{number}"), says(f"Loaded answer{number}x.")))
        assert other.bodies == played.bodies and cold.player.values == client.player.values
        again = new_player()
        again.values = dict(cold.player.values)
        assert again.ask(client.sent[-1], script(says("Another."))).bodies[0] == played.bodies[0]
        cold.player.forget()
    assert played.turn.window is not None


@examples(4)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(WAYS | STEADY)), st.sampled_from((20, 80, 250)), st.booleans()),
        min_size=30, max_size=36,
    ),
    st.sampled_from((2500, 4000)), st.integers(0, 999),
)  # fmt: skip
def test_a_client_may_change_its_way(turns: list[tuple[str, int, bool]], budget: int, seed: int) -> None:
    client = Writer(new_player(budget), WAYS["files"])
    for number, (name, words, forgets) in enumerate(turns):
        if number % 5 == 0:
            client.way = (WAYS | STEADY)[name]
        rng = random.Random(seed + number)
        loads = fault_of(f"msg_{rng.randint(1, 2 * number + 1):04d}", f"t{number}")
        played = client.turn(words, script(loads, says(f"said{number}x")) if rng.random() < 0.3 else None)
        for request in played.requests:
            assert count_tokens(request) <= budget
            check_pairs(request)
        client.check()
        again = new_player(budget)
        again.values = dict(client.player.values)
        assert again.ask(client.sent[-1], script(says("Again."))).bodies[0] == played.bodies[0], "invariant 7"
        if forgets:
            client.player.forget()


@pytest.mark.parametrize("name, budget", [
    *((name, BUDGET) for name in ("linear", "note 4", "thoughts", "files", *STEADY)), ("note 4", 100_000), ("signed 4", 100_000),
])  # fmt: skip
def test_the_store_grows_by_what_is_new_and_every_path_comes_back_whole(name: str, budget: int) -> None:
    way = WAYS.get(name) or STEADY.get(name) or (lambda said, asked, _: [*said, asked])
    client, stored = Writer(new_player(budget), way), [0]
    said = 0
    for _ in range(60):
        played = client.turn()
        said += sum(len(json.dumps(m)) for m in client.said[-2:])
        stored.append(sum(map(len, client.player.values.values())))
        assert played.turn.record is not None
        loaded = client.player._load_path(played.turn.record)
        assert [(n.id, n.role, n.raw) for n in loaded] == [(n.id, n.role, n.raw) for n in played.turn.path]
    assert stored[-1] <= 8 * said
    assert stored[60] - stored[40] <= 1.3 * (stored[40] - stored[20]), "it grows by the history"


def test_a_client_that_does_not_change_its_first_message_any_more_has_a_window_again() -> None:
    client = Writer(new_player(), with_signature_at(0))
    for _ in range(30):
        assert client.turn().turn.record is not None
    record = client.played[-1].turn.record
    assert record is not None and record.unkept and not record.window
    client.way = lambda said, asked, _: [*client.sent[29][:2], *said, asked]
    assert client.turn().answer.report.new_epoch
    client.player.forget()
    assert not client.turn().answer.report.new_epoch
    had, has = (played.requests[0]["messages"] for played in client.played[-2:])
    assert has[: len(had) - 1] == had[:-1], "but for the newest, whose evidence has left"


def test_a_path_that_others_are_read_from_is_missed_and_nothing_else() -> None:
    client = Writer(new_player(), with_signature_at(0))
    for _ in range(20):
        client.turn()
    lost, last = (played.turn.record for played in client.played[-2:])
    assert lost is not None and last is not None
    del client.player.values[record_key(lost.id)]
    client.player.forget()
    with pytest.raises(LookupError, match="missing"):
        list(client.player._load_path(last))
    played = client.turn()
    assert played.answer.refused is None and played.turn.record is not None
    assert [n.raw for n in client.player._load_path(played.turn.record)] == [n.raw for n in played.turn.path]


def test_an_agent_whose_older_results_are_cut_keeps_the_rest() -> None:
    """One task, then calls and results; a call stays whole with its result (invariant 8)."""
    player, plain = new_player(2000), new_player(2000)
    task = {"role": "user", "content": text_of(random.Random(0), 60, "task0x")}
    steps: list[tuple[Message, Message]] = []
    sent: list[list[Message]] = []
    played: list[Played] = []
    kept = epochs = 0
    for number in range(80):
        whole = [m for step in steps for m in step]
        cut = [{**m, "content": "[cut]"} if m["role"] == "tool" and i < len(whole) - 8 else m
               for i, m in enumerate(whole)]  # fmt: skip
        wanted = calls(call("lookup", {"word": f"w{number}"}, f"c{number}"))
        sent.append([task, *cut])
        played.append(player.ask(sent[-1], script(wanted), tools=[LOOKUP_TOOL]))
        epochs += plain.ask([task, *whole], script(wanted), tools=[LOOKUP_TOOL]).answer.report.new_epoch
        for request in played[-1].requests:
            assert count_tokens(request) <= 2000
            check_pairs(request)
            assert request["messages"].count(task) == 1
        result = text_of(random.Random(number), 90, f"result{number}x")
        steps.append((wanted, {"role": "tool", "tool_call_id": f"c{number}", "content": result}))
        if number and played[-2].turn.window and not played[-1].answer.report.new_epoch:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*sent[-2:], strict=False)))
            had, has = played[-2].requests[-1]["messages"], played[-1].requests[0]["messages"]
            at = max(i for i, m in enumerate(had) if m == sent[-2][same])
            assert had[:at] == has[:at]
            kept += 1
    assert kept >= 15 and sum(p.answer.report.new_epoch for p in played) <= epochs + 2


@pytest.mark.parametrize("late", [False, True], ids=["while it is asked", "while it is stored"])
def test_two_requests_at_once_that_rewrite_alike_do_not_mix_their_states(late: bool) -> None:
    """Both store the same answers; one of them had to make room for what stands behind these."""
    client = Writer(new_player(), WAYS["note 4"])
    while not client.turn().answer.report.new_epoch:
        pass
    differ = False
    while not differ:
        sent, large = (
            client.way(client.said, {"role": "user", "content": text_of(random.Random(3), words, name)}, 99)
            for words, name in ((1, "outer7x"), (900, "inner7x"))
        )
        inner: list[Played] = []

        def meanwhile(large: list[Message] = large, inner: list[Played] = inner) -> Message:
            inner.append(client.player.ask(large, script(says("inner7x"))))
            return says("outer7x")

        client.player.late = meanwhile if late else None
        outer = client.player.ask(sent, script(says("outer7x")) if late else lambda _: meanwhile())
        differ = inner[0].answer.report.new_epoch and not outer.answer.report.new_epoch
        then, also = client.player, new_player()
        also.values = dict(then.values)
        history = [*sent, says("outer7x"), {"role": "user", "content": "And?"}]
        played = then.ask(history, script(says("So.")))
        assert also.ask(history, script(says("So."))).bodies == played.bodies
        assert b"inner7x" not in played.bodies[0] and b"outer7x" in played.bodies[0]
        assert played.answer.report.new_epoch is (late and differ), "it goes on, or is a miss"
        client.turn()
