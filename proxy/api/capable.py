"""What is known of models: for the turns, and for the people who ask (GET /vm/models).

Promises: an override wins over what a refusal taught, and that over what is assumed; one key's
refusals are shown to that key only; the list of models kept per key is bounded. What passed and what
failed is remembered in RAM only: it decides whether a refusal is tried again, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

import msgspec

from proxy.api.memory import Memory
from proxy.config import Config
from proxy.conversation import keys
from proxy.conversation.calibration import TOKENS_FACTOR
from proxy.conversation.capability import (
    LARGE_TOKENS,
    Capabilities,
    Seen,
    capabilities,
    describe,
)
from proxy.limits import UPSTREAM_WINDOW
from proxy.tokens import model_card

_LISTED_MODELS = 256  # of one key; of more, the latest
_NEW_MODELS = 256
_SEEN_MODELS = 4096  # of all keys: what passed and what was refused is remembered
_FAILURES = 3  # so many, and what passed before proves nothing: the server may be another by now
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
        self._new = lru_cache(_NEW_MODELS)(partial(self._known, facts={}))
        self._seen: dict[bytes, Seen] = {}
        self._doubted: dict[bytes, int] = {}  # windows that one refusal of the moment made probable
        host = urlsplit(config.upstream.base_url).hostname or ""
        self._cache_key = config.upstream.provider == "openai" and host in _KNOWN_HOSTS

    def of(self, model: str, facts: Mapping[str, Any]) -> Capabilities:
        """For a turn; `facts`: what was learned of the model by now."""
        return self._known(model, facts) if facts else self._new(model)  # of nearly every model nothing

    def _known(self, model: str, facts: Mapping[str, Any]) -> Capabilities:
        assumed = self._assumed(None) | {"mid_system": self._hoisted(model) or None}
        return capabilities(self._override(model), facts, assumed)

    def stated(self, scope: bytes, model: str) -> int | None:
        """The window that the upstream's own list of models states."""
        window = self._memory.learned(scope, model).get(UPSTREAM_WINDOW)
        return window if isinstance(window, int) else None

    async def learn(self, scope: bytes, model: str, facts: Mapping[str, Any]) -> None:
        """Keep what a refusal taught, beside any turn. Raises StorageError."""
        await self._memory.store.commit(self.lessons(scope, model, facts))

    def lessons(
        self, scope: bytes, model: str, facts: Mapping[str, Any]
    ) -> list[tuple[bytes, bytes]]:
        """What is stored when a model's refusal or bill taught these facts (None: one is no more)."""
        listed = [name for name in self._listed(scope) if name != model]
        names = [*listed, model][-_LISTED_MODELS:]
        put = self._memory.learned_put(scope, model, facts)
        return [put, (keys.MODELS + scope, msgspec.msgpack.encode(names))]

    def seen(self, scope: bytes, model: str) -> Seen:
        """What passed, and what failed since."""
        key = scope + model.encode()
        return self._seen.get(key, Seen())._replace(doubted=key in self._doubted)

    def answered(self, scope: bytes, model: str, tokens: int, doubted_tokens: int) -> None:
        """A prompt of so many tokens, as upstream counts, was answered (0: nobody counted it); after
        a refusal of the moment, in a window of `doubted_tokens`."""
        key = scope + model.encode()
        if tokens >= LARGE_TOKENS and tokens > self.seen(scope, model).passed_tokens:
            _keep(self._seen, key, Seen(tokens))
        if tokens > self._doubted.get(key, 0):
            self._doubted.pop(key, None)
        if doubted_tokens:
            _keep(self._doubted, key, doubted_tokens)

    def failed(self, scope: bytes, model: str) -> None:
        """A turn ended with a refusal that nobody can explain."""
        passed, failures, _ = self.seen(scope, model)
        proof_lapses = passed > 0 and failures + 1 >= _FAILURES
        now = Seen() if proof_lapses else Seen(passed, failures + 1)
        _keep(self._seen, scope + model.encode(), now)

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
        data = self._memory.store.get(keys.MODELS + scope)
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
            assumed["mid_system"] = card.developer_role == "developer" or self._hoisted(model)
            assumed |= {"window_tokens": card.window_tokens, "developer_role": card.developer_role}
            assumed |= {"tools": True, "tools_with_json": True, TOKENS_FACTOR: 1.0}
        return assumed

    def _hoisted(self, model: str) -> bool:
        """litellm puts all system messages into the one field that these protocols have for them, each
        a block of its own: the client's stays cached when ours is another one."""
        name = model.lower()
        hoists = any(house in name for house in ("anthropic", "claude", "gemini"))
        return hoists and self._config.upstream.provider == "litellm"


def _keep(table: dict[bytes, Any], key: bytes, value: Any) -> None:
    """Enter it as the latest of a bounded table."""
    table.pop(key, None)
    table[key] = value
    if len(table) > _SEEN_MODELS:
        del table[next(iter(table))]
