"""Figure 6: clients that send only the end of their history.

Once their front has moved on three times in a row, what they dropped is found by search_pages and
loaded by page_fault; what a user deletes stays deleted; an overlap that could be two conversations is
nobody's; a session's client of new messages has its history back.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.conversation.checks import without_evidence
from tests.e2e.harness import Recorded, message_of
from tests.e2e.script import (
    SYSTEM,
    Chat,
    Stand,
    developer,
    fault,
    filler,
    ransack,
    search,
    shown_to_model,
    talk,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEEP = 6
TURNS = 12
MOVES = 3
SESSIONS: dict[str, dict[str, Any]] = {
    "no session": {},
    "header": {"headers": {"x-session-id": "a-session"}},
    "metadata": {"metadata": {"session_id": "a-session"}},
}


def result_of(recorded: Recorded) -> dict[str, Any]:
    """What the newest memory call brought."""
    message = recorded.json["messages"][-1]
    assert message["role"] == "tool"
    found: dict[str, Any] = json.loads(message["content"])
    return found


def hint_of(recorded: Recorded, words: str) -> str:
    """The manifest's hint that has the words, "" without one."""
    found = re.search(rf'"hint":"[^"]*{words}[^"]*"', shown_to_model([recorded]))
    return found.group() if found else ""


@pytest.mark.parametrize(
    "session, when", [("no session", "always"), ("no session", "late"), ("header", "always"), ("metadata", "late")]
)
async def test_what_a_trimming_client_dropped_is_found_and_loaded(
    stand: Stand, session: str, when: str
) -> None:
    """`always`: it never sends more than six messages; `late`: its whole history before."""
    script, marks = stand.script, list[str]()
    chat = Chat(stand.client(), keep=KEEP if when == "always" else None, **SESSIONS[session])
    await talk(chat, script, "talk", TURNS, marks)
    if when == "late":
        chat.keep = KEEP
        await talk(chat, script, "trimmed", MOVES, marks)
    script.plan("search", search("talka1q"))
    await chat.fork().say("Look for it.", "search", stream=True)
    first, second = script.calls["search"]
    shown = shown_to_model([first])  # its first words may stand in the manifest, as a hint
    assert "talka1q" not in shown.replace(hint_of(first, "talka1q"), "")
    page = result_of(second)["results"][0]["page_id"]
    assert page == "msg_0004"
    script.plan("fault", fault(page))
    await chat.fork().say("Load it.", "fault")
    assert "talka1q" in result_of(script.calls["fault"][1])["page"]["content"]["text"]
    text = await ransack(script, chat, "all", len(marks) + 1, marks)
    assert not (missing := [mark for mark in marks if mark not in text]), missing


async def test_a_front_that_moved_once_or_twice_is_a_deletion(stand: Stand) -> None:
    """What a user deletes is not sent again, however large the window is and whatever is asked."""
    script = stand.script
    chat = Chat(stand.client())
    marks: list[str] = []
    await talk(chat, script, "first", 4, marks)
    for round_, deletions in enumerate((1, 2, 1)):
        for turn in range(deletions):
            del chat.messages[1:3]
            gone, marks = marks[:2], marks[2:]
            tag = f"deleted/{round_}/{turn}"
            await talk(chat, script, tag, 1, marks)
            (recorded,) = script.calls[f"{tag}/0"]
            assert recorded.json["messages"] == chat.messages[:-1]
            assert not [mark for mark in gone if mark in shown_to_model([recorded])]
        await talk(chat, script, f"rest/{round_}", 1, marks)


async def test_an_ambiguous_overlap_matches_nothing(stand: Stand) -> None:
    """Two conversations that begin differently and go on alike: the end could be of either."""
    script = stand.script
    chats = [Chat(stand.client()), Chat(stand.client())]
    marks: dict[str, list[str]] = {"red": [], "blue": []}
    for name, chat in zip(marks, chats, strict=True):
        await talk(chat, script, name, 4, marks[name])
        chat.keep = KEEP
    for turn in range(TURNS):
        for name, other in (("red", "blue"), ("blue", "red")):
            chat = chats[name == "blue"]
            await talk(chat, script, f"same{turn}", 1, [])
            text = shown_to_model(script.calls[f"same{turn}/0"][-1:])
            assert not [mark for mark in marks[other] if mark in text]
    assert chats[0].messages[-2 * TURNS :] == chats[1].messages[-2 * TURNS :]


async def test_a_name_does_not_say_which_of_two_it_is(stand: Stand) -> None:
    """A session's name is a label: what is ambiguous stays so."""
    script = stand.script
    marks: dict[str, list[str]] = {"red": [], "blue": []}
    for name, own in marks.items():
        chat = Chat(stand.client(), headers={"x-session-id": name})
        await talk(chat, script, name, 4, own)
        await talk(chat, script, "same", 4, [])
    chat = Chat(stand.client(), chat.messages, keep=KEEP, headers={"x-session-id": "red"})
    await chat.say("Which one am I?", "which")
    (recorded,) = script.calls["which"]
    assert recorded.json["messages"] == [SYSTEM, *chat.messages[-7:-1]]


async def test_one_message_is_no_overlap(stand: Stand) -> None:
    """An answer alone ("OK.") could be anybody's."""
    script = stand.script
    chat = Chat(stand.client())
    await talk(chat, script, "talk", 4, [])
    chat.keep = 2
    await chat.say("Go on.", "short")
    (recorded,) = script.calls["short"]
    assert recorded.json == {"model": "gpt-4o", "messages": [SYSTEM, *chat.messages[-3:-1]]}


async def test_a_session_of_new_messages_has_its_history(stand: Stand) -> None:
    """Natively while it fits, as a client that sends everything would have it, and then paged."""
    script, marks = stand.script, list[str]()
    chat = Chat(stand.client(), keep=1, headers={"x-llm-pager-session": "a session"})
    native = 0
    for turn in range(TURNS):
        await talk(chat, script, f"turn{turn}x", 1, marks)
        (recorded,) = script.calls[f"turn{turn}x/0"]
        if developer(recorded) is None:
            assert recorded.json["messages"] == chat.messages[:-1]
            native += 1
    assert 5 < native < TURNS, "the history has to outgrow the window"
    assert without_evidence(recorded.json["messages"][-1])["content"] == chat.messages[-2]["content"]
    text = await ransack(script, chat, "all", 2 * TURNS + 1, marks)
    assert not (missing := [mark for mark in marks if mark not in text]), missing


async def test_a_session_and_a_whole_history_have_the_same_window(stand: Stand) -> None:
    """Who sends everything and who sends the new message only are told the same."""
    script = stand.script
    whole = Chat(stand.client(), user="whole")
    parts = Chat(stand.client(), user="parts", keep=1, headers={"x-llm-pager-session": "parts"})
    for turn in range(TURNS + 4):
        for name, chat in (("whole", whole), ("parts", parts)):
            tag = f"{name}/{turn}"
            looks = [fault("msg_0003")] if turn == TURNS + 1 else []
            said = message_of(f"Noted {turn}. {filler(str(turn), 60)}")
            script.plan(tag, *looks, said)
            await chat.say(f"Note {turn}. {filler(f'u{turn}', 60)}", tag, stream=turn % 2 == 0)
        for one, other in zip(script.calls[f"whole/{turn}"], script.calls[f"parts/{turn}"], strict=True):
            assert one.json["messages"] == other.json["messages"], f"turn {turn}"
    assert developer(one)
