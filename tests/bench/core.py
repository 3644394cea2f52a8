"""The memory core's own speed: planning and packing after one new message, by the age of the
conversation.

Run from the repository's root: `python -m tests.bench.core [--sizes 100,1000,10000]`. For each
number of pages a conversation grows turn by turn, paged as `proxy.conversation.turn` pages it, so
that it has every index that its segments left; then TURNS more turns come.
Printed are the medians in microseconds of

- `append`: a turn whose message is added to the window (page table, log, window, the messages'
  bytes);
- `rebuild`: a turn that begins an epoch (the segment, the plan, the kept pages
  at their levels, the manifest, the bytes);
- `plan`: the planner alone, on the groups that the rebuild had;

each with its ratio to the first row. Nothing here does I/O; the window has the same size
throughout, so what grows, grows with the pages outside it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from proxy.conversation import epoch
from proxy.conversation.body import Body
from proxy.conversation.channel import choose_channel
from proxy.conversation.context import TurnContext
from proxy.conversation.derived import NO_DERIVED, Derived
from proxy.conversation.effects import Effect, Offload
from proxy.conversation.form import Form
from proxy.conversation.identify import Place
from proxy.conversation.limits import Limits
from proxy.conversation.pages import PathPages
from proxy.conversation.records import State
from proxy.conversation.report import TurnReport
from proxy.conversation.tree import Identity, Node
from proxy.conversation.turn_window import TurnWindow
from proxy.conversation.window import Window
from proxy.memory import planner
from proxy.memory.eviction import ImportanceWeightedLRU
from proxy.memory.models import VMMode
from proxy.memory.planner import Plan
from proxy.memory.table import PageTable
from proxy.memory.working_set import WorkingSetConfig
from proxy.tokens import get_counter
from tests.bench.texts import Texts

SIZES = (100, 1_000, 10_000)
ROOM_TOKENS = 8_000
MESSAGE_CHARS = 320
TURNS = 200
SYSTEM = b'{"role":"system","content":"You are a helpful assistant."}'
SLACK = 4.0  # what a log factor and a noisy machine are allowed, from the first size to the last

_counter = get_counter("gpt-4o")


def limits_of(room_tokens: int) -> Limits:
    """The default configuration's numbers around a window of `room_tokens`."""
    return Limits(
        working_set=WorkingSetConfig(max_l0_tokens=room_tokens + 1000, reserved_tokens=1000),
        window_tokens=128_000,
        window_known=True,
        mode=VMMode.RELAXED,
        model_takes_tools=True,
        developer_role="developer",
        faults_per_turn=3,
        fault_tokens=8192,
        max_rounds=8,
        prefetch_pages=64,
        prefetch_tokens=None,
        manifest_tokens=1024,
        page_tokens=1024,
        search_results=10,
        snippet_tokens=64,
        segment_messages=512,
        max_claims=128,
    )


@dataclass(slots=True)
class Times:
    """Microseconds, one for each turn."""

    append: list[float] = field(default_factory=list)
    rebuild: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, float, float]:
        """Of append, rebuild and plan."""
        return (
            statistics.median(self.append),
            statistics.median(self.rebuild),
            statistics.median(self.plan),
        )


