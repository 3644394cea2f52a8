"""A bill as JSON: what was billed, beside what the same turns would have been billed otherwise.

Promises: tokens are upstream's own (`proxy.conversation.bill` says how the two others follow); money is by
litellm's list prices, and `null` as soon as one of the models has none there; a conversation of any length
is answered from one record, its latest breaks from one more each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from proxy.conversation.bill import Break, Sums, Tokens
from proxy.conversation.records import GetRecord, Record
from proxy.memory.ids import make_page_id
from proxy.tokens import prices

_LATEST_BREAKS = 50
_USD_DIGITS = 6


def bill_of(sums: Iterable[Sums], breaks: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The turns, three bills for them, and the breaks of the cache by reason."""
    sums = list(sums)
    sides = {
        "llm_pager": [(one.model, one.ours) for one in sums],
        "sliding_window": [(one.model, one.sliding) for one in sums],
        "full_history": [(one.model, one.full) for one in sums],
    }
    return {
        "turns": sum(one.turns for one in sums),
        "turns_without_usage": sum(one.unbilled for one in sums),
        **{name: _side(side) for name, side in sides.items()},
        "cache_breaks": {
            reason: {"turns": turns, "lost_tokens": lost} for reason, (turns, lost) in sorted(breaks.items())
        },
    }


def _side(side: list[tuple[str, Tokens]]) -> dict[str, Any]:
    return {
        "prompt_tokens": sum(tokens.prompt for _, tokens in side),
        "cached_tokens": sum(tokens.cached for _, tokens in side),
        "written_tokens": sum(tokens.written for _, tokens in side),
        "completion_tokens": sum(tokens.completion for _, tokens in side),
        "billed_prompt_tokens": sum(tokens.billed(model) for model, tokens in side),
        "cost_usd": _cost_usd(side),
    }


def _cost_usd(side: list[tuple[str, Tokens]]) -> float | None:
    total = 0.0
    for model, tokens in side:
        price = prices(model)
        if price is not None:
            total += tokens.billed(model) * price.prompt + tokens.completion * price.completion
        elif tokens != Tokens():
            return None
    return round(total, _USD_DIGITS)


def conversation_bill(head: Record, get: GetRecord) -> dict[str, Any]:
    """The bill of the path that ends with `head`."""
    account = head.account
    if account is None:  # stored before there were accounts
        return {**bill_of((), {}), "models": [], "latest_breaks": []}
    return {
        **bill_of(account.sums, account.breaks),
        "models": [_model(one) for one in account.sums],
        "latest_breaks": [_broke(one) for one in _latest(head, get)],
    }


def _model(sums: Sums) -> dict[str, Any]:
    price = prices(sums.model)
    usd = None
    if price is not None:
        usd = {name: round(value * 1e6, _USD_DIGITS) for name, value in price._asdict().items()}
    return {
        "model": sums.model, "turns": sums.turns, "turns_without_usage": sums.unbilled,
        "usd_per_million_tokens": usd,
    }  # fmt: skip


def _broke(one: Break) -> dict[str, Any]:
    return {
        "turn": one.turn, "reason": one.reason.value,
        "message": make_page_id(one.message) if one.message >= 0 else None,
        "lost_tokens": one.lost_tokens if one.lost_tokens >= 0 else None,
    }  # fmt: skip


def _latest(head: Record, get: GetRecord) -> Iterable[Break]:
    """The newest first."""
    at: Record | None = head
    for _ in range(_LATEST_BREAKS + 1):
        account = at.account if at is not None else None
        if account is None:
            return
        if account.broke is not None:
            yield account.broke
        if not account.broken:
            return
        at = get(account.broken)
