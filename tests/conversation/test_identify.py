"""Where a request belongs: by content, by its session, or by what a trimmed history still shows."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.conversation.player import Message, Player, limits_of, says, script
from tests.examples import examples

many = examples(60)
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


def test_a_trimmed_history_gets_its_ancestors_back() -> None:
    it = player()
    messages = [*keep(it, *map(telling, "abcdef")), {"role": U, "content": "g"}]
    for first in range(1, 5):
        found = it.place(json.dumps({"model": "gpt-4o", "messages": messages[first:]}).encode())[1]
        assert len(found.path) == 7 and found.start == found.floor == first
        assert found.record is not None and found.record.end == 6


def test_too_short_an_overlap_matches_nothing() -> None:
    it = player()
    keep(it, "a", "b", "c", "d")
    assert placed(it, [{"role": A, "content": "d"}, {"role": U, "content": "x"}]) == ["d", "x"]
    assert placed(it, [{"role": U, "content": "c"}, {"role": U, "content": "x"}]) == ["c", "x"]


def test_invariant_06_an_ambiguous_overlap_matches_nothing() -> None:
    it = player()
    keep(it, "a", "b", "c", "d")
    keep(it, "z", "b", "c", "d")
    tail = [*told("c", "d"), {"role": U, "content": "x"}]
    assert placed(it, tail) == ["c", "d", "x"]
    assert placed(it, [{"role": A, "content": "b"}, *tail]) == ["b", "c", "d", "x"]


def test_a_longer_agreement_decides_between_two_paths() -> None:
    it = player()
    keep(it, "a", "b", "c", "d", "e", "f")
    keep(it, "z", "b", "c", "d", "e", "other")
    assert placed(it, [*told("c", "d", "e", "f"), {"role": U, "content": "x"}])[0] == "a"


def test_a_whole_history_is_never_taken_for_a_trimmed_one() -> None:
    it = player()
    keep(it, "a", "b", "c", "d")
    keep(it, "c", "d")
    assert placed(it, told("c", "d", "x")) == ["c", "d", "x"]


def test_reattaching_can_be_switched_off() -> None:
    it = Player(limits_of(20_000), reattach=False)
    messages = keep(it, "a", "b", "c", "d")
    assert placed(it, [*messages[2:], {"role": U, "content": "x"}]) == ["c", "d", "x"]


def test_a_session_takes_new_messages_overlaps_and_whole_histories() -> None:
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


def test_an_answer_edited_in_a_session_is_a_branch() -> None:
    it = player()
    keep(it, "a", "b", "c", "d", session="s")
    assert placed(it, told("a", "b", "c2", "d2", "x"), session="s") == ["a", "b", "c2", "d2", "x"]
    assert placed(it, [*told("a", "b", "c2")], session="s") == ["a", "b", "c2"]


@many
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=2, max_size=8), min_size=1, max_size=4),
       st.integers(0, 3), st.integers(0, 5), st.booleans())
def test_invariant_06_a_path_is_one_that_the_tenant_said(
    told_before: list[list[str]], which: int, first: int, again: bool
) -> None:
    """Whatever is trimmed, the path ends with what the client sent, and what stands before it is a
    stored beginning of that conversation, or nothing."""
    it = player()
    stored = []
    for texts in told_before:
        texts = texts[: len(texts) // 2 * 2]
        keep(it, *texts)
        stored.append(texts)
    texts = stored[which % len(stored)]
    messages = [*told(*texts)[first:], {"role": U, "content": "new"}]
    path = placed(it, messages)
    sent = [m["content"] for m in messages]
    before = path[: len(path) - len(sent)]
    assert path[len(before) :] == sent
    assert not before or any(
        known[: len(path) - 1][: len(before)] == before and known[len(before) :][:2] == sent[:2][: len(known)]
        for known in stored
    )
    assert placed(it, messages, user="a stranger") == sent
    if again:
        it.forget()
        assert placed(it, messages) == path


def test_invariant_06_a_greeting_is_no_proof_of_identity() -> None:
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
    tail = [*messages[-2:], {"role": "system", "content": "n3"}, {"role": U, "content": "x"}]
    found = it.place(json.dumps({"model": "gpt-4o", "messages": tail}).encode())[1]
    assert [(a.position, found.start) for a in found.anchors] == [(4, 2)]
