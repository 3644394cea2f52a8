"""What a model is known not to take, and the table of it that people read. Pure.

Promises: a fact is an override (configuration), learned (a refusal said so) or assumed, in this
order; the same facts give the same capabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from proxy.conversation.limits import Limits

LEAST_WINDOW_TOKENS = 512  # a refusal that names less speaks of something else
LARGE_TOKENS = 1000  # a smaller request fits every model that is in use
_GROWTH = 1.25  # of a guessed window that a request has filled and passed


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


def capabilities(
    override: Mapping[str, Any], learned: Mapping[str, Any], assumed: Mapping[str, Any]
) -> Capabilities:
    """The mappings are of field names; None in an override means that it says nothing."""
    known = {**assumed, **learned, **{k: v for k, v in override.items() if v is not None}}
    window = known.get("window_tokens")
    return Capabilities(
        stream_usage=bool(known.get("stream_usage", True)),
        prompt_cache_key=bool(known.get("prompt_cache_key", False)),
        mid_system=mid if isinstance(mid := known.get("mid_system"), bool) else None,
        system_role=known.get("system_role") is not False,
        alternate=known.get("alternate") is True,
        window_tokens=window if isinstance(window, int) and window >= LEAST_WINDOW_TOKENS else None,
        refused_tokens=int(known.get("refused_tokens") or 0),
    )


def within(limits: Limits, window_tokens: int) -> Limits:
    """The limits in a window of so many counted tokens, when that is smaller.

    What is kept for the answer shrinks with it: at most a quarter of the window.
    """
    if window_tokens >= limits.working_set.max_l0_tokens:
        return replace(limits, window_tokens=window_tokens, window_known=True)
    reserve = min(limits.working_set.reserved_tokens, window_tokens // 4)
    smaller = {"max_l0_tokens": window_tokens, "reserved_tokens": reserve}
    working_set = limits.working_set.model_copy(update=smaller)
    return replace(
        limits, working_set=working_set, window_tokens=window_tokens, window_known=True
    )


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
