"""The pictures of the dashboard as numbers: what stands where in an SVG. Pure; the templates draw them.

Promises: a picture has at most some thousand shapes, however long the conversation; coordinates are whole pixels.
"""

from __future__ import annotations

from typing import Any

_MAP_WIDTH, _MAP_HEIGHT, _TURN_HEIGHT = 960, 420, 34
_LEAST_ROW, _MOST_ROW = 3, 16
_CHART_WIDTH, _CHART_HEIGHT = 720, 220
_TICKS = 8


def map_chart(told: dict[str, Any]) -> dict[str, Any]:
    """Pages over turns: `cells` of (x, y, width, height, class, title), before `stored`: each page as long as it is there, in the
    window or not; `lines` where epochs begin, `marks` above the turns."""
    turns, pages = told["turns"], told["pages"]
    first, count = told["first"], len(turns)
    step = min(48.0, _MAP_WIDTH / max(1, count))
    row = max(_LEAST_ROW, min(_MOST_ROW, _MAP_HEIGHT // max(1, len(pages))))
    gap = 1 if row > 4 else 0
    cells: list[dict[str, Any]] = []
    stored: list[dict[str, Any]] = []
    for index, page in enumerate(pages):
        since = max(page["since"], first)
        stored.append({
            "x": round((since - first) * step, 1), "y": _TURN_HEIGHT + index * row, "w": round((first + count - since) * step - gap, 1),
            "h": row - gap, "page": page["page"], "title": f"{page['page']} ({page['role']}): outside the window",
        })  # fmt: skip
        for start, end, place in page["runs"]:
            x = (start - first) * step
            cells.append({
                "x": round(x, 1), "y": _TURN_HEIGHT + index * row, "w": round((end - start + 1) * step - gap, 1), "h": row - gap,
                "kind": place, "page": page["page"], "pinned": page["pinned"],
                "title": f"{page['page']} ({page['role']}): {_PLACES.get(place, place)}, "
                + (f"turn {start}" if start == end else f"turns {start} to {end}"),
            })  # fmt: skip
    lines, marks = [], []
    for index, turn in enumerate(turns):
        x = round(index * step + step / 2, 1)
        if turn["epoch_begun"]:
            lines.append({"x": round(index * step, 1), "epoch": turn["epoch_begun"], "turn": turn["turn"]})
        if turn["faults"]:
            marks.append({"x": x, "kind": "fault", "turn": turn["turn"], "count": turn["faults"]})
        if turn["evidence"]:
            marks.append({"x": x, "kind": "evidence", "turn": turn["turn"], "count": turn["evidence"]})
    every = max(1, -(-count // _TICKS))
    ticks = [{"x": round(i * step + step / 2, 1), "turn": t["turn"]} for i, t in enumerate(turns) if i % every == 0]
    return {
        **told, "cells": cells, "stored": stored, "lines": lines, "marks": marks, "ticks": ticks, "row": row,
        "width": _MAP_WIDTH, "height": _TURN_HEIGHT + max(1, len(pages)) * row + 18, "top": _TURN_HEIGHT,
        "used_width": round(count * step, 1),
        "places": [(kind, name) for kind, name in _PLACES.items() if kind == "out" or any(cell["kind"] == kind for cell in cells)],
    }  # fmt: skip


_PLACES = {
    "native": "as it was said", "evidence": "shown as evidence", "fault": "asked for by the model",
    "kept0": "kept word for word", "kept1": "kept, reduced", "kept2": "kept as key points", "kept3": "kept as tags",
    "out": "stored, outside the window",
}  # fmt: skip


def timeline_chart(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Two areas over the turns: the history's tokens and the window's."""
    told = [p for p in points if p["history_tokens"]]
    most = max((max(p["history_tokens"], p["window_tokens"] or 0) for p in told), default=1)
    last, first = (told[-1]["turn"], told[0]["turn"]) if told else (1, 1)

    def x(turn: int) -> float:
        return round((turn - first) * (_CHART_WIDTH - 2) / max(1, last - first) + 1, 1)

    def y(tokens: int) -> float:
        return round(_CHART_HEIGHT - tokens * (_CHART_HEIGHT - 8) / most, 1)

    def area(name: str) -> str:
        places = [(x(p["turn"]), y(p[name])) for p in told if p[name]]
        if not places:
            return ""
        line = " L".join(f"{a} {b}" for a, b in places)
        return f"M{places[0][0]} {_CHART_HEIGHT} L{line} L{places[-1][0]} {_CHART_HEIGHT} Z"  # what is not known is passed over

    grid = [{"y": y(value), "tokens": value} for value in _nice(most)]
    return {
        "width": _CHART_WIDTH, "height": _CHART_HEIGHT, "history": area("history_tokens"), "window": area("window_tokens"),
        "grid": grid, "first": first, "last": last, "most": most, "points": told,
    }  # fmt: skip


def _nice(most: int) -> list[int]:
    """Round numbers of tokens for three or four lines."""
    size = 10 ** max(0, len(str(most)) - 1)
    step = next(s for s in (size // 4, size // 2, size, 2 * size, 5 * size) if s and most / s <= 4.5)
    return [n * step for n in range(1, int(most / step) + 1)]


def branch_bars(branches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each branch as a bar of its messages: what it shares with the one that is shown, then its own."""
    most = max((b["messages"] for b in branches), default=1)
    return [
        {**b, "shared_w": round(600 * b["shared_messages"] / most, 1), "own_w": round(600 * (b["messages"] - b["shared_messages"]) / most, 1)}
        for b in branches
    ]
