"""What a check is, and how its outcome is said.

Promises: a check is played in one or more variants (a short conversation, one beyond the window;
a whole answer, a stream); an outcome is passed, failed with a reason in one line, or not applicable
with a reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.contract.play import Play

REASON_CHARS = 600  # of a failure, as far as it is shown

Scenario = Callable[["Play"], Awaitable[None]]


class Failed(Exception):
    """The promise was broken; the text quotes what was seen."""


class NotApplicable(Exception):
    """This gateway cannot be asked this."""


@dataclass(frozen=True, slots=True)
class Variant:
    """`long`: the conversation is beyond the window. `stream`: the answer is asked for as a stream."""

    long: bool = False
    stream: bool = False

    @property
    def name(self) -> str:
        return ("long" if self.long else "short") + (" stream" if self.stream else "")


SHORT, SHORT_STREAM = Variant(), Variant(stream=True)
LONG, LONG_STREAM = Variant(long=True), Variant(long=True, stream=True)
BOTH = (SHORT, LONG)
STREAMS = (SHORT_STREAM, LONG_STREAM)
ALL = (SHORT, SHORT_STREAM, LONG, LONG_STREAM)
PAGED = (LONG, LONG_STREAM)


@dataclass(frozen=True, slots=True)
class Check:
    """`needs`: "" any gateway, "proxy" anything but bare, "loop" one that answers calls of its own
    tools inside, "window" one that keeps requests below a window. `alone`: it measures time, so
    nothing else runs beside it."""

    id: str
    promise: str
    scenario: Scenario
    variants: tuple[Variant, ...]
    needs: str = ""
    alone: bool = False

    @property
    def category(self) -> str:
        return self.id.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Case:
    """One check in one variant."""

    check: Check
    variant: Variant

    @property
    def id(self) -> str:
        return f"{self.check.id}[{self.variant.name}]"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status`: passed | failed | n/a. `note`: the reason, or what was measured."""

    status: str
    note: str = ""


_checks: dict[str, Check] = {}


def check(
    id: str,
    promise: str,
    variants: tuple[Variant, ...] = BOTH,
    *,
    needs: str = "",
    alone: bool = False,
) -> Callable[[Scenario], Scenario]:
    """Registers a scenario. Raises ValueError when the id is taken."""

    def register(scenario: Scenario) -> Scenario:
        add(Check(id, promise, scenario, variants, needs, alone))
        return scenario

    return register


def add(made: Check) -> None:
    """Registers a check. Raises ValueError when its id is taken."""
    if made.id in _checks:
        raise ValueError(f"two checks are called {made.id}")
    _checks[made.id] = made


def cases(only: str | None = None) -> list[Case]:
    """Every case, or those whose check's id (or beginning of it) or own id is `only`."""
    return [case for case in _every() if only is None or _named(case, only)]


def _every() -> Iterator[Case]:
    for one in _checks.values():
        for variant in one.variants:
            yield Case(one, variant)


def _named(case: Case, only: str) -> bool:
    return only in (case.id, case.check.id, case.check.category) or case.check.id.startswith(only)


def quote(value: Any, chars: int = 240) -> str:
    """A value in one short line."""
    text = value if isinstance(value, str) else repr(value)
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= chars else f"{text[:chars]}... ({len(text)} characters)"


def equal(got: Any, want: Any, what: str) -> None:
    """Fails when two values differ, quoting both."""
    if got != want:
        raise Failed(f"{what}: got {quote(got)}, wanted {quote(want)}")


def expect(true: object, what: str) -> None:
    """Fails with `what` unless `true`."""
    if not true:
        raise Failed(what)
