"""The manifest of an epoch: the pages outside the window, nearest first, within a bound. Pure.

Promises: its cost does not grow with the history: a bounded number of entries is priced, and what is
older is one line per segment.
"""

from __future__ import annotations

from bisect import bisect_left

from proxy.conversation.epoch_request import EpochRequest
from proxy.memory.compressor import hint
from proxy.memory.ids import make_page_id
from proxy.memory.manifest import (
    MIN_MANIFEST_TOKENS,
    AvailablePageEntry,
    ManifestBuilder,
    ManifestPolicies,
)
from proxy.memory.models import PageType, StorageTier, VMMode

_MANIFEST_ENTRIES = 64  # priced at most; the rest is one line per segment
_SEGMENTS = 8
_LOOKED_AT = 16  # messages, for one of the user's
_FIRST_HINT_WORDS = 10


def manifest_of(
    request: EpochRequest, native_from: int, resident: set[int], cut: set[int], max_tokens: int
) -> str:
    """The pages outside the window: the ones faulted before, then the nearest, then segments."""
    if max_tokens < MIN_MANIFEST_TOKENS or request.mode is VMMode.PASSIVE:
        return ""
    policies = ManifestPolicies(max_faults_per_turn=request.limits.faults_per_turn)
    builder = ManifestBuilder(policies=policies)
    outside = sorted(cut, reverse=True)
    position = native_from - 1
    limit = min(_MANIFEST_ENTRIES, max_tokens // 24)  # no entry is shorter
    while position >= 0 and len(outside) < limit:
        if position not in resident:
            outside.append(position)
        position -= 1
    for p in outside:
        for wanted in request.pages.ids(p):
            builder.add_available_page_entry(_available(request, wanted))
    _add_segments(request, builder, position + 1, resident)
    return builder.fit(max_tokens, request.counter.text).model_dump_json()


def _available(request: EpochRequest, wanted: str) -> AvailablePageEntry:
    return AvailablePageEntry(
        page_id=wanted,
        modality=request.pages.modality(wanted).value,
        tier=StorageTier.L2.value,
        hint=hint(request.pages.bare(wanted), _FIRST_HINT_WORDS),
    )


def _add_segments(
    request: EpochRequest, builder: ManifestBuilder, end: int, resident: set[int]
) -> None:
    """Positions 0..end-1 as ranges: the closed segments with their topics, and what is before them
    as one."""
    inside = sorted(resident)

    def add(first: int, last: int, topics: str) -> None:
        count = last - first - (bisect_left(inside, last) - bisect_left(inside, first))
        if count > 0:
            builder.add_segment(make_page_id(first), make_page_id(last - 1), count, topics)

    ranges: list[tuple[int, int, str]] = []
    for page in reversed(list(request.pages.derived.pages.values())):
        if page.page_type is not PageType.INDEX:
            continue
        first, last = (request.pages.position(i) for i in page.provenance)
        if first < end:
            ranges.append((first, min(last + 1, end), page.text().partition("): ")[2]))
        if len(ranges) == _SEGMENTS:
            break
    ranges.reverse()
    before = ranges[0][0] if ranges else end
    add(0, before, _opening(request, before))
    for first, last, topics in ranges:
        add(first, last, topics)


def _opening(request: EpochRequest, end: int) -> str:
    """What the first user message of positions 0..end-1 says."""
    path = request.pages.path
    speaker = next((p for p in range(min(end, _LOOKED_AT)) if path[p].role == "user"), 0)
    return hint(request.pages.parts(speaker)[0], _FIRST_HINT_WORDS) if end else ""
