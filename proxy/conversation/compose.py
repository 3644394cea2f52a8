"""Writes what goes upstream and what goes back, changing only what has to change. Pure.

Promises: every field that is not ours keeps the client's bytes and place; a response keeps the
upstream's fields; several rounds look like one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from proxy.conversation.body import Fields

_encode = msgspec.json.encode


def request_body(
    fields: Fields, order: Sequence[str], messages: bytes, changed: Mapping[str, bytes | None]
) -> bytes:
    """The client's body with other messages and with `changed` fields (None: left out)."""
    pieces: list[bytes] = []
    for name in order:
        if name == "messages":
            value: bytes | None = messages
        elif name in changed:
            value = changed[name]
        else:
            value = bytes(fields[name])
        if value is not None:
            pieces.append(_encode(name) + b":" + value)
    for name, value in changed.items():
        if name not in fields and value is not None:
            pieces.append(_encode(name) + b":" + value)
    return b"{" + b",".join(pieces) + b"}"


def with_context(message: dict[str, Any], block: str) -> dict[str, Any]:
    """A user message with a <VM:CONTEXT> block in front of the user's own text."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [{"type": "text", "text": block}, *content]}
    return {**message, "content": f"{block}\n\n{content or ''}"}


def as_input(message: dict[str, Any]) -> dict[str, Any]:
    """An answer as a request may carry it: without the null and empty fields of a response."""
    kept = {k: v for k, v in message.items() if v is not None and v != []}
    kept.pop("index", None)
    kept.setdefault("role", "assistant")
    if "content" not in kept:
        kept["content"] = None if kept.get("tool_calls") or kept.get("function_call") else ""
    return kept


def total_usage(usages: Sequence[Mapping[str, Any] | None], faults: int) -> dict[str, Any] | None:
    """One usage for several rounds.

    `prompt_tokens` is the last round's (clients use it as a gauge), `completion_tokens` the sum;
    what all rounds were billed stands in `vm`. None when upstream gave none.
    """
    known = [usage for usage in usages if usage]
    if not known:
        return None
    last = dict(known[-1])
    completion = sum(int(usage.get("completion_tokens") or 0) for usage in known)
    prompt = int(last.get("prompt_tokens") or 0)
    last["completion_tokens"] = completion
    last["total_tokens"] = prompt + completion
    last["vm"] = {
        "rounds": len(usages),
        "faults": faults,
        "prompt_tokens": sum(int(usage.get("prompt_tokens") or 0) for usage in known),
        "cached_tokens": sum(_cached(usage) for usage in known),
        "completion_tokens": completion,
    }
    return last


def _cached(usage: Mapping[str, Any]) -> int:
    details = usage.get("prompt_tokens_details")
    return int(details.get("cached_tokens") or 0) if isinstance(details, dict) else 0


def response_body(
    response: dict[str, Any], first: dict[str, Any], shown: dict[str, Any], finish_reason: str | None,
    usage: dict[str, Any] | None,
) -> bytes:
    """The last round's response as the client sees it, under the first round's identity."""
    choice = {**response["choices"][0], "message": shown, "finish_reason": finish_reason}
    same = {k: first[k] for k in ("id", "created", "model") if k in first}
    return _encode({**response, **same, "choices": [choice], **({"usage": usage} if usage else {})})
