"""What a request says that no answer depends on, and what a provider cannot be told. Pure.

Promises: a field at OpenAI's default, and a hint for OpenAI's own house (its cache, its abuse
checks, its guess at the answer), may be left out at a provider that has no such field; what would
change the answer is never left out here, but refused with a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from proxy.errors import ApiError

Json = dict[str, Any]

HINTS: Final = frozenset(
    (
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
    )
)


def without_idle(fields: Json, defaults: Mapping[str, tuple[Any, ...]]) -> Json:
    """The request, or a copy without hints and without those of `defaults` that have a value of theirs."""
    idle = {
        name
        for name, value in fields.items()
        if name in HINTS or any(value == idle for idle in defaults.get(name, ()))
    }
    return {k: v for k, v in fields.items() if k not in idle} if idle else fields


def has_custom_tools(fields: Json) -> bool:
    """OpenAI's tools without a schema are among those on offer."""
    return any(isinstance(tool, dict) and "custom" in tool for tool in fields.get("tools") or ())


def refused(who: str, what: str, param: str) -> ApiError:
    """For what cannot be said to `who`."""
    return ApiError(
        400,
        f"{who}'s models do not take {what}. Remove them, or choose another model.",
        code="unsupported_value",
        param=param,
    )
