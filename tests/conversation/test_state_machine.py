"""Random histories against the whole conversation core: a hypothesis state machine over `Player`.

Promises: each turn is a dialogue without mocks, played by two installations: one keeps its caches
until a rule drops them, the other loses its RAM, or all but its stored bytes, before every turn. After
each turn the invariants 3, 4, 6, 7, 8 and 9 hold, requests keep their prefix within an epoch, and the
stored mutation log gives the turn's page table and the window at every earlier turn.

The suite plays a few histories. Thousands, drawn anew each time:

    LLM_PAGER_EXAMPLES=3000 pytest -q tests/conversation/test_state_machine.py
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from proxy.conversation.effects import Append, Complete, Load
from proxy.conversation.pages import owner
from proxy.conversation.records import Record, history, restore_state
from proxy.conversation.turn import Turn
from proxy.conversation.window import MIXED, NATIVE
from proxy.memory import StorageTier, VMMode
from tests.bench.token_error import png_part, wav_part
from tests.conversation.checks import (
    check_full_pages,
    check_media_messages,
    goes_on,
    upstream_tokens,
)
from tests.conversation.player import (
    Message,
    Played,
    Player,
    call,
    calls,
    check_pairs,
    limits_of,
    messages_bytes,
    says,
    script,
    tool_messages,
)
from tests.conversation.scenario import tools_of
from tests.conversation.speakers import HABITS, SIZES, Speakers, echo
from tests.examples import examples

MODELS = ("gpt-4o", "gpt-4o-mini", "gpt-4")
BUDGETS = (1500, 2500, 4000, 9000)
PAGE_SHARES = (8, 16)  # of the budget, for one page
_MARK = re.compile(r"Zq\d+z")  # stands in one message and whatever is made of it, nowhere else


@dataclass
class Branch:
    """One client's history as it would send it."""

    key: str
    messages: list[Message]

    @property
    def spoken(self) -> list[Message]:
        return [message for message in self.messages if message["role"] != "system"]

    @property
    def users(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]


@dataclass
class Past:
    """What is known of the state that an answer left."""

    key: str
    marks: set[str]
    unseen: set[str] = field(default_factory=set)
    contexts: dict[int, list[str]] = field(default_factory=dict)  # turn: pages in the window
    last: tuple[int, str, bytes] | None = None  # epoch, model and messages of its last request


