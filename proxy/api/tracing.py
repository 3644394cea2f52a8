"""Spans of requests for OpenTelemetry, by its conventions for generative AI; the extra [telemetry].

Promises: names, numbers and ids, never content, queries or credentials; nothing waits for whoever is told: what it does
not take in time is dropped; the client's trace goes on (`traceparent`), and upstream gets our span as its parent. OTEL_*
variables mean what they mean everywhere (sampler, headers, resource, queue); the protocol is http/protobuf.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from proxy import __version__
from proxy.api.http import Scope, is_chat
from proxy.api.visit import Visit
from proxy.config import Config
from proxy.conversation.bill import usage_of
from proxy.conversation.effects import Refused, Said
from proxy.conversation.report import FaultReport
from proxy.upstream import CHAT_PATH, Header

logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # it quotes clients' headers

_CLOSE_S: Final = 2.0  # for the last spans
_W3C: Final = TraceContextTextMapPropagator()
_NAMES: Final = frozenset(name.encode() for name in _W3C.fields)
_ROOT: Final = Context()  # what is current in a task is not ours
_COUNTS: Final = ("rounds", "faults", "searches", "epochs", "used_tokens", "memory_lost")


class Tracing:
    """One per process."""

    def __init__(self, config: Config) -> None:
        ours = Resource({"service.name": "llm-pager", "service.version": __version__})
        self._provider = TracerProvider(resource=Resource.create().merge(ours).merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("llm-pager", __version__)
        self._upstream = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": config.upstream.provider}
        if config.upstream.provider == "openai":
            self._upstream["server.address"] = urlsplit(config.upstream.base_url).hostname or ""

    def begin(self, scope: Scope, visit: Visit) -> Scope:
        """A request's span; the request with it as its parent."""
        named = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _NAMES}
        route = CHAT_PATH if scope["method"] == "POST" and is_chat(visit.path) else ""
        span = self._tracer.start_span(
            f"{scope['method']} {route}".rstrip(), _W3C.extract(named, _ROOT), SpanKind.SERVER,
            {"http.request.method": scope["method"], **({"http.route": route} if route else {})},
        )  # fmt: skip
        visit.trace = Trace(self._tracer, span, self._upstream)
        return {**scope, "headers": _with_parent(scope["headers"], span)}

    async def close(self) -> None:
        """What is told by now is sent, if that takes no longer than a moment."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _CLOSE_S)


class Trace:
    """One request's spans. Seconds are `time.perf_counter`'s."""

    def __init__(self, tracer: otel.Tracer, span: Span, upstream: Mapping[str, str]) -> None:
        self._tracer, self._span, self._upstream = tracer, span, upstream
        self._context = otel.set_span_in_context(span, _ROOT)
        self._epoch_s = time.time() - time.perf_counter()
        self._round: Span | None = None
        self.id = otel.format_trace_id(span.get_span_context().trace_id)

    def calls(self, headers: list[Header], visit: Visit) -> list[Header]:
        """A round begins; its headers."""
        about = {"gen_ai.request.model": visit.model, "gen_ai.conversation.id": visit.conversation}
        self._round = self._tracer.start_span(
            f"chat {visit.model}", self._context, SpanKind.CLIENT, {**self._upstream, **about}
        )
        return _with_parent(headers, self._round)

    def called(self, reply: Said | Refused) -> None:
        """How the round ended."""
        span, self._round = self._round, None
        if span is None:
            return
        if isinstance(reply, Refused):
            span.set_attributes({"http.response.status_code": reply.status, "error.type": str(reply.status)})
            span.set_status(StatusCode.ERROR)
        else:
            if (usage := usage_of(reply.usage, 0)) is not None:
                span.set_attributes({
                    "gen_ai.usage.input_tokens": usage.prompt, "gen_ai.usage.output_tokens": usage.completion,
                    "gen_ai.usage.cache_read.input_tokens": usage.cached or 0,
                    "gen_ai.usage.cache_creation.input_tokens": usage.written,
                })  # fmt: skip
            if isinstance(reply.finish_reason, str):
                span.set_attribute("gen_ai.response.finish_reasons", [reply.finish_reason[:64]])
        span.end()

    def did(self, name: str, began_s: float, about: Mapping[str, Any]) -> None:
        """A step that ends now."""
        self._tracer.start_span(name, self._context, attributes=about, start_time=self._ns(began_s)).end()

    def faulted(self, fault: FaultReport, began_s: float) -> None:
        """A page fault, whose loading `began_s`."""
        about = {
            "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "page_fault", "llm_pager.fault.reason": fault.reason,
            "llm_pager.fault.tier": fault.tier.value, "llm_pager.fault.tokens": fault.tokens,
        }  # fmt: skip
        start = self._ns(began_s)
        span = self._tracer.start_span("execute_tool page_fault", self._context, attributes=about, start_time=start)
        if fault.error is not None:
            span.set_status(StatusCode.ERROR)
        span.end(start + int(fault.ms * 1e6))

    def ended(self, visit: Visit) -> None:
        """The request has ended, whichever way."""
        if self._round is not None:  # nobody waits for it any more, or it broke off
            self._round.set_status(StatusCode.ERROR)
            self._round.end()
        span = self._span
        span.set_attribute("llm_pager.channel", visit.channel)
        if visit.status:
            span.set_attribute("http.response.status_code", visit.status)
        if visit.status >= 500 or not visit.status:
            span.set_status(StatusCode.ERROR)
        if visit.conversation:
            span.set_attribute("gen_ai.conversation.id", visit.conversation)
            span.set_attributes({f"llm_pager.{name}": getattr(visit, name) for name in _COUNTS})
        span.end()

    def _ns(self, at_s: float) -> int:
        return int((self._epoch_s + at_s) * 1e9)


def _with_parent(headers: list[Header], span: Span) -> list[Header]:
    carried: dict[str, str] = {}
    _W3C.inject(carried, otel.set_span_in_context(span, _ROOT))
    ours = [(name.encode(), value.encode("latin-1")) for name, value in carried.items()]
    return [*(header for header in headers if header[0] not in _NAMES), *ours]
