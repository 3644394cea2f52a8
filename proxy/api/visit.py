"""One client request from its head to the end of its answer: what is said of it, and to whom; and what all
of them add up to, for Prometheus at GET /metrics.

Promises: every answer says in `x-llm-pager-channel` whether it was paged, streams in their first head;
one line a request is logged, which holds counts and names, never content, queries or credentials. The
metrics are numbers, with labels of a fixed few values (a model's is the name or glob that `models` of the configuration
has for it), so that neither a path nor a model nor a tenant of anyone's shows or makes the table grow
(docs/observability.md lists them).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CONTENT_TYPE_LATEST

from proxy import keys
from proxy.api.bill import bill_of
from proxy.api.http import Message, Scope, Send, raw_path
from proxy.api.memory import Memory
from proxy.api.metrics import FLUSH_S, Metrics, totals
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

if TYPE_CHECKING:  # an extra
    from proxy.api.tracing import Trace

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
_STEP_SECONDS: Final = (0.001, 0.003, *_SECONDS)
_FILLS: Final = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0)
_COUNTERS: Final = (  # a visit's field, the counter's name, what it counts
    ("rounds", "rounds", "Calls of upstream for chat requests that were answered"),
    ("searches", "searches", "Searches of models"),
    ("crowded", "crowded_epochs", "Windows rebuilt that are too small for their traffic: nearly each request rebuilds them"),
    ("memory_lost", "memory_lost", "Answers that could not be remembered, because of the storage"),
    ("refusals", "upstream_refusals", "Answers of upstream to chat requests with a status of 400 or more"),
)
_SIDES: Final = ("llm_pager", "sliding_window", "full_history")
_TOKENS: Final = ("prompt", "cached", "completion")


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
        self.first_s = 0.0  # of a streamed answer: from the head of the request to the first bytes of the body
        self.path = raw_path(scope)
        self.channel = "unpaged"
        self.kind = "other"  # of what is not paged: responses | messages | chat | other
        self.conversation = ""
        self.model = ""
        self.rounds = self.faults = self.searches = self.epochs = self.crowded = self.refusals = 0
        self.reads = READS.get() or Reads()
        self.fault_tiers = ""  # each fault's, and its milliseconds
        self.memory_lost = 0  # 1: the answer cannot be remembered
        self.trace: Trace | None = None  # where there is somebody to tell
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
        elif not self.first_s and message.get("more_body") and message.get("body"):
            self.first_s = time.perf_counter() - self.started_s
        return self._send(message)

    # -- what is learned on the way

    def placed(self, model: str, root: bytes) -> None:
        """A chat request found its conversation; `root`: the id of its first node, which is keyed."""
        short = model[:_PATH_CHARS]  # a client's text, on one line of a log
        self.model = short if short.isprintable() else "".join(c if c.isprintable() else "?" for c in short)
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
        if self.trace is not None:
            line["trace_id"] = self.trace.id
        if self.memory_lost:
            line["memory"] = "lost"
        if self.channel != "unpaged" or self.refusals:
            line.update((name, value) for name in _COUNTED if (value := getattr(self, name)))
        if self.fault_tiers:
            line["fault_tiers"] = self.fault_tiers
        for tier in _BELOW:
            if values := self.reads.values.get(tier):
                line[f"{tier.value}_reads"], line[f"{tier.value}_ms"] = values, round(self.reads.seconds[tier] * 1000, 1)
        log.info("%s", line, extra={"fields": line})


class Stats:
    """What all requests of this process add up to, in numbers only, so that any tenant's may be counted
    (invariant 6): JSON at GET /vm/stats, Prometheus's text at GET /metrics. One per process."""

    def __init__(
        self, memory: Memory, writer: Writer, model_class: Callable[[str], str] = lambda model: "other",
    ) -> None:
        """`model_class`: a model's, of a bounded number."""
        self._memory = memory
        self._writer = writer
        self.metrics = UserExperienceMetrics()
        self.turns = self.paged_turns = self.epochs = self.crowded_epochs = 0
        self.unpaged: Tally[str] = Tally()  # by what their paths are of
        self._bills: dict[str, Sums] = {}  # by model
        self._breaks: dict[str, tuple[int, int]] = {}  # of the provider's cache, by reason
        self._faults: dict[str, tuple[int, float]] = {}  # by tier: how many, milliseconds
        self._class = lru_cache(1024)(model_class)
        self._erased: Mapping[str, int] = {}
        self.prometheus = made = Metrics()
        count, spread = made.count, made.spread
        self._requests = count(
            "requests", "Requests answered, by channel, model and class of status", "channel", "model", "status"
        )
        self._unpaged = count(
            "unpaged", "Requests passed on as they came: /v1/responses, /v1/messages, chat requests that could not be"
            " paged, others", "path",
        )  # fmt: skip
        self._seconds = spread("chat_seconds", "From the head of a chat request to the end of its answer", _SECONDS, "channel")
        self._first = spread(
            "first_token_seconds", "From the head of a chat request to the first bytes of its streamed answer", _SECONDS,
            "channel",
        )  # fmt: skip
        self._steps = spread(
            "step_seconds", "What requests wait for: upstream (a round, to the end of its answer), commit (of a turn), search,"
            " load (of a page)", _STEP_SECONDS, "step",
        )  # fmt: skip
        self._fill = spread("window_fill", "Of the window's tokens those that a paged turn's last request took", _FILLS)
        self._tokens = count(
            "billed_tokens", "Tokens by upstream's usage, all rounds together; cached ones are prompt tokens, too", "kind"
        )
        self._broken = count(
            "cache_breaks", "Turns for which upstream read again what it could have had in its cache", "reason"
        )
        self._sides = count(
            "paged_billed_tokens", "Input of paged turns in tokens at the full price: billed, and what a sliding window"
            " and the whole history would have been", "what",
        )  # fmt: skip
        self._faulted = count("faults", "Page faults of models, by reason (or resident, failed) and tier", "reason", "tier")
        self._refaults = count("refaults", "Page faults for what had left the window only lately")
        self._epochs = count("epochs", "Windows rebuilt, by cause: first, full, rewritten, pinned, round", "cause")
        self._evicted = count("evicted_pages", "Pages that left windows when they were rebuilt")
        self._shown = count("evidence_pages", "Pages shown unasked, in front of a question")
        self._used = count("evidence_used_pages", "Of these pages those that the answer took something from")
        self._read = count(
            "values_read", "Values that requests read from objects: L3 large ones, L4 of unused conversations", "tier"
        )
        self._read_seconds = count("values_read_seconds", "Seconds that these took, summed", "tier")
        self._fault_seconds = spread(
            "fault_seconds", "Time to load a page that the model asked for, by the coldest tier that the request had"
            " read from", _SECONDS, "tier",
        )  # fmt: skip
        self._damaged = count("damaged_values", "Damaged values that were met, by kind", "kind")
        self._losses = count("store_losses", "Times that another store, or an older one, stood where this one was")
        self._erasures = count("erasures", "Erasures that this process finished, by who asked", "by")
        self._counters = [(field, count(name, text)) for field, name, text in _COUNTERS]
        for counter in (self._refaults, self._evicted, self._shown, self._used, self._losses, *(c for _, c in self._counters)):
            counter(0)
        for metric, values in ((self._damaged, keys.KINDS.values()), (self._tokens, _TOKENS), (self._sides, _SIDES)):
            for value in values:
                metric(0, value)
        # They are told before their first event: what increases from nothing is not seen.

    def watch(self, queues: Callable[[], Mapping[str, float]], erased: Mapping[str, int]) -> None:
        """What others count: jobs in `queues`, and erasures by who asked."""
        self.prometheus.gauge("queue", "Jobs that wait: pool, writer, decoders, embedder (pages)", "queue", queues)
        self._erased = erased

    def took(self, step: str, seconds: float) -> None:
        """A step of a request."""
        self._steps(seconds, step)

    def count(self, visit: Visit) -> None:
        """One request whose answer has ended."""
        model = self._class(visit.model) if visit.model else "none"
        self._requests(1, visit.channel, model, f"{visit.status // 100}xx" if visit.status else "none")
        if visit.channel == "unpaged":
            self._unpaged(1, visit.kind)
            self.unpaged[visit.kind] += 1
        else:
            self._seconds(visit.seconds, visit.channel)
            if visit.first_s:
                self._first(visit.first_s, visit.channel)
        for field, counter in self._counters:
            if value := getattr(visit, field):
                counter(value)
        for kind, tokens in zip(_TOKENS, (visit.prompt_tokens, visit.cached_tokens, visit.completion_tokens), strict=True):
            if tokens:
                self._tokens(tokens, kind)
        if visit.reads.values:
            for tier in _BELOW:
                if values := visit.reads.values.get(tier):
                    self._read(values, tier.value)
                    self._read_seconds(visit.reads.seconds[tier], tier.value)

    def told(self, report: TurnReport) -> None:
        """Count one answered turn."""
        self.turns += 1
        if (billed := report.billed) is not None:
            model = billed.model if billed.model in self._bills or len(self._bills) < _MODELS else _OTHER
            self._bills[model] = self._bills.get(model, Sums(model)) + billed
            if billed.others is not None:
                for what, tokens in zip(_SIDES, (billed.ours, *billed.others), strict=True):
                    self._sides(tokens.billed(billed.model), what)
        if (broke := report.broke) is not None:
            turns, lost = self._breaks.get(broke.reason, (0, 0))
            self._breaks[broke.reason] = turns + 1, lost + max(0, broke.lost_tokens)
            self._broken(1, broke.reason.value)
        if report.channel == "bypass":
            return
        self.paged_turns += 1
        self.crowded_epochs += report.crowded
        report.record(self.metrics)
        if report.budget_tokens:
            self._fill(report.used_tokens / report.budget_tokens)
        if report.new_epoch:
            self.epochs += 1
            self._epochs(1, report.epoch_cause)
            self._evicted(len(report.evicted_pages))
        if report.prefetched_pages:
            self._shown(len(report.prefetched_pages))
            self._used(report.prefetched_used)
        for fault in report.faults:
            count, ms = self._faults.get(tier := fault.tier.value, (0, 0.0))
            self._faults[tier] = count + 1, ms + fault.ms
            self._fault_seconds(fault.ms / 1000, tier)
            self._faulted(1, fault.reason, tier)
            self._refaults(fault.refault)

    def flush(self) -> None:
        """Hand on what was counted, for `text`."""
        for kind, times in self._memory.store.damaged.items():
            self._damaged.reaches(times, kind)
        for by, times in self._erased.items():
            self._erasures.reaches(times, by)
        self._losses.reaches(self._memory.store.losses)
        self.prometheus.flush()

    async def keep_flushing(self) -> None:
        """Other workers tell what is counted here, and threads."""
        while True:
            self.flush()
            await asyncio.sleep(FLUSH_S)

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
        """`totals` of /metrics: of all workers since the start, as they were half a second ago. Blocks; from any thread."""
        return totals(self.prometheus.text().decode())


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
