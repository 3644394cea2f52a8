"""What is known of models: for the turns, and for the people who ask (GET /vm/models).

Promises: an override wins over what a refusal taught, and that over what is assumed; one key's
refusals are shown to that key only; the list of models kept per key is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from proxy.api.memory import TOKENS_FACTOR, Memory
from proxy.config import Config
from proxy.conversation.capability import (
    LEAST_WINDOW_TOKENS,
    Capabilities,
    capabilities,
    describe,
)
from proxy.tokens import model_card

_LISTED_MODELS = 256  # of one key; of more, the latest
_RECENT_S = 5.0
_RECENT_MODELS = 1024  # of a key
_WATCHED_BILLS = 4096  # conversations whose last bill is remembered
_SEEN_MODELS = 4096  # of all keys: what passed and what was refused is remembered
_REFUSALS_IN_A_ROW = 3  # so many, and what passed before proves nothing any more: the server may be another
_GROWN = 1.02  # so much larger a prompt cannot cost the same
_KNOWN_HOSTS = ("api.openai.com",)  # whose API has prompt_cache_key
_OVERRIDES = (
    "window_tokens", "tools", "tools_with_json", "developer_role", "mid_system", "stream_usage", "prompt_cache_key",
)  # fmt: skip


@dataclass(slots=True)
class _Seen:
    """A model behind a key, as this process saw it; tokens as upstream counts them."""

    passed_tokens: int = 0  # the largest prompt that was answered
    refusals: int = 0  # of turns, since the last one that was answered
    doubted_tokens: int = 0  # a window that one refusal of the moment made probable


class Capable:
    """One per process."""

    def __init__(self, config: Config, memory: Memory) -> None:
        self._config = config
        self._memory = memory
        self._recent: dict[bytes, tuple[float, Capabilities]] = {}  # until when, and what
        self._seen: dict[bytes, _Seen] = {}
        self._bills: dict[bytes, tuple[int, int]] = {}  # the last one of a conversation
        host = urlsplit(config.upstream.base_url).hostname or ""
        self._cache_key = config.upstream.provider == "openai" and host in _KNOWN_HOSTS

    def of(self, scope: bytes, model: str, fresh: bool = True) -> Capabilities:
        """For a turn. `scope` is the tenant of the API key alone. Not `fresh`: what another worker
        learned in the last seconds may be missing, which costs a request that is not paged a refusal."""
        key = scope + model.encode()
        now_s = time.monotonic()
        if not fresh and (recent := self._recent.get(key)) is not None and recent[0] > now_s:
            return recent[1]
        found = capabilities(
            self._override(model), self._memory.learned(scope, model), self._assumed(None)
        )
        if len(self._recent) >= _RECENT_MODELS:
            self._recent.clear()
        self._recent[key] = now_s + _RECENT_S, found
        return found

    async def learn(
        self, scope: bytes, model: str, facts: Mapping[str, Any], doubtful: bool = False
    ) -> None:
        """Keep what a refusal taught; a `doubtful` window only when it is the second time, with
        nothing larger answered in between. Raises StorageError."""
        seen = self._seen_of(scope, model)
        if doubtful and not seen.doubted_tokens:
            seen.doubted_tokens = facts["window_tokens"]
            facts = {k: v for k, v in facts.items() if k not in ("window_tokens", "refused_tokens")}
            if not facts:
                return
        await self._memory.learn(scope, model, dict(facts))
        self._recent.clear()
        listed = [name for name in self._listed(scope) if name != model]
        names = [*listed, model][-_LISTED_MODELS:]
        await self._memory.store.commit([(b"M" + scope, msgspec.msgpack.encode(names))])

    def passed_tokens(self, scope: bytes, model: str) -> int:
        """Of the largest prompt that was answered: a refusal of no more is not about size."""
        seen = self._seen_of(scope, model)
        return seen.passed_tokens if seen.refusals < _REFUSALS_IN_A_ROW else 0

    def answered(self, scope: bytes, model: str, tokens: int) -> None:
        """A prompt of so many tokens was answered (0: nobody counted it)."""
        seen = self._seen_of(scope, model)
        if seen.refusals >= _REFUSALS_IN_A_ROW:
            seen.passed_tokens = 0
        seen.refusals = 0
        seen.passed_tokens = max(seen.passed_tokens, tokens)
        if tokens > seen.doubted_tokens:
            seen.doubted_tokens = 0

    def refused(self, scope: bytes, model: str) -> None:
        """A turn ended with upstream's refusal."""
        self._seen_of(scope, model).refusals += 1

    def _seen_of(self, scope: bytes, model: str) -> _Seen:
        key = scope + model.encode()
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= _SEEN_MODELS:
                del self._seen[next(iter(self._seen))]
            seen = self._seen[key] = _Seen()
        return seen

    def cut(
        self, scope: bytes, model: str, conversation: bytes, size: int, billed: int
    ) -> int | None:
        """The window of an upstream that cuts prompts silently: a conversation grows, and its bill
        stays the same to the token. None as long as the bills move. `size`: of the prompt, in one
        unit for one conversation."""
        key = scope + conversation + model.encode()
        before = self._bills.pop(key, None)
        self._bills[key] = size, billed
        if len(self._bills) > _WATCHED_BILLS:
            del self._bills[next(iter(self._bills))]
        if before is None or billed != before[1] or billed < LEAST_WINDOW_TOKENS:
            return None
        return billed if size >= before[0] * _GROWN else None

    def table(self, scope: bytes) -> list[dict[str, Any]]:
        """A row for each model with an override or a lesson of this key, sorted by name.

        `{"model", <fact>: {"value", "from": "override" | "learned" | "assumed"}}`; the facts are the
        fields of `models:` in the configuration and `tokens_factor` (billed per counted token).
        """
        names = sorted({*self._config.models, *self._listed(scope)})
        return [
            describe(name, self._override(name), self._memory.learned(scope, name), self._assumed(name))
            for name in names
        ]

    def _listed(self, scope: bytes) -> list[str]:
        data = self._memory.store.get(b"M" + scope)
        return msgspec.msgpack.decode(data, type=list[str]) if data else []

    def _override(self, model: str) -> dict[str, Any]:
        override = self._config.model_override(model)
        return {name: getattr(override, name) for name in _OVERRIDES}

    def _assumed(self, model: str | None) -> dict[str, Any]:
        """What holds without a word from anyone; with a model's name, its card too."""
        assumed: dict[str, Any] = {
            "mid_system": True, "stream_usage": True, "prompt_cache_key": self._cache_key,
        }  # fmt: skip
        if model is not None:
            card = model_card(model)
            assumed |= {"window_tokens": card.window_tokens, "developer_role": card.developer_role}
            assumed |= {"tools": True, "tools_with_json": True, TOKENS_FACTOR: 1.0}
        return assumed
