"""Counters, histograms and gauges in Prometheus's terms, that cost a request next to nothing.

Promises: a count is one entry of a dict until `flush`, which hands it to prometheus-client: one of its own costs 2 µs, an
observation 6 µs, where several workers keep them in files (`PROMETHEUS_MULTIPROC_DIR`, which `llm-pager serve` makes).
What any of these workers tells is true of all, but for what they counted in the last `FLUSH_S`; a dead one's counts stay,
its gauges go. All of one event loop's thread but `text`.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

import prometheus_client as prometheus
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.parser import text_string_to_metric_families

FLUSH_S: Final = 0.5
_DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own

prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside each counter doubles the page and says nothing


class Count:
    """A counter. Call it with a number and the values of its labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: prometheus.CollectorRegistry) -> None:
        counter = prometheus.Counter(name, text, labels, registry=registry)
        self._of: Callable[..., prometheus.Counter] = lru_cache(1024)(counter.labels) if labels else lambda: counter
        self._new: dict[tuple[str, ...], float] = {}
        self._told: dict[tuple[str, ...], float] = {}

    def __call__(self, value: float, *labels: str) -> None:
        new = self._new
        new[labels] = new.get(labels, 0.0) + value

    def reaches(self, total: float, *labels: str) -> None:
        """What somebody else counts has come to `total`."""
        if (more := total - self._told.get(labels, 0.0)) > 0:
            self._told[labels] = total
            self(more, *labels)

    def flush(self) -> None:
        new, self._new = self._new, {}
        for labels, value in new.items():
            self._of(*labels).inc(value)


class Spread:
    """A histogram. Call it with a number and the values of its labels."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: prometheus.CollectorRegistry
    ) -> None:
        histogram = prometheus.Histogram(name, text, labels, buckets=bounds, registry=registry)
        self._of: Callable[..., prometheus.Histogram] = lru_cache(1024)(histogram.labels) if labels else lambda: histogram
        self._bounds = bounds
        self._new: dict[tuple[str, ...], list[float]] = {}

    def __call__(self, value: float, *labels: str) -> None:
        if (new := self._new.get(labels)) is None:
            new = self._new[labels] = [0.0] * (len(self._bounds) + 2)
        new[bisect_left(self._bounds, value)] += 1
        new[-1] += value

    def flush(self) -> None:
        new, self._new = self._new, {}
        for labels, (*buckets, total) in new.items():
            histogram = self._of(*labels)
            histogram._sum.inc(total)
            for bucket, count in zip(histogram._buckets, buckets, strict=True):
                if count:
                    bucket.inc(count)


class Metrics:
    """All of one process."""

    def __init__(self) -> None:
        self._own = prometheus.CollectorRegistry()
        self._all: list[Count | Spread] = []
        self._gauges: list[tuple[prometheus.Gauge, Callable[[], Mapping[str, float]]]] = []

    def count(self, name: str, text: str, *labels: str) -> Count:
        self._all.append(made := Count(f"llm_pager_{name}", text, labels, self._own))
        return made

    def spread(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> Spread:
        self._all.append(made := Spread(f"llm_pager_{name}", text, labels, bounds, self._own))
        return made

    def gauge(self, name: str, text: str, label: str, now: Callable[[], Mapping[str, float]]) -> None:
        """`now` says, by the label's value, what there is."""
        made = prometheus.Gauge(f"llm_pager_{name}", text, (label,), registry=self._own, multiprocess_mode="livesum")
        self._gauges.append((made, now))

    def flush(self) -> None:
        for one in self._all:
            one.flush()
        for gauge, now in self._gauges:
            for label, value in now().items():
                gauge.labels(label).set(value)

    def text(self) -> bytes:
        """Prometheus's text format, of all workers. Blocks; from any thread."""
        directory = os.environ.get(_DIRECTORY)
        if directory is None:
            return prometheus.generate_latest(self._own)
        for pid in {int(file.stem.rpartition("_")[2]) for file in Path(directory).glob("gauge_live*.db")}:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                with suppress(FileNotFoundError):  # another worker has seen it, too
                    mark_process_dead(pid)  # type: ignore[no-untyped-call]
        shared = prometheus.CollectorRegistry()
        MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return prometheus.generate_latest(shared)


def totals(text: str) -> dict[str, dict[str, float]]:
    """What a page of /metrics says, by name and the values of the labels, a model's left out: counters (without `_total`),
    gauges, of histograms the sum and the count; zeros are left out."""
    out: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("llm_pager_").removesuffix("_total")
            if sample.value and not name.endswith("_bucket"):
                row, label = out.setdefault(name, {}), " ".join(v for k, v in sample.labels.items() if k != "model")
                row[label] = row.get(label, 0.0) + sample.value
    return out
