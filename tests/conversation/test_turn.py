"""Whole turns, played as dialogues: the invariants over random conversations, and single stories."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.conversation.effects import Append, Complete, Load, Refused
from proxy.memory import StorageTier, VMMode
from proxy.memory.message_text import message_text
from tests.conversation.checks import goes_on
from tests.conversation.player import (
    Message,
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
from tests.conversation.scenario import Run, Scenario, grown, play, scenarios, text_of, tools_of
from tests.examples import examples

few = examples(8)

_NAMES = re.compile(r"(?:system|user|answer|note|pre|result|vm_|vs_|cl_)\d+[x_][\w]*")


# -- over random conversations


# In this one a room that is 60 tokens too large is seen.
_CLOSE = Scenario(772, 3000, ("retry", "say", "edit", "big", "say", "regenerate", "regenerate", "retry", "say", "big", "say", "edit",
                              "say", "retry"), "stubborn", 0.05, 3, VMMode.STRICT)  # fmt: skip


@examples(16)
@example(_CLOSE)
@given(scenarios())
def test_invariants_03_06_and_08_hold_in_every_turn(scenario: Scenario) -> None:
    run = play(scenario)
    for played in run.played:
        for request in played.requests:
            assert count_tokens(request) <= scenario.budget, "invariant 3"
            check_pairs(request)
    _check_prefixes(run)
    _check_branches(run)
    _check_what_the_client_sees(run, scenario)


@examples(6)
@given(scenarios(turns=10), st.integers(0, 2**16))
def test_invariants_07_and_09_a_restart_another_replica_and_lost_caches_change_no_request(scenario: Scenario, coin: int) -> None:
    rng = random.Random(coin)

    def before_turn(player: Player, _: int) -> None:
        """Its caches are lost, or another replica goes on, or nothing happens."""
        if (happens := rng.random()) < 0.3:
            player.forget()
        elif happens < 0.6:
            stored = dict(player.values)
            player.__init__(scenario.limits())  # type: ignore[misc]
            player.values = stored

    assert play(scenario, before_turn=before_turn).bodies == play(scenario).bodies


def _check_prefixes(run: Run) -> None:
    """Within an epoch the messages only grow at their end."""
    ends: dict[bytes, tuple[int, bytes]] = {}
    for played in run.played:
        record = played.place.record
        before = ends.get(record.id) if record else None
        rounds = zip(played.bodies, played.epochs, played.messages_bytes(), strict=True)
        for body, epoch, messages in rounds:  # a model that does not stop calling is asked without tools
            listed = b'"search_pages"' in body.split(b'"tools"')[-1]
            if epoch and before and before[0] == epoch and listed:
                assert goes_on(before[1], messages)
            before = (epoch, messages) if listed else None
        if played.turn.record is not None and before is not None:
            ends.setdefault(played.turn.record.id, before)  # an equal answer is stored once


def _check_branches(run: Run) -> None:
    """Invariant 6: no effect has text of another branch."""
    lineage: dict[bytes, set[str]] = {}
    for played, history in zip(run.played, run.histories, strict=True):
        own = set(_NAMES.findall(json.dumps(history)))
        for reply in played.replies:  # what the model itself says in this turn
            own.update(_NAMES.findall(str(getattr(reply, "messages", ""))))
        if played.place.record is not None:
            own |= lineage[played.place.record.id]
        for effect, reply in zip(played.effects, played.replies, strict=False):
            text = str(reply) if isinstance(effect, Load) else ""
            if isinstance(effect, Complete):
                text = effect.body.decode()
            if isinstance(effect, Append):
                text = str([record.raws + record.substitute for record in effect.records])
            found = set(_NAMES.findall(text)) - own
            assert all(any(name.startswith(cut) for name in own) for cut in found), found
        if played.turn.record is not None:
            lineage.setdefault(played.turn.record.id, own)


def _check_what_the_client_sees(run: Run, scenario: Scenario) -> None:
    """Never a call of the memory's."""
    names = {tool["function"]["name"] for tool in tools_of(scenario.tools)}
    for played in run.played:
        assert played.message is not None
        assert {c["function"]["name"] for c in played.message.get("tool_calls") or ()} <= names
        assert b"search_pages" not in played.stream
        assert played.stream.count(b"[DONE]") <= 1


