"""How a tool was used again and again, as one page: the call that worked, and what usually followed.

Promises: pure; read from the assistant's calls as `message_text` shows them (`name({...})` on a line of its
own); only a tool called at least MIN_CALLS times in the segment with the same argument names makes a page.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from proxy.memory.models import MemoryPage, PageType, StorageTier
from proxy.memory.sentences import PageText

PROCEDURES_PER_SEGMENT = 3
MIN_CALLS = 3
PROCEDURE_IMPORTANCE = 0.6
MAX_SOURCES = 16

_CALL = re.compile(r"^([A-Za-z_][\w.\-]{0,63})\((\{.*\})\)$", re.MULTILINE)
_EXAMPLE_CHARS = 160
_MAX_ARGUMENT_CHARS = 20_000


class _Call(NamedTuple):
    page_id: str
    tool: str
    names: tuple[str, ...]
    shown: str


def procedure_pages(
    number: int, docs: Sequence[PageText], turn: int, count: Callable[[str], int]
) -> list[MemoryPage]:
    """The procedures of segment `number`, the most used first: `procedure_seg_03_1`, ..."""
    calls = [call for doc in docs if doc.role == "assistant" for call in _calls(doc)]
    times = Counter((call.tool, call.names) for call in calls)
    used = [key for key, n in times.most_common() if n >= MIN_CALLS]
    pages = []
    for k, (tool, names) in enumerate(used[:PROCEDURES_PER_SEGMENT], 1):
        mine = [i for i, call in enumerate(calls) if (call.tool, call.names) == (tool, names)]
        text = f"{tool}({', '.join(names)}): called {len(mine)} times, e.g. {calls[mine[-1]].shown}"
        after = Counter(calls[i + 1].tool for i in mine if i + 1 < len(calls))
        if after:
            following, n = after.most_common(1)[0]
            if following != tool and n >= MIN_CALLS and 2 * n > len(mine):
                text += f"; {following} usually came next"
        pages.append(
            MemoryPage(
                page_id=f"procedure_seg_{number:02d}_{k}",
                page_type=PageType.PROCEDURE,
                content=text,
                storage_tier=StorageTier.L2,
                size_tokens=count(text),
                provenance=list(dict.fromkeys(calls[i].page_id for i in mine))[-MAX_SOURCES:],
                importance=PROCEDURE_IMPORTANCE,
                metadata={"turn": turn, "tool": tool},
            )
        )
    return pages


def _calls(doc: PageText) -> list[_Call]:
    out: list[_Call] = []
    if "({" not in doc.text:
        return out
    for match in _CALL.finditer(doc.text):
        if len(match[2]) > _MAX_ARGUMENT_CHARS:
            continue
        try:
            arguments = json.loads(match[2])
        except (ValueError, RecursionError):  # the model's own text that looks like a call
            continue
        shown = match[0]
        if len(shown) > _EXAMPLE_CHARS:
            shown = shown[:_EXAMPLE_CHARS] + "…"
        out.append(_Call(doc.page_id, match[1], tuple(arguments), shown))
    return out
