"""Asks an upstream for its list of models, once per key, and keeps the windows that it states.

Promises: never on a request's path and never in its way: after an answered chat request, a few calls
at once, bounded in time and bytes; only where it decides something (no window is configured); a list,
or that none came, holds for a while, for every process on this storage. What it states of a model is
stored with what else is known of it, and used from the next turn on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from proxy.api.capable import Capable
from proxy.api.memory import Memory
from proxy.config import Config
from proxy.conversation import keys
from proxy.conversation.stated import stated_windows, window_of
from proxy.errors import ApiError
from proxy.limits import UPSTREAM_WINDOW
from proxy.storage.l2 import StorageError
from proxy.upstream import Header, Upstream, UpstreamBroken

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_LIST_BYTES = 16 << 20
_AT_ONCE = 4
_KEYS = 1024  # whose lists are kept in RAM
_MODELS = 1024  # of a key, looked up in its list
_AGAIN_S = 3600.0
_AGAIN_AFTER_FAILURE_S = 600.0
_OF_THE_BODY = (b"content-", b"accept", b"if-", b"range", b"transfer-", b"idempotency-", b"expect")


@dataclass(slots=True)
class _Asked:
    until_s: float  # Unix time
    stated: dict[str, int] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)  # models whose window was looked up in it


class StatedWindows:
    """One per process."""

    def __init__(self, config: Config, upstream: Upstream, memory: Memory, capable: Capable) -> None:
        self._config = config
        self._upstream = upstream
        self._memory = memory
        self._capable = capable
        self._active = config.upstream.provider == "openai" and config.tiers.l0.tokens == "auto"
        self._asked: dict[bytes, _Asked] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def look(self, scope: bytes, model: str, headers: Sequence[Header], query: bytes) -> None:
        """A chat request of this key was answered. Returns at once."""
        asked, now_s = self._asked.get(scope), time.time()
        fresh = asked is not None and asked.until_s > now_s
        if not self._active or (fresh and asked and model in asked.known) or len(self._tasks) >= _AT_ONCE:
            return
        if self._config.model_override(model).window_tokens is not None:
            return
        if asked is None or not fresh:
            asked = self._stored(scope, now_s)
            self._asked.pop(scope, None)
            if len(self._asked) >= _KEYS:
                del self._asked[next(iter(self._asked))]
            self._asked[scope] = asked or _Asked(now_s + _AGAIN_AFTER_FAILURE_S)
        if asked is None:
            work = self._ask(self._asked[scope], scope, model, headers, query)
        else:
            work = self._keep(asked, scope, model)
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stored(self, scope: bytes, now_s: float) -> _Asked | None:
        """What any process on this storage was told; a damaged word is none."""
        try:
            data = self._memory.store.get(keys.STATED + scope)
            if data is None:
                return None
            until_s, stated = msgspec.msgpack.decode(data, type=tuple[float, dict[str, int]])
        except (StorageError, msgspec.MsgspecError):
            return None
        return _Asked(until_s, stated) if until_s > now_s else None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(
        self, asked: _Asked, scope: bytes, model: str, headers: Sequence[Header], query: bytes
    ) -> None:
        body = b""
        sent = [header for header in headers if not header[0].startswith(_OF_THE_BODY)]
        sent += [(b"accept", b"application/json"), (b"accept-encoding", b"identity")]
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reply = await self._upstream.forward("GET", "/models", query, sent, None)
                try:
                    body = await reply.read(_LIST_BYTES) if reply.status == 200 else b""
                finally:
                    await reply.close()
            asked.stated = await asyncio.to_thread(stated_windows, body) if body else {}
        except (ApiError, UpstreamBroken, TimeoutError) as error:
            log.info("the upstream's list of models did not come: %s", error)
        if body:
            asked.until_s = time.time() + _AGAIN_S
        data = msgspec.msgpack.encode((asked.until_s, asked.stated))
        try:
            await self._memory.store.commit([(keys.STATED + scope, data)])
        except StorageError as error:
            log.warning("an upstream's list of models was not kept: %s", error)
        await self._keep(asked, scope, model)

    async def _keep(self, asked: _Asked, scope: bytes, model: str) -> None:
        if len(asked.known) < _MODELS:
            asked.known.add(model)
        window = window_of(model, asked.stated)
        try:
            if window is None or self._capable.stated(scope, model) == window:
                return
            log.warning("model %s: the upstream states a window of %d tokens", model, window)
            await self._capable.learn(scope, model, {UPSTREAM_WINDOW: window})
        except StorageError as error:  # the next list says the same
            log.warning("a stated window was not kept: %s", error)
