"""What a refusal of a request that we changed allows and teaches. Pure.

Promises: only a refusal that our changes may have caused is tried again without them, and only when
the unchanged request would fit the model (invariant 1).
"""

from __future__ import annotations

from typing import Any

from proxy.conversation.effects import Refused
from proxy.conversation.limits import Limits

_REPAIRABLE = (400, 404, 413, 415, 422)  # refusals that our own changes may have caused


def repairable(refused: Refused) -> bool:
    """The unchanged request may do better."""
    return refused.status in _REPAIRABLE


def unchanged_fits(tokens: int, limits: Limits) -> bool:
    """A request of so many tokens fits the model, as far as its window is known."""
    return not limits.window_known or tokens < limits.window_tokens


def learn(refusal: bytes, limits: Limits) -> dict[str, Any]:
    """What a refusal of our request says about the model (only true if the unchanged one passes)."""
    text = refusal.decode("utf-8", "replace").lower()
    if "developer" in text and limits.developer_role == "developer":
        return {"developer_role": "system"}
    if "tool" in text or "function" in text:
        return {"tools": False}
    return {}
