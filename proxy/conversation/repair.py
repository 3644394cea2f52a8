"""One turn's knowledge of its model, and how a refused request is made to pass. Pure.

Promises: each repair is made once in a turn, so that the tries are bounded; a repair changes only
what the refusal named; the facts that it leaves behind are those that the next turn begins with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from proxy.conversation.body import Fields
from proxy.conversation.capability import (
    LARGE_TOKENS,
    LEAST_WINDOW_TOKENS,
    Capabilities,
    Seen,
    within,
)
from proxy.conversation.channel import PASSIVE, Channel
from proxy.conversation.effects import Refused
from proxy.conversation.form import Form
from proxy.conversation.limits import Limits
from proxy.conversation.refusal import (
    Overflow,
    by_numbers,
    excluded_by,
    is_for_the_moment,
    is_something_else,
    learn,
    names_audio,
    overflow,
)
from proxy.tokens import TokenCounter

_KNOWN_SHARE = 0.75  # of what was sent: a window that is known is not far off, as it seems
_ASSUMED_SHARE = 0.5  # a window that is only assumed may be anything: half, after a failure a quarter
_MOST_FAILURES = 2
_NOTHING_SEEN = Seen()
_FILLED = 0.8  # of the budget: a request that passes with so much says something of the window
COUNTED_FIELDS = ("tools", "functions", "response_format", "prediction")
_FORM = ("mid_system", "system_role", "alternate")  # what a refusal may say of the messages' form
_BODY_REFUSED = (400, 422)
_decode = msgspec.json.decode


@dataclass(slots=True)
class Model:
    """What this turn knows of its model; changed by refusals. `learned` are the new facts."""

    capabilities: Capabilities
    limits: Limits
    max_tokens: int | None
    fields: tuple[str, ...] = ()  # the request's
    learned: dict[str, Any] = field(default_factory=dict)
    audio: bool = True  # audio ids of earlier answers are still good
    assumed: bool = False  # nobody said how large the window is
    blind: bool = False  # the window was made smaller without a word that we understand
    unexplained: bool = False  # a refusal of a large request was
    shrunk: bool = False  # in this turn
    doubted_tokens: int = 0  # a window that upstream's trouble of the moment may have feigned

    @classmethod
    def of(
        cls, capabilities: Capabilities, limits: Limits, decoded: Mapping[str, Any]
    ) -> Model:
        """For a request with these top-level fields."""
        length = decoded.get("max_completion_tokens") or decoded.get("max_tokens")
        length = length if isinstance(length, int) else None
        return cls(capabilities, limits, length, tuple(decoded))

    def __post_init__(self) -> None:
        window = self.capabilities.window_tokens
        guessed = window is None or bool(self.capabilities.refused_tokens)
        self.assumed = guessed and not self.limits.window_known
        if window is not None:
            tokens = max(LEAST_WINDOW_TOKENS, int(window / self.limits.tokens_factor))
            if tokens < self.limits.window_tokens or not self.limits.window_known:
                self._take(tokens, guessed)

    @property
    def form(self) -> Form:
        """How its messages have to look. OpenAI's own models surely read several system messages,
        behind whatever gateway; of others nobody knows: some templates refuse a second one, some
        drop it without a word."""
        known = self.capabilities
        several = known.mid_system
        if several is None:
            several = self.limits.developer_role == "developer"
        alone = known.alternate or not known.system_role
        return Form(
            several and not alone, known.mid_system is not False and known.system_role,
            known.system_role, alone,
        )  # fmt: skip

    def shrink(self, refused: Refused, counted_tokens: int, seen: Seen = _NOTHING_SEEN) -> bool:
        """Take the window from an overflow, in upstream's words or without.

        `counted_tokens` is the refused request's count; a refusal of no more than has passed before
        is not about size. False when it is about something else, or the second one in this turn.
        """
        if self.shrunk:
            return False
        sent = int(counted_tokens * self.limits.tokens_factor)
        said = overflow(refused, sent)
        if said is None:
            explained = is_something_else(refused) or bool(learn(refused.body, self.limits))
            self.unexplained = self.assumed and sent >= LARGE_TOKENS and not explained
            if not self.unexplained or sent <= seen.passed_tokens:
                return False
            said, self.blind = by_numbers(refused, sent), True
        window = said.window_tokens or self._guess(said, sent, counted_tokens, seen)
        if window < LEAST_WINDOW_TOKENS:
            return False
        # Upstream's own count of this request says what its tokens are in ours.
        factor = said.sent_tokens / counted_tokens if said.sent_tokens and counted_tokens else 1.0
        factor = min(4.0, max(0.25, factor, self.limits.tokens_factor if factor == 1.0 else 0))
        self.shrunk = True
        guessed = self.blind or said.window_tokens is None
        if said.window_tokens is None and self.blind and is_for_the_moment(refused) and not seen.doubted:
            self.doubted_tokens = window
        else:
            self.learned["window_tokens"] = window
            if guessed or self.capabilities.refused_tokens:
                self.learned["refused_tokens"] = (said.sent_tokens or sent) if guessed else 0
        self._take(int(window / factor), guessed)
        return True

    def _take(self, window_tokens: int, guessed: bool) -> None:
        """A guess binds what can be paged, and nothing else: the window is still not known."""
        self.limits = within(self.limits, window_tokens)
        if self.assumed and guessed:
            self.limits = replace(self.limits, window_known=False)

    def _guess(self, said: Overflow, sent: int, counted: int, seen: Seen) -> int:
        """The window, when upstream does not say how large it is."""
        sent = said.sent_tokens or sent
        if said.excess_tokens:
            return sent - said.excess_tokens
        halvings = 1 + min(seen.failures, _MOST_FAILURES)
        share = _ASSUMED_SHARE**halvings if self.assumed else _KNOWN_SHARE
        proved = seen.passed_tokens if seen.passed_tokens < sent else 0
        return max(int(min(sent, counted) * share), proved)

    def passed(self, counted_tokens: int) -> None:
        """A request of so many tokens was answered: a guess that it filled may have been too low."""
        known = self.capabilities
        if self.shrunk or not known.refused_tokens or known.window_tokens is None:
            return
        filled = counted_tokens >= _FILLED * self.limits.budget_tokens
        if filled and (window := known.grown()) > known.window_tokens:
            self.learned["window_tokens"] = window

    def adapt(self, refused: Refused, ours: Iterable[str]) -> bool:
        """Leave out what a refusal names: of our additions (`ours`, facts) or the form of messages."""
        facts = learn(refused.body, self.limits)
        if names_audio(refused) and self.audio:
            self.audio = False
            return True
        known = {k: v for k, v in facts.items() if k in (*ours, *_FORM)}
        if not known or all(getattr(self.capabilities, k) == v for k, v in known.items()):
            return False
        self.capabilities = replace(self.capabilities, **known)
        self.learned.update(known)
        return True

    def says(self, refused: Refused) -> dict[str, Any]:
        """What the refusal teaches, if the request passes without what it names."""
        facts = learn(refused.body, self.limits)
        if facts.keys() - {"tools"}:
            return facts
        excluded = excluded_by(refused.body, self.fields)
        return {"not_with_tools": sorted({*excluded, *self.limits.not_with_tools})} if excluded else facts

    def without_exchange(
        self, refused: Refused, channel: Channel, words: bool
    ) -> Channel | None:
        """The channel for a template that has no place for calls and results: the first round passed,
        and the one that brings our exchange is refused. It goes as text from now on. `words`: only if
        the refusal speaks of roles."""
        if not channel.listed or "tools" in self.learned:
            return None
        said = "alternate" in learn(refused.body, self.limits)
        if not (said or (not words and refused.status in _BODY_REFUSED)):
            return None
        self.learned["tools"] = False
        self.limits = replace(self.limits, model_takes_tools=False)
        return unlisted(channel)

    def without(self, refused: Refused, channel: Channel) -> Channel | None:
        """The channel for a model that refused tools or the developer role, or None."""
        facts = self.says(refused)
        if not facts or facts.keys() & self.learned.keys():
            return None
        self.learned.update(facts)
        if "developer_role" in facts:
            self.limits = replace(self.limits, developer_role=facts["developer_role"])
            return channel
        if "not_with_tools" in facts:
            self.limits = replace(self.limits, not_with_tools=frozenset(facts["not_with_tools"]))
        elif "tools_with_json" in facts:
            self.limits = replace(self.limits, tools_with_json=False)
        else:
            self.limits = replace(self.limits, model_takes_tools=False)
        return unlisted(channel) if channel.listed else None


def unlisted(channel: Channel) -> Channel:
    """The same conversation without the VM tools."""
    return replace(channel, name=PASSIVE, listed=False)


def fixed_tokens(system: Sequence[bytes], fields: Fields, counter: TokenCounter) -> int:
    """Tokens of what every request carries beside its history."""
    total = sum(counter.message(_decode(raw)) for raw in system)
    for name in COUNTED_FIELDS:
        value = _decode(fields[name]) if name in fields else None
        total += counter.tools(value if isinstance(value, list) else [value]) if value else 0
    return total
