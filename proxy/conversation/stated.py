"""What an upstream's own list of models says of their windows. Pure.

Promises: no list of servers or fields: a number counts when the keys that lead to it speak of a
context, a model's length or its input, and of nothing else; of several the smallest counts (what one
provider serves of what the model could); a list that is no list says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from proxy.conversation.capability import LEAST_WINDOW_TOKENS
from proxy.tokens import normal_name

MOST_MODELS = 8192
_MOST_TOKENS = 1 << 30  # more is no window
_DEEP = 5
_NAMES = ("id", "name", "model", "aliases")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WINDOW = re.compile(
    r"context|window|(?:model|seq|sequence|position)\w*_len|max_length|n_ctx|num_ctx"
    r"|(?:max|limit)\w*(?:input|prompt)|(?:input|prompt)\w*(?:max|limit)"
)
_ANOTHER = re.compile(
    r"train|original|output|completion|generat|response|answer|pric|cost|per_|rate|minute|cach"
    r"|min_|default|byte|char|image|audio|video|file|size_b|over_|above|thresh|param|embed"
)


def stated_windows(body: bytes) -> dict[str, int]:
    """Tokens by the model's name, and by its normal name. One that the list names alone is also at "":
    some servers answer to any name."""
    try:
        listed = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(listed, Mapping):
        listed = next((listed[key] for key in ("data", "models") if isinstance(listed.get(key), list)), [])
    found: dict[str, int] = {}
    models = [one for one in listed[:MOST_MODELS] if isinstance(one, Mapping)] if isinstance(listed, list) else []
    for model in models:
        window = _window(model)
        if window is None:
            continue
        for name in _names(model):
            for key in (name, normal_name(name)):
                found[key] = min(window, found.get(key, window))
        if len(models) == 1:
            found[""] = window
    return found


def window_of(model: str, stated: Mapping[str, int]) -> int | None:
    """By its own name, else by a spelling of it."""
    for name in (model, normal_name(model), ""):
        if name in stated:
            return stated[name]
    return None


def _names(model: Mapping[str, Any]) -> Iterator[str]:
    for key in _NAMES:
        value = model.get(key)
        yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str) and name)


def _window(model: Mapping[str, Any]) -> int | None:
    return min(
        (number for path, number in _numbers(model, "", _DEEP)
         if _WINDOW.search(path) and not _ANOTHER.search(path)),
        default=None,
    )  # fmt: skip


def _numbers(value: Any, path: str, deep: int) -> Iterator[tuple[str, int]]:
    """Every number that could be a window, with the keys that lead to it, in snake case."""
    if isinstance(value, Mapping) and deep:
        for key, one in value.items():
            yield from _numbers(one, f"{path}.{_CAMEL.sub('_', str(key)).lower()}", deep - 1)
    elif isinstance(value, list) and deep:
        for one in value[:64]:
            yield from _numbers(one, path, deep - 1)
    elif isinstance(value, (int, float)) and LEAST_WINDOW_TOKENS <= value <= _MOST_TOKENS:
        yield path, int(value)
