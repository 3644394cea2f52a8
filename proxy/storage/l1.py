"""Tier L1: decoded records, windows and page tables in RAM. Only a cache.

Promises: least recently used things go first, bounded in tokens (or by the largest single value,
where that is more); losing any of it at any moment changes no later prompt, only the time until it
is there again (invariant 9).
"""

from __future__ import annotations

import threading
from operator import itemgetter
from typing import Any

from cachetools import LRUCache

BYTES_PER_TOKEN = 4  # how bytes in RAM are charged against tiers.l1.tokens


class Cache:
    """Values by kind and id, each with a weight in tokens."""

    def __init__(self, limit_tokens: int) -> None:
        self._values: LRUCache[tuple[str, bytes], tuple[Any, int]]
        self._values = LRUCache(limit_tokens, itemgetter(1))
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()  # a long conversation's state is read in another thread

    def __len__(self) -> int:
        return len(self._values)

    @property
    def tokens(self) -> int:
        """What is charged now; a value larger than the limit counts as the limit."""
        return int(self._values.currsize)

    def get(self, kind: str, key: bytes) -> Any:
        """The value, or None."""
        with self._lock:
            return self._counted(self._values.get((kind, key)))

    def take(self, kind: str, key: bytes) -> Any:
        """The value, which leaves the cache: for what its user is going to change."""
        with self._lock:
            return self._counted(self._values.pop((kind, key), None))

    def put(self, kind: str, key: bytes, value: Any, size_bytes: int) -> None:
        """Keep a value; the newest is kept even when it alone is larger than the limit."""
        weight = min(size_bytes // BYTES_PER_TOKEN + 1, int(self._values.maxsize))
        with self._lock:
            self._values[kind, key] = value, weight

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def _counted(self, found: tuple[Any, int] | None) -> Any:
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        return found[0]
