"""The counter: how large a text, a message, a part or a tools array is for a model.

Promises: no network (litellm ships the encodings), counts by OpenAI's published rules, never below
them for text, and never an exception for a model nobody has heard of. A tools array counts by the
cookbook's num_tokens_for_tools, carried on into nested schemas so that no word of one is left out; for
other providers as its JSON, which is what their chat templates render. Counting is the slowest step of
a request (about 20 MB/s, all of it tiktoken's), so callers count a message once in its life. litellm's
own counter takes seconds to import and sums a whole request at once.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from proxy.tokens.cards import LITELLM_DIR, load_table, plain_name
from proxy.tokens.media import (
    ImageRule,
    Text,
    count_medium,
    count_speech,
    image_rule,
    largest_medium,
)

# Must be set before tiktoken loads an encoding, or it asks the network.
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(LITELLM_DIR / "litellm_core_utils" / "tokenizers"))

import tiktoken

log = logging.getLogger(__name__)

DEFAULT_ENCODING = "o200k_base"
PER_MESSAGE = 4  # start, separator, end: OpenAI bills 3, and the role's token
PER_REPLY = 3  # every reply is primed with <|start|>assistant<|message|>
PER_NAME = 1
PER_TOOL_CALL = 3  # not published: one message's overhead beside id, name and arguments
ENCRYPTED_CHARS_PER_TOKEN = 4  # of reasoning that only its provider can read
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))  # one token
_SIGNED = "__thought__"  # litellm: "call_1__thought__<Gemini's signature>"
_CHUNK_CHARS = 100_000  # longest text handed to the encoder at once; bounds its worst case
# Encodings whose tokens end behind a line break, unless another one or a slash follows.
_BROKEN_BY_LINES = ("o200k_base", "cl100k_base")

_MOST_MARKS = 16  # behind a text's last word
_LAST_WORD = re.compile(r"[0-9A-Za-z](?=[!-/:-@\[-`{-~]{0,8}\Z)")
_BEGINS_WITH_WORD = re.compile(r"[0-9A-Za-z]").match

_loaded: set[str] = set()  # encodings, in this process

_PER_TOOLS = 12  # the namespace around a tools array ("func_end")
_PER_TOOL = 8  # around the JSON of one
_PROP_INIT = 3
_PROP_KEY = 3
_ENUM_INIT = -3
_ENUM_ITEM = 3
_MAX_DEPTH = 24  # a schema nested deeper is counted as its JSON
_BRANCHES = ("anyOf", "oneOf", "allOf", "prefixItems")
_DEFINITIONS = ("$defs", "definitions")
# Read by the rule itself, or rendered as a mark ("?") or not at all.
_STRUCTURE = frozenset(
    """
    type description properties items enum required additionalProperties $schema $id $ref title
    strict nullable
    """.split()
) | {*_BRANCHES, *_DEFINITIONS}

# Every medium's part has one of these words as its type or as a key (an escaped letter counts as
# one too), and an answer's sound has "audio". A word that is something else only adds.
_MEDIUM_WORD = re.compile(rb'"(image|input_|audio|video|file|document"|output_audio")')
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])")


@dataclass(frozen=True, slots=True)
class ToolRule:
    """`published`: OpenAI's rule, else JSON; `overhead`: tokens around any tools array."""

    name: str
    published: bool
    overhead: int = _PER_TOOLS


_OPENAI = ToolRule("", True)
_JSON = ToolRule("json-tools", False)
# Anthropic puts a system prompt of its own before the tools (tool_choice auto: 346 tokens).
_CLAUDE = ToolRule("claude-tools", False, 346)
_OPENAI_MODELS = ("gpt-*", "chatgpt-*", "o[1-9]", "o[1-9]-*", "computer-use-*", "codex-*")


@lru_cache(maxsize=1024)
def _tool_rule(model: str) -> ToolRule:
    """The rule of a model's provider, by the model's name."""
    name = plain_name(model)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _OPENAI_MODELS):
        return _OPENAI
    return _CLAUDE if "claude" in name else _JSON


