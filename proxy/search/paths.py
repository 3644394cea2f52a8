"""The search index of each conversation path that is in use, by words and, where an encoder is given, by
meaning. Derived: it can be rebuilt any time. What is known by words is stored in pieces of 512 messages, each under the
key of its last message, so that a long conversation's first search after a restart reads them and not its text.

Promises: an index holds the pages of one path only, whichever branch asks (invariant 6); the pages
kept over all paths are bounded. Those of conversations that rest are packed: a tenth of the RAM, and opened again in
a third of the time in which they would be made again.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING

import msgspec
import zstandard

from proxy.memory.ids import Doc, Hit
from proxy.memory.questions import Query
from proxy.search.fts import QUERIES, PageIndex
from proxy.search.fusion import fuse, merge
from proxy.search.related import related
from proxy.search.terms import languages_of, tokenizer

if TYPE_CHECKING:  # an extra
    from proxy.search.vectors import Encoder, Vector, VectorIndex

_BRANCHES = 4  # indexes kept for branches of one conversation
_INDEX_PAGES = 1  # what an empty index weighs, in pages
_STEP_BACK = 8  # messages an index is cut by before another branch gets an index of its own
_LIVE_SHARE = 10  # of the limit's pages, 1/10 are kept unpacked, those that were asked last
_PACKED_AT_ONCE = 256  # pages: a larger index is not packed, which would take more than some ms
_FUSED = 200  # hits by words that a ranking by meaning is fused with

_PIECE = 512  # messages that are stored together
_LONG = 4096  # messages: a shorter path's are read again, sooner than their pieces would pay for half of the text's size
_FRESH = 64  # messages, the newest, that are not stored yet: they may still be said otherwise

GetPiece = Callable[[bytes], bytes | None]
Queries = str | Sequence[str | Query]  # as `PageIndex.search` takes them
DocsOf = Callable[[int, int], Iterable[Doc]]


def make_encoder(embeddings: str) -> Encoder | None:
    """The encoder of `search.embeddings` that is here, not upstream. ImportError without its extra."""
    if embeddings != "static":
        return None
    from proxy.search.static import static_encoder

    return static_encoder()


def piece_version(page_tokens: int) -> bytes:
    """What else a stored piece depends on: where pages are cut, and what words are matched by."""
    words = tokenizer().sequence("Running walkers' studies, naïve Größe, 東京で3.5 km: e-mail_1 ЁЛКИ cafés généralement.")
    return repr((1, page_tokens, sys.byteorder, words)).encode()


class _Branch:
    """The indexes of a path and the keys of the messages whose pages they hold."""

    def __init__(self) -> None:
        self.index = PageIndex()
        self.pages = 0  # in it
        self.packed: bytes | None = None  # the index, where it rests
        self.vectors: VectorIndex | None = None
        self.ids: list[bytes] = []  # of what was loaded the last of each piece alone, the others b""
        self.loaded = 0  # messages
        self.stored = 0  # messages, in whole pieces
        self.lock = threading.Lock()

    @property
    def weight(self) -> int:
        """What it counts against the limit, in pages."""
        vectors = self.vectors.weight if self.vectors is not None else 0
        return self.pages + vectors + _INDEX_PAGES

    def pack(self) -> None:
        """Let the index rest, unless somebody has it in his hands."""
        if not self.lock.acquire(blocking=False):
            return
        if self.packed is None:
            packed = zstandard.ZstdCompressor(1).compress(self.index.store(0, sys.maxsize))
            self.packed = bytes(memoryview(packed))  # a copy: what the compressor gives has room for all that it read
            self.index = PageIndex()
        self.lock.release()

    def open(self) -> None:
        """Have the index at hand."""
        if self.packed is not None:
            self.index.load(zstandard.ZstdDecompressor().decompress(self.packed))
            self.packed = None

    def common(self, ids: Sequence[bytes]) -> int:
        """How many messages of the path it has."""
        loaded = self.loaded
        while loaded and (loaded > len(ids) or self.ids[loaded - 1] != ids[loaded - 1]):
            loaded -= _PIECE
        return _common(self.ids, ids, loaded) if loaded == self.loaded else loaded

    def load(self, ids: Sequence[bytes], get: GetPiece) -> None:
        """Bring it to what is stored of the path."""
        while self.stored + _PIECE <= len(ids) and self.stored == len(self.ids):
            key = ids[self.stored + _PIECE - 1]
            piece = get(key)
            if piece is None:
                break
            try:
                self.index.load(piece)
            except msgspec.DecodeError:  # damaged: a miss
                break
            self.ids += [*repeat(b"", _PIECE - 1), key]
            self.stored = self.loaded = len(self.ids)

    def due(self) -> Iterator[tuple[bytes, bytes]]:
        """What of it can be stored: the messages that hardly change any more."""
        while len(self.ids) >= max(_LONG, self.stored + _PIECE + _FRESH):
            first, self.stored = self.stored, self.stored + _PIECE
            yield self.ids[self.stored - 1], self.index.store(first, self.stored)

    def follow(self, ids: Sequence[bytes], docs: DocsOf, encoder: Encoder | None) -> None:
        """Bring it to the path."""
        same = self.common(ids)
        if same < len(self.ids):
            self.index.truncate(same)
            del self.ids[same:]
            self.loaded, self.stored = min(self.loaded, same), min(self.stored, same // _PIECE * _PIECE)
            if self.vectors is not None:
                self.vectors.truncate(same)
        new = list(docs(same, len(ids))) if same < len(ids) else []
        if encoder is not None:
            self._encode(ids, docs, encoder, new, same)
        self.index.extend(new)
        self.pages = len(self.index)
        self.ids.extend(ids[same:])  # last: who sees them will not wait for this

    def _encode(
        self, ids: Sequence[bytes], docs: DocsOf, encoder: Encoder, new: list[Doc], first: int
    ) -> None:
        """Bring the vectors to the path, of which `new` are the pages from message `first` on."""
        if self.vectors is None:
            from proxy.search.vectors import VectorIndex

            self.vectors = VectorIndex()
        due = self.vectors.due(encoder)
        if due < len(ids):
            self.vectors.extend(new if due == first else list(docs(due, len(ids))), len(ids), encoder)

    def asked(self, queries: Queries) -> list[str]:
        """What is to be encoded of each query: not the names of the speakers."""
        return [self.index.prior(query)[0] for query in _each(queries)]

    def nearest(self, queries: Queries, vectors: Sequence[Vector | None]) -> list[Hit]:
        """The pages of the path by meaning, best first."""
        asked = zip(_each(queries), vectors, strict=True)
        found, index = self.vectors, self.index
        return merge([found.nearest(v, index.prior(q)[1]) for q, v in asked if found and v is not None])


class PathIndexes:
    """Indexes by conversation, least recently used ones dropped above `limit_pages` pages."""

    def __init__(self, limit_pages: int, encoder: Encoder | None = None, get: GetPiece | None = None) -> None:
        self._limit = limit_pages
        self._get = get
        self._due: list[tuple[bytes, bytes]] = []
        self._encoder = encoder
        self._roots: OrderedDict[bytes, list[_Branch]] = OrderedDict()
        self._pages = 0
        self._live: OrderedDict[_Branch, int] = OrderedDict()  # pages of those that are not packed, the last asked last
        self._live_pages = 0
        self._lock = threading.Lock()
        languages_of(), related("")  # what takes its time once in a process takes it before the first request

    def search(
        self,
        ids: Sequence[bytes],
        docs: DocsOf,
        queries: Queries,
        limit: int,
        skip: Callable[[int, int], bool] | None,
        seen_s: Callable[[int], int] | None = None,
        near: Sequence[Hit] = (),
        least: Callable[[float], float] | None = None,
    ) -> list[Hit]:
        """The best pages of the path with the keys `ids` (each names all before it); `docs(first, last)`
        gives new pages; `near` are the pages by meaning, where their vectors are not the encoder's own; the
        rest is as `PageIndex.search` takes it.

        Blocks while it indexes; may be called from any thread.
        """
        if not ids:
            return []
        with self._followed(ids, docs, self._encoder) as branch:
            if self._encoder is not None:
                near = branch.nearest(queries, self._encoder.encode(branch.asked(queries)))
            near = [hit for hit in near if skip is None or not skip(hit.position, hit.part)]
            wide = max(limit, _FUSED) if near else limit
            hits = branch.index.search(queries, wide, skip, seen_s, None if near else least)
        return fuse(hits, near)[:limit]

    def asked(self, ids: Sequence[bytes], docs: DocsOf, queries: Queries) -> list[str]:
        """What is to be encoded of each query about that path."""
        with self._followed(ids, docs, None) as branch:
            return branch.asked(queries)

    def nearest(
        self, ids: Sequence[bytes], docs: DocsOf, queries: Queries, vectors: Sequence[Vector], encoder: Encoder
    ) -> list[Hit]:
        """The pages of the path by meaning, best first: of the queries' vectors, with the encoder's of pages."""
        with self._followed(ids, docs, encoder) as branch:
            return branch.nearest(queries, vectors)

    def missing(self, ids: Sequence[bytes]) -> int:
        """How many messages of the path the nearest index lacks; all, while another thread has one of that
        conversation in its hands, which who searches would wait for."""
        with self._lock:
            branches = self._roots.get(ids[0], ())
            held = any(branch.lock.locked() for branch in branches)
            best = 0 if held else max((branch.common(ids) for branch in branches), default=0)
        return len(ids) - best

    def due(self, owner: bytes = b"") -> list[tuple[bytes, bytes]]:
        """Pieces of a conversation's indexes, by the key of their last message, that are to be stored: they are what
        `get` gives. `owner`: what its keys begin with."""
        with self._lock:
            due = [piece for piece in self._due if piece[0].startswith(owner)]
            self._due = [piece for piece in self._due if not piece[0].startswith(owner)]
        return due

    def clear(self) -> None:
        with self._lock:
            self._roots.clear()
            self._live.clear()
            self._due.clear()
            self._pages = self._live_pages = 0

    @contextmanager
    def _followed(
        self, ids: Sequence[bytes], docs: DocsOf, encoder: Encoder | None
    ) -> Iterator[_Branch]:
        """The index of that path, up to date and held."""
        branch = self._branch(ids)
        with branch.lock:
            weight = branch.weight
            branch.open()
            if self._get is not None and not branch.ids:
                branch.load(ids, self._get)
            branch.follow(ids, docs, encoder)
            if self._get is not None:
                self._due += branch.due()
            grown = branch.weight - weight
            yield branch
        for resting in self._trim(branch, grown):
            resting.pack()

    def _branch(self, ids: Sequence[bytes]) -> _Branch:
        """The index nearest to this path, or a new one rather than undoing another branch's."""
        with self._lock:
            branches = self._roots.setdefault(ids[0], [])
            self._roots.move_to_end(ids[0])
            near = [(branch.common(ids), branch) for branch in branches]
            usable = [n for n in near if len(n[1].ids) - n[0] <= _STEP_BACK]
            if usable:
                best = max(usable, key=lambda n: n[0])[1]
                branches.remove(best)
            else:
                if len(branches) == _BRANCHES:
                    self._drop(branches.pop(0))
                best = _Branch()
                self._pages += best.weight
            branches.append(best)
            return best

    def _trim(self, asked: _Branch, grown: int) -> list[_Branch]:
        """Keep to the limits. Returns what is to be packed: that takes its time."""
        with self._lock:
            self._pages += grown
            self._live_pages += asked.pages - self._live.pop(asked, 0)
            self._live[asked] = asked.pages
            while self._pages > self._limit and len(self._roots) > 1:
                for branch in self._roots.popitem(last=False)[1]:
                    self._drop(branch)
            resting: list[_Branch] = []
            while self._live_pages > self._limit // _LIVE_SHARE and len(self._live) > 1:
                branch, pages = self._live.popitem(last=False)
                self._live_pages -= pages
                if pages <= _PACKED_AT_ONCE:
                    resting.append(branch)
            return resting

    def _drop(self, branch: _Branch) -> None:
        self._pages -= branch.weight
        self._live_pages -= self._live.pop(branch, 0)


def _each(queries: Queries) -> list[str]:
    """What each of them asks: its context would make it like everything else."""
    several = [queries] if isinstance(queries, str) else queries[:QUERIES]
    return [query if isinstance(query, str) else query.text for query in several]


def _common(have: Sequence[bytes], wanted: Sequence[bytes], low: int = 0) -> int:
    """Length of the common beginning. An id names all before it, so bisection is exact; mostly it is all of them."""
    if len(have) <= len(wanted) and (not have or have[-1] == wanted[len(have) - 1]):
        return len(have)
    high = min(len(have), len(wanted))
    while low < high:
        middle = (low + high + 1) // 2
        if have[middle - 1] == wanted[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
