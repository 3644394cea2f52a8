"""What a refusal of a request that we changed allows and teaches. Pure.

Promises: only a refusal that our changes may have caused is tried again without them, and only when
the unchanged request would fit the model (invariant 1).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from proxy.conversation.effects import Refused
from proxy.conversation.limits import Limits

_READ_CHARS = 4000
_REFUSES = r"(?:not (?:support|allow|accept|permit|implement|available|enabled)|n't (?:support|allow|accept)" \
    r"|requires --|unsupported|unknown|unrecogni[sz]ed|invalid|unexpected|no support)"
_NO_TOOLS = re.compile(
    rf"{_REFUSES}[^.]{{0,60}}\b(?:tools?|functions?|function[ _]calling|tool[ _]choice)\b(?!\[)"
    rf"|\b(?:tools?|functions?|function[ _]calling|tool[ _]choice)\b(?!\[)[^.]{{0,60}}{_REFUSES}"
)
_NO_DEVELOPER = re.compile(rf"developer[^.]{{0,80}}{_REFUSES}|{_REFUSES}[^.]{{0,80}}developer")
_REPAIRABLE = (400, 404, 413, 415, 422)  # refusals that our own changes may have caused


def repairable(refused: Refused) -> bool:
    """The unchanged request may do better."""
    return refused.status in _REPAIRABLE


def unchanged_fits(tokens: int, limits: Limits) -> bool:
    """A request of so many tokens fits the model, as far as its window is known."""
    return not limits.window_known or tokens < limits.window_tokens


def learn(refusal: bytes, limits: Limits) -> dict[str, Any]:
    """What a refusal of our request says about the model (only true if the unchanged one passes).

    Only a sentence that says what the model does not take counts, not any that names a tool.
    """
    text = _sentence(refusal).lower()[:_READ_CHARS]
    if limits.developer_role == "developer" and _NO_DEVELOPER.search(text):
        return {"developer_role": "system"}
    return {"tools": False} if _NO_TOOLS.search(text) else {}


def _sentence(refusal: bytes) -> str:
    """The error's own words: its type ("invalid_request_error") says nothing."""
    try:
        error = msgspec.json.decode(refusal)["error"]
        return f"{error['message']} {error.get('param') or ''}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return refusal.decode("utf-8", "replace")
