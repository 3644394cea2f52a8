"""How commands tell: one JSON value, a table, lines; a progress bar beside them.

Promises: what was asked for is all of standard output; a bar, a question, what is wrong go to standard error; colours and
bars are for terminals only (`NO_COLOR` is kept); a table is cut to a terminal's width, and elsewhere to none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from proxy.readable import harmless

Advance = Callable[[int, int | None], None]  # done so far, of how many
_WIDE = 1000  # columns of what is no terminal
_GAP = 2  # between two columns


def tell_json(value: Any, to: TextIO | None = None) -> None:
    """In one line, but on a terminal."""
    print(harmless(json.dumps(value, ensure_ascii=False, indent=2 if (to or sys.stdout).isatty() else None)), file=to, flush=True)


def console() -> Console:
    """Of standard output."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False, emoji=False, soft_wrap=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first and the last column are text, those between them figures; the last is cut, so that a row is a line."""
    lines = [[" ".join(harmless(cell).split()) for cell in row] for row in rows]
    taken = sum(max(cell_len(line[at]) + _GAP for line in [heads, *lines]) for at in range(len(heads) - 1))
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for at, head in enumerate(heads):
        made.add_column(head, justify="left" if at in (0, len(heads) - 1) else "right", no_wrap=True)
    for line in lines:
        *cells, last = map(Text, line)
        last.truncate(max(1, console().width - taken), overflow="ellipsis")
        made.add_row(*cells, last)
    return made


def tell_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    to = console()
    with to.capture() as captured:
        to.print(table(heads, rows))
    for line in captured.get().splitlines():
        print(line.rstrip())


class Told:
    """Lines of a name and a sentence: printed as they come or, for JSON, together at the end."""

    def __init__(self, as_json: bool) -> None:
        self._lines: list[dict[str, str]] | None = [] if as_json else None

    def __call__(self, name: str, sentence: str) -> None:
        if self._lines is None:
            print(f"{name:10} {sentence}", flush=True)
        else:
            self._lines.append({"what": name, "told": sentence})

    def end(self, **facts: Any) -> None:
        if self._lines is not None:
            tell_json({**facts, "lines": self._lines})


@contextmanager
def progress(what: str, shown: bool = True) -> Iterator[Advance]:
    """A bar on standard error, where that is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = not (shown and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
