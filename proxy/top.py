"""`llm-pager top`: what a running server does, as its /metrics and /vm/stats say it.

Promises: the server is asked for numbers only, and changed in nothing; figures are of all of its workers but for those of L1.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich.live import Live

from proxy.api.metrics import totals
from proxy.errors import StartError
from proxy.readable import share, short
from proxy.terminal import console, table, tell_json, tell_table

_TIMEOUT_S = 10.0
_SHOWN = 6  # labels of a row, the most frequent
_HEADS = "", "in all", "now", "of these"

Totals = dict[str, dict[str, float]]


def run(url: str, every_s: float, once: bool, as_json: bool) -> int:
    """Until Ctrl-C, or once where nobody watches. Raises StartError where no server answers."""
    url = url.rstrip("/").removesuffix("/v1")
    now, stats = _asked(url)
    if as_json:
        tell_json({"url": url, "totals": now, "stats": stats})
        return 0
    if once or not sys.stdout.isatty():
        tell_table(_HEADS, _rows(now, {}, 0, stats))
        return 0
    at_s = time.monotonic()
    try:
        with Live(table(_HEADS, _rows(now, {}, 0, stats)), console=console(), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                before, before_s = now, at_s
                (now, stats), at_s = _asked(url), time.monotonic()
                live.update(table(_HEADS, _rows(now, before, at_s - before_s, stats)), refresh=True)
    except KeyboardInterrupt:
        return 0


def _asked(url: str) -> tuple[Totals, dict[str, Any]]:
    try:
        with urlopen(f"{url}/metrics", timeout=_TIMEOUT_S) as metrics, urlopen(f"{url}/vm/stats", timeout=_TIMEOUT_S) as stats:
            return totals(metrics.read().decode()), json.loads(stats.read())
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise StartError(f"No llm-pager answers at {url} ({reason}); say where one is with --url.") from error


def _rows(now: Totals, before: Totals, seconds: float, stats: dict[str, Any]) -> list[list[str]]:
    """Of each figure: since the start, in a second of the last while, and what it is made of."""

    def total(name: str, label: str | None = None) -> float:
        return sum(now.get(name, {}).values()) if label is None else now.get(name, {}).get(label, 0.0)

    def row(title: str, name: str, told: str = "") -> list[str]:
        rate = "" if not seconds else f"{(total(name) - sum(before.get(name, {}).values())) / seconds:.1f}/s"
        return [title, short(total(name)), rate, told or _parts(now.get(name, {}))]

    def mean(title: str, name: str) -> list[str]:
        count = total(f"{name}_count")
        return [title, f"{total(f'{name}_sum') / count:.2f} s" if count else "–", "", "mean since the start"]

    prompt, billed = total("billed_tokens", "prompt"), total("paged_billed_tokens", "llm_pager")
    others = [f"{title} {short(total('paged_billed_tokens', side))} ({total('paged_billed_tokens', side) / billed:.1f}×)"
              for side, title in (("sliding_window", "sliding window"), ("full_history", "history")) if billed]  # fmt: skip
    l1 = stats["l1"]
    return [
        row("requests", "requests"),
        row("upstream calls", "rounds", f"{short(total('upstream_refusals'))} refused"),
        mean("first token", "first_token_seconds"),
        row("windows rebuilt", "epochs"),
        row("pages out", "evicted_pages"),
        row("evidence shown", "evidence_pages", f"{short(total('evidence_used_pages'))} pages used, {share(total('evidence_used_pages'), total('evidence_pages'))}"),
        row("page faults", "faults"),
        row("searches", "searches", f"{short(total('refaults'))} faults for what had left lately"),
        ["prompt tokens", short(prompt), "", f"{share(total('billed_tokens', 'cached'), prompt)} from the provider's cache"],
        row("cache breaks", "cache_breaks"),
        ["billed when paged", short(billed), "", ", ".join(others) or "–"],
        row("not paged", "unpaged"),
        ["L1 hits", share(l1["hits"], l1["hits"] + l1["misses"]), "", f"{short(l1['tokens'])} tokens in RAM (of one worker)"],
        ["waiting jobs", short(total("queue")), "", _parts(now.get("queue", {}))],
        row("not remembered", "memory_lost", f"{short(total('damaged_values'))} damaged values met"),
    ]  # fmt: skip


def _parts(row: dict[str, float]) -> str:
    most = sorted(row.items(), key=lambda part: -part[1])[:_SHOWN]
    return ", ".join(f"{label} {short(count)}" for label, count in most if label)
