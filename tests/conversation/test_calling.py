"""A model that does not call the VM tools where it should goes without them: counted, tried again, the same bytes
everywhere."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.calling import MANY, TRIAL, VM_CALLS, Calling, may_speak_first, offered
from proxy.conversation.window import Window
from tests.conversation.player import Message, Played, Player, call, calls, limits_of, says
from tests.conversation.scenario import WORDS


def test_calling_is_given_up_after_many_turns_that_needed_a_call_and_tried_again() -> None:
    known = Calling()
    for _ in range(MANY):
        assert known.offered
        known = known.after(needed=False, helped=False, began=True).after(needed=True, helped=False, began=False)
    assert known.given_up
    tried = []
    for _ in range(3 * TRIAL):
        tried.append(known.offered)
        known = known.after(needed=True, helped=False, began=True)
    assert tried == ([False] * (TRIAL - 1) + [True]) * 3
    assert known.after(needed=True, helped=True, began=True).offered


def test_calling_that_helped_is_given_up_later() -> None:
    known = Calling().after(needed=True, helped=True, began=False)
    for _ in range(4 * MANY):
        assert known.offered
        known = known.after(needed=True, helped=False, began=False)
    assert known.given_up


@given(st.one_of(st.none(), st.integers(), st.lists(st.one_of(st.integers(), st.text()), max_size=4)))
def test_calling_of_any_fact_is_known(fact: object) -> None:
    assert isinstance(Calling.of({VM_CALLS: fact}).offered, bool)
    known = Calling(1, 2, 3)
    assert Calling.of({VM_CALLS: list(known)}) == known


def test_calling_of_a_first_turn_is_what_was_learned_elsewhere() -> None:
    assert offered("m", {}, None, None) == (True, True)
    assert offered("m", {VM_CALLS: Calling(0, MANY, 0)}, None, None) == (False, False)


def test_first_words_wait_no_longer_where_no_call_helped_in_three_epochs() -> None:
    def window(epoch: int) -> Window:
        return Window(epoch, "", 0, 0, 0, (), 0)

    assert may_speak_first({}, None) and may_speak_first({}, window(3)) and not may_speak_first({}, window(4))
    assert may_speak_first({VM_CALLS: Calling(1)}, window(9))
    assert not may_speak_first({VM_CALLS: Calling(0, MANY)}, window(9))


# -- as a dialogue


def question(turn: int) -> str:
    """About what was said long before."""
    return f"What did I say of the {WORDS[turn % 24]} of number {turn % 24}?"


def story(turn: int) -> str:
    return f"Number {turn} has a {WORDS[turn % 24]}, as everybody in the town knows by heart. " * 3


def offers(request: Message) -> bool:
    return "page_fault" in {tool["function"]["name"] for tool in request.get("tools", ())}


class Talk:
    """A growing chat with a player whose facts are counted; some turns are answered by a twin after a restart, too."""

    def __init__(self) -> None:
        self.player = Player(limits_of(1400))
        self.player.facts = {}
        self.begin("Hello.")

    def begin(self, greeting: str) -> None:
        self.history: list[Message] = [{"role": "user", "content": greeting}, says("Hello!")]
        self.turn = 0

    def say(self, answer: str, searching: bool = False) -> Played:
        self.history.append({"role": "user", "content": story(self.turn) if self.turn < 24 else question(self.turn)})
        self.turn += 1

        def model(request: Message) -> Message:
            wants = searching and offers(request) and request["messages"][-1]["role"] == "user"
            words = json.dumps({"query": f"{WORDS[(self.turn - 1) % 24]}"})
            return calls(call("search_pages", words, f"call_{self.turn}")) if wants else says(answer)

        twin = Player(self.player.limits)
        twin.values, twin.facts = dict(self.player.values), dict(self.player.facts or {})
        played = self.player.ask(self.history, model)
        if self.turn % 7 == 0:
            assert twin.ask(self.history, model).bodies == played.bodies
            assert twin.facts == self.player.facts
        self.history.append(says(answer))
        return played


def test_tools_go_where_no_call_came_at_an_epoch_and_the_prefix_stays_within_each() -> None:
    talk, windows = Talk(), list[tuple[int, bool]]()
    last: tuple[int, bytes] = (0, b"")
    for _ in range(90):
        played = talk.say("I do not know.")
        epoch, body = played.epochs[0], played.requests[0]
        if not epoch:
            continue
        if windows and windows[-1][0] == epoch:
            assert windows[-1] == (epoch, offers(body))
        windows.append((epoch, offers(body)))
        head = json.dumps(body["messages"][:3]).encode()
        assert last[0] != epoch or last[1] == head
        last = epoch, head
        if not offers(body):
            assert "page_fault" not in json.dumps(body["messages"][0])
    assert windows[0][1] and not windows[-1][1]
    talk.begin("Good evening.")  # another chat with the model
    while not (played := talk.say("I do not know.")).epochs[0]:
        pass
    assert not offers(played.requests[0])


def test_tools_stay_where_calls_come() -> None:
    talk = Talk()
    for _ in range(60):
        played = talk.say("I do not know.", searching=True)
    assert offers(played.requests[0]) and len(played.requests) == 2
    assert Calling.of(talk.player.facts or {}).helped > 9
