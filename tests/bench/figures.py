"""The charts of README.md and docs/measured.md, drawn from the tables that stand there: one source of each figure.

    python -m tests.bench.figures            draws docs/recall.svg, bill.svg, overhead.svg and engine.svg anew
    python -m tests.bench.figures --bill     plays the demo, and prints the table of its bill turn by turn
    python -m tests.bench.figures --map      plays 80 turns of it, and draws docs/map.svg: which pages were in the window when
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

from proxy.demo.bill import Ledger
from proxy.ui.charts import map_chart
from proxy.upstream import RootPath, Upstream
from tests.bench.chart import bars, small_multiples

DOCS = Path(__file__).resolve().parents[2] / "docs"
_TURNS_A_ROW = 39  # six rows of the demo's 234 turns
_MAPPED_TURNS = 80
_MAP_STYLE = """
svg { font: 11px system-ui, sans-serif; background: #fcfcfb; } text { fill: #52514e; } .title { font-size: 14px; font-weight: 600; fill: #0b0b0b; }
.native { fill: #2a78d6; } .evidence { fill: #1b9e77; } .fault { fill: #eb6834; } .kept0 { fill: #7fb0ea; } .kept1 { fill: #a9c9f0; }
.kept2 { fill: #c9dcf5; } .kept3 { fill: #dfe9f7; } .line { fill: #8a8984; } .out { fill: #efeeea; }
@media (prefers-color-scheme: dark) {
svg { background: #1a1a19; } text { fill: #c3c2b7; } .title { fill: #fff; } .native { fill: #3987e5; } .evidence { fill: #3cc79a; } .fault { fill: #d95926; }
.out { fill: #252523; } .kept0 { fill: #2c5d96; } .kept1 { fill: #26496f; } .kept2 { fill: #22394f; } .kept3 { fill: #202d3a; }
}"""


def rows(heading: str, text: str) -> list[list[str]]:
    """The cells of the first table whose first line has `heading`, without its head."""
    lines = text[text.index(heading) :].splitlines()
    table = lines[2 : next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def number(cell: str) -> float:
    """The first number of a cell: `74.7 (29.2)` is 74.7."""
    return float(re.findall(r"[0-9][0-9,.]*", cell)[0].replace(",", ""))


def recall(text: str) -> str:
    """Of each data set at first sight, by window: what stands in the first request."""
    found = {tuple(re.split(" at |, ", cells[0])): cells for cells in rows("| | at once | lost |", text)}
    windows = ["4,000", "16,000"]
    columns = {"llm-pager": 1, "BM25, window full": 5, "sliding window": 4}
    panels = {
        f"{data}: % at once": {
            name: [number(found[data, window, "first sight"][column]) for window in windows]
            for name, column in columns.items()
        }
        for data in ("LoCoMo", "BEAM")
    }
    title = "What is asked for stands in the first request, by window (tokens)"
    return small_multiples(title, windows, list(columns), panels)


def bill(text: str) -> str:
    """Of the demo, turn by turn."""
    cells = rows("| turn of the demo |", text)
    names = ["llm-pager", "full history", "sliding window"]
    thousands = {name: [number(row[column]) / 1000 for row in cells] for column, name in enumerate(names, 1)}
    ticks = [row[0] if n in (0, len(cells) - 1) else "" for n, row in enumerate(cells)]
    title = "Input billed so far in the demo, window 4,000, by turn (thousands of tokens)"
    return small_multiples(title, ticks, names, {"thousands of tokens": thousands})


def overhead(text: str) -> str:
    """Each column of the table as a panel; a gateway that was not run in it has no bar."""
    heading = "| | new 1 KB chat |"
    names = [cell.strip() for cell in text[text.index(heading) :].partition("\n")[0].strip("|").split("|")][1:]
    cells = [row for row in rows(heading, text) if "/" not in row[0]]
    panels = {
        f"{name}, ms": {row[0]: number(row[column]) for row in cells if any(map(str.isdigit, row[column]))}
        for column, name in enumerate(names, 1)
    }
    return bars("What a request costs in the gateway: CPU, and the time to the first token", "llm-pager", panels)


def engine(text: str) -> str:
    """Tokens evaluated a turn, by the way in which the window was made."""
    found = {row[0]: number(row[1]) for row in rows("| window made by |", text)}
    return bars("Tokens that a real engine evaluated a turn (Qwen2.5-Coder 0.5B, window 4,000)", "llm-pager", {"tokens a turn": found})


def charts() -> dict[str, str]:
    """Each chart's file in docs/ and what belongs in it."""
    text = (DOCS / "measured.md").read_text(encoding="utf-8")
    drawn = {"recall": recall, "bill": bill, "overhead": overhead, "engine": engine}
    return {f"{name}.svg": draw(text) for name, draw in drawn.items()}


def played() -> None:
    """The demo's accounts, as they stand every so many turns."""
    from proxy.demo import play

    table: list[str] = []
    turn, count = Ledger.turn, 0

    def noted(ledger: Ledger, *args: object) -> None:
        nonlocal count
        turn(ledger, *args)  # type: ignore[arg-type]
        count += 1
        if count % _TURNS_A_ROW == 0:
            billed = " | ".join(f"{account.billed_tokens:,.0f}" for account in ledger.accounts)
            table.append(f"| {count} | {billed} |")

    with patch.object(Ledger, "turn", noted):
        play.main(fast=True, window=None, ui=False, as_json=False)
    print("\n| turn of the demo | llm-pager | full history | sliding window |\n|---|---|---|---|", *table, sep="\n")


def mapped() -> str:
    """The memory map of the dashboard, of the demo's first turns, as a picture for itself."""
    from proxy.demo import play

    told: dict[str, Any] = {}
    plays = play.Show.play

    async def first_turns(show: play.Show, client: Upstream) -> None:
        show.turns = show.turns[:_MAPPED_TURNS]
        await plays(show, client)

        async def got(path: str) -> Any:
            reply = await client.forward("GET", RootPath(path), b"", [(b"authorization", b"Bearer demo")], None)
            return json.loads(await reply.read(1 << 24))

        newest = (await got("/vm/conversations"))["conversations"][0]["conversation"]
        told.update(await got(f"/vm/conversations/{newest}/map"))

    with patch.object(play.Show, "play", first_turns):
        play.main(fast=True, window=None, ui=False, as_json=False)
    return drawn(map_chart(told))


def drawn(chart: dict[str, Any]) -> str:
    """A map with its legend; colours as the charts have them."""
    width, height, top = int(chart["used_width"]) + 24, chart["height"] + 44, 40
    title = f"The memory map: pages (rows) over {len(chart['turns'])} turns of the demo, window 4,000 tokens"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{title}</title><style>{_MAP_STYLE}</style>",
        f'<text class="title" x="12" y="20">{title}</text>',
    ]
    x = 12
    for kind, name in [*chart["places"], ("line", "a new epoch")]:
        out.append(f'<rect class="{kind}" x="{x}" y="30" width="10" height="10"/><text x="{x + 15}" y="39">{name}</text>')
        x += 34 + 6 * len(name)
    out.append(f'<g transform="translate(12 {top - 20})">')
    for cell in [*chart["stored"], *chart["cells"]]:
        out.append(f'<rect class="{cell.get("kind", "out")}" x="{cell["x"]}" y="{cell["y"]}" width="{cell["w"]}" height="{cell["h"]}"/>')
    for line in chart["lines"]:
        out.append(f'<rect class="line" x="{line["x"]}" y="{chart["top"]}" width="1" height="{chart["height"] - chart["top"] - 18}"/>')
    for tick in chart["ticks"]:
        out.append(f'<text text-anchor="middle" x="{tick["x"]}" y="{chart["height"] - 4}">{tick["turn"]}</text>')
    return "\n".join([*out, "</g></svg>", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bill", action="store_true", help="play the demo and print the table of its bill")
    parser.add_argument("--map", action="store_true", help="play the demo's first turns and draw docs/map.svg")
    options = parser.parse_args()
    if options.bill:
        played()
    elif options.map:
        (DOCS / "map.svg").write_text(mapped(), encoding="utf-8")
    else:
        for name, svg in charts().items():
            (DOCS / name).write_text(svg, encoding="utf-8")