class Conversation:
    """One conversation, turn after turn, as `Turn` runs a `TurnWindow`."""

    def __init__(self, pages: int) -> None:
        self._texts = Texts("core")
        self._limits = limits_of(ROOM_TOKENS)
        self._table = PageTable()
        self._window: Window | None = None
        self._derived: Derived = NO_DERIVED
        self._turn = 0
        self.path: list[Node] = []
        self.times = Times()
        while len(self.path) < pages:
            self._say()
            if len(self.path) % 2:
                self._ask()

    def _say(self) -> None:
        """One message more on the path, counted as a first sight would."""
        number = len(self.path)
        role = "assistant" if number % 2 else "user"
        text = f"Item {number}: {self._texts.text(MESSAGE_CHARS)}"
        raw = msgspec.json.encode({"role": role, "content": text})
        node = Node(number.to_bytes(32, "big"), b"", role, raw)
        node.tokens, node.counter = _counter.message({"role": role, "content": text}), _counter.name
        self.path.append(node)

    def run(self, turns: int) -> None:
        """So many turns, timed, and on until one of each kind was: a message of the user's each, and the answer
        to the one before."""
        while turns > 0 or not (self.times.append and self.times.rebuild):
            turns -= 1
            self._say()
            if len(self.path) % 2 == 0:
                self._say()
            seconds, rebuilt = self._ask()
            (self.times.rebuild if rebuilt else self.times.append).append(seconds * 1e6)

    def _ask(self) -> tuple[float, bool]:
        """(seconds, whether an epoch began) of one turn."""
        self._turn += 1
        begun = time.perf_counter()
        pages = PathPages(self.path, _counter, self._limits.page_tokens, self._derived)
        report = TurnReport("gpt-4o", "tools", self._turn)
        window = self._window
        state = None if window is None else State(window, self._table, self._derived)
        context = TurnContext(
            body=b"", sent=Body({}, [], [SYSTEM], None, 0, [], None), decoded={"model": "gpt-4o"},
            place=Place(self.path, 0, 0, [], None), state=state, limits=self._limits, counter=_counter,
            policy=ImportanceWeightedLRU(), identity=Identity(bytes(32)), tenant=b"", fixed_tokens=lambda: 0,
            substitutes=lambda _: (), get_record=lambda _: None,
        )  # fmt: skip
        channel = choose_channel({}, self._limits)
        paging = TurnWindow(context, pages, self._table, channel, self._limits, None, 0, report)
        for step in (paging.open(), _messages(paging)):
            for effect in step:
                if isinstance(effect, Offload):  # of a shell with threads
                    continue
                raise RuntimeError(f"text needs nothing from the shell, but: {effect}")
        paging.tell()
        seconds = time.perf_counter() - begun
        self._window, self._derived = paging.window, pages.derived
        return seconds, report.new_epoch


def _messages(paging: TurnWindow) -> Generator[Effect, Any, bytes]:
    envelope = yield from paging.envelope(Form(several=True))
    return envelope.window_messages(paging.window)


def measure(pages: int, turns: int = TURNS) -> Times:
    """The times of a conversation that begins with so many pages."""
    conversation = Conversation(pages)
    planned, kept = planner.plan, conversation.times.plan

    def timed(*args: object, **more: object) -> Plan:
        begun = time.perf_counter()
        made = planned(*args, **more)  # type: ignore[arg-type]
        kept.append((time.perf_counter() - begun) * 1e6)
        return made

    gc.collect()
    gc.freeze()  # a full collection costs in proportion to everything alive, whosever it is
    setattr(epoch, "plan", timed)  # noqa: B010
    try:
        conversation.run(turns)
    finally:
        setattr(epoch, "plan", planned)  # noqa: B010
        gc.unfreeze()
    return conversation.times


def show(sizes: Sequence[int], turns: int = TURNS) -> None:
    """The table."""
    print(
        f"window of {ROOM_TOKENS:,} tokens, messages of about {MESSAGE_CHARS} characters,"
        f" {turns} turns; medians in microseconds"
    )
    print(
        f"{'pages':>9}"
        + "".join(f"{name:>12}{'ratio':>8}" for name in ("append", "rebuild", "plan"))
    )
    first: tuple[float, float, float] | None = None
    last = (0.0, 0.0, 0.0)
    for pages in sizes:
        last = measure(pages, turns).medians()
        first = first or last
        cells = "".join(
            f"{now:12.0f}{now / was:8.2f}" for now, was in zip(last, first, strict=True)
        )
        print(f"{pages:9,}{cells}", flush=True)
    grown = max(now / was for now, was in zip(last, first or last, strict=True))
    print(f"grows by at most {grown:.2f} ({'within' if grown <= SLACK else 'ABOVE'} {SLACK:.0f})")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=",".join(str(size) for size in SIZES))
    parser.add_argument("--turns", type=int, default=TURNS)
    asked = parser.parse_args()
    show([int(size) for size in asked.sizes.split(",")], asked.turns)


if __name__ == "__main__":
    main()
