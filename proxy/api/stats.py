"""What this process's memory has done: counts for operators, and no text of anyone.

Promises: numbers only, so any tenant's request may be counted (invariant 6); fed by real turns;
bounded.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from proxy.api.memory import Memory
from proxy.api.visit import Visit
from proxy.api.writer import Writer
from proxy.conversation.pages import packed_lines
from proxy.conversation.report import TurnReport
from proxy.memory.metrics import UserExperienceMetrics


class Stats:
    """One per process."""

    def __init__(self, memory: Memory, writer: Writer) -> None:
        self._memory = memory
        self._writer = writer
        self.metrics = UserExperienceMetrics()
        self.turns = 0
        self.paged_turns = 0
        self.epochs = 0
        self.unpaged: Counter[str] = Counter()  # by what their paths are of

    def seen(self, visit: Visit) -> None:
        """Count a request that went up as it came."""
        if visit.channel == "unpaged":
            self.unpaged[visit.kind] += 1

    def told(self, report: TurnReport) -> None:
        """Count one answered turn."""
        self.turns += 1
        if report.channel == "bypass":
            return
        self.paged_turns += 1
        self.epochs += report.new_epoch
        report.record(self.metrics)

    def snapshot(self) -> dict[str, Any]:
        """JSON values, in a fixed order."""
        cache, lines = self._memory.cache, packed_lines()
        return {
            "turns": self.turns,
            "paged_turns": self.paged_turns,
            "epochs": self.epochs,
            "unpaged": dict(sorted(self.unpaged.items())),
            "user_experience": self.metrics.snapshot(),
            "prefetch": {
                source: counts.model_dump()
                for source, counts in sorted(self.metrics.prefetch.items())
            },
            "pack_cache": lines.model_dump(),
            "l1": {"values": len(cache), "tokens": cache.tokens, "hits": cache.hits,
                   "misses": cache.misses},
            "writer": {"written": self._writer.written, "failed": self._writer.failed,
                       "dropped": self._writer.dropped},
        }  # fmt: skip
