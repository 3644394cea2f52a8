"""What input costs: OpenAI's rule for cached prompts, on the requests that really went out.

Promises: deterministic, no clock. A prompt is the tools array and then the messages; of the longest
prefix that it shares with one of the recent prompts is cached what `/vm/bill`'s rule says (1,024 tokens and
more, in steps of 128), at a tenth of the price (a cache that never expires between two turns). Beside ours, the
ledger bills what an application without the proxy would send, one request a turn.
"""

from __future__ import annotations

import json
import os.path
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from proxy.conversation.bill import CACHED_PRICE, cached_prefix
from proxy.demo.reader import read
from proxy.tokens import TokenCounter

_RECENT_PROMPTS = 8
_COUNTED_MESSAGES = 4096


class PromptCache:
    """One provider account's cache; `tokens(request)` is called once per request, in order."""

    def __init__(self, counter: TokenCounter) -> None:
        self._recent: deque[list[str]] = deque(maxlen=_RECENT_PROMPTS)
        self._counter = counter
        self._message_tokens = lru_cache(_COUNTED_MESSAGES)(lambda part: counter.message(json.loads(part)))

    def tokens(self, request: dict[str, Any]) -> tuple[int, int]:
        """The prompt's tokens, and how many of them are cached; remembered for the next requests."""
        tools = request.get("tools") or []
        parts = [json.dumps(part, ensure_ascii=False, sort_keys=True) for part in (tools, *request["messages"])]
        tokens = [self._counter.tools(tools), *map(self._message_tokens, parts[1:])]
        shared = max((self._shared(parts, tokens, old) for old in self._recent), default=0)
        self._recent.append(parts)
        return sum(tokens), cached_prefix(shared)

    def _shared(self, new: list[str], tokens: list[int], old: list[str]) -> int:
        least = min(len(new), len(old))
        same = next((i for i in range(least) if new[i] != old[i]), least)
        total = sum(tokens[:same])
        if 0 < same < least:
            total += self._counter.text(os.path.commonprefix([new[same], old[same]]))
        return total


@dataclass
class Account:
    """Input tokens over the whole conversation; `recalled` questions were answered from them."""

    name: str
    cache: PromptCache
    prompt_tokens: int = 0
    cached_tokens: int = 0
    largest_tokens: int = 0
    recalled: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def billed_tokens(self) -> float:
        return self.prompt_tokens - self.cached_tokens * (1 - CACHED_PRICE)

    def book(self, request: dict[str, Any]) -> None:
        prompt_tokens, cached_tokens = self.cache.tokens(request)
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.largest_tokens = max(self.largest_tokens, prompt_tokens)


class Ledger:
    """Three accounts side by side: `ours` is booked by the upstream, every round of a turn; `budget_tokens`
    is the sliding window's and ours."""

    def __init__(self, counter: TokenCounter, budget_tokens: int) -> None:
        self._counter, self._budget_tokens = counter, budget_tokens
        names = ("llm-pager", "full history", "sliding window")
        self.accounts = [Account(name, PromptCache(counter)) for name in names]
        self.ours, self.full, self.sliding = self.accounts

    def turn(self, messages: Sequence[dict[str, Any]], expect: str | None) -> None:
        """One turn as the application sent it; a recall question names what it `expect`s."""
        for account, sent in ((self.full, list(messages)), (self.sliding, self._newest(messages))):
            request = {"messages": sent}
            account.book(request)
            if expect is not None:
                account.recalled += expect in str(read(request)["content"])

    def _newest(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []
        tokens = 0
        for message in reversed(messages):
            tokens += self._counter.message(message)
            if kept and tokens > self._budget_tokens:
                break
            kept.append(message)
        return kept[::-1]
