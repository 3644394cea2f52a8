"""Several rankings of the same pages in one: by words and by meaning, of several questions.

Promises: pure and deterministic; without the second list the first stays as it is; a page's evidence is
that of its words: likeness alone is no reason to bring a page in unasked.

Fused by score: each list relative to its best, since neither has a unit. By rank (reciprocal rank
fusion) LoCoMo loses what BEAM gains (tests/bench/recall_semantic.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from proxy.memory.ids import Hit

SHARE = 0.3  # of the meaning's best score, beside 1 for the best by words


def merge(rankings: Iterable[Sequence[Hit]]) -> list[Hit]:
    """Several questions' pages in one list, best first: a page is worth what it is worth to the one it
    answers best. Likenesses to several questions are in one unit, so small talk does not count as much."""
    found: dict[tuple[int, int], Hit] = {}
    for hit in chain.from_iterable(rankings):
        found[hit[:2]] = max(hit, found.get(hit[:2], hit))
    return _ordered(found.values())


def fuse(lexical: Sequence[Hit], semantic: Sequence[Hit]) -> list[Hit]:
    """The pages of both, best first; scores are in the unit of the first list's. Each is ordered, best first."""
    if not semantic:
        return list(lexical)
    unit = lexical[0].score if lexical else 1.0
    share = SHARE * unit / semantic[0].score
    found = {(hit.position, hit.part): hit for hit in lexical}
    for hit in semantic:
        place = hit.position, hit.part
        known = found.get(place, Hit(*place, 0.0))
        found[place] = known._replace(score=known.score + share * hit.score)
    return _ordered(found.values())


def _ordered(hits: Iterable[Hit]) -> list[Hit]:
    return sorted(hits, key=lambda hit: (-hit.score, -hit.position, hit.part))