@few
@given(scenarios(turns=8, habit="stubborn", mode=VMMode.RELAXED))
def test_invariant_10_a_model_that_only_calls_us_is_brought_to_an_end(scenario: Scenario) -> None:
    limits = scenario.limits()
    for played in play(scenario).played:
        assert len(played.bodies) <= limits.max_rounds + 2  # it is asked twice more, without tools
        refused = played.answer.refused
        assert refused is not None or (played.message or {}).get("content")
        assert refused is None or (refused.status == 502 and b"no_answer" in refused.body)
        served = [fault for fault in played.answer.report.faults if fault.error is None]
        assert sum(fault.tokens for fault in served) <= limits.fault_tokens
        for request in played.requests:
            check_pairs(request)
            assert count_tokens(request) <= scenario.budget


@few
@given(scenarios(turns=8))
def test_invariant_06_tenants_with_the_same_words_do_not_meet(scenario: Scenario) -> None:
    """Three users behind one key say the same, one after the other."""
    alone = play(scenario)
    player = Player(scenario.limits())
    for user in ("a", "b"):
        _as_user(player, user)
        play(scenario, player)
    _as_user(player, None)
    assert play(scenario, player).bodies == alone.bodies
    ids = {record_id for record_id in player.values if record_id[:1] == b"n"}
    assert len(ids) == 3 * len({p.turn.record.id for p in alone.played if p.turn.record})


def _as_user(player: Player, user: str | None) -> None:
    ask = Player.ask

    def as_user(*args: Any, **extra: Any) -> Played:
        played = ask(player, *args, **extra, **({"user": user} if user else {}))
        played.bodies = [b.replace(b', "user": "%s"' % (user or "").encode(), b"") for b in played.bodies]
        return played

    player.ask = as_user  # type: ignore[method-assign]


# -- invariant 1


def test_invariant_01_a_refused_changed_request_is_sent_once_more_unchanged() -> None:
    player = Player(limits_of(1500))
    messages = grown(player, 12)
    messages.append({"role": "user", "content": "and now?"})
    body = json.dumps({"model": "gpt-4o", "messages": messages, "odd": [1]}).encode()
    refusal = Refused(400, b'{"error":{"message":"tools are not supported"}}')
    played = player.ask([], script(refusal, says("fine")), body=body)
    assert len(played.bodies) == 2 and played.bodies[0] != body and played.bodies[1] == body
    assert played.message is not None and played.message["content"] == "fine"
    assert played.answer.learned == {"tools": False}
    messages += [{"role": "assistant", "content": "fine"}, {"role": "user", "content": "go on"}]
    assert player.ask(messages, script(says("ok"))).message == says("ok")


def test_invariant_01_a_refusal_in_a_later_round_is_tried_unchanged_too() -> None:
    player = Player(limits_of(1500))
    messages = [*grown(player, 12), {"role": "user", "content": "and now?"}]
    fault = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"))
    played = player.ask(messages, script(fault, Refused(400, b"no")))
    assert played.answer.refused == Refused(400, b"no") and len(played.bodies) == 3
    played = player.ask(messages, script(fault, Refused(400, b"no"), says("yes")))
    assert played.answer.refused is None and played.requests[-1]["messages"] == messages


