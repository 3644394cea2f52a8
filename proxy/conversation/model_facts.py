"""What is known of a model: what it takes, how large its window is, and who said so. Pure.

Promises: a fact is an override (configuration), learned (a refusal or a bill said so), stated (by the
upstream's own list of models) or assumed, in this order; the same facts give the same capabilities. Of a
list of models no server or field is named: a number counts when the keys that lead to it speak of a
context, a model's length or its input, and of nothing else; of several the smallest counts (what one
provider serves of what the model could). In a turn each repair of a refused request is made once, so
that the tries are bounded; it changes only what the refusal named, and the facts that it leaves behind
are those that the next turn begins with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import msgspec

from proxy.conversation.calibration import LEAST_WINDOW_TOKENS
from proxy.conversation.channel import Channel, unlisted
from proxy.conversation.compose import answer_limits
from proxy.conversation.effects import Refused
from proxy.conversation.form import Form
from proxy.conversation.limits import Limits
from proxy.conversation.refusals import (
    Overflow,
    by_numbers,
    excluded_by,
    is_for_the_moment,
    is_something_else,
    learn,
    names_audio,
    overflow,
)
from proxy.tokens import normal_name

LARGE_TOKENS = 1000  # a smaller request fits every model that is in use
_GROWTH = 1.25  # of a guessed window that a request has filled and passed
_KNOWN_SHARE = 0.75  # of what was sent: a window that is known is not far off, as it seems
_ASSUMED_SHARE = 0.5  # a window that is only assumed may be anything: half, after a failure a quarter
_MOST_FAILURES = 2
_FILLED = 0.8  # of the budget: a request that passes with so much says something of the window
_FORM = ("mid_system", "system_role", "alternate")  # what a refusal may say of the messages' form
_BODY_REFUSED = (400, 422)


class Seen(NamedTuple):
    """What a process saw of a model behind a key."""

    passed_tokens: int = 0  # the largest prompt that was answered, as upstream counts
    failures: int = 0  # large requests since then that failed for no reason that we know
    doubted: bool = False  # one may have failed for its size, or for the server's trouble of the moment


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Beside `Limits`: what our own additions to a request may be, and the window that a refusal
    named or a bill showed (`window_tokens`: as upstream counts).

    `refused_tokens`: the window is a guess, made when so many were refused without a reason. A guess
    is never final: it is halved when it is refused, too, and grows while requests that fill it pass,
    as long as it stays below what was refused.
    """

    stream_usage: bool = True  # stream_options.include_usage
    prompt_cache_key: bool = False
    mid_system: bool | None = None  # a second system message, or one after the beginning; None: who knows
    system_role: bool = True  # a system message at all
    alternate: bool = False  # user and assistant have to take turns
    window_tokens: int | None = None
    refused_tokens: int = 0

    def grown(self) -> int:
        """The guessed window, one step up."""
        return min(int((self.window_tokens or 0) * _GROWTH), self.refused_tokens - 1)


def capabilities(override: Mapping[str, Any], learned: Mapping[str, Any], assumed: Mapping[str, Any]) -> Capabilities:
    """The mappings are of field names; None in an override means that it says nothing."""
    known = {**assumed, **learned, **{k: v for k, v in override.items() if v is not None}}
    facts = {one.name: known[one.name] for one in fields(Capabilities) if known.get(one.name) is not None}
    if facts.get("window_tokens", 0) < LEAST_WINDOW_TOKENS:
        facts.pop("window_tokens", None)
    return Capabilities(**facts)


