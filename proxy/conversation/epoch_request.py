"""What a rebuild of the window depends on, and how its pages are fetched at a level. Pure."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.conversation.effects import Effect, Load
from proxy.conversation.limits import Limits
from proxy.conversation.pathpages import PathPages
from proxy.conversation.window import Entry
from proxy.memory.eviction_policy import EvictionPolicy
from proxy.memory.models import CompressionLevel, MemoryPage, PageMutation, VMMode
from proxy.memory.pins import PinnedSet
from proxy.memory.table import PageTable
from proxy.tokens import TokenCounter


@dataclass(slots=True)
class EpochRequest:
    """Everything a rebuild depends on. `floor`: no message before it may become native again;
    `after`: so many messages follow those of the pages, and stand in `tail`."""

    pages: PathPages
    table: PageTable
    policy: EvictionPolicy
    pins: PinnedSet
    counter: TokenCounter
    limits: Limits
    substitutes: Callable[[bytes], Sequence[bytes]]
    names: Mapping[str, str]  # what the VM tools are called in this conversation
    mode: VMMode
    turn: int
    epoch: int
    floor: int
    room_tokens: int  # for everything but the client's system messages and the tools
    apply: Callable[[PageMutation], None]  # changes the table
    newest: Entry | None = None  # the newest message as this turn already sent it
    tail: tuple[Entry, ...] = ()  # this turn's VM exchange so far, or what comes `after`
    after: int = 0
    shown: dict[tuple[str, int], MemoryPage] = field(default_factory=dict)  # loaded by now


def show(
    request: EpochRequest, wanted: str, level: CompressionLevel
) -> Generator[Effect, Any, MemoryPage]:
    """A page at a level: from the shell where that takes a codec or a model, else made here."""
    page = request.shown.get((wanted, int(level)))
    if page is None:
        made_elsewhere = request.limits.written_by_models or request.pages.is_medium(wanted)
        if made_elsewhere and (level or wanted in request.pages.derived.pages):
            page = yield Load(wanted, int(level))
        else:
            page = request.pages.at(wanted, level)
        request.shown[wanted, int(level)] = page
    return page
