"""What is known of models: for the turns, and for the people who ask (GET /vm/models).

Promises: an override wins over what a refusal taught, and that over what is assumed; one key's
refusals are shown to that key only; the list of models kept per key is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from proxy.api.memory import TOKENS_FACTOR, UPSTREAM_WINDOW, Memory
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
_GROWN = 1.02  # so much larger a prompt cannot cost the same
_KNOWN_HOSTS = ("api.openai.com",)  # whose API has prompt_cache_key
_OVERRIDES = (
    "window_tokens", "tools", "tools_with_json", "developer_role", "mid_system", "system_role", "alternate",
    "stream_usage", "prompt_cache_key",
)  # fmt: skip


class Capable:
    """One per process."""

    def __init__(self, config: Config, memory: Memory) -> None:
        self._config = config
        self._memory = memory
        self._recent: dict[bytes, tuple[float, Capabilities]] = {}  # until when, and what
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

    def stated(self, scope: bytes, model: str) -> int | None:
        """The window that the upstream's own list of models states."""
        window = self._memory.learned(scope, model).get(UPSTREAM_WINDOW)
        return window if isinstance(window, int) else None

    async def learn(self, scope: bytes, model: str, facts: Mapping[str, Any]) -> None:
        """Keep what a refusal taught. Raises StorageError."""
        await self._memory.learn(scope, model, dict(facts))
        self._recent.clear()
        listed = [name for name in self._listed(scope) if name != model]
        names = [*listed, model][-_LISTED_MODELS:]
        await self._memory.store.commit([(b"M" + scope, msgspec.msgpack.encode(names))])

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

        `{"model", <fact>: {"value", "from": "override" | "learned" | "upstream" | "assumed"}}`; the facts are the
        fields of `models:` in the configuration and `tokens_factor` (billed per counted token).
        """
        names = sorted({*self._config.models, *self._listed(scope)})
        return [self._row(scope, name) for name in names]

    def _row(self, scope: bytes, name: str) -> dict[str, Any]:
        learned = dict(self._memory.learned(scope, name))
        window = learned.pop(UPSTREAM_WINDOW, None)
        row = describe(name, self._override(name), learned, self._assumed(name))
        if window is not None and row["window_tokens"]["from"] == "assumed":
            row["window_tokens"] = {"value": window, "from": "upstream"}
        return row

    def _listed(self, scope: bytes) -> list[str]:
        data = self._memory.store.get(b"M" + scope)
        return msgspec.msgpack.decode(data, type=list[str]) if data else []

    def _override(self, model: str) -> dict[str, Any]:
        override = self._config.model_override(model)
        return {name: getattr(override, name) for name in _OVERRIDES}

    def _assumed(self, model: str | None) -> dict[str, Any]:
        """What holds without a word from anyone; with a model's name, its card too."""
        assumed: dict[str, Any] = {
            "mid_system": None, "system_role": True, "alternate": False, "stream_usage": True,
            "prompt_cache_key": self._cache_key,
        }  # fmt: skip
        if model is not None:
            card = model_card(model)
            assumed["mid_system"] = card.developer_role == "developer"
            assumed |= {"window_tokens": card.window_tokens, "developer_role": card.developer_role}
            assumed |= {"tools": True, "tools_with_json": True, TOKENS_FACTOR: 1.0}
        return assumed
