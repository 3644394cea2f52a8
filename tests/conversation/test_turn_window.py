"""This turn's window: the client's own system messages in it, the room that a page gets, and that a turn which was
opened ends in an answer, however much the model calls for, within the budget."""


from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.effects import Refused
from proxy.errors import ApiError
from proxy.memory import StorageTier, VMMode, WorkingSetConfig
from proxy.memory.ids import make_page_id
from proxy.tokens import get_counter
from tests.bench.token_error import png_part
from tests.conversation.checks import check_media_messages, goes_on, upstream_tokens
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
from tests.conversation.scenario import WORDS, grown, text_of, tools_of
from tests.examples import examples

_COUNTER = get_counter("gpt-4o")


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
    """Each answer is followed by a system message alone: fifty of them, in a window of five."""
    player = Player(limits_of(12_000))
    messages: list[Message] = [*front, {"role": "user", "content": "Run every block of the plan."}]
    epochs = 0
    for turn in range(50):
        said = says(f"Running block {turn}.")
        played = player.ask(messages, script(said))
        epochs += played.answer.report.new_epoch
        for request in played.requests:
            assert count_tokens(request) <= 12_000
        assert f"kestrel{turn - 1}q" in json.dumps(played.requests[-1]) or not turn
        messages += [said, {"role": "system", "content": output(turn)}]
        if turn in (15, 30):
            player.forget()
    assert played.answer.report.channel == "tools" and epochs < 20
    for turn in (1, 20, 40):
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
        assert number == 0 or goes_on(before_bytes, played.messages_bytes()[0])


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
    begun = 0
    for budget in (1000, 1100, 1200, 1300):  # the window is full to another height in each
        player = Player(limits_of(budget, page_tokens=200))
        messages = [*grown(player, 20, words=60), {"role": "user", "content": "one"}]
        messages.append({"role": "system", "content": "note1x"})
        rounds = [
            calls(*(call("page_fault", {"page_id": f"msg_{i:04d}"}, f"c{i}") for i in (n, n + 1)))
            for n in (1, 3, 5)
        ]
        played = player.ask(messages, script(*rounds, says("yes")))
        begun += len(set(played.epochs)) > 1
        for request in played.requests:
            assert json.dumps(request["messages"]).count("note1x") == 1
            check_pairs(request)
    assert begun


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


# -- what the client has just sent


@pytest.mark.parametrize("files", [["files1x"], ["files1x", "files2x", "files3x"]])
def test_what_came_since_the_last_answer_is_whole_as_long_as_it_fits(files: list[str]) -> None:
    """A client that sends its files again before each question, and leaves the old ones out."""
    player, history = Player(limits_of(4000)), list[Message]()
    opening = [{"role": "user", "content": text_of(random.Random(1), 2100, "map1x")}, says("Ok.")]
    for number in range(6):
        words = 1500 // len(files)
        sent = [{"role": "user", "content": text_of(random.Random(2), words, mark)} for mark in files]
        asked = {"role": "user", "content": f"change {number}x"}
        played = player.ask([*opening, *history, *sent, says("Ok, those."), asked], script(says(f"done {number}x")))
        assert played.answer.report.channel == "tools"
        messages = played.requests[0]["messages"]
        assert [m for m in messages if m in sent] == sent and messages[-1] == asked
        history += [asked, says(f"done {number}x")]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_window_that_is_too_small_for_its_traffic_is_said_to_be_once(restarts: bool) -> None:
    player, messages, said, epochs = Player(limits_of(4000)), list[Message](), list[str](), 0
    for number in range(12):
        messages.append({"role": "user", "content": text_of(random.Random(number), 1500, f"user{number}x")})
        report = player.ask(messages, script(says("noted"))).answer.report
        messages.append({"role": "assistant", "content": "noted"})
        epochs += report.crowded
        said += [report.warning] if report.warning else []
        if restarts:
            player.forget()
    assert epochs > 5 and len(said) == 1
    assert said[0].isascii() and "4100 tokens" in said[0] and "raise tiers.l0.tokens to" in said[0]
    enough = int(said[0].rpartition(" to ")[2].rstrip("."))
    larger = Player(limits_of(enough - 100))
    assert not any(larger.ask(messages[: n + 1], script(says("noted"))).answer.report.crowded for n in range(0, 24, 2))


# -- room

COUNT = get_counter("gpt-4o").text
MARKUP = '"a"\n\\b '  # in JSON half as long again
many = examples(6)


# -- as dialogues


