"""What a conversation was billed, and would have been: dialogues with a provider that keeps a cache.

Promises: the two requests that are never made are compared with ones that are written out in full and
billed by the same rule; reasons are those of what was done.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.bill import (
    Account,
    Break,
    Head,
    Reason,
    Sums,
    Tokens,
    Turned,
    Usage,
    accounted,
    cached_prefix,
    usage_of,
)
from proxy.tokens import PER_REPLY, get_counter
from tests.conversation.player import Message, Played, Player, call, calls, limits_of, says, script
from tests.examples import examples

COUNTER = get_counter("gpt-4o")
BUDGET = 3000
LOOKUP = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("usage", "expected", "prompt"),
    [
        (None, 900, None),
        ({}, 900, None),
        ({"prompt_tokens": 10**30}, 900, None),
        ({"prompt_tokens": True}, 900, None),
        ({"prompt_tokens": "many"}, 900, None),
        ({"prompt_tokens": 1000}, 900, 1000),
        ({"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 768}}, 900, 1000),
        ({"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 960}}, 900, 1000),
        ({"prompt_tokens": 600, "prompt_tokens_details": {"cached_tokens": 400}}, 1000, 1000),
        ({"prompt_tokens": 40, "cache_read_input_tokens": 960}, 900, 1000),
        ({"prompt_tokens": 40, "cache_creation_input_tokens": 60, "cache_read_input_tokens": 900}, 0, 1000),
        ({"prompt_tokens": 1000, "cache_creation_input_tokens": 950}, 900, 1000),
        ({"prompt_tokens": 1000, "prompt_tokens_details": None}, 900, 1000),
    ],
)  # fmt: skip
def test_tokens_from_the_cache_are_part_of_the_prompt(usage: Any, expected: int, prompt: int | None) -> None:
    found = usage_of(usage, expected)
    assert (found.prompt if found else None) == prompt


@pytest.mark.parametrize(
    ("usage", "cached", "written"),
    [
        ({}, None, 0),
        ({"prompt_tokens_details": {"audio_tokens": 3}}, None, 0),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, 0, 0),
        ({"prompt_tokens_details": {"cached_tokens": 700, "cache_write_tokens": 100}}, 700, 100),  # OpenRouter
        ({"prompt_cache_hit_tokens": 640, "prompt_cache_miss_tokens": 360}, 640, 0),  # DeepSeek
        ({"cached_tokens": 512}, 512, 0),  # Moonshot
        ({"cache_read_input_tokens": 500, "cache_creation_input_tokens": 400,
          "prompt_tokens_details": {"cached_tokens": 500, "cache_creation_tokens": 400}}, 500, 400),  # litellm
        ({"cache_discount": 0.1, "cached": True}, None, 0),
    ],
)  # fmt: skip
def test_the_cache_is_read_under_every_provider_s_name(usage: Any, cached: int | None, written: int) -> None:
    found = usage_of({"prompt_tokens": 1000, **usage}, 1000)
    assert found is not None and (found.cached, found.written) == (cached, written)


def test_a_bill_counts_cached_and_written_tokens_at_the_model_s_own_prices() -> None:
    tokens = Tokens(10_000, 4_000, 2_000, 50)
    assert tokens.billed("gpt-4o") == 10_000 - 2_000  # half the price; what is written costs as ever
    assert tokens.billed("claude-sonnet-4-5") == 10_000 - 3_600 + 500
    assert tokens.billed("nobody's model") == 10_000 - 3_600 + 500


# -- a provider with a cache, and the two requests that nobody made


def parts_of(request: Message) -> list[tuple[str, int]]:
    """(bytes, tokens) of a prompt's tools and messages, in the provider's order."""
    own, ours = [], []
    for tool in request.get("tools") or ():
        (own if tool == LOOKUP else ours).append(tool)
    out = [(json.dumps(tools), COUNTER.tools(tools)) for tools in (own, ours) if tools]  # as we count them
    return out + [(json.dumps(m), COUNTER.message(m)) for m in request["messages"]]


def shared_tokens(old: Sequence[tuple[str, int]], new: Sequence[tuple[str, int]]) -> int:
    total = 0
    for (before, tokens), (now, _) in zip(old, new, strict=False):
        if before != now:
            break
        total += tokens
    return total


@dataclass
class Provider:
    """Bills what it is asked; what it was asked before is cached, but for what it lost."""

    old: list[list[tuple[str, int]]] = field(default_factory=list)
    cold: bool = False
    silent: bool = False
    first_cached: int | None = None  # of the turn's first request

    def bill(self, request: Message) -> Message | None:
        if self.silent:
            return None
        parts = parts_of(request)
        shared = max((shared_tokens(old, parts) for old in self.old[-8:]), default=0)
        cached = 0 if self.cold else cached_prefix(shared)
        self.cold = False
        self.old.append(parts)
        if self.first_cached is None:
            self.first_cached = cached
        prompt = sum(tokens for _, tokens in parts) + PER_REPLY
        return {"prompt_tokens": prompt, "completion_tokens": 9, "total_tokens": prompt + 9,
                "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip


def slid(messages: Sequence[Message], fixed: int) -> list[Message]:
    """The newest messages of a history that fit the window; no result without its call."""
    at, room = len(messages), BUDGET - fixed - PER_REPLY
    while at and sum(COUNTER.message(m) for m in messages[at - 1 :]) <= room:
        at -= 1
    at = min(at, len(messages) - 1)
    while at < len(messages) - 1 and messages[at]["role"] == "tool":
        at += 1
    return list(messages[at:])


class Talk:
    """A client, the proxy, and the two others beside it, each with its whole request."""

    def __init__(self, prefetch_pages: int = 0) -> None:
        self.player = Player(limits_of(BUDGET, prefetch_pages=prefetch_pages))
        self.provider = Provider()
        self.player.bills = self.provider.bill
        self.system: Message = {"role": "system", "content": "You keep notes."}
        self.messages: list[Message] = []
        self.before: tuple[list[tuple[str, int]], list[tuple[str, int]]] | None = None
        self.sliding, self.full = Tokens(), Tokens()
        self.last: Played | None = None

    def ask(self, *new: Message, answer: Message | None = None, **extra: Any) -> Played:
        self.messages += new
        self.provider.first_cached = None
        sent = {"model": "gpt-4o", "messages": [self.system, *self.messages], "tools": [LOOKUP], **extra}
        played = self.player.ask((), lambda _: answer or says("Noted."), body=json.dumps(sent).encode())
        assert played.message is not None
        self.last = played
        if not self.provider.silent:
            self._bill_others(played, sent["tools"])
        self.messages.append({k: v for k, v in played.message.items() if v is not None})
        return played

    def _bill_others(self, played: Played, tools: list[Message]) -> None:
        fixed = COUNTER.message(self.system) + COUNTER.tools(tools)
        head = {"tools": tools}
        sent = [parts_of({**head, "messages": [self.system, *m]}) for m in (slid(self.messages, fixed), self.messages)]
        found = self.provider.first_cached or 0
        bills: list[Tokens] = []
        for i, parts in enumerate(sent):
            prompt = sum(tokens for _, tokens in parts) + PER_REPLY
            if self.before is None or self.before[i][:2] != parts[:2]:  # another head
                cached = min(found, prompt)
            else:
                cached = cached_prefix(shared_tokens(self.before[i], parts))
            bills.append(Tokens(prompt, cached, 0, 9))
        assert played.turn.report.billed is not None
        if played.answer.report.channel == "bypass":
            bills = [played.turn.report.billed.ours] * 2
        self.sliding, self.full = self.sliding + bills[0], self.full + bills[1]
        self.before = sent[0], sent[1]

    @property
    def account(self) -> Account:
        assert self.last is not None and self.last.turn.record is not None
        account = self.last.turn.record.account
        assert account is not None
        return account

    @property
    def sums(self) -> Sums:
        (sums,) = self.account.sums
        return sums


def note(rng: random.Random, words: int) -> Message:
    return {"role": "user", "content": " ".join(f"w{rng.randrange(10_000)}" for _ in range(words))}


@given(st.integers(0, 2**32), st.lists(st.sampled_from(("say", "say", "say", "big", "tool", "system", "restart")), min_size=8, max_size=16))
@examples(12)
def test_invariant_7_the_two_others_are_billed_as_if_they_had_been_sent(seed: int, moves: list[str]) -> None:
    rng, talk = random.Random(seed), Talk()
    for number, move in enumerate(["big", "big", *moves]):
        if move == "system":
            talk.system = {"role": "system", "content": f"You keep notes{'!?.,'[number % 4]}"}
        if move == "restart":
            talk.player.forget()
        if move == "tool":
            wanted = call("lookup", {"word": "x"}, f"c{number}")
            talk.ask(note(rng, 20), answer=calls(wanted))
            result = {"role": "tool", "tool_call_id": f"c{number}", "content": note(rng, 60)["content"]}
            talk.ask(result)
        else:
            talk.ask(note(rng, 300 if move == "big" else rng.randrange(5, 60)))
    sums = talk.sums
    assert (sums.sliding, sums.full) == (talk.sliding, talk.full)
    assert sums.turns == len([m for m in talk.messages if m["role"] == "assistant"]) and not sums.unbilled
    assert sums.ours.prompt == sum(u["prompt_tokens"] for u in map(_usage, talk.provider.old))


def _usage(parts: list[tuple[str, int]]) -> Message:
    return {"prompt_tokens": sum(tokens for _, tokens in parts) + PER_REPLY}


def paged(seed: int = 1, prefetch_pages: int = 0, words: int = 250) -> tuple[Talk, random.Random]:
    """A conversation that has just begun to page, and grows in its window."""
    talk, rng = Talk(prefetch_pages), random.Random(seed)
    while talk.last is None or talk.last.answer.report.channel == "bypass":
        talk.ask(note(rng, words))
    assert talk.account.broke is not None and talk.account.broke.reason is Reason.EPOCH
    while talk.account.prompt < 1500 or talk.account.broke is not None:
        talk.ask(note(rng, 60))
    return talk, rng


def test_a_break_of_the_cache_has_its_reason_and_what_was_lost() -> None:
    talk, rng = paged()
    found: list[tuple[Reason, int]] = []

    def ask(**extra: Any) -> None:
        before = talk.account.prompt
        talk.ask(note(rng, 20), **extra)
        broke = talk.account.broke
        assert broke is not None and broke.turn == len(talk.messages) // 2
        assert broke.lost_tokens == cached_prefix(before) - (talk.provider.first_cached or 0) > 256
        found.append((broke.reason, broke.lost_tokens))
        talk.ask(note(rng, 20), **extra)
        assert talk.account.broke is None

    talk.system = {"role": "system", "content": "You lose notes."}
    ask()
    more = [{"type": "function", "function": {"name": "more", "parameters": {"type": "object"}}}, LOOKUP]
    ask(tools=more)
    talk.provider.old.clear()
    ask(model="gpt-4o-mini", tools=more)
    talk.provider.cold = True
    ask(model="gpt-4o-mini", tools=more)
    reasons = [reason for reason, _ in found]
    assert reasons == [Reason.SYSTEM, Reason.TOOLS, Reason.MODEL, Reason.COLD]
    account = talk.account
    assert {name: turns for name, (turns, _) in account.breaks.items()} == {
        "epoch": 1, "system": 1, "tools": 1, "model": 1, "cold": 1,
    }  # fmt: skip
    assert account.breaks["cold"] == (1, found[-1][1])
    assert [one.model for one in account.sums] == ["gpt-4o", "gpt-4o-mini"] and account.sums[1].turns == 4
    chain, record = [], talk.last.turn.record if talk.last else None
    while record is not None and record.account is not None and record.account.broken:
        record = talk.player.get_record(record.account.broken)
        assert record is not None and record.account is not None and record.account.broke is not None
        chain.append(record.account.broke.reason)
    assert chain == [*reversed(reasons), Reason.EPOCH]


def test_evidence_that_was_taken_out_is_a_break_of_its_own() -> None:
    talk, rng = paged(prefetch_pages=5, words=70)  # short enough to be shown whole
    olds = [" ".join(str(talk.messages[at]["content"]).split()[:12]) for at in range(0, 8, 2)]
    talk.ask({"role": "user", "content": " ".join(f"What about {old}?" for old in olds)})
    report = talk.last.answer.report if talk.last else None
    assert report is not None and report.prefetched_pages and not report.new_epoch
    shown_at = talk.account.prompt
    talk.ask(note(rng, 20))
    assert talk.account.broke is not None and talk.account.broke.reason is Reason.EVIDENCE
    assert 256 < talk.account.broke.lost_tokens < shown_at / 2


def test_the_others_lose_what_a_cold_cache_lost_of_ours() -> None:
    talk, rng = paged()
    before = talk.sums
    talk.provider.cold = True
    talk.ask(note(rng, 20))
    assert talk.sums.ours.cached == before.ours.cached
    assert (talk.sums.full.cached, talk.sums.sliding.cached) == (before.full.cached, before.sliding.cached)


def test_a_client_that_says_its_newest_message_otherwise_later_keeps_its_account() -> None:
    """Its answers hang on what it said then; the account goes on along what it says now, but for the
    first time, when nobody could know."""
    talk, rng = paged()
    turns = talk.sums.turns
    for _ in range(4):
        said = note(rng, 30)
        talk.ask({**said, "content": f"Retrieved: {note(rng, 400)['content']}\n\n{said['content']}"})
        position = len(talk.messages) - 2
        talk.messages[position] = said
    turns += 3
    assert talk.sums.turns == turns
    broke = talk.account.broke
    assert broke is not None and broke.reason in (Reason.REWRITTEN, Reason.EPOCH)
    assert broke.reason is Reason.EPOCH or broke.message == len(talk.messages) - 4
    assert "rewritten" in talk.account.breaks
    prompts = [sum(tokens for _, tokens in parts) + PER_REPLY for parts in talk.provider.old]
    assert talk.sums.ours.prompt == sum(prompts) - prompts[-4]


def test_a_turn_without_usage_is_counted_and_adds_nothing() -> None:
    talk, rng = paged()
    before = talk.sums
    talk.provider.silent = True
    talk.ask(note(rng, 20))
    talk.ask(note(rng, 20))
    sums = talk.sums
    assert (sums.turns, sums.unbilled) == (before.turns + 2, before.unbilled + 2)
    assert (sums.ours, sums.sliding, sums.full) == (before.ours, before.sliding, before.full)
    assert talk.account.broke is None
    talk.provider.silent = False
    talk.ask(note(rng, 20))
    assert talk.sums.full.prompt - before.full.prompt == talk.full.prompt - before.full.prompt


def test_what_a_later_round_lost_counts_and_is_an_epoch_or_a_cold_cache() -> None:
    head, whole, lost = Head(b"", b"", True), Usage(2000, 1920), Usage(2300, 0)
    before, _ = accounted(None, b"", Turned(1, "gpt-4o", [Usage(2000, 0)], 2000, head), None)
    for why, reason in ((Reason.EPOCH, Reason.EPOCH), (Reason.REWRITTEN, Reason.COLD), (None, Reason.COLD)):
        after, _ = accounted(before, b"r", Turned(2, "gpt-4o", [whole, lost], 2300, head, why, 4), None)
        assert after.broke == Break(reason, 2, -1, cached_prefix(2000))
    after, _ = accounted(before, b"r", Turned(2, "gpt-4o", [lost, lost], 2300, head, Reason.REWRITTEN, 4), None)
    assert after.broke == Break(Reason.REWRITTEN, 2, 4, cached_prefix(2000) + cached_prefix(2300))


def test_invariant_10_the_models_of_a_conversation_whose_sums_are_kept_are_few() -> None:
    account: Account | None = None
    for number in [*range(12), 3, 11]:
        turn = Turned(number, f"model-{number}", [Usage(100)], 100, Head(b"", b"", False))
        account, _ = accounted(account, b"", turn, None)
    assert account is not None and sum(one.turns for one in account.sums) == 14
    turns = {one.model: one.turns for one in account.sums}
    assert len(turns) == 9 and (turns["model-3"], turns[""]) == (2, 5)


def test_a_turn_whose_upstream_tells_no_usage_still_keeps_what_its_window_was() -> None:
    player, texts = Player(limits_of(BUDGET)), ["Words of the harbour, the boats and the tide. " * 40] * 8
    player.bills = lambda request: None
    history: list[Message] = []
    for number, text in enumerate(texts):
        history.append({"role": "user", "content": f"{number} {text}"})
        played = player.ask(history, script(says("Noted.")))
        history.append(says("Noted."))
        record = played.turn.record
        assert record is not None and record.bill is not None
        assert (record.bill.counted, record.bill.billed) == (played.turn.report.used_tokens, 0)
    assert record.window and 0 < record.bill.counted <= BUDGET
