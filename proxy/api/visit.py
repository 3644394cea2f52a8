"""One client request from its head to the end of its answer: what is said of it, and to whom; and what all
of them add up to, for Prometheus at GET /metrics.

Promises: every answer says in `x-llm-pager-channel` whether it was paged, streams in their first head;
one line a request is logged, which holds counts and names, never content, queries or credentials. The
metrics are numbers, with labels of a fixed few values, so that neither a path nor a model nor a tenant of
anyone's shows or makes the table grow; right with several workers, whose numbers stand in files of one
directory (`PROMETHEUS_MULTIPROC_DIR`, which `llm-pager serve` makes); a count costs 0.4 µs, with several
workers 2 µs.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter as Tally
from collections.abc import Awaitable
from functools import lru_cache
from typing import Any, Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from proxy.api.bill import bill_of
from proxy.api.http import Message, Scope, Send, raw_path
from proxy.api.memory import Memory
from proxy.api.writer import Writer
from proxy.conversation.bill import Sums
from proxy.conversation.chunks import decode_chunk
from proxy.conversation.effects import Refused
from proxy.conversation.pages import packed_lines
from proxy.conversation.records import conversation_name, owner_of
from proxy.conversation.report import TurnReport
from proxy.memory.metrics import UserExperienceMetrics
from proxy.memory.models import StorageTier
from proxy.storage.tiered import READS, Reads
from proxy.upstream import Header

log = logging.getLogger("proxy.request")

_SCOPE_KEY: Final = "llm_pager.visit"
_PATH_CHARS: Final = 200  # of a path in the log
_COUNTED: Final = (
    "rounds", "faults", "searches", "used_tokens", "prompt_tokens", "cached_tokens", "completion_tokens",
    "refusals",
)  # fmt: skip
_NAME: Final = re.compile(r"[\w.:/-]{1,64}")  # a code of upstream's, in the log
_MEMORY_LOST: Final = (b"x-llm-pager-memory", b"lost")
_MODELS: Final = 256  # whose bills are kept apart, for their prices
_BELOW: Final = (StorageTier.L3, StorageTier.L4)
_OTHER: Final = ""  # all others'
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST  # of the metrics
_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_COUNTERS: Final = (  # a visit's field, the counter's name, what it counts
    ("rounds", "rounds", "Calls of upstream for chat requests"),
    ("faults", "faults", "Page faults of models"),
    ("searches", "searches", "Searches of models"),
    ("epochs", "epochs", "Windows rebuilt"),
    ("crowded", "crowded_epochs", "Windows rebuilt that are too small for their traffic: nearly each request rebuilds them"),
    ("memory_lost", "memory_lost", "Answers that could not be remembered, because of the storage"),
    ("refusals", "upstream_refusals", "Answers of upstream to chat requests with a status of 400 or more"),
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside each counter doubles the page and says nothing


class _Line(dict[str, Any]):
    """Fields of one line, as JSON values; as text where that is asked for."""

    def __str__(self) -> str:
        return " ".join([f"{name}={value}" for name, value in self.items()])


class Visit:
    """What is known of one request; the handlers fill it in as they learn it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._headers: list[Header] = [(b"x-llm-pager-channel", b"unpaged")]
        scope[_SCOPE_KEY] = self
        self.started_s = time.perf_counter()
        self.seconds = 0.0
        self.status = 0  # 0: nothing was sent
        self.path = raw_path(scope)
        self.channel = "unpaged"
        self.kind = "other"  # of what is not paged: responses | messages | chat | other
        self.conversation = ""
        self.model = ""
        self.rounds = self.faults = self.searches = self.epochs = self.crowded = self.refusals = 0
        self.reads = READS.get() or Reads()
        self.fault_tiers = ""  # each fault's, and its milliseconds
        self.memory_lost = 0  # 1: the answer cannot be remembered
        self.used_tokens = self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0

    @staticmethod
    def of(scope: Scope) -> Visit:
        """The visit that a request is part of; one that nobody asks for a handler called alone."""
        visit = scope.get(_SCOPE_KEY)
        return visit if isinstance(visit, Visit) else Visit(scope, _nowhere)

    def send(self, message: Message) -> Awaitable[None]:
        """An ASGI `send` that adds what we say to the answer's head."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name for name, _ in self._headers}  # another llm-pager upstream has them, too
            given = [header for header in message.get("headers", ()) if header[0] not in names]
            message = {**message, "headers": given + self._headers}
        return self._send(message)

    # -- what is learned on the way

    def placed(self, model: str, root: bytes) -> None:
        """A chat request found its conversation; `root`: the id of its first node, which is keyed."""
        short = model[:_PATH_CHARS]  # a client's text, on one line of a log
        self.model = "".join(c if c.isprintable() else "?" for c in short)
        self.conversation = conversation_name(owner_of(root))

    def asks(self, report: TurnReport, epoch: int) -> None:
        """The turn calls upstream: what it decided, for the head of the answer. `epoch`: 0 for none."""
        self.channel = report.channel
        self.used_tokens = report.used_tokens
        self._headers = [(b"x-llm-pager-channel", report.channel.encode())]
        if report.channel != "bypass":
            self._headers += [
                (b"x-llm-pager-window-tokens", b"%d" % report.budget_tokens),
                (b"x-llm-pager-epoch", b"%d" % epoch),
                (b"x-llm-pager-conversation", self.conversation.encode()),
            ]
        if report.warning is not None:
            line = report.warning.encode("ascii", "replace")
            self._headers.append((b"x-llm-pager-warning", line))

    def remembers(self, stored: bool) -> None:
        """Whether the turn is stored, or, before its end, will be as far as is known: what its head still can say."""
        self.memory_lost = int(not stored)
        if self._headers[-1] == _MEMORY_LOST:
            self._headers.pop()
        if not stored:
            self._headers.append(_MEMORY_LOST)

    def unpaged(self, kind: str = "chat") -> None:
        """It goes up as it came."""
        self.channel, self.kind = "unpaged", kind
        self._headers = [(b"x-llm-pager-channel", b"unpaged")]

    def refused(self, refused: Refused) -> None:
        """Upstream did not answer a call of this turn."""
        self.refusals += 1
        body = decode_chunk(refused.body) if len(refused.body) <= 65_536 else None
        error = (body or {}).get("error")
        said = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
        code = said if isinstance(said, str) and _NAME.fullmatch(said) else "no code"
        log.warning(
            "upstream refused: status %d, %s; model %s, %s tokens by our count, channel %s",
            refused.status, code, self.model, self.used_tokens or "few", self.channel,
            extra={"fields": {"event": "refusal", "status": refused.status, "code": code,
                              "conversation": self.conversation, "model": self.model}},
        )  # fmt: skip

    def answered(self, report: TurnReport, usage: dict[str, Any] | None, first: bool) -> None:
        """The turn has ended well. `first`: the conversation was not paged before."""
        self.channel = report.channel
        self.rounds, self.used_tokens = report.rounds, report.used_tokens
        self.faults, self.searches = len(report.faults), len(report.searches)
        self.fault_tiers = ",".join(f"{fault.tier.value}:{fault.ms:.1f}ms" for fault in report.faults)
        self.epochs, self.crowded = int(report.new_epoch), int(report.crowded)
        usage = usage or {}
        billed = usage.get("vm") or usage
        self.prompt_tokens = _count(billed, "prompt_tokens") or _count(usage, "prompt_tokens")
        self.completion_tokens = _count(usage, "completion_tokens")
        details = billed.get("prompt_tokens_details") or usage.get("prompt_tokens_details")
        self.cached_tokens = _count(billed, "cached_tokens") or _count(details, "cached_tokens")
        if first and report.channel != "bypass":
            log.info(
                "conversation %s is paged from here on: model %s, window %d tokens, %s",
                self.conversation, self.model, report.budget_tokens, report.channel,
                extra={"fields": {"event": "first_paging", "conversation": self.conversation,
                                  "model": self.model, "window_tokens": report.budget_tokens}},
            )  # fmt: skip

    def ended(self) -> None:
        """The answer is out, or the client is gone: the request's line."""
        self.seconds = time.perf_counter() - self.started_s
        if not log.isEnabledFor(logging.INFO):
            return
        line = _Line(channel=self.channel, status=self.status, ms=round(self.seconds * 1000, 1))
        if self.channel == "unpaged":
            line["path"] = self.path[:_PATH_CHARS]
        if self.model:
            line["model"] = self.model
        if self.conversation:
            line["conversation"] = self.conversation
        if self.memory_lost:
            line["memory"] = "lost"
        if self.channel != "unpaged" or self.refusals:
            line.update((name, value) for name in _COUNTED if (value := getattr(self, name)))
        if self.fault_tiers:
            line["fault_tiers"] = self.fault_tiers
        for tier in _BELOW:
            if values := self.reads.values[tier]:
                line[f"{tier.value}_reads"], line[f"{tier.value}_ms"] = values, round(self.reads.seconds[tier] * 1000, 1)
        log.info("%s", line, extra={"fields": line})


