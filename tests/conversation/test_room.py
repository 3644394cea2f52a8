"""A turn that was opened ends in an answer, however much the model calls for, within the budget."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.effects import Refused
from proxy.conversation.room import without_oldest_round
from proxy.conversation.window import Entry
from proxy.errors import ApiError
from proxy.memory import StorageTier, VMMode
from proxy.tokens import get_counter
from tests.bench.token_error import png_part
from tests.conversation.checks import check_media_messages, upstream_tokens
from tests.conversation.player import (
    Message,
    Model,
    Played,
    Player,
    call,
    calls,
    check_pairs,
    limits_of,
    says,
    script,
    tool_messages,
)
from tests.conversation.scenario import WORDS, text_of, tools_of
from tests.examples import examples

COUNT = get_counter("gpt-4o").text
MARKUP = '"a"\n\\b '  # in JSON half as long again
many = examples(40)


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


def test_a_round_is_the_models_message_and_all_that_answers_it() -> None:
    roles = ["assistant", "tool", "tool", "user", "assistant", "tool"]
    tail = [Entry(json.dumps({"role": role}).encode(), 1) for role in roles]
    assert without_oldest_round(tail) == tuple(tail[4:])
    assert without_oldest_round(tail[4:]) == ()


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