@pytest.mark.parametrize("share", [0.1, 0.7, 0.9])
def test_invariant_01_the_clients_own_tools_are_never_forbidden_before_the_last_round(
    share: float,
) -> None:
    """However full the window is, the first round leaves the client's choice alone."""
    player = Player(limits_of(1500, faults_per_turn=0))
    messages = grown(player, 12, tools=tools_of(1))
    text = text_of(random.Random(1), int(share * 1500 / 1.6), "user99x")
    messages.append({"role": "user", "content": text})
    lookup = calls(call("lookup", {"word": "a"}, "c1"))
    played = player.ask(messages, script(lookup), tools=tools_of(1))
    assert "tool_choice" not in played.requests[0]
    assert played.message is not None and played.message["tool_calls"] == lookup["tool_calls"]
    forced = {"type": "function", "function": {"name": "lookup"}}
    played = player.ask(messages, script(lookup), tools=tools_of(1), tool_choice=forced)
    assert [r["tool_choice"] for r in played.requests] == [forced]


# -- invariant 2


@examples(12)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=40)},
            optional={"x": st.none() | st.integers()},
        ),
        min_size=1, max_size=6,
    ).filter(lambda messages: any(m["role"] != "system" for m in messages)),
    st.integers(0, 3), st.booleans(),
)
def test_invariant_02_what_fits_goes_up_with_the_very_same_bytes(
    messages: list[Message], indent: int, twice: bool
) -> None:
    player = Player(limits_of(20_000))
    body = json.dumps({"n": 1, "messages": messages, "odd": {"b": 1, "a": None}, "model": "gpt-4o"},
                      indent=indent or None, ensure_ascii=bool(indent % 2)).encode()
    for _ in range(1 + twice):
        played = player.ask([], script(says("ok")), body=body)
        assert played.bodies == [body]
        effect = played.effects[0]
        assert isinstance(effect, Complete) and effect.through and not effect.offer
        assert played.answer.body is None  # the answer goes down as it came


# -- invariant 4


def test_invariant_04_every_page_that_was_evicted_can_be_had_whole() -> None:
    player = Player(limits_of(3000, page_tokens=200, faults_per_turn=99))
    messages = grown(player, 20)
    messages[4]["content"] = "\n\n".join(text_of(random.Random(i), 90, f"part{i}x") for i in range(6))
    for i in range(4, len(messages), 2):  # the same story again, with one long message in it
        player.ask(messages[: i + 1], script({**messages[i + 1]}))
    messages.append({"role": "user", "content": "and now?"})
    table = player.ask(messages, script(says("so"))).turn.table
    outside = [e for e in table if e.position >= 0 and (e.tier is not StorageTier.L0 or e.level)]
    assert len(outside) > 20 and {e.part for e in outside} >= {0, 1, 2}
    found: dict[int, str] = {}
    for entry in outside:
        fault = calls(call("page_fault", {"page_id": entry.page_id}, "c1"))
        played = player.ask(messages, script(fault, says("there it is")))
        page = json.loads(tool_messages(played.requests[-1])[-1]["content"])["page"]
        assert page["level"] == 0 and page["page_id"] == entry.page_id
        found[entry.position] = found.get(entry.position, "") + page["content"]["text"]
    for position, text in found.items():
        assert text == messages[position]["content"]


# -- invariant 5


@pytest.mark.parametrize("turns", [1, 12])
def test_invariant_05_a_turn_ends_only_after_all_of_it_is_appended(turns: int) -> None:
    player = Player(limits_of(1500))
    messages = [*grown(player, turns), {"role": "user", "content": "and now?"}]
    played = player.ask(messages, script(says("here it is")))
    assert isinstance(played.effects[-1], Append)
    player.forget()
    record = played.turn.record
    assert record is not None
    stored = player.get_record(record.id)
    assert stored is not None and json.loads(stored.raws[-1])["content"] == "here it is"
    path = player._load_path(stored)
    assert [json.loads(n.raw)["content"] for n in path[:-1]] == [m["content"] for m in messages]


# -- mixed calls


