"""Nobody's words but the client's: what one conversation said is in no other's requests.

The applications' habits that look like one conversation and are two: texts that an application puts
into every history, one session name for several purposes, messages that a person deletes or edits.
"""

from __future__ import annotations

from typing import Any

from tests.contract import say
from tests.contract.model import ALL, BOTH, LONG, SHORT, Check, Scenario, add, check, expect
from tests.contract.play import Play, fact, history
from tests.contract.talks import (
    KEPT,
    Talk,
    answers,
    chatter,
    noted,
    own_words,
    searching,
    told,
    unseen,
    user,
)
from tests.contract.wire import Headers, Json

LOOK = say.tool("look")
LOOKED_UP = [
    user("Example: which tide is it at Skerry?"),
    say.calling(say.call("call_example", "look", '{"word": "Skerry"}')),
    {"role": "tool", "tool_call_id": "call_example", "content": "Skerry: high water at 04:10 and 16:35."},
    say.text("High water at Skerry is at 04:10 and at 16:35, by the table of the harbour office."),
]
INJECTED: dict[str, tuple[str, list[Json]]] = {
    "canned_reply": ("a canned reply to a button", [
        user("[Start]"),
        say.text("Good day! This is the ferry office. I sell tickets, change bookings and know the timetable. "
                 "Which of these may it be?"),
    ]),
    "few_shot": ("few-shot pairs", [
        user("Translate into Latin: the ship is large."), say.text("Navis magna est, as the textbook says it."),
        user("Translate into Latin: the sea is calm."), say.text("Mare tranquillum est, as the textbook says it."),
    ]),
    "files": ("a listing of files with a canned consent", [
        user("*These files are open for editing*:\n\nharbour.py\n" + "    tide = tide + 1\n" * 40),
        say.text("Understood, every change that I propose will be made to these files and to no others."),
    ]),
    "small_talk": ("the same small talk", [
        user("hey"), say.text("Hey there!"), user("how are you?"), say.text("Very well, thank you. And you?"),
    ]),
    "greeting": ("a greeting of the assistant's at the beginning", [
        say.text("Ahoy! I am Captain Brine, the talking parrot's best friend. Ask me about the seven seas!"),
    ]),
    "tool_example": ("an example of a tool call", LOOKED_UP),
}


def _injected(shared: list[Json]) -> Scenario:
    async def scenario(play: Play) -> None:
        fields: Json = {"tools": [LOOK]} if shared is LOOKED_UP else {}
        play.says(answers(play), inner=0)
        before = history(play.tag) if play.long else []
        await chatter(Talk(play, [*before, *told(play), *shared], fields=fields), 2)
        second = Talk(play, list(shared), fields=fields)
        await chatter(second, 3, own_words)
        if play.long:
            play.says(answers(play), inner=1)
            searching(play, "code word")
            play.script.calls.clear()
            third = Talk(play, [*shared, *history(play.tag)], fields=fields)
            await third.say("Which code word did I tell you?")
            unseen(play)

    return scenario


for _id, (_what, _shared) in INJECTED.items():
    add(Check(f"isolation.injected_{_id}", f"two conversations into which an application puts {_what}: neither "
              "sees the other", _injected(_shared), BOTH))


def _other(changed: Json) -> Scenario:
    """The end of a conversation, moving on as a window does, in other surroundings."""

    async def scenario(play: Play) -> None:
        play.says(answers(play), inner=0)
        first = Talk(play, told(play))
        await chatter(first, 6)
        second = Talk(play, list(first.messages), keep=7, **changed)
        await chatter(second, 4, unseen)

    return scenario


add(Check("isolation.other_system", "the end of a history under another system prompt is another conversation",
          _other({"system": "You serve the other harbour."}), (SHORT,)))
add(Check("isolation.other_tools", "the end of a history with other tools is another conversation",
          _other({"fields": {"tools": [LOOK]}}), (SHORT,)))

# ---------------------------------------------------------------- one session name, several purposes

SESSIONS: tuple[tuple[str, str], ...] = (  # where applications write the name of a session
    ("header", "X-Session-Id"), ("header", "X-OpenWebUI-Chat-Id"), ("metadata", "session_id"),
    ("metadata", "chat_id"), ("field", "prompt_cache_key"),
)
SIDE: dict[str, tuple[str, str, list[Json]]] = {
    "title": ("a title", "You are asked for a title of at most six words.", [user("Title of: 'Good morning!'")]),
    "tags": ("tags", "Be brief.", [user("### Task: tag the chat with 1-3 words.\n<chat>Good morning!</chat>")]),
    "summary": ("a summary", "You summarise.", [user("Say in one sentence: ships are made of wood and steel.")]),
    "follow_ups": ("follow-up questions", "Be brief.", [user("Suggest three questions that the user may ask.")]),
    "compaction": ("a client's own compaction", "Be brief.", [
        user("The conversation so far, in short: we spoke of ropes and of knots."), say.text("Let us go on."),
        user("Which knot was the first?")]),
    "new_chat": ("a new chat", "Be brief.", [user("Good morning, what can you do for me?")]),
}


def _named(play: Play, number: int) -> tuple[Headers, Json]:
    """A request's headers and fields that name the session; both of each kind."""
    where, key = SESSIONS[number]
    name = f"session-{play.tag}-{number}"
    if where == "header":
        return [(key, name)], {}
    return [], {"metadata": {key: name}} if where == "metadata" else {key: name}