class Machine(RuleBasedStateMachine):
    """`warm` keeps its caches between turns, `cold` never does; both get what the clients send."""

    @initialize(
        budget=st.sampled_from(BUDGETS), page_share=st.sampled_from(PAGE_SHARES),
        tools=st.sampled_from((0, 1, 3)), words=st.sampled_from((0, 10, 60)),
        mode=st.sampled_from((VMMode.RELAXED, VMMode.RELAXED, VMMode.STRICT, VMMode.PASSIVE)),
    )  # fmt: skip
    def begin(self, budget: int, page_share: int, tools: int, words: int, mode: VMMode) -> None:
        self.mode, self.tools, self.model = mode, tools, MODELS[0]
        self.speakers = Speakers(budget)
        self.page_tokens = budget // page_share
        self.resized = False  # pages had another size: ids in the table are not those of today
        self.limits = limits_of(budget, mode=mode, page_tokens=self.page_tokens)
        self.warm, self.cold = Player(self.limits), Player(self.limits)
        self.past: dict[bytes, Past] = {}
        self.media: dict[str, str] = {}  # the data of each original medium: its mark
        rng = random.Random(words)
        system = {"role": "system", "content": self.speakers.text(rng, words)}
        self.branches = [Branch("key", [system] if words else [])]
        self.standing = self.marks(json.dumps(system))

    # -- turns

    def pick(self, seed: int) -> Branch:
        return self.branches[-1 - seed % min(3, len(self.branches))]

    def converse(self, branch: Branch, habit: str, seed: int, **extra: Any) -> None:
        """Ask until the model answers, with the client's tools run in between."""
        rng = random.Random(seed)
        if self.tools:
            extra = {"tools": tools_of(self.tools), **extra}
        if rng.random() < 0.4:
            extra["stream"] = True
        for loop in range(3):
            message = self.turn(branch, habit, rng.randint(0, 10**9), loop == 2, extra)
            branch.messages.append(echo(message, rng))
            wanted = message.get("tool_calls") or []
            if not wanted:
                return
            branch.messages += self.speakers.results(rng, wanted)

    def turn(
        self, branch: Branch, habit: str, seed: int, last: bool, extra: dict[str, Any]
    ) -> Message:
        made = self.speakers.made
        fields = {"model": self.model, "messages": branch.messages, **extra}
        ask: dict[str, Any] = {"key": branch.key, "body": json.dumps(fields).encode()}
        played = self.warm.ask([], self.speakers.answerer(habit, seed, last), **ask)
        self.speakers.made, after = made, self.speakers.made
        self.cold = _replica(self.cold) if seed % 2 else self.cold
        self.cold.forget()
        again = self.cold.ask([], self.speakers.answerer(habit, seed, last), **ask)
        assert again.bodies == played.bodies, "invariants 7 and 9"
        assert self.cold.values == self.warm.values, "invariant 7: what is stored"
        self.speakers.made = made
        repeated = _replica(self.cold).ask([], self.speakers.answerer(habit, seed, last), **ask)
        self.speakers.made = after
        assert repeated.bodies == played.bodies, "invariant 7: a request that comes again"
        self.check(branch, played)
        assert played.message is not None
        return played.message

    def check(self, branch: Branch, played: Played) -> None:
        for request in played.requests:
            tokens, budget = upstream_tokens(request), self.limits.budget_tokens
            assert tokens <= budget, f"invariant 3, {played.answer.report.channel}"
            check_pairs(request)
            check_media_messages(request)
        check_full_pages(played, branch.spoken)
        own = self.check_branch(branch, played)
        record = played.turn.record
        if record is None or self.warm.get_record(record.id) is not record:
            return  # an equal answer was stored before: that turn's state is the one that counts
        before = self.past.get(played.place.record.id) if played.place.record else None
        past = Past(branch.key, own, dict(before.contexts) if before else {})
        past.last = self.check_prefix(branch, before.last if before else None, played)
        if played.turn.window is not None:
            self.check_log(record, played.turn, past)
            past.unseen = self.unseen(played.turn, played.turn, record.substitute)
            if before and not played.answer.report.new_epoch and not self.resized:
                assert past.unseen <= before.unseen, "in the window, says the table"
        self.past[record.id] = past
        for answered in played.effects[-1].records[:-1]:  # of answers that came with the request
            marks = self.marks(json.dumps(branch.spoken[: answered.end]))
            self.past.setdefault(answered.id, Past(branch.key, marks | self.standing))
        self.check_settled(before, played)

    def check_settled(self, before: Past | None, played: Played) -> None:
        """The state before what the client may say otherwise: this turn went on from it too."""
        if not played.turn.settled or played.settled is None:
            return
        record, state = played.turn.settled[-1]
        if self.warm.get_record(record.id) is not record:
            return
        past = self.past[record.id]
        past.marks |= before.marks if before else set()
        past.contexts.update(before.contexts if before else {})
        restored = restore_state(record, self.warm.get_record, self.warm.get_block)
        assert restored.window == state.window
        past.unseen = self.unseen(played.turn, restored, [])
        log, derived = history(record, self.warm.get_record), state.derived.pages
        assert {m.page_id for m in log.entries} >= derived.keys()
        past.contexts[record.turn] = sorted(log.get_context_at_turn(record.turn))
        names = json.loads(played.bodies[0]).get("tools") or ()
        if any(tool["function"]["name"] == "search_pages" for tool in names):
            past.last = state.window.epoch, self.model, played.settled + b"]"
            if played.epochs[0] == state.window.epoch:
                assert goes_on(played.settled + b"]", played.messages_bytes()[0])

    def check_prefix(
        self, branch: Branch, before: tuple[int, str, bytes] | None, played: Played
    ) -> tuple[int, str, bytes] | None:
        """Within an epoch and one model, each request's messages begin with those before, up to the
        first system message that the client took back."""
        for epoch, body in zip(played.epochs, played.bodies, strict=True):
            tools = json.loads(body).get("tools") or ()
            listed = any(tool["function"]["name"] == "search_pages" for tool in tools)
            now = (epoch, self.model, messages_bytes(body))
            if epoch and before and before[:2] == now[:2] and listed:
                kept = self.taken_back_at(branch, before[2])
                whole = before[2][:kept].rstrip(b",]") + b"]"
                assert goes_on(whole, now[2]), "the prefix changed within an epoch"
            before = now if listed else None
        return before

    def taken_back_at(self, branch: Branch, before: bytes) -> int:
        """How much of a request's messages the client still has in front of its question."""
        said, at = {json.dumps(m) for m in branch.messages}, 1
        for raw in msgspec.json.decode(before, type=list[msgspec.Raw]):
            message = json.loads(bytes(raw))
            if message["role"] == "system" and json.dumps(message) not in said:
                return at
            at += len(bytes(raw)) + 1
        return len(before) - 1

    def check_branch(self, branch: Branch, played: Played) -> set[str]:
        """Invariant 6; returns what this path may know."""
        own = self.marks(json.dumps(branch.messages))
        for reply in played.replies:
            own |= self.marks(json.dumps(getattr(reply, "messages", "")))
        if played.place.record is not None:
            past = self.past[played.place.record.id]
            assert past.key == branch.key, "invariant 6: another tenant's history"
            own |= past.marks
        for effect, reply in zip(played.effects, played.replies, strict=True):
            text = json.dumps(reply.model_dump(mode="json")) if isinstance(effect, Load) else ""
            if isinstance(effect, Complete):
                text = effect.body.decode()
            if isinstance(effect, Append):
                text = str([record.raws + record.substitute for record in effect.records])
            assert self.marks(text) <= own, "invariant 6: text of another branch"
        return own

    def marks(self, text: str) -> set[str]:
        return set(_MARK.findall(text)) | {m for data, m in self.media.items() if data in text}

    def check_log(self, record: Record, turn: Turn, past: Past) -> None:
        table = turn.table
        log = history(record, self.warm.get_record)
        assert log.replay() == table, "the log replays to the table"
        assert turn.report.turn == record.turn == table.turn, "the turn's number"
        past.contexts[turn.report.turn] = sorted(entry.page_id for entry in table.resident())
        for number, pages in past.contexts.items():
            assert sorted(log.get_context_at_turn(number)) == pages, f"the window at turn {number}"

    def unseen(self, turn: Turn, state: Any, substitute: list[bytes]) -> set[str]:
        """Pages in the window, says the table, which nothing in it names (nor the VM's part of a mixed
        call, which is put there in the next turn); what is in it whole the table has."""
        window, path, table = state.window, turn.pages.path, state.table
        native = {e.position: e for e in window.entries if e.kind in (NATIVE, MIXED)}
        cut = {owner(path, e.position) for e in window.entries if e.whole}  # by a system message's end
        whole = [p for p, e in native.items() if e.kind == MIXED or e.raw == path[p].raw]
        whole = [p for p in whole if p not in cut]
        entries = [table.lookup(i) for p in whole for i in turn.pages[p].ids]
        assert all(e is None or (e.tier is StorageTier.L0 and not e.level) for e in entries)
        text = window.developer + b"".join([*(e.raw for e in window.entries), *substitute]).decode()
        resident = [e.page_id for e in table.resident() if e.position not in native]
        return {i for i in resident if i.partition(".")[0] not in text}  # a whole, or a part of it

    # -- rules: turns

    @rule(seed=st.integers(0, 10**6), size=st.sampled_from(SIZES), habit=st.sampled_from(HABITS))
    def user_turn(self, seed: int, size: str, habit: str) -> None:
        branch, rng = self.pick(seed), random.Random(seed)
        text = self.speakers.say(rng, size)
        content: Any = [{"type": "text", "text": text}] if rng.random() < 0.2 else text
        branch.messages.append({"role": "user", "content": content})
        self.converse(branch, habit, seed)

    @rule(seed=st.integers(0, 10**6), habit=st.sampled_from(HABITS))
    def several_turns(self, seed: int, habit: str) -> None:
        rng, branch = random.Random(seed), self.pick(seed)
        for _ in range(5):
            text = self.speakers.say(rng, rng.choice(SIZES[:4]))
            branch.messages.append({"role": "user", "content": text})
            self.converse(branch, rng.choice((habit, "answer")), rng.randint(0, 10**6))

    @rule(
        seed=st.integers(0, 10**6), side=st.sampled_from((64, 512, 513, 900, 1500)),
        count=st.sampled_from((1, 1, 3)), sound=st.booleans(), habit=st.sampled_from(HABITS),
    )  # fmt: skip
    def media_turn(self, seed: int, side: int, count: int, sound: bool, habit: str) -> None:
        branch, rng = self.pick(seed), random.Random(seed)
        parts = []
        for _ in range(count):
            if sound:
                parts.append(wav_part(0.3 + len(self.media) / 100 + side / 1000, 2000))
                data = parts[-1]["input_audio"]["data"]
            else:
                detail = rng.choice((None, "low", "high"))
                parts.append(png_part(side + 1 + len(self.media), side, detail))
                data = parts[-1]["image_url"]["url"]
            self.media.setdefault(data, self.speakers.mark())
        text = {"type": "text", "text": self.speakers.say(rng, "short")}
        content = [text, *parts] if rng.random() < 0.7 else [*parts, text]
        branch.messages.append({"role": "user", "content": content})
        self.converse(branch, habit, seed)

    @rule(seed=st.integers(0, 10**6))
    def forced_turn(self, seed: int) -> None:
        """The client forbids tools, or wants what VM tools cannot go with."""
        branch, rng = self.pick(seed), random.Random(seed)
        branch.messages.append({"role": "user", "content": self.speakers.say(rng, "short")})
        fields = ({"logprobs": True}, {"tool_choice": "none"}, {"functions": [{}]})
        self.converse(branch, "answer", seed, **rng.choice(fields))

    @rule(seed=st.integers(0, 10**6), behind=st.booleans())
    def system_message(self, seed: int, behind: bool) -> None:
        """A system message in mid-conversation, before or behind the newest message."""
        branch, rng = self.pick(seed), random.Random(seed)
        new: list[Message] = [
            {"role": "user", "content": self.speakers.say(rng, "short")},
            {"role": "system", "content": self.speakers.text(rng, 10)},
        ]
        branch.messages += new if behind else new[::-1]
        self.converse(branch, "answer", seed)

    @rule(seed=st.integers(0, 10**6), habit=st.sampled_from(HABITS), size=st.sampled_from(SIZES))
    def system_outputs(self, seed: int, habit: str, size: str) -> None:
        """An agent whose tools' outputs are system messages alone, one behind each answer."""
        branch, rng = self.pick(seed), random.Random(seed)
        if not branch.messages or branch.messages[-1]["role"] != "assistant":
            return
        for _ in range(rng.choice((1, 3, 6))):
            branch.messages.append({"role": "system", "content": self.speakers.say(rng, size)})
            self.converse(branch, rng.choice((habit, "answer")), rng.randint(0, 10**6))

    @rule(seed=st.integers(0, 10**6), gone=st.booleans())
    def system_message_said_otherwise(self, seed: int, gone: bool) -> None:
        """The client edits an old system message, or takes it back."""
        branch, rng = self.pick(seed), random.Random(seed)
        spoken = [i for i, m in enumerate(branch.messages) if m["role"] != "system"]
        found = [i for i, m in enumerate(branch.messages)
                 if m["role"] == "system" and spoken and i > spoken[0]]  # fmt: skip
        if not found:
            return
        at = rng.choice(found)
        branch.messages[at : at + 1] = [] if gone else [
            {"role": "system", "content": self.speakers.text(rng, 30)}
        ]
        branch.messages.append({"role": "user", "content": self.speakers.say(rng, "short")})
        self.converse(branch, "answer", seed)

    @rule(seed=st.integers(0, 10**6), habit=st.sampled_from(HABITS), size=st.sampled_from(SIZES))
    def rewritten_turns(self, seed: int, habit: str, size: str) -> None:
        """Each newest message comes with retrieved text, and without it in the next request."""
        branch, rng = self.pick(seed), random.Random(seed)
        for _ in range(rng.choice((1, 2, 4))):
            question, at = self.speakers.say(rng, "short"), len(branch.messages)
            context = self.speakers.say(rng, size)
            branch.messages.append({"role": "user", "content": f"Use this: {context} {question}"})
            self.converse(branch, rng.choice((habit, "answer")), rng.randint(0, 10**6))
            branch.messages[at] = {"role": "user", "content": question}

    @rule(seed=st.integers(0, 10**6), habit=st.sampled_from(HABITS), behind=st.booleans())
    def reminded_turns(self, seed: int, habit: str, behind: bool) -> None:
        """A system message that moves along, always before or behind the newest message."""
        branch, rng = self.pick(seed), random.Random(seed)
        for _ in range(rng.choice((1, 2, 4))):
            note = {"role": "system", "content": self.speakers.text(rng, rng.choice((3, 30)))}
            said = {"role": "user", "content": self.speakers.say(rng, "short")}
            branch.messages += [said, note] if behind else [note, said]
            self.converse(branch, rng.choice((habit, "answer")), rng.randint(0, 10**6))
            branch.messages = [one for one in branch.messages if one is not note]

    # -- rules: branches and tenants

    @rule(seed=st.integers(0, 10**6), habit=st.sampled_from(HABITS))
    def regenerate(self, seed: int, habit: str) -> None:
        branch = self.pick(seed)
        if branch.users:
            self.branches.append(Branch(branch.key, branch.messages[: branch.users[-1] + 1]))
            self.converse(self.branches[-1], habit, seed)

    @rule(seed=st.integers(0, 10**6), back=st.integers(0, 20), size=st.sampled_from(SIZES),
          habit=st.sampled_from(HABITS))  # fmt: skip
    def edit(self, seed: int, back: int, size: str, habit: str) -> None:
        """An earlier message said in other words; both branches go on."""
        branch = self.pick(seed)
        if users := branch.users:
            kept = branch.messages[: users[-1 - back % len(users)]]
            said = {"role": "user", "content": self.speakers.say(random.Random(seed), size)}
            self.branches.append(Branch(branch.key, [*kept, said]))
            self.converse(self.branches[-1], habit, seed)

    @rule(seed=st.integers(0, 10**6), habit=st.sampled_from(HABITS))
    def other_tenant(self, seed: int, habit: str) -> None:
        """Somebody else says the same words, and goes on in his own."""
        branch = self.pick(seed)
        key = "other" if branch.key == "key" else "key"
        kept = branch.messages[: branch.users[-1]] if branch.users else branch.messages
        said = {"role": "user", "content": self.speakers.say(random.Random(seed), "short")}
        self.branches.append(Branch(key, [*kept, said]))
        self.converse(self.branches[-1], habit, seed)

    # -- rules: the installation

    @rule()
    def forget(self) -> None:
        self.warm.forget()

    @rule()
    def restart(self) -> None:
        self.warm = _replica(self.warm)

    @rule(model=st.sampled_from(MODELS))
    def change_model(self, model: str) -> None:
        self.model = model

    @rule(budget=st.sampled_from(BUDGETS), faults=st.sampled_from((0, 1, 3, 20)),
          page_share=st.sampled_from((0, *PAGE_SHARES)))  # fmt: skip
    def restart_with_other_limits(self, budget: int, faults: int, page_share: int) -> None:
        if page_share:
            self.page_tokens, self.resized = budget // page_share, True
        self.limits = limits_of(
            budget, mode=self.mode, page_tokens=self.page_tokens, faults_per_turn=faults
        )
        self.speakers.budget = budget
        self.warm, self.cold = _replica(self.warm, self.limits), _replica(self.cold, self.limits)

    @precondition(lambda self: any(past.contexts for past in self.past.values()))
    @rule(seed=st.integers(0, 10**6))
    def fault_back(self, seed: int) -> None:
        """Invariant 4: a random evicted message comes back whole, on a replica with room for it."""
        branch, rng = self.pick(seed), random.Random(seed)
        limits = limits_of(
            60_000, page_tokens=self.page_tokens, faults_per_turn=99, fault_tokens=50_000, prefetch_pages=0
        )
        messages = [*branch.messages, {"role": "user", "content": "and now?"}]
        turn = _replica(self.warm, limits).ask(messages, script(says("so")), key=branch.key).turn
        outside = [e for e in turn.table if e.tier is not StorageTier.L0 and e.position >= 0]
        if turn.window is None or not outside:
            return
        position = rng.choice(outside).position
        ids = list(turn.pages[position].ids)
        lost = [i for i in ids if (e := turn.table.lookup(i)) and e.tier is not StorageTier.L0]
        if not lost:
            return  # pages had another size when this message was registered
        faults = [call("page_fault", {"page_id": i, "target_level": 0}, f"c{i}") for i in lost[:8]]
        played = _replica(self.warm, limits).ask(
            messages, script(calls(*faults), says("there")), key=branch.key
        )
        results = tool_messages(played.requests[-1])[-len(faults) :]
        found = {page["page_id"]: page for one in results if (page := json.loads(one["content"]).get("page"))}
        assert list(found) == lost[:8], [one["content"][:200] for one in results]
        assert all(page["level"] == 0 for page in found.values())
        check_full_pages(played, branch.spoken)
        texts = [i for i in ids if i.startswith("msg_")]
        message = branch.spoken[position]
        if found.keys() >= set(texts) and isinstance(message["content"], str):
            whole = "".join(found[i]["content"]["text"] for i in texts)
            assert message["content"] in whole or message.get("tool_calls")
            if message["role"] == "user":
                assert whole == message["content"]


def _replica(player: Player, limits: Any = None) -> Player:
    """A new installation over the same stored bytes."""
    new = Player(limits or player.limits)
    new.values = dict(player.values)
    return new


TestHistories = Machine.TestCase
TestHistories.settings = settings(
    examples(4), stateful_step_count=20, suppress_health_check=list(HealthCheck), print_blob=False
)


def test_a_page_that_grows_by_a_system_message_stays_in_the_window() -> None:
    """It gets one part more than the table has of it."""
    machine = Machine()
    machine.begin(budget=1500, page_share=8, tools=0, words=0, mode=VMMode.RELAXED)
    for _ in range(2):
        machine.rewritten_turns(habit="answer", seed=0, size="short")
    machine.system_outputs(habit="answer", seed=0, size="long")  # each turn is checked
    assert machine.pick(0).messages[-1]["role"] == "assistant"
    machine.teardown()
