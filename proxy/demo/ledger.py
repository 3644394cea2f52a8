"""What the demo's conversation costs with the proxy, with the full history, and with a sliding window.

Promises: ours counts the requests that really went upstream, every round of them; the two others
are the requests that an application without the proxy would send, one a turn, under the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxy.tokens import TokenCounter
from proxy.upstream.demo_cache import PromptCache
from proxy.upstream.demo_reader import read


@dataclass
class Account:
    """Input tokens over the whole conversation; `recalled` questions were answered from them."""

    name: str
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    billed_tokens: float = 0.0
    largest_tokens: int = 0
    recalled: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Ledger:
    """Three accounts side by side; `budget_tokens` is the sliding window's and ours."""

    def __init__(self, counter: TokenCounter, budget_tokens: int) -> None:
        self._counter, self._budget_tokens = counter, budget_tokens
        self.ours = Account("llm-pager")
        self.full = Account("full history")
        self.sliding = Account("sliding window")
        self._caches = {a.name: PromptCache(counter) for a in self.accounts}

    @property
    def accounts(self) -> list[Account]:
        return [self.ours, self.full, self.sliding]

    def upstream_request(self, request: dict[str, Any]) -> None:
        """One request that reached the upstream through the proxy."""
        self._book(self.ours, request)

    def turn(self, messages: Sequence[dict[str, Any]], expect: str | None) -> None:
        """One turn as the application sent it; a recall question names what it `expect`s."""
        full: dict[str, Any] = {"messages": list(messages)}
        sliding = {"messages": self._newest(messages)}
        for account, request in ((self.full, full), (self.sliding, sliding)):
            self._book(account, request)
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

    def _book(self, account: Account, request: dict[str, Any]) -> None:
        bill = self._caches[account.name].bill(request)
        account.requests += 1
        account.prompt_tokens += bill.prompt_tokens
        account.cached_tokens += bill.cached_tokens
        account.billed_tokens += bill.billed_tokens
        account.largest_tokens = max(account.largest_tokens, bill.prompt_tokens)
