"""Token counts and model cards: how large a text, a message or a tools array is for a model.

Promises: no network (litellm ships the encodings and the model table, read from its files
without importing it), counts by OpenAI's published rules, never below them for text, and never an
exception for a model nobody has heard of. Counting is the slowest step of a request (about
20 MB/s), so callers count a message once in its life.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

log = logging.getLogger(__name__)

_LITELLM = importlib.util.find_spec("litellm")  # found, not imported: importing it takes seconds
_LITELLM_DIR = Path(_LITELLM.origin).parent if _LITELLM and _LITELLM.origin else None
if _LITELLM_DIR:  # must be set before tiktoken loads an encoding, or it asks the network
    os.environ.setdefault(
        "TIKTOKEN_CACHE_DIR", str(_LITELLM_DIR / "litellm_core_utils" / "tokenizers")
    )

import tiktoken  # noqa: E402

DEFAULT_ENCODING = "o200k_base"
UNKNOWN_WINDOW_TOKENS = 32_000
PER_MESSAGE = 4  # start, role, separator, end: OpenAI bills 3 and the role's token
PER_REPLY = 3  # every reply is primed with <|start|>assistant<|message|>
PER_TOOL_CALL = 8  # id, type and braces of one call, beside its name and arguments
PER_TOOLS = 12  # the namespace around a tools array
PER_TOOL = 8
IMAGE_TOKENS_LOW = 85  # tile rule of gpt-4o, detail: low
IMAGE_TOKENS_HIGH = 1445  # its maximum: 85 + 8 tiles of 170
AUDIO_TOKENS_PER_KB = 2  # 10 tokens a second of 16 kHz mono PCM16, base64 included
FILE_TOKENS_PER_KB = 80
_CHUNK_CHARS = 100_000  # longest text handed to the encoder at once; bounds its worst case


def tokens_upper_bound(body: bytes) -> int:
    """A count that a request body of text can never exceed: every token has at least one byte."""
    media = body.count(b'"image_url"') + body.count(b'"input_audio"') + body.count(b'"file"')
    return len(body) + media * IMAGE_TOKENS_HIGH


class TokenCounter:
    """Counts with one tiktoken encoding. Thread-safe; creating one is cheap after the first."""

    def __init__(self, encoding_name: str) -> None:
        self.encoding_name = encoding_name
        self._encode = tiktoken.get_encoding(encoding_name).encode_ordinary

    def text(self, text: str) -> int:
        """Tokens of a text; special tokens in it count as plain text."""
        if len(text) <= _CHUNK_CHARS:
            return len(self._encode(text))
        cuts = range(0, len(text), _CHUNK_CHARS)
        return sum(len(self._encode(text[i : i + _CHUNK_CHARS])) for i in cuts)

    def message(self, message: Mapping[str, Any]) -> int:
        """Tokens of one Chat Completions message with its overhead (without the reply primer)."""
        total = PER_MESSAGE + self._content(message.get("content"))
        for key in ("name", "refusal", "reasoning_content", "reasoning", "tool_call_id"):
            value = message.get(key)
            if isinstance(value, str) and value:
                total += 1 + self.text(value)
        calls = message.get("tool_calls") or ()
        for call in calls if isinstance(calls, list) else ():
            total += PER_TOOL_CALL + self.text(_compact(call))
        if message.get("function_call"):
            total += PER_TOOL_CALL + self.text(_compact(message["function_call"]))
        return total

    def _content(self, content: Any) -> int:
        if isinstance(content, str):
            return self.text(content)
        if not isinstance(content, list):
            return 0
        return sum(self._part(part) for part in content)

    def _part(self, part: Any) -> int:
        if not isinstance(part, dict):
            return self.text(str(part))
        kind = part.get("type")
        if kind == "image_url":
            image = part.get("image_url")
            low = isinstance(image, dict) and image.get("detail") == "low"
            return IMAGE_TOKENS_LOW if low else IMAGE_TOKENS_HIGH
        if kind == "input_audio":
            return 1 + len(_compact(part)) * AUDIO_TOKENS_PER_KB // 1024
        if kind == "file":
            return 1 + len(_compact(part)) * FILE_TOKENS_PER_KB // 1024
        text = part.get("text", part.get("refusal"))
        return 1 + self.text(text if isinstance(text, str) else _compact(part))

    def tools(self, tools: Sequence[Any]) -> int:
        """Tokens of a tools array. Its JSON is longer than what the provider renders of it."""
        if not tools:
            return 0
        return PER_TOOLS + sum(PER_TOOL + self.text(_compact(tool)) for tool in tools)


def _compact(value: Any) -> str:
    return msgspec.json.encode(value).decode()


@lru_cache(maxsize=8)
def _counter(encoding_name: str) -> TokenCounter:
    return TokenCounter(encoding_name)


@lru_cache(maxsize=1024)
def encoding_of(model: str) -> str:
    """The encoding of an OpenAI model, or o200k_base for any other."""
    name = model.rsplit("/", 1)[-1]
    try:
        return tiktoken.encoding_name_for_model(name)
    except KeyError:
        return DEFAULT_ENCODING


def get_counter(model: str, tokenizer: str | None = None) -> TokenCounter:
    """The counter for a model; `tokenizer` (an encoding's name) overrides what its name says."""
    name = tokenizer or encoding_of(model)
    try:
        return _counter(name)
    except (ValueError, OSError):  # unknown, or one that tiktoken would have to download
        log.warning("no local file for the encoding %r: counting with %s", name, DEFAULT_ENCODING)
        return _counter(DEFAULT_ENCODING)


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
    if _LITELLM_DIR is None:
        return {}
    data = (_LITELLM_DIR / "model_prices_and_context_window_backup.json").read_bytes()
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


Count = Callable[[str], int]
