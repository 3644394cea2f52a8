"""<VM:MANIFEST_JSON>: which pages exist outside the window, within a bound of tokens.

Promises: always valid JSON on one line that cannot open or close a `<VM:` tag; entries come in the
order of adding, which is their priority; what does not fit is folded into segment lines, and
`total_available` says how many pages there are whatever was folded. Fields at their defaults are
left out of the JSON: tokens are what a manifest costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from proxy.memory.context_packer import quote_json
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
    """A page that can be brought in. `levels` are the levels on offer, `hint` is for navigation
    only.
    """

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
        self._working.append(
            WorkingSetEntry(
                page_id=page.page_id,
                modality=page.modality.value,
                level=int(page.compression_level),
            )
        )

    def add_available_page_entry(self, entry: AvailablePageEntry) -> None:
        """A page outside the window; earlier additions are kept first."""
        self._available.append(entry)

    def add_segment(self, first_page_id: str, last_page_id: str, pages: int, hint: str) -> None:
        """A run of `pages` pages outside the window that have no entries of their own."""
        self._segments.append(
            SegmentEntry(first=first_page_id, last=last_page_id, pages=pages, hint=hint)
        )

    @property
    def total_available(self) -> int:
        """Pages outside the window, with and without an entry of their own."""
        return len(self._available) + sum(segment.pages for segment in self._segments)

    def build(self) -> VMManifest:
        """Everything that was added."""
        return self._manifest(self._available, self._segments, self._working)

    def fit(self, max_tokens: int, count: Callable[[str], int]) -> VMManifest:
        """A manifest whose JSON has at most `max_tokens` (as `count` counts; from
        MIN_MANIFEST_TOKENS up).

        Working set entries, then available entries, are kept in order of adding; the rest becomes
        segments.
        """
        bare = self._manifest([], [], [])
        room = max_tokens - count(bare.model_dump_json())
        working, room = _affordable(self._working, room, count)
        kept, _ = _affordable(self._available, room, count)
        if len(kept) < len(self._available) or self._segments:
            kept, _ = _affordable(kept, room - max_tokens // _SEGMENT_SHARE, count)
        entry_runs = [_run(e.page_id, e.page_id, 1, e.hint) for e in self._available]
        segment_runs = [_run(s.first, s.last, s.pages, s.hint) for s in self._segments]
        segments, hints = _MAX_SEGMENTS, True
        while True:
            folded = _fold([*_one_run(entry_runs[len(kept) :]), *segment_runs], segments, hints)
            manifest = self._manifest(kept, folded, working)
            over = count(manifest.model_dump_json()) - max_tokens
            if over <= 0:
                return manifest
            if segments > 2:
                segments //= 2
            elif kept:
                kept = kept[: max(0, len(kept) - max(1, over // 32))]
            elif working:
                working = working[: len(working) // 2]
            elif hints:
                hints = False
            elif segments:
                segments = segments // 2 if folded else 0
            else:
                return VMManifest(total_available=self.total_available)

    def _manifest(
        self,
        available: Sequence[AvailablePageEntry],
        segments: Sequence[SegmentEntry],
        working: Sequence[WorkingSetEntry],
    ) -> VMManifest:
        return VMManifest(
            session_id=self._session_id,
            total_available=self.total_available,
            working_set=list(working),
            available_pages=list(available),
            segments=list(segments),
            policies=self._policies,
        )


_Entry = TypeVar("_Entry", bound=_Compact)


def _affordable(
    entries: Sequence[_Entry], room_tokens: int, count: Callable[[str], int]
) -> tuple[list[_Entry], int]:
    """The first entries whose tokens fit, and the room that is left after them."""
    kept: list[_Entry] = []
    for entry in entries:
        tokens = count(entry.model_dump_json() + ",")
        if tokens > room_tokens:
            break
        room_tokens -= tokens
        kept.append(entry)
    return kept, room_tokens


# A run of pages: position and part of its first (to sort by), first id, last id, pages, hint.
_Run = tuple[int, int, str, str, int, str]


def _run(first: str, last: str, pages: int, hint: str) -> _Run:
    position, part = parse_page_id(first) or (-1, 0)
    return position, part, first, last, pages, hint


def _one_run(runs: Sequence[_Run]) -> list[_Run]:
    """Pages without an entry as one run, so that they do not crowd the segments' own hints out."""
    if not runs:
        return []
    ordered = sorted(runs)
    position, part, first, _, _, words = ordered[0]
    return [(position, part, first, ordered[-1][3], sum(run[4] for run in ordered), words)]


def _fold(runs: Sequence[_Run], limit: int, hints: bool) -> list[SegmentEntry]:
    """At most `limit` segments, in conversation order, that cover all runs."""
    if limit <= 0 or not runs:
        return []
    ordered = sorted(runs)
    size = -(-len(ordered) // limit)
    groups = (ordered[at : at + size] for at in range(0, len(ordered), size))
    return [
        SegmentEntry(
            first=group[0][2],
            last=group[-1][3],
            pages=sum(run[4] for run in group),
            hint=group[0][5] if hints else "",
        )
        for group in groups
    ]