@pytest.mark.parametrize("stream", [False, True])
def test_a_mixed_call_comes_back_whole_however_much_later(stream: bool) -> None:
    player = Player(limits_of(2500))
    tools = tools_of(1)
    messages = [*grown(player, 20, tools=tools), {"role": "user", "content": "and now?"}]
    both = calls(call("page_fault", {"page_id": "msg_0001"}, "v1"), call("lookup", {"w": 1}, "c1"))
    played = player.ask(messages, script(both), tools=tools, stream=stream)
    assert played.message is not None and len(played.bodies) == 1
    assert [c["id"] for c in played.message["tool_calls"]] == ["c1"]
    messages.append({"role": "assistant", "tool_calls": [call("lookup", {"w": 1}, "c1")]})
    messages.append({"role": "tool", "tool_call_id": "c1", "content": "seven"})
    player.forget()
    played = player.ask(messages, script(says("seven")), tools=tools)
    request = played.requests[0]
    check_pairs(request)
    ids = [c["id"] for m in request["messages"] for c in m.get("tool_calls") or ()]
    assert ids == ["v1", "c1"]
    page = next(m for m in tool_messages(request) if m["tool_call_id"] == "v1")
    assert "user0x" in page["content"]


def test_a_mixed_call_too_large_for_the_window_is_reduced_to_the_clients_part() -> None:
    player = Player(limits_of(1300, page_tokens=64))
    tools = tools_of(1)
    messages = [*grown(player, 20, words=100, tools=tools), {"role": "user", "content": "and now?"}]
    faults = [call("page_fault", {"page_id": f"msg_{i:04d}"}, f"v{i}") for i in (1, 3, 5)]
    played = player.ask(messages, script(calls(*faults, call("lookup", {}, "c1"))), tools=tools)
    assert played.message is not None
    messages += [{"role": "assistant", "content": None, "tool_calls": played.message["tool_calls"]},
                 {"role": "tool", "tool_call_id": "c1", "content": text_of(random.Random(3), 900, "r")}]
    request = player.ask(messages, script(says("so")), tools=tools).requests[0]
    check_pairs(request)
    assert count_tokens(request) <= 1300
    assert [m["tool_call_id"] for m in tool_messages(request)][-1] == "c1"


# -- who sends only a part


def test_a_trimmed_history_that_begins_inside_a_tool_group_is_made_whole() -> None:
    player = Player(limits_of(1500))
    tools = tools_of(1)
    messages = grown(player, 12, tools=tools)
    for n in range(2):  # its front begins to move
        messages.append({"role": "user", "content": f"turn {n}"})
        noted = says(f"noted {n}, and there is nothing else to be said about it, now or later")
        player.ask(messages[-3:], script(noted), tools=tools)
        messages.append(noted)
    messages.append({"role": "user", "content": "look it up, in the one lookup that there is for things like this one"})
    player.ask(messages[-3:], script(calls(call("lookup", {}, "c1"))), tools=tools)
    messages.append(calls(call("lookup", {}, "c1")))
    messages.append({"role": "tool", "tool_call_id": "c1", "content": "seven"})
    found = "seven it is, as the lookup says, and there is nothing else to be found about it"
    player.ask(messages[-3:], script(says(found)), tools=tools)
    messages += [says(found), {"role": "user", "content": "and twice that?"}]
    played = player.ask(messages[-3:], script(says("fourteen")), tools=tools)
    assert played.place.start == len(messages) - 3
    check_pairs(played.requests[0])


def test_a_session_gets_only_the_new_messages_and_the_model_all_of_them() -> None:
    player = Player(limits_of(20_000))
    first = player.ask([{"role": "user", "content": "my name is Ada"}], script(says("hi")), session="s")
    assert first.place.start == 0
    second = player.ask([{"role": "user", "content": "who am I?"}], script(says("Ada")), session="s")
    assert [m["content"] for m in second.requests[0]["messages"]] == ["my name is Ada", "hi", "who am I?"]
    other = player.ask([{"role": "user", "content": "who am I?"}], script(says("?")), session="t")
    assert len(other.requests[0]["messages"]) == 1


