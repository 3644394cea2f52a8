"""Asks an upstream for its list of models, once per key, and keeps the windows that it states.

Promises: never on a request's path and never in its way: after an answered chat request, a few calls
at once, bounded in time and bytes; a list that did not come is asked for again only after a while;
what is kept is stored with what else is known of the model, and used from the next turn on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from proxy.api.capable import Capable
from proxy.api.memory import UPSTREAM_WINDOW
from proxy.conversation.stated import stated_windows, window_of
from proxy.errors import ApiError
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
    until_s: float
    stated: dict[str, int] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)  # models whose window was looked up in it


class StatedWindows:
    """One per process. `active`: the upstream has such a list."""

    def __init__(self, upstream: Upstream, capable: Capable, active: bool) -> None:
        self._upstream = upstream
        self._capable = capable
        self._active = active
        self._asked: dict[bytes, _Asked] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def look(self, scope: bytes, model: str, headers: Sequence[Header], query: bytes) -> None:
        """A chat request of this key was answered. Returns at once."""
        asked = self._asked.get(scope)
        fresh = asked is not None and asked.until_s > time.monotonic()
        if not self._active or (fresh and asked and model in asked.known) or len(self._tasks) >= _AT_ONCE:
            return
        if asked is None or not fresh:
            self._asked.pop(scope, None)
            if len(self._asked) >= _KEYS:
                del self._asked[next(iter(self._asked))]
            asked = self._asked[scope] = _Asked(time.monotonic() + _AGAIN_AFTER_FAILURE_S)
            task = asyncio.ensure_future(self._ask(asked, scope, model, headers, query))
        else:
            task = asyncio.ensure_future(self._keep(asked, scope, model))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(
        self, asked: _Asked, scope: bytes, model: str, headers: Sequence[Header], query: bytes
    ) -> None:
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
            return
        if body:
            asked.until_s = time.monotonic() + _AGAIN_S
        await self._keep(asked, scope, model)

    async def _keep(self, asked: _Asked, scope: bytes, model: str) -> None:
        if len(asked.known) < _MODELS:
            asked.known.add(model)
        window = window_of(model, asked.stated)
        if window is None or self._capable.stated(scope, model) == window:
            return
        log.warning("model %s: the upstream states a window of %d tokens", model, window)
        try:
            await self._capable.learn(scope, model, {UPSTREAM_WINDOW: window})
        except StorageError as error:  # the next list says the same
            log.warning("a stated window was not kept: %s", error)
