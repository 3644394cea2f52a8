"""What the model is told: the results of page_fault and search_pages.

Promises: one line of JSON with a fixed key order that cannot open or close a `<VM:` tag; the models
and the functions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from proxy.memory.context_packer import quote_json
from proxy.memory.manifest import AvailablePageEntry
from proxy.memory.models import CompressionLevel, Modality, StorageTier


class FaultedContent(BaseModel):
    """What a page says; its media travel beside it."""

    text: str


class FaultedPage(BaseModel):
    """A page as the model receives it."""

    page_id: str
    modality: Modality
    level: CompressionLevel
    tier: StorageTier
    content: FaultedContent


class FaultEffects(BaseModel):
    """What the fault did to the window."""

    promoted_to_working_set: bool = True
    tokens_est: int = 0


class FaultToolResult(BaseModel):
    """The tool result of a served fault."""

    page: FaultedPage
    effects: FaultEffects = Field(default_factory=FaultEffects)

    def model_dump_json(self, **_: Any) -> str:
        """Compact, escaped JSON, as the proxy sends it; pydantic's options do not apply."""
        return quote_json(self.model_dump(mode="json"))


class SearchResultEntry(AvailablePageEntry):
    """One search result; `relevance` is higher for better, comparable within one result only."""

    relevance: float = 0.0
    complete: bool = False  # the hint is the page's whole text


class SearchToolResult(BaseModel):
    """The tool result of a search, best first; `total_available`: how many pages were searched."""

    results: list[SearchResultEntry] = Field(default_factory=list)
    total_available: int = 0

    def model_dump_json(self, **_: Any) -> str:
        """Compact, escaped JSON, as the proxy sends it; pydantic's options do not apply."""
        results = [entry.compact() for entry in self.results]
        return quote_json({"results": results, "total_available": self.total_available})


def fault_result(
    page_id: str,
    modality: Modality,
    level: CompressionLevel | int,
    tier: StorageTier,
    text: str,
    tokens: int,
) -> str:
    """The tool result of a served fault: `tier` is where the page came from, `tokens` what it costs
    now.
    """
    return FaultToolResult(
        page=FaultedPage(
            page_id=page_id,
            modality=modality,
            level=CompressionLevel(level),
            tier=tier,
            content=FaultedContent(text=text),
        ),
        effects=FaultEffects(tokens_est=tokens),
    ).model_dump_json()


def search_result(entries: Sequence[SearchResultEntry], total: int) -> str:
    """The tool result of a search, best first; `total` is how many pages there were to search."""
    return SearchToolResult(results=list(entries), total_available=total).model_dump_json()


def error_result(message: str) -> str:
    """The tool result of a call that could not be served."""
    return quote_json({"error": message})
