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
from proxy.conversation.capability import LEAST_WINDOW_TOKENS, Capabilities, within
from proxy.conversation.channel import PASSIVE, Channel
from proxy.conversation.effects import Refused
from proxy.conversation.form import Form
from proxy.conversation.limits import Limits
from proxy.conversation.refusal import excluded_by, learn, names_audio, overflow
from proxy.tokens import TokenCounter

_GUESSED_SHARE = 0.75  # of what was sent, when upstream does not say how large its window is
_COUNTED_FIELDS = ("tools", "functions", "response_format", "prediction")
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
        if window is not None:
            tokens = max(LEAST_WINDOW_TOKENS, int(window / self.capabilities.tokens_factor))
            if tokens < self.limits.window_tokens or not self.limits.window_known:
                self.limits = within(self.limits, tokens, self.max_tokens)

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

    def shrink(self, refused: Refused, counted_tokens: int) -> bool:
        """Take the window from an overflow. `counted_tokens` is the refused request's count.

        False when the refusal is about something else, or the second one in this turn.
        """
        said = overflow(refused)
        if said is None or "window_tokens" in self.learned:
            return False
        sent = said.sent_tokens or int(counted_tokens * self.capabilities.tokens_factor)
        window = said.window_tokens
        if window is None:
            least = sent - said.excess_tokens if said.excess_tokens else int(sent * _GUESSED_SHARE)
            window = least if said.excess_tokens else min(least, int(counted_tokens * _GUESSED_SHARE))
        if window < LEAST_WINDOW_TOKENS:
            return False
        # Upstream's own count of this request says what its tokens are in ours.
        factor = sent / counted_tokens if said.sent_tokens and counted_tokens else 1.0
        factor = min(4.0, max(0.25, factor, self.capabilities.tokens_factor if factor == 1.0 else 0))
        self.learned["window_tokens"] = window
        self.limits = within(self.limits, int(window / factor), self.max_tokens)
        return True

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
    return Channel(PASSIVE, False, channel.names)


def fixed_tokens(system: Sequence[bytes], fields: Fields, counter: TokenCounter) -> int:
    """Tokens of what every request carries beside its history."""
    total = sum(counter.message(_decode(raw)) for raw in system)
    for name in _COUNTED_FIELDS:
        value = _decode(fields[name]) if name in fields else None
        total += counter.tools(value if isinstance(value, list) else [value]) if value else 0
    return total
