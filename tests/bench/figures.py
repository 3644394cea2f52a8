"""The charts of README.md and docs/measured.md, drawn from the tables that stand there: one source of each figure.

    python -m tests.bench.figures            draws docs/recall.svg and docs/bill.svg anew
    python -m tests.bench.figures --bill     plays the demo, and prints the table of its bill turn by turn
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from unittest.mock import patch

from proxy.demo.bill import Ledger
from tests.bench.chart import small_multiples

DOCS = Path(__file__).resolve().parents[2] / "docs"
_TURNS_A_ROW = 39  # six rows of the demo's 234 turns


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
    """Of the demo, turn by turn; of chats and agents in their window."""
    cells = rows("| turn of the demo |", text)
    names = ["llm-pager", "full history", "sliding window"]
    thousands = {name: [number(row[column]) / 1000 for row in cells] for column, name in enumerate(names, 1)}
    ticks = [row[0] if n in (0, len(cells) - 1) else "" for n, row in enumerate(cells)]
    title = "Input billed so far in the demo, window 4,000, by turn (thousands of tokens)"
    return small_multiples(title, ticks, names, {"thousands of tokens": thousands})


def charts() -> dict[str, str]:
    """Each chart's file in docs/ and what belongs in it."""
    text = (DOCS / "measured.md").read_text(encoding="utf-8")
    return {"recall.svg": recall(text), "bill.svg": bill(text)}


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
        play.main(argparse.Namespace(fast=True, window=None))
    print("\n| turn of the demo | llm-pager | full history | sliding window |\n|---|---|---|---|", *table, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bill", action="store_true", help="play the demo and print the table of its bill")
    if parser.parse_args().bill:
        played()
    else:
        for name, svg in charts().items():
            (DOCS / name).write_text(svg, encoding="utf-8")
