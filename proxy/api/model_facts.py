"""What is known of models: for the turns, and for the people who ask (GET /vm/models).

Promises: an override wins over what a refusal taught, and that over what is assumed; one key's
refusals are shown to that key only; the list of models kept per key is bounded. What passed and what
failed is remembered in RAM only: it decides whether a refusal is tried again, and nothing else.

The upstream's own list of models is asked for, once per key, never on a request's path and never in its
way: after an answered chat request, a few calls at once, bounded in time and bytes; only where it decides
something (no window is configured). A list, or that none came, holds for a while, for every process on
this storage; the window that it states of a model is used from the next turn on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import msgspec

from proxy import keys
from proxy.api.memory import Memory
from proxy.config import Config
from proxy.conversation.calibration import TOKENS_FACTOR
from proxy.conversation.calling import VM_CALLS, Calling
from proxy.conversation.model_facts import (
    LARGE_TOKENS,
    Capabilities,
    Seen,
    capabilities,
    describe,
    stated_windows,
    window_of,
)
from proxy.conversation.tree import KeyScope
from proxy.errors import ApiError
from proxy.model_limits import UPSTREAM_WINDOW
from proxy.storage.l2 import StorageError
from proxy.tokens import model_card
from proxy.upstream import Header, Upstream, UpstreamBroken, read_whole

log = logging.getLogger(__name__)

_LISTED_MODELS = 256  # of one key; of more, the latest
_MODELS = 256  # whose capabilities are not put together again
_CAPABILITIES = tuple(one.name for one in fields(Capabilities))
_SEEN_MODELS = 4096  # of all keys: what passed and what was refused is remembered
_FAILURES = 3  # so many, and what passed before proves nothing: the server may be another by now
_NOTHING_SEEN = Seen()
_KNOWN_HOSTS = ("api.openai.com",)  # whose API has prompt_cache_key
_OVERRIDES = (
    "window_tokens", "tools", "tools_with_json", "developer_role", "mid_system", "system_role", "alternate",
    "stream_usage", "prompt_cache_key",
)  # fmt: skip


_LIST_TIMEOUT_S = 10.0
_LIST_BYTES = 16 << 20
_LISTS_AT_ONCE = 4
_LISTS = 1024  # of keys, kept in RAM
_LOOKED_UP = 1024  # models of a key, in its list
_AGAIN_S = 3600.0
_AGAIN_AFTER_FAILURE_S = 600.0
_OF_THE_BODY = (b"content-", b"accept", b"if-", b"range", b"transfer-", b"idempotency-", b"expect")


@dataclass(slots=True)
class _List:
    """What upstream's list of models stated for a key."""

    until_s: float  # Unix time
    windows: dict[str, int] = field(default_factory=dict)
    looked_up: set[str] = field(default_factory=set)


