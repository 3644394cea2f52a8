"""<VM:MANIFEST_JSON>: which pages exist outside the window, within a bound of tokens.

Promises: always valid JSON on one line that cannot open or close a `<VM:` tag; entries come in the
order of adding, which is their priority; what does not fit is folded into segment lines, and
`total_available` says how many pages there are whatever was folded. Fields at their defaults are
left out of the JSON: tokens are what a manifest costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from proxy.memory.context import quote_json
from proxy.memory.ids import parse_page_id
from proxy.memory.models import CompressionLevel, MemoryPage, Modality, StorageTier

ALL_LEVELS = [0, 1, 2, 3]
MIN_MANIFEST_TOKENS = 32  # below this `fit` cannot keep its bound
_MAX_SEGMENTS = 8
_SEGMENT_SHARE = 4  # segment lines may take a quarter of the tokens


class _Compact(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def compact(self) -> dict[str, Any]:
        """As plain JSON values, without fields at their defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def model_dump_json(self, **_: Any) -> str:
        """Compact, escaped JSON; pydantic's formatting options do not apply."""
        return quote_json(self.compact())


class ManifestPolicies(_Compact):
    """What the model may do with the manifest."""

    max_faults_per_turn: int = Field(default=2, ge=0)


class WorkingSetEntry(_Compact):
    """A page that is in the window."""

    page_id: str
    modality: str = Modality.TEXT.value
    level: int = CompressionLevel.FULL.value


class AvailablePageEntry(_Compact):
    """A page that can be brought in. `levels` are on offer, `hint` is for navigation only."""

    page_id: str
    modality: str = Modality.TEXT.value
    tier: str = StorageTier.L2.value
    levels: list[int] = Field(default_factory=lambda: list(ALL_LEVELS))
    hint: str = ""


class SegmentEntry(_Compact):
    """A run of pages as one line."""

    first: str
    last: str
    pages: int = Field(ge=1)
    hint: str = ""


class VMManifest(_Compact):
    """The manifest as data; `model_dump_json()` is what the model reads."""

    session_id: str = ""
    total_available: int = 0
    working_set: list[WorkingSetEntry] = Field(default_factory=list)
    available_pages: list[AvailablePageEntry] = Field(default_factory=list)
    segments: list[SegmentEntry] = Field(default_factory=list)
    policies: ManifestPolicies = Field(default_factory=ManifestPolicies)


class ManifestBuilder:
    """Collects pages in the order of their value; builds a manifest, whole or within a bound."""

    def __init__(self, session_id: str = "", policies: ManifestPolicies | None = None) -> None:
        self._session_id = session_id
        self._policies = policies or ManifestPolicies()
        self._working: list[WorkingSetEntry] = []
        self._available: list[AvailablePageEntry] = []
        self._segments: list[SegmentEntry] = []

    def add_working_set_page(self, page: MemoryPage) -> None:
        """A page that is in the window."""
        level = int(page.compression_level)
        self._working.append(
            WorkingSetEntry(page_id=page.page_id, modality=page.modality.value, level=level)
        )

    def add_available_page_entry(self, entry: AvailablePageEntry) -> None:
        """A page outside the window; earlier additions are kept first."""
        self._available.append(entry)

    def add_segment(self, first_page_id: str, last_page_id: str, pages: int, hint: str) -> None:
        """A run of `pages` pages outside the window that have no entries of their own."""
        self._segments.append(
            SegmentEntry(first=first_page_id, last=last_page_id, pages=pages, hint=hint)
        )

    def build(self) -> VMManifest:
        """Everything that was added."""
        return VMManifest(
            session_id=self._session_id,
            total_available=self._total(),
            working_set=self._working,
            available_pages=self._available,
            segments=self._segments,
            policies=self._policies,
        )

    def fit(self, max_tokens: int, count: Callable[[str], int]) -> VMManifest:
        """A manifest of the pages outside the window whose JSON has at most `max_tokens` (as `count`
        counts; from MIN_MANIFEST_TOKENS up).

        Available entries are kept in the order of adding; the rest becomes segments.
        """
        bare = VMManifest(total_available=self._total(), policies=self._policies)
        room = max_tokens - count(bare.model_dump_json())
        kept = _affordable(self._available, room, count)
        if len(kept) < len(self._available) or self._segments:
            kept = _affordable(kept, room - max_tokens // _SEGMENT_SHARE, count)
        alone = [
            SegmentEntry(first=entry.page_id, last=entry.page_id, pages=1, hint=entry.hint)
            for entry in self._available
        ]
        segments, hints = _MAX_SEGMENTS, True
        while True:
            rest = sorted(alone[len(kept) :], key=_order)
            # One run, so that pages without an entry do not crowd the segments' own hints out.
            runs = sorted([*([_joined(rest)] if rest else []), *self._segments], key=_order)
            folded = _fold(runs, segments, hints)
            manifest = bare.model_copy(update={"available_pages": kept, "segments": folded})
            over = count(manifest.model_dump_json()) - max_tokens
            if over <= 0:
                return manifest
            if segments > 2:
                segments //= 2
            elif kept:
                kept = kept[: max(0, len(kept) - max(1, over // 32))]
            elif hints:
                hints = False
            elif folded:
                segments //= 2
            else:
                return manifest

    def _total(self) -> int:
        """Pages outside the window, with and without an entry of their own."""
        return len(self._available) + sum(segment.pages for segment in self._segments)


def _affordable(
    entries: list[AvailablePageEntry], room_tokens: int, count: Callable[[str], int]
) -> list[AvailablePageEntry]:
    """The first entries whose tokens fit."""
    for index, entry in enumerate(entries):
        room_tokens -= count(entry.model_dump_json() + ",")
        if room_tokens < 0:
            return entries[:index]
    return entries


def _order(run: SegmentEntry) -> tuple[int, int, str, str, int, str]:
    position, part = parse_page_id(run.first) or (-1, 0)
    return position, part, run.first, run.last, run.pages, run.hint


def _joined(runs: Sequence[SegmentEntry], hints: bool = True) -> SegmentEntry:
    """Runs in conversation order as one."""
    pages, hint = sum(run.pages for run in runs), runs[0].hint if hints else ""
    return SegmentEntry(first=runs[0].first, last=runs[-1].last, pages=pages, hint=hint)


def _fold(runs: Sequence[SegmentEntry], limit: int, hints: bool) -> list[SegmentEntry]:
    """At most `limit` segments that cover all runs."""
    if not limit or not runs:
        return []
    size = -(-len(runs) // limit)
    return [_joined(runs[at : at + size], hints) for at in range(0, len(runs), size)]
