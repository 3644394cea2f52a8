"""Makes the table of `proxy/search/related.py`: which words say about the same.

    python -m tests.bench.related   # with the extra [semantic]; writes proxy/search/related.zst

The words are those of WordLlama's vocabulary, each by its stem (a stem's first word stands for it), but for stop words
and small talk; of each the nearest by the angle between their vectors, from whole numbers: the same on every machine.
What it brings and costs: `python -m tests.bench.recall_memory`, docs/measured.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import zstandard

import proxy.search
from proxy.search.static import static_encoder
from proxy.search.terms import idle_terms, tokenizer

LEAST = 0.35  # cosine
MOST = 12  # of a word: more are hardly ever on a path's pages
_WORD = re.compile("▁([A-Za-z][a-z]+)")


def main() -> None:
    found = list(lines())
    text = "\n".join(found).encode()
    packed = zstandard.ZstdCompressor(19).compress(text)
    (Path(proxy.search.__path__[0]) / "related.zst").write_bytes(packed)
    print(f"{len(found):,} words, {len(text):,} bytes, packed {len(packed):,}")


def lines(every: int = 1) -> Iterator[str]:
    """A term and its nearest, a line each, in the order of the vocabulary; of every n-th alone."""
    stems = _stems(static_encoder().vocabulary())
    terms = list(stems)
    vectors = np.stack([v.astype(np.float64) for v in static_encoder().encode(list(stems.values()))])
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    for row in range(0, len(terms), every):
        near = np.einsum("ij,j->i", vectors, vectors[row]) / (lengths * lengths[row])
        near[row] = 0
        best = np.argsort(-near, kind="stable")[:MOST]
        if found := [terms[i] for i in best if near[i] >= LEAST]:
            yield " ".join([terms[row], *found])


def _stems(vocabulary: Iterable[str]) -> dict[str, str]:
    """Stem -> its first word."""
    words = [match[1].lower() for piece in vocabulary if (match := _WORD.fullmatch(piece))]
    found: dict[str, str] = {}
    for word, sequence in zip(words, tokenizer().sequences(words), strict=True):
        if len(sequence) == 1 and sequence[0] not in idle_terms():
            found.setdefault(sequence[0], word)
    return found


if __name__ == "__main__":
    main()
