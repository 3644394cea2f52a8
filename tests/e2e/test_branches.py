"""Figure 5: what only another branch, tenant or user has never reaches a request (invariant 6).

The scripted model searches for the other side's marks and faults every page id there may be. The
same probe finds the branch's own evicted marks, so a probe that finds nothing would be seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.e2e.harness import message_of
from tests.e2e.script import (
    SYSTEM,
    Chat,
    Stand,
    complete,
    filler,
    ransack,
    search,
    shown_to_model,
    talk,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRUNK_TURNS = 12
PAGES = 48  # more than any conversation here has


def seen(stand: Stand, prefix: str) -> str:
    """What the model was shown in the turns whose tag begins with `prefix`."""
    calls = [c for tag, made in stand.script.calls.items() if tag.startswith(prefix) for c in made]
    assert calls, prefix
    return shown_to_model(calls)


def assert_apart(text: str, own: Sequence[str], foreign: Sequence[str]) -> None:
    missing = [mark for mark in own if mark not in text]
    assert not missing, f"the probe is blind: it did not find its own {missing}"
    assert not (leaked := [mark for mark in foreign if mark in text]), f"leaked: {leaked}"


async def test_invariant_6_forks_share_their_trunk_and_nothing_else(stand: Stand) -> None:
    """Two branches, turn about, from the middle of a paged conversation."""
    script = stand.script
    trunk, left, right = [list[str]() for _ in range(3)]
    base = Chat(stand.client("k"))
    await talk(base, script, "trunk", TRUNK_TURNS, trunk)
    fork = 1 + 2 * 8  # after eight turns; what the trunk says later is foreign to both branches
    one, other = base.fork(fork), base.fork(fork)
    common, after = trunk[:16], trunk[16:]
    for turn in range(6):
        await talk(one, script, f"left{turn}x", 1, left)
        await talk(other, script, f"right{turn}x", 1, right)
    for name, chat, own, foreign in (
        ("left", one, left, [*right, *after]),
        ("right", other, right, [*left, *after]),
        ("trunk", base, after, [*left, *right]),
    ):
        assert_apart(await ransack(script, chat, name, PAGES, foreign), [*common, *own], foreign)
        assert not (leaked := [m for m in foreign if m in seen(stand, name)]), leaked


async def test_invariant_6_a_regenerated_answer_is_forgotten_by_the_one_that_replaced_it(
    stand: Stand,
) -> None:
    script = stand.script
    marks: list[str] = []
    chat = Chat(stand.client("k"))
    await talk(chat, script, "first", TRUNK_TURNS, marks)
    script.plan("old", search("amber"), message_of("The old answer says rejectedmark."))
    script.plan("new", message_of("The new answer says acceptedmark."))
    again = chat.fork()
    await chat.say("Say something.", "old")
    await again.say("Say something.", "new", stream=True)
    old, new = list[str](), list[str]()
    for turn in range(4):
        await talk(chat, script, f"old{turn}x", 1, old)
        await talk(again, script, f"new{turn}x", 1, new)
    foreign = ["rejectedmark", *old]
    text = await ransack(script, again, "new", PAGES, foreign)
    assert_apart(text, [*marks, "acceptedmark", *new], foreign)
    assert not (leaked := [m for m in foreign if m in seen(stand, "new")]), leaked
    text = await ransack(script, chat, "old", PAGES, ["acceptedmark", *new])
    assert_apart(text, [*marks, "rejectedmark", *old], ["acceptedmark", *new])


async def test_invariant_6_an_edited_message_leaves_nothing_of_what_it_said(stand: Stand) -> None:
    """The edit is far back, where the original is already evicted."""
    script = stand.script
    before, after, edited = [list[str]() for _ in range(3)]
    chat = Chat(stand.client("k"))
    await talk(chat, script, "before", 2, before)
    await chat.say(f"My address is regretmark. {filler('r', 30)}", "regret")
    await talk(chat, script, "after", TRUNK_TURNS, after)
    changed = [dict(m) for m in chat.messages]
    position = next(i for i, m in enumerate(changed) if "regretmark" in (m["content"] or ""))
    changed[position]["content"] = f"My address is correctmark. {filler('c', 30)}"
    edit = Chat(stand.client("k"), changed)
    await talk(edit, script, "edit", 3, edited)
    text = await ransack(script, edit, "edit", PAGES, ["regretmark", "address"])
    assert_apart(text, [*before, "correctmark", *after, *edited], ["regretmark"])
    assert "regretmark" not in seen(stand, "edit")
    text = await ransack(script, chat, "after", PAGES, ["correctmark", *edited])
    assert_apart(text, ["regretmark", *after], ["correctmark", *edited])


@pytest.mark.parametrize("by", ["key", "safety_identifier"])
async def test_invariant_6_tenants_with_one_opening_do_not_meet(stand: Stand, by: str) -> None:
    """The same words at first, in the same order, from two tenants at the same time."""
    script = stand.script
    chats = {
        name: Chat(stand.client(name if by == "key" else "k"), **({} if by == "key" else {by: name}))
        for name in ("ann", "ben")
    }
    marks = {name: list[str]() for name in chats}
    opening: list[str] = []
    for chat in chats.values():
        await talk(chat, script, "opening", 6, opening)
    for turn in range(8):
        await asyncio.gather(
            *(talk(c, script, f"{n}{turn}x", 1, marks[n]) for n, c in chats.items())
        )
    for name, foreign in (("ann", marks["ben"]), ("ben", marks["ann"])):
        text = await ransack(script, chats[name], name, PAGES, foreign)
        assert_apart(text, [*opening, *marks[name]], foreign)
        assert not (leaked := [m for m in foreign if m in seen(stand, name)]), leaked


@pytest.mark.parametrize("by", ["key", "user"])
async def test_invariant_6_the_same_history_of_another_user_has_a_window_of_its_own(
    stand: Stand, by: str
) -> None:
    """Ann's memory exchange (what her model looked for) is hers, though Ben says the same words.

    Ann has two branches, so that RAM knows several of her histories that begin like his.
    """
    script = stand.script
    ann = Chat(stand.client("ann" if by == "key" else "k"), **({} if by == "key" else {"user": "ann"}))
    ben = Chat(stand.client("ben" if by == "key" else "k"), **({} if by == "key" else {"user": "ben"}))
    marks: list[str] = []
    await talk(ann, script, "opening", TRUNK_TURNS, marks)
    branch = ann.fork(7)
    await branch.say("Another branch.", "branch/0")
    script.plan("ann/secret", search("annsearched"), message_of("The same answer."))
    await ann.say("The same question.", "ann/secret")
    await branch.say("Another branch, longer.", "branch/1")
    assert len(script.calls["ann/secret"]) == 2
    ben.messages = list(ann.messages)
    for turn in range(2):
        await ben.say(f"Go on {turn}.", f"ben/{turn}")
        await ann.say(f"Go on {turn}.", f"ann/{turn}")
    for turn in range(2):
        assert b"annsearched" in script.bodies(f"ann/{turn}")[0], "the probe is blind"
        assert b"annsearched" not in script.bodies(f"ben/{turn}")[0]


async def test_invariant_6_a_session_of_another_key_or_user_is_not_there(stand: Stand) -> None:
    """The id of a session is untrusted: it names a conversation only inside its tenant."""
    script = stand.script
    session = {"x-llm-pager-session": "shared-session"}
    owner = Chat(stand.client("owner"), keep=1, headers=session)
    marks: list[str] = []
    await talk(owner, script, "owner", TRUNK_TURNS, marks)
    got = await ransack(script, owner, "owner", PAGES, marks[:4])
    assert_apart(got, marks, [])  # the owner's client sends one message and still finds all
    question = [SYSTEM, {"role": "user", "content": f"What do you know of {marks[0]}?"}]
    for key, fields in (("thief", {}), ("owner", {"user": "thief"})):
        tag = f"thief/{key}"
        await complete(stand.client(key), question, tag, headers=session, **fields)
        (request,) = script.calls[tag]  # nothing is paged, so no memory tools are on offer
        assert request.json == {"model": "gpt-4o", "messages": question, **fields}
        await complete(stand.client(key), question, f"{tag}/again", headers=session, **fields)
        text = shown_to_model(script.calls[f"{tag}/again"])
        assert not [m for m in marks[1:] if m in text]