def within(limits: Limits, window_tokens: int) -> Limits:
    """The limits in a window of so many counted tokens, when that is smaller.

    What is kept for the answer shrinks with it: at most a quarter of the window.
    """
    if window_tokens >= limits.working_set.max_l0_tokens:
        return replace(limits, window_tokens=window_tokens, window_known=True)
    reserve = min(limits.working_set.reserved_tokens, window_tokens // 4)
    smaller = {"max_l0_tokens": window_tokens, "reserved_tokens": reserve}
    working_set = limits.working_set.model_copy(update=smaller)
    return replace(limits, working_set=working_set, window_tokens=window_tokens, window_known=True)


class Model:
    """What this turn knows of its model, changed by refusals; for a request with the top-level fields
    `decoded`. `learned` are the new facts."""

    def __init__(self, capabilities: Capabilities, limits: Limits, decoded: Mapping[str, Any]) -> None:
        self.capabilities = capabilities
        self.limits = limits
        self.max_tokens = next(iter(answer_limits(decoded).values()), None)
        self.learned: dict[str, Any] = {}
        self.audio = True  # audio ids of earlier answers are still good
        self.blind = False  # the window was made smaller without a word that we understand
        self.unexplained = False  # a refusal of a large request was
        self.shrunk = False  # in this turn
        self.doubted_tokens = 0  # a window that upstream's trouble of the moment may have feigned
        self._fields = decoded.keys()
        window = capabilities.window_tokens
        guessed = window is None or bool(capabilities.refused_tokens)
        self.assumed = guessed and not limits.window_known  # nobody said how large the window is
        if window is not None:
            tokens = max(LEAST_WINDOW_TOKENS, int(window / limits.tokens_factor))
            if tokens < limits.window_tokens or not limits.window_known:
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
            several and not alone, known.mid_system is not False and known.system_role, known.system_role, alone
        )  # fmt: skip

    def shrink(self, refused: Refused, counted_tokens: int, seen: Seen) -> bool:
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
        excluded = excluded_by(refused.body, self._fields)
        return {"not_with_tools": sorted({*excluded, *self.limits.not_with_tools})} if excluded else facts

    def without_exchange(self, refused: Refused, channel: Channel, words: bool) -> Channel | None:
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


# -- for people


def describe(
    model: str, override: Mapping[str, Any], learned: Mapping[str, Any], assumed: Mapping[str, Any]
) -> dict[str, Any]:
    """One row of the table: `{"model", <fact>: {"value", "from": override|learned|assumed}}`."""
    row: dict[str, Any] = {"model": model}
    for fact in sorted({*override, *learned, *assumed}):
        if override.get(fact) is not None:
            row[fact] = {"value": override[fact], "from": "override"}
        elif fact in learned:
            row[fact] = {"value": learned[fact], "from": "learned"}
        else:
            row[fact] = {"value": assumed.get(fact), "from": "assumed"}
    return row


# -- an upstream's list of models

_MOST_MODELS = 8192
_MOST_TOKENS = 1 << 30  # more is no window
_DEEP = 5
_NAMES = ("id", "name", "model", "aliases")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WINDOW = re.compile(
    r"context|window|(?:model|seq|sequence|position)\w*_len|max_length|n_ctx|num_ctx"
    r"|(?:max|limit)\w*(?:input|prompt)|(?:input|prompt)\w*(?:max|limit)"
)
_ANOTHER = re.compile(
    r"train|original|output|completion|generat|response|answer|pric|cost|per_|rate|minute|cach"
    r"|min_|default|byte|char|image|audio|video|file|size_b|over_|above|thresh|param|embed"
)


def stated_windows(body: bytes) -> dict[str, int]:
    """Tokens by the model's name, and by its normal name. One that the list names alone is also at "":
    some servers answer to any name."""
    try:
        listed = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(listed, Mapping):
        listed = next((listed[key] for key in ("data", "models") if isinstance(listed.get(key), list)), [])
    found: dict[str, int] = {}
    models = [one for one in listed[:_MOST_MODELS] if isinstance(one, Mapping)] if isinstance(listed, list) else []
    for model in models:
        window = _window(model)
        if window is None:
            continue
        for name in _names(model):
            for key in (name, normal_name(name)):
                found[key] = min(window, found.get(key, window))
        if len(models) == 1:
            found[""] = window
    return found


def window_of(model: str, stated: Mapping[str, int]) -> int | None:
    """By its own name, else by a spelling of it."""
    for name in (model, normal_name(model), ""):
        if name in stated:
            return stated[name]
    return None


def _names(model: Mapping[str, Any]) -> Iterator[str]:
    for key in _NAMES:
        value = model.get(key)
        yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str) and name)


def _window(model: Mapping[str, Any]) -> int | None:
    return min(
        (number for path, number in _numbers(model, "", _DEEP)
         if _WINDOW.search(path) and not _ANOTHER.search(path)),
        default=None,
    )  # fmt: skip


def _numbers(value: Any, path: str, deep: int) -> Iterator[tuple[str, int]]:
    """Every number that could be a window, with the keys that lead to it, in snake case."""
    if isinstance(value, Mapping) and deep:
        for key, one in value.items():
            yield from _numbers(one, f"{path}.{_CAMEL.sub('_', str(key)).lower()}", deep - 1)
    elif isinstance(value, list) and deep:
        for one in value[:64]:
            yield from _numbers(one, path, deep - 1)
    elif isinstance(value, (int, float)) and LEAST_WINDOW_TOKENS <= value <= _MOST_TOKENS:
        yield path, int(value)
