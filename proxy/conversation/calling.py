"""Whether a model calls the VM tools, and whether that helps: learned turn by turn, so that the tools' tokens go
where nobody uses them. Pure.

Promises: the tools are on offer until MANY turns in a row needed a call and had none (of a model whose calls have
helped before, four times as many); then every TRIAL-th epoch of the model has them again, and one call that helps
brings them back for good. What is counted is a fact of the model behind a key, stored with the turn that counts; a
conversation's next epoch goes by what stood there at its last answer, which the answer's record keeps, and an epoch
by what its window says: so neither a retry, a restart nor another replica changes a byte.

A turn *needed* a call when the model could make one, the user asked for what a page outside the window holds (half
of the question's words stand on it, and it is no question itself), and the answer took nothing from what was shown of it unasked. In people's
chats that is one turn in 400, of their later questions about them two in three. A call *helped* when it brought a
page, or a search found one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

from proxy.conversation.records import Record
from proxy.conversation.window import Window
from proxy.memory.prefetcher import shared_terms

VM_CALLS = "vm_calls"  # of what is learned of a model: its `Calling`
MANY = 24
TRIAL = 16
_PROVEN = 4
_SHARED = 2  # words of a question on the page that holds what it asks for, at least ...
_HALF = 2  # ... and at least 1/2 of its words
_MOST = 1 << 30
_QUIET_EPOCHS = 3


class Calling(NamedTuple):
    """Turns whose calls helped, turns in a row since then that needed one and had none, and epochs that began
    since the tools went."""

    helped: int = 0
    missed: int = 0
    without: int = 0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Calling:
        """What was learned; nothing from what is not ours."""
        fact = facts.get(VM_CALLS)
        if isinstance(fact, (list, tuple)) and len(fact) == 3 and all(isinstance(n, int) for n in fact):
            return cls(*fact)
        return cls()

    @property
    def given_up(self) -> bool:
        return self.missed >= MANY * (_PROVEN if self.helped else 1)

    @property
    def offered(self) -> bool:
        """The next epoch has the tools."""
        return not self.given_up or self.without % TRIAL == TRIAL - 1

    def described(self, always: bool = False) -> dict[str, Any]:
        """For people."""
        return {"tools_offered": always or not self.given_up, "turns_helped": self.helped, "turns_missed": self.missed}

    def after(self, *, needed: bool, helped: bool, began: bool) -> Calling:
        """With one more turn; `began`: an epoch did in it."""
        if helped:
            return Calling(min(self.helped + 1, _MOST))
        if self.given_up:
            return self._replace(without=self.without + began)
        return self._replace(missed=self.missed + needed)


def holds(page_text: str, asked: frozenset[str]) -> bool:
    """The page has what a question of these terms asks for."""
    least, low = max(_SHARED, -(-len(asked) // _HALF)), page_text.lower()
    absent = (term for term in asked if term not in low)
    if least > len(asked) or any(islice(absent, len(asked) - least, None)):
        return False
    return len(shared_terms(page_text, asked)) >= least


def may_speak_first(facts: Mapping[str, Any], window: Window | None) -> bool:
    """The first words of a stream may be a preamble: of a model whose calls have helped, and of any other in the
    first epochs of a conversation. Beyond, nobody's first words wait for a call that never comes; a preamble is
    then shown, and its call answered inside."""
    return Calling.of(facts).helped > 0 or window is None or window.epoch <= _QUIET_EPOCHS


def offered(
    model: str, facts: Mapping[str, Any], record: Record | None, window: Window | None
) -> tuple[bool, bool]:
    """Whether the VM tools are on offer in a turn after `record`, and from its next epoch on."""
    bill = record.bill if record is not None else None
    following = bill.calls if bill is not None and bill.model == model else Calling.of(facts).offered
    return (following if window is None else window.tools), following