def ask_with_little_room(
    model: Model, budget: int, page: str, newest_words: int, **limits: Any
) -> Played:
    """A long newest message after `page` (msg_0001) and other messages left the window."""
    player = Player(limits_of(budget, page_tokens=budget // 4, prefetch_pages=0, **limits))
    messages: list[Message] = []
    texts = [page, *(text_of(random.Random(i), budget // 20, f"user{i}x") for i in range(12))]
    for text in texts:
        messages.append({"role": "user", "content": text})
        player.ask(messages, script(says("noted")))
        messages.append({"role": "assistant", "content": "noted"})
    newest = text_of(random.Random(99), newest_words, "newest")
    played = player.ask([*messages, {"role": "user", "content": newest}], model)
    for request in played.requests:
        assert upstream_tokens(request) <= budget, "invariant 3"
        check_pairs(request)
    return played


def fault(page_id: str, call_id: str = "c1") -> Message:
    return call("page_fault", {"page_id": page_id}, call_id)


@pytest.mark.parametrize("newest_words", [5200, 5800, 6400, 6900])
def test_a_page_that_is_longer_as_json_is_given_at_a_level_that_fits(newest_words: int) -> None:
    page = MARKUP * (2100 // COUNT(MARKUP))
    played = ask_with_little_room(
        script(calls(fault("msg_0001")), says("so")), 9000, page, newest_words
    )
    result = json.loads(tool_messages(played.requests[-1])[-1]["content"])
    assert result["page"]["level"] > 0 and MARKUP * 9 in result["page"]["content"]["text"]
    assert played.message is not None and played.message["content"] == "so"


@pytest.mark.parametrize("newest_words", [200, 300, 400, 500])
def test_a_system_message_before_the_newest_takes_of_the_room(newest_words: int) -> None:
    def model(request: Message) -> Message:
        asked = len(tool_messages(request))
        if request.get("tool_choice") == "none":
            return says("so")
        wanted = (fault(f"msg_{2 * (asked + i) + 1:04d}", f"c{asked}_{i}") for i in range(3))
        return calls(*wanted)

    player = Player(limits_of(4000, page_tokens=1000, prefetch_pages=0, faults_per_turn=20))
    texts = [text_of(random.Random(i), 500, f"user{i}x") for i in range(5)]
    messages: list[Message] = []
    for text in (*texts, "system", "one", "two"):
        if text == "system":
            content = text_of(random.Random(98), 600, "systemx")
            messages.append({"role": "system", "content": content})
            continue
        messages.append({"role": "user", "content": text})
        player.ask(messages, script(says("noted")))
        messages.append({"role": "assistant", "content": "noted"})
    newest = text_of(random.Random(99), newest_words, "newest")
    played = player.ask([*messages, {"role": "user", "content": newest}], model)
    assert all(upstream_tokens(request) <= 4000 for request in played.requests)
    assert played.message is not None and played.message["content"] == "so"


def long_id(seed: int) -> str:
    return "call_" + "".join(random.Random(seed).choices("abcxyzKLM0123456789", k=85))


@pytest.mark.parametrize("newest_words", range(2400, 3400, 200))
def test_a_result_leaves_room_for_those_of_the_calls_after_it(newest_words: int) -> None:
    wanted = [fault(f"msg_{i:04d}", long_id(i)) for i in (1, 3, 5, 7, 9, 31, 32, 33)]
    played = ask_with_little_room(
        script(calls(*wanted), says("so")), 4000, "word " * 900, newest_words
    )
    results = [json.loads(one["content"]) for one in tool_messages(played.requests[-1])]
    if len(results) == len(wanted):  # else not even so many errors fit, and it was asked without tools
        assert "page" in results[0] and "error" in results[-1]
    assert played.message is not None and played.message["content"] == "so"


def test_a_round_that_a_smaller_window_cannot_keep_leaves_it() -> None:
    """Upstream takes less than it is known to, and says so in the middle of the loop."""
    rounds = 0

    def model(request: Message) -> Message | Refused:
        nonlocal rounds
        tokens = upstream_tokens(request)
        if tokens > 3000:
            words = f"maximum context length is 3000 tokens. Your messages resulted in {tokens} tokens."
            return Refused(400, json.dumps({"error": {"message": words}}).encode())
        rounds += 1
        return calls(fault("msg_0001")) if request.get("tool_choice") != "none" else says("so")

    played = ask_with_little_room(model, 6000, "lantern " * 1400, 1300, faults_per_turn=20)
    before, after = played.requests[-2:]
    assert upstream_tokens(before) > 3000 >= upstream_tokens(after)
    assert tool_messages(before) and not tool_messages(after)
    assert played.message is not None and played.message["content"] == "so"
    entry = played.turn.table.lookup("msg_0001")
    lines = "".join(m["content"] for m in after["messages"] if m["role"] == "developer")
    assert entry is not None and (entry.tier is StorageTier.L0) == ("U (msg_0001" in lines)


# -- as random plays


@dataclass(frozen=True)
class Stubborn:
    """`calls`: how many faults and searches a round of the model's may have; `markup`: texts that are
    longer as JSON; `chatter`: words that it says beside its calls; `client`: it calls the client's
    tool as well, where there is one."""

    seed: int
    budget: int = 4000
    calls: tuple[int, ...] = (1, 2, 12)
    tools: int = 0
    mode: VMMode = VMMode.RELAXED
    markup: bool = False
    media: bool = False
    systems: bool = False
    chatter: int = 0
    id_chars: int = 8
    faults: int = 20
    share: int = 8  # of the budget, for one page
    client: bool = False
    extra: str = ""


EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "json": {"response_format": {"type": "json_object"}},
    "passive": {"tool_choice": "none"},
    "unlisted": {"functions": [{"name": "look", "parameters": {"type": "object"}}]},
    "stream": {"stream": True},
}


class Talk:
    """A linear conversation with a model that never stops calling of itself."""

    def __init__(self, how: Stubborn) -> None:
        self.how = how
        self.rng = random.Random(how.seed)
        self.player = Player(
            limits_of(
                how.budget, mode=how.mode, page_tokens=how.budget // how.share,
                faults_per_turn=how.faults,
            )
        )  # fmt: skip
        self.messages: list[Message] = []
        self.asked = self.said = 0
        self.bodies: list[bytes] = []

    def text(self, share: float) -> str:
        self.said += 1
        words = int(self.how.budget * share / 1.6)
        text = text_of(self.rng, words, f"name{self.said}x")
        if self.how.markup:
            text = MARKUP.join(text.split()[::3])
        return text

    def turn(self) -> None:
        how, rng = self.how, self.rng
        if how.systems and rng.random() < 0.5:
            self.messages.append({"role": "system", "content": self.text(rng.choice((0.01, 0.1)))})
        content: Any = self.text(rng.choice((0.02, 0.1, 0.3, 0.5, 0.9, 1.6)))
        if how.media and rng.random() < 0.5:
            side = rng.choice((64, 512, 900))
            content = [{"type": "text", "text": content}, png_part(side + self.said, side)]
        self.messages.append({"role": "user", "content": content})
        extra = EXTRAS[how.extra] | ({"tools": tools_of(how.tools)} if how.tools else {})
        for _ in range(2):
            before = self.asked
            try:
                played = self.player.ask(self.messages, self.model, **extra)
            except ApiError as error:
                assert self.asked == before, f"an opened turn failed: {error}"
                self.messages.pop()  # it could not be opened
                return
            self.check(played)
            assert played.message is not None
            echo = {k: v for k, v in played.message.items() if v is not None}
            self.messages.append({"content": "", **echo})
            wanted = played.message.get("tool_calls") or ()
            if not wanted:
                return
            for one in wanted:
                result = self.text(rng.choice((0.02, 0.4)))
                self.messages.append({"role": "tool", "tool_call_id": one["id"], "content": result})

    def check(self, played: Played) -> None:
        self.bodies += played.bodies
        for request in played.requests:
            assert upstream_tokens(request) <= self.how.budget, "invariant 3"
            check_pairs(request)
            check_media_messages(request)

    def model(self, request: Message) -> Message:
        how = self.how
        self.asked += 1
        rng = random.Random(f"{how.seed} {self.asked}")
        names = [tool["function"]["name"] for tool in request.get("tools") or ()]
        fault = next((n for n in ("vm_page_fault", "page_fault") if n in names), None)
        if fault is None or "search_pages" not in names or rng.random() < 0.02:
            return says(f"answer {self.asked}")
        wanted = []
        for i in range(rng.choice(how.calls)):
            call_id = f"c{self.asked}_{i}_" + "".join(rng.choices("abcxyz789", k=how.id_chars - 8))
            if rng.random() < 0.25:
                query = {"query": " ".join(rng.choices(WORDS, k=3)), "limit": 20}
                wanted.append(call("search_pages", query, call_id))
            else:
                kind = "img_{:04d}_1" if how.media and rng.random() < 0.3 else "msg_{:04d}"
                page = kind.format(rng.randint(1, len(self.messages)))
                wanted.append(call(fault, {"page_id": page}, call_id))
        if how.client and "lookup" in names and rng.random() < 0.3:
            wanted.insert(0, call("lookup", {"word": "x" * 40}, f"k{self.asked}"))
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, how.chatter))) if how.chatter else None
        return calls(*wanted, text=text)


stubborn = st.builds(
    Stubborn,
    seed=st.integers(0, 10**6),
    budget=st.integers(2000, 9000),
    calls=st.sampled_from(((1,), (1, 2), (12,), (1, 2, 12))),
    tools=st.sampled_from((0, 1, 3)),
    mode=st.sampled_from((VMMode.RELAXED, VMMode.STRICT)),
    markup=st.booleans(),
    media=st.booleans(),
    systems=st.booleans(),
    chatter=st.sampled_from((0, 20, 400)),
    id_chars=st.sampled_from((8, 29, 90)),
    faults=st.sampled_from((3, 20)),
    share=st.sampled_from((4, 8, 16)),
    client=st.booleans(),
    extra=st.sampled_from(tuple(EXTRAS)),
)


@many
@given(stubborn)
def test_invariant_01_a_turn_that_was_opened_never_fails_for_lack_of_room(how: Stubborn) -> None:
    """`turn` says what must hold of each."""
    talk = Talk(how)
    for _ in range(8):
        talk.turn()
    assert talk.asked > 0 and talk.bodies, "at least one turn was opened"


def user_of(request: Message, words: str) -> list[str]:
    """The lines of a request's context that have these words."""
    text = "\n".join(m["content"] for m in request["messages"] if m["role"] == "developer")
    return [line for line in text.splitlines() if words in line]


def test_what_a_user_said_for_all_later_answers_stands_in_every_window_word_for_word() -> None:
    """And no more of a long message than that; a later one takes its place; a restart changes no byte."""
    player, history = Player(limits_of(1500)), list[Message]()
    pasted = "\n".join(f"row {i}: harbour {i * 7} lantern {i * 13}" for i in range(60))
    said = {
        1: "Always answer in French.",
        2: f"{pasted}\nWhat is in row 7? I prefer tables over lists.",
        12: "From now on answer in German.",
    }
    requests: dict[int, Message] = {}
    for turn in range(24):
        text = said.get(turn, f"Turn {turn}: " + "what lies at the quay of the old town today? " * 6)
        history.append({"role": "user", "content": text})
        twin = Player(player.limits)
        twin.values = dict(player.values)
        bodies = [one.ask(history, lambda _: says("It is quiet there. " * 8)).bodies for one in (player, twin)]
        assert bodies[0] == bodies[1]
        requests[turn] = json.loads(bodies[0][0])
        history.append(says("It is quiet there. " * 8))
    french, tables = user_of(requests[10], "French"), user_of(requests[23], "tables over")
    assert french == ['U (msg_0003): "Always answer in French."']
    assert tables == ['U (msg_0005, level 1): "I prefer tables over lists."']
    assert user_of(requests[23], "German") == ['U (msg_0025): "From now on answer in German."']
    assert not user_of(requests[23], "French") and "row 7:" not in json.dumps(requests[23])


# -- what is far in front of the window


def long_history() -> list[Message]:
    """200 short messages and a question about the third of them."""
    said = [f"Item {n}: the {'red' if n % 3 else 'green'} crate number {n * 7919 % 1009} stands at quay {n % 17}." for n in range(200)]
    said[2] = "The password of the lighthouse is zanzibar."
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return [*messages, {"role": "user", "content": "What was the password of the lighthouse?"}]


class _Counted(Player):
    """One whose process has counted all messages before."""

    def place(self, *given: Any) -> Any:
        split, found, *rest = super().place(*given)
        for node in found.path:
            node.counted(_COUNTER.message(json.loads(node.raw)), _COUNTER.name)
        return split, found, *rest


def test_far_messages_are_estimated_and_counted_when_they_are_shown() -> None:
    turn = Player(limits_of(1000)).ask(long_history(), script(says("zanzibar"))).turn
    table, path = turn.table, turn.path
    exact = [_COUNTER.message(json.loads(node.raw)) for node in path]
    entries = [table.lookup(make_page_id(position)) for position in range(201)]
    far = [entry for entry in entries if entry is not None and entry.estimated]
    assert 80 < len(far) < 160 and not any(entry.l0_tokens for entry in far)
    assert sum(entry.size_tokens for entry in far) == pytest.approx(sum(exact[entry.position] for entry in far), rel=0.1)
    assert sum(path[entry.position].tokens < 0 for entry in far) > 60  # the others' lines were counted
    shown = entries[2]
    assert shown is not None and shown.l0_tokens and shown.size_tokens == exact[2] and not shown.estimated


def test_invariant_07_what_a_process_has_counted_before_changes_nothing() -> None:
    plain, counted = Player(limits_of(1000)), _Counted(limits_of(1000))
    messages, upstream = long_history(), list[list[bytes]]()
    for player in (plain, counted):
        bodies: list[bytes] = []
        said = list(messages)
        for number in range(6):
            played = player.ask(said, script(says(f"Answer {number}: " + "the crates stand at the quay. " * 8)))
            bodies += played.bodies
            assert played.message is not None and played.turn.record is not None
            bodies.append(played.turn.record.mutations)
            said += [played.message, {"role": "user", "content": f"And what stands at quay {number}?"}]
            if number == 2:
                player.forget()
        upstream.append(bodies)
    assert upstream[0] == upstream[1]
