"""What the requests of all worker processes add up to, for Prometheus at GET /metrics.

Promises: numbers only, and labels of a fixed few values, so that neither a path nor a model nor a
tenant of anyone's shows or makes the table grow; right with several workers, whose numbers stand in
files of one directory (`PROMETHEUS_MULTIPROC_DIR`, which `llm-pager serve` makes); a count costs 0.4 µs,
with several workers 2 µs.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from proxy.api.visit import Visit

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside each counter doubles the page and says nothing


class Metrics:
    """One per process."""

    def __init__(self) -> None:
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
        self._requests = lru_cache(64)(requests.labels)
        self._unpaged = lru_cache(8)(unpaged.labels)
        self._seconds = lru_cache(8)(seconds.labels)
        self._prompt, self._cached, self._completion = map(
            tokens.labels, ("prompt", "cached", "completion")
        )
        self._rounds = Counter("llm_pager_rounds", "Calls of upstream for chat requests", registry=own)
        self._faults = Counter("llm_pager_faults", "Page faults of models", registry=own)
        self._searches = Counter("llm_pager_searches", "Searches of models", registry=own)
        self._epochs = Counter("llm_pager_epochs", "Windows rebuilt", registry=own)
        self._refusals = Counter(
            "llm_pager_upstream_refusals", "Answers of upstream to chat requests with a status of 400 or more",
            registry=own,
        )  # fmt: skip

    def count(self, visit: Visit) -> None:
        """One request whose answer has ended."""
        channel = visit.channel
        self._requests(channel, f"{visit.status // 100}xx" if visit.status else "none").inc()
        if channel == "unpaged":
            self._unpaged(visit.kind).inc()
        else:
            self._seconds(channel).observe(visit.seconds)
        if visit.prompt_tokens:
            self._prompt.inc(visit.prompt_tokens)
        if visit.cached_tokens:
            self._cached.inc(visit.cached_tokens)
        if visit.completion_tokens:
            self._completion.inc(visit.completion_tokens)
        if visit.rounds:
            self._rounds.inc(visit.rounds)
        if visit.faults:
            self._faults.inc(visit.faults)
        if visit.searches:
            self._searches.inc(visit.searches)
        if visit.epochs:
            self._epochs.inc(visit.epochs)
        if visit.refusals:
            self._refusals.inc(visit.refusals)

    def text(self) -> bytes:
        """The page in Prometheus's text format; of all workers, where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._own)
        shared = CollectorRegistry()
        MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared)
