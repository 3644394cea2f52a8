"""What a provider's prompt cache would bill: OpenAI's rule, on the requests that really went out.

Promises: deterministic, no clock. A prompt is the tools array and then the messages; the longest
prefix it shares with one of the recent prompts is cached when it has at least 1,024 tokens, in
steps of 128, at a tenth of the price (a cache that never expires between two turns).
"""

from __future__ import annotations

import json
import os.path
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

from proxy.tokens import TokenCounter

RULE = "OpenAI's rule: prefix of at least 1,024 tokens, in steps of 128, billed at a tenth"
MIN_PREFIX_TOKENS = 1024
STEP_TOKENS = 128
CACHED_PRICE = 0.1
_RECENT_PROMPTS = 8
_COUNTED_SEGMENTS = 4096


@dataclass(frozen=True)
class Bill:
    """Input tokens of one request."""

    prompt_tokens: int
    cached_tokens: int

    @property
    def billed_tokens(self) -> float:
        return self.prompt_tokens - self.cached_tokens * (1 - CACHED_PRICE)


class PromptCache:
    """One provider account's cache; `bill(request)` is called once per request, in order."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter
        self._recent: deque[list[str]] = deque(maxlen=_RECENT_PROMPTS)
        self._counted: OrderedDict[str, int] = OrderedDict()

    def _tokens(self, segment: str, value: Any) -> int:
        if segment in self._counted:
            self._counted.move_to_end(segment)
            return self._counted[segment]
        counter = self._counter
        count = counter.tools(value) if isinstance(value, list) else counter.message(value)
        self._counted[segment] = count
        if len(self._counted) > _COUNTED_SEGMENTS:
            self._counted.popitem(last=False)
        return count

    def bill(self, request: dict[str, Any]) -> Bill:
        """Counts the request, and remembers it for the next ones."""
        values = [request.get("tools") or [], *request.get("messages", [])]
        segments = [json.dumps(v, ensure_ascii=False, sort_keys=True) for v in values]
        tokens = [self._tokens(s, v) for s, v in zip(segments, values, strict=True)]
        shared = max((self._shared(segments, tokens, old) for old in self._recent), default=0)
        self._recent.append(segments)
        cached = shared - shared % STEP_TOKENS if shared >= MIN_PREFIX_TOKENS else 0
        return Bill(sum(tokens), cached)

    def _shared(self, new: list[str], tokens: list[int], old: list[str]) -> int:
        same = 0
        while same < min(len(new), len(old)) and new[same] == old[same]:
            same += 1
        total = sum(tokens[:same])
        if 0 < same < min(len(new), len(old)):
            prefix = os.path.commonprefix([new[same], old[same]])
            total += self._counter.text(prefix)
        return total
