"""Words that say about the same as a word: "pet" where "dog" was asked for.

Promises: pure; the same on every machine and for every tenant: a table in the package, made once from the word
vectors of WordLlama (MIT) by `python -m tests.bench.related`; a word that is not in it has none. Words are terms
as `proxy.search.terms` makes them.
"""

from __future__ import annotations

import functools
from importlib import resources

import zstandard


def related(term: str) -> list[str]:
    """The nearest first. The first call of a process reads the table: some 10 ms."""
    return _table().get(term, "").split()


@functools.cache
def _table() -> dict[str, str]:
    packed = resources.files("proxy.search").joinpath("related.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompress(packed).decode().splitlines()
    return {term: near for term, _, near in (line.partition(" ") for line in lines)}
