"""The vectors of one path's pages: which are about the same as a question, whatever their words.

Promises: exact, so the same on every machine (invariant 7): a vector is a direction in whole numbers,
SCALE long, so every partial sum of a product is a whole number that float32 holds, in whatever order a
library adds; a page without a vector (yet) is found by its neighbours at most; scores are relative to
this path alone (invariant 6).

What answers "Where did you go?" stands beside it: each page counts with three neighbours on either side.
The sums are of scores, not of vectors: the same, without a second copy of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxy.memory.ids import Doc, Hit
from proxy.search.speakers import speaker_label

SCALE = 2048  # SCALE ** 2 is far below 2 ** 24, up to where float32 holds every whole number
WEIGHTS = (10, 3, 2, 1)  # of a page and of those one, two and three away; measured (tests/bench/recall_semantic.py)
NEAREST = 200  # pages that count as near; fewer lose whole windows, more change nothing
_WEIGHED = 4 * NEAREST  # of which it is asked who speaks
PAGE_CHARS = 1024  # of a page that are encoded: its topic shows at its beginning

Vector: TypeAlias = NDArray[np.int16]
Prior: TypeAlias = Callable[[dict[int, float]], dict[int, float]]
NO_VECTOR: Vector = np.zeros(0, np.int16)


class Encoder(Protocol):
    """Gives texts their vectors. Called from any thread."""

    @property
    def version(self) -> bytes:
        """Another one when there may be vectors that were not there before."""
        ...

    def encode(self, texts: Sequence[str]) -> Sequence[Vector | None]:
        """A vector each, as `whole` makes them; NO_VECTOR: there is none; None: not yet."""
        ...


def whole(direction: NDArray[Any] | Sequence[float]) -> Vector:
    """A direction in whole numbers, SCALE long; NO_VECTOR for none."""
    exact = np.asarray(direction, np.float64)
    length = float(np.sqrt(exact @ exact))
    if not 0 < length < float("inf"):
        return NO_VECTOR
    return np.rint(exact * (SCALE / length)).astype(np.int16)


def vector_of(data: bytes) -> Vector:
    """The vector that was stored as these bytes (its `tobytes()`)."""
    return np.frombuffer(data, "<i2") if len(data) % 2 == 0 else NO_VECTOR


def page_text(doc: Doc) -> str:
    """What is encoded of a page: not who says it, which would make all pages of a speaker alike."""
    label = doc.name if doc.name and doc.text.startswith(f"{doc.name}:") else speaker_label(doc.text)
    return doc.text[len(label) + 1 if label else 0 :].lstrip()[:PAGE_CHARS]


class VectorIndex:
    """The vectors of a path's pages, in path order. Not for several threads at once."""

    def __init__(self) -> None:
        self._rows = np.zeros((0, 0), np.float32)
        self._keys: list[tuple[int, int]] = []
        self._version = b""
        self._missing: tuple[int, int] | None = None  # the first page whose vector may come
        self.messages = 0  # of the path that are in it

    @property
    def weight(self) -> int:
        """In pages of the index of words, whose size a vector of 256 numbers has."""
        return -(-self._rows.size // 256)

    def truncate(self, messages: int) -> None:
        """Keep the pages of the first so many messages."""
        if messages < self.messages:
            self.messages = messages
            del self._keys[bisect_left(self._keys, (messages,)) :]
            if self._missing is not None and self._missing >= (messages,):
                self._missing = None

    def due(self, encoder: Encoder) -> int:
        """The message from which on pages are to be added: an earlier one when missing vectors may be there."""
        if self._missing is not None and encoder.version != self._version:
            self.truncate(self._missing[0])
        return self.messages

    def extend(self, docs: Sequence[Doc], messages: int, encoder: Encoder) -> None:
        """Add the pages of the path up to `messages`."""
        version = encoder.version  # asked first: what comes in between is looked for again
        vectors = encoder.encode([page_text(doc) for doc in docs])
        first, size = len(self._keys), len(self._keys) + len(docs)
        width = max((len(v) for v in vectors if v is not None), default=0) or self._rows.shape[1]
        if width != self._rows.shape[1] or size > len(self._rows):
            grown = np.zeros((max(size + size // 4, 64), width), np.float32)
            if width == self._rows.shape[1]:
                grown[:first] = self._rows[:first]
            self._rows = grown
        for row, (doc, vector) in enumerate(zip(docs, vectors, strict=True), first):
            key = doc.position, doc.part
            self._keys.append(key)
            self._rows[row] = vector if vector is not None and len(vector) == width else 0
            if vector is None and self._missing is None:
                self._missing = key
        self.messages, self._version = messages, version

    def nearest(self, query: Vector, prior: Prior) -> list[Hit]:
        """The pages that are nearer to the query than the path is on average, best first; `prior` makes of
        scores by row what they are worth."""
        rows = len(self._keys)
        if not rows or len(query) != self._rows.shape[1]:
            return []
        # Not `@`: a BLAS wakes its threads for it, which cost ten times what they do.
        own = np.einsum("ij,j->i", self._rows[:rows], query.astype(np.float32)).astype(np.float64)
        near = own * WEIGHTS[0]
        for step, weight in enumerate(WEIGHTS[1:], 1):
            near[step:] += weight * own[:-step]
            near[:-step] += weight * own[step:]
        near -= near.sum() / rows
        least = np.partition(near, -_WEIGHED)[-_WEIGHED] if rows > _WEIGHED else -np.inf
        (best,) = np.nonzero((near >= least) & (near > 0))
        worth = prior(dict(zip(best.tolist(), near[best].tolist(), strict=True)))
        ranked = sorted(worth.items(), key=lambda item: (-item[1], -item[0]))[:NEAREST]
        return [Hit(*self._keys[row], score) for row, score in ranked]
