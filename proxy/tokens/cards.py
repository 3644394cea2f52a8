"""Model cards: how large a model's window is, and what its API accepts.

Promises: litellm's model table, read from its file without importing it; never an exception for a
model nobody has heard of.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec

log = logging.getLogger(__name__)

_LITELLM = importlib.util.find_spec("litellm")  # found, not imported: importing it takes seconds
LITELLM_DIR = Path(_LITELLM.origin).parent if _LITELLM and _LITELLM.origin else None
UNKNOWN_WINDOW_TOKENS = 32_000

Role = Literal["developer", "system"]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of a model: its input window in tokens, and what its API accepts."""

    window_tokens: int
    known: bool
    tools: bool
    developer_role: Role


class _Row(msgspec.Struct):
    max_input_tokens: float | str | None = None
    max_tokens: float | str | None = None
    litellm_provider: str = ""
    mode: str = ""
    supports_function_calling: bool = False


@lru_cache(maxsize=1)
def _table() -> dict[str, msgspec.Raw]:
    if LITELLM_DIR is None:
        return {}
    data = (LITELLM_DIR / "model_prices_and_context_window_backup.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, msgspec.Raw])


def _row(model: str) -> _Row | None:
    table = _table()
    for name in (model, model.rsplit("/", 1)[-1]):
        raw = table.get(name)
        if raw is not None:
            return msgspec.json.decode(raw, type=_Row)
    return None


@lru_cache(maxsize=1024)
def model_card(model: str) -> ModelCard:
    """The card from litellm's local table; an unknown model gets 32,000 tokens and one warning."""
    row = _row(model)
    window = row and (row.max_input_tokens or row.max_tokens)
    if row is None or not isinstance(window, (int, float)):
        log.warning(
            "model %r is not in litellm's table: assuming a window of %d tokens; set"
            " models.<name>.window_tokens or tiers.l0.tokens to its real one",
            model,
            UNKNOWN_WINDOW_TOKENS,
        )
        return ModelCard(UNKNOWN_WINDOW_TOKENS, False, True, "system")
    role: Role = "developer" if row.litellm_provider == "openai" and _takes_developer(model) else (
        "system"
    )
    return ModelCard(int(window), True, row.supports_function_calling, role)


def _takes_developer(model: str) -> bool:
    """gpt-3.5 and the first gpt-4 know only `system`; o1-mini and o1-preview know neither."""
    old = ("gpt-3.5*", "gpt-4", "gpt-4-*", "o1-mini*", "o1-preview*")
    return not any(fnmatch.fnmatch(model.rsplit("/", 1)[-1], pattern) for pattern in old)