class TokenCounter:
    """Counts with one tiktoken encoding and one family's rules. Thread-safe.

    `name` identifies the rules: counters of the same name give the same counts.
    """

    def __init__(self, encoding_name: str, images: ImageRule, tool: ToolRule) -> None:
        self.encoding_name = encoding_name
        self.images = images
        self.tools_overhead = tool.overhead
        self._tool = tool
        self._func_init = 7 if encoding_name == DEFAULT_ENCODING else 10  # gpt-4o, gpt-4
        self.name = "/".join(filter(None, (encoding_name, images.name, tool.name)))
        encoding = tiktoken.get_encoding(encoding_name)
        encoding._mergeable_ranks = {}  # 27 MB, which only a copy of it would need
        self._encode = encoding.encode_ordinary
        self._closing = lru_cache(256)(self._closing_of)
        _loaded.add(encoding_name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenCounter) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def text(self, text: str) -> int:
        """Tokens of a text; special tokens in it count as plain text."""
        if len(text) <= _CHUNK_CHARS:
            return len(self._encode(text))
        cuts = range(0, len(text), _CHUNK_CHARS)
        return sum(len(self._encode(text[i : i + _CHUNK_CHARS])) for i in cuts)

    def adds_lines(self, text: str, chars: int) -> bool:
        """Whether the tokens of `chars` of lines in front of `text`, each counted with its line break, add to its own."""
        if self.encoding_name not in _BROKEN_BY_LINES or len(text) + chars > _CHUNK_CHARS:
            return False
        return bool(text) and text[0] not in "\r\n/"

    def quoting(self, text: str, tokens: int, line: str) -> int:
        """Tokens of a line with its line break; `text`, which it mostly ends with in quotes, has so many alone. These
        encodings begin a token behind such a quotation mark, and where the marks begin behind the last word."""
        end = _LAST_WORD.search(text, max(0, len(text) - _MOST_MARKS))
        if end is None or self.encoding_name not in _BROKEN_BY_LINES or not _BEGINS_WITH_WORD(text):
            return self.text(line)
        if len(text) > _CHUNK_CHARS or not line.endswith(f' "{text}"\n'):  # something in it is escaped
            return self.text(line)
        return self.text(line[: -len(text) - 2]) + tokens + self._closing(text[end.end() :])

    def _closing_of(self, marks: str) -> int:
        """What a quotation mark and a line break behind these add to their tokens."""
        return self.text(f'{marks}"\n') - self.text(marks)

    def message(self, message: Mapping[str, Any]) -> int:
        """Tokens of one Chat Completions message with its overhead (without the reply primer)."""
        content, role = message.get("content"), message.get("role")
        total = PER_MESSAGE
        if isinstance(role, str) and role not in _ROLES:
            total += self.text(role)
        if isinstance(content, str):
            total += self.text(content)
            if len(message) == 2 and role is not None:
                return total
        elif isinstance(content, list):
            total += sum(self.part(part) for part in content)
        return total + self._beside_content(message)

    def _beside_content(self, message: Mapping[str, Any]) -> int:
        total = 0
        for key in ("name", "refusal", "reasoning_content", "reasoning", "tool_call_id"):
            value = message.get(key)
            if isinstance(value, str) and value:
                value = _unsigned(value) if key == "tool_call_id" else value
                total += PER_NAME + self.text(value)
        calls = message.get("tool_calls") or ()
        for call in calls if isinstance(calls, list) else ():
            total += PER_TOOL_CALL + self._call(call)
        legacy = message.get("function_call")
        if legacy:
            total += PER_TOOL_CALL + self._call({"function": legacy})
        for item in message.get("reasoning_items") or ():  # of the Responses bridge
            if isinstance(item, Mapping) and isinstance(item.get("encrypted_content"), str):
                total += len(item["encrypted_content"]) // ENCRYPTED_CHARS_PER_TOKEN
        audio = message.get("audio")
        return total + (count_speech(audio, self.text) if isinstance(audio, Mapping) else 0)

    def _call(self, call: Any) -> int:
        body = (call.get("function") or call.get("custom")) if isinstance(call, Mapping) else None
        if not isinstance(body, Mapping):
            return self.text(compact(call))
        words = (_unsigned(call.get("id")), body.get("name"), body.get("arguments"), body.get("input"))
        return sum(self.text(word if isinstance(word, str) else compact(word)) for word in words if word is not None)

    def part(self, part: Any) -> int:
        """Tokens of one content part, by the family's rule for its kind."""
        if not isinstance(part, Mapping):
            return self.text(str(part))
        if part.get("type") not in ("text", "refusal"):
            tokens = count_medium(part, self.images, self.text)
            if tokens is not None:
                return tokens
        text = part.get("text", part.get("refusal"))
        return self.text(text if isinstance(text, str) else compact(part))

    def tools(self, tools: Sequence[Any]) -> int:
        """Tokens of a tools array; also of legacy functions and of other JSON in the prompt."""
        return _count_tools(tools, self._tool, self._func_init, self.text)


def _unsigned(call_id: Any) -> Any:
    """A call's id without the signature that litellm hangs on it: Gemini is told it as one, not as text."""
    return call_id.partition(_SIGNED)[0] if isinstance(call_id, str) else call_id


def tokens_upper_bound(body: bytes, counter: TokenCounter) -> int:
    """A count that a request body can never exceed, without parsing it.

    Every token of text has at least one byte, and so has all overhead of a message with a role; a
    medium costs at most `largest_medium` more, `tools` and `functions` the provider's own words.
    """
    other = largest_medium(counter.images)
    words = _MEDIUM_WORD.findall(body)
    images = words.count(b"image")
    others = len(words) - images
    if b"\\u00" in body:
        others += len(_ESCAPED_LETTER.findall(body))
    # The words of an answer's sound count three times: as text, and as two tokens a character.
    spoken = 3 if others and (b'"transcript"' in body or b"\\u00" in body) else 1
    return len(body) * spoken + images * counter.images.max_tokens + others * other + 2 * counter.tools_overhead


