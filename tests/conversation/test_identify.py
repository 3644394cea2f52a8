"""Where a request belongs: by content, by the session it asked for, or by a front that moves on."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.identify import Place
from tests.conversation.player import Message, Player, limits_of, says, script
from tests.examples import examples

many = examples(20)
U, A = "user", "assistant"


def told(*texts: str) -> list[Message]:
    """user, assistant, user, ... in turn."""
    return [{"role": (U, A)[i % 2], "content": text} for i, text in enumerate(texts)]


def keep(player: Player, *texts: str, **extra: Any) -> list[Message]:
    """Play a conversation whose answers are given too."""
    messages = told(*texts)
    for i in range(1, len(messages), 2):
        player.ask(messages[:i], script(says(texts[i])), **extra)
    return messages


def placed(player: Player, messages: list[Message], **extra: Any) -> list[str]:
    """The texts on the path that a request is placed on."""
    session = extra.pop("session", None)
    body = json.dumps({"model": "gpt-4o", "messages": messages, **extra}).encode()
    found = player.place(body, session=session)[1]
    return [json.loads(node.raw)["content"] for node in found.path]


def player() -> Player:
    return Player(limits_of(20_000))


def telling(text: str) -> str:
    """Long enough to be recognised by two messages."""
    return f"{text}: words that only this one conversation has in it"


_numbers = itertools.count()


def window(player: Player, messages: list[Message], keep_last: int, turns: int, **extra: Any) -> Place:
    """Go on with a conversation whose client sends its last messages only; where its last request
    was placed. `messages` grows."""
    for _ in range(turns):
        n = next(_numbers)
        messages.append({"role": U, "content": telling(f"u{n}")})
        played = player.ask(messages[-keep_last:], script(says(telling(f"a{n}"))), **extra)
        assert played.message is not None
        messages.append(played.message)
    return played.place


def texts(place: Place) -> list[str]:
    return [json.loads(node.raw)["content"] for node in place.path]


SYSTEM = {"role": "system", "content": "You help."}


@pytest.mark.parametrize("keep_last", [3, 5, 6])
@pytest.mark.parametrize("before", [0, 6])
def test_front_that_moved_on_three_times_gets_its_ancestors_back(keep_last: int, before: int) -> None:
    """Also of what was dropped before that, and with everything cached gone."""
    it = player()
    messages: list[Message] = []
    if before:
        messages = keep(it, *map(telling, "abcdef"))
    while len(messages) + 1 <= keep_last:
        window(it, messages, keep_last, 1)
    for move in (1, 2):
        place = window(it, messages, keep_last, 1)
        assert len(place.path) == keep_last and place.floor == 0, f"move {move} proves nothing"
    for _ in range(3):
        place = window(it, messages, keep_last, 1)
        assert texts(place) == [m["content"] for m in messages[:-1]]
        assert place.start == place.floor == len(messages) - 1 - keep_last
        it.forget()


def test_answer_asked_for_again_does_not_count_twice() -> None:
    """Each request of a moving window is sent twice, and answered otherwise: three moves are three."""
    it = player()
    messages: list[Message] = []
    while len(messages) < 6:
        window(it, messages, 6, 1)
    for move in (1, 2, 3):
        lost = list(messages)
        window(it, lost, 6, 1)
        again = [*messages, lost[-2]]
        played = it.ask(again[-6:], script(says(telling(f"better {move}"))))
        assert (len(played.place.path) == len(again)) is (move == 3)
        assert played.message is not None
        messages = [*again, played.message]


def test_proved_front_may_rest() -> None:
    it = player()
    messages: list[Message] = []
    window(it, messages, 6, 8)
    end = {"role": U, "content": "more"}
    for first in (-6, -5, -9):
        place = it.place(json.dumps({"model": "gpt-4o", "messages": [*messages[first:], end]}).encode())[1]
        assert texts(place) == [m["content"] for m in [*messages, end]]


def test_invariant_06_last_pair_of_a_proved_window_is_not_its_history() -> None:
    """Another chat of the tenant begins with an answer that an application kept, word for word."""
    it = player()
    messages: list[Message] = []
    window(it, messages, 8, 9)
    end = {"role": U, "content": "what did I say?"}
    for sent in (messages[-2:], messages[-3:]):
        place = it.place(json.dumps({"model": "gpt-4o", "messages": [*sent, end]}).encode())[1]
        assert texts(place) == [m["content"] for m in [*sent, end]]


def test_invariant_06_deletion_at_the_front_stays_deleted() -> None:
    """Once, and twice in a row, and later again: whatever went before a rest is gone for good."""
    it = player()
    messages = keep(it, *map(telling, "abcdef"))
    gone = []
    for _ in range(3):
        for deletions in (1, 2):
            for _ in range(deletions):
                gone += [m["content"] for m in messages[:2]]
                del messages[:2]
                place = window(it, messages, 100, 1)
                assert texts(place) == [m["content"] for m in messages[:-1]]
            place = window(it, messages, 100, 1)
            assert not set(texts(place)) & set(gone)
    place = window(it, messages, 6, 6)
    assert place.start and not set(texts(place)) & set(gone), "a window that follows brings nothing of it back"


def test_invariant_06_regenerated_answer_is_on_no_later_path() -> None:
    it = player()
    messages: list[Message] = []
    window(it, messages, 4, 6)
    again = messages[:-1]
    played = it.ask(again[-4:], script(says(telling("better"))))
    assert played.message is not None
    messages = [*again, played.message]
    place = window(it, messages, 4, 2)
    assert texts(place) == [m["content"] for m in messages[:-1]] and telling("better") in texts(place)


@pytest.mark.parametrize("front", [SYSTEM, {**SYSTEM, "content": "Other."}, None])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "other"}}]])
def test_invariant_06_another_system_message_or_tool_is_another_application(
    front: Message | None, tools: Any
) -> None:
    it = player()
    messages: list[Message] = []
    system = [SYSTEM]
    for _ in range(8):
        messages.append({"role": U, "content": telling(f"u{len(messages)}")})
        played = it.ask([*system, *messages[-4:]], script(says(telling(f"a{len(messages)}"))))
        assert played.message is not None
        messages.append(played.message)
    sent = [*([front] if front else []), *messages[-3:], {"role": U, "content": "and?"}]
    extra = {"tools": tools} if tools else {}
    place = it.place(json.dumps({"model": "gpt-4o", "messages": sent, **extra}).encode())[1]
    same = front == SYSTEM and not tools
    assert (len(place.path) == len(messages) + 1) is same
    assert same or texts(place) == [m["content"] for m in sent if m["role"] != "system"]


def test_invariant_06_answer_that_nobody_delivered_proves_nothing() -> None:
    """An application puts the same pairs into every history, each time from further on."""
    it = player()
    pairs = told(*(telling(f"shot{i}") for i in range(12)))
    secret = told("my secret is 4711", "Noted.")
    it.ask([*secret, *pairs, {"role": U, "content": "q"}], script(says("ok")))
    for first in (2, 4, 6, 8):
        end = {"role": U, "content": f"other {first}"}
        played = it.ask([*pairs[first:], end], script(says("ok")))
        assert texts(played.place) == [m["content"] for m in [*pairs[first:], end]]


def test_invariant_06_two_paths_that_fit_are_none() -> None:
    """Two chats of one tenant that begin differently and then say the same, word for word."""
    it = player()
    chats = [keep(it, telling("red"), "ok"), keep(it, telling("blue"), "ok")]
    for turn in range(6):
        for chat in chats:
            chat.append({"role": U, "content": telling(f"u{turn}")})
            played = it.ask(chat[-4:], script(says(telling(f"a{turn}"))))
            assert played.message is not None
            chat.append(played.message)
            assert not {telling("red"), telling("blue")} & set(texts(played.place)[: -4])


def test_whole_history_is_never_taken_for_a_trimmed_one() -> None:
    it = player()
    keep(it, "a", "b", "c", "d")
    keep(it, "c", "d")
    assert placed(it, told("c", "d", "x")) == ["c", "d", "x"]


def test_reattaching_can_be_switched_off() -> None:
    it = Player(limits_of(20_000), reattach=False)
    messages: list[Message] = []
    assert len(window(it, messages, 4, 8).path) == 4


def test_session_takes_new_messages_overlaps_and_whole_histories() -> None:
    it = player()
    messages = keep(it, "a", "b", "c", "d", session="s")
    new = {"role": U, "content": "e"}
    whole = ["a", "b", "c", "d", "e"]
    assert placed(it, [new], session="s") == whole
    assert placed(it, [messages[-1], new], session="s") == whole
    assert placed(it, [*messages[-2:], new], session="s") == whole
    assert placed(it, [*messages, new], session="s") == whole
    assert placed(it, [{"role": U, "content": "a"}], session="s") == ["a"]  # said again: a retry
    assert placed(it, [new], session="other") == ["e"]
    assert placed(it, [new], session="s", user="other") == ["e"]
    stranger = told("x", "y", "z")
    assert placed(it, stranger, session="s") == ["x", "y", "z"]


def test_invariant_08_session_goes_on_before_a_call_that_its_client_did_not_hear() -> None:
    """The answer was stored, the client saw a broken connection: it says the same again, or something else.
    With the call in it, every later request would be refused."""
    it = player()
    keep(it, "a", "b", session="s")
    question = {"role": "user", "content": "look"}
    calls = [{"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}]
    it.ask([question], script({"role": "assistant", "content": "", "tool_calls": calls}), session="s")
    result = {"role": "tool", "tool_call_id": "c1", "content": "found"}
    other = {**result, "tool_call_id": "c0"}

    def contents(*sent: Message) -> list[str]:
        return placed(it, list(sent), session="s")

    assert contents(result) == ["a", "b", "look", "", "found"]
    assert contents(question) == ["a", "b", "look"]
    assert contents({"role": "user", "content": "never mind"}) == ["a", "b", "look", "never mind"]
    assert contents(other) == ["a", "b", "look", "found"]


def test_answer_edited_in_a_session_is_a_branch() -> None:
    it = player()
    keep(it, "a", "b", "c", "d", session="s")
    assert placed(it, told("a", "b", "c2", "d2", "x"), session="s") == ["a", "b", "c2", "d2", "x"]
    assert placed(it, [*told("a", "b", "c2")], session="s") == ["a", "b", "c2"]


@many
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.booleans()), min_size=4, max_size=14),
       st.integers(1, 3))
def test_invariant_06_nothing_stands_before_what_was_sent_but_what_its_client_said_just_before(
    turns: list[tuple[str, int, bool]], chats: int
) -> None:
    """Chats of one tenant that say nearly the same and send any number of their last messages: a
    path ends with what was sent, and what stands before it is that chat's own, without a gap."""
    it = player()
    said: list[list[Message]] = [[] for _ in range(chats)]
    for n, (word, last, forget) in enumerate(turns):
        chat = said[n % chats]
        chat.append({"role": U, "content": telling(word)})
        played = it.ask(chat[-last:], script(says(telling(f"re {word}"))))
        path, own = texts(played.place), [m["content"] for m in chat]
        assert path == own[len(own) - len(path) :] or len(path) > len(own), (path, own)
        if len(path) > len(own):  # another chat's, of the very same words as far as both went
            assert path[len(path) - len(own) :] == own and chats > 1
        assert played.message is not None
        chat.append(played.message)
        if forget:
            it.forget()


def test_invariant_06_greeting_is_no_proof_of_identity() -> None:
    it = player()
    keep(it, "My number is 4711", "Noted.", "hi", "Hello! How can I help you today?")
    opening = ["hi", "Hello! How can I help you today?", "What is my number?"]
    assert placed(it, told(*opening)) == opening


def test_mid_conversation_system_messages_keep_their_place() -> None:
    it = player()
    messages = keep(it, "a", "b", telling("c"), telling("d"))
    messages[2:2] = [{"role": "developer", "content": "n1"}, {"role": "system", "content": "n2"}]
    for _ in range(2):  # cold, then by bytes
        body = json.dumps({"model": "gpt-4o", "messages": messages}).encode()
        found = it.place(body)[1]
        assert [(a.position, json.loads(a.raw)["content"]) for a in found.anchors] == [(2, "n1"), (2, "n2")]
        assert len(found.path) == 4 and found.record is not None
    chat: list[Message] = []
    window(it, chat, 4, 6)
    tail = [*chat[-3:], {"role": "system", "content": "n3"}, {"role": U, "content": "x"}]
    found = it.place(json.dumps({"model": "gpt-4o", "messages": tail}).encode())[1]
    assert [(a.position, found.start) for a in found.anchors] == [(12, 9)]
