"""What a model is known not to take, and the table of it that people read. Pure.

Promises: a fact is an override (configuration), learned (a refusal said so) or assumed, in this
order; the same facts give the same capabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from proxy.conversation.limits import Limits

LEAST_WINDOW_TOKENS = 512  # a refusal that names less speaks of something else


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Beside `Limits`: what our own additions to a request may be, and the window that a refusal
    named (`window_tokens`: as upstream counts; `tokens_factor`: its tokens per counted one)."""

    stream_usage: bool = True  # stream_options.include_usage
    prompt_cache_key: bool = False
    mid_system: bool | None = None  # a second system message, or one after the beginning; None: who knows
    system_role: bool = True  # a system message at all
    alternate: bool = False  # user and assistant have to take turns
    window_tokens: int | None = None
    tokens_factor: float = 1.0


def capabilities(
    override: Mapping[str, Any], learned: Mapping[str, Any], assumed: Mapping[str, Any]
) -> Capabilities:
    """The mappings are of field names; None in an override means that it says nothing."""
    known = {**assumed, **learned, **{k: v for k, v in override.items() if v is not None}}
    window = known.get("window_tokens")
    factor = known.get("tokens_factor", 1.0)
    return Capabilities(
        stream_usage=bool(known.get("stream_usage", True)),
        prompt_cache_key=bool(known.get("prompt_cache_key", False)),
        mid_system=mid if isinstance(mid := known.get("mid_system"), bool) else None,
        system_role=known.get("system_role") is not False,
        alternate=known.get("alternate") is True,
        window_tokens=window if isinstance(window, int) and window >= LEAST_WINDOW_TOKENS else None,
        tokens_factor=factor if isinstance(factor, float) and factor > 0 else 1.0,
    )


def within(limits: Limits, window_tokens: int, max_tokens: int | None) -> Limits:
    """The limits in a window of so many counted tokens, when that is smaller.

    What is kept for the answer shrinks with it: at most a quarter of the window, but up to half of
    it when the client asks for that much (`max_tokens`).
    """
    if window_tokens >= limits.working_set.max_l0_tokens:
        return replace(limits, window_tokens=window_tokens, window_known=True)
    reserve = min(limits.working_set.reserved_tokens, window_tokens // 4)
    reserve = max(reserve, min(max_tokens or 0, window_tokens // 2))
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