@lru_cache(maxsize=64)
def _counter(encoding_name: str, images: ImageRule, tool: ToolRule) -> TokenCounter:
    return TokenCounter(encoding_name, images, tool)


@lru_cache(maxsize=1024)
def _encoding_of(model: str) -> str | None:
    try:
        return tiktoken.encoding_name_for_model(plain_name(model))
    except KeyError:
        return None


def encoding_is_known(model: str) -> bool:
    """Whether the encoding of the model is known; that of any other is taken for DEFAULT_ENCODING."""
    return _encoding_of(model) is not None


def encoding_is_loaded(model: str, tokenizer: str | None = None) -> bool:
    """Whether `get_counter` reads no file."""
    return (tokenizer or _encoding_of(model) or DEFAULT_ENCODING) in _loaded


def get_counter(model: str, tokenizer: str | None = None) -> TokenCounter:
    """The counter for a model; `tokenizer` (an encoding's name) overrides what its name says."""
    name = tokenizer or _encoding_of(model) or DEFAULT_ENCODING
    images, tool = image_rule(model), _tool_rule(model)
    try:
        return _counter(name, images, tool)
    except (ValueError, OSError):  # unknown, or one that tiktoken would have to download
        log.warning("no local file for the encoding %r: counting with %s", name, DEFAULT_ENCODING)
        return _counter(DEFAULT_ENCODING, images, tool)


def load() -> None:
    """What the first request of a process would read: 0.3 s for the encoding that most models have."""
    load_table()
    get_counter("").text("")


# ---------------------------------------------------------------- tools


def _count_tools(tools: Sequence[Any], rule: ToolRule, func_init: int, text: Text) -> int:
    if not tools:
        return 0
    total, overhead = 0, _PER_TOOLS
    for tool in tools:
        function = _function(tool)
        if function is not None:
            overhead = rule.overhead
        if function is None or not rule.published:
            total += _PER_TOOL + text(compact(tool))
        else:
            total += func_init + _function_tokens(function, text)
    return total + overhead


def compact(value: Any) -> str:
    """JSON without spaces; Python's own spelling of what JSON cannot say."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError):
        return str(value)


def _function(tool: Any) -> Mapping[str, Any] | None:
    """What the model is shown of a tool: a function's or a custom tool's own object."""
    if not isinstance(tool, Mapping):
        return None
    for key in ("function", "custom"):
        inner = tool.get(key)
        if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            return inner
    legacy = isinstance(tool.get("name"), str) and "parameters" in tool
    return tool if legacy else None


def _function_tokens(function: Mapping[str, Any], text: Text) -> int:
    total = text(f"{function['name']}:{_words(function)}")
    total += _schema(function.get("parameters"), text, 0)
    rest = {
        key: value
        for key, value in function.items()
        if key not in ("name", "description", "parameters", "strict", "type")
    }
    return total + (text(compact(rest)) if rest else 0)


def _schema(schema: Any, text: Text, depth: int) -> int:
    """What a schema holds beside its own name, type and description."""
    if not isinstance(schema, Mapping):
        return 0
    if depth >= _MAX_DEPTH:
        return text(compact(schema))
    total = 0
    for key in ("properties", *_DEFINITIONS):
        inner = schema.get(key)
        if isinstance(inner, Mapping) and inner:
            total += _PROP_INIT + _PROP_KEY * len(inner)
            total += sum(_named(f"{key}:", prop, text, depth + 1) for key, prop in inner.items())
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            total += _named("", schema[key], text, depth + 1)
    for key in _BRANCHES:
        inner = schema.get(key)
        for branch in inner if isinstance(inner, list) else ():
            total += 1 + _named("", branch, text, depth + 1)  # and the stroke between two
    total += _enum(schema.get("enum"), text)
    rest = {key: value for key, value in schema.items() if key not in _STRUCTURE}
    return total + (text(compact(rest)) if rest else 0)


def _named(head: str, schema: Any, text: Text, depth: int) -> int:
    """A property's schema behind its name; without one an array's items, one of several alternatives."""
    if not isinstance(schema, Mapping):
        return text(head + compact(schema))
    return text(f"{head}{_kind(schema)}:{_words(schema)}") + _schema(schema, text, depth)


def _enum(items: Any, text: Text) -> int:
    if not isinstance(items, list):
        return 0
    total = _ENUM_INIT
    for item in items:  # a number stands without quotation marks
        total += _ENUM_ITEM + text(item) if isinstance(item, str) else 1 + text(compact(item))
    return max(0, total)


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type", schema.get("$ref", ""))
    return "|".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _words(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description") or "").removesuffix(".")
