"""This turn's window: the client's own system messages in it, and the room that a page gets."""

from __future__ import annotations

import json
import random

import pytest

from proxy.memory import StorageTier, VMMode, WorkingSetConfig
from proxy.tokens import get_counter
from tests.conversation.player import (
    Message,
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
from tests.conversation.scenario import grown, text_of


@pytest.mark.parametrize("tokens", [900, 1000, 1020])
def test_a_full_page_can_be_loaded_in_a_window_of_4000_tokens(tokens: int) -> None:
    small = WorkingSetConfig(max_l0_tokens=4000, reserved_tokens=1000)
    player = Player(limits_of(3000, working_set=small))
    count = get_counter("gpt-4o").text
    words = text_of(random.Random(7), 900, "long7x").split()
    while count(" ".join(words)) > tokens:
        words.pop()
    words[-1] = "lastword"
    text = " ".join(words)
    messages = [{"role": "user", "content": text}]
    player.ask(messages, script(says("noted")))
    messages.append({"role": "assistant", "content": "noted"})
    for turn in range(20):
        messages.append({"role": "user", "content": text_of(random.Random(turn), 60, f"user{turn}x")})
        answer = text_of(random.Random(turn), 60, f"answer{turn}x")
        player.ask(messages, script(says(answer)))
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": "and now"})
    fault = calls(call("page_fault", {"page_id": "msg_0001", "target_level": 0}, "c1"))
    played = player.ask(messages, script(fault, says("there it is")))
    assert words[-1].encode() not in played.bodies[0]  # it was evicted
    page = json.loads(tool_messages(played.requests[-1])[-1]["content"])["page"]
    assert (page["level"], page["content"]["text"]) == (0, text)
    entry = played.turn.table.lookup("msg_0001")
    assert entry is not None and entry.tier is StorageTier.L0
    assert all(count_tokens(request) <= 3000 for request in played.requests)


# -- the client's own system messages


def test_system_messages_in_mid_conversation_count_and_leave_with_the_messages_beside_them() -> None:
    player = Player(limits_of(1500))
    messages = grown(player, 6)
    for i in (2, 5, 8):
        note = {"role": "system", "content": text_of(random.Random(i), 30, f"note{i}x")}
        messages.insert(i, note)
    for i in range(6):
        messages.append({"role": "user", "content": text_of(random.Random(90 + i), 60, f"late{i}x")})
        played = player.ask(messages, script(says("yes")))
        for request in played.requests:
            assert count_tokens(request) <= 1500
            text = json.dumps(request["messages"])
            beside = ((2, "user1x"), (5, "user2x"), (8, "user3x"))  # each stands before a question
            shown = [(text.count(f"note{number}x"), text.count(name)) for number, name in beside]
            assert all(note <= message <= 1 for note, message in shown)
        messages.append({"role": "assistant", "content": "yes"})
    assert [note for note, _ in shown] != [1, 1, 1]


def output(turn: int, lines: int = 120) -> str:
    """About 4 KB of a tool's output, with one word that stands nowhere else."""
    rows = (f"def step_{turn}_{i}(a, b): return a * {i} + b" for i in range(lines))
    return f"Ran block {turn}.\n" + "\n".join([*rows, f"checksum kestrel{turn}q of block {turn}"])


@pytest.mark.parametrize("front", [[], [{"role": "system", "content": "You run what you are told."}]])
def test_an_agent_whose_outputs_are_system_messages_goes_on_for_long(front: list[Message]) -> None:
    """Each answer is followed by a system message alone: a hundred of them, in a window of five."""
    player = Player(limits_of(12_000))
    messages: list[Message] = [*front, {"role": "user", "content": "Run every block of the plan."}]
    epochs = 0
    for turn in range(100):
        said = says(f"Running block {turn}.")
        played = player.ask(messages, script(said))
        epochs += played.answer.report.new_epoch
        for request in played.requests:
            assert count_tokens(request) <= 12_000
        assert f"kestrel{turn - 1}q" in json.dumps(played.requests[-1]) or not turn
        messages += [said, {"role": "system", "content": output(turn)}]
        if turn in (30, 60):
            player.forget()
    assert played.answer.report.channel == "tools" and epochs < 40
    for turn in (1, 20, 55, 90):
        asked = script(calls(call("search_pages", {"query": f"kestrel{turn}q checksum"}, "s")), says("ok"))
        played = player.ask(messages, asked)
        found = json.loads(tool_messages(played.requests[-1])[-1]["content"])["results"]
        page = found[0]["page_id"]
        load = script(calls(call("page_fault", {"page_id": page, "target_level": 0}, "f")), says("ok"))
        played = player.ask(messages, load)
        told = json.loads(tool_messages(played.requests[-1])[-1]["content"])["page"]["content"]["text"]
        assert f"kestrel{turn}q" in told


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("before", ["answer", "question", "front"])
def test_a_newest_system_message_larger_than_the_window_is_cut_and_can_be_loaded(
    role: str, before: str
) -> None:
    player = Player(limits_of(12_000))
    messages: list[Message] = [{"role": "user", "content": "Run it."}]
    if before == "answer":
        player.ask(messages, script(says("Running.")))
        messages.append({"role": "assistant", "content": "Running."})
    large = {"role": role, "content": output(1, 900)}
    messages.append(large)
    if before == "front":
        messages.append({"role": "user", "content": "Well?"})
        messages.append({"role": role, "content": "Be brief in this answer."})
    found = script(calls(call("search_pages", {"query": "step_1_450"}, "s")), says("ok"))
    played = player.ask(messages, found)
    for request in played.requests:
        assert count_tokens(request) <= 12_000
    shown = next(m for m in played.requests[0]["messages"] if m["content"].startswith("Ran block 1."))
    assert shown["role"] == role and "are not shown; the whole is in msg_" in shown["content"]
    assert "kestrel1q" in shown["content"]  # its end
    results = json.loads(tool_messages(played.requests[-1])[-1]["content"])["results"]
    page = results[0]["page_id"]
    load = calls(call("page_fault", {"page_id": page, "target_level": 0}, "f"))
    told = player.ask(messages, script(load, says("ok"))).requests[-1]
    assert "step_1_450(" in json.loads(tool_messages(told)[-1]["content"])["page"]["content"]["text"]
    for number in range(4):  # and the window goes on from there
        messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": f"go on {number}"}]
        before_bytes = played.messages_bytes()[-1]
        played = player.ask(messages, script(says("ok")))
        assert not played.answer.report.new_epoch or number == 0
        assert number == 0 or played.messages_bytes()[0].startswith(before_bytes[:-1])


def test_a_standing_instruction_of_the_applications_stays_in_front() -> None:
    player = Player(limits_of(1500))
    messages = grown(player, 3)
    note = {"role": "developer", "content": "From now on answer in French."}
    messages.append(note)
    for i in range(20):
        messages.append({"role": "user", "content": text_of(random.Random(i), 60, f"late{i}x")})
        played = player.ask(messages, script(says("oui")))
        assert played.requests[-1]["messages"].count(note) == 1
        assert count_tokens(played.requests[-1]) <= 1500
        messages.append({"role": "assistant", "content": "oui"})
    assert played.requests[-1]["messages"][0] == note


def test_an_old_system_message_that_the_client_changes_is_shown_nowhere_as_it_was() -> None:
    """Neither quoted from the pages of the messages beside it, nor found."""
    player = Player(limits_of(1500))
    messages = grown(player, 4)
    at = len(messages)
    messages.insert(at - 1, {"role": "system", "content": "The vault code is heron1q."})
    for i in range(12):
        messages.append({"role": "user", "content": text_of(random.Random(i), 60, f"late{i}x")})
        player.ask(messages, script(says("yes")))
        messages.append({"role": "assistant", "content": "yes"})
    messages.append({"role": "user", "content": "What did we say about the vault code?"})
    search = calls(call("search_pages", {"query": "vault code"}, "s"))
    assert b"heron1q" in b"".join(player.ask(messages, script(search, says("so"))).bodies)
    messages[at - 1] = {"role": "system", "content": "The vault code is plover2q."}
    found = b"".join(player.ask(messages, script(search, says("so"))).bodies)
    assert b"heron1q" not in found and b"plover2q" in found
    del messages[at - 1]
    gone = b"".join(player.ask(messages, script(search, says("so"))).bodies)
    assert b"heron1q" not in gone and b"plover2q" not in gone


def test_a_system_message_that_the_client_took_back_is_gone() -> None:
    player = Player(limits_of(1500))
    messages = grown(player, 14)
    messages.append({"role": "system", "content": "note1x"})
    for i in range(3):
        messages.append({"role": "user", "content": f"say more {i}"})
        player.ask(messages, script(says(f"yes {i}")))
        messages.append({"role": "assistant", "content": f"yes {i}"})
    kept = [m for m in messages if m["role"] != "system"]
    kept.append({"role": "user", "content": "and now"})
    assert b"note1x" not in player.ask(kept, script(says("yes"))).bodies[0]


def test_a_second_system_message_behind_the_first_is_seen_at_once() -> None:
    player = Player(limits_of(1500))
    messages = [*grown(player, 14), {"role": "user", "content": "one"}]
    messages.append({"role": "system", "content": "note1x"})
    player.ask(messages, script(says("yes")))
    messages += [{"role": "system", "content": "note2x"}, {"role": "assistant", "content": "yes"},
                 {"role": "user", "content": "two"}]
    body = player.ask(messages, script(says("yes"))).bodies[0]
    assert b"note1x" in body and b"note2x" in body


def test_a_system_message_behind_the_newest_survives_an_epoch_in_mid_turn() -> None:
    player = Player(limits_of(1200, page_tokens=200))
    messages = [*grown(player, 30, words=30), {"role": "user", "content": "one"}]
    messages.append({"role": "system", "content": "note1x"})
    rounds = [
        calls(*(call("page_fault", {"page_id": f"msg_{i:04d}"}, f"c{i}") for i in (n, n + 1)))
        for n in (1, 3, 5)
    ]
    played = player.ask(messages, script(*rounds, says("yes")))
    assert len(set(played.epochs)) > 1
    for request in played.requests:
        assert json.dumps(request["messages"]).count("note1x") == 1
        check_pairs(request)


@pytest.mark.parametrize("formatted", [True, False])
def test_strict_mode_asks_for_citations_but_never_where_the_answer_is_json(formatted: bool) -> None:
    """The rule leaves for that request only: the next one continues the cached prefix."""
    player = Player(limits_of(1500, mode=VMMode.STRICT))
    messages = grown(player, 14)
    extra = {"response_format": {"type": "json_object"}} if formatted else {}
    messages.append({"role": "user", "content": "in JSON, please"})
    asked = player.ask(messages, script(says("{}")), **extra).requests[0]
    messages += [{"role": "assistant", "content": "{}"}, {"role": "user", "content": "and now?"}]
    then = player.ask(messages, script(says("so"))).requests[0]
    rules = [next(m["content"] for m in r["messages"] if m["role"] == "developer") for r in (asked, then)]
    assert ("cite the page" in rules[0]) is not formatted
    assert "cite the page" in rules[1] and "never guess" in rules[0]
