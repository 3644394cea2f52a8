"""Reads the arguments that a model gave to page_fault and search_pages.

Promises: no argument string, however wild, raises: the result is either arguments in range or one
sentence that the model can act on.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from proxy.memory.ids import canonical_page_id, make_page_id
from proxy.memory.models import CompressionLevel, Modality

DEFAULT_SEARCH_LIMIT = 5
MAX_SEARCH_LIMIT = 20
_MAX_QUERY_CHARS = 1000
_MAX_ID_CHARS = 64
_LEVELS = "0 (full), 1 (reduced), 2 (key points) or 3 (topic tags)"


class FaultArgs(NamedTuple):
    """Arguments of page_fault."""

    page_id: str
    level: CompressionLevel


class SearchArgs(NamedTuple):
    """Arguments of search_pages; modality None means any."""

    query: str
    modality: Modality | None
    limit: int


def parse_fault_args(arguments_json: str) -> FaultArgs | str:
    """(page_id, level) of a page_fault call, the id made canonical; or a sentence for the model."""
    arguments = _object(arguments_json, '{"page_id": "msg_0042"}')
    if isinstance(arguments, str):
        return arguments
    page = _page_id(arguments.get("page_id"))
    if page is None:
        return 'page_fault needs a page_id from the manifest or a search, such as "msg_0042".'
    raw = arguments.get("target_level")
    level = CompressionLevel.FULL if raw is None else _level(raw)
    if level is None:
        return f"target_level must be {_LEVELS}."
    return FaultArgs(page, level)


def parse_search_args(arguments_json: str) -> SearchArgs | str:
    """Arguments of a search_pages call, limit brought into 1..20; or a sentence for the model."""
    arguments = _object(arguments_json, '{"query": "words to look for"}')
    if isinstance(arguments, str):
        return arguments
    query = arguments.get("query")
    if isinstance(query, (int, float)) and not isinstance(query, bool):
        query = str(query)
    if not isinstance(query, str) or not query.strip():
        return "search_pages needs a query: a few words that the page is likely to contain."
    raw_modality = arguments.get("modality")
    modality: Modality | None = None
    if raw_modality not in (None, "", "any", "all"):
        modality = _modality(raw_modality)
        if modality is None:
            return f"modality must be one of {', '.join(m.value for m in Modality)}, or left out."
    raw_limit = arguments.get("limit")
    limit = DEFAULT_SEARCH_LIMIT if raw_limit is None else _whole_number(raw_limit)
    if limit is None:
        return f"limit must be a whole number from 1 to {MAX_SEARCH_LIMIT}."
    clipped = max(1, min(MAX_SEARCH_LIMIT, limit))
    return SearchArgs(query.strip()[:_MAX_QUERY_CHARS], modality, clipped)


def _object(arguments_json: str, example: str) -> dict[str, Any] | str:
    try:
        value = json.loads(arguments_json)
        if isinstance(value, str):  # some models encode their arguments twice
            value = json.loads(value)
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return f"The arguments were not a JSON object; send for example {example}."
    return value


def _page_id(raw: object) -> str | None:
    if isinstance(raw, int) and not isinstance(raw, bool) and 0 < raw < 10**9:
        return make_page_id(raw - 1)
    if not isinstance(raw, str):
        return None
    text = raw.strip(" \t\r\n[]()\"'`")
    if not text or len(text) > _MAX_ID_CHARS:
        return None
    return canonical_page_id(text)


def _level(raw: object) -> CompressionLevel | None:
    if isinstance(raw, str) and raw.strip().upper() in CompressionLevel.__members__:
        return CompressionLevel[raw.strip().upper()]
    number = _whole_number(raw)
    return CompressionLevel(number) if number is not None and 0 <= number <= 3 else None


def _modality(raw: object) -> Modality | None:
    if not isinstance(raw, str):
        return None
    return next((m for m in Modality if m.value == raw.strip().lower()), None)


def _whole_number(raw: object) -> int | None:
    """An int from an int, a whole float or a string of one; None for anything else, NaN and
    infinity included.
    """
    if isinstance(raw, str):
        try:
            raw = float(raw)
        except ValueError:
            return None
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return None
    if isinstance(raw, float) and not (math.isfinite(raw) and raw.is_integer()):
        return None
    return int(raw)
