"""Lower levels of a JSON value: fewer items, then the telling leaves, then only the shape.

Promises: pure functions of a decoded value; `truncated` is always JSON again; every walk has a
limit in depth and in items; the same value gives the same text. Libraries that cut JSON repair or
stream it; none keeps its schema within a number of tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from proxy.memory.models import json_text

SHAPE_TOKENS = 16
MAX_LEAVES = 2_000  # looked at for key facts
MAX_ITEMS_TOLD = 100  # of an array, for key facts
MAX_ITEMS_SEEN = 1_000  # of an array, when looking for items with keys of their own
_SMALL_TOKENS = 40  # a value this small is its own level 1
_REDUCED_SHARE = 3  # level 1 keeps about a third
_MOST_CHARS_PER_TOKEN = 8  # a longer text is not even counted
_MAX_FACTS = 24
_KEY_CHARS = 32
_FACT_CHARS = 60
_MAX_RANK = 24  # deeper, or later in arrays within arrays, is not told

_MORE = re.compile(r"… (\d+) more")
_ALARMING = frozenset(
    "error errors exception failed failure failures fatal critical rejected warning fault".split()
)


class _Cut(NamedTuple):
    items: int
    chars: int
    keys: int
    depth: int


_CUTS = (
    _Cut(12, 320, 1_000, 12),
    _Cut(8, 240, 1_000, 12),
    _Cut(5, 160, 1_000, 10),
    _Cut(3, 120, 200, 10),
    _Cut(2, 60, 64, 8),
    _Cut(1, 24, 24, 5),
    _Cut(1, 12, 12, 3),
)
# (keys of the outermost object, keys of those within, depth), most telling first.
_SHAPES = (
    (8, 8, 4),
    (6, 6, 3),
    (4, 4, 3),
    (3, 3, 3),
    (2, 3, 3),
    (2, 2, 3),
    (1, 3, 3),
    (1, 2, 3),
    (4, 1, 2),
    (2, 1, 2),
    (1, 1, 2),
    (1, 1, 1),
)


def parse_json(text: str) -> Any | None:
    """The value of a text that is a JSON object or array; None for any other text."""
    if not looks_like_json(text):
        return None
    try:
        # Numbers that JSON cannot write again stay as the text that they are.
        return json.loads(text.strip(), parse_float=_finite, parse_int=_short, parse_constant=str)
    except (ValueError, RecursionError):
        return None


def looks_like_json(text: str) -> bool:
    """Whether a text begins and ends as an object or an array does."""
    stripped = text.strip()
    return (stripped[:1], stripped[-1:]) in (("{", "}"), ("[", "]"))


def _finite(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _short(text: str) -> int | str:
    return int(text) if len(text) < 100 else text


def truncated(value: Any, original: str, limit: int, count: Callable[[str], int]) -> str | None:
    """`value` as compact JSON of about a third of `original`'s tokens and at most `limit`.

    Long arrays keep their first items, some with keys of their own or a failure, and end in a
    string "… 9 more"; long strings are cut; keys go last. None when nothing fits in `limit`.
    """
    tokens = count(original)
    target = min(limit, max(_SMALL_TOKENS, tokens // _REDUCED_SHARE))
    if tokens <= _SMALL_TOKENS * 2:  # else the whole value has to be written to be too long
        whole = _encoded(value)
        if count(whole) <= target:
            return whole
    best = None
    for cut in _CUTS:
        text = _encoded(_shrunk(value, cut, 0))
        if len(text) > max(target, limit) * _MOST_CHARS_PER_TOKEN:
            continue
        size = count(text)
        if size <= target:
            return text
        if size <= limit:
            best = text  # the smallest so far: cuts only get deeper
    return best


def _encoded(value: Any) -> str:
    return json_text(value) or json_text(_shrunk(value, _CUTS[-1], 0))  # too deep to be written


def _shrunk(value: Any, cut: _Cut, depth: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= cut.chars else value[: cut.chars].rstrip() + "…"
    if isinstance(value, dict):
        if value and depth >= cut.depth:
            return f"{{… {len(value)} keys}}"
        short = {key: _shrunk(inner, cut, depth + 1) for key, inner in _first(value, cut.keys)}
        if len(value) > cut.keys:
            short["…"] = f"{len(value) - cut.keys} more keys"
        return short
    if isinstance(value, list):
        if value and depth >= cut.depth:
            return f"[… {len(value)} items]"
        kept = [_shrunk(value[index], cut, depth + 1) for index in _kept(value, cut.items)]
        if len(kept) < len(value):
            kept.append(f"… {_length(value) - len(kept)} more")
        return kept
    return value


def _first(value: dict[str, Any], keys: int) -> Iterator[tuple[str, Any]]:
    for index, (key, inner) in enumerate(value.items()):
        if index >= keys:
            return
        yield (key if len(key) <= 200 else key[:199] + "…"), inner


def _kept(items: list[Any], most: int) -> list[int]:
    """The first `most` items, and as many later ones again that have keys not seen before or tell
    of a failure.
    """
    if len(items) <= most + 1:  # a note about one more item is no shorter than the item
        return list(range(len(items)))
    kept = list(range(most))
    seen: set[str] = set()
    for index, item in enumerate(items[:MAX_ITEMS_SEEN]):
        if isinstance(item, dict):
            told = not seen.issuperset(item) or _is_alarming(item)
            if index >= most and told and len(kept) < 2 * most:
                kept.append(index)
            if index < most or kept[-1] == index:
                seen.update(item)
    return kept


def _is_alarming(item: dict[str, Any]) -> bool:
    return any(isinstance(leaf, str) and leaf.lower() in _ALARMING for leaf in item.values())


def _length(items: list[Any]) -> int:
    """How many items there are, or were before `truncated` cut them."""
    more = _MORE.fullmatch(items[-1]) if items and isinstance(items[-1], str) else None
    return len(items) - 1 + int(more[1][:18]) if more else len(items)


def key_facts(value: Any, limit: int, count: Callable[[str], int]) -> str:
    """Leaves and lengths of arrays as "path: value; path: value", in the order of the document, within
    `limit` tokens: first what tells of a failure, then the least deep and the first items of an array,
    what is empty last. "" when none fits.
    """
    facts = list(islice(_facts(value, "", 0), MAX_LEAVES))
    ranked = sorted(range(len(facts)), key=lambda index: (facts[index][0], index))
    chosen: list[int] = []
    text = ""
    for index in ranked[:_MAX_FACTS]:
        candidate = "; ".join(facts[i][1] for i in sorted([*chosen, index]))
        if count(candidate) <= limit:
            chosen.append(index)
            text = candidate
    return text


def _facts(value: Any, path: str, rank: int) -> Iterator[tuple[int, str]]:
    """(rank, fact) of each leaf and array in document order; a low rank is told first."""
    if rank > _MAX_RANK:
        return
    if isinstance(value, dict) and value:
        for key, inner in _first(value, 200):
            short = key[:_KEY_CHARS]
            yield from _facts(inner, f"{path}.{short}" if path else short, rank + 1)
    elif isinstance(value, list) and value:
        if _length(value) > 1:
            yield rank, f"{path or 'list'}: {_length(value)} items"
        for index, inner in enumerate(value[:MAX_ITEMS_TOLD]):
            if not (isinstance(inner, str) and _MORE.fullmatch(inner)):
                yield from _facts(inner, f"{path}[{index}]", rank + 1 + min(index, 4))
    else:
        shown = _encoded(value)
        if isinstance(value, str):
            line = " ".join(value[: 4 * _FACT_CHARS].split())
            shown = line if len(line) <= _FACT_CHARS else line[:_FACT_CHARS].rstrip() + "…"
        alarming = shown.lower() in _ALARMING or (value and path.rpartition(".")[2] in _ALARMING)
        rank += -_MAX_RANK if alarming else _MAX_RANK if value in (None, "", [], {}) else 0
        yield rank, f"{path}: {shown}" if path else shown


def shape(value: Any, limit: int, count: Callable[[str], int]) -> str:
    """What the value looks like: `{orders: [12 x {id, total, …}], …}`; the most telling one within
    `limit` tokens, "" when none is.
    """
    for keys, inner_keys, depth in _SHAPES:
        text = _shape(value, keys, inner_keys, depth)
        if count(text) <= limit:
            return text
    return ""


def _shape(value: Any, keys: int, inner_keys: int, depth: int) -> str:
    if isinstance(value, dict):
        if not value or depth == 0:
            return "{…}" if value else "{}"
        shown = []
        for key, inner in _first(value, keys):
            name = key if len(key) <= _KEY_CHARS else key[:_KEY_CHARS] + "…"
            nested = isinstance(inner, (dict, list)) and inner and depth > 1
            shown.append(
                f"{name}: {_shape(inner, inner_keys, inner_keys, depth - 1)}" if nested else name
            )
        return "{" + ", ".join(shown) + (", …}" if len(value) > keys else "}")
    if isinstance(value, list):
        if not value or depth == 0:
            return f"[{_length(value)}]"
        return f"[{_length(value)} x {_shape(value[0], inner_keys, inner_keys, depth - 1)}]"
    names = {str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