class ModelFacts:
    """One per process."""

    def __init__(self, config: Config, memory: Memory, upstream: Upstream) -> None:
        self._config = config
        self._memory = memory
        self._upstream = upstream
        self._lists_count = config.upstream.provider == "openai" and config.tiers.l0.tokens == "auto"
        self._lists: dict[bytes, _List] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._capabilities = lru_cache(_MODELS)(self._known)
        self._seen: dict[bytes, Seen] = {}
        self._doubted: dict[bytes, int] = {}  # windows that one refusal of the moment made probable
        host = urlsplit(config.upstream.base_url).hostname or ""
        self._cache_key = config.upstream.provider == "openai" and host in _KNOWN_HOSTS

    def of(self, model: str, facts: Mapping[str, Any]) -> Capabilities:
        """For a turn; `facts`: what was learned of the model by now."""
        return self._capabilities(model, tuple((name, facts[name]) for name in _CAPABILITIES if name in facts))

    def _known(self, model: str, facts: Sequence[tuple[str, Any]]) -> Capabilities:
        assumed = self._assumed(None) | {"mid_system": self._hoisted(model) or None}
        return capabilities(self._override(model), dict(facts), assumed)

    async def learn(self, scope: KeyScope, model: str, facts: Mapping[str, Any]) -> None:
        """Keep what a refusal taught, beside any turn. Raises StorageError."""
        await self._memory.store.commit(self.lessons(scope, model, facts))

    def lessons(self, scope: KeyScope, model: str, facts: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
        """What is stored when a model's refusal or bill taught these facts (None: one is no more)."""
        listed = [name for name in self._listed(scope) if name != model]
        names = [*listed, model][-_LISTED_MODELS:]
        put = self._memory.learned_put(scope, model, facts)
        return [put, (keys.MODELS + scope, msgspec.msgpack.encode(names))]

    def seen(self, scope: KeyScope, model: str) -> Seen:
        """What passed, and what failed since."""
        key = scope + model.encode()
        return self._seen.get(key, _NOTHING_SEEN)._replace(doubted=key in self._doubted)

    def answered(self, scope: KeyScope, model: str, tokens: int, doubted_tokens: int) -> None:
        """A prompt of so many tokens, as upstream counts, was answered (0: nobody counted it); after
        a refusal of the moment, in a window of `doubted_tokens`."""
        key = scope + model.encode()
        if tokens >= LARGE_TOKENS and tokens > self._seen.get(key, _NOTHING_SEEN).passed_tokens:
            _keep(self._seen, key, Seen(tokens), _SEEN_MODELS)
        if tokens > self._doubted.get(key, 0):
            self._doubted.pop(key, None)
        if doubted_tokens:
            _keep(self._doubted, key, doubted_tokens, _SEEN_MODELS)

    def failed(self, scope: KeyScope, model: str) -> None:
        """A turn ended with a refusal that nobody can explain."""
        passed, failures, _ = self.seen(scope, model)
        proof_lapses = passed > 0 and failures + 1 >= _FAILURES
        _keep(self._seen, scope + model.encode(), Seen() if proof_lapses else Seen(passed, failures + 1), _SEEN_MODELS)

    def table(self, scope: KeyScope) -> list[dict[str, Any]]:
        """A row for each model with an override or a lesson of this key, sorted by name.

        `{"model", <fact>: {"value", "from": "override" | "learned" | "upstream" | "assumed"}}`; the facts are the
        fields of `models:` in the configuration, `tokens_factor` (billed per counted token) and, once anything was
        counted, `vm_calls` (`Calling.described`).
        """
        names = sorted({*self._config.models, *self._listed(scope)})
        return [self._row(scope, name) for name in names]

    def _row(self, scope: KeyScope, name: str) -> dict[str, Any]:
        learned = dict(self._memory.learned(scope, name))
        window = learned.pop(UPSTREAM_WINDOW, None)
        if VM_CALLS in learned:
            learned[VM_CALLS] = Calling.of(learned).described(self._config.memory.tools == "always")
        row = describe(name, self._override(name), learned, self._assumed(name))
        if window is not None and row["window_tokens"]["from"] == "assumed":
            row["window_tokens"] = {"value": window, "from": "upstream"}
        return row

    def _listed(self, scope: KeyScope) -> list[str]:
        data = self._memory.get(keys.MODELS + scope)
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

    # -- upstream's list of models

    def look(self, scope: KeyScope, model: str, headers: Sequence[Header], query: bytes) -> None:
        """A chat request of this key was answered: see what the list states of its model. Returns at once."""
        listed, now_s = self._lists.get(scope), time.time()
        fresh = listed is not None and listed.until_s > now_s
        if not self._lists_count or (fresh and listed and model in listed.looked_up):
            return
        if len(self._tasks) >= _LISTS_AT_ONCE or self._config.model_override(model).window_tokens is not None:
            return
        if fresh and listed:
            work = self._look_up(listed, scope, model)
        else:
            listed = _List(now_s + _AGAIN_AFTER_FAILURE_S)
            _keep(self._lists, scope, listed, _LISTS)
            work = self._find(listed, scope, model, headers, query)
        task = asyncio.ensure_future(self._memory.beside(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """What is being asked is given up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _find(self, listed: _List, scope: KeyScope, model: str, headers: Sequence[Header], query: bytes) -> None:
        """Not in the request: its client may be gone, and the storage may be far."""
        data = self._memory.get(keys.STATED + scope)  # what any process on this storage was told; a damaged word is none
        until_s, windows = msgspec.msgpack.decode(data, type=tuple[float, dict[str, int]]) if data is not None else (0.0, {})
        if until_s <= time.time():
            return await self._ask(listed, scope, model, headers, query)
        listed.until_s, listed.windows = until_s, windows
        await self._look_up(listed, scope, model)

    async def _ask(self, listed: _List, scope: KeyScope, model: str, headers: Sequence[Header], query: bytes) -> None:
        body = b""
        sent = [header for header in headers if not header[0].startswith(_OF_THE_BODY)]
        sent += [(b"accept", b"application/json"), (b"accept-encoding", b"identity")]
        try:
            async with asyncio.timeout(_LIST_TIMEOUT_S):
                status, body = await read_whole(self._upstream.forward("GET", "/models", query, sent, None), _LIST_BYTES)
            body = body if status == 200 else b""
            listed.windows = await asyncio.to_thread(stated_windows, body) if body else {}
        except (ApiError, UpstreamBroken, TimeoutError) as error:
            log.info("the upstream's list of models did not come: %s", error)
        if body:
            listed.until_s = time.time() + _AGAIN_S
        data = msgspec.msgpack.encode((listed.until_s, listed.windows))
        try:
            await self._memory.store.commit([(keys.STATED + scope, data)])
        except StorageError as error:
            log.warning("an upstream's list of models was not kept: %s", error)
        await self._look_up(listed, scope, model)

    async def _look_up(self, listed: _List, scope: KeyScope, model: str) -> None:
        if len(listed.looked_up) < _LOOKED_UP:
            listed.looked_up.add(model)
        window = window_of(model, listed.windows)
        try:
            if window is None or self._memory.learned(scope, model).get(UPSTREAM_WINDOW) == window:
                return
            log.warning("model %s: the upstream states a window of %d tokens", model, window)
            await self.learn(scope, model, {UPSTREAM_WINDOW: window})
        except StorageError as error:  # the next list says the same
            log.warning("a stated window was not kept: %s", error)


def _keep(table: dict[bytes, Any], key: bytes, value: Any, most: int) -> None:
    """Enter it as the latest of a bounded table, which threads may read."""
    table.pop(key, None)
    table[key] = value
    if len(table) > most:
        del table[next(iter(table))]
