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

from proxy.conversation.bill import Account, Reason, Sums, Tokens, cached_prefix, usage_of
from proxy.tokens import PER_REPLY, get_counter
from tests.conversation.player import Message, Played, Player, call, calls, limits_of, says
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

    def __init__(self) -> None:
        self.player = Player(limits_of(BUDGET, prefetch_pages=0))
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
        extra = {"tools": [LOOKUP], **extra}
        played = self.player.ask([self.system, *self.messages], lambda _: answer or says("Noted."), **extra)
        assert played.message is not None
        self.last = played
        if not self.provider.silent:
            self._bill_others(played, extra["tools"])
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