# -- too much


def test_a_message_larger_than_the_window_is_shown_by_its_ends() -> None:
    player = Player(limits_of(1500, page_tokens=200))
    text = "BEGIN " + " ".join(text_of(random.Random(i), 100, f"part{i}x") for i in range(40)) + " END"
    fault = calls(call("page_fault", {"page_id": "msg_0001.20"}, "c1"))
    played = player.ask([{"role": "user", "content": text}], script(fault, says("so")))
    request = played.requests[-1]
    shown = next(m["content"] for m in request["messages"] if m["role"] == "user")
    assert "BEGIN" in shown and shown.endswith("END") and "msg_0001.1 to msg_0001." in shown
    page = json.loads(tool_messages(request)[-1]["content"])["page"]
    assert page["level"] == 0 and page["content"]["text"] in text
    assert all(count_tokens(r) <= 1500 for r in played.requests)


def test_what_the_model_itself_cannot_take_goes_up_as_it_came() -> None:
    """Upstream says it best; and who is told why is the operator."""
    player = Player(limits_of(1500, window_tokens=1600))
    messages = [{"role": "system", "content": "word " * 2000}, *grown(player, 3),
                {"role": "user", "content": "hi"}]  # fmt: skip
    played = player.ask(messages, script(says("took it")))
    assert [r["messages"] for r in played.requests] == [messages]
    warning = played.answer.report.warning
    assert warning is not None and "models.<name>.window_tokens" in warning and warning.isascii()
    assert played.answer.report.channel == "bypass"


# -- small parts


def test_the_report_says_what_happened() -> None:
    player = Player(limits_of(1500))
    messages = [*grown(player, 14), {"role": "user", "content": "and now?"}]
    played = player.ask(messages, script(
        calls(call("page_fault", {"page_id": "msg_0001"}, "a"), call("page_fault", {"page_id": "x"}, "b"),
              call("search_pages", {"query": "answer3x"}, "c")), says("so")))
    report = played.answer.report
    assert (report.channel, report.rounds, report.budget_tokens) == ("tools", 2, 1500)
    assert [(f.page_id, f.error is None) for f in report.faults] == [("msg_0001", True), ("x", False)]
    assert report.searches[0].results[0] == "msg_0008"
    assert report.used_tokens <= 1500 and "msg_0001" in report.context_pages
    assert played.answer.usage is not None and played.answer.usage["vm"]["rounds"] == 2
    assert played.answer.usage["vm"]["faults"] == 1


def test_text_of_pages_is_what_the_message_says(run: Run | None = None) -> None:
    run = run or play(Scenario(3, 2000, ("say", "list", "big", "say", "say"), "client", tools=1))
    for played in run.played:
        pages = played.turn.pages
        for position in range(len(played.place.path)):
            message = msgspec.json.decode(played.place.path[position].raw)
            assert "".join(pages[position].parts) == message_text(message)


def test_invariant_02_what_fits_again_is_untouched() -> None:
    """A conversation was paged; then the client asks a model with a larger window, or shortens it."""
    player = Player(limits_of(1500))
    messages = [*grown(player, 14), {"role": "user", "content": "and now?"}]
    assert player.ask(messages, script(says("paged"))).answer.report.channel == "tools"
    player.limits = limits_of(20_000)
    for content in ("paged", "untouched"):
        played = player.ask(messages, script(says("untouched")))
        assert played.answer.report.channel == "bypass" and played.requests[0]["messages"] == messages
        messages += [says(content), {"role": "user", "content": "and then?"}]
    player.limits = limits_of(1500)
    played = player.ask(messages, script(says("paged again")))
    assert played.answer.report.channel == "tools" and count_tokens(played.requests[0]) <= 1500
