"""Small multiples as SVG: one panel a figure, a line a series or a bar each, every axis from zero. Light and dark by itself.

Promises: the same figures give the same bytes; nothing but the text is needed to show it; a line is named where it ends
by its value, and by its colour in the legend; a bar by its name before it and its value behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _COLUMNS = 220, 150, 4  # of a panel, with what is around it; panels in a row, which is as wide with fewer
_LEFT, _RIGHT, _TOP, _BOTTOM = 12, 52, 40, 24  # of a panel: around its plot
_HEAD = 56  # above the panels
_STYLE = """
svg { font: 11px system-ui, sans-serif; background: #fcfcfb; }
text { fill: #52514e; } .title { font-size: 14px; font-weight: 600; fill: #0b0b0b; } .name { fill: #0b0b0b; font-weight: 600; }
.grid { stroke: #e1e0d9; } .line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dot { stroke: #fcfcfb; stroke-width: 2; }
.s0 { stroke: #2a78d6; } .d0 { fill: #2a78d6; } .s1 { stroke: #eb6834; } .d1 { fill: #eb6834; }
.s2 { stroke: #1b9e77; } .d2 { fill: #1b9e77; } .other { fill: #b9b8b0; }
@media (prefers-color-scheme: dark) {
svg { background: #1a1a19; } text { fill: #c3c2b7; } .title, .name { fill: #fff; } .grid { stroke: #2c2c2a; } .dot { stroke: #1a1a19; }
.s0 { stroke: #3987e5; } .d0 { fill: #3987e5; } .s1 { stroke: #d95926; } .d1 { fill: #d95926; }
.s2 { stroke: #3cc79a; } .d2 { fill: #3cc79a; } .other { fill: #5b5a55; }
}"""
_NAMES, _BAR, _BAR_GAP = 205, 14, 6  # of bars: the room for their names, their height and what is between them


def small_multiples(
    title: str, ticks: Sequence[str], series: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
    """`panels`: by their names, for each of the series a value for each of the ticks. At most three series."""
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    width, height = _COLUMNS * _WIDTH, _HEAD + rows * _HEIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}\n</style>",
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>',
    ]
    for index, name in enumerate(series):
        x = _LEFT + 140 * index
        out.append(f'<circle class="d{index}" cx="{x + 5}" cy="38" r="5"/><text x="{x + 15}" y="42">{escape(name)}</text>')
    out.append(f'<text text-anchor="end" x="{width - 12}" y="42">every axis from 0</text>')
    for index, (name, lines) in enumerate(panels.items()):
        x, y = index % columns * (width // columns), _HEAD + index // columns * _HEIGHT
        out += [f'<g transform="translate({x} {y})">', *_panel(name, ticks, series, lines, width // columns), "</g>"]
    return "\n".join([*out, "</svg>", ""])


def bars(title: str, ours: str, panels: Mapping[str, Mapping[str, float]]) -> str:
    """`panels`: by their names, a value for each bar, in their order; those whose names begin with `ours` stand out."""
    columns = min(len(panels), 2)
    height = 30 + max(map(len, panels.values())) * (_BAR + _BAR_GAP)  # of a panel
    width, all_height = _COLUMNS * _WIDTH, 40 + -(-len(panels) // columns) * height + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{all_height}" viewBox="0 0 {width} {all_height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}\n</style>",
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>',
    ]
    room = width // columns - _LEFT - _NAMES - _RIGHT
    for index, (name, values) in enumerate(panels.items()):
        x, y = index % columns * (width // columns), 40 + index // columns * height
        out.append(f'<g transform="translate({x} {y})"><text class="name" x="{_LEFT}" y="16">{escape(name)}</text>')
        for row, (bar, value) in enumerate(values.items()):
            top, long = 26 + row * (_BAR + _BAR_GAP), room * value / max(values.values())
            kind = "d0" if bar.startswith(ours) else "other"
            out.append(f'<text x="{_LEFT}" y="{top + 11}">{escape(bar)}</text>')
            out.append(f'<rect class="{kind}" x="{_LEFT + _NAMES}" y="{top}" width="{max(1.0, long):.1f}" height="{_BAR}" rx="2"/>')
            out.append(f'<text x="{_LEFT + _NAMES + max(1.0, long) + 6:.1f}" y="{top + 11}">{_short(value)}</text>')
        out.append("</g>")
    return "\n".join([*out, "</svg>", ""])


def _panel(
    name: str, ticks: Sequence[str], series: Sequence[str], lines: Mapping[str, Sequence[float]], width: int
) -> list[str]:
    right, bottom = width - _RIGHT, _HEIGHT - _BOTTOM
    most = max(value for values in lines.values() for value in values) * 1.1

    def at(position: int, value: float) -> tuple[float, float]:
        return _LEFT + position * (right - _LEFT) / max(1, len(ticks) - 1), bottom - value / most * (bottom - _TOP)

    out = [f'<text class="name" x="{_LEFT}" y="24">{escape(name)}</text>']
    out += [f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>' for y in (_TOP, bottom)]
    for position, tick in enumerate(ticks):
        anchor = ("start", "end")[position == len(ticks) - 1] if position in (0, len(ticks) - 1) else "middle"
        out.append(f'<text text-anchor="{anchor}" x="{at(position, 0)[0]:.1f}" y="{_HEIGHT - 8}">{escape(tick)}</text>')
    placed: list[float] = []
    for key, values in sorted(lines.items(), key=lambda line: -line[1][-1]):
        index = series.index(key)
        points = [at(position, value) for position, value in enumerate(values)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline class="line s{index}" points="{drawn}"/>')
        out += [f'<circle class="dot d{index}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        beside = max([points[-1][1] + 4, *(y + 12 for y in placed)])  # labels do not overlap
        placed.append(beside)
        out.append(f'<text x="{right + 8}" y="{beside:.1f}">{values[-1]:.3g}</text>')
    return out


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