class Stats:
    """What all requests of this process add up to, in numbers only, so that any tenant's may be counted
    (invariant 6): JSON at GET /vm/stats, Prometheus's text at GET /metrics. One per process."""

    def __init__(self, memory: Memory, writer: Writer) -> None:
        self._memory = memory
        self._writer = writer
        self.metrics = UserExperienceMetrics()
        self.turns = self.paged_turns = self.epochs = self.crowded_epochs = 0
        self.unpaged: Tally[str] = Tally()  # by what their paths are of
        self._bills: dict[str, Sums] = {}  # by model
        self._breaks: dict[str, tuple[int, int]] = {}  # of the provider's cache, by reason
        self._own = own = CollectorRegistry()
        requests = Counter(
            "llm_pager_requests", "Requests answered, by channel and class of status",
            ("channel", "status"), registry=own,
        )  # fmt: skip
        unpaged = Counter(
            "llm_pager_unpaged", "Requests passed on as they came: /v1/responses, /v1/messages, chat"
            " requests that could not be paged, others", ("path",), registry=own,
        )  # fmt: skip
        seconds = Histogram(
            "llm_pager_chat_seconds", "From the head of a chat request to the end of its answer",
            ("channel",), buckets=_SECONDS, registry=own,
        )  # fmt: skip
        tokens = Counter(
            "llm_pager_billed_tokens", "Tokens by upstream's usage, all rounds together; cached ones are"
            " prompt tokens, too", ("kind",), registry=own,
        )  # fmt: skip
        broken = Counter(
            "llm_pager_cache_breaks", "Turns for which upstream read again what it could have had in its cache",
            ("reason",), registry=own,
        )  # fmt: skip
        paged = Counter(
            "llm_pager_paged_billed_tokens", "Input of paged turns in tokens at the full price: billed, and"
            " what a sliding window and the whole history would have been", ("what",), registry=own,
        )  # fmt: skip
        self._broken = lru_cache(8)(broken.labels)
        self._sides = [paged.labels(what) for what in ("llm_pager", "sliding_window", "full_history")]
        read = Counter(
            "llm_pager_values_read", "Values that requests read from objects: L3 large ones, L4 of unused conversations",
            ("tier",), registry=own,
        )  # fmt: skip
        read_seconds = Counter(
            "llm_pager_values_read_seconds", "Seconds that these took, summed", ("tier",), registry=own
        )
        fault_seconds = Histogram(
            "llm_pager_fault_seconds", "Time to load a page that the model asked for, by the coldest tier that the"
            " request had read from", ("tier",), buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self._read_seconds = lru_cache(8)(read_seconds.labels)
        self._read, self._fault_seconds = lru_cache(8)(read.labels), lru_cache(8)(fault_seconds.labels)
        self._faults: dict[str, tuple[int, float]] = {}  # by tier: how many, milliseconds
        self._requests = lru_cache(64)(requests.labels)
        self._unpaged = lru_cache(8)(unpaged.labels)
        self._seconds = lru_cache(8)(seconds.labels)
        self._counters = [
            (f"{kind}_tokens", tokens.labels(kind)) for kind in ("prompt", "cached", "completion")
        ]
        self._counters += [
            (field, Counter(f"llm_pager_{name}", text, registry=own)) for field, name, text in _COUNTERS
        ]

    def count(self, visit: Visit) -> None:
        """One request whose answer has ended."""
        self._requests(visit.channel, f"{visit.status // 100}xx" if visit.status else "none").inc()
        if visit.channel == "unpaged":
            self._unpaged(visit.kind).inc()
            self.unpaged[visit.kind] += 1
        else:
            self._seconds(visit.channel).observe(visit.seconds)
        for field, counter in self._counters:
            if value := getattr(visit, field):
                counter.inc(value)
        for tier in _BELOW:
            if values := visit.reads.values[tier]:
                self._read(tier.value).inc(values)
                self._read_seconds(tier.value).inc(visit.reads.seconds[tier])

    def told(self, report: TurnReport) -> None:
        """Count one answered turn."""
        self.turns += 1
        if (billed := report.billed) is not None:
            model = billed.model if billed.model in self._bills or len(self._bills) < _MODELS else _OTHER
            self._bills[model] = self._bills.get(model, Sums(model)) + billed
            if billed.others is not None:
                for counter, tokens in zip(self._sides, (billed.ours, *billed.others), strict=True):
                    counter.inc(tokens.billed(billed.model))
        if (broke := report.broke) is not None:
            turns, lost = self._breaks.get(broke.reason, (0, 0))
            self._breaks[broke.reason] = turns + 1, lost + max(0, broke.lost_tokens)
            self._broken(broke.reason.value).inc()
        if report.channel == "bypass":
            return
        self.paged_turns += 1
        self.epochs += report.new_epoch
        self.crowded_epochs += report.crowded
        report.record(self.metrics)
        for fault in report.faults:
            count, ms = self._faults.get(tier := fault.tier.value, (0, 0.0))
            self._faults[tier] = count + 1, ms + fault.ms
            self._fault_seconds(tier).observe(fault.ms / 1000)

    def snapshot(self) -> dict[str, Any]:
        """For /vm/stats: JSON values, in a fixed order."""
        cache, lines = self._memory.cache, packed_lines()
        return {
            "turns": self.turns,
            "paged_turns": self.paged_turns,
            "epochs": self.epochs,
            "crowded_epochs": self.crowded_epochs,
            "unpaged": dict(sorted(self.unpaged.items())),
            "user_experience": self.metrics.snapshot(),
            "faults": {tier: {"count": count, "ms": round(ms / count, 1)} for tier, (count, ms) in sorted(self._faults.items())},
            "pack_cache": lines.model_dump(),
            "l1": {"values": len(cache), "tokens": cache.tokens, "hits": cache.hits,
                   "misses": cache.misses},
            "writer": {"written": self._writer.written, "failed": self._writer.failed,
                       "dropped": self._writer.dropped},
        }  # fmt: skip

    def bill(self) -> dict[str, Any]:
        """For /vm/bill, when it names no conversation: JSON values, no model's name."""
        return bill_of(self._bills.values(), self._breaks)

    def totals(self) -> dict[str, dict[str, float]]:
        """The counters of /metrics, by name and the value of their labels: of all workers since the start."""
        out: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(self.text().decode()):
            for sample in family.samples:
                name = sample.name.removeprefix("llm_pager_").removesuffix("_total")
                if family.type == "counter" and sample.value:
                    row, label = out.setdefault(name, {}), " ".join(sample.labels.values())
                    row[label] = row.get(label, 0.0) + sample.value
        return out

    def text(self) -> bytes:
        """For /metrics: Prometheus's text format; of all workers, where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._own)
        shared = CollectorRegistry()
        MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared)


def path_kind(path: str) -> str:
    """Of a request that is passed on: which API it is for, as far as that API has conversations."""
    segments = path.split("/")
    for kind in ("responses", "messages"):
        if kind in segments:
            return kind
    return "other"


def _count(usage: object, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value > 0 else 0


async def _nowhere(message: Message) -> None:
    """No answer of its own."""
