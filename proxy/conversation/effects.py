"""What a turn asks of its shell, and what it is told. The turn yields one and is sent the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxy.conversation.calibration import Calibration
from proxy.memory.faults import Load as Load
from proxy.memory.questions import Query

if TYPE_CHECKING:  # records.py says what an answered turn appends
    from proxy.conversation.calling import Calling
    from proxy.conversation.records import Record


@dataclass(frozen=True, slots=True)
class Search:
    """Answered with a list of `proxy.memory.ids.Hit`, best first, over positions 0..before-1 of this path only."""

    queries: Sequence[str | Query]  # each a question of its own
    limit: int
    before: int
    skip: Callable[[int, int], bool] | None = None  # (position, part) that the caller does not want
    # When a position's message was first seen (Unix seconds): for questions about a day. None: it is not known.
    seen_s: Callable[[int], int] | None = None
    # Of what is worth so many `words` (`Hit.words`), the evidence without which no page is wanted. None: any will do.
    least: Callable[[float], float] | None = None

    @property
    def query(self) -> str:
        """All that is asked, in one."""
        return " ".join(query if isinstance(query, str) else query.text for query in self.queries)


@dataclass(frozen=True, slots=True)
class Complete:
    """Answered with `Said` or `Refused`. `body` is the upstream request.

    `offer`: the model may call the VM tools; `through`: the answer goes to the client as it is.
    """

    body: bytes
    offer: bool = False
    through: bool = False


@dataclass(slots=True)
class Said:
    """One upstream answer.

    `messages` has one message per choice, VM calls included; empty when the answer cannot be
    remembered. `response` is the decoded body of a non-streaming call; of a streamed one, `shown`
    is what the client has received so far, over all rounds. `unread`: it was a VM call as text that
    cannot be read.
    """

    messages: list[dict[str, Any]]
    finish_reason: str | None
    usage: dict[str, Any] | None
    response: dict[str, Any] | None = None
    shown: dict[str, Any] | None = None
    unread: bool = False
    ended_s: float = 0.0  # when the answer was there (Unix time)


@dataclass(frozen=True, slots=True)
class Refused:
    """Upstream answered with an error: a status, or an error in place of an answer under a status of
    200, whole or as the first of a stream. Nothing of an answer has reached the client yet."""

    status: int  # that it means
    body: bytes
    as_came: Any = field(default=None, compare=False, repr=False)  # the shell's, to send it on


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a turn's bill taught of its model: the evidence, and the facts that it changed (None: such
    a fact is no more). `warning` is for the operator."""

    calibration: Calibration
    facts: Mapping[str, Any]
    warning: str = ""


@dataclass(slots=True)
class Append:
    """Answered when durable. `joins` add a node id to the set under a key.

    `facts` are what refusals taught of the model. `lesson` and `calls`, the fact of how it calls where that
    changed, count only when the turn is new: one that is stored already was billed before.
    """

    puts: list[tuple[bytes, bytes]]
    joins: Sequence[tuple[bytes, bytes]]
    records: list[Record]
    facts: Mapping[str, Any] = field(default_factory=dict)
    lesson: Lesson | None = None
    calls: Calling | None = None


@dataclass(frozen=True, slots=True)
class Offload:
    """Answered with None: what comes next takes as long as a window is large. A shell that others wait for goes on in
    another thread."""


OFFLOAD = Offload()

Effect = Load | Search | Complete | Append | Offload