def _side(system: str, messages: list[Json], first: bool = False) -> Scenario:
    async def scenario(play: Play) -> None:
        numbers = range(len(SESSIONS)) if not play.long else (0, 2)
        for number in numbers:
            headers, fields = _named(play, number)
            play.says(answers(play), inner=0)
            main = Talk(play, [*(history(play.tag) if play.long else ()), *told(play)],
                        headers=headers, fields=fields)
            await chatter(main, 2)
            play.script.calls.clear()
            side = Talk(play, list(messages), system, headers=headers, fields=fields)
            own_words(play, await side.again())

    return scenario


for _id, (_what, _system, _messages) in SIDE.items():
    add(Check(f"isolation.session_{_id}", f"{_what} under a chat's session name: nothing of the chat is in it",
              _side(_system, _messages), BOTH))


@check("isolation.session_title_first", "a title asked for before a chat begins under the same session name: "
       "nothing of it is in the chat", BOTH)
async def title_first(play: Play) -> None:
    for number in range(len(SESSIONS)):
        headers, fields = _named(play, number)
        play.says(answers(play), inner=0)
        await Talk(play, told(play)[:1], "Titles only.", headers=headers, fields=fields).again()
        await chatter(Talk(play, headers=headers, fields=fields), 3, own_words)


@check("isolation.session_two_at_once", "two chats under one session name, turn about: neither sees the other",
       (SHORT,))
async def two_at_once(play: Play) -> None:
    play.says(answers(play), inner=0)
    headers, fields = _named(play, 0)
    one = Talk(play, told(play), headers=headers, fields=fields)
    two = Talk(play, headers=headers, fields=fields)
    for _ in range(3):
        await chatter(one, 1)
        await chatter(two, 1, own_words)


# ---------------------------------------------------------------- what a person takes back


def _taken_back(change: Any, turns_before: int = 3) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(answers(play), inner=0)
        talk = Talk(play, [user("Good morning."), say.text("Good morning to you, too, and welcome on board.")])
        if change is not _first:
            await chatter(talk, 1)
        else:
            talk.messages.clear()
        await talk.say(told(play)[0]["content"])
        talk.messages += history(play.tag) if play.long else []
        await chatter(talk, turns_before)
        talk.messages = change(play, talk.messages)
        play.says(answers(play), inner=1)
        searching(play, "code word")
        for number in range(3):
            play.script.calls.clear()
            sent = await talk.say(f"And what else is there, {number}? Do you know a code word?")
            if play.long:
                unseen(play)
            else:
                own_words(play, sent)

    return scenario


def _at(play: Play, messages: list[Json]) -> int:
    return next(i for i, m in enumerate(messages) if m["content"] == told(play)[0]["content"])


def _first(play: Play, messages: list[Json]) -> list[Json]:
    return messages[2:]


def _exchange(play: Play, messages: list[Json]) -> list[Json]:
    at = _at(play, messages)
    return [*messages[:at], *messages[at + 2 :]]


def _question(play: Play, messages: list[Json]) -> list[Json]:
    at = _at(play, messages)
    return [*messages[:at], user("My code word is none of your business."), *messages[at + 1 :]]


def _forked(play: Play, messages: list[Json]) -> list[Json]:
    return messages[: _at(play, messages)]


TAKEN_BACK = {
    "first": ("deletes the first exchange", _first),
    "middle": ("deletes an exchange in the middle", _exchange),
    "edited": ("edits an old message and keeps what follows", _question),
    "rewound": ("goes back to before a message", _forked),
}
for _id, (_what, _change) in TAKEN_BACK.items():
    add(Check(f"isolation.taken_back_{_id}", f"a person {_what}: its text never comes back", _taken_back(_change),
              BOTH))


@check("isolation.taken_back_answer", "a regenerated answer's first version never comes back", ALL)
async def regenerated(play: Play) -> None:
    first, second = told(play)[0]["content"], "The code word is not for sale, said the old pilot to the crew."
    play.says(say.text(first), say.text(second), answers(play), inner=0)
    talk = Talk(play, [*(history(play.tag) if play.long else ()), user("Which code word do you know?")])
    await talk.again()
    talk.messages.pop()
    await talk.again()
    play.script.calls.clear()
    sent = await talk.say("Are you sure of that?")
    if not play.long:
        own_words(play, sent)
    unseen(play)


# ---------------------------------------------------------------- and what is its own


def _last(keeps: tuple[int, ...]) -> Scenario:
    async def scenario(play: Play) -> None:
        play.says(answers(play), inner=0)
        talk = Talk(play, keep=keeps[0])
        for turn in range(16):
            talk.keep = keeps[turn % len(keeps)] if turn > KEPT // 2 else None
            await noted(talk, 1)
        await remembered(talk)

    return scenario


async def remembered(talk: Talk) -> None:
    """What the client no longer sends is at hand when it is asked for."""
    play = talk.play
    play.says(answers(play), inner=1)
    play.script.calls.clear()
    sent = await talk.say("Which code has depot 3?")
    expect(not any(fact(3) in str(m["content"]) for m in sent), "the client sends it itself")
    seen = b"".join(recorded.body for recorded in play.calls)
    expect(fact(3).encode() in seen, "what an earlier message said is not upstream")


add(Check("isolation.last_ten", "a client that sends its last ten messages: what it dropped is remembered",
          _last((KEPT,)), (LONG,), "window"))
add(Check("isolation.last_some", "a client that sends as many messages as fit (ten, then eight): what it dropped "
          "is remembered", _last((KEPT, KEPT, KEPT - 2)), (LONG,), "window"))
