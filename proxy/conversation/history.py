"""RAM's short cut to identity: which history does this body begin with?

Promises: an answer is exact (bytes are compared, not only hashed) and stays inside its scope (the
tenant); forgetting everything only costs time (invariant 9); the bytes kept are bounded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass

import xxhash

from proxy.conversation.tree import Anchor, Node

_SMALLEST = 6  # histories are keyed by their first 64, 128, 256 ... bytes
_BUCKET = 4  # how many histories with the same beginning are tried, newest first

_Key = tuple[bytes, int, bytes]


@dataclass(slots=True, eq=False)
class Known:
    """A history seen before: its bytes, where its messages end in them, and what they mean."""

    history: bytes
    ends: list[int]  # offset after each message, mid-conversation system messages included
    counts: list[int]  # how many nodes those messages make: counts[i] <= i + 1
    path: list[Node]  # from the root: only whole histories are kept
    anchors: list[Anchor]
    tenant: bytes  # whose path it is


class HistoryCache:
    """Least recently used histories, up to `limit_bytes` of them."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._buckets: dict[_Key, list[Known]] = {}
        self._keys: OrderedDict[int, tuple[Known, list[_Key]]] = OrderedDict()

    def clear(self) -> None:
        self._buckets.clear()
        self._keys.clear()
        self._bytes = 0

    def find(self, scope: bytes, body: bytes, start: int) -> tuple[Known, int] | None:
        """The history that shares most with body[start:], and how many whole messages it shares."""
        best: tuple[int, Known] | None = None
        for key in reversed(_keys_of(scope, body, start)):
            for known in reversed(self._buckets.get(key, ())):
                common = _common(known.history, body, start)
                if best is None or common > best[0]:
                    best = common, known
            if best is not None:
                break
        if best is None:
            return None
        shared = bisect_right(best[1].ends, best[0])
        if shared == 0:
            return None
        self._keys.move_to_end(id(best[1]))
        return best[1], shared

    def add(self, scope: bytes, known: Known, replaces: Known | None) -> None:
        """Keep a history; the one that it continues (`replaces`) is inside it and goes."""
        if replaces is not None and known.history.startswith(replaces.history):
            self.forget(replaces)
        size = len(known.history)
        if size > self._limit or size < 1 << _SMALLEST:
            return
        keys = _keys_of(scope, known.history, 0)
        for key in keys:
            bucket = self._buckets.setdefault(key, [])
            bucket.append(known)
            if len(bucket) > _BUCKET:
                del bucket[0]
        self._keys[id(known)] = known, keys
        self._bytes += size
        while self._bytes > self._limit:
            self.forget(next(iter(self._keys.values()))[0])

    def forget(self, known: Known) -> None:
        """Drop one history, if it is kept."""
        entry = self._keys.pop(id(known), None)
        if entry is None:
            return
        self._bytes -= len(known.history)
        for key in entry[1]:
            bucket = self._buckets.get(key, [])
            kept = [other for other in bucket if other is not known]
            if kept:
                self._buckets[key] = kept
            else:
                self._buckets.pop(key, None)


def _keys_of(scope: bytes, data: bytes, start: int) -> list[_Key]:
    """Keys of the first 64, 128, ... bytes from `start`, in one pass over them."""
    view = memoryview(data)[start:]
    hasher = xxhash.xxh3_128()
    keys: list[_Key] = []
    level, done = _SMALLEST, 0
    while 1 << level <= len(view):
        hasher.update(view[done : 1 << level])
        done = 1 << level
        keys.append((scope, level, hasher.digest()))
        level += 1
    return keys


def _common(history: bytes, body: bytes, start: int) -> int:
    """Length of the longest common beginning of `history` and body[start:], by bisection."""
    if body.startswith(history, start):
        return len(history)
    low, high = 0, min(len(history), len(body) - start)
    while low < high:  # invariant: the first `low` bytes agree, the first high + 1 do not
        middle = (low + high + 1) // 2
        if body.startswith(history[low:middle], start + low):
            low = middle
        else:
            high = middle - 1
    return low
