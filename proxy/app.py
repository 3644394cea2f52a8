"""The ASGI application: the chat path handled plainly, everything else behind it.

Promises: a POST to any path that ends in /chat/completions goes straight to the chat handler; our own
paths (/health, /ready, /metrics, /vm/...) are FastAPI's; everything else passes through to the upstream
verbatim. One application per worker process; workers share the state directory.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from proxy.api.access import Access
from proxy.api.chat import ChatApi, Observer
from proxy.api.endpoints import Draining, own_endpoints
from proxy.api.erasure import Erasures, watch
from proxy.api.http import (
    Origins,
    Receive,
    Scope,
    Send,
    is_chat,
    is_ours,
    passthrough,
    send_error,
)
from proxy.api.memory import Memory
from proxy.api.renditions import Renditions
from proxy.api.views import Views
from proxy.api.visit import Stats, Visit, path_kind
from proxy.api.vm import Vm
from proxy.api.writer import Writer
from proxy.config import Config, effective_config
from proxy.errors import ApiError
from proxy.process import collect_now_and_then, configure, tune
from proxy.server import Door
from proxy.storage.tiered import READS, Reads
from proxy.tokens import load
from proxy.ui import Dashboard
from proxy.upstream import Upstream, UpstreamBroken, make_upstream

if TYPE_CHECKING:  # an extra
    from proxy.api.tracing import Tracing

log = logging.getLogger(__name__)


class App:
    """Routes by path. FastAPI is behind it, because a route of its costs more than our whole turn."""

    def __init__(self, config: Config, observer: Observer | None = None, upstream: Upstream | None = None) -> None:
        self.door = Door(config.server)  # the server's, where it is ours
        self.memory = Memory(config)
        self._upstream = upstream or _upstream(config)
        self._renditions = renditions = Renditions(config, self.memory)
        self._writer = Writer(config, self._upstream, renditions)
        self._stats = Stats(self.memory, self._writer, lambda model: config.model_class(model) or "other")
        self._tracing = _tracing(config)
        self._chat = ChatApi(config, self._upstream, self.memory, renditions, self._writer, self._stats, observer)
        self._draining = Draining(config.server.drain_s)
        self._erasures = Erasures(self.memory.store, self.memory.store.objects_of)
        self._stats.watch(self._chat.queued, self._erasures.finished)
        self._retention_days = config.storage.retention_days
        self._access = Access(config, self.memory)
        own = own_endpoints(
            self._draining, self._stats, self.memory, self._access, self._chat.model_facts.table, self._erasures
        )
        self._origins = Origins(config)
        views, streams = Views(config, self.memory), config.server.event_streams
        vm = Vm(views, self._access, self.memory, streams, lambda: self._draining.begun)
        vm.mount(own)
        Dashboard(vm, self._stats, self._chat.model_facts.table, self._erasures, config).mount(own)
        self._own = self.memory.requests(own)
        self._serve = self.memory.requests(self._visited)
        self._served = 0  # requests, at this moment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await self._own(scope, receive, send)
            return
        READS.set(Reads())
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        if origin is not None:
            head = self._origins.preflight(scope, origin)
            if head is not None:
                await send({"type": "http.response.start", "status": 204, "headers": head})
                await send({"type": "http.response.body", "body": b""})
                return
            send = self._origins.readable(origin, send)
        if not is_ours(scope["path"]):
            await self._serve(scope, receive, Visit(scope, send))
        elif scope["path"].startswith("/vm/") and (refusal := self._origins.refusal(scope)):
            await send_error(send, refusal)
        else:
            await self._own(self._access.admitted(scope)[0], receive, send)

    async def _visited(self, scope: Scope, receive: Receive, visit: Visit) -> None:
        """A failure of our own becomes a 500 in OpenAI's shape while that is still possible."""
        self._served += 1
        if self._tracing is not None:
            scope = self._tracing.begin(scope, visit)
        try:
            scope, refusal = self._access.admitted(scope)
            if (refusal := self._origins.refusal(scope) or refusal) is not None:
                await send_error(visit.send, refusal)
            elif scope["method"] == "POST" and is_chat(visit.path):  # stored ones are upstream's
                visit.kind = "chat"
                await self._chat(scope, receive, visit.send)
            else:
                visit.kind = path_kind(visit.path)
                await passthrough(scope, receive, visit.send, self._upstream)
        except UpstreamBroken:
            raise  # the connection has to break, or the client takes half an answer for a whole
        except Exception:
            log.exception("failed: %s %s", scope["method"], scope["path"])
            if visit.status:  # something was sent
                raise
            error = ApiError(500, "llm-pager failed to handle this request; its log says why.",
                             "api_error", "internal_error")
            await send_error(visit.send, error)
        finally:
            self._served -= 1
            visit.ended()
            self._stats.count(visit)
            if visit.trace is not None:
                visit.trace.ended(visit)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        collecting: list[asyncio.Future[None]] = []
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await asyncio.gather(self._upstream.start(), asyncio.to_thread(load))
                self.memory.start()
                self._draining.watch()
                watching = watch(self._erasures, self.memory.store, self.memory.renew, self._retention_days)
                collected = collect_now_and_then(lambda: not self._served)
                flushing = self._stats.keep_flushing()
                collecting = [asyncio.ensure_future(task) for task in (collected, self.memory.beside(watching), flushing)]
                await send({"type": "lifespan.startup.complete"})
            else:
                for task in collecting:
                    task.cancel()
                await self._chat.close()
                await self._writer.close()
                await self._renditions.close()
                await self._upstream.close()
                await self.memory.close()
                self._stats.flush()
                if self._tracing is not None:
                    await self._tracing.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


def _tracing(config: Config) -> Tracing | None:
    """Where OpenTelemetry's own variables name somebody to tell. They may be there for other programs, so a missing extra
    stops nothing."""
    asked = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{traces}ENDPOINT") for traces in ("", "TRACES_"))
    if not asked or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    try:
        from proxy.api.tracing import Tracing
    except ImportError:
        log.warning("OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, which need: pip install 'llm-pager[telemetry]'.")
        return None
    return Tracing(config)


def _upstream(config: Config) -> Upstream:
    if config.upstream.provider == "demo":
        from proxy.demo.upstream import DemoUpstream

        return DemoUpstream()
    return make_upstream(config)


def create_app(config: Config, observer: Observer | None = None, upstream: Upstream | None = None) -> App:
    """The application for a configuration; `observer` is told of every answered turn; `upstream`
    stands for the configured one."""
    return App(config, observer, upstream)


def app_from_env() -> App:
    """The factory for worker processes: the effective configuration is in their environment."""
    config = effective_config(os.environ)
    configure(config.log.format, config.log.level)
    app = create_app(config)
    tune()
    return app
