"""Tier L1: decoded records, windows and page tables in RAM. Only a cache.

Promises: least recently used things go first, bounded in tokens (or by the largest single value,
where that is more); losing any of it at any moment changes no later prompt, only the time until it
is there again (invariant 9).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

BYTES_PER_TOKEN = 4  # how bytes in RAM are charged against tiers.l1.tokens


class Cache:
    """Values by kind and id, each with a weight in tokens."""

    def __init__(self, limit_tokens: int) -> None:
        self._values: OrderedDict[tuple[str, bytes], tuple[Any, int]] = OrderedDict()  # the newest last, with its weight
        self._limit_tokens = limit_tokens
        self.tokens = 0  # what is charged now; a value larger than the limit counts as the limit
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()  # a long conversation's state is read in another thread

    def __len__(self) -> int:
        return len(self._values)

    def get(self, kind: str, key: bytes) -> Any:
        """The value, or None."""
        with self._lock:
            found = self._values.get((kind, key))
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end((kind, key))
            return found[0]

    def take(self, kind: str, key: bytes) -> Any:
        """The value, which leaves the cache: for what its user is going to change."""
        with self._lock:
            found = self._values.pop((kind, key), None)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self.tokens -= found[1]
            return found[0]

    def put(self, kind: str, key: bytes, value: Any, size_bytes: int) -> None:
        """Keep a value; the newest is kept even when it alone is larger than the limit."""
        weight = min(size_bytes // BYTES_PER_TOKEN + 1, self._limit_tokens)
        with self._lock:
            before = self._values.pop((kind, key), None)
            self._values[kind, key] = value, weight
            self.tokens += weight - (before[1] if before is not None else 0)
            while self.tokens > self._limit_tokens:
                self.tokens -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self.tokens = 0
