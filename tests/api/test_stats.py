"""Counts of what the turns reported: rates of real events, and no text of anyone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.api.memory import Memory
from proxy.api.renditions import Renditions
from proxy.api.stats import Stats
from proxy.api.writer import Writer
from proxy.config import load_config
from proxy.conversation.report import FaultReport, PrefetchReport, SearchReport, TurnReport
from proxy.upstream import make_upstream


@asynccontextmanager
async def stats_in(folder: Path) -> AsyncIterator[tuple[Stats, Memory]]:
    file = folder / "config.yaml"
    file.write_text(json.dumps({"tiers": {"l2": {"path": str(folder / "data")}}}))
    config = load_config(file, {}, {})
    memory, upstream = Memory(config), make_upstream(config)
    try:
        yield Stats(memory, Writer(config, upstream, Renditions(config, memory))), memory
    finally:
        await memory.close()
        await upstream.close()


def report(turn: int = 5, **changes: Any) -> TurnReport:
    made = TurnReport("gpt-secret", "tools", turn, budget_tokens=3000, used_tokens=1000, reachable_tokens=4000)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


async def test_rates_are_of_what_the_turns_reported(tmp_path: Path) -> None:
    async with stats_in(tmp_path) as (stats, _):
        faults = [FaultReport("msg_0001", 0, 70), FaultReport("msg_0002", 0, 50, refault=True),
                  FaultReport("msg_0003", 0, 0), FaultReport("msg_9999", 0, 0, "unknown page")]  # fmt: skip
        searches = [SearchReport("my secret", ["msg_0001"]), SearchReport("nothing", [])]
        brought = [PrefetchReport("msg_0004", "search", True), PrefetchReport("msg_0001", "recall")]
        stats.told(report(faults=faults, searches=searches, prefetched=brought, evicted_pages=["a", "b"], new_epoch=True))
        stats.told(report(6, used_tokens=3000, reachable_tokens=4000))
        stats.told(report(7, channel="bypass"))
        found = stats.snapshot()
    assert (found["turns"], found["paged_turns"], found["epochs"]) == (3, 2, 1)
    told = found["user_experience"]
    assert (told["recalls"], told["recalls_succeeded"]) == (6, 4)
    assert told["recall_success_rate"] == pytest.approx(4 / 6)
    assert (told["faults"], told["refaults"]) == (2, 1), "a page that was there already costs nothing"
    assert told["thrash_index"] == 0.5 and told["evictions"] == 2 and told["turns"] == 2
    assert told["effective_context"] == 2.0
    assert told["prefetch_hit_rates"] == {"recall": 0.0, "search": 1.0}
    assert found["prefetch"] == {"recall": {"prefetched": 1, "used": 0}, "search": {"prefetched": 1, "used": 1}}


async def test_stats_are_numbers_only(tmp_path: Path) -> None:
    async with stats_in(tmp_path) as (stats, _):
        for turn in range(200):
            brought = [PrefetchReport(f"msg_{turn:04d}", "search", True)]
            searches = [SearchReport(f"secret {turn}", ["msg_0001"])]
            stats.told(report(turn, prefetched=brought, searches=searches))
        text = json.dumps(stats.snapshot())
    assert "secret" not in text and "msg_" not in text and "gpt" not in text


async def test_what_is_in_ram_is_counted(tmp_path: Path) -> None:
    async with stats_in(tmp_path) as (stats, memory):
        memory.cache.put("record", b"x", "value", 12)
        memory.cache.get("record", b"x")
        found = stats.snapshot()
        tokens = memory.cache.tokens
    assert found["l1"] == {"values": 1, "tokens": tokens, "hits": 1, "misses": 0} and tokens > 0
    assert found["writer"] == {"written": 0, "failed": 0, "dropped": 0}
